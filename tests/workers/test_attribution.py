"""A worker dies, hangs or is told to stop: which of its batches is to blame, on real processes."""

from __future__ import annotations

import asyncio
import os
import select
import signal

import numpy as np
import pytest

from gateway.backends.interface import Failure, FailureKind, Sign, Success
from gateway.workers import channel as channels
from tests.faults.nonce import POISON, graph
from tests.workers.rig import (
    ROW,
    TestBatch,
    array_batch,
    executing,
    grind,
    kinds,
    load_one,
    long_batch,
    matmul,
    pid_of,
    pool_of,
    short_batch,
    stop_process,
    until,
)


async def failure_of(batch: TestBatch) -> Failure:
    outcome = await batch.outcome()
    assert isinstance(outcome, Failure), outcome
    return outcome


def nonce(value: int) -> TestBatch:
    return array_batch(np.array([[value]], np.int64))


async def test_of_two_models_in_one_process_the_one_that_crashed_it_is_known() -> None:
    """Both are in flight; only one executes. The real thing: an integer division that ends the process by SIGFPE."""
    async with pool_of(1) as (pool, _):
        bad, good = await load_one(pool, graph(poison="crash"), "bad"), await load_one(pool, matmul(), "good")
        channel = bad.instances[0].channel
        assert channel is not None
        answered = array_batch(ROW)
        good.replicas[0].execute(answered, 60.0)
        await answered.success()
        guilty = nonce(POISON | 1)
        bad.replicas[0].execute(guilty, 60.0)
        failure = await failure_of(guilty)
        assert (failure.kind, failure.sign) == (FailureKind.BROKEN, Sign.CRASH)
        assert channel.suspects == [bad]


async def test_a_crash_beside_another_run_is_not_beyond_doubt() -> None:
    async with pool_of(1, slots=2) as (pool, _):
        bad, other = await load_one(pool, graph(poison="crash"), "bad"), await load_one(pool, grind(), "other")
        beside, guilty = long_batch(), nonce(POISON | 1)
        other.replicas[0].execute(beside, 60.0)
        await executing(other)
        bad.replicas[0].execute(guilty, 60.0)
        ends = [await failure_of(batch) for batch in (guilty, beside)]
        assert [(end.kind, end.sign) for end in ends] == [(FailureKind.BROKEN, Sign.EXIT)] * 2


async def test_a_crash_while_another_model_is_freed_is_not_beyond_doubt() -> None:
    """What is freed may crash the process as well as what executes."""
    async with pool_of(1) as (pool, _):
        model, other = await load_one(pool, grind(), "model"), await load_one(pool, matmul(), "other")
        batch = long_batch()
        model.replicas[0].execute(batch, 60.0)
        channel = await executing(model)
        await stop_process(channel.pid)
        freeing = asyncio.ensure_future(other.unload())
        await until(lambda: bool(channel._questions), "asked to free it")
        os.kill(channel.pid, signal.SIGSEGV)
        os.kill(channel.pid, signal.SIGCONT)
        failure = await failure_of(batch)
        assert (failure.kind, failure.sign) == (FailureKind.BROKEN, Sign.EXIT)
        await freeing


@pytest.mark.parametrize(
    ("number", "sign"),
    [
        (signal.SIGSEGV, Sign.CRASH),
        (signal.SIGFPE, Sign.CRASH),
        (signal.SIGILL, Sign.CRASH),
        (signal.SIGKILL, Sign.EXIT),
        (signal.SIGABRT, Sign.EXIT),
        (signal.SIGBUS, Sign.EXIT),
    ],
)
async def test_only_a_fault_in_its_own_code_is_a_crash(number: signal.Signals, sign: Sign) -> None:
    async with pool_of(1) as (pool, _):
        model = await load_one(pool, grind())
        batch = long_batch()
        model.replicas[0].execute(batch, 60.0)
        channel = await executing(model)
        os.kill(channel.pid, number)
        failure = await failure_of(batch)
        assert (failure.kind, failure.sign) == (FailureKind.BROKEN, sign)


async def test_a_batch_that_was_not_begun_was_not_sent() -> None:
    """One executes on each of two instances, a third waits for its turn, a fourth lies unread in the socket."""
    async with pool_of(1, slots=2) as (pool, _):
        model, other = await load_one(pool, grind(), "first"), await load_one(pool, grind(), "second")
        first, waiting, beside, unread = long_batch(), short_batch(), long_batch(), short_batch()
        model.replicas[0].execute(first, 60.0)
        await executing(model)
        other.replicas[0].execute(beside, 60.0)
        channel = await executing(model, 2)
        model.replicas[0].execute(waiting, 60.0)
        await until(lambda: len(channel._board.progress()) == 3, "received")
        await stop_process(channel.pid)
        other.replicas[0].execute(unread, 60.0)
        os.kill(channel.pid, signal.SIGKILL)
        ends = [await failure_of(batch) for batch in (first, beside, waiting, unread)]
        assert [(end.kind, end.sign) for end in ends] == [
            (FailureKind.BROKEN, Sign.EXIT),
            (FailureKind.BROKEN, Sign.EXIT),
            (FailureKind.NOT_SENT, Sign.BYSTANDER),
            (FailureKind.NOT_SENT, Sign.BYSTANDER),
        ]
        assert channel.suspects == [model, other]


