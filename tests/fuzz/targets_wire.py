"""Targets: what arrives on a socket, before anybody knows whose it is. First byte: how the bytes are cut into reads."""

from __future__ import annotations

from hpack import Encoder

from gateway.protocol.hpack_blocks import Blocks
from gateway.protocol.http1 import Continue, Event, Heads, Held, HttpLimits, Receiver, Reject, Request
from gateway.protocol.http2 import Head, Http2, Piece, Stream
from gateway.protocol.http2_fields import RequestFields
from gateway.protocol.http2_frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_WINDOW,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ConnectionFault,
    frame,
    settings,
)
from gateway.protocol.http2_limits import Http2Limits, OpenCalls
from tests.fuzz.target import Target, cut_up, require
from tests.protocol.http2_peer import REQUEST, block, data, headers, parse

# -- HTTP/1 ----------------------------------------------------------------------------------------------------------

_HTTP1 = HttpLimits(max_body_bytes=400, max_head_bytes=1000, max_skipped_body_bytes=100, max_chunks=20)
_HTTP1_MANY = 10_000
_HEADS = Heads(_HTTP1, lambda head: None)
_STATUSES = {501, 505}


def run_http1(given: bytes) -> None:
    """The same events however the bytes are cut; refusals are the client's fault; all that was held is given back."""
    if not given:
        return
    body = given[1:]
    whole = _http1_events([body])
    require(whole == _http1_events(cut_up(body, 1 + given[0] % 16)), "cut, it means something else", body)


def _http1_events(pieces: list[bytes]) -> list[tuple[object, ...]]:
    held = Held(_HTTP1.max_held_bytes)
    subject = Receiver(_HEADS, held, 0.0)
    seen: list[tuple[object, ...]] = []
    events: list[Event] = []
    for piece in pieces:
        taken = subject.take_whole(piece)
        if taken is not None:
            length = taken.length
            seen.append(("request", taken.method, taken.path, piece[len(piece) - length :] if length else b""))
            held.used_bytes -= length
            continue
        events = subject.receive(piece, 0.0, _HTTP1_MANY)
        seen += [found for event in events if (found := _http1_seen(event, held))]
        require(0 <= held.used_bytes <= 1000 + 400 + 70_000, "more is held than may be", held.used_bytes)
    subject.close()
    require(held.used_bytes == 0, "something is still held", held.used_bytes)
    return seen


def _http1_seen(event: Event, held: Held) -> tuple[object, ...]:
    if isinstance(event, Request):
        require(len(event.body) <= _HTTP1.max_body_bytes, "a body over the limit", len(event.body))
        held.used_bytes -= len(event.body)
        return ("request", event.head.method, event.head.path, bytes(event.body))
    if isinstance(event, Reject):
        status = event.error.status
        require(400 <= status < 500 or status in _STATUSES, "a client's fault is a 5xx", event.error)
        return ("reject", status, event.close)
    require(isinstance(event, Continue), "a strange event", event)
    return ()


_POST = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: a\r\n"
_HTTP1_SEEDS = (
    b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n" * 2,
    _POST + b"Content-Length: 5\r\n\r\nhelloGET / HTTP/1.0\r\n\r\n",
    _POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nT: u\r\n\r\n",
    _POST + b"Content-Length: 500\r\n\r\n" + b"x" * 20,
    _POST + b"Content-Length: 3\r\nExpect: 100-continue\r\nConnection: close\r\n\r\nabc",
    _POST + b"Content-Length: 3\r\nInference-Header-Content-Length: 1\r\nContent-Encoding: gzip\r\n\r\nabc",
    b"\r\n\r\nGET http://a/v2?x=%41 HTTP/1.1\r\nhost: a\r\nX-Request-Timeout-Ms: 5\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
    PREFACE,
)
_HTTP1_WORDS = (
    b"\r\n", b"\n", b"\r", b": ", b"\0", b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"Host: a\r\n",
    b"0\r\n\r\n", b"HTTP/1.1", b"HTTP/1.0", b"GET ", b"POST ", b"Expect: 100-continue\r\n", b"Connection: close\r\n",
    b"%2f", b";", b"\t", b"ffffffffffffffff\r\n", b"00000000000000001\r\n", b"\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\n",
    b"Upgrade: x\r\n",
)  # fmt: skip

# -- HTTP/2 ----------------------------------------------------------------------------------------------------------

_HTTP2 = Http2Limits(
    max_streams=4, max_header_list_bytes=600, max_continuations=3, stream_window_bytes=65_535, frame_bytes=16_384,
    connection_window_bytes=65_535, overhead_burst=30, reset_burst=10,
)  # fmt: skip
_ANSWER_BYTES = 100
_GREETING = PREFACE + settings({})


