"""How long one gRPC client's slowness is borne: instants stored on the way, compared about once a second.

Whoever is waited for gets an answer where one can still be read: a call whose message does not come fails, an answer
that is not taken is reset, a connection that breaks off mid-way is told why. Only a client that takes nothing at all,
or does not answer a PING, is cut off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from gateway.ingress.grpc_call import GrpcCall
from gateway.protocol import grpc_wire
from gateway.protocol.http2_frames import ErrorCode

if TYPE_CHECKING:
    from gateway.ingress.grpc_connection import GrpcConnection

_SHUTDOWN_GRACE_S: Final = 1.0
"""A client that does not answer the PING behind the first GOAWAY is sent the second one after this time."""


class Patience:
    """One connection's clock. `read_at`, `excused_at` and `shutdown_at` are written by the connection."""

    __slots__ = (
        "_block_since",
        "_connection",
        "_limits",
        "_made_at",
        "_untaken_bytes",
        "_untaken_since",
        "excused_at",
        "read_at",
        "shutdown_at",
    )

    def __init__(self, connection: GrpcConnection, now: float) -> None:
        self._connection = connection
        self._limits = connection.shared.limits
        self._made_at = now
        self._block_since = 0.0
        self._untaken_bytes = 0
        self._untaken_since = 0.0
        self.read_at = now
        """When something last arrived."""
        self.excused_at = 0.0
        """Before it, it was we who did not read."""
        self.shutdown_at = 0.0
        """When the first GOAWAY went out; 0 if it did not."""

    def untaken(self, now: float, count: int) -> None:
        """The transport holds `count` bytes and takes no more."""
        self._untaken_bytes = count
        self._untaken_since = now

    def sweep(self, now: float) -> None:
        connection = self._connection
        connection.http2.now = now
        if connection.paused:
            self._sweep_untaken(now)
            return
        self._sweep_speech(now)
        if not connection.http2.closed:
            self._sweep_calls(now)
            self._sweep_silence(now)

    def _sweep_untaken(self, now: float) -> None:
        limits = self._limits
        elapsed = now - self._untaken_since
        if elapsed < limits.write_timeout_s:
            return
        waiting = self._connection.transport.get_write_buffer_size()
        if self._untaken_bytes - waiting >= min(elapsed * limits.min_body_rate_bytes_s, self._untaken_bytes / 2):
            self.untaken(now, waiting)
        else:
            self._connection.drop("unread")

    def _sweep_speech(self, now: float) -> None:
        """The preface, a header block that has begun, and the answer to a first GOAWAY."""
        connection, patience_s = self._connection, self._limits.header_timeout_s
        http2 = connection.http2
        if not http2.in_block:
            self._block_since = 0.0
        elif not self._block_since:
            self._block_since = now
        since = self._block_since if http2.started else self._made_at
        if since and now - since >= patience_s:
            connection.shared.count_reject("slow_client")
            http2.fail(ErrorCode.SETTINGS_TIMEOUT, f"the client was silent for {patience_s:g} s where it had to speak")
        elif self.shutdown_at and now - self.shutdown_at >= _SHUTDOWN_GRACE_S:
            http2.end_shutdown()

    def _sweep_calls(self, now: float) -> None:
        for stream in list(self._connection.http2.streams.values()):
            call = cast("GrpcCall", stream)
            if call.queued_bytes:
                self._sweep_answer(call, now)
            elif not call.over and not call.remote_closed and (call.wanted or call.handler is None):
                self._sweep_message(call, now)

    def _sweep_answer(self, call: GrpcCall, now: float) -> None:
        limits, route = self._limits, call.head.route
        streaming = route is not None and route.streaming
        patience_s = limits.stream_write_timeout_s if streaming else limits.write_timeout_s
        if now - max(call.progress_at, self.excused_at) >= patience_s:
            self._connection.shared.count_reject("unread")
            self._connection.http2.reset(call.id, ErrorCode.CANCEL)
            call.abort()

    def _sweep_message(self, call: GrpcCall, now: float) -> None:
        """A message must begin within `header_timeout_s`, and then arrive at the rate of the slow-body rule."""
        limits = self._limits
        if call.paused or call.seen_at <= self.excused_at:
            call.seen_at, call.seen_bytes = now, call.taken_bytes
            return
        elapsed = now - call.seen_at
        if elapsed < (limits.body_window_s if call.taken_bytes else limits.header_timeout_s):
            return
        if call.taken_bytes - call.seen_bytes < elapsed * limits.min_body_rate_bytes_s:
            self._connection.shared.count_reject("slow_client")
            rate = limits.min_body_rate_bytes_s
            call.give_up(
                grpc_wire.DEADLINE_EXCEEDED, f"the request message arrives at less than {rate} bytes per second"
            )
        else:
            call.seen_at, call.seen_bytes = now, call.taken_bytes

    def _sweep_silence(self, now: float) -> None:
        connection, limits = self._connection, self._limits
        http2 = connection.http2
        silent_s = now - self.read_at
        if http2.pinged_at and min(silent_s, now - http2.pinged_at) >= limits.keepalive_timeout_s:
            connection.drop("silent")
        elif http2.streams and silent_s >= limits.keepalive_interval_s:
            http2.ping()
        elif not http2.streams and silent_s >= limits.idle_timeout_s:
            connection.drain()
