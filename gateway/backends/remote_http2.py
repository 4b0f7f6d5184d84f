"""HTTP/2 and gRPC as their client: one unary call at a time on a connection.

Rules (RFC 9113, gRPC over HTTP/2): several calls take several connections, like HTTP/1.1's, so a lost connection never
concerns more than one; streams are numbered on. Windows are opened wide, since the bound on an answer is ours. Header
blocks use no dynamic table on the way out. What belongs to a stream that is over is read and forgotten; what belongs to
one that is not begun, and whatever else breaks the protocol, ends the connection, so no answer can be there before its
question. Every frame costs a little of an allowance that data in either direction fill up: floods of frames, of
whatever kind, run into its end. Told apart exactly: REFUSED_STREAM and a GOAWAY below our stream mean that nothing was
processed.
"""

from __future__ import annotations

import socket
import struct
from typing import Any, ClassVar, Final, NamedTuple
from urllib.parse import unquote

from gateway.backends.remote_connections import Channel, Connection
from gateway.backends.remote_outcome import broken, not_sent
from gateway.core.outcome import Failure, FailureKind, Sign
from gateway.protocol import http2_frames as h2
from gateway.protocol.hpack_blocks import EMPTY_TABLE, HARD_FACTOR, Blocks, metadata_literal
from gateway.protocol.http2_frames import ConnectionFault, ErrorCode

MAX_HEAD_BYTES: Final = 65_536
MAX_FRAME_BYTES: Final = 1 << 20
"""Largest frame that we take."""
DEFAULT_TABLE: Final = 4096
_PREFIX_BYTES: Final = 5
"""Before each message of gRPC: whether it is compressed, and its length."""
_REOPEN: Final = 1 << 29
"""Bytes received after which the connection's window is opened again."""
FRAMES: Final = 2000
"""Frames that a peer may send for one call, besides those that its data pay for."""
_PAID_BY_DATA: Final = 8
"""A frame is paid for by so many bits' worth of bytes received: 256 of them."""
_PAID_BY_US: Final = 8
"""Frames that the peer may send for each frame of data from us: it opens its windows."""
MAX_BLOCKS: Final = 16
"""Header blocks of one call, most of them interim."""
_SIZES: Final = {h2.RST_STREAM: 4, h2.PING: 8, h2.WINDOW_UPDATE: 4, h2.PRIORITY: 5}
"""Frames of a fixed size."""
_OK: Final = 200
_ODD_LENGTH: Final = "a message of another length than it says, or several"
_OF_STREAMS: Final = frozenset({h2.DATA, h2.HEADERS, h2.RST_STREAM, h2.CONTINUATION})
_PREFACE: Final = (
    h2.PREFACE
    + h2.settings(
        {
            h2.ENABLE_PUSH: 0,
            h2.INITIAL_WINDOW_SIZE: h2.MAX_WINDOW,
            h2.MAX_FRAME_SIZE: MAX_FRAME_BYTES,
            h2.MAX_HEADER_LIST_SIZE: MAX_HEAD_BYTES,
        }
    )
    + h2.window_update(0, h2.MAX_WINDOW - h2.DEFAULT_WINDOW)
)
"""No push, wide windows, large frames, bounded headers."""


class GrpcRequest(NamedTuple):
    block: bytes
    """The header block (see `header_block`)."""
    message: bytes | bytearray
    """With its prefix of five bytes."""


class GrpcAnswer(NamedTuple):
    status: int
    """Of HTTP."""
    code: int
    """gRPC's; below 0: there was none."""
    text: str
    trailers: dict[str, str]
    message: memoryview
    """Without its prefix; empty where there was none."""


def literal(name: str, value: str, *, secret: bool = False) -> bytes:
    """A header field that enters no table (RFC 7541 §6.2.2); one that is secret says so to everybody (§6.2.3)."""
    found = metadata_literal(name.encode("ascii"), value.encode("latin-1"))
    return bytes((found[0] | 0x10,)) + found[1:] if secret else found


