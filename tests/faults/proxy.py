"""A TCP proxy with toxics, after Shopify's toxiproxy: it stands between the gateway and one backend.

`Toxic` says what it does to connections from now on; those that stand are affected too. Rules: it never changes a
byte; what it holds back is bounded by one read per connection and direction.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Toxic:
    """What happens to the bytes of both directions. The default lets everything pass at once."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    """Added to the latency, by turns 0 and this."""
    bandwidth: float = 0.0
    """Bytes per second; 0: no bound."""
    slice_bytes: int = 0
    """Bytes are passed on in slices of this size; 0: as they come."""
    black_hole: bool = False
    """Connections are taken, and stay open, but no byte passes any more: like a half-open TCP connection."""
    limit_bytes: int = 0
    """Each connection is reset after so many bytes from the backend; 0: never."""


CLEAR = Toxic()


class Proxy:
    """Listens on a free port and passes on to `target` on loopback."""

    def __init__(self, target: int) -> None:
        self.port = 0
        self.toxic = CLEAR
        self._target = target
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._clear = asyncio.Event()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def connections(self) -> int:
        """Connections that stand."""
        return len(self._tasks) // 2

    def poison(self, toxic: Toxic) -> None:
        """From now on."""
        self.toxic = toxic
        if not toxic.black_hole:
            self._clear.set()
            self._clear = asyncio.Event()

    def reset_all(self) -> None:
        """Every connection ends, both ways."""
        for task in list(self._tasks):
            task.cancel()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.reset_all()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, far_writer}
        self._writers |= both
        pumps = {
            asyncio.ensure_future(self._pump(reader, far_writer, limited=False)),
            asyncio.ensure_future(self._pump(far_reader, writer, limited=True)),
        }
        self._tasks |= pumps

        def ended(pump: asyncio.Task[None]) -> None:
            self._tasks.discard(pump)
            self._writers.difference_update(both)
            for one in both:
                one.transport.abort()
            for other in pumps - {pump}:
                other.cancel()

        for pump in pumps:
            pump.add_done_callback(ended)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, limited: bool) -> None:
        passed = turn = 0
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                while self.toxic.black_hole:
                    await self._clear.wait()
                toxic = self.toxic
                turn += 1
                if toxic.latency_s or toxic.jitter_s:
                    await asyncio.sleep(toxic.latency_s + toxic.jitter_s * (turn % 2))
                size = toxic.slice_bytes or len(data)
                for at in range(0, len(data), size):
                    piece = data[at : at + size]
                    writer.write(piece)
                    await writer.drain()
                    if toxic.bandwidth:
                        await asyncio.sleep(len(piece) / toxic.bandwidth)
                passed += len(data)
                if limited and toxic.limit_bytes and passed >= toxic.limit_bytes:
                    return
