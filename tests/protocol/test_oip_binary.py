"""Binary tensors: sizes, BYTES framing, BOOL bytes, and the shape of raw requests."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from gateway.core.model import ModelSpec
from gateway.core.tensor import DATATYPE, element_count, unpack_bytes
from gateway.errors import InvalidRequest
from gateway.protocol import oip_binary
from gateway.protocol.oip_binary import from_blob, raw_request_key
from gateway.protocol.oip_plan import InputPlan, Planner

from .oip_samples import NUMPY, model, packed, tensor_spec


def plan(datatype: str, shape: tuple[int, ...]) -> InputPlan:
    return InputPlan(0, "X", DATATYPE[datatype], shape, element_count(shape))


def refused(datatype: str, shape: tuple[int, ...], blob: bytes, *words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        from_blob(plan(datatype, shape), memoryview(blob), "m")
    assert caught.value.status == 400
    for word in (*words, "X"):
        assert word in str(caught.value)


@pytest.mark.parametrize("datatype", sorted(NUMPY))
def test_blob_of_the_right_size_is_kept_as_a_view(datatype: str) -> None:
    blob = memoryview(bytes([1, 0] * DATATYPE[datatype].itemsize * 3))
    tensor = from_blob(plan(datatype, (2, 3)), blob, "m")
    assert tensor.buffer is blob
    assert tensor.shape == (2, 3)
    assert tensor.values is None


@pytest.mark.parametrize("datatype", sorted(NUMPY))
@pytest.mark.parametrize("off", [-1, 1])
def test_size_that_differs_from_the_shape(datatype: str, off: int) -> None:
    size = DATATYPE[datatype].itemsize * 3
    refused(
        datatype, (1, 3), bytes(size + off),
        "input byte size mismatch for input 'X' for model 'm'", f"Expected {size}, got {size + off}",
    )  # fmt: skip


@pytest.mark.parametrize("value", [2, 255])
def test_bool_byte_that_is_neither_0_nor_1(value: int) -> None:
    refused("BOOL", (1, 3), bytes([0, 1, value]), "BOOL", "0 or 1")


def test_empty_tensor() -> None:
    for datatype in [*NUMPY, "BYTES"]:
        assert from_blob(plan(datatype, (1, 0)), memoryview(b""), "m").buffer == b""


def test_bytes_elements_may_be_empty_and_hold_nul() -> None:
    blob = packed([b"", b"a\0b", "hé".encode()])
    assert from_blob(plan("BYTES", (1, 3)), memoryview(blob), "m").buffer == blob


@pytest.mark.parametrize("elements", [[], [b"a"]])
def test_bytes_with_too_few_elements(elements: list[bytes]) -> None:
    refused("BYTES", (1, 3), packed(elements), "expected 3 string elements", f"got {len(elements)}")


def test_bytes_with_too_many_elements() -> None:
    refused("BYTES", (1, 3), packed([b"a"] * 4), "unexpected number of string elements 4", "expecting 3")


@pytest.mark.parametrize("claimed", [2, 2**31, 2**32 - 1])
def test_bytes_length_prefix_past_the_end(claimed: int) -> None:
    refused("BYTES", (1, 1), struct.pack("<I", claimed) + b"a", "incomplete string data")


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_bytes_length_prefix_cut_short(cut: int) -> None:
    refused("BYTES", (1, 1), packed([b"a"]) + bytes(cut), "incomplete string length")


def test_bytes_element_that_is_not_utf8() -> None:
    refused("BYTES", (1, 2), packed([b"a", b"\xff\xfe"]), "element 1", "UTF-8")


@pytest.mark.parametrize(
    ("spec", "size", "shape"),
    [
        (model(), 12, (1, 3)),
        (model(), 0, (1, 0)),
        (model([tensor_spec("X", dims=(2, -1))]), 24, (1, 2, 3)),
        (model([tensor_spec("X", dims=(4,))]), 16, (1, 4)),
        (model([tensor_spec("X", dims=(-1,))], max_batch_size=0), 12, (3,)),
        (model([tensor_spec("X", "FP64", (-1,))]), 24, (1, 3)),
    ],
)
def test_raw_request_shape_is_deduced(spec: ModelSpec, size: int, shape: tuple[int, ...]) -> None:
    assert raw_request_key(spec, size) == ("X", spec.inputs[0].datatype.name, shape)


def test_raw_bytes_request_is_one_element() -> None:
    assert raw_request_key(model([tensor_spec("X", "BYTES", (1,))]), 5) == ("X", "BYTES", (1, 1))


@pytest.mark.parametrize(
    ("spec", "size", "words"),
    [
        (model([tensor_spec("X"), tensor_spec("Z")]), 12, "raw request must only have 1 input (found 2)"),
        (model(), 13, "'X' can not be deduced: 13 bytes"),
        (model([tensor_spec("X", dims=(-1, -1))]), 12, "more than one variable-sized dimension"),
        (model([tensor_spec("X", dims=(0, -1))]), 12, "'X' can not be deduced"),
        (model([tensor_spec("X", "BYTES", (2,))]), 12, "must have input shape [1]"),
        (model([tensor_spec("X", "BYTES", (-1,))]), 12, "must have input shape [1]"),
    ],
)
def test_raw_request_whose_shape_cannot_be_deduced(spec: ModelSpec, size: int, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        raw_request_key(spec, size)
    assert words in str(caught.value)


def test_strings_beyond_the_shape_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def noted(*arguments: Any) -> list[bytes]:
        read.append(len(found := unpack_bytes(*arguments)))
        return found

    monkeypatch.setattr(oip_binary, "unpack_bytes", noted)
    refused("BYTES", (1, 2), bytes(400_000), "unexpected number of string elements 3", "expecting 2")
    assert read == [3]


def test_the_strings_of_one_input_are_bounded() -> None:
    planner = Planner(model([tensor_spec("x", "BYTES"), tensor_spec("y", "INT8", optional=True)]))
    assert planner.plan((("x", "BYTES", (1, 1_048_576)),)).inputs[0].elements == 1_048_576
    planner.plan((("x", "BYTES", (1, 1)), ("y", "INT8", (1, 2_000_000))))
    with pytest.raises(InvalidRequest, match=r"input 'x': .* holds 1048577 strings, at most 1048576 are allowed"):
        planner.plan((("x", "BYTES", (1, 1_048_577)),))
