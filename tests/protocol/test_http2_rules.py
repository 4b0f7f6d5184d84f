"""The rules of RFC 9113 (and of RFC 7541 where it shows), one by one, by section: what h2spec checks, and more.

Each case is what a client sends behind the preface and its SETTINGS, and how the server takes it: `goaway CODE`,
`rst STREAM CODE`, or nothing. `served`: the streams whose requests are complete afterwards.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest

from gateway.protocol.http2_frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PRIORITY_FLAG,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
    frame_head,
    goaway,
    rst_stream,
    settings,
    window_update,
)
from gateway.protocol.http2_limits import Http2Limits
from tests.protocol.http2_peer import PSEUDO, REQUEST, Peer, block, data, headers

LIMITS = Http2Limits(max_streams=3, frame_bytes=16_384, stream_window_bytes=65_535, connection_window_bytes=65_535)
PROTOCOL = ("goaway PROTOCOL_ERROR",)
SIZE = ("goaway FRAME_SIZE_ERROR",)
FLOW = ("goaway FLOW_CONTROL_ERROR",)
HPACK = ("goaway COMPRESSION_ERROR",)
CALM = ("goaway ENHANCE_YOUR_CALM",)
MALFORMED = ("rst 1 PROTOCOL_ERROR",)
CLOSED = ("rst 1 STREAM_CLOSED",)
B = block()
TRAILERS = block([(b"x-t", b"1")])
UNKNOWN = 0x16
TWO = headers(1, [*REQUEST, (b"content-length", b"2")], end=False)
"""A request whose body has two bytes."""


@dataclass(frozen=True)
class Case:
    rule: str
    sent: bytes
    verdict: tuple[str, ...] = ()
    served: list[int] = field(default_factory=list)
    answered: bool = False
    """The server ends each stream as soon as its request is complete."""


def setting(key: int, value: int) -> bytes:
    return settings({key: value})


def request(*extra: tuple[bytes, bytes], without: bytes = b"-") -> bytes:
    return headers(1, [pair for pair in [*REQUEST, *extra] if pair[0] != without])


def raw_headers(payload: bytes, flags: int = END_HEADERS | END_STREAM, stream_id: int = 1) -> bytes:
    return frame(HEADERS, flags, stream_id, payload)


def priority(on: int, weight: int = 15) -> bytes:
    return struct.pack(">IB", on, weight)


CASES = [
    # 3.4 is in PREFACES below
    # 4.1 frame format
    Case("4.1 a frame of an unknown type is ignored", frame(UNKNOWN, 0, 0, b"x" * 8) + headers(1), served=[1]),
    Case("4.1 an unknown frame on a stream is ignored", frame(UNKNOWN, 255, 1, b"x") + headers(1), served=[1]),
    Case("4.1 an empty unknown frame is ignored", frame(UNKNOWN, 0, 0) + headers(1), served=[1]),
    Case("4.1 undefined flags are ignored", frame(PING, 0x16, 0, b"8 bytes!") + headers(1), served=[1]),
    Case("4.1 the reserved bit is ignored", raw_headers(B, stream_id=1 | 1 << 31), served=[1]),
    Case("4.1 the reserved bit is ignored on PING", frame(PING, 0, 1 << 31, b"8 bytes!") + headers(1), served=[1]),
    # 4.2 frame size
    Case("4.2 DATA of the largest size is taken", headers(1, end=False) + data(1, bytes(16_384), end=True), served=[1]),
    Case("4.2 DATA over the largest size", headers(1, end=False) + frame_head(16_385, DATA, 0, 1), SIZE),
    Case("4.2 padded DATA over the largest size", headers(1, end=False) + frame_head(16_385, DATA, PADDED, 1), SIZE),
    Case("4.2 HEADERS over the largest size", frame_head(16_385, HEADERS, 5, 1), SIZE),
    Case("4.2 an unknown frame over the largest size", frame_head(16_385, UNKNOWN, 0, 1), SIZE),
    # 4.3 header blocks
    Case("4.3 a block that cannot be decoded", raw_headers(b"\x00\x85\xf2\xb2\x4a\x84\xff\x84\x49\x50\x9f\xff"), HPACK),
    Case("4.3 DATA between HEADERS and CONTINUATION", frame(HEADERS, 0, 1, B) + data(1), PROTOCOL),
    Case("4.3 PRIORITY inside a block", frame(HEADERS, 0, 1, B) + frame(PRIORITY, 0, 1, priority(0)), PROTOCOL),
    Case("4.3 an unknown frame inside a block", frame(HEADERS, 0, 1, B) + frame(UNKNOWN, 0, 1), PROTOCOL),
    Case("4.3 PING inside a block", frame(HEADERS, 0, 1, B) + frame(PING, 0, 0, b"8 bytes!"), PROTOCOL),
    Case("4.3 another stream's HEADERS inside a block", frame(HEADERS, 0, 1, B) + headers(3), PROTOCOL),
    Case(
        "4.3 another stream's CONTINUATION inside a block",
        frame(HEADERS, 0, 1, B) + frame(CONTINUATION, END_HEADERS, 3),
        PROTOCOL,
    ),
    # 5.1 stream states
    Case("5.1 idle: DATA", data(1, b"x"), PROTOCOL),
    Case("5.1 idle: RST_STREAM", rst_stream(1, 8), PROTOCOL),
    Case("5.1 idle: WINDOW_UPDATE", window_update(1, 100), PROTOCOL),
    Case("5.1 idle: CONTINUATION", frame(CONTINUATION, END_HEADERS, 1, B), PROTOCOL),
    Case("5.1 idle: PRIORITY is fine", frame(PRIORITY, 0, 1, priority(0)) + headers(1), served=[1]),
    Case("5.1 half-closed (remote): DATA", headers(1) + data(1, b"x"), CLOSED, [1]),
    Case("5.1 half-closed (remote): HEADERS", headers(1) + headers(1), CLOSED, [1]),
    Case("5.1 half-closed (remote): CONTINUATION", headers(1) + frame(CONTINUATION, 4, 1, B), PROTOCOL, [1]),
    Case("5.1 half-closed (remote): WINDOW_UPDATE is fine", headers(1) + window_update(1, 1) + headers(3), (), [1, 3]),
    Case("5.1 half-closed (remote): PRIORITY is fine", headers(1) + frame(PRIORITY, 0, 1, priority(0)), (), [1]),
    Case("5.1 half-closed (remote): RST_STREAM is fine", headers(1) + rst_stream(1, 8) + headers(3), (), [1, 3]),
    Case("5.1 reset by the client: DATA", headers(1) + rst_stream(1, 8) + data(1, b"x"), CLOSED, [1]),
    Case(
        "5.1 reset by the client: HEADERS",
        headers(1) + rst_stream(1, 8) + headers(1),
        ("goaway STREAM_CLOSED",),
        [1],
    ),
    Case(
        "5.1 reset by the client: CONTINUATION",
        headers(1) + rst_stream(1, 8) + frame(CONTINUATION, 4, 1),
        PROTOCOL,
        [1],
    ),
    Case(
        "5.1 reset by the client: WINDOW_UPDATE is fine", headers(1) + rst_stream(1, 8) + window_update(1, 1), (), [1]
    ),
    Case("5.1 reset by the client: RST_STREAM is fine", headers(1) + rst_stream(1, 8) * 2, (), [1]),
    Case(
        "5.1 reset by the client: PRIORITY is fine",
        headers(1) + rst_stream(1, 8) + frame(PRIORITY, 0, 1, priority(3)),
        (),
        [1],
    ),
    Case("5.1 closed: DATA", headers(1) + data(1, b"x"), CLOSED, [1], answered=True),
    Case("5.1 closed: HEADERS", headers(1) + headers(1), ("goaway STREAM_CLOSED",), [1], answered=True),
    Case("5.1 closed: CONTINUATION", headers(1) + frame(CONTINUATION, 4, 1), PROTOCOL, [1], answered=True),
    Case("5.1 closed: WINDOW_UPDATE is fine", headers(1) + window_update(1, 9), (), [1], answered=True),
    Case("5.1 closed: RST_STREAM is fine", headers(1) + rst_stream(1, 8), (), [1], answered=True),
    Case("5.1 closed: PRIORITY is fine", headers(1) + frame(PRIORITY, 0, 1, priority(3)), (), [1], answered=True),
    # frames on a stream that the server reset, which may have been on their way
    Case("5.1 reset by us: DATA is ignored", request((b"Upper", b"")) + data(1, b"x"), MALFORMED),
    Case("5.1 reset by us: HEADERS is ignored", request((b"Upper", b"")) + headers(1), MALFORMED),
    Case("5.1 reset by us: RST_STREAM is ignored", request((b"Upper", b"")) + rst_stream(1, 8), MALFORMED),
    Case("5.1 reset by us: WINDOW_UPDATE is ignored", request((b"Upper", b"")) + window_update(1, 1), MALFORMED),
    Case("5.1 skipped streams are closed", headers(5) + headers(3), ("goaway STREAM_CLOSED",), [5]),
    Case("5.1 DATA on a skipped stream", headers(5) + data(3, b"x"), ("rst 3 STREAM_CLOSED",), [5]),
    # 5.1.1 stream identifiers
    Case("5.1.1 an even stream", headers(2), PROTOCOL),
    Case("5.1.1 DATA on an even stream", data(2, b"x"), PROTOCOL),
    Case("5.1.1 WINDOW_UPDATE on an even stream", headers(5) + window_update(2, 1), PROTOCOL, [5]),
    Case("5.1.1 RST_STREAM on an even stream", headers(5) + rst_stream(2, 1), PROTOCOL, [5]),
    Case("5.1.1 streams need not be consecutive", headers(1) + headers(101) + headers(103), (), [1, 101, 103]),
    # 5.1.2 concurrency
    Case(
        "5.1.2 more streams than were offered",
        b"".join(headers(number, end=False) for number in (1, 3, 5, 7)),
        ("rst 7 REFUSED_STREAM",),
    ),
    Case(
        "5.1.2 a refused stream may be followed by another",
        b"".join(headers(number, end=False) for number in (1, 3, 5, 7)) + rst_stream(1, 8) + headers(9),
        ("rst 7 REFUSED_STREAM",),
        [9],
    ),
    Case(
        "5.1.2 answered streams do not count",
        b"".join(headers(number) for number in (1, 3, 5, 7)),
        (),
        [1, 3, 5, 7],
        answered=True,
    ),
    # 5.3 priority (deprecated)
    Case(
        "5.3 HEADERS that depends on itself",
        raw_headers(priority(1) + B, END_HEADERS | END_STREAM | PRIORITY_FLAG),
        MALFORMED,
    ),
    Case("5.3 PRIORITY that depends on itself", headers(1) + frame(PRIORITY, 0, 1, priority(1)), MALFORMED, [1]),
    Case(
        "5.3 HEADERS with a priority",
        raw_headers(priority(0) + B, END_HEADERS | END_STREAM | PRIORITY_FLAG),
        served=[1],
    ),
    Case(
        "5.3 HEADERS too short for its priority",
        raw_headers(b"\0\0\0", END_HEADERS | END_STREAM | PRIORITY_FLAG),
        SIZE,
    ),
    # 5.5 extending
    Case("5.5 unknown settings are ignored", setting(0xFFFF, 1) + headers(1), served=[1]),
    # 6.1 DATA
    Case("6.1 DATA on stream 0", data(0, b"x"), PROTOCOL),
    Case("6.1 padding", headers(1, end=False) + frame(DATA, PADDED | 1, 1, b"\x03ab\0\0\0"), served=[1]),
    Case("6.1 padding that is all", headers(1, end=False) + frame(DATA, PADDED | 1, 1, b"\x03\0\0\0"), served=[1]),
    Case("6.1 padding of length 0", headers(1, end=False) + frame(DATA, PADDED | 1, 1, b"\x00x"), served=[1]),
    Case("6.1 padding longer than the frame", headers(1, end=False) + frame(DATA, PADDED, 1, b"\x03\0\0"), PROTOCOL),
    Case("6.1 padding as long as the frame", headers(1, end=False) + frame(DATA, PADDED, 1, b"\x01"), PROTOCOL),
    Case("6.1 padded and empty", headers(1, end=False) + frame(DATA, PADDED, 1), PROTOCOL),
    Case("6.1 padded DATA on stream 0", frame(DATA, PADDED, 0, b"\0x"), PROTOCOL),
    # 6.2 HEADERS
    Case("6.2 HEADERS on stream 0", raw_headers(B, stream_id=0), PROTOCOL),
    Case("6.2 padding", raw_headers(b"\x02" + B + b"\0\0", 5 | PADDED), served=[1]),
    Case(
        "6.2 padding and priority",
        raw_headers(b"\x01" + priority(0) + B + b"\0", 5 | PADDED | PRIORITY_FLAG),
        served=[1],
    ),
    Case("6.2 padding longer than the frame", raw_headers(b"\xff" + B, 5 | PADDED), PROTOCOL),
    Case("6.2 padded and empty", raw_headers(b"", 5 | PADDED), PROTOCOL),
    # 6.3 PRIORITY
    Case("6.3 PRIORITY on stream 0", frame(PRIORITY, 0, 0, priority(1)), PROTOCOL),
    Case("6.3 PRIORITY of 4 bytes", headers(1) + frame(PRIORITY, 0, 1, bytes(4)), ("rst 1 FRAME_SIZE_ERROR",), [1]),
    Case("6.3 PRIORITY of 6 bytes", headers(1) + frame(PRIORITY, 0, 1, bytes(6)), ("rst 1 FRAME_SIZE_ERROR",), [1]),
    Case("6.3 a huge PRIORITY", frame_head(16_000, PRIORITY, 0, 1), SIZE),
    # 6.4 RST_STREAM
    Case("6.4 RST_STREAM on stream 0", rst_stream(0, 8), PROTOCOL),
    Case("6.4 RST_STREAM of 3 bytes", headers(1) + frame(RST_STREAM, 0, 1, bytes(3)), SIZE, [1]),
    Case("6.4 RST_STREAM of 5 bytes", headers(1) + frame(RST_STREAM, 0, 1, bytes(5)), SIZE, [1]),
    Case("6.4 an unknown error code is fine", headers(1) + rst_stream(1, 0xABCD) + headers(3), (), [1, 3]),
    # 6.5 SETTINGS
    Case("6.5 SETTINGS on a stream", frame(SETTINGS, 0, 1), PROTOCOL),
    Case("6.5 an acknowledgement with a payload", frame(SETTINGS, ACK, 0, bytes(6)), SIZE),
    Case("6.5 a size that is no multiple of 6", frame(SETTINGS, 0, 0, bytes(7)), SIZE),
    Case("6.5 an empty SETTINGS is fine", settings({}) + headers(1), served=[1]),
    Case("6.5 more settings than anyone needs", frame(SETTINGS, 0, 0, bytes(6) * 33), CALM),
    Case("6.5.2 ENABLE_PUSH of 2", setting(2, 2), PROTOCOL),
    Case("6.5.2 ENABLE_PUSH of 0 and 1", setting(2, 0) + setting(2, 1) + headers(1), served=[1]),
    Case("6.5.2 INITIAL_WINDOW_SIZE over 2^31-1", setting(4, 2**31), FLOW),
    Case("6.5.2 INITIAL_WINDOW_SIZE of 2^31-1", setting(4, 2**31 - 1) + headers(1), served=[1]),
    Case("6.5.2 MAX_FRAME_SIZE below 16384", setting(5, 16_383), PROTOCOL),
    Case("6.5.2 MAX_FRAME_SIZE over 2^24-1", setting(5, 2**24), PROTOCOL),
    Case("6.5.2 MAX_FRAME_SIZE of 2^24-1", setting(5, 2**24 - 1) + headers(1), served=[1]),
    # 6.6 PUSH_PROMISE
    Case(
        "6.6 PUSH_PROMISE from a client", headers(1, end=False) + frame(PUSH_PROMISE, 4, 1, b"\0\0\0\2" + B), PROTOCOL
    ),
    Case("6.6 PUSH_PROMISE on stream 0", frame(PUSH_PROMISE, 4, 0, b"\0\0\0\2"), PROTOCOL),
    # 6.7 PING
    Case("6.7 PING on a stream", frame(PING, 0, 1, b"8 bytes!"), PROTOCOL),
    Case("6.7 PING of 6 bytes", frame(PING, 0, 0, bytes(6)), SIZE),
    Case("6.7 PING of 9 bytes", frame(PING, 0, 0, bytes(9)), SIZE),
    Case("6.7 an answer nobody asked for is ignored", frame(PING, ACK, 0, b"8 bytes!") + headers(1), served=[1]),
    # 6.8 GOAWAY
    Case("6.8 GOAWAY on a stream", frame(GOAWAY, 0, 1, bytes(8)), PROTOCOL),
    Case("6.8 GOAWAY that is too short", frame(GOAWAY, 0, 0, bytes(7)), SIZE),
    Case(
        "6.8 streams go on behind GOAWAY", headers(1, end=False) + goaway(0, 0, "bye") + data(1, end=True), served=[1]
    ),
    # 6.9 WINDOW_UPDATE
    Case("6.9 an increment of 0 on the connection", frame(WINDOW_UPDATE, 0, 0, bytes(4)), PROTOCOL),
    Case("6.9 an increment of 0 on a stream", headers(1) + frame(WINDOW_UPDATE, 0, 1, bytes(4)), MALFORMED, [1]),
    Case("6.9 WINDOW_UPDATE of 3 bytes", frame(WINDOW_UPDATE, 0, 0, bytes(3)), SIZE),
    Case("6.9 WINDOW_UPDATE of 5 bytes", headers(1) + frame(WINDOW_UPDATE, 0, 1, bytes(5)), SIZE, [1]),
    Case(
        "6.9 the increment's reserved bit is ignored",
        frame(WINDOW_UPDATE, 0, 0, b"\x80\0\0\1") + headers(1),
        served=[1],
    ),
    Case("6.9.1 the connection's window over 2^31-1", window_update(0, 2**31 - 1), FLOW),
    Case(
        "6.9.1 a stream's window over 2^31-1",
        headers(1) + window_update(1, 2**31 - 1),
        ("rst 1 FLOW_CONTROL_ERROR",),
        [1],
    ),
    Case(
        "6.9.2 a changed initial window takes a stream's over 2^31-1",
        headers(1) + window_update(1, 2**31 - 1 - 65_535) + setting(4, 65_536),
        FLOW,
        [1],
    ),
    # 6.10 CONTINUATION
    Case(
        "6.10 one CONTINUATION",
        frame(HEADERS, END_STREAM, 1, B[:5]) + frame(CONTINUATION, END_HEADERS, 1, B[5:]),
        served=[1],
    ),
    Case(
        "6.10 several CONTINUATIONs",
        frame(HEADERS, END_STREAM, 1, B[:5])
        + frame(CONTINUATION, 0, 1, B[5:6])
        + frame(CONTINUATION, 0, 1)
        + frame(CONTINUATION, END_HEADERS, 1, B[6:]),
        served=[1],
    ),
    Case(
        "6.10 CONTINUATION behind END_HEADERS",
        headers(1, end=False) + frame(CONTINUATION, END_HEADERS, 1, B),
        PROTOCOL,
    ),
    Case(
        "6.10 CONTINUATION on stream 0",
        frame(HEADERS, 0, 1, B) + frame(CONTINUATION, END_HEADERS, 0),
        PROTOCOL,
    ),
    Case("6.10 CONTINUATION behind DATA", headers(1, end=False) + data(1, b"x") + frame(CONTINUATION, 4, 1), PROTOCOL),
    Case("6.10 END_STREAM on CONTINUATION means nothing", frame(HEADERS, 0, 1, B) + frame(CONTINUATION, 5, 1), ()),
    # 7 error codes
    Case("7 an unknown error code in GOAWAY", goaway(0, 0xFFFF) + headers(1), served=[1]),
    # 8.1 messages
    Case("8.1 trailers", headers(1, end=False) + data(1, b"x") + raw_headers(TRAILERS), served=[1]),
    Case("8.1 trailers without data", headers(1, end=False) + raw_headers(TRAILERS), served=[1]),
    Case(
        "8.1 a second HEADERS without END_STREAM", headers(1, end=False) + raw_headers(TRAILERS, END_HEADERS), MALFORMED
    ),
    Case("8.1 a request as trailers", headers(1, end=False) + headers(1), MALFORMED),
    Case("8.1 a pseudo-header in the trailers", headers(1, end=False) + headers(1, [(b":path", b"/")]), MALFORMED),
    Case("8.1 an upper-case name in the trailers", headers(1, end=False) + headers(1, [(b"X", b"")]), MALFORMED),
    Case("8.1.1 content-length that is met", TWO + data(1, b"ab", end=True), served=[1]),
    Case("8.1.1 content-length over several DATA", TWO + data(1, b"a") + data(1, b"b") + data(1, end=True), served=[1]),
    Case("8.1.1 padding does not count", TWO + frame(DATA, 9, 1, b"\x02ab\0\0"), served=[1]),
    Case("8.1.1 content-length that is not reached", TWO + data(1, b"a", end=True), MALFORMED),
    Case(
        "8.1.1 content-length that is not reached, with trailers",
        TWO + data(1, b"a") + raw_headers(TRAILERS),
        MALFORMED,
    ),
    Case("8.1.1 content-length that is passed", TWO + data(1, b"abc"), MALFORMED),
    Case("8.1.1 content-length that is passed by a later DATA", TWO + data(1, b"ab") + data(1, b"c"), MALFORMED),
    Case("8.1.1 content-length without a body", request((b"content-length", b"1")), MALFORMED),
    Case("8.1.1 content-length 0 without a body", request((b"content-length", b"0")), served=[1]),
    Case("8.1.1 content-length that is no number", request((b"content-length", b"1x")), MALFORMED),
    Case("8.1.1 negative content-length", request((b"content-length", b"-1")), MALFORMED),
    Case("8.1.1 two content-lengths", request((b"content-length", b"0"), (b"content-length", b"1")), MALFORMED),
    Case(
        "8.1.1 a content-length said twice", request((b"content-length", b"0"), (b"content-length", b"0")), served=[1]
    ),
    # 8.2 fields
    Case("8.2.1 an upper-case name", request((b"X-Test", b"ok")), MALFORMED),
    Case("8.2.1 an empty name", request((b"", b"ok")), MALFORMED),
    Case("8.2.1 a blank in a name", request((b"x test", b"ok")), MALFORMED),
    Case("8.2.1 a colon in a name", request((b"x:test", b"ok")), MALFORMED),
    Case("8.2.1 a byte over 127 in a name", request((b"x\xe9", b"ok")), MALFORMED),
    Case("8.2.1 NUL in a value", request((b"x", b"a\0b")), MALFORMED),
    Case("8.2.1 CR in a value", request((b"x", b"a\rb")), MALFORMED),
    Case("8.2.1 LF in a value", request((b"x", b"a\nb")), MALFORMED),
    Case("8.2.1 LF at the end of a value", request((b"x", b"a\n")), MALFORMED),
    Case("8.2.1 a blank before a value", request((b"x", b" a")), MALFORMED),
    Case("8.2.1 a tab behind a value", request((b"x", b"a\t")), MALFORMED),
    Case("8.2.1 blanks inside a value", request((b"x", b"a b")), served=[1]),
    Case("8.2.1 an empty value", request((b"x", b"")), served=[1]),
    Case("8.2.1 a byte over 127 in a value", request((b"x", b"\xff")), served=[1]),
    *(
        Case(f"8.2.2 {name.decode()} does not exist", request((name, value)), MALFORMED)
        for name, value in (
            (b"connection", b"keep-alive"),
            (b"keep-alive", b"timeout=5"),
            (b"proxy-connection", b"keep-alive"),
            (b"transfer-encoding", b"chunked"),
            (b"upgrade", b"h2c"),
        )
    ),
    Case("8.2.2 te other than trailers", request((b"te", b"trailers, deflate")), MALFORMED),
    Case("8.2.2 no te", request(without=b"te"), served=[1]),
    # 8.3 pseudo-headers
    Case("8.3 an unknown pseudo-header", headers(1, [*PSEUDO, (b":test", b"ok")]), MALFORMED),
    Case("8.3 a pseudo-header of responses", headers(1, [*PSEUDO, (b":status", b"200")]), MALFORMED),
    Case("8.3 a pseudo-header behind a field", headers(1, [*PSEUDO, (b"x", b"1"), (b":authority", b"x")]), MALFORMED),
    *(
        Case(f"8.3.1 no {name.decode()}", request(without=name), MALFORMED)
        for name in (b":method", b":scheme", b":path")
    ),
    *(
        Case(f"8.3.1 two {name.decode()}", headers(1, [(name, value), *REQUEST]), MALFORMED)
        for name, value in (*PSEUDO, (b":authority", b"x"))
    ),
    Case("8.3.1 an empty :path", headers(1, [*PSEUDO[:2], (b":path", b"")]), MALFORMED),
    Case("8.3.1 a :path without its slash", headers(1, [*PSEUDO[:2], (b":path", b"a")]), MALFORMED),
    Case("8.3.1 a blank in :path", headers(1, [*PSEUDO[:2], (b":path", b"/a b")]), MALFORMED),
    Case("8.3.1 no :authority", request(without=b":authority"), served=[1]),
    Case("8.5 CONNECT", headers(1, [(b":method", b"CONNECT"), (b":authority", b"x:1")]), MALFORMED),
    # RFC 7541
    Case("7541 2.3.3 an index without an entry", raw_headers(b"\xc6" + B), HPACK),
    Case("7541 2.3.3 a name index without an entry", raw_headers(b"\x7f\x10\x01a" + B), HPACK),
    Case("7541 4.2 a table size update at the beginning", raw_headers(b"\x20" + B), served=[1]),
    Case("7541 4.2 a table size update behind a field", raw_headers(B + b"\x20"), HPACK),
    Case("7541 5.1 an integer without an end", raw_headers(b"\xff" + b"\xff" * 12), HPACK),
    Case("7541 5.1 a block that breaks off", raw_headers(B[:-1]), HPACK),
    Case("7541 5.2 Huffman padding over 7 bits", raw_headers(B + b"\x00\x01x\x84\xff\xff\xff\xff"), HPACK),
    Case("7541 5.2 Huffman padding of zeros", raw_headers(B + b"\x00\x01x\x81\x00"), HPACK),
    Case("7541 6.1 index 0", raw_headers(b"\x80" + B), HPACK),
    Case("7541 6.3 a table larger than was offered", raw_headers(b"\x3f\xe2\x1f" + B), HPACK),
    Case("7541 6.3 the table as large as was offered", raw_headers(b"\x3f\xe1\x1f" + B), served=[1]),
]


def play(case: Case, *, step: int | None = None) -> Peer:
    peer = Peer(LIMITS)
    peer.answer_at_end = case.answered
    if step is None:
        return peer.send(case.sent)
    return peer.send(*(case.sent[at : at + step] for at in range(0, len(case.sent), step)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_rule(case: Case) -> None:
    peer = play(case)
    assert (peer.verdict(), peer.ended) == (case.verdict, case.served)
    assert peer.http2.closed is any(text.startswith("goaway") for text in case.verdict)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_rule_byte_by_byte(case: Case) -> None:
    whole, pieces = play(case), play(case, step=1)
    assert pieces.raw() == whole.raw()
    assert (pieces.ended, pieces.gone, pieces.bodies) == (whole.ended, whole.gone, whole.bodies)


def test_there_are_as_many_rules_as_h2spec_has() -> None:
    assert len(CASES) >= 140
    assert len({case.rule for case in CASES}) == len(CASES)


SETTINGS_FRAME = settings({})
PREFACES = [
    ("the preface and SETTINGS", PREFACE + SETTINGS_FRAME, ()),
    ("the preface and SETTINGS with values", PREFACE + settings({3: 100, 4: 1000}), ()),
    ("something else", b"INVALID CONNECTION PREFACE\r\n\r\n", PROTOCOL),
    ("a preface with one wrong byte", PREFACE[:-1] + b"x", PROTOCOL),
    ("no SETTINGS but HEADERS", PREFACE + headers(1), PROTOCOL),
    ("no SETTINGS but PING", PREFACE + frame(PING, 0, 0, bytes(8)), PROTOCOL),
    ("no SETTINGS but its acknowledgement", PREFACE + frame(SETTINGS, ACK, 0), PROTOCOL),
    ("no SETTINGS but an unknown frame", PREFACE + frame(UNKNOWN, 0, 0), PROTOCOL),
    ("no SETTINGS but DATA", PREFACE + data(1, b"x"), PROTOCOL),
    ("SETTINGS that are wrong", PREFACE + setting(2, 3), PROTOCOL),
    ("binary noise", bytes(range(200)), PROTOCOL),
    ("TLS on a plain port", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", PROTOCOL),
]


@pytest.mark.parametrize("step", [None, 1])
@pytest.mark.parametrize(("what", "sent", "verdict"), PREFACES, ids=[what for what, _, _ in PREFACES])
def test_3_4_connection_preface(what: str, sent: bytes, verdict: tuple[str, ...], step: int | None) -> None:
    peer = Peer(LIMITS, greeted=False)
    peer.send(*([sent] if step is None else [sent[at : at + 1] for at in range(len(sent))]))
    found = peer.sent()
    assert ("goaway PROTOCOL_ERROR",) * peer.http2.closed == verdict
    assert peer.http2.started is not bool(verdict) or "wrong" in what
    if not verdict:
        assert [each.kind for each in found][:1] == [SETTINGS]
        assert any(each.kind == SETTINGS and each.flags == ACK for each in found)


@pytest.mark.parametrize("step", [None, 1])
def test_a_client_of_http1_is_recognised(step: int | None) -> None:
    sent = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    peer = Peer(LIMITS, greeted=False)
    peer.send(*([sent] if step is None else [sent[at : at + 1] for at in range(len(sent))]))
    assert peer.http2.foreign
    assert peer.http2.closed
    assert peer.raw() == b"", "nothing of HTTP/2 may stand before the answer"


def test_6_9_1_data_beyond_a_window() -> None:
    peer = Peer(LIMITS)
    peer.send(headers(1, end=False))
    peer.stream.paused = True
    peer.send(*[data(1, bytes(16_384))] * 3)
    assert peer.verdict() == ()
    peer.send(data(1, bytes(16_384)))
    assert peer.verdict() == ("rst 1 FLOW_CONTROL_ERROR",)
    assert peer.gone == [1]


def test_6_9_1_data_beyond_the_connections_window() -> None:
    peer = Peer(Http2Limits(connection_window_bytes=65_535, stream_window_bytes=2**20, frame_bytes=2**20))
    peer.send(headers(1, end=False), data(1, bytes(65_536)))
    assert peer.verdict() == FLOW


def test_6_5_3_settings_are_acknowledged_in_order() -> None:
    peer = Peer(LIMITS)
    peer.send(setting(4, 1), frame(PING, 0, 0, b"between!"), setting(4, 2))
    assert [(each.kind, each.flags, each.payload) for each in peer.sent()] == [
        (SETTINGS, ACK, b""),
        (PING, ACK, b"between!"),
        (SETTINGS, ACK, b""),
    ]
