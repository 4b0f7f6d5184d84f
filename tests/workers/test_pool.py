"""The pool on real processes: placement, death, hanging, crash loops, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from gateway.backends.interface import FailureKind, Success
from gateway.backends.onnx import LoadedModel, LoadOptions, OnnxPool, OnnxReplica
from gateway.core.request import InputTensor
from gateway.core.tensor import DATATYPE
from gateway.errors import ModelError, NotReady
from gateway.workers import supervision
from gateway.workers.attempt import WarmUp
from gateway.workers.keeper import Keeper
from tests.cut_off import CutOff
from tests.workers.rig import (
    GRIND_WIDTH,
    ROW,
    TestBatch,
    alive,
    array_batch,
    artifact,
    executing,
    floats,
    gather,
    grind,
    identity,
    kinds,
    load_one,
    long_batch,
    matmul,
    open_fds,
    pid_of,
    pool_of,
    run,
    serves,
    short_batch,
    stop_process,
    until,
    worker_of,
    worker_pids,
)


def short_batch_on(replica: OnnxReplica) -> TestBatch:
    batch = short_batch()
    replica.execute(batch, 60.0)
    return batch


# --- Placement --------------------------------------------------------------------------------------------------------


async def test_instances_go_to_different_workers_least_loaded_first() -> None:
    async with pool_of(3) as (pool, _):
        names = []
        for n in range(3):
            model = await pool.load(artifact(matmul(), f"m{n}"), LoadOptions(instances=2))
            names.append(sorted(replica.name for replica in model.replicas))
        assert names == [["onnx-1", "onnx-2"], ["onnx-1", "onnx-3"], ["onnx-2", "onnx-3"]]
        assert [len(worker.models) for worker in pool.statistics().workers] == [2, 2, 2]


async def test_more_instances_than_workers_share_one() -> None:
    async with pool_of(1) as (pool, _):
        model = await pool.load(artifact(matmul()), LoadOptions(instances=3))
        assert [replica.name for replica in model.replicas] == ["onnx-1"] * 3
        assert all([await serves(replica) for replica in model.replicas])


@pytest.mark.parametrize("dedicated", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_a_load_that_is_given_up_at_any_await_leaves_nothing_behind(dedicated: bool) -> None:
    """A worker keeps the threads of sessions that ended for those to come, so as many as before are enough."""
    options = LoadOptions(1 if dedicated else 2, dedicated)
    async with pool_of(1) as (pool, _):
        await pool.unload(await pool.load(artifact(matmul()), options))
        (shared,) = worker_pids(pool)
        threads = threads_of(shared)
        for at in itertools.count(1):
            loading = load_cut_off(pool, options, at)
            await asyncio.wait({loading})
            if not loading.cancelled():
                await pool.unload(loading.result())
                break
            await until(lambda: not pool._unfinished, "the end of what was begun")
        assert at > 1
        assert repr(pool) == "<WorkerPool workers=1 models=0>"
        assert worker_pids(pool) == [shared]
        assert pool.statistics().workers[0].models == ()
        assert threads_of(shared) == threads


def threads_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def load_cut_off(pool: OnnxPool, options: LoadOptions, at: int) -> asyncio.Task[LoadedModel[OnnxReplica]]:
    """A load that is cancelled when its work waits for the `at`-th time."""

    async def cut_off(model: LoadedModel[OnnxReplica]) -> None:
        await CutOff(OnnxPool._add_instances(pool, model), at, loading.cancel)

    pool._add_instances = cut_off  # type: ignore[method-assign]
    loading = asyncio.ensure_future(pool.load(artifact(matmul()), options))
    return loading


async def test_dedicated_instances_have_processes_of_their_own() -> None:
    async with pool_of(1) as (pool, _):
        model = await pool.load(artifact(matmul(), "digits"), LoadOptions(instances=2, dedicated=True))
        assert [replica.name for replica in model.replicas] == ["onnx-digits-1", "onnx-digits-2"]
        assert len(set(worker_pids(pool))) == 3
        assert await serves(model.replicas[1])
        pids = worker_pids(pool)
        await model.unload()
        assert [worker.name for worker in pool.statistics().workers] == ["onnx-1"]
        assert sum(alive(pid) for pid in pids) == 1


async def test_a_worker_that_gives_way_to_others_does_so_once_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[bool] = []
    setpriority = os.setpriority

    def watched(which: int, who: int, priority: int) -> None:
        started.append("onnxruntime" in Path(f"/proc/{who}/maps").read_text())
        setpriority(which, who, priority)

    monkeypatch.setattr(os, "setpriority", watched)
    async with pool_of(1) as (pool, _):
        options = LoadOptions(instances=1, dedicated=True, intra_op_threads=2, niceness=19)
        model = await pool.load(artifact(matmul(), "digits"), options)
        assert await serves(model.replicas[0])
        assert started, "it was never told to give way"
        assert all(started), "a busy machine would never let it start"
        threads = [int(task.name) for task in Path(f"/proc/{pid_of(pool, 'onnx-digits-1')}/task").iterdir()]
        assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {19}
        assert os.getpriority(os.PRIO_PROCESS, pid_of(pool, "onnx-1")) == os.getpriority(os.PRIO_PROCESS, 0)


async def test_what_the_workers_run_is_known() -> None:
    async with pool_of(1) as (pool, _):
        assert pool.onnxruntime.count(".") == 2
        (worker,) = pool.statistics().workers
        assert worker.rss_bytes > 1_000_000
        assert worker.state == "ready"


# --- Loading ----------------------------------------------------------------------------------------------------------


async def test_a_model_that_is_refused_leaves_nothing() -> None:
    async with pool_of(2) as (pool, _):
        before = open_fds()
        for dedicated in (False, True):
            with pytest.raises(ModelError, match="model 'bad' version 1: the file is not an ONNX model"):
                await pool.load(artifact(b"junk", "bad"), LoadOptions(dedicated=dedicated))
        assert await settled_fds() <= before
        assert pool.statistics().models == 0
        assert [worker.name for worker in pool.statistics().workers] == ["onnx-1", "onnx-2"]


async def test_a_worker_that_dies_during_a_load_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool_of(2) as (pool, _):
        await stop_process(pid_of(pool, "onnx-1"))
        load = asyncio.create_task(load_one(pool, matmul()))
        channel = pool._keepers[0].channel
        assert channel is not None
        await until(lambda: bool(channel._questions), "LOAD on its way")
        os.kill(channel.pid, signal.SIGKILL)
        model = await load
        assert model.replicas[0].name == "onnx-2"
        assert await serves(model.replicas[0])


async def test_a_load_that_never_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool_of(1) as (pool, _):
        pool.load_timeout_s = 0.05
        await stop_process(pid_of(pool, "onnx-1"))
        monkeypatch.setattr("gateway.workers.pool.LOAD_TRIES", 1)
        with pytest.raises(ModelError, match=r"breaks its worker process on loading: .* did not answer within 0.05 s"):
            await load_one(pool, matmul())
        pool.load_timeout_s = 60.0
        assert await serves((await load_one(pool, matmul())).replicas[0])


async def test_a_pool_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    pool = OnnxPool(workers=2)
    with pytest.raises(NotReady, match="worker onnx-1 died"):
        await pool.start()
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    with pytest.raises(NotReady, match="could not be started"):
        await pool.start()


async def test_a_closed_pool_loads_nothing() -> None:
    async with pool_of(1) as (pool, _):
        await pool.close()
        with pytest.raises(NotReady):
            await load_one(pool, matmul())


# --- Death ------------------------------------------------------------------------------------------------------------


async def test_kill_9_mid_batch_is_seen_at_once_and_made_good() -> None:
    async with pool_of(2) as (pool, events):
        model = await pool.load(artifact(grind()), LoadOptions(instances=2))
        replica, other = model.replicas
        flips: list[bool] = []
        replica.set_listener(lambda: flips.append(replica.available))
        batch = long_batch()
        replica.execute(batch, 60.0)
        pid = (await executing(model)).pid
        os.kill(pid, signal.SIGKILL)
        assert await batch.failure(FailureKind.BROKEN) == "worker onnx-1 died"
        assert (replica.available, replica.free_slots, replica.in_flight) == (False, 0, 0)
        await short_batch_on(other).success()
        await until(lambda: replica.available)
        assert flips == [False, True]
        await short_batch_on(replica).success()
        assert pid_of(pool, "onnx-1") != pid
        await until(lambda: kinds(events)[-1] == "worker_ready")
        died = next(event for event in events if event.kind == "worker_died")
        assert (died.worker, died.pid, died.text) == ("onnx-1", pid, "signal SIGKILL")
        assert kinds(events)[-3:] == ["worker_died", "worker_started", "worker_ready"]
        assert (replica.restarts, other.restarts) == (1, 0)
        assert pool.statistics().restarts == 1


async def test_a_batch_for_a_dead_worker_is_not_sent() -> None:
    async with pool_of(1) as (pool, _):
        model = await load_one(pool, matmul())
        channel = model.instances[0].channel
        assert channel is not None
        os.kill(channel.pid, signal.SIGKILL)
        await until(lambda: not model.replicas[0].available)
        batch = array_batch(ROW)
        model.replicas[0].execute(batch, 60.0)
        assert not batch.outcomes
        await batch.failure(FailureKind.NOT_SENT)


async def test_a_hanging_worker_times_out_and_takes_its_other_batches_along() -> None:
    async with pool_of(1) as (pool, events):
        slow, other = await load_one(pool, grind(), "slow"), await load_one(pool, matmul(), "other")
        hanging, along = long_batch(), array_batch(ROW)
        slow.replicas[0].execute(hanging, 0.3)
        pid = (await executing(slow)).pid
        await stop_process(pid)  # so that the run does not end when it is told to
        other.replicas[0].execute(along, 60.0)
        assert "did not answer in time" in await hanging.failure(FailureKind.TIMEOUT)
        await along.failure(FailureKind.NOT_SENT)
        await until(lambda: slow.replicas[0].available and other.replicas[0].available)
        await short_batch_on(slow.replicas[0]).success()
        assert not alive(pid)
        died = next(event for event in events if event.kind == "worker_died")
        assert died.text == "did not answer in time"


async def test_a_short_pause_is_not_a_hang() -> None:
    async with pool_of(1) as (pool, events):
        model = await load_one(pool, matmul())
        pid = pid_of(pool, "onnx-1")
        await stop_process(pid)
        batch = array_batch(ROW)
        model.replicas[0].execute(batch, 60.0)
        os.kill(pid, signal.SIGCONT)
        await batch.success()
        assert "worker_died" not in kinds(events)


async def test_signals_that_end_a_service_do_not_end_its_workers() -> None:
    async with pool_of(1) as (pool, events):
        model = await load_one(pool, matmul())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid_of(pool, "onnx-1"), number)
        assert await serves(model.replicas[0])
        assert "worker_died" not in kinds(events)


async def test_a_restarted_worker_warms_up_before_it_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool_of(1) as (pool, _):
        model = await load_one(pool, matmul())
        model.set_warm_up([[InputTensor(DATATYPE["FP32"], (1, 4), [1.0] * 4, None)]] * 3)
        warm_ups: list[bool] = []
        original = WarmUp.settle

        def settle(self: WarmUp, outcome: Success) -> None:
            warm_ups.append(model.replicas[0].available)
            original(self, outcome)

        monkeypatch.setattr(WarmUp, "settle", settle)
        os.kill(pid_of(pool, "onnx-1"), signal.SIGKILL)
        await until(lambda: not model.replicas[0].available)
        await until(lambda: model.replicas[0].available)
        assert warm_ups == [False] * 3
        assert await serves(model.replicas[0])


async def test_a_model_that_fails_its_warm_up_has_failed() -> None:
    async with pool_of(1) as (pool, events):
        model = await load_one(pool, gather())
        model.set_warm_up([[InputTensor(DATATYPE["INT64"], (1,), [9], None)]])
        os.kill(pid_of(pool, "onnx-1"), signal.SIGKILL)
        await until(lambda: model.failed)
        assert "warm-up failed: Non-zero status code" in model.reason
        assert kinds(events).count("model_failed") == 1
        assert not model.replicas[0].available


# --- Crash loops ------------------------------------------------------------------------------------------------------


async def crash(model: LoadedModel[OnnxReplica]) -> None:
    """The model's first instance crashes while it executes."""
    replica = model.replicas[0]
    await until(lambda: replica.available, "available again")
    pid = worker_of(model.instances[0])
    batch = long_batch()
    replica.execute(batch, 60.0)
    await executing(model)
    os.kill(pid, signal.SIGSEGV)
    await batch.failure(FailureKind.BROKEN)
    await until(lambda: not alive(pid), "dead")


