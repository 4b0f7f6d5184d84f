"""Priorities and queue policies on a virtual clock; traps 64-71 of the wire notes by name."""

from __future__ import annotations

import asyncio

import pytest

from gateway.backends.interface import FailureKind
from gateway.core.model import BatchPolicy
from gateway.core.scheduling import QueuePolicy, Scheduling
from gateway.errors import Cancelled, DeadlineExceeded, ModelError, Overloaded, QueueTimeout
from tests.scripted import Bench, Caller, ScriptedBatch, simulated, turns

ON_TIME_S = 0.005
"""How late a timeout may fire."""
LEVELS = Scheduling(priority_levels=2, default_priority_level=2)


def rejecting(timeout_s: float, *, override: bool = False, size: int = 0) -> Scheduling:
    return Scheduling(default_queue_policy=QueuePolicy("REJECT", timeout_s, override, size))


def numbers_of(*callers: Caller) -> list[int]:
    return [number for caller in callers for number in caller.numbers]


async def busy(bench: Bench) -> ScriptedBatch:
    """The only replica is busy with a request of somebody else's."""
    bench.send()
    return await bench.backend.expect_batch(rows=1)


# -- traps -----------------------------------------------------------------------------------------------------------


@simulated
async def test_trap_64_preferred_sizes_and_the_delay() -> None:
    policy = BatchPolicy(8, max_queue_delay_s=0.1, preferred_batch_sizes=(4,))
    for rows, expected in ((1, [(1, 0.1)]), (4, [(4, 0.0)]), (5, [(4, 0.0), (1, 0.1)])):
        bench = Bench(policy, replicas=2)
        begun = bench.loop.time()
        for _ in range(rows):
            bench.send()
        for size, after_s in expected:
            (await bench.backend.expect_batch(size)).reply()
            assert after_s <= bench.loop.time() - begun <= after_s + ON_TIME_S
        await bench.finish()
        assert bench.statistics.execution_count == len(expected)


@simulated
async def test_trap_65_two_shapes_interleaved_are_never_mixed() -> None:
    bench = Bench(BatchPolicy(8, max_queue_delay_s=0.1))
    callers = [bench.send(key="ab"[place % 2]) for place in range(16)]
    even = await bench.backend.expect_batch(rows=8)
    even.reply()
    odd = await bench.backend.expect_batch(rows=8)
    odd.reply()
    assert (even.numbers, odd.numbers) == (numbers_of(*callers[::2]), numbers_of(*callers[1::2]))
    await bench.finish()  # every answer is compared with its own rows
    assert all(caller.answered for caller in callers)


@simulated
async def test_trap_66_a_full_queue_refuses_at_once() -> None:
    bench = Bench(scheduling=rejecting(0.0, size=1))
    running = await busy(bench)
    begun = bench.loop.time()
    waiting = bench.send(rows=3)  # requests are counted, not rows
    for _ in range(2):
        with pytest.raises(Overloaded, match=r"^Exceeds maximum queue size: 1 requests wait, .*max_queue_size"):
            bench.send()
    assert bench.loop.time() == begun
    running.reply()
    (await bench.backend.expect_batch(rows=3)).reply()
    assert bench.statistics.rejected == {"queue_size": 2}
    assert bench.statistics.failed == 0  # trap 46: no failure in the statistics
    await bench.finish()
    assert waiting.answered


@simulated
async def test_trap_67_a_request_s_timeout_does_nothing_where_there_is_none_to_shorten() -> None:
    bench = Bench(scheduling=rejecting(0.0, override=True))
    running = await busy(bench)
    caller = bench.send(stated_timeout_s=0.05)
    await asyncio.sleep(5.0)
    assert caller.settled == 0
    running.reply()
    (await bench.backend.expect_batch(rows=1)).reply()
    await bench.finish()
    assert caller.answered


@simulated
async def test_trap_67_a_request_s_timeout_fires_on_time_though_all_replicas_are_busy() -> None:
    bench = Bench(scheduling=rejecting(10.0, override=True), replicas=2)
    for _ in range(2):
        bench.send()
        await bench.backend.expect_batch(rows=1)
    begun = bench.loop.time()
    late, patient = bench.send(stated_timeout_s=0.05), bench.send()
    await asyncio.sleep(1.0)
    assert isinstance(late.error, QueueTimeout)
    assert (late.error.status, late.error.grpc_code) == (503, 14)
    assert str(late.error).startswith("Request timeout expired")
    assert 0.05 <= late.settled_at - begun <= 0.05 + ON_TIME_S
    assert bench.statistics.failures["REJECTED"] == bench.statistics.failed == 1  # trap 46
    assert bench.statistics.rejected == {"timeout": 1}
    for batch in bench.backend.running:
        batch.reply()
    (await bench.backend.expect_batch(rows=1)).reply()
    await bench.finish()
    assert patient.answered


