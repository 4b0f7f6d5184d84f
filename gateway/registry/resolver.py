"""The contract between the gateway and places that models come from: what a reference means now, and its files.

A *reference* is what the user wrote (`models:/digits@champion`). A resolver says what it means at this moment
(`Resolved`) and fetches exactly that. Everything here is synchronous and runs in a thread.

Rules:
- `resolve` opens no more than it needs for the answer and fetches no model file. `fetch` writes only below the
  directory it is given, regular files and directories, nothing else; it may be given a directory that a former
  attempt left half full only if it cleans up itself: callers always give an empty one.
- Every call is bounded in time and in bytes (`Bounds`), whatever the other side sends.
- A text of an error or of a `Resolved` never holds a credential.
- What a source does not say is None or empty here, never guessed. A digest that covers less than everything says so in
  `digest_kind`.
- What lies under `uri` should never change. Whether that held is found out by digests (cache.py), not believed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

MIB: Final = 1024 * 1024

Told = Callable[[int, int | None], None]
"""Called while files arrive: bytes so far, and how many there will be (None: not known). Any thread."""


def untold(done: int, total: int | None) -> None:
    """For callers who do not want to know."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much a source may send. Bytes and files of one model version; seconds of one call."""

    max_bytes: int = 8192 * MIB
    max_files: int = 10_000
    resolve_s: float = 30.0
    fetch_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Dataset:
    """Data that a training run says it used; every field as the source says it."""

    name: str
    digest: str | None = None
    digest_kind: str | None = None
    """How the digest was made and what it covers, for instance `md5 of the first 10000 rows, 8 hex digits`."""
    source: str | None = None
    context: str | None = None
    """What it was used for: `training`, `eval` …"""


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a model version comes from, as far as its source says so. None and () mean unknown."""

    run_id: str | None = None
    git_commit: str | None = None
    datasets: tuple[Dataset, ...] = ()
    experiment: str | None = None
    model_id: str | None = None
    """The source's own name for the trained artefact, where it has one beside the version (MLflow: m-…)."""
    created_by: str | None = None
    created_at: str | None = None
    """RFC 3339, UTC."""
    tags: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader must know of the above, for instance that a digest is weak."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference meant when it was asked for."""

    reference: str
    """As the user wrote it."""
    uri: str
    """Names the same files for ever, for instance `models:/digits/3` or `s3://bucket/key?versionId=…`."""
    immutable_id: str
    """The source's identity of the content, or the best it has: equal texts from one `registry` mean equal files."""
    version: str
    """The version clients see: a positive integer as text. MLflow's version number, else "1"."""
    mutable: bool
    """Whether the same reference may mean something else later."""
    registry: str = ""
    """Who was asked: a URL without credentials, for instance `http://mlflow:5000`."""
    lineage: Lineage = field(default_factory=Lineage)
    expected_sha256: Mapping[str, str] = field(default_factory=dict)
    """Path → SHA-256 in hex, for files whose digest the source states; the cache compares them with what came."""
    private: Any = field(default=None, repr=False, compare=False)
    """The resolver's own knowledge on the way from `resolve` to `fetch`; never stored, never shown. `fetch` must do
    without it, because a version may be known from the lock only."""


class Resolver(Protocol):
    """One kind of source. Made once from the configuration; every method may be called from any thread.

    Errors of both methods: `SourceUnavailable` where the same call may succeed later (network, 5xx, credentials);
    `SourceError` where the answer is final (there is no such model, nothing servable in it, more than the bounds).
    Nothing else may leave them.
    """

    @property
    def scheme(self) -> str:
        """Of the references it takes: `models`, `s3`, `oci`, `hf`."""

    def registry_of(self, reference: str) -> str:
        """Who would be asked, as `Resolved.registry` has it; nobody is. Equal references of two registries are two
        models."""

    def resolve(self, reference: str) -> Resolved:
        """What the reference means now."""

    def fetch(self, resolved: Resolved, into: Path, told: Told = untold) -> None:
        """Write the version's files into the empty directory `into`. `resolved` may come from a lock file."""