@pytest.mark.usefixtures("_hasty")
async def test_a_model_that_crashes_again_is_isolated_then_fails_then_recovers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervision, "RETRY_AFTER_S", 0.5)
    async with pool_of(2) as (pool, events):
        good = await pool.load(artifact(matmul(), "good"), LoadOptions(instances=2))
        bad = await pool.load(artifact(grind(), "bad"), LoadOptions(instances=2))
        await crash(bad)
        assert bad.replicas[0].name == "onnx-1"
        await crash(bad)
        await until(lambda: {replica.name for replica in bad.replicas} == {"onnx-bad-1", "onnx-bad-2"})
        await until(lambda: good.replicas[0].available)
        pids = {worker_of(instance) for instance in good.instances}
        for _ in range(4):
            await crash(bad)
        await until(lambda: bad.failed)
        assert not any(replica.available for replica in bad.replicas)
        failed = next(event for event in events if event.kind == "model_failed")
        assert (failed.model, failed.version) == ("bad", "1")
        assert "crashed 6 times in a minute" in failed.text
        assert {worker_of(instance) for instance in good.instances} == pids, "others are not affected"
        assert all([await serves(replica) for replica in good.replicas])
        await until(lambda: "model_recovered" in kinds(events))
        await until(lambda: all(replica.available for replica in bad.replicas))
        assert not bad.failed
        await crash(bad)
        await until(lambda: kinds(events).count("model_failed") == 2, "failed again on probation")


