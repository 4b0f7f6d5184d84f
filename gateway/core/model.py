"""What the gateway knows of a model: its signature, how it may be batched, and the life of a version.

Rules: dims in a `TensorSpec` never include the batch dimension; `max_batch_size` 0 means the model does not batch
and shapes are used as written (Triton's convention, wire notes §5.1).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from gateway.core.resilience import RESILIENCE, Resilience
from gateway.core.scheduling import PLAIN, Scheduling
from gateway.core.tensor import Datatype

Oversize = Literal["split", "reject"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. `dims`: −1 is variable; without the batch dimension where the model batches."""

    name: str
    datatype: Datatype
    dims: tuple[int, ...]
    optional: bool = False
    reshape: tuple[int, ...] | None = None
    """Dims the model itself has, where they differ from the ones clients see; without the batch dimension."""
    ragged: bool = False
    """Rows of different shapes share a batch: they are laid one behind the other, flat."""


ONE_ROW: Final = "a request may have only one row: the model gives one answer per request, not one per row"
"""Why `BatchPolicy.one_row`, for people."""


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """How requests of one model become batches. Rows are counted, never requests."""

    max_batch_size: int
    """Rows; 0: the model is not batched, each request runs alone."""
    merge: bool = True
    """False: rows of different requests never share a run, because the proof at load failed (core/batchability.py)
    or somebody switched batching off."""
    max_queue_delay_s: float = 0.0
    preferred_batch_sizes: tuple[int, ...] = ()
    oversize: Oversize = "reject"
    """What happens to a request of more than `max_batch_size` rows."""
    max_queue_rows: int = 16_384
    max_queue_bytes: int = 256 * 1024 * 1024
    deadline_s: float = 30.0
    """Given to requests that bring none."""
    one_row: bool = False
    """Requests have one row: the model answers requests, not rows (core/ragged.py)."""

    @property
    def rows_reason(self) -> str:
        """What follows a refusal of more than `request_rows`: why it is one where nobody stated that; else nothing."""
        return f": {ONE_ROW}" if self.one_row and self.max_batch_size > 1 else ""

    @property
    def request_rows(self) -> int:
        """The most rows that one request may have."""
        if self.one_row:
            return 1
        # A request that is split still waits whole: more rows than the queue holds could never be let in.
        return self.max_batch_size if self.oversize == "reject" else self.max_queue_rows


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One version of one model, as clients see it."""

    name: str
    version: str
    digest: str
    """`sha256:<64 hex>` over the listing of the version's files (see registry/digest.py); empty where the files are
    not ours to see: the model is served by remote servers only."""
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    policy: BatchPolicy
    batching_note: str = ""
    """Why the model is or is not batched, in words; shown by `gateway models` and the log."""
    scheduling: Scheduling = PLAIN
    resilience: Resilience = RESILIENCE
    forwards_parameters: bool = False
    """Whether request parameters that the gateway does not know go to the backend: it may know them."""

    @property
    def batched(self) -> bool:
        return self.policy.max_batch_size > 0


class ModelState(enum.Enum):
    """Life of one model version. READY is the only state that takes requests."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"
    FAILED = "FAILED"


class ModelEvent(enum.Enum):
    LOADED = "loaded"
    LOAD_FAILED = "load_failed"
    CRASH_LOOP = "crash_loop"
    RECOVERED = "recovered"
    UNLOAD = "unload"
    DRAINED = "drained"


TRANSITIONS: Final[dict[tuple[ModelState, ModelEvent], ModelState]] = {
    (ModelState.LOADING, ModelEvent.LOADED): ModelState.READY,
    (ModelState.LOADING, ModelEvent.LOAD_FAILED): ModelState.FAILED,
    (ModelState.LOADING, ModelEvent.CRASH_LOOP): ModelState.FAILED,
    (ModelState.READY, ModelEvent.CRASH_LOOP): ModelState.FAILED,
    (ModelState.READY, ModelEvent.UNLOAD): ModelState.UNLOADING,
    (ModelState.FAILED, ModelEvent.RECOVERED): ModelState.READY,
    (ModelState.FAILED, ModelEvent.UNLOAD): ModelState.UNAVAILABLE,
    (ModelState.UNLOADING, ModelEvent.DRAINED): ModelState.UNAVAILABLE,
}


def next_state(state: ModelState, event: ModelEvent) -> ModelState:
    """Raises KeyError on a transition that the table does not list; nothing changes then."""
    return TRANSITIONS[state, event]


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """One file of a version directory; `path` is relative, POSIX separators."""

    path: str
    size: int
    sha256: str


class Held(Protocol):
    """Memory behind a file descriptor that nobody can change any more; freed when the last reference goes."""

    def fileno(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Artifact:
    """The bytes of one model version, read once: what is hashed is what is loaded."""

    name: str
    version: str
    source: str
    """Where it came from, for people: a path or URI."""
    files: tuple[ArtifactFile, ...]
    digest: str
    model: bytes = field(repr=False)
    """Content of the model file (ONNX protobuf)."""
    model_file: str = "model.onnx"
    external: Held | None = field(default=None, repr=False, compare=False)
    """Content of the files in which the model keeps tensors outside its own (workers/bundle.py); None: it has none."""
    verification: Mapping[str, str | None] | None = field(default=None, compare=False)
    """What became of its signature (registry/signing.py); None: nobody looked."""
