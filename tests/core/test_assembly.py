from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core import assembly
from gateway.core.assembly import (
    AssemblyError,
    check_outputs,
    concat,
    encode_values,
    join_outputs,
    part_nbytes,
    row_offsets,
    slice_rows,
    split_request,
    write_parts,
)
from gateway.core.model import BatchPolicy
from gateway.core.request import BatchInput, InferRequest, InputTensor, OutputTensor
from gateway.core.tensor import DATATYPE, DATATYPES, Datatype, element_count, pack_bytes, unpack_bytes
from tests.scripted import BYTES, INT64, model_spec

SPEC = model_spec(BatchPolicy(8))
TRAILING = st.lists(st.integers(0, 3), max_size=2).map(tuple)


@st.composite
def packed(draw: st.DrawFn, datatype: Datatype, count: int) -> bytes:
    """`count` elements in OIP binary form."""
    if datatype.kind == "bytes":
        return pack_bytes([draw(st.binary(max_size=5)) for _ in range(count)])
    if datatype.kind == "bool":
        return bytes(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    size = count * datatype.itemsize
    return draw(st.binary(min_size=size, max_size=size))


def as_values(datatype: Datatype, buffer: bytes) -> list[Any] | None:
    """What a JSON parser would keep; None where the datatype has no JSON form or never waits as values."""
    if datatype.kind in {"bytes", "half"}:
        return None
    values: list[Any] = np.frombuffer(buffer, datatype.numpy).tolist()
    return values


@st.composite
def requests(draw: st.DrawFn, datatype: Datatype, trailing: tuple[int, ...], max_rows: int = 6) -> tuple[Any, bytes]:
    """(request of one input, its bytes in OIP binary form)."""
    rows = draw(st.integers(1, max_rows))
    shape = (rows, *trailing)
    buffer = draw(packed(datatype, element_count(shape)))
    values = as_values(datatype, buffer) if draw(st.booleans()) else None
    if values is not None and datatype.kind == "float":
        buffer = encode_values(datatype, values)  # NaN payloads need not survive being a Python float
    whole = InputTensor(datatype, shape, values, None if values is not None else memoryview(buffer))
    return InferRequest((None, whole), rows, part_nbytes(whole), "k", (0,), "id", None, 2.5), buffer


def written(batch_input: BatchInput) -> bytes:
    """Into a larger buffer, whose rest must stay untouched."""
    destination = bytearray(b"\xee" * (batch_input.nbytes + 7))
    write_parts(batch_input, memoryview(destination))
    assert destination[batch_input.nbytes :] == b"\xee" * 7
    return bytes(destination[: batch_input.nbytes])


@pytest.mark.parametrize("datatype", DATATYPES, ids=repr)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_batch_is_its_members_one_behind_the_other(datatype: Datatype, data: st.DataObject) -> None:
    trailing = data.draw(TRAILING)
    drawn = data.draw(st.lists(requests(datatype, trailing), min_size=1, max_size=5))
    members = [request for request, _ in drawn]
    rows = sum(request.rows for request in members)
    (batch_input,) = concat(members, rows, batched=True)
    assert batch_input.index == 1  # the absent optional input is left out, the place of the other one kept
    assert batch_input.shape == (rows, *trailing)
    assert batch_input.datatype is datatype
    assert written(batch_input) == b"".join(buffer for _, buffer in drawn)


@pytest.mark.parametrize("datatype", DATATYPES, ids=repr)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_split_parts_make_up_the_whole(datatype: Datatype, data: st.DataObject) -> None:
    request, buffer = data.draw(requests(datatype, data.draw(TRAILING), max_rows=20))
    max_rows = data.draw(st.integers(1, 8))
    request.received, request.priority, request.stated_timeout_s = 7.0, 3, 0.5
    parts = split_request(request, max_rows)
    assert all(1 <= part.rows <= max_rows for part in parts)
    assert [part.rows for part in parts[:-1]] == [max_rows] * (len(parts) - 1)
    assert sum(part.rows for part in parts) == request.rows
    assert sum(part.nbytes for part in parts) == request.nbytes
    for part in parts:
        assert part.inputs[0] is None
        tensor = part.inputs[1]
        assert tensor is not None
        assert tensor.shape == (part.rows, *request.inputs[1].shape[1:])
        assert (part.key, part.outputs, part.request_id, part.received, part.timeout_s) == ("k", (0,), "id", 7.0, 2.5)
        assert (part.priority, part.stated_timeout_s) == (3, 0.5)
    (batch_input,) = concat(parts, request.rows, batched=True)
    assert written(batch_input) == buffer


@pytest.mark.parametrize("datatype", DATATYPES, ids=repr)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_slices_joined_again_are_the_output(datatype: Datatype, data: st.DataObject) -> None:
    rows, trailing = data.draw(st.integers(1, 9)), data.draw(TRAILING)
    shape = (rows, *trailing)
    output = OutputTensor("o", datatype, shape, data.draw(packed(datatype, element_count(shape))))
    cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1), max_size=4))) if rows > 1 else []
    spans = list(zip([0, *cuts], [*cuts, rows], strict=True))
    pieces = [slice_rows(output, start, stop - start) for start, stop in spans]
    assert [piece.shape for piece in pieces] == [(stop - start, *trailing) for start, stop in spans]
    assert b"".join(bytes(piece.data) for piece in pieces) == bytes(output.data)
    joined = join_outputs([({3: output}, start, stop - start) for start, stop in spans])
    assert (joined[3].name, joined[3].datatype, joined[3].shape) == ("o", datatype, output.shape)
    assert bytes(joined[3].data) == bytes(output.data)


