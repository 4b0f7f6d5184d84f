"""The whole gateway inside the test's process, on an event loop in a thread of its own.

Real sockets, real worker processes, the composition root as it is; what a test gains over a gateway in a process of
its own is that it can look at queues and connections, and spoil a function on purpose.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import uvloop

from gateway.app import Gateway
from gateway.config import Config
from gateway.ingress.http_server import HttpStatistics
from tests.live.gateway_process import START_S, until

T = TypeVar("T")


class InProcess(Gateway):
    """`Gateway`, except that signals stay with the test runner and the port is told."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.loop = asyncio.get_running_loop()
        self.port = self.grpc_port = 0

    def _catch_signals(self) -> None:
        pass

    async def _serve(self, wanted, listeners, *others, demo):  # type: ignore[no-untyped-def]
        self.port, self.grpc_port = listeners.http.port, listeners.grpc.port
        return await super()._serve(wanted, listeners, *others, demo=demo)

    @property
    def loaded(self) -> bool:
        return self._loaded

    def stop(self) -> None:
        """Like SIGTERM; from any thread."""
        self.loop.call_soon_threadsafe(self._stopping.set)

    def call(self, function: Callable[[], T]) -> T:
        """`function()` on the gateway's own thread."""

        async def inner() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(inner(), self.loop).result(60)

    def residue(self) -> list[str]:
        """Whatever is still waiting, running or held anywhere; empty when the gateway is idle."""
        found = []
        for version in self.models.catalog.versions():
            if version.scheduler is None:
                continue
            queue = version.scheduler.queue_statistics()
            if queue.rows or queue.nbytes or queue.requests or version.scheduler.pending:
                found.append(f"{version.name}: {queue}, pending {version.scheduler.pending}")
            found += [f"{version.name}: {r!r} in flight {r.in_flight}" for r in version.replicas if r.in_flight]
        http: HttpStatistics = self.ports.http.statistics()
        if http.in_flight or http.held_bytes:
            found.append(f"http: {http.in_flight} in flight, {http.held_bytes} bytes held")
        grpc = self.ports.grpc.statistics()
        if grpc.in_flight or grpc.held_bytes:
            found.append(f"grpc: {grpc.in_flight} in flight, {grpc.held_bytes} bytes held")
        return found


@contextlib.contextmanager
def in_process(config: Config) -> Iterator[InProcess]:
    """A gateway that serves `config` until the block ends; then it must have stopped cleanly."""
    started: list[InProcess] = []
    codes: list[int] = []
    thresholds = gc.get_threshold()

    async def serve() -> int:
        gateway = InProcess(config)
        started.append(gateway)
        return await gateway.serve(demo=False)

    thread = threading.Thread(target=lambda: codes.append(uvloop.run(serve())), name="gateway")
    thread.start()
    try:
        until(lambda: bool(started and started[0].loaded) or not thread.is_alive(), START_S, "it did not start")
        assert thread.is_alive(), f"it ended with {codes}"
        yield started[0]
    finally:
        if started and thread.is_alive():
            started[0].stop()
        thread.join(60)
        gc.unfreeze()
        gc.set_threshold(*thresholds)
    assert codes == [0]


async def gather_all(awaitables: list[Awaitable[T]]) -> list[T]:
    """All results; the first failure is raised only when every other has ended, so that nothing outlives a test."""
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
