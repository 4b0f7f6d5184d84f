"""Several replicas, one of which fails: where rows go again, where not, and who is told what. See tests/scripted.py."""

from __future__ import annotations

import asyncio

import pytest

from gateway.backends.interface import FailureKind, Sign
from gateway.core.model import BatchPolicy
from gateway.core.request import SequenceStep
from gateway.core.resilience import Resilience
from gateway.core.scheduling import Scheduling
from gateway.dispatcher_failures import DOUBT_S
from gateway.dispatcher_lanes import Lane
from gateway.errors import (
    BackendError,
    Cancelled,
    DeadlineExceeded,
    ModelError,
    NoBackend,
    Overloaded,
    PoisonRequest,
    RetryBudgetExhausted,
)
from gateway.scheduler import NO_BACKEND_S, NO_REMOTE_S
from tests.scripted import Bench, Caller, Kind, ScriptedBatch, simulated, turns


def numbers_of(*callers: Caller) -> list[int]:
    return [number for caller in callers for number in caller.numbers]


# -- the retry lane ----------------------------------------------------------------------------------------------------


@simulated
async def test_a_failed_batch_waits_for_the_replica_it_has_not_tried_though_the_other_is_free() -> None:
    bench = Bench(BatchPolicy(2), replicas=2, kinds=["oip", "oip"])
    for _ in range(4):
        bench.send()
    one = await bench.backend.expect_batch(rows=2)
    two = await bench.backend.expect_batch(rows=2)
    one.fail(FailureKind.BROKEN)
    await bench.backend.expect_nothing()
    two.reply()
    again = await bench.backend.expect_batch(rows=2)
    assert (again.replica, again.numbers, again.lane) == (two.replica, one.numbers, Lane.RETRY)
    again.reply()
    await bench.finish()
    assert all(caller.answered for caller in bench.callers)


@simulated
async def test_retried_rows_are_not_mixed_with_newcomers_and_newcomers_take_the_free_replica() -> None:
    bench = Bench(BatchPolicy(4), replicas=2, kinds=["oip", "oip"])
    first, second = [bench.send(4), bench.send(1)]
    one = await bench.backend.expect_batch(rows=4)
    two = await bench.backend.expect_batch(rows=1)
    newcomer = bench.send(1)
    one.fail(FailureKind.BROKEN)
    third = await bench.backend.expect_batch(rows=1)
    assert (third.replica, third.numbers) == (one.replica, newcomer.numbers)
    two.reply()
    again = await bench.backend.expect_batch(rows=4)
    assert (again.replica, again.numbers) == (two.replica, first.numbers)
    again.reply()
    third.reply()
    await bench.finish()
    assert second.answered


@simulated
async def test_rows_with_the_same_history_share_their_retry() -> None:
    bench = Bench(BatchPolicy(4), replicas=2, slots=2, kinds=["onnx", "onnx"])
    bench.send(4)
    busy = await bench.backend.expect_batch(rows=4)
    other = next(replica for replica in bench.backend.replicas if replica is not busy.replica)
    other._slots = 1
    busy.replica._slots = 2
    bench.backend.respond = lambda batch: batch.fail(FailureKind.BROKEN) if batch.replica is other else batch.reply()
    bench.send(1)
    await turns(2)
    busy.reply()
    await bench.finish()
    assert all(caller.answered for caller in bench.callers)


@simulated
async def test_with_one_replica_only_a_retry_goes_there_again() -> None:
    bench = Bench(replicas=1)
    bench.send(3)
    (await bench.backend.expect_batch(rows=3)).fail(FailureKind.BROKEN)
    (await bench.backend.expect_batch(rows=3)).reply()
    await bench.finish()
    assert bench.callers[0].answered


@simulated
async def test_what_waits_for_a_retry_takes_room_in_the_queue() -> None:
    bench = Bench(BatchPolicy(4, max_queue_rows=6), replicas=2, kinds=["oip", "oip"])
    bench.send(4)
    bench.send(4)
    one = await bench.backend.expect_batch(rows=4)
    two = await bench.backend.expect_batch(rows=4)
    one.replica.set_available(False)
    one.fail(FailureKind.BROKEN)
    await turns()
    bench.send(2)
    with pytest.raises(Overloaded, match="another attempt"):
        bench.send(1)
    bench.scheduler.abort(bench.callers[0].request)  # whichever of the two it was
    bench.scheduler.abort(bench.callers[1].request)
    bench.send(1)
    bench.backend.respond = ScriptedBatch.reply
    two.reply()
    await bench.finish()


