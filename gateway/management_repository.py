"""Loading and unloading at run time: who may ask, what is loaded, and what happens to what served before.

Modes (`server.model_control`, Triton's): `none`: what the configuration names is served, for good. `poll`: the sources
are looked at every `repository_poll_s` seconds; new and changed models are loaded, vanished ones unloaded. `explicit`:
only `load_models` at start (`*`: all), then whatever load and unload requests say.

Rules: loads and unloads of one model happen one after the other, of several models a few at a time. A load that fails
leaves what served before serving. What an ensemble is made of is loaded with it if it does not serve yet. An override
(management_override.py) holds until the next load, which reads the source anew. A model that was never loaded is only a
name. Everything that touches the disk runs in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from gateway import plan
from gateway.catalog import Catalog, ServedVersion
from gateway.config import Config, ModelEntry, yielding
from gateway.config_models import check_batch_sizes, find_model, locate_model, model_names
from gateway.core.model import ModelState
from gateway.errors import (
    ConfigError,
    Fault,
    GatewayError,
    LoadFailed,
    NotReady,
)
from gateway.loading import WantedVersion
from gateway.management_fingerprints import fingerprints
from gateway.management_override import Override, overridden, read_override
from gateway.management_requests import ModelControl, check_name, check_request, known_versions
from gateway.management_servers import NoneRegistered, NoServers, Registered, Servers
from gateway.protocol.model_config import ModelConfig
from gateway.releases import Releases

log = logging.getLogger("gateway.repository")

ALL: Final = "*"
MAX_GONE: Final = 1000
"""Models that do not serve any more, or could not be loaded, and are still known: clients can invent names."""
MAX_SHOWN: Final = 10
"""Names of models in one message."""
AGAIN_S: Final = 10.0
"""Between two attempts to load a model that was found late."""
SIGNAL: Final = "SIGHUP"
"""Who asks where a signal has the configuration read again."""
PARALLEL: Final = 2
"""Models loaded at one time."""


class Repository:
    """The configuration's sources, and the catalog they are loaded into."""

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        load: plan.Load,
        servers: Servers | None = None,
        releases: Releases | None = None,
        registered: Registered | None = None,
    ) -> None:
        self._servers = servers or NoServers()
        self._registered = registered or NoneRegistered()
        self._releases = releases or Releases(catalog)
        self._config = config
        self._catalog = catalog
        self._load = load
        self._mode: ModelControl = config.server.model_control
        self._gate = asyncio.Semaphore(PARALLEL)
        self._polling = asyncio.Lock()
        self._with: set[str] = set()
        """Models that were loaded only because an ensemble needs them."""
        self._elsewhere: list[str] = []
        """Models to load at start that are not on disk."""
        self._first_registered: list[str] = []
        """And those of registries."""
        self._seen: dict[str, object] = {}
        """What each model's settings and files looked like when they were looked at last; not in mode explicit."""
        self._behind: set[str] = set()
        """Models that could not be loaded as they were wanted last."""
        self.forgotten: Callable[[str], None] = lambda name: None
        """Called with the name of a model about which nothing is known any more."""
        self.open = False
        """Whether loads and unloads are taken: not before what is served from the start is loaded."""

    @property
    def config(self) -> Config:
        """Where models are looked for now."""
        return self._config

    # -- at start ------------------------------------------------------------------------------------------------

    def initial(self) -> list[WantedVersion]:
        """What is to be served from the start; blocks on the disk.

        Raises:
            ConfigError: with every fault of every source (explicit: of the models asked for).
        """
        chosen = self._config.server.load_models
        if self._mode != "explicit" or ALL in chosen:
            wanted = plan.versions(self._config, self._load)
            self._seen = fingerprints(self._config)
            self._first_registered = self._registered.names()
            return wanted
        faults: list[Fault] = []
        found: list[WantedVersion] = []
        names = list(dict.fromkeys(chosen))
        for name in names:  # it grows by the models that ensembles are made of
            try:
                versions = plan.versions_of(self._config, self._load, name)
            except ConfigError as error:
                faults += error.faults
                continue
            if not versions and name in self._registered.names():
                self._first_registered.append(name)
            elif not versions and self._servers.configured:
                self._elsewhere.append(name)
            elif not versions:
                text = f"no source has a model '{name}'; {self._choice()}"
                faults.append(Fault(self._config.file or "command line", 0, "server.load_models", text))
            found += versions
            steps = {step.model for version in versions for step in version.scheduling.ensemble}
            self._with |= steps - set(names)
            names += sorted(steps - set(names))
        if faults:
            raise ConfigError(faults)
        return found

    async def initial_registered(self) -> list[WantedVersion]:
        """What is to be served from the start of the models that come from registries.

        Raises:
            LoadFailed: what some of them mean cannot be found out; with every reason.
            ConfigError: models.lock cannot be used.
        """
        names, self._first_registered = self._first_registered, []
        asked = [asyncio.to_thread(self._registered.wanted, name) for name in names]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        failed = []
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, LoadFailed):
                failed.append(f"model '{name}': {answer}")
            elif isinstance(answer, BaseException):
                raise answer
        if failed:
            raise LoadFailed("\n".join(failed))
        if self._mode != "explicit":
            self._seen |= self._registered.settings()
        return [version for versions in answers if isinstance(versions, list) for version in versions]

    async def initial_remote(self) -> list[WantedVersion]:
        """What is to be served from the start of the models that are not on disk.

        Raises:
            ConfigError: a model was asked for that nobody has.
        """
        if self._mode != "explicit" or ALL in self._config.server.load_models:
            names = self._servers.names()
            self._seen |= self._servers.settings()
        else:
            names, self._elsewhere = self._elsewhere, []
        found = dict(zip(names, await asyncio.gather(*map(self._servers.wanted, names)), strict=True))
        if lacking := [name for name, versions in found.items() if not versions]:
            choice = await asyncio.to_thread(self._choice)
            place = self._config.file or "command line"
            texts = [f"no source has a model '{name}'; {choice}" for name in lacking]
            raise ConfigError([Fault(place, 0, "server.load_models", text) for text in texts])
        return [version for versions in found.values() for version in versions]

    async def discovered(self, name: str) -> None:
        """A server that was down has this model: it is served too, unless clients choose what is. Returns when it is,
        or nobody has it any more."""
        said = ""
        while self._mode != "explicit" and self.open and not self._catalog.ready_versions(name):
            if name not in self._servers.names():
                return  # it left again
            try:
                await self._load_with_steps(name, None, (), "discovery")
                self._seen |= {key: value for key, value in self._servers.settings().items() if key == name}
            except GatewayError as error:
                if str(error) != said:
                    log.error("%s; it is tried again", error)
                said = str(error)
                await asyncio.sleep(AGAIN_S)

    def _known_names(self) -> list[str]:
        """Every model that could be loaded, in order; blocks on the disk."""
        return sorted({*model_names(self._config), *self._servers.names(), *self._registered.names()})

    def _choice(self) -> str:
        """What could be loaded, for people; bounded. Blocks on the disk."""
        names = self._known_names()
        more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
        return f"there are: {', '.join(names[:MAX_SHOWN])}{more}" if names else "the sources are empty"

    def loadable(self) -> list[str]:
        """Names of the models that clients can load now; blocks on the disk."""
        return self._known_names() if self._mode == "explicit" else []

    # -- what clients ask ----------------------------------------------------------------------------------------

    async def index(self, ready: bool = False, repository: str = "") -> list[dict[str, str]]:
        """Every version with its state, or only those that are READY; models never loaded have only a name. READY means
        what `…/ready` means: one that is loaded, and cannot answer, is UNAVAILABLE with the reason.

        `repository` chooses among several in Triton and is ignored, as it is there.
        """
        entries = known_versions(self._catalog.distinct(), ready=ready)
        if not ready and self._mode != "none":
            known = set(self._catalog.names())
            loadable = await asyncio.to_thread(self._known_names)
            entries += [{"name": name} for name in loadable if name not in known]
        return sorted(entries, key=lambda entry: entry["name"])

    async def load(self, name: str, parameters: Mapping[str, object], repository: str = "") -> None:
        """Load a model, or load it again; returns when its name means what was asked for.

        `parameters`: see `management_override.read_override`.

        Raises:
            ControlOff: the mode is not explicit.
            NotReady: the gateway is still starting.
            InvalidRequest: the name or a parameter cannot be used.
            Unsupported: a repository is named.
            LoadFailed: unknown or broken model.
        """
        check_request(name, repository, self._mode, is_open=self.open)
        check_name(name)
        try:
            await self._load_with_steps(name, await asyncio.to_thread(read_override, parameters), (), "request")
        except (ConfigError, LoadFailed) as error:
            if isinstance(error, ConfigError):
                error = LoadFailed(f"failed to load '{name}', failed to poll from model repository: {error}")
            log.error("%s", error)
            raise error from None
        finally:
            self._forget_gone()

    async def unload(self, name: str, unload_dependents: bool = False, repository: str = "") -> None:
        """Unload a model; returns when its accepted requests are answered. An unknown one is unloaded already.

        `unload_dependents`: and what was loaded only for its sake, if no other model needs it.

        Raises:
            ControlOff, NotReady, InvalidRequest, Unsupported: as `load`.
        """
        check_request(name, repository, self._mode, is_open=self.open)
        steps = {step for version in self._catalog.of(name) for step in version.dependencies}
        async with self.turn(name):
            await self._unload(name, "request")
        self._with.discard(name)
        self._forget_gone()
        if not unload_dependents:
            return
        for step in sorted(steps & self._with):
            if not self._needed(step):
                await self.unload(step, unload_dependents=True)

    async def _unload(self, name: str, by: str) -> None:
        """The caller has the model's turn."""
        await self._catalog.unload(name)
        self._releases.unloaded(name, by)

    def _forget_gone(self) -> None:
        for name in self._catalog.forget_gone(MAX_GONE):
            self.forgotten(name)

    def _needed(self, name: str) -> bool:
        """Whether a model that serves is composed of this one."""
        return any(name in v.dependencies for v in self._catalog.versions() if v.state is ModelState.READY)

    # -- loading -------------------------------------------------------------------------------------------------

    def turn(self, name: str) -> contextlib.AbstractAsyncContextManager[None]:
        """Held by whoever loads, replaces or retires versions of a model."""
        return self._releases.turn(name)

    async def _load_with_steps(self, name: str, override: Override | None, above: tuple[str, ...], by: str) -> None:
        """What an ensemble is made of serves before the ensemble does. `above`: ensembles that want this model.

        No turn is held while another is waited for, so that two loads cannot wait for each other.
        """
        if name in above:
            raise LoadFailed(f"failed to load '{above[0]}': the ensembles {', '.join(above)} contain each other")
        for step in await asyncio.to_thread(self._steps, name, override):
            if not self._catalog.ready_versions(step):
                await self._load_with_steps(step, None, (*above, name), by)
        async with self.turn(name):
            if above and self._catalog.ready_versions(name):
                return  # somebody else was faster
            await self._load_one(name, override, by)
        if above:
            self._with.add(name)
        else:
            self._with.discard(name)

    def _steps(self, name: str, override: Override | None) -> list[str]:
        """Runs in a thread."""
        if override is not None:
            config: ModelConfig | None = override.config
        else:
            found = find_model(self._config, name)
            config = found[1].config if found is not None else None
        return sorted({step.model for step in config.scheduling.ensemble}) if config is not None else []

    async def _load_one(self, name: str, override: Override | None, by: str) -> None:
        """The caller has the model's turn. Raises LoadFailed, ConfigError."""
        with contextlib.ExitStack() as until_loaded:
            wanted = await asyncio.to_thread(self._wanted, name, override, until_loaded)
            if not wanted and override is None:
                wanted = await self._servers.wanted(name)
            if not wanted:
                choice = await asyncio.to_thread(self._choice)
                raise LoadFailed(
                    f"failed to load '{name}', failed to poll from model repository: no source has this model; {choice}"
                )
            async with self._gate:
                failed = await self._releases.replace(wanted, by, follow=override is None)
        if failed:
            raise LoadFailed(
                f"failed to load '{name}': version {failed[0].version} is at UNAVAILABLE state: {_cause(failed[0])}"
            )

    def _wanted(self, name: str, override: Override | None, until_loaded: contextlib.ExitStack) -> list[WantedVersion]:
        """Runs in a thread."""
        if override is None:
            return plan.versions_of(self._config, self._load, name) or self._registered.wanted(name)
        entry, place = locate_model(self._config, name) or (ModelEntry(source=name), None)
        entry = yielding(entry, override.config)
        found = until_loaded.enter_context(overridden(name, place, override))
        check_batch_sizes(self._config, entry, found)
        return plan.settled(self._config, entry, found, self._load)

    # -- polling -------------------------------------------------------------------------------------------------

    async def poll_for_ever(self) -> None:
        """Follow the sources until cancelled; does nothing in another mode than `poll`."""
        while self._mode == "poll":
            await asyncio.sleep(self._config.server.repository_poll_s)
            if not self.open:
                return
            try:
                await self._servers.refresh()
                await self.poll()
                await self._servers.reconcile()
            except Exception:
                log.exception("looking at the model repository failed; it is tried again")

    async def poll(self, by: str = "poll") -> list[str]:
        """Bring the catalog in line with the sources, once. A model that cannot be loaded is logged, and tried again
        when its files or settings change, or when a signal asks for it. Returns the names of those."""
        async with self._polling:
            return await self._poll(by)

    async def _poll(self, by: str) -> list[str]:
        now = await asyncio.to_thread(fingerprints, self._config)
        now |= self._servers.settings() | self._registered.settings()
        for name in sorted(self._seen.keys() - now.keys()):
            log.info("model %s has left the repository and is unloaded", name)
            async with self.turn(name):
                await self._unload(name, by)
        again = self._behind if by == SIGNAL else set()
        changed = [name for name in sorted(now) if name in again or self._differs(name, now[name])]
        self._seen = now
        failed = []
        for name in changed:
            try:
                await self._load_with_steps(name, None, (), by)
            except GatewayError as error:
                log.error("model %s has changed but stays as it was: %s", name, error)
                failed.append(name)
        self._behind = (self._behind - set(changed)) & now.keys() | set(failed)
        return failed

    def _differs(self, name: str, looks: object) -> bool:
        """Whether a model must be loaded again. What is followed sees to changes of its files by itself."""
        before = self._seen.get(name)
        if self._releases.follows(name) and name not in self._registered.names():
            return _settings(before) != _settings(looks)
        return before != looks

    async def reload(self, config: Config) -> list[str]:
        """Serve what another configuration names: what is new or changed is loaded, what it does not name unloaded.

        In mode `explicit` it only changes where models are looked for. Its `server` is not looked at.
        Returns the names of models that could not be loaded and stay as they were.

        Raises:
            ConfigError: it names something that cannot be served; nothing was changed.
            NotReady: the gateway is starting or stopping.
        """
        if not self.open:
            raise NotReady("the gateway is starting or stopping")
        await asyncio.to_thread(plan.versions, config, self._load)
        await self._servers.reload(config)
        self._registered.reload(config)
        self._config = replace(config, server=self._config.server)
        failed = await self.poll(SIGNAL) if self._mode != "explicit" else []
        await self._servers.reconcile()
        return failed


def _settings(looks: object) -> object:
    """Of what `fingerprints` says of a model, the part that is not its files."""
    return looks[0] if isinstance(looks, tuple) and looks else looks


def _cause(version: ServedVersion) -> str:
    return version.reason.removeprefix(f"model '{version.name}' version {version.version}: ")
