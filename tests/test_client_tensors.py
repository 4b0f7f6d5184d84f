"""From what a person types to a request that fits the model, and back."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.client import Answer, ClientError
from gateway.client_tensors import HEADER_LENGTH, Output, build_request, read_data, read_outputs
from gateway.core.tensor import pack_bytes


def metadata(*inputs: tuple[str, str, list[int]], outputs: tuple[tuple[str, str], ...] = (("y", "FP32"),)) -> Any:
    return {
        "inputs": [{"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape in inputs],
        "outputs": [{"name": name, "datatype": datatype, "shape": [-1]} for name, datatype in outputs],
    }


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def sent(model: Any, data: Any) -> tuple[dict[str, Any], bytes]:
    """(the request's JSON part, what stands behind it)."""
    request = build_request(model, data)
    end = int(request.headers.get(HEADER_LENGTH, len(request.body)))
    return json.loads(request.body[:end]), request.body[end:]


ROWS = metadata(("x", "FP32", [-1, 4]))
IMAGE = metadata(("x", "FP32", [-1, 1, 2, 2]))
SCALARS = metadata(("x", "INT64", [-1]))


@pytest.mark.parametrize(
    ("model", "data", "shape", "flat"),
    [
        (ROWS, [[1, 2, 3, 4], [5, 6, 7, 8]], [2, 4], [1, 2, 3, 4, 5, 6, 7, 8]),
        (ROWS, [1, 2, 3, 4], [1, 4], [1, 2, 3, 4]),
        (ROWS, [1, 2, 3, 4, 5, 6, 7, 8], [2, 4], [1, 2, 3, 4, 5, 6, 7, 8]),
        (ROWS, {"x": [1, 2, 3, 4]}, [1, 4], [1, 2, 3, 4]),
        (IMAGE, [[1, 2, 3, 4], [5, 6, 7, 8]], [2, 1, 2, 2], [1, 2, 3, 4, 5, 6, 7, 8]),
        (IMAGE, [[[1, 2], [3, 4]]], [1, 1, 2, 2], [1, 2, 3, 4]),
        (SCALARS, [1, 2], [2], [1, 2]),
        (SCALARS, 7, [1], [7]),
        (metadata(("x", "FP32", [-1, -1])), [1, 2, 3], [1, 3], [1, 2, 3]),
        (metadata(("x", "BYTES", [-1, 1])), ["a", "b"], [2, 1], ["a", "b"]),
        (metadata(("x", "FP32", [-1, 4])), [[1, 2]], [1, 2], [1, 2]),
    ],
)
def test_the_shape_follows_the_data_and_the_models_rank(
    model: Any, data: Any, shape: list[int], flat: list[Any]
) -> None:
    request, rest = sent(model, data)
    (entry,) = request["inputs"]
    assert (entry["shape"], entry["data"], rest) == (shape, flat, b"")
    assert "outputs" not in request


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (ROWS, [[1, 2], [3]], "rows for input 'x' differ in length"),
        (ROWS, [[1, 2], 3], "rows for input 'x' differ in length"),
        (ROWS, [1, [2]], "must be nested lists of values, all equally deep"),
        (ROWS, [{"a": 1}], "must be nested lists of values"),
        (ROWS, [1, 2, 3], r"input 'x' has shape \[-1, 4\] \(-1: any\), but the data has shape \[3\]"),
        (ROWS, {"y": [1]}, "the model has no input 'y'; its inputs are x"),
        (metadata(("a", "FP32", [-1]), ("b", "FP32", [-1])), [1], 'the model has 2 inputs; name them: {"a": '),
        (metadata(("x", "FP99", [-1])), [1], "unknown datatype FP99"),
        (metadata(("x", "FP16", [-1])), ["a"], "must be numbers"),
        (ROWS, json.loads("[" * 20 + "]" * 20), "nested deeper than 16 lists"),
    ],
)
def test_data_that_does_not_fit(model: Any, data: Any, message: str) -> None:
    with pytest.raises(ClientError, match=message):
        build_request(model, data)


def test_several_inputs_by_name_and_absent_ones_left_out() -> None:
    model = metadata(("a", "FP32", [-1, 2]), ("b", "INT32", [-1]), ("c", "INT32", [-1]))
    request, _ = sent(model, {"b": [5], "a": [[1, 2]]})
    assert [(e["name"], e["shape"]) for e in request["inputs"]] == [("a", [1, 2]), ("b", [1])]


def test_a_whole_request_is_sent_as_it_is() -> None:
    request = {"id": "7", "inputs": [{"name": "q", "shape": [1], "datatype": "X", "data": [1]}]}
    assert sent(ROWS, request) == (request, b"")
    assert sent(ROWS, {"model": "m", "request": request, "response": {}}) == (request, b"")