@simulated
async def test_trap_68_a_longer_timeout_than_the_default_is_the_default() -> None:
    bench = Bench(scheduling=rejecting(0.2, override=True))
    running = await busy(bench)
    begun = bench.loop.time()
    caller = bench.send(stated_timeout_s=9.0)
    await asyncio.sleep(1.0)
    assert isinstance(caller.error, QueueTimeout)
    assert 0.2 <= caller.settled_at - begun <= 0.2 + ON_TIME_S
    running.reply()
    await bench.finish()


@simulated
async def test_trap_68_a_timeout_without_leave_to_override_is_the_default() -> None:
    bench = Bench(scheduling=rejecting(0.2))
    running = await busy(bench)
    begun = bench.loop.time()
    caller = bench.send(stated_timeout_s=0.05)
    await asyncio.sleep(1.0)
    assert 0.2 <= caller.settled_at - begun <= 0.2 + ON_TIME_S
    running.reply()
    await bench.finish()


@simulated
async def test_trap_68_who_is_delayed_is_served_after_all_who_are_not() -> None:
    policy = QueuePolicy("DELAY", default_timeout_s=0.1)
    bench = Bench(BatchPolicy(2), scheduling=Scheduling(default_queue_policy=policy))
    running = await busy(bench)
    old = [bench.send() for _ in range(2)]
    await asyncio.sleep(0.2)
    fresh = [bench.send() for _ in range(3)]
    await asyncio.sleep(0.05)
    running.reply()
    for expected in (fresh[:2], [fresh[2], old[0]], [old[1]]):
        batch = await bench.backend.expect_batch(rows=len(expected))
        assert batch.numbers == numbers_of(*expected)
        batch.reply()
    await bench.finish()
    assert all(caller.answered for caller in bench.callers)


@simulated
async def test_trap_69_all_of_the_higher_level_first_and_in_order_within_a_level() -> None:
    bench = Bench(BatchPolicy(2), scheduling=LEVELS)
    running = await busy(bench)
    low = [bench.send(priority=2), bench.send(), bench.send(priority=99)]
    high = [bench.send(priority=1) for _ in range(3)]
    running.reply()
    for expected in (high[:2], [high[2], low[0]], low[1:]):
        batch = await bench.backend.expect_batch(rows=2)
        assert batch.numbers == numbers_of(*expected)
        batch.reply()
    await bench.finish()


@simulated
async def test_trap_69_levels_go_before_arrival_among_shapes_too() -> None:
    bench = Bench(scheduling=LEVELS)
    running = await busy(bench)
    low, high = bench.send(key="a"), bench.send(key="b", priority=1)
    running.reply()
    for expected in (high, low):
        batch = await bench.backend.expect_batch(rows=1)
        assert batch.numbers == expected.numbers
        batch.reply()
    await bench.finish()


@simulated
async def test_trap_70_one_bad_request_of_a_shared_batch_fails_alone() -> None:
    bench = Bench(scheduling=LEVELS)
    running = await busy(bench)
    callers = [bench.send(priority=1 + place % 2) for place in range(6)]
    poison = callers[3].numbers[0]
    bench.backend.respond = lambda batch: batch.fail(FailureKind.SUSPECT) if poison in batch.numbers else batch.reply()
    running.reply()
    await bench.finish()
    assert [caller.answered for caller in callers] == [place != 3 for place in range(6)]
    assert isinstance(callers[3].error, ModelError)


@simulated
async def test_trap_71_who_disconnects_while_queued_is_not_executed() -> None:
    bench = Bench(scheduling=Scheduling(2, 2, QueuePolicy("DELAY", 0.1, max_queue_size=3)))
    running = await busy(bench)
    before, gone, after = bench.send(), bench.send(priority=1), bench.send()
    delayed = bench.send(key="other")
    await asyncio.sleep(0.2)
    for caller in (gone, delayed):
        bench.scheduler.abort(caller.request)
        assert isinstance(caller.error, Cancelled)
    running.reply()
    batch = await bench.backend.expect_batch(rows=2)
    assert batch.numbers == numbers_of(before, after)
    batch.reply()
    await bench.finish()  # nothing is left pending
    assert bench.statistics.failures["CANCELED"] == 2


# -- queue policies --------------------------------------------------------------------------------------------------


@simulated
async def test_each_level_has_a_bound_of_its_own() -> None:
    bench = Bench(scheduling=Scheduling(2, 2, QueuePolicy(max_queue_size=1), ((1, QueuePolicy(max_queue_size=2)),)))
    running = await busy(bench)
    for priority in (1, 1, 2):
        bench.send(priority=priority)
    with pytest.raises(Overloaded, match="2 requests with priority 1 wait"):
        bench.send(priority=1)
    with pytest.raises(Overloaded, match="1 requests with priority 2 wait"):
        bench.send()
    running.reply()
    (await bench.backend.expect_batch(rows=3)).reply()
    await bench.finish()