async def test_what_was_answered_before_the_death_counts() -> None:
    """The answer lies in the socket when the process is gone, also if the news of its end comes first."""
    async with pool_of(1) as (pool, _):
        model = await load_one(pool, matmul())
        channel = model.instances[0].channel
        assert channel is not None
        loop = asyncio.get_running_loop()
        loop.remove_reader(channel._socket.fileno())  # this side is slow
        batch = array_batch(ROW)
        model.replicas[0].execute(batch, 60.0)
        await until(lambda: bool(channel._board.progress()), "received")
        await until(lambda: readable(channel._socket.fileno()), "answered")
        os.kill(channel.pid, signal.SIGKILL)
        assert isinstance(await batch.outcome(), Success)
        assert channel.lost


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


async def test_a_batch_that_nobody_waits_for_is_ended_between_two_nodes() -> None:
    async with pool_of(1) as (pool, events):
        model = await load_one(pool, grind())
        replica = model.replicas[0]
        batch = long_batch()
        replica.execute(batch, 60.0)
        await executing(model)
        replica.cancel(batch)
        assert not batch.outcomes, "done must not be called from inside cancel"
        assert (await failure_of(batch)).kind is FailureKind.CANCELLED
        assert replica.free_slots == 1
        follow = short_batch()
        replica.execute(follow, 60.0)
        await follow.success()
        assert "worker_died" not in kinds(events)


async def test_a_waiting_batch_can_be_cancelled_and_the_running_one_goes_on() -> None:
    async with pool_of(1, slots=2) as (pool, _):
        model = await load_one(pool, grind())
        replica = model.replicas[0]
        running, waiting = long_batch(), short_batch()
        replica.execute(running, 60.0)
        channel = await executing(model)
        replica.execute(waiting, 60.0)
        await until(lambda: len(channel._board.progress()) == 2, "received")
        replica.cancel(waiting)
        await running.success()
        assert (await failure_of(waiting)).kind is FailureKind.CANCELLED


async def test_cancelling_what_is_over_is_harmless() -> None:
    async with pool_of(1) as (pool, events):
        model = await load_one(pool, matmul())
        replica = model.replicas[0]
        for _ in range(20):
            batch = array_batch(ROW)
            replica.execute(batch, 60.0)
            replica.cancel(batch)  # it may come to an answer or to its end, but to one thing only
            outcome = await batch.outcome()
            assert isinstance(outcome, Success) or outcome.kind is FailureKind.CANCELLED
            replica.cancel(batch)
        last = array_batch(ROW)
        replica.execute(last, 60.0)
        await last.success()
        assert "worker_died" not in kinds(events)


async def test_a_run_that_takes_too_long_is_ended_without_killing_the_worker() -> None:
    async with pool_of(1) as (pool, events):
        model = await load_one(pool, graph(poison="loop"))
        pid = pid_of(pool, "onnx-1")
        batch = nonce(POISON | 1)
        model.replicas[0].execute(batch, 0.2)
        failure = await failure_of(batch)
        assert (failure.kind, failure.message) == (FailureKind.TIMEOUT, "worker onnx-1 did not answer in time")
        good = nonce(1)
        model.replicas[0].execute(good, 60.0)
        await good.success()
        assert pid_of(pool, "onnx-1") == pid
        assert "worker_died" not in kinds(events)


async def test_a_worker_that_stands_still_is_killed_and_nobody_blamed() -> None:
    async with pool_of(1) as (pool, events):
        model = await load_one(pool, matmul())
        channel = model.instances[0].channel
        assert channel is not None
        await stop_process(channel.pid)
        batch = array_batch(ROW)
        model.replicas[0].execute(batch, 0.05)
        failure = await failure_of(batch)
        assert (failure.kind, failure.sign) == (FailureKind.NOT_SENT, Sign.BYSTANDER)
        assert channel.suspects == []
        await until(lambda: "worker_died" in kinds(events))


async def test_who_waits_behind_a_long_run_is_not_hung() -> None:
    async with pool_of(1, slots=2) as (pool, events):
        model = await load_one(pool, grind())
        running, waiting = long_batch(), short_batch()
        model.replicas[0].execute(running, 60.0)
        await executing(model)
        model.replicas[0].execute(waiting, 0.05)
        await running.success()
        await waiting.success()
        assert "worker_died" not in kinds(events)


async def test_an_answer_that_waited_for_us_is_taken_before_its_deadline_counts() -> None:
    """The loop stood still for longer than the deadline; the worker did not."""
    async with pool_of(1) as (pool, events):
        model = await load_one(pool, matmul())
        channel = model.instances[0].channel
        assert channel is not None
        batch = array_batch(ROW)
        model.replicas[0].execute(batch, 0.05)
        while not readable(channel._socket.fileno()):
            pass  # the loop's thread is busy
        assert channel.expire(asyncio.get_running_loop().time() + 10.0) == float("inf")
        await batch.success()
        assert "worker_died" not in kinds(events)


async def test_a_death_for_lack_of_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool_of(1) as (pool, _):
        model = await load_one(pool, grind())
        batch = long_batch()
        model.replicas[0].execute(batch, 60.0)
        channel = await executing(model)
        monkeypatch.setattr(channels, "out_of_memory_kills", lambda: channel.out_of_memory_kills + 1)
        os.kill(channel.pid, signal.SIGKILL)
        failure = await failure_of(batch)
        assert (failure.kind, failure.sign) == (FailureKind.BROKEN, Sign.MEMORY)
        assert failure.message == "worker onnx-1 died for lack of memory"


async def test_a_run_that_asks_for_too_much_memory_is_refused_and_the_worker_lives() -> None:
    async with pool_of(1) as (pool, events):
        model = await load_one(pool, graph(poison="memory"))
        batch = nonce(POISON | 1)
        model.replicas[0].execute(batch, 60.0)
        assert (await failure_of(batch)).kind is FailureKind.SUSPECT
        assert "worker_died" not in kinds(events)
