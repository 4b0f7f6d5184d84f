"""A model's external data files on their way to the workers: one sealed memory file, written while they are hashed.

    content of the files, each from a page boundary on … · index (JSON: [[location, offset, size], …]) · its length u64

`location` is the text by which the model names the file; several may name one. Nobody can change the memory once it is
sealed, so every load, also after a worker was restarted, gets the bytes that were hashed. Integers are little-endian.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import orjson

from gateway.workers.shm import create_area, seal

MAX_BUNDLE_BYTES: Final = 2**38
MAX_INDEX_BYTES: Final = 64 * 1024 * 1024
_LENGTH: Final = struct.Struct("<Q")


class BundleError(Exception):
    """The bundle cannot be made, or is none; the text says why."""


class Bundle:
    """The finished memory file; freed when the last reference goes."""

    __slots__ = ("_fd", "size")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size

    def __repr__(self) -> str:
        return f"<Bundle fd={self._fd} size={self.size}>"

    def fileno(self) -> int:
        return self._fd

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class BundleWriter:
    """Fills a bundle: `begin` a file, `write` its content, and at the end `finish` with who names what."""

    def __init__(self, expected: int) -> None:
        """`expected`: bytes that are going to come. Raises BundleError: there is no room for so much."""
        if expected > MAX_BUNDLE_BYTES:
            raise BundleError(f"external data of {expected} bytes: at most {MAX_BUNDLE_BYTES} are possible")
        free = available_memory()
        if free is not None and expected > free:
            raise BundleError(f"external data of {expected} bytes does not fit into the {free} bytes of memory left")
        try:
            self._fd = create_area("gateway-weights")
        except OSError as error:
            raise BundleError(f"no memory for external data: {error.strerror}") from None
        self._at = 0
        self._places: dict[str, tuple[int, int]] = {}
        self._current = ""

    def __del__(self) -> None:
        fd = getattr(self, "_fd", -1)
        if fd >= 0:
            os.close(fd)

    def begin(self, path: str) -> None:
        """What is written from now on is the file `path`."""
        self._at = -(-self._at // mmap.PAGESIZE) * mmap.PAGESIZE
        self._places[path] = (self._at, 0)
        self._current = path

    def write(self, chunk: bytes | memoryview) -> None:
        """Raises BundleError: no memory, or more than is possible."""
        if self._at + len(chunk) > MAX_BUNDLE_BYTES:
            raise BundleError(f"external data is larger than the {MAX_BUNDLE_BYTES} bytes that are possible")
        view = memoryview(chunk)
        try:
            while view:
                written = os.pwrite(self._fd, view, self._at)
                view = view[written:]
                self._at += written
        except OSError as error:
            raise BundleError(f"no memory for external data: {error.strerror}") from None
        start, _ = self._places[self._current]
        self._places[self._current] = (start, self._at - start)

    def finish(self, locations: Mapping[str, str]) -> Bundle:
        """Seal it. `locations`: text in the model → path given to `begin`. Raises BundleError."""
        index = orjson.dumps([[location, *self._places[path]] for location, path in locations.items()])
        if len(index) > MAX_INDEX_BYTES:
            raise BundleError("the model names too many external data files")
        try:
            os.pwrite(self._fd, index + _LENGTH.pack(len(index)), self._at)
            seal(self._fd)
        except OSError as error:
            raise BundleError(f"no memory for external data: {error.strerror}") from None
        fd, self._fd = self._fd, -1
        return Bundle(fd)


def read_bundle(fd: int) -> dict[str, memoryview]:
    """location → content, as views of mapped memory that live as long as they are referenced. Raises BundleError."""
    size = os.fstat(fd).st_size
    if size < _LENGTH.size:
        raise BundleError("external data arrived without an index")
    try:
        view = memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ))
    except (OSError, ValueError) as error:
        raise BundleError(f"external data cannot be mapped: {error}") from None
    (length,) = _LENGTH.unpack(view[-_LENGTH.size :])
    end = size - _LENGTH.size
    if length > min(MAX_INDEX_BYTES, end):
        raise BundleError("external data arrived with a broken index")
    content = end - length
    files: dict[str, memoryview] = {}
    try:
        for location, offset, nbytes in orjson.loads(view[content:end]):
            if not 0 <= offset <= offset + nbytes <= content:
                raise BundleError("the index of external data points outside it")
            files[location] = view[offset : offset + nbytes]
    except (orjson.JSONDecodeError, TypeError, ValueError) as error:
        raise BundleError(f"external data arrived with a broken index: {error}") from None
    return files


def available_memory() -> int | None:
    """Bytes the system says can be had without swapping; None: it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None