@simulated
async def test_a_deadline_in_the_retry_lane_is_kept() -> None:
    bench = Bench(BatchPolicy(1), replicas=2, kinds=["oip", "oip"])
    begun = bench.loop.time()
    late, patient = bench.send(timeout_s=0.2), bench.send()
    one, two = await bench.backend.expect_batch(rows=1), await bench.backend.expect_batch(rows=1)
    first, second = (one, two) if one.numbers == late.numbers else (two, one)
    first.fail(FailureKind.BROKEN)
    await asyncio.sleep(0.5)
    assert isinstance(late.error, DeadlineExceeded)
    assert 0.2 <= late.settled_at - begun <= 0.21
    second.reply()
    await bench.finish()
    assert patient.answered
    assert len(bench.backend.executed) == 2


# -- not taken ---------------------------------------------------------------------------------------------------------


@simulated
@pytest.mark.parametrize("kind", [FailureKind.NOT_SENT, FailureKind.OVERLOAD])
async def test_what_was_not_taken_goes_elsewhere_at_once(kind: FailureKind) -> None:
    bench = Bench(replicas=2, kinds=["oip", "oip"])
    caller = bench.send()
    begun = bench.loop.time()
    first = await bench.backend.expect_batch(rows=1)
    first.fail(kind)
    second = await bench.backend.expect_batch(rows=1)
    assert second.replica is not first.replica
    assert bench.loop.time() == begun
    second.reply()
    await bench.finish()
    assert caller.request.batch.attempt == 1


# -- executed at most once ---------------------------------------------------------------------------------------------


@simulated
@pytest.mark.parametrize("kind", [FailureKind.BROKEN, FailureKind.TIMEOUT])
async def test_what_may_not_be_executed_twice_is_not(kind: FailureKind) -> None:
    bench = Bench(replicas=2, kinds=["oip", "oip"], resilience=Resilience(idempotent=False))
    callers = [bench.send(), bench.send()]
    (await bench.backend.expect_batch(rows=2)).fail(kind, "it is gone")
    await bench.finish()
    assert all(isinstance(caller.error, BackendError) for caller in callers)
    assert all("what may have run is not sent again (idempotent: false): it is gone" in str(c.error) for c in callers)
    assert len(bench.backend.executed) == 1


@simulated
async def test_what_was_never_sent_may_go_elsewhere_even_then() -> None:
    bench = Bench(replicas=2, kinds=["oip", "oip"], resilience=Resilience(idempotent=False))
    caller = bench.send()
    (await bench.backend.expect_batch(rows=1)).fail(FailureKind.NOT_SENT, sign=Sign.CONNECT)
    (await bench.backend.expect_batch(rows=1)).reply()
    await bench.finish()
    assert caller.answered


# -- sequences ---------------------------------------------------------------------------------------------------------


@simulated
async def test_steps_of_a_sequence_stay_on_one_replica_alone_and_in_order() -> None:
    bench = Bench(replicas=3, slots=2, kinds=["oip"] * 3)
    for member in bench.scheduler.fleets[0].members:
        member.slots.limit = 2
    steps = [SequenceStep(7, start=True), SequenceStep(7), SequenceStep(7, end=True)]
    callers = [bench.send(sequence=step) for step in steps]
    others = [bench.send(), bench.send()]
    seen: list[ScriptedBatch] = []

    def look(batch: ScriptedBatch) -> None:
        seen.append(batch)
        assert sum(running.sequence is not None for running in bench.backend.running) <= 1

    bench.backend.inspect = look
    for _ in range(20):
        await turns()
        for batch in bench.backend.running:
            batch.reply()
    await bench.finish()
    own = [batch for batch in seen if batch.sequence is not None]
    assert [batch.numbers for batch in own] == [caller.numbers for caller in callers]
    assert [batch.sequence for batch in own] == steps
    assert len({batch.replica.name for batch in own}) == 1
    assert [batch.numbers for batch in seen if batch.sequence is None] == [numbers_of(*others)]