@simulated
async def test_a_burst_on_a_free_replica_is_not_refused_because_nothing_was_handed_out_yet() -> None:
    bench = Bench(scheduling=rejecting(0.0, size=2))
    for _ in range(4):
        bench.send()
    with pytest.raises(Overloaded):
        bench.send()
    (await bench.backend.expect_batch(rows=2)).reply()
    (await bench.backend.expect_batch(rows=2)).reply()
    await bench.finish()


@simulated
async def test_queue_time_covers_waiting_only() -> None:
    bench = Bench(scheduling=rejecting(0.1))
    caller = bench.send()
    batch = await bench.backend.expect_batch(rows=1)
    await asyncio.sleep(1.0)
    batch.fail(FailureKind.BROKEN)  # it was executed: the rerun is the gateway's business
    again = await bench.backend.expect_batch(rows=1)
    await asyncio.sleep(1.0)
    again.reply()
    await bench.finish()
    assert caller.answered


@simulated
async def test_a_batch_that_no_replica_took_was_still_waiting() -> None:
    bench = Bench(scheduling=rejecting(0.1))
    begun = bench.loop.time()
    caller = bench.send()
    bench.backend.respond = lambda batch: batch.fail(FailureKind.NOT_SENT)
    await bench.finish()
    assert isinstance(caller.error, QueueTimeout)
    assert 0.1 <= caller.settled_at - begun <= 0.1 + ON_TIME_S


@simulated
async def test_a_request_whose_time_is_up_is_refused_though_the_delay_is_longer() -> None:
    # As Triton does; QA of the queue policies is built on it.
    bench = Bench(BatchPolicy(8, max_queue_delay_s=1.0), scheduling=rejecting(0.1, override=True))
    begun = bench.loop.time()
    late = bench.send()
    await asyncio.sleep(0.5)
    mates = [bench.send() for _ in range(8)]
    (await bench.backend.expect_batch(rows=8)).reply()
    await bench.finish()
    assert isinstance(late.error, QueueTimeout)
    assert 0.1 <= late.settled_at - begun <= 0.1 + ON_TIME_S
    assert all(mate.answered for mate in mates)


@simulated
async def test_a_deadline_of_the_transport_holds_whatever_the_policy_says() -> None:
    bench = Bench(scheduling=rejecting(10.0, override=True))
    running = await busy(bench)
    begun = bench.loop.time()
    caller = bench.send(timeout_s=0.1, stated_timeout_s=5.0)
    await asyncio.sleep(1.0)
    assert isinstance(caller.error, DeadlineExceeded)
    assert caller.settled_at - begun <= 0.1 + ON_TIME_S
    running.reply()
    await bench.finish()


@simulated
@pytest.mark.parametrize(("timeout_s", "stated_s"), [(0.0, 0.1), (0.1, 5.0), (5.0, 0.1)])
async def test_where_no_policy_is_stated_the_timeout_is_the_whole_deadline(timeout_s: float, stated_s: float) -> None:
    bench = Bench(scheduling=LEVELS)
    begun = bench.loop.time()
    caller = bench.send(timeout_s=timeout_s, stated_timeout_s=stated_s)
    batch = await bench.backend.expect_batch(rows=1)
    await asyncio.sleep(1.0)
    assert isinstance(caller.error, DeadlineExceeded)
    assert 0.1 <= caller.settled_at - begun <= 0.1 + ON_TIME_S
    batch.reply()
    await bench.finish()


@simulated
async def test_many_timeouts_of_one_instant_and_an_answer_that_sends_more() -> None:
    # Whoever is told that its time is up may send at once: nobody whose time is up may be executed for that.
    bench = Bench(scheduling=rejecting(0.1, size=3))
    running = await busy(bench)
    late = [bench.send() for _ in range(3)]
    await turns()
    bench.scheduler.stop()  # no timer: the next pump finds all of them at once
    await asyncio.sleep(0.2)
    extra: list[Caller] = []

    def send_more() -> None:
        extra.extend(bench.send() for _ in range(2))

    late[0].on_settled = send_more
    running.reply()
    # The second found the queue full and had it emptied: of those whose time is up, and of the first.
    for _ in range(2):
        (await bench.backend.expect_batch(rows=1)).reply()
    await bench.finish()
    assert [type(caller.error) for caller in late] == [QueueTimeout] * 3
    assert all(caller.answered for caller in extra)


@simulated
async def test_the_two_kinds_of_queues_are_chosen_by_what_is_stated() -> None:
    assert Bench().scheduler._levels is None
    assert Bench(scheduling=Scheduling(preserve_ordering=True)).scheduler._levels is None
    assert Bench(scheduling=LEVELS).scheduler._levels is not None
    assert Bench(scheduling=rejecting(0.0)).scheduler._levels is not None
