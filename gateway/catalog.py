"""The models: which versions exist, what state each is in, and which one a name means.

Loading a version: read and hash its bytes → load its instances on workers → read its signature → settle how it may
be batched, with proof → warm every instance up → READY. A failure at any step leaves that version FAILED with its
reason, and everyone else untouched. States change only along `core.model.TRANSITIONS`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from gateway.backends.interface import Replica
from gateway.core.model import (
    Artifact,
    ModelEvent,
    ModelSpec,
    ModelState,
    next_state,
)
from gateway.errors import ConfigError, GatewayError, NotFound, NotReady
from gateway.loading import LoadedModel, WantedVersion, settle_spec
from gateway.observe.record import ModelStatistics
from gateway.scheduler import Scheduler

log = logging.getLogger("gateway.catalog")


class ServedVersion:
    """One model version in the catalog. `scheduler` is there exactly while requests can be taken."""

    def __init__(self, wanted: WantedVersion) -> None:
        self.name = wanted.name
        self.version = wanted.version
        self.wanted = wanted
        self.state = ModelState.LOADING
        self.reason = ""
        """Why it is not READY, in words."""
        self.statistics = ModelStatistics()
        self.artifact: Artifact | None = None
        """Files and digest; the model's bytes are not kept."""
        self.sidecar: bytes | None = None
        """Content of `provenance.json`."""
        self.loaded: LoadedModel | None = None
        self.scheduler: Scheduler | None = None
        self.http_codec: Any = None
        """Belongs to the ingress: decoder and encoder made for this version's signature. So does `grpc_codec`."""
        self.grpc_codec: Any = None
        self.split_rows = 0
        """A request of more rows than this is cut, and its answer put together again; 0: no request is."""
        self._spec: ModelSpec | None = None

    @property
    def spec(self) -> ModelSpec:
        """The signature; only known once the version was loaded."""
        if self._spec is None:
            raise NotReady(
                f"model '{self.name}' version {self.version} is not at ready state: {self.reason or 'loading'}"
            )
        return self._spec

    @property
    def replicas(self) -> Sequence[Replica]:
        return self.loaded.replicas if self.loaded is not None else ()

    @property
    def ready(self) -> bool:
        """Whether it can answer now: READY, and at least one replica is there to do it."""
        return self.state is ModelState.READY and any(replica.available for replica in self.replicas)

    def settle(self, spec: ModelSpec, loaded: LoadedModel, row_s: float = 0.0) -> None:
        """It is loaded. `row_s`: seconds a row took on trial; 0.0: unknown."""
        self._spec = spec
        self.split_rows = spec.policy.max_batch_size
        self.loaded = loaded
        self.scheduler = Scheduler(spec, loaded.replicas, self.statistics, row_s=row_s)

    def __repr__(self) -> str:
        return f"<ServedVersion {self.name}/{self.version} {self.state.value}>"


