"""Mirroring to a shadow: nobody waits for it, and what it costs is bounded."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway import traffic_shadow
from gateway.backends.interface import FailureKind
from gateway.catalog import ServedVersion
from gateway.core.model import BatchPolicy, ModelSpec
from gateway.core.request import InferRequest, InputTensor, SequenceStep
from gateway.core.scheduling import PLAIN, SequencePolicy
from gateway.core.shadow_comparison import Tolerance
from gateway.errors import Overloaded
from gateway.pipeline import Pipeline
from gateway.scheduler import Scheduler
from gateway.traffic_leisure import Leisure
from gateway.traffic_shadow import Mirror, ShadowRule, unmirrorable
from tests.scripted import Bench, Caller, ScriptedBatch, model_spec, simulated, turns


@dataclass
class Version:
    """As much of a served version as a request meets on its way."""

    name: str
    version: str
    spec: ModelSpec
    scheduler: Scheduler | None
    split_rows: int
    ready: bool = True
    cached: bool = False
    mirror: Any = None
    log: Any = None


class Clock:
    """The loop's, which stands still while code runs: copying costs nothing unless the test says otherwise."""

    def __init__(self) -> None:
        self.ahead = self.step = 0.0
        self._loop = asyncio.get_running_loop()

    def __call__(self) -> float:
        self.ahead += self.step
        return self._loop.time() + self.ahead


class Road:
    """A champion and its shadow on scripted replicas, behind the pipeline."""

    def __init__(
        self,
        share: float = 1.0,
        policy: BatchPolicy | None = None,
        shadow_policy: BatchPolicy | None = None,
        reorder: bool = False,
    ) -> None:
        self.champion_bench = Bench(policy or BatchPolicy(4))
        self.shadow_bench = Bench(shadow_policy or BatchPolicy(4, oversize="split"))
        self.champion = self._version(self.champion_bench, "1")
        self.shadow = self._version(self.shadow_bench, "2")
        if reorder:
            self.shadow.spec = replace(self.shadow.spec, outputs=self.shadow.spec.outputs[::-1])
        self.pipeline = Pipeline()
        self.clock = Clock()
        self.mirror = Mirror(
            cast("ServedVersion", self.champion),
            cast("ServedVersion", self.shadow),
            ShadowRule(share, Tolerance()),
            lambda version, request: self.pipeline.infer(version, request, past_cache=True),
            random.Random(1),
            self.clock,
            Leisure(self.clock, lambda: 0.0),
        )
        self.champion.mirror = self.mirror
        self.callers: list[Caller] = []

    def _version(self, bench: Bench, version: str) -> Version:
        spec = replace(bench.spec, version=version)
        return Version("m", version, spec, bench.scheduler, bench.policy.max_batch_size)

    def send(self, rows: int = 1, **kwargs: Any) -> Caller:
        caller = self.champion_bench.caller(rows, **kwargs)
        self.pipeline.infer(cast("ServedVersion", self.champion), caller.request)
        self.callers.append(caller)
        return caller

    async def answer(self, rows: int) -> None:
        (await self.champion_bench.backend.expect_batch(rows)).reply()
        await turns()

    async def finish(self) -> None:
        await self.champion_bench.scheduler.drained()
        await self.shadow_bench.scheduler.drained()
        await turns()
        for caller in self.callers:
            assert caller.settled == 1
            caller.check()
        statistics = self.mirror.statistics()
        assert (statistics.pending_rows, statistics.pending_bytes) == (0, 0)
        self.champion_bench.scheduler.stop()
        self.shadow_bench.scheduler.stop()


@simulated
async def test_the_caller_is_answered_before_the_shadow_hears_of_it() -> None:
    road = Road()
    caller = road.send(2)
    seen: list[int] = []
    caller.on_settled = lambda: seen.append(road.shadow_bench.scheduler.pending)
    await road.answer(2)
    assert caller.answered
    assert seen == [0], "the copy begins behind the answer"
    assert caller.request.told == b'Inference-Shadow: "m";version="2";digest="sha256:' + b"0" * 64 + b'"\r\n'
    copy = await road.shadow_bench.backend.expect_batch(2)
    assert copy.numbers == caller.numbers
    copy.reply()
    await road.finish()
    compared = road.mirror.statistics().compared
    assert (compared.agreed, compared.differed) == (1, 0)