class _Head:
    plain = False

    def __init__(self, request: RequestFields) -> None:
        self.content_length = request.content_length


class _Owner:
    """Answers every request that is complete, and writes down what it is told."""

    def __init__(self) -> None:
        self.held = Held(1 << 30)
        self.calls = OpenCalls(1 << 20)
        self.http2 = Http2(self, _HTTP2, self.held, self.calls, 0.0)
        self.bodies: dict[int, bytes] = {}
        self.told: list[tuple[str, int]] = []
        self.wire: list[Piece] = []

    def read_head(self, request: RequestFields, list_bytes: int) -> Head:
        return _Head(request)

    def new_stream(self, stream_id: int, head: Head) -> Stream:
        require(stream_id & 1, "an even stream", stream_id)
        return Stream(stream_id, self.http2.peer_window, self.http2.window)

    def opened(self, stream: Stream) -> None:
        require(stream.id not in self.bodies, "a stream is opened twice", stream.id)
        require(len(self.http2.streams) <= _HTTP2.max_streams, "too many streams", len(self.http2.streams))
        self.bodies[stream.id] = b""
        self.told.append(("opened", stream.id))

    def received(self, stream: Stream, piece: Piece, end: bool) -> None:
        require(("ended", stream.id) not in self.told, "received behind the end", stream.id)
        self.bodies[stream.id] += bytes(piece)
        if end:
            self.told.append(("ended", stream.id))
            self.http2.send_headers(stream, b"\x88")
            self.http2.send_data(stream, [bytes(_ANSWER_BYTES)], _ANSWER_BYTES)
            self.http2.send_trailers(stream, b"\x88")

    def left(self, stream: Stream) -> None:
        require(stream.id not in self.http2.streams, "it left and is still there", stream.id)
        self.told.append(("left", stream.id))

    def drained(self, stream: Stream) -> None:
        pass

    def collect(self) -> None:
        if self.http2.waiting:
            self.http2.pump(1 << 20)
        self.wire += self.http2.out
        self.http2.out = []

    def take(self, pieces: list[bytes]) -> tuple[object, ...]:
        for piece in pieces:
            self.http2.receive(piece, 0.0)
        self.collect()
        ignored = {each.stream for each in parse(b"".join(self.wire)) if each.kind == RST_STREAM}
        bodies = {number: body for number, body in self.bodies.items() if number not in ignored}
        return bodies, self.told, self.http2.closed, self.http2.foreign, sorted(self.http2.streams)


def run_http2(given: bytes) -> None:
    """What the owner is told does not depend on the cuts; nothing raises; what goes out are whole frames, in bounds."""
    if not given:
        return
    # The high bit leaves the greeting to the input.
    stream = given[1:] if given[0] & 128 else _GREETING + given[1:]
    first, second = _Owner(), _Owner()
    whole, cut = first.take([stream]), second.take(cut_up(stream, 1 + (given[0] & 127)))
    require(whole == cut, "cut, it means something else", whole, cut, stream)
    for owner in (first, second):
        _check_http2(owner, len(stream))


def _check_http2(owner: _Owner, received: int) -> None:
    http2 = owner.http2
    frames = parse(b"".join(owner.wire))
    # An answer to a frame of nine bytes is at most a header, 100 bytes in nine-byte frames, and its end.
    require(
        sum(len(each.payload) + 9 for each in frames) < 1000 + received * 12, "it says more than it was told", received
    )
    for stream in http2.streams.values():
        require(stream.send_window <= MAX_WINDOW, "a window over 2^31-1", stream.send_window)
    require(sum(each.kind == GOAWAY for each in frames) <= 1 + http2.closed, "it says goodbye twice", frames)
    if http2.closed and not http2.foreign and frames:
        require(frames[-1].kind == GOAWAY, "GOAWAY is not the last", frames[-1])
    for stream in list(http2.streams.values()):
        http2.forget(stream)
    require(owner.held.used_bytes == 0, "something is still held", owner.held.used_bytes)
    require(owner.calls.count == 0, "calls are still counted", owner.calls.count)


def _encoded(count: int) -> bytes:
    encoder = Encoder()
    return b"".join(
        frame(HEADERS, END_HEADERS | END_STREAM, 2 * number + 1, encoder.encode(REQUEST)) for number in range(count)
    )