@pytest.mark.usefixtures("_hasty")
async def test_a_model_that_answers_between_its_crashes_is_isolated_but_never_fails() -> None:
    async with pool_of(1) as (pool, events):
        model = await load_one(pool, grind())
        for _ in range(supervision.FAIL_CRASHES + 3):
            await until(lambda: model.replicas[0].available)
            await short_batch_on(model.replicas[0]).success()
            await crash(model)
        await until(lambda: model.replicas[0].available)
        assert model.dedicated
        assert "model_failed" not in kinds(events)
        for _ in range(supervision.FAIL_CRASHES):  # one was counted already
            await crash(model)
        await until(lambda: "model_failed" in kinds(events), "without answers it fails")


@pytest.mark.usefixtures("_hasty")
async def test_rows_that_crash_it_one_after_the_other_fail_no_model_that_answers_its_warm_up() -> None:
    """What a caller sends at once leaves no time for anybody's answer between: the known good input speaks for it."""
    async with pool_of(1) as (pool, events):
        model = await load_one(pool, grind())
        model.set_warm_up([[InputTensor(DATATYPE["FP32"], (1, GRIND_WIDTH), None, bytes(4 * GRIND_WIDTH))]])
        for _ in range(supervision.FAIL_CRASHES + 4):
            await crash(model)
        await until(lambda: model.replicas[0].available)
        assert model.dedicated
        assert "model_failed" not in kinds(events)


