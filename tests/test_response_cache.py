"""The response cache before a scripted model: hits, single flights, everyone settled exactly once; virtual time."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.app import Gateway
from gateway.backends.interface import FailureKind
from gateway.catalog import ServedVersion
from gateway.config import load as load_config
from gateway.core.assembly import slice_rows
from gateway.core.batch import executions
from gateway.core.model import BatchPolicy, ModelSpec
from gateway.core.remembered import Store
from gateway.core.request import InferRequest
from gateway.errors import Cancelled, ConfigError, DeadlineExceeded, ModelError, NoBackend, NotReady, Overloaded
from gateway.observe.record import ModelStatistics
from gateway.pipeline import Pipeline
from gateway.response_cache import ResponseCache
from gateway.scheduler import Scheduler
from tests.scripted import Bench, ScriptedBatch, answer_to, request_of, simulated, turns


class Version:
    """As much of a served version as a request meets on its way."""

    def __init__(self, bench: Bench, split_rows: int = 0) -> None:
        self.spec: ModelSpec = bench.spec
        self.scheduler: Scheduler | None = bench.scheduler
        self.statistics: ModelStatistics = bench.statistics
        self.split_rows = split_rows
        self.cached = True
        self.cache: ResponseCache | None = None
        self.load = 1
        self.mirror: Any = None

    def fingerprint(self) -> bytes:
        return b"m/1/%d" % self.load


class Asker:
    """Sends numbers; checks that the answer is that of its own numbers."""

    def __init__(self, desk: Desk, numbers: list[int], priority: int = 0, **kwargs: Any) -> None:
        self.numbers = numbers
        self.settled = 0
        self.settled_at = 0.0
        self.request: InferRequest = request_of(numbers, **kwargs)
        self.request.priority = priority
        self.request.received = desk.loop.time()
        self.request.settle = self._settle
        self._loop = desk.loop

    def _settle(self, request: InferRequest, /) -> None:
        assert request is self.request
        self.settled += 1
        self.settled_at = self._loop.time()

    @property
    def answered(self) -> bool:
        return self.settled > 0 and self.request.error is None

    @property
    def backends(self) -> list[str]:
        return [execution.backend for execution, _ in executions(self.request.batch, self.request.row)]

    @property
    def cached(self) -> bool:
        return set(self.backends) == {"cache"}

    def check(self) -> None:
        assert self.settled == 1
        assert self.request.error is None, self.request.error
        batch = self.request.batch
        for index in self.request.outputs:
            own = slice_rows(batch.outputs[index], self.request.row, self.request.rows)
            if index == 0:
                assert np.frombuffer(own.data, "<i8").tolist() == [answer_to(number) for number in self.numbers]


class Desk:
    """A pipeline with a cache into a bench."""

    def __init__(
        self, policy: BatchPolicy | None = None, store: Store | None = None, replicas: int = 1, split: bool = False
    ) -> None:
        self.bench = Bench(policy, replicas)
        self.loop = self.bench.loop
        self.backend = self.bench.backend
        self.statistics = self.bench.statistics
        self.version = Version(self.bench, self.bench.policy.max_batch_size if split else 0)
        self.store = Store(1 << 20, None) if store is None else store  # an empty one is false
        execute = partial(Pipeline(self.store).infer, cast("ServedVersion", self.version), past_cache=True)
        self.cache = ResponseCache(self.version, self.store, execute, self.loop.time)
        self.askers: list[Asker] = []
        self.refused = 0

    def ask(self, *numbers: int, **kwargs: Any) -> Asker:
        asker = Asker(self, list(numbers), **kwargs)
        try:
            self.cache.infer(asker.request)
        except Exception:
            self.refused += 1
            raise
        self.askers.append(asker)
        return asker

    async def finish(self) -> None:
        """Everyone was settled once with its own answer, everything is counted, and nothing is left."""
        await self.bench.scheduler.drained()
        await turns()
        for asker in self.askers:
            assert asker.settled == 1, (asker.numbers, asker.settled)
            if asker.answered:
                asker.check()
        assert self.cache._flights == {}
        assert self.cache.waiting_rows == 0
        assert self.backend.running == []
        assert self.bench.scheduler.pending == 0
        answered = sum(asker.answered for asker in self.askers)
        counted = self.statistics
        assert counted.success == answered
        assert counted.cache_hits == sum(asker.cached for asker in self.askers if asker.answered)
        assert sum(counted.failures.values()) == len(self.askers) - answered + self.refused
        self.bench.scheduler.stop()


@simulated
async def test_the_second_time_is_a_hit() -> None:
    desk = Desk()
    first = desk.ask(1, 2)
    (await desk.backend.expect_batch(rows=2)).reply()
    await turns()
    again, other = desk.ask(1, 2), desk.ask(1, 3)
    (await desk.backend.expect_batch(rows=2)).reply()
    await desk.finish()
    assert (first.cached, again.cached, other.cached) == (False, True, False)
    counted = desk.statistics
    assert (counted.success, counted.cache_hits, counted.cache_misses) == (3, 1, 2)
    assert (counted.inference_count, counted.execution_count) == (4, 2)


@simulated
async def test_a_hit_names_the_execution_that_made_it() -> None:
    desk = Desk()
    mate, first = desk.ask(7), desk.ask(1)
    (await desk.backend.expect_batch(rows=2)).reply()
    await turns()
    hit = desk.ask(1)
    await desk.finish()
    made = first.request.batch
    assert (made.rows, first.request.row, mate.request.row) == (2, 1, 0)
    (execution, row), *others = executions(hit.request.batch, hit.request.row)
    assert others == []
    assert (execution.backend, execution.batch_id, execution.rows, row) == ("cache", made.batch_id, 2, 1)
    assert (hit.request.batch.rows, hit.request.batch.infer_ns) == (1, 0)


@simulated
async def test_a_hit_is_not_settled_inside_infer() -> None:
    desk = Desk()
    desk.ask(1)
    (await desk.backend.expect_batch(rows=1)).reply()
    await turns()
    hit = desk.ask(1)
    assert hit.settled == 0
    await desk.finish()


@simulated
async def test_a_caller_that_leaves_before_its_hit_is_not_answered() -> None:
    desk = Desk()
    desk.ask(1)
    (await desk.backend.expect_batch(rows=1)).reply()
    await turns()
    hit = desk.ask(1)
    hit.request.abort()
    await desk.finish()
    assert isinstance(hit.request.error, Cancelled)
    assert desk.statistics.failures["CANCELED"] == 1


@simulated
async def test_other_outputs_of_the_same_input_hit() -> None:
    desk = Desk()
    desk.ask(1, outputs=(0,))
    (await desk.backend.expect_batch(rows=1)).reply()
    await turns()
    hit = desk.ask(1, outputs=(1,), as_values=False)
    await desk.finish()
    assert hit.cached
    assert set(hit.request.batch.outputs) == {0, 1}


@simulated
async def test_another_load_of_the_model_does_not_hit() -> None:
    desk = Desk()
    desk.ask(1)
    (await desk.backend.expect_batch(rows=1)).reply()
    await turns()
    desk.version.load = 2
    miss = desk.ask(1)
    (await desk.backend.expect_batch(rows=1)).reply()
    await desk.finish()
    assert not miss.cached


@simulated
async def test_an_answer_that_would_be_another_by_now_is_not_kept() -> None:
    desk = Desk()
    desk.ask(1)
    batch = await desk.backend.expect_batch(rows=1)
    desk.version.load = 2  # a step's model was replaced while the request was on its way
    batch.reply()
    await desk.finish()
    assert len(desk.store) == 0


@simulated
async def test_an_answer_ages() -> None:
    desk = Desk(store=Store(1 << 20, ttl_s=2.0))
    desk.ask(1)
    (await desk.backend.expect_batch(rows=1)).reply()
    await asyncio.sleep(1.9)
    young = desk.ask(1)
    await asyncio.sleep(0.2)
    old = desk.ask(1)
    (await desk.backend.expect_batch(rows=1)).reply()
    await desk.finish()
    assert (young.cached, old.cached) == (True, False)


# -- flights ---------------------------------------------------------------------------------------------------------


@simulated
async def test_equal_requests_under_way_share_one_execution() -> None:
    desk = Desk(replicas=2)
    askers = [desk.ask(5) for _ in range(4)]
    batch = await desk.backend.expect_batch(rows=1)
    askers += [desk.ask(5), desk.ask(5)]
    await desk.backend.expect_nothing()
    batch.reply()
    await desk.finish()
    assert [asker.cached for asker in askers] == [False, True, True, True, True, True]
    assert (desk.statistics.inference_count, desk.statistics.cache_misses) == (1, 1)


@simulated
async def test_a_leader_that_leaves_does_not_take_its_followers_along() -> None:
    desk = Desk()
    leader, follower, last = desk.ask(5), desk.ask(5), desk.ask(5)
    batch = await desk.backend.expect_batch(rows=1)
    leader.request.abort()
    await turns()
    assert isinstance(leader.request.error, Cancelled)
    assert follower.settled == 0
    batch.reply()
    await desk.finish()
    assert [follower.cached, last.cached] == [False, True]  # one of those who are left counts as executed
    assert desk.statistics.failures["CANCELED"] == 1


@simulated
async def test_when_all_have_left_the_row_is_not_executed() -> None:
    desk = Desk()
    busy = desk.ask(1)
    running = await desk.backend.expect_batch(rows=1)
    leader, follower = desk.ask(5), desk.ask(5)
    leader.request.abort()
    follower.request.abort()
    running.reply()
    await desk.backend.expect_nothing()
    await desk.finish()
    assert busy.answered
    assert desk.statistics.failures["CANCELED"] == 2


@simulated
async def test_a_follower_that_leaves_is_the_only_one_who_notices() -> None:
    desk = Desk()
    leader, follower, last = desk.ask(5), desk.ask(5), desk.ask(5)
    follower.request.abort()
    (await desk.backend.expect_batch(rows=1)).reply()
    await desk.finish()
    assert leader.answered
    assert last.answered


@simulated
async def test_when_the_leader_s_time_is_up_the_next_one_asks_anew() -> None:
    desk = Desk()
    begun = desk.loop.time()
    leader, follower, last = desk.ask(5, timeout_s=0.1), desk.ask(5), desk.ask(5)
    stuck = await desk.backend.expect_batch(rows=1)
    await asyncio.sleep(0.2)
    assert isinstance(leader.request.error, DeadlineExceeded)
    assert leader.settled_at - begun == pytest.approx(0.1, abs=0.005)
    assert (follower.settled, last.settled) == (0, 0)
    stuck.reply()
    (await desk.backend.expect_batch(rows=1)).reply()
    await desk.finish()
    assert (follower.cached, last.cached) == (False, True)


@simulated
async def test_a_follower_keeps_its_own_deadline() -> None:
    desk = Desk()
    begun = desk.loop.time()
    leader, follower = desk.ask(5), desk.ask(5, timeout_s=0.1)
    batch = await desk.backend.expect_batch(rows=1)
    await asyncio.sleep(0.3)
    assert isinstance(follower.request.error, DeadlineExceeded)
    assert follower.settled_at - begun == pytest.approx(0.1, abs=0.005)
    batch.reply()
    await desk.finish()
    assert leader.answered
    assert desk.statistics.rejected == {"deadline": 1}


@simulated
async def test_a_failure_of_the_model_is_everybody_s_answer_and_is_not_kept() -> None:
    desk = Desk()
    askers = [desk.ask(5) for _ in range(3)]
    (await desk.backend.expect_batch(rows=1)).fail(FailureKind.SUSPECT)
    await turns()
    assert all(isinstance(asker.request.error, ModelError) for asker in askers)
    assert {asker.request.avoid for asker in askers} == {"onnx-1"}
    retry = desk.ask(5)
    (await desk.backend.expect_batch(rows=1)).reply()
    await desk.finish()
    assert not retry.cached
    assert desk.statistics.failures["BACKEND"] == 3


@simulated
async def test_when_no_worker_is_left_all_are_told() -> None:
    desk = Desk()
    askers = [desk.ask(5) for _ in range(3)]
    error = NoBackend("none")
    desk.bench.scheduler.fail_waiting(error)
    await desk.finish()
    assert all(isinstance(asker.request.error, NoBackend) for asker in askers)


@simulated
async def test_other_priorities_do_not_wait_for_a_flight() -> None:
    desk = Desk(replicas=2)
    desk.ask(5)
    urgent = desk.ask(5, priority=1)
    (await desk.backend.expect_batch(rows=2)).reply()
    await desk.finish()
    assert not urgent.cached


@simulated
async def test_who_waits_for_flights_is_bounded() -> None:
    desk = Desk(BatchPolicy(8, max_queue_rows=3))
    desk.ask(5)
    await desk.backend.expect_batch(rows=1)
    for _ in range(3):
        desk.ask(5)
    with pytest.raises(Overloaded, match="Exceeds maximum queue size"):
        desk.ask(5)
    desk.backend.running[0].reply()
    await desk.finish()


@simulated
async def test_a_refused_leader_is_refused_and_leaves_nothing_behind() -> None:
    desk = Desk(BatchPolicy(1, max_queue_rows=1))
    desk.ask(1)
    batch = await desk.backend.expect_batch(rows=1)
    desk.ask(2)
    with pytest.raises(Overloaded):
        desk.ask(3)
    batch.reply()
    (await desk.backend.expect_batch(rows=1)).reply()
    await desk.finish()


@simulated
async def test_a_version_that_left_is_not_ready() -> None:
    desk = Desk()
    desk.version.scheduler = None
    with pytest.raises(NotReady):
        desk.cache.infer(Asker(desk, [1]).request)
    assert desk.cache._flights == {}


@simulated
async def test_an_oversized_request_is_kept_whole() -> None:
    desk = Desk(BatchPolicy(2, oversize="split"), split=True)
    desk.ask(1, 2, 3)
    for rows in (2, 1):
        (await desk.backend.expect_batch(rows)).reply()
    await turns()
    hit = desk.ask(1, 2, 3)
    await desk.finish()
    assert hit.backends == ["cache", "cache"]
    hit.check()


@simulated
async def test_requests_too_large_to_look_up_pass_by() -> None:
    desk = Desk()
    for _ in range(2):
        asker = Asker(desk, [1])
        asker.request.nbytes = 5 * 1024 * 1024
        desk.cache.infer(asker.request)
        (await desk.backend.expect_batch(rows=1)).reply()
        await turns()
        asker.check()
    assert (desk.statistics.cache_hits, desk.statistics.cache_misses) == (0, 0)


def test_the_configuration_decides_how_much_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("server: {response_cache: {max_bytes: 5000, ttl_s: 2.5}}")
    store = Gateway(load_config(file, {}, {})).models.pipeline._store
    assert store is not None
    assert (store.max_bytes, store.ttl_s) == (5000, 2.5)
    file.write_text("server: {response_cache: {max_bytes: 1}}")
    with pytest.raises(ConfigError, match="max_bytes"):
        load_config(file, {}, {})


@simulated
async def test_the_checker_sees_an_answer_of_another_input() -> None:
    # Negative control: a key that forgets the content.
    desk = Desk()
    desk.ask(1)
    (await desk.backend.expect_batch(rows=1)).reply()
    await turns()
    entry = next(iter(desk.store._entries.values()))
    wrong = Asker(desk, [2])
    desk.cache.answer(wrong.request, entry.answer, desk.loop.time())
    with pytest.raises(AssertionError):
        wrong.check()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(1, 3), st.sampled_from([0.0, 0.0, 0.05]), st.integers(0, 1)),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.tuples(st.just("end"), st.integers(0, 3), st.sampled_from([None, None, None, *FailureKind])),
        st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.02, 0.2])),
        st.tuples(st.just("reload")),
    ),
    min_size=3,
    max_size=40,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS, replicas=st.integers(1, 2), split=st.booleans(), small=st.booleans())
@simulated
async def test_any_history_settles_everyone_once_with_its_own_answer(
    steps: list[tuple[Any, ...]], replicas: int, split: bool, small: bool
) -> None:
    policy = BatchPolicy(2, max_queue_rows=12, oversize="split")
    desk = Desk(policy, Store(1000 if small else 100_000, ttl_s=0.3), replicas, split=split)
    for step in steps:
        match step:
            case ("ask", number, timeout_s, priority):
                numbers = list(range(number, number + (3 if split and number == 3 else 1)))
                with suppress(Overloaded):
                    outputs = (0, 1)[: number % 2 + 1]
                    desk.ask(
                        *numbers, priority=priority, timeout_s=timeout_s, as_values=timeout_s == 0.0, outputs=outputs
                    )
            case ("abort", index) if desk.askers:
                desk.askers[index % len(desk.askers)].request.abort()
            case ("end", index, kind) if desk.backend.running:
                batch = desk.backend.running[index % len(desk.backend.running)]
                batch.reply() if kind is None else batch.fail(kind)
            case ("sleep", seconds):
                await asyncio.sleep(seconds)
            case ("reload",):
                desk.version.load += 1
            case _:
                await turns(1)
        assert all(asker.settled <= 1 for asker in desk.askers)
        assert desk.store.nbytes <= desk.store.max_bytes
    desk.backend.respond = ScriptedBatch.reply
    for batch in desk.backend.running:
        batch.reply()
    await desk.finish()
