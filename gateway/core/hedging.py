"""Whether a batch that is late is sent to a second replica as well (resilience notes §1.5; off unless configured).

The second run is wasted work in most cases, so it only ever uses what is idle: nobody waits, every replica is well,
another one has a free slot. It is sent when the batch has taken longer than 95 of 100 of its size; the share of rows
sent twice and the retry budget bound it ("The Tail at Scale": about 2 % more work removes most of the tail).

Decide, then act: `may_hedge` says Hedge, Later (with the instant to look again) or Never for this batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LOOK_AGAIN_S: Final = 0.005
"""When something was in the way that may be gone soon."""
SHARE_SAVED: Final = 100.0
"""Items' worth of hedging that a quiet time may save up at most."""


@dataclass(frozen=True, slots=True)
class Hedge:
    """Now."""


@dataclass(frozen=True, slots=True)
class Later:
    """Not yet: look again at `instant`, monotonic seconds."""

    instant: float


@dataclass(frozen=True, slots=True)
class Never:
    """Not for this batch."""


HEDGE: Final = Hedge()
NEVER: Final = Never()
Decision = Hedge | Later | Never


@dataclass(frozen=True, slots=True)
class RunningAttempt:
    """A batch that is on its way. `items` are its members that still wait."""

    items: int
    dispatched: float
    deadline: float
    """The latest of its members', monotonic seconds; infinite if none."""
    p95_s: float | None
    """For its size, on its replica; None: not known yet."""
    predicted_s: float
    """S(rows) on the replica that would run it too; 0.0: unknown."""
    attempts: int
    """Executions of the member that has most of them, this one included."""
    hedged: bool
    """It has a twin, or is one."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The model's state at this instant."""

    idempotent: bool
    max_attempts: int
    idle_slot: bool
    """Another usable replica, none of those tried, has a free slot and nothing in flight."""
    waiting: bool
    """Anything waits in a queue or lane of the model."""
    all_closed: bool
    """Every breaker of the model's replicas is closed."""
    budget: float
    """Items the retry budget could pay for."""


class HedgeShare:
    """Keeps hedged items to a share of all: +share per item executed for the first time, −1 per hedged item."""

    __slots__ = ("_saved", "hedged", "share")

    def __init__(self, share: float) -> None:
        """`share`: 0.02 is two in a hundred; 0.0 switches hedging off."""
        self.share = share
        self.hedged = 0
        """Items hedged, ever."""
        self._saved = 0.0

    def deposit(self, items: int) -> None:
        self._saved = min(self._saved + self.share * items, SHARE_SAVED)

    def allows(self, items: int) -> bool:
        return items <= self._saved

    def spend(self, items: int) -> None:
        self._saved -= items
        self.hedged += items

    def __repr__(self) -> str:
        return f"<HedgeShare {self._saved:.1f} saved, {self.hedged} hedged>"


def may_hedge(attempt: RunningAttempt, around: Surroundings, share: HedgeShare, now: float) -> Decision:
    """What to do about a batch that has not been answered yet; nothing is taken from share or budget here."""
    if attempt.p95_s is None or not _permitted(attempt, around, share):
        return NEVER
    due = attempt.dispatched + attempt.p95_s
    if max(now, due) + attempt.predicted_s >= attempt.deadline:
        return NEVER  # the twin could not answer in time either
    if now < due:
        return Later(due)
    if not share.allows(attempt.items) or attempt.items > around.budget:
        return NEVER
    if around.waiting or not around.idle_slot or not around.all_closed:
        return Later(now + max(LOOK_AGAIN_S, attempt.p95_s / 4))
    return HEDGE


def _permitted(attempt: RunningAttempt, around: Surroundings, share: HedgeShare) -> bool:
    """What does not change while the batch runs."""
    if share.share <= 0.0 or not around.idempotent:
        return False
    return attempt.items > 0 and not attempt.hedged and attempt.attempts < around.max_attempts
