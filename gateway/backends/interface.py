"""The one way a batch is executed, whatever executes it.

A *replica* can execute batches of one model version. Slots are capacity: a batch is handed over only while
`free_slots > 0` and holds its slot until its outcome is delivered. `execute` never raises for a failing backend:
every batch handed over ends in exactly one call of `batch.done(outcome)`, on the event loop's thread, never from
inside `execute` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from gateway.core.outcome import Failure, FailureKind, Sign, Success
from gateway.core.request import BatchInput, SequenceStep
from gateway.core.traits import Traits

__all__ = ["Batch", "Failure", "FailureKind", "Replica", "Sign", "Success", "Traits"]


class Batch(Protocol):
    """What a replica is given. `outputs` are indexes into the model's outputs."""

    @property
    def inputs(self) -> Sequence[BatchInput]: ...
    @property
    def outputs(self) -> tuple[int, ...]: ...
    @property
    def rows(self) -> int: ...
    @property
    def deadline(self) -> float:
        """Monotonic instant after which nobody waits for it any more; infinite where nobody said."""

    @property
    def sequence(self) -> SequenceStep | None:
        """The step of a sequence that it is, all of it, for replicas that keep state between requests; mostly None."""

    @property
    def parameters(self) -> Mapping[str, object]:
        """Request parameters that go to the backend as the caller wrote them; mostly empty."""

    def done(self, outcome: Success | Failure, /) -> None: ...


class Replica(Protocol):
    """One place where batches of one model version can be executed."""

    @property
    def name(self) -> str:
        """Backend name as shown in headers and metrics, for instance `onnx-1`."""

    @property
    def traits(self) -> Traits: ...

    @property
    def available(self) -> bool:
        """Whether batches may be sent: process alive, model loaded and warmed up."""

    @property
    def free_slots(self) -> int:
        """Batches it can take now; 0 when unavailable."""

    @property
    def in_flight(self) -> int:
        """Batches handed over and not done."""

    def execute(self, batch: Batch, timeout_s: float, /) -> None: ...

    def cancel(self, batch: Batch, /) -> None:
        """Nobody waits for `batch` any more: end it early if that can be done. It is still done exactly once, soon,
        with CANCELLED or with whatever it came to. Harmless for a batch that it does not have (any more)."""

    def set_listener(self, changed: Callable[[], None], /) -> None:
        """`changed` is called whenever `available` flips, so that a waiting queue can be looked at again."""
