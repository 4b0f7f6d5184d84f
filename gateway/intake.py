"""What a served version takes requests with, whatever executes them: a queue with batches, or an ensemble's steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gateway.core.batch_queue import QueueStatistics
from gateway.core.request import InferRequest
from gateway.errors import GatewayError
from gateway.observe.record import ModelStatistics


class Intake(Protocol):
    """Takes validated requests and settles each exactly once. `scheduler.Scheduler`, `ensemble.Ensemble` and
    `sequence_scheduler.SequenceScheduler` fit."""

    @property
    def statistics(self) -> ModelStatistics: ...

    @property
    def pending(self) -> int:
        """Requests accepted and not yet settled."""

    def submit(self, request: InferRequest) -> None:
        """Take a request; `received`, `context` and `settle` are set. Its `settle` is called later.

        Raises:
            GatewayError: it was not taken (queue full, not ready, draining); `settle` will not be called.
        """

    def submit_parts(self, whole: InferRequest, parts: Sequence[InferRequest]) -> None:
        """Take the parts of one request, all of them or none; otherwise as `submit`. `settle` may be set later, but
        before the event loop's next turn."""

    def abort(self, request: InferRequest) -> None:
        """The caller left: drop the request, wherever it is. Harmless at any time."""

    def close(self, error: GatewayError) -> None:
        """Refuse new requests with `error` from now on; those inside are still answered."""

    def fail_waiting(self, error: GatewayError) -> None:
        """Settle everyone who waits with `error`."""

    def reopen(self) -> None:
        """Take requests again."""

    async def drained(self) -> None:
        """Returns when no accepted request is unsettled."""

    def stop(self) -> None:
        """Let go of timers; nothing may be pending."""

    def queue_statistics(self) -> QueueStatistics: ...
