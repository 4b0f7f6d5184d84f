"""Rows together, rows apart: how requests become one batch and how its answer is cut up again.

Invariants: parts are written in the order of the batch's members, one behind the other, and the number of bytes
written is exactly the number announced; a batch's output is only cut when it has exactly as many rows as went in.
The copy made by `write_parts` is the only one between a client's bytes and the worker's memory; small batches of bytes
take a second one, which is cheaper.
"""

from __future__ import annotations

from struct import error as struct_error
from struct import pack, pack_into
from typing import Any, Final

import numpy as np

from gateway.core.model import ModelSpec
from gateway.core.request import BatchInput, InferRequest, InputTensor, OutputTensor
from gateway.core.tensor import Datatype, element_count, unpack_bytes

PACKED_VALUES: Final = 4096
"""Up to this many numbers are packed one by one; numpy is faster beyond."""
JOINED_BYTES: Final = 65_536
"""Up to this size the bytes of all parts are put together first, at once: cheaper than a slice for each of them."""
_STRUCT_CODE: Final = {
    "BOOL": "?", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q",
    "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q", "FP32": "f", "FP64": "d",
}  # fmt: skip


class AssemblyError(Exception):
    """The parts do not make up the announced batch, or an answer does not have the batch's rows."""


def concat(members: list[InferRequest], rows: int, batched: bool) -> list[BatchInput]:
    """The batch's inputs, still in parts. Members have equal keys; a model that does not batch has one member."""
    inputs = []
    for index, first in enumerate(members[0].inputs):
        if first is None:
            continue
        parts = [first] if len(members) == 1 else [member.inputs[index] for member in members]
        shape = (rows, *first.shape[1:]) if batched else first.shape
        if first.datatype.itemsize:
            nbytes = element_count(shape) * first.datatype.itemsize
        else:
            nbytes = sum(map(part_nbytes, parts))  # type: ignore[arg-type]  # equal keys: none is None
        inputs.append(BatchInput(index, first.datatype, shape, nbytes, parts))  # type: ignore[arg-type]
    return inputs


def part_nbytes(part: InputTensor) -> int:
    """Size of one part in OIP binary form."""
    if part.buffer is not None:
        return len(part.buffer)
    return len(part.values or ()) * part.datatype.itemsize


def write_parts(batch_input: BatchInput, destination: memoryview) -> None:
    """Write the parts of one input into `destination` (writable, at least `batch_input.nbytes` bytes).

    Runs of parts still held as Python values are converted with one numpy call per run.

    Raises:
        AssemblyError: the parts hold more or fewer bytes than announced.
    """
    if batch_input.nbytes <= JOINED_BYTES and _write_joined(batch_input, destination):
        return
    at = 0
    run: list[Any] = []
    for part in batch_input.parts:
        if part.values is not None:
            run += part.values
            continue
        if run:
            at = _put_values(destination, at, batch_input, run)
            run = []
        at = _put(destination, at, _buffer(part), batch_input.nbytes)
    if run:
        at = _put_values(destination, at, batch_input, run)
    if at != batch_input.nbytes:
        raise AssemblyError(f"batch input holds {at} bytes, announced {batch_input.nbytes}")


def _write_joined(batch_input: BatchInput, destination: memoryview) -> bool:
    """Where every part waits as bytes, and together they are as many as announced; False: nothing was written."""
    parts = batch_input.parts
    if not parts or parts[0].buffer is None:
        return False
    try:
        joined = b"".join([part.buffer for part in parts])  # type: ignore[misc]  # None, of another, is a TypeError
    except TypeError:
        return False
    if len(joined) != batch_input.nbytes:
        return False
    destination[: len(joined)] = joined
    return True


def _put_values(destination: memoryview, at: int, batch_input: BatchInput, values: list[Any]) -> int:
    datatype = batch_input.datatype
    end = at + len(values) * datatype.itemsize
    if end > batch_input.nbytes:
        raise AssemblyError(f"batch input exceeds the {batch_input.nbytes} bytes announced")
    code = _STRUCT_CODE.get(datatype.name)
    if code is None or len(values) > PACKED_VALUES:
        return _put(destination, at, encode_values(datatype, values), batch_input.nbytes)
    try:
        # Half the price of a numpy array at these sizes, and no copy in between.
        pack_into(f"<{len(values)}{code}", destination, at, *values)
    except (OverflowError, struct_error):
        # 1e39 in FP32 is Infinity by the protocol, which only numpy makes of it.
        return _put(destination, at, encode_values(datatype, values), batch_input.nbytes)
    return end


def encode_values(datatype: Datatype, values: list[object]) -> bytes:
    """Checked numbers or booleans → OIP binary form. BYTES never waits as values: its parser packs it."""
    with np.errstate(over="ignore"):  # 1e39 in FP32 is Infinity by the protocol, not a mistake
        return np.array(values, datatype.numpy).tobytes()


def values_bytes(datatype: Datatype, values: list[Any]) -> bytes:
    """As `encode_values`, and as `write_parts` writes them; cheaper for few values."""
    code = _STRUCT_CODE.get(datatype.name)
    if code is not None and len(values) <= PACKED_VALUES:
        try:
            return pack(f"<{len(values)}{code}", *values)
        except (OverflowError, struct_error):
            pass  # 1e39 in FP32 is Infinity by the protocol, which only numpy makes of it
    return encode_values(datatype, values)


