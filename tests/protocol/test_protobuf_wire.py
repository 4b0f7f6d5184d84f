from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.internal import encoder
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol import schema
from gateway.protocol.protobuf_wire import field, length_at, prefix, text, varint, varints
from tests.protocol.grpc_samples import REQUEST
from tests.protocol.oip_samples import PATIENT


@PATIENT
@given(st.integers(0, 2**64 - 1))
def test_a_varint_is_what_protobuf_writes(value: int) -> None:
    assert varint(value) == encoder._VarintBytes(value)  # type: ignore[attr-defined]


def test_fields_are_read_back_by_protobuf() -> None:
    data = text(1, "m") + text(2, "") + text(3, "hé" * 100) + field(7, b"") + field(7, b"x" * 70_000)
    read = REQUEST.FromString(data)
    assert (read.model_name, read.model_version, read.id) == ("m", "", "hé" * 100)
    assert [len(raw) for raw in read.raw_input_contents] == [0, 70_000]


@PATIENT
@given(st.integers(0, 300), st.binary(max_size=3))
def test_a_length_is_read_back(size: int, behind: bytes) -> None:
    message = prefix(7, size) + bytes(size) + behind
    start, end = length_at(message, 1, len(message))
    assert (end - start, len(message) - end) == (size, len(behind))


@PATIENT
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50), st.lists(st.integers(0, 2**64 - 1), max_size=50))
def test_packed_integers_are_what_protobuf_wrote(signed: list[int], unsigned: list[int]) -> None:
    contents = schema.message("inference.InferTensorContents")
    for name, values in (("int64_contents", signed), ("uint64_contents", unsigned)):
        written = contents(**{name: values}).SerializeToString()
        start = length_at(written, 1, len(written))[0] if values else 0
        numbers = varints(memoryview(written)[start:])
        assert (numbers.view(np.int64) if name == "int64_contents" else numbers).tolist() == values


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (b"\x3a\x03ab", -1),  # its value would end behind the message
        (b"\x3a", -1),
        (b"\x3a\x80", -1),  # the length itself is cut short
        (b"\x3a\x80\x80\x80\x80\x80\x00", -1),  # longer than any length has to be
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", -1),
        (b"\x3a\x81\x00z", 4),  # a length with a needless digit means the same
        (b"\x3a\x00", 2),
    ],
)
def test_what_a_walk_reads(message: bytes, found: int) -> None:
    assert length_at(message, 1, len(message))[1] == found
