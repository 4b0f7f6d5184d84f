"""What becomes of the members of a batch that failed.

Rules (resilience notes §1.3, §1.4; the unit is the request, not the batch):
  * nobody who waits for an answer pays for a dead worker: BROKEN, TIMEOUT, OVERLOAD and NOT_SENT go back to the
    front of the queue, for another replica;
  * input that the model refuses (SUSPECT) is halved until the offender stands alone: every innocent batch-mate
    succeeds, at a cost of at most 2·log2(n) + 1 extra runs;
  * a batch that broke two workers is run member by member: a crash costs a restart, a single run milliseconds; whoever
    breaks another one alone stays alone, so that it cannot take a third party along;
  * attempts that ended with SUSPECT do not count as broken: innocents of a halved batch keep all their reruns;
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
    broken: int
    """Broken attempts of the member that has seen most of them, this attempt included if it counts (`counts`)."""
    kind: FailureKind


def counts(kind: FailureKind) -> bool:
    """Whether an attempt that ended so used up one of the `MAX_ATTEMPTS`."""
    return kind not in (FailureKind.SUSPECT, FailureKind.NOT_SENT, FailureKind.OVERLOAD)


def after_failure(batch: FailedBatch) -> Verdict:
    if batch.kind is FailureKind.SUSPECT:
        return Verdict.HALVE if batch.members > 1 else Verdict.FAIL_MODEL
    if batch.kind in (FailureKind.NOT_SENT, FailureKind.OVERLOAD):
        return Verdict.REQUEUE  # nothing ran: the worker is gone. Tried again after a pause, until the deadline
    if batch.broken >= MAX_ATTEMPTS and batch.members == 1:
        return Verdict.FAIL_BACKEND
    return Verdict.SINGLES if batch.broken >= SINGLES_FROM else Verdict.REQUEUE
