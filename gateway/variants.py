"""The variants of models: which canary and which shadow stand beside a champion, and how they get there.

The configuration says what is wanted; this file brings it about and keeps it so. Rules:
  * a variant has worker processes of its own, those of a shadow at the lowest priority: whatever one does, the
    champion's workers do not notice;
  * a variant that cannot be loaded, does not fit, or has left, costs nobody an answer: the champion has its share. Why
    it is not there is told once, and shown for as long as it holds;
  * a variant must be able to answer the champion's clients (core/signature_compatibility.py). That is looked at again
    whenever another version becomes champion;
  * a variant with the champion's own version number is that version: it is not loaded a second time;
  * a share that an operator set at run time holds until the configuration's own changes, or the process ends;
  * one that could not be loaded for a reason that may be over soon is tried again, after pauses that grow; one that was
    refused is not, until its files look different, its source means something else, or the configuration is read anew;
  * loads of one model happen one after the other, together with everybody else's (`turn`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Final

from gateway.catalog import Catalog, ServedVersion, confirm
from gateway.config import Config, ModelEntry
from gateway.config_release import Canary, Shadow
from gateway.config_variant_models import entries_with_variants
from gateway.core.model import ModelState
from gateway.core.signature_compatibility import incompatibilities
from gateway.errors import ConfigError, GatewayError, LoadFailed, PassingTrouble, SourceUnavailable
from gateway.loading import WantedVersion
from gateway.loading_passing import Passing
from gateway.traffic import Chance
from gateway.traffic_shadow import unmirrorable
from gateway.variants_hanging import Infer, hang_mirror, hang_split, show, unhang
from gateway.variants_sources import Target, variant_entry
from gateway.variants_status import TrafficStatus
from gateway.variants_wanted import AGAIN_S, ROLES, ModelVariants, VariantRole, WantedVariant

log = logging.getLogger("gateway.traffic")

AT_ONCE: Final = 4
"""Variants whose sources are asked, or which are loaded: a registry that hangs must neither hold up the others' nor
occupy every thread there is."""
POLL_S: Final = 30.0
"""Between two looks at a source that may mean something else by itself, where `poll_interval_s` does not say; or
at files that were refused."""


Find = Callable[[Config, str, ModelEntry, Canary | Shadow, VariantRole], Awaitable[Target]]
"""Asks a variant's source (`variants_sources.find`, in a thread). Raises SourceUnavailable: it may be asked again;
other GatewayErrors: it may not, until something changes."""
Looks = Callable[[Config, ModelEntry, Canary | Shadow], Awaitable[object]]
"""See `variants_sources.looks`."""


async def _unlooked(config: Config, entry: ModelEntry, keys: Canary | Shadow) -> object:
    """Nothing lies on disk."""
    return None


class Variants:
    """All models that have a canary or a shadow."""

    def __init__(
        self,
        catalog: Catalog,
        find: Find,
        infer: Infer,
        turn: Callable[[str], AbstractAsyncContextManager[Any]],
        chance: Chance | None = None,
        clock: Callable[[], float] = time.monotonic,
        looks: Looks = _unlooked,
    ) -> None:
        """`infer`: how copies reach a shadow; `turn`: held while a model's versions are loaded or replaced."""
        self._catalog = catalog
        self._find = find
        self._infer = infer
        self._turn = turn
        self._chance = chance or random.Random()  # noqa: S311  # a sample
        self._now = clock
        self._config = Config()
        self._models: dict[str, ModelVariants] = {}
        self._wake = asyncio.Event()
        self._looks = looks
        self._trying = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        catalog.on_elected = self.elected

    def __repr__(self) -> str:
        return f"<Variants models={len(self._models)}>"

    # -- the configuration -----------------------------------------------------------------------------------------

    async def configure(self, config: Config) -> None:
        """Want what `config` names from now on; `settle` brings it about.

        Raises:
            ConfigError: it cannot be told whose a variant is; nothing was changed.
        """
        entries = await asyncio.to_thread(entries_with_variants, config)
        self._config = config
        wanted = {name: entry for name, _, entry in entries}
        for name in self._models.keys() | wanted.keys():
            entry = wanted.get(name)
            model = self._models.setdefault(name, ModelVariants(name, self._chance))
            model.entry = entry or model.entry
            for role in ROLES:
                self._configure(model, role, getattr(entry, role) if entry is not None else None)
            self.elected(name)
        self._wake.set()

    def _configure(self, model: ModelVariants, role: VariantRole, keys: Canary | Shadow | None) -> None:
        before = model.variants.pop(role, None)
        if keys is None:
            if before is not None:
                self._retire(model, before)
            return
        settings = (variant_entry(model.entry, keys), keys.version, self._config.defaults, self._config.registries)
        variant = model.variants[role] = WantedVariant(role, keys, settings)
        if before is None:
            return
        variant.percent = before.percent if before.keys.percent == keys.percent else keys.percent
        variant.version, variant.reason, variant.same = before.version, before.reason, before.same
        variant.identity = before.identity if before.settings == variant.settings else ""

    async def settle(self) -> None:
        """Load what is wanted and not there, and let go of what is not wanted any more. Never raises for a variant's
        sake: why one is not there is its `reason`."""
        while tasks := self._begin():
            await asyncio.wait(tasks)

    def _begin(self) -> list[asyncio.Task[None]]:
        """Start what is due. Returns everything that is under way."""
        under_way = []
        for name, model in sorted(self._models.items()):
            for variant in model.variants.values():
                if variant.task is None and self._now() >= variant.due and not self._closed:
                    variant.task = asyncio.get_running_loop().create_task(self._settle(model, variant))
                    variant.task.add_done_callback(partial(self._settled, variant))
                    self._tasks.add(variant.task)
                if variant.task is not None:
                    under_way.append(variant.task)
            if not model.variants:
                del self._models[name]
        return under_way

    async def follow(self) -> None:
        """Do so whenever something changed, until cancelled. One that takes its time holds up no other."""
        while True:
            self._begin()
            idle = [v.due for m in self._models.values() for v in m.variants.values() if v.task is None]
            due = min(idle, default=math.inf)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if math.isinf(due) else max(0.1, due - self._now())):
                    await self._wake.wait()
            self._wake.clear()

    async def _settle(self, model: ModelVariants, variant: WantedVariant) -> None:
        try:
            async with self._trying:
                if not self._gone(model, variant):
                    await self._try(model, variant)
        except Exception:
            log.exception("model %s: bringing about its %s failed; it is tried again", model.name, variant.role)
            variant.due = self._now() + variant.pause_s()

    def _settled(self, variant: WantedVariant, task: asyncio.Task[None]) -> None:
        variant.task = None
        self._tasks.discard(task)
        self._wake.set()

    async def _try(self, model: ModelVariants, variant: WantedVariant) -> None:
        variant.due = math.inf
        if self._champion(model.name) is None:
            if variant.version is None:
                variant.reason = "the model does not serve"
            return  # it is looked at again when one is elected
        poll_s, looks = self._poll_s(model.entry), await self._looks(self._config, model.entry, variant.keys)
        if variant.looked is not None:
            if variant.looked == looks:
                variant.due = self._now() + (poll_s or math.inf)
                return  # they are what was refused
            variant.looked, variant.refused = None, ""
        try:
            target = await self._find(self._config, model.name, model.entry, variant.keys, variant.role)
            if target.mutable and poll_s:
                variant.due = self._now() + poll_s
            await self._take(model, variant, target)
            variant.failures = 0
        except PassingTrouble as error:
            variant.refused = ""
            self._trouble(model, variant, str(error))
            variant.due = self._now() + variant.pause_s()
        except SourceUnavailable as error:
            self._trouble(model, variant, str(error))
            variant.due = self._now() + AGAIN_S
        except GatewayError as error:
            self._trouble(model, variant, str(error))
            if looks is not None and poll_s and math.isinf(variant.due):  # else another champion came meanwhile
                variant.looked, variant.due = looks, self._now() + poll_s

    def _poll_s(self, entry: ModelEntry) -> float:
        stated = entry.poll_interval_s if entry.poll_interval_s is not None else self._config.defaults.poll_interval_s
        return POLL_S if stated is None else stated

    async def _take(self, model: ModelVariants, variant: WantedVariant, target: Target) -> None:
        """Raises GatewayError: it cannot be loaded, or does not fit."""
        if target.identity in (variant.identity if variant.version is not None else None, variant.refused):
            return
        async with self._turn(model.name):
            if self._gone(model, variant):
                return
            if self._is_champion(model.name, target.wanted.version):
                self._leave(model, variant)
                variant.out(_same(target.wanted.version), same=True)
                self.elected(model.name)
                return
            variant.refused = target.identity
            (version,) = await self._stage(variant, target.wanted)
            champion = self._champion(model.name)
            if champion is None or self._gone(model, variant):
                variant.refused = ""
                self._catalog.retire([version])
                return
            if reason := self._unfit(variant.role, champion, version):
                self._catalog.retire([version])
                raise ConfigError(f"version {version.version} cannot stand beside version {champion.version}: {reason}")
            former, variant.version = variant.version, version
            variant.identity, variant.refused, variant.reason, variant.same = target.identity, "", "", False
            variant.told = ""
            self.elected(model.name)
            if former is not None:
                self._catalog.retire([former])
        log.info(
            "model %s: version %s is its %s now, with %g %% of the requests", model.name, version.version, variant.role,
            variant.percent,
        )  # fmt: skip
        await confirm([version])

    async def _stage(self, variant: WantedVariant, wanted: WantedVersion) -> list[ServedVersion]:
        """Raises LoadFailed; PassingTrouble: later it may be loaded."""
        passing = Passing()
        watched = replace(wanted, read=lambda: passing.watch(wanted.read))
        try:
            return await self._catalog.stage([watched], variant.role)
        except LoadFailed as error:
            raise (PassingTrouble(str(error)) if passing.seen else error) from None

    def _trouble(self, model: ModelVariants, variant: WantedVariant, reason: str) -> None:
        """It could not be loaded. What was loaded before goes on."""
        if variant.version is None:
            variant.reason, variant.same = reason, False
        if reason != variant.told:
            log.error("model %s: its %s (%s) takes no part: %s", model.name, variant.role, variant.keys.source, reason)
        variant.told = reason
        self.elected(model.name)

    def _gone(self, model: ModelVariants, variant: WantedVariant) -> bool:
        return (
            self._closed or self._models.get(model.name) is not model or model.variants.get(variant.role) is not variant
        )

    # -- who is beside whom ----------------------------------------------------------------------------------------

    def elected(self, name: str) -> None:
        """Perhaps another version is the champion now, or a variant came or went: hang split and mirror where they
        belong. Between two turns of the event loop, so no request meets half of it."""
        model = self._models.get(name)
        if model is None:
            return
        champion = self._champion(name)
        if model.champion is not None and model.champion is not champion:
            unhang(model.champion)
        changed, model.champion = model.champion is not champion, champion
        for variant in model.variants.values():
            if variant.version is not None and champion is not None:
                self._check(model, variant, champion, variant.version)
            if changed and variant.version is None:
                variant.due, variant.refused, variant.looked = 0.0, "", None
                self._wake.set()
        if champion is None:
            return
        show(champion, "champion" if model.variants else "")
        hang_split(model, champion)
        hang_mirror(model, champion, self._infer, self._chance)

    def _champion(self, name: str) -> ServedVersion | None:
        champions = [v for v in self._catalog.champions(name) if v.state is ModelState.READY]
        return champions[-1] if champions else None

    def _is_champion(self, name: str, version: str) -> bool:
        return any(v.version == version for v in self._catalog.champions(name))

    def _check(
        self, model: ModelVariants, variant: WantedVariant, champion: ServedVersion, version: ServedVersion
    ) -> None:
        """Is it still what it should be, beside this champion?"""
        if version is champion or version.role != variant.role:
            variant.out(_same(version.version), same=True)  # it was promoted
        elif version.state in (ModelState.UNLOADING, ModelState.UNAVAILABLE):
            variant.out("it was unloaded with the model")
            variant.due = 0.0
        elif self._is_champion(model.name, version.version):
            self._leave(model, variant)
            variant.out(_same(version.version), same=True)
        elif reason := self._unfit(variant.role, champion, version):
            self._leave(model, variant)
            variant.out(f"version {version.version} cannot stand beside version {champion.version}: {reason}")
            log.error("model %s: its %s takes no part any more: %s", model.name, variant.role, variant.reason)

    def _unfit(self, role: VariantRole, champion: ServedVersion, version: ServedVersion) -> str:
        if role == "shadow" and (reason := unmirrorable(champion.spec)):
            return f"requests cannot be mirrored: {reason}"
        return "; ".join(incompatibilities(champion.spec, version.spec))

    def _retire(self, model: ModelVariants, variant: WantedVariant) -> None:
        """It is not wanted any more."""
        self._leave(model, variant)
        self.elected(model.name)

    def _leave(self, model: ModelVariants, variant: WantedVariant) -> None:
        """Take what is loaded of it out of every choice, then out of service."""
        version, variant.version = variant.version, None
        variant.identity = ""
        champion = model.champion
        if version is None:
            return
        if variant.role == "canary":
            model.split.canary = None
        elif champion is not None and champion.mirror is not None:
            champion.mirror.close()
            champion.mirror = None
        if version.role == variant.role:
            self._catalog.retire([version])

    # -- what operators do -----------------------------------------------------------------------------------------

    def share(self, name: str, percents: Mapping[VariantRole, float]) -> TrafficStatus:
        """Give variants other shares, in percent, from now on.

        Raises:
            ConfigError: the model has no such variant, or a share is not from 0 to 100.
        """
        model = self._models.get(name)
        for role, percent in percents.items():
            if model is None or role not in model.variants:
                raise ConfigError(f"model '{name[:64]}' has no {role}; name one in its entry of the configuration")
            if not 0.0 <= percent <= 100.0:
                raise ConfigError(f"a share is a number of percent from 0 to 100, not {percent:g}")
        if model is not None:
            for role, percent in percents.items():
                model.variants[role].percent = percent
                log.info("model %s: its %s has %g %% of the requests now", name, role, percent)
            self.elected(name)
        return self.status(name)

    def candidate(self, name: str) -> ServedVersion:
        """The canary that could become champion.

        Raises:
            ConfigError: there is none, or it is not ready.
        """
        model = self._models.get(name)
        variant = model.variants.get("canary") if model is not None else None
        if variant is None:
            raise ConfigError(f"model '{name[:64]}' has no canary; name one in its entry of the configuration")
        if variant.version is None or not variant.version.ready:
            why = variant.reason if variant.version is None else variant.version.obstacle
            raise ConfigError(f"the canary of model '{name}' cannot be promoted: {why}")
        return variant.version

    def status(self, name: str) -> TrafficStatus:
        """Raises ConfigError: the model has no variants."""
        model = self._models.get(name)
        if model is None or not model.variants:
            raise ConfigError(f"model '{name[:64]}' has neither a canary nor a shadow")
        return model.status()

    def statuses(self) -> dict[str, TrafficStatus]:
        """Of every model that has variants."""
        return {name: self.status(name) for name, model in sorted(self._models.items()) if model.variants}

    def close(self) -> None:
        """The gateway stops: nobody waits for shadows."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for model in self._models.values():
            if model.champion is not None and model.champion.mirror is not None:
                model.champion.mirror.close()
                model.champion.mirror = None


def _same(version: str) -> str:
    return f"version {version} is what the model's name means already"
