"""Trial inferences on a simulated loop: when they are made, on whom, and what becomes of their permits."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest

from gateway.core.breaker import State
from gateway.core.fleet import Fleet, Member
from gateway.core.model import BatchPolicy
from gateway.core.outcome import Failure, FailureKind
from gateway.core.request import InputTensor
from gateway.core.resilience import Resilience
from gateway.prober import FIRST_TIMEOUT_S, TIMEOUT_S, WORKER_TIMEOUT_S, Prober, Probers
from tests.scripted import INT64, Bench, Kind, ScriptedBatch, simulated, turns

SAMPLE = (InputTensor(INT64, (1, 1), [7], None),)
INTERVAL_S = 2.0


class Middle:
    """No jitter."""

    def random(self) -> float:
        return 0.5


def state_of(member: Member) -> State:
    return member.breaker.state


def is_sampled(fleet: Fleet) -> bool:
    return fleet.sampled


def permit_of(member: Member) -> float | None:
    return member.breaker.permit_at


class Trial:
    """A bench whose backends are tried."""

    def __init__(self, *kinds: Kind, resilience: Resilience | None = None, slots: int = 2, chance: Any = None) -> None:
        self.bench = Bench(
            BatchPolicy(max_batch_size=8), replicas=len(kinds), slots=slots, kinds=kinds,
            resilience=resilience or Resilience(),
        )  # fmt: skip
        self.backend = self.bench.backend
        self.backend.obeys = True
        self.prober = Prober(
            self.bench.spec, self.bench.scheduler, SAMPLE, INTERVAL_S, chance or Middle(), self.bench.loop.time
        )
        (self.fleet,) = self.bench.scheduler.fleets
        self.prober.start()

    def trip(self, member: Member) -> None:
        """Eject `member` as five failed batches would."""
        now = self.bench.loop.time()
        for _ in range(5):
            self.fleet.began(member, 1, now)
            self.fleet.failed(member, 1, Failure(FailureKind.BROKEN, "scripted"), 0.0, now)
        assert state_of(member) is State.OPEN

    async def finish(self) -> None:
        self.prober.close()
        await self.prober.closed()
        await self.bench.finish()
        assert repr(self.prober).endswith("running=0>")


def answering(trial: Trial, *, fail: Callable[[ScriptedBatch], bool] = lambda _: False) -> None:
    """Every batch is answered at once, or fails."""

    def respond(batch: ScriptedBatch) -> None:
        if batch.ended:
            return
        if fail(batch):
            batch.fail(FailureKind.BROKEN)
        else:
            batch.reply()

    trial.backend.respond = respond


@simulated
async def test_a_silent_remote_backend_is_tried_every_interval_and_workers_never() -> None:
    trial = Trial("oip", "onnx", "oip")
    answering(trial)
    await asyncio.sleep(INTERVAL_S * 3 + 0.5)
    tried = [batch.replica.name for batch in trial.backend.executed]
    assert sorted(tried) == ["host-1"] * 3 + ["host-3"] * 3
    assert all(batch.numbers == [7] for batch in trial.backend.executed)
    await trial.finish()


@simulated
async def test_the_interval_is_spread_by_a_fifth() -> None:
    trial = Trial("oip", chance=random.Random(1))
    answering(trial)
    at: list[float] = []
    trial.backend.inspect = lambda _: at.append(trial.bench.loop.time())
    await asyncio.sleep(60)
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert len(gaps) > 20
    assert all(0.8 * INTERVAL_S - 0.01 <= gap <= 1.2 * INTERVAL_S + 0.01 for gap in gaps)
    assert max(gaps) - min(gaps) > 0.4
    await trial.finish()


@simulated
async def test_a_backend_that_answers_callers_is_not_tried() -> None:
    trial = Trial("oip")
    answering(trial)
    for _ in range(20):
        trial.bench.send()
        await asyncio.sleep(INTERVAL_S / 4)
    assert trial.prober.trials == 0
    await asyncio.sleep(2.5 * INTERVAL_S)
    assert trial.prober.trials >= 1
    await trial.finish()


@simulated
async def test_callers_go_first() -> None:
    """A batch under way says more than a trial would, and no slot is taken from those who wait."""
    trial = Trial("oip")
    trial.bench.send()
    running = await trial.backend.expect_batch(1)
    await asyncio.sleep(4 * INTERVAL_S)
    assert trial.prober.trials == 0
    running.reply()
    answering(trial)
    await asyncio.sleep(2.5 * INTERVAL_S)
    assert trial.prober.trials >= 1
    await trial.finish()


@simulated
async def test_three_trials_that_fail_eject_a_silent_backend_and_three_that_succeed_bring_it_back() -> None:
    trial = Trial("oip", "oip")
    bad = trial.backend.replicas[0]
    ill = True
    answering(trial, fail=lambda batch: ill and batch.replica is bad)
    member = trial.fleet.of(bad)
    await asyncio.sleep(INTERVAL_S * 2 + 0.5)
    assert state_of(member) is State.CLOSED
    await asyncio.sleep(INTERVAL_S)
    assert state_of(member) is State.OPEN
    ill = False
    before = len(trial.backend.executed)
    await asyncio.sleep(1.5)
    assert state_of(member) is State.RAMP
    assert sum(batch.replica is bad for batch in trial.backend.executed[before:]) == 3
    await asyncio.sleep(11)
    assert state_of(member) is State.CLOSED
    await trial.finish()


@simulated
async def test_an_ejected_worker_is_tried_by_the_prober_and_not_by_callers() -> None:
    trial = Trial("onnx", "onnx")
    member = trial.fleet.members[0]
    trial.trip(member)
    answering(trial, fail=lambda batch: batch.replica is member.replica)
    for _ in range(100):
        trial.bench.send()
        await asyncio.sleep(0.05)
    failed = [batch for batch in trial.backend.executed if batch.replica is member.replica]
    assert trial.prober.trials == len(failed) >= 2  # 1 s, then 2 s, ± 20 %
    assert all(batch.numbers == [7] for batch in failed)
    assert all(batch.timeout_s == WORKER_TIMEOUT_S for batch in failed)
    await trial.finish()


@simulated
async def test_a_wrong_answer_to_a_trial_is_a_failure() -> None:
    trial = Trial("oip", "oip")
    bad = trial.backend.replicas[0]

    def respond(batch: ScriptedBatch) -> None:
        batch.reply((lambda answers: [*answers, 1]) if batch.replica is bad else None)

    trial.backend.respond = respond
    await asyncio.sleep(INTERVAL_S * 2 + 0.5)
    member = trial.fleet.of(bad)
    assert state_of(member) is State.OPEN
    assert "answer failed its checks" in member.note
    assert state_of(trial.fleet.members[1]) is State.CLOSED
    await trial.finish()


@simulated
async def test_close_gives_up_what_is_under_way_and_the_permit_is_free_again() -> None:
    trial = Trial("onnx", "onnx")
    member = trial.fleet.members[0]
    trial.trip(member)
    await asyncio.sleep(1.5)
    (running,) = trial.backend.executed
    assert permit_of(member) is not None
    trial.prober.close()
    await trial.prober.closed()
    assert running.cancelled
    assert permit_of(member) is None
    assert state_of(member) is State.HALF_OPEN
    assert not is_sampled(trial.fleet)
    assert trial.fleet.watchers == []
    executed = len(trial.backend.executed)
    await asyncio.sleep(10)
    assert len(trial.backend.executed) == executed
    await trial.finish()


@simulated
async def test_a_full_backend_gives_its_permit_back_and_is_tried_when_it_has_room() -> None:
    trial = Trial("oip", "oip", slots=1)
    member = trial.fleet.members[0]
    member.replica.execute(_Stuck(), 1.0)
    trial.trip(member)
    await asyncio.sleep(2.0)
    assert state_of(member) is State.HALF_OPEN
    assert trial.prober.trials <= 1  # the other one, which is silent
    (stuck,) = trial.backend.replicas[0].running
    stuck.end_early()
    answering(trial)
    await asyncio.sleep(0.6)
    assert state_of(member) is State.RAMP
    await trial.finish()


@simulated
async def test_callers_may_take_the_slot_before_a_trial_that_was_begun_does() -> None:
    trial = Trial("oip", "oip", slots=1)
    member = tripped = trial.fleet.members[0]
    trial.trip(member)
    begin = trial.prober._begin

    def begin_and_lose_the_slot(fleet: Fleet, member: Member) -> bool:
        begun = begin(fleet, member)
        if member is tripped and begun and not member.replica.in_flight:
            member.replica.execute(_Stuck(), 1.0)
        return begun

    trial.prober._begin = begin_and_lose_the_slot  # type: ignore[method-assign]
    await asyncio.sleep(1.5)
    assert trial.backend.complaints == []
    assert permit_of(member) is None
    trial.prober._begin = begin  # type: ignore[method-assign]
    (stuck,) = trial.backend.replicas[0].running
    stuck.end_early()
    answering(trial)
    await asyncio.sleep(0.6)
    assert state_of(member) is State.RAMP
    await trial.finish()


class _Stuck:
    inputs = ()
    outputs = (0,)
    rows = 0
    deadline = 0.0
    sequence = None
    parameters: dict[str, object] = {}  # noqa: RUF012

    def done(self, outcome: object, /) -> None:
        """Nobody waits for it."""


@simulated
async def test_nothing_is_executed_twice_that_must_not_be_and_a_backend_that_can_be_asked_is() -> None:
    trial = Trial("oip", "oip", resilience=Resilience(idempotent=False))
    asked: list[float] = []

    class Asking(type(trial.backend.replicas[0])):  # type: ignore[misc]
        async def ping(self, timeout_s: float, /) -> bool:
            asked.append(timeout_s)
            return False

    trial.backend.replicas[0].__class__ = Asking
    await asyncio.sleep(INTERVAL_S * 3 + 0.5)
    assert trial.backend.executed == []
    assert asked == [FIRST_TIMEOUT_S] * 3
    assert state_of(trial.fleet.members[0]) is State.OPEN
    assert state_of(trial.fleet.members[1]) is State.CLOSED
    assert not is_sampled(trial.fleet)
    await trial.finish()


@simulated
async def test_a_trial_has_at_least_a_second_and_more_where_batches_take_longer() -> None:
    trial = Trial("oip")
    seen: list[float] = []

    def respond(batch: ScriptedBatch) -> None:
        seen.append(batch.timeout_s)
        batch.reply()

    trial.backend.respond = respond
    member = trial.fleet.members[0]
    await asyncio.sleep(INTERVAL_S + 0.5)
    for _ in range(200):
        member.time.observe(1, 0.01, trial.bench.loop.time())
    await asyncio.sleep(2 * INTERVAL_S)
    for _ in range(2000):
        member.time.observe(1, 3.0, trial.bench.loop.time())
    await asyncio.sleep(2 * INTERVAL_S)
    assert seen[:2] == [FIRST_TIMEOUT_S, TIMEOUT_S]
    assert seen[-1] > 3.0
    await trial.finish()


@simulated
async def test_before_callers_showed_how_long_a_batch_takes_the_longest_trial_does() -> None:
    trial = Trial("oip")
    seen: list[float] = []

    def respond(batch: ScriptedBatch) -> None:
        seen.append(batch.timeout_s)
        trial.bench.loop.call_later(1.5, batch.reply)

    trial.backend.respond = respond
    await asyncio.sleep(4 * INTERVAL_S)
    assert seen[:2] == [FIRST_TIMEOUT_S, pytest.approx(4.5)]
    assert trial.backend.running == []
    await trial.finish()


@simulated
async def test_one_that_joins_later_is_tried_and_one_that_left_is_not() -> None:
    trial = Trial("oip")
    answering(trial)
    late = trial.backend.add("oip")
    trial.bench.scheduler.add_replica(late)
    await asyncio.sleep(INTERVAL_S + 0.5)
    assert {batch.replica.name for batch in trial.backend.executed} == {"host-1", "host-2"}
    await trial.bench.scheduler.remove_replica(late)
    before = len(trial.backend.executed)
    await asyncio.sleep(3 * INTERVAL_S)
    assert {batch.replica.name for batch in trial.backend.executed[before:]} == {"host-1"}
    await trial.finish()


@simulated
async def test_nothing_ticks_while_there_is_nothing_to_look_at() -> None:
    trial = Trial("onnx", "onnx")
    looks = 0
    look = trial.prober._look

    def counted() -> None:
        nonlocal looks
        looks += 1
        look()

    trial.prober._look = counted  # type: ignore[method-assign]
    await asyncio.sleep(3600)
    assert looks <= 1
    await trial.finish()


def test_changes_of_state_are_told_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    @simulated
    async def run() -> None:
        trial = Trial("oip", "oip")
        answering(trial)
        trial.trip(trial.fleet.members[0])
        await asyncio.sleep(1.5)
        await trial.finish()

    with caplog.at_level(logging.INFO, "gateway.backends"):
        run()
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert said[0][0] == "WARNING"
    assert said[0][1].startswith("model m: backend host-1 is ejected for ")
    assert "several attempts in a row failed; the last: scripted" in said[0][1]
    assert [(level, text.split(":")[1].strip()) for level, text in said[1:]] == [
        ("INFO", "backend host-1 is on trial"),
        ("INFO", "backend host-1 is ramping up"),
    ]


def test_a_question_and_its_answer_are_not_told_to_the_log_but_a_verdict_is(caplog: pytest.LogCaptureFixture) -> None:
    hung = False

    @simulated
    async def run() -> None:
        nonlocal hung
        trial = Trial("oip", "oip")
        trial.backend.respond = lambda batch: None if hung else batch.reply()
        for hung in (False, False, True):
            await _keep_waiting(trial)
            await asyncio.sleep(0.1)
            assert state_of(trial.fleet.members[0]) is (State.HALF_OPEN if hung else State.CLOSED)
        for batch in [*trial.backend.running]:
            batch.fail(FailureKind.TIMEOUT)
        await turns(20)
        assert state_of(trial.fleet.members[0]) is State.OPEN
        await trial.finish()

    with caplog.at_level(logging.INFO, "gateway.backends"):
        run()
    (said,) = caplog.records
    assert said.levelname == "WARNING"
    assert "failed again while it was on trial" in said.getMessage()


async def _keep_waiting(trial: Trial) -> None:
    """The first backend lets a batch time out in silence; then there is time enough to ask it."""
    member, now = trial.fleet.members[0], trial.bench.loop.time()
    trial.fleet.began(member, 1, now)
    trial.fleet.failed(member, 1, Failure(FailureKind.TIMEOUT, "scripted"), 0.1, now)
    assert state_of(member) is State.OPEN
    await asyncio.sleep(0.03)


@simulated
async def test_who_was_silent_is_asked_once_and_in_time_whoever_else_waits() -> None:
    trial = Trial("oip", "oip")
    at: list[float] = []
    trial.backend.inspect = lambda _: at.append(trial.bench.loop.time())
    trial.backend.respond = lambda batch: batch.reply()
    began = trial.bench.loop.time()
    await _keep_waiting(trial)
    assert at == [pytest.approx(began + 0.02, abs=0.006)]
    assert state_of(trial.fleet.members[0]) is State.CLOSED
    await trial.finish()


@simulated
async def test_who_is_asked_when_the_trials_end_is_asked_by_callers() -> None:
    trial = Trial("oip", "oip")
    trial.backend.respond = lambda _: None
    await _keep_waiting(trial)
    member = trial.fleet.members[0]
    assert permit_of(member) is not None
    trial.prober.close()
    await trial.prober.closed()
    assert permit_of(member) is None
    await asyncio.sleep(0.3)
    answering(trial)
    trial.bench.send()
    await turns(20)
    assert state_of(member) is State.CLOSED
    await trial.finish()


@simulated
async def test_probers_of_versions_come_and_go() -> None:
    bench = Bench(replicas=1, kinds=["oip"])

    class Version:
        spec, scheduler, probe = bench.spec, bench.scheduler, SAMPLE

    probers = Probers(INTERVAL_S, Middle())
    version: Any = Version()
    probers.attach(version)
    fleet: Fleet = bench.scheduler.fleets[0]
    assert is_sampled(fleet)
    probers.detach(version)
    probers.detach(version)
    assert not is_sampled(fleet)
    probers.attach(version)
    await probers.close()
    assert repr(probers) == "<Probers 0>"
    await turns()
    await bench.finish()
