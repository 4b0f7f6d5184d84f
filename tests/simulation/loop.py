"""An event loop without sockets: callbacks, timers and a clock that jumps to the next timer.

It is what `asyncio.get_running_loop()` returns while a history runs, and offers what the gateway's scheduler, futures,
events and tasks need of a loop. Rules:
  * time stands still while callbacks run, but for `turn_s`, which every turn costs, and `stall`, which a history calls;
  * a timer never fires early; how late is drawn (`late_s`), and so is the order of timers of one instant;
  * an exception that leaves a callback is kept in `mishaps`: no history may have any;
  * callbacks that keep following each other without time passing are a busy loop, which is reported, not waited for.
"""

from __future__ import annotations

import asyncio
from asyncio import events
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from heapq import heappop, heappush
from random import Random
from typing import Any, Final, cast

MANY_TURNS: Final = 2_000
"""Turns in a row at one instant, after which the loop counts as busy; with `turn_s` the instant moves a little."""
INSTANT_S: Final = 1e-12


class BusyLoop(Exception):
    """Callbacks follow each other without end and without time passing."""


class Call:
    """What `call_soon` and `call_later` return."""

    __slots__ = ("arguments", "callback", "loop", "waits", "when_")

    def __init__(
        self, loop: SimulatedLoop, callback: Callable[..., object], arguments: tuple[Any, ...], when: float
    ) -> None:
        self.loop = loop
        self.callback: Callable[..., object] | None = callback
        self.arguments = arguments
        self.when_ = when
        self.waits = False
        """Whether it stands in the heap of timers and was not cancelled."""

    def cancel(self) -> None:
        self.callback = None
        self.arguments = ()
        if self.waits:
            self.waits = False
            self.loop.timers -= 1

    def cancelled(self) -> bool:
        return self.callback is None

    def when(self) -> float:
        return self.when_


class SimulatedLoop:
    """See the module's docstring."""

    def __init__(self, rng: Random, turn_s: float = 0.0, late_s: float = 0.0) -> None:
        self.now = 1000.0
        self.timers = 0
        """Armed and neither fired nor cancelled."""
        self.callbacks = 0
        """Executed so far."""
        self.mishaps: list[str] = []
        self._turn_s = turn_s
        self._late_s = late_s
        self._chance = rng.random
        self._ready: deque[Call] = deque()
        self._heap: list[tuple[float, float, int, Call]] = []
        self._sequence = 0

    # -- what asyncio and the gateway ask of a loop ------------------------------------------------------------------

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Any:
        call = Call(self, callback, args, self.now)
        self._ready.append(call)
        return call

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Any:
        return self.call_at(self.now + delay, callback, *args)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Any:
        call = Call(self, callback, args, when)
        call.waits = True
        self.timers += 1
        self._sequence += 1
        tie = self._chance()
        heappush(self._heap, (when + self._late_s * tie, tie, self._sequence, call))
        return call

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self.for_asyncio)

    def create_task(self, coro: Any, *, name: Any = None, context: Context | None = None) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self.for_asyncio, name=name)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.mishaps.append(f"{context.get('message')}: {context.get('exception')!r}")

    @property
    def for_asyncio(self) -> asyncio.AbstractEventLoop:
        """Itself; asyncio never asks whether it is one of its own."""
        return cast("asyncio.AbstractEventLoop", self)

    @contextmanager
    def current(self) -> Iterator[None]:
        """It is the running loop inside."""
        before = events._get_running_loop()
        events._set_running_loop(self.for_asyncio)
        try:
            yield
        finally:
            events._set_running_loop(before)

    # -- what a history does -----------------------------------------------------------------------------------------

    def stall(self, seconds: float) -> None:
        """The loop was blocked that long: timers that came due meanwhile are late."""
        self.now += seconds

    def run(self, until: float) -> None:
        """Run what is due, in the order of time, up to the instant `until`; then it is that instant.

        Raises:
            BusyLoop: something ticks that should wait.
        """
        with self.current():
            self._run(until)

    def _run(self, until: float) -> None:
        ready, heap = self._ready, self._heap
        turns, instant = 0, self.now
        while True:
            while heap and (heap[0][0] <= self.now or heap[0][3].callback is None):
                call = heappop(heap)[3]
                if call.callback is not None:
                    call.waits = False
                    self.timers -= 1
                    ready.append(call)
            if not ready:
                if not heap or heap[0][0] > until:
                    self.now = max(self.now, until)
                    return
                self.now = heap[0][0]
                continue
            turns += 1
            if turns > MANY_TURNS:
                if self.now - instant <= (MANY_TURNS + 1) * self._turn_s + INSTANT_S:
                    raise BusyLoop(f"{MANY_TURNS} turns at one instant; last: {ready[0].callback!r}")
                turns, instant = 0, self.now
            self.now += self._turn_s
            for _ in range(len(ready)):
                call = ready.popleft()
                callback = call.callback
                if callback is None:
                    continue
                self.callbacks += 1
                try:
                    callback(*call.arguments)
                except Exception as error:
                    self.mishaps.append(f"{callback!r}: {error!r}")

    def __repr__(self) -> str:
        return f"<SimulatedLoop at {self.now:.6f}, {len(self._ready)} ready, {self.timers} timers>"
