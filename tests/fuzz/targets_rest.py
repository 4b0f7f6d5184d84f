"""Targets: what a REST client sends as a body. First byte: the model; `binary` has the header length next."""

from __future__ import annotations

from gateway.errors import GatewayError
from gateway.protocol.content_coding import DEFLATE, GZIP, Inflation, choose_coding, deflate
from gateway.protocol.generate import Generate
from gateway.protocol.oip_json import LARGE_BYTES, RequestDecoder
from tests.fuzz.target import SPECS, Target, check_refusal, chosen, outcome, require
from tests.protocol.oip_samples import binary_body, packed, padded, request_body

_DECODERS = [RequestDecoder(spec) for spec in SPECS]
_GENERATE = [Generate(decoder) for decoder in _DECODERS]


# -- JSON: four roads ------------------------------------------------------------------------------------------------

_UNKNOWN = b',"\\u0055nknown":'
_ROADS = ("large", "general", "strict", "large strict", "large general")


def run_json(data: bytes) -> None:
    """The same body, made to take another of the four roads, means the same or is refused. First byte: model, road."""
    if not data:
        return
    place, body = chosen(data[0]), data[1:]
    spec, decoder = SPECS[place], _DECODERS[place]
    plain = outcome(lambda: decoder.decode(body), spec)
    require(plain == outcome(lambda: decoder.decode(body), spec), "the second time differs", body)
    road = _ROADS[data[0] // len(SPECS) % len(_ROADS)]
    if road == "large":
        text = b" " * LARGE_BYTES + body
    elif not body.endswith(b"}") or b"nknown" in body:
        return
    else:
        text = body[:-1] + _UNKNOWN + (b"NaN}" if "strict" in road else b'[{"x":1}]}')
        if "large" in road:
            text = padded(text)
    found = outcome(lambda: decoder.decode(text), spec)
    require(found == plain, f"the {road} road differs", plain, found, body)


_TWO_INPUTS = (
    b'{"inputs":[{"name":"X","shape":[1,2],"datatype":"INT8","data":[-128,127]},'
    b'{"name":"Z","shape":[1,1,2],"datatype":"UINT64","data":[18446744073709551615,-0]}]}'
)
_TWO_INT64 = (
    b'{"inputs":[{"name":"X","shape":[1,1],"datatype":"INT64","data":[9007199254740993]},'
    b'{"name":"Z","shape":[1,1],"datatype":"INT64","data":[[-9223372036854775808]]}],"id":"7"}'
)
_BODIES: tuple[tuple[int, bytes], ...] = (
    (0, request_body()),
    (0, request_body(data="[[1,-0.5],[1e3]]", extra='"id":"a\\u00e9",')),
    (0, request_body(data="[NaN,-Infinity,-0]", extra='"parameters":{"timeout":5,"a":"b","priority":1},')),
    (0, request_body(data="[1e39,-1.5e-400,0.1]", extra='"parameters":{"sequence_id":"q","sequence_start":true},')),
    (0, request_body()[:-1] + b',"outputs":[{"name":"Y","parameters":{"binary_data":true,"classification":2}}]}'),
    (0, request_body(shape="[2,0]", data="[]")),
    (0, request_body(data="[-0,1,-0 ]")),
    (1, _TWO_INPUTS),
    (2, request_body("BYTES", '["h\\u00e9","b\\u0000c",""]')),
    (2, request_body("BYTES", '["\\ud83d\\ude00","\\\\","a:b"]')),
    (3, request_body("BOOL", "[true,false,true]")),
    (4, request_body()),
    (5, b'{"inputs":[{"name":"X","shape":[],"datatype":"FP64","data":[3]}],"foo":{"x":[]}}'),
    (6, _TWO_INT64),
    (7, request_body("FP16")),
)  # fmt: skip
_JSON_WORDS = (
    b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"-0", b"-0.0", b"1e400", b"1e39", b"NaN", b"Infinity",
    b"-Infinity", b"null", b"true", b"false", b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\\udc00", b"\xef\xbb\xbf",
    b"\\u0000", b'""', b"18446744073709551616", b"18446744073709551615", b"-9223372036854775809",
    b"9223372036854775808", b"[[[[[[[[[[[[[[[[", b'"inputs"', b'"data"', b'"shape"', b'"datatype"', b'"name"',
    b'"parameters"', b'"outputs"', b'"id"', b'"binary_data_size"', b'"binary_data_output"', b'"classification"',
    b'"shared_memory_region"', b'"shared_memory_byte_size"', b'"sequence_id"', b'"timeout"', b'"X"', b'"Y"',
    b'"FP32"', b'"BYTES"', b'"INT8"', b'"INT64"', b'"BOOL"', b'{"triton_a":1}', b"1.0", b"1E1",
)  # fmt: skip

# -- binary ----------------------------------------------------------------------------------------------------------


def run_binary(data: bytes) -> None:
    """JSON with binary tensors behind it: remembered or not, the same."""
    if len(data) < 3:
        return
    place, length, body = chosen(data[0]), int.from_bytes(data[1:3], "little", signed=True), data[3:]
    spec, decoder = SPECS[place], _DECODERS[place]
    first = outcome(lambda: decoder.decode(body, length), spec)
    second = outcome(lambda: decoder.decode(body, length), spec)
    require(first == second, "a remembered request differs", body, length)
    if 0 < length < len(body) and body[:1] == b"{":
        # A blank more makes it a text nobody remembers.
        third = outcome(lambda: decoder.decode(b" " + body, length + 1), spec)
        require(first == third, "a blank before the JSON part changes it", body, length)


def _binary(place: int, *inputs: tuple[str, str, list[int], bytes | str], extra: str = "") -> bytes:
    body, length = binary_body(*inputs, extra=extra)
    return bytes([place]) + length.to_bytes(2, "little") + body


_BINARY = (
    _binary(0, ("X", "FP32", [1, 3], bytes(12))),
    _binary(0, ("X", "FP32", [2, 1], bytes(8)), extra='"parameters":{"binary_data_output":true},'),
    _binary(1, ("Z", "UINT64", [1, 1, 2], b"\xff" * 16), ("X", "INT8", [1, 2], "[1,2]")),
    _binary(2, ("X", "BYTES", [1, 2], packed([b"a", b""]))),
    _binary(3, ("X", "BOOL", [1, 2], b"\0\1"), ("B", "FP16", [1, 1], b"\0\x3c")),
    _binary(4, ("X", "FP32", [1, 3], bytes(12)), ("B", "BYTES", [1, 2], packed([b"a", b"\xc3\xa9"]))),
    _binary(4, ("I", "INT64", [1, 1], "[9007199254740993]"), ("X", "FP32", [1, 3], bytes(12)), extra='"id":"q",'),
    b"\0\0\0" + bytes(12),
    b"\2\0\0" + b"any bytes",
    b"\0\xff\xff{}",
)

# -- generate --------------------------------------------------------------------------------------------------------


def run_generate(data: bytes) -> None:
    if not data:
        return
    place, body = chosen(data[0]), data[1:]
    spec, generate = SPECS[place], _GENERATE[place]
    found = outcome(lambda: generate.decode(body), spec)
    require(found == outcome(lambda: generate.decode(body), spec), "the second time differs", body)


_GENERATED = (
    b'\0{"X":[1,2.5],"id":"a"}', b'\0{"X":1}', b'\1{"X":[1,2],"Z":[3,4,5,6],"timeout":7}',
    b'\2{"X":"text","stream":false}', b'\3{"X":[true],"parameters":{"max_tokens":20}}',
    b'\6{"X":-0,"Z":[],"parameters":{"priority":2}}', b'\4{"I":[9],"X":[]}',
)  # fmt: skip

# -- content coding --------------------------------------------------------------------------------------------------

INFLATED_LIMIT = 20_000


def run_coding(data: bytes) -> None:
    """First byte: the coding, and how much is made in one step. Bounded, and the same in any steps."""
    if not data:
        return
    coding, body = (GZIP, DEFLATE)[data[0] & 1], data[1:]
    whole = _inflate(coding, body, 1 << 20)
    require(whole == _inflate(coding, body, 100 + (data[0] >> 1) * 40), "steps change what comes out", body)
    choice = choose_coding(body)
    require(choice in (None, GZIP, DEFLATE), "an unknown coding", choice)
    made = deflate([body], coding, 1)
    require(_inflate(coding, made, 999) == body, "what we compress does not come out", body)


def _inflate(coding: bytes, body: bytes, most: int) -> bytes | int:
    stream = Inflation(coding, body, INFLATED_LIMIT)
    steps = 0
    try:
        while not stream.step(most):
            steps += 1
            require(steps <= INFLATED_LIMIT // most + len(body) + 2, "it goes on and on", body)
            require(stream.made <= INFLATED_LIMIT + 1, "more than the limit comes out", stream.made)
    except GatewayError as error:
        check_refusal(error)
        require(stream.made <= INFLATED_LIMIT + 1, "more than the limit comes out", stream.made)
        return error.status
    require(len(stream.result) == stream.made <= INFLATED_LIMIT, "another size", stream.made)
    return stream.result


_PLAIN = (b"", b"hello", bytes(INFLATED_LIMIT), bytes(INFLATED_LIMIT + 1), bytes(range(256)) * 4)
_CODED = (
    *(bytes([n]) + deflate([text], (GZIP, DEFLATE)[n & 1], 6) for n in (0, 1, 6, 255) for text in _PLAIN),
    b"\0gzip;q=0.5, deflate;q=0.8", b"\0identity;q=1.0,*;q=0", b"\1gzip;q=0,br,GZIP", b"\0deflate , gzip ; q=1.5",
)  # fmt: skip

TARGETS = (
    Target(
        "json",
        run_json,
        tuple(bytes([road * len(SPECS) + place]) + body for place, body in _BODIES for road in range(len(_ROADS))),
        _JSON_WORDS,
    ),
    Target("binary", run_binary, _BINARY, _JSON_WORDS),
    Target("generate", run_generate, _GENERATED, _JSON_WORDS),
    Target("coding", run_coding, _CODED, (b"gzip", b"deflate", b"identity", b";q=", b",", b"\x1f\x8b\x08")),
)
