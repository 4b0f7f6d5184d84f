"""Running a replica once: what it is given, and what comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from gateway.backends.interface import Batch, Failure, FailureKind, Success
from gateway.backends.one_shot import TIMEOUT_S, run_once
from gateway.core.assembly import write_parts
from gateway.core.request import InputTensor
from gateway.core.tensor import DATATYPE
from tests.fakes import PlainReplica

INT32, BYTES = DATATYPE["INT32"], DATATYPE["BYTES"]
DONE = Success([], 1, 2, 3)


class OneReplica(PlainReplica):
    """Keeps what it is given, and does with it what it is told."""

    name = "onnx-1"
    available = True
    free_slots = 1
    in_flight = 0

    def __init__(self, act: Callable[[Batch], None]) -> None:
        self.act = act
        self.given: list[Batch] = []
        self.timeouts_s: list[float] = []

    def execute(self, batch: Batch, timeout_s: float, /) -> None:
        self.given.append(batch)
        self.timeouts_s.append(timeout_s)
        asyncio.get_running_loop().call_soon(self.act, batch)

    def set_listener(self, changed: Callable[[], None], /) -> None:
        raise AssertionError


async def test_the_replica_gets_each_input_at_its_place() -> None:
    replica = OneReplica(lambda batch: batch.done(DONE))
    numbers = InputTensor(INT32, (2, 3), [1, 2, 3, 4, 5, 6], None)
    strings = InputTensor(BYTES, (2,), None, b"\1\0\0\0a\0\0\0\0")
    assert await run_once(replica, [numbers, strings], (1, 0)) is DONE
    (batch,) = replica.given
    assert (batch.rows, batch.outputs, replica.timeouts_s) == (2, (1, 0), [TIMEOUT_S])
    first, second = batch.inputs
    assert (first.index, first.datatype, first.shape, first.nbytes) == (0, INT32, (2, 3), 24)
    assert (second.index, second.datatype, second.shape, second.nbytes) == (1, BYTES, (2,), 9)
    memory = bytearray(24)
    write_parts(first, memoryview(memory))
    assert memory == bytes.fromhex("010000000200000003000000040000000500000006000000")


async def test_who_gives_up_has_the_replica_end_the_run() -> None:
    replica = OneReplica(lambda batch: None)
    cancelled: list[Batch] = []
    replica.cancel = cancelled.append  # type: ignore[method-assign]
    task = asyncio.create_task(run_once(replica, [InputTensor(INT32, (1,), [7], None)], (0,)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled == replica.given
    cancelled[0].done(DONE)  # late, and nobody's business any more


@pytest.mark.parametrize("inputs", [[], [InputTensor(INT32, (), [7], None)]])
async def test_without_a_first_dimension_it_is_one_row(inputs: list[InputTensor]) -> None:
    replica = OneReplica(lambda batch: batch.done(DONE))
    await run_once(replica, inputs, (0,), 5.0)
    assert (replica.given[0].rows, replica.timeouts_s) == (1, [5.0])


async def test_a_failure_is_a_result_and_only_the_first_outcome_counts() -> None:
    failure = Failure(FailureKind.SUSPECT, "index out of range")

    def act(batch: Batch) -> None:
        batch.done(failure)
        batch.done(DONE)

    assert await run_once(OneReplica(act), [], (0,)) is failure


async def test_an_outcome_after_the_caller_gave_up_is_harmless() -> None:
    replica = OneReplica(lambda batch: None)
    task = asyncio.ensure_future(run_once(replica, [], (0,)))
    while not replica.given:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    replica.given[0].done(DONE)
    assert task.cancelled()
