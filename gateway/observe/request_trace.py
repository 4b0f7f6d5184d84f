"""Traces of single requests in Triton's format: which requests, what is noted of them, and the file.

A model that is traced has a `ModelTracer`, called once a batch; one that is not has none, which costs one test a batch.
Rules: one request in `rate` is noted, `count` of them at most; the contents of tensors only if small. Writing happens
in a thread, one write at a time; what would have to wait beyond `MAX_WAITING` traces is dropped and counted. A file is
at all times one JSON array. No more than `max_bytes` are written in the life of a `TraceFile`; a disk that is full or
gone ends tracing with a line in the log, and nothing else.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from gateway.core.assembly import slice_rows
from gateway.core.batch import FinishedBatch
from gateway.core.model import ModelSpec
from gateway.core.request import InferRequest
from gateway.core.tensor import Datatype, unpack_bytes

log = logging.getLogger("gateway.trace")

MAX_WAITING: Final = 1000
MAX_TENSOR_BYTES: Final = 4096
"""Of larger tensors name, datatype and shape are noted, and no data."""
FLUSH_AFTER_S: Final = 1.0

_IDS: Final = itertools.count(1)
Trace = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class TracePlan:
    """What is traced of one model's requests."""

    timestamps: bool
    tensors: bool
    rate: int
    """One request in this many; 0: none."""
    count: int
    """Traces to be made; -1: without end."""
    log_frequency: int
    """Traces in one file; 0: all in one."""

    @property
    def on(self) -> bool:
        return (self.timestamps or self.tensors) and self.rate > 0 and self.count != 0


class TraceFile:
    """The file, or with a log frequency the numbered files, that traces are written to."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.dropped = 0
        self._path = path
        self._left = max_bytes
        self._waiting: list[Trace] = []
        self._per_file = 0
        self._number = self._filled = 0
        """Of the numbered file that is written, and how many traces are in it."""
        self._closing = False
        self._begun = False
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None

    def add(self, trace: Trace, per_file: int) -> None:
        """`per_file`: traces in one file, 0: all in one."""
        if len(self._waiting) >= MAX_WAITING or self._left <= 0:
            self.dropped += 1
            return
        self._per_file = per_file
        self._waiting.append(trace)
        if self._timer is None and self._writing is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_AFTER_S, self._begin)

    def _begin(self) -> None:
        self._timer = None
        self._writing = asyncio.get_running_loop().create_task(self._write_all())

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                per_file = self._per_file
                count = max(1, per_file - self._filled) if per_file else len(self._waiting)
                if len(self._waiting) < min(count, MAX_WAITING) and not self._closing:
                    break  # this file is not full yet
                traces, self._waiting = self._waiting[:count], self._waiting[count:]
                if not per_file:
                    await self._write(self._path, traces, new=not self._begun)
                    self._begun = True
                    continue
                await self._write(
                    self._path.with_name(f"{self._path.name}.{self._number}"), traces, new=not self._filled
                )
                self._filled += len(traces)
                if self._filled >= per_file:
                    self._number, self._filled = self._number + 1, 0
        finally:
            self._writing = None

    async def _write(self, path: Path, traces: list[Trace], *, new: bool) -> None:
        rows = b",\n".join([orjson.dumps(row) for trace in traces for row in trace])
        if len(rows) + 4 > self._left:
            self._left = 0
            log.warning("tracing ends: %s has reached its largest size (server.trace.max_bytes)", self._path)
            return
        self._left -= len(rows) + 4
        try:
            await asyncio.to_thread(append_rows, path, rows, new)
        except OSError as error:
            self._left = 0
            log.error("tracing ends: %s cannot be written: %s", path, error.strerror)

    async def close(self) -> None:
        """Write what is left."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writing is not None:
            await self._writing
        await self._write_all()


def append_rows(path: Path, rows: bytes, new: bool) -> None:
    """Add `rows` (JSON values with commas between) to the array in `path`; `new`: begin it, over whatever is there."""
    if new:
        path.write_bytes(b"[" + rows + b"]")
        return
    with path.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b",\n" + rows + b"]")


