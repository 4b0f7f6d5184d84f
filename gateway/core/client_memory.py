"""Memory that clients share with the gateway, as the protocols see it: where a tensor lies, and who can reach it.

A request may say of an input that it lies in a region that the client has registered, and of an output that it is
wanted in one. `shared_memory.py` keeps the regions; requests only ever hold an `Area` (what the client said) and, from
decoding to answer, a `Target` per such output.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from gateway.errors import Unsupported


class Area(NamedTuple):
    """Bytes `offset` to `offset + nbytes` of a region."""

    region: str
    offset: int
    nbytes: int


class Target(Protocol):
    """An area that an output is written to. Whoever has one can write, even if the region was unregistered since."""

    @property
    def area(self) -> Area: ...

    def write(self, data: bytes | memoryview, /) -> None:
        """Write `data`, no longer than the area, at its start.

        Raises:
            RegionFailed: it cannot be written.
        """


class ClientMemory(Protocol):
    """All registered regions."""

    def read(self, area: Area, /) -> bytes:
        """A copy of an area as it is now.

        Raises:
            NotFound: no such region.
            InvalidRequest: the area is not inside the region, or the region's memory has shrunk.
            TooLarge: more than one tensor may have.
            Unsupported: clients cannot share memory with this gateway.
        """

    def target(self, area: Area, /) -> Target:
        """The area as a place for an output; raises as `read`."""


class NoClientMemory:
    """The usual case: clients cannot share memory with this gateway."""

    def read(self, area: Area, /) -> bytes:
        raise self._refusal(area)

    def target(self, area: Area, /) -> Target:
        raise self._refusal(area)

    def _refusal(self, area: Area) -> Unsupported:
        return Unsupported(
            f"shared memory region '{area.region[:64]}' cannot be used: shared memory of clients is switched off here; "
            "send tensors in the request"
        )


NO_CLIENT_MEMORY: Final = NoClientMemory()
