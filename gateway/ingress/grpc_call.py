"""One gRPC call: messages in, answer out. What an application is given to answer with.

Rules and invariants:
- A call ends once: answered, failed, or aborted (`on_abort`) because its client cancelled, left, broke a rule, or its
  deadline passed, which is answered here, at once. Answering after the end does nothing: a vanished client is normal.
- A unary method gets exactly one message, whole; a call that brings none or two fails UNIMPLEMENTED.
- A stream's messages are handed over in order, and none while its handler asked for a pause or the client does not take
  what was sent; what waits then is bounded by the stream's window.
- Bytes of messages are counted in the server's `held` from their arrival until a unary call is over, or until a
  stream's handler was given the message.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from gateway.errors import InvalidRequest, TooLarge
from gateway.ingress.grpc_application import GrpcApplication, Method, StreamHandler
from gateway.protocol import grpc_wire
from gateway.protocol.content_coding import Inflation, deflate
from gateway.protocol.grpc_messages import PREFIX_BYTES, MessageBuffer
from gateway.protocol.grpc_wire import HEADERS_BLOCK, TRAILERS_OK, CallHead
from gateway.protocol.hpack_blocks import metadata_literal
from gateway.protocol.http2 import Piece, Stream

if TYPE_CHECKING:
    from gateway.ingress.grpc_connection import GrpcConnection

__all__ = ["GrpcApplication", "GrpcCall", "Method", "StreamHandler"]

_log = logging.getLogger("gateway.grpc")

MAX_QUEUED_BYTES: Final = 256 * 1024
"""A stream whose client leaves more than this untaken is given no further messages."""
JOINED_BYTES: Final = 65_536
"""Up to this size copying a message behind its head is cheaper than handing the transport several pieces."""
_HEADERS_FRAME: Final = struct.Struct(">BHBBI").pack
_DATA_FRAME: Final = struct.Struct(">BHHIBI").pack
"""Head of a DATA frame, then a plain message's prefix."""
_HEADERS_BYTES: Final = len(HEADERS_BLOCK)
_TRAILERS_BYTES: Final = len(TRAILERS_OK)
_INFLATED_BYTES: Final = 1024 * 1024
"""Inflated at one go; other calls have their turn before more is."""
_ONE_MESSAGE: Final = "this method takes exactly one request message, and"


