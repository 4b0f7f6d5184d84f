"""Listening sockets of the data ports.

Rules: SO_REUSEADDR always, so that a restart does not wait for old connections to time out; SO_REUSEPORT only when
asked, because it would let a second gateway start silently on the same port. All addresses a host name stands for
are listened on, with one port; either all of them, or none.

Sockets that were inherited (app_takeover.py) are taken as they are, and nothing is accepted from them before `start`:
whoever else has them may be able to answer already, and if nobody can, connections wait in them. Closing a listener
closes this process's descriptors only: a socket that another process has too goes on, with what waits in it.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Sequence
from typing import Final, Protocol

from gateway.errors import BindError

_BACKLOG: Final = 1024
_HANDSHAKE_S: Final = 10.0
"""A client that has not finished TLS by then is disconnected; servers do not know of it before."""


class Accepting(Protocol):
    """A server that is given connections."""

    def protocol(self) -> asyncio.BaseProtocol: ...
    def attach(self, listener: Listener, /) -> None: ...


class Listener:
    """Accepts connections for one server until it is closed; connections already accepted live on."""

    def __init__(
        self, host: str, sockets: Sequence[socket.socket], server: Accepting, tls: ssl.SSLContext | None
    ) -> None:
        self.host = host
        self.port: int = sockets[0].getsockname()[1]
        """The port really listened on, also where 0 was asked for."""
        self._servers: list[asyncio.Server] = []
        self._sockets = sockets
        self._server = server
        self._tls = tls

    def __repr__(self) -> str:
        return f"<Listener {self.host}:{self.port}>"

    def fds(self) -> list[int]:
        """Descriptors of what is listened on, to hand over; none once it is closed."""
        return [sock.fileno() for sock in self._sockets if sock.fileno() >= 0]

    async def start(self) -> None:
        """Accept connections from here on. Harmless when repeated."""
        if self._servers:
            return
        create = asyncio.get_running_loop().create_server
        limit_s = _HANDSHAKE_S if self._tls is not None else None
        for sock in self._sockets:
            started = await create(
                self._server.protocol, sock=sock, backlog=_BACKLOG, ssl=self._tls, ssl_handshake_timeout=limit_s
            )
            self._servers.append(started)
        self._server.attach(self)

    def close(self) -> None:
        for server in self._servers:
            server.close()


async def listen(
    host: str,
    port: int,
    server: Accepting,
    *,
    reuse_port: bool = False,
    tls: ssl.SSLContext | None = None,
    option: str = "--http-port",
    sockets: Sequence[socket.socket] = (),
) -> Listener:
    """Listen, and start to accept connections for `server`.

    Args:
        port: 0 takes a free one.
        tls: connections are encrypted with it.
        option: the command line option that a fault tells to change.
        sockets: inherited ones, listening already; then no address is bound, `host` and `port` do not matter, and the
            caller calls `start`.

    Raises:
        BindError: the address cannot be listened on; the text says why and what to change.
    """
    if sockets:
        return Listener(sockets[0].getsockname()[0], sockets, server, tls)
    listener = Listener(host, await _bind_all(host, port, reuse_port, option), server, tls)
    await listener.start()
    return listener


async def _bind_all(host: str, port: int, reuse_port: bool, option: str) -> list[socket.socket]:
    """Raises BindError."""
    loop = asyncio.get_running_loop()
    try:
        infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise BindError(host, port, "the host name cannot be resolved; use an address of this machine") from None
    sockets: list[socket.socket] = []
    bound_port = port
    try:
        for family, address in dict.fromkeys((info[0], info[4]) for info in infos):
            sockets.append(_bind(family, (address[0], bound_port, *address[2:]), reuse_port))
            bound_port = sockets[0].getsockname()[1]
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise BindError(host, port, _cause(error, option)) from None
    return sockets


def _bind(family: int, address: tuple[object, ...], reuse_port: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # Accepted sockets inherit it; answers are written whole, so Nagle's delay could only hurt.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        sock.bind(address)
        # Two sockets with SO_REUSEADDR may both bind; only listening finds out that the port is taken.
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _cause(error: OSError, option: str) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"the port is in use by another process; stop that process or choose another port with {option}"
        case errno.EADDRNOTAVAIL:
            return "the address does not belong to this machine; use one that does, such as 127.0.0.1"
        case errno.EACCES:
            return f"not permitted; ports below 1024 need privileges, choose another with {option}"
        case _:
            return error.strerror or str(error)
