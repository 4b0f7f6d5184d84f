"""Decoding whole requests: text, shapes, outputs, and the errors that name the field."""

from __future__ import annotations

import contextlib
import json
import time

import numpy as np
import pytest

from gateway.errors import InvalidRequest
from gateway.protocol.oip_json import LARGE_BYTES, RequestDecoder

from .oip_samples import (
    ROADS,
    by_road,
    decode,
    decoded,
    model,
    naive_bytes,
    of_x,
    packed,
    padded,
    refused,
    request_body,
    tensor_spec,
    x_of,
)

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
@pytest.mark.parametrize(
    "extra", ['"id":"~",', '"foo":"~",', '"foo":{"~":1},', '"foo":[["~"]],', '"parameters":{"~":1},']
)
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
    for cut in [*range(80), *range(80, len(body), 97), len(body) - 1]:
        with pytest.raises(InvalidRequest):
            decoder.decode(body[:cut])


@pytest.mark.parametrize("body", [b"", b" ", b"[]", b"{}", b"null", b"1", b'"x"', b"true", b"[1]", b'[{"inputs":[]}]'])
@pytest.mark.parametrize("size", [0, LARGE_BYTES])
def test_other_documents(body: bytes, size: int) -> None:
    refused(of_x(), body + b" " * size)


@pytest.mark.parametrize("opening", ["[", '{"a":', '[1,{"a":[0,'])
@pytest.mark.parametrize("depth", [120, 400, 999, 1030, 200_000])
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
    for levels, fits in ((62, True), (99, True), (100, False), (101, False), (300, False)):
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
        '"foo":[' + ",".join(["1"] * 9_000) + "],",
        '"foo":{' + ",".join(f'"k{index}":1' for index in range(5_000)) + "},",
        ",".join(f'"k{index}":1' for index in range(5_000)) + ",",
        '"foo":"' + "x" * 20_000 + '",',
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
    assert any(decoder.decode(flagged + b"}").form.binary)
    assert not any(decoder.decode(flagged + b',"outputs":[{"name":"Y"}]}').form.binary)
    assert any(decoder.decode(VALID[:-1] + b',"outputs":[{"name":"Y","parameters":{"binary_data":true}}]}').form.binary)


def test_half_precision_output_needs_binary_on_every_road() -> None:
    spec = model([tensor_spec("X")], [tensor_spec("Y", "FP16")])
    for road in ROADS:
        refused(spec, by_road(road, VALID), "sending FP16 data via JSON is not supported", "'Y'")
    assert any(decode(spec, VALID[:-1] + b',"parameters":{"binary_data_output":true}}').form.binary)


def test_half_precision_input_as_json() -> None:
    for road in ROADS:
        refused(
            of_x("FP16"), by_road(road, request_body("FP16")), "receiving FP16 data via JSON is not supported", "'X'"
        )


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
