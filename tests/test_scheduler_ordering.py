"""Answers in the order of arrival (`preserve_ordering`) on a virtual clock."""

from __future__ import annotations

import asyncio
import types
from typing import cast

import pytest

from gateway.backends.interface import FailureKind
from gateway.catalog import ServedVersion
from gateway.core.model import BatchPolicy
from gateway.core.scheduling import Scheduling
from gateway.errors import DeadlineExceeded, Overloaded
from gateway.pipeline import Pipeline
from tests.scripted import Bench, simulated, turns

IN_ORDER = Scheduling(preserve_ordering=True)


@simulated
async def test_answers_are_released_in_the_order_of_arrival() -> None:
    bench = Bench(BatchPolicy(2), replicas=3, scheduling=IN_ORDER)
    told: list[int] = []
    for place in range(6):
        bench.send().on_settled = lambda place=place: told.append(place)
    first, second, third = [await bench.backend.expect_batch(rows=2) for _ in range(3)]
    third.reply()
    await turns()
    assert told == []
    first.reply()
    await turns()
    assert told == [0, 1]
    second.reply()
    await bench.finish()
    assert told == [0, 1, 2, 3, 4, 5]


@simulated
async def test_errors_and_those_who_leave_hold_nobody_up() -> None:
    bench = Bench(BatchPolicy(1), replicas=4, scheduling=IN_ORDER)
    fails, leaves, late, waits = (bench.send(timeout_s=0.1 if place == 2 else 0.0) for place in range(4))
    batches = [await bench.backend.expect_batch(rows=1) for _ in range(4)]
    batches[3].reply()
    bench.scheduler.abort(leaves.request)
    await asyncio.sleep(0.2)
    assert isinstance(late.error, DeadlineExceeded)
    assert [caller.settled for caller in (fails, leaves, late, waits)] == [0, 1, 1, 0]
    batches[0].fail(FailureKind.SUSPECT)
    await turns()
    assert waits.answered
    batches[1].reply()
    batches[2].reply()
    await bench.finish()


@simulated
async def test_whose_answer_is_held_may_still_leave() -> None:
    bench = Bench(BatchPolicy(1), replicas=3, scheduling=IN_ORDER)
    first, second, third = [bench.send() for _ in range(3)]
    batches = [await bench.backend.expect_batch(rows=1) for _ in range(3)]
    batches[1].reply()
    batches[2].reply()
    await turns()
    bench.scheduler.abort(second.request)
    assert [caller.settled for caller in (first, second, third)] == [0, 1, 0]
    batches[0].reply()
    await bench.finish()


@simulated
async def test_answers_that_are_held_back_are_bounded() -> None:
    bench = Bench(BatchPolicy(1, max_queue_rows=4), replicas=2, scheduling=IN_ORDER)
    bench.send()
    slow = await bench.backend.expect_batch(rows=1)
    for _ in range(4):
        bench.send()
        (await bench.backend.expect_batch(rows=1)).reply()
        await turns()
    with pytest.raises(Overloaded, match="Exceeds maximum queue size: 0 rows wait, and the answers of 4"):
        bench.send()
    slow.reply()
    await turns()
    bench.send()
    (await bench.backend.expect_batch(rows=1)).reply()
    await bench.finish()


@simulated
async def test_a_split_request_keeps_its_place_as_one() -> None:
    bench = Bench(BatchPolicy(2, oversize="split"), replicas=4, scheduling=IN_ORDER)
    version = cast("ServedVersion", types.SimpleNamespace(
        spec=bench.spec, scheduler=bench.scheduler, split_rows=2, cached=False, mirror=None
    ))  # fmt: skip
    told: list[str] = []
    whole, after = bench.caller(rows=5), bench.caller()
    bench.callers += [whole, after]
    whole.on_settled, after.on_settled = lambda: told.append("whole"), lambda: told.append("after")
    for caller in (whole, after):
        Pipeline().infer(version, caller.request)
        await turns()
    batches = [await bench.backend.expect_batch(rows) for rows in (2, 2, 1, 1)]
    for batch in reversed(batches[1:]):
        batch.reply()
    await turns()
    assert told == []
    batches[0].reply()
    await bench.finish()
    assert told == ["whole", "after"]


@simulated
async def test_an_answer_that_cannot_be_written_does_not_hold_up_the_next() -> None:
    def explode() -> None:
        raise RuntimeError("the socket is on fire")

    bench = Bench(BatchPolicy(1), replicas=2, scheduling=IN_ORDER)
    first, second = bench.send(), bench.send()
    batches = [await bench.backend.expect_batch(rows=1) for _ in range(2)]
    first.on_settled = explode
    batches[1].reply()
    batches[0].reply()
    await bench.finish()
    assert second.answered
