"""One timer for all deadlines, on simulated time."""

from __future__ import annotations

import asyncio

from gateway.ingress.grpc_deadlines import CallDeadlines
from tests.scripted import simulated


class Call:
    def __init__(self, deadlines: CallDeadlines) -> None:
        self.deadlines = deadlines
        self.deadline: float | None = None
        self.over = False
        self.expired_at: float | None = None

    def expire(self) -> None:
        assert self.deadline is None
        self.expired_at = asyncio.get_running_loop().time()
        self.over = True

    def end(self) -> None:
        self.over = True
        if self.deadline is not None:
            self.deadlines.forget(self)


def watched(count: int, *after_s: float) -> tuple[CallDeadlines, list[Call]]:
    loop = asyncio.get_running_loop()
    deadlines = CallDeadlines(loop.time)
    calls = [Call(deadlines) for _ in range(count)]
    for call, seconds in zip(calls, after_s, strict=True):
        deadlines.watch(call, loop.time() + seconds)
    return deadlines, calls


@simulated
async def test_each_expires_at_its_time() -> None:
    start = asyncio.get_running_loop().time()
    _, calls = watched(4, 3.0, 1.0, 2.0, 1.0)
    await asyncio.sleep(5)
    expired = [round(call.expired_at - start, 6) for call in calls if call.expired_at is not None]
    assert expired == [3.0, 1.0, 2.0, 1.0]


@simulated
async def test_ended_calls_do_not_expire_and_do_not_stay() -> None:
    deadlines, calls = watched(1000, *[10.0 + number for number in range(1000)])
    for call in calls[:990]:
        call.end()
    assert len(deadlines) == 10
    assert len(deadlines._heap) < 100
    await asyncio.sleep(2000)
    assert sum(call.expired_at is not None for call in calls) == 10
    assert len(deadlines) == 0


@simulated
async def test_no_timer_without_calls() -> None:
    deadlines, calls = watched(2, 5.0, 6.0)
    for call in calls:
        call.end()
    assert deadlines._handle is None
    assert deadlines._heap == []


@simulated
async def test_the_timer_is_not_armed_anew_for_every_call() -> None:
    loop = asyncio.get_running_loop()
    deadlines, (first,) = watched(1, 5.0)
    handle = deadlines._handle
    for number in range(100):
        call = Call(deadlines)
        deadlines.watch(call, loop.time() + 6.0 + number)
        if number % 2:
            call.end()
    assert deadlines._handle is handle
    earlier = Call(deadlines)
    deadlines.watch(earlier, loop.time() + 1.0)
    assert deadlines._handle is not handle
    first.end()
    await asyncio.sleep(1.5)
    assert earlier.expired_at is not None


@simulated
async def test_a_call_may_end_others_when_it_expires() -> None:
    deadlines, calls = watched(200, *[1.0] * 200)

    def expire() -> None:
        calls[0].over = True
        for call in calls[1:]:
            call.end()

    calls[0].expire = expire  # type: ignore[method-assign]
    await asyncio.sleep(3)
    assert all(call.expired_at is None for call in calls)
    assert len(deadlines) == 0
