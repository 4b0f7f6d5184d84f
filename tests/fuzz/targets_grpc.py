"""Targets: what a gRPC client sends, from the message inwards (`targets_http2.py` has what is around it).

First byte of `protobuf`: the model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

from gateway.errors import GatewayError
from gateway.protocol.grpc_messages import PREFIX_BYTES, MessageBuffer
from gateway.protocol.grpc_wire import MAX_TIMEOUT_S, binary_value, percent_encoded, read_head, timeout_of
from gateway.protocol.hpack_blocks import metadata_literal
from gateway.protocol.http2_fields import MalformedHeaders, check_trailers, read_request
from gateway.protocol.oip_grpc_cut import Openings
from gateway.protocol.oip_grpc_request import RequestReader, parameters_of
from gateway.protocol.oip_parameters import input_options, memory_area, output_options, request_options
from gateway.protocol.schema import message
from tests.fuzz.target import SPECS, Target, check_refusal, chosen, outcome, require
from tests.protocol.grpc_samples import infer_request
from tests.protocol.oip_samples import packed

# -- protobuf: two roads ---------------------------------------------------------------------------------------------

_READERS = [RequestReader(spec) for spec in SPECS]
_OPENINGS = Openings()


def run_protobuf(data: bytes) -> None:
    """The walk along the bytes and the protobuf library read the same; so does whoever remembers."""
    if not data:
        return
    place, body = chosen(data[0]), data[1:]
    spec, reader = SPECS[place], _READERS[place]
    walked = outcome(lambda: reader.read(_OPENINGS.cut(body)), spec)
    whole = outcome(lambda: reader.read(_OPENINGS.cut_whole(body)), spec)
    require(walked == whole, "the two roads differ", walked, whole, body)
    again = outcome(lambda: reader.read(_OPENINGS.cut(memoryview(body))), spec)
    require(walked == again, "the second time differs", walked, again, body)


def _sample(place: int, *inputs: Any, **more: Any) -> bytes:
    written: bytes = infer_request(*inputs, **more).SerializeToString(deterministic=True)
    return bytes([place]) + written


_MESSAGES = (
    _sample(0, ("X", "FP32", [1, 3], bytes(12))),
    _sample(0, ("X", "FP32", [1, 3], {"fp32_contents": [1.0, math.nan, -0.0]}), request_id="seven"),
    _sample(0, ("X", "FP32", [2, 1], bytes(8)), request_id="é", outputs=["Y"], version="1", extra_raw=[b"abc"]),
    _sample(0, ("X", "FP32", [1, 1], bytes(4)), outputs=[("Y", {"classification": 2})],
            parameters={"timeout": 5, "priority": ("uint64_param", 3), "sequence_id": "q", "sequence_start": True}),
    _sample(1, ("Z", "UINT64", [1, 1, 2], b"\xff" * 16), ("X", "INT8", [1, 2], b"ab")),
    _sample(1, ("Z", "UINT64", [1, 1, 2], {"uint64_contents": [1, 2**64 - 1]}),
            ("X", "INT8", [1, 2], {"int_contents": [-128, 127]})),
    _sample(2, ("X", "BYTES", [1, 2], packed([b"a", b"\xc3\xa9"]))),
    _sample(2, ("X", "BYTES", [1, 2], {"bytes_contents": [b"a", b"\xff"]})),
    _sample(3, ("X", "BOOL", [1, 2], {"bool_contents": [True, False]}), ("B", "FP16", [1, 1], None)),
    _sample(3, ("B", "FP16", [1, 1], b"\0\x3c"), ("X", "BOOL", [1, 2], b"\0\1")),
    _sample(4, ("X", "FP32", [1, 600], {"fp32_contents": [0.5] * 600})),
    _sample(4, ("I", "INT64", [1, 1], bytes(8)), ("X", "FP32", [1, 0], b"")),
    _sample(5, ("X", "FP64", [], bytes(8))),
    _sample(6, ("X", "INT64", [1, 1], {"int64_contents": [-(2**63)]}),
            ("Z", "INT64", [1, 1], {"int64_contents": [2**63 - 1]})),
    _sample(7, ("X", "FP16", [1, 2], bytes(4))),
)  # fmt: skip
_MESSAGE_WORDS = (
    b"\x0a", b"\x12", b"\x1a", b"\x22", b"\x2a", b"\x32", b"\x3a", b"\x3a\x0c", b"\x3a\x80\x00", b"\x1a\x01a",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x0b", b"\x0c", b"\x08\x01", b"\x42\x00", b"\x1a\x00", b"\x0a\x01m",
    b"FP32", b"BYTES", b"INT8", b"X", b"Y", b"\x3a\x8c\x80\x80\x80\x00", b"\xff\xff\xff\x7f",
)  # fmt: skip


# -- parameters ------------------------------------------------------------------------------------------------------

_REQUEST = message("inference.ModelInferRequest")


def run_parameters(data: bytes) -> None:
    """Parameters, shared memory's included, as a gRPC map: whoever reads them refuses or keeps to their ranges."""
    try:
        parsed = _REQUEST.FromString(data)
    except Exception:  # the library's own error; not ours to judge
        return
    found: list[dict[str, object]] = []
    for given in [parsed.parameters, *(each.parameters for each in [*parsed.inputs, *parsed.outputs])]:
        try:
            found.append(parameters_of(given, "request"))
        except GatewayError as error:
            check_refusal(error)
    for parameters in found:
        _check_parameters(parameters)


