"""The HTTP/1.1 server of the data port: its connections, its counters, its clock, its end.

Decides nothing about bytes: `protocol/http1.py` does. One sweep a second stands in for all timers of all
connections, and only runs while there are connections, so an idle server sleeps.

Invariant: after `drain` returns there is no connection left, and no exchange that could still be written.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, Protocol

from gateway.ingress.http_connection import Connection, Shared
from gateway.ingress.http_exchange import Application, Exchange, Refused, untold
from gateway.protocol.http1 import Head, Held, HttpLimits

__all__ = ["Application", "Exchange", "Head", "HttpLimits", "HttpServer", "HttpStatistics"]

_SWEEP_INTERVAL_S: Final = 1.0
_ROUNDS_BEFORE_CLOSING: Final = 3


class Closable(Protocol):
    """Something that accepts connections until it is closed."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class HttpStatistics:
    """Counters since the start, and gauges of this moment."""

    open_connections: int
    accepted_connections: int
    requests: int
    """Handed over to the application."""
    aborted: int
    """Handed over, but the client left before the answer."""
    rejected: dict[str, int]
    """Refused here, by reason: requests, connections over a limit, slow clients."""
    in_flight: int
    held_bytes: int
    """Request bytes being received or waiting for their answer."""
    remembered_heads: int


class HttpServer:
    """`protocol` is the factory to give to `loop.create_server`; `ingress.listener.listen` does."""

    def __init__(
        self,
        application: Application,
        limits: HttpLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        refused: Refused = untold,
    ) -> None:
        """`clock`: monotonic seconds; `Exchange.received` is read from it. `refused`: is told
        of each refusal made here."""
        self.limits = limits or HttpLimits()
        self._application = application
        self._shared = Shared(application, self.limits, clock, refused)
        self._shared.opened = self._arm
        self._shared.closed = self._connection_closed
        self._listeners: list[Closable] = []
        self._timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._emptied: asyncio.Event | None = None

    def __repr__(self) -> str:
        return f"<HttpServer {len(self._shared.connections)} connections, {self._shared.requests} requests>"

    def protocol(self) -> Connection:
        return Connection(self._shared)

    @property
    def held(self) -> Held:
        """The budget of request bytes; another server may share it."""
        return self._shared.held

    def attach(self, listener: Closable) -> None:
        """`drain` closes `listener` first."""
        self._listeners.append(listener)

    def forget_heads(self) -> None:
        """Have every head resolved anew: what the application knows has changed."""
        self._shared.heads.forget()

    def statistics(self) -> HttpStatistics:
        shared = self._shared
        return HttpStatistics(
            open_connections=len(shared.connections),
            accepted_connections=shared.accepted,
            requests=shared.requests,
            aborted=shared.aborted,
            rejected=dict(shared.rejected),
            in_flight=sum(len(connection.pending) for connection in shared.connections),
            held_bytes=shared.held.used_bytes,
            remembered_heads=len(shared.heads.remembered),
        )

    @property
    def draining(self) -> bool:
        """Whether `drain` was called: every answer from now on may be its connection's last."""
        return self._draining

    @property
    def sweeping(self) -> bool:
        """Whether a timer is set; never without a connection."""
        return self._timer is not None

    # -- time ------------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Disconnect clients that have been too slow. Called by a timer while there are connections."""
        for connection in [*self._shared.connections, *self._shared.refused]:
            connection.sweep(now)

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SWEEP_INTERVAL_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.sweep(self._shared.clock())
        if self._shared.connections or self._shared.refused:
            self._arm()

    # -- end -------------------------------------------------------------------------------------------------

    def _connection_closed(self) -> None:
        if self._emptied is not None and not self._shared.connections and not self._shared.refused:
            self._emptied.set()

    def drain(self, timeout_s: float, idle_s: float = 0.0) -> Coroutine[Any, Any, int]:
        """Stop: accept no more, answer what was accepted, close. Awaited, how many requests went unanswered.

        From the call on, awaited or not, every connection's last answer says `Connection: close`. Whatever is left
        after `timeout_s` is cut off.

        `idle_s`: how long connections without a request are kept open, so that their clients learn of the end from an
        answer: one that sends while the connection is being closed cannot know whether its request was executed.
        """
        shared = self._shared
        for listener in self._listeners:
            listener.close()
        self._draining = True
        shared.room = 1
        shared.handle = self._handle_last
        for connection in shared.connections:
            connection.room = 1
        return self._drained(timeout_s, idle_s)

    async def _drained(self, timeout_s: float, idle_s: float) -> int:
        shared = self._shared
        if idle_s:
            await self._wait_empty(idle_s)
        # What clients sent before they could know is in the sockets: let it in before idle connections close.
        for _ in range(_ROUNDS_BEFORE_CLOSING):
            await asyncio.sleep(0)
        for connection in list(shared.connections):
            connection.drain()
        emptied = await self._wait_empty(timeout_s)
        unanswered = sum(not exchange.answered for c in shared.connections for exchange in c.pending)
        for connection in [*shared.connections, *shared.refused]:
            connection.transport.abort()
        await emptied.wait()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return unanswered

    async def _wait_empty(self, timeout_s: float) -> asyncio.Event:
        """Returns when there is no connection left, or after `timeout_s`; the event is set in the former case."""
        self._emptied = emptied = asyncio.Event()
        self._connection_closed()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await emptied.wait()
        return emptied

    def _handle_last(self, head: Head, body: bytes, exchange: Exchange) -> None:
        exchange.keep_alive = False
        self._application.handle(head, body, exchange)
