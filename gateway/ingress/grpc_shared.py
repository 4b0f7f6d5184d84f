"""What all connections of one gRPC server have in common: the application, budgets, counters, and the next write."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gateway.ingress.grpc_application import GrpcApplication, Refused, untold
from gateway.ingress.grpc_deadlines import CallDeadlines
from gateway.protocol.http1 import Held
from gateway.protocol.http2_limits import Http2Limits, OpenCalls

if TYPE_CHECKING:
    from gateway.ingress.grpc_connection import GrpcConnection


class Shared:
    """See the module's text."""

    def __init__(
        self,
        application: GrpcApplication,
        limits: Http2Limits,
        held: Held,
        clock: Callable[[], float],
        compression: int,
        refused: Refused = untold,
    ) -> None:
        self.application = application
        self.refused_here = refused
        self.limits = limits
        self.held = held
        self.calls = OpenCalls(limits.max_calls)
        self.clock = clock
        self.compression = compression
        """zlib's level for answers; 0: none are compressed."""
        self.deadlines = CallDeadlines(clock)
        self.connections: set[GrpcConnection] = set()
        self.refused: set[GrpcConnection] = set()
        """Over a connection limit: being told so, then closed."""
        self.addresses: dict[str, int] = {}
        self.in_flight = 0
        self.requests = 0
        self.accepted = 0
        self.aborted = 0
        self.expired = 0
        self.rejected: dict[str, int] = {}
        self.opened: Callable[[], None] = lambda: None
        self.closed: Callable[[], None] = lambda: None
        self.dirty: list[GrpcConnection] = []

    def count_reject(self, reason: str) -> None:
        self.rejected[reason] = self.rejected.get(reason, 0) + 1

    def flush(self) -> None:
        """Write what was produced outside of reads."""
        dirty, self.dirty = self.dirty, []
        for connection in dirty:
            connection.flush()
