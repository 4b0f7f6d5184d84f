"""One client's connection: bytes in, requests to the application, answers out in request order.

The asyncio shell around `protocol/http1.py`; it moves bytes and decides nothing about them.

Rules and invariants:
- `pending` holds the exchanges handed over and not written, in request order. Only its first one is ever written;
  answers given early wait in their exchange.
- Each exchange ends once: written, or aborted with `on_abort` because the client is gone. Its bytes in `Held` are
  given back then.
- Nothing is read while `pending` is full, or while the client does not take what is written. What waits then is
  bounded by the look-ahead limit.
- No timer of its own: `sweep` is called about once a second and compares instants stored on the way.

`attention` is true whenever something besides "write this answer" may be due, so that the usual request pays for
one test only.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import Final, cast

from gateway.errors import GatewayError, Overloaded
from gateway.ingress.http_exchange import UNREAD_HEAD, AdaptedExchange, Application, Exchange, Refused
from gateway.protocol.http1 import (
    CONTINUE,
    Event,
    Head,
    Heads,
    Held,
    HttpLimits,
    Receiver,
    Reject,
    Request,
    error_response,
)

_log = logging.getLogger("gateway.http")

_MAX_REFUSED: Final = 128
"""Connections over the limit that are told so, at one time; further ones are cut off without a word."""
_PROBE_DELAY_S: Final = 0.04
"""Two of these, and a slot whose caller left is free within a tenth of a second."""
_TCP_CLOSE: Final = 7
"""State of a connection that was reset (`tcp_states.h`); the first byte of `struct tcp_info`."""


class Shared:
    """What all connections of one server have in common."""

    def __init__(
        self,
        application: Application,
        limits: HttpLimits,
        clock: Callable[[], float],
        refused: Refused,
    ) -> None:
        self.limits = limits
        self.refused_here = refused
        self.clock = clock
        self.handle = application.handle
        self.heads = Heads(limits, application.resolve)
        self.held = Held(limits.max_held_bytes)
        self.connections: set[Connection] = set()
        self.refused: set[Connection] = set()
        """Over a connection limit: being told so, then closed."""
        self.addresses: dict[str, int] = {}
        self.room = limits.max_in_flight
        self.requests = 0
        self.accepted = 0
        self.aborted = 0
        self.rejected: dict[str, int] = {}
        self.opened: Callable[[], None] = lambda: None
        self.closed: Callable[[], None] = lambda: None

    def count_reject(self, error: GatewayError) -> None:
        self.rejected[error.reason] = self.rejected.get(error.reason, 0) + 1


class Connection(asyncio.Protocol):
    """See the module's text."""

    __slots__ = (
        "_address",
        "_clock",
        "_closing",
        "_continue_owed",
        "_eof",
        "_give_up_at",
        "_linger",
        "_paused",
        "_probed",
        "_quiet_since",
        "_read_at",
        "_receive",
        "_scheduled",
        "_take_whole",
        "_unread_bytes",
        "_unread_held",
        "_unread_since",
        "attention",
        "pending",
        "receiver",
        "room",
        "shared",
        "transport",
        "writable",
        "write",
    )

    transport: asyncio.Transport
    write: Callable[[bytes], None]
    receiver: Receiver

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.room = shared.room
        self.pending: deque[Exchange] = deque()
        self.writable = True
        self.attention = False
        self._paused = False
        self._scheduled = False
        self._eof = False
        self._probed = False
        self._continue_owed = False
        self._linger = False
        self._closing = False
        self._give_up_at = 0.0
        self._quiet_since = 0.0
        self._unread_bytes = 0
        self._unread_held = 0
        self._unread_since = 0.0
        self._address = ""

    def __repr__(self) -> str:
        return f"<Connection {self._address} {len(self.pending)} pending>"

    # -- beginning and end -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        shared = self.shared
        now = shared.clock()
        self.transport = cast("asyncio.Transport", transport)  # uvloop's fits, without being a subclass
        self.write = self.transport.write
        self.receiver = Receiver(shared.heads, shared.held, now)
        self._receive = self.receiver.receive
        self._take_whole = self.receiver.take_whole
        self._clock = shared.clock
        self._read_at = now
        peer = transport.get_extra_info("peername")
        self._address = peer[0] if isinstance(peer, tuple) else ""
        shared.accepted += 1
        error = self._over_limit()
        if error is not None:
            self._turn_away(error)
        else:
            shared.connections.add(self)
            shared.addresses[self._address] = shared.addresses.get(self._address, 0) + 1
        shared.opened()

    def _over_limit(self) -> Overloaded | None:
        limits = self.shared.limits
        if len(self.shared.connections) >= limits.max_connections:
            return Overloaded(f"all {limits.max_connections} connections are in use; retry later, or reuse connections")
        local = self._address.startswith(("127.", "::ffff:127.")) or self._address in {"::1", ""}
        if not local and self.shared.addresses.get(self._address, 0) >= limits.max_connections_per_address:
            count = limits.max_connections_per_address
            return Overloaded(f"all {count} connections of one address are in use; retry later, or reuse connections")
        return None

    def _turn_away(self, error: Overloaded) -> None:
        self.shared.count_reject(error)
        self._closing = True
        if len(self.shared.refused) >= _MAX_REFUSED:
            self.transport.abort()
            return
        self.shared.refused.add(self)
        self.write(error_response(error, self.shared.refused_here(None, error, self.shared.clock()), keep_alive=False))
        self._linger = True
        self.finish()

    def connection_lost(self, error: Exception | None) -> None:
        shared = self.shared
        self._closing = True
        self.receiver.close()
        self._release_unread()
        self._abort_pending()
        shared.refused.discard(self)
        if self in shared.connections:
            shared.connections.remove(self)
            left = shared.addresses[self._address] - 1
            if left:
                shared.addresses[self._address] = left
            else:
                del shared.addresses[self._address]
        shared.closed()

    def _abort_pending(self) -> None:
        while self.pending:
            self.pending.popleft().abort(self)

    def finish(self) -> None:
        """End the connection once what is written has gone out.

        After a refusal the client may still be sending. Closing at once would make the kernel answer that with a
        reset, which can destroy the refusal before it is read; so only our half is closed, and what comes is
        dropped until the client closes or `linger_s` are over.
        """
        limits = self.shared.limits
        self._closing = True
        self.receiver.close()
        self._abort_pending()
        if self._linger and not self._eof and self.transport.can_write_eof():
            self._give_up_at = self.shared.clock() + limits.linger_s
            self.transport.write_eof()
            self._resume_reading()
        else:
            self._give_up_at = self.shared.clock() + limits.write_timeout_s
            self.transport.close()

    # -- in --------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        pending = self.pending
        self._read_at = now = self._clock()
        if not pending:
            # The usual case: one whole request with a remembered head, and nothing before it.
            head = self._take_whole(data)
            if head is not None:
                self._hand_over(head, data[-head.length :] if head.length else b"", now)
                return
        for event in self._receive(data, now, self.room - len(pending)):
            if type(event) is Request and not self._closing:
                self._continue_owed = False  # its body came without
                self._hand_over(event.head, event.body, now)
            else:
                self._uncommon_event(event, now)
        if self.receiver.more or len(pending) >= self.room:
            self._pause_reading()
            self._schedule()

    def _hand_over(self, head: Head, body: bytes, now: float) -> None:
        kind = AdaptedExchange if head.uncommon else Exchange
        exchange = kind(self, head, now, len(body))
        self.pending.append(exchange)
        shared = self.shared
        shared.requests += 1
        try:
            shared.handle(head, body, exchange)
        except Exception:
            self._failed(exchange)

    def _uncommon_event(self, event: Event, now: float) -> None:
        if isinstance(event, Request):  # behind one that ended the connection
            self.shared.held.used_bytes -= len(event.body)
        elif self._closing:
            return
        elif isinstance(event, Reject):
            self.shared.count_reject(event.error)
            self._refuse(event.error, event.close, now, event.head)
        elif self.pending:
            self._continue_owed = self.attention = True
        else:
            self.write(CONTINUE)

    def _refuse(self, error: GatewayError, close: bool, now: float, head: Head | None) -> None:
        self._continue_owed = False
        exchange = Exchange(self, UNREAD_HEAD, now, 0)
        exchange.keep_alive = not close
        self._linger = close
        self.pending.append(exchange)
        exchange.send_error(error, self.shared.refused_here(head, error, now))

    def _failed(self, exchange: Exchange) -> None:
        _log.exception("a request failed in a way nobody foresaw: %r", exchange.head)
        if not exchange.answered:
            error = GatewayError("the gateway failed on this request; its log says why")
            exchange.send_error(error, self.shared.refused_here(exchange.head, error, exchange.received))

    def eof_received(self) -> bool:
        """The client sends no more. It may have closed its half only, so what it asked for is answered first."""
        self._eof = self.attention = True
        if not self.receiver.more:
            self.receiver.close()
        if self._closing or not (self.pending or self.receiver.more):
            return False
        asyncio.get_running_loop().call_later(_PROBE_DELAY_S, self._probe)
        return True

    def _probe(self) -> None:
        """Find out whether a client that sends no more still listens.

        A half-closed and a fully closed peer look the same until something is sent: the latter answers with a reset.
        An interim 100 may be sent at any time and is discarded (RFC 9110 §15.2.1), but not to HTTP/1.0.
        """
        if self._closing or not self.pending:
            return
        if self._reset():
            self._cut_off()
        elif not self._probed and self.writable and not self.pending[0].head.http10:
            self._probed = True
            self.write(CONTINUE)
            asyncio.get_running_loop().call_later(_PROBE_DELAY_S, self._probe)

    def _reset(self) -> bool:
        sock: socket.socket | None = self.transport.get_extra_info("socket")
        if sock is None:
            return False
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE

    # -- flow ------------------------------------------------------------------------------------------------

    def _pause_reading(self) -> None:
        if not self._paused and not self._closing:
            self._paused = self.attention = True
            self.transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._paused and not self.transport.is_closing():
            self._paused = False
            self.receiver.excuse(self.shared.clock())
            self.transport.resume_reading()

    def _schedule(self) -> None:
        """Go on in the loop's next round, so that one connection's pipeline does not hold up the others."""
        if not self._scheduled and self.writable and len(self.pending) <= self.room // 2:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        self._scheduled = False
        if self._closing or not self.writable:
            return
        if self.receiver.more:
            self.data_received(b"")
        elif len(self.pending) <= self.room // 2:
            self._resume_reading()
        self._settle()

    def pause_writing(self) -> None:
        """The client does not take what is written: nothing more is written, read or handed over."""
        self.writable = False
        self._unread_bytes = self._unread_held = self.transport.get_write_buffer_size()
        self.shared.held.used_bytes += self._unread_held  # an answer nobody reads fills memory as a request does
        self._unread_since = self.shared.clock()
        self._pause_reading()

    def _release_unread(self) -> None:
        self.shared.held.used_bytes -= self._unread_held
        self._unread_held = 0

    def resume_writing(self) -> None:
        self.writable = True
        self._release_unread()
        if not self._closing:
            self._settle()
            self._schedule()

    # -- out -------------------------------------------------------------------------------------------------

    def written(self, exchange: Exchange) -> None:
        """An answer was written, and more than that may be due."""
        if not exchange.keep_alive:
            self.finish()
            return
        self._settle()

    def _settle(self) -> None:
        """Write what has been waiting for its turn; end or go on reading if that is what was waited for."""
        pending = self.pending
        while pending and self.writable and not self._closing:
            exchange = pending[0]
            if not exchange.flush(self):
                break
            if not exchange.keep_alive:
                self.finish()
        if self._closing:
            return
        if self._paused:
            self._schedule()
        if not pending:
            if self._continue_owed:
                self._continue_owed = False
                self.write(CONTINUE)
            if self._eof and not self.receiver.more:
                self.finish()
        self.attention = self._paused or self._eof or self._continue_owed

    # -- time ------------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Look for a client that has been too slow; called about once a second."""
        if self._closing:
            if now >= self._give_up_at:
                self.transport.abort()
        elif not self.writable:
            self._sweep_unread(now)
        elif self._eof:
            self._probe()
        elif not self._paused:
            self._sweep_input(now)

    def _sweep_unread(self, now: float) -> None:
        limits = self.shared.limits
        elapsed = now - self._unread_since
        if elapsed < limits.write_timeout_s:
            return
        waiting = self.transport.get_write_buffer_size()
        if self._unread_bytes - waiting >= min(elapsed * limits.min_body_rate_bytes_s, self._unread_bytes / 2):
            self._unread_bytes = waiting
            self._unread_since = now
        else:
            self.shared.rejected["unread"] = self.shared.rejected.get("unread", 0) + 1
            self._cut_off()

    def _cut_off(self) -> None:
        """End the connection at once; what is still unwritten is lost."""
        self._closing = True
        self._give_up_at = 0.0
        self.transport.abort()

    def _sweep_input(self, now: float) -> None:
        error = self.receiver.expired(now)
        if error is not None:
            self.shared.count_reject(error)
            if self.receiver.skipping:
                self._linger = True
                self.finish()
            else:
                head = self.receiver.begun
                self.receiver.close()
                self._refuse(error, close=True, now=now, head=head)
        elif self.pending:
            self._quiet_since = now
        elif self.receiver.idle and now - max(self._read_at, self._quiet_since) >= self.shared.limits.idle_timeout_s:
            self.finish()

    def drain(self) -> None:
        """The server stops: end the connection after what it owes. An unfinished request may still be finished."""
        if self._closing:
            return
        if self.pending:
            if self.receiver.idle:
                self.pending[-1].keep_alive = False
        elif self.receiver.unused:
            self.finish()
