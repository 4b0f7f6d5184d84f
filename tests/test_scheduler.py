"""Every request settles exactly once, with its own rows, whatever happens in between. See tests/scripted.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from gateway.backends.interface import FailureKind
from gateway.core.model import BatchPolicy
from gateway.core.retry import MAX_ATTEMPTS
from gateway.errors import (
    BackendError,
    Cancelled,
    DeadlineExceeded,
    ModelError,
)
from gateway.scheduler import TIMER_SLACK_S
from tests.scripted import Bench, Caller, simulated, turns

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
    bench.backend.respond = lambda batch: batch.fail(FailureKind.BROKEN) if poison in batch.numbers else batch.reply()
    await bench.finish()
    assert [batch.rows for batch in bench.backend.executed] == [4, 4, 1, 1, 1, 1]
    assert [caller.answered for caller in callers] == [True, True, False, True]
    assert isinstance(callers[2].error, BackendError)
    assert callers[2].request.trouble is not None
    assert callers[2].request.trouble.broken <= MAX_ATTEMPTS


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
    assert 3 <= len(bench.backend.executed) <= 40  # pauses of up to 25, 50, 100, 200, 400 ms ...


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
    await turns()
    bench.scheduler.stop()
    await asyncio.sleep(0.5)
    assert late.settled == 0
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


@simulated
async def test_a_batch_is_cut_so_that_the_most_urgent_is_answered_in_time() -> None:
    bench = Bench()
    (member,) = bench.scheduler.fleets[0].members
    for _ in range(100):
        for rows in (1, 8):
            member.time.observe(rows, 0.1 * rows, bench.loop.time())
    hurried = [bench.send(timeout_s=0.45)]
    callers = [bench.send() for _ in range(7)]
    batch = await bench.backend.expect_batch(rows=4)
    assert batch.numbers[0] == hurried[0].numbers[0]
    await asyncio.sleep(0.4)
    batch.reply()
    rest = await bench.backend.expect_batch(rows=4)
    rest.reply()
    bench.send(timeout_s=0.05)  # nobody can help it: the others need not run in smaller batches for that
    callers += [bench.send() for _ in range(3)]
    whole = await bench.backend.expect_batch(rows=4)
    await asyncio.sleep(0.4)
    whole.reply()
    await bench.finish()
    assert hurried[0].answered
    assert all(caller.answered for caller in callers)
    assert bench.statistics.batches["deadline"] == 1
