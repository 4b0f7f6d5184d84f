"""One thread that puts frames on the disk: the only part of the log that a serving process lets wait for a disk.

The event loop offers frames; they are taken or refused at once, by the bytes that are held in memory. The thread
writes all there is in one `writev` every few milliseconds and syncs at most every `sync_ms`, so that one `fsync` pays
for all frames of that time.

Rules and invariants:
* A frame is held in memory until it is **synced**; `pending_bytes` counts all of that, and is the queue's bound.
* Records of an epoch have positions without holes. What was written is a prefix of what was offered.
* A disk that refuses (full, read-only, broken) never loses what was taken: the segment is cut back to the last byte
  that is known to be good, the rest stays in memory, and the thread tries again, slower and slower, up to every 2 s.
  After a failed `fsync` nothing since the last good one is trusted: Linux forgets such pages (they count as clean).
* A process that is killed loses what it had not handed to the kernel (some milliseconds); a machine that loses its
  power, what was not synced (`sync_ms`).
* `offer`, `pending_bytes` and `statistics` may be called from another thread than the writer's, `offer` from one only.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.errors import ConfigError
from gateway.inference_log import private_files, segments, wal
from gateway.inference_log.frame import Event, encode

TURN_S: Final = 0.005
"""How long frames gather before they are written, while there are any."""
RETRY_S: Final = (0.05, 2.0)
"""First and longest pause after the disk refused."""
LOCK_ATTEMPTS: Final = 200
MAX_WRITE: Final = 256
"""Frames in one `writev`: two buffers each, within the kernel's 1024."""


@dataclass(frozen=True, slots=True)
class WriterSettings:
    queue_bytes: int = 64 << 20
    reserve_bytes: int = 16 << 20
    """On top of `queue_bytes`, for what `offer(…, reserve=True)` brings."""
    segment_bytes: int = 64 << 20
    """A segment that has grown to this size is closed."""
    seal_s: float = 60.0
    """So is one whose first record is this old."""
    sync_ms: float = 100.0


@dataclass(frozen=True, slots=True)
class WriterStatistics:
    written_rows: int
    """Rows and events handed to the kernel."""
    written_bytes: int
    synced_rows: int
    synced_bytes: int
    lost_rows: int
    """Taken, and given up at `close` because the disk refused until the end."""
    pending_bytes: int
    segments: int
    syncs: int
    sync_seconds: float
    """All `fsync` calls together."""
    last_sync_seconds: float
    failing: str | None
    """What the disk says at present; None while all is well."""


@dataclass(slots=True)
class _OpenSegment:
    descriptor: int
    number: int
    marker: bytes
    opened: float
    good_bytes: int
    """End of the last record that is known to be whole."""
    synced_bytes: int


