"""Shared memory between the gateway and one worker: anonymous files that only ever grow.

An area is a memfd, known to nobody but the two processes that hold its descriptor; when both are gone the
kernel frees it, so nothing stale can remain after a crash. One side owns an area and grows it, the other
side maps what it is told exists. Shrinking is sealed off at creation: a mapping once checked can never
fault later.

Pages are reserved when an area grows (`posix_fallocate`), because running out of memory must be an error
here and not a SIGBUS at the first write.

Dropping a mapping is dropping the references to it: views of it that are still alive keep it alive.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

_PAGE: Final = mmap.PAGESIZE
_EMPTY: Final = memoryview(bytearray())


class AreaError(Exception):
    """The other side named memory that does not exist."""


def create_area(name: str) -> int:
    """A new, empty, growing memfd; returns its descriptor. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


def sealed_file(name: str, content: bytes) -> int:
    """A memfd with this content that nobody can change any more; returns its descriptor. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        at = 0
        view = memoryview(content)
        while at < len(view):
            at += os.write(fd, view[at : at + (1 << 30)])
        seal(fd)
    except OSError:
        os.close(fd)
        raise
    return fd


def seal(fd: int) -> None:
    """Nobody changes this memfd's content or size any more; it must not be mapped for writing. Raises OSError."""
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


def read_file(fd: int) -> bytes:
    """The whole content of a memfd, wherever its file offset stands."""
    size = os.fstat(fd).st_size
    parts = []
    at = 0
    while at < size:
        part = os.pread(fd, min(size - at, 1 << 30), at)
        if not part:
            break
        parts.append(part)
        at += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class Area:
    """One side's view of a growing shared file. `view` covers `size` bytes."""

    __slots__ = ("_protection", "fd", "size", "view")

    def __init__(self, fd: int, *, writable: bool) -> None:
        self.fd = fd
        self.size = 0
        self.view = _EMPTY
        self._protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)

    def __repr__(self) -> str:
        return f"<Area fd={self.fd} size={self.size}>"

    def reserve(self, size: int) -> None:
        """Owner: make room for `size` bytes. At least doubles, so that growth is rare. Raises OSError."""
        if size <= self.size:
            return
        wanted = max(size, 2 * self.size)
        wanted = (wanted + _PAGE - 1) & -_PAGE
        os.posix_fallocate(self.fd, 0, wanted)
        self._map(wanted)

    def follow(self, size: int) -> None:
        """Other side: map at least `size` bytes. Raises AreaError: the file is not that long."""
        if size <= self.size:
            return
        present = os.fstat(self.fd).st_size
        if present < size:
            raise AreaError(f"shared memory of {size} bytes was announced, {present} exist")
        self._map(present)

    def _map(self, size: int) -> None:
        self.view = memoryview(mmap.mmap(self.fd, size, prot=self._protection))
        self.size = size

    def close(self) -> None:
        """Give up the descriptor and the mapping. Harmless when repeated."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self.view = _EMPTY
            self.size = 0


class Buffer:
    """The memory of one batch in flight: an input area the gateway grows, an output area the worker grows."""

    __slots__ = ("announced", "identity", "input", "output")

    def __init__(self, identity: int, input_area: Area, output_area: Area) -> None:
        self.identity = identity
        self.input = input_area
        self.output = output_area
        self.announced = False
        """Whether the worker has been given the descriptors."""

    @classmethod
    def create(cls, identity: int) -> Buffer:
        """The gateway's side of a new buffer. Raises OSError."""
        input_fd = create_area("gateway-input")
        try:
            output_fd = create_area("gateway-output")
        except OSError:
            os.close(input_fd)
            raise
        return cls(identity, Area(input_fd, writable=True), Area(output_fd, writable=False))

    @classmethod
    def adopt(cls, identity: int, input_fd: int, output_fd: int) -> Buffer:
        """The worker's side of a buffer whose descriptors arrived."""
        return cls(identity, Area(input_fd, writable=False), Area(output_fd, writable=True))

    @property
    def size(self) -> int:
        """Bytes mapped."""
        return self.input.size + self.output.size

    def close(self) -> None:
        self.input.close()
        self.output.close()
