"""What becomes of the members of a failed batch while others come, go and are told things."""

from __future__ import annotations

import asyncio

import pytest

from gateway.backends.interface import FailureKind, Sign
from gateway.core.fleet import State
from gateway.core.model import BatchPolicy
from gateway.core.resilience import Resilience
from gateway.dispatcher_lanes import Lane
from gateway.errors import Cancelled, DeadlineExceeded, RetryBudgetExhausted
from tests.scripted import Bench, simulated, turns


@simulated
async def test_who_is_made_leave_by_somebody_without_credit_waits_in_no_lane() -> None:
    bench = Bench(BatchPolicy(8), replicas=2, kinds=["oip", "oip"])
    early, late = bench.send(timeout_s=5.0), bench.send(timeout_s=9.0)
    late.on_settled = early.request.abort
    (dispatcher,) = bench.scheduler.dispatchers
    batch = await bench.backend.expect_batch(rows=2)
    now = bench.loop.time()
    assert dispatcher.budget.withdraw(int(dispatcher.budget.available(now)) - 1, now)
    batch.fail(FailureKind.BROKEN)
    await bench.backend.expect_nothing()
    assert isinstance(late.error, RetryBudgetExhausted)
    assert isinstance(early.error, Cancelled)
    assert dispatcher.lanes.count == 0
    await bench.finish()


@simulated
async def test_nobody_is_to_blame_once_the_rows_are_others() -> None:
    """A refuses two rows, B takes neither, one leaves; that B takes the other proves nothing about A."""
    bench = Bench(BatchPolicy(8), replicas=2, kinds=["oip", "oip"])
    leaver, _ = bench.send(), bench.send()
    refused = await bench.backend.expect_batch(rows=2)
    refused.fail(FailureKind.SUSPECT, sign=Sign.ANSWERED)
    untaken = await bench.backend.expect_batch(rows=2)
    assert untaken.replica is not refused.replica
    leaver.request.abort()
    untaken.fail(FailureKind.NOT_SENT)
    again = await bench.backend.expect_batch(rows=1)
    again.reply()
    await bench.finish()
    assert [member.breaker.window.failed for member in bench.scheduler.fleets[0].members] == [0, 0]


@simulated
async def test_a_caller_s_short_deadline_is_no_failure_of_the_replica() -> None:
    bench = Bench(BatchPolicy(1), replicas=2, kinds=["oip", "oip"])
    (fleet,) = bench.scheduler.fleets
    for member in fleet.members:
        for _ in range(250):
            member.time.observe(1, 0.3, bench.loop.time())
    for _ in range(12):
        bench.send(timeout_s=0.2)
        batch = await bench.backend.expect_batch(rows=1)
        assert batch.timeout_s == pytest.approx(0.2)
        await asyncio.sleep(batch.timeout_s)
        batch.fail(FailureKind.TIMEOUT)
        await asyncio.sleep(0.1)
    assert all(isinstance(caller.error, DeadlineExceeded) for caller in bench.callers)
    assert [member.breaker.state for member in fleet.members] == [State.CLOSED, State.CLOSED]
    assert [member.breaker.window.failed for member in fleet.members] == [0, 0]
    await bench.finish()


@simulated
async def test_a_replica_that_lets_the_time_of_an_attempt_pass_is_charged_whatever_the_deadline() -> None:
    bench = Bench(BatchPolicy(1), replicas=2, kinds=["oip", "oip"], resilience=Resilience(attempt_timeout_s=0.1))
    bench.send(timeout_s=0.1001)
    batch = await bench.backend.expect_batch(rows=1)
    await asyncio.sleep(0.1)
    batch.fail(FailureKind.TIMEOUT)
    assert sum(member.breaker.window.failed for member in bench.scheduler.fleets[0].members) == 1
    await bench.finish()


@simulated
async def test_what_timed_out_is_not_tried_again_where_the_time_left_is_too_short() -> None:
    bench = Bench(BatchPolicy(8), replicas=2, kinds=["oip", "oip"], resilience=Resilience(attempt_timeout_s=1.0))
    for member in bench.scheduler.fleets[0].members:
        for _ in range(20):
            member.time.observe(2, 0.5, bench.loop.time())
    hurried, patient = bench.send(timeout_s=1.3), bench.send(timeout_s=9.0)
    batch = await bench.backend.expect_batch(rows=2)
    await asyncio.sleep(1.0)
    batch.fail(FailureKind.TIMEOUT)
    again = await bench.backend.expect_batch(rows=1)
    assert (again.numbers, again.lane) == (patient.numbers, Lane.RETRY)
    assert isinstance(hurried.error, DeadlineExceeded)
    assert bench.loop.time() < hurried.request.deadline
    again.reply()
    await turns()
    await bench.finish()
