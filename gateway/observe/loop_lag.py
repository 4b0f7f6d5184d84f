"""How late the event loop runs what is due: look here first when latency rises and nothing else moved.

A timer measures its own lateness. Rules: while work passes through (the `activity` number moves) it fires
every `BUSY_INTERVAL_S`, otherwise every `IDLE_INTERVAL_S`, so an idle process wakes once a second for it. The
clock is `time.monotonic`, because uvloop's `loop.time()` only advances in milliseconds, once per turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from gateway.observe.record import Histogram

BUSY_INTERVAL_S: Final = 0.1
IDLE_INTERVAL_S: Final = 1.0
LAG_BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class LoopLag:
    """Histogram of the running loop's lag in seconds; `start` and `close` on the loop's thread.

    Args:
        activity: any number that changes whenever the process does work, for instance requests received.
        clock: monotonic seconds.
    """

    def __init__(self, activity: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> None:
        self.histogram = Histogram(LAG_BOUNDS_S)
        self._activity = activity
        self._clock = clock
        self._seen = activity()
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._arm(BUSY_INTERVAL_S)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, interval_s: float) -> None:
        self._due = self._clock() + interval_s
        self._timer = asyncio.get_running_loop().call_later(interval_s, self._fired)

    def _fired(self) -> None:
        self.histogram.add(max(0.0, self._clock() - self._due))
        seen, self._seen = self._seen, self._activity()
        self._arm(IDLE_INTERVAL_S if seen == self._seen else BUSY_INTERVAL_S)

    def __repr__(self) -> str:
        return f"<LoopLag {self.histogram!r}>"
