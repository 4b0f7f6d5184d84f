"""One HTTP/2 connection as seen by a server, without I/O: bytes in, calls to the owner and frames out.

Cuts the bytes into frames and checks their heads (RFC 9113 §3.4, §4). `http2_streams.py` decides what whole frames
mean, `http2_control.py` reads the payloads of control frames, `http2_fields.py` decides which header lists are well
formed, `hpack_blocks.py` reads header blocks, `http2_output.py` says what may be sent. The shell is
`ingress/grpc_connection.py`.

Rules and invariants:
- The owner is told the same however the bytes are cut into reads, but for the cuts of a body.
- What is held: at most one frame that is no DATA, or one padded DATA frame, and one header block; other DATA is handed
  on as it arrives. Frames of unknown types are skipped, not held.
- After `closed` input is dropped unread. `receive` never raises because of what it is given.
- Nothing is sent before the client's preface, so that a client of HTTP/1 can be told what this port speaks.

Promises and the upgrade from HTTP/1.1 are not offered.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from gateway.protocol.http1 import Held
from gateway.protocol.http2_control import check_control
from gateway.protocol.http2_frames import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    FRAME_HEAD_BYTES,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
    MAX_STREAM_ID,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ConnectionFault,
    ErrorCode,
    StreamFault,
    goaway,
    settings,
    unpack_head,
    window_update,
)
from gateway.protocol.http2_limits import Http2Limits, OpenCalls
from gateway.protocol.http2_output import Piece, Stream
from gateway.protocol.http2_streams import PRIORITY_BYTES, Head, Owner, Streams

__all__ = ["NOT_HTTP2", "Head", "Http2", "Owner", "Piece", "Stream"]

_MAX_HTTP1_LINE_BYTES: Final = 8192
_HTTP1_LINE: Final = re.compile(rb"[A-Z]{1,20} [!-~]+ HTTP/1\.[01]\r?\n")
_HTTP1_START: Final = re.compile(rb"[A-Z]{1,20}( [!-~]*( [HTP/1.0]*\r?)?)?")
_NOT_HTTP2_TEXT: Final = (
    b"This port speaks gRPC, over HTTP/2 only. Inference over HTTP/1.1 is on the gateway's HTTP port.\n"
)
NOT_HTTP2: Final = (
    b"HTTP/1.1 505 HTTP Version Not Supported\r\nContent-Type: text/plain\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_NOT_HTTP2_TEXT), _NOT_HTTP2_TEXT)
)
"""What a client that speaks HTTP/1 is told."""


class Http2(Streams):
    """See the module's text."""

    __slots__ = ("_have", "_need", "_pieces", "_rest", "_rest_end", "_rest_stream", "_started", "foreign")

    def __init__(self, owner: Owner, limits: Http2Limits, held: Held, calls: OpenCalls, now: float) -> None:
        """`held`, `calls`: budgets that all connections of the server share. `now`: monotonic seconds."""
        super().__init__(owner, limits, held, calls, now)
        self._pieces: list[bytes] = []
        """Input that waits until `_need` bytes are here."""
        self._have = 0
        self._need = 1
        self._started = False
        """The preface has been seen."""
        self._rest = 0
        """Bytes to come of a DATA frame's payload, or of one that is skipped."""
        self._rest_stream: Stream | None = None
        self._rest_end = False
        self.foreign = False
        """The client speaks HTTP/1; answer it `NOT_HTTP2`."""

    def __repr__(self) -> str:
        return f"<Http2 {len(self.streams)} streams, last {self.last_stream}{', closed' if self.closed else ''}>"

    @property
    def started(self) -> bool:
        """Whether the connection preface is complete."""
        return self._settled

    @property
    def in_block(self) -> bool:
        """Whether a header block has begun and is not complete."""
        return self._block is not None

    # -- in --------------------------------------------------------------------------------------------------

    def receive(self, data: bytes, now: float) -> None:
        """Take what was read. Afterwards look at `closed`, and at `out`."""
        if self.closed:
            return
        self.now = now
        if self._pieces:
            self._pieces.append(data)
            self._have += len(data)
            if self._have < self._need:
                return
            data = b"".join(self._pieces)
            self._pieces.clear()
        try:
            at = self._frames(data)
        except ConnectionFault as fault:
            self.fail(fault.code, str(fault))
            return
        if at < len(data) and not self.closed:
            self._pieces.append(data[at:] if at else data)
            self._have = len(data) - at

    def _frames(self, data: bytes) -> int:
        """Use up all that is complete; returns the position behind it, and sets `_need` to what must arrive."""
        at, size = 0, len(data)
        if not self._started:
            at = self._begin(data)
        elif self._rest:
            at = self._resume(data)
        while self._started and not self.closed:
            body = at + FRAME_HEAD_BYTES
            if size < body:
                self._need = FRAME_HEAD_BYTES
                break
            high, low, kind, flags, stream_id = unpack_head(data, at)
            length = high << 16 | low
            end = body + length
            if self._block is not None:
                self._check_block(kind, stream_id)
            if kind == DATA and not flags & PADDED:
                at = self._plain_data(data, body, end, flags, stream_id & MAX_STREAM_ID)
                continue
            if kind == HEADERS and flags == END_HEADERS and end <= size and self._repeated(stream_id, data[body:end]):
                at = end
                continue
            stream_id &= MAX_STREAM_ID
            if self._check(kind, flags, stream_id, length):
                self._rest = length
                at = body + self._resume(data[body:])
                continue
            if end > size:
                self._need = end - at
                break
            at = end
            try:
                self._act(kind, flags, stream_id, data[body:end])
            except StreamFault as fault:
                self._stream_fault(fault)
        return at

    def _plain_data(self, data: bytes, body: int, end: int, flags: int, stream_id: int) -> int:
        """A DATA frame without padding; returns the position behind what is here of it."""
        stream = self._account(stream_id, end - body, end - body, flags)
        size = len(data)
        if end > size:
            self._begin_rest(data[body:], end - size, stream, flags & END_STREAM)
            return size
        if stream is not None:
            closed = stream.remote_closed
            self._owner.received(stream, data[body:end], closed)
            if not closed:
                self.credit(stream)
        return end

    def _repeated(self, stream_id: int, block: bytes) -> bool:
        """Open a stream if its header block is a remembered one and nothing else is special about it."""
        head = self._remembered.get(block)
        if (
            head is None
            or not stream_id & 1
            or not self.last_stream < stream_id <= self.final_stream
            or self._crowded()
        ):
            return False
        self._open(stream_id, head, 0)
        return True

    def _begin(self, data: bytes) -> int:
        """The connection preface; nothing is sent before it, so that a client of HTTP/1 can be answered."""
        if data.startswith(PREFACE):
            self._started = True
            limits = self._limits
            self.out.append(
                settings(
                    {
                        MAX_CONCURRENT_STREAMS: limits.max_streams,
                        INITIAL_WINDOW_SIZE: self.window,
                        MAX_FRAME_SIZE: limits.frame_bytes,
                        MAX_HEADER_LIST_SIZE: limits.max_header_list_bytes,
                    }
                )
            )
            if self._receive_window > DEFAULT_WINDOW:
                self.out.append(window_update(0, self._receive_window - DEFAULT_WINDOW))
            return len(PREFACE)
        if PREFACE.startswith(data):
            self._need = len(PREFACE)
            return 0
        if _HTTP1_LINE.match(data):
            self.foreign = self.closed = True
            return len(data)
        if len(data) > _MAX_HTTP1_LINE_BYTES or not _HTTP1_START.fullmatch(data):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "this is not the connection preface of HTTP/2")
        self._need = len(data) + 1
        return 0

    def _begin_rest(self, piece: bytes, rest: int, stream: Stream | None, end: int) -> None:
        """A DATA frame that is not all here."""
        self._rest = rest
        self._rest_stream = stream
        self._rest_end = bool(end)
        if stream is not None:
            stream.remote_closed = False  # only when its last byte is here
            if piece:
                self._owner.received(stream, piece, False)

    def _resume(self, data: bytes) -> int:
        """More of a frame's payload; returns how much of `data` belongs to it."""
        take = min(self._rest, len(data))
        self._rest -= take
        stream = self._rest_stream
        if stream is not None:
            last = not self._rest
            if self.streams.get(stream.id) is stream and (take or last):
                stream.remote_closed = last and self._rest_end
                self._owner.received(stream, data[:take], stream.remote_closed)
            if last:
                self._rest_stream = None
                self.credit(stream)
        return take

    # -- what is allowed ---------------------------------------------------------------------------------------

    def _check_block(self, kind: int, stream_id: int) -> None:
        if kind != CONTINUATION or stream_id & MAX_STREAM_ID != self._block_stream:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a header block was interrupted by another frame")

    def _check(self, kind: int, flags: int, stream_id: int, length: int) -> bool:
        """Whether a frame may be what its head says; returns whether its payload is skipped unread."""
        if length > self._limits.frame_bytes:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "a frame is larger than SETTINGS_MAX_FRAME_SIZE")
        if not self._settled and (kind != SETTINGS or flags & ACK):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if kind in {HEADERS, CONTINUATION}:
            if not stream_id & 1:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "clients use odd stream numbers")
            if length > self._max_block_bytes:
                raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "the header block is far too large")
            if kind == CONTINUATION and self._block is None:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without a header block")
        elif kind == PRIORITY:
            if not stream_id:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PRIORITY on stream 0")
            if length > PRIORITY_BYTES * 4:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "PRIORITY has a size it cannot have")
        elif kind > CONTINUATION:
            self._spend()
            return True
        elif kind != DATA:
            check_control(kind, bool(flags & ACK), stream_id, length)
        return False

    def _act(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        act = _ACTIONS.get(kind)
        if act is not None:
            act(self, flags, stream_id, payload)

    def fail(self, code: ErrorCode, text: str) -> None:
        """End the connection: GOAWAY is the last that goes out, and names no later stream than one before (§6.8)."""
        self.closed = True
        self._pieces.clear()
        self._block = None
        self.out.append(goaway(min(self.last_stream, self.final_stream), code, text))


_ACTIONS: Final[dict[int, Callable[[Http2, int, int, bytes], None]]] = {
    DATA: Http2._padded_data,
    HEADERS: Http2._headers,
    PRIORITY: Http2._priority,
    RST_STREAM: Http2._rst_stream,
    SETTINGS: Http2._settings,
    PING: Http2._ping,
    GOAWAY: Http2._goaway,
    WINDOW_UPDATE: Http2._window_update,
    CONTINUATION: Http2._continuation,
}
"""What is done with each type of frame; other types are skipped before their payload is read."""
