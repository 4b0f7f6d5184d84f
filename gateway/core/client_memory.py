"""Memory that clients share with the gateway, as the protocols see it: where a tensor lies, and who can reach it.

A request may say of an input that it lies in a region that the client has registered, and of an output that it is
wanted in one. `shared_memory.py` keeps the regions; a request holds an `Area` (what the client said) and, from decoding
to answer, a `Place` per such output.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from gateway.errors import Unsupported


class Area(NamedTuple):
    """Bytes `offset` to `offset + nbytes` of a region."""

    region: str
    offset: int
    nbytes: int


class Place(Protocol):
    """An area that was found in its region. Whoever has it can use it, even if the region was unregistered since."""

    @property
    def area(self) -> Area: ...

    def read(self) -> bytes:
        """A copy of the area as it is now.

        Raises:
            InvalidRequest: the client's object has become shorter than the area's end.
            RegionFailed: it cannot be read.
        """

    def write(self, data: bytes | memoryview, /) -> None:
        """Write `data`, no longer than the area, at its start; raises as `read`."""


class ClientMemory(Protocol):
    """All registered regions."""

    @property
    def max_bytes(self) -> int:
        """Most that the inputs of one request may take from regions, together."""

    def find(self, area: Area, /) -> Place:
        """
        Raises:
            NotFound: no such region.
            InvalidRequest: the area is not inside the region.
            Unsupported: clients cannot share memory with this gateway.
        """


class NoClientMemory:
    """The usual case: clients cannot share memory with this gateway."""

    max_bytes: Final = 2**63 - 1

    def find(self, area: Area, /) -> Place:
        raise Unsupported(
            f"shared memory region '{area.region[:64]}' cannot be used: shared memory of clients is switched off here; "
            "send tensors in the request"
        )


NO_CLIENT_MEMORY: Final = NoClientMemory()
