"""Server reflection over one call: an answer to each request, until the client has no more.

What the answers are is `protocol/reflection.py`'s.
"""

from __future__ import annotations

from gateway.errors import InvalidRequest
from gateway.ingress.grpc_call import GrpcCall
from gateway.ingress.grpc_stream import STOPPING, Drainable
from gateway.protocol import reflection
from gateway.protocol.grpc_wire import UNAVAILABLE


class ReflectionStream:
    """One call; fits `grpc_call.StreamHandler`. `package`: of the messages, one of `reflection.SERVICES`."""

    def __init__(self, package: str, call: GrpcCall, streams: set[Drainable]) -> None:
        self._package = package
        self._call = call
        self._streams = streams
        streams.add(self)

    def message(self, message: bytes | memoryview) -> None:
        try:
            data = reflection.answer(self._package, message)
        except InvalidRequest as error:
            self.aborted()
            self._call.fail(error.grpc_code, str(error))
            return
        self._call.send([data], len(data))

    def half_closed(self) -> None:
        self.aborted()
        self._call.finish()

    def writable(self) -> None:
        """The transport itself holds messages back while the client does not read."""

    def aborted(self) -> None:
        self._streams.discard(self)

    def drain(self) -> None:
        self.aborted()
        self._call.finish(UNAVAILABLE, STOPPING)
