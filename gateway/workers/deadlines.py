"""One timer for the deadlines of all batches in flight, instead of one per batch.

It is armed for the earliest deadline it was told of and asleep while nothing is in flight. Batches usually end long
before their deadlines and new ones have later deadlines, so it is hardly ever armed anew.

A timer that fires late says that this process was held up, or the whole machine was, and so perhaps those on the other
side. Nothing is done about deadlines then but to look again a little later; the second time counts, late or not.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

LATE_S: Final = 0.05
"""A timer this late was held up; busy turns of the loop take a tenth of it."""
GRACE_S: Final = 0.1
"""What the others are given then to get on with their work."""


class Expiring(Protocol):
    def expire(self, now: float, /) -> float:
        """Act on what is overdue; returns the earliest deadline left, infinite if there is none."""


class Sweep:
    """The one timer behind all attempt deadlines: asleep while nothing is in flight."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.channels: set[Expiring] = set()
        self._due = float("inf")
        self._handle: asyncio.TimerHandle | None = None
        self._grace = False

    def watch(self, deadline: float) -> None:
        """An attempt with this deadline (loop time) was sent."""
        if deadline < self._due:
            self._arm(deadline)

    def _arm(self, due: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._due = due
        self._handle = self.loop.call_at(due, self._fire)

    def _fire(self) -> None:
        self._handle = None
        now = self.loop.time()
        self._grace = not self._grace and now - self._due > LATE_S
        if self._grace:
            self._arm(now + GRACE_S)
            return
        self._due = float("inf")
        for channel in list(self.channels):
            self.watch(channel.expire(now))

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
