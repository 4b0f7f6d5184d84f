"""Regions of clients: what may be registered, and what a client can do to an object that is."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from pathlib import Path

import pytest

from gateway.core.client_memory import Area
from gateway.errors import AlreadyRegistered, GatewayError, InvalidRequest, NotFound, Overloaded, RegionFailed
from gateway.shared_memory import MAX_SIZE, Region, RegionPlace, SharedMemory

CONTENT = bytes(range(100))


@pytest.fixture
def memory(tmp_path: Path) -> SharedMemory:
    """A directory instead of /dev/shm, with one object in it."""
    (tmp_path / "object").write_bytes(CONTENT)
    return SharedMemory(1000, str(tmp_path))


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


# -- registration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["/object", "object", "//object"])
def test_an_object_is_registered_by_its_posix_name(memory: SharedMemory, key: str) -> None:
    memory.register("r", key, 10, 20)
    entry = {"name": "r", "key": key, "offset": 10, "byte_size": 20}
    assert memory.status(None) == memory.status("r") == [entry]
    assert memory.find(Area("r", 5, 3)).read() == CONTENT[15:18]
    memory.unregister("r")
    assert memory.status(None) == []
    memory.unregister("r")
    memory.unregister("nobody")
    with pytest.raises(NotFound, match="Unable to find system shared memory region: 'r'"):
        memory.status("r")


def test_unregistering_no_region_is_unregistering_all(memory: SharedMemory) -> None:
    for name in ("b", "a"):
        memory.register(name, "/object", 0, 1)
    assert [entry["name"] for entry in memory.status(None)] == ["b", "a"]
    memory.unregister(None)
    assert memory.status(None) == []


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("", "must name an object"),
        ("/", "must name an object"),
        ("///", "must name an object"),
        ("/a/b", "without a path"),
        ("object/", "without a path"),
        ("../object", "without a path"),
        ("/..", "without a path"),
        (".", "without a path"),
        ("/object\0", "without a path"),
        ("x" * 256, "at most 255 bytes"),
        ("/" + "é" * 128, "at most 255 bytes"),
        ("\udcff", "Unicode"),
        ("/triton_python_backend_shm_region_1", "reserved"),
        ("//triton_python_backend_shm_region_", "reserved"),
        ("/sem.lock", "reserved"),
    ],
)
def test_keys_that_name_no_object(memory: SharedMemory, tmp_path: Path, key: str, words: str) -> None:
    for file in ("triton_python_backend_shm_region_1", "triton_python_backend_shm_region_", "sem.lock"):
        (tmp_path / file).write_bytes(CONTENT)
    with pytest.raises(InvalidRequest, match=f"'r'.*{words}"):
        memory.register("r", key, 0, 1)
    assert memory.status(None) == []


def test_an_absent_object_is_not_made(memory: SharedMemory, tmp_path: Path) -> None:
    with pytest.raises(RegionFailed, match="Unable to open shared memory region: '/absent'") as caught:
        memory.register("r", "/absent", 0, 1)
    assert caught.value.status == 500
    assert [path.name for path in tmp_path.iterdir()] == ["object"]


def test_links_are_not_followed(memory: SharedMemory, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "object")
    (tmp_path / "broken").symlink_to(tmp_path / "made")
    for key in ("/link", "/broken"):
        with pytest.raises(RegionFailed, match="Unable to open"):
            memory.register("r", key, 0, 1)
    assert not (tmp_path / "made").exists()


def test_only_regular_files_are_objects(memory: SharedMemory, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # opening it must not wait for the other side
    (tmp_path / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for key in ("/fifo", "/directory", "/socket"):
            words = "is no shared memory object" if key == "/fifo" else "Unable to open"
            with pytest.raises((InvalidRequest, RegionFailed), match=words):
                memory.register("r", key, 0, 1)
    assert memory.status(None) == []


def test_a_lease_on_the_object_holds_nobody_up(memory: SharedMemory, tmp_path: Path) -> None:
    """The kernel would wait up to 45 seconds for its holder to give it back."""
    previous = signal.signal(signal.SIGIO, signal.SIG_IGN)  # how the holder is told; it does not care
    try:
        with (tmp_path / "object").open("r+b") as held:
            try:
                fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            except OSError:
                pytest.skip("no leases on this file system")
            with pytest.raises(RegionFailed, match="Unable to open"):
                memory.register("r", "/object", 0, 1)
    finally:
        signal.signal(signal.SIGIO, previous)


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 0), (100, 0), (0, 101), (1, 100), (100, 1), (-1, 5), (0, -1), (0, 2**62), (2**64 - 1, 2**64), (MAX_SIZE, 1)],
)
def test_a_region_lies_inside_its_object(memory: SharedMemory, offset: int, size: int) -> None:
    with pytest.raises(InvalidRequest, match="failed to register shared memory region 'r': invalid args"):
        memory.register("r", "/object", offset, size)
    assert memory.status(None) == []


def test_an_object_without_bytes_cannot_be_registered(memory: SharedMemory, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for size in (0, 1):
        with pytest.raises(InvalidRequest, match="invalid args"):
            memory.register("r", "/empty", 0, size)


def test_a_name_is_registered_once(memory: SharedMemory, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"other")
    memory.register("r", "/object", 0, 100)
    with pytest.raises(AlreadyRegistered, match="shared memory region 'r' already in manager") as caught:
        memory.register("r", "/other", 0, 5)
    assert (caught.value.status, caught.value.grpc_code) == (400, 6)
    assert memory.find(Area("r", 0, 2)).read() == CONTENT[:2]
    memory.unregister("r")
    memory.register("r", "/other", 0, 5)
    assert memory.find(Area("r", 0, 5)).read() == b"other"


@pytest.mark.parametrize("name", ["", "x" * 257, "\udcff"])
def test_names_are_bounded(memory: SharedMemory, name: str) -> None:
    with pytest.raises(InvalidRequest, match="failed to register"):
        memory.register(name, "/object", 0, 1)


def test_regions_are_bounded_in_number_and_so_are_their_descriptors(memory: SharedMemory) -> None:
    assert 0 < memory.max_regions <= 1024
    memory.max_regions = 5
    for number in range(3000):
        if number < 5:
            memory.register(f"r{number}", "/object", number, 1)
            continue
        with pytest.raises(Overloaded, match="at most 5"):
            memory.register(f"r{number}", "/object", 0, 1)
    assert len(memory.status(None)) == 5
    memory.unregister("r0")
    memory.register("again", "/object", 0, 1)


def test_a_refusal_leaves_no_descriptor_open(memory: SharedMemory, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = open_descriptors()
    for key, size in [("/fifo", 1), ("/object", 101), ("/absent", 1)] * 20:
        with pytest.raises(GatewayError):
            memory.register("r", key, 0, size)
    assert open_descriptors() == before


# -- use -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "size", "words"),
    [
        (20, 0, "Invalid offset for shared memory region: 'r'"),
        (20, 1, "Invalid offset for shared memory region: 'r'"),
        (2**64 - 1, 2**64 - 1, "Invalid offset for shared memory region: 'r'"),
        (0, 21, r"Invalid offset \+ byte size for shared memory region: 'r'"),
        (19, 2, r"Invalid offset \+ byte size for shared memory region: 'r'"),
        (1, 2**64 - 1, r"Invalid offset \+ byte size for shared memory region: 'r'"),
    ],
)
def test_an_area_lies_inside_its_region(memory: SharedMemory, offset: int, size: int, words: str) -> None:
    """Not only inside its object, which is longer."""
    memory.register("r", "/object", 40, 20)
    with pytest.raises(InvalidRequest, match=words):
        memory.find(Area("r", offset, size))
    assert memory.find(Area("r", 19, 1)).read() == CONTENT[59:60]
    assert memory.find(Area("r", 19, 0)).read() == b""


def test_an_unknown_region(memory: SharedMemory) -> None:
    with pytest.raises(NotFound, match="Unable to find shared memory region: 'nobody'"):
        memory.find(Area("nobody", 0, 1))


def test_what_is_read_is_a_copy(memory: SharedMemory, tmp_path: Path) -> None:
    memory.register("r", "/object", 0, 100)
    place = memory.find(Area("r", 0, 4))
    found = place.read()
    (tmp_path / "object").write_bytes(b"later" * 20)
    assert found == CONTENT[:4]
    assert place.read() == b"late"


def test_what_is_written_stands_in_its_area_alone(memory: SharedMemory, tmp_path: Path) -> None:
    memory.register("r", "/object", 10, 50)
    place = memory.find(Area("r", 5, 10))
    place.write(memoryview(b"abcd"))
    assert (tmp_path / "object").read_bytes() == CONTENT[:15] + b"abcd" + CONTENT[19:]


def test_regions_and_areas_may_overlap(memory: SharedMemory) -> None:
    memory.register("a", "/object", 0, 60)
    memory.register("b", "/object", 40, 60)
    memory.find(Area("a", 40, 4)).write(b"1234")
    memory.find(Area("b", 2, 4)).write(b"5678")
    assert memory.find(Area("a", 40, 6)).read() == b"125678"


@pytest.mark.parametrize("size", [0, 14, 15, 18])
def test_an_object_that_was_cut_short_is_an_error_and_stays_short(
    memory: SharedMemory, tmp_path: Path, size: int
) -> None:
    """Mapped, it would be a SIGBUS, and the end of the process."""
    memory.register("r", "/object", 10, 50)
    place = memory.find(Area("r", 5, 4))
    os.truncate(tmp_path / "object", size)
    for use in (place.read, lambda: place.write(b"wxyz")):
        with pytest.raises(InvalidRequest, match=r"region 'r'.*'/object' was made shorter than the 19 bytes"):
            use()
    assert (tmp_path / "object").stat().st_size == size
    os.truncate(tmp_path / "object", 100)
    place.write(b"wxyz")
    assert place.read() == b"wxyz"


def test_an_object_that_shrinks_while_it_is_read(
    memory: SharedMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.register("r", "/object", 0, 100)
    real, calls = os.pread, []

    def pread(fd: int, size: int, at: int) -> bytes:
        calls.append(at)
        found = real(fd, min(size, 40), at)
        os.truncate(tmp_path / "object", 60)
        return found

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(InvalidRequest, match="was made shorter"):
        memory.find(Area("r", 0, 100)).read()
    assert calls == [0, 40, 60]


def test_reads_and_writes_in_pieces(memory: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel may do with large tensors."""
    pread, pwrite = os.pread, os.pwrite
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 7), at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    memory.register("r", "/object", 3, 90)
    place = memory.find(Area("r", 1, 60))
    assert place.read() == CONTENT[4:64]
    place.write(CONTENT[::-1][:60])
    assert place.read() == CONTENT[::-1][:60]


