"""What happened in the last ten seconds: ten buckets of one second each, exact counts.

A mean weighted by arrivals would hide a total outage behind one tight burst of failures (resilience notes §1.6), so
attempts are counted, and forgotten second by second. Constant time and memory; the totals are always those of the
second of the latest call and the nine before it. A clock that stands still or goes back merely keeps counting in the
newest bucket.
"""

from __future__ import annotations

from typing import Final

BUCKETS: Final = 10
BUCKET_S: Final = 1.0


class Window:
    """Counts attempts: how many, how many of them failed; and of those that were timed, how many were slow."""

    __slots__ = ("_failed", "_second", "_slow", "_timed", "_total", "failed", "slow", "timed", "total")

    def __init__(self) -> None:
        self._second = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.total = self.failed = self.timed = self.slow = 0
        self._total = [0] * BUCKETS
        self._failed = [0] * BUCKETS
        self._timed = [0] * BUCKETS
        self._slow = [0] * BUCKETS

    def attempt(self, failed: bool, now: float) -> None:
        """An attempt ended at `now`, monotonic seconds."""
        at = self._at(now)
        self._total[at] += 1
        self.total += 1
        if failed:
            self._failed[at] += 1
            self.failed += 1

    def time(self, slow: bool, now: float) -> None:
        """The time of an attempt could be compared with that of its peers."""
        at = self._at(now)
        self._timed[at] += 1
        self.timed += 1
        if slow:
            self._slow[at] += 1
            self.slow += 1

    def advance(self, now: float) -> None:
        """Forget what is older than the window."""
        self._at(now)

    def _at(self, now: float) -> int:
        second = int(now / BUCKET_S)
        if second > self._second:
            for old in range(max(self._second + 1, second - BUCKETS + 1), second + 1):
                self._empty(old % BUCKETS)
            self._second = second
        return self._second % BUCKETS

    def _empty(self, at: int) -> None:
        self.total -= self._total[at]
        self.failed -= self._failed[at]
        self.timed -= self._timed[at]
        self.slow -= self._slow[at]
        self._total[at] = self._failed[at] = self._timed[at] = self._slow[at] = 0

    def __repr__(self) -> str:
        return f"<Window {self.failed} of {self.total} failed, {self.slow} of {self.timed} slow>"
