"""Any interleaving of sequences, failures, leavings and deadlines: each sequence gets what it would get alone."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.backends.interface import FailureKind
from gateway.core.model import BatchPolicy
from gateway.core.request import SETTLED
from gateway.core.scheduling import SequencePolicy
from gateway.errors import GatewayError, ModelError, SequenceLost
from tests.scripted import simulated, turns
from tests.sequence_bench import FLAGS, READY, SequenceBatch, SequenceBench, Step, replies, sequence_policy

KINDS: list[FailureKind | None] = [None, None, None, None, *FailureKind]
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("send"), st.integers(1, 4), st.sampled_from(["", "", "start", "start", "end", "both"]),
            st.sampled_from([0.0, 0.0, 0.05, 0.3]),
        ),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("finish"), st.integers(0, 5), st.sampled_from(KINDS)),
        st.tuples(st.just("finish"), st.integers(0, 5), st.none()),
        st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.01, 0.1, 0.6, 6.0])),
        st.tuples(st.just("flip"), st.integers(0, 1)),
        st.tuples(st.just("turn")),
    ),
    min_size=5,
    max_size=70,
)  # fmt: skip
POLICIES = st.sampled_from(
    [
        sequence_policy(max_sequence_idle_s=0.5),
        sequence_policy(controls=(*FLAGS, READY)),
        sequence_policy(minimum_slot_utilization=1.0, max_queue_delay_s=0.02),
        sequence_policy(strategy="oldest", max_candidate_sequences=1),
        sequence_policy(strategy="oldest", preferred_batch_sizes=(2,), max_queue_delay_s=0.02),
        sequence_policy(strategy="oldest", preserve_ordering=True, max_sequence_idle_s=0.5),
    ]
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=STEPS, sequence=POLICIES, size=st.integers(1, 3), merge=st.booleans(), replicas=st.integers(1, 2),
    slots=st.integers(1, 2),
)  # fmt: skip
@simulated
async def test_each_sequence_gets_what_it_would_get_alone(
    steps: list[tuple[object, ...]], sequence: SequencePolicy, size: int, merge: bool, replicas: int, slots: int
) -> None:
    bench = SequenceBench(sequence, BatchPolicy(size, merge, max_queue_rows=20), replicas, slots)
    for step in steps:
        await perform(bench, step)
        _one_step_at_a_time(bench)
    for replica in bench.replicas:
        replica.set_available(True)
    bench.respond = replies
    for batch in _running(bench):
        batch.reply()
    await bench.scheduler.drained()
    await asyncio.sleep(1.1)  # whoever rests too long ends
    await bench.finish(sequences=0)
    _as_if_alone(bench)
    _seats_are_kept(bench, sequence, size)


def _running(bench: SequenceBench) -> list[SequenceBatch]:
    return [batch for replica in bench.replicas for batch in replica.running]


async def perform(bench: SequenceBench, step: tuple[object, ...]) -> None:
    match step:
        case ("send", int(identity), str(kind), float(timeout_s)):
            start, end = kind in {"start", "both"}, kind in {"end", "both"}
            with suppress(GatewayError):
                number = 2 ** len(bench.steps)  # sums of different steps are different
                bench.send(number, identity, start=start, end=end, timeout_s=timeout_s)
        case ("abort", int(index)) if bench.steps:
            bench.scheduler.abort(bench.steps[index % len(bench.steps)].request)
        case ("finish", int(index), kind) if _running(bench):
            batches = _running(bench)
            batch = batches[index % len(batches)]
            if isinstance(kind, FailureKind):
                batch.fail(kind)
            else:
                batch.reply()
        case ("sleep", float(seconds)):
            await asyncio.sleep(seconds)
        case ("flip", int(index)):
            replica = bench.replicas[index % len(bench.replicas)]
            replica.set_available(not replica.available)
        case _:
            await turns(1)


def _one_step_at_a_time(bench: SequenceBench) -> None:
    by_number = {step.number: step for step in bench.steps}
    alive = set()
    for batch in _running(bench):
        for number in filter(None, batch.numbers):
            step = by_number[number]
            if step.request.state != SETTLED:
                assert step.request.key not in alive, "two steps of a sequence run at the same time"
                alive.add(step.request.key)


def _as_if_alone(bench: SequenceBench) -> None:
    for identity in (1, 2, 3, 4):
        total = 0
        broken = False
        for step in bench.steps:
            place = step.request.sequence
            if place is None or place.id != identity:
                continue
            if place.start:
                total, broken = 0, False
            if step.error is None:
                assert not broken, "a step was answered although one before it was given up"
                total += step.number
                assert step.sum == total
                assert step.flags & 3 == place.start + 2 * place.end
            elif isinstance(step.error, SequenceLost):
                assert broken, "nothing before it was given up"
            elif not isinstance(step.error, ModelError):
                broken = True


def _seats_are_kept(bench: SequenceBench, sequence: SequencePolicy, size: int) -> None:
    """Direct: every step of a sequence on one replica, and in one row where the model has READY."""
    by_number: dict[int, Step] = {step.number: step for step in bench.steps}
    seats: dict[object, set[object]] = {}
    for batch in bench.executed:
        assert batch.rows <= size
        for row, number in enumerate(batch.numbers):
            if number == 0:
                assert batch.inputs["READY"][row] == batch.inputs["START"][row] == batch.inputs["END"][row] == 0
                continue
            ready = "READY" in batch.inputs
            assert not ready or batch.inputs["READY"][row] == 1
            seat = (batch.replica.name, row if ready else None)
            seats.setdefault(by_number[number].request.key, set()).add(seat)
    if sequence.strategy == "direct":
        assert all(len(found) == 1 for found in seats.values()), seats


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.data(), sequence=POLICIES, size=st.integers(2, 4), replicas=st.integers(1, 2),
    lengths=st.lists(st.integers(1, 5), min_size=2, max_size=6),
)  # fmt: skip
@simulated
async def test_whole_sequences_at_once_in_any_order(
    data: st.DataObject, sequence: SequencePolicy, size: int, replicas: int, lengths: list[int]
) -> None:
    """Nobody leaves and nothing is lost, so every step is answered; many share batches, in any composition."""
    bench = SequenceBench(sequence, BatchPolicy(size), replicas)
    refused = data.draw(st.sets(st.integers(0, 20), max_size=3))
    turn = data.draw(st.permutations([at for at, length in enumerate(lengths) for _ in range(length)]))
    sent = [0] * len(lengths)

    def respond(batch: SequenceBatch) -> None:
        if {2**number for number in refused}.intersection(batch.numbers):
            batch.fail(FailureKind.SUSPECT)
        else:
            batch.reply()

    bench.respond = respond
    for number, at in enumerate(turn):
        sent[at] += 1
        again = sent[at] > 1 and data.draw(st.integers(0, 5)) == 0
        bench.send(2**number, at + 1, start=sent[at] == 1 or again, end=sent[at] == lengths[at])
        if data.draw(st.booleans()):
            await turns(data.draw(st.integers(1, 4)))
    await bench.finish(sequences=0)
    assert {step.number for step in bench.steps if step.error is not None} == {
        2**number for number in refused if number < len(turn)
    }
    _as_if_alone(bench)
    _seats_are_kept(bench, sequence, size)