class Catalog:
    """All versions by name. Lookups are two dictionary reads; everything slow happens at load."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str, ServedVersion]] = {}
        self._newest: dict[str, ServedVersion] = {}
        """The version a name without a version means: the highest that is READY."""

    # -- lookups -------------------------------------------------------------------------------------------------

    def resolve(self, name: str, version: str | None) -> ServedVersion:
        """The READY version that `name` (and `version`, None: newest) means.

        Raises:
            NotFound: no such model or version.
            NotReady: it exists but cannot answer now; the text says why.
        """
        if version is None:
            found = self._newest.get(name)
            if found is not None:
                return found
        found = self.find(name, version)
        if found.state is not ModelState.READY:
            raise NotReady(
                f"Request for model '{name}' version {found.version}, which is not at ready state: "
                f"{found.reason or found.state.value.lower()}"
            )
        return found

    def find(self, name: str, version: str | None) -> ServedVersion:
        """Like `resolve`, in whatever state; without a version the highest."""
        versions = self._models.get(name)
        if not versions:
            raise NotFound(f"Request for unknown model: '{_short(name)}' is not found")
        if version is None:
            return self._newest.get(name) or versions[max(versions, key=_numeric)]
        found = versions.get(version)
        if found is None:
            raise NotFound(f"Request for unknown model: '{name}' version {_short(version)} is not found")
        return found

    def ready_versions(self, name: str) -> list[str]:
        versions = self._models.get(name, {})
        return sorted((v.version for v in versions.values() if v.state is ModelState.READY), key=_numeric)

    def versions(self) -> list[ServedVersion]:
        """Every version, by name and number."""
        return [
            self._models[name][version]
            for name in sorted(self._models)
            for version in sorted(self._models[name], key=_numeric)
        ]

    def ready(self) -> bool:
        """Whether every version that should be served can take requests."""
        return all(version.ready for version in self.versions())

    # -- loading ---------------------------------------------------------------------------------------------------

    async def load_all(
        self,
        wanted: Iterable[WantedVersion],
        on_loaded: Callable[[str], None] = lambda name: None,
        parallel: int = 2,
    ) -> list[ServedVersion]:
        """Load versions, a few at a time; returns those that FAILED. Never raises for a model's sake.

        `on_loaded` is called with a model's name when it is done, whichever way.
        """
        gate = asyncio.Semaphore(parallel)
        # All are known before the first is loaded: who asks for one that waits its turn is told so, not "unknown".
        versions = [self._register(version) for version in wanted]

        async def one(version: ServedVersion) -> ServedVersion:
            async with gate:
                await self._load_registered(version)
            on_loaded(version.name)
            return version

        served = await asyncio.gather(*[one(version) for version in versions])
        return [version for version in served if version.state is ModelState.FAILED]

    async def load(self, wanted: WantedVersion) -> ServedVersion:
        """Load one version; the outcome is its state and reason."""
        return await self._load_registered(self._register(wanted))

    def _register(self, wanted: WantedVersion) -> ServedVersion:
        version = ServedVersion(wanted)
        self._models.setdefault(wanted.name, {})[wanted.version] = version
        return version

    async def _load_registered(self, version: ServedVersion) -> ServedVersion:
        try:
            await self._load(version)
        except GatewayError as error:
            return _load_failed(version, str(error))
        except Exception as error:
            log.exception("loading a model failed in a way nobody foresaw")
            return _load_failed(version, f"the gateway failed on it: {type(error).__name__}: {error}")
        version.state = next_state(version.state, ModelEvent.LOADED)
        self._elect(version.name)
        spec = version.spec
        log.info("model %s version %s is ready: %s; %s", spec.name, spec.version, spec.batching_note, spec.digest)
        return version

    async def _load(self, version: ServedVersion) -> None:
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
        version.artifact = replace(artifact, model=b"")
        loaded = await wanted.load(artifact)
        try:
            spec, row_s = await settle_spec(version.wanted, artifact, loaded)
        except Exception:
            await loaded.unload()
            raise
        version.settle(spec, loaded, row_s)

    def failed(self, name: str, version: str, reason: str) -> None:
        """A READY version's workers crash too often: it takes no more requests until `recovered`."""
        found = self._models.get(name, {}).get(version)
        if found is None or found.state is not ModelState.READY or found.scheduler is None:
            return
        found.state = next_state(found.state, ModelEvent.CRASH_LOOP)
        found.reason = reason
        self._elect(name)
        error = NotReady(f"model '{name}' version {version} failed: {reason}")
        found.scheduler.close(error)
        found.scheduler.fail_waiting(error)

    def recovered(self, name: str, version: str) -> None:
        found = self._models.get(name, {}).get(version)
        if found is None or found.state is not ModelState.FAILED or found.scheduler is None:
            return
        found.state = next_state(found.state, ModelEvent.RECOVERED)
        found.reason = ""
        found.scheduler.reopen()
        self._elect(name)

    async def drain(self) -> None:
        """Returns when every accepted request is settled."""
        await asyncio.gather(*[v.scheduler.drained() for v in self.versions() if v.scheduler is not None])

    def stop(self) -> None:
        for version in self.versions():
            if version.scheduler is not None:
                version.scheduler.stop()

    def _elect(self, name: str) -> None:
        ready = self.ready_versions(name)
        if ready:
            self._newest[name] = self._models[name][ready[-1]]
        else:
            self._newest.pop(name, None)


def _load_failed(version: ServedVersion, reason: str) -> ServedVersion:
    version.state = next_state(version.state, ModelEvent.LOAD_FAILED)
    version.reason = reason
    named = reason if reason.startswith("model ") else f"model '{version.name}' version {version.version}: {reason}"
    log.error("could not be loaded: %s", named)
    return version


def _numeric(version: str) -> tuple[int, str]:
    return (int(version) if version.isdecimal() else -1, version)


def _short(text: str) -> str:
    return text if len(text) <= 64 else text[:64] + "…"
