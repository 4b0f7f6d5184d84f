"""A server under test and its two neighbours, both played by the test: the application and the client."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import uvloop

from gateway.ingress.http_server import Exchange, Head, HttpLimits, HttpServer
from gateway.ingress.listener import Listener, listen
from gateway.protocol.http1 import response_head

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
PATIENCE_S = 30.0


def run(loop: str, test: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(asyncio.wait_for(test, PATIENCE_S))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in its own time; the bound is `run`'s."""
    while not condition():
        await asyncio.sleep(0.001)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class App:
    """Keeps what it is given until the test answers it; with `echo`, answers each request with its body at once."""

    def __init__(self, echo: bool = False) -> None:
        self.echo = echo
        self.given: list[tuple[Exchange, bytes]] = []
        self.aborted: list[bytes] = []
        self.resolved: list[bytes] = []
        self.fail: Exception | None = None

    def resolve(self, head: Head) -> bytes:
        self.resolved.append(head.path)
        return head.path

    def handle(self, head: Head, body: bytes, exchange: Exchange) -> None:
        assert head.route == head.path
        exchange.on_abort = lambda: self.aborted.append(body)
        self.given.append((exchange, body))
        if self.fail is not None:
            raise self.fail
        if self.echo:
            answer(exchange, body)

    def bodies(self) -> list[bytes]:
        return [body for _, body in self.given]


def answer(exchange: Exchange, body: bytes) -> None:
    exchange.send(response_head(200, b"text/plain", len(body), keep_alive=exchange.keep_alive) + body)


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def response(self, bodiless: bool = False) -> tuple[int, dict[str, str], bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        status, *lines = head[:-4].split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines)
        length = 0 if bodiless else int(fields.get("Content-Length", "0"))
        return int(status.split(" ")[1]), fields, await self.reader.readexactly(length)

    async def status(self) -> int:
        return (await self.response())[0]

    async def ended(self) -> bool:
        """Whether the server closes and has said nothing more."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True

    def leave(self) -> None:
        """Close both halves the way a program that ends does: the server sees an end of stream."""
        self.writer.close()

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.writer.transport.abort()


class Bench:
    """A listening server with its application, its clock and its clients."""

    def __init__(self, app: App, server: HttpServer, listener: Listener, clock: Clock) -> None:
        self.app = app
        self.server = server
        self.listener = listener
        self.clock = clock
        self.clients: list[Client] = []

    async def client(self) -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.listener.port)
        client = Client(reader, writer)
        self.clients.append(client)
        return client

    async def connected(self) -> Client:
        """A client whose connection the server knows of."""
        before = self.server.statistics().accepted_connections
        client = await self.client()
        await until(lambda: self.server.statistics().accepted_connections > before)
        return client

    def later(self, seconds: float) -> None:
        self.clock.now += seconds
        self.server.sweep(self.clock.now)

    async def given(self, count: int) -> None:
        await until(lambda: len(self.app.given) >= count)


@asynccontextmanager
async def bench(limits: HttpLimits | None = None, echo: bool = False) -> AsyncIterator[Bench]:
    app, clock = App(echo), Clock()
    server = HttpServer(app, limits, clock)
    subject = Bench(app, server, await listen("127.0.0.1", 0, server), clock)
    try:
        yield subject
    finally:
        for client in subject.clients:
            client.writer.transport.abort()
        await server.drain(0.0)
        statistics = server.statistics()
        assert (statistics.open_connections, statistics.held_bytes, statistics.in_flight) == (0, 0, 0)
        assert not server.sweeping