@given(st.lists(st.lists(st.binary(max_size=6), min_size=2, max_size=2), min_size=1, max_size=8), st.data())
def test_rows_of_strings_are_cut_at_strings(rows: list[list[bytes]], data: st.DataObject) -> None:
    output = OutputTensor("s", BYTES, (len(rows), 2), pack_bytes([element for row in rows for element in row]))
    first = data.draw(st.integers(0, len(rows) - 1))
    count = data.draw(st.integers(1, len(rows) - first))
    piece = slice_rows(output, first, count)
    assert unpack_bytes(piece.data) == [element for row in rows[first : first + count] for element in row]
    offsets = row_offsets(output)
    assert len(offsets) == len(rows) + 1
    assert (offsets[0], offsets[-1]) == (0, len(output.data))


def test_a_slice_of_numbers_is_a_view() -> None:
    data = bytearray(32)
    piece = slice_rows(OutputTensor("o", INT64, (4, 1), memoryview(data)), 1, 2)
    data[8] = 7
    assert piece.data[0] == 7


@given(st.integers(-9, 9).filter(bool), st.booleans())
def test_parts_that_hold_more_or_less_than_announced_are_refused(off: int, values: bool) -> None:
    part = InputTensor(INT64, (2, 1), [1, 2] if values else None, None if values else bytes(16))
    destination = bytearray(b"\xee" * 64)
    announced = 16 + off
    with pytest.raises(AssemblyError):
        write_parts(BatchInput(0, INT64, (2, 1), announced, [part]), memoryview(destination))
    assert destination[announced:] == b"\xee" * (64 - announced)  # nothing written past what was announced


def test_a_part_with_neither_form_is_refused() -> None:
    batch_input = BatchInput(0, INT64, (1, 1), 8, [InputTensor(INT64, (1, 1), None, None)])
    with pytest.raises(AssemblyError):
        write_parts(batch_input, memoryview(bytearray(8)))


def test_unbatched_input_keeps_its_shape() -> None:
    tensor = InputTensor(INT64, (3, 2), None, bytes(48))
    request = InferRequest((tensor,), 1, 48, "k", (0,), None)
    (batch_input,) = concat([request], 1, batched=False)
    assert (batch_input.shape, batch_input.nbytes) == ((3, 2), 48)


@pytest.mark.parametrize(
    ("datatype", "values", "expected"),
    [
        ("FP32", [0.1, 1e39, -1e39], struct.pack("<3f", 0.1, float("inf"), float("-inf"))),
        ("INT64", [2**63 - 1, -(2**63)], struct.pack("<2q", 2**63 - 1, -(2**63))),
        ("UINT64", [2**64 - 1, 2**53 + 1], struct.pack("<2Q", 2**64 - 1, 2**53 + 1)),
        ("BOOL", [True, False], b"\x01\x00"),
        ("FP64", [1, 2.5], struct.pack("<2d", 1, 2.5)),
        ("FP32", [], b""),
    ],
)
def test_values_are_encoded_exactly(datatype: str, values: list[object], expected: bytes) -> None:
    assert encode_values(DATATYPE[datatype], values) == expected


def output(name: str = "triple", datatype: Datatype = INT64, shape: tuple[int, ...] = (3, 1)) -> OutputTensor:
    return OutputTensor(name, datatype, shape, bytes(24))


def test_an_answer_that_is_the_batch_s_passes() -> None:
    check_outputs(SPEC, (0, 1), 3, [output(), output("name", BYTES)])
    check_outputs(SPEC, (1,), 3, [output("name", BYTES)])


@pytest.mark.parametrize(
    "outputs",
    [
        [],
        [output(), output("name", BYTES)],
        [output("name", BYTES)],
        [output("triple", DATATYPE["UINT64"])],
        [output(shape=(2, 1))],
        [output(shape=(4, 1))],
        [output(shape=())],
    ],
)
def test_an_answer_that_is_not_is_refused(outputs: list[OutputTensor]) -> None:
    with pytest.raises(AssemblyError):
        check_outputs(SPEC, (0,), 3, outputs)


def test_parts_of_differing_widths_are_not_one_tensor() -> None:
    narrow, wide = output(), OutputTensor("triple", INT64, (3, 2), bytes(48))
    with pytest.raises(AssemblyError, match="differing shapes"):
        join_outputs([({0: narrow}, 0, 3), ({0: wide}, 0, 3)])


def test_splitting_strings_walks_through_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Once per part would be quadratic: minutes on the event loop for one large request.
    walked = 0

    def counting(buffer: bytes | memoryview) -> list[bytes]:
        nonlocal walked
        elements = unpack_bytes(buffer)
        walked += len(elements)
        return elements

    monkeypatch.setattr(assembly, "unpack_bytes", counting)
    tensor = InputTensor(BYTES, (1024, 1), None, pack_bytes([b"x"] * 1024))
    parts = split_request(InferRequest((tensor,), 1024, 5 * 1024, "k", (0,), None), 16)
    assert len(parts) == 64
    assert walked == 1024
