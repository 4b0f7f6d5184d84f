"""How much of the event loop's time may go to work that nobody waits for.

Credit grows with the time in which the loop had nothing to do: half of it, but never less than `LEAST` of all time, so
that even a gateway under full load does a little, and never more than `MOST`. Whoever does such work spends what it
took, times `HIDDEN`: what is done on its behalf elsewhere (queues, batches, workers) cannot be told from everybody's.

The loop is occupied while its thread runs or waits for a core: with other processes on the same cores a thread that
is never idle may run only half the time. Both are the kernel's to say, which is asked once in `WINDOW_S`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

SCHEDULE: Final = Path("/proc/thread-self/schedstat")
LEAST: Final = 0.01
MOST: Final = 0.2
BURST_S: Final = 0.02
"""Most that is saved up."""
HIDDEN: Final = 3.0
WINDOW_S: Final = 0.05
"""How long is looked at before the loop is called busy or idle."""


class Leisure:
    """Of one loop; made in its thread."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, occupied: Callable[[], float] | None = None
    ) -> None:
        """`occupied`: seconds so far in which the loop's thread ran or wanted to; None: the kernel is asked."""
        self._now = clock
        self._occupied = occupied or occupied_s
        self._credit_s = BURST_S
        self._seen = self._window = clock()
        self._occupied_s = self._occupied()
        self._rate = MOST

    def left(self) -> bool:
        """Whether there is time now."""
        now = self._now()
        if now - self._window >= WINDOW_S:
            occupied_s = self._occupied()
            idle = 1.0 - (occupied_s - self._occupied_s) / (now - self._window)
            self._rate = min(MOST, max(LEAST, idle / 2))
            self._window, self._occupied_s = now, occupied_s
        self._credit_s = min(BURST_S, self._credit_s + (now - self._seen) * self._rate)
        self._seen = now
        return self._credit_s > 0.0

    def spent(self, begun: float) -> None:
        """Work that began then is done, or left to others, now."""
        self._credit_s -= (self._now() - begun) * HIDDEN

    def __repr__(self) -> str:
        return f"<Leisure rate={self._rate:.2f} credit={self._credit_s * 1e3:.1f} ms>"


def occupied_s(file: Path = SCHEDULE) -> float:
    """Seconds in which the calling thread ran or waited for a core; where the kernel does not say: in which it ran."""
    try:
        ran, waited, *_ = file.read_bytes().split()
        return (int(ran) + int(waited)) / 1e9
    except (OSError, ValueError):
        return time.thread_time()
