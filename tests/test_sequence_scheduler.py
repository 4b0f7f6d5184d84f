"""Sequence batching by its rules, on a simulated clock: order, state, seats, idleness, and steps that are given up."""

from __future__ import annotations

import asyncio

import pytest

from gateway.core.batching import Reason
from gateway.core.model import BatchPolicy
from gateway.core.outcome import FailureKind
from gateway.core.request import QUEUED, InferRequest, SequenceStep
from gateway.core.scheduling import StateTensor
from gateway.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    ModelError,
    NoBackend,
    NotReady,
    Overloaded,
    SequenceLost,
)
from tests.scripted import simulated, turns
from tests.sequence_bench import (
    CORRID,
    FLAGS,
    INT64,
    READY,
    SequenceBatch,
    SequenceBench,
    Step,
    replies,
    sequence_policy,
)

START, END, READY_FLAG = 1, 2, 4


def bench_request(bench: SequenceBench, rows: int) -> InferRequest:
    return Step(1, SequenceStep(7, True), bench.loop.time(), 0.0, rows).request


@simulated
async def test_a_step_sees_the_state_of_the_one_before() -> None:
    bench = SequenceBench()
    bench.respond = replies
    first = bench.send(5, start=True)
    await turns()
    second = bench.send(6)
    await turns()
    last = bench.send(7, end=True)
    await bench.finish(sequences=0)
    assert [step.sum for step in (first, second, last)] == [5, 11, 18]
    assert [step.flags for step in (first, second, last)] == [START, 0, END]


@simulated
async def test_steps_sent_at_once_run_one_after_the_other() -> None:
    bench = SequenceBench()
    steps = [bench.send(number, start=number == 1, end=number == 3) for number in (1, 2, 3)]
    for number, total in ((1, 1), (2, 3), (3, 6)):
        batch = await bench.expect_batch([number])
        await bench.expect_nothing()
        batch.reply()
        await turns()
        assert steps[number - 1].sum == total
    await bench.finish()


@simulated
async def test_steps_of_different_sequences_share_a_batch() -> None:
    bench = SequenceBench()
    bench.respond = replies
    steps = [bench.send(10 * identity, identity, start=True) for identity in (1, 2, 3)]
    await turns()
    more = [bench.send(identity, identity, end=True) for identity in (3, 1, 2)]
    await bench.finish()
    assert [batch.numbers for batch in bench.executed] == [[10, 20, 30], [3, 1, 2]]
    assert [step.sum for step in steps] == [10, 20, 30]
    assert [step.sum for step in more] == [33, 11, 22]


@simulated
@pytest.mark.parametrize("identity", [0, ""])
async def test_no_id_is_refused(identity: int | str) -> None:
    bench = SequenceBench()
    with pytest.raises(InvalidRequest, match="must specify a non-zero or non-empty correlation ID"):
        bench.send(1, identity, start=True)
    with pytest.raises(InvalidRequest, match="must specify a non-zero or non-empty correlation ID"):
        bench.send(1, plain=True)
    await bench.finish()


@simulated
async def test_the_first_step_must_say_so() -> None:
    bench = SequenceBench()
    with pytest.raises(InvalidRequest, match=r"sequence 7 .* must specify the START flag on the first"):
        bench.send(1)
    await bench.finish()


@simulated
async def test_a_step_has_one_row() -> None:
    bench = SequenceBench()
    with pytest.raises(InvalidRequest, match="must specify batch-size 1 due to requirements of sequence batcher"):
        bench.send(1, start=True, rows=2)
    with pytest.raises(InvalidRequest, match="must specify batch-size 1"):
        bench.scheduler.submit_parts(bench_request(bench, rows=3), [])
    await bench.finish()


@simulated
async def test_after_the_end_the_id_is_unknown() -> None:
    bench = SequenceBench()
    bench.respond = replies
    bench.send(1, start=True, end=True)
    await turns()
    with pytest.raises(InvalidRequest, match="START"):
        bench.send(2)
    await bench.finish()
    assert bench.executed[0].inputs["START"] == bench.executed[0].inputs["END"] == [1]


