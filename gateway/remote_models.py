"""Models of remote servers: which there are, what each is loaded with, and which replicas each has at every moment.

A model's backends are what its entry of the configuration lists, or every server of the URLs among the sources whose
index names it as ready. Two tasks of this file:
- at start and at reload: ask all servers, a few at a time and not for long, and turn the answers into `WantedVersion`s;
- from then on (`follow`): bring the replicas of every loaded version in line with the servers that there are. A server
  that was down joins when it was heard of; one that left the configuration or the address list drains and goes.

Rules: what a server said last holds until it says otherwise: one that is down takes nothing away. The first server that
answers, in the order of the configuration, defines the signature of a version that is not on disk; a replica whose
server shows another one stays unavailable and says so. All changes of replicas happen in one task at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from gateway.backends.interface import Traits
from gateway.backends.remote import RemoteReplica
from gateway.backends.remote_endpoint import RemoteModel
from gateway.backends.remote_server import RemoteServer
from gateway.catalog import Catalog, ServedVersion
from gateway.config import Config
from gateway.config_models import model_names
from gateway.core.model import Artifact, ModelState
from gateway.errors import ConfigError, GatewayError, ModelError
from gateway.loading import LoadedModel, WantedVersion
from gateway.remote_census import Census, Redundant
from gateway.remote_composition import Composition, Origin, compose, is_remote, origins
from gateway.remote_loaded import MixedLoaded, RemoteLoaded, RemoteSide, Wanted
from gateway.remote_sites import START_S, Site, SiteKey
from gateway.remote_versions import ONLY, asked_as, signature_of, version_order, versions_of
from gateway.remote_wanted import broken_version, settings_of, wanted_version

log = logging.getLogger("gateway.backends")

NONE_HAS_IT: Final = "no backend can serve it; start one that has it, or correct its url or model"
REDISCOVERY_S: Final = 3.0
"""Between two looks for servers that were never heard of."""


class RemoteModels:
    """All remote servers and the models on them."""

    def __init__(self, config: Config, catalog: Catalog) -> None:
        self._config = config
        self._catalog = catalog
        self._origins: list[Origin] = []
        """The servers that `_config` names."""
        self._sites: dict[SiteKey, Site] = {}
        self._models: dict[str, Redundant] = {}
        self.census = Census()
        """What the servers said."""
        self._attached: weakref.WeakSet[ServedVersion] = weakref.WeakSet()
        """Versions that have, or may get, remote replicas."""
        self._warned: dict[str, str] = {}
        """What was last said of names that are not served, by whatever it was about."""
        self._changing = asyncio.Lock()
        self._wake = asyncio.Event()
        self._following: asyncio.Task[Any] | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        """Replicas that left and still answer what they had taken."""
        self.on_discovered: Callable[[str], None] = lambda name: None
        """Called with the name of a model that a server has which was down at start."""
        self.drained: Callable[[str, str, str], bool] = lambda model, server, url: False
        """Whether a model gets no batches on a server of that name and URL: others are loaded from first, since a
        version begins with one replica."""

    def __repr__(self) -> str:
        return f"<RemoteModels models={len(self._models)} sites={len(self._sites)}>"

    @property
    def configured(self) -> bool:
        """Whether the configuration names any server."""
        return any(is_remote(self._config, entry) for entry in self._config.models)

    # -- what there is -------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Ask all servers that the configuration names; those that do not answer in time are logged.

        Raises:
            ConfigError: a secret cannot be read, or a name is served from two places.
        """
        await self._take(self._config)
        for site in self._sites.values():
            for cause in self.census.silent(site):
                log.warning("backend %s does not answer: %s; it joins when it does", site.endpoint.url, cause)
        for model in self._models.values():
            if self.census.unheard(model):
                log.warning("model %s: not all backends have it: %s", model.name, self.census.silence(model))

    def obstacle(self) -> str:
        """Why there is no model at all, in words; empty if there is one."""
        if self._models:
            return ""
        silent = [
            f"{site.endpoint.url}: {cause}" for site in self._sites.values() for cause in self.census.silent(site)
        ]
        return "no server answers: " + "; ".join(silent) if silent else "no server has a model that is ready"

    def names(self) -> list[str]:
        """Models that are not on disk, in order."""
        return sorted(name for name, model in self._models.items() if not model.mixed)

    def server_names(self) -> set[str]:
        """What people may call the servers that the configuration names: names, addresses and URLs."""
        endpoints = [origin.endpoint for origin in self._origins]
        return {name for one in endpoints for name in (one.label, one.authority, one.url)}

    def settings(self) -> dict[str, object]:
        """For each of `names`, what makes it another model when it changes."""
        return {
            name: (settings_of(self._config, model), tuple(versions_of(self.census.offers(model))))
            for name, model in self._models.items()
            if not model.mixed
        }

    async def wanted(self, name: str) -> list[WantedVersion]:
        """The versions of a model that is not on disk; none if no server has it. Never raises for a server's sake:
        what cannot be served says why when it is loaded."""
        model = self._models.get(name)
        if model is None or model.mixed:
            return []
        await self.census.ask(model)
        versions = versions_of(self.census.offers(model))
        if not versions:
            why = ModelError(f"{NONE_HAS_IT}: {self.census.silence(model)}")
            return [broken_version(self._config, model, ONLY, why)]
        return [await self._wanted_version(model, version, versions[-1]) for version in versions]

    def mixed(self, name: str, loaded: LoadedModel) -> LoadedModel:
        """What was loaded on workers, with room for the servers beside it, if the configuration names any."""
        model = self._models.get(name)
        if model is None or not model.mixed:
            return loaded
        return MixedLoaded(loaded, RemoteSide(), self.census.most_rows(model))

    def attach(self, version: ServedVersion) -> None:
        """A version was loaded and is about to serve; its other replicas follow."""
        side = _side(version)
        if side is not None:
            for replica in side.replicas.values():
                replica.max_rows = version.spec.policy.max_batch_size
            self._attached.add(version)
            version.origin = partial(self._origin, version)
            self._wake.set()

    # -- following -----------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Keep the replicas of all versions in line with the servers, until cancelled or closed."""
        self._following = asyncio.current_task()
        while True:
            unheard = any(map(self.census.silent, self._sites.values())) or self._some_lacking()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REDISCOVERY_S if unheard else None):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self._look_again()
            except Exception:
                log.exception("bringing the backends in line failed; it is tried again")

    def _some_lacking(self) -> bool:
        """Whether a server answers, and did not say what it has of a model that it should have."""
        return any(map(self.census.unheard, self._models.values()))

    async def _look_again(self) -> None:
        silent = [site for site in self._sites.values() if self.census.silent(site)]
        if silent or self._some_lacking():
            before = set(self._models)
            async with self._changing:
                await self.census.refresh(silent, self._listing(self._origins))
                self._adopt(await self._compose(self._config, self._origins))
                await asyncio.gather(*[self.census.ask(model, unheard=True) for model in self._models.values()])
            for name in sorted(self._models.keys() - before):
                log.info("model %s is known now", name)
                self.on_discovered(name)
        await self.reconcile()

    async def reload(self, config: Config) -> None:
        """Take over another configuration's servers; the models are the caller's business, then `reconcile`.

        Raises:
            ConfigError: as `open`; nothing was changed then.
        """
        await self._take(config)

    async def refresh(self) -> None:
        """Ask all servers anew what they have."""
        async with self._changing:
            await self.census.refresh(self._sites.values(), self._listing(self._origins))
            self._adopt(await self._compose(self._config, self._origins))
            await asyncio.gather(*map(self.census.ask, self._models.values()))

    async def reconcile(self) -> None:
        """Add and remove replicas of all loaded versions until they are those that should be."""
        async with self._changing:
            await asyncio.gather(*map(self._settle, list(self._attached)))
            await self._close_unused()

    async def close(self) -> None:
        """Waits for nobody: whatever is being asked or changed meanwhile finds its servers closed."""
        tasks = [*self._retiring, *([self._following] if self._following is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*[site.close() for site in self._sites.values()])

    async def _settle(self, version: ServedVersion) -> None:
        side = _side(version)
        if side is None or not _serving(version):
            return
        model = self._models.get(version.name)
        served = {version.version, *self._catalog.ready_versions(version.name)}
        due = self._due(model, version.version, max(served, key=version_order)) if model is not None else []
        leaving = [key for key in side.replicas if key not in due]
        inputs, outputs = signature_of(version.spec)
        coming = {key: key.replica(inputs, outputs) for key in due if key not in side.replicas}
        for replica in coming.values():
            replica.max_rows = version.spec.policy.max_batch_size
            replica.set_warm_up(version.probe)
        if leaving:  # whoever takes over is up to it before anybody leaves
            await asyncio.gather(*[replica.verify(START_S) for replica in coming.values()])
        if not _serving(version):  # unloaded meanwhile
            await asyncio.gather(*[replica.close() for replica in coming.values()])
            return
        gone = [side.replicas.pop(key) for key in leaving if key in side.replicas]
        for key, replica in coming.items():
            side.replicas[key] = replica
            version.add_replica(replica)
            when = "" if replica.available else " as soon as it is verified"
            log.info("model %s: backend %s joins%s", version.name, replica.name, when)
        for replica in gone:
            log.info("model %s: backend %s leaves", version.name, replica.name)
            # One that hangs must not hold up what happens to the others.
            task = asyncio.ensure_future(_retire(version, replica))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    def _due(self, model: Redundant, version: str, newest: str) -> list[Wanted]:
        """The replicas that a version should have."""
        due = []
        for line, server in model.servers():
            asked = asked_as(self.census.offer(line, server), version, newest)
            if asked is not None:
                backend = line.backend
                host = backend.host or server.address or server.endpoint.host
                traits = Traits("oip", backend.weight, backend.zone, host, server.name, backend.max_slots)
                due.append(Wanted(server, line.model, asked, traits))
        return due

    async def _close_unused(self) -> None:
        """Servers that left are closed; those that still answer what a replica had taken, when that is over."""
        used = {origin.key for origin in self._origins}
        for key, site in list(self._sites.items()):
            await site.close_gone()
            if key not in used:
                del self._sites[key]
                await site.leave()
        self.census.forget({server for site in self._sites.values() for server in site.servers.values()})

    # -- asking --------------------------------------------------------------------------------------------------

    async def _take(self, config: Config) -> None:
        async with self._changing:
            found = await asyncio.to_thread(origins, config)
            fresh: dict[SiteKey, Site] = {}
            for origin in found:
                if origin.key not in self._sites and origin.key not in fresh:
                    fresh[origin.key] = Site(origin.endpoint, self._wake.set)
            before = self._sites
            self._sites = self._sites | fresh
            try:
                await asyncio.gather(*[site.start() for site in fresh.values()])
                asked = dict.fromkeys(self._sites[origin.key] for origin in found)
                await self.census.refresh(asked, self._listing(found))
                made = await self._compose(config, found)
                if made.taken:
                    raise ConfigError(made.taken)
                await asyncio.gather(*map(self.census.ask, made.models.values()))
            except BaseException:
                self._sites = before
                for site in fresh.values():
                    await site.close()
                raise
            self._config, self._origins = config, found
            self._adopt(made)

    async def _compose(self, config: Config, found: list[Origin]) -> Composition:
        on_disk = await asyncio.to_thread(model_names, config)
        return compose(config, found, self._sites, self.census, on_disk)

    def _adopt(self, made: Composition) -> None:
        """From now on these are the models; what of the servers is left out is said, once."""
        self._models = made.models
        texts = {url: f"{url} has models that cannot be served: {wrong}" for url, wrong in made.unusable.items()}
        texts |= {f"{fault.where} {fault.message}": str(fault) for fault in made.taken}
        for place, text in texts.items():
            if self._warned.get(place) != text:
                log.warning("%s", text)
        self._warned = texts

    def _listing(self, found: list[Origin]) -> set[Site]:
        """Sites whose models are those that they list."""
        return {self._sites[origin.key] for origin in found if origin.listed}

    # -- loading -------------------------------------------------------------------------------------------------

    async def _wanted_version(self, model: Redundant, version: str, newest: str) -> WantedVersion:
        heard: list[RemoteModel] = []
        for line, server in model.servers():
            offer = self.census.offer(line, server)
            asked = asked_as(offer, version, newest) if offer.versions is not None else None
            if asked is not None and (found := await self.census.hear(line, server, asked)) is not None:
                heard.append(found)
        try:
            if not heard:
                raise ModelError(f"{NONE_HAS_IT}: {self.census.silence(model)}")
            load = partial(self._load, model.name, version, newest, heard[0], Counter())
            return wanted_version(self._config, model, version, heard, load)
        except GatewayError as error:
            return broken_version(self._config, model, version, error)

    async def _load(
        self,
        name: str,
        version: str,
        newest: str,
        first: RemoteModel,
        tried: Counter[RemoteServer],
        artifact: Artifact,
    ) -> LoadedModel:
        """One replica, whose server answers; the others join once the version serves.

        `tried`: how often this load began on each server. Asked again, since one was lost meanwhile, it takes another.

        Raises:
            ModelError: no server has it any more.
        """
        model = self._models.get(name)
        causes = []
        due = self._due(model, version, newest) if model is not None else []
        drained = {wanted.server: self.drained(name, wanted.server.name, wanted.server.url) for wanted in due}
        for wanted in sorted(due, key=lambda wanted: (drained[wanted.server], tried[wanted.server])):
            if not self.census.answers(wanted.server):
                continue
            replica = wanted.replica(first.inputs, first.outputs)
            cause = await replica.verify(START_S)
            if not cause:
                tried[wanted.server] += 1
                side = RemoteSide()
                side.replicas[wanted] = replica
                return RemoteLoaded(side, first.inputs, first.outputs)
            causes.append(f"{replica.name}: {cause}")
            await replica.close()
        raise ModelError(f"no backend of {artifact.name} can be used: {'; '.join(causes) or 'none answers'}")

    def _origin(self, version: ServedVersion) -> list[dict[str, Any]]:
        """For people: what the servers of a version said of it."""
        side = _side(version)
        found = []
        for wanted, replica in side.replicas.items() if side is not None else ():
            heard = self.census.known(wanted.server, wanted.model, wanted.version)
            found.append(
                {
                    "name": replica.name,
                    "url": wanted.server.endpoint.url,
                    "model": wanted.model,
                    "version": wanted.version or None,
                    "metadata": dict(heard.raw) if heard is not None else None,
                }
            )
        return found


def _serving(version: ServedVersion) -> bool:
    return version.state is ModelState.READY


async def _retire(version: ServedVersion, replica: RemoteReplica) -> None:
    """It takes nothing more, answers what it has, and is closed."""
    try:
        await version.remove_replica(replica)
        await replica.close()
    except Exception:
        log.exception("taking the backend %s of model %s out of service failed", replica.name, version.name)


def _side(version: ServedVersion) -> RemoteSide | None:
    loaded = version.loaded
    return loaded.side if isinstance(loaded, RemoteLoaded | MixedLoaded) else None