async def test_a_process_forgets_a_warm_up_with_the_last_instance_of_its_model() -> None:
    async with pool_of(1) as (pool, _):
        model = await pool.load(artifact(matmul()), LoadOptions(instances=2))
        other = await load_one(pool, matmul(), "other")
        for loaded in (model, other):
            loaded.set_warm_up([[InputTensor(DATATYPE["FP32"], (1, 4), None, bytes(16))]])
        os.kill(pid_of(pool, "onnx-1"), signal.SIGKILL)
        await until(lambda: not other.replicas[0].available)
        await until(lambda: all(replica.available for replica in [*model.replicas, *other.replicas]))
        channel = other.instances[0].channel
        assert channel is not None
        assert channel.warm == {model, other}
        first, second = model.instances
        assert first.detach() is channel
        assert isinstance(first.home, Keeper)
        await first.home.free(channel, first)
        assert channel.warm == {model, other}
        assert second.channel is channel
        await model.unload()
        assert channel.warm == {other}


async def test_how_soon_a_worker_is_back_depends_on_what_it_died_of(monkeypatch: pytest.MonkeyPatch) -> None:
    deaths: list[supervision.Death] = []

    def died(self: supervision.Backoff, now: float, rng: random.Random, death: supervision.Death) -> float:
        deaths.append(death)
        return 0.0

    monkeypatch.setattr(supervision.Backoff, "died", died)
    async with pool_of(1) as (pool, _):
        model = await load_one(pool, grind())
        os.kill(worker_of(model.instances[0]), signal.SIGKILL)
        await until(lambda: len(deaths) == 1)
        await crash(model)
        await until(lambda: len(deaths) == 2 and model.replicas[0].available)
        await short_batch_on(model.replicas[0]).success()
        await crash(model)
        await until(lambda: len(deaths) == 3)
    assert deaths == [supervision.Death.OUTSIDE, supervision.Death.CRASH, supervision.Death.INPUT]


