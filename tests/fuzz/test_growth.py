"""Work and memory grow with the bytes a client sends, not with their square.

Each pattern is sent n times and 8 n times: linear work takes 8 times as long, quadratic 64. The bound lies between,
and the best of several runs counts, so a busy machine does not matter.
"""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from collections.abc import Callable

import pytest

from gateway.errors import ConfigError, GatewayError
from gateway.management_override import read_override
from gateway.protocol.content_coding import GZIP, Inflation, choose_coding, deflate
from gateway.protocol.generate import Generate
from gateway.protocol.grpc_messages import MessageBuffer
from gateway.protocol.hpack_blocks import Blocks
from gateway.protocol.http1 import Heads, Held, HttpLimits, Receiver
from gateway.protocol.http2_frames import DATA, HEADERS, PING, SETTINGS, ConnectionFault, frame
from gateway.protocol.http2_limits import Http2Limits
from gateway.protocol.model_config import parse
from gateway.protocol.model_config_json import parse_json
from gateway.protocol.oip_grpc_cut import Openings
from gateway.protocol.oip_grpc_request import RequestReader
from gateway.protocol.oip_json import RequestDecoder
from tests.fuzz.target import SPECS
from tests.protocol.http2_peer import Peer, data, headers

Run = Callable[[int], object]
"""Sends a pattern so many times."""
FACTOR = 8
BOUND = 20.0
"""Between 8 and 64."""
SHORT_S = 0.0005
"""Times are compared from here on; what takes less is not worth an attack."""
BYTES_PER_BYTE = 120
"""Memory that one byte of a request may cost while it is read: a Python object for an element of two characters."""


def json_body(piece: bytes) -> Run:
    def run(count: int) -> None:
        RequestDecoder(SPECS[4]).decode(
            b'{"inputs":[{"name":"X","shape":[1,3],"datatype":"FP32","data":[%b]}]}' % (piece * count)[:-1]
        )

    return run


def json_text(before: bytes, piece: bytes, after: bytes = b"") -> Run:
    return lambda count: RequestDecoder(SPECS[4]).decode(before + piece * count + after)


def binary(count: int) -> None:
    text = b'{"inputs":[{"name":"X","shape":[1,%d],"datatype":"BYTES","parameters":{"binary_data_size":%d}}]}'
    head = text % (count, 4 * count)
    RequestDecoder(SPECS[2]).decode(head + bytes(4 * count), len(head))


def generate(count: int) -> None:
    Generate(RequestDecoder(SPECS[0])).decode(b'{"X":[%b0]}' % (b"1," * count))


def protobuf(piece: bytes) -> Run:
    return lambda count: RequestReader(SPECS[4]).read(Openings().cut(b"\x0a\x01m" + piece * count))


def pbtxt(piece: str) -> Run:
    return lambda count: parse(piece * count)


def config_json(piece: str) -> Run:
    return lambda count: parse_json('{"input": [' + piece * count + "{}]}")


def http1(piece: bytes, step: int) -> Run:
    def run(count: int) -> None:
        limits = HttpLimits(max_head_bytes=1 << 20, max_field_bytes=1 << 20, max_fields=100_000, max_chunks=1 << 20)
        subject = Receiver(Heads(limits, lambda head: None), Held(1 << 30), 0.0)
        body = b"POST / HTTP/1.1\r\nHost: a\r\n" + piece * count
        for at in range(0, len(body), step):
            subject.receive(body[at : at + step], 0.0, 1 << 20)

    return run


CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


def http1_chunks(count: int) -> None:
    limits = HttpLimits(max_chunks=1 << 20)
    subject = Receiver(Heads(limits, lambda head: None), Held(1 << 30), 0.0)
    subject.receive(b"POST / HTTP/1.1\r\nHost: a\r\n" + CHUNKED, 0.0, 99)
    for _ in range(count):
        subject.receive(b"1\r\na\r\n", 0.0, 99)


def http2(piece: bytes, step: int = 1 << 20) -> Run:
    def run(count: int) -> None:
        peer = Peer(Http2Limits(overhead_burst=1 << 30, reset_burst=1 << 30, frame_bytes=1 << 20))
        body = headers(1, end=False) + piece * count
        for at in range(0, len(body), step):
            peer.send(body[at : at + step])
        peer.raw()

    return run


def http2_streams(count: int) -> None:
    peer = Peer(Http2Limits(max_streams=1 << 30, reset_burst=1 << 30))
    peer.answer_at_end = True
    for number in range(count):
        peer.send(headers(2 * number + 1))
    peer.raw()


def hpack(piece: bytes) -> Run:
    return lambda count: Blocks(1 << 30).decode(piece * count)


def framing(step: int) -> Run:
    def run(count: int) -> None:
        buffer = MessageBuffer()
        body = (b"\0\0\0\0\4abcd" if step > 1 else (count).to_bytes(5, "big") + bytes(4)) * (count if step > 1 else 1)
        body += bytes(count)
        for at in range(0, len(body), step):
            buffer.add(body[at : at + step])
            while buffer.length >= 0 and buffer.missing <= 0:
                buffer.pop()

    return run


def inflating(most: int) -> Run:
    def run(count: int) -> None:
        stream = Inflation(GZIP, deflate([b"0123456789" * count], GZIP, 9), 1 << 30)
        while not stream.step(most):
            pass
        assert len(stream.result) == 10 * count

    return run


def load(count: int) -> None:
    read_override({"config": "{}", **{f"file:1/{number}": "AAAA" for number in range(count)}})


