"""Two attempts of one batch at once, and everything that can happen to either of them meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.backends.interface import FailureKind, Sign
from gateway.core.fleet import Member
from gateway.core.model import BatchPolicy
from gateway.core.request import SequenceStep
from gateway.core.resilience import Resilience
from gateway.errors import GatewayError
from tests.scripted import Bench, Kind, ScriptedBatch, ScriptedReplica, simulated, turns
from tests.test_scheduler_resilience_interleavings import OUTCOMES, World

RUN_S = 0.02
"""What a batch of any size takes, as the fleet has learned."""


def hedging_bench(kinds: Sequence[Kind], slots: int = 1, rows: int = 4, max_attempts: int = 3) -> Bench:
    """Idle replicas of which it is known when a batch is late."""
    bench = Bench(
        BatchPolicy(rows, max_queue_rows=60),
        len(kinds),
        slots,
        kinds=kinds,
        resilience=Resilience(hedging=1.0, attempt_timeout_s=60.0, max_attempts=max_attempts),
    )
    learn(bench)
    return bench


def learn(bench: Bench) -> None:
    for member in bench.scheduler.fleets[0].members:
        if not member.time.known:
            for size in (1, 2, 3, 8):
                for _ in range(120):
                    member.time.observe(size, RUN_S, bench.loop.time())


async def both(bench: Bench, rows: int = 1) -> tuple[ScriptedBatch, ScriptedBatch]:
    first = await bench.backend.expect_batch(rows=rows)
    second = await bench.backend.expect_batch(rows=rows)
    assert first.numbers == second.numbers
    assert first.replica is not second.replica
    return first, second


def member_of(bench: Bench, replica: ScriptedReplica) -> Member:
    return bench.scheduler.fleets[0].of(replica)


@pytest.mark.parametrize("kind", [FailureKind.OVERLOAD, FailureKind.NOT_SENT])
@simulated
async def test_who_did_not_take_the_batch_is_no_witness_against_its_only_row(kind: FailureKind) -> None:
    bench = hedging_bench(["oip", "oip"])
    caller = bench.send()
    first, second = await both(bench)
    first.fail(kind)
    await asyncio.sleep(0.2)  # it is left alone for a moment
    second.fail(FailureKind.BROKEN, sign=Sign.ANSWERED)
    again = await bench.backend.expect_batch(rows=1)
    assert again.replica is first.replica
    again.reply()
    await bench.finish()
    assert caller.answered
    assert caller.request.attempt == 2  # what was not taken was no attempt


@simulated
async def test_both_attempts_count() -> None:
    bench = hedging_bench(["oip", "oip"], max_attempts=2)
    caller = bench.send()
    first, second = await both(bench)
    first.fail(FailureKind.BROKEN)
    second.fail(FailureKind.BROKEN)
    await turns()
    assert caller.settled == 1
    await bench.finish()
    assert len(bench.backend.executed) == 2


@simulated
async def test_who_refuses_what_its_twin_answers_is_to_blame() -> None:
    bench = hedging_bench(["oip", "oip"])
    caller = bench.send()
    first, second = await both(bench)
    first.fail(FailureKind.SUSPECT, sign=Sign.ANSWERED)
    refuser = member_of(bench, first.replica)
    assert refuser.breaker.window.failed == 0
    second.reply()
    await bench.finish()
    assert caller.answered
    assert refuser.breaker.window.failed == 1


@simulated
async def test_the_second_attempt_has_the_caller_s_parameters_wherever_the_first_went() -> None:
    bench = hedging_bench(["onnx", "oip"])
    bench.backend.replicas[1]._slots = 0
    caller = bench.caller()
    caller.request.parameters = {"temperature": 0.5}
    bench.scheduler.submit(caller.request)
    bench.callers.append(caller)
    await turns()
    bench.backend.replicas[1]._slots = 1
    worker, server = await both(bench)
    assert (worker.parameters, server.parameters) == ({}, {"temperature": 0.5})
    server.reply()
    worker.end_early()
    await bench.finish()


@simulated
async def test_a_step_of_a_sequence_is_never_sent_twice() -> None:
    bench = hedging_bench(["onnx"])
    bench.send(sequence=SequenceStep(7))
    first = await bench.backend.expect_batch(rows=1)
    bench.scheduler.add_replica(bench.backend.add("oip"))
    learn(bench)
    await asyncio.sleep(11.0)
    await bench.backend.expect_nothing()
    first.reply()
    await bench.finish()


@simulated
async def test_only_those_who_still_wait_are_sent_twice() -> None:
    bench = hedging_bench(["oip", "oip"])
    leaver, _, stays = bench.send(), bench.send(), bench.send()
    first = await bench.backend.expect_batch(rows=3)
    leaver.request.abort()
    second = await bench.backend.expect_batch(rows=2)
    assert second.numbers == first.numbers[1:]
    second.reply()
    assert stays.answered
    first.end_early()
    await bench.finish()


@simulated
async def test_when_everybody_left_both_attempts_are_cancelled_and_nobody_is_blamed() -> None:
    bench = hedging_bench(["oip", "oip"])
    bench.backend.obeys = True
    caller = bench.send()
    first, second = await both(bench)
    bench.scheduler.abort(caller.request)
    assert first.cancelled
    assert second.cancelled
    await bench.finish()
    assert [member.breaker.window.failed for member in bench.scheduler.fleets[0].members] == [0, 0]


@simulated
async def test_a_replica_that_is_removed_waits_for_the_attempt_that_lost() -> None:
    bench = hedging_bench(["oip", "oip"])
    bench.send()
    first, second = await both(bench)
    removal = asyncio.ensure_future(bench.scheduler.remove_replica(first.replica))
    second.reply()
    await turns()
    assert not removal.done()
    first.end_early()
    await removal
    await bench.finish()


@simulated
async def test_who_waits_is_failed_and_what_runs_twice_is_not() -> None:
    bench = hedging_bench(["oip", "oip"])
    caller = bench.send()
    first, second = await both(bench)
    bench.send()
    await turns()
    bench.scheduler.fail_waiting(GatewayError("closed"))
    assert [caller.settled for caller in bench.callers] == [0, 1]
    first.fail(FailureKind.BROKEN)
    second.fail(FailureKind.BROKEN)
    await bench.finish()
    assert caller.error is not None


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, 3), st.sampled_from("ab"), st.sampled_from([0.0, 0.03, 0.3])),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("reply"), st.integers(0, 5)),
        st.tuples(st.just("fail"), st.integers(0, 5), st.sampled_from(OUTCOMES)),
        st.tuples(st.just("sleep"), st.sampled_from([0.01, 0.025, 0.025, 0.025, 0.1])),
        st.tuples(st.just("sleep"), st.sampled_from([0.025, 12.0])),
        st.tuples(st.just("flip"), st.integers(0, 3)),
        st.tuples(st.just("join"), st.sampled_from(["onnx", "oip"])),
        st.tuples(st.just("remove"), st.integers(0, 3)),
        st.tuples(st.just("turn")),
    ),
    min_size=5,
    max_size=50,
)


class Twins(World):
    """Rows may run on two replicas at once, and on no more."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench, True)
        self.most = 0

    def check(self) -> None:
        learn(self.bench)
        running = self.bench.backend.running
        runs = [(number, batch.replica) for batch in running for number in batch.numbers]
        wanted = [(number, batch.replica) for batch in running if not batch.cancelled for number in batch.numbers]
        assert len(runs) == len(set(runs))
        times = [sum(number == other for other, _ in wanted) for number, _ in wanted]
        self.most = max([self.most, *times])
        assert self.most <= 2
        for caller in self.bench.callers:
            assert caller.settled <= 1
            if caller.answered:
                caller.check()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS, kinds=st.lists(st.sampled_from(["onnx", "oip"]), min_size=2, max_size=3), slots=st.integers(1, 2))
@simulated
async def test_whatever_happens_to_twins_everyone_is_settled_once_with_its_own_rows(
    steps: list[tuple[object, ...]], kinds: list[Kind], slots: int
) -> None:
    bench = hedging_bench(kinds, slots)
    world = Twins(bench)
    with suppress(GatewayError):
        bench.send()
    await asyncio.sleep(2 * RUN_S)
    world.check()
    for step in steps:
        await world.perform(step)
        world.check()
    for replica in bench.backend.replicas:
        replica.set_available(True)
    bench.backend.respond = ScriptedBatch.reply
    for batch in bench.backend.running:
        batch.reply()
    await bench.finish()
    for removal in world.removals:
        await removal
    (fleet,) = bench.scheduler.fleets
    assert [(member.batches, member.rows_in_flight) for member in fleet.members] == [(0, 0)] * len(fleet.members)
    assert world.most == 2, "nothing was sent twice"
