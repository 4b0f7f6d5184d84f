"""Answers that cannot be believed or taken in end the process; what listeners get wrong does not."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from gateway.backends.interface import Failure, FailureKind, Success
from gateway.protocol import ipc
from tests.workers.rig import (
    ROW,
    TestBatch,
    array_batch,
    kinds,
    load_one,
    matmul,
    pool_of,
    run,
    serves,
    stop_process,
    until,
    worker_of,
)


@pytest.mark.parametrize("damage", ["checksum", "generation", "noise"])
async def test_a_corrupt_frame_recycles_the_worker(damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    async with pool_of(1) as (pool, _):
        model = await load_one(pool, matmul())
        channel = model.instances[0].channel
        assert channel is not None
        await stop_process(channel.pid)
        batch = array_batch(ROW)
        model.replicas[0].execute(batch, 60.0)
        frame = bytearray(ipc.encode(ipc.UNLOAD, channel.generation, 1, ipc.encode_number(1)))
        if damage == "checksum":
            frame[-1] ^= 1
        elif damage == "generation":
            frame = bytearray(ipc.encode(ipc.UNLOAD, channel.generation + 1, 1, ipc.encode_number(1)))
        else:
            frame = bytearray(os.urandom(100))
        channel._socket.send(frame)
        os.kill(channel.pid, signal.SIGCONT)
        # The good batch may have been answered by another thread before the bad frame was read.
        await batch.outcome()
        await until(lambda: model.instances[0].channel not in {None, channel})
        assert await serves(model.replicas[0])
        assert "frame refused" in capfd.readouterr().err


async def test_a_corrupt_answer_recycles_the_worker() -> None:
    async with pool_of(1) as (pool, events):
        model = await load_one(pool, matmul())
        channel = model.instances[0].channel
        assert channel is not None
        await stop_process(channel.pid)
        batch = array_batch(ROW)
        model.replicas[0].execute(batch, 60.0)
        channel.generation += 1  # from here on, what this process says is stale
        os.kill(channel.pid, signal.SIGCONT)
        assert "sent an answer that cannot be used" in await batch.failure(FailureKind.BROKEN)
        await until(lambda: model.replicas[0].available)
        assert await serves(model.replicas[0])
        assert "expected" in next(event.text for event in events if event.kind == "worker_died")


async def test_an_answer_in_memory_that_does_not_exist_recycles_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    async with pool_of(1) as (pool, _):
        model = await load_one(pool, matmul())
        decode = ipc.decode_result
        monkeypatch.setattr(ipc, "decode_result", lambda p: replace(decode(p), output_size=1 << 40))
        batch = array_batch(ROW)
        model.replicas[0].execute(batch, 60.0)
        assert "was announced" in await batch.failure(FailureKind.BROKEN)
        monkeypatch.undo()
        await until(lambda: model.replicas[0].available)
        assert await serves(model.replicas[0])


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError(), KeyError("x")])
async def test_an_answer_that_cannot_be_taken_in_recycles_the_worker(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    async with pool_of(1) as (pool, _):
        model = await load_one(pool, matmul())
        replica = model.replicas[0]
        with monkeypatch.context() as patch:
            patch.setattr("gateway.workers.shm.Area.follow", fail)
            batch = array_batch(ROW)
            replica.execute(batch, 60.0)
            assert "sent an answer that cannot be used" in await batch.failure(FailureKind.BROKEN)
        assert replica.in_flight == 0
        await until(lambda: replica.available)
        assert await serves(replica)


async def test_a_listener_that_fails_kills_no_worker(caplog: pytest.LogCaptureFixture) -> None:
    class Batch(TestBatch):
        def done(self, outcome: Success | Failure, /) -> None:
            super().done(outcome)
            raise ipc.FrameError("not the worker's")

    async with pool_of(1) as (pool, events):
        model = await load_one(pool, matmul())
        pid = worker_of(model.instances[0])
        batch = Batch(array_batch(ROW).inputs)
        await run(model.replicas[0], batch)
        assert await serves(model.replicas[0])
        assert worker_of(model.instances[0]) == pid
        assert "worker_died" not in kinds(events)
        assert "could not be delivered" in caplog.text