@simulated
async def test_what_differs_is_counted_and_changes_no_answer() -> None:
    road = Road()
    road.send(2)
    await road.answer(2)
    (await road.shadow_bench.backend.expect_batch(2)).reply(lambda answers: [answers[0], answers[1] + 5])
    await road.finish()
    (seen,) = road.mirror.statistics().compared.outputs
    assert (seen.output, seen.rows, seen.equal_rows, seen.max_absolute) == ("triple", 2, 1, 5.0)


@simulated
async def test_outputs_are_compared_by_name() -> None:
    road = Road(reorder=True)

    def answer(batch: ScriptedBatch) -> None:
        batch.reply()

    road.shadow_bench.backend.respond = answer
    road.send(1, outputs=(0,))
    await road.answer(1)
    await turns()
    statistics = road.mirror.statistics()
    # The scripted replica gives its outputs by place: what is asked for at the shadow's place 1 is "name".
    assert [seen.output for seen in statistics.compared.outputs] == ["triple"]
    assert statistics.compared.differed == 1, "the replica does not know of the other order, and it shows"


@simulated
async def test_rows_of_shared_batches_are_compared_with_their_own() -> None:
    road = Road()
    road.shadow_bench.backend.respond = lambda batch: batch.reply()
    for rows in (1, 2, 1):
        road.send(rows)
    await road.answer(4)
    await road.finish()
    assert road.mirror.statistics().compared.agreed == 3


@simulated
async def test_a_larger_request_is_cut_for_a_shadow_of_smaller_batches() -> None:
    road = Road(shadow_policy=BatchPolicy(2, oversize="split"))
    road.shadow_bench.backend.respond = lambda batch: batch.reply()
    road.send(4)
    await road.answer(4)
    await road.finish()
    assert road.mirror.statistics().compared.agreed == 1


@simulated
async def test_a_share_of_nothing_copies_nothing() -> None:
    road = Road(share=0.0)
    road.mirror._draw = lambda: 0.0
    road.send(1)
    await road.answer(1)
    assert road.mirror.mirrored == 0
    await road.finish()


def test_a_copy_has_its_inputs_by_name() -> None:
    champion = model_spec(BatchPolicy(4))
    (a,) = champion.inputs
    b, c = replace(a, name="b"), replace(a, name="c", optional=True)
    wiring = traffic_shadow._Wiring(replace(champion, inputs=(a, b)), replace(champion, inputs=(b, c, a)))
    sent = [InputTensor(a.datatype, (1, 1), [value], None) for value in (1, 2)]
    request = InferRequest(tuple(sent), 1, 16, None, (0,), None)
    made = wiring.request(traffic_shadow._Copy(request, []))
    assert list(made.inputs) == [sent[1], None, sent[0]]


@simulated
async def test_only_the_share_is_copied() -> None:
    road = Road(share=0.25)
    road.shadow_bench.backend.respond = lambda batch: batch.reply()
    road.champion_bench.backend.respond = lambda batch: batch.reply()
    for _ in range(400):
        road.send(1)
        await turns()
    await road.finish()
    statistics = road.mirror.statistics()
    assert statistics.mirrored + sum(statistics.dropped.values()) == pytest.approx(100, abs=50)
    assert sum(bool(caller.request.told) for caller in road.callers) == statistics.mirrored


@simulated
async def test_batch_mates_are_answered_before_any_copy_is_sent() -> None:
    road = Road()
    seen: list[int] = []
    for _ in range(3):
        road.send(1).on_settled = lambda: seen.append(road.shadow_bench.scheduler.pending)
    await road.answer(3)
    assert seen == [0, 0, 0]
    (await road.shadow_bench.backend.expect_batch(3)).reply()
    await road.finish()


@simulated
async def test_what_the_response_cache_lets_through_was_drawn_before_it() -> None:
    road = Road()
    caller = road.champion_bench.caller()
    road.pipeline.infer(cast("ServedVersion", road.champion), caller.request, past_cache=True)
    await road.answer(1)
    assert caller.answered
    assert road.mirror.statistics().mirrored == 0
    await road.finish()


