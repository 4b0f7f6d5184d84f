"""One request's way back to its client: what an application is given to answer with.

Rules: an exchange is answered once, now or later, or aborted because its client is gone; answering after that does
nothing, because a vanished client is normal. Answers leave in request order, whatever order they are given in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from gateway.errors import GatewayError, Overloaded
from gateway.protocol.http1 import Head, adapt, error_response

if TYPE_CHECKING:
    from gateway.ingress.http_connection import Connection

_log = logging.getLogger("gateway.http")

_SENT: Final = b"sent"

UNREAD_HEAD: Final = Head(b"", b"")
"""Stands for the head of a request that was refused before it had one."""


class Application(Protocol):
    """What answers the requests."""

    def resolve(self, head: Head, /) -> Any:
        """Called once for each unseen head; the result is kept in `head.route`. Must not raise."""

    def handle(self, head: Head, body: bytes, exchange: Exchange, /) -> None:
        """Answer now, or later through `exchange`. An exception becomes a 500, unless the answer is out."""


class Refused(Protocol):
    """Is told of every request that is refused before the application was given it, or because it failed on it."""

    def __call__(self, head: Head | None, error: GatewayError, received: float, /) -> bytes:
        """Header lines that the refusal carries besides, whole lines. Must not raise.

        `head`: what is known of it, resolved; None: not even its path. `received`: monotonic seconds.
        """


def untold(head: Head | None, error: GatewayError, received: float) -> bytes:
    """Nobody wants to know."""
    return b""


class Exchange:
    """One request's way back to its client. Answer it once, with one of the `send` methods."""

    __slots__ = ("_answer", "_connection", "_held_bytes", "head", "keep_alive", "on_abort", "received")

    def __init__(self, connection: Connection, head: Head, received: float, held_bytes: int) -> None:
        self.received = received
        """When the request was complete: monotonic seconds of the server's clock."""
        self.head = head
        self.keep_alive = head.keep_alive
        """Whether the connection stays open after the answer. The answer's `Connection` header has to agree, so
        read it when the head is written; set it to False to end the connection."""
        self.on_abort: Callable[[], None] | None = None
        """Called once if the client leaves before the answer is given."""
        self._connection: Connection | None = connection
        self._answer: bytes | list[bytes | memoryview] | None = None
        self._held_bytes = held_bytes

    def __repr__(self) -> str:
        state = "open" if self._answer is None and self._connection is not None else "over"
        return f"<Exchange {self.head!r} {state}>"

    def hold(self, nbytes: int) -> None:
        """Count further bytes as held for this request until it ends: what its body became.

        Raises:
            Overloaded: the server holds as many bytes as it may.
        """
        connection = self._connection
        if connection is None:
            return
        held = connection.shared.held
        if held.used_bytes + nbytes > held.limit_bytes:
            raise Overloaded(f"the bodies of all requests may hold {held.limit_bytes} bytes; retry later")
        held.used_bytes += nbytes
        self._held_bytes += nbytes

    def send(self, data: bytes) -> None:
        """Answer with the bytes of a complete response. Does nothing if the client is gone.

        Raises:
            RuntimeError: the request was answered before.
        """
        connection = self._connection
        if connection is not None and connection.writable and connection.pending[0] is self:
            self._answer = _SENT
            self._connection = None
            pending = connection.pending
            pending.popleft()
            connection.shared.held.used_bytes -= self._held_bytes
            connection.write(data)
            if connection.attention or pending or not self.keep_alive:
                connection.written(self)
        else:
            self._keep(data)

    def send_parts(self, parts: list[bytes | memoryview]) -> None:
        """As `send`, for a response in several parts; large ones are not copied, so they must not change later."""
        connection = self._connection
        if connection is not None and connection.writable and connection.pending[0] is self:
            connection.pending.popleft()
            self.write_to(connection, parts)
            connection.written(self)
        else:
            self._keep(parts)

    def send_error(self, error: GatewayError, extra: bytes = b"") -> None:
        """Answer with an error. `extra`: further headers, each with its CRLF."""
        self.send(error_response(error, extra, self.keep_alive))

    def _keep(self, answer: bytes | list[bytes | memoryview]) -> None:
        if self._answer is not None:
            raise RuntimeError("a request was answered twice")
        if self._connection is not None:
            self._answer = answer

    @property
    def answered(self) -> bool:
        return self._answer is not None

    def flush(self, connection: Connection) -> bool:
        """Write the answer if it was given already; for the connection, when its turn has come."""
        answer = self._answer
        if answer is None:
            return False
        connection.pending.popleft()
        self.write_to(connection, answer)
        return True

    def write_to(self, connection: Connection, answer: bytes | list[bytes | memoryview]) -> None:
        self._answer = _SENT
        self._connection = None
        connection.shared.held.used_bytes -= self._held_bytes
        if isinstance(answer, list):
            connection.transport.writelines(answer)
        else:
            connection.write(answer)

    def abort(self, connection: Connection) -> None:
        """The client is gone, or will never read this answer."""
        self._connection = None
        connection.shared.held.used_bytes -= self._held_bytes
        if self._answer is not None:
            return
        connection.shared.aborted += 1
        on_abort, self.on_abort = self.on_abort, None
        if on_abort is None:
            return
        try:
            on_abort()
        except Exception:
            _log.exception("giving up a request whose client left failed")


class AdaptedExchange(Exchange):
    """For HEAD, whose answers have no body, and HTTP/1.0, where staying open has to be said."""

    __slots__ = ()

    def send(self, data: bytes) -> None:
        head = self.head
        super().send(adapt(data, head.method == b"HEAD", head.http10 and self.keep_alive))

    def send_parts(self, parts: list[bytes | memoryview]) -> None:
        self.send(b"".join(parts))
