"""The one timer of a scheduler: armed for the earliest instant that anybody asked for, and for no other.

It may fire earlier than the latest `arm` asked for, never later: whoever is called looks again, and arms it anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

TIMER_SLACK_S: Final = 0.0005
"""uvloop rounds timers to milliseconds; without this one could fire just before its instant, and again."""


class Timer:
    """Calls `fired` once for each time it runs out."""

    __slots__ = ("_fired", "_handle", "_instant", "_loop", "_now")

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float], fired: Callable[[], None]) -> None:
        self._loop = loop
        self._now = clock
        self._fired = fired
        self._handle: asyncio.TimerHandle | None = None
        self._instant = 0.0

    @property
    def armed(self) -> bool:
        return self._handle is not None

    def arm(self, instant: float) -> None:
        """Fire at `instant`, monotonic seconds, or before."""
        if self._handle is not None:
            if self._instant <= instant:
                return
            self._handle.cancel()
        self._instant = instant
        self._handle = self._loop.call_later(max(0.0, instant - self._now()) + TIMER_SLACK_S, self._run_out)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _run_out(self) -> None:
        self._handle = None
        self._fired()

    def __repr__(self) -> str:
        return f"<Timer for {self._instant:.3f}>" if self.armed else "<Timer>"


def earlier(one: float | None, other: float | None) -> float | None:
    """Of two instants; None is never."""
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)
