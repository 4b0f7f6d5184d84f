"""The writer thread: what was taken reaches the disk once, whatever the disk does in between."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import ConfigError
from gateway.inference_log import private_files, segments, wal, writer
from gateway.inference_log.frame import Event, decode
from gateway.inference_log.segments import Layout, Segment
from gateway.inference_log.writer import LogWriter, WriterSettings
from tests.inference_log.log_rows import encoded, new_epoch, numbers_in_wal, numbers_of
from tests.live.gateway_process import until

FAST = WriterSettings(sync_ms=1.0)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., LogWriter]]:
    made: list[LogWriter] = []

    def make(settings: WriterSettings = FAST, directory: Path = tmp_path) -> LogWriter:
        made.append(LogWriter(directory / "log", new_epoch(), settings))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.close(1.0)


def drained(one: LogWriter) -> None:
    until(lambda: one.pending_bytes == 0, 30.0, "the writer did not sync")


def readings(directory: Path, epoch: str) -> list[wal.Reading]:
    layout = Layout(directory / "log")
    return [
        wal.read(private_files.read_file(layout.segment(one)), one.epoch, one.number) for one in layout.segments(epoch)
    ]


def test_what_is_offered_is_there_once_and_in_order(tmp_path: Path, opened: Callable[..., LogWriter]) -> None:
    one = opened()
    for start in range(0, 3000, 3):
        assert one.offer(encoded(range(start, start + 3)), 3)
    one.close()
    assert numbers_in_wal(tmp_path / "log") == list(range(3000))
    statistics = one.statistics()
    assert (statistics.written_rows, statistics.synced_rows, statistics.lost_rows) == (3000, 3000, 0)
    assert statistics.pending_bytes == 0
    (reading,) = readings(tmp_path, one.epoch)
    assert reading.closed
    assert reading.next_position == 3000


def test_a_full_queue_says_so_at_once_and_the_reserve_is_for_what_has_run(
    tmp_path: Path, opened: Callable[..., LogWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(os, "fdatasync", lambda _: gate.wait(30))
    one = opened(WriterSettings(queue_bytes=1000, reserve_bytes=500, sync_ms=0.0))
    assert one.offer(b"x" * 1500, 1), "a frame larger than the queue is taken when nothing else waits"
    assert not one.offer(b"x", 1)
    gate.set()
    drained(one)
    gate.clear()
    assert one.offer(b"a" * 600, 1)
    assert not one.offer(b"b" * 600, 1)
    assert one.offer(b"c" * 400, 1)
    assert not one.offer(b"d", 1)
    assert one.offer(b"e" * 500, 1, reserve=True)
    assert not one.offer(b"f", 1, reserve=True)
    gate.set()
    one.close()
    assert not one.offer(b"late", 1)
    records = [bytes(record.payload)[:1] for reading in readings(tmp_path, one.epoch) for record in reading.records]
    assert records == [b"x", b"a", b"c", b"e"]


def test_segments_are_closed_by_size(tmp_path: Path, opened: Callable[..., LogWriter]) -> None:
    one = opened(WriterSettings(segment_bytes=4096, sync_ms=1.0))
    for start in range(0, 400, 4):
        assert one.offer(encoded(range(start, start + 4)), 4)
        if start % 40 == 0:
            drained(one)
    one.close()
    found = readings(tmp_path, one.epoch)
    assert len(found) > 3
    assert all(reading.closed and not reading.damages for reading in found)
    assert numbers_in_wal(tmp_path / "log") == list(range(400))
    positions = [(reading.header.first_position, reading.next_position) for reading in found if reading.header]
    assert all(a[1] == b[0] for a, b in pairwise(positions))


def test_segments_are_closed_by_age(tmp_path: Path, opened: Callable[..., LogWriter]) -> None:
    one = opened(WriterSettings(seal_s=0.02, sync_ms=1.0))
    layout = Layout(tmp_path / "log")
    assert one.offer(encoded([1]), 1)
    first = Segment(one.epoch, 0)
    until(lambda: layout.segment(first).exists() and segments.is_final(layout, first), 30.0, "it stayed open")
    assert one.offer(encoded([2]), 1)
    one.close()
    assert [reading.next_position for reading in readings(tmp_path, one.epoch)] == [1, 2]


def test_everything_is_private_whatever_the_umask_says(tmp_path: Path, opened: Callable[..., LogWriter]) -> None:
    before = os.umask(0o000)
    try:
        one = opened()
        one.offer(encoded([1]), 1)
        one.close()
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "log").rglob("*") if path.is_dir()}
    assert modes | {(tmp_path / "log").stat().st_mode & 0o777} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "log").rglob("*") if path.is_file()} == {0o600}


def test_a_directory_that_is_not_ours_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "log").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="links are not followed"):
        LogWriter(tmp_path / "log", new_epoch(), FAST).start()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(ConfigError, match="chmod 700"):
        LogWriter(tmp_path / "shared", new_epoch(), FAST).start()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be used"):
        LogWriter(tmp_path / "file" / "log", new_epoch(), FAST).start()


def test_two_writers_never_share_an_epoch(
    tmp_path: Path, opened: Callable[..., LogWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = opened()
    monkeypatch.setattr(writer, "LOCK_ATTEMPTS", 2)
    with pytest.raises(ConfigError, match="in use by another process"):
        LogWriter(tmp_path / "log", one.epoch, FAST).start()


def test_a_link_in_the_place_of_a_segment_is_not_followed(tmp_path: Path, opened: Callable[..., LogWriter]) -> None:
    one = opened()
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    path = Layout(tmp_path / "log").segment(Segment(one.epoch, 0))
    path.symlink_to(victim)
    one.offer(encoded([5]), 1)
    until(lambda: one.statistics().failing is not None, 30.0, "the link was not noticed")
    assert victim.read_bytes() == b"precious"
    path.unlink()
    drained(one)
    assert numbers_in_wal(tmp_path / "log") == [5]


def test_a_write_that_is_refused_in_the_middle_is_made_good(tmp_path: Path, opened: Callable[..., LogWriter]) -> None:
    """The file-size limit makes the kernel write a part and refuse the rest, as a full disk does."""
    one = opened()
    one.offer(encoded(range(10)), 10)
    drained(one)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    try:
        for start in range(10, 200, 10):
            assert one.offer(encoded(range(start, start + 10)), 10)
        until(lambda: one.statistics().failing is not None, 30.0, "nothing was refused")
        assert "File too large" in (one.statistics().failing or "")
        assert one.pending_bytes > 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    drained(one)
    one.close()
    assert one.statistics().failing is None
    assert one.statistics().lost_rows == 0
    assert numbers_in_wal(tmp_path / "log") == list(range(200))
    assert [reading.damages for reading in readings(tmp_path, one.epoch)] == [()]


@pytest.mark.parametrize("call", ["fdatasync", "writev", "ftruncate", "open"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_whatever_call_fails_and_however_often_nothing_is_lost_or_doubled(
    tmp_path: Path, opened: Callable[..., LogWriter], monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    real, calls, torn = getattr(os, call), iter(range(10**9)), iter(range(10**9))

    synced: dict[int, int] = {}

    def fails(*arguments: Any) -> object:
        if next(calls) % 3 != 2:
            if call == "fdatasync":
                found = os.fstat(arguments[0])
                synced[found.st_ino] = found.st_size
            return real(*arguments)
        if call == "fdatasync":  # what the kernel could not write it forgets: zeros, with luck
            size = os.fstat(arguments[0]).st_size
            os.ftruncate(arguments[0], synced.get(os.fstat(arguments[0]).st_ino, wal.HEADER_BYTES))
            os.ftruncate(arguments[0], size)
        raise OSError(error, os.strerror(error))

    def tears(descriptor: int, buffers: list[bytes]) -> int:
        """Writes a part and then refuses: makes the writer cut the segment."""
        if next(torn) % 4 == 2:
            os.write(descriptor, bytes(buffers[0])[:7])
            raise OSError(error, os.strerror(error))
        return real_writev(descriptor, buffers)

    real_writev = os.writev
    monkeypatch.setattr(writer, "RETRY_S", (0.0, 0.0))
    one = opened(WriterSettings(segment_bytes=1500, sync_ms=0.0))
    if call != "open":
        monkeypatch.setattr(os, "writev", tears)
    if call != "writev":
        monkeypatch.setattr(os, call, fails)
    for start in range(0, 400, 5):
        assert one.offer(encoded(range(start, start + 5)), 5)
        if start % 50 == 0:
            drained(one)
    drained(one)
    monkeypatch.undo()
    one.close()
    assert numbers_in_wal(tmp_path / "log") == list(range(400))
    assert one.statistics().synced_rows == one.statistics().written_rows == 400
    assert all(not reading.damages for reading in readings(tmp_path, one.epoch))


@pytest.mark.parametrize("segment_bytes", [64 << 20, 1500])
def test_after_a_failed_sync_all_since_the_last_good_one_is_written_again(
    tmp_path: Path, opened: Callable[..., LogWriter], monkeypatch: pytest.MonkeyPatch, segment_bytes: int
) -> None:
    """A burst is written, and its sync fails: in small segments while more of the burst waits behind it."""
    real, calls, synced = os.fdatasync, iter(range(10**9)), {0: 0}
    entered, gate = threading.Event(), threading.Event()

    def forgets(descriptor: int) -> None:
        number, found = next(calls), os.fstat(descriptor)
        if number == 0:
            entered.set()
            gate.wait(30)
        if number in (1, 2):  # what the kernel could not write it forgets
            os.ftruncate(descriptor, synced.get(found.st_ino, wal.HEADER_BYTES))
            os.ftruncate(descriptor, found.st_size)
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)
        synced[found.st_ino] = found.st_size

    monkeypatch.setattr(writer, "RETRY_S", (0.0, 0.0))
    monkeypatch.setattr(os, "fdatasync", forgets)
    one = opened(WriterSettings(segment_bytes=segment_bytes, sync_ms=0.0))
    assert one.offer(encoded([0]), 1)
    assert entered.wait(30)
    for number in range(1, 601):
        assert one.offer(encoded([number]), 1)
    gate.set()
    drained(one)
    one.close()
    assert numbers_in_wal(tmp_path / "log") == list(range(601))
    assert one.statistics().synced_rows == one.statistics().written_rows == 601
    found = readings(tmp_path, one.epoch)
    assert all(not reading.damages for reading in found)
    assert [found[0].header.first_position, found[-1].next_position] == [0, 601]  # type: ignore[union-attr]


def test_a_closed_segment_is_on_the_disk_with_its_name_and_its_end(
    tmp_path: Path, opened: Callable[..., LogWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, int] = {}
    folders: list[str] = []
    sync_data, sync = os.fdatasync, os.fsync

    def data(descriptor: int) -> None:
        sync_data(descriptor)
        assert one.epoch in folders, "the segment's name is synced before its first record is called synced"
        sizes[Path(f"/proc/self/fd/{descriptor}").readlink().name] = os.fstat(descriptor).st_size

    def folder(descriptor: int) -> None:
        sync(descriptor)
        folders.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    one = opened(WriterSettings(segment_bytes=1500, sync_ms=1.0))
    monkeypatch.setattr(os, "fdatasync", data)
    monkeypatch.setattr(os, "fsync", folder)
    for start in range(0, 100, 10):
        assert one.offer(encoded(range(start, start + 10)), 10)
        drained(one)
    one.close()
    home = Layout(tmp_path / "log").epoch(one.epoch)
    there = {path.name: path.stat().st_size for path in home.glob("*.wal")}
    assert sizes == there
    assert folders.count(one.epoch) == len(there) > 1


def test_what_the_disk_refuses_until_the_end_is_counted(
    tmp_path: Path, opened: Callable[..., LogWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = opened()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "writev", full)
    one.offer(encoded(range(7)), 7)
    until(lambda: one.statistics().failing is not None, 30.0, "nothing was refused")
    one.close(0.2)
    assert one.statistics().lost_rows == 7
    assert "No space left" in (one.statistics().failing or "")
    assert numbers_in_wal(tmp_path / "log") == []


def test_what_a_hanging_disk_holds_up_is_counted_wherever_it_waits(
    opened: Callable[..., LogWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, gate = threading.Event(), threading.Event()

    def hangs(_: int) -> None:
        entered.set()
        gate.wait(30)

    monkeypatch.setattr(os, "fdatasync", hangs)
    one = opened(WriterSettings(sync_ms=0.0))
    assert one.offer(encoded([0]), 1)
    assert entered.wait(30)
    assert one.offer(encoded([1, 2]), 2)
    one.close(0.0)
    assert one.statistics().lost_rows == 3
    gate.set()


def test_a_lock_that_was_swept_away_while_it_was_taken_is_taken_again(
    tmp_path: Path, opened: Callable[..., LogWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = private_files.take_lock
    swept: list[Path] = []

    def take(path: Path) -> int | None:
        lock = real(path)
        if not swept:
            swept.append(path)
            path.unlink()
        return lock

    monkeypatch.setattr(private_files, "take_lock", take)
    one = opened()
    assert len(swept) == 1
    assert segments.is_alive(Layout(tmp_path / "log"), one.epoch)


def test_a_frame_that_no_reader_could_hold_is_never_taken(
    opened: Callable[..., LogWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wal, "MAX_PAYLOAD_BYTES", 100)
    one = opened()
    assert not one.offer(b"x" * 101, 1)
    assert one.offer(b"x" * 100, 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_writer_that_ends_by_a_fault_of_ours_says_so(
    opened: Callable[..., LogWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = opened()

    def broken(*_: object) -> bytes:
        raise RuntimeError("a fault")

    monkeypatch.setattr(wal, "record_header", broken)
    assert one.offer(encoded([1]), 1)
    until(lambda: "a fault" in (one.statistics().failing or ""), 30.0, "nobody knows")
    assert not one.offer(encoded([2]), 1)
    one.close(0.1)
    assert one.statistics().lost_rows == 1


def test_a_really_full_disk(tmp_path: Path, opened: Callable[..., LogWriter]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("needs root and mount(8), to make a small tmpfs")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("mount(8) may not be used here (CAP_SYS_ADMIN), so there is no small tmpfs")
    try:
        ballast = disk / "ballast"
        one = opened(FAST, disk)
        ballast.write_bytes(b"x" * 150_000)
        for start in range(0, 2000, 10):
            assert one.offer(encoded(range(start, start + 10)), 10)
        until(lambda: "No space left" in (one.statistics().failing or ""), 30.0, "the disk never filled")
        written = one.statistics().synced_rows
        ballast.unlink()
        drained(one)
        one.close()
        assert 0 <= written < 2000
        assert numbers_in_wal(disk / "log") == list(range(2000))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_events_of_a_process_that_has_only_a_few(tmp_path: Path) -> None:
    event = Event(1, "access", "show", "", "", "{}")
    writer.write_events(tmp_path / "log", [event, event], 1_790_000_000 * 10**9)
    layout = Layout(tmp_path / "log")
    (segment,) = layout.snapshot().wal
    reading = wal.read(private_files.read_file(layout.segment(segment)), segment.epoch, segment.number)
    assert [decode(record.payload) for record in reading.records] == [event, event]
    assert not segments.is_alive(layout, segment.epoch)


KILLER = """
import itertools, json, os, signal, sys, time
from pathlib import Path
from gateway.inference_log.writer import LogWriter, WriterSettings
from tests.inference_log.log_rows import encoded, new_epoch

