"""What hangs on a champion that has variants: the split and the mirror, and the name under which each version answers.

Rule: nothing here waits, so no request meets half of a change.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.catalog import ServedVersion
from gateway.config_release import Canary, Shadow
from gateway.core.request import InferRequest
from gateway.core.shadow_comparison import Tolerance
from gateway.core.traffic_split import SplitRule
from gateway.traffic import Chance
from gateway.traffic_shadow import Mirror, ShadowRule
from gateway.variants_wanted import ModelVariants

Infer = Callable[[ServedVersion, InferRequest], None]


def hang_split(model: ModelVariants, champion: ServedVersion) -> None:
    """Requests without a version meet the split of the model, if it has a canary."""
    variant = model.variants.get("canary")
    if variant is None or variant.same or not isinstance(variant.keys, Canary):
        champion.split, model.split.canary = None, None
        return
    keys = variant.keys
    model.split.rule = SplitRule.of(model.name, variant.percent, keys.header, keys.sticky)
    model.split.canary = variant.version
    if variant.version is not None:
        show(variant.version, "canary")
    champion.split = model.split


def hang_mirror(model: ModelVariants, champion: ServedVersion, infer: Infer, chance: Chance) -> None:
    """Copies go to the shadow, if there is one. `infer`: how they get there."""
    variant, mirror = model.variants.get("shadow"), champion.mirror
    shadow = variant.version if variant is not None else None
    if variant is None or shadow is None or not isinstance(variant.keys, Shadow):
        if mirror is not None:
            mirror.close()
        champion.mirror = None
        return
    show(shadow, "shadow")
    keys = variant.keys
    rule = ShadowRule(variant.percent / 100, Tolerance(keys.rtol, *([] if keys.atol is None else [keys.atol])))
    if mirror is not None and mirror.shadow is shadow and mirror.rule.tolerance == rule.tolerance:
        mirror.rule = rule
        return
    if mirror is not None:
        mirror.close()
    champion.mirror = Mirror(champion, shadow, rule, infer, chance)


def unhang(version: ServedVersion) -> None:
    """It is the champion no more."""
    version.split = None
    if version.mirror is not None:
        version.mirror.close()
        version.mirror = None
    show(version, "")


def show(version: ServedVersion, variant: str) -> None:
    """What its answers call it; codecs have that in their headers."""
    if version.variant != variant:
        version.variant = variant
        version.http_codec = version.grpc_codec = None
