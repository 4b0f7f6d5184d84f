"""One timer for the deadlines of all batches in flight, instead of one per batch.

It is armed for the earliest deadline it was told of and asleep while nothing is in flight. Batches usually end long
before their deadlines and new ones have later deadlines, so it is hardly ever armed anew.
"""

from __future__ import annotations

import asyncio
from typing import Protocol


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
        self._due = float("inf")
        now = self.loop.time()
        for channel in list(self.channels):
            self.watch(channel.expire(now))

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
