"""Models that come from registries: which of them the configuration names, and what is loaded for one of them.

A reference becomes a version to load in two steps. `RegisteredModels.wanted` asks the registry what the reference
means: that gives the version's number, which the catalog must know first. The version's `read` then takes the files out
of the cache, or fetches them, and hashes what it reads; so a fetch that fails, a digest that is not the pinned one and
a file that is no model are the failed load of that version, like those of a directory.

Everything here blocks and runs in a thread, but for `facts`, which is a look at what is known.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from gateway import plan
from gateway.config import Config, ModelEntry
from gateway.config_sources import registries_of, registry_entries
from gateway.core.model import Artifact
from gateway.errors import SourceUnavailable
from gateway.loading import LoadedModel, WantedVersion
from gateway.registry.cache import Cached
from gateway.registry.directory import FoundModel
from gateway.registry.golden_file import GoldenFile
from gateway.registry.layout import model_file
from gateway.registry.mlmodel import Mlmodel, differences, read_mlmodel
from gateway.registry.reference import RegistrySource
from gateway.registry.resolver import Resolved
from gateway.registry.sources import Registries, Settled

__all__ = ["RegisteredModels", "registry_entries", "wanted_release"]

log = logging.getLogger("gateway.registry")

Fetching = Callable[[str, int, int | None], None]
"""Told while a model's files arrive: its name, bytes so far, all bytes if known. Any thread."""


def _nobody(name: str, done: int, total: int | None) -> None:
    """Nobody watches."""


def wanted_release(
    config: Config,
    registries: Registries,
    entry: ModelEntry,
    resolved: Resolved,
    load: plan.Load,
    *,
    name: str = "",
    stale: str = "",
    instead_of: str = "",
    told: Fetching = _nobody,
) -> WantedVersion:
    """The version to load that a reference was resolved to; nothing is fetched before its `read`.

    Args:
        entry: its settings; need not be one of the configuration's.
        name: of the model; empty: as the entry says.
        stale: why `resolved` is remembered and not what the registry says now.
        instead_of: what the reference means while an operator chose `resolved`; see `WantedVersion`.

    Raises:
        ConfigError: the entry's settings contradict each other.
    """
    source = config.source(entry)
    title = source.title if isinstance(source, RegistrySource) else ""
    release = _Release(config, registries, entry, name or entry.name or title, resolved, told)
    place = registries.cache.directory  # where the files are is known when they are there
    model = FoundModel(release.name, {resolved.version: place}, None, resolved.uri, directory=place)
    (wanted,) = plan.settled(config, entry, model, load)
    return replace(
        wanted,
        read=release.read,
        load=partial(release.load, wanted.load),
        golden=release.golden,
        identity=resolved.immutable_id,
        uri=resolved.uri,
        facts=release.facts,
        confirm=release.confirm,
        stale=stale,
        instead_of=instead_of,
    )


class RegisteredModels:
    """The models of one configuration that come from registries."""

    def __init__(self, config: Config, load: plan.Load) -> None:
        self._config = config
        self._load = load
        self.registries = registries_of(config)
        self.told: Fetching = _nobody
        """Who watches files arrive."""

    @property
    def configured(self) -> bool:
        return bool(registry_entries(self._config))

    def names(self) -> list[str]:
        return [name for name, _ in registry_entries(self._config)]

    def references(self) -> list[tuple[str, str]]:
        """Name and reference of each model."""
        return [(name, entry.source) for name, entry in registry_entries(self._config)]

    def settings(self) -> dict[str, object]:
        """For each of `names`, what makes it another model when the configuration changes it."""
        shared = (self._config.defaults.model_dump_json(), self._config.instances, self._config.registries)
        return {
            name: (entry.model_dump_json(exclude={"backends", "canary", "shadow"}), *shared)
            for name, entry in registry_entries(self._config)
        }

    def wanted(self, name: str) -> list[WantedVersion]:
        """The version that the model's reference means; empty if no entry has this name.

        Raises:
            SourceUnavailable: its registry cannot be asked, and nothing is known of what it meant before.
            SourceError, ConfigError: it cannot be served.
        """
        entry = dict(registry_entries(self._config)).get(name)
        if entry is None:
            return []
        settled = self.registries.settle(entry.source)
        if settled.stale:
            log.warning("model %s: %s", name, settled.stale)
        elif settled.instead_of and not self.registries.locked:
            log.warning(
                "model %s: an operator chose %s instead of what %s means, and it serves until that means something "
                "else; gateway models refresh %s --force follows it now",
                name, settled.resolved.uri, entry.source, name,
            )  # fmt: skip
        return [self.release(self._config, entry, settled, self._load, name)]

    def release(
        self, config: Config, entry: ModelEntry, settled: Settled, load: plan.Load, name: str = ""
    ) -> WantedVersion:
        """`wanted_release` with this configuration's registries."""
        return wanted_release(
            config, self.registries, entry, settled.resolved, load,
            name=name, stale=settled.stale, instead_of=settled.instead_of, told=self.told,
        )  # fmt: skip

    def reload(self, config: Config) -> None:
        """Take over another configuration; registries whose settings did not change go on counting. What was refused
        is tried again."""
        if (config.registries, config.environ) != (self._config.registries, self._config.environ):
            self.registries = registries_of(config)
        self.forget_refused()
        self._config = config

    def forget_refused(self) -> None:
        """See `Registries.forget_refused`."""
        self.registries.forget_refused()


