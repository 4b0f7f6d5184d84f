"""Watches what the gateway says of its backends, every few milliseconds, and keeps the changes with their times."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Final

from tests.faults.servers import parse_backends

USABLE: Final = frozenset({"closed", "ramp"})


@dataclass(frozen=True, slots=True)
class Change:
    """Monotonic instant at which a backend was first seen in a state."""

    at: float
    backend: str
    state: str
    cause: str


class Watch:
    """Asks `/api/backends` every `every_s`; `changes` grows. Start it, and stop it, inside the same loop."""

    def __init__(self, port: int, every_s: float = 0.01) -> None:
        self.changes: list[Change] = []
        self._port = port
        self._every_s = every_s
        self._task: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def start(self) -> None:
        """Returns when the first answer has come."""
        self._task = asyncio.create_task(self._run())
        while not self.changes and not self._task.done():
            await asyncio.sleep(0.002)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None

    def first(self, backend: str, since: float, *, usable: bool) -> Change | None:
        """The first change of `backend` after `since` to a state in which it is (not) sent clients' batches."""
        for change in self.changes:
            if change.at >= since and change.backend == backend and (change.state in USABLE) == usable:
                return change
        return None

    def state(self, backend: str) -> str:
        return next((change.state for change in reversed(self.changes) if change.backend == backend), "")

    def flips(self, backend: str, since: float) -> int:
        """How often it left the usable states."""
        states = [change.state in USABLE for change in self.changes if change.backend == backend and change.at >= since]
        return sum(was and not now for was, now in zip([True, *states], states, strict=False))

    async def _run(self) -> None:
        last: dict[str, str] = {}
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                self._writer = writer
                while True:
                    writer.write(b"GET /api/backends HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                    length = int(head.partition("content-length: ")[2].partition("\r")[0])
                    body = await reader.readexactly(length)
                    now = time.monotonic()
                    for line in parse_backends(body):
                        if last.get(line.name) != line.state:
                            last[line.name] = line.state
                            self.changes.append(Change(now, line.name, line.state, line.cause))
                    await asyncio.sleep(self._every_s)
            except (OSError, asyncio.IncompleteReadError):
                await asyncio.sleep(0.1)