class Http2Connection(Connection):
    """Requests are `GrpcRequest`s, answers `GrpcAnswer`s."""

    alpn: ClassVar[str] = "h2"

    def __init__(self, channel: Channel, sock: socket.socket) -> None:
        super().__init__(channel, sock)
        self._blocks = Blocks(MAX_HEAD_BYTES // HARD_FACTOR)
        self._before_block = b""
        self._received = bytearray()
        self._stream = -1
        self._last = False
        """The server said that it takes no further streams."""
        self._frame_bytes = h2.DEFAULT_FRAME_BYTES
        self._stream_start = h2.DEFAULT_WINDOW
        self._window = h2.DEFAULT_WINDOW
        self._taken = 0
        self._block: bytearray | None = None
        self._block_flags = (0, 0)
        self._begin()

    def _begin(self) -> None:
        self._stream_window = self._stream_start
        self._unsent = memoryview(b"")
        self._status = 0
        self._head: dict[str, str] = {}
        self._message = bytearray()
        self._allowance = FRAMES
        self._blocks_left = MAX_BLOCKS
        self._result: tuple[Any, bool] | None = None
        """How the call ended, and whether the connection may be kept; told when all that was received is read."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.write(_PREFACE)

    def write(self, request: Any) -> None:
        self._begin()
        self._stream += 2
        self._unsent = memoryview(request.message)
        block, self._before_block = self._before_block + request.block, b""
        head = h2.header_frames(self._stream, block, 0, self._frame_bytes)
        self.transport.write(head + b"".join(self._data_frames()))

    def _data_frames(self) -> list[bytes | memoryview]:
        """As much of the request as the peer's windows allow."""
        frames: list[bytes | memoryview] = []
        while self._unsent:
            size = min(len(self._unsent), self._frame_bytes, self._window, self._stream_window)
            if size <= 0:
                break
            piece, self._unsent = self._unsent[:size], self._unsent[size:]
            self._window -= size
            self._stream_window -= size
            self._allowance += _PAID_BY_US
            flags = 0 if self._unsent else h2.END_STREAM
            frames += [h2.frame_head(size, h2.DATA, flags, self._stream), piece]
        return frames

    def _send_more(self) -> None:
        if self._unsent and (frames := self._data_frames()):
            self.transport.write(b"".join(frames))

    # -- frames in ---------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        try:
            at = self._read(received)
        except (ValueError, IndexError, struct.error, ConnectionFault) as fault:
            received.clear()
            what = str(fault) if isinstance(fault, _Refused) else "an answer that breaks HTTP/2"
            result = (broken(f"{self.channel.name} gave {what}"), False)
            if self._result is not None:
                result = self._result[0], False  # that was before
            self.end(result[0], keep=False)
            return
        del received[:at]
        if self._result is not None:
            # Not before all is read: whoever is told may begin the next call at once, which nothing here can be for.
            (answer, keep), self._result = self._result, None
            self.end(answer, keep=keep and not self._last)

    def _read(self, received: bytearray) -> int:
        """Act on every whole frame; returns where the rest begins."""
        at, size = 0, len(received)
        while size - at >= h2.FRAME_HEAD_BYTES:
            upper, lower, kind, flags, stream = h2.unpack_head(received, at)
            length = upper << 16 | lower
            if length > MAX_FRAME_BYTES:
                if received.startswith(b"HTTP/", at):
                    raise _Refused("an answer in HTTP/1: no gRPC there; for its HTTP port write http:// in url")
                raise _Refused("a frame larger than allowed")
            if size - at < h2.FRAME_HEAD_BYTES + length:
                break
            self._allowance -= 1
            if self._allowance < 0:
                raise _Refused("more frames than an answer needs")
            at += h2.FRAME_HEAD_BYTES
            payload = bytes(memoryview(received)[at : at + length])
            at += length
            self._act(kind, flags, stream & h2.MAX_STREAM_ID, payload)
            if self.dropped:
                break
        return at

    def _check(self, kind: int, stream: int, payload: bytes) -> None:
        if self._block is not None and kind != h2.CONTINUATION:
            raise ValueError("a header block was interrupted")
        if len(payload) != _SIZES.get(kind, len(payload)):
            raise ValueError("a frame of a wrong size")
        if kind in _OF_STREAMS and not (stream & 1 and stream <= self._stream):
            raise ValueError("a frame of a stream that was not begun")
        if kind == h2.PUSH_PROMISE:
            raise ValueError("a push that was switched off")

    def _act(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self._check(kind, stream, payload)
        if kind == h2.DATA:
            self._on_data(flags, stream, payload)
        elif kind == h2.HEADERS:
            payload = _unpadded(flags, payload)
            self._block = bytearray(payload[5:] if flags & h2.PRIORITY_FLAG else payload)
            self._block_flags = (flags, stream)
            self._on_block(flags)
        elif kind == h2.CONTINUATION:
            if self._block is None or stream != self._block_flags[1]:
                raise ValueError("a continuation of nothing")
            self._block += payload
            self._on_block(flags)
        elif kind == h2.RST_STREAM:
            self._on_reset(stream, int.from_bytes(payload[:4], "big"))
        elif kind == h2.SETTINGS and not flags & h2.ACK:
            self._on_settings(payload)
        elif kind == h2.PING and not flags & h2.ACK:
            self.transport.write(h2.frame(h2.PING, h2.ACK, 0, payload))
        elif kind == h2.GOAWAY:
            self._on_goaway(struct.unpack_from(">L", payload)[0] & h2.MAX_STREAM_ID)
        elif kind == h2.WINDOW_UPDATE:
            self._on_window(stream, struct.unpack_from(">L", payload)[0] & h2.MAX_WINDOW)

    def _ours(self, stream: int) -> bool:
        return self.exchange is not None and self._result is None and stream == self._stream

    def _on_data(self, flags: int, stream: int, payload: bytes) -> None:
        self._taken += len(payload)
        if self._taken >= _REOPEN:
            self.transport.write(h2.window_update(0, self._taken))
            self._taken = 0
        if not self._ours(stream):
            return
        if not self._status:
            raise ValueError("data before a head")
        self._allowance += len(payload) >> _PAID_BY_DATA
        content = _unpadded(flags, payload)
        message = self._message
        if self._status == _OK:  # what comes with another one is no message
            message += content
        announced = int.from_bytes(message[1:5], "big") if len(message) >= _PREFIX_BYTES else 0
        if announced > self.max_bytes:
            raise _Refused(f"an answer of more than {self.max_bytes} bytes")
        if len(message) > _PREFIX_BYTES + announced:
            raise _Refused(_ODD_LENGTH)
        if flags & h2.END_STREAM:
            self._finish()

    def _on_block(self, flags: int) -> None:
        block, (first, stream) = self._block, self._block_flags
        if block is None or len(block) > MAX_HEAD_BYTES:
            raise ValueError("a header block larger than allowed")
        if not flags & h2.END_HEADERS:
            return
        self._block = None
        self._blocks_left -= 1
        if self._blocks_left < 0:
            raise _Refused("more heads than an answer needs")
        head = self._fields(bytes(block))
        if not self._ours(stream):
            return
        self.answered = True
        if bool(self._status) is (":status" in head):
            raise ValueError("no status, or a second one")
        if not self._status:
            status = head[":status"]
            if len(status) != 3 or not status.isdigit():
                raise ValueError("no status")
            if status.startswith("1"):
                if first & h2.END_STREAM:
                    raise ValueError("an interim head at the end")
                return
            self._status = int(status)
        self._head.update(head)
        if first & h2.END_STREAM:
            self._finish()

    def _fields(self, block: bytes) -> dict[str, str]:
        known: dict[str, str] | None = self._blocks.remembered.get(block)
        if known is None:
            fields, lasting = self._blocks.decode(block)
            known = {name.decode("latin-1"): value.decode("latin-1") for name, value in fields}
            if lasting:
                self._blocks.remember(block, known)
        return known

    def _finish(self) -> None:
        message, text = self._message, self._head.get("grpc-status", "")
        self._message = bytearray()
        code = int(text) if text.isdigit() and len(text) <= 3 else -1
        well = self._status == _OK and code == 0
        if well and len(message) < _PREFIX_BYTES:
            raise _Refused("no message")
        if message and message[0]:
            raise _Refused("a compressed message that nobody asked for")
        if well and int.from_bytes(message[1:5], "big") != len(message) - _PREFIX_BYTES:
            raise _Refused(_ODD_LENGTH)
        words = unquote(self._head.get("grpc-message", ""), errors="replace")
        answer = GrpcAnswer(self._status, code, words, self._head, memoryview(message)[_PREFIX_BYTES:].toreadonly())
        # Answered before all was sent: the rest of it would be in the way of the next call.
        self._result = answer, not self._unsent and self._stream < h2.MAX_STREAM_ID - 2

    def _on_reset(self, stream: int, error: int) -> None:
        if not self._ours(stream):
            return
        name = self.channel.name
        refused = error == ErrorCode.REFUSED_STREAM and not self.answered
        result = broken(f"{name} reset the stream (error {error})")
        if refused:
            result = not_sent(f"{name} refused the stream")
        elif error == ErrorCode.ENHANCE_YOUR_CALM:
            result = Failure(FailureKind.OVERLOAD, f"{name} asked for calm", Sign.ANSWERED)
        self._result = result, refused and not self._unsent

    def _on_settings(self, payload: bytes) -> None:
        for key, value in h2.settings_of(payload):
            if key == h2.HEADER_TABLE_SIZE and value < DEFAULT_TABLE:
                self._before_block = EMPTY_TABLE
            elif key == h2.MAX_FRAME_SIZE:
                if not h2.DEFAULT_FRAME_BYTES <= value <= h2.MAX_FRAME_BYTES:
                    raise ValueError("an impossible frame size")
                self._frame_bytes = value
            elif key == h2.INITIAL_WINDOW_SIZE:
                if value > h2.MAX_WINDOW:
                    raise ValueError("an impossible window")
                self._stream_window += value - self._stream_start
                self._stream_start = value
        self.transport.write(h2.frame(h2.SETTINGS, h2.ACK, 0))
        self._send_more()

    def _on_goaway(self, last: int) -> None:
        self._last = True
        if self.exchange is None:
            self.drop()
        elif self._stream > last and not self.answered and self._result is None:
            self._result = not_sent(f"{self.channel.name} is going away and did not take the call"), False

    def _on_window(self, stream: int, more: int) -> None:
        if not stream:
            self._window += more
        elif stream == self._stream:
            self._stream_window += more
        self._send_more()


class _Refused(ValueError):
    """Within HTTP/2, but no answer that is taken; the text says what it was."""


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & h2.PADDED:
        return payload
    if payload[0] >= len(payload):
        raise ValueError("more padding than frame")
    return payload[1 : len(payload) - payload[0]]
