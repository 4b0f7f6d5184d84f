"""Regions of POSIX shared memory that clients on this machine have registered (OIP's extension `system_shared_memory`).

A client creates an object below /dev/shm, registers a part of it as a region, and from then on its requests may say
"this input lies there" and "put that output there" instead of carrying the tensors.

Whoever reaches the port decides here which objects the gateway reads and writes, so it is off unless the owner of the
server says `client_shared_memory: true`. What a client may do even then:
- name an object, not a file: one component below /dev/shm, opened without following links and without waiting for
  anybody; it must be a regular file, and is none of the reserved ones (Triton's Python backend, semaphores);
- register what exists: at least one byte, inside the object; nothing is created or made longer by the gateway;
- change the object at any time. Therefore it is never mapped: a read of a mapping whose file was cut short kills the
  process. An input is copied when its request is read, an output when its answer is written, each by `pread` and
  `pwrite`, which report what has become of the object. What a client writes meanwhile is in its copy, or is not;
- take up at most MAX_REGIONS descriptors (fewer where the process has few), and bounded names.

A region keeps its object open, so it stays what was registered, even when the client removes the name. Unregistering
takes the region's name away at once; requests under way hold the region itself, and its descriptor is closed with the
last of them.
"""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Callable
from typing import Any, Final

from gateway.core.client_memory import Area
from gateway.errors import AlreadyRegistered, InvalidRequest, NotFound, Overloaded, RegionFailed

DIRECTORY: Final = "/dev/shm"  # noqa: S108  # where POSIX shared memory objects live on Linux
MAX_REGIONS: Final = 1024
SHARE_OF_DESCRIPTORS: Final = 4
"""At most one in so many of the process's descriptors are regions'; the others are for connections and workers."""
MAX_NAME_BYTES: Final = 256
MAX_KEY_BYTES: Final = 255
"""Linux's longest file name."""
RESERVED: Final = ("triton_python_backend_shm_region_", "sem.")
MAX_SIZE: Final = 2**63 - 1


class Region:
    """A registered part of an open object: `nbytes` bytes from `offset` on."""

    __slots__ = ("_fd", "key", "name", "nbytes", "offset")

    def __init__(self, name: str, key: str, offset: int, nbytes: int, fd: int) -> None:
        """`fd` is the region's from now on."""
        self._fd = fd
        self.name = name
        self.key = key
        self.offset = offset
        self.nbytes = nbytes

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self._fd)

    def status(self) -> os.stat_result:
        """What the object is now."""
        return os.fstat(self._fd)

    def check(self, area: Area) -> None:
        """Raises InvalidRequest unless `area` lies inside the region."""
        if area.offset >= self.nbytes:
            raise InvalidRequest(
                f"Invalid offset for shared memory region: '{_short(self.name)}' has {self.nbytes} bytes, the tensor "
                f"is said to start at {area.offset}"
            )
        if area.offset + area.nbytes > self.nbytes:
            raise InvalidRequest(
                f"Invalid offset + byte size for shared memory region: '{_short(self.name)}' has {self.nbytes} bytes, "
                f"the tensor is said to have {area.nbytes} from {area.offset} on"
            )

    def read(self, area: Area) -> bytes:
        """A copy of an area that was checked. Raises InvalidRequest: the object has shrunk; RegionFailed."""
        at = self.offset + area.offset
        end = at + area.nbytes
        parts = []
        while at < end:
            try:
                part = os.pread(self._fd, end - at, at)
            except OSError as error:
                raise RegionFailed(
                    f"shared memory region '{_short(self.name)}' cannot be read: {_why(error)}"
                ) from error
            if not part:
                raise self._shrunk(end)
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, area: Area, data: bytes | memoryview) -> None:
        """Write at the start of an area that was checked. Raises as `read`."""
        at = self.offset + area.offset
        if self.status().st_size < at + len(data):  # writing would make the client's object longer
            raise self._shrunk(at + len(data))
        rest = memoryview(data)
        while rest:
            try:
                written = os.pwrite(self._fd, rest, at)
            except OSError as error:  # the machine's shared memory is full, for instance
                raise RegionFailed(
                    f"shared memory region '{_short(self.name)}' cannot be written: {_why(error)}"
                ) from error
            at += written
            rest = rest[written:]

    def _shrunk(self, end: int) -> InvalidRequest:
        return InvalidRequest(
            f"shared memory region '{_short(self.name)}': its object '{_short(self.key)}' was made shorter than the "
            f"{end} bytes that are needed; do not shorten an object that is registered"
        )


class RegionPlace:
    """An area of a region, for one tensor of one request; it keeps the region open. A `client_memory.Place`."""

    __slots__ = ("_region", "area")

    def __init__(self, region: Region, area: Area) -> None:
        self._region = region
        self.area = area

    def read(self) -> bytes:
        return self._region.read(self.area)

    def write(self, data: bytes | memoryview) -> None:
        self._region.write(self.area, data)


