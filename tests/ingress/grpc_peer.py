"""A gRPC server under test, and an application that does what its calls' paths say."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hpack import Decoder

from gateway.ingress.grpc_server import CallHead, GrpcCall, GrpcServer, Http2Limits, StreamHandler
from gateway.ingress.listener import Listener, listen
from gateway.protocol.hpack_blocks import Fields, metadata_literal
from gateway.protocol.http2_frames import END_STREAM, FRAME_HEAD_BYTES, HEADERS, PREFACE, settings
from tests.ingress.http_peer import Clock, until
from tests.protocol.http2_peer import REQUEST, Sent, parse


class EchoStream:
    """Sends every message back; `/test.Echo/Pausing` takes one at a time."""

    def __init__(self, app: EchoApp, call: GrpcCall) -> None:
        self.app = app
        self.call = call
        self.messages: list[bytes] = []
        self.ended = False

    def message(self, message: bytes | memoryview) -> None:
        self.messages.append(bytes(message))
        if message == b"raise":
            raise RuntimeError("on purpose")
        if self.call.head.path == b"/test.Echo/Pausing":
            self.call.pause()
        self.call.send([message], len(message))

    def half_closed(self) -> None:
        self.ended = True
        self.call.finish()

    def aborted(self) -> None:
        self.app.aborted.append(self.call.id)

    def writable(self) -> None:
        self.app.drained += 1


class EchoMethod:
    def __init__(self, app: EchoApp, path: bytes) -> None:
        self.app = app
        self.path = path
        self.streaming = path in {b"/test.Echo/Stream", b"/test.Echo/Pausing"}

    def handle(self, head: CallHead, message: bytes | memoryview, call: GrpcCall) -> None:
        app = self.app
        app.calls.append(call)
        app.messages.append(bytes(message[:64]))
        call.on_abort = lambda: app.aborted.append(call.id)
        match self.path:
            case b"/test.Echo/Unary":
                call.reply([message], len(message), b"".join(metadata_literal(*m) for m in echoed(head)))
            case b"/test.Echo/Fail":
                call.fail(9, "naïve 100%\n", metadata_literal(b"x-why", b"because"))
            case b"/test.Echo/Raise":
                raise RuntimeError("on purpose")
            case b"/test.Echo/Later":
                app.later.append((call, bytes(message)))
            case _:
                call.fail(12, "unknown method")

    def open(self, head: CallHead, call: GrpcCall) -> StreamHandler:
        stream = EchoStream(self.app, call)
        self.app.streams.append(stream)
        return stream


def echoed(head: CallHead) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in head.metadata if name.startswith(b"x-")]


class EchoApp:
    def __init__(self) -> None:
        self.resolved: list[bytes] = []
        self.calls: list[GrpcCall] = []
        self.messages: list[bytes] = []
        self.later: list[tuple[GrpcCall, bytes]] = []
        self.streams: list[EchoStream] = []
        self.aborted: list[int] = []
        self.drained = 0

    def resolve(self, head: CallHead) -> EchoMethod:
        self.resolved.append(head.path)
        return EchoMethod(self, head.path)


class GrpcBench:
    def __init__(self, app: EchoApp, server: GrpcServer, listener: Listener, clock: Clock) -> None:
        self.app = app
        self.server = server
        self.listener = listener
        self.clock = clock
        self.clients: list[RawClient] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.listener.port}"

    def later(self, seconds: float) -> None:
        self.clock.now += seconds
        self.server.sweep(self.clock.now)


@asynccontextmanager
async def grpc_bench(limits: Http2Limits | None = None, compression: str = "none") -> AsyncIterator[GrpcBench]:
    """An echo server whose clock is the loop's, plus what the test adds; afterwards nothing may be left."""
    loop = asyncio.get_running_loop()
    clock = LoopClock(loop)
    app = EchoApp()
    server = GrpcServer(app, limits, clock, compression=compression)
    bench = GrpcBench(app, server, await listen("127.0.0.1", 0, server), clock)
    try:
        yield bench
    finally:
        for client in bench.clients:
            client.writer.transport.abort()
        await server.drain(0.0)
        for client in bench.clients:
            with contextlib.suppress(ConnectionError):
                await client.writer.wait_closed()
        statistics = server.statistics()
        assert (statistics.open_connections, statistics.held_bytes, statistics.in_flight) == (0, 0, 0)
        assert server._shared.calls.count == 0
        assert not server.sweeping


class RawClient:
    """Writes frames, and reads them."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.seen: list[Sent] = []

    def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))

    async def frame(self, kind: int) -> Sent:
        """The next frame of this type; the others are kept in `seen`."""
        while True:
            head = await self.reader.readexactly(FRAME_HEAD_BYTES)
            payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
            (found,) = parse(head + payload)
            self.seen.append(found)
            if found.kind == kind:
                return found

    async def rest(self) -> list[Sent]:
        """All frames until the server closes."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await self.frame(-1)
        return self.seen

    async def answer(self) -> dict[str, str]:
        """Header fields and trailers of the next call that ends."""
        fields: dict[str, str] = {}
        decoder = Decoder()
        while True:
            found = await self.frame(HEADERS)
            fields.update((str(name), str(value)) for name, value in decoder.decode(found.payload))
            if found.flags & END_STREAM:
                return fields


async def raw_client(bench: GrpcBench, *, greet: bool = True) -> RawClient:
    before = bench.server.statistics().accepted_connections
    client = RawClient(*await asyncio.open_connection("127.0.0.1", bench.listener.port))
    bench.clients.append(client)
    await until(lambda: bench.server.statistics().accepted_connections > before)
    if greet:
        client.send(PREFACE, settings({}))
    return client


def fields_for(path: bytes, *extra: tuple[bytes, bytes]) -> Fields:
    return [(name, path if name == b":path" else value) for name, value in REQUEST] + list(extra)


def prefixed(message: bytes, flag: int = 0) -> bytes:
    return bytes((flag,)) + len(message).to_bytes(4, "big") + message


class LoopClock(Clock):
    """The loop's time, moved forward by `later`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ahead = 0.0

    @property
    def now(self) -> float:
        return self._loop.time() + self._ahead

    @now.setter
    def now(self, value: float) -> None:
        self._ahead += value - self.now

    def __call__(self) -> float:
        return self.now
