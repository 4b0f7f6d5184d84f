"""Moving, refusing and replacing, and faults of the keeper itself: nothing waits for ever, nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from gateway.core.request import InputTensor
from gateway.core.tensor import DATATYPE
from gateway.protocol import ipc
from gateway.workers import supervision
from gateway.workers.attempt import LoadRefused
from gateway.workers.channel import Channel
from gateway.workers.hosting import Instance
from tests.workers.rig import (
    PATIENCE_S,
    ROW,
    array_batch,
    gather,
    kinds,
    load_one,
    matmul,
    pool_of,
    serves,
    stop_process,
    until,
    worker_of,
)


def questions(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kinds of the control frames that are asked of it from now on."""
    asked: list[int] = []
    original = channel.ask

    async def ask(kind: int, payload: bytes, *arguments: Any, **named: Any) -> bytes:
        asked.append(kind)
        return await original(kind, payload, *arguments, **named)

    monkeypatch.setattr(channel, "ask", ask)
    return asked


async def test_a_batch_belongs_to_the_worker_that_runs_it_until_the_instance_has_moved() -> None:
    async with pool_of(1) as (pool, _):
        model = await load_one(pool, matmul(), "digits")
        (instance,), (replica,) = model.instances, model.replicas
        shared = pool._keepers[0]
        old = instance.channel
        assert old is not None
        await stop_process(old.pid)
        batch = array_batch(ROW)
        replica.execute(batch, 60.0)
        pool._isolate(model)
        assert instance.home.name == "onnx-digits-1"
        assert replica.name == "onnx-1", "it still runs there"
        await until(lambda: instance.channel not in {None, old})
        assert replica.name == "onnx-digits-1"
        os.kill(old.pid, signal.SIGCONT)
        await batch.success()
        await until(lambda: not pool._moves)
        assert [keeper._unloads for keeper in pool._keepers] == [1, 0], "booked where it was hosted"
        assert shared.channel is old
        assert await serves(replica)


async def test_a_move_to_a_worker_that_never_comes_up_ends_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "FIRST_DELAY_S", 100.0)
    async with pool_of(1) as (pool, _):
        model = await load_one(pool, matmul(), "digits")
        shared, channel = pool._keepers[0], model.instances[0].channel
        assert channel is not None
        asked = questions(channel, monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr("sys.executable", "/nonexistent/python")
            pool._isolate(model)
            await until(lambda: pool._keepers[1].restarts > 0)
            assert await serves(model.replicas[0]), "served where it was"
            async with asyncio.timeout(PATIENCE_S):
                await model.unload()
        assert asked == [ipc.UNLOAD], "freed once"
        assert (shared._unloads, pool._moves, len(pool._keepers)) == (1, {}, 1)


async def test_a_model_refused_by_its_warm_up_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool_of(1) as (pool, _):
        model = await load_one(pool, gather(), "passing")
        shared, channel = pool._keepers[0], model.instances[0].channel
        assert channel is not None
        model.set_warm_up([[InputTensor(DATATYPE["INT64"], (1,), [9], None)]])
        asked = questions(channel, monkeypatch)
        with pytest.raises(LoadRefused, match="warm-up failed: Non-zero status code"):
            await shared.load(Instance(model, 1000, shared))
        assert asked == [ipc.LOAD, ipc.UNLOAD]
        assert shared._unloads == 1
        assert [instance.number for instance in shared.instances] == [model.instances[0].number]


async def test_a_warm_up_that_cannot_be_made_ready_is_a_refusal() -> None:
    async with pool_of(1) as (pool, events):
        model = await load_one(pool, gather())
        model.set_warm_up([[InputTensor(DATATYPE["INT64"], (1,), None, None)]])
        with pytest.raises(LoadRefused, match="warm-up failed: the batch could not be made ready"):
            await pool._keepers[0].load(Instance(model, 1000, pool._keepers[0]))
        assert "worker_died" not in kinds(events)


@pytest.mark.usefixtures("_hasty")
async def test_a_fault_of_the_keeper_does_not_end_its_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with pool_of(1) as (pool, _):
        model = await load_one(pool, matmul())
        faults = iter([ValueError("one"), ValueError("two")])

        def came_up(_: object) -> None:
            for fault in faults:
                raise fault

        monkeypatch.setattr(pool, "came_up", came_up)
        first = worker_of(model.instances[0])
        os.kill(first, signal.SIGKILL)
        await until(lambda: pool._keepers[0].generation == 4 and model.replicas[0].available)
        assert await serves(model.replicas[0])
        assert caplog.text.count("supervision of worker onnx-1 failed and starts over") == 2
        assert pool._keepers[0].state is supervision.WorkerState.READY
        assert len(pool._keepers[0]._channels) == 1, "nothing of the earlier lives is left"


async def test_a_replacement_that_fails_for_whatever_reason_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool_of(1) as (pool, _):
        model = await load_one(pool, matmul())
        first = worker_of(model.instances[0])
        failed = asyncio.Event()

        async def place(*_: object) -> None:
            failed.set()
            raise ValueError("unforeseen")

        with monkeypatch.context() as patch:
            patch.setattr(pool._keepers[0], "_place", place)
            pool._keepers[0]._recycle.set()
            async with asyncio.timeout(PATIENCE_S):
                await failed.wait()
            await until(lambda: pool.statistics().workers[0].state == "ready")
        assert worker_of(model.instances[0]) == first
        assert await serves(model.replicas[0])