def check_outputs(
    spec: ModelSpec,
    wanted: tuple[int, ...],
    rows: int,
    outputs: list[OutputTensor],
    flat: frozenset[int] = frozenset(),
) -> None:
    """Whether an answer is the batch's answer: every wanted output, by name and datatype, with the batch's rows.

    `flat`: places of outputs that do not come in rows (core/ragged.py).

    Raises:
        AssemblyError: it is not; nothing of it may reach a caller.
    """
    if len(outputs) != len(wanted):
        raise AssemblyError(f"{len(outputs)} outputs where {len(wanted)} were asked for")
    for index, output in zip(wanted, outputs, strict=True):
        tensor = spec.outputs[index]
        if output.name != tensor.name or output.datatype is not tensor.datatype:
            raise AssemblyError(
                f"output '{output.name}' of {output.datatype} where '{tensor.name}' of {tensor.datatype} was expected"
            )
        if spec.batched and (not output.shape or output.shape[0] != rows) and index not in flat:
            raise AssemblyError(f"output '{output.name}' has shape {list(output.shape)} for a batch of {rows} rows")


def split_request(request: InferRequest, max_rows: int) -> list[InferRequest]:
    """A request of more than `max_rows` rows → requests of at most that many, in row order."""
    cuts = [(start, min(start + max_rows, request.rows)) for start in range(0, request.rows, max_rows)]
    pieces = [[None] * len(cuts) if tensor is None else _cut(tensor, cuts) for tensor in request.inputs]
    parts = []
    for place, (start, stop) in enumerate(cuts):
        inputs = tuple([of_input[place] for of_input in pieces])
        nbytes = sum(part_nbytes(tensor) for tensor in inputs if tensor is not None)
        part = InferRequest(
            inputs, stop - start, nbytes, request.key, request.outputs, request.request_id, request.form,
            request.timeout_s,
        )  # fmt: skip
        part.stated_timeout_s = request.stated_timeout_s
        part.priority = request.priority
        part.parameters = request.parameters
        part.received = request.received
        part.part = True
        parts.append(part)
    return parts


def _cut(tensor: InputTensor, cuts: list[tuple[int, int]]) -> list[InputTensor | None]:
    """Rows `start` to `stop` for each of `cuts`. BYTES are walked through once, however many cuts there are."""
    datatype, rows, trailing = tensor.datatype, tensor.shape[0], tensor.shape[1:]
    shapes = [(stop - start, *trailing) for start, stop in cuts]
    if tensor.values is not None:
        values = tensor.values
        per_row = len(values) // rows
        of_cuts = [values[start * per_row : stop * per_row] for start, stop in cuts]
        return [InputTensor(datatype, shape, part, None) for shape, part in zip(shapes, of_cuts, strict=True)]
    buffer = memoryview(_buffer(tensor))
    if datatype.kind == "bytes":
        offsets = _row_offsets(buffer, rows)
        views = [buffer[offsets[start] : offsets[stop]] for start, stop in cuts]
    else:
        per_row = len(buffer) // rows
        views = [buffer[start * per_row : stop * per_row] for start, stop in cuts]
    return [InputTensor(datatype, shape, None, view) for shape, view in zip(shapes, views, strict=True)]


def join_outputs(parts: list[tuple[dict[int, OutputTensor], int, int]]) -> dict[int, OutputTensor]:
    """Answers to the parts of a split request → its answer. `parts`: (outputs of a batch, first row, rows).

    Raises:
        AssemblyError: the parts' trailing shapes differ, so they are not one tensor.
    """
    joined = {}
    for index, first in parts[0][0].items():
        pieces = [slice_rows(outputs[index], row, rows) for outputs, row, rows in parts]
        trailing = {piece.shape[1:] for piece in pieces}
        if len(trailing) != 1:
            raise AssemblyError(
                f"output '{first.name}' has differing shapes {sorted(trailing)} for parts of one request"
            )
        shape = (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])
        joined[index] = OutputTensor(first.name, first.datatype, shape, b"".join([p.data for p in pieces]))
    return joined


def slice_rows(output: OutputTensor, row: int, rows: int) -> OutputTensor:
    """Rows `row` to `row + rows` of a batch's output; a view where the datatype has a fixed size."""
    total = output.shape[0]
    shape = (rows, *output.shape[1:])
    data = memoryview(output.data)
    if output.datatype.kind == "bytes":
        offsets = row_offsets(output)
        return OutputTensor(output.name, output.datatype, shape, data[offsets[row] : offsets[row + rows]])
    per_row = len(data) // total if total else 0
    return OutputTensor(output.name, output.datatype, shape, data[row * per_row : (row + rows) * per_row])


def row_offsets(output: OutputTensor) -> list[int]:
    """Byte offset at which each row of a BYTES output starts, and the end: `rows + 1` numbers."""
    return _row_offsets(output.data, output.shape[0])


def _row_offsets(packed: bytes | memoryview, rows: int) -> list[int]:
    sizes = [4 + len(element) for element in unpack_bytes(packed)]
    per_row = len(sizes) // rows if rows else 0
    offsets = [0]
    for row in range(rows):
        offsets.append(offsets[-1] + sum(sizes[row * per_row : (row + 1) * per_row]))
    return offsets


def _buffer(part: InputTensor) -> bytes | memoryview:
    if part.buffer is None:
        raise AssemblyError("a part has neither values nor a buffer")
    return part.buffer


def _put(destination: memoryview, at: int, data: bytes | memoryview, limit: int) -> int:
    end = at + len(data)
    if end > limit:
        raise AssemblyError(f"batch input exceeds the {limit} bytes announced")
    destination[at:end] = data
    return end