@simulated
async def test_what_failed_is_not_copied(caplog: pytest.LogCaptureFixture) -> None:
    road = Road()
    caller = road.send(1)
    (await road.champion_bench.backend.expect_batch(1)).fail(FailureKind.SUSPECT)
    await turns()
    assert caller.settled == 1
    assert caller.error is not None
    await road.shadow_bench.backend.expect_nothing()
    assert road.mirror.statistics().mirrored == 0
    assert "could not be copied" not in caplog.text


@simulated
async def test_steps_of_sequences_are_not_copied() -> None:
    road = Road()
    road.send(1, sequence=SequenceStep(1, start=True))
    await road.answer(1)
    await road.shadow_bench.backend.expect_nothing()
    await road.finish()


@simulated
async def test_a_hanging_shadow_costs_copies_and_nothing_else() -> None:
    road = Road()
    road.champion_bench.backend.respond = lambda batch: batch.reply()
    for _ in range(3 * traffic_shadow.MAX_ROWS // 4):
        road.send(4)
        await turns()
    statistics = road.mirror.statistics()
    assert statistics.pending_rows == traffic_shadow.MAX_ROWS
    assert statistics.dropped["full"] == len(road.callers) - statistics.mirrored > 0
    assert all(caller.answered for caller in road.callers)
    assert not road.callers[-1].request.told
    road.mirror.close()
    for batch in road.shadow_bench.backend.running:
        batch.fail(FailureKind.CANCELLED)
    await road.finish()


@simulated
async def test_bytes_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic_shadow, "MAX_BYTES", 100)
    road = Road()
    for _ in range(10):
        road.send(4)
        await road.answer(4)
    statistics = road.mirror.statistics()
    assert 0 < statistics.pending_bytes <= 200
    assert statistics.dropped["full"] == 10 - statistics.mirrored
    road.shadow_bench.backend.respond = lambda batch: batch.reply()
    (await road.shadow_bench.backend.expect_batch(4)).reply()
    await road.finish()


@simulated
async def test_a_shadow_that_cannot_answer_is_not_asked() -> None:
    road = Road()
    road.shadow.ready = False
    caller = road.send(1)
    await road.answer(1)
    assert not caller.request.told
    assert road.mirror.statistics().dropped["unready"] == 1
    await road.finish()


@simulated
async def test_a_full_queue_of_the_shadow_is_counted() -> None:
    road = Road(shadow_policy=BatchPolicy(1, max_queue_rows=1))
    for _ in range(4):
        road.send(1)
        await road.answer(1)
    statistics = road.mirror.statistics()
    assert statistics.dropped["refused"] == 2, "one runs, one waits"
    assert statistics.pending_rows == 2
    road.shadow_bench.backend.respond = lambda batch: batch.reply()
    (await road.shadow_bench.backend.expect_batch(1)).reply()
    await road.finish()


@simulated
async def test_a_shadow_that_fails_is_counted() -> None:
    road = Road()
    road.shadow_bench.backend.respond = lambda batch: batch.fail(FailureKind.SUSPECT)
    road.send(1)
    await road.answer(1)
    await road.finish()
    statistics = road.mirror.statistics()
    assert (statistics.failed, statistics.compared.agreed, statistics.compared.differed) == (1, 0, 0)


@simulated
async def test_a_loop_without_time_copies_less() -> None:
    """Each look at the clock takes a millisecond: copies are paid for from a share of what passes."""
    road = Road()
    road.champion_bench.backend.respond = lambda batch: batch.reply()
    road.shadow_bench.backend.respond = lambda batch: batch.reply()

    road.clock.step = 0.001
    for _ in range(200):
        road.send(1)
        await turns()
    statistics = road.mirror.statistics()
    assert statistics.dropped["busy"] > 100
    assert statistics.mirrored > 0
    road.clock.ahead += 60.0
    caller = road.send(1)
    await turns()
    assert caller.request.told, "a rested loop copies again"
    await road.finish()