@simulated
async def test_a_step_is_executed_at_most_once_and_a_worker_knows_nothing_of_sequences() -> None:
    bench = Bench(replicas=2, kinds=["oip", "oip"])
    caller = bench.send(sequence=SequenceStep("s"))
    (await bench.backend.expect_batch(rows=1)).fail(FailureKind.BROKEN)
    await bench.finish()
    assert isinstance(caller.error, BackendError)
    local = Bench(replicas=1)
    local.send(sequence=SequenceStep("s"))
    batch = await local.backend.expect_batch(rows=1)
    assert batch.sequence is None
    batch.reply()
    await local.finish()


@simulated
async def test_parameters_go_to_remote_servers() -> None:
    bench = Bench(replicas=1, kinds=["oip"])
    caller = bench.caller()
    caller.request.parameters = {"temperature": 0.5}
    bench.scheduler.submit(caller.request)
    bench.callers.append(caller)
    batch = await bench.backend.expect_batch(rows=1)
    assert batch.parameters == {"temperature": 0.5}
    batch.reply()
    await bench.finish()


# -- nobody waits any more ---------------------------------------------------------------------------------------------


@simulated
async def test_a_batch_has_the_latest_deadline_of_its_members() -> None:
    bench = Bench()
    now = bench.loop.time()
    bench.send(timeout_s=2.0)
    bench.send(timeout_s=5.0)
    batch = await bench.backend.expect_batch(rows=2)
    assert batch.deadline == now + 5.0
    batch.reply()
    await bench.finish()


@simulated
async def test_the_last_one_to_leave_has_the_batch_cancelled_and_nobody_is_blamed() -> None:
    bench = Bench(kinds=["oip"])
    bench.backend.obeys = True
    callers = [bench.send(timeout_s=0.5), bench.send()]
    batch = await bench.backend.expect_batch(rows=2)
    bench.scheduler.abort(callers[1].request)
    assert bench.backend.running == [batch]
    assert [running.cancelled for running in bench.backend.running] == [False]
    await asyncio.sleep(1.0)
    assert batch.cancelled
    assert batch.ended
    (fleet,) = bench.scheduler.fleets
    assert [member.state for member in fleet.statistics(bench.loop.time()).members] == ["closed"]
    bench.send()
    (await bench.backend.expect_batch(rows=1)).reply()
    await bench.finish()
    assert isinstance(callers[1].error, Cancelled)
    assert bench.statistics.attempts["host-1", "cancelled"] == 1


# -- poison ------------------------------------------------------------------------------------------------------------


@simulated
async def test_who_crashes_workers_alone_is_told_so_and_is_not_executed_again() -> None:
    bench = Bench(BatchPolicy(8), replicas=3)
    callers = [bench.send() for _ in range(8)]
    poison = callers[3].numbers[0]
    bench.backend.respond = lambda batch: (
        batch.fail(FailureKind.BROKEN, "the worker died", Sign.EXIT) if poison in batch.numbers else batch.reply()
    )
    await bench.finish()
    assert [caller.answered for caller in callers] == [index != 3 for index in range(8)]
    assert isinstance(callers[3].error, PoisonRequest)
    crashes = [batch for batch in bench.backend.executed if poison in batch.numbers]
    assert len(crashes) <= 3
    assert bench.statistics.poisoned == 1
    executed = len(bench.backend.executed)
    again = bench.caller()
    again.request.inputs = callers[3].request.inputs
    with pytest.raises(PoisonRequest, match="not executed again"):
        bench.scheduler.submit(again.request)
    assert len(bench.backend.executed) == executed


