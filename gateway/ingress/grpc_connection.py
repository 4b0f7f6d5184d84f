"""One gRPC client's connection: bytes in, calls to the application, frames out.

The asyncio shell around `protocol/http2.py`; it moves bytes and decides nothing about frames.

Rules and invariants:
- All that one turn of the loop produces leaves in one write: at the end of the read that caused it, or in one callback
  for all connections that have something to say.
- Nothing is read, and no data is framed, while the client does not take what is written; what waits is counted in
  `held` and given `write_timeout_s`.
- Each call ends once; when the connection is lost every open one is aborted, and what was held for it is given back.
- No timer of its own: `sweep` is called about once a second and compares instants stored on the way.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable
from typing import Any, Final, cast

from gateway.errors import GatewayError, Overloaded
from gateway.ingress.grpc_call import GrpcCall
from gateway.ingress.grpc_patience import Patience
from gateway.ingress.grpc_shared import Shared
from gateway.protocol import grpc_wire
from gateway.protocol.http2 import NOT_HTTP2, Head, Http2, Piece, Stream
from gateway.protocol.http2_fields import RequestFields
from gateway.protocol.http2_frames import MAX_STREAM_ID, ErrorCode, goaway, settings

_log = logging.getLogger("gateway.grpc")

_WRITE_BUDGET_BYTES: Final = 1024 * 1024
"""Data framed at one go; other connections have their turn before more is."""
_WRITE_BUFFER_BYTES: Final = 512 * 1024
"""The transport holds this much before it says that the client is slow."""
_LINGER_S: Final = 5.0
_MAX_REFUSED: Final = 128
_VIEW_BYTES: Final = 65_536
"""A larger message is a view of what was read instead of a copy."""
_PREFIX: Final = struct.Struct(">BI").unpack_from


class GrpcConnection(asyncio.Protocol):
    """See the module's text."""

    __slots__ = (
        "_address",
        "_awake",
        "_clock",
        "_give_up_at",
        "_unread_held",
        "closing",
        "http2",
        "loop",
        "patience",
        "paused",
        "shared",
        "transport",
    )

    transport: asyncio.Transport
    http2: Http2

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self._clock = shared.clock
        self._awake = False
        """Whether a flush is due anyway."""
        self.paused = False
        self.closing = False
        self._give_up_at = 0.0
        self._unread_held = 0
        self._address = ""

    def __repr__(self) -> str:
        return f"<GrpcConnection {self._address} {self.http2!r}>"

    # -- beginning and end -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        shared = self.shared
        now = shared.clock()
        self.patience = Patience(self, now)
        self.loop = asyncio.get_running_loop()
        self.transport = cast("asyncio.Transport", transport)  # uvloop's fits, without being a subclass
        self.transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        self.http2 = Http2(self, shared.limits, shared.held, shared.calls, now)
        peer = transport.get_extra_info("peername")
        self._address = peer[0] if isinstance(peer, tuple) else ""
        shared.accepted += 1
        refusal = self._over_limit()
        if refusal:
            self._turn_away(refusal)
        else:
            shared.connections.add(self)
            shared.addresses[self._address] = shared.addresses.get(self._address, 0) + 1
        shared.opened()

    def _over_limit(self) -> str:
        limits = self.shared.limits
        if len(self.shared.connections) >= limits.max_connections:
            return f"all {limits.max_connections} connections are in use; retry later, or reuse connections"
        local = self._address.startswith(("127.", "::ffff:127.")) or self._address in {"::1", ""}
        if not local and self.shared.addresses.get(self._address, 0) >= limits.max_connections_per_address:
            count = limits.max_connections_per_address
            return f"all {count} connections of one address are in use; retry later, or reuse connections"
        return ""

    def _turn_away(self, refusal: str) -> None:
        self.shared.count_reject(Overloaded.reason)
        self.http2.closed = True
        if len(self.shared.refused) >= _MAX_REFUSED:
            self.closing = True
            self.transport.abort()
            return
        self.shared.refused.add(self)
        self.transport.write(settings({}) + goaway(0, ErrorCode.ENHANCE_YOUR_CALM, refusal))
        self.finish()

    def connection_lost(self, error: Exception | None) -> None:
        shared = self.shared
        self.closing = self.http2.closed = True
        self._release_unread()
        self._abort_all()
        shared.refused.discard(self)
        if self in shared.connections:
            shared.connections.remove(self)
            left = shared.addresses[self._address] - 1
            if left:
                shared.addresses[self._address] = left
            else:
                del shared.addresses[self._address]
        shared.closed()

    def _abort_all(self) -> None:
        http2 = self.http2
        for stream in list(http2.streams.values()):
            http2.forget(stream)
            if isinstance(stream, GrpcCall):
                stream.abort()

    def finish(self) -> None:
        """End the connection once what is written has gone out.

        The client may still be sending. Closing at once would make the kernel answer that with a reset, which can
        destroy our GOAWAY before it is read; so only our half is closed, and what comes is dropped for a while.
        """
        if self.closing:
            return
        self.closing = self.http2.closed = True
        self._abort_all()
        if self.transport.can_write_eof():
            self._give_up_at = self._clock() + _LINGER_S
            self.transport.write_eof()
            self._resume_reading()
        else:
            self._give_up_at = self._clock() + self.shared.limits.write_timeout_s
            self.transport.close()

    def eof_received(self) -> bool:
        """HTTP/2 has no use for half a connection: who sends no more has left."""
        return False

    # -- in --------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        self._awake = True
        self.patience.read_at = now = self._clock()
        http2 = self.http2
        http2.receive(data, now)
        if http2.out or http2.waiting or http2.closed or not http2.streams:
            self.flush()
        else:
            self._awake = False  # calls whose answers are still to come

    def read_head(self, request: RequestFields, list_bytes: int) -> Head:
        head = grpc_wire.read_head(request)
        limit = self.shared.limits.max_header_list_bytes
        if list_bytes > limit:
            head.refusal = (
                grpc_wire.RESOURCE_EXHAUSTED,
                f"the metadata has {list_bytes} bytes, more than the limit of {limit}; send less",
            )
        if head.http_status == 200 and head.refusal is None:
            head.route = self.shared.application.resolve(head)
            head.plain = head.timeout_s is None and not head.route.streaming
        return head

    def new_stream(self, stream_id: int, head: Head) -> Stream:
        http2 = self.http2
        return GrpcCall(self, stream_id, head, http2.peer_window, http2.window)  # type: ignore[arg-type]  # read_head's

    def opened(self, stream: Stream) -> None:
        call = cast("GrpcCall", stream)
        head = call.head
        if head.http_status != 200:
            self.shared.count_reject("not_grpc")
            call.over = True
            self.http2.send_short(call, *grpc_wire.http_answer(head.http_status))
        elif head.refusal is not None:
            code, text = head.refusal
            self.shared.count_reject("invalid" if code != grpc_wire.RESOURCE_EXHAUSTED else "headers_too_large")
            call.fail(code, text, grpc_wire.ACCEPTED_ENCODINGS if code == grpc_wire.UNIMPLEMENTED else b"")
        else:
            if head.timeout_s is not None:
                self.shared.deadlines.watch(call, self.http2.now + head.timeout_s)
            if head.route.streaming:
                self._begin(call)
                call.received = self.http2.now
                self.guard(call, self._open_stream, call)

    def _open_stream(self, call: GrpcCall) -> None:
        call.handler = call.head.route.open(call.head, call)

    def received(self, stream: Stream, piece: Piece, end: bool) -> None:
        call: GrpcCall = stream  # type: ignore[assignment]  # new_stream's; cast() is a call
        if end and call.handler is None and not call.taken_bytes and not call.over and len(piece) >= 5:
            # The usual case: one whole message in one frame.
            flag, length = _PREFIX(piece)
            if not flag and length == len(piece) - 5 and length <= self.shared.limits.max_message_bytes:
                held = self.shared.held
                held.used_bytes += length
                call.held_bytes = length
                if held.used_bytes > held.limit_bytes:
                    self.refuse(call, grpc_wire.too_much_held())
                else:
                    self.handle(call, piece[5:] if length < _VIEW_BYTES else memoryview(piece)[5:])
                return
        call.take(piece, end)

    def _begin(self, call: GrpcCall) -> None:
        call.begun = True
        self.shared.in_flight += 1
        self.shared.requests += 1

    def handle(self, call: GrpcCall, message: bytes | memoryview) -> None:
        """Give a unary call's message to the application."""
        shared = self.shared
        call.begun = True
        shared.in_flight += 1
        shared.requests += 1
        call.received = self.http2.now
        head = call.head
        try:
            head.route.handle(head, message, call)
        except Exception:
            self._failed(call)

    def guard(self, call: GrpcCall, function: Callable[..., object], *arguments: Any) -> None:
        """Call into the application; what it raises ends the call, and nothing else."""
        try:
            function(*arguments)
        except Exception:
            self._failed(call)

    def _failed(self, call: GrpcCall) -> None:
        _log.exception("a call failed in a way nobody foresaw: %r", call)
        call.give_up(grpc_wire.INTERNAL, "the gateway failed on this request; its log says why")

    def refuse(self, call: GrpcCall, error: GatewayError) -> None:
        self.shared.count_reject(error.reason)
        call.give_up(error.grpc_code, str(error))

    def left(self, stream: Stream) -> None:
        cast("GrpcCall", stream).abort()

    def drained(self, stream: Stream) -> None:
        call = cast("GrpcCall", stream)
        if call.handler is not None and not call.over:
            self.guard(call, call.handler.writable)
            call.deliver()
            self.http2.credit(call)

    # -- out -------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Something is to be written: do it at the end of this turn, with all else that comes up in it."""
        if not self._awake:
            self._awake = True
            dirty = self.shared.dirty
            if not dirty:
                self.loop.call_soon(self.shared.flush)
            dirty.append(self)

    def flush(self) -> None:
        """Write all there is, as far as the client and the transport take it."""
        if self.closing:
            return
        http2 = self.http2
        if http2.waiting:
            http2.pump(_WRITE_BUDGET_BYTES)
        out = http2.out
        if out:
            http2.out = []
            if len(out) == 1:
                self.transport.write(out[0])
            else:
                self.transport.writelines(out)
        self._awake = False
        if http2.waiting and http2.open and http2.send_window > 0:
            self.wake()
        if http2.closed or (not http2.streams and (http2.peer_leaving or http2.final_stream != MAX_STREAM_ID)):
            self._last_words()

    def _last_words(self) -> None:
        if self.http2.foreign:
            self.shared.count_reject("http_version")
            self.transport.write(NOT_HTTP2)
        elif self.http2.closed:
            self.shared.count_reject("http2")
        self.finish()

    def pause_writing(self) -> None:
        """The client does not take what is written: nothing more is framed, read or handed over."""
        self.http2.open = False
        self._unread_held = self.transport.get_write_buffer_size()
        self.shared.held.used_bytes += self._unread_held
        self.patience.untaken(self._clock(), self._unread_held)
        if not self.paused and not self.closing:
            self.paused = True
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.http2.open = True
        self._release_unread()
        self._resume_reading()
        if not self.closing:
            self.wake()

    def _release_unread(self) -> None:
        self.shared.held.used_bytes -= self._unread_held
        self._unread_held = 0

    def _resume_reading(self) -> None:
        if self.paused and not self.transport.is_closing():
            self.paused = False
            self.patience.read_at = self.patience.excused_at = self._clock()
            self.transport.resume_reading()

    # -- time ------------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Look for a client that has been too slow; called about once a second."""
        if self.closing:
            if now >= self._give_up_at:
                self.transport.abort()
        else:
            self.patience.sweep(now)
            self.flush()

    def drop(self, reason: str) -> None:
        """End the connection at once; what is still unwritten is lost."""
        self.shared.count_reject(reason)
        self.closing = self.http2.closed = True
        self._give_up_at = 0.0
        self.transport.abort()

    def drain(self) -> None:
        """Accept no more calls, and end the connection after those that are open."""
        http2 = self.http2
        if self.closing:
            return
        if not http2.started:
            self.finish()
            return
        if not self.patience.shutdown_at:
            self.patience.shutdown_at = self._clock()
            http2.begin_shutdown()
            self.wake()