class _Release:
    """One resolved version on its way to being served, and what is known of it."""

    def __init__(
        self,
        config: Config,
        registries: Registries,
        entry: ModelEntry,
        name: str,
        resolved: Resolved,
        told: Fetching,
    ) -> None:
        self.name = name
        self._config = config
        self._registries = registries
        self._entry = entry
        self._resolved = resolved
        self._told = told
        self._cached: Cached | None = None
        self._stated: Mlmodel | None = None
        self._warnings: tuple[str, ...] = ()

    def read(self) -> tuple[Artifact, bytes | None]:
        """See `WantedVersion.read`."""
        cached = self._obtain()
        path = cached.path
        model = FoundModel(
            self.name, {self._resolved.version: path}, None, self._resolved.uri, model_file(path), directory=path
        )
        artifact, sidecar = plan.read_model(
            path, model, self._resolved.version, self._config.settings(self._entry).signing
        )
        if artifact.digest != cached.digest:
            self._registries.cache.discard(cached.digest, "they changed while they were read")
            raise SourceUnavailable(f"the files of {self._resolved.uri} changed in the cache while they were read")
        self._cached, self._stated = cached, read_mlmodel(path)
        return artifact, sidecar

    def _obtain(self) -> Cached:
        started, fetched = time.monotonic(), 0

        def told(done: int, total: int | None) -> None:
            nonlocal fetched
            if not fetched:
                log.info("model %s: fetching %s", self.name, self._resolved.uri)
            fetched = done
            self._told(self.name, done, total)

        cached = self._registries.obtain(self._resolved, self._entry.digest, told)
        if not cached.hit:
            spent = time.monotonic() - started
            log.info("model %s: fetched %s, %d bytes in %.1f s", self.name, self._resolved.uri, fetched, spent)
        return cached

    async def load(self, load: Callable[[Artifact], Any], artifact: Artifact) -> LoadedModel:
        """Load it, and compare what the registry states of its tensors with what they are."""
        loaded: LoadedModel = await load(artifact)
        if self._stated is not None:
            found = differences(self._stated, loaded.inputs, loaded.outputs)
            self._warnings = tuple(f"the signature in MLflow {text}" for text in found)
            for text in self._warnings:
                log.warning("model %s version %s: %s", self.name, self._resolved.version, text)
        return loaded

    def golden(self) -> GoldenFile | None:
        """See `WantedVersion.golden`."""
        return plan.golden_of(self._config, self._entry, self._cached.path if self._cached is not None else Path())

    def confirm(self, reference: str, instead_of: str) -> None:
        """See `WantedVersion.confirm`."""
        if self._cached is not None:
            self._registries.confirm(self._resolved, self._cached.digest, reference, instead_of)

    def facts(self) -> dict[str, Any]:
        """What the registry says of the version, for the manifest; None where it says nothing."""
        lineage = self._resolved.lineage
        stated = self._stated.signature() if self._stated is not None else None
        silent = self._registries.unanswered().get(self._resolved.reference)
        stale = f"its registry did not answer when it was asked last: {silent}" if silent else ""
        notes = [*lineage.notes, *([stale] if stale else [])]
        return {
            "reference": self._resolved.reference,
            "registry": self._resolved.registry,
            "immutable_id": self._resolved.immutable_id,
            "run_id": lineage.run_id,
            "git_commit": lineage.git_commit,
            "experiment": lineage.experiment,
            "datasets": [asdict(dataset) for dataset in lineage.datasets] or None,
            "signature": stated,
            "created_at": lineage.created_at,
            "created_by": lineage.created_by,
            "tags": dict(lineage.tags),
            "fetched_at": self._cached.fetched_at if self._cached is not None else None,
            "locked": self._registries.locked,
            "notes": notes,
            "warnings": list(self._warnings),
        }