@simulated
async def test_in_a_storm_of_crashes_one_beyond_doubt_is_enough_and_innocents_are_answered() -> None:
    """Five crashes make the storm, whichever they are; from then on rows run alone, and each of these costs one run."""
    bench = Bench(BatchPolicy(8), replicas=2)
    guilty: set[int] = set()
    bench.backend.respond = lambda batch: (
        batch.fail(FailureKind.BROKEN, "the worker died", Sign.CRASH)
        if guilty.intersection(batch.numbers)
        else batch.reply()
    )

    async def send(*, bad: bool) -> tuple[Caller, int]:
        caller = bench.caller()
        guilty.update(caller.numbers if bad else [])
        bench.callers.append(caller)
        bench.scheduler.submit(caller.request)
        await asyncio.sleep(0.1)
        return caller, sum(caller.numbers[0] in batch.numbers for batch in bench.backend.executed)

    runs = []
    for _ in range(5):
        for bad in (True, False):
            caller, count = await send(bad=bad)
            assert isinstance(caller.error, PoisonRequest) if bad else caller.answered
            runs += [count] if bad else []
    assert runs == [2, 2, 1, 1, 1]
    (dispatcher,) = bench.scheduler.dispatchers
    assert dispatcher.failures.crashes.alone(bench.loop.time())
    assert not dispatcher.failures.outage.outage
    await bench.finish()


@simulated
async def test_a_storm_is_not_taken_for_an_outage() -> None:
    """In a storm a row that a remote server breaks on is still tried as often as it may be; in an outage it is not."""
    bench = Bench(BatchPolicy(8), replicas=2, kinds=["oip", "oip"])
    (dispatcher,) = bench.scheduler.dispatchers
    for _ in range(5):
        dispatcher.failures.crashes.crashed(bench.loop.time())
    caller = bench.send()
    for _ in range(2):
        (await bench.backend.expect_batch(rows=1)).fail(FailureKind.BROKEN)
    await asyncio.sleep(1.0)
    (third,) = bench.backend.running
    third.reply()
    await bench.finish()
    assert caller.answered


@simulated
async def test_one_quarantined_batch_at_a_time_while_others_go_on() -> None:
    bench = Bench(BatchPolicy(4), replicas=3, slots=2)
    suspects = [bench.send() for _ in range(4)]
    (await bench.backend.expect_batch(rows=4)).fail(FailureKind.BROKEN, sign=Sign.EXIT)
    (await bench.backend.expect_batch(rows=4)).fail(FailureKind.BROKEN, sign=Sign.EXIT)
    served = 0
    for _ in range(4):
        apart = await bench.backend.expect_batch(rows=1)
        assert apart.lane is Lane.QUARANTINE
        bench.send()
        newcomer = await bench.backend.expect_batch(rows=1)
        assert newcomer.lane is None
        await bench.backend.expect_nothing()
        newcomer.reply()
        await bench.backend.expect_nothing()
        apart.reply()
        served += 1
    await bench.finish()
    assert served == len(suspects)
    assert all(caller.answered for caller in bench.callers)


@simulated
async def test_a_remote_server_that_refuses_what_another_takes_is_to_blame() -> None:
    bench = Bench(replicas=2, kinds=["oip", "oip"])
    callers = [bench.send(), bench.send()]
    first = await bench.backend.expect_batch(rows=2)
    first.fail(FailureKind.SUSPECT, sign=Sign.ANSWERED)
    second = await bench.backend.expect_batch(rows=2)
    assert (second.lane, second.numbers) == (Lane.QUARANTINE, first.numbers)
    assert second.replica is not first.replica
    second.reply()
    await bench.finish()
    assert all(caller.answered for caller in callers)
    (fleet,) = bench.scheduler.fleets
    failures = {member.name: member.time.statistics(bench.loop.time()).failures for member in fleet.members}
    assert failures == {first.replica.name: 1, second.replica.name: 0}


@simulated
async def test_rows_that_two_servers_refuse_are_their_own_fault_and_halved() -> None:
    bench = Bench(replicas=2, kinds=["oip", "oip"])
    callers = [bench.send() for _ in range(4)]
    bad = callers[2].numbers[0]
    bench.backend.respond = lambda batch: (
        batch.fail(FailureKind.SUSPECT, sign=Sign.ANSWERED) if bad in batch.numbers else batch.reply()
    )
    await bench.finish()
    assert [caller.answered for caller in callers] == [True, True, False, True]
    assert isinstance(callers[2].error, ModelError)
    (fleet,) = bench.scheduler.fleets
    assert [member.time.statistics(bench.loop.time()).failures for member in fleet.members] == [0, 0]


