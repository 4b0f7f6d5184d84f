"""How much may be executed again: a share of what is executed at all, so that retries never multiply an outage.

Counted in items (requests), per model (resilience notes §1.3). Two sources:

  * **credit**: every item executed for the first time adds `ratio` (0.1: a tenth); it expires after 10 s, so that a
    long quiet success does not pay for a storm (Finagle's RetryBudget, TTL 10 s);
  * **reserve**: max(100, 2 × largest batch × slots) items, regained evenly within 10 s, so that the death of one
    replica with everything in flight on it is affordable at any time, also right after the start.

Invariant, for any T seconds: withdrawn ≤ ratio × deposited in them and the 10 s before + reserve × (1 + T / 10).
Time is an argument, monotonic seconds; an instant before the last one seen counts as that one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

TTL_S: Final = 10.0
"""After this credit has expired, and an empty reserve is full again."""
MIN_RESERVE: Final = 100.0
SLICES: Final = 10
"""Credit is kept by age in slices of a second."""


@dataclass(frozen=True, slots=True)
class RetryBudgetStatistics:
    """Items. `withdrawn` and `refused` are totals."""

    available: float
    credit: float
    reserve: float
    reserve_size: float
    withdrawn: int
    refused: int


class RetryBudget:
    """The budget of one model; see the module's docstring."""

    __slots__ = (
        "_credit", "_reserve", "_second", "_size", "_slices", "_then", "ratio", "refused", "withdrawn",
    )  # fmt: skip

    def __init__(self, ratio: float, max_batch_rows: int, slots: int = 1) -> None:
        """`ratio`: items executed again per item executed for the first time. `slots`: batches in flight at most."""
        self.ratio = ratio
        self.withdrawn = 0
        """Items paid for, ever."""
        self.refused = 0
        """Items there was nothing left for, ever."""
        self._slices = [0.0] * SLICES
        self._credit = 0.0
        self._second = 0
        self._then: float | None = None
        self._size = self._reserve = _reserve_size(max_batch_rows, slots)

    def resize(self, max_batch_rows: int, slots: int) -> None:
        """Replicas came or went, or learned to take more."""
        size = _reserve_size(max_batch_rows, slots)
        self._reserve = min(max(self._reserve + size - self._size, 0.0), size)
        self._size = size

    def deposit(self, items: int, now: float) -> None:
        """`items` are executed for the first time."""
        if self._then is None or int(now) != self._second:  # the rest is up to `withdraw`
            self._advance(now)
        amount = self.ratio * items
        self._slices[self._second % SLICES] += amount
        self._credit += amount

    def withdraw(self, items: int, now: float) -> bool:
        """Pay for executing `items` again: all of them, or False and nothing is taken. The oldest credit goes first."""
        self._advance(now)
        if items > self._credit + self._reserve + 1e-9:
            self.refused += items
            return False
        self.withdrawn += items
        owed = float(items)
        for age in range(SLICES - 1, -1, -1):
            at = (self._second - age) % SLICES
            taken = min(self._slices[at], owed)
            self._slices[at] -= taken
            owed -= taken
        self._credit = sum(self._slices)
        self._reserve = max(self._reserve - owed, 0.0)
        return True

    def available(self, now: float) -> float:
        """Items that could be paid for now."""
        self._advance(now)
        return self._credit + self._reserve

    def _advance(self, now: float) -> None:
        if self._then is None:
            self._then, self._second = now, int(now)
            return
        if now <= self._then:
            return
        self._reserve = min(self._reserve + self._size * (now - self._then) / TTL_S, self._size)
        self._then = now
        second = int(now)
        if second == self._second:
            return
        for at in range(max(self._second + 1, second - SLICES + 1), second + 1):
            self._slices[at % SLICES] = 0.0
        self._second = second
        self._credit = sum(self._slices)

    def statistics(self, now: float) -> RetryBudgetStatistics:
        available = self.available(now)
        return RetryBudgetStatistics(available, self._credit, self._reserve, self._size, self.withdrawn, self.refused)

    def __repr__(self) -> str:
        return f"<RetryBudget {self._credit:.1f} + {self._reserve:.1f} of {self._size:.0f}>"


def _reserve_size(max_batch_rows: int, slots: int) -> float:
    return max(MIN_RESERVE, 2.0 * max_batch_rows * slots)
