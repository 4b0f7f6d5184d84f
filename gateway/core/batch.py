"""An executed batch, as every member sees it: outputs of all rows, and what is said about the execution.

One object per batch carries everything that answers, metrics and records need, so that per-request work stays small.
`http_memo` and `grpc_memo` belong to whoever encodes the answers: what is made once per batch and protocol stays there.
"""

from __future__ import annotations

from typing import Any

from gateway.core.request import OutputTensor


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
        "parts",
        "reason",
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
        self.parts: list[tuple[FinishedBatch, int]] | None = None
        """Where this is the answer to a split request, put together again: (batch, first row) of each part."""
        self.http_memo: Any = None
        self.grpc_memo: Any = None
