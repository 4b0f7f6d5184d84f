"""What the frames of one HTTP/2 connection mean: streams, header blocks, windows, pings, shutdown (RFC 9113).

The half of `http2.py` that sees whole frames; that one cuts them out of the bytes and checks their heads.

Rules and invariants:
- The connection's window is always given back; a stream's while its owner wants more (`wanted`, `paused`).
- Every header block is decoded, whatever becomes of its stream: the table depends on it.
- Frames that carry nothing, resets and our own stream errors draw on an `Allowance` each (CVE-2019-9512 and its
  kin, CVE-2023-44487, CVE-2025-8671); header blocks are bounded in bytes and frames (CVE-2024-27316).
- Frames on a stream we ended are ignored while they may have been on their way (§5.1). Priorities are ignored.
"""

from __future__ import annotations

from typing import Final, Protocol

from gateway.protocol.hpack_blocks import HARD_FACTOR, Blocks, Fields, list_bytes
from gateway.protocol.http1 import Held
from gateway.protocol.http2_control import depends_on_itself, read_settings, strip_priority, unpad
from gateway.protocol.http2_fields import MalformedHeaders, RequestFields, check_trailers, read_request
from gateway.protocol.http2_frames import (
    ACK,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    HEADER_TABLE_SIZE,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    MAX_STREAM_ID,
    MAX_WINDOW,
    PING,
    SETTINGS,
    ConnectionFault,
    ErrorCode,
    StreamFault,
    frame,
    goaway,
    rst_stream,
    window_update,
)
from gateway.protocol.http2_limits import Allowance, Http2Limits, OpenCalls
from gateway.protocol.http2_output import Output, Piece, Stream

_USEFUL_PAYS: Final = 4
_MAX_IGNORED: Final = 2048
_SHUTDOWN_PING: Final = b"shutdown"
_KEEPALIVE_PING: Final = b"alive?\0\0"
_DEFAULT_TABLE_BYTES: Final = 4096
PRIORITY_BYTES: Final = 5


class Head(Protocol):
    """What the owner makes of a request's fields; shared by all streams with the same header block."""

    content_length: int
    plain: bool
    """The owner need not be told before the stream's first bytes are here."""


class Owner(Protocol):
    """Whom the connection tells. It may send, reset or end any stream from within."""

    def read_head(self, request: RequestFields, list_bytes: int) -> Head: ...
    def new_stream(self, stream_id: int, head: Head) -> Stream: ...
    def opened(self, stream: Stream) -> None:
        """A request whose head is not plain."""

    def received(self, stream: Stream, piece: Piece, end: bool) -> None:
        """Some of a request's body; `end`: its last, which may be empty."""

    def left(self, stream: Stream) -> None:
        """The client cancelled the stream, or broke a rule on it: it is over."""

    def drained(self, stream: Stream) -> None:
        """All that was queued for the stream has left."""