@simulated
async def test_nothing_joins_behind_an_end_that_still_waits() -> None:
    bench = SequenceBench()
    bench.send(1, start=True)
    batch = await bench.expect_batch([1])
    bench.send(2, end=True)
    with pytest.raises(InvalidRequest, match="START"):
        bench.send(3)
    again = bench.send(100, start=True, end=True)
    bench.respond = replies
    batch.reply()
    await bench.finish()
    assert again.sum == 100
    assert [step.sum for step in bench.steps] == [1, 3, 100]


@simulated
async def test_start_on_a_live_sequence_begins_it_anew() -> None:
    bench = SequenceBench()
    bench.respond = replies
    sent = [bench.send(1, start=True), bench.send(2), bench.send(10, start=True), bench.send(3, end=True)]
    await bench.finish()
    assert [step.sum for step in sent] == [1, 3, 10, 13]


@simulated
async def test_number_and_text_are_different_ids() -> None:
    bench = SequenceBench()
    bench.respond = replies
    bench.send(1, 5, start=True)
    bench.send(100, "5", start=True)
    await turns()
    sums = [bench.send(1, 5, end=True), bench.send(1, "5", end=True)]
    await bench.finish()
    assert [step.sum for step in sums] == [2, 101]


@simulated
async def test_the_model_is_told_the_id() -> None:
    bench = SequenceBench(sequence_policy(controls=(*FLAGS, CORRID)))
    bench.respond = replies
    steps = [bench.send(1, identity, start=True, end=True) for identity in (3, 2**40, 9)]
    await turns()
    with pytest.raises(InvalidRequest, match="'sequence_id' must be an integer of INT64 for model 'acc'"):
        bench.send(1, "text", start=True)
    with pytest.raises(InvalidRequest, match="'sequence_id' must be an integer of INT64"):
        bench.send(1, 2**63, start=True)
    await bench.finish()
    assert [step.identity for step in steps] == [3, 2**40, 9]


@simulated
async def test_the_first_state_is_the_stated_one() -> None:
    first = StateTensor("total", "total_out", INT64, (1,), initial=(1000).to_bytes(8, "little"))
    bench = SequenceBench(sequence_policy(states=(first,)))
    bench.respond = replies
    sent = [bench.send(1, start=True), bench.send(1), bench.send(5, start=True, end=True)]
    await bench.finish()
    assert [step.sum for step in sent] == [1001, 1002, 1005]


@simulated
async def test_a_model_that_does_not_batch_has_sequences_too() -> None:
    bench = SequenceBench(policy=BatchPolicy(max_batch_size=0), replicas=2)
    bench.respond = replies
    for step in (bench.send(1, 1, start=True), bench.send(2, 2, start=True)):
        step.request.inputs[0].shape = (1,)  # type: ignore[union-attr]
    waits = bench.send(3, 3, start=True, end=True)
    waits.request.inputs[0].shape = (1,)  # type: ignore[union-attr]
    await turns()
    assert not waits.settled, "two instances, two sequences"
    assert sorted(batch.replica.name for batch in bench.executed) == ["onnx-1", "onnx-2"]
    ends = bench.send(10, 1, end=True)
    ends.request.inputs[0].shape = (1,)  # type: ignore[union-attr]
    await bench.finish(sequences=1)
    assert (ends.sum, waits.sum) == (11, 3)


# -- seats -------------------------------------------------------------------------------------------------------------


@simulated
async def test_direct_a_sequence_waits_for_a_seat_until_another_ends() -> None:
    bench = SequenceBench(policy=BatchPolicy(max_batch_size=2))
    bench.respond = replies
    bench.send(1, 1, start=True)
    bench.send(2, 2, start=True)
    third, fourth = bench.send(3, 3, start=True), bench.send(4, 4, start=True, end=True)
    more = bench.send(30, 3, end=True)
    await turns()
    assert [batch.numbers for batch in bench.executed] == [[1, 2]]
    bench.send(5, 2, end=True)
    await bench.finish(sequences=1)
    assert (third.sum, more.sum, fourth.sum) == (3, 33, 4)
    assert [batch.numbers for batch in bench.executed[1:]] == [[5], [3], [30], [4]], "first come, first seated"


