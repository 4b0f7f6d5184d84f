"""Models made for these tests, and the peer that tests play: batches whose outcome can be awaited."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from gateway.backends.interface import Failure, FailureKind, Success
from gateway.backends.onnx import LoadedModel, LoadOptions, OnnxPool, OnnxReplica, PoolEvent
from gateway.core.model import Artifact
from gateway.core.request import BatchInput, InputTensor
from gateway.core.tensor import DATATYPE, Datatype
from gateway.workers.board import Progress
from gateway.workers.channel import Channel
from gateway.workers.hosting import Instance
from tests.fakes import PlainBatch
from tests.live.models import ONNX_TYPE

PATIENCE_S = 60.0
"""Bound on waiting for something that must happen; generous, since the machine may be busy."""


def model_bytes(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any] | None = None) -> bytes:
    graph = helper.make_graph(nodes, "test", inputs, outputs, weights or [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def value(name: str, datatype: str, shape: list[int | str | None]) -> Any:
    return helper.make_tensor_value_info(name, ONNX_TYPE[datatype], shape)


def identity(datatype: str) -> bytes:
    shape: list[int | str | None] = ["n", None]
    node = helper.make_node("Identity", ["x"], ["y"])
    return model_bytes([node], [value("x", datatype, shape)], [value("y", datatype, shape)])


def matmul() -> bytes:
    """[n, 4] FP32 → [n, 3] FP32, by the weights of `MATMUL_WEIGHTS`."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    weights = [numpy_helper.from_array(MATMUL_WEIGHTS, "w")]
    return model_bytes([node], [value("x", "FP32", ["n", 4])], [value("y", "FP32", ["n", 3])], weights)


MATMUL_WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3)


def nonzero() -> bytes:
    """[n] FP32 → [1, k] INT64: the size of the output depends on the values."""
    node = helper.make_node("NonZero", ["x"], ["y"])
    return model_bytes([node], [value("x", "FP32", ["n"])], [value("y", "INT64", [1, None])])


def expand() -> bytes:
    """[k] INT64 shape → zeros of that shape, FP32: tiny input, output as large as asked for."""
    node = helper.make_node("ConstantOfShape", ["x"], ["y"])
    return model_bytes([node], [value("x", "INT64", ["k"])], [value("y", "FP32", None)])  # type: ignore[arg-type]


def gather() -> bytes:
    """[n] INT64 → [n] FP32; fails for indexes out of [-4, 3]."""
    node = helper.make_node("Gather", ["d", "x"], ["y"])
    weights = [numpy_helper.from_array(np.arange(4, dtype=np.float32), "d")]
    return model_bytes([node], [value("x", "INT64", ["n"])], [value("y", "FP32", ["n"])], weights)


GRIND_WIDTH = 256


def grind() -> bytes:
    """[n, 256] FP32 → the same. Four hundred nodes: `LONG_ROWS` of them take seconds, each node milliseconds."""
    names = ["x", *[f"h{n}" for n in range(400)]]
    nodes = [helper.make_node("MatMul", [before, "w"], [after]) for before, after in itertools.pairwise(names)]
    nodes.append(helper.make_node("Identity", [names[-1]], ["y"]))
    weights = [numpy_helper.from_array(np.eye(GRIND_WIDTH, dtype=np.float32), "w")]
    shape: list[int | str | None] = ["n", GRIND_WIDTH]
    return model_bytes(nodes, [value("x", "FP32", shape)], [value("y", "FP32", shape)], weights)


LONG_ROWS = 2000


def long_batch() -> TestBatch:
    return array_batch(np.ones((LONG_ROWS, GRIND_WIDTH), np.float32))


def short_batch() -> TestBatch:
    return array_batch(np.ones((1, GRIND_WIDTH), np.float32))


async def executing(model: LoadedModel[OnnxReplica], count: int = 1) -> Channel:
    """Wait until the process of the model's first instance executes `count` batches; returns its channel."""
    channel = model.instances[0].channel
    assert channel is not None

    def busy() -> bool:
        progress = channel._board.progress()
        return sum(progress.get(identity) is Progress.EXECUTING for identity in channel.in_flight) == count

    await until(busy, "executing")
    return channel