@simulated
@pytest.mark.parametrize("kind", ["onnx", "oip"])
async def test_who_is_left_of_several_was_not_alone(kind: Kind) -> None:
    bench = Bench(replicas=2, kinds=[kind, kind])
    gone, stays = bench.send(), bench.send()
    batch = await bench.backend.expect_batch(rows=2)
    bench.scheduler.abort(gone.request)
    batch.fail(FailureKind.SUSPECT)
    again = await bench.backend.expect_batch(rows=1)
    assert again.numbers == stays.numbers
    again.reply()
    await bench.finish()
    assert stays.answered


@simulated
@pytest.mark.parametrize("bad_at", range(8))
async def test_a_row_that_two_servers_fail_on_alone_is_poison_though_both_saw_it_in_company_before(bad_at: int) -> None:
    bench = Bench(replicas=2, kinds=["oip", "oip"], seed=bad_at)
    callers = [bench.send() for _ in range(8)]
    bad = callers[bad_at].numbers[0]
    bench.backend.respond = lambda batch: (
        batch.fail(FailureKind.BROKEN, sign=Sign.ANSWERED) if bad in batch.numbers else batch.reply()
    )
    await bench.finish()
    assert [caller.answered for caller in callers] == [at != bad_at for at in range(8)]
    assert isinstance(callers[bad_at].error, PoisonRequest)
    alone = {batch.replica.name for batch in bench.backend.executed if batch.numbers == [bad]}
    assert len(alone) == 2
    assert sum(batch.numbers == [bad] for batch in bench.backend.executed) == 2


@simulated
async def test_after_reopening_without_any_backend_those_who_wait_are_told_again() -> None:
    bench = Bench(kinds=["oip"])
    bench.backend.replicas[0].set_available(False)
    await asyncio.sleep(NO_REMOTE_S + 1.0)
    bench.scheduler.reopen()
    begun = bench.loop.time()
    caller = bench.send()
    await asyncio.sleep(10.0)
    assert isinstance(caller.error, NoBackend)
    assert caller.settled_at - begun == pytest.approx(NO_REMOTE_S)
    await bench.finish()


# -- no backend --------------------------------------------------------------------------------------------------------


@simulated
@pytest.mark.parametrize(("kinds", "patience_s"), [(["oip", "oip"], NO_REMOTE_S), (["oip", "onnx"], NO_BACKEND_S)])
async def test_how_long_requests_wait_for_anyone(kinds: list[str], patience_s: float) -> None:
    bench = Bench(replicas=2, kinds=kinds)  # type: ignore[arg-type]
    begun = bench.loop.time()
    for replica in bench.backend.replicas:
        replica.set_available(False)
    waiting = bench.send()
    await asyncio.sleep(10.0)
    assert isinstance(waiting.error, NoBackend)
    assert waiting.settled_at - begun == pytest.approx(patience_s)
    with pytest.raises(NoBackend):
        bench.send()
    await bench.finish()


# -- replicas come and go ----------------------------------------------------------------------------------------------


@simulated
async def test_a_replica_that_joins_takes_part_and_one_that_is_removed_finishes_first() -> None:
    bench = Bench(BatchPolicy(1), replicas=1, kinds=["oip"])
    first, second = bench.send(), bench.send()
    one = await bench.backend.expect_batch(rows=1)
    new = bench.backend.add("oip")
    bench.scheduler.add_replica(new)
    two = await bench.backend.expect_batch(rows=1)
    assert two.replica is new
    removal = asyncio.ensure_future(bench.scheduler.remove_replica(one.replica))
    third = bench.send()
    await turns()
    assert not removal.done()
    one.reply()
    await turns()
    assert removal.done()
    await bench.backend.expect_nothing()
    two.reply()
    three = await bench.backend.expect_batch(rows=1)
    assert three.replica is new
    three.reply()
    await bench.finish()
    assert [caller.answered for caller in (first, second, third)] == [True] * 3
    (fleet,) = bench.scheduler.fleets
    assert [member.name for member in fleet.statistics(bench.loop.time()).members] == [new.name]


