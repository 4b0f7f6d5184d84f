from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.tensor import DATATYPE, DATATYPES, element_count, pack_bytes, unpack_bytes

ELEMENTS = st.lists(st.binary(max_size=40), max_size=30)


def test_codes_are_places_and_part_of_the_wire_format() -> None:
    # Frames between gateway and workers hold these numbers: the order may grow but never change.
    names = "BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 BYTES BF16"
    assert " ".join(d.name for d in DATATYPES) == names
    assert [d.code for d in DATATYPES] == list(range(14))
    assert all(DATATYPE[d.name] is d for d in DATATYPES)


def test_item_sizes_are_those_of_the_numpy_types_and_little_endian() -> None:
    for datatype in DATATYPES:
        if datatype.kind == "bytes":
            assert datatype.itemsize == 0
        else:
            assert datatype.itemsize == datatype.numpy.itemsize
            assert datatype.numpy == datatype.numpy.newbyteorder("<")


@given(st.lists(st.integers(0, 2**40), max_size=16))
def test_element_count_is_exact(shape: list[int]) -> None:
    expected = 1
    for dim in shape:
        expected *= dim
    assert element_count(shape) == element_count(tuple(shape)) == expected


def test_element_count_does_not_wrap_around() -> None:
    assert element_count((2**32, 2**32, 2**32)) == 2**96
    assert int(np.prod([2**32, 2**32, 2**32], dtype=np.int64)) != 2**96


@given(ELEMENTS)
def test_packed_elements_come_back(elements: list[bytes]) -> None:
    packed = pack_bytes(elements)
    assert len(packed) == sum(4 + len(element) for element in elements)
    assert unpack_bytes(packed) == elements
    assert unpack_bytes(memoryview(packed)) == elements


def test_packed_form_is_the_wire_form() -> None:
    assert pack_bytes([b"ab", b""]) == b"\x02\x00\x00\x00ab\x00\x00\x00\x00"


@given(ELEMENTS.filter(bool), st.data())
def test_every_cut_is_noticed_unless_it_falls_between_elements(elements: list[bytes], data: st.DataObject) -> None:
    packed = pack_bytes(elements)
    cut = data.draw(st.integers(0, len(packed) - 1))
    ends = {len(pack_bytes(elements[:count])): count for count in range(len(elements) + 1)}
    if cut in ends:
        assert unpack_bytes(packed[:cut]) == elements[: ends[cut]]
    else:
        with pytest.raises(ValueError, match="incomplete"):
            unpack_bytes(packed[:cut])


@given(st.binary(max_size=64))
def test_any_bytes_are_either_refused_or_whole(buffer: bytes) -> None:
    try:
        elements = unpack_bytes(buffer)
    except ValueError:
        return
    assert pack_bytes(elements) == buffer


def test_a_length_that_points_past_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="incomplete string data"):
        unpack_bytes(b"\xff\xff\xff\xffab")
