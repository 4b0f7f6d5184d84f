"""Oversized requests: cut into parts, run apart, answered once and whole, or not at all."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.backends.interface import FailureKind, Success
from gateway.catalog import ServedVersion
from gateway.core.model import BatchPolicy, ModelSpec
from gateway.core.request import OutputTensor
from gateway.errors import BackendError, Cancelled, DeadlineExceeded, ModelError, NotReady, Overloaded, TooLarge
from gateway.pipeline import Pipeline
from gateway.scheduler import Scheduler
from tests.scripted import INT64, Bench, Caller, ScriptedBatch, simulated, turns


@dataclass
class Version:
    """As much of a served version as a request meets on its way."""

    spec: ModelSpec
    scheduler: Scheduler | None
    split_rows: int
    cached: bool = False
    mirror: Any = None


class Road:
    """A pipeline into a bench."""

    def __init__(self, policy: BatchPolicy | None = None, replicas: int = 1) -> None:
        self.bench = Bench(policy or BatchPolicy(4, oversize="split"), replicas)
        self.backend = self.bench.backend
        self.version = Version(self.bench.spec, self.bench.scheduler, self.bench.policy.max_batch_size)
        self.pipeline = Pipeline()
        self.callers: list[Caller] = []

    def send(self, rows: int, **kwargs: Any) -> Caller:
        caller = self.bench.caller(rows, **kwargs)
        self.pipeline.infer(cast("ServedVersion", self.version), caller.request)
        self.callers.append(caller)
        return caller

    def abort(self, caller: Caller) -> None:
        caller.request.abort()

    async def finish(self) -> None:
        await self.bench.scheduler.drained()
        await turns()
        for caller in self.callers:
            assert caller.settled == 1
            if caller.answered:
                caller.check()
        assert self.backend.running == []
        queue = self.bench.scheduler.queue_statistics()
        assert (self.bench.scheduler.pending, queue.requests, queue.rows, queue.nbytes, queue.groups) == (0, 0, 0, 0, 0)
        self.bench.scheduler.stop()


@simulated
async def test_a_request_that_fits_goes_straight_through() -> None:
    road = Road()
    caller = road.send(4)
    (await road.backend.expect_batch(rows=4)).reply()
    await road.finish()
    assert caller.answered
    assert caller.request.batch.parts is None


@simulated
@pytest.mark.parametrize("as_values", [True, False])
async def test_the_joined_answer_is_the_unsplit_one(as_values: bool) -> None:
    road = Road(replicas=2)
    caller = road.send(10, as_values=as_values, outputs=(0, 1))
    batches = [await road.backend.expect_batch(rows=4), await road.backend.expect_batch(rows=4)]
    batches[1].reply()  # out of order
    await turns()
    assert caller.settled == 0
    batches[0].reply()
    last = await road.backend.expect_batch(rows=2)
    await asyncio.sleep(0.5)
    last.reply()
    await road.finish()
    assert caller.answered
    batch = caller.request.batch
    assert (batch.rows, caller.request.row) == (10, 0)
    assert [(finished.rows, row) for finished, row in batch.parts] == [(4, 0), (4, 0), (2, 0)]
    assert (batch.input_ns, batch.infer_ns, batch.output_ns) == (3, 30, 3)
    counted = road.bench.scheduler.statistics
    assert counted.success == 1
    assert (counted.compute_input_ns, counted.compute_infer_ns, counted.compute_output_ns) == (3, 30, 3)
    counted.execute.fold()
    assert counted.execute.sum >= 0.5
    executed_ns = round(counted.execute.sum * 1e9)
    assert abs(counted.success_ns - counted.queue_ns - executed_ns) <= 3, "as long as its three batches ran"


@simulated
async def test_parts_share_batches_with_others() -> None:
    road = Road()
    small, large, other = road.send(1), road.send(5), road.send(2)
    for rows in (1, 4, 3):
        (await road.backend.expect_batch(rows)).reply()
    await road.finish()
    assert all(caller.answered for caller in (small, large, other))


@simulated
async def test_a_batch_that_two_parts_shared_is_charged_once() -> None:
    road = Road(BatchPolicy(4))
    caller = road.send(6)
    first = await road.backend.expect_batch(rows=4)
    first.fail(FailureKind.BROKEN)
    (await road.backend.expect_batch(rows=4)).reply()
    (await road.backend.expect_batch(rows=2)).reply()
    await road.finish()
    assert caller.request.batch.attempt == 2
    assert (caller.request.batch.input_ns, caller.request.batch.infer_ns) == (2, 20)


@simulated
async def test_one_failed_part_fails_the_whole_once_and_the_rest_is_not_run() -> None:
    road = Road()
    caller = road.send(12)
    (await road.backend.expect_batch(rows=4)).fail(FailureKind.SUSPECT)
    await road.backend.expect_nothing()
    await road.finish()
    assert isinstance(caller.error, ModelError)


@simulated
async def test_two_parts_that_fail_together_fail_the_whole_once() -> None:
    road = Road(replicas=2)
    caller = road.send(8)
    batches = [await road.backend.expect_batch(rows=4) for _ in range(2)]
    for batch in batches:
        batch.fail(FailureKind.SUSPECT)
    await road.finish()
    assert isinstance(caller.error, ModelError)


@simulated
async def test_a_caller_that_leaves_takes_all_its_parts_along() -> None:
    road = Road()
    caller, mate = road.send(9), road.send(2)
    batch = await road.backend.expect_batch(rows=4)
    road.abort(caller)
    road.abort(caller)
    batch.reply()
    last = await road.backend.expect_batch(rows=2)
    assert last.numbers == mate.numbers
    last.reply()
    await road.finish()
    assert isinstance(caller.error, Cancelled)
    assert mate.answered


@simulated
async def test_leaving_after_the_answer_does_nothing() -> None:
    road = Road()
    caller = road.send(5)
    for rows in (4, 1):
        (await road.backend.expect_batch(rows)).reply()
    road.abort(caller)
    await road.finish()
    assert caller.answered


@simulated
async def test_the_deadline_of_the_whole_is_that_of_its_parts_and_counted_as_one_expiry() -> None:
    road = Road()
    begun = road.bench.loop.time()
    caller = road.send(12, timeout_s=0.5)
    batch = await road.backend.expect_batch(rows=4)
    await asyncio.sleep(1.0)
    assert isinstance(caller.error, DeadlineExceeded)
    assert caller.settled_at - begun == pytest.approx(0.5, abs=0.005)
    batch.reply()
    await road.backend.expect_nothing()
    await road.finish()
    assert road.bench.statistics.rejected.get("deadline", 0) + road.bench.statistics.failures["OTHER"] == 1
    assert sum(road.bench.statistics.failures.values()) == 1  # one request, whatever its parts


@simulated
@pytest.mark.parametrize("policy", [BatchPolicy(4, max_queue_rows=10), BatchPolicy(4, max_queue_bytes=80)])
async def test_all_parts_are_let_in_or_none(policy: BatchPolicy) -> None:
    road = Road(policy)
    with pytest.raises(TooLarge):
        road.send(11)
    await road.backend.expect_nothing()
    queue = road.bench.scheduler.queue_statistics()
    assert (queue.requests, queue.rows, road.bench.scheduler.pending) == (0, 0, 0)
    assert road.bench.statistics.failures["CANCELED"] == 0
    assert sum(road.bench.statistics.rejected.values()) == 1
    caller = road.send(10)
    road.backend.respond = ScriptedBatch.reply
    await road.finish()
    assert caller.answered


@simulated
async def test_a_refused_request_is_never_settled() -> None:
    road = Road(BatchPolicy(4, max_queue_rows=4))
    caller = road.bench.caller(9)
    with pytest.raises(TooLarge):
        road.pipeline.infer(cast("ServedVersion", road.version), caller.request)
    await turns()
    assert caller.settled == 0
    assert caller.request.batch is None
    await road.finish()


@simulated
@pytest.mark.parametrize("rows", [1, 9])
async def test_a_version_that_left_is_not_ready(rows: int) -> None:
    road = Road()
    road.version.scheduler = None
    caller = road.bench.caller(rows)
    with pytest.raises(NotReady, match="'m' version 1"):
        road.pipeline.infer(cast("ServedVersion", road.version), caller.request)
    road.abort(caller)
    assert caller.settled == 0


@simulated
async def test_parts_that_cannot_be_joined_are_the_backend_s_fault() -> None:
    road = Road()
    caller = road.send(6)
    (await road.backend.expect_batch(rows=4)).reply()
    odd = await road.backend.expect_batch(rows=2)
    odd._end(Success([OutputTensor("triple", INT64, (2, 3), bytes(48))], 0, 0, 0))
    await road.finish()
    assert isinstance(caller.error, BackendError)


@simulated
async def test_the_checker_sees_parts_joined_in_the_wrong_order() -> None:
    # Negative control.
    road = Road()
    caller = road.send(6)
    (await road.backend.expect_batch(rows=4)).reply(lambda rows: rows[::-1])
    (await road.backend.expect_batch(rows=2)).reply()
    with pytest.raises(AssertionError):
        caller.check()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, 14), st.sampled_from([0.0, 0.05])),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.tuples(st.just("end"), st.integers(0, 3), st.sampled_from([None, None, None, *FailureKind])),
        st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.02, 0.2])),
    ),
    min_size=3,
    max_size=40,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS, replicas=st.integers(1, 2))
@simulated
async def test_any_mix_of_sizes_settles_once_with_its_own_rows(steps: list[tuple[Any, ...]], replicas: int) -> None:
    road = Road(BatchPolicy(4, max_queue_rows=50, oversize="split"), replicas)
    for step in steps:
        match step:
            case ("send", rows, timeout_s):
                with suppress(Overloaded):
                    road.send(rows, timeout_s=timeout_s, outputs=(0, 1), as_values=rows % 2 == 0)
            case ("abort", index) if road.callers:
                road.abort(road.callers[index % len(road.callers)])
            case ("end", index, kind) if road.backend.running:
                batch = next(itertools.islice(road.backend.running, index % len(road.backend.running), None))
                batch.reply() if kind is None else batch.fail(kind)
            case ("sleep", seconds):
                await asyncio.sleep(seconds)
            case _:
                await turns(1)
        assert all(caller.settled <= 1 for caller in road.callers)
    road.backend.respond = ScriptedBatch.reply
    for batch in road.backend.running:
        batch.reply()
    await road.finish()
