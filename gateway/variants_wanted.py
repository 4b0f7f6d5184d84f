"""What is wanted beside one model's champion, what became of it, and how people are shown that."""

from __future__ import annotations

import asyncio
from typing import Any, Final, Literal

from gateway.catalog import ServedVersion
from gateway.config import ModelEntry
from gateway.config_release import Canary, Shadow
from gateway.core.traffic_split import SplitRule
from gateway.traffic import Chance, Split
from gateway.traffic_shadow import MirrorStatistics
from gateway.variants_status import CanaryStatus, ShadowStatus, TrafficStatus

AGAIN_S: Final = 15.0
"""Between two attempts at a variant whose source could not be reached; before the second attempt to load one."""
MOST_PAUSE_S: Final = 900.0

VariantRole = Literal["canary", "shadow"]
ROLES: Final[tuple[VariantRole, ...]] = ("canary", "shadow")


class WantedVariant:
    """One wanted variant of one model, and what became of it."""

    def __init__(self, role: VariantRole, keys: Canary | Shadow, settings: object) -> None:
        self.role = role
        self.keys = keys
        self.settings = settings
        """What it is loaded with: where that changes it is loaded anew, whatever its source means."""
        self.percent = keys.percent
        """Share of the requests now; an operator may have changed it."""
        self.version: ServedVersion | None = None
        self.identity = ""
        """Of what is loaded."""
        self.refused = ""
        """Identity of what was found last and could not be taken."""
        self.reason = "it is not loaded yet"
        self.told = ""
        """Trouble that the log has heard of."""
        self.same = False
        """Whether it is out because the champion is the very same version."""
        self.due = 0.0
        """When its source is asked again, monotonic seconds; infinite: not before something changes."""
        self.failures = 0
        """Loads one after the other that ended for reasons which may be over soon."""
        self.looked: object = None
        """How the files looked that were refused; None: nothing on disk was."""
        self.task: asyncio.Task[None] | None = None
        """It is being brought about."""

    def out(self, reason: str, *, same: bool = False) -> None:
        self.version, self.reason, self.same = None, reason, same

    def pause_s(self) -> float:
        """Until the next attempt, after another one failed for a reason that may be over soon: loading takes memory and
        a core, so each pause is twice the one before."""
        self.failures += 1
        return min(AGAIN_S * 2.0 ** min(self.failures - 1, 16), MOST_PAUSE_S)


class ModelVariants:
    """What is wanted beside one model's champion, and who is there."""

    def __init__(self, name: str, chance: Chance) -> None:
        self.name = name
        self.entry = ModelEntry(source=name)
        self.variants: dict[VariantRole, WantedVariant] = {}
        self.split = Split(name, SplitRule(0.0), chance)
        self.champion: ServedVersion | None = None
        """On whom the split and the mirror hang."""

    def status(self) -> TrafficStatus:
        champion = self.champion
        return TrafficStatus(
            self.name,
            champion.version if champion is not None else "",
            champion.chosen if champion is not None else 0,
            self._canary_status(),
            self._shadow_status(),
        )

    def _canary_status(self) -> CanaryStatus | None:
        variant = self.variants.get("canary")
        if variant is None or not isinstance(variant.keys, Canary):
            return None
        version = variant.version
        return CanaryStatus(
            **_common(variant),
            requests=version.chosen if version is not None else 0,
            header=dict(variant.keys.header),
            sticky=variant.keys.sticky,
            fallbacks=self.split.fallbacks,
        )

    def _shadow_status(self) -> ShadowStatus | None:
        variant = self.variants.get("shadow")
        if variant is None:
            return None
        mirror = self.champion.mirror if self.champion is not None else None
        seen: MirrorStatistics | None = mirror.statistics() if mirror is not None else None
        return ShadowStatus(**_common(variant), requests=seen.mirrored if seen is not None else 0, mirror=seen)


def _common(variant: WantedVariant) -> dict[str, Any]:
    """What both kinds of status have."""
    version = variant.version
    artifact = version.artifact if version is not None else None
    return {
        "source": variant.keys.source,
        "version": version.version if version is not None else "",
        "digest": artifact.digest if artifact is not None else "",
        "state": version.state.value if version is not None else "UNAVAILABLE",
        "reason": version.obstacle if version is not None else variant.reason,
        "percent": variant.percent,
        "configured_percent": variant.keys.percent,
    }
