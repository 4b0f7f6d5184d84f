"""One timer: armed for what is due, asleep otherwise."""

from __future__ import annotations

import asyncio
import time

from gateway.workers.deadlines import LATE_S, Sweep
from tests.workers.rig import until


class Source:
    def __init__(self, *deadlines: float) -> None:
        self.deadlines = set(deadlines)
        self.expired: list[float] = []
        self.asked = 0

    def expire(self, now: float, /) -> float:
        self.asked += 1
        due = {deadline for deadline in self.deadlines if deadline <= now}
        self.deadlines -= due
        self.expired += due
        return min(self.deadlines, default=float("inf"))


async def test_it_fires_for_each_deadline_and_then_sleeps() -> None:
    loop = asyncio.get_running_loop()
    sweep = Sweep(loop)
    now = loop.time()
    source = Source(now + 0.02, now + 0.01, now + 1000)
    sweep.channels.add(source)
    for deadline in list(source.deadlines):
        sweep.watch(deadline)
    await until(lambda: len(source.expired) == 2)
    assert source.expired == sorted(source.expired)
    asked = source.asked
    await asyncio.sleep(0.03)
    assert source.asked == asked
    sweep.stop()


async def test_later_deadlines_do_not_arm_it_again() -> None:
    sweep = Sweep(asyncio.get_running_loop())
    sweep.watch(sweep.loop.time() + 1000)
    handle = sweep._handle
    sweep.watch(sweep.loop.time() + 2000)
    assert sweep._handle is handle
    sweep.watch(sweep.loop.time() + 500)
    assert sweep._handle is not handle
    sweep.stop()


async def test_a_loop_that_stood_still_gives_the_others_time_once() -> None:
    """Late by no fault of theirs: nothing is done the first time, and it is not put off for ever."""
    sweep = Sweep(asyncio.get_running_loop())
    source = Source(sweep.loop.time() + 0.01)
    sweep.channels.add(source)
    sweep.watch(min(source.deadlines))
    fired: list[bool] = []
    fire = sweep._fire

    def watched() -> None:
        fire()
        fired.append(bool(source.expired))

    handle = sweep._handle
    assert handle is not None
    handle.cancel()
    sweep._handle = sweep.loop.call_at(handle.when(), watched)
    time.sleep(LATE_S + 0.02)  # the loop stands still
    await until(lambda: bool(fired), "fired")
    assert fired == [False]
    await until(lambda: bool(source.expired), "expired")
    sweep.stop()
