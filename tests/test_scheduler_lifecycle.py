"""Bounds of the queue, replicas that come and go, closing, draining, and rest."""

from __future__ import annotations

import asyncio

import pytest

from gateway.backends.interface import FailureKind
from gateway.core.model import BatchPolicy
from gateway.errors import Draining, NoBackend, NotReady, Overloaded
from gateway.scheduler import NO_BACKEND_S
from tests.scripted import Bench, ScriptedBatch, simulated, turns


@simulated
async def test_the_queue_is_bounded_in_rows_and_room_comes_back() -> None:
    bench = Bench(BatchPolicy(4, max_queue_rows=6))
    bench.send()
    batch = await bench.backend.expect_batch(rows=1)
    for _ in range(6):
        bench.send()
    with pytest.raises(Overloaded, match="maximum queue size"):
        bench.send()
    bench.scheduler.abort(bench.callers[-1].request)
    bench.send()
    batch.reply()
    (await bench.backend.expect_batch(rows=4)).reply()
    (await bench.backend.expect_batch(rows=2)).reply()
    await bench.finish()
    assert bench.statistics.rejected == {"queue_rows": 1}


@simulated
async def test_requests_wait_for_a_replica_that_comes_back() -> None:
    bench = Bench()
    bench.backend.replicas[0].set_available(False)
    bench.send()
    await asyncio.sleep(NO_BACKEND_S * 0.9)
    bench.backend.replicas[0].set_available(True)
    (await bench.backend.expect_batch(rows=1)).reply()
    await asyncio.sleep(NO_BACKEND_S)
    await bench.finish()
    assert bench.callers[0].answered


@simulated
async def test_without_any_replica_they_are_refused_in_time_and_so_are_newcomers() -> None:
    bench = Bench(replicas=2)
    begun = bench.loop.time()
    for replica in bench.backend.replicas:
        replica.set_available(False)
    waiting = bench.send()
    await asyncio.sleep(NO_BACKEND_S * 2)
    assert isinstance(waiting.error, NoBackend)
    assert waiting.settled_at - begun == pytest.approx(NO_BACKEND_S)
    with pytest.raises(NoBackend):
        bench.send()
    bench.backend.replicas[1].set_available(True)
    bench.send()
    (await bench.backend.expect_batch(rows=1)).reply()
    await bench.finish()
    assert bench.statistics.rejected == {"no_backend": 2}


@simulated
async def test_a_second_outage_is_measured_from_its_own_beginning() -> None:
    bench = Bench()
    (replica,) = bench.backend.replicas
    replica.set_available(False)
    await asyncio.sleep(NO_BACKEND_S / 2)
    replica.set_available(True)
    replica.set_available(False)
    again = bench.loop.time()
    caller = bench.send()
    await asyncio.sleep(NO_BACKEND_S * 2)
    assert caller.settled_at - again == pytest.approx(NO_BACKEND_S)
    await bench.finish()


@simulated
@pytest.mark.parametrize("kind", [FailureKind.BROKEN, FailureKind.SUSPECT])
async def test_who_comes_back_from_a_failed_batch_after_all_hope_is_gone_is_told_at_once(kind: FailureKind) -> None:
    bench = Bench()
    callers = [bench.send(), bench.send()]
    batch = await bench.backend.expect_batch(rows=2)
    bench.backend.replicas[0].set_available(False)
    await asyncio.sleep(NO_BACKEND_S + 1)
    assert [caller.settled for caller in callers] == [0, 0]
    batch.fail(kind)
    assert all(isinstance(caller.error, NoBackend) for caller in callers)
    await bench.finish()


@simulated
async def test_isolated_members_are_told_too_when_no_replica_comes_back() -> None:
    bench = Bench()
    callers = [bench.send(), bench.send()]
    batch = await bench.backend.expect_batch(rows=2)
    bench.backend.replicas[0].set_available(False)
    batch.fail(FailureKind.SUSPECT)
    await asyncio.sleep(NO_BACKEND_S + 0.1)
    assert all(isinstance(caller.error, NoBackend) for caller in callers)
    await bench.finish()


@simulated
async def test_a_model_that_failed_for_good_refuses_until_it_is_reopened() -> None:
    bench = Bench()
    bench.send()
    batch = await bench.backend.expect_batch(rows=1)
    waiting = bench.send()
    error = NotReady("model 'm' version 1 failed: it crashes")
    bench.scheduler.close(error)
    bench.scheduler.fail_waiting(error)
    assert waiting.error is error
    with pytest.raises(NotReady, match="it crashes"):
        bench.send()
    batch.reply()
    bench.scheduler.reopen()
    bench.send()
    (await bench.backend.expect_batch(rows=1)).reply()
    await bench.finish()
    assert [caller.answered for caller in bench.callers] == [True, False, True]


@simulated
async def test_closing_refuses_newcomers_and_answers_those_inside() -> None:
    bench = Bench()
    bench.send()
    batch = await bench.backend.expect_batch(rows=1)
    bench.send()
    bench.scheduler.close(Draining("the gateway is shutting down"))
    with pytest.raises(Draining):
        bench.send()
    batch.reply()
    (await bench.backend.expect_batch(rows=1)).reply()
    await bench.finish()
    assert all(caller.answered for caller in bench.callers)


@simulated
async def test_everyone_who_waits_for_the_drain_is_told() -> None:
    bench = Bench()
    bench.send()
    batch = await bench.backend.expect_batch(rows=1)
    waiters = [asyncio.ensure_future(bench.scheduler.drained()) for _ in range(3)]
    await turns()
    waiters[1].cancel()
    await turns()
    assert not waiters[0].done()
    batch.reply()
    await turns()
    assert [waiter.cancelled() for waiter in waiters] == [False, True, False]
    assert waiters[0].done()
    assert waiters[2].done()
    await bench.finish()


@simulated
async def test_draining_waits_for_a_batch_whose_callers_have_all_left() -> None:
    bench = Bench()
    caller = bench.send()
    batch = await bench.backend.expect_batch(rows=1)
    bench.scheduler.abort(caller.request)
    waiter = asyncio.ensure_future(bench.scheduler.drained())
    await turns()
    assert not waiter.done()
    batch.fail(FailureKind.BROKEN)
    await turns()
    assert waiter.done()
    await bench.finish()


@simulated
async def test_nothing_ticks_while_nobody_waits() -> None:
    bench = Bench()
    bench.send(timeout_s=2.0)
    (await bench.backend.expect_batch(rows=1)).reply()
    await bench.scheduler.drained()
    await asyncio.sleep(3600.0)
    assert not bench.scheduler._timer.armed
    assert repr(bench.scheduler) == "<Scheduler m/1 <BatchQueue 0 requests, 0 rows, 0 groups> running=0>"


@simulated
async def test_one_timer_however_many_wait() -> None:
    bench = Bench()
    bench.send()
    batch = await bench.backend.expect_batch(rows=1)
    for patience in range(200, 100, -1):
        bench.send(timeout_s=patience / 100)
    await turns()
    live = [handle for handle in bench.loop._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]
    assert len(live) == 1
    bench.backend.respond = ScriptedBatch.reply
    batch.reply()
    await bench.finish()
