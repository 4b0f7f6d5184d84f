"""The cache of fetched model versions, addressed by what is in them.

    <cache>/sha256/<hex>/         the files of a version whose digest is sha256:<hex> (digest.py)
    <cache>/sha256/<hex>.json     where they came from, and when
    <cache>/incoming/             files on their way, see cache_incoming.py

A version is fetched into `incoming`, hashed, compared with every digest that is known for it, synced to the disk, made
read-only, and renamed into its place. So a directory under `sha256` is whole, or was changed by somebody else: it is
hashed again each time it is read, and one that is not what its name says is never served, but thrown away and fetched
anew.

Several processes may share a cache. All methods block on the disk; errors of it are SourceUnavailable.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from gateway.core.model import ArtifactFile
from gateway.errors import ConfigError, SourceError, SourceUnavailable
from gateway.registry.cache_incoming import Incoming, move, replace_file, settle
from gateway.registry.digest import read_artifact
from gateway.registry.resolver import Dataset, Lineage, Resolved

log = logging.getLogger("gateway.registry")

MAX_ORIGINS: Final = 16
"""Origins of one digest that are remembered, newest first."""
MAX_RECORD: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the files of a digest came from, once."""

    reference: str
    uri: str
    immutable_id: str
    version: str
    registry: str
    fetched_at: str
    lineage: Lineage = field(default_factory=Lineage)

    def resolved(self, reference: str, *, mutable: bool) -> Resolved:
        """As if `reference` had been resolved to it now."""
        return Resolved(reference, self.uri, self.immutable_id, self.version, mutable, self.registry, self.lineage)


