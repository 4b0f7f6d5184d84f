"""Every request settles exactly once, with its own rows, whatever happens in between. See tests/scripted.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.backends.interface import FailureKind
from gateway.core.model import BatchPolicy
from gateway.core.retry import MAX_ATTEMPTS
from gateway.errors import (
    BackendError,
    Cancelled,
    DeadlineExceeded,
    Draining,
    ModelError,
    NoBackend,
    NotReady,
    Overloaded,
)
from gateway.scheduler import NO_BACKEND_S, RETRY_PAUSE_S, TIMER_SLACK_S
from tests.scripted import Bench, Caller, ScriptedBatch, simulated, turns

LATE_S = TIMER_SLACK_S + 0.001
"""How late a timer may be."""


def numbers_of(*callers: Caller) -> list[int]:
    return [number for caller in callers for number in caller.numbers]


# -- batching on the loop --------------------------------------------------------------------------------------------


@simulated
async def test_requests_of_one_turn_share_a_batch() -> None:
    bench = Bench()
    callers = [bench.send(rows) for rows in (1, 2, 1)]
    batch = await bench.backend.expect_batch(rows=4)
    assert batch.numbers == numbers_of(*callers)
    batch.reply()
    await bench.finish()
    assert [caller.request.row for caller in callers] == [0, 1, 3]
    assert bench.statistics.batches["worker_free"] == 1


@simulated
async def test_what_arrives_meanwhile_is_the_next_batch() -> None:
    bench = Bench()
    bench.send()
    first = await bench.backend.expect_batch(rows=1)
    later = [bench.send() for _ in range(10)]
    await bench.backend.expect_nothing()
    first.reply()
    second = await bench.backend.expect_batch(rows=8)
    assert second.numbers == numbers_of(*later[:8])
    second.reply()
    (await bench.backend.expect_batch(rows=2)).reply()
    await bench.finish()


@simulated
async def test_keys_are_never_mixed_and_values_and_buffers_are() -> None:
    bench = Bench(replicas=2)
    ints = [bench.send(key="a"), bench.send(key="a", as_values=False, rows=2), bench.send(key="a")]
    bench.send(key="b", outputs=(0, 1))
    batch = await bench.backend.expect_batch(rows=4)
    assert batch.numbers == numbers_of(*ints)
    (await bench.backend.expect_batch(rows=1)).reply()
    batch.reply()
    await bench.finish()


@simulated
async def test_the_delay_gathers_and_ends_on_time() -> None:
    bench = Bench(BatchPolicy(8, max_queue_delay_s=0.1))
    begun = bench.loop.time()
    bench.send()
    await asyncio.sleep(0.06)
    bench.send()
    batch = await bench.backend.expect_batch(rows=2)
    assert 0.1 <= bench.loop.time() - begun <= 0.1 + LATE_S
    batch.reply()
    await bench.finish()
    assert bench.statistics.batches["delay"] == 1


@simulated
async def test_preferred_four_of_five_go_at_once_and_one_after_the_delay() -> None:
    bench = Bench(BatchPolicy(8, max_queue_delay_s=0.1, preferred_batch_sizes=(4,)), replicas=2)
    begun = bench.loop.time()
    for _ in range(5):
        bench.send()
    (await bench.backend.expect_batch(rows=4)).reply()
    assert bench.loop.time() == begun
    (await bench.backend.expect_batch(rows=1)).reply()
    assert 0.1 <= bench.loop.time() - begun <= 0.1 + LATE_S
    await bench.finish()


@simulated
async def test_a_model_that_does_not_batch_gets_one_request_a_run() -> None:
    bench = Bench(BatchPolicy(8, merge=False), replicas=2, slots=2)
    for rows in (1, 3, 2):
        bench.send(rows)
    for rows in (1, 3, 2):
        (await bench.backend.expect_batch(rows)).reply()
    await bench.finish()


# -- callers leave ---------------------------------------------------------------------------------------------------


@simulated
async def test_rows_of_a_caller_that_left_are_never_executed() -> None:
    bench = Bench()
    bench.send()
    first = await bench.backend.expect_batch(rows=1)
    before, gone, after = bench.send(), bench.send(2), bench.send()
    bench.scheduler.abort(gone.request)
    bench.scheduler.abort(gone.request)
    first.reply()
    second = await bench.backend.expect_batch(rows=2)
    assert second.numbers == numbers_of(before, after)
    second.reply()
    await bench.finish()
    assert isinstance(gone.error, Cancelled)
    assert bench.statistics.failures["CANCELED"] == 1


@simulated
async def test_a_caller_that_leaves_a_running_batch_changes_nothing_for_the_others() -> None:
    bench = Bench()
    mates = [bench.send(), bench.send(2), bench.send()]
    batch = await bench.backend.expect_batch(rows=4)
    bench.scheduler.abort(mates[1].request)
    batch.reply()
    await bench.finish()
    assert [mate.answered for mate in mates] == [True, False, True]


@simulated
async def test_leaving_after_the_answer_does_nothing() -> None:
    bench = Bench()
    caller = bench.send()
    (await bench.backend.expect_batch(rows=1)).reply()
    bench.scheduler.abort(caller.request)
    await bench.finish()
    assert caller.answered


@simulated
async def test_a_caller_whose_answer_makes_a_mate_leave() -> None:
    bench = Bench()
    first, second, third = bench.send(), bench.send(), bench.send()
    first.on_settled = lambda: bench.scheduler.abort(second.request)
    (await bench.backend.expect_batch(rows=3)).reply()
    await bench.finish()
    assert [caller.answered for caller in (first, second, third)] == [True, False, True]


@simulated
@pytest.mark.parametrize("kind", [None, FailureKind.SUSPECT])
async def test_an_answer_that_cannot_be_written_harms_nobody_else(
    kind: FailureKind | None, caplog: pytest.LogCaptureFixture
) -> None:
    def explode() -> None:
        raise RuntimeError("the socket is on fire")

    bench = Bench(BatchPolicy(1) if kind else None)
    callers = [bench.send() for _ in range(3)]
    callers[1].on_settled = explode
    if kind is None:
        (await bench.backend.expect_batch(rows=3)).reply()
    else:
        for _ in callers:
            (await bench.backend.expect_batch(rows=1)).fail(kind)
    await bench.finish()
    assert [caller.answered for caller in callers] == [kind is None] * 3
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1


# -- failures --------------------------------------------------------------------------------------------------------


@simulated
@pytest.mark.parametrize("kind", [FailureKind.BROKEN, FailureKind.TIMEOUT, FailureKind.NOT_SENT, FailureKind.OVERLOAD])
async def test_a_failed_batch_is_rerun_on_the_other_replica(kind: FailureKind) -> None:
    bench = Bench(replicas=2)
    callers = [bench.send(), bench.send(2)]
    first = await bench.backend.expect_batch(rows=3)
    first.fail(kind)
    second = await bench.backend.expect_batch(rows=3)
    assert second.replica is not first.replica
    assert second.numbers == numbers_of(*callers)
    second.reply()
    await bench.finish()
    attempts = 1 if kind in (FailureKind.NOT_SENT, FailureKind.OVERLOAD) else 2
    assert {caller.request.batch.attempt for caller in callers} == {attempts}


@simulated
async def test_the_failed_go_ahead_of_those_who_came_later() -> None:
    bench = Bench(BatchPolicy(2))
    first = [bench.send(), bench.send()]
    batch = await bench.backend.expect_batch(rows=2)
    bench.send()
    batch.fail(FailureKind.BROKEN)
    again = await bench.backend.expect_batch(rows=2)
    assert again.numbers == numbers_of(*first)
    again.reply()
    (await bench.backend.expect_batch(rows=1)).reply()
    await bench.finish()


@simulated
async def test_only_the_offender_of_a_batch_fails() -> None:
    bench = Bench(replicas=2)
    callers = [bench.send() for _ in range(8)]
    poison = callers[5].numbers[0]
    bench.backend.respond = lambda batch: (
        batch.fail(FailureKind.SUSPECT, "index out of range") if poison in batch.numbers else batch.reply()
    )
    await bench.finish()
    assert [caller.answered for caller in callers] == [index != 5 for index in range(8)]
    assert isinstance(callers[5].error, ModelError)
    assert len(bench.backend.executed) - 1 <= 2 * 3 + 1


@simulated
async def test_isolated_members_are_not_mixed_with_newcomers() -> None:
    bench = Bench()
    suspects = [bench.send() for _ in range(4)]
    batch = await bench.backend.expect_batch(rows=4)
    newcomers = [bench.send() for _ in range(3)]
    batch.fail(FailureKind.SUSPECT)
    for half in (suspects[:2], suspects[2:]):
        batch = await bench.backend.expect_batch(rows=2)
        assert batch.numbers == numbers_of(*half)
        batch.reply()
    last = await bench.backend.expect_batch(rows=3)
    assert last.numbers == numbers_of(*newcomers)
    last.reply()
    await bench.finish()


@simulated
async def test_two_breaks_make_singles_and_only_the_culprit_fails() -> None:
    bench = Bench(replicas=2)
    callers = [bench.send() for _ in range(4)]
    poison = callers[2].numbers[0]
    bench.backend.respond = lambda batch: (
        batch.fail(FailureKind.BROKEN) if poison in batch.numbers else batch.reply()
    )
    await bench.finish()
    assert [batch.rows for batch in bench.backend.executed] == [4, 4, 1, 1, 1, 1]
    assert [caller.answered for caller in callers] == [True, True, False, True]
    assert isinstance(callers[2].error, BackendError)
    assert callers[2].request.broken == MAX_ATTEMPTS


@simulated
@pytest.mark.parametrize("tamper", [lambda rows: rows[:-1], lambda rows: [*rows, 7], lambda rows: []])
async def test_an_answer_of_the_wrong_size_is_given_to_nobody(tamper: Callable[[list[int]], list[int]]) -> None:
    bench = Bench(replicas=2)
    callers = [bench.send(), bench.send(2)]
    (await bench.backend.expect_batch(rows=3)).reply(tamper)
    await turns(1)
    assert [caller.settled for caller in callers] == [0, 0]
    (await bench.backend.expect_batch(rows=3)).reply()
    await bench.finish()
    assert all(caller.answered for caller in callers)


@simulated
async def test_a_replica_that_takes_nothing_does_not_keep_the_loop_busy() -> None:
    bench = Bench()
    caller = bench.send(timeout_s=1.0)
    bench.backend.respond = lambda batch: batch.fail(FailureKind.NOT_SENT)
    await bench.finish()
    assert isinstance(caller.error, DeadlineExceeded)
    assert len(bench.backend.executed) <= 1.0 / RETRY_PAUSE_S + 1


@simulated
async def test_the_checker_sees_a_row_that_is_not_its_own() -> None:
    # Negative control: what the whole file relies on.
    bench = Bench()
    callers = [bench.send(), bench.send(3)]
    (await bench.backend.expect_batch(rows=4)).reply(lambda rows: [rows[1], rows[0], *rows[2:]])
    for caller in callers:
        with pytest.raises(AssertionError):
            caller.check()
    await bench.scheduler.drained()


# -- deadlines -------------------------------------------------------------------------------------------------------


@simulated
async def test_a_deadline_in_the_queue_is_kept_while_all_replicas_are_busy() -> None:
    bench = Bench()
    bench.send()
    first = await bench.backend.expect_batch(rows=1)
    begun = bench.loop.time()
    late, patient = bench.send(timeout_s=0.2), bench.send(timeout_s=5.0)
    await asyncio.sleep(1.0)
    assert isinstance(late.error, DeadlineExceeded)
    assert 0.2 <= late.settled_at - begun <= 0.2 + LATE_S
    first.reply()
    batch = await bench.backend.expect_batch(rows=1)
    assert batch.numbers == patient.numbers
    batch.reply()
    await bench.finish()
    assert bench.statistics.rejected == {"deadline": 1}


@simulated
async def test_a_deadline_while_running_is_kept_and_mates_do_not_notice() -> None:
    bench = Bench()
    begun = bench.loop.time()
    late, patient = bench.send(timeout_s=0.2), bench.send()
    batch = await bench.backend.expect_batch(rows=2)
    await asyncio.sleep(1.0)
    assert isinstance(late.error, DeadlineExceeded)
    assert late.settled_at - begun <= 0.2 + LATE_S
    batch.reply()
    await bench.finish()
    assert patient.answered
    assert bench.statistics.failures["OTHER"] == 1


@simulated
async def test_rows_whose_deadline_has_passed_are_never_executed() -> None:
    # The outcome of a batch may be read in the very turn in which a deadline passes, before the timer's turn comes.
    bench = Bench()
    bench.send()
    first = await bench.backend.expect_batch(rows=1)
    late, patient = bench.send(timeout_s=0.2), bench.send()
    bench.scheduler.stop()
    await asyncio.sleep(0.5)
    first.reply()
    batch = await bench.backend.expect_batch(rows=1)
    assert batch.numbers == patient.numbers
    batch.reply()
    await bench.finish()
    assert isinstance(late.error, DeadlineExceeded)


@simulated
async def test_a_request_that_arrives_too_late_is_not_executed() -> None:
    bench = Bench()
    caller = bench.caller(timeout_s=0.5)
    caller.request.received -= 1.0  # its body took that long
    bench.scheduler.submit(caller.request)
    bench.callers.append(caller)
    await bench.backend.expect_nothing()
    await bench.finish()
    assert isinstance(caller.error, DeadlineExceeded)


@simulated
async def test_the_default_deadline_is_the_policy_s() -> None:
    bench = Bench(BatchPolicy(8, deadline_s=3.0))
    begun = bench.loop.time()
    caller = bench.send()
    batch = await bench.backend.expect_batch(rows=1)
    await asyncio.sleep(10.0)
    assert 3.0 <= caller.settled_at - begun <= 3.0 + LATE_S
    batch.reply()
    await bench.finish()


@simulated
async def test_a_mate_that_leaves_because_of_a_deadline_is_counted_once() -> None:
    bench = Bench()
    bench.send()
    first = await bench.backend.expect_batch(rows=1)
    one, two = bench.send(timeout_s=0.2), bench.send(timeout_s=0.2)
    one.on_settled = lambda: bench.scheduler.abort(two.request)
    await asyncio.sleep(1.0)
    first.reply()
    await bench.finish()  # compares the counters with the callers
    assert isinstance(two.error, Cancelled)


# -- bounds, replicas that come and go, the end ----------------------------------------------------------------------


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
    assert bench.scheduler._timer is None
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


# -- any interleaving ------------------------------------------------------------------------------------------------

KINDS: list[FailureKind | None] = [None, None, None, *FailureKind]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, 5), st.sampled_from("ab"), st.sampled_from([0.0, 0.05, 0.3])),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("end"), st.integers(0, 5), st.sampled_from(KINDS)),
        st.tuples(st.just("short"), st.integers(0, 5)),
        st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.01, 0.1, 1.0])),
        st.tuples(st.just("flip"), st.integers(0, 1)),
        st.tuples(st.just("turn")),
    ),
    min_size=5,
    max_size=60,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=STEPS,
    delay=st.sampled_from([0.0, 0.02]),
    merge=st.booleans(),
    replicas=st.integers(1, 2),
    slots=st.integers(1, 2),
)
@simulated
async def test_every_request_settles_once_with_its_own_rows(
    steps: list[tuple[object, ...]], delay: float, merge: bool, replicas: int, slots: int
) -> None:
    bench = Bench(BatchPolicy(6, merge, delay, (3,), max_queue_rows=40), replicas, slots)
    bench.backend.inspect = lambda batch: _only_for_those_inside(bench, batch)
    for step in steps:
        await perform(bench, step)
        _nothing_crossed(bench)
    for replica in bench.backend.replicas:
        replica.set_available(True)
    bench.backend.respond = ScriptedBatch.reply
    for batch in bench.backend.running:
        batch.reply()
    await bench.finish()


async def perform(bench: Bench, step: tuple[object, ...]) -> None:
    match step:
        case ("send", int(rows), str(key), float(timeout_s)):
            wanted = (0,) if rows < 4 else (0, 1)
            with suppress(Overloaded, NoBackend):
                bench.send(rows, key=key, timeout_s=timeout_s, as_values=rows % 2 == 0, outputs=wanted)
        case ("abort", int(index)) if bench.callers:
            bench.scheduler.abort(bench.callers[index % len(bench.callers)].request)
        case ("end", int(index), kind) if bench.backend.running:
            batch = bench.backend.running[index % len(bench.backend.running)]
            if isinstance(kind, FailureKind):
                batch.fail(kind)
            else:
                batch.reply()
        case ("short", int(index)) if bench.backend.running:
            bench.backend.running[index % len(bench.backend.running)].reply(lambda rows: rows[1:])
        case ("sleep", float(seconds)):
            await asyncio.sleep(seconds)
        case ("flip", int(index)):
            replica = bench.backend.replicas[index % len(bench.backend.replicas)]
            replica.set_available(not replica.available)
        case _:
            await turns(1)


def _only_for_those_inside(bench: Bench, batch: ScriptedBatch) -> None:
    """At the moment a batch is handed over, all its rows belong to callers who wait and still have time."""
    for caller in bench.callers:
        if not set(batch.numbers).isdisjoint(caller.numbers):
            assert caller.settled == 0
            assert caller.request.deadline > bench.loop.time()


def _nothing_crossed(bench: Bench) -> None:
    owners = {number: caller for caller in bench.callers for number in caller.numbers}
    running = [number for batch in bench.backend.running for number in batch.numbers]
    assert len(running) == len(set(running)), "a row runs twice at the same time"
    for caller in bench.callers:
        assert caller.settled <= 1
        if caller.answered:
            caller.check()
    for batch in bench.backend.running:
        keys = {owners[number].request.key for number in batch.numbers}
        assert len(keys) == 1, "requests that may not share a batch did"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), offenders=st.sets(st.integers(0, 19)), replicas=st.integers(1, 3))
@simulated
async def test_exactly_the_offenders_fail_whatever_the_batches(
    data: st.DataObject, offenders: set[int], replicas: int
) -> None:
    bench = Bench(replicas=replicas, slots=2)
    poison = {number for index in offenders for number in range(index * 3 + 1, index * 3 + 4)}
    breaks = data.draw(st.integers(0, 1))

    def respond(batch: ScriptedBatch) -> None:
        nonlocal breaks
        if poison & set(batch.numbers):
            batch.fail(FailureKind.SUSPECT)
        elif breaks:
            breaks -= 1
            batch.fail(FailureKind.BROKEN)
        else:
            batch.reply()

    bench.backend.respond = respond
    for _ in range(20):
        bench.send(3)
        if data.draw(st.booleans()):
            await turns(data.draw(st.integers(1, 3)))
    await bench.finish()
    failed = {index for index, caller in enumerate(bench.callers) if not caller.answered}
    assert failed == offenders