class SharedMemory:
    """All regions of the process, by name; a `client_memory.ClientMemory`."""

    def __init__(self, max_bytes: int, directory: str = DIRECTORY) -> None:
        """`max_bytes`: most that the inputs of one request may take from regions, together."""
        self.max_bytes = max_bytes
        self._directory = directory
        self._regions: dict[str, Region] = {}
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.max_regions = MAX_REGIONS if soft < 0 else min(MAX_REGIONS, soft // SHARE_OF_DESCRIPTORS)

    # -- registration --------------------------------------------------------------------------------------------

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Make bytes `offset` to `offset + byte_size` of the object `key` the region `name`.

        Raises:
            InvalidRequest: a name is missing, reserved or too long, or the bytes are not inside the object.
            AlreadyRegistered: the region's name is taken.
            RegionFailed: there is no such object, or it cannot be opened.
            Overloaded: there are too many regions.
        """
        _check_name(name)
        if name in self._regions:
            raise AlreadyRegistered(f"shared memory region '{_short(name)}' already in manager; unregister it first")
        if len(self._regions) >= self.max_regions:
            raise Overloaded(
                f"failed to register shared memory region '{_short(name)}': there are {len(self._regions)} regions, "
                f"at most {self.max_regions} are allowed; unregister those that are not needed"
            )
        file = _file_name(name, key)
        if byte_size < 1 or offset < 0 or offset + byte_size > MAX_SIZE:
            raise InvalidRequest(
                f"failed to register shared memory region '{_short(name)}': invalid args: 'byte_size' must be at least "
                f"1, and 'offset' + 'byte_size' at most {MAX_SIZE}; got {offset} and {byte_size}"
            )
        region = Region(name, key, offset, byte_size, self._open(key, file))
        self._check_object(region)
        self._regions[name] = region

    def _open(self, key: str, file: str) -> int:
        # Without O_NONBLOCK a FIFO, or a lease that its owner does not give back, would hold everybody up.
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                return os.open(file, flags, dir_fd=directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise RegionFailed(f"Unable to open shared memory region: '{_short(key)}': {_why(error)}") from error

    def _check_object(self, region: Region) -> None:
        found = region.status()
        if not stat.S_ISREG(found.st_mode):
            raise InvalidRequest(
                f"failed to register shared memory region '{_short(region.name)}': '{_short(region.key)}' is no shared "
                "memory object"
            )
        if region.offset + region.nbytes > found.st_size:
            raise InvalidRequest(
                f"failed to register shared memory region '{_short(region.name)}': invalid args: 'offset' + "
                f"'byte_size' is {region.offset + region.nbytes}, '{_short(region.key)}' has {found.st_size} bytes"
            )

    def unregister(self, name: str | None) -> None:
        """Forget a region, or all of them (None). Harmless when there is none."""
        if name is None:
            self._regions.clear()
        else:
            self._regions.pop(name, None)

    def status(self, name: str | None) -> list[dict[str, Any]]:
        """One region, or all of them in the order they were registered. Raises NotFound."""
        if name is not None and name not in self._regions:
            raise NotFound(f"Unable to find system shared memory region: '{_short(name)}'")
        regions = self._regions.values() if name is None else [self._regions[name]]
        return [{"name": r.name, "key": r.key, "offset": r.offset, "byte_size": r.nbytes} for r in regions]

    # -- use -----------------------------------------------------------------------------------------------------

    def find(self, area: Area) -> RegionPlace:
        """See `client_memory.ClientMemory`."""
        region = self._regions.get(area.region)
        if region is None:
            raise NotFound(f"Unable to find shared memory region: '{_short(area.region)}'")
        region.check(area)
        return RegionPlace(region, area)


def _check_name(name: str) -> None:
    if not name:
        raise InvalidRequest("failed to register shared memory region: its name is empty")
    if not 0 < _bytes_of(name) <= MAX_NAME_BYTES:
        raise InvalidRequest(
            f"failed to register shared memory region '{_short(name)}': its name must be Unicode text of at most "
            f"{MAX_NAME_BYTES} bytes"
        )


def _file_name(name: str, key: str) -> str:
    """The file below /dev/shm that `key` stands for: as in shm_open(3), leading slashes do not count."""
    file = key.lstrip("/")
    fault = None
    if not file:
        fault = "must name an object"
    elif "/" in file or "\0" in file or file in (".", ".."):
        fault = "must be a name without a path"
    elif not 0 < _bytes_of(file) <= MAX_KEY_BYTES:
        fault = f"must be Unicode text of at most {MAX_KEY_BYTES} bytes"
    elif file.startswith(RESERVED):
        fault = f"begins with a reserved prefix: {' or '.join(RESERVED)}"
    if fault is not None:
        raise InvalidRequest(
            f"failed to register shared memory region '{_short(name)}': the key '{_short(key)}' {fault}; give it as "
            "'/name'"
        )
    return file


def _bytes_of(text: str) -> int:
    """In UTF-8; 0: it is not Unicode."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return 0


def _why(error: OSError) -> str:
    return (error.strerror or "it failed").lower()


def _short(text: str) -> str:
    """A client's text as an error repeats it."""
    return text if len(text) <= 64 else text[:64] + "…"
