"""Second executions on a simulated loop: what is drawn, where it runs, and that callers never notice."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np
import pytest

from gateway.agreement_sampling import LOG_INTERVAL_S, MAX_BYTES, AgreementSampler, AgreementSamplers
from gateway.core.agreement import Outcome
from gateway.core.model import BatchPolicy
from gateway.core.outcome import FailureKind
from gateway.core.resilience import Resilience
from tests.scripted import Bench, Kind, ScriptedBatch, simulated, turns


class Always:
    """Everything is drawn."""

    def random(self) -> float:
        return 0.0


class Half:
    """Every second one is drawn at a share of one half."""

    def __init__(self) -> None:
        self._last = 0.0

    def random(self) -> float:
        self._last = 0.75 - self._last
        return self._last


class Twice:
    """A bench whose batches are executed a second time."""

    def __init__(self, *kinds: Kind, share: float = 1.0, slots: int = 1, chance: Any = None) -> None:
        self.bench = Bench(
            BatchPolicy(max_batch_size=8), len(kinds), slots, kinds=kinds, resilience=Resilience(agreement=share)
        )
        self.backend = self.bench.backend
        self.sampler = AgreementSampler(self.bench.spec, self.bench.scheduler, chance or Always(), self.bench.loop.time)
        self.sampler.start()

    def counted(self, outcome: Outcome) -> int:
        return self.sampler.statistics().batches[outcome]

    async def first(self, rows: int = 1) -> ScriptedBatch:
        """The batch of a new caller."""
        self.bench.send(rows)
        return await self.backend.expect_batch(rows)


@simulated
async def test_a_batch_is_executed_again_elsewhere_after_its_caller_was_answered() -> None:
    twice = Twice("onnx", "oip")
    caller = twice.bench.send(3)
    first = await twice.backend.expect_batch(3)
    answered: list[bool] = []
    twice.backend.inspect = lambda _: answered.append(caller.answered)
    first.reply()
    again = await twice.backend.expect_batch(3)
    assert answered == [True]
    assert again.replica is not first.replica
    assert again.numbers == first.numbers
    assert again.lane is None
    again.reply()
    statistics = twice.sampler.statistics()
    assert statistics.batches == {"agreed": 1, "differed": 0, "failed": 0, "skipped": 0}
    (output,) = statistics.outputs
    assert (output.output, output.max_absolute, output.min_equal_rows) == ("triple", 0.0, 1.0)
    await twice.bench.finish()


@simulated
async def test_another_answer_is_a_disagreement_and_nobody_but_the_counters_notices() -> None:
    twice = Twice("onnx", "oip")
    (await twice.first(2)).reply()
    (await twice.backend.expect_batch(2)).reply(lambda answers: [answers[0], answers[1] + 5])
    assert twice.counted("differed") == 1
    (output,) = twice.sampler.statistics().outputs
    assert (output.max_absolute, output.min_equal_rows) == (5.0, 0.5)
    await twice.bench.finish()
    assert twice.bench.statistics.success == 1
    assert sum(twice.bench.statistics.attempts.values()) == 1


@simulated
async def test_two_workers_run_one_file_and_are_not_compared_but_two_servers_are() -> None:
    workers, servers = Twice("onnx", "onnx"), Twice("oip", "oip")
    (await workers.first()).reply()
    await workers.backend.expect_nothing()
    assert workers.counted("skipped") == 1
    (await servers.first()).reply()
    (await servers.backend.expect_batch(1)).reply()
    assert servers.counted("agreed") == 1
    await workers.bench.finish()
    await servers.bench.finish()


@simulated
async def test_no_slot_is_taken_while_somebody_waits_or_it_would_be_the_last() -> None:
    twice = Twice("onnx", "oip")
    first, second = await twice.first(), await twice.first()
    third = twice.bench.send()
    first.reply()  # the third takes its place
    await turns()
    assert twice.counted("skipped") == 1
    second.reply()  # now the other one is free, but the third's is not: one slot must stay
    await turns()
    assert twice.counted("skipped") == 2
    (running,) = twice.backend.running
    running.reply()
    await turns()
    assert third.answered
    (again,) = twice.backend.running
    again.reply()
    assert twice.counted("agreed") == 1
    await twice.bench.finish()


@simulated
async def test_a_backend_that_nobody_could_replace_is_left_to_callers() -> None:
    twice = Twice("onnx", "oip")
    first = await twice.first()
    fleet = twice.bench.scheduler.fleets[0]
    (member,) = [one for one in fleet.members if one.replica is first.replica]
    fleet.force(member, "open", twice.bench.loop.time())
    first.reply()
    await twice.backend.expect_nothing()
    assert twice.counted("skipped") == 1
    await twice.bench.finish()


@simulated
async def test_the_slot_of_a_second_run_goes_to_whoever_waits_as_soon_as_it_ends() -> None:
    twice = Twice("onnx", "oip")
    first = await twice.first()
    await asyncio.sleep(0.01)
    first.reply(infer_ns=10_000_000)
    again = await twice.backend.expect_batch(1)
    one = await twice.first()
    twice.bench.send()
    await twice.backend.expect_nothing()
    again.reply()
    at = twice.bench.loop.time()
    two = await twice.backend.expect_batch(1)
    assert two.replica is again.replica
    assert twice.bench.loop.time() == at
    one.reply()
    two.reply()
    await turns()
    for batch in twice.backend.running:
        batch.reply()
    await twice.bench.finish()


@simulated
async def test_the_share_is_kept() -> None:
    twice = Twice("onnx", "oip", share=0.5, chance=Half())
    twice.backend.respond = lambda batch: batch.reply()
    for _ in range(10):
        twice.bench.send()
        await turns(12)
    assert twice.counted("agreed") == 5
    assert len(twice.backend.executed) == 15
    await twice.bench.finish()


@simulated
async def test_a_second_run_that_fails_is_counted_and_blames_nobody() -> None:
    twice = Twice("onnx", "oip")
    (await twice.first()).reply()
    again = await twice.backend.expect_batch(1)
    again.fail(FailureKind.BROKEN)
    assert twice.counted("failed") == 1
    (await twice.first()).reply()
    (await twice.backend.expect_batch(1)).reply(lambda answers: [*answers, 1])
    assert twice.counted("failed") == 2
    assert twice.bench.statistics.attempts == {("onnx-1", "ok"): 1, ("host-2", "ok"): 1} or (
        list(twice.bench.statistics.attempts.values()) == [2]
    )
    await twice.bench.finish()


@simulated
async def test_large_batches_are_not_copied() -> None:
    twice = Twice("onnx", "oip")
    first = await twice.first()
    batch: Any = first._batch
    for one in batch.inputs:
        one.nbytes = MAX_BYTES + 1
    first.reply()
    await twice.backend.expect_nothing()
    assert twice.counted("skipped") == 1
    await twice.bench.finish()


@simulated
async def test_the_copy_does_not_change_when_the_callers_bytes_do() -> None:
    twice = Twice("onnx", "oip")
    caller = twice.bench.caller(2, as_values=False)
    body = bytearray(np.array(caller.numbers, "<i8").tobytes())
    tensor = caller.request.inputs[0]
    assert tensor is not None
    tensor.buffer = memoryview(body)
    twice.bench.scheduler.submit(caller.request)
    twice.bench.callers.append(caller)
    first = await twice.backend.expect_batch(2)
    caller.on_settled = lambda: body.__setitem__(slice(None), bytes(len(body)))
    first.reply()
    again = await twice.backend.expect_batch(2)
    assert again.numbers == caller.numbers
    again.reply()
    assert twice.counted("agreed") == 1
    await twice.bench.finish()


@simulated
async def test_close_gives_up_the_run_under_way() -> None:
    twice = Twice("onnx", "oip")
    twice.backend.obeys = True
    (await twice.first()).reply()
    again = await twice.backend.expect_batch(1)
    twice.sampler.close()
    await turns()
    assert again.cancelled
    assert again.ended
    (await twice.first()).reply()
    await twice.backend.expect_nothing()
    await twice.bench.finish()


def test_disagreements_are_told_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    @simulated
    async def run() -> None:
        twice = Twice("onnx", "oip")
        for pause_s in (0.0, 1.0, LOG_INTERVAL_S):
            twice.bench.loop._simulated.now += pause_s  # type: ignore[attr-defined]
            (await twice.first()).reply()
            (await twice.backend.expect_batch(1)).reply(lambda answers: [answer + 1 for answer in answers])
        assert twice.counted("differed") == 3
        await twice.bench.finish()

    with caplog.at_level(logging.WARNING, "gateway.agreement"):
        run()
    one, two = [record.getMessage() for record in caplog.records]
    assert "answers otherwise than the backend that answered the caller: output 'triple' by up to 1 (" in one
    assert "0% of the rows are equal" in one
    assert two.endswith("(1 more since the last such line)")


@simulated
async def test_only_models_that_ask_for_it_and_may_be_executed_twice_are_sampled() -> None:
    samplers = AgreementSamplers(Always())
    for resilience, wanted in (
        (Resilience(), False),
        (Resilience(agreement=0.5, idempotent=False), False),
        (Resilience(agreement=0.5), True),
    ):
        bench = Bench(replicas=2, kinds=["onnx", "oip"], resilience=resilience)

        class Version:
            spec, scheduler = bench.spec, bench.scheduler

        version: Any = Version()
        samplers.attach(version)
        assert (samplers.statistics(version) is not None) is wanted
        assert (bench.scheduler.on_executed is not None) is wanted
        samplers.detach(version)
        samplers.detach(version)
        assert bench.scheduler.on_executed is None
        await bench.finish()