def log_for_ever(directory, epoch, told):
    settings = WriterSettings(segment_bytes=30_000, sync_ms=2.0, queue_bytes=50_000)
    one = LogWriter(directory, epoch, settings)
    one.start()
    said = 0
    for start in itertools.count(0, 5):
        frame = encoded(range(start, start + 5))
        while not one.offer(frame, 5):
            pass
        if (synced := one.statistics().synced_rows) != said:
            said = synced
            os.write(told, b"%d\\n" % synced)

for after_s in json.loads(sys.argv[2]):
    epoch = new_epoch(time.time())
    hear, told = os.pipe()
    child = os.fork()
    if child == 0:
        log_for_ever(Path(sys.argv[1]), epoch, told)
    os.close(told)
    text = os.read(hear, 64)  # it has begun
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while piece := os.read(hear, 65536):
        text += piece
    os.close(hear)
    print(epoch, text[: text.rindex(b"\\n")].decode().split()[-1], flush=True)
"""


def killed_writers(directory: Path, after_s: Sequence[float]) -> Iterator[tuple[str, int]]:
    """Processes, one after the other, that log 0, 1, 2 … until they are killed, so long after their first sync.

    For each, its epoch and how many rows it had said to be synced.
    """
    command = [sys.executable, "-c", KILLER, str(directory), json.dumps(after_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killer:
        assert killer.stdout is not None
        for line in killer.stdout:
            epoch, synced = line.split()
            yield epoch, int(synced)
    assert killer.returncode == 0


def test_a_writer_that_is_killed_keeps_every_synced_row_exactly_once(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "log")
    for epoch, synced in killed_writers(layout.directory, [0.0, 0.003, 0.02, 0.05]):
        found = []
        for segment in layout.segments(epoch):
            data = private_files.read_file(layout.segment(segment))
            for record in wal.read(data, epoch, segment.number).records:
                found += numbers_of(record.payload)
        assert found == list(range(len(found))), "a hole, or something twice"
        assert len(found) >= synced > 0
        assert not segments.is_alive(layout, epoch)
