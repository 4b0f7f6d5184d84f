"""The gRPC server of port 8001: its connections, its counters, its clock, its end.

Decides nothing about bytes: `protocol/http2.py` and `protocol/grpc_wire.py` do. One sweep a second stands in for all
timers of all connections but the deadlines', and only runs while there are connections, so an idle server sleeps.

Shutdown is graceful (RFC 9113 §6.8): a first GOAWAY tells clients to open no more calls, a PING finds out when they
have heard it, a second GOAWAY names the last call that is served, and the connection closes after it.

Invariant: after `drain` returns there is no connection left, and no call that could still be answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from gateway.ingress.grpc_application import Refused, untold
from gateway.ingress.grpc_call import GrpcApplication, GrpcCall, Method, StreamHandler
from gateway.ingress.grpc_connection import GrpcConnection
from gateway.ingress.grpc_shared import Shared
from gateway.protocol.grpc_wire import COMPRESSION_LEVELS, CallHead
from gateway.protocol.http1 import Held
from gateway.protocol.http2_limits import Http2Limits

__all__ = [
    "CallHead",
    "GrpcApplication",
    "GrpcCall",
    "GrpcServer",
    "GrpcStatistics",
    "Http2Limits",
    "Method",
    "StreamHandler",
]

_SWEEP_INTERVAL_S: Final = 1.0
_ROUNDS_BEFORE_CLOSING: Final = 3


class Closable(Protocol):
    """Something that accepts connections until it is closed."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class GrpcStatistics:
    """Counters since the start, and gauges of this moment."""

    open_connections: int
    accepted_connections: int
    requests: int
    """Calls handed over to the application."""
    aborted: int
    """Handed over, but the client cancelled or left before the answer."""
    expired: int
    """Answered DEADLINE_EXCEEDED here."""
    rejected: dict[str, int]
    """Refused here, by reason: calls, connections over a limit, slow clients, protocol faults."""
    in_flight: int
    held_bytes: int
    """Bytes of requests being received or waiting for their answer, and of answers not yet taken."""


class GrpcServer:
    """`protocol` is the factory to give to `loop.create_server`; `ingress.listener.listen` does."""

    def __init__(
        self,
        application: GrpcApplication,
        limits: Http2Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        held: Held | None = None,
        compression: str = "none",
        refused: Refused = untold,
    ) -> None:
        """
        Args:
            clock: monotonic seconds; `GrpcCall.received` and deadlines are read from it.
            held: the budget of bytes, to share it with another server.
            compression: of answers, to clients that accept any: none, low, medium or high.
            refused: is told of each refusal made here.
        """
        self.limits = limits or Http2Limits()
        held = held if held is not None else Held(self.limits.max_held_bytes)
        self._shared = Shared(application, self.limits, held, clock, COMPRESSION_LEVELS[compression], refused)
        self._shared.opened = self._arm
        self._shared.closed = self._connection_closed
        self._listeners: list[Closable] = []
        self._timer: asyncio.TimerHandle | None = None
        self._emptied: asyncio.Event | None = None

    def __repr__(self) -> str:
        return f"<GrpcServer {len(self._shared.connections)} connections, {self._shared.requests} calls>"

    def protocol(self) -> GrpcConnection:
        return GrpcConnection(self._shared)

    def attach(self, listener: Closable) -> None:
        """`drain` closes `listener` first."""
        self._listeners.append(listener)

    def statistics(self) -> GrpcStatistics:
        shared = self._shared
        return GrpcStatistics(
            open_connections=len(shared.connections),
            accepted_connections=shared.accepted,
            requests=shared.requests,
            aborted=shared.aborted,
            expired=shared.expired,
            rejected=dict(shared.rejected),
            in_flight=shared.in_flight,
            held_bytes=shared.held.used_bytes,
        )

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

    async def drain(self, timeout_s: float) -> int:
        """Stop: accept no more, answer what was accepted, close. Returns how many calls went unanswered.

        Whatever is left after `timeout_s` is cut off.
        """
        shared = self._shared
        for listener in self._listeners:
            listener.close()
        # What clients sent before they could know is in the sockets: let it in before idle connections close.
        for _ in range(_ROUNDS_BEFORE_CLOSING):
            await asyncio.sleep(0)
        self._emptied = emptied = asyncio.Event()
        for connection in list(shared.connections):
            connection.drain()
        self._connection_closed()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await emptied.wait()
        unanswered = shared.in_flight
        for connection in [*shared.connections, *shared.refused]:
            connection.transport.abort()
        await emptied.wait()
        shared.deadlines.stop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return unanswered