class Streams(Output):
    """See the module's text."""

    __slots__ = (
        "_any_reset",
        "_block",
        "_block_flags",
        "_block_frames",
        "_block_stream",
        "_blocks",
        "_connection_half",
        "_ignored",
        "_itself",
        "_limits",
        "_max_block_bytes",
        "_overhead",
        "_owner",
        "_receive_window",
        "_remembered",
        "_resets",
        "_settled",
        "_useful",
        "final_stream",
        "last_stream",
        "peer_leaving",
        "pinged_at",
        "window",
    )

    def __init__(self, owner: Owner, limits: Http2Limits, held: Held, calls: OpenCalls, now: float) -> None:
        super().__init__(held, calls, now)
        self._owner = owner
        self._limits = limits
        self._blocks = Blocks(limits.max_header_list_bytes)
        self._remembered = self._blocks.remembered
        self._max_block_bytes = limits.max_header_list_bytes * HARD_FACTOR
        self._overhead = Allowance(limits.overhead_burst, limits.overhead_per_s, now)
        self._resets = Allowance(limits.reset_burst, limits.reset_per_s, now)
        self._any_reset = False
        """Whether `_resets` was ever drawn on; before that nothing needs to be paid back."""
        self._useful = 0
        """Useful frames that have not paid yet."""
        self.window = max(limits.stream_window_bytes, DEFAULT_WINDOW)
        """What a client may send ahead on a stream."""
        self._receive_window = max(limits.connection_window_bytes, DEFAULT_WINDOW)
        self._connection_half = self._receive_window // 2
        self._settled = False
        """The client's first SETTINGS have been seen."""
        self._block: bytearray | None = None
        """A header block whose CONTINUATIONs are to come."""
        self._block_stream = 0
        self._block_flags = 0
        self._block_frames = 0
        self._itself = False
        """The header block's stream claims to depend on itself."""
        self._ignored: dict[int, None] = {}
        """Streams we ended, on which frames may still be on their way; the oldest first."""
        self.last_stream = 0
        """Highest stream the client opened."""
        self.final_stream = MAX_STREAM_ID
        """Streams above this one are refused: we said so."""
        self.peer_leaving = False
        """The client sent GOAWAY."""
        self.pinged_at = 0.0
        """When a PING of ours went out that is not answered; 0 if there is none."""

    # -- what is allowed ---------------------------------------------------------------------------------------

    def _spend(self) -> None:
        """A frame that carries nothing arrived."""
        if self._useful:
            self._overhead.give(self._useful * _USEFUL_PAYS)
            self._useful = 0
        if not self._overhead.take(self.now):
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that carry nothing")

    def _account(self, stream_id: int, length: int, content: int, flags: int) -> Stream | None:
        """Charge a DATA frame of `length` bytes, `content` of them not padding; returns the stream that gets it."""
        if length > self._limits.frame_bytes:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "a frame is larger than SETTINGS_MAX_FRAME_SIZE")
        self._receive_window -= length
        if self._receive_window < self._connection_half:
            self._open_window()
        stream = self.streams.get(stream_id)
        if stream is None or stream.remote_closed:
            self._unexpected(stream_id, stream)
            return None
        stream.receive_window -= length
        if content:
            self._useful += 1
        elif not flags & END_STREAM:
            self._spend()
        if stream.receive_window < 0 or stream.content_left >= 0:
            fault = self._body_fault(stream, content, flags & END_STREAM)
            if fault is not None:
                self._stream_fault(fault)
                return None
        if flags & END_STREAM:
            stream.remote_closed = True
        return stream

    def _open_window(self) -> None:
        """Give back the connection's window, half of it at a time."""
        if self._receive_window < 0:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "DATA beyond the connection's window")
        increment = self._connection_half * 2 - self._receive_window
        self._receive_window += increment
        self.out.append(window_update(0, increment))

    @staticmethod
    def _body_fault(stream: Stream, content: int, end: int) -> StreamFault | None:
        if stream.receive_window < 0:
            return StreamFault(stream.id, ErrorCode.FLOW_CONTROL_ERROR, "DATA beyond the stream's window")
        left = stream.content_left - content
        if left < 0 or (left and end):
            return StreamFault(stream.id, ErrorCode.PROTOCOL_ERROR, "the body is not as long as content-length says")
        stream.content_left = left
        return None

    def _unexpected(self, stream_id: int, stream: Stream | None) -> None:
        """DATA on a stream that takes none."""
        if not stream_id & 1 or stream_id > self.last_stream:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "DATA on a stream that was never opened")
        if stream is not None or stream_id not in self._ignored:
            self._stream_fault(StreamFault(stream_id, ErrorCode.STREAM_CLOSED, "DATA behind the end of a stream"))

    def _stream_fault(self, fault: StreamFault) -> None:
        """End one stream because of what the client did on it."""
        stream = self.streams.get(fault.stream_id)
        self.reset(fault.stream_id, fault.code)
        if stream is not None:
            self._owner.left(stream)
        self._count_reset()

    def _count_reset(self) -> None:
        self._any_reset = True
        if not self._resets.take(self.now):
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many streams were reset")

    # -- frames ------------------------------------------------------------------------------------------------

    def _padded_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        content = unpad(payload, flags)
        stream = self._account(stream_id, len(payload), len(content), flags)
        if stream is not None:
            self._owner.received(stream, content, stream.remote_closed)
            self.credit(stream)

    def _goaway(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._spend()
        self.peer_leaving = True

    def _priority(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._spend()
        if len(payload) != PRIORITY_BYTES:
            raise StreamFault(stream_id, ErrorCode.FRAME_SIZE_ERROR, "PRIORITY has a size it cannot have")
        if depends_on_itself(payload, stream_id):
            raise StreamFault(stream_id, ErrorCode.PROTOCOL_ERROR, "a stream depends on itself")

    def _ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not flags & ACK:
            self._spend()
            self.out.append(frame(PING, ACK, 0, payload))
        elif payload == _SHUTDOWN_PING and self.final_stream == MAX_STREAM_ID:
            self.end_shutdown()
        elif payload == _KEEPALIVE_PING and self.pinged_at:
            self.pinged_at = 0.0
        else:
            self._spend()

    def _settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._settled = True
        self._spend()
        if flags & ACK:
            return
        values = read_settings(payload)
        self.peer_frame_bytes = values.get(MAX_FRAME_SIZE, self.peer_frame_bytes)
        if values.get(HEADER_TABLE_SIZE, _DEFAULT_TABLE_BYTES) < _DEFAULT_TABLE_BYTES:
            self.shrink_table()
        if INITIAL_WINDOW_SIZE in values:
            change = values[INITIAL_WINDOW_SIZE] - self.peer_window
            self.peer_window += change
            for stream in self.streams.values():
                stream.send_window += change
                if stream.send_window > MAX_WINDOW:
                    raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "a stream's window is over 2^31-1")
                self.window_changed(stream)
        self.out.append(frame(SETTINGS, ACK, 0))

    def _window_update(self, flags: int, stream_id: int, payload: bytes) -> None:
        increment = int.from_bytes(payload, "big") & MAX_WINDOW
        if not stream_id:
            if not increment:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            self.send_window += increment
            if self.send_window > MAX_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "the connection's window is over 2^31-1")
            return
        stream = self._known(stream_id)
        if not increment:
            raise StreamFault(stream_id, ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
        if stream is not None:
            stream.send_window += increment
            if stream.send_window > MAX_WINDOW:
                raise StreamFault(stream_id, ErrorCode.FLOW_CONTROL_ERROR, "the stream's window is over 2^31-1")
            self.window_changed(stream)

    def _rst_stream(self, flags: int, stream_id: int, payload: bytes) -> None:
        stream = self._known(stream_id)
        if stream is None:
            self._spend()
            return
        self.forget(stream)
        self._owner.left(stream)
        self._count_reset()

    def _known(self, stream_id: int) -> Stream | None:
        """The stream, None if it is over; one that was never opened ends the connection."""
        if not stream_id & 1 or stream_id > self.last_stream:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a frame on a stream that was never opened")
        return self.streams.get(stream_id)

    # -- header blocks -----------------------------------------------------------------------------------------

    def _headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        block, self._itself = strip_priority(unpad(payload, flags), flags, stream_id)
        if flags & END_HEADERS:
            self._complete(stream_id, flags, block)
        else:
            self._block = bytearray(block)
            self._block_stream = stream_id
            self._block_flags = flags
            self._block_frames = 0

    def _continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        block = self._block
        assert block is not None  # noqa: S101  # checked with the frame's head
        block += payload
        self._block_frames += 1
        if len(block) > self._max_block_bytes or self._block_frames > self._limits.max_continuations:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "the header block is far too large")
        if flags & END_HEADERS:
            self._block = None
            self._complete(stream_id, self._block_flags, bytes(block))

    def _complete(self, stream_id: int, flags: int, block: bytes) -> None:
        """A whole header block. It is decoded whatever becomes of it: the table depends on it."""
        head: Head | None = self._remembered.get(block)
        fields: Fields = []
        keep = False
        if head is None:
            fields, keep = self._blocks.decode(block)
        stream = self.streams.get(stream_id)
        if stream is not None:
            self._trailers(stream, flags, fields, head is not None)
            return
        if stream_id <= self.last_stream:
            if stream_id not in self._ignored:
                raise ConnectionFault(ErrorCode.STREAM_CLOSED, "HEADERS on a stream that is over")
            return
        self.last_stream = stream_id
        if stream_id > self.final_stream or self._crowded():
            self.reset(stream_id, ErrorCode.REFUSED_STREAM)
            return
        if self._itself:
            raise StreamFault(stream_id, ErrorCode.PROTOCOL_ERROR, "a stream depends on itself")
        if head is None:
            try:
                request = read_request(fields)
            except MalformedHeaders as error:
                raise StreamFault(stream_id, ErrorCode.PROTOCOL_ERROR, str(error)) from None
            head = self._owner.read_head(request, list_bytes(fields))
            if keep:
                self._blocks.remember(block, head)
        self._open(stream_id, head, flags & END_STREAM)

    def _trailers(self, stream: Stream, flags: int, fields: Fields, request: bool) -> None:
        if stream.remote_closed:
            raise StreamFault(stream.id, ErrorCode.STREAM_CLOSED, "HEADERS behind the end of a stream")
        if not flags & END_STREAM or request or stream.content_left > 0:
            raise StreamFault(stream.id, ErrorCode.PROTOCOL_ERROR, "a second HEADERS that is no trailer section")
        try:
            check_trailers(fields)
        except MalformedHeaders as error:
            raise StreamFault(stream.id, ErrorCode.PROTOCOL_ERROR, str(error)) from None
        stream.remote_closed = True
        self._owner.received(stream, b"", True)

    def _crowded(self) -> bool:
        return len(self.streams) >= self._limits.max_streams or self.calls.count >= self.calls.limit

    def _open(self, stream_id: int, head: Head, end: int) -> None:
        self.last_stream = stream_id
        self._useful += 1
        stream = self._owner.new_stream(stream_id, head)
        self.streams[stream_id] = stream
        self.calls.count += 1
        if head.content_length >= 0:
            stream.content_left = head.content_length
            if end and head.content_length:
                raise StreamFault(stream_id, ErrorCode.PROTOCOL_ERROR, "a body was announced and none came")
        if end:
            stream.remote_closed = True
        if not head.plain:
            self._owner.opened(stream)
        if end and stream_id in self.streams:
            self._owner.received(stream, b"", True)

    # -- what the owner may do -----------------------------------------------------------------------------------

    def credit(self, stream: Stream) -> None:
        """Let the client send more on a stream, if its owner wants more and half of the window is used up."""
        if stream.paused or stream.remote_closed or stream.id not in self.streams:
            return
        target = min(max(self.window, stream.wanted), MAX_WINDOW)
        if stream.receive_window <= target // 2:
            self.out.append(window_update(stream.id, target - stream.receive_window))
            stream.receive_window = target

    def reset(self, stream_id: int, code: int) -> None:
        """End a stream at once, whatever was queued for it. The owner is not told."""
        stream = self.streams.get(stream_id)
        if stream is not None:
            self.forget(stream)
        self.out.append(rst_stream(stream_id, code))
        self.ignore(stream_id)

    def finished(self, stream: Stream) -> None:
        # Output.finished spelled out: one call less for each request.
        del self.streams[stream.id]
        self.calls.count -= 1
        if not stream.remote_closed:
            self._cut_short(stream)
        if self._any_reset:
            self._resets.give(1)

    def ignore(self, stream_id: int) -> None:
        if len(self._ignored) >= _MAX_IGNORED:
            del self._ignored[next(iter(self._ignored))]
        self._ignored[stream_id] = None

    def drained(self, stream: Stream) -> None:
        self._owner.drained(stream)

    def ping(self) -> None:
        """Ask whether the client still lives; `pinged_at` says since when there is no answer."""
        if not self.pinged_at:
            self.pinged_at = self.now
            self.out.append(frame(PING, 0, 0, _KEEPALIVE_PING))

    def begin_shutdown(self) -> None:
        """Tell the client to open no more streams; those on their way are still served (§6.8)."""
        self.out.append(goaway(MAX_STREAM_ID, ErrorCode.NO_ERROR, "shutting down"))
        self.out.append(frame(PING, 0, 0, _SHUTDOWN_PING))

    def end_shutdown(self) -> None:
        """Name the last stream that is served; the client has had time to hear of the first GOAWAY."""
        if self.final_stream == MAX_STREAM_ID:
            self.final_stream = self.last_stream
            self.out.append(goaway(self.last_stream, ErrorCode.NO_ERROR, "shutting down"))