@simulated
async def test_direct_spreads_sequences_over_replicas_and_keeps_each_on_its_own() -> None:
    bench = SequenceBench(replicas=2)
    bench.respond = replies
    for number in range(3):
        for identity in (1, 2, 3, 4):
            bench.send(100 * identity + number, identity, start=number == 0, end=number == 2)
    await bench.finish()
    homes: dict[int, set[str]] = {}
    for batch in bench.executed:
        for number in batch.numbers:
            homes.setdefault(number // 100, set()).add(batch.replica.name)
    assert homes == {1: {"onnx-1"}, 2: {"onnx-2"}, 3: {"onnx-1"}, 4: {"onnx-2"}}


@simulated
async def test_direct_prefers_a_replica_that_is_there() -> None:
    bench = SequenceBench(replicas=2)
    bench.respond = replies
    bench.replicas[0].set_available(False)
    for identity in (1, 2):
        bench.send(identity, identity, start=True, end=True)
    await bench.finish()
    assert {batch.replica.name for batch in bench.executed} == {"onnx-2"}


@simulated
async def test_direct_with_ready_every_sequence_has_its_row() -> None:
    bench = SequenceBench(sequence_policy(controls=(*FLAGS, READY)))
    bench.respond = replies
    for identity in (1, 2, 3):
        bench.send(identity, identity, start=True)
    await turns()
    third = bench.send(30, 3)
    await turns()
    pair = [bench.send(20, 2, end=True), bench.send(10, 1)]
    await turns()
    rest = [bench.send(300, 3, end=True), bench.send(100, 1, end=True)]
    await bench.finish()
    assert [(b.numbers, b.inputs["READY"]) for b in bench.executed] == [
        ([1, 2, 3], [1, 1, 1]), ([0, 0, 30], [0, 0, 1]), ([10, 20, 0], [1, 1, 0]), ([100, 0, 300], [1, 0, 1])
    ]  # fmt: skip
    assert all(batch.inputs["END"][row] == 0 for batch in bench.executed for row in range(3) if not batch.numbers[row])
    assert (third.sum, [step.sum for step in pair], [step.sum for step in rest]) == (33, [22, 11], [333, 111])
    assert {step.flags for step in bench.steps} == {START + 4, 4, END + 4}
    assert bench.statistics.inference_count == 8, "rows that nobody asked for are not counted"


@simulated
async def test_direct_with_ready_rows_that_are_not_proven_independent_stay_alone() -> None:
    bench = SequenceBench(sequence_policy(controls=(*FLAGS, READY)), BatchPolicy(4, merge=False))
    bench.respond = replies
    for identity in (1, 2):
        bench.send(identity, identity, start=True)
    await turns()
    last = bench.send(20, 2, end=True)
    await bench.finish(sequences=1)
    assert [batch.numbers for batch in bench.executed] == [[1], [2], [20]]
    assert (last.sum, last.flags) == (22, END + READY_FLAG)


@simulated
async def test_direct_with_ready_the_batch_ends_at_the_highest_row_in_use() -> None:
    bench = SequenceBench(sequence_policy(controls=(*FLAGS, READY)))
    bench.respond = replies
    for identity in (1, 2, 3):
        bench.send(identity, identity, start=True)
    await turns()
    bench.send(30, 3, end=True)
    await turns()
    bench.send(10, 1, end=True)
    await turns()
    newcomer = bench.send(40, 4, start=True, end=True)
    await bench.finish(sequences=1)
    assert [b.numbers for b in bench.executed[1:]] == [[0, 0, 30], [10, 0], [40, 0]]
    assert newcomer.sum == 40


@simulated
async def test_oldest_has_no_rows_of_ones_own() -> None:
    bench = SequenceBench(sequence_policy(strategy="oldest", controls=(*FLAGS, READY)), replicas=2)
    bench.respond = replies
    for identity in (1, 2, 3):
        bench.send(identity, identity, start=True)
    await turns()
    third = bench.send(30, 3, end=True)
    await bench.finish(sequences=2)
    assert bench.executed[-1].numbers == [30]
    assert third.flags == END + READY_FLAG


@simulated
async def test_oldest_takes_no_more_sequences_than_stated() -> None:
    bench = SequenceBench(sequence_policy(strategy="oldest", max_candidate_sequences=2))
    bench.respond = replies
    steps = [bench.send(identity, identity, start=True) for identity in (1, 2, 3)]
    await turns()
    assert [step.settled for step in steps] == [1, 1, 0]
    bench.send(10, 1, end=True)
    await turns()
    assert steps[2].sum == 3
    await bench.finish(sequences=2)


@simulated
async def test_oldest_waits_for_a_preferred_size_or_the_delay() -> None:
    policy = sequence_policy(strategy="oldest", preferred_batch_sizes=(2,), max_queue_delay_s=0.1)
    bench = SequenceBench(policy)
    bench.send(1, 1, start=True)
    await bench.expect_nothing()
    bench.send(2, 2, start=True)
    (await bench.expect_batch([1, 2])).reply()
    sent = bench.loop.time()
    bench.send(3, 1, end=True)
    (await bench.expect_batch([3])).reply()
    assert 0.1 <= bench.loop.time() - sent <= 0.105
    await bench.finish(sequences=1)
    assert bench.statistics.batches[Reason.FULL.value] == bench.statistics.batches[Reason.DELAY.value] == 1


@simulated
async def test_direct_waits_for_the_stated_share_of_slots_or_the_delay() -> None:
    bench = SequenceBench(sequence_policy(minimum_slot_utilization=0.5, max_queue_delay_s=0.2))
    bench.send(1, 1, start=True)
    await bench.expect_nothing()
    bench.send(2, 2, start=True)
    (await bench.expect_batch([1, 2])).reply()
    sent = bench.loop.time()
    bench.send(3, 1, end=True)
    (await bench.expect_batch([3])).reply()
    assert 0.2 <= bench.loop.time() - sent <= 0.205
    await bench.finish(sequences=1)


@simulated
async def test_direct_without_a_share_does_not_wait() -> None:
    bench = SequenceBench(sequence_policy(max_queue_delay_s=5.0))
    sent = bench.loop.time()
    bench.send(1, start=True, end=True)
    (await bench.expect_batch([1])).reply()
    assert bench.loop.time() == sent
    await bench.finish()


@simulated
async def test_oldest_answers_in_order_of_arrival_where_asked_to() -> None:
    bench = SequenceBench(sequence_policy(strategy="oldest", preserve_ordering=True), BatchPolicy(1), replicas=2)
    told: list[int] = []
    for identity in (1, 2):
        step = bench.send(identity, identity, start=True, end=True)
        step.on_settled = lambda number=identity: told.append(number)  # type: ignore[misc]
    first, second = await bench.expect_batch([1]), await bench.expect_batch([2])
    second.reply()
    await turns()
    assert told == []
    first.reply()
    await bench.finish()
    assert told == [1, 2]


# -- time --------------------------------------------------------------------------------------------------------------


@simulated
async def test_an_idle_sequence_ends_on_time_and_frees_its_seat() -> None:
    bench = SequenceBench(sequence_policy(max_sequence_idle_s=2.0), BatchPolicy(1))
    bench.respond = replies
    bench.send(1, 1, start=True)
    await turns()
    answered = bench.loop.time()
    waits = bench.send(2, 2, start=True, end=True)
    await bench.scheduler.drained()
    assert 2.0 <= waits.settled_at - answered <= 2.005
    with pytest.raises(InvalidRequest, match="START"):
        bench.send(3, 1)
    await bench.finish()


@simulated
async def test_a_sequence_is_not_idle_while_a_step_waits_or_runs() -> None:
    bench = SequenceBench(sequence_policy(max_sequence_idle_s=1.0))
    first = bench.send(1, start=True)
    batch = await bench.expect_batch([1])
    await asyncio.sleep(5.0)
    batch.reply()
    await asyncio.sleep(0.9)
    assert first.sum == 1
    second = bench.send(2)
    batch = await bench.expect_batch([2])
    await asyncio.sleep(5.0)
    batch.reply()
    await asyncio.sleep(0.9)
    third = bench.send(3, end=True)
    (await bench.expect_batch([3])).reply()
    await bench.finish()
    assert (second.sum, third.sum) == (3, 6)


@simulated
async def test_a_step_whose_time_is_up_in_the_backlog_ends_its_sequence() -> None:
    bench = SequenceBench(policy=BatchPolicy(1))
    bench.respond = replies
    bench.send(1, 1, start=True)
    sent = bench.loop.time()
    late, behind = bench.send(2, 2, start=True, timeout_s=0.5), bench.send(3, 2)
    await turns()
    with_start = bench.send(4, 2, start=True)
    lost = bench.send(5, 1, timeout_s=0.0, end=False)
    await turns()
    assert lost.sum == 6
    await asyncio.sleep(0.6)
    assert isinstance(late.error, DeadlineExceeded)
    assert 0.5 <= late.settled_at - sent <= 0.505
    assert isinstance(behind.error, SequenceLost)
    assert not with_start.settled, "it begins anew"
    bench.send(6, 1, end=True)
    await bench.finish(sequences=1)
    assert with_start.sum == 4
    assert bench.statistics.rejected == {"deadline": 1, "sequence": 1}
    assert (bench.statistics.failed, bench.statistics.failures["REJECTED"]) == (2, 2), "both had been accepted"


@simulated
async def test_a_step_whose_time_is_up_while_it_waits_leaves_those_before_it_alone() -> None:
    bench = SequenceBench()
    first = bench.send(1, start=True)
    batch = await bench.expect_batch([1])
    second = bench.send(2)
    third, fourth = bench.send(3, timeout_s=0.5), bench.send(4, end=True)
    await asyncio.sleep(1.0)
    assert isinstance(third.error, DeadlineExceeded)
    assert isinstance(fourth.error, SequenceLost)
    with pytest.raises(InvalidRequest, match="START"):
        bench.send(5)
    bench.respond = replies
    batch.reply()
    await bench.finish()
    assert (first.sum, second.sum) == (1, 3)


@simulated
async def test_a_step_whose_time_is_up_while_it_runs_changes_no_state() -> None:
    bench = SequenceBench(policy=BatchPolicy(1))
    late = bench.send(1, start=True, timeout_s=0.5)
    batch = await bench.expect_batch([1])
    behind, other = bench.send(2), bench.send(9, 9, start=True, end=True)
    await asyncio.sleep(0.6)
    assert isinstance(late.error, DeadlineExceeded)
    assert isinstance(behind.error, SequenceLost)
    bench.respond = replies
    batch.reply()
    await bench.finish()
    assert other.sum == 9


@simulated
async def test_a_caller_that_leaves_ends_its_sequence() -> None:
    bench = SequenceBench()
    bench.send(1, start=True)
    batch = await bench.expect_batch([1])
    waits, behind = bench.send(2), bench.send(3)
    waits.request.abort()
    assert isinstance(waits.error, Cancelled)
    assert isinstance(behind.error, SequenceLost)
    batch.reply()
    await bench.finish()
    assert bench.statistics.failures["CANCELED"] == 1


@simulated
async def test_a_caller_that_leaves_while_its_step_runs() -> None:
    bench = SequenceBench(policy=BatchPolicy(2))
    gone, stays = bench.send(1, 1, start=True), bench.send(2, 2, start=True)
    batch = await bench.expect_batch([1, 2])
    gone.request.abort()
    gone.request.abort()
    assert isinstance(gone.error, Cancelled)
    with pytest.raises(InvalidRequest, match="START"):
        bench.send(5, 1)
    batch.reply()
    await bench.finish(sequences=1)
    assert stays.sum == 2
    assert bench.statistics.failures["CANCELED"] == 1


# -- failures ----------------------------------------------------------------------------------------------------------


@simulated
async def test_a_broken_worker_costs_a_sequence_nothing() -> None:
    bench = SequenceBench(replicas=2)
    bench.respond = replies
    bench.send(1, 1, start=True)
    await turns()
    bench.respond = None
    second = bench.send(2, 1)
    batch = await bench.expect_batch([2])
    bench.replicas[0].set_available(False)
    batch.fail(FailureKind.BROKEN)
    await asyncio.sleep(1.0)
    assert not second.settled
    bench.respond = replies
    bench.replicas[0].set_available(True)
    last = bench.send(3, 1, end=True)
    await bench.finish()
    assert (second.sum, last.sum) == (3, 6)


@simulated
async def test_who_executed_a_step_and_how_often_is_known_of_its_caller() -> None:
    bench = SequenceBench()
    bench.respond = replies
    first = bench.send(1, start=True)
    await turns()
    assert (first.request.attempt, first.request.batch.attempt) == (1, 1)
    bench.respond = None
    again = bench.send(2)
    (await bench.expect_batch([2])).fail(FailureKind.BROKEN)
    await asyncio.sleep(1.0)
    (await bench.expect_batch([2])).reply()
    await turns()
    assert (again.request.attempt, again.request.batch.attempt) == (2, 2)
    refused = bench.send(3, end=True)
    (await bench.expect_batch([3])).fail(FailureKind.SUSPECT, "no")
    await bench.finish()
    assert isinstance(refused.error, ModelError)
    assert (refused.request.avoid, refused.request.attempt) == ("onnx-1", 1)


@simulated
async def test_a_refused_step_leaves_the_state_as_it_was() -> None:
    bench = SequenceBench()
    bench.respond = replies
    bench.send(1, start=True)
    await turns()
    bench.respond = lambda batch: batch.fail(FailureKind.SUSPECT, "no")
    refused = bench.send(100)
    await turns()
    assert isinstance(refused.error, ModelError)
    bench.respond = replies
    last = bench.send(2, end=True)
    await bench.finish()
    assert last.sum == 3


@simulated
async def test_a_refused_start_leaves_nothing_of_the_sequence_before() -> None:
    bench = SequenceBench()
    bench.respond = replies
    bench.send(50, start=True)
    await turns()
    bench.respond = lambda batch: batch.fail(FailureKind.SUSPECT, "no")
    refused = bench.send(1, start=True)
    await turns()
    assert isinstance(refused.error, ModelError)
    bench.respond = replies
    last = bench.send(2, end=True)
    await bench.finish()
    assert last.sum == 2


@simulated
async def test_batch_mates_of_a_refused_step_get_their_answers() -> None:
    bench = SequenceBench(sequence_policy(controls=(*FLAGS, READY)))

    def refuses(batch: SequenceBatch) -> None:
        batch.fail(FailureKind.SUSPECT, "13") if 13 in batch.numbers else batch.reply()

    bench.respond = refuses
    steps = [bench.send(number, number, start=True, end=True) for number in (11, 12, 13, 14)]
    await bench.finish()
    assert [type(step.error) for step in steps] == [type(None), type(None), ModelError, type(None)]
    assert [step.sum for step in steps if step.error is None] == [11, 12, 14]


@simulated
async def test_without_a_worker_sequences_end_and_new_ones_are_refused() -> None:
    bench = SequenceBench(policy=BatchPolicy(1))
    bench.respond = replies
    bench.send(1, 1, start=True)
    await turns()
    bench.replicas[0].set_available(False)
    waits, behind, backlog = bench.send(2, 1), bench.send(3, 1), bench.send(4, 2, start=True)
    await asyncio.sleep(6.0)
    assert isinstance(waits.error, NoBackend)
    assert isinstance(behind.error, SequenceLost)
    assert isinstance(backlog.error, NoBackend)
    with pytest.raises(NoBackend):
        bench.send(5, 3, start=True)
    assert bench.scheduler.sequences == 0
    bench.replicas[0].set_available(True)
    again = bench.send(6, 1, start=True, end=True)
    await bench.finish()
    assert again.sum == 6


@simulated
async def test_a_step_that_is_refused_at_the_door_leaves_the_sequence_as_it_was() -> None:
    bench = SequenceBench(sequence_policy(max_sequence_idle_s=60.0))
    bench.respond = replies
    bench.send(1, start=True)
    await turns()
    bench.replicas[0].set_available(False)
    await asyncio.sleep(6.0)
    with pytest.raises(NoBackend):
        bench.send(100)
    with pytest.raises(NoBackend):
        bench.send(100, start=True)
    bench.replicas[0].set_available(True)
    last = bench.send(2, end=True)
    await bench.finish()
    assert last.sum == 3


@simulated
async def test_a_long_backlog_without_a_worker_is_refused_one_by_one() -> None:
    bench = SequenceBench(policy=BatchPolicy(1))
    bench.replicas[0].set_available(False)
    steps = [bench.send(number, number, start=True) for number in range(1, 2001)]
    await asyncio.sleep(6.0)
    await bench.finish()
    assert {type(step.error) for step in steps} == {NoBackend}


@simulated
async def test_close_fail_and_reopen() -> None:
    bench = SequenceBench(policy=BatchPolicy(1))
    running = bench.send(1, 1, start=True)
    batch = await bench.expect_batch([1])
    behind, backlog = bench.send(2, 1), bench.send(3, 2, start=True)
    bench.scheduler.close(NotReady("model 'acc' failed"))
    bench.scheduler.fail_waiting(NotReady("model 'acc' failed"))
    assert isinstance(behind.error, NotReady)
    assert isinstance(backlog.error, NotReady)
    with pytest.raises(NotReady):
        bench.send(4, 4, start=True)
    batch.reply()
    await turns()
    assert running.sum == 1
    assert bench.scheduler.sequences == 0
    bench.scheduler.reopen()
    bench.respond = replies
    again = bench.send(5, 5, start=True, end=True)
    await bench.finish()
    assert again.sum == 5


# -- bounds ------------------------------------------------------------------------------------------------------------


@simulated
async def test_steps_that_wait_are_bounded_wherever_they_wait() -> None:
    bench = SequenceBench(policy=BatchPolicy(1, max_queue_rows=3))
    bench.send(1, 1, start=True)
    batch = await bench.expect_batch([1])
    for identity in (1, 2, 2):
        bench.send(2, identity, start=identity == 2)
    with pytest.raises(Overloaded, match="Exceeds maximum queue size: 3 of 3 rows"):
        bench.send(3, 1)
    bench.respond = replies
    batch.reply()
    await turns()
    bench.send(4, 1, end=True)
    await bench.finish(sequences=1)


@simulated
async def test_bytes_that_wait_are_bounded() -> None:
    bench = SequenceBench(policy=BatchPolicy(1, max_queue_bytes=16))
    bench.send(1, 1, start=True)
    batch = await bench.expect_batch([1])
    bench.send(2, 1)
    bench.send(2, 1)
    with pytest.raises(Overloaded, match="16 of 16 bytes"):
        bench.send(3, 1)
    bench.respond = replies
    batch.reply()
    await bench.finish(sequences=1)


@simulated
async def test_who_was_let_in_is_not_refused_later() -> None:
    """A batch that comes back from a dead worker fills the queue beyond its bound; nobody inside pays for it."""
    bench = SequenceBench(sequence_policy(strategy="oldest"), BatchPolicy(4, max_queue_bytes=16), replicas=2)
    bench.send(1, 1, start=True)
    stays = await bench.expect_batch([1])
    bench.send(3, 3, start=True)
    dies = await bench.expect_batch([3])
    second = bench.send(10, 1)
    bench.send(2, 2, start=True)
    dies.replica.set_available(False)
    dies.fail(FailureKind.BROKEN)
    await turns()
    bench.respond = replies
    stays.reply()
    await bench.finish(sequences=3)
    assert second.sum == 11


@simulated
async def test_sequences_are_bounded() -> None:
    bench = SequenceBench(sequence_policy(strategy="oldest"), BatchPolicy(4, max_queue_rows=5))
    bench.respond = replies
    for identity in range(1, 6):
        bench.send(1, identity, start=True)
        await turns()
    with pytest.raises(Overloaded, match="5 sequences live"):
        bench.send(1, 6, start=True)
    bench.send(1, 1, end=True)
    await turns()
    bench.send(1, 6, start=True)
    await bench.finish(sequences=5)


@simulated
async def test_states_are_bounded_and_an_end_always_gets_in() -> None:
    bench = SequenceBench(sequence_policy(strategy="oldest"), BatchPolicy(4, max_queue_bytes=23))
    bench.respond = replies
    for identity in (1, 2, 3):
        bench.send(1, identity, start=True)
        await turns()
    with pytest.raises(Overloaded, match="states of 3 sequences hold 24 bytes"):
        bench.send(1, 1)
    with pytest.raises(Overloaded, match="states of 3 sequences"):
        bench.send(1, 4, start=True)
    last = bench.send(5, 2, end=True)
    await turns()
    assert last.sum == 6
    bench.send(1, 1)
    await bench.finish(sequences=2)


@simulated
async def test_a_refused_request_is_as_it_was() -> None:
    bench = SequenceBench(policy=BatchPolicy(1))
    bench.replicas[0].set_available(False)
    await asyncio.sleep(6.0)
    request = bench_request(bench, rows=1)
    with pytest.raises(NoBackend):
        bench.scheduler.submit(request)
    assert (request.state, request.owner) == (QUEUED, None)
    request.abort()
    assert bench.scheduler.pending == bench.scheduler.sequences == 0
