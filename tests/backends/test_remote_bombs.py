"""Answers of remote servers in which a few bytes stand for much: known for what they are before they grow."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.backends.remote_grpc_codec import MAX_PARTS, parted
from gateway.backends.remote_http1 import HttpAnswer
from gateway.backends.remote_http_codec import SLOW_BYTES
from gateway.core.outcome import Failure, FailureKind, Success
from tests.backends.test_remote_codec import answer, entry, grpc_codec, http_codec

BROKEN = FailureKind.BROKEN


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def chunk(tag: int, content: bytes) -> bytes:
    return bytes([tag << 3 | 2]) + varint(len(content)) + content


OUTPUT = chunk(1, b"y") + chunk(2, b"FP32") + chunk(3, b"\x01\x02")
BOMBS = {
    "outputs": b"\x2a\x00" * 2_000_000,
    "raw": chunk(5, OUTPUT) + b"\x32\x00" * 2_000_000,
    "unknown": b"\x78\x00" * 2_000_000,
    "parameters": b"\x22\x00" * 2_000_000,
    "described": chunk(5, OUTPUT + chunk(4, b"x" * 2_000_000)) + chunk(6, bytes(8)),
    "typed": chunk(5, OUTPUT + chunk(5, chunk(6, bytes(17 << 20)))),
    "group": b"\x0b" * 1000,
    "past the end": b"\x32\xff\xff\xff\xff\x0f",
    "long number": b"\xff" * 30,
}


@pytest.mark.parametrize("name", BOMBS)
def test_messages_that_would_become_much_larger(name: str) -> None:
    codec = grpc_codec()
    begun = time.process_time()
    found = codec.success(memoryview(BOMBS[name]), (0,))
    assert isinstance(found, Failure)
    assert found.kind is BROKEN
    assert time.process_time() - begun < 0.5


def test_raw_tensors_stay_where_they_are() -> None:
    data = np.array([1.5, 2.5], "<f4").tobytes()
    message = chunk(5, OUTPUT) + chunk(6, data) + chunk(1, b"model")
    found = grpc_codec().success(memoryview(message), (0,))
    assert isinstance(found, Success)
    assert bytes(found.outputs[0].data) == data
    described, raw = parted(memoryview(message))
    assert (described, [bytes(piece) for piece in raw]) == (chunk(5, OUTPUT) + chunk(1, b"model"), [data])
    assert MAX_PARTS > 300


@pytest.mark.parametrize(
    "document",
    [
        b"[" + b"{}," * 200_000 + b"{}]",
        b'{"outputs":[' + b"{}," * 200_000 + b"{}]}",
        b'{"outputs":[' + b'{"name":"y","datatype":"FP32","shape":[1,2],"data":[1,2],"x":"' + b"y" * 200_000 + b'"}]}',
        b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1,2],"data":' + b"[" * 90_000 + b"]" * 90_000 + b"}]}",
        b'{"outputs":[' + b'{"name":"y","datatype":"FP32","shape":[1,2],"data":[' + b"NaN," * 200_000 + b"1]}]}",
        b'{"outputs":[' + b'{"name":"y","datatype":"FP32","shape":[1,2],"data":[' + b"1," * 200_000 + b"1]}]}",
        b'{"outputs":[' + b'{"name":"y","datatype":"FP32","shape":[100001,2],"data":[' + b"1," * 200_000 + b"tru]}]}",
    ],
    ids=range(7),
)
def test_large_json_that_is_none_is_soon_known(document: bytes) -> None:
    assert len(document) > SLOW_BYTES
    begun = time.process_time()
    found = http_codec().success(HttpAnswer(200, {}, document), (0,))
    assert isinstance(found, Failure) or b'"x"' in document
    assert time.process_time() - begun < 0.5


@pytest.mark.parametrize("datatype", ["FP32", "INT64", "BYTES", "BOOL"])
def test_large_json_says_what_small_json_says(datatype: str) -> None:
    element: Any = {"FP32": 1.25, "INT64": -7, "BYTES": "é", "BOOL": True}[datatype]
    count = 200_000
    large = http_codec(datatype).success(
        answer({"outputs": [entry(datatype=datatype, shape=[count // 2, 2], data=[element] * count)]}), (0,)
    )
    small = http_codec(datatype).success(
        answer({"outputs": [entry(datatype=datatype, shape=[1, 2], data=[element] * 2)]}), (0,)
    )
    assert isinstance(large, Success)
    assert isinstance(small, Success)
    assert bytes(large.outputs[0].data) == bytes(small.outputs[0].data) * (count // 2)


def test_nan_in_large_json_comes_back() -> None:
    count = 100_000
    numbers = [float("nan"), float("-inf"), 1.5, -0.0] * (count // 4)
    found = http_codec().success(answer({"outputs": [entry(shape=[count // 2, 2], data=numbers)]}), (0,))
    assert isinstance(found, Success)
    got = np.frombuffer(found.outputs[0].data, "<f4")
    assert got.tobytes() == np.array(numbers, "<f4").tobytes() or (
        np.isnan(got[::4]).all() and np.isneginf(got[1::4]).all() and (got[2::4] == 1.5).all()
    )


def test_strings_of_an_answer_are_counted_before_they_are_read() -> None:
    item = entry(datatype="BYTES", shape=[1 << 20, 2], parameters={"binary_data_size": 1 << 23})
    begun = time.process_time()
    assert isinstance(http_codec("BYTES").success(answer({"outputs": [item]}, bytes(1 << 23)), (0,)), Failure)
    assert time.process_time() - begun < 0.5


@given(st.lists(st.sampled_from([*b"\x2a\x32\x00\x01\x08\x0a\x12\x1a\xff\x7f\x03y"]), max_size=60).map(bytes))
def test_parts_of_any_message_are_all_of_it(data: bytes) -> None:
    found = grpc_codec().success(memoryview(data), (0,))
    assert isinstance(found, Failure)