def _check_parameters(parameters: dict[str, object]) -> None:
    def read(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except GatewayError as error:
            check_refusal(error)
            return None

    size = read(lambda: input_options(parameters, "input 'x'"))
    require(size is None or 0 <= size < 2**64, "an impossible size", size)
    wanted = read(lambda: output_options(parameters, "output 'y'"))
    require(wanted is None or wanted.classes >= 0, "an impossible number of classes", wanted)
    area = read(lambda: memory_area(parameters, "input 'x'"))
    require(area is None or (0 <= area.nbytes < 2**64 and 0 <= area.offset < 2**64), "an impossible area", area)
    options = read(lambda: request_options(parameters))
    if options is not None:
        require(options.stated_timeout_s >= 0 and options.priority >= 0, "an impossible option", options)
        step = options.sequence
        require(step is None or type(step.id) in {int, str}, "a strange correlation id", step)


def _parameters(**parameters: Any) -> bytes:
    written: bytes = infer_request(parameters=parameters).SerializeToString(deterministic=True)
    return written


_GIVEN = (
    _parameters(timeout=5, priority=("uint64_param", 2**64 - 1), sequence_id=-1, sequence_start=True),
    _parameters(sequence_id="text", sequence_end=True, own=1.5, other="x"),
    _parameters(shared_memory_region="r", shared_memory_byte_size=64, shared_memory_offset=8),
    _parameters(shared_memory_region="r", shared_memory_byte_size=-1),
    _parameters(classification=3, binary_data=True, binary_data_size=-5, empty=("", 0)),
    _parameters(triton_a=1, triton_enable_empty_final_response=True),
)
_NAMES = (
    b"timeout", b"priority", b"sequence_id", b"sequence_start", b"sequence_end", b"classification", b"binary_data",
    b"shared_memory_region", b"shared_memory_byte_size", b"shared_memory_offset", b"binary_data_size", b"triton_",
    b"binary_data_output", b"\x22", b"\x12", b"\x0a", b"\x10", b"\x08", b"\x1a", b"\x21", b"\x28",
)  # fmt: skip


# -- message framing -------------------------------------------------------------------------------------------------


def run_framing(data: bytes) -> None:
    """First byte: the length of the pieces. Messages are the same however they arrive, and nothing is left behind."""
    if not data:
        return
    step, body = data[0], data[1:]
    expected, rest = _naive_messages(body)
    buffer = MessageBuffer()
    found = []
    for at in range(0, len(body), step or max(len(body), 1)):
        buffer.add(body[at : at + (step or len(body))])
        while buffer.length >= 0 and buffer.missing <= 0:
            found.append((buffer.flag, buffer.pop()))
    require(found == expected, "other messages", found, expected)
    require(len(buffer) == len(rest), "another rest", len(buffer), len(rest))
    if rest:
        require(buffer.missing > 0, "a message was missed", body)
        if len(rest) >= PREFIX_BYTES:
            require(buffer.length == int.from_bytes(rest[1:5], "big"), "another length", buffer.length)


def _naive_messages(body: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    found = []
    while len(body) >= PREFIX_BYTES:
        stop = PREFIX_BYTES + int.from_bytes(body[1:5], "big")
        if stop > len(body):
            break
        found.append((body[0], body[PREFIX_BYTES:stop]))
        body = body[stop:]
    return found, body


_FRAMED = (
    b"\0" + b"\0\0\0\0\0" * 3, b"\3" + b"\0\0\0\0\4abcd\1\0\0\0\0", b"\1\0\0\0\0\1x" * 4, b"\0\0\xff\xff\xff\xffabc",
    b"\xff" + b"\0\0\0\4\0" + bytes(1024) + b"\1\0\0\0\2zz",
)  # fmt: skip


# -- heads of calls --------------------------------------------------------------------------------------------------


def run_head(data: bytes) -> None:
    """Fields as `name NUL value NUL`: well formed or refused; what a head says is within its bounds."""
    parts = data.split(b"\0")
    fields = list(zip(parts[::2], parts[1::2], strict=False))
    with contextlib.suppress(MalformedHeaders):
        check_trailers(fields)
    try:
        request = read_request(fields)
    except MalformedHeaders as error:
        require(str(error), "a refusal without words")
        return
    require(request.content_length >= -1, "an impossible length", request.content_length)
    head = read_head(request)
    if head.timeout_s is not None:
        require(0 <= head.timeout_s <= MAX_TIMEOUT_S, "an impossible timeout", head.timeout_s)
    require(head.http_status in {200, 405, 415}, "a strange status", head.http_status)
    if head.refusal is not None:
        encoded = percent_encoded(head.refusal[1])
        require(encoded.isascii() and not {10, 13, 0} & set(encoded), "a text that is not fit for a header", encoded)
    for name, value in fields:
        timeout = timeout_of(value)
        require(timeout is None or 0 <= timeout <= MAX_TIMEOUT_S, "an impossible timeout", value)
        binary_value(value)
        require(len(metadata_literal(name, value)) >= len(value), "a literal that is too short", name)


def _fields(*extra: tuple[bytes, bytes]) -> bytes:
    fields = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/inference.GRPCInferenceService/ModelInfer"),
        (b":authority", b"localhost:8001"), (b"te", b"trailers"), (b"content-type", b"application/grpc"), *extra,
    ]  # fmt: skip
    return b"\0".join(name + b"\0" + value for name, value in fields)


_HEADS = (
    _fields(),
    _fields(
        (b"grpc-timeout", b"50m"), (b"grpc-encoding", b"gzip"), (b"grpc-accept-encoding", b"identity, deflate,gzip")
    ),
    _fields((b"grpc-timeout", b"99999999H"), (b"x-bin", b"AAEC"), (b"content-length", b"12")),
    _fields((b"grpc-timeout", b"1.5S"), (b"grpc-encoding", b"br")),
    _fields((b"content-type", b"text/plain"), (b"host", b"other"), (b"cookie", b"a=b")),
    b"grpc-status\x000",
)
_HEAD_WORDS = (
    b"\0", b":method", b":path", b":scheme", b":authority", b"te", b"trailers", b"connection", b"host",
    b"content-length", b"grpc-timeout", b"H", b"n", b"grpc-encoding", b"-bin", b"\r\n", b"A", b" ",
    b"application/grpc+proto", b":protocol",
)  # fmt: skip

TARGETS = (
    Target("protobuf", run_protobuf, _MESSAGES, _MESSAGE_WORDS, 4096),
    Target("parameters", run_parameters, _GIVEN, _NAMES, 1024),
    Target("framing", run_framing, _FRAMED, (b"\0\0\0\0\1", b"\1\0\0\0\0", b"\0\0\0\1\0")),
    Target("head", run_head, _HEADS, _HEAD_WORDS),
)
