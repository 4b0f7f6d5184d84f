"""The models: which versions exist, what state each is in, and which one a name means.

Loading a version: read and hash its bytes → load its instances on workers → read its signature → settle how it may
be batched, with proof → warm every instance up → READY. A failure at any step leaves that version FAILED with its
reason, and everyone else untouched. States change only along `core.model.TRANSITIONS`.

Replacing a model that serves: its new versions are loaded beside the old ones and out of sight, all of them or none;
then the name changes hands between two turns of the event loop, and the old versions answer what they had taken before
their workers are freed. Unloading ends the same way. A request belongs to the version it was decoded for and never
changes it. Invariant: whoever is in `_models` or retiring is the only holder of its workers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from gateway.catalog_version import GONE, ServedVersion
from gateway.core.ensemble_plan import load_order
from gateway.core.model import TRANSITIONS, ModelEvent, ModelState, next_state
from gateway.core.request import InferRequest
from gateway.ensemble import Ensemble, check_cacheable, ensemble_spec
from gateway.errors import ConfigError, GatewayError, NotFound, NotReady
from gateway.loading import WantedVersion, document, settle_spec

__all__ = ["GONE", "Catalog", "ServedVersion"]

log = logging.getLogger("gateway.catalog")


class Catalog:
    """All versions by name. Lookups are two dictionary reads; everything slow happens at load."""

    def __init__(self, infer: Callable[[ServedVersion, InferRequest], None] | None = None) -> None:
        """`infer`: the entry of every request, for the steps of ensembles (`Pipeline.infer`); None: straight into the
        queue of the step's model."""
        self._infer = infer or _into_the_queue
        self._models: dict[str, dict[str, ServedVersion]] = {}
        self._newest: dict[str, ServedVersion] = {}
        """The version a name without a version means: the highest that is READY."""
        self.on_ready: Callable[[ServedVersion], None] = lambda version: None
        """Called with each version that was loaded, before the first request reaches it."""
        self.on_retired: Callable[[ServedVersion], None] = lambda version: None
        """Called with each version that takes no new callers any more, before it is freed."""
        self._retiring: dict[str, set[asyncio.Task[None]]] = {}
        """By model: versions out of service that still answer, and are freed then."""

    # -- lookups -------------------------------------------------------------------------------------------------

    def resolve(self, name: str, version: str | None) -> ServedVersion:
        """The READY version that `name` (and `version`, None: newest) means.

        Raises:
            NotFound: no such model or version, or it was unloaded.
            NotReady: it exists but cannot answer now; the text says why.
        """
        if version is None:
            found = self._newest.get(name)
            if found is not None:
                return found
        found = self.find(name, version)
        if found.state in GONE:
            raise NotFound(f"Request for unknown model: '{name}' has no available versions")
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
        """Whether every version that should be served can take requests; one that was unloaded should not."""
        return all(v.ready for v in self.versions() if v.required and v.state not in GONE)

    def names(self) -> list[str]:
        """Every model that was ever loaded or tried, in order."""
        return sorted(self._models)

    def of(self, name: str) -> list[ServedVersion]:
        """The versions of a model, by number; none for an unknown one."""
        versions = self._models.get(name, {})
        return [versions[version] for version in sorted(versions, key=_numeric)]

    # -- loading ---------------------------------------------------------------------------------------------------

    async def load_all(
        self,
        wanted: Iterable[WantedVersion],
        on_loaded: Callable[[str], None] = lambda name: None,
        parallel: int = 2,
    ) -> list[ServedVersion]:
        """Load versions, a few at a time; returns those that FAILED, which the caller tells.

        Never raises for a model's sake. `on_loaded` is called with a model's name when it is done, whichever way.
        """
        gate = asyncio.Semaphore(parallel)
        # All are known before the first is loaded: who asks for one that waits its turn is told so, not "unknown".
        versions = [self._register(version) for version in wanted]

        async def one(version: ServedVersion) -> ServedVersion:
            async with gate:
                await self._load_registered(version)
            on_loaded(version.name)
            return version

        plain = [version for version in versions if not version.wanted.scheduling.ensemble]
        served = await asyncio.gather(*[one(version) for version in plain])
        # Ensembles read no more than a file; what they are made of must be there first.
        for version in _in_order([version for version in versions if version.wanted.scheduling.ensemble]):
            served.append(await one(version))
        return [version for version in served if version.state is ModelState.FAILED]

    async def load(self, wanted: WantedVersion) -> ServedVersion:
        """Load one version; the outcome is its state and reason."""
        return await self._load_registered(self._register(wanted))

    async def replace(self, wanted: Sequence[WantedVersion]) -> list[ServedVersion]:
        """Load all versions of one model, in place of those that are there; returns those that FAILED,
        which the caller tells.

        All or none: while the model serves, a failure changes nothing for its callers. Returns as soon as the name
        means the new versions; the old ones are still answering then. Calls for one model must not overlap.
        """
        name = wanted[0].name
        await self._retired(name)
        before = self._models.get(name, {})
        serving = any(version.scheduler is not None for version in before.values())
        versions = [ServedVersion(version) for version in wanted]
        for version in versions:
            version.required = False
            if (former := before.get(version.version)) is not None and former.state is ModelState.READY:
                version.statistics = former.statistics  # the same version goes on counting
        coming = {version.version: version for version in versions}
        if not serving:
            self._models[name] = coming
        try:
            for version in versions:
                await self._load_registered(version)
        except BaseException:
            await self._discard(versions)
            raise
        failed = [version for version in versions if version.state is ModelState.FAILED]
        if failed:
            await self._discard(versions)
            return failed
        for version in versions:
            version.required = True
        self._models[name] = coming
        self._elect(name)
        for version in before.values():
            self._retire(version)
        return []

    async def unload(self, name: str) -> None:
        """Take a model out of service; returns when its callers are answered and its workers free.

        Its versions stay known, as UNAVAILABLE. Harmless for a model that is unknown or unloaded.
        """
        for version in self.of(name):
            self._retire(version)
        self._elect(name)
        await self._retired(name)

    def forget_gone(self, keep: int) -> list[str]:
        """Drop what is known of models that serve no more, but for the `keep` known last; returns their names."""
        gone = [
            name
            for name, versions in self._models.items()
            if all(version.state is ModelState.UNAVAILABLE for version in versions.values())
        ]
        dropped = gone[: max(0, len(gone) - keep)]
        for name in dropped:
            del self._models[name]
        return dropped

    def _retire(self, version: ServedVersion) -> None:
        """From now on it takes no new callers; it is freed when the others are answered."""
        if (version.state, ModelEvent.UNLOAD) not in TRANSITIONS:
            return
        version.state = next_state(version.state, ModelEvent.UNLOAD)
        version.reason = "unloaded"
        self.on_retired(version)
        task = asyncio.get_running_loop().create_task(self._free(version))
        self._retiring.setdefault(version.name, set()).add(task)
        task.add_done_callback(partial(self._freed, version.name))

    async def _free(self, version: ServedVersion) -> None:
        scheduler, loaded = version.scheduler, version.loaded
        try:
            if scheduler is not None:
                await version.unpinned()
                await scheduler.drained()
                # Between the last answer and this line nobody else ran: nothing can have come in.
                version.scheduler = None
                scheduler.close(NotReady(f"model '{version.name}' version {version.version} was unloaded"))
                scheduler.stop()
            if loaded is not None:
                await loaded.unload()
        finally:
            version.scheduler, version.loaded = None, None
            version.http_codec = version.grpc_codec = None
            if version.state is ModelState.UNLOADING:
                version.state = next_state(version.state, ModelEvent.DRAINED)

    def _freed(self, name: str, task: asyncio.Task[None]) -> None:
        tasks = self._retiring.get(name, set())
        tasks.discard(task)
        if not tasks:
            self._retiring.pop(name, None)
        if not task.cancelled() and task.exception() is not None:
            log.error("freeing model %s failed", name, exc_info=task.exception())

    async def _retired(self, name: str) -> None:
        await asyncio.gather(*self._retiring.get(name, ()), return_exceptions=True)

    async def _discard(self, versions: Sequence[ServedVersion]) -> None:
        """Free what was loaded of a model that is not going to be served after all."""
        for version in versions:
            if version.state is ModelState.LOADING:
                version.state = next_state(version.state, ModelEvent.LOAD_FAILED)
                version.reason = "its load was given up"
            reason = version.reason
            self._retire(version)
            version.reason = reason or "another version of it could not be loaded"
        self._elect(versions[0].name)
        await self._retired(versions[0].name)

    def _register(self, wanted: WantedVersion) -> ServedVersion:
        version = ServedVersion(wanted)
        self._models.setdefault(wanted.name, {})[wanted.version] = version
        return version

    async def _load_registered(self, version: ServedVersion) -> ServedVersion:
        """A failure is its state and reason; who asked for the load tells it, once."""
        started = time.monotonic()
        try:
            await self._load(version)
        except GatewayError as error:
            return _load_failed(version, str(error))
        except Exception as error:
            log.exception("loading a model failed in a way nobody foresaw")
            return _load_failed(version, f"the gateway failed on it: {type(error).__name__}: {error}")
        version.state = next_state(version.state, ModelEvent.LOADED)
        version.load_s = time.monotonic() - started
        self.on_ready(version)
        self._elect(version.name)
        spec = version.spec
        about = {"digest": spec.digest} if spec.digest else {}
        log.info("model %s version %s is ready: %s", spec.name, spec.version, spec.batching_note, extra=about)
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
        check_cacheable(wanted.scheduling)
        if wanted.scheduling.ensemble:
            spec = ensemble_spec(wanted, artifact)
            version.config_document = await asyncio.to_thread(document, wanted, artifact, spec, 0)
            version.settle_ensemble(Ensemble(spec, version.statistics, self.resolve, self._infer))
            return
        loaded = await wanted.load(artifact)
        try:
            settled = await settle_spec(version.wanted, artifact, loaded)
            instances = len(loaded.replicas)
            version.config_document = await asyncio.to_thread(document, wanted, artifact, settled.spec, instances)
        except BaseException:
            await loaded.unload()
            raise
        version.settle(settled, loaded)

    def failed(self, name: str, version: str, reason: str, loaded: object = None) -> None:
        """A READY version's workers crash too often: it takes no more requests until `recovered`.

        `loaded`: whose workers they are, where that is known; another load of the same version is not meant.
        """
        found = self._models.get(name, {}).get(version)
        if found is None or found.state is not ModelState.READY or found.scheduler is None:
            return
        if loaded is not None and loaded is not found.loaded:
            return
        found.state = next_state(found.state, ModelEvent.CRASH_LOOP)
        found.reason = reason
        self._elect(name)
        error = NotReady(f"model '{name}' version {version} failed: {reason}")
        found.scheduler.close(error)
        found.scheduler.fail_waiting(error)

    def recovered(self, name: str, version: str, loaded: object = None) -> None:
        found = self._models.get(name, {}).get(version)
        if found is None or found.state is not ModelState.FAILED or found.scheduler is None:
            return
        if loaded is not None and loaded is not found.loaded:
            return
        found.state = next_state(found.state, ModelEvent.RECOVERED)
        found.reason = ""
        found.scheduler.reopen()
        self._elect(name)

    async def drain(self) -> None:
        """Returns when every accepted request is settled."""
        await asyncio.gather(*[v.scheduler.drained() for v in self.versions() if v.scheduler is not None])
        await asyncio.gather(*[self._retired(name) for name in list(self._retiring)])

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


def _into_the_queue(version: ServedVersion, request: InferRequest) -> None:
    if version.scheduler is None:
        raise NotReady(f"Request for unavailable model: '{version.name}' version {version.version}")
    version.scheduler.submit(request)


def _in_order(ensembles: Sequence[ServedVersion]) -> list[ServedVersion]:
    """Ensembles behind those they contain."""
    steps: dict[str, set[str]] = {}
    for version in ensembles:
        steps.setdefault(version.name, set()).update(step.model for step in version.wanted.scheduling.ensemble)
    places = {name: place for place, name in enumerate(load_order(steps))}
    return sorted(ensembles, key=lambda version: places[version.name])


def _load_failed(version: ServedVersion, reason: str) -> ServedVersion:
    version.state = next_state(version.state, ModelEvent.LOAD_FAILED)
    version.reason = reason
    return version


def _numeric(version: str) -> tuple[int, str]:
    return (int(version) if version.isdecimal() else -1, version)


def _short(text: str) -> str:
    return text if len(text) <= 64 else text[:64] + "…"
