from __future__ import annotations

import asyncio

import pytest

from gateway.scheduler_timer import TIMER_SLACK_S, Timer, earlier
from tests.scripted import simulated


@simulated
async def test_it_fires_at_the_earliest_instant_asked_for_and_once() -> None:
    loop = asyncio.get_running_loop()
    fired: list[float] = []
    timer = Timer(loop, loop.time, lambda: fired.append(loop.time()))
    begun = loop.time()
    timer.arm(begun + 3.0)
    timer.arm(begun + 1.0)
    timer.arm(begun + 2.0)
    await asyncio.sleep(10.0)
    assert fired == [pytest.approx(begun + 1.0, abs=2 * TIMER_SLACK_S)]
    assert fired[0] >= begun + 1.0
    assert not timer.armed
    timer.arm(begun)  # in the past: now
    await asyncio.sleep(0.1)
    assert len(fired) == 2


@simulated
async def test_cancelled_it_does_not_fire() -> None:
    loop = asyncio.get_running_loop()
    fired: list[float] = []
    timer = Timer(loop, loop.time, lambda: fired.append(loop.time()))
    timer.cancel()
    timer.arm(loop.time() + 1.0)
    timer.cancel()
    await asyncio.sleep(5.0)
    assert fired == []


def test_never_is_later_than_any_instant() -> None:
    assert earlier(None, None) is None
    assert earlier(1.0, None) == earlier(None, 1.0) == earlier(1.0, 2.0) == earlier(2.0, 1.0) == 1.0
