"""Batches through real workers: what goes in comes out, bit by bit, and failures are what they are."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.backends.interface import Failure, FailureKind, Replica, Success
from gateway.backends.onnx import LoadOptions, OnnxReplica
from gateway.core.request import BatchInput, InputTensor
from gateway.core.tensor import DATATYPE, DATATYPES
from gateway.protocol import ipc
from gateway.protocol.ipc import Result, ResultOutput
from tests.workers.rig import (
    MATMUL_WEIGHTS,
    TestBatch,
    array_batch,
    artifact,
    expand,
    floats,
    gather,
    identity,
    load_one,
    matmul,
    model_bytes,
    nonzero,
    open_fds,
    packed,
    pool_of,
    raw_batch,
    run,
    stop_process,
    value,
)

BITS = {
    "BOOL": bytes([0, 1, 1, 0, 1, 0]),
    "BYTES": packed(b"", b"a", "é€😀".encode(), b"a\0b", b"x" * 70_000, b"\n"),
    # Quiet and signalling NaNs with payloads, infinities, minus zero, the smallest subnormal.
    "FP16": struct.pack("<6H", 0x7E01, 0x7D55, 0x7C00, 0xFC00, 0x8000, 1),
    "BF16": struct.pack("<6H", 0x7FC1, 0x7F81, 0x7F80, 0xFF80, 0x8000, 1),
    "FP32": struct.pack("<6I", 0x7FC00001, 0x7F800001, 0x7F800000, 0xFF800000, 0x80000000, 1),
    "FP64": struct.pack("<6Q", 0x7FF8 << 48 | 1, 0x7FF0 << 48 | 1, 0x7FF0 << 48, 0xFFF0 << 48, 1 << 63, 1),
}


def sample(name: str) -> bytes:
    itemsize = DATATYPE[name].itemsize
    return BITS.get(name, bytes(range(256 - 6 * itemsize, 256)))


@pytest.mark.parametrize("name", [datatype.name for datatype in DATATYPES])
async def test_identity_is_bit_exact_for_every_datatype(name: str) -> None:
    datatype, data = DATATYPE[name], sample(name)
    async with pool_of() as (pool, _):
        model = await load_one(pool, identity(name))
        for shape, content in (((0, 3), b""), ((2, 3), data), ((3, 0), b""), ((2, 3), data)):
            success = await run_well(model.replicas[0], raw_batch(datatype, shape, content))
            (output,) = success.outputs
            assert (output.name, output.datatype, output.shape) == ("y", datatype, shape)
            assert output.data == content


async def run_well(replica: OnnxReplica, batch: TestBatch) -> Success:
    outcome = await run(replica, batch)
    assert isinstance(outcome, Success), outcome
    return outcome


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.text(max_size=20), min_size=2, max_size=2), max_size=8))
def test_any_strings_survive(rows: list[list[str]]) -> None:
    data = packed(*[element.encode("utf-8", "replace") for row in rows for element in row])

    async def there_and_back() -> None:
        async with pool_of() as (pool, _):
            model = await load_one(pool, identity("BYTES"))
            success = await run_well(model.replicas[0], raw_batch(DATATYPE["BYTES"], (len(rows), 2), data))
            assert success.outputs[0].data == data

    asyncio.run(there_and_back())


async def test_parts_are_joined_in_order() -> None:
    fp32 = DATATYPE["FP32"]
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    parts = [
        InputTensor(fp32, (1, 4), rows[0].tolist(), None),
        InputTensor(fp32, (1, 4), None, rows[1].tobytes()),
        InputTensor(fp32, (1, 4), rows[2].tolist(), None),
    ]
    async with pool_of() as (pool, _):
        model = await load_one(pool, matmul())
        batch = TestBatch([BatchInput(0, fp32, (3, 4), 48, parts)])
        assert floats(await run_well(model.replicas[0], batch)).tolist() == (rows @ MATMUL_WEIGHTS).tolist()


async def test_several_inputs_and_chosen_outputs() -> None:
    from onnx import helper

    names = ["a", "b", "c"]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in names]
    content = model_bytes(
        nodes,
        [value("a", "FP32", ["n", 1]), value("b", "BYTES", ["n"]), value("c", "INT8", ["n", 3])],
        [value("a_out", "FP32", ["n", 1]), value("b_out", "BYTES", ["n"]), value("c_out", "INT8", ["n", 3])],
    )
    data = [np.array([1, 2], np.float32).tobytes(), packed(b"p", b"q"), bytes(range(6))]
    shapes: list[tuple[int, ...]] = [(2, 1), (2,), (2, 3)]
    types = [DATATYPE[name] for name in ("FP32", "BYTES", "INT8")]
    inputs = [
        BatchInput(index, kind, shape, len(part), [InputTensor(kind, shape, None, part)])
        for index, (kind, shape, part) in enumerate(zip(types, shapes, data, strict=True))
    ]
    async with pool_of() as (pool, _):
        model = await load_one(pool, content)
        for outputs in ((0, 1, 2), (2, 0), (1,)):
            success = await run_well(model.replicas[0], TestBatch(inputs, outputs))
            assert [output.name for output in success.outputs] == [f"{names[index]}_out" for index in outputs]
            assert [output.data for output in success.outputs] == [data[index] for index in outputs]


async def test_outputs_whose_size_depends_on_values() -> None:
    async with pool_of() as (pool, _):
        model = await load_one(pool, nonzero())
        for x in ([0, 5, 0, 7], [0, 0], [1] * 3000):
            success = await run_well(model.replicas[0], array_batch(np.array(x, np.float32)))
            assert floats(success).tolist() == [[place for place, number in enumerate(x) if number]]


async def test_outputs_grow_past_the_buffer_and_big_buffers_are_given_back() -> None:
    async with pool_of() as (pool, _):
        model = await load_one(pool, expand())
        channel = model.instances[0].channel
        assert channel is not None
        for count in (10, 100_000, 5, 20_000_000, 7):
            success = await run_well(model.replicas[0], array_batch(np.array([count], np.int64)))
            assert success.outputs[0].shape == (count,)
            assert len(success.outputs[0].data) == 4 * count
            assert sum(buffer.size for buffer in channel._free) < 64 * 1024 * 1024


async def test_inputs_grow_past_the_buffer() -> None:
    async with pool_of() as (pool, _):
        model = await load_one(pool, identity("UINT8"))
        for rows in (1, 100_000, 3, 1_000_000):
            x = np.arange(rows * 2, dtype=np.uint8).reshape(rows, 2)
            success = await run_well(model.replicas[0], array_batch(x))
            assert success.outputs[0].data == x.tobytes()


async def test_a_model_that_fails_on_its_input_is_suspect_and_lives_on() -> None:
    async with pool_of() as (pool, events):
        model = await load_one(pool, gather())
        replica = model.replicas[0]
        batch = array_batch(np.array([9], np.int64))
        replica.execute(batch, 30.0)
        text = await batch.failure(FailureKind.SUSPECT)
        assert "idx=9 must be within" in text
        assert floats(await run_well(replica, array_batch(np.array([3, -4], np.int64)))).tolist() == [3.0, 0.0]
        assert replica.in_flight == 0
        assert not [event for event in events if event.kind == "worker_died"]


async def test_invalid_utf8_is_suspect() -> None:
    async with pool_of() as (pool, _):
        model = await load_one(pool, identity("BYTES"))
        batch = raw_batch(DATATYPE["BYTES"], (1, 1), packed(b"\xff"))
        model.replicas[0].execute(batch, 30.0)
        assert "not valid UTF-8" in await batch.failure(FailureKind.SUSPECT)


async def test_too_many_inputs_for_a_frame_are_suspect() -> None:
    async with pool_of() as (pool, _):
        model = await load_one(pool, matmul())
        fp32 = DATATYPE["FP32"]
        tensor = InputTensor(fp32, (1, 4), None, bytes(16))
        batch = TestBatch([BatchInput(0, fp32, (1, 4), 16, [tensor])] * 3000)
        model.replicas[0].execute(batch, 30.0)
        assert not batch.outcomes, "done must not be called from inside execute"
        assert "limit of one frame" in await batch.failure(FailureKind.SUSPECT)
        assert model.replicas[0].free_slots == 1
        await run_well(model.replicas[0], array_batch(np.ones((1, 4), np.float32)))


async def test_parts_that_are_not_the_batch_announced_are_suspect() -> None:
    async with pool_of() as (pool, _):
        model = await load_one(pool, matmul())
        fp32 = DATATYPE["FP32"]
        for data, text in ((bytes(8), "holds 8 bytes, announced 16"), (bytes(24), "exceeds the 16 bytes")):
            batch = TestBatch([BatchInput(0, fp32, (1, 4), 16, [InputTensor(fp32, (1, 4), None, data)])])
            model.replicas[0].execute(batch, 30.0)
            assert text in await batch.failure(FailureKind.SUSPECT)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (MemoryError(), "MemoryError"),
        (struct.error("argument\nout of range"), "argument out of range"),
        (KeyError("x"), "'x'"),
    ],
)
async def test_a_batch_that_cannot_be_made_ready_is_suspect_and_leaves_nothing(
    error: Exception, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    async with pool_of() as (pool, events):
        model = await load_one(pool, matmul())
        replica = model.replicas[0]
        x = np.ones((1, 4), np.float32)
        await run_well(replica, array_batch(x))
        channel = model.instances[0].channel
        assert channel is not None
        before = open_fds()
        for _ in range(3):
            with monkeypatch.context() as patch:
                patch.setattr("gateway.workers.channel.write_parts", fail)
                batch = array_batch(x)
                replica.execute(batch, 30.0)
            assert not batch.outcomes, "done must not be called from inside execute"
            assert await batch.failure(FailureKind.SUSPECT) == f"the batch could not be made ready: {text}"
            assert (replica.in_flight, replica.free_slots, len(channel.in_flight)) == (0, 1, 0)
        assert open_fds() <= before
        await run_well(replica, array_batch(x))
        assert not [event for event in events if event.kind == "worker_died"]


async def test_no_memory_for_a_buffer_is_the_batchs_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    async with pool_of() as (pool, _):
        model = await load_one(pool, matmul())
        batch = array_batch(np.ones((1, 4), np.float32))
        with monkeypatch.context() as patch:
            patch.setattr("gateway.workers.shm.create_area", fail)
            model.replicas[0].execute(batch, 30.0)
        assert "Too many open files" in await batch.failure(FailureKind.SUSPECT)
        await run_well(model.replicas[0], array_batch(np.ones((1, 4), np.float32)))


async def test_a_worker_that_takes_nothing_now_is_not_the_batchs_fault() -> None:
    async with pool_of() as (pool, _):
        model = await load_one(pool, matmul())
        channel = model.instances[0].channel
        assert channel is not None
        await stop_process(channel.pid)
        frame = ipc.encode(ipc.DETACH, channel.generation, 0, ipc.encode_number(99))
        with contextlib.suppress(BlockingIOError):
            while True:
                channel._socket.send(frame)
        batch = array_batch(np.ones((1, 4), np.float32))
        model.replicas[0].execute(batch, 30.0)
        await batch.failure(FailureKind.NOT_SENT)
        assert model.replicas[0].free_slots == 1
        os.kill(channel.pid, signal.SIGCONT)


async def test_nothing_escapes_execute() -> None:
    class Batch(TestBatch):
        inputs = property(lambda self: 1 // 0, lambda self, value: None)

        def __init__(self) -> None:
            good = array_batch(np.ones((1, 4), np.float32))
            self.outputs, self.rows, self.outcomes, self._done = (0,), 1, [], good._done

    async with pool_of() as (pool, _):
        model = await load_one(pool, matmul())
        batch = Batch()
        model.replicas[0].execute(batch, 30.0)
        assert not batch.outcomes
        assert "ZeroDivisionError" in await batch.failure(FailureKind.SUSPECT)
        assert model.replicas[0].free_slots == 1


async def test_the_replica_counts_its_slots() -> None:
    async with pool_of(slots=2) as (pool, _):
        model = await load_one(pool, matmul())
        replica: Replica = model.replicas[0]
        assert (replica.name, replica.available, replica.free_slots, replica.in_flight) == ("onnx-1", True, 2, 0)
        batches = [array_batch(np.full((1, 4), n, np.float32)) for n in range(2)]
        for batch in batches:
            replica.execute(batch, 30.0)
        assert (replica.free_slots, replica.in_flight) == (0, 2)
        for n, batch in enumerate(batches):
            assert floats(await batch.success()).tolist() == (np.full((1, 4), n) @ MATMUL_WEIGHTS).tolist()
        assert (replica.free_slots, replica.in_flight) == (2, 0)


async def test_the_slot_and_the_buffer_are_free_when_done_is_called() -> None:
    async with pool_of() as (pool, _):
        model = await load_one(pool, matmul())
        replica = model.replicas[0]
        channel = model.instances[0].channel
        assert channel is not None
        kept = channel._free
        seen: list[tuple[int, int]] = []

        class Batch(TestBatch):
            def done(self, outcome: Success | Failure, /) -> None:
                seen.append((replica.free_slots, len(kept)))
                super().done(outcome)

        await run_well(replica, Batch(array_batch(np.ones((1, 4), np.float32)).inputs))
        assert seen == [(1, 1)]


PLACE = ResultOutput(0, DATATYPE["FP32"], (2, 3), 0, 24)


@pytest.mark.parametrize(
    "outputs",
    [
        pytest.param((), id="missing"),
        pytest.param((PLACE, PLACE), id="one too many"),
        pytest.param((ResultOutput(1, DATATYPE["FP32"], (2, 3), 0, 24),), id="another output"),
        pytest.param((ResultOutput(0, DATATYPE["INT32"], (2, 3), 0, 24),), id="another datatype"),
        pytest.param((ResultOutput(0, DATATYPE["FP32"], (2, 4), 0, 24),), id="too few bytes"),
        pytest.param((ResultOutput(0, DATATYPE["FP32"], (2, 3), 0, 28),), id="too many bytes"),
    ],
)
async def test_an_answer_that_is_not_the_batchs_answer_is_broken(outputs: tuple[Any, ...]) -> None:
    async with pool_of() as (pool, _):
        model = await load_one(pool, matmul())
        from gateway.backends.onnx import _OnnxAttempt

        batch = array_batch(np.ones((2, 4), np.float32))
        attempt = _OnnxAttempt(model.replicas[0], batch, model.instances[0])
        good = attempt.result(Result(64, 1, 2, 3, (PLACE,)), memoryview(bytes(64)))
        assert isinstance(good, Success)
        outcome = attempt.result(Result(64, 1, 2, 3, outputs), memoryview(bytes(64)))
        assert isinstance(outcome, Failure)
        assert outcome.kind is FailureKind.BROKEN


async def test_two_instances_run_on_two_workers() -> None:
    async with pool_of(2) as (pool, _):
        model = await pool.load(artifact(matmul()), LoadOptions(instances=2))
        assert {replica.name for replica in model.replicas} == {"onnx-1", "onnx-2"}
        batches = [array_batch(np.full((2, 4), n, np.float32)) for n in range(2)]
        for replica, batch in zip(model.replicas, batches, strict=True):
            replica.execute(batch, 30.0)
        for n, batch in enumerate(batches):
            assert floats(await batch.success()).tolist() == (np.full((2, 4), n) @ MATMUL_WEIGHTS).tolist()