@simulated
async def test_a_batch_that_fails_on_a_removed_replica_goes_to_another() -> None:
    bench = Bench(replicas=2, kinds=["oip", "oip"])
    caller = bench.send()
    batch = await bench.backend.expect_batch(rows=1)
    removal = asyncio.ensure_future(bench.scheduler.remove_replica(batch.replica))
    await turns()
    batch.fail(FailureKind.BROKEN)
    (await bench.backend.expect_batch(rows=1)).reply()
    await removal
    await bench.scheduler.remove_replica(batch.replica)  # harmless
    await bench.finish()
    assert caller.answered


# -- those who look on -------------------------------------------------------------------------------------------------


@simulated
async def test_the_observer_sees_every_batch_before_its_members_do_and_harms_nobody() -> None:
    bench = Bench()
    caller = bench.send()
    seen: list[int] = []

    def observe(batch: object, outcome: object) -> None:
        seen.append(caller.settled)
        raise RuntimeError("the observer has its own troubles")

    bench.scheduler.on_executed = observe
    (await bench.backend.expect_batch(rows=1)).reply()
    await bench.finish()
    assert seen == [0]
    assert caller.answered


@simulated
async def test_who_watches_the_fleet_is_told_of_failures_and_flips() -> None:
    bench = Bench(replicas=2, kinds=["oip", "oip"])
    told: list[float] = []
    bench.scheduler.on_fleet_changed = lambda: told.append(bench.loop.time())
    bench.send()
    (await bench.backend.expect_batch(rows=1)).fail(FailureKind.BROKEN)
    assert len(told) >= 1
    before = len(told)
    bench.backend.replicas[0].set_available(False)
    assert len(told) > before
    (await bench.backend.expect_batch(rows=1)).reply()
    await bench.finish()


# -- credit ------------------------------------------------------------------------------------------------------------


@simulated
async def test_short_of_credit_the_first_rank_and_then_the_earliest_deadline_go_again() -> None:
    bench = Bench(
        BatchPolicy(8),
        replicas=2,
        kinds=["oip", "oip"],
        scheduling=Scheduling(priority_levels=2, default_priority_level=2),
    )
    late, early, first = bench.send(timeout_s=9.0), bench.send(timeout_s=5.0), bench.send(priority=1, timeout_s=20.0)
    (dispatcher,) = bench.scheduler.dispatchers
    batch = await bench.backend.expect_batch(rows=3)
    now = bench.loop.time()
    assert dispatcher.budget.withdraw(int(dispatcher.budget.available(now)) - 2, now)
    batch.fail(FailureKind.BROKEN)
    again = await bench.backend.expect_batch(rows=2)
    assert sorted(again.numbers) == sorted(numbers_of(early, first))
    assert isinstance(late.error, RetryBudgetExhausted)
    again.reply()
    await bench.finish()
    assert bench.statistics.rejected == {"retry_budget_exhausted": 1}
    assert bench.scheduler.retry_budget_rows < 1.0


# -- two attempts at once ----------------------------------------------------------------------------------------------


async def hedging_bench(share: float = 1.0) -> Bench:
    """Two idle replicas that have answered often enough for what is late to be known."""
    bench = Bench(
        BatchPolicy(1),
        replicas=2,
        kinds=["oip", "oip"],
        resilience=Resilience(hedging=share, attempt_timeout_s=60.0),
    )
    for _ in range(300):
        bench.send()
        batch = await bench.backend.expect_batch(rows=1)
        await asyncio.sleep(0.02)
        batch.reply()
        await turns()
    await asyncio.sleep(15.0)
    return bench


@simulated
async def test_a_late_batch_is_sent_twice_and_the_first_answer_is_everybody_s() -> None:
    bench = await hedging_bench()
    bench.backend.obeys = True
    caller = bench.send()
    first = await bench.backend.expect_batch(rows=1)
    second = await bench.backend.expect_batch(rows=1)
    assert second.replica is not first.replica
    assert second.numbers == first.numbers == caller.numbers
    second.reply()
    assert caller.answered
    assert caller.request.batch.backend == second.replica.name
    assert first.cancelled
    await turns()
    await bench.finish()
    assert bench.statistics.hedges == {"won": 1, "lost": 0, "failed": 0}


