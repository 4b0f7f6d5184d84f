"""One version of the catalog from its files to READY, or to FAILED with a reason.

Read and hash its bytes → load its instances on workers → read its signature → settle how it may be batched, with proof
→ golden inputs → READY. Whatever goes wrong on the way, nothing of it stays loaded. A remote server that is lost
meanwhile is not the model's fault: it is loaded on the next one, and the lost one joins when it is back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from gateway.catalog_version import ServedVersion
from gateway.core.ensemble_plan import load_order
from gateway.core.model import Artifact, ModelEvent, next_state
from gateway.core.request import InferRequest
from gateway.ensemble import Ensemble, check_cacheable, ensemble_spec
from gateway.errors import ConfigError, GatewayError, ModelError
from gateway.loading import LoadedModel, Settled, WantedVersion, check_answers, document, settle_spec
from gateway.loading_passing import passes
from gateway.loading_trial import ServerLost

log = logging.getLogger("gateway.catalog")

MAX_LOST: Final = 2
"""Servers that one load may lose. A model that took two along is not tried on a third: it may be the reason."""

Resolve = Callable[[str, str | None], ServedVersion]
Infer = Callable[[ServedVersion, InferRequest], None]


async def load_version(version: ServedVersion, resolve: Resolve, infer: Infer) -> bool:
    """Load `version`, which is LOADING; whether it is READY now. Never raises for the model's sake.

    `resolve` and `infer`: for the steps of an ensemble.
    """
    started = time.monotonic()
    try:
        await _load(version, resolve, infer)
    except GatewayError as error:
        return _failed(version, str(error), passing=passes(error))
    except Exception as error:
        log.exception("loading a model failed in a way nobody foresaw")
        return _failed(version, f"the gateway failed on it: {type(error).__name__}: {error}")
    version.state = next_state(version.state, ModelEvent.LOADED)
    version.load_s = time.monotonic() - started
    return True


async def _load(version: ServedVersion, resolve: Resolve, infer: Infer) -> None:
    wanted = version.wanted
    try:
        artifact, version.sidecar = await asyncio.to_thread(wanted.read)
    except OSError as error:
        raise ConfigError(f"cannot read the model's files: {error.strerror or error}") from error
    if wanted.digest_pin is not None and artifact.digest != wanted.digest_pin:
        raise ConfigError(
            f"the files have digest {artifact.digest}, but the configuration pins {wanted.digest_pin}; "
            "put the right files there or change the pin"
        )
    version.artifact = replace(artifact, model=b"", external=None)
    check_cacheable(wanted.scheduling)
    if wanted.scheduling.ensemble:
        spec = ensemble_spec(wanted, artifact)
        version.config_document = await asyncio.to_thread(document, wanted, artifact, spec, 0)
        version.settle_ensemble(Ensemble(spec, version.statistics, resolve, infer))
        return
    settled, loaded = await _loaded(wanted, artifact)
    try:
        instances = len(loaded.replicas)
        version.config_document = await asyncio.to_thread(document, wanted, artifact, settled.spec, instances)
    except BaseException:
        await loaded.unload()
        raise
    version.settle(settled, loaded)


async def _loaded(wanted: WantedVersion, artifact: Artifact) -> tuple[Settled, LoadedModel]:
    """Instances, or a remote server, on which the model was tried with success."""
    lost: list[str] = []
    while True:
        try:
            loaded = await wanted.load(artifact)
        except ModelError as error:
            if not lost:
                raise
            raise ModelError("; ".join([*lost, str(error)])) from None
        try:
            settled = await settle_spec(wanted, artifact, loaded)
            await check_answers(wanted, settled.spec, loaded)
        except ServerLost as error:
            await loaded.unload()
            lost.append(str(error))
            if len(lost) == MAX_LOST:
                raise ModelError("; ".join(lost)) from None
            log.warning("model %s version %s: %s; another server is tried", wanted.name, wanted.version, error)
        except BaseException:
            await loaded.unload()
            raise
        else:
            return settled, loaded


def _failed(version: ServedVersion, reason: str, *, passing: bool = False) -> bool:
    version.state = next_state(version.state, ModelEvent.LOAD_FAILED)
    version.reason, version.passing = reason, passing
    return False


def in_order(ensembles: Sequence[ServedVersion]) -> list[ServedVersion]:
    """Ensembles behind those they contain."""
    steps: dict[str, set[str]] = {}
    for version in ensembles:
        steps.setdefault(version.name, set()).update(step.model for step in version.wanted.scheduling.ensemble)
    places = {name: place for place, name in enumerate(load_order(steps))}
    return sorted(ensembles, key=lambda version: places[version.name])
