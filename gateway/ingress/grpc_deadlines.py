"""The deadlines of all calls of a server, with one timer.

Calls usually end long before their deadlines, and later calls usually have later ones, so the timer is hardly ever
armed anew: it fires, finds that what it was set for is gone, and is set for the earliest that is left. Calls that ended
stay in the heap as long as they are fewer than those alive, so forgetting one costs next to nothing.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from typing import Final, Protocol

_COMPACT_ABOVE: Final = 64
_EARLY_S: Final = 0.0005
"""Timers of the loop count in milliseconds and may fire half of one early."""


class Expiring(Protocol):
    deadline: float | None
    over: bool

    def expire(self) -> None: ...


class CallDeadlines:
    """`clock`: monotonic seconds; the loop's timers are relative to it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int, Expiring]] = []
        self._gone = 0
        self._count = 0
        self._handle: asyncio.TimerHandle | None = None
        self._due = 0.0

    def __len__(self) -> int:
        return len(self._heap) - self._gone

    def watch(self, call: Expiring, deadline: float) -> None:
        """Have `call` expire at `deadline`."""
        call.deadline = deadline
        self._count += 1
        heapq.heappush(self._heap, (deadline, self._count, call))
        if self._handle is None or deadline < self._due:
            self._arm(deadline)

    def forget(self, call: Expiring) -> None:
        """A watched call is over."""
        call.deadline = None
        self._gone += 1
        if self._gone > _COMPACT_ABOVE and self._gone > len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if not entry[2].over]
            heapq.heapify(self._heap)
            self._gone = 0
        if self._gone == len(self._heap) and self._handle is not None:
            self._heap.clear()
            self._gone = 0
            self.stop()

    def _arm(self, due: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._due = due
        self._handle = asyncio.get_running_loop().call_later(max(0.0, due - self._clock()), self._fire)

    def _fire(self) -> None:
        self._handle = None
        now = self._clock() + _EARLY_S
        while self._heap and (self._heap[0][2].over or self._heap[0][0] <= now):
            call = heapq.heappop(self._heap)[2]
            if call.over:
                self._gone -= 1
            else:
                call.deadline = None  # nobody forgets what is not watched any more
                call.expire()
        if self._heap and self._handle is None:
            self._arm(self._heap[0][0])

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