def artifact(content: bytes, name: str = "model", version: str = "1") -> Artifact:
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    return Artifact(name=name, version=version, source="test", files=(), digest=digest, model=content)


class TestBatch(PlainBatch):
    """A batch as the dispatcher would make it; `await batch` gives its outcome."""

    __test__ = False

    def __init__(self, inputs: list[BatchInput], outputs: tuple[int, ...] = (0,)) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.rows = inputs[0].shape[0] if inputs and inputs[0].shape else 1
        self.outcomes: list[Success | Failure] = []
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(self, outcome: Success | Failure, /) -> None:
        self.outcomes.append(outcome)
        if not self._done.done():
            self._done.set_result(None)

    async def outcome(self) -> Success | Failure:
        async with asyncio.timeout(PATIENCE_S):
            await self._done
        assert len(self.outcomes) == 1
        return self.outcomes[0]

    async def success(self) -> Success:
        outcome = await self.outcome()
        assert isinstance(outcome, Success), outcome
        return outcome

    async def failure(self, kind: FailureKind) -> str:
        outcome = await self.outcome()
        assert isinstance(outcome, Failure), outcome
        assert outcome.kind is kind, outcome
        return outcome.message


def raw_batch(
    datatype: Datatype, shape: tuple[int, ...], data: bytes, outputs: tuple[int, ...] = (0,), index: int = 0
) -> TestBatch:
    tensor = InputTensor(datatype, shape, None, data)
    return TestBatch([BatchInput(index, datatype, shape, len(data), [tensor])], outputs)


def array_batch(array: np.ndarray[Any, Any], outputs: tuple[int, ...] = (0,)) -> TestBatch:
    datatype = next(d for d in DATATYPE.values() if d.numpy == array.dtype and d.name not in {"BF16", "BYTES"})
    return raw_batch(datatype, array.shape, array.tobytes(), outputs)


def floats(success: Success) -> Any:
    output = success.outputs[0]
    return np.frombuffer(output.data, output.datatype.numpy).reshape(output.shape)


async def run(replica: OnnxReplica, batch: TestBatch, timeout_s: float = PATIENCE_S) -> Success | Failure:
    replica.execute(batch, timeout_s)
    return await batch.outcome()


async def until(condition: Callable[[], bool], what: str = "condition") -> None:
    """Poll; fails after `PATIENCE_S`."""
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, f"{what} did not come true in time"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def pool_of(workers: int = 1, *, slots: int = 1) -> AsyncIterator[tuple[OnnxPool, list[PoolEvent]]]:
    """A running pool and the events it emits; nothing of it is left afterwards."""
    events: list[PoolEvent] = []
    pool = OnnxPool(workers=workers, slots=slots, on_event=events.append, intra_op_threads=1)
    await pool.start()
    try:
        yield pool, events
    finally:
        pids = worker_pids(pool)
        await pool.close()
        assert not any(alive(pid) for pid in pids)


async def load_one(pool: OnnxPool, content: bytes, name: str = "model") -> LoadedModel[OnnxReplica]:
    return await pool.load(artifact(content, name), LoadOptions(instances=1))


def worker_pids(pool: OnnxPool) -> list[int]:
    return [worker.pid for worker in pool.statistics().workers if worker.pid]


def pid_of(pool: OnnxPool, name: str) -> int:
    return next(worker.pid for worker in pool.statistics().workers if worker.name == name)


def alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


async def stop_process(pid: int) -> None:
    """SIGSTOP, and wait until it has taken effect."""
    os.kill(pid, 19)
    await until(lambda: stopped(pid), "SIGSTOP")


def open_fds(pid: int | str = "self") -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def packed(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


ROW = np.ones((1, 4), np.float32)


async def serves(replica: OnnxReplica) -> bool:
    return isinstance(await run(replica, array_batch(ROW)), Success)


def kinds(events: list[PoolEvent]) -> list[str]:
    return [event.kind for event in events]


def worker_of(instance: Instance) -> int:
    channel = instance.channel
    assert channel is not None
    return channel.pid
