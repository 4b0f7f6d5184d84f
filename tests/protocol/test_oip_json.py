"""Decoding whole requests: four roads, one answer; and nothing a client sends is worse than a 4xx."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import struct
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.core.model import ModelSpec
from gateway.core.request import InferRequest
from gateway.core.tensor import DATATYPE
from gateway.errors import GatewayError, InvalidRequest, Unsupported
from gateway.protocol.oip_json import LARGE_BYTES, REMEMBERED_FORMS, RequestDecoder

from .oip_samples import (
    INTEGERS, JSON_DATATYPES, NUMPY, decoded, model, naive_bytes, naive_request, packed, padded, request_body,
    tensor_bytes, tensor_spec,
)  # fmt: skip

ROADS = ["typed", "general", "large", "strict", "large strict"]


def by_road(road: str, body: bytes) -> bytes:
    """The same request, changed so that it takes `road`."""
    if road == "typed":
        return body
    if road == "general":
        return body[:-1] + b',"unknown":[{"x":1}]}'
    if road == "large":
        return padded(body)
    strict = body[:-1] + b',"unknown":NaN}'
    return strict if road == "strict" else padded(strict)


def of_x(datatype: str = "FP32", **policy: Any) -> ModelSpec:
    return model([tensor_spec("X", datatype)], **policy)


def decode(spec: ModelSpec, body: bytes, header_length: int | None = None) -> InferRequest:
    return RequestDecoder(spec).decode(body, header_length)


def refused(spec: ModelSpec, body: bytes, *words: str, header_length: int | None = None) -> None:
    decoder = RequestDecoder(spec)
    for _ in range(2):  # nothing remembered from the first refusal lets the second through
        with pytest.raises(InvalidRequest) as caught:
            decoder.decode(body, header_length)
        assert caught.value.status == 400
        for word in words:
            assert word in str(caught.value)


def x_of(request: InferRequest) -> bytes:
    return tensor_bytes(request.inputs[0])


# -- four roads, one answer ----------------------------------------------------------------------------------------


def elements(datatype: str) -> st.SearchStrategy[Any]:
    if datatype == "BOOL":
        return st.booleans()
    if datatype == "BYTES":
        return st.text(max_size=8) | st.sampled_from(['"', "\\", "\0", ":", "[{", "NaN", "-0,", "hé😀", "\u2028"])
    if datatype in INTEGERS:
        limits = np.iinfo(NUMPY[datatype])
        return st.integers(int(limits.min), int(limits.max)) | st.sampled_from([int(limits.min), int(limits.max), 0])
    floats = st.floats(allow_nan=False, allow_infinity=False) | st.floats(width=32, allow_nan=False, allow_infinity=False)
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


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
        assert request.timeout_s == (0.001 if "parameters" in document else 0.0)
        assert request.outputs == (0,)
        assert request.rows == document["inputs"][0]["shape"][0]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(JSON_DATATYPES), st.data())
def test_every_road_refuses_the_same_data(datatype: str, data: st.DataObject) -> None:
    any_json = st.none() | st.booleans() | st.integers(-(2**66), 2**66) | st.floats(allow_nan=False, allow_infinity=False)
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
def test_minus_zero_is_zero_where_integers_are_expected(road: str) -> None:
    body = by_road(road, request_body("INT32", "[]", "[1,-0]", extra='"parameters":{"timeout":-0,"custom":-0},'))
    assert decode(of_x("INT32"), body).inputs[0].shape == (1, 0)  # type: ignore[union-attr]
    assert x_of(decode(of_x("INT32"), by_road(road, request_body("INT32", "[-0,1,2]")))) == naive_bytes("INT32", [0, 1, 2])


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


# -- ambiguous or broken text --------------------------------------------------------------------------------------

VALID = request_body()


@pytest.mark.parametrize("size", [0, LARGE_BYTES])
@pytest.mark.parametrize(
    ("body", "key"),
    [
        (request_body(extra='"id":"a","id":"b",'), "id"),
        (request_body(extra='"inputs":[],'), "inputs"),
        (request_body(extra='"parameters":{"a":1,"a":1},'), "a"),
        (request_body(extra='"foo":{"b":[{"a":1,"a":2}]},'), "a"),
        (request_body(extra='"foo":1,"foo":2,'), "foo"),
        (VALID.replace(b'"name"', b'"name":"X","name"'), "name"),
        (VALID.replace(b'"data"', b'"data":[4,5,6],"data"'), "data"),
        (VALID.replace(b'"name"', b'"shape":[1,3],"name"'), "shape"),
        (VALID.replace(b'"name"', b'"\\u006eame":"X","name"'), "name"),
        (VALID.replace(b'"name"', b'"parameters":{"p":1,"p":1},"name"'), "p"),
        (VALID[:-1] + b',"outputs":[{"name":"Y","name":"Y"}]}', "name"),
    ],
)
def test_key_given_twice(size: int, body: bytes, key: str) -> None:
    refused(of_x(), padded(body, size), "twice", f"'{key}'")


@pytest.mark.parametrize("size", [0, LARGE_BYTES])
def test_colons_inside_strings_are_no_keys(size: int) -> None:
    request = decode(of_x(), padded(request_body(extra='"id":"a:b::","foo":":",'), size))
    assert request.request_id == "a:b::"


@pytest.mark.parametrize("size", [0, LARGE_BYTES])
@pytest.mark.parametrize("bad", [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xe2\x82", b"\xf5\x80\x80\x80"])
@pytest.mark.parametrize("extra", ['"id":"~",', '"foo":"~",', '"foo":{"~":1},', '"foo":[["~"]],', '"~":1,'])
def test_invalid_utf8_anywhere(size: int, bad: bytes, extra: str) -> None:
    refused(of_x(), padded(request_body(extra=extra).replace(b"~", bad), size), "UTF-8")


@pytest.mark.parametrize("size", [0, LARGE_BYTES])
@pytest.mark.parametrize("bad", ["\\ud800", "\\udfff", "\\ud800\\ud800", "\\ude00\\ud83d", "x\\uDBFF\\n"])
@pytest.mark.parametrize("extra", ['"id":"~",', '"foo":"~",', '"foo":{"~":1},', '"foo":[["~"]],', '"parameters":{"~":1},'])
def test_lone_surrogate_anywhere(size: int, bad: str, extra: str) -> None:
    refused(of_x(), padded(request_body(extra=extra.replace("~", bad)), size), "surrogate")


@pytest.mark.parametrize("size", [0, LARGE_BYTES])
def test_lone_surrogate_in_data(size: int) -> None:
    refused(of_x("BYTES"), padded(request_body("BYTES", '["a","\\ud800","b"]'), size), "surrogate")


@pytest.mark.parametrize("size", [0, LARGE_BYTES])
def test_byte_order_mark(size: int) -> None:
    refused(of_x(), b"\xef\xbb\xbf" + padded(VALID, size), "byte order mark")


@pytest.mark.parametrize("size", [0, LARGE_BYTES])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be"])
def test_other_encodings(size: int, encoding: str) -> None:
    refused(of_x(), padded(VALID, size).decode().encode(encoding))


@pytest.mark.parametrize("size", [0, LARGE_BYTES])
def test_nul(size: int) -> None:
    spec = of_x("BYTES")
    body = padded(request_body("BYTES", '["a","b\\u0000c",""]', extra='"id":"\\u0000",'), size)
    request = decode(spec, body)
    assert x_of(request) == packed([b"a", b"b\0c", b""])
    assert request.request_id == "\0"
    refused(spec, body.replace(b"\\u0000", b"\0"), "JSON")
    refused(of_x(), VALID + b"\0", "JSON")


@pytest.mark.parametrize("size", [0, LARGE_BYTES])
@pytest.mark.parametrize("tail", [b"x", b"{}", b",", b"]", b"\0", b" 1"])
def test_garbage_behind_the_object(size: int, tail: bytes) -> None:
    refused(of_x(), padded(VALID, size) + tail, "JSON")


@pytest.mark.parametrize("size", [0, LARGE_BYTES])
def test_body_cut_short_anywhere(size: int) -> None:
    body = padded(request_body(extra='"id":"hé",'), size)
    decoder = RequestDecoder(of_x())
    for cut in [*range(0, 80), *range(80, len(body), 97), len(body) - 1]:
        with pytest.raises(InvalidRequest):
            decoder.decode(body[:cut])


@pytest.mark.parametrize("body", [b"", b" ", b"[]", b"{}", b"null", b"1", b'"x"', b"true", b"[1]", b'[{"inputs":[]}]'])
@pytest.mark.parametrize("size", [0, LARGE_BYTES])
def test_other_documents(body: bytes, size: int) -> None:
    refused(of_x(), body + b" " * size)


@pytest.mark.parametrize("opening", ["[", '{"a":', '[1,{"a":[0,'])
@pytest.mark.parametrize("depth", [90, 400, 999, 1030, 200_000])
@pytest.mark.parametrize("where", ["data", "unknown", "shape", "parameter"])
def test_deep_nesting_is_answered_at_once(opening: str, depth: int, where: str) -> None:
    closing = "".join({"[": "]", "{": "}"}.get(character, "") for character in reversed(opening))
    deep = opening * depth + "1" + closing * depth
    body = {
        "data": request_body(data=f"[1,{deep},3]"),
        "unknown": request_body(extra=f'"foo":{deep},'),
        "shape": request_body(shape=deep),
        "parameter": request_body(extra=f'"parameters":{{"a":{deep}}},'),
    }[where]
    begun = time.process_time()
    if where == "unknown" and depth < 1000:
        with contextlib.suppress(InvalidRequest):  # within the parsers' own limits either is fine
            decode(of_x(), body)
    else:
        refused(of_x(), body)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("size", [0, LARGE_BYTES])
@pytest.mark.parametrize("shape", ["[1,3]", "[3,1]"])
def test_data_nesting_limit_is_the_same_on_every_road(size: int, shape: str) -> None:
    for levels, fits in ((62, True), (63, True), (64, False), (65, False), (300, False)):
        deep = "[" * levels + "2" + "]" * levels
        body = padded(request_body(data=f"[1,{deep},3]", shape=shape, extra='"id":"]]]]]]]]]]]]]]",'), size)
        if fits:
            assert x_of(decode(of_x(), body)) == naive_bytes("FP32", [1, 2, 3])
        else:
            refused(of_x(), body, "'X'", "nested deeper")


@pytest.mark.parametrize("name", ["X\\u0000", "a\\u0000b", "", "/", "~1", "%s", "é"])
@pytest.mark.parametrize("size", [0, LARGE_BYTES])
def test_odd_keys_are_only_unknown_keys(name: str, size: int) -> None:
    """simdjson looks keys up as C strings: `data\\0` must not become `data`."""
    body = request_body(extra=f'"{name}":1,"id":"7",')
    assert decode(of_x(), padded(body, size)).request_id == "7"
    hidden = VALID.replace(b'"data"', b'"data\\u0000":[9,9,9],"data"')
    assert x_of(decode(of_x(), padded(hidden, size))) == naive_bytes("FP32", [1, 2, 3])
    refused(of_x(), padded(VALID.replace(b'"data"', b'"data\\u0000"'), size), "'X' sets none")


def test_large_arrays_stay_out_of_python_objects() -> None:
    """The point of the large road; were the array turned into a list on the way, this would show it."""
    numbers = np.arange(5_000, dtype="<f4") + 0.5
    data = json.dumps(numbers.tolist())
    tensor = decode(of_x(), request_body(data=data, shape="[1,5000]", extra='"foo":{"a":[1]},')).inputs[0]
    assert tensor is not None
    assert tensor.values is None
    assert tensor.buffer == numbers.tobytes()
    frame = RequestDecoder(of_x())._large_frame(request_body(data=data, shape="[1,5000]"))
    assert frame is not None
    assert not isinstance(frame.inputs[0].data, list)


@pytest.mark.parametrize(
    "extra",
    [
        '"foo":[%s],' % ",".join(["1"] * 9_000),
        '"foo":{%s},' % ",".join(f'"k{index}":1' for index in range(5_000)),
        ",".join(f'"k{index}":1' for index in range(5_000)) + ",",
        '"foo":"%s",' % ("x" * 20_000),
    ],
)  # fmt: skip
def test_much_beside_the_data(extra: str) -> None:
    assert x_of(decode(of_x(), request_body(extra=extra))) == naive_bytes("FP32", [1, 2, 3])
    refused(of_x(), request_body(extra=extra + '"z":1,"z":2,'), "'z'", "twice")


def test_very_many_inputs() -> None:
    refused(of_x(), b'{"inputs":[' + b",".join([b"{}"] * 9_000) + b"]}", "'inputs' holds 9000 tensors")


# -- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    ("shape", "data", "words"),
    [
        ("[1,-3]", "[1,2,3]", ["'X'", "negative"]),
        ("[-1,-3]", "[1,2,3]", ["'X'", "negative"]),
        ("[1,3.0]", "[1,2,3]", ["'X'", "'shape'"]),
        ("[true,3]", "[1,2,3]", ["'X'", "'shape'"]),
        ('["1",3]', "[1,2,3]", ["'X'", "'shape'"]),
        ("[1,null]", "[1,2,3]", ["'X'", "'shape'"]),
        ("null", "[1,2,3]", ["'X'", "'shape'"]),
        ("3", "[1,2,3]", ["'X'", "'shape'"]),
        ("[0,3]", "[]", [">= 1"]),
        ("[]", "[1]", ["'X' has no shape"]),
        ("[3]", "[1,2,3]", ["unexpected shape for input 'X'"]),
        ("[9,1]", "[1,2,3,4,5,6,7,8,9]", ["batch-size must be <= 8"]),
        ("[1,3]", "[1,2]", ["'X'", "3 elements", "holds 2"]),
        ("[1,3]", "[1,2,3,4]", ["'X'", "3 elements", "holds 4"]),
        ("[1,3]", "[]", ["'X'", "3 elements", "holds 0"]),
        ("[1,2147483648]", "[]", ["'X'", "2147483648"]),
        ("[1,9223372036854775807]", "[]", ["'X'", "exceed maximum size"]),
        ("[1,9223372036854775808]", "[]", ["'X'", "exceed maximum size"]),
        ("[1099511627776,1099511627776]", "[]", ["'X'", "causes total element count to exceed maximum size of"]),
        ("[1,18446744073709551616]", "[]", ["'X'"]),
        ("[1,3]", "5", ["'X'", "'data' must be an array"]),
        ("[1,3]", "null", ["'X'", "sets none"]),
        ("[1,3]", '["1",2,3]', ["'X'", "element 0"]),
        ("[1,3]", "[true,2,3]", ["'X'", "element 0"]),
        ("[1,3]", "[null,2,3]", ["'X'", "element 0"]),
    ],
)
def test_shapes_and_counts_that_are_refused(road: str, shape: str, data: str, words: list[str]) -> None:
    refused(of_x(), by_road(road, request_body(data=data, shape=shape)), *words)


@pytest.mark.parametrize("road", ROADS)
def test_empty_row(road: str) -> None:
    request = decode(of_x(), by_road(road, request_body(data="[]", shape="[1,0]")))
    assert decoded(of_x(), request) == {"X": ((1, 0), b"")}
    assert request.rows == 1


# -- batch key, outputs, parameters --------------------------------------------------------------------------------


def test_equal_requests_share_a_batch_and_others_do_not() -> None:
    spec = model([tensor_spec("X")], [tensor_spec("P"), tensor_spec("Q")])
    decoder = RequestDecoder(spec)
    key = decoder.decode(VALID).key
    assert decoder.decode(by_road("large", VALID)).key == key
    assert decoder.decode(request_body(data="[1,2,3,4,5,6]", shape="[2,3]")).key == key
    assert decoder.decode(request_body(extra='"id":"x",')).key == key
    assert decoder.decode(request_body(data="[1,2]", shape="[1,2]")).key != key
    assert decoder.decode(VALID[:-1] + b',"outputs":[{"name":"Q"}]}').key != key
    both = VALID[:-1] + b',"outputs":[{"name":"Q"},{"name":"P"}]}'
    assert decoder.decode(both).key == key


def test_repeated_bodies_give_independent_requests() -> None:
    decoder = RequestDecoder(of_x())
    first, second = decoder.decode(VALID), decoder.decode(VALID)
    assert first is not second
    assert x_of(first) == x_of(second)


def test_request_wide_binary_flag_covers_only_unlisted_outputs() -> None:
    decoder = RequestDecoder(of_x())
    flagged = VALID[:-1] + b',"parameters":{"binary_data_output":true}'
    assert decoder.decode(flagged + b"}").form.any_binary
    assert not decoder.decode(flagged + b',"outputs":[{"name":"Y"}]}').form.any_binary
    assert decoder.decode(VALID[:-1] + b',"outputs":[{"name":"Y","parameters":{"binary_data":true}}]}').form.any_binary


def test_half_precision_output_needs_binary_on_every_road() -> None:
    spec = model([tensor_spec("X")], [tensor_spec("Y", "FP16")])
    for road in ROADS:
        refused(spec, by_road(road, VALID), "sending FP16 data via JSON is not supported", "'Y'")
    assert decode(spec, VALID[:-1] + b',"parameters":{"binary_data_output":true}}').form.any_binary


def test_half_precision_input_as_json() -> None:
    for road in ROADS:
        refused(of_x("FP16"), by_road(road, request_body("FP16")), "receiving FP16 data via JSON is not supported", "'X'")


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"FP32"', b'"fp32"', ["invalid datatype for input X"]),
        (b'"FP32"', b'"FP99"', ["invalid datatype for input X"]),
        (b'"FP32"', b'"INT32"', ["data-type is 'INT32', but model 'm' expects 'FP32'"]),
        (b'"FP32"', b"32", ["'X'", "'datatype'"]),
        (b'"name":"X",', b"", ["'name'"]),
        (b'"shape":[1,3],', b"", ["'X'", "'shape'"]),
        (b'"datatype":"FP32",', b"", ["'X'", "'datatype'"]),
        (b',"data":[1,2,3]', b"", ["'X' sets none"]),
        (b'"X"', b'"Q"', ["unexpected inference input 'Q' for model 'm'"]),
        (b'"X"', b"7", ["'name'"]),
    ],
)
def test_inputs_that_are_refused(road: str, old: bytes, new: bytes, words: list[str]) -> None:
    refused(of_x(), by_road(road, VALID.replace(old, new)), *words)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("text", ["7", "null", "true", "[]"])
def test_id_that_is_not_a_string(road: str, text: str) -> None:
    refused(of_x(), by_road(road, request_body(extra=f'"id":{text},')), "'id' must be a string")


@pytest.mark.parametrize("road", ROADS)
def test_duplicate_and_missing_inputs(road: str) -> None:
    item = VALID[len(b'{"inputs":[') : -len(b"]}")]
    refused(of_x(), by_road(road, b'{"inputs":[%b,%b]}' % (item, item)), "input 'X' already exists in request")
    refused(of_x(), by_road(road, b'{"inputs":[]}'), "expected 1 inputs but got 0 inputs", "['X']")
    refused(of_x(), by_road(road, b'{"id":"7"}'), "'inputs'")


# -- binary tensors ------------------------------------------------------------------------------------------------


def binary_body(*inputs: tuple[str, str, list[int], bytes | str], extra: str = "", blobs: bytes | None = None) -> tuple[bytes, int]:
    """(body, header length); an input whose content is text goes as JSON."""
    items = []
    for name, datatype, shape, content in inputs:
        how = (
            f'"data":{content}' if isinstance(content, str) else f'"parameters":{{"binary_data_size":{len(content)}}}'
        )
        items.append(f'{{"name":"{name}","shape":{shape},"datatype":"{datatype}",{how}}}')
    head = f'{{{extra}"inputs":[{",".join(items)}]}}'.encode()
    if blobs is None:
        blobs = b"".join(content for *_, content in inputs if isinstance(content, bytes))
    return head + blobs, len(head)


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
    refused(
        of_x(), body[:length], "unexpected size for input 'X', expecting 12 additional bytes", header_length=length
    )


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


def test_remembered_headers_are_bounded_and_never_mix_requests() -> None:
    decoder = RequestDecoder(of_x())
    for number in range(REMEMBERED_FORMS * 2 + 10):
        blob = struct.pack("<f", number)
        body, length = binary_body(("X", "FP32", [1, 1], blob), extra=f'"id":"{number}",')
        for _ in range(2):
            request = decoder.decode(body, length)
            assert x_of(request) == blob
            assert request.request_id == str(number)
    assert len(decoder._binary) <= REMEMBERED_FORMS


def test_remembered_header_still_checks_the_blobs() -> None:
    decoder = RequestDecoder(of_x("BOOL"))
    body, length = binary_body(("X", "BOOL", [1, 3], b"\0\1\1"))
    decoder.decode(body, length)
    for wrong in (body[:length] + b"\0\1\2", body[:-1], body + b"\0"):
        with pytest.raises(InvalidRequest):
            decoder.decode(wrong, length)


def test_raw_request() -> None:
    blob = np.array([1, 2, 3], "<f4").tobytes()
    request = decode(of_x(), blob, 0)
    assert decoded(of_x(), request) == {"X": ((1, 3), blob)}
    assert request.request_id is None
    assert request.form.binary == (True,)


def test_raw_bytes_request_carries_no_length_prefix() -> None:
    assert x_of(decode(of_x("BYTES"), b"hello", 0)) == packed([b"hello"])


def test_raw_request_that_cannot_be_deduced() -> None:
    refused(of_x(), bytes(13), "'X'", "13 bytes", header_length=0)
    refused(model([tensor_spec("A"), tensor_spec("B")]), bytes(12), "1 input (found 2)", header_length=0)
    refused(model([tensor_spec("X", dims=(3,))]), bytes(8), "'X'", "Expected 12, got 8", header_length=0)


# -- fuzz ----------------------------------------------------------------------------------------------------------

FUZZED = model([tensor_spec("X"), tensor_spec("B", "BYTES", optional=True), tensor_spec("I", "INT64", optional=True)])
SEEDS = [
    (VALID, None),
    (request_body(extra='"id":"a\\u00e9",', data="[[1,-0.5],[1e3]]"), None),
    (padded(request_body(data=str([[n * 0.5] for n in range(700)]), shape="[1,700]"), 5000), None),
    (request_body(data="[NaN,-Infinity,-0]", extra='"parameters":{"timeout":5,"a":"b"},'), None),
    (VALID[:-1] + b',"outputs":[{"name":"Y","parameters":{"binary_data":true}}]}', None),
    binary_body(("X", "FP32", [1, 3], bytes(12)), ("B", "BYTES", [1, 2], packed([b"a", b""]))),
    binary_body(("I", "INT64", [1, 1], "[9007199254740993]"), ("X", "FP32", [1, 3], bytes(12)), extra='"id":"q",'),
    (bytes(12), 0),
]
TOKENS = [
    b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"-", b"-0", b"1e400", b"NaN", b"Infinity", b"null", b"true", b"\xff",
    b"\xed\xa0\x80", b"\\ud800", b"\xef\xbb\xbf", b"\0", b"9" * 400, b"18446744073709551616", b"[" * 200, b"]" * 200, b".5",
    b'"inputs"', b'"data"', b'"shape"', b'"parameters"', b'{"triton_a":1}', b"-9223372036854775808", b"\\u0000", b" ",
]  # fmt: skip


def survives(decoder: RequestDecoder, body: bytes, length: int | None) -> None:
    """Either a request whose books balance, or an error the caller is to blame for."""
    try:
        request = decoder.decode(body, length)
    except GatewayError as error:
        assert error.status < 500 or isinstance(error, Unsupported)
        str(error).encode()  # fit for the wire
        assert len(str(error)) < 10_000
    else:
        decoded(decoder.spec, request)
        if request.request_id is not None:
            request.request_id.encode()


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200), st.none() | st.integers(-5, 220))
def test_random_bytes(body: bytes, length: int | None) -> None:
    survives(RequestDecoder(FUZZED), body, length)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5), st.sampled_from(TOKENS)), max_size=4))
def test_changed_requests(seed: tuple[bytes, int | None], edits: list[tuple[float, int, bytes]]) -> None:
    body, length = seed
    for where, cut, token in edits:
        at = int(where * len(body))
        body = body[:at] + token + body[at + cut :]
    decoder = RequestDecoder(FUZZED)
    survives(decoder, body, length)
    survives(decoder, body, None)


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["X", "FP32", "BYTES"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
            st.sampled_from(["inputs", "name", "shape", "datatype", "data", "parameters", "outputs", "id", "binary_data_size"]),
            inner, max_size=5,
        ),
    )
)  # fmt: skip
def test_any_json_with_the_protocols_words(document: Any) -> None:
    body = json.dumps(document).encode()
    decoder = RequestDecoder(FUZZED)
    for sent in (body, body + b" " * LARGE_BYTES):
        survives(decoder, sent, None)
    survives(decoder, b'{"inputs":[{"name":"X","shape":[1,1],"datatype":"FP32","data":[%b]}]}' % body, None)


def mutations(rng: random.Random) -> Any:
    decoders = [RequestDecoder(FUZZED), RequestDecoder(of_x()), RequestDecoder(of_x("BYTES")), RequestDecoder(of_x("INT64"))]
    while True:
        body, length = rng.choice(SEEDS)
        changed = bytearray(body)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            at = rng.randrange(len(changed) + 1)
            kind = rng.randrange(5)
            if kind == 0 and at < len(changed):
                changed[at] = rng.randrange(256)
            elif kind == 1:
                del changed[at : at + rng.randrange(1, 9)]
            elif kind == 2:
                changed[at:at] = rng.choice(TOKENS)
            elif kind == 3:
                start = rng.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + rng.randrange(40)]
            else:
                del changed[at:]
        if length is not None and rng.random() < 0.3:
            length = max(-1, length + rng.randrange(-5, 6))
        yield rng.choice(decoders), bytes(changed), length


@pytest.mark.slow
def test_300000_mutations() -> None:
    for decoder, body, length in itertools.islice(mutations(random.Random(20)), 300_000):
        survives(decoder, body, length)


def test_2000_mutations() -> None:
    for decoder, body, length in itertools.islice(mutations(random.Random(7)), 2_000):
        survives(decoder, body, length)


@pytest.mark.slow
def test_100000_mutations_mean_the_same_on_every_road() -> None:
    """A mutated body that is still a request says the same small and large, plain and with an unknown key."""
    accepted = 0
    for decoder, body, _ in itertools.islice(mutations(random.Random(5)), 100_000):
        outcomes = []
        for sent in (body, body + b" " * LARGE_BYTES, b" " * LARGE_BYTES + body):
            try:
                outcomes.append(decoded(decoder.spec, decoder.decode(sent)))
                accepted += 1
            except InvalidRequest:
                outcomes.append({})
            except Unsupported:
                outcomes.append({"": ((), b"")})
        assert outcomes[0] == outcomes[1] == outcomes[2], body
    assert accepted > 1_000
