"""Connections to one remote server, and one exchange at a time on each, whatever is spoken on them.

Clients of our own because a failure has to be told apart exactly: whether a byte of the request can have reached the
server, whether a byte of the answer came, and whether the connection may be used again. Rules: nothing is ever sent
twice here (RFC 9112 §9.3.1); a connection whose exchange ended in any but the planned way is closed; an unused one is
closed after a minute. There is no bound of its own on their number: slots bound the exchanges.

NOT_SENT after a connection was lost is said only where the peer closed it without having acknowledged one byte of the
request: a FIN acknowledges all that arrived before it, so such a server had closed an idle connection. A reset proves
nothing, since acknowledgements may be late; it counts as broken.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any, ClassVar, Final, Protocol

from gateway.backends.remote_endpoint import Endpoint
from gateway.backends.remote_outcome import broken, not_connected, not_sent
from gateway.backends.remote_tls import TlsError, TlsFiles
from gateway.core.outcome import Failure

IDLE_S: Final = 60.0
"""Longest that a connection is kept unused."""
SWEEP_S: Final = 15.0
MAX_TOLD_BYTES: Final = 2 << 20
"""Of an answer to a question that is no inference: reading it holds everybody else up."""
OUT_OF: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
"""What this process or machine lacks, not the server."""
OUT_OF_PAUSE_S: Final = 0.05
"""Before a batch is handed back for lack of them: it comes back at once otherwise, and finds them lacking."""
TLS_FACTOR: Final = 4
"""A TLS handshake takes two more round trips and some computing than the connection below it."""
_KEEPALIVE: Final = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 5000))
_ACKED_AT: Final = 120
"""Offset of `tcpi_bytes_acked` in Linux' struct tcp_info."""
_ACKED: Final = struct.Struct("=Q")

Done = Callable[[Any], None]
"""Takes the answer, in the form of the protocol spoken, or a `Failure`."""


class Watcher(Protocol):
    """Who wants to know about connections."""

    def connected(self) -> None: ...
    def connect_failed(self, text: str, /) -> None: ...
    def disturbed(self) -> None:
        """A connection was lost that nobody on this side closed."""


class Exchange:
    """One request and its answer. `done` is called once, unless it was abandoned before."""

    __slots__ = ("connection", "done", "max_bytes", "request", "tag")

    def __init__(self, request: Any, done: Done, max_bytes: int) -> None:
        self.request = request
        self.done: Done | None = done
        self.max_bytes = max_bytes
        """Of the answer."""
        self.tag = ""
        """What the request calls itself, where it does."""
        self.connection: Connection | None = None

    def abandon(self) -> None:
        """Nobody waits: the connection it is on is closed, never used again. Harmless when it is over."""
        self.done = None
        if self.connection is not None:
            self.connection.drop()

    def settle(self, result: Any) -> None:
        done, self.done = self.done, None
        self.connection = None
        self.request = None
        if done is not None:
            done(result)