def test_an_array_travels_in_binary_form_and_is_cast_within_its_kind() -> None:
    array = np.arange(8, dtype=np.float64).reshape(2, 4)
    request, rest = sent(ROWS, read_data(npy(array)))
    (entry,) = request["inputs"]
    assert entry == {"name": "x", "shape": [2, 4], "datatype": "FP32", "parameters": {"binary_data_size": 32}}
    assert rest == array.astype("<f4").tobytes()
    request, rest = sent(ROWS, np.asfortranarray(array.astype(">f4")))
    assert rest == array.astype("<f4").tobytes()


def test_an_array_of_another_kind_is_refused_with_the_cast_to_make() -> None:
    with pytest.raises(
        ClientError, match=r"input 'x' is INT64, the array holds float64; save it with .astype\(numpy.int64\)"
    ):
        build_request(SCALARS, np.zeros(2))
    with pytest.raises(ClientError, match="takes text; the array holds float64"):
        build_request(metadata(("x", "BYTES", [-1])), np.zeros(2))


def test_text_arrays_become_bytes_elements() -> None:
    _, rest = sent(metadata(("x", "BYTES", [-1])), np.array(["é", "ab"]))
    assert rest == pack_bytes(["é".encode(), b"ab"])


def test_halves_travel_in_binary_form_both_ways() -> None:
    model = metadata(("x", "FP16", [-1]), outputs=(("y", "FP16"), ("z", "FP32")))
    request, rest = sent(model, [1.5, -2])
    assert rest == np.array([1.5, -2], "<f2").tobytes()
    assert request["outputs"] == [
        {"name": "y", "parameters": {"binary_data": True}},
        {"name": "z", "parameters": {"binary_data": False}},
    ]


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (-2.0, 0xC000),
        (1.00390625, 0x3F80),
        (1.01171875, 0x3F82),
        (float("inf"), 0x7F80),
        (3.4e38, 0x7F80),
    ],
)
def test_bfloat16_rounds_to_nearest_even(value: float, bits: int) -> None:
    _, rest = sent(metadata(("x", "BF16", [-1])), [value])
    assert int.from_bytes(rest, "little") == bits


def test_bfloat16_keeps_nan_and_raw_bits() -> None:
    _, rest = sent(metadata(("x", "BF16", [-1])), np.array([np.nan], np.float32))
    assert int.from_bytes(rest, "little") == 0x7FC0
    _, rest = sent(metadata(("x", "BF16", [-1])), np.array([7], np.uint16))
    assert int.from_bytes(rest, "little") == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1,", "the data is not JSON"),
        (b"rows.json", "@file.json"),
        (b"\xff", "the data is not JSON"),
        (npy(np.zeros(3))[:-4], r"this \.npy file cannot be read"),
        (b"\x93NUMPY\x01\x00\x04\x00{}  ", r"this \.npy file cannot be read"),
    ],
)
def test_data_that_cannot_be_read(content: bytes, message: str) -> None:
    with pytest.raises(ClientError, match=message):
        read_data(content)


def test_a_pickled_array_is_never_loaded() -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ClientError, match=r"cannot be read: Object arrays cannot be loaded"):
        read_data(stream.getvalue())


def test_json_and_binary_outputs_are_read_in_order() -> None:
    blob = np.array([1.5, 2.5], "<f2").tobytes()
    raw = np.array([0x3F80], "<u2").tobytes()
    texts = pack_bytes([b"a", b"\xff"])
    document = {
        "outputs": [
            {"name": "h", "datatype": "FP16", "shape": [2], "parameters": {"binary_data_size": len(blob)}},
            {"name": "j", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]},
            {"name": "b", "datatype": "BF16", "shape": [1], "parameters": {"binary_data_size": len(raw)}},
            {"name": "s", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(texts)}},
        ]
    }
    head = json.dumps(document).encode()
    answer = Answer([(HEADER_LENGTH.lower(), str(len(head)))], head + blob + raw + texts, 0.0)
    assert read_outputs(answer) == [
        Output("h", "FP16", (2,), [1.5, 2.5]),
        Output("j", "INT64", (1, 2), [1, 2]),
        Output("b", "BF16", (1,), [1.0]),
        Output("s", "BYTES", (2,), ["a", "\\xff"]),
    ]


@pytest.mark.parametrize(
    "body",
    [b"[]", b"{}", b'{"outputs": [1]}', b'{"outputs": [{"name": "a", "datatype": "X", "shape": []}]}', b"3"],
)
def test_answers_that_do_not_follow_the_protocol(body: bytes) -> None:
    with pytest.raises(ClientError, match="does not follow the protocol"):
        read_outputs(Answer([], body, 0.0))


NUMBERS = st.integers(-(2**63), 2**64 - 1)


@given(st.recursive(NUMBERS | st.text() | st.none(), lambda inner: st.lists(inner, max_size=4)))
def test_any_data_is_a_request_or_a_client_error(data: Any) -> None:
    try:
        request = build_request(ROWS, read_data(json.dumps(data).encode()))
    except ClientError:
        return
    (entry,) = json.loads(request.body)["inputs"]
    assert int(np.prod(entry["shape"])) == len(entry["data"])
