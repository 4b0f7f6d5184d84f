"""One timer: armed for what is due, asleep otherwise."""

from __future__ import annotations

import asyncio

from gateway.workers.deadlines import Sweep
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