class Channel:
    """All connections to one address of one endpoint."""

    def __init__(self, endpoint: Endpoint, address: str, name: str, watcher: Watcher, kind: type[Connection]) -> None:
        self._endpoint = endpoint
        self._address = address or endpoint.host
        self.name = name
        self.watcher = watcher
        self.max_bytes = endpoint.max_answer_bytes
        self._kind = kind
        self._loop = asyncio.get_running_loop()
        self._tls = TlsFiles(endpoint, kind.alpn) if endpoint.secure else None
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self.closed = False

    def __repr__(self) -> str:
        return f"<Channel {self.name} open={len(self._open)} idle={len(self._idle)}>"

    @property
    def connections(self) -> int:
        return len(self._open)

    def begin(self, request: Any, done: Done, max_bytes: int = 0) -> Exchange:
        """Send one whole request. `done` is never called from inside. `max_bytes`: of the answer; 0: the endpoint's."""
        exchange = Exchange(request, done, max_bytes or self.max_bytes)
        connection = self._take()
        if connection is not None:
            connection.send(exchange)
        else:
            task = self._loop.create_task(self._connect(exchange))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return exchange

    async def ask(self, request: Any, timeout_s: float) -> Any:
        """Like `begin`, for those who wait: the answer, a small one, or a `Failure`. Raises TimeoutError."""
        answer: asyncio.Future[Any] = self._loop.create_future()

        def take(result: Any) -> None:
            if not answer.done():  # it may have been given up, and the exchange not yet
                answer.set_result(result)

        exchange = self.begin(request, take, MAX_TOLD_BYTES)
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        finally:
            exchange.abandon()

    async def close(self) -> None:
        """Close every connection; exchanges under way end as broken."""
        self.closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        for connection in [*self._open]:
            connection.drop()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # in which the transports close their sockets

    def drop_idle(self) -> None:
        """Close the connections that nobody uses: what is behind them may be gone."""
        for connection in [*self._idle]:
            connection.drop()

    def _take(self) -> Connection | None:
        now = self._loop.time()
        while self._idle:
            connection = self._idle.pop()
            if now < connection.idle_until and connection.usable and connection.silent():
                return connection
            connection.drop()
        return None

    def release(self, connection: Connection) -> None:
        """An exchange is over, and its connection may serve another."""
        if self.closed:
            connection.drop()
            return
        connection.idle_until = self._loop.time() + connection.idle_s
        self._idle.append(connection)
        if self._sweep is None:
            self._sweep = self._loop.call_later(SWEEP_S, self._drop_old)

    def _drop_old(self) -> None:
        now = self._loop.time()
        for connection in [c for c in self._idle if c.idle_until <= now]:
            connection.drop()
        self._sweep = self._loop.call_later(SWEEP_S, self._drop_old) if self._idle else None

    def lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    async def _connect(self, exchange: Exchange) -> None:
        try:
            connection = await self._connection()
        except asyncio.CancelledError:
            exchange.settle(not_connected(f"the connection to {self.name} was given up"))
            raise
        except (OSError, TlsError, ValueError) as error:
            text = f"no connection to {self.name}: {_fault(error, self._endpoint)}"
            if isinstance(error, OSError) and error.errno in OUT_OF:
                await asyncio.sleep(OUT_OF_PAUSE_S)
                exchange.settle(not_sent(text))
                return
            self.watcher.connect_failed(text)
            exchange.settle(not_connected(text))
            return
        self.watcher.connected()
        if not connection.usable:
            exchange.settle(not_sent(f"{self.name} closed the connection before it took the request"))
        elif exchange.done is None:
            self.release(connection)
        else:
            connection.send(exchange)

    async def _connection(self) -> Connection:
        limit = self._endpoint.connect_timeout_s
        context = None if self._tls is None else self._tls.context()
        async with asyncio.timeout(limit):
            sock = await self._socket()
        connection = self._kind(self, sock)
        try:
            if context is None:
                await self._loop.create_connection(lambda: connection, sock=sock)
            else:
                async with asyncio.timeout(TLS_FACTOR * limit):
                    name = self._endpoint.server_name
                    await self._loop.create_connection(lambda: connection, sock=sock, ssl=context, server_hostname=name)
        except BaseException:
            sock.close()
            raise
        self._open.add(connection)
        return connection

    async def _socket(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in self._address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                if hasattr(socket, option):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            await self._loop.sock_connect(sock, (self._address, self._endpoint.port))
        except BaseException:
            sock.close()
            raise
        return sock


class Connection(asyncio.Protocol):
    """One connection; a subclass speaks the protocol."""

    alpn: ClassVar[str] = ""

    def __init__(self, channel: Channel, sock: socket.socket) -> None:
        self.channel = channel
        self._socket = sock
        self.transport: Any = None
        self.exchange: Exchange | None = None
        self._acked = -1
        self._untouched = False
        """Whether the peer closed before it had a byte of the request."""
        self.answered = False
        """Whether a byte of the answer to the exchange under way has come."""
        self.max_bytes = channel.max_bytes
        self.idle_until = 0.0
        self.idle_s = IDLE_S
        self.dropped = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} to {self.channel.name} {'busy' if self.exchange else 'idle'}>"

    @property
    def usable(self) -> bool:
        return not self.dropped and not self.transport.is_closing()

    def send(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.max_bytes = exchange.max_bytes
        exchange.connection = self
        self.answered = False
        self._acked = self._bytes_acked()
        self.write(exchange.request)
        exchange.request = None

    def silent(self) -> bool:
        """Whether nothing has come that is not read yet; asked before an unused connection is used again."""
        return True

    def write(self, request: Any) -> None:
        """Begin to send a request."""
        raise NotImplementedError

    def drop(self) -> None:
        """Close it at once; what was under way ends as broken, if somebody still waits."""
        if not self.dropped:
            self.dropped = True
            self.channel.lost(self)
            self.transport.abort()

    def end(self, result: Any, *, keep: bool) -> None:
        """The exchange under way is over. `keep`: the connection may serve another one."""
        exchange, self.exchange = self.exchange, None
        if keep and self.usable:
            self.channel.release(self)
        else:
            self.drop()
        if exchange is not None:
            exchange.settle(result)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def eof_received(self) -> None:
        self._untouched = 0 <= self._acked == self._bytes_acked()

    def connection_lost(self, error: Exception | None) -> None:
        ours, self.dropped = self.dropped, True
        self.channel.lost(self)
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.settle(self.loss())
        if not ours and not self.channel.closed:
            self.channel.watcher.disturbed()

    def loss(self) -> Failure:
        """What it means for the exchange under way that the connection is gone."""
        name = self.channel.name
        if self.answered:
            return broken(f"{name} closed the connection before its answer was complete")
        if self._untouched:
            return not_sent(f"{name} closed the connection before it took the request")
        return broken(f"{name} closed the connection before it answered")

    def _bytes_acked(self) -> int:
        """Bytes that the peer's kernel has acknowledged, whatever they were; −1: unknown."""
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED_AT + _ACKED.size)
            return int(_ACKED.unpack_from(info, _ACKED_AT)[0])
        except (OSError, AttributeError, struct.error):
            return -1


_CERTIFICATE_HINTS: Final = {
    **dict.fromkeys((18, 19, 20, 21), "; tls.ca names the authorities to trust"),
    **dict.fromkeys((62, 64), "; tls.server_name is the name it must have, where that is not the URL's host"),
}
"""By OpenSSL's X509_V_ERR codes: nobody known vouches for it; it is another host's or address's."""


def _fault(error: Exception, endpoint: Endpoint) -> str:
    """Why there is no connection, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = _CERTIFICATE_HINTS.get(error.verify_code, "")
        return f"its certificate is refused: {error.verify_message.rstrip('.')}{hint}"
    if isinstance(error, ssl.SSLError):
        if error.reason == "WRONG_VERSION_NUMBER":
            return "what answers does not speak TLS; write http:// or grpc:// in url, or the port that does"
        return f"TLS failed: {(error.reason or str(error)).replace('_', ' ').lower()}"
    if isinstance(error, TimeoutError) and not error.errno:
        return f"none was made within {round(endpoint.connect_timeout_s * 1000)} ms"
    if isinstance(error, OSError):  # asyncio's own words for it repeat the address
        return os.strerror(error.errno) if error.errno else "the TLS handshake was broken off"
    return str(error)