def test_memory_that_cannot_be_used_is_an_error(memory: SharedMemory, tmp_path: Path) -> None:
    """As when the machine's shared memory is full."""
    read_only = Region("r", "/object", 0, 100, os.open(tmp_path / "object", os.O_RDONLY))
    with pytest.raises(RegionFailed, match="'r' cannot be written: bad file descriptor"):
        RegionPlace(read_only, Area("r", 0, 4)).write(b"abcd")
    write_only = Region("r", "/object", 0, 100, os.open(tmp_path / "object", os.O_WRONLY))
    with pytest.raises(RegionFailed, match="'r' cannot be read: bad file descriptor"):
        RegionPlace(write_only, Area("r", 0, 4)).read()


def test_a_region_stays_what_was_registered(memory: SharedMemory, tmp_path: Path) -> None:
    memory.register("r", "/object", 0, 100)
    (tmp_path / "object").unlink()
    assert memory.find(Area("r", 0, 3)).read() == CONTENT[:3]
    (tmp_path / "object").write_bytes(b"another one")
    assert memory.find(Area("r", 0, 3)).read() == CONTENT[:3]


def test_unregistering_waits_for_those_who_use_the_region(memory: SharedMemory) -> None:
    memory.register("r", "/object", 0, 100)
    places = [memory.find(Area("r", 0, 4)), memory.find(Area("r", 4, 4))]
    fd = places[0]._region._fd
    memory.unregister("r")
    memory.register("r", "/object", 50, 4)  # the name is free at once
    with pytest.raises(InvalidRequest, match="Invalid offset"):
        memory.find(Area("r", 4, 4))
    places.pop(0).write(b"last")
    assert is_open(fd)
    assert places.pop().read() == CONTENT[4:8]
    assert not is_open(fd)
    assert memory.find(Area("r", 0, 4)).read() == CONTENT[50:54]
