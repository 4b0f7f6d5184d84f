"""What a gRPC server asks of whatever answers its calls; `grpc_call.py` says what it gives in return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from gateway.protocol.grpc_wire import CallHead

if TYPE_CHECKING:
    from gateway.ingress.grpc_call import GrpcCall


class StreamHandler(Protocol):
    """What an application makes of one streaming call."""

    def message(self, message: bytes | memoryview, /) -> None: ...
    def half_closed(self) -> None:
        """The client has sent its last message."""

    def aborted(self) -> None:
        """The call ended although it was not finished here."""

    def writable(self) -> None:
        """The client has taken all that was sent."""


class Method(Protocol):
    """One RPC. `streaming` decides which of the two is called."""

    streaming: bool

    def handle(self, head: CallHead, message: bytes | memoryview, call: GrpcCall, /) -> None:
        """Answer now, or later through `call`. An exception becomes INTERNAL, unless the answer is out."""

    def open(self, head: CallHead, call: GrpcCall, /) -> StreamHandler: ...


class Refused(Protocol):
    """Is told of every call, and of every message of a stream, that is refused before the application was given it."""

    def __call__(self, call: GrpcCall, code: int, text: str, /) -> bytes:
        """Encoded literals that go with the status. Must not raise."""


def untold(call: GrpcCall, code: int, text: str) -> bytes:
    """Nobody wants to know."""
    return b""


class GrpcApplication(Protocol):
    """What answers the calls."""

    def resolve(self, head: CallHead, /) -> Method:
        """Called once for each distinct header block of a connection; kept in `head.route`. Must not raise: an unknown
        path is a method that fails UNIMPLEMENTED."""