PATTERNS: dict[str, tuple[Run, int]] = {
    "json: numbers": (json_body(b"1.5,"), 10_000),
    "json: a number of many digits": (json_body(b"7"), 50_000),
    "json: strings": (json_body(b'"a",'), 10_000),
    "json: NaN": (json_body(b"NaN,"), 10_000),
    "json: arrays inside": (json_body(b"[1],"), 5_000),
    "json: deep": (json_text(b"", b"["), 20_000),
    "json: deep objects": (json_text(b"", b'{"a":'), 10_000),
    "json: keys": (json_text(b'{"a":0', b',"\\u0061":1', b"}"), 3_000),
    "json: escapes": (json_text(b'{"id":"', b"\\ud83d\\ude00", b'"}'), 4_000),
    "json: backslashes": (json_text(b'{"id":"', b"\\\\", b'"}'), 20_000),
    "json: colons in a string": (json_text(b'{"id":"', b":", b'"}'), 50_000),
    "json: inputs": (json_text(b'{"inputs":[{}', b",{}", b"]}"), 5_000),
    "json: outputs": (json_text(b'{"inputs":[],"outputs":[{}', b",{}", b"]}"), 5_000),
    "json: blanks": (json_text(b"{", b" ", b"}"), 100_000),
    "json: minus signs": (json_body(b"-0,"), 10_000),
    "binary: empty strings": (binary, 4_000),
    "generate: numbers": (generate, 10_000),
    "protobuf: raw tensors": (protobuf(b"\x3a\x00"), 400),
    "protobuf: ids": (protobuf(b"\x1a\x01a"), 4_000),
    "protobuf: inputs": (protobuf(b"\x2a\x03\x0a\x01X"), 400),
    "protobuf: unknown fields": (protobuf(b"\x42\x01a"), 10_000),
    "protobuf: groups": (protobuf(b"\x43"), 5_000),
    "pbtxt: fields": (pbtxt("a: 1\n"), 1_000),
    "pbtxt: strings": (pbtxt('name: "a" "b" '), 1_000),
    "pbtxt: one string in parts": (lambda count: parse('name: ' + '"b" ' * count), 2_000),
    "pbtxt: escapes": (lambda count: parse('name: "' + "\\303" * count + '"'), 4_000),
    "pbtxt: open brackets": (pbtxt("a {"), 3_000),
    "pbtxt: comments": (pbtxt("#\n"), 3_000),
    "pbtxt: inputs": (pbtxt('input { name: "X" data_type: TYPE_FP32 dims: 1 }\n'), 100),
    "pbtxt: dims": (lambda count: parse("input { dims: [" + "1," * count + "1] }"), 1_000),
    "pbtxt: a bad token at the end of many digits": (lambda count: parse("a: " + "1" * count + "$"), 20_000),
    "config JSON: inputs": (config_json('{"name":"a"},'), 200),
    "http1: a head byte by byte": (http1(b"a", 1), 4_000),
    "http1: fields": (http1(b"X-A: b\r\n", 7), 1_000),
    "http1: blank lines": (http1(b"\r\n", 2), 1_000),
    "http1: chunks": (http1_chunks, 2_000),
    "http2: DATA of one byte": (http2(data(1, b"a")), 2_000),
    "http2: DATA byte by byte": (http2(data(1, b"abc"), 1), 200),
    "http2: PING": (http2(frame(PING, 0, 0, bytes(8))), 1_000),
    "http2: SETTINGS": (http2(frame(SETTINGS, 0, 0, b"\0\4\0\0\xff\xff")), 1_000),
    "http2: a long frame byte by byte": (
        lambda count: http2(frame(HEADERS, 0, 3, bytes(count)), 1)(1), 4_000,
    ),
    "http2: empty DATA": (http2(frame(DATA, 0, 1, b"")), 1_000),
    "http2: streams": (http2_streams, 300),
    "hpack: indices": (hpack(b"\x82"), 4_000),
    "hpack: the table's size": (hpack(b"\x20"), 4_000),
    "hpack: new entries": (hpack(b"\x40\x01a\x01b"), 2_000),
    "framing: small messages": (framing(9), 2_000),
    "framing: byte by byte": (framing(1), 60_000),
    "coding: small steps": (inflating(1000), 2_000),
    "coding: one step": (inflating(1 << 30), 10_000),
    "coding: choices": (lambda count: choose_coding(b"gzip;q=0.1," * count), 4_000),
    "load: files": (load, 500),
}  # fmt: skip


def attempt(run: Run, count: int) -> float:
    """Seconds of processor time, which a busy machine does not take away. A refusal is fine."""
    start = time.thread_time()
    with contextlib.suppress(GatewayError, ConfigError, ConnectionFault):
        run(count)
    return time.thread_time() - start


@pytest.mark.parametrize("name", PATTERNS)
def test_work_is_linear(name: str) -> None:
    run, count = PATTERNS[name]
    ratio = 0.0
    for _ in range(4):
        small = min(attempt(run, count) for _ in range(3))
        large = min(attempt(run, count * FACTOR) for _ in range(2))
        ratio = large / max(small, SHORT_S)
        if ratio < BOUND:
            return
    pytest.fail(f"{FACTOR} times as much took {ratio:.0f} times as long")


@pytest.mark.parametrize("name", [name for name in PATTERNS if name.split(":")[0] in {"json", "generate", "protobuf"}])
def test_memory_is_a_multiple_of_what_was_sent(name: str) -> None:
    run, count = PATTERNS[name]
    attempt(run, 10)
    tracemalloc.start()
    try:
        attempt(run, count)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 300_000 + count * 4 * BYTES_PER_BYTE