@simulated
async def test_the_loser_s_late_answer_and_a_failure_beside_one_that_runs_reach_nobody() -> None:
    bench = await hedging_bench()
    one = bench.send()
    first = await bench.backend.expect_batch(rows=1)
    second = await bench.backend.expect_batch(rows=1)
    first.reply()
    assert second.cancelled
    second.reply()  # it did not hear it in time
    two = bench.send()
    first = await bench.backend.expect_batch(rows=1)
    second = await bench.backend.expect_batch(rows=1)
    second.fail(FailureKind.BROKEN)
    await bench.backend.expect_nothing()
    assert two.settled == 0
    first.reply()
    await bench.finish()
    assert one.answered
    assert two.answered
    assert bench.statistics.hedges == {"won": 0, "lost": 1, "failed": 1}
    assert bench.statistics.execution_count == 302  # what reached nobody was an attempt, but no execution of anybody's
    attempts = bench.statistics.attempts
    assert sum(count for (_, outcome), count in attempts.items() if outcome == "ok") == 303


@simulated
async def test_when_both_fail_neither_of_them_is_asked_first_again() -> None:
    bench = await hedging_bench()
    caller = bench.send()
    first = await bench.backend.expect_batch(rows=1)
    second = await bench.backend.expect_batch(rows=1)
    third = bench.backend.add("oip")
    first.fail(FailureKind.BROKEN)
    bench.scheduler.add_replica(third)
    second.fail(FailureKind.BROKEN)
    again = await bench.backend.expect_batch(rows=1)
    assert again.replica is third
    assert caller.request.trouble is not None
    assert {member.replica for member in caller.request.trouble.tried} == {first.replica, second.replica}
    again.reply()
    await bench.finish()
    assert caller.answered


@simulated
async def test_nothing_is_sent_twice_unless_somebody_asked_for_it() -> None:
    bench = await hedging_bench(share=0.0)
    bench.send()
    first = await bench.backend.expect_batch(rows=1)
    await asyncio.sleep(5.0)
    await bench.backend.expect_nothing()
    first.reply()
    await bench.finish()


# -- what callers are told ---------------------------------------------------------------------------------------------


@simulated
@pytest.mark.parametrize("kind", [FailureKind.SUSPECT, FailureKind.BROKEN])
async def test_what_a_server_writes_is_shown_only_to_the_one_whose_input_it_refused(kind: FailureKind) -> None:
    bench = Bench(replicas=2, kinds=["oip", "oip"])
    callers = [bench.send() for _ in range(4)]
    bad = callers[2].numbers[0]
    bench.backend.respond = lambda batch: (
        batch.fail(kind, "b answered with status", Sign.ANSWERED, words=f"/srv/m.py: {batch.numbers}")
        if bad in batch.numbers
        else batch.reply()
    )
    await bench.finish()
    assert [caller.answered for caller in callers] == [True, True, False, True]
    told = str(callers[2].error)
    assert "b answered with status" in told
    assert ("/srv/m.py" in told) == (kind is FailureKind.SUSPECT)
    assert not any(str(caller.numbers[0]) in told for caller in callers if caller is not callers[2])


@simulated
async def test_servers_that_die_together_condemn_nobody() -> None:
    """Three lost connections within a moment: by the time a third attempt is made it is known who is gone."""
    bench = Bench(replicas=3, kinds=["oip", "oip", "oip"])
    caller = bench.send()
    (await bench.backend.expect_batch(rows=1)).fail(FailureKind.BROKEN)
    second = await bench.backend.expect_batch(rows=1)
    at = bench.loop.time()
    second.fail(FailureKind.BROKEN)
    await bench.backend.expect_nothing()
    for replica in bench.backend.replicas:
        replica.set_available(False)
    await asyncio.sleep(DOUBT_S)
    for replica in bench.backend.replicas:
        replica.set_available(True)
    (await bench.backend.expect_batch(rows=1)).reply()
    assert bench.loop.time() >= at + DOUBT_S
    await bench.finish()
    assert caller.answered


@simulated
async def test_a_doubt_never_takes_more_than_half_of_what_is_left() -> None:
    bench = Bench(replicas=3, kinds=["oip", "oip", "oip"])
    caller = bench.send(timeout_s=0.2)
    for _ in range(2):
        (await bench.backend.expect_batch(rows=1)).fail(FailureKind.BROKEN)
    (await bench.backend.expect_batch(rows=1)).reply()
    await bench.finish()
    assert caller.answered
