"""The models: which versions exist, what state each is in, and which one a name means.

A version that cannot be loaded (catalog_load.py) is FAILED with its reason, and everyone else untouched. States change
only along `core.model.TRANSITIONS`.

Replacing a model that serves: its new versions are loaded beside the old ones and out of sight, all of them or none;
then the name changes hands between two turns of the event loop, and the old versions answer what they had taken before
their workers are freed. Unloading ends the same way. A request belongs to the version it was decoded for and never
changes it.

Beside the versions that a name means there may be others of it, loaded and never elected: one on trial before it takes
the name (`stage`), one that had it before and can have it back at once (`flip`). Invariant: whoever is in `_models`,
beside or retiring is the only holder of its workers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from gateway.catalog_load import in_order, load_version
from gateway.catalog_version import GONE, Role, ServedVersion, confirm
from gateway.core.model import TRANSITIONS, ModelEvent, ModelState, next_state
from gateway.core.request import InferRequest
from gateway.errors import LoadFailed, NotFound, NotReady, PassingTrouble
from gateway.loading import WantedVersion

__all__ = ["GONE", "Catalog", "ServedVersion", "confirm"]

log = logging.getLogger("gateway.catalog")


class Catalog:
    """All versions by name. Lookups are two dictionary reads; everything slow happens at load."""

    def __init__(self, infer: Callable[[ServedVersion, InferRequest], None] | None = None) -> None:
        """`infer`: the entry of every request, for the steps of ensembles (`Pipeline.infer`); None: straight into the
        queue of the step's model."""
        self._infer = infer or _into_the_queue
        self._models: dict[str, dict[str, ServedVersion]] = {}
        self._beside: dict[str, list[ServedVersion]] = {}
        """By model: versions that its name does not mean; `role` says what for. Two may have one version number."""
        self._newest: dict[str, ServedVersion] = {}
        """The version a name without a version means: the highest that is READY."""
        self.on_ready: Callable[[ServedVersion], None] = lambda version: None
        """Called with each version that was loaded, before the first request reaches it."""
        self.on_retired: Callable[[ServedVersion], None] = lambda version: None
        """Called with each version that takes no new callers any more, before it is freed."""
        self.on_elected: Callable[[str], None] = lambda name: None
        """Called with the name of a model whenever it may mean another version than before."""
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
        found = versions.get(version) or self._reachable_beside(name, version)
        if found is None:
            raise NotFound(f"Request for unknown model: '{name}' version {_short(version)} is not found")
        return found

    def _reachable_beside(self, name: str, version: str) -> ServedVersion | None:
        beside = self._beside.get(name, ())
        return next((v for v in beside if v.version == version and v.reachable and v.state not in GONE), None)

    def ready_versions(self, name: str) -> list[str]:
        """The numbers that clients may ask for, in order."""
        return sorted({v.version for v in self.of(name) if v.state is ModelState.READY and v.reachable}, key=_numeric)

    def versions(self) -> list[ServedVersion]:
        """Every version, by name and number; those beside behind those that the name means."""
        return [version for name in sorted(self._models.keys() | self._beside.keys()) for version in self.of(name)]

    def distinct(self) -> list[ServedVersion]:
        """`versions`, without those beside whose number another one has: what clients and dashboards can tell apart.
        Those that clients can reach go first."""
        found: dict[tuple[str, str], ServedVersion] = {}
        for version in sorted(self.versions(), key=lambda version: (version.name, not version.reachable)):
            found.setdefault((version.name, version.version), version)
        return list(found.values())

    def champions(self, name: str) -> list[ServedVersion]:
        """The versions that the name means, by number; none for an unknown one."""
        versions = self._models.get(name, {})
        return [versions[version] for version in sorted(versions, key=_numeric)]

    def beside(self, name: str, role: Role | None = None) -> list[ServedVersion]:
        """Versions of a model that its name does not mean; None: whatever for."""
        return [version for version in self._beside.get(name, ()) if role in (None, version.role)]

    def ready(self) -> bool:
        """Whether every version that should be served can take requests; one that was unloaded should not."""
        return not self.obstacle()

    def obstacle(self) -> str:
        """Which version that should be served takes no requests, and why, in words; empty where all do."""
        required = (version for version in self.versions() if version.required)
        found = next((v for v in required if v.state not in GONE and not v.ready), None)
        return "" if found is None else f"model '{found.name}' version {found.version}: {found.obstacle}"

    def names(self) -> list[str]:
        """Every model that was ever loaded or tried, in order."""
        return sorted(self._models)

    def of(self, name: str) -> list[ServedVersion]:
        """The versions of a model, by number; those beside behind the others; none for an unknown one."""
        return [*self.champions(name), *self._beside.get(name, ())]

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
        for version in in_order([version for version in versions if version.wanted.scheduling.ensemble]):
            served.append(await one(version))
        return [version for version in served if version.state is ModelState.FAILED]

    async def load(self, wanted: WantedVersion) -> ServedVersion:
        """Load one version; the outcome is its state and reason."""
        return await self._load_registered(self._register(wanted))

    async def replace(self, wanted: Sequence[WantedVersion], *, keep: bool = False) -> list[ServedVersion]:
        """Load all versions of one model, in place of those that are there; returns those that FAILED,
        which the caller tells.

        All or none: while the model serves, a failure changes nothing for its callers. Returns as soon as the name
        means the new versions; the old ones are still answering then. `keep`: as in `flip`. Calls for one model must
        not overlap.
        """
        name = wanted[0].name
        await self._retired(name)
        before = self._models.get(name, {})
        serving = any(version.scheduler is not None for version in before.values())
        versions = self._made(wanted, "champion")
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
        self.flip(name, versions, keep=keep)
        return []

    async def stage(self, wanted: Sequence[WantedVersion], role: Role) -> list[ServedVersion]:
        """Load versions of one model where its callers do not see them; they are READY and beside. Calls for one model
        must not overlap.

        Raises:
            LoadFailed: one cannot be loaded; then none is.
            PassingTrouble: later it may.
        """
        name = wanted[0].name
        await self._retired(name)
        versions = self._made(wanted, role)
        self._beside.setdefault(name, []).extend(versions)
        try:
            for version in versions:
                await self._load_registered(version)
        except BaseException:
            await self._discard(versions)
            raise
        failed = next((version for version in versions if version.state is ModelState.FAILED), None)
        if failed is not None:
            reason = failed.reason.removeprefix(f"model '{name}' version {failed.version}: ")
            await self._discard(versions)
            raise (PassingTrouble if failed.passing else LoadFailed)(
                f"version {failed.version} cannot be loaded: {reason}"
            )
        return versions

    def flip(self, name: str, versions: Sequence[ServedVersion], *, keep: bool) -> list[ServedVersion]:
        """The name means `versions`, all of them loaded, from now on; between two turns of the event loop.

        `keep`: those that it meant stay loaded beside (role `previous`), if all of them are well; else they answer
        what they have taken and are freed. Returns those that were kept.
        """
        former = [version for version in self._models.get(name, {}).values() if version not in versions]
        kept = former if keep and all(version.state is ModelState.READY for version in former) else []
        self._beside[name] = [version for version in self._beside.get(name, ()) if version not in versions]
        for version in versions:
            version.role, version.required = "champion", True
        for version in kept:
            version.role, version.required = "previous", False
            self._beside[name].append(version)
        if not self._beside[name]:
            del self._beside[name]
        self._models[name] = {version.version: version for version in versions}
        self._elect(name)
        if not kept:
            self.retire(former)
        return kept

    def retire(self, versions: Iterable[ServedVersion]) -> None:
        """They take no new callers; each is freed when the others are answered, see `freed`."""
        for version in list(versions):
            self._retire(version)

    async def freed(self, name: str) -> None:
        """Returns when what was retired of a model is freed."""
        await self._retired(name)

    def _made(self, wanted: Sequence[WantedVersion], role: Role) -> list[ServedVersion]:
        versions = [ServedVersion(version) for version in wanted]
        before = self._models.get(wanted[0].name, {})
        for version in versions:
            version.role, version.required = role, False
            if role not in ("champion", "standby"):
                continue
            if (former := before.get(version.version)) is not None and former.state is ModelState.READY:
                version.statistics = former.statistics  # the same version goes on counting
        return versions

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
        task.add_done_callback(partial(self._freed, version))

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

    def _freed(self, version: ServedVersion, task: asyncio.Task[None]) -> None:
        name = version.name
        if version in self._beside.get(name, ()):
            self._beside[name].remove(version)
            if not self._beside[name]:
                del self._beside[name]
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
        if await load_version(version, self.resolve, self._infer):
            self.on_ready(version)
            self._elect(version.name)
            spec = version.spec
            about = {"digest": spec.digest} if spec.digest else {}
            log.info("model %s version %s is ready: %s", spec.name, spec.version, spec.batching_note, extra=about)
        return version

    def failed(self, name: str, version: str, reason: str, loaded: object = None) -> None:
        """A READY version's workers crash too often: it takes no more requests until `recovered`.

        `loaded`: whose workers they are, where that is known; another load of the same version is not meant.
        """
        found = self._loaded(name, version, loaded)
        if found is None or found.state is not ModelState.READY or found.scheduler is None:
            return
        found.state = next_state(found.state, ModelEvent.CRASH_LOOP)
        found.reason = reason
        self._elect(name)
        error = NotReady(f"model '{name}' version {version} failed: {reason}")
        found.scheduler.close(error)
        found.scheduler.fail_waiting(error)

    def _loaded(self, name: str, version: str, loaded: object) -> ServedVersion | None:
        same = [v for v in self.of(name) if v.version == version]
        return next((v for v in same if loaded is None or loaded is v.loaded), None)

    def recovered(self, name: str, version: str, loaded: object = None) -> None:
        found = self._loaded(name, version, loaded)
        if found is None or found.state is not ModelState.FAILED or found.scheduler is None:
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
        ready = [version for version in self.champions(name) if version.state is ModelState.READY]
        if ready:
            self._newest[name] = ready[-1]
        else:
            self._newest.pop(name, None)
        self.on_elected(name)


def _into_the_queue(version: ServedVersion, request: InferRequest) -> None:
    if version.scheduler is None:
        raise NotReady(f"Request for unavailable model: '{version.name}' version {version.version}")
    version.scheduler.submit(request)


def _numeric(version: str) -> tuple[int, str]:
    return (int(version) if version.isdecimal() else -1, version)


def _short(text: str) -> str:
    return text if len(text) <= 64 else text[:64] + "…"
