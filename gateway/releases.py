"""Following what models' sources mean, and changing the version that serves without a request noticing.

What may be done is decided in core/release.py; here it is carried out:

    ask the source ─▶ fetch, verify ─▶ load and warm up beside the one that serves, answer the golden inputs
      ─▶ compare signatures ─▶ let the name mean it, between two turns of the event loop ─▶ the former one answers what
         it has taken; it stays loaded for a rollback, or is freed

Rules:
  * one change of a model at a time, whoever asks: `turn`. Only a rollback waits for nobody: it ends a trial, and a load
    that somebody else asked for changes hands after it. So between two awaits the catalog and what is known here agree;
  * a request belongs to the version it was decoded for, and a version has a queue and workers' instances of its own: no
    batch holds rows of two releases;
  * until the name changes hands nothing that callers see has changed. What goes wrong is a refusal (the release's
    own fault: not tried again while the source means it) or a failure (of its surroundings: tried again), told once;
  * a source that cannot be asked changes nothing. A kept release answers clients that name its version;
  * what clients load by request, and what a changed configuration loads, takes the name at once: they asked for it.
    What it displaces is kept just the same;
  * sources are asked in threads, a few at a time, at intervals that differ by ± 20 % from turn to turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final, Literal
from weakref import WeakValueDictionary

from gateway.catalog import Catalog, ServedVersion
from gateway.core.model import Artifact
from gateway.core.release import (
    Happened,
    Prepare,
    Release,
    ReleaseEvent,
    ReleaseState,
    Restore,
    Stay,
)
from gateway.errors import GatewayError, LoadFailed
from gateway.loading import LoadedModel, WantedVersion
from gateway.loading_passing import Passing
from gateway.releases_model import (
    FollowedModel,
    ModelReleasesStatus,
    Result,
    check_fit,
    digest_of,
    named,
    obstacle_of,
    uri_of,
    versions_of,
)
from gateway.releases_sources import Following, identity_of

log = logging.getLogger("gateway.releases")

JITTER: Final = 0.2
ASKED_AT_ONCE: Final = 4
"""Sources: a registry that hangs must not occupy every thread there is."""
TRIED_AT_ONCE: Final = 2
"""Releases: loading one takes memory and a core."""


class NothingToDo(GatewayError):
    """409, on the operations port only: this cannot be done with the model as it is; the text says why."""

    status = 409
    reason = "nothing_to_do"


class Releases:
    """The releases of every model that is loaded."""

    def __init__(
        self,
        catalog: Catalog,
        find: Callable[[str], Following] = lambda name: Following(),
        chance: random.Random | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`find`: how a model is to be followed, by its name; blocks on the disk, runs in a thread."""
        self._catalog = catalog
        self._find = find
        self._chance = chance or random.Random()  # noqa: S311  # jitter
        self._now = clock
        self._models: dict[str, FollowedModel] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._asking = asyncio.Semaphore(ASKED_AT_ONCE)
        self._trying = asyncio.Semaphore(TRIED_AT_ONCE)
        self._closed = False
        self.on_happened: Callable[[str, Happened], None] = lambda name, happened: None
        """Called with each line of a model's history."""

    @contextlib.asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """Held by whoever changes what a model serves."""
        lock = self._locks.setdefault(name, asyncio.Lock())
        async with lock:
            yield

    def follows(self, name: str) -> bool:
        """Whether changes of this model's source are this class's affair: it serves, and is asked by itself."""
        model = self._models.get(name)
        return model is not None and model.track.live is not None and model.following.interval_s > 0

    # -- what others load ----------------------------------------------------------------------------------------

    async def adopt(self, names: Iterable[str], by: str) -> None:
        """These models were loaded, at start or late, without `replace`."""
        for name in names:
            if self._catalog.champions(name):
                await self._installed(name, by, await asyncio.to_thread(self._find, name))

    async def replace(self, wanted: Sequence[WantedVersion], by: str, *, follow: bool = True) -> list[ServedVersion]:
        """`Catalog.replace`: what serves is kept for a rollback, where that is wanted. The caller has the model's turn.

        `follow`: whether its source is asked from then on; not where somebody sent something else than the source has.
        Returns the versions that FAILED, which the caller tells; then nothing has changed.
        """
        name = wanted[0].name
        following = await asyncio.to_thread(self._find, name)  # nothing may fail once the name has changed hands
        if not follow:
            following = replace(following, interval_s=0.0, source=None)
        model = self._models.get(name)
        keep = model is not None and following.keep > 0 and model.track.live is not None
        failed = await self._catalog.replace(wanted, keep=keep)
        if not failed:
            await self._installed(name, by, following)
        return failed

    async def _installed(self, name: str, by: str, following: Following) -> None:
        served = self._catalog.champions(name)
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = FollowedModel(name, following)
        model.following, model.track.keep = following, following.keep
        now = self._now()
        release = Release(identity_of(served), versions_of(served), uri_of(served), now, digest_of(served))
        dropped = model.track.installed(release, by, now)
        if instead_of := served[0].wanted.instead_of:
            model.track.hold(instead_of)
        model.served[release] = served
        self._drop(model, dropped)
        self._forget_lost(model)
        self._tell(model)
        self._follow(model)
        await model.note(release)

    def unloaded(self, name: str, by: str) -> None:
        """The model was taken out of service, with everything beside it."""
        model = self._models.pop(name, None)
        if model is None:
            return
        if model.task is not None:
            model.task.cancel()
        if model.track.live is not None:
            model.track.unloaded(by, self._now())
            self._tell(model)

    # -- following -----------------------------------------------------------------------------------------------

    def _follow(self, model: FollowedModel) -> None:
        wanted = model.following.source is not None and model.following.interval_s > 0 and not self._closed
        if wanted and model.task is None:
            model.task = asyncio.get_running_loop().create_task(self._follow_for_ever(model))
        elif not wanted and model.task is not None:
            model.task.cancel()
            model.task = None

    async def _follow_for_ever(self, model: FollowedModel) -> None:
        while True:
            spread = self._chance.uniform(1 - JITTER, 1 + JITTER)
            await asyncio.sleep(model.following.interval_s * spread)
            await self.look(model.name, "poll")

    async def look(self, name: str, by: str) -> None:
        """`refresh`; what comes of it is told where it happens, and never raised."""
        try:
            await self.refresh(name, by)
        except GatewayError:
            pass  # told where it happened
        except Exception:
            log.exception("following model %s failed; it is tried again", name)

    async def refresh_all(self, by: str) -> None:
        """Ask the source of every model that has one that can change, and do what it says. What was refused is tried
        again: the configuration was read anew, and golden inputs are files of it."""
        followed = [model for model in self._models.values() if model.following.source is not None]
        for model in followed:
            model.track.forgive()
        await asyncio.gather(*[self.look(model.name, by) for model in followed])

    def referring(self, prefixes: tuple[str, ...]) -> list[str]:
        """Names of the models whose reference begins like one of these and can mean something else."""
        return [
            name
            for name, model in self._models.items()
            if model.following.source is not None and model.following.reference.startswith(prefixes)
        ]

    async def refresh(self, name: str, by: str, *, insist: bool = False) -> Result:
        """Ask what a model's source means now, and make it serve if it is something new.

        `insist`: also what was refused before or rolled back from.

        Raises:
            NothingToDo: the model is not loaded, or its source cannot mean anything else.
            SourceUnavailable: the source cannot be asked.
            LoadFailed: what it means cannot be used; the one that serves goes on.
        """
        model = self._known(name)
        if model.following.source is None:
            raise NothingToDo(
                f"model '{name}' is not followed: its source always means the same; for files, set poll_interval_s"
            )
        async with self.turn(name):
            if self._models.get(name) is not model or model.track.live is None:
                raise NothingToDo(f"model '{name}' is not loaded")
            if insist:
                model.following.forget()
            model.trial = asyncio.get_running_loop().create_task(self._look(model, by, insist=insist))
            try:
                return await asyncio.shield(model.trial)
            except asyncio.CancelledError:
                if model.trial.cancelled():  # by a rollback
                    raise NothingToDo(f"model '{name}' was rolled back meanwhile") from None
                model.end_trial()
                await asyncio.wait({model.trial})
                raise
            finally:
                model.trial = None

    async def _look(self, model: FollowedModel, by: str, *, insist: bool) -> Result:
        source = model.following.source
        assert source is not None  # noqa: S101  # see `refresh`
        try:
            async with self._asking:
                meant = await asyncio.to_thread(source.look)
        except GatewayError as error:
            model.trouble = str(error)
            if model.trouble != model.said:
                log.error("model %s: its source cannot be asked, and it serves on as it is: %s", model.name, error)
            model.said = model.trouble
            raise
        if model.trouble:
            log.info("model %s: its source can be asked again", model.name)
        model.trouble = model.said = ""
        model.asked_at = now = self._now()
        withheld = model.track.withheld
        decision = model.track.noticed(meant.identity, meant.version, meant.uri, now, insist=insist)
        if withheld and not model.track.withheld and model.track.live is not None:
            await model.note(model.track.live)  # a restart is not to withhold it either
        if isinstance(decision, Restore) and (obstacle := obstacle_of(model.served[decision.release])):
            log.warning("model %s: it is kept, but loaded anew: %s", model.name, obstacle)
            self._lose(model, decision.release)
            decision = model.track.noticed(meant.identity, meant.version, meant.uri, now)
        match decision:
            case Stay():
                if decision.why == "refused":
                    raise LoadFailed(f"model '{model.name}': refused before, and not tried again: {decision.text}")
                return model.result(decision.why, decision.text)
            case Restore():
                return await self._serve(model, decision.release, model.served[decision.release], by, "swapped")
            case Prepare():
                log.info("model %s: its source means version %s now (%s)", model.name, meant.version, meant.uri)
                return await self._try(model, decision.release, meant.wanted, by)

    async def _try(
        self, model: FollowedModel, release: Release, wanted_of: Callable[[], list[WantedVersion]], by: str
    ) -> Result:
        """Fetch, verify, load, check, swap."""
        passing = Passing()
        try:
            async with self._trying:
                wanted = await asyncio.to_thread(passing.watch, wanted_of)
                staged = await self._catalog.stage([self._watched(model, one, passing) for one in wanted], "standby")
        except GatewayError as error:
            self._not_served(model, str(error), by, passing=passing.seen)
            raise LoadFailed(f"model '{model.name}': {error}") from None
        except BaseException:
            self._not_served(model, "it was given up", by, passing=True)
            raise
        model.track.tried(ReleaseEvent.LOADED, self._now(), digest_of(staged), versions_of(staged))
        try:
            check_fit(self._catalog.champions(model.name), staged)
            model.track.tried(ReleaseEvent.CHECKED, self._now())
        except GatewayError as error:
            self._not_served(model, str(error), by, passing=False)
            self._catalog.retire(staged)
            await self._catalog.freed(model.name)
            raise LoadFailed(f"model '{model.name}': {error}") from None
        return await self._serve(model, release, staged, by, "swapped")

    def _watched(self, model: FollowedModel, wanted: WantedVersion, passing: Passing) -> WantedVersion:
        async def load(artifact: Artifact) -> LoadedModel:
            if model.track.trial is not None and model.track.trial.state is ReleaseState.NOTICED:
                model.track.tried(ReleaseEvent.VERIFIED, self._now(), artifact.digest)
            return await wanted.load(artifact)

        return replace(wanted, read=lambda: passing.watch(wanted.read), load=load)

    def _not_served(self, model: FollowedModel, why: str, by: str, *, passing: bool) -> None:
        track, now = model.track, self._now()
        if track.trial is None:
            return
        if passing:
            track.abandoned(why, by, now)
        else:
            track.refused(why, by, now)
        self._tell(model)

    # -- changing hands ------------------------------------------------------------------------------------------

    async def _serve(
        self,
        model: FollowedModel,
        release: Release,
        versions: list[ServedVersion],
        by: str,
        outcome: Literal["swapped", "rolled_back", "promoted"],
    ) -> Result:
        """The name means `versions` before anybody else runs."""
        before, track = model.track.live, model.track
        self._catalog.flip(model.name, versions, keep=track.keep > 0)
        model.served[release] = versions
        self._drop(model, track.swapped(release, by, self._now(), outcome))
        self._forget_lost(model)
        self._tell(model)
        # Files that changed keep their version number: then the digests tell the two apart.
        full = before is not None and before.version == release.version
        was = named(before, full=full) if before is not None else "nothing"
        text = f"{named(release, full=full)} serves now, {was} before"
        if track.withheld and model.following.source is not None:
            text += (
                f"; {model.following.reference} is not followed until it means something else, or: gateway models "
                f"refresh {model.name} --force"
            )
        result = model.result(outcome, text)
        await model.note(release)
        return result

    async def rollback(self, name: str, by: str) -> Result:
        """Let the name mean what it meant before, at once; what it meant until now is kept in its place. Needs no turn.

        Raises:
            NothingToDo: nothing is kept.
            LoadFailed: what is kept cannot answer.
        """
        model = self._known(name)
        kept = model.track.back()
        if kept is None:
            raise NothingToDo(
                f"model '{name}' has no former version loaded, so there is nothing to go back to; keep_previous says "
                "how many are kept from the next swap on"
            )
        versions = model.served[kept.release]
        if obstacle := obstacle_of(versions):
            raise LoadFailed(f"model '{name}': {obstacle}")
        model.end_trial()
        self._not_served(model, "it was given up for a rollback", by, passing=True)
        return await self._serve(model, kept.release, versions, by, "rolled_back")

    async def promote(self, name: str, versions: list[ServedVersion], by: str) -> Result:
        """Let the name mean versions that are loaded beside, a canary. The caller has the model's turn, and has asked
        whether they fit its clients.

        Raises:
            NothingToDo: the model is not loaded, one of the versions is not, or it has the name already.
        """
        model = self._known(name)
        model.track.keep = (await asyncio.to_thread(self._find, name)).keep  # it may not have had a canary when loaded
        if any(version.role == "champion" for version in versions):
            raise NothingToDo(f"version {versions_of(versions)} is what the name of model '{name}' means already")
        if bad := next((version for version in versions if not version.ready), None):
            raise NothingToDo(f"version {bad.version} cannot answer: {bad.obstacle}")
        now = self._now()
        release = Release(identity_of(versions), versions_of(versions), uri_of(versions), now, digest_of(versions))
        for event in (ReleaseEvent.VERIFIED, ReleaseEvent.LOADED, ReleaseEvent.CHECKED):
            release.go(event, now)
        return await self._serve(model, release, versions, by, "promoted")

    def _forget_lost(self, model: FollowedModel) -> None:
        """What was not well when it was displaced is not kept."""
        for release in model.track.previous:
            if any(version.role != "previous" for version in model.served[release]):
                self._lose(model, release)

    def _lose(self, model: FollowedModel, release: Release) -> None:
        model.track.lost(release, self._now())
        self._drop(model, [release])

    def _drop(self, model: FollowedModel, releases: Iterable[Release]) -> None:
        for release in releases:
            self._catalog.retire(model.served.pop(release, ()))

    # -- what is known -------------------------------------------------------------------------------------------

    def _known(self, name: str) -> FollowedModel:
        model = self._models.get(name)
        if model is None:
            raise NothingToDo(f"model '{name[:64]}' is not loaded here")
        return model

    def _tell(self, model: FollowedModel) -> None:
        """Log and count the newest line of a model's history, and pass it on."""
        self.on_happened(model.name, model.tell())

    def status(self, name: str) -> ModelReleasesStatus | None:
        """None: the model is not loaded."""
        model = self._models.get(name)
        return None if model is None else model.status(followed=self.follows(name))

    def statistics(self) -> list[ModelReleasesStatus]:
        """Of every model that is loaded, by name."""
        found = [self.status(name) for name in sorted(self._models)]
        return [one for one in found if one is not None]

    async def close(self) -> None:
        """Follow no more, and give up what is on trial."""
        self._closed = True
        tasks = [task for model in self._models.values() for task in (model.task, model.trial) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def __repr__(self) -> str:
        return f"<Releases {len(self._models)} models>"