class Log:
    """As much of an inference log as a mirror writes to."""

    def __init__(self) -> None:
        self.rows: list[tuple[bool, bytes, str | None]] = []

    def shadowed(self, request: InferRequest, request_id: bytes, ended_s: float, cause: str | None) -> None:
        assert ended_s >= request.received
        self.rows.append((request.error is None, request_id, cause))


@simulated
async def test_the_inference_log_is_told_what_became_of_copies() -> None:
    road = Road()
    road.shadow.log = log = Log()
    known = road.send(1)
    known.on_settled = lambda: setattr(known.request, "answer_id", b"0199-original")
    await road.answer(1)
    (await road.shadow_bench.backend.expect_batch(1)).reply()
    road.send(1)
    await road.answer(1)
    (await road.shadow_bench.backend.expect_batch(1)).fail(FailureKind.SUSPECT)
    await turns()
    await road.finish()
    assert [(ok, cause) for ok, _, cause in log.rows] == [(True, "0199-original"), (False, None)]
    assert len({request_id for _, request_id, _ in log.rows}) == 2


@simulated
async def test_closing_gives_up_what_is_under_way() -> None:
    road = Road()
    road.send(1)
    await road.answer(1)
    hanging = await road.shadow_bench.backend.expect_batch(1)
    road.mirror.close()
    assert road.shadow_bench.scheduler.pending == 0
    assert hanging.cancelled
    hanging.fail(FailureKind.CANCELLED)
    road.send(1)
    await road.answer(1)
    await road.shadow_bench.backend.expect_nothing()
    await road.finish()
    assert road.mirror.statistics().failed == 0


@simulated
async def test_a_refused_request_leaves_no_trace() -> None:
    road = Road(policy=BatchPolicy(4, max_queue_rows=1))
    road.shadow_bench.backend.respond = lambda batch: batch.reply()
    road.send(1)
    await turns()
    road.send(1)
    with pytest.raises(Overloaded):
        road.pipeline.infer(cast("ServedVersion", road.champion), road.champion_bench.caller().request)
    await road.answer(1)
    await road.answer(1)
    await road.finish()
    assert road.mirror.statistics().mirrored == 2


@simulated
async def test_an_answer_that_cannot_be_copied_is_answered_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    road = Road()

    def broken(self: Mirror, request: InferRequest) -> None:
        raise RuntimeError("scripted")

    monkeypatch.setattr(Mirror, "copy", broken)
    caller = road.send(1)
    await road.answer(1)
    assert caller.answered
    await road.finish()


def test_what_cannot_be_mirrored_is_said() -> None:
    assert unmirrorable(model_spec(BatchPolicy(4))) == ""
    assert "sequences" in unmirrorable(model_spec(BatchPolicy(4), replace(PLAIN, sequence=SequencePolicy())))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_whatever_both_do_everybody_is_answered_once_and_nothing_is_left(seed: int) -> None:
    @simulated
    async def history() -> None:
        chance = random.Random(seed)
        road = Road(share=chance.choice([0.3, 1.0]))

        def shadow(batch: ScriptedBatch) -> None:
            end = chance.random()
            if end < 0.6:
                batch.reply(lambda answers: [a + chance.choice([0, 0, 1]) for a in answers])
            elif end < 0.9:
                batch.fail(chance.choice([FailureKind.SUSPECT, FailureKind.BROKEN, FailureKind.NOT_SENT]))
            else:
                asyncio.get_running_loop().call_later(chance.random() * 50, batch.end_early)

        road.champion_bench.backend.respond = lambda batch: batch.reply()
        road.shadow_bench.backend.respond = shadow
        for _ in range(30):
            road.send(chance.randint(1, 4))
            if chance.random() < 0.5:
                await asyncio.sleep(chance.random() * 0.01)
            if chance.random() < 0.1:
                road.shadow.ready = not road.shadow.ready
        if chance.random() < 0.3:
            road.mirror.close()
        await road.finish()
        statistics = road.mirror.statistics()
        ended = statistics.compared.agreed + statistics.compared.differed + statistics.failed
        assert ended + statistics.dropped["refused"] <= statistics.mirrored
        assert sum(bool(caller.request.told) for caller in road.callers) == statistics.mirrored

    history()