class GrpcCall(Stream):
    """See the module's text."""

    __slots__ = (
        "_buffer",
        "_connection",
        "_delivering",
        "_ended",
        "_pausing",
        "begun",
        "context",
        "deadline",
        "handler",
        "held_bytes",
        "on_abort",
        "over",
        "received",
        "seen_at",
        "seen_bytes",
        "started",
        "taken_bytes",
    )

    head: CallHead

    def __init__(
        self, connection: GrpcConnection, stream_id: int, head: CallHead, send_window: int, receive_window: int
    ) -> None:
        # Stream.__init__ spelled out: one call less for each request.
        self.id = stream_id
        self.head = head
        self.send_window = send_window
        self.receive_window = receive_window
        self.remote_closed = False
        self.content_left = -1
        self.wanted = 0
        self.paused = False
        self.queue = None
        self.queued_bytes = 0
        self.trailers = None
        self.progress_at = 0.0

        self.received = 0.0
        """When the message was complete: monotonic seconds of the server's clock."""
        self.deadline: float | None = None
        """Monotonic seconds."""
        self.on_abort: Callable[[], None] | None = None
        """Called once if the call ends before it was answered."""
        self.context: Any = None
        """The application's own."""
        self.over = False
        """Nothing more can be sent."""
        self.started = False
        """Response headers were sent."""
        self.begun = False
        """The application was given the call."""
        self.handler: StreamHandler | None = None
        self._connection = connection
        self._buffer: MessageBuffer | None = None
        self.held_bytes = 0
        """Of this call, in `held` until it is over."""
        self._ended = False
        self._delivering = False
        self._pausing = False
        self.taken_bytes = 0
        """Body bytes that came in pieces; for the slow-body rule, as the two below, which the sweep writes."""
        self.seen_bytes = 0
        self.seen_at = 0.0

    def __repr__(self) -> str:
        return f"<GrpcCall {self.id} {self.head.path.decode('ascii', 'replace')}{' over' if self.over else ''}>"

    # -- messages in -------------------------------------------------------------------------------------------

    def take(self, piece: Piece, end: bool) -> None:
        """Some of the request's body, in the general case: a message in pieces, several in one, compressed …"""
        if self.over:
            return
        if self._buffer is None:
            self._buffer = MessageBuffer()
        self._buffer.add(piece)
        self.taken_bytes += len(piece)
        self._ended = end
        if not self._hold(len(piece)):
            return
        if self.handler is None:
            self._take_unary(self._buffer)
        else:
            self.deliver()

    def _hold(self, count: int) -> bool:
        """Count bytes of this call; False: they are more than there is room for, and the call has ended.

        What a message's prefix announces is not reserved: several announced at one time may not all find room."""
        held = self._connection.shared.held
        self.held_bytes += count
        held.used_bytes += count
        if count <= 0 or held.used_bytes <= held.limit_bytes:
            return True
        self._connection.refuse(self, grpc_wire.too_much_held())
        return False

    def _take_unary(self, buffer: MessageBuffer) -> None:
        if buffer.length >= 0:
            if not self._admit(buffer):
                return
            missing = buffer.missing
            self.wanted = max(missing, 0)
            if missing < 0:
                self.fail(grpc_wire.UNIMPLEMENTED, f"{_ONE_MESSAGE} a second one came")
            elif self._ended and not missing:
                self._unpack(buffer.flag, buffer.only(), self._hand_over)
                return
        if self._ended and not self.over:
            self.fail(grpc_wire.UNIMPLEMENTED, f"{_ONE_MESSAGE} the call ended before it was complete")

    def _hand_over(self, message: bytes | memoryview) -> None:
        self._connection.handle(self, message)

    def _admit(self, buffer: MessageBuffer) -> bool:
        """Whether the first message, whose prefix is here, may be waited for."""
        if self.wanted:
            return True  # it was admitted before
        shared = self._connection.shared
        length = buffer.length
        most = min(shared.limits.max_message_bytes, shared.held.limit_bytes)
        if buffer.flag > 1 or (buffer.flag and self.head.encoding == b"identity"):
            self.give_up(grpc_wire.INTERNAL, "a message is flagged as compressed, and no grpc-encoding was given")
        elif length > most:
            text = f"a message of {length} bytes is over the limit of {most} bytes"
            self.give_up(grpc_wire.RESOURCE_EXHAUSTED, text)
        elif shared.held.used_bytes + buffer.missing > shared.held.limit_bytes:
            self._connection.refuse(self, grpc_wire.too_much_held())
        else:
            return True
        return False

    def _unpack(self, flag: int, message: bytes | memoryview, then: Callable[[bytes | memoryview], None]) -> None:
        """Go on with the message as it was before its compression; a long one is inflated over several turns."""
        if not flag:
            then(message)
            return
        shared = self._connection.shared
        room = min(shared.limits.max_message_bytes, shared.held.limit_bytes - shared.held.used_bytes)
        self._inflate(Inflation(self.head.encoding, cast("bytes", message), max(room, 0)), then)

    def _inflate(self, inflation: Inflation, then: Callable[[bytes | memoryview], None]) -> None:
        if self.over:
            return
        before = inflation.made
        try:
            done = inflation.step(_INFLATED_BYTES)
        except TooLarge:
            self.give_up(grpc_wire.RESOURCE_EXHAUSTED, "a message inflates to more bytes than there is room for")
            return
        except InvalidRequest as error:
            self.give_up(grpc_wire.INTERNAL, f"a message could not be inflated: {error}")
            return
        if not self._hold(inflation.made - before):
            return
        if done:
            then(inflation.result)
        else:
            self._connection.loop.call_soon(self._inflate, inflation, then)

    # -- messages of a stream ----------------------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        """Whether the client takes what is sent; if not, send no more than is owed for the messages at hand."""
        return self.queued_bytes <= MAX_QUEUED_BYTES and not self.over

    def pause(self) -> None:
        """Hand over no further message until `resume`: the handler has as much in work as it wants."""
        self._pausing = self.paused = True

    def resume(self) -> None:
        if self._pausing:
            self._pausing = False
            self._deliver_more()

    def _deliver_more(self) -> None:
        self.deliver()
        self._connection.http2.credit(self)
        self._connection.wake()

    def deliver(self) -> None:
        """Give the handler what is complete. While it can be given nothing, the client gets no window to send more."""
        handler, buffer = self.handler, self._buffer
        if not self._delivering and handler is not None and buffer is not None:
            self._deliver(handler, buffer)
        self.paused = self._delivering or not self._may_deliver()

    def _deliver(self, handler: StreamHandler, buffer: MessageBuffer) -> None:
        while self._may_deliver() and buffer.length >= 0:
            if not self._admit(buffer):
                return
            self.wanted = max(buffer.missing, 0)
            if self.wanted:
                break
            flag, before = buffer.flag, len(buffer)
            self._delivering = True
            message = buffer.pop()
            self._hold(len(buffer) - before)
            self._unpack(flag, message, partial(self._give, handler, flag))
            if self._delivering:
                return  # it is being inflated, and goes on from there
        if self._ended and self._may_deliver():
            self._ended = False
            if len(buffer):
                self.give_up(grpc_wire.INTERNAL, "the stream ended within a message")
            else:
                self._connection.guard(self, handler.half_closed)

    def _give(self, handler: StreamHandler, flag: int, message: bytes | memoryview) -> None:
        if flag:
            self._hold(-len(message))
        self.received = self._connection.http2.now
        self._connection.guard(self, handler.message, message)
        self._delivering = False
        if flag:
            self._connection.loop.call_soon(self._deliver_more)

    def _may_deliver(self) -> bool:
        return not self.over and not self._pausing and self.queued_bytes <= MAX_QUEUED_BYTES

    # -- answers -----------------------------------------------------------------------------------------------

    def reply(self, parts: list[Piece], length: int, head: bytes = b"") -> None:
        """Answer a unary call with one message. Does nothing if the call is over.

        Args:
            parts: the message; they must not change afterwards.
            length: bytes of all parts.
            head: encoded literals (`metadata_literal`) that go with the response headers.
        """
        if self.over:
            return
        connection = self._connection
        http2 = connection.http2
        total = length + PREFIX_BYTES
        if (
            total <= self.send_window
            and total <= http2.send_window
            and length <= JOINED_BYTES
            and total <= http2.peer_frame_bytes
            and len(head) < 8192
            and http2.open
            and not http2.prefix
            and not connection.shared.compression
        ):
            http2.send_window -= total
            stream_id = self.id
            http2.out.append(
                b"".join(
                    (
                        _HEADERS_FRAME(0, _HEADERS_BYTES + len(head), 1, 4, stream_id),
                        HEADERS_BLOCK,
                        head,
                        _DATA_FRAME(total >> 16, total & 0xFFFF, 0, stream_id, 0, length),
                        *parts,
                        _HEADERS_FRAME(0, _TRAILERS_BYTES, 1, 5, stream_id),
                        TRAILERS_OK,
                    )
                )
            )
            http2.finished(self)
            self._end()
            connection.wake()
        else:
            self.start(head)
            self.send(parts, length)
            self.finish()

    def start(self, head: bytes = b"") -> None:
        """Send the response headers; `head` as for `reply`. Does nothing if the call is over."""
        if self.over or self.started:
            return
        self.started = True
        if self._coding is not None:
            head += metadata_literal(b"grpc-encoding", self._coding)
        self._connection.http2.send_headers(self, HEADERS_BLOCK + head)
        self._connection.wake()

    def send(self, parts: list[Piece], length: int) -> None:
        """Send one message, after the response headers. Look at `writable` now and then."""
        if self.over:
            return
        self.start()
        flag, coding = 0, self._coding
        if coding is not None and grpc_wire.MIN_COMPRESSED_BYTES <= length <= grpc_wire.MAX_COMPRESSED_BYTES:
            compressed = deflate(parts, coding, self._connection.shared.compression)
            if len(compressed) < length:
                parts, length, flag = [compressed], len(compressed), 1
        prefix = bytes((flag,)) + length.to_bytes(4, "big")
        parts = [b"".join((prefix, *parts))] if length <= JOINED_BYTES else [prefix, *parts]
        self._connection.http2.send_data(self, parts, PREFIX_BYTES + length)
        self._connection.wake()

    def finish(self, code: int = 0, text: str = "", head: bytes = b"") -> None:
        """End the call with a status, behind all that was sent; `head`: literals that go with it. Does nothing if the
        call is over."""
        if self.over:
            return
        if not self.started:
            self.fail(code, text, head)
            return
        block = TRAILERS_OK + head if not code else grpc_wire.trailers(code, text, head)
        self._connection.http2.send_trailers(self, block)
        self._end()
        self._connection.wake()

    def fail(self, code: int, text: str, head: bytes = b"") -> None:
        """End the call with an error: trailers only, when nothing was sent. Does nothing if the call is over."""
        if self.over:
            return
        if not self.begun:  # the application has not seen it
            head += self._connection.shared.refused_here(self, code, text)
        trailers = grpc_wire.trailers(code, text, head)
        if self.started:
            self._connection.http2.send_trailers(self, trailers)
        else:
            self.started = True
            self._connection.http2.send_headers(self, HEADERS_BLOCK + trailers, end=True)
        self._end()
        self._connection.wake()

    @property
    def _coding(self) -> bytes | None:
        """What our messages are compressed with: the client's first choice, if the server compresses at all."""
        accepted = self.head.accept_encoding
        return accepted[0] if accepted and self._connection.shared.compression else None

    # -- end ---------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """The answer is given; what is left of it leaves without us."""
        self.over = True
        self.on_abort = self.handler = None  # they hold the call, and a cycle would wait for the garbage collector
        connection = self._connection
        shared = connection.shared
        if self.held_bytes:
            shared.held.used_bytes -= self.held_bytes
            self.held_bytes = 0
        if self.begun:
            self.begun = False
            shared.in_flight -= 1
        if self.deadline is not None:
            shared.deadlines.forget(self)
        self._buffer = None

    def abort(self) -> None:
        """The call is over without an answer. The stream is the connection's affair."""
        if not self.over:
            tell = self._told()
            self._connection.shared.aborted += self.begun
            self._end()
            tell()

    def expire(self) -> None:
        """The deadline has passed: the client is told at once, then the application."""
        if not self.over:
            self._connection.shared.expired += 1
            self.give_up(grpc_wire.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def give_up(self, code: int, text: str) -> None:
        """End the call for a reason that the application does not know: the client is told, then the application. Does
        nothing if the call is over."""
        if not self.over:
            tell = self._told()
            within = self.handler is not None and (self._delivering or bool(self._buffer))
            self.fail(code, text, self._connection.shared.refused_here(self, code, text) if within else b"")
            tell()

    def _told(self) -> Callable[[], None]:
        """What tells the application that the call is over."""
        if not self.begun:
            return lambda: None
        known = (self.on_abort, self.handler.aborted if self.handler is not None else None)

        def tell() -> None:
            for function in known:
                try:
                    if function is not None:
                        function()
                except Exception:
                    _log.exception("giving up a call that was aborted failed: %r", self)

        return tell
