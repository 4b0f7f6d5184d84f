"""grpc.health.v1.Health/Watch: one message at once, and one whenever the server becomes ready or ceases to be.

Whatever service is named, the answer is the server's. While anybody watches, readiness is looked at twice a second; a
client that asks a second time on one call, which no conforming one does, is told the same again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from gateway.errors import InvalidRequest
from gateway.ingress.grpc_call import GrpcCall
from gateway.ingress.grpc_stream import STOPPING, Drainable
from gateway.protocol import oip_grpc_documents
from gateway.protocol.grpc_wire import UNAVAILABLE

LOOK_EVERY_S: Final = 0.5


class HealthWatch:
    """One call; fits `grpc_call.StreamHandler`."""

    def __init__(self, call: GrpcCall, ready: Callable[[], bool], streams: set[Drainable]) -> None:
        self._call = call
        self._ready = ready
        self._streams = streams
        self._told: bool | None = None
        self._timer: asyncio.TimerHandle | None = None
        streams.add(self)

    def message(self, message: bytes | memoryview) -> None:
        try:
            oip_grpc_documents.read("grpc.health.v1.HealthCheckRequest", message)
        except InvalidRequest as error:
            self._end()
            self._call.fail(error.grpc_code, str(error))
            return
        self._told = None
        if self._timer is None:
            self._look()

    def half_closed(self) -> None:
        if self._timer is None:  # it never asked
            self._end()
            self._call.finish(InvalidRequest.grpc_code, "the call ended before its request message")

    def writable(self) -> None:
        pass

    def aborted(self) -> None:
        self._end()

    def drain(self) -> None:
        self._tell(ready=False)
        self._end()
        self._call.finish(UNAVAILABLE, STOPPING)

    def _look(self) -> None:
        ready = self._ready()
        if ready is not self._told:
            self._tell(ready)
        self._timer = asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)

    def _tell(self, ready: bool) -> None:
        self._told = ready
        status = {"status": "SERVING" if ready else "NOT_SERVING"}
        data = oip_grpc_documents.write("grpc.health.v1.HealthCheckResponse", status)
        self._call.send([data], len(data))

    def _end(self) -> None:
        self._streams.discard(self)
        if self._timer is not None:
            self._timer.cancel()
