"""The tensors of many requests as columns of a frame: joined bytes, and what is needed to cut them.

Pure. Inputs are what the model got, outputs what the client got; both are read from what the batch path left behind, so
that a turn's rows cost a few joins and not a loop over elements. A payload policy is applied here, before the bytes go
anywhere.

Invariant: what a column says of a row is that request's own: its own input tensors, and exactly its rows of the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final

from gateway.core import assembly
from gateway.core.batch import FinishedBatch
from gateway.core.log_policy import LogPolicy, Payload
from gateway.core.model import ModelSpec
from gateway.core.request import InferRequest, InputTensor, OutputTensor
from gateway.inference_log.frame import Column

HASH_BYTES: Final = 32

Shape = tuple[int, ...]


class _Gathered:
    """One tensor of many rows, on its way to a column."""

    __slots__ = ("chunks", "datatype", "rows", "shapes", "sizes")

    def __init__(self, datatype: str) -> None:
        self.datatype = datatype
        self.rows: list[int] = []
        self.shapes: list[Shape] = []
        self.sizes: list[int] = []
        self.chunks: list[bytes | memoryview] = []

    def add(self, row: int, shape: Shape, data: bytes | memoryview) -> None:
        self.rows.append(row)
        self.shapes.append(shape)
        self.sizes.append(len(data))
        self.chunks.append(data)

    def column(self, name: str, count: int, payload: Payload, limit: int) -> Column:
        """`count`: rows of the frame."""
        sizes, shapes = self.sizes, self.shapes
        lengths = None
        chunks: Sequence[bytes | memoryview] = self.chunks
        if payload != "keep":
            lengths = sizes
            chunks = _reduced(b"".join(chunks), sizes, payload, limit)
            sizes = [len(chunk) for chunk in chunks]
        return Column(
            name,
            self.datatype,
            None if len(self.rows) == count else self.rows,
            shapes[:1] if shapes.count(shapes[0]) == len(shapes) else shapes,
            b"".join(chunks),
            None if sizes.count(sizes[0]) == len(sizes) else sizes,
            payload,
            lengths,
        )


def _reduced(data: bytes, sizes: list[int], payload: Payload, limit: int) -> list[bytes | memoryview]:
    """What a policy other than keep leaves of each row's bytes."""
    if payload == "drop":
        return [b""] * len(sizes)
    view = memoryview(data)
    ends = list(accumulate(sizes))
    pieces = [view[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    if payload == "truncate":
        return [piece[:limit] for piece in pieces]
    return [hashlib.sha256(piece).digest() for piece in pieces]


def input_columns(
    spec: ModelSpec, policy: LogPolicy, rows: Sequence[int], requests: Sequence[InferRequest], count: int
) -> list[Column]:
    """The inputs of `requests`, which are the frame's rows `rows`, ascending; the frame has `count` rows."""
    columns = []
    for index, tensor in enumerate(spec.inputs):
        gathered: dict[str, _Gathered] = {}
        parts = [request.inputs[index] for request in requests]
        first = parts[0]
        if first is not None and all([p is not None and p.values is not None for p in parts]):  # noqa: C419  # faster
            gathered[first.datatype.name] = _from_values(rows, parts)  # type: ignore[arg-type]  # none is None
        else:
            for row, part in zip(rows, parts, strict=True):
                if part is not None:
                    name = part.datatype.name
                    into = gathered.get(name) or gathered.setdefault(name, _Gathered(name))
                    into.add(row, part.shape, input_bytes(part))
        payload, limit = policy.of(tensor.name), policy.truncate_bytes
        columns += [found.column(tensor.name, count, payload, limit) for found in gathered.values()]
    return columns


def _from_values(rows: Sequence[int], parts: Sequence[InputTensor]) -> _Gathered:
    """Small JSON inputs: all their numbers become bytes in one call."""
    datatype = parts[0].datatype
    gathered = _Gathered(datatype.name)
    values: list[Any] = []
    for part in parts:
        values += part.values  # type: ignore[arg-type]  # the caller looked
    gathered.rows = list(rows)
    gathered.shapes = [part.shape for part in parts]
    gathered.sizes = [len(part.values) * datatype.itemsize for part in parts]  # type: ignore[arg-type]
    gathered.chunks = [assembly.values_bytes(datatype, values)]
    return gathered


def input_bytes(part: InputTensor) -> bytes | memoryview:
    """One input in OIP binary form."""
    if part.values is not None:
        return assembly.values_bytes(part.datatype, part.values)
    return part.buffer if part.buffer is not None else b""


class OutputColumns:
    """Gathers the outputs of answered requests, in the order of their rows in the frame."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._gathered: dict[tuple[str, str], _Gathered] = {}
        self._offsets: dict[int, list[int]] = {}
        """Of BYTES tensors, by the object's identity: they live at least as long as this one."""

    def add_run(self, first: int, batch: FinishedBatch, run: Sequence[InferRequest]) -> None:
        """Requests that lie one behind the other in `batch` and wanted the same outputs; the frame's rows from `first`
        on."""
        spec = self._spec
        start = run[0].row
        for index in run[0].outputs:
            output = batch.outputs[index]
            into = self._of(output)
            into.rows += range(first, first + len(run))
            if not spec.batched:
                into.shapes += [output.shape] * len(run)
                into.sizes += [len(output.data)] * len(run)
                into.chunks += [output.data] * len(run)
                continue
            trailing = output.shape[1:]
            stop = run[-1].row + run[-1].rows
            into.shapes += _shapes([request.rows for request in run], trailing)
            if output.datatype.kind == "bytes":
                offsets = self._row_offsets(output)
                into.sizes += [offsets[r.row + r.rows] - offsets[r.row] for r in run]
                into.chunks.append(memoryview(output.data)[offsets[start] : offsets[stop]])
            else:
                per_row = len(output.data) // batch.rows if batch.rows else 0
                into.sizes += [request.rows * per_row for request in run]
                into.chunks.append(memoryview(output.data)[start * per_row : stop * per_row])

    def add_served(self, row: int, tensors: Sequence[OutputTensor]) -> None:
        """One request whose answer is not its rows of the outputs as they are (classes)."""
        for tensor in tensors:
            self._of(tensor).add(row, tensor.shape, tensor.data)

    def columns(self, policy: LogPolicy, count: int) -> list[Column]:
        """`count`: rows of the frame."""
        return [
            found.column(name, count, policy.of(name), policy.truncate_bytes)
            for (name, _), found in self._gathered.items()
            if found.rows
        ]

    def _of(self, output: OutputTensor) -> _Gathered:
        key = (output.name, output.datatype.name)
        found = self._gathered.get(key)
        if found is None:
            found = self._gathered[key] = _Gathered(output.datatype.name)
        return found

    def _row_offsets(self, output: OutputTensor) -> list[int]:
        offsets = self._offsets.get(id(output))
        if offsets is None:
            offsets = self._offsets[id(output)] = assembly.row_offsets(output)
        return offsets


def _shapes(rows: list[int], trailing: Shape) -> list[Shape]:
    known = {count: (count, *trailing) for count in set(rows)}
    return [known[count] for count in rows]
