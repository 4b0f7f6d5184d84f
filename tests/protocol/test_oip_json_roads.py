"""Four roads, one answer: whichever parser reads a request, the tensors are those json and numpy read."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.model import ModelSpec
from gateway.errors import InvalidRequest
from gateway.protocol.oip_json import LARGE_BYTES, RequestDecoder

from .oip_samples import (
    INTEGERS,
    JSON_DATATYPES,
    NUMPY,
    PATIENT,
    ROADS,
    by_road,
    decode,
    decoded,
    model,
    naive_bytes,
    naive_request,
    of_x,
    padded,
    refused,
    request_body,
    tensor_bytes,
    tensor_spec,
    x_of,
)


def elements(datatype: str) -> st.SearchStrategy[Any]:
    if datatype == "BOOL":
        return st.booleans()
    if datatype == "BYTES":
        return st.text(max_size=8) | st.sampled_from(['"', "\\", "\0", ":", "[{", "NaN", "-0,", "hé😀", "\u2028"])
    if datatype in INTEGERS:
        limits = np.iinfo(NUMPY[datatype])
        return st.integers(int(limits.min), int(limits.max)) | st.sampled_from([int(limits.min), int(limits.max), 0])
    floats = st.floats(allow_nan=False, allow_infinity=False) | st.floats(
        width=32, allow_nan=False, allow_infinity=False
    )
    return floats | st.integers(-(2**70), 2**70) | st.sampled_from([-0.0, 1e39, 5e-324, 2**53 + 1, 2**64 - 1, 10**300])


def nestings(draw: st.DrawFn, flat: list[Any]) -> Any:
    """`flat` with brackets put anywhere."""
    data = list(flat)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, len(data)))
        data[start:stop] = [data[start:stop]]
    return data


@st.composite
def requests(draw: st.DrawFn) -> tuple[ModelSpec, dict[str, Any]]:
    """A model and a valid request for it; some inputs optional and absent, some of equal datatype."""
    one = draw(st.sampled_from([*JSON_DATATYPES, None]))
    count = draw(st.integers(1, 3))
    specs, sent = [], []
    rows = draw(st.integers(1, 4))
    for index in range(count):
        datatype = one or draw(st.sampled_from(JSON_DATATYPES))
        name = draw(st.sampled_from(["X", "a:b", "é\n", '"q"', "%d"])) + str(index)
        optional = index > 0 and draw(st.booleans())
        specs.append(tensor_spec(name, datatype, optional=optional))
        if optional and draw(st.booleans()):
            continue
        width = draw(st.integers(0, 6))
        flat = draw(st.lists(elements(datatype), min_size=rows * width, max_size=rows * width))
        item = {"name": name, "shape": [rows, width], "datatype": datatype, "data": nestings(draw, flat)}
        sent.append(dict(draw(st.permutations(list(item.items())))))
    request: dict[str, Any] = {"inputs": draw(st.permutations(sent))}
    if draw(st.booleans()):
        request["id"] = draw(st.text(max_size=5))
    if draw(st.booleans()):
        request["parameters"] = {"a:b": 1.5, "timeout": 1000}
    if draw(st.booleans()):
        request["outputs"] = [{"name": "Y"}]
    return model(specs), request


@settings(PATIENT, max_examples=300)
@given(requests(), st.booleans(), st.sampled_from([None, (",", ":")]))
def test_every_road_reads_what_json_and_numpy_read(
    drawn: tuple[ModelSpec, dict[str, Any]], ascii_only: bool, separators: tuple[str, str] | None
) -> None:
    spec, document = drawn
    body = json.dumps(document, ensure_ascii=ascii_only, separators=separators).encode()
    expected = naive_request(body)
    decoder = RequestDecoder(spec)
    for road in ROADS:
        request = decoder.decode(by_road(road, body))
        assert decoded(spec, request) == expected, road
        assert request.request_id == (document.get("id") or None)
        assert request.stated_timeout_s == (0.001 if "parameters" in document else 0.0)
        assert request.outputs == (0,)
        assert request.rows == document["inputs"][0]["shape"][0]


@settings(PATIENT, max_examples=300)
@given(st.sampled_from(JSON_DATATYPES), st.data())
def test_every_road_refuses_the_same_data(datatype: str, data: st.DataObject) -> None:
    any_json = (
        st.none() | st.booleans() | st.integers(-(2**66), 2**66) | st.floats(allow_nan=False, allow_infinity=False)
    )
    item = st.recursive(any_json | st.text(max_size=2), lambda inner: st.lists(inner, max_size=2), max_leaves=4)
    drawn = data.draw(st.lists(elements(datatype) | item, min_size=3, max_size=3))
    body = request_body(datatype, json.dumps(drawn))
    decoder = RequestDecoder(of_x(datatype))
    outcomes = set()
    for road in ROADS:
        try:
            outcomes.add(x_of(decoder.decode(by_road(road, body))))
        except InvalidRequest:
            outcomes.add(b"refused")
    assert len(outcomes) == 1


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("datatype", JSON_DATATYPES)
def test_every_datatype_on_every_road(road: str, datatype: str) -> None:
    samples = {"BOOL": [True, False, True], "BYTES": ["hé", "b\0c", ""], "FP32": [1, 2.5, 0.1], "FP64": [1, 2.5, 0.1]}
    data = samples.get(datatype, [0, 1, 127])
    for shape in ("[1,3]", "[3,1]"):
        request = decode(of_x(datatype), by_road(road, request_body(datatype, json.dumps(data), shape)))
        assert x_of(request) == naive_bytes(datatype, data)


@pytest.mark.parametrize("text", ["-0", "-0.0", "-0e5"])
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("after", ["", " ", "\n", "\t", "\r"])
def test_minus_zero_keeps_its_sign(road: str, text: str, after: str) -> None:
    for datatype in ("FP32", "FP64"):
        body = by_road(road, request_body(datatype, f"[{text}{after},0,[{text}{after}]]"))
        assert x_of(decode(of_x(datatype), body)) == naive_bytes(datatype, [-0.0, 0.0, -0.0])


@pytest.mark.parametrize("road", ROADS)
def test_minus_zero_in_plain_requests(road: str) -> None:
    """Flat data is what the typed road accepts, and what it remembers forms of."""
    two = model([tensor_spec("X"), tensor_spec("Z")])
    item = b'{"name":"%b","shape":[1,2],"datatype":"FP32","data":[%b]}'
    both = b'{"inputs":[%b,%b]}' % (item % (b"X", b"1,2"), item % (b"Z", b"0,-0"))
    decoder = RequestDecoder(two)
    for _ in range(2):
        assert tensor_bytes(decoder.decode(by_road(road, both)).inputs[1]) == naive_bytes("FP32", [0.0, -0.0])
    decoder = RequestDecoder(of_x())
    for data, numbers in (
        ("[0,1,2]", [0.0, 1.0, 2.0]),
        ("[-0,0,1]", [-0.0, 0.0, 1.0]),
        ("[-0.5,0,-0]", [-0.5, 0.0, -0.0]),
    ):
        assert x_of(decoder.decode(by_road(road, request_body(data=data)))) == naive_bytes("FP32", numbers)


@pytest.mark.parametrize("road", ROADS)
def test_minus_zero_is_zero_where_integers_are_expected(road: str) -> None:
    body = by_road(road, request_body("INT32", "[]", "[1,-0]", extra='"parameters":{"timeout":-0,"custom":-0},'))
    assert decode(of_x("INT32"), body).inputs[0].shape == (1, 0)  # type: ignore[union-attr]
    assert x_of(decode(of_x("INT32"), by_road(road, request_body("INT32", "[-0,1,2]")))) == naive_bytes(
        "INT32", [0, 1, 2]
    )


@pytest.mark.parametrize("size", [0, LARGE_BYTES])
def test_literals_nan_and_infinity(size: int) -> None:
    body = padded(request_body("FP32", "[NaN, Infinity, -Infinity]"), size)
    assert x_of(decode(of_x(), body)) == np.array([np.nan, np.inf, -np.inf], "<f4").tobytes()
    refused(of_x("INT32"), padded(request_body("INT32", "[1,NaN,2]"), size), "'X'", "element 1")
    refused(of_x(), padded(request_body("FP32", "[1,nan,2]"), size), "JSON")


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("number", ["1e400", "-1e400", "9" * 310, "-" + "9" * 399, "9" * 1000, "9" * 5000])
def test_number_over_every_float_is_refused(road: str, number: str) -> None:
    for datatype in ("FP32", "FP64"):
        refused(of_x(datatype), by_road(road, request_body(datatype, f"[1,{number},2]")))


@pytest.mark.parametrize("road", ROADS)
def test_integer_over_64_bits_is_a_fine_float(road: str) -> None:
    numbers = [2**64, 10**308, -(10**25)]
    body = by_road(road, request_body("FP64", str(numbers)))
    assert x_of(decode(of_x("FP64"), body)) == np.array([float(n) for n in numbers], "<f8").tobytes()


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("datatype", INTEGERS)
def test_integer_limits_are_exact(road: str, datatype: str) -> None:
    low, high = int(np.iinfo(NUMPY[datatype]).min), int(np.iinfo(NUMPY[datatype]).max)
    spec = of_x(datatype)
    assert x_of(decode(spec, by_road(road, request_body(datatype, f"[{low},{high},1]")))) == naive_bytes(
        datatype, [low, high, 1]
    )
    for wrong in (low - 1, high + 1):
        refused(spec, by_road(road, request_body(datatype, f"[0,{wrong},1]")), "'X'", datatype)
