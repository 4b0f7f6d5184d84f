"""One inference request between its parser and its answer: plain data, no rules.

A tensor waits in one of two forms, and is copied once, into the batch:
`values`: a flat Python list, already checked element by element (small JSON input), or
`buffer`: bytes in OIP binary form (binary input, large JSON arrays).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from gateway.core.tensor import Datatype


class InputTensor:
    """One input of one request. `shape` includes the batch dimension; exactly one of `values`, `buffer` is set."""

    __slots__ = ("buffer", "datatype", "shape", "values")

    def __init__(
        self,
        datatype: Datatype,
        shape: tuple[int, ...],
        values: list[Any] | None,
        buffer: bytes | memoryview | None,
    ) -> None:
        self.datatype = datatype
        self.shape = shape
        self.values = values
        self.buffer = buffer


class OutputTensor:
    """One output of a batch or of a request. `data` is in OIP binary form; `shape` includes the batch dimension."""

    __slots__ = ("data", "datatype", "name", "shape")

    def __init__(self, name: str, datatype: Datatype, shape: tuple[int, ...], data: bytes | memoryview) -> None:
        self.name = name
        self.datatype = datatype
        self.shape = shape
        self.data = data


class BatchInput:
    """One input of a batch: the members' tensors of one input, still apart.

    `shape` is the whole batch's shape. All parts have the same datatype and trailing dims; those of a ragged input have
    their own, and `shape` is flat (core/ragged.py). The replica writes
    them one behind the other into memory it owns: with `core.assembly.write_parts(batch_input, destination)`,
    which needs exactly `nbytes` bytes.
    """

    __slots__ = ("datatype", "index", "nbytes", "parts", "shape")

    def __init__(
        self, index: int, datatype: Datatype, shape: tuple[int, ...], nbytes: int, parts: Sequence[InputTensor]
    ) -> None:
        self.index = index
        """Place of this input in the model's signature."""
        self.datatype = datatype
        self.shape = shape
        self.nbytes = nbytes
        self.parts = parts


class Settle(Protocol):
    """Completes a caller; called exactly once per request, by the request's owner only."""

    def __call__(self, request: InferRequest, /) -> None: ...


class Owner(Protocol):
    """Whoever has taken a request, and will settle it."""

    def abort(self, request: InferRequest, /) -> None: ...


class SequenceStep(NamedTuple):
    """OIP's parameters `sequence_id`, `sequence_start`, `sequence_end`."""

    id: int | str
    start: bool = False
    end: bool = False


NO_PARAMETERS: Final[Mapping[str, object]] = {}
"""Of a request without parameters of its own; never written to."""


class Trouble:
    """What happened to one request in attempts that failed, and where it waits for the next one."""

    __slots__ = ("alone", "broken", "lane", "refused", "tried")

    def __init__(self) -> None:
        self.tried: tuple[Any, ...] = ()
        """Replicas (`core.fleet.Member`) that failed it, in that order, each once."""
        self.alone: tuple[Any, ...] = ()
        """Of these, the ones that failed when it was the only request of the batch."""
        self.broken = 0
        """Attempts that ended in a broken or hung backend (see core/retry.py)."""
        self.refused = 0
        """Times in a row that a backend did not take it (see dispatcher.py, pauses)."""
        self.lane: Any = None
        """The group in which it waits for its next attempt (dispatcher_lanes.py); None: it does not."""


QUEUED: Final = 0
RUNNING: Final = 1
SETTLED: Final = 2


class InferRequest:
    """A validated request. `inputs` are in the model's order; `None` stands for an absent optional input."""

    __slots__ = (
        "answer_id",
        "attempt",
        "avoid",
        "batch",
        "context",
        "deadline",
        "error",
        "form",
        "inputs",
        "key",
        "nbytes",
        "outputs",
        "owner",
        "parameters",
        "part",
        "place",
        "priority",
        "received",
        "request_id",
        "row",
        "rows",
        "sequence",
        "settle",
        "state",
        "stated_timeout_s",
        "timeout_s",
        "told",
        "trouble",
        "unused",
    )

    def __init__(  # noqa: PLR0915 - a line for each thing that is known of it
        self,
        inputs: tuple[InputTensor | None, ...],
        rows: int,
        nbytes: int,
        key: object,
        outputs: tuple[int, ...],
        request_id: str | None,
        form: Any = None,
        timeout_s: float = 0.0,
    ) -> None:
        self.inputs = inputs
        self.rows = rows
        self.nbytes = nbytes
        self.key = key
        """Requests with equal keys may share a batch (see core/batching.py)."""
        self.outputs = outputs
        """Indexes into the model's outputs that the batch must produce for it, ascending."""
        self.form = form
        """How the caller wants the answer encoded; belongs to the protocol that parsed the request."""
        self.timeout_s = timeout_s
        """What the caller allows from arrival to answer, seconds; 0: it did not say."""
        self.stated_timeout_s = 0.0
        """OIP's parameter `timeout`, seconds; 0: not stated. What it means depends on the model's queue policy."""
        self.priority = 0
        """OIP's parameter `priority`; 0: not stated."""
        self.sequence: SequenceStep | None = None
        """Where it stands in a sequence of requests; None: the caller said nothing of one."""
        self.request_id = request_id
        """The client's own OIP `id`, echoed; None if it sent none."""
        self.received = 0.0
        self.deadline = 0.0
        self.state = QUEUED
        self.attempt = 0
        """Attempts begun so far."""
        self.avoid: str | None = None
        """Replica on which the last attempt failed, for people."""
        self.trouble: Trouble | None = None
        """What is remembered of failed attempts; None for nearly everybody."""
        self.parameters: Mapping[str, object] = NO_PARAMETERS
        """The caller's own request parameters, for backends that get them as written; they are part of `key` then."""
        self.unused: Mapping[str, object] = NO_PARAMETERS
        """Those that nobody reads; for the inference log."""
        self.batch: Any = None
        """The finished batch (core.batch.FinishedBatch) once settled with an answer."""
        self.row = 0
        """First row of this request in `batch`."""
        self.part = False
        """Whether it is part of a larger request, which is counted once, as a whole."""
        self.owner: Owner | None = None
        """Who has it until it is settled."""
        self.place: Any = None
        """Belongs to the queue."""
        self.error: Exception | None = None
        """Set instead of `batch` when the request failed."""
        self.told = b""
        """Header lines, as HTTP has them, that its answer carries besides those of its batch."""
        self.context: Any = None
        """Belongs to the caller (the ingress): what it needs to write the answer."""
        self.settle: Settle
        self.answer_id: bytes
        """Request id of its answer; set only where the inference log has a row of it."""

    def abort(self) -> None:
        """The caller left: its rows are not needed any more. Harmless at any time."""
        if self.owner is not None:
            self.owner.abort(self)