@pytest.mark.usefixtures("_hasty")
async def test_kills_from_outside_fail_no_model() -> None:
    async with pool_of(1) as (pool, events):
        model = await load_one(pool, grind())
        for _ in range(8):
            pid = worker_of(model.instances[0])
            batch = long_batch()
            model.replicas[0].execute(batch, 60.0)
            await executing(model)
            os.kill(pid, signal.SIGKILL)
            await batch.failure(FailureKind.BROKEN)
            await until(lambda: model.replicas[0].available)
        assert not model.failed
        assert model.replicas[0].name == "onnx-1"
        await short_batch_on(model.replicas[0]).success()
        assert kinds(events).count("worker_died") == 8


# --- Unloading --------------------------------------------------------------------------------------------------------


async def test_unloading_waits_for_batches_in_flight() -> None:
    async with pool_of(1) as (pool, _):
        model = await load_one(pool, matmul())
        pid = pid_of(pool, "onnx-1")
        await stop_process(pid)
        batch = array_batch(ROW)
        model.replicas[0].execute(batch, 60.0)
        unloading = asyncio.create_task(model.unload())
        await until(lambda: not model.replicas[0].available)
        channel = pool._keepers[0].channel
        assert channel is not None
        for _ in range(10):
            await asyncio.sleep(0)
        assert not channel._questions, "UNLOAD must not overtake the batch"
        assert not unloading.done()
        os.kill(pid, signal.SIGCONT)
        await batch.success()
        await unloading
        assert pool.statistics().workers[0].models == ()
        await model.unload()


async def test_after_enough_unloads_a_worker_is_replaced_without_failing_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervision, "RECYCLE_AFTER_UNLOADS", 3)
    async with pool_of(1) as (pool, events):
        lasting = await load_one(pool, matmul(), "lasting")
        replica = lasting.replicas[0]
        first = worker_of(lasting.instances[0])
        flips: list[bool] = []
        replica.set_listener(lambda: flips.append(replica.available))
        for _ in range(3):
            await (await load_one(pool, matmul(), "passing")).unload()
        served = 0
        while worker_of(lasting.instances[0]) == first or alive(first):
            assert await serves(replica)
            served += 1
        assert served > 0
        assert flips == []
        assert await serves(replica)
        assert (replica.restarts, pool.statistics().workers[0].generation) == (0, 2)
        assert "worker_died" not in kinds(events)


async def test_a_replaced_process_finishes_what_it_has() -> None:
    async with pool_of(1) as (pool, events):
        model = await load_one(pool, matmul())
        first = worker_of(model.instances[0])
        await stop_process(first)
        batch = array_batch(ROW)
        model.replicas[0].execute(batch, 60.0)
        pool._keepers[0]._recycle.set()
        await until(lambda: worker_of(model.instances[0]) != first)
        assert not batch.outcomes
        os.kill(first, signal.SIGCONT)
        await batch.success()
        await until(lambda: not alive(first))
        assert "worker_died" not in kinds(events)


async def test_a_replacement_that_dies_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "RECYCLE_AFTER_UNLOADS", 1)
    async with pool_of(1) as (pool, events):
        lasting = await load_one(pool, matmul(), "lasting")
        first = worker_of(lasting.instances[0])
        passing = await load_one(pool, matmul(), "passing")
        monkeypatch.setattr("sys.executable", "/bin/false")
        await passing.unload()
        await until(lambda: "worker_died" in kinds(events))
        monkeypatch.undo()
        await until(lambda: pool.statistics().workers[0].state == "ready")
        assert worker_of(lasting.instances[0]) == first
        assert await serves(lasting.replicas[0])