class ModelTracer:
    """Notes requests of one model version."""

    def __init__(self, spec: ModelSpec, file: TraceFile, plan: TracePlan) -> None:
        """`plan.on` holds."""
        self.plan = plan
        self._spec = spec
        self._file = file
        self._left = plan.count
        self._passed = 0

    def batch(self, members: Sequence[InferRequest], batch: FinishedBatch) -> None:
        """A batch was executed for `members`, whose answers are out."""
        if not self._left:
            return
        for request in members:
            self._passed += 1
            if self._passed % self.plan.rate or request.batch is None:
                continue
            # Not `batch`: what a member was answered with may be cut to its own shape (core/ragged.py).
            self._file.add(self._trace(request, request.batch), self.plan.log_frequency)
            self._left -= self._left > 0
            if not self._left:
                return

    def _trace(self, request: InferRequest, batch: FinishedBatch) -> Trace:
        number = next(_IDS)
        spec = self._spec
        head: dict[str, Any] = {"id": number, "model_name": spec.name, "model_version": _version(spec.version)}
        if request.request_id is not None:
            head["request_id"] = request.request_id
        rows: Trace = [head]
        if self.plan.timestamps:
            rows.append({"id": number, "timestamps": _timestamps(request, batch)})
        if self.plan.tensors:
            rows += [
                {"id": number, "activity": activity, "tensor": tensor}
                for activity, tensor in self._tensor_rows(request, batch)
            ]
        return rows

    def _tensor_rows(self, request: InferRequest, batch: FinishedBatch) -> list[tuple[str, dict[str, str]]]:
        rows = []
        for spec, tensor in zip(self._spec.inputs, request.inputs, strict=False):
            if tensor is not None:
                data = _values(tensor.datatype, tensor.values, tensor.buffer)
                rows.append(("TENSOR_QUEUE_INPUT", _tensor(spec.name, tensor.datatype, tensor.shape, data)))
        for index in request.outputs:
            output = batch.outputs.get(index)
            if output is None:
                continue
            if self._spec.batched:
                output = slice_rows(output, request.row, request.rows)
            data = _values(output.datatype, None, output.data)
            rows.append(("TENSOR_BACKEND_OUTPUT", _tensor(output.name, output.datatype, output.shape, data)))
        return rows


def _timestamps(request: InferRequest, batch: FinishedBatch) -> list[dict[str, Any]]:
    """Monotonic nanoseconds. What the backend measured is laid out from the instant the batch was sent."""
    received, sent, finished = (round(s * 1e9) for s in (request.received, batch.dispatched, batch.finished))
    marks = (
        ("REQUEST_START", received),
        ("QUEUE_START", received),
        ("COMPUTE_START", sent),
        ("COMPUTE_INPUT_END", sent + batch.input_ns),
        ("COMPUTE_OUTPUT_START", sent + batch.input_ns + batch.infer_ns),
        ("COMPUTE_END", finished),
        ("REQUEST_END", finished),
    )
    return [{"name": name, "ns": ns} for name, ns in marks]


def _tensor(name: str, datatype: Datatype, shape: Sequence[int], data: str) -> dict[str, str]:
    return {"name": name, "data": data, "shape": ",".join(map(str, shape)), "dtype": datatype.name}


def _values(datatype: Datatype, values: list[Any] | None, buffer: bytes | memoryview | None) -> str:
    """The elements, separated by commas; empty if they are many."""
    if values is None and buffer is not None:
        if len(buffer) > MAX_TENSOR_BYTES:
            return ""
        if datatype.kind == "bytes":
            values = unpack_bytes(bytes(buffer))
        elif datatype.numpy is not None:
            values = np.frombuffer(buffer, datatype.numpy).tolist()
    if not values or len(values) > MAX_TENSOR_BYTES // 4:
        return ""
    texts = [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values]
    return ",".join(texts)[:MAX_TENSOR_BYTES]


def _version(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
