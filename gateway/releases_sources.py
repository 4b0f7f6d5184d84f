"""What a model's source means now, asked without fetching anything that is not needed for the answer.

A registry is asked for the immutable thing behind a reference; a directory's files are looked at, and hashed if they
look changed. Both say it as an *identity*: equal texts mean equal files. Everything here blocks, and runs in a thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from gateway import plan
from gateway.catalog import ServedVersion
from gateway.config import Config, ModelEntry
from gateway.config_models import find_model, locate_model
from gateway.errors import SourceUnavailable
from gateway.loading import WantedVersion
from gateway.plan_registry import RegisteredModels, registry_entries
from gateway.registry.directory import looks_of, read_version
from gateway.registry.locator import locate_reference
from gateway.registry.sources import Settled

POLL_S: Final = 30.0
"""Between two questions about a reference whose meaning can change."""


@dataclass(frozen=True, slots=True)
class Meant:
    """What a source means now. `wanted` makes the versions to load; it blocks, and may raise GatewayError."""

    identity: str
    version: str
    uri: str
    wanted: Callable[[], list[WantedVersion]]


class Source(Protocol):
    """Where a model comes from."""

    def look(self) -> Meant:
        """Ask. Raises SourceUnavailable, ConfigError, SourceError."""


@dataclass(frozen=True, slots=True)
class Following:
    """How one model is followed. `source` None: it always means the same."""

    interval_s: float = 0.0
    """0: only when somebody asks."""
    keep: int = 0
    """Former releases that stay loaded."""
    source: Source | None = None
    reference: str = ""
    """The source as it is configured, for people."""
    remembers: bool = False
    """Whether it is written down, for a restart, what serves instead of what the source means."""
    forget: Callable[[], None] = lambda: None
    """Forget what was refused, so that it is fetched once more."""


def identity_of(served: Sequence[ServedVersion]) -> str:
    """Identity of what is loaded. Versions from a registry bring theirs; of files it is made of their digests."""
    stated = [version.wanted.identity for version in served if version.wanted.identity]
    if stated:
        return ", ".join(stated)
    digests = {version.version: version.artifact.digest for version in served if version.artifact is not None}
    return files_identity(digests, served[0].wanted.config_text)


def files_identity(digests: dict[str, str], config_text: str) -> str:
    """`digests` by version."""
    lines = "".join(f"{version} {digests[version]}\n" for version in sorted(digests))
    return "files:" + hashlib.sha256((lines + config_text).encode()).hexdigest()


class DirectorySource:
    """A model's directory, or its one file: hashed where size or time of a file is another than before."""

    def __init__(self, config: Config, load: plan.Load, name: str) -> None:
        self._config = config
        self._load = load
        self._name = name
        self._seen: tuple[object, str] | None = None
        """How it looked when it was hashed last, and what it was."""

    def look(self) -> Meant:
        found = find_model(self._config, self._name)
        if found is None:
            raise SourceUnavailable("its files are gone; put them back, or unload the model")
        entry, model = found
        looks = looks_of(model.directory) if model.directory is not None else ()
        if self._seen is None or self._seen[0] != looks:
            try:
                digests = {v: read_version(model, v, path).digest for v, path in model.versions.items()}
            except OSError as error:
                raise SourceUnavailable(f"its files cannot be read: {error.strerror or error}") from None
            self._seen = (looks, files_identity(digests, model.config.text if model.config is not None else ""))
        return Meant(
            self._seen[1],
            ", ".join(model.versions),
            model.source,
            lambda: plan.settled(self._config, entry, model, self._load),
        )


class RegisteredSource:
    """A reference to a registry whose meaning can change."""

    def __init__(
        self, config: Config, entry: ModelEntry, name: str, load: plan.Load, registered: RegisteredModels
    ) -> None:
        self._config = config
        self._entry = entry
        self._name = name
        self._load = load
        self._registered = registered

    def look(self) -> Meant:
        resolved = self._registered.registries.resolve(self._entry.source)

        def wanted() -> list[WantedVersion]:
            release = self._registered.release
            return [release(self._config, self._entry, Settled(resolved), self._load, self._name)]

        return Meant(resolved.immutable_id, resolved.version, resolved.uri, wanted)


def following(config: Config, load: plan.Load, name: str, registered: RegisteredModels | None = None) -> Following:
    """How the model of this name is followed, by its entry and `defaults`; blocks on the disk."""
    entry = dict(registry_entries(config)).get(name)
    if entry is not None and registered is not None:
        if not locate_reference(entry.source).mutable:
            return Following(0.0, _kept(config, entry, followed=False), None, entry.source)
        interval_s = _key(config, entry, "poll_interval_s", POLL_S)
        source = RegisteredSource(config, entry, name, load, registered)
        kept = _kept(config, entry, followed=True)
        remembers = not registered.registries.locked
        return Following(interval_s, kept, source, entry.source, remembers, registered.forget_refused)
    return _following_files(config, load, name)


def _following_files(config: Config, load: plan.Load, name: str) -> Following:
    located = locate_model(config, name)
    if located is None:
        return Following()
    entry, place = located
    interval_s = _key(config, entry, "poll_interval_s", 0.0)
    source = DirectorySource(config, load, name) if interval_s > 0 else None
    return Following(interval_s, _kept(config, entry, followed=source is not None), source, str(place))


def _kept(config: Config, entry: ModelEntry, *, followed: bool) -> int:
    return int(_key(config, entry, "keep_previous", 1 if followed or entry.canary is not None else 0))


def _key(config: Config, entry: ModelEntry, key: str, built_in: float) -> float:
    stated = getattr(entry, key)
    if stated is None:
        stated = getattr(config.defaults, key)
    return built_in if stated is None else float(stated)