# --- Nothing left behind ----------------------------------------------------------------------------------------------


async def settled_fds() -> int:
    """Open descriptors. Compare with `<=`: event loops of earlier tests may be closed at any time."""
    gc.collect()
    await asyncio.sleep(0)
    return open_fds()


async def test_descriptors_return_to_where_they_were() -> None:
    async with pool_of(2) as (pool, _):
        model = await pool.load(artifact(identity("FP32"), "warm"), LoadOptions(instances=2))
        for replica in model.replicas:
            await run(replica, array_batch(np.ones((2, 2), np.float32)))
        await model.unload()
        before = await settled_fds()
        inside = [open_fds(pid) for pid in worker_pids(pool)]
        for n in range(20):
            model = await pool.load(artifact(matmul(), f"m{n}"), LoadOptions(instances=2))
            for replica in model.replicas:
                assert await serves(replica)
            await model.unload()
        assert await settled_fds() <= before
        assert [open_fds(pid) for pid in worker_pids(pool)] == inside


async def test_descriptors_return_after_restarts() -> None:
    before_all = open_fds()
    async with pool_of(1) as (pool, _):
        model = await load_one(pool, matmul())
        assert await serves(model.replicas[0])
        before = await settled_fds()
        for _ in range(3):
            os.kill(pid_of(pool, "onnx-1"), signal.SIGKILL)
            await until(lambda: not model.replicas[0].available)
            await until(lambda: model.replicas[0].available)
            assert await serves(model.replicas[0])
        assert await settled_fds() <= before
    assert await settled_fds() <= before_all


async def test_closing_ends_even_a_worker_that_hangs() -> None:
    async with pool_of(1) as (pool, _):
        pid = pid_of(pool, "onnx-1")
        await stop_process(pid)
        await pool.close(timeout_s=0.05)
        assert not alive(pid)


async def test_closing_breaks_what_is_in_flight() -> None:
    async with pool_of(1) as (pool, _):
        model = await load_one(pool, matmul())
        await stop_process(pid_of(pool, "onnx-1"))
        batch = array_batch(ROW)
        model.replicas[0].execute(batch, 60.0)
        await pool.close(timeout_s=0.05)
        assert await batch.failure(FailureKind.NOT_SENT) == "worker onnx-1 was stopped"


async def test_an_idle_pool_uses_no_processor_time() -> None:
    async with pool_of(2) as (pool, _):
        model = await pool.load(artifact(matmul()), LoadOptions(instances=2))
        for replica in model.replicas:
            assert await serves(replica)
        before = [ticks(pid) for pid in worker_pids(pool)]
        await asyncio.sleep(1.0)
        used = [after - start for after, start in zip(map(ticks, worker_pids(pool)), before, strict=True)]
        assert max(used) < 0.02 * os.sysconf("SC_CLK_TCK") + 1


def ticks(pid: int) -> int:
    """utime + stime."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


async def test_many_batches_from_many_hands_are_never_crossed() -> None:
    async with pool_of(2) as (pool, _):
        models = [await pool.load(artifact(matmul(), f"m{n}"), LoadOptions(instances=2)) for n in range(3)]

        async def hand(replica: OnnxReplica, seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(40):
                x = rng.integers(-100, 100, (int(rng.integers(1, 50)), 4)).astype(np.float32)
                outcome = await run(replica, array_batch(x))
                assert isinstance(outcome, Success)
                weights = np.arange(12, dtype=np.float32).reshape(4, 3)
                assert np.array_equal(floats(outcome), x @ weights)

        replicas = [replica for model in models for replica in model.replicas]
        await asyncio.gather(*[hand(replica, seed) for seed, replica in enumerate(replicas)])


async def test_back_within_a_second() -> None:
    """The figure is for an idle machine; the test only bounds it generously and prints it."""
    async with pool_of(1) as (pool, _):
        model = await load_one(pool, matmul())
        os.kill(pid_of(pool, "onnx-1"), signal.SIGKILL)
        began = time.monotonic()
        await until(lambda: not model.replicas[0].available)
        await until(lambda: model.replicas[0].available)
        assert time.monotonic() - began < 30
