"""The client of an HTTP/2 connection under test, and its owner, both played by the test."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.protocol.hpack_blocks import Fields, metadata_literal
from gateway.protocol.http1 import Held
from gateway.protocol.http2 import Head, Http2, Piece, Stream
from gateway.protocol.http2_fields import RequestFields
from gateway.protocol.http2_frames import (
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_HEAD_BYTES,
    GOAWAY,
    HEADERS,
    MAX_STREAM_ID,
    PREFACE,
    RST_STREAM,
    ErrorCode,
    frame,
    settings,
    unpack_head,
)
from gateway.protocol.http2_limits import Http2Limits, OpenCalls

PSEUDO: Fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/a.B/C")]
REQUEST: Fields = [*PSEUDO, (b":authority", b"x"), (b"te", b"trailers"), (b"content-type", b"application/grpc")]


def block(fields: Fields = REQUEST) -> bytes:
    return b"".join(metadata_literal(name, value) for name, value in fields)


def headers(stream_id: int, fields: Fields = REQUEST, *, end: bool = True, flags: int = 0) -> bytes:
    return frame(HEADERS, END_HEADERS | end | flags, stream_id, block(fields))


def data(stream_id: int, payload: bytes = b"", *, end: bool = False) -> bytes:
    return frame(DATA, end, stream_id, payload)


@dataclass(frozen=True)
class Sent:
    """One frame of the server."""

    kind: int
    flags: int
    stream: int
    payload: bytes


def parse(raw: bytes) -> list[Sent]:
    frames = []
    at = 0
    while at < len(raw):
        high, low, kind, flags, stream_id = unpack_head(raw, at)
        stop = at + FRAME_HEAD_BYTES + (high << 16 | low)
        frames.append(Sent(kind, flags, stream_id & MAX_STREAM_ID, raw[at + FRAME_HEAD_BYTES : stop]))
        assert stop <= len(raw)
        at = stop
    return frames


class TestHead:
    __test__ = False
    plain = False

    def __init__(self, request: RequestFields, list_bytes: int) -> None:
        self.request = request
        self.list_bytes = list_bytes
        self.content_length = request.content_length


class Peer:
    """A connection, and what it told its owner: `opened`, `received` (pieces of a stream joined), `left`."""

    def __init__(
        self, limits: Http2Limits | None = None, *, greeted: bool = True, calls: OpenCalls | None = None
    ) -> None:
        self.held = Held(1 << 30)
        self.calls = calls or OpenCalls(1 << 20)
        self.http2 = Http2(self, limits or Http2Limits(), self.held, self.calls, 0.0)
        self.heads: list[TestHead] = []
        self.opened_streams: list[int] = []
        self.bodies: dict[int, bytearray] = {}
        self.ended: list[int] = []
        self.gone: list[int] = []
        self.drained_streams: list[int] = []
        self.answer_at_end = False
        self.now = 0.0
        if greeted:
            self.send(PREFACE + settings({}))
            self.sent()

    # the owner

    def read_head(self, request: RequestFields, list_bytes: int) -> Head:
        self.heads.append(TestHead(request, list_bytes))
        return self.heads[-1]

    def new_stream(self, stream_id: int, head: Head) -> Stream:
        stream = Stream(stream_id, self.http2.peer_window, self.http2.window)
        stream.head = head
        return stream

    def opened(self, stream: Stream) -> None:
        self.opened_streams.append(stream.id)
        self.bodies[stream.id] = bytearray()

    def received(self, stream: Stream, piece: Piece, end: bool) -> None:
        assert stream.id not in self.ended, "received behind the end"
        assert stream.remote_closed is end
        self.bodies[stream.id] += piece
        if end:
            self.ended.append(stream.id)
            if self.answer_at_end:
                self.http2.send_headers(stream, b"\x88", end=True)

    def left(self, stream: Stream) -> None:
        assert stream.id not in self.http2.streams
        self.gone.append(stream.id)

    def drained(self, stream: Stream) -> None:
        self.drained_streams.append(stream.id)

    # the client

    def send(self, *parts: bytes) -> Peer:
        for part in parts:
            self.http2.receive(part, self.now)
        return self

    def raw(self) -> bytes:
        """What the server has to say since the last call."""
        self.http2.pump(1 << 30)
        raw = b"".join(self.http2.out)
        self.http2.out = []
        return raw

    def sent(self) -> list[Sent]:
        return parse(self.raw())

    def verdict(self) -> tuple[str, ...]:
        """How the server took what was sent: each GOAWAY and RST_STREAM, by name."""
        found = []
        for each in self.sent():
            if each.kind == GOAWAY:
                found.append(f"goaway {ErrorCode(int.from_bytes(each.payload[4:8], 'big')).name}")
            elif each.kind == RST_STREAM:
                found.append(f"rst {each.stream} {ErrorCode(int.from_bytes(each.payload, 'big')).name}")
        return tuple(found)

    @property
    def stream(self) -> Stream:
        """The only stream."""
        (stream,) = self.http2.streams.values()
        return stream


def end_of(sent: list[Sent], stream_id: int) -> bool:
    """Whether the server ended this stream."""
    return any(each.stream == stream_id and each.kind in {DATA, HEADERS} and each.flags & END_STREAM for each in sent)
