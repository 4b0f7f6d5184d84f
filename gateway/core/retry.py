"""What becomes of the members of a batch that failed.

Rules (resilience notes §1.3, §1.4; the unit is the request, not the batch):
  * nobody who waits for an answer pays for a dead worker: BROKEN, TIMEOUT, OVERLOAD and NOT_SENT go back to the
    front of the queue, for another replica;
  * input that the model refuses (SUSPECT) is halved until the offender stands alone: every innocent batch-mate
    succeeds, at a cost of at most 2·log2(n) + 1 extra runs;
  * a batch that broke two workers is run member by member: a crash costs a restart, a single run milliseconds;
  * whoever fails alone is told so.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from gateway.core.outcome import FailureKind

MAX_ATTEMPTS: Final = 3
"""Executions of one request that may end in a broken worker (SRE practice; gRPC caps at 5)."""
SINGLES_FROM: Final = 2
"""Broken attempts after which members run alone."""


class Verdict(enum.Enum):
    REQUEUE = "requeue"
    """All members back to the front of the queue."""
    HALVE = "halve"
    """Run the two halves as batches of their own."""
    SINGLES = "singles"
    """Run every member as a batch of its own."""
    FAIL_MODEL = "fail_model"
    """The only member is at fault: ModelError."""
    FAIL_BACKEND = "fail_backend"
    """Attempts used up: BackendError."""


@dataclass(frozen=True, slots=True)
class FailedBatch:
    members: int
    attempt: int
    """The highest attempt among its members, this one included; 1 is the first."""
    kind: FailureKind


def after_failure(batch: FailedBatch) -> Verdict:
    if batch.kind is FailureKind.SUSPECT:
        return Verdict.HALVE if batch.members > 1 else Verdict.FAIL_MODEL
    if batch.kind in (FailureKind.NOT_SENT, FailureKind.OVERLOAD):
        return Verdict.REQUEUE  # nothing ran: bounded by the deadline alone
    if batch.attempt >= SINGLES_FROM and batch.members > 1:
        return Verdict.SINGLES
    return Verdict.REQUEUE if batch.attempt < MAX_ATTEMPTS else Verdict.FAIL_BACKEND
