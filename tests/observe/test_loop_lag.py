from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from gateway.observe.loop_lag import BUSY_INTERVAL_S, IDLE_INTERVAL_S, LoopLag


class Timer:
    def __init__(self, delay_s: float, callback: Callable[[], None]) -> None:
        self.delay_s = delay_s
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Clock:
    """Plays loop and clock: the test says how late each timer fires."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 50.0
        self.work = 0
        self.timers: list[Timer] = []
        monkeypatch.setattr(asyncio, "get_running_loop", lambda: self)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        self.timers.append(Timer(delay_s, callback))
        return self.timers[-1]

    def fire(self, late_s: float = 0.0) -> None:
        timer = self.timers.pop()
        self.now += timer.delay_s + late_s
        timer.callback()

    def probe(self) -> LoopLag:
        return LoopLag(lambda: self.work, lambda: self.now)


def test_lateness_is_what_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lag = clock.probe()
    lag.start()
    for late_s in (0.0, 0.03, 0.7):
        clock.fire(late_s)
    lag.histogram.fold()
    assert lag.histogram.count == 3
    assert lag.histogram.sum == pytest.approx(0.73)


def test_a_timer_that_fires_early_counts_as_no_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lag = clock.probe()
    lag.start()
    clock.fire(-0.0004)
    lag.histogram.fold()
    assert (lag.histogram.count, lag.histogram.sum) == (1, 0.0)


def test_it_fires_often_only_while_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lag = clock.probe()
    lag.start()
    clock.fire()
    assert clock.timers[-1].delay_s == IDLE_INTERVAL_S
    clock.work += 1
    clock.fire()
    assert clock.timers[-1].delay_s == BUSY_INTERVAL_S
    clock.fire()
    assert clock.timers[-1].delay_s == IDLE_INTERVAL_S
    assert len(clock.timers) == 1


def test_close_leaves_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lag = clock.probe()
    lag.close()
    lag.start()
    lag.close()
    assert clock.timers[-1].cancelled


async def test_on_a_real_loop_a_blocked_turn_shows() -> None:
    """Blocks the loop past the instant the probe is due, so lag must be seen however slow the machine is."""
    now = 0.0
    lag = LoopLag(lambda: 0, lambda: now)
    lag.start()
    now = BUSY_INTERVAL_S + 0.5
    while not lag.histogram.pending:
        await asyncio.sleep(0.01)
    lag.close()
    assert lag.histogram.pending[0] == pytest.approx(0.5)
