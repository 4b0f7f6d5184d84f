"""An executed batch, as every member sees it: outputs of all rows, and what is said about the execution.

One object per batch carries everything that answers, metrics and records need, so that per-request work stays small.
`http_memo` and `grpc_memo` belong to whoever encodes the answers: what is made once per batch and protocol stays there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gateway.core.request import OutputTensor


class Execution(NamedTuple):
    """What is said of one executed batch to those whose rows were in it."""

    backend: str
    """Who executed it; "cache" where an answer was remembered; model, version and backend for an ensemble's step."""
    attempt: int
    batch_id: str
    rows: int
    """In the executed batch."""
    remote: bool = False
    """As `FinishedBatch.remote`."""


class FinishedBatch:
    """`outputs` by index into the model's outputs; times are monotonic seconds."""

    __slots__ = (
        "attempt",
        "backend",
        "batch_id",
        "dispatched",
        "finished",
        "grpc_memo",
        "http_memo",
        "infer_ns",
        "input_ns",
        "output_ns",
        "outputs",
        "own",
        "parts",
        "reason",
        "remote",
        "rows",
    )

    def __init__(
        self,
        batch_id: str,
        rows: int,
        outputs: dict[int, OutputTensor],
        backend: str,
        attempt: int,
        dispatched: float,
        finished: float,
        reason: str,
        compute_ns: tuple[int, int, int],
    ) -> None:
        self.batch_id = batch_id
        self.rows = rows
        self.outputs = outputs
        self.backend = backend
        self.attempt = attempt
        self.dispatched = dispatched
        self.finished = finished
        self.reason = reason
        """Why the batch was closed (core.batching.Reason)."""
        self.input_ns, self.infer_ns, self.output_ns = compute_ns
        """Nanoseconds as the backend measured them: preparing inputs, running the model, writing outputs."""
        self.remote = False
        """Whether a remote backend made any of it: nobody here knows from which files."""
        self.parts: Sequence[tuple[Execution | FinishedBatch, int]] | None = None
        """Where several executions, or an earlier one, made this answer (a split request put together again, an
        ensemble, an answer from the cache): each, and the request's first row in it. It then belongs to one request."""
        self.own: Mapping[int, FinishedBatch] | None = None
        """Where members do not get plain rows of the outputs (core/ragged.py): what each gets instead, as a batch of
        its own, by its first row in this one."""
        self.http_memo: Any = None
        self.grpc_memo: Any = None


def executions(batch: FinishedBatch, row: int) -> Iterator[tuple[Execution, int]]:
    """What made the answer of a request that starts at `row` of `batch`: (execution, first row in it), in order."""
    for part, first in [(batch, row)] if batch.parts is None else batch.parts:
        yield Execution(part.backend, part.attempt, part.batch_id, part.rows, part.remote), first