class LogWriter:
    """Writes the frames of one epoch. `start` before the first `offer`, `close` once at the end."""

    def __init__(self, directory: Path, epoch: str, settings: WriterSettings) -> None:
        self._layout = segments.Layout(directory)
        self.epoch = epoch
        self._settings = settings
        self._queue: deque[tuple[bytes, int]] = deque()
        self._offered_bytes = 0  # written by the offering thread only, as `_released_bytes` by the writer only
        self._released_bytes = 0
        self._held: list[tuple[bytes, int]] = []
        """Taken from the queue and not written."""
        self._unsynced: list[tuple[bytes, int]] = []
        """Written and not synced."""
        self._position = 0
        self._number = 0
        self._segment: _OpenSegment | None = None
        self._cut: int | None = None
        """Length to which the segment must be cut before anything is written."""
        self._wake = threading.Event()
        self._idle = False
        self._closing = False
        self._accepting = False
        self._lock: int | None = None
        self._thread = threading.Thread(target=self._run, name="inference-log", daemon=True)
        self._next_sync = 0.0
        self._pause = RETRY_S[0]
        self._counts = {"rows": 0, "bytes": 0, "synced_rows": 0, "synced_bytes": 0, "lost": 0, "syncs": 0}
        self._sync_seconds = 0.0
        self._last_sync_seconds = 0.0
        self._failing: str | None = None

    def __repr__(self) -> str:
        return f"LogWriter({self.epoch}, position {self._position}, {self.pending_bytes} B pending, {self._failing})"

    @property
    def pending_bytes(self) -> int:
        """Bytes of frames that were taken and are not synced."""
        return self._offered_bytes - self._released_bytes

    def start(self) -> None:
        """Makes the epoch's directory, takes its lock, starts the thread.

        Raises:
            ConfigError: the directory cannot be used; the text says why.
        """
        segments.prepare(self._layout.directory)
        home = self._layout.epoch(self.epoch)
        try:
            self._lock = self._take_lock(home)
        except OSError as error:
            raise ConfigError(f"inference_log.directory: {home} cannot be used: {error.strerror}") from None
        self._accepting = True
        self._thread.start()

    def offer(self, frame: bytes, rows: int, *, reserve: bool = False) -> bool:
        """Takes a frame of `rows` rows or events (at least 1), or says at once that there is no room: False.

        A frame that is larger than the whole queue is taken when nothing else waits. `reserve`: the frame may also
        use `reserve_bytes`: for what was executed already and cannot be refused any more.
        """
        size = len(frame)
        pending = self._offered_bytes - self._released_bytes
        room = self._settings.queue_bytes + (self._settings.reserve_bytes if reserve else 0)
        if not self._accepting or size > wal.MAX_PAYLOAD_BYTES or (pending and pending + size > room):
            return False
        self._offered_bytes += size
        self._queue.append((frame, rows))
        if self._idle:
            self._wake.set()
        return True

    def close(self, timeout_s: float = 10.0) -> None:
        """Writes and syncs what was taken, closes the segment, gives up the lock; returns after `timeout_s` anyway.

        What the disk would not take by then is counted in `lost_rows`.
        """
        self._accepting = False
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        waiting = [*self._unsynced, *self._held, *self._queue]
        self._counts["lost"] = sum(rows for _, rows in waiting)
        if not self._thread.is_alive() and self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def statistics(self) -> WriterStatistics:
        count = self._counts
        return WriterStatistics(
            count["rows"],
            count["bytes"],
            count["synced_rows"],
            count["synced_bytes"],
            count["lost"],
            self.pending_bytes,
            self._number,
            count["syncs"],
            self._sync_seconds,
            self._last_sync_seconds,
            self._failing,
        )

    def _take_lock(self, home: Path) -> int:
        """The lock of our own epoch. The sealer may take a new directory for an abandoned one and sweep it away."""
        for _ in range(LOCK_ATTEMPTS):
            private_files.make_directory(home)
            try:
                lock = private_files.take_lock(home / "lock")
            except FileNotFoundError:
                continue
            if lock is None:
                time.sleep(TURN_S)
            elif _is_at(lock, home / "lock"):
                return lock
            else:
                os.close(lock)
        raise ConfigError(f"inference_log.directory: {home} is in use by another process")

    # The thread.

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # a fault of ours: nobody may go on believing that somebody writes
            self._accepting = False
            self._failing = f"the writer has ended: {error!r}"
            raise

    def _work(self) -> None:
        while True:
            try:
                busy = self._turn(time.monotonic())
            except OSError as error:
                self._refused(error)
                if self._closing:
                    self._wake.clear()
                self._wake.wait(self._pause)
                self._pause = min(self._pause * 2, RETRY_S[1])
                continue
            if self._failing:
                self._failing, self._pause = None, RETRY_S[0]
            if busy:
                time.sleep(TURN_S)
            elif self._closing:
                return
            else:
                self._rest()

    def _turn(self, now: float) -> bool:
        """Writes what waits, syncs and rotates where due. False when there was nothing to do at all."""
        self._repair()
        queue, held = self._queue, self._held
        while queue:
            held.append(queue.popleft())
        if held:
            self._write(now)
        segment = self._segment
        if segment and self._unsynced and (now >= self._next_sync or self._closing):
            self._sync(segment, now)
        if segment and not self._unsynced and self._is_due(segment, now):
            self._finish(segment)
        return bool(self._queue or self._unsynced or (self._closing and self._segment))

    def _is_due(self, segment: _OpenSegment, now: float) -> bool:
        full = segment.good_bytes >= self._settings.segment_bytes
        return (self._closing and not self._queue) or full or now - segment.opened >= self._settings.seal_s

    def _rest(self) -> None:
        """Waits for a frame, or until the open segment is old enough to be closed."""
        self._idle = True
        if not self._queue and not self._closing:
            due = None
            if self._segment:
                due = max(0.0, self._segment.opened + self._settings.seal_s - time.monotonic())
            self._wake.wait(due)
        self._idle = False
        self._wake.clear()

    def _write(self, now: float) -> None:
        held = self._held
        while held:
            segment = self._segment or self._open(now)
            self._segment = segment
            if self._unsynced and segment.good_bytes >= self._settings.segment_bytes:
                self._sync(segment, now)
                self._finish(segment)
                continue
            if not self._unsynced:
                self._next_sync = now + self._settings.sync_ms / 1000
            self._write_some(segment, held[:MAX_WRITE])

    def _write_some(self, segment: _OpenSegment, frames: list[tuple[bytes, int]]) -> None:
        position = self._position
        buffers: list[bytes] = []
        for frame, rows in frames:
            buffers += (wal.record_header(segment.marker, position, rows, frame), frame)
            position += rows
        size = sum(map(len, buffers))
        self._cut = segment.good_bytes  # until all of it is there
        _write_all(segment.descriptor, buffers)
        self._cut = None
        segment.good_bytes += size
        self._unsynced += frames
        del self._held[: len(frames)]
        self._counts["rows"] += position - self._position
        self._counts["bytes"] += size
        self._position = position

    def _open(self, now: float) -> _OpenSegment:
        number = self._number
        path = self._layout.segment(segments.Segment(self.epoch, number))
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
            header = wal.SegmentHeader(self.epoch, number, self._position, time.time_ns() // 1000)
            _write_all(descriptor, [wal.segment_header(header)])
            private_files.sync_directory(path.parent)
        except OSError:
            os.close(descriptor)
            raise
        self._number = number + 1
        marker = wal.marker(self.epoch, number)
        return _OpenSegment(descriptor, number, marker, now, wal.HEADER_BYTES, wal.HEADER_BYTES)

    def _sync(self, segment: _OpenSegment, now: float) -> None:
        started = time.perf_counter()
        self._cut = segment.synced_bytes  # a failed sync says nothing about any page since the last one
        os.fdatasync(segment.descriptor)
        self._cut = None
        self._last_sync_seconds = time.perf_counter() - started
        self._sync_seconds += self._last_sync_seconds
        self._counts["syncs"] += 1
        self._counts["synced_bytes"] += segment.good_bytes - segment.synced_bytes
        segment.synced_bytes = segment.good_bytes
        self._counts["synced_rows"] += sum(rows for _, rows in self._unsynced)
        self._released_bytes += sum(len(frame) for frame, _ in self._unsynced)
        self._unsynced.clear()
        self._next_sync = now + self._settings.sync_ms / 1000

    def _finish(self, segment: _OpenSegment) -> None:
        """Closes a segment whose records are all synced."""
        self._cut = segment.good_bytes
        _write_all(segment.descriptor, [wal.end_record(segment.marker, self._position)])
        os.fdatasync(segment.descriptor)
        self._cut = None
        self._segment = None
        os.close(segment.descriptor)

    def _repair(self) -> None:
        """Cuts the segment back to what is good, after the disk refused in the middle of something."""
        segment, cut = self._segment, self._cut
        if segment is None or cut is None:
            return
        os.ftruncate(segment.descriptor, cut)
        self._cut = None
        if cut < segment.good_bytes:  # a sync failed: what was written since the last good one is written again
            rows = sum(rows for _, rows in self._unsynced)
            self._counts["rows"] -= rows
            self._counts["bytes"] -= segment.good_bytes - cut
            self._position -= rows
            self._held[:0] = self._unsynced
            self._unsynced.clear()
            segment.good_bytes = cut

    def _refused(self, error: OSError) -> None:
        self._failing = f"{self._layout.directory}: {error.strerror or error}"


def _write_all(descriptor: int, buffers: list[bytes]) -> None:
    """`writev` until everything is written.

    Raises:
        OSError: the disk refused; how much is written is unknown.
    """
    rest: list[bytes | memoryview] = list(buffers)
    while rest:
        written = os.writev(descriptor, rest)
        while rest and written >= len(rest[0]):
            written -= len(rest.pop(0))
        if rest and written:
            rest[0] = memoryview(rest[0])[written:]


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the file that is open is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def write_events(directory: Path, events: Sequence[Event], now_ns: int) -> None:
    """Puts entries of side streams on the disk, synced, as an epoch of their own. For processes that only have a few.

    Raises:
        ConfigError: the directory cannot be used.
        OSError: the disk refused; nothing is recorded.
    """
    writer = LogWriter(directory, segments.new_epoch(now_ns // 1_000_000, os.urandom(10)), WriterSettings())
    writer.start()
    try:
        for event in events:
            writer.offer(encode(event), 1)
    finally:
        writer.close()
    if (statistics := writer.statistics()).lost_rows:
        raise OSError(statistics.failing or "the log took nothing")