_HALF = len(block()) // 2
_HTTP2_SEEDS = (
    headers(1) + headers(3),
    headers(1, end=False) + data(1, b"abc") + data(1, b"de", end=True),
    headers(1, [*REQUEST, (b"content-length", b"3")], end=False) + data(1, b"abc", end=True),
    frame(HEADERS, END_STREAM, 1, block()[:_HALF]) + frame(CONTINUATION, END_HEADERS, 1, block()[_HALF:]),
    headers(1, end=False) + frame(DATA, PADDED | END_STREAM, 1, b"\3abc\0\0\0"),
    settings({INITIAL_WINDOW_SIZE: 10})
    + headers(1)
    + frame(WINDOW_UPDATE, 0, 1, b"\0\0\1\0")
    + frame(SETTINGS, ACK, 0),
    frame(PING, 0, 0, b"12345678") + frame(PRIORITY, 0, 3, b"\0\0\0\1\5") + frame(GOAWAY, 0, 0, bytes(8)),
    headers(1, end=False) + frame(RST_STREAM, 0, 1, bytes(4)) + data(1, b"late") + headers(3),
    headers(1, end=False) + headers(1, [(b"x-trailer", b"y")]),
    settings({INITIAL_WINDOW_SIZE: MAX_WINDOW}) + headers(1) + frame(WINDOW_UPDATE, 0, 1, b"\x7f\xff\xff\xff"),
    frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") + frame(77, 255, 9, b"unknown") + headers(1),
    _encoded(6),
)
_HTTP2_WORDS = (
    *(bytes([0, 0, length, kind]) for length in (0, 1, 4, 5, 8) for kind in range(10)), block(), b"\0\0\0\1",
    b"\0\0\0\3", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\1", b"\0\4", b"\0\5", b"\0\1", b"\x88", b"\x82\x86\x84",
    b"\x3f\xe1\x1f", b"\x20",
)  # fmt: skip

# -- HPACK -----------------------------------------------------------------------------------------------------------


def run_hpack(given: bytes) -> None:
    """Blocks with their lengths in front, through one decoder that remembers and one that does not."""
    remembering, plain = Blocks(400), Blocks(400)
    at = 0
    while at < len(given):
        piece = given[at + 1 : at + 1 + given[at]]
        at += 1 + given[at]
        found = remembering.remembered.get(piece)
        fresh: object
        try:
            fresh = plain.decode(piece)[0]
        except ConnectionFault as fault:
            require(found is None, "a remembered block cannot be decoded", piece, found)
            try:
                remembering.decode(piece)
            except ConnectionFault as second:
                require(second.code == fault.code, "another fault", second.code, fault.code)
                return
            require(condition=False, what="only one of two decoders refuses")
        if found is None:
            found, keep = remembering.decode(piece)
            if keep:
                remembering.remember(piece, found)
        require(found == fresh, "a remembered block means something else", found, fresh)
        require(sum(len(n) + len(v) + 32 for n, v in found) <= 400 * 4 + 32, "a list that is too long", len(found))
    require(len(remembering.remembered) <= 256, "too much is remembered", len(remembering.remembered))


def _blocks(*lists: list[tuple[bytes, bytes]], huffman: bool = True) -> bytes:
    encoder = Encoder()
    made = [encoder.encode(fields, huffman=huffman) for fields in lists]
    return b"".join(bytes([len(each)]) + each for each in made)


_HPACK_SEEDS = (
    _blocks(REQUEST, REQUEST, REQUEST),
    _blocks(REQUEST, [*REQUEST, (b"x-a", b"b")], REQUEST, huffman=False),
    bytes([len(block())]) + block(),
    b"\1\x20\1\x82\4\x3f\xe1\x1f\x82",
    b"\5\x40\1a\1b\1\xbe\5\x40\1c\1d\1\xbe",
    b"\7\x40\1a\xff\xff\xff\xff\2\x0f\x7f",
)
_HPACK_WORDS = (
    b"\x20", b"\x3f\xe1\x1f", b"\x40", b"\x00", b"\x10", b"\x80", b"\xbe", b"\xff", b"\x7f\xff\xff\xff\xff\x0f",
    b"\x82", b"\1\x82", b"\1\xbe", b"\5\x40\1a\1b", b"\4\x3f\xe1\xff\x03",
)  # fmt: skip

TARGETS = (
    Target(
        "http1", run_http1, tuple(bytes([step]) + seed for seed in _HTTP1_SEEDS for step in (0, 5)), _HTTP1_WORDS, 700
    ),
    Target("http2", run_http2, tuple(b"\6" + seed for seed in _HTTP2_SEEDS), _HTTP2_WORDS),
    Target("hpack", run_hpack, _HPACK_SEEDS, _HPACK_WORDS),
)