@dataclass(frozen=True, slots=True)
class Cached:
    """A version that is in the cache, hashed a moment ago."""

    digest: str
    path: Path
    files: tuple[ArtifactFile, ...]
    fetched_at: str
    hit: bool
    """Whether nothing had to be fetched for it."""


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Since the process started; bytes and versions as they are on the disk now."""

    hits: int
    fetches: int
    fetched_bytes: int
    damaged: int
    """Versions that were not what their name says, and were thrown away."""
    collected: int


Check = Callable[[str], None]
"""Raises SourceError if this digest must not be served for what was asked."""


class Cache:
    """One directory. Any thread; any number of processes."""

    def __init__(self, directory: Path, *, turn_s: float = 3600.0) -> None:
        """`turn_s`: how long another process's fetch of the same version is waited for."""
        self.directory = directory
        self._turn_s = turn_s
        self._incoming = Incoming(directory / "incoming")
        self._hits = self._fetches = self._fetched_bytes = self._damaged = self._collected = 0

    # -- looking ---------------------------------------------------------------------------------------------------

    def path(self, digest: str) -> Path:
        """Where the version with `digest` is, or would be."""
        return self.directory / "sha256" / digest.removeprefix("sha256:")

    def digests(self) -> list[str]:
        """What is there, by name."""
        try:
            found = [entry.name for entry in os.scandir(self.directory / "sha256") if entry.is_dir()]
        except OSError:
            return []
        return sorted(f"sha256:{name}" for name in found)

    def origins(self, digest: str) -> list[Origin]:
        """Where it came from, newest first; empty if nobody knows."""
        try:
            with self.path(digest).with_suffix(".json").open("rb") as stream:
                document = json.loads(stream.read(MAX_RECORD))
            return [_origin(item) for item in document["origins"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return []

    def find(self, matches: Callable[[Origin], bool]) -> tuple[str, Origin] | None:
        """The digest whose origin matches, and that origin; of several the one that was fetched last."""
        found = [(origin.fetched_at, digest, origin) for digest in self.digests() for origin in self.origins(digest)]
        fitting = [item for item in found if matches(item[2])]
        if not fitting:
            return None
        _, digest, origin = max(fitting, key=lambda item: item[0])
        return digest, origin

    def known(self, resolved: Resolved) -> str | None:
        """The digest of files that came from exactly this."""
        found = self.find(lambda o: (o.registry, o.immutable_id) == (resolved.registry, resolved.immutable_id))
        return found[0] if found is not None else None

    def open(self, digest: str) -> Cached | None:
        """The version with `digest`, hashed anew; None if it is not there. One that was changed is thrown away."""
        path = self.path(digest)
        if not path.is_dir():
            return None
        try:
            artifact = read_artifact(path, "", "", model_file="")
            actual, why = artifact.digest, f"its files have digest {artifact.digest}"
        except (ConfigError, OSError) as error:
            actual, why = "", str(error)
        if actual != digest:
            if path.is_dir():  # else another process let go of it meanwhile, whole
                self.discard(digest, why)
            return None
        origins = self.origins(digest)
        return Cached(digest, path, artifact.files, origins[0].fetched_at if origins else "", hit=True)

    # -- fetching --------------------------------------------------------------------------------------------------

    def obtain(self, resolved: Resolved, digest: str | None, fetch: Callable[[Path], None], check: Check) -> Cached:
        """The version's files, from here if they are known, else fetched.

        Args:
            digest: what the files must be, if that is known; it also finds them here.
            fetch: writes the files into an empty directory.
            check: decides on the digest that was found, before the files are taken in.

        Raises:
            SourceError: what came is not a version that may be served.
            SourceUnavailable: nothing came, or it could not be written.
        """
        wanted = digest or self.known(resolved)
        if wanted is not None and (found := self._open_checked(wanted, resolved, check)) is not None:
            return found
        try:
            with self._incoming.turn(f"{resolved.registry}\n{resolved.immutable_id}", resolved.uri, self._turn_s):
                wanted = digest or self.known(resolved)  # whoever had the turn before has fetched it
                if wanted is not None and (found := self._open_checked(wanted, resolved, check)) is not None:
                    return found
                return self._fetch(resolved, fetch, check)
        except OSError as error:
            where = error.filename or self.directory
            raise SourceUnavailable(
                f"the cache cannot be written at {where}: {error.strerror}; make room there, or name another directory "
                "in registries.cache", soon=False,
            ) from None  # fmt: skip

    def _open_checked(self, digest: str, resolved: Resolved, check: Check) -> Cached | None:
        found = self.open(digest)
        if found is None:
            return None
        check(digest)
        self._hits += 1
        with contextlib.suppress(OSError):  # a cache that may not be written still serves
            self._remember(digest, resolved)
        return found

    def _fetch(self, resolved: Resolved, fetch: Callable[[Path], None], check: Check) -> Cached:
        with self._incoming.directory() as directory:
            fetch(directory)
            try:
                artifact = read_artifact(directory, "", "", model_file="")
            except ConfigError as error:
                raise SourceError(f"{resolved.uri}: {error}") from None
            if not artifact.files:
                raise SourceError(f"{resolved.uri} has no files")
            _compare(resolved, artifact.files)
            check(artifact.digest)
            settle(directory)
            target = self.path(artifact.digest)
            target.parent.mkdir(parents=True, exist_ok=True)
            if self.open(artifact.digest) is None:  # the same files may have come from elsewhere
                move(directory, target)
        self._fetches += 1
        self._fetched_bytes += sum(file.size for file in artifact.files)
        at = self._remember(artifact.digest, resolved)
        return Cached(artifact.digest, target, artifact.files, at, hit=False)

    def discard(self, digest: str, why: str) -> None:
        """Throw away a version that is not what its name says."""
        self._damaged += 1
        log.error(
            "the cached files of %s are not what they were: %s; they are thrown away and fetched anew", digest, why
        )
        self._remove(digest)

    def _remember(self, digest: str, resolved: Resolved) -> str:
        """Note where the files came from; returns when they did."""
        before = self.origins(digest)
        now = _now()
        origin = Origin(
            resolved.reference, resolved.uri, resolved.immutable_id, resolved.version, resolved.registry, now,
            resolved.lineage,
        )  # fmt: skip
        same = [
            o for o in before if (o.registry, o.uri, o.reference) == (origin.registry, origin.uri, origin.reference)
        ]
        if same and same[0].lineage == origin.lineage and before[0] is same[0]:
            return same[0].fetched_at
        kept = [o for o in before if o not in same][: MAX_ORIGINS - 1]
        document = {"digest": digest, "origins": [_document(origin), *map(_document, kept)]}
        replace_file(self.path(digest).with_suffix(".json"), json.dumps(document, indent=1).encode())
        return now

    # -- keeping less ----------------------------------------------------------------------------------------------

    def collect(self, keep: Collection[str], versions: int) -> list[str]:
        """Remove what nothing refers to, but for the `versions` of each reference that came last; returns the digests.

        Args:
            keep: digests that stay whatever else holds: those of the lock, of what serves, of the inference log.
        """
        by_reference: dict[str, list[tuple[str, str]]] = {}
        for digest in self.digests():
            for origin in self.origins(digest) or [Origin("", "", "", "", "", "")]:
                by_reference.setdefault(origin.reference, []).append((origin.fetched_at, digest))
        stays = set(keep)
        for reference, listed in by_reference.items():
            stays.update(digest for _, digest in sorted(listed, reverse=True)[: versions if reference else 0])
        gone = [digest for digest in self.digests() if digest not in stays]
        for digest in gone:
            self._remove(digest)
            self._collected += 1
        self._incoming.sweep_turns()
        return gone

    def _remove(self, digest: str) -> None:
        """First out of its place, in one step, so that nobody finds half of it."""
        with contextlib.suppress(OSError):
            with self._incoming.directory() as away:
                path = self.path(digest)
                path.chmod(0o700)
                path.rename(away / "gone")
            self.path(digest).with_suffix(".json").unlink(missing_ok=True)

    def statistics(self) -> CacheStatistics:
        return CacheStatistics(self._hits, self._fetches, self._fetched_bytes, self._damaged, self._collected)

    def __repr__(self) -> str:
        return f"<Cache {self.directory}>"


def _compare(resolved: Resolved, files: Collection[ArtifactFile]) -> None:
    """Whether the files are what their source states. Raises SourceError."""
    found = {file.path: file.sha256 for file in files}
    for path, wanted in resolved.expected_sha256.items():
        if found.get(path) != wanted:
            raise SourceError(
                f"{resolved.uri}: {path} has SHA-256 {found.get(path, '(not there)')}, its registry states {wanted}"
            )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _document(origin: Origin) -> dict[str, Any]:
    return asdict(origin)


def _origin(item: Mapping[str, Any]) -> Origin:
    """Raises TypeError, KeyError: it is not one of ours."""
    given = dict(item)
    lineage = dict(given.pop("lineage"))
    lineage["datasets"] = tuple(Dataset(**dataset) for dataset in lineage.get("datasets", ()))
    lineage["tags"] = tuple((str(key), str(value)) for key, value in lineage.get("tags", ()))
    lineage["notes"] = tuple(lineage.get("notes", ()))
    return Origin(**given, lineage=Lineage(**lineage))
