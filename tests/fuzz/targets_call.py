"""Target: a whole gRPC connection with an application behind it; what is fuzzed is the body of calls.

First byte: how the bytes of the body are cut into DATA frames, and which of four calls they belong to (unary or
streaming, plain or compressed). The rest: the bytes of the messages. The framing of HTTP/2 is another target's.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from gateway.ingress.grpc_connection import GrpcConnection
from gateway.ingress.grpc_shared import Shared
from gateway.protocol.content_coding import DEFLATE, GZIP, deflate
from gateway.protocol.http1 import Held
from gateway.protocol.http2_frames import END_STREAM, HEADERS, PREFACE, settings
from gateway.protocol.http2_limits import Http2Limits
from tests.fuzz.target import Finding, Target, cut_up, require
from tests.ingress.grpc_peer import EchoApp, fields_for, prefixed
from tests.protocol.http2_peer import data, headers, parse

_LIMITS = Http2Limits(max_held_bytes=40_000, max_message_bytes=20_000)
_CODES = {0, 3, 8, 12, 13, 14}
_ENCODING = ((b"grpc-encoding", b"gzip"),)
_CALLS = [
    headers(1, fields_for(path, *more), end=False)
    for path in (b"/test.Echo/Unary", b"/test.Echo/Stream")
    for more in ((), _ENCODING)
]
_TURNS = 50
"""Of the loop: a message that is inflated takes several."""


class _Strict(logging.Handler):
    """An error that nobody foresaw is only logged; here it is a finding."""

    def emit(self, record: logging.LogRecord) -> None:
        _UNFORESEEN.append(record.getMessage())


_UNFORESEEN: list[str] = []
logging.getLogger("gateway.grpc").addHandler(_Strict())


class _Wire(asyncio.Transport):
    """Takes everything at once and keeps it."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self.written = bytearray()
        self.gone = False

    def write(self, piece: Any) -> None:
        self.written += piece

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.gone = True

    def abort(self) -> None:
        self.gone = True

    def close(self) -> None:
        self.gone = True

    def is_closing(self) -> bool:
        return self.gone

    def get_write_buffer_size(self) -> int:
        return 0


_LOOP = asyncio.new_event_loop()


def run_call(given: bytes) -> None:
    if not given:
        return
    _UNFORESEEN.clear()  # other tests in this process provoke such failures on purpose
    head, step, body = _CALLS[given[0] & 3], given[0] >> 2, given[1:]
    whole = _LOOP.run_until_complete(_talk(head, [body]))
    cut = _LOOP.run_until_complete(_talk(head, cut_up(body, 1 + step)))
    require(whole == cut, "cut, it means something else", whole, cut, body)
    if _UNFORESEEN:
        raise Finding(_UNFORESEEN.pop())


async def _talk(head: bytes, pieces: list[bytes]) -> tuple[object, ...]:
    app = EchoApp()
    shared = Shared(app, _LIMITS, Held(_LIMITS.max_held_bytes), lambda: 0.0, 0)
    connection, wire = GrpcConnection(shared), _Wire()
    connection.connection_made(wire)
    connection.data_received(PREFACE + settings({}) + head)
    for place, piece in enumerate(pieces):
        connection.data_received(data(1, piece, end=place == len(pieces) - 1))
    if not pieces:
        connection.data_received(data(1, end=True))
    for _ in range(_TURNS):
        await asyncio.sleep(0)
    frames = parse(bytes(wire.written))
    blocks = [each.payload for each in frames if each.kind == HEADERS and each.flags & END_STREAM and each.stream == 1]
    require(len(blocks) <= 1, "a call ends twice", blocks)
    messages = app.messages or [message for stream in app.streams for message in stream.messages]
    require(blocks or connection.closing, "a call does not end", pieces)
    connection.connection_lost(None)
    require(shared.held.used_bytes == 0, "something is still held", shared.held.used_bytes)
    require(shared.in_flight == 0, "calls are still in flight", shared.in_flight)
    require(all(len(message) <= _LIMITS.max_message_bytes for message in messages), "a message is too long")
    require(sum(map(len, messages)) <= 64 * 1024 * 1024, "too much is made of a few bytes")
    return messages, [status for block in blocks if (status := _status(block)) is not None], wire.gone


def _status(block: bytes) -> bytes | None:
    """`grpc-status` of a block, which is a plain literal there."""
    at = block.find(b"grpc-status")
    if at < 0:
        return None
    length = block[at + 11]
    status = block[at + 12 : at + 12 + length]
    require(int(status) in _CODES, "a strange status", status)
    return status


_BODIES = tuple(
    bytes([first]) + body
    for first in (0, 1, 2, 3, 22, 39)
    for body in (
        prefixed(b"hello"), prefixed(b"a") + prefixed(b"") + prefixed(b"b" * 300), prefixed(b"cut short")[:-3], b"",
        prefixed(deflate([b"hello"], GZIP, 1), 1), prefixed(deflate([bytes(20_001)], GZIP, 9), 1),
        prefixed(deflate([b"x" * 900], GZIP, 1), 1) + prefixed(b"plain"), prefixed(deflate([b"z"], DEFLATE, 1), 1),
        b"\2\0\0\0\1x", b"\0\xff\xff\xff\xff",
    )
)  # fmt: skip

TARGETS = (
    Target("call", run_call, _BODIES, (b"\0\0\0\0\1", b"\1\0\0\0\0", b"\1\0\0\0\x19\x1f\x8b\x08", b"\0\0\0\x4e\x21")),
)
