"""Requests with binary tensors behind the JSON part, and raw requests without one."""

from __future__ import annotations

import numpy as np
import pytest

from gateway.core.tensor import DATATYPE

from .oip_samples import (
    NUMPY,
    binary_body,
    decode,
    decoded,
    model,
    naive_bytes,
    of_x,
    packed,
    refused,
    request_body,
    tensor_spec,
    x_of,
)

VALID = request_body()


@pytest.mark.parametrize("datatype", sorted(NUMPY))
def test_binary_input_of_every_datatype(datatype: str) -> None:
    blob = bytes([1, 0, 1, 1, 0, 0] * DATATYPE[datatype].itemsize)
    spec = of_x(datatype)
    body, length = binary_body(("X", datatype, [2, 3], blob))
    assert decoded(spec, decode(spec, body, length)) == {"X": ((2, 3), blob)}


def test_binary_input_is_a_view_of_the_body() -> None:
    body, length = binary_body(("X", "FP32", [1, 3], bytes(12)))
    tensor = decode(of_x(), body, length).inputs[0]
    assert tensor is not None
    assert isinstance(tensor.buffer, memoryview)
    assert tensor.buffer.obj is body


def test_blobs_stand_in_the_order_of_inputs_and_mix_with_json() -> None:
    spec = model([tensor_spec("A"), tensor_spec("B", "INT32"), tensor_spec("C", "BYTES"), tensor_spec("D", "INT64")])
    c, b = packed([b"x", b"yz"]), np.array([[7, 8]], "<i4").tobytes()
    body, length = binary_body(
        ("C", "BYTES", [1, 2], c), ("A", "FP32", [1, 1], "[1.5]"), ("B", "INT32", [1, 2], b),
        ("D", "INT64", [1, 1], "[9007199254740993]"),
    )  # fmt: skip
    assert decoded(spec, decode(spec, body, length)) == {
        "A": ((1, 1), np.array([1.5], "<f4").tobytes()), "B": ((1, 2), b), "C": ((1, 2), c),
        "D": ((1, 1), np.array([9007199254740993], "<i8").tobytes()),
    }  # fmt: skip


def test_binary_bytes_may_hold_nul_and_be_empty() -> None:
    blob = packed([b"", b"a\0b"])
    body, length = binary_body(("X", "BYTES", [1, 2], blob))
    assert x_of(decode(of_x("BYTES"), body, length)) == blob


@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
def test_binary_input_of_no_elements_needs_no_bytes_behind_the_json(datatype: str) -> None:
    spec = of_x(datatype)
    body, length = binary_body(("X", datatype, [1, 0], b""))
    for header_length in (None, length):
        assert decoded(spec, decode(spec, body, header_length)) == {"X": ((1, 0), b"")}


def test_header_length_equal_to_the_body_is_plain_json() -> None:
    assert x_of(decode(of_x(), VALID, len(VALID))) == naive_bytes("FP32", [1, 2, 3])


@pytest.mark.parametrize("length", [-1, -(2**70), 9999, 2**64])
def test_header_length_out_of_range(length: int) -> None:
    refused(of_x(), VALID, f"inference header size should be in range (0, {len(VALID)})", header_length=length)


def test_header_length_that_cuts_the_json() -> None:
    body, length = binary_body(("X", "FP32", [1, 3], bytes(12)))
    for wrong in (1, length - 1, length + 1, length + 11):
        refused(of_x(), body, header_length=wrong)


def test_one_byte_too_many_or_too_few() -> None:
    inputs = ("X", "FP32", [1, 3], bytes(12))
    body, length = binary_body(inputs)
    refused(of_x(), body + b"\0", "unexpected additional input data for model 'm'", header_length=length)
    refused(of_x(), body[:-1], "unexpected size for input 'X', expecting 1 additional bytes", header_length=length)
    refused(of_x(), body[:length], "unexpected size for input 'X', expecting 12 additional bytes for model 'm'")
    refused(of_x(), body[:length], "unexpected size for input 'X', expecting 12 additional bytes", header_length=length)


def test_blob_behind_pure_json() -> None:
    body, length = binary_body(("X", "FP32", [1, 3], "[1,2,3]"), blobs=b"\0")
    refused(of_x(), body, "unexpected additional input data", header_length=length)


def test_size_that_differs_from_the_shape() -> None:
    body, length = binary_body(("X", "FP32", [1, 3], bytes(8)))
    refused(of_x(), body, "input byte size mismatch for input 'X'", "Expected 12, got 8", header_length=length)


@pytest.mark.parametrize("size", ["-1", "1e1", '"12"', "true", "12.0", "null", "18446744073709551616"])
def test_binary_data_size_mistyped_or_huge(size: str) -> None:
    body, length = binary_body(("X", "FP32", [1, 3], bytes(12)))
    head = body[:length].replace(b'"binary_data_size":12', b'"binary_data_size":' + size.encode())
    refused(of_x(), head + bytes(12), "'X'", header_length=len(head))


def test_header_part_is_read_as_strictly_as_a_body() -> None:
    body, length = binary_body(("X", "FP32", [1, 3], bytes(12)))
    head = body[:length]
    for bad in (
        b"\xef\xbb\xbf" + head,
        head.replace(b'"name"', b'"name":"X","name"'),
        head[:-1] + b',"foo":"\xff"}',
        head[:-1] + b',"foo":"\\ud800"}',
        head[:-1] + b',"id":7}',
        head[:-1] + b',"foo":' + b"[" * 1000 + b"]" * 1000 + b"}",
        head[:-1] + b',"foo":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    ):
        refused(of_x(), bad + bytes(12), header_length=len(bad))


def test_raw_request() -> None:
    blob = np.array([1, 2, 3], "<f4").tobytes()
    request = decode(of_x(), blob, 0)
    assert decoded(of_x(), request) == {"X": ((1, 3), blob)}
    assert request.request_id is None
    assert request.form.binary == (True,)


def test_raw_bytes_request_carries_no_length_prefix() -> None:
    spec = model([tensor_spec("X", "BYTES", (1,))])
    assert x_of(decode(spec, b"hello", 0)) == packed([b"hello"])


def test_an_empty_raw_request_is_an_empty_tensor() -> None:
    assert decode(of_x(), b"", 0).inputs[0] is not None
    assert x_of(decode(of_x(), b"", 0)) == b""


def test_raw_request_that_cannot_be_deduced() -> None:
    refused(of_x(), bytes(13), "'X'", "13 bytes", header_length=0)
    refused(model([tensor_spec("A"), tensor_spec("B")]), bytes(12), "1 input (found 2)", header_length=0)
    refused(model([tensor_spec("X", dims=(3,))]), bytes(8), "'X'", "Expected 12, got 8", header_length=0)
