"""From a WAL segment to Parquet files and their commit record: one step, whatever it is interrupted by.

    read → tables → files under hidden names, synced → renamed → commit record → WAL file removed

Rules and invariants:
* The commit record is the only step that matters. Killed before it, sealing starts again and makes the same files under
  the same names; killed after it, only the WAL file has still to go. No row is lost, none is there twice.
* Losses are written down, never passed over: bytes of the segment that prove nothing, and frames that cannot be read,
  stand in the commit record and, at the position of the first row that is missing, as an event of the `gap` stream.
  A segment that was damaged in its middle, or holds an unreadable frame, is kept in `damaged/` as it was found.
* Rows are converted some ten thousand at a time: memory is bounded by that, not by the segment. Each such piece is a
  row group; since request ids and times ascend, statistics of row groups find one id without reading the rest.
* Files end up in the partition of the model that was served and of the UTC day on which the request was received.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gateway.inference_log import arrow_tables, private_files, segments, wal
from gateway.inference_log.frame import Event, Frame, FrameError, Requests, decode
from gateway.inference_log.segments import Commit, Layout, Loss, Segment, StoredFile

CHUNK_ROWS: Final = 50_000
CHUNK_BYTES: Final = 16 << 20
"""A piece of a segment that is converted at once, and a row group of the files."""
DAY_US: Final = 86_400_000_000
DICTIONARY: Final = [
    *("model", "asked_model", "version", "digest", "variant", "protocol", "endpoint", "reason", "backend", "batch_id"),
    *("epoch", "kind", "error", "parameters"),
    *(f"{side}.list.element.{leaf}" for side in ("inputs", "outputs") for leaf in ("name", "datatype", "policy")),
]
"""Columns whose values repeat. The rest would only fill a dictionary before it is given up."""

Step = Callable[[str], None]
"""Told after every step that a reader or a successor could see."""


def quiet(_: str) -> None:
    """A `Step` that is told in vain."""


def seal(layout: Layout, segment: Segment, now_us: int, step: Step = quiet) -> Commit | None:
    """Seals one segment that will not grow any more; None if it held nothing at all.

    Raises:
        OSError: the disk refused; nothing has changed that counts.
    """
    path = layout.segment(segment)
    data = private_files.read_file(path)
    reading = wal.read(data, segment.epoch, segment.number)
    losses = list(_losses(reading, _first_position_after(layout, segment)))
    if not reading.records and not losses:
        remove(layout, segment, step)
        return None
    step("read")
    with _Files(layout, segment, step) as files:
        unreadable = _convert(reading, files, segment.epoch)
        losses += unreadable
        _tell_losses(files, segment, losses, now_us)
        stored = files.finish()
        digests = sorted(files.digests)
    first = reading.header.first_position if reading.header else next((r.position for r in reading.records), 0)
    commit = Commit(
        segment.epoch,
        segment.number,
        first,
        reading.next_position,
        sum(file.rows for file in stored),
        len(data),
        hashlib.sha256(data).hexdigest(),
        now_us,
        stored,
        [loss.entry for loss in losses],
        digests,
    )
    if unreadable or any(not loss.entry.torn for loss in losses):
        _keep(layout, segment)
    private_files.write_json(layout.commit(segment), commit)
    step("committed")
    remove(layout, segment, step)
    return commit


def remove(layout: Layout, segment: Segment, step: Step = quiet) -> None:
    """Removes the WAL file of a segment that is sealed, or was empty."""
    path = layout.segment(segment)
    with suppress(FileNotFoundError):
        path.unlink()
        private_files.sync_directory(path.parent)
    step("removed")


@dataclass(frozen=True, slots=True)
class _Lost:
    """A loss, and the position of the first row that is missing: None where that is unknown."""

    position: int | None
    entry: Loss


def _losses(reading: wal.Reading, following: int | None) -> Iterator[_Lost]:
    """What of the segment proves nothing. `following`: first position of the next segment, if there is one."""
    for damage in reading.damages:
        rows = damage.rows
        if damage.torn and rows is None and following is not None:
            rows = following - reading.next_position
        yield _Lost(damage.position, Loss(damage.start, damage.end, rows, damage.torn))
    torn = any(damage.torn for damage in reading.damages)
    if not torn and following is not None and following > reading.next_position:
        end = reading.good_bytes
        yield _Lost(reading.next_position, Loss(end, end, following - reading.next_position, True))


def _convert(reading: wal.Reading, files: _Files, epoch: str) -> list[_Lost]:
    """Puts every record's frame into the files; returns those that could not be read."""
    unreadable: list[_Lost] = []
    piece: list[tuple[int, Frame]] = []
    rows = size = 0
    for record in reading.records:
        try:
            frame = decode(record.payload)
        except FrameError:
            unreadable.append(_unreadable(record))
            continue
        piece.append((record.position, frame))
        rows, size = rows + record.rows, size + len(record.payload)
        if rows >= CHUNK_ROWS or size >= CHUNK_BYTES:
            unreadable += _put(piece, files, epoch)
            piece, rows, size = [], 0, 0
    return unreadable + _put(piece, files, epoch)


def _put(piece: list[tuple[int, Frame]], files: _Files, epoch: str) -> list[_Lost]:
    requests, events = arrow_tables.split(piece)
    for stream, found in events.items():
        files.add(stream, "", arrow_tables.events_table(found, epoch))
    models: dict[str, list[tuple[int, Requests]]] = {}
    for position, frame in requests:
        models.setdefault(frame.model, []).append((position, frame))
        files.digests.add(frame.digest)
    unreadable: list[_Lost] = []
    for model, mine in models.items():
        try:
            table = arrow_tables.requests_table(mine, epoch)
        except ValueError:  # one of them contradicts itself: find it, keep the others
            good, bad = _sorted_out(mine, epoch)
            unreadable += bad
            table = arrow_tables.requests_table(good, epoch)
        files.add("requests", model, table)
    return unreadable


def _sorted_out(frames: list[tuple[int, Requests]], epoch: str) -> tuple[list[tuple[int, Requests]], list[_Lost]]:
    good: list[tuple[int, Requests]] = []
    bad: list[_Lost] = []
    for position, frame in frames:
        try:
            arrow_tables.requests_table([(position, frame)], epoch)
        except ValueError:
            bad.append(_Lost(position, Loss(0, 0, len(frame.rows), False)))
        else:
            good.append((position, frame))
    return good, bad


def _unreadable(record: wal.Record) -> _Lost:
    return _Lost(record.position, Loss(0, 0, record.rows, False))


def _tell_losses(files: _Files, segment: Segment, losses: list[_Lost], now_us: int) -> None:
    """An event for each loss, at the position of the first row that is missing: no other row has it."""
    events = []
    for loss in losses:
        if loss.position is None or loss.entry.rows == 0:
            continue
        details = {
            "rows": loss.entry.rows,
            "segment": segment.name,
            "from_byte": loss.entry.start,
            "to_byte": loss.entry.end,
            "reason": "torn" if loss.entry.torn else "damaged",
        }
        event = Event(now_us * 1000, "gap", "recovery", "", "", msgspec.json.encode(details).decode())
        events.append((loss.position, event))
    if events:
        files.add("gap", "", arrow_tables.events_table(events, segment.epoch))


def _keep(layout: Layout, segment: Segment) -> None:
    """A second name for a damaged segment: what could not be read here may be worth something to somebody."""
    private_files.make_directory(layout.damaged)
    with suppress(FileExistsError):
        (layout.damaged / f"{segment.name}.wal").hardlink_to(layout.segment(segment))
        private_files.sync_directory(layout.damaged)


def _first_position_after(layout: Layout, segment: Segment) -> int | None:
    path = layout.segment(Segment(segment.epoch, segment.number + 1))
    try:
        head = private_files.read_file(path)[: wal.HEADER_BYTES]
    except FileNotFoundError:
        return None
    header = wal.read(head, segment.epoch, segment.number + 1).header
    return header.first_position if header else None


class _Files:
    """The Parquet files of one segment while they are made: one for each stream, model and day."""

    def __init__(self, layout: Layout, segment: Segment, step: Step) -> None:
        self._layout = layout
        self._segment = segment
        self._step = step
        self._open: dict[tuple[str, str, str], ParquetFile] = {}
        self.digests: set[str] = set()

    def __enter__(self) -> _Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open.values():
            file.give_up()

    def add(self, stream: str, model: str, table: pa.Table) -> None:
        for date, part in by_day(table):
            file = self._open.get((stream, model, date))
            if file is None:
                path = self._layout.partition(stream, date, model) / f"{self._segment.name}.parquet"
                file = self._open[stream, model, date] = ParquetFile(path, table.schema)
            file.add(part)

    def finish(self) -> list[StoredFile]:
        """Completes all files: synced, and under their names."""
        found = []
        for (stream, model, date), file in sorted(self._open.items()):
            extent = file.sync()
            self._step("written")
            name = (model or segments.UNRESOLVED) if stream == "requests" else ""
            found.append(describe(self._layout, file, stream, name, date, extent))
            file.show()
            self._step("shown")
        self._open.clear()
        self.digests.discard("")
        return found


@dataclass(frozen=True, slots=True)
class Extent:
    rows: int
    first_us: int
    last_us: int


class ParquetFile:
    """One Parquet file that becomes visible when it is complete. Rows are added in row groups."""

    def __init__(self, path: Path, kind: pa.Schema) -> None:
        self.path = path
        self._hidden = path.with_name(f".{path.name}.tmp")
        private_files.make_directory(path.parent)
        self._context = private_files.open_new(self._hidden)
        self._stream = self._context.__enter__()
        dictionary = [name for name in DICTIONARY if name.split(".")[0] in kind.names]
        self._writer: Any = pq.ParquetWriter(
            self._stream, kind, compression="zstd", compression_level=1, use_dictionary=dictionary
        )
        self._rows = 0
        self._span: tuple[int, int] | None = None

    def add(self, table: pa.Table) -> None:
        """One row group more."""
        self._writer.write_table(table, row_group_size=max(1, len(table)))
        self._rows += len(table)
        first, last = _span(table)
        self._span = (min(first, self._span[0]), max(last, self._span[1])) if self._span else (first, last)

    @property
    def present(self) -> Path:
        """Where the file lies now."""
        return self._hidden if self._hidden.exists() else self.path

    def sync(self) -> Extent:
        """Completes the file, still under its hidden name."""
        self._writer.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._context.__exit__(None, None, None)
        first, last = self._span or (0, 0)
        return Extent(self._rows, first, last)

    def show(self) -> None:
        """Gives the file its name."""
        self._hidden.replace(self.path)
        private_files.sync_directory(self.path.parent)

    def give_up(self) -> None:
        """Forgets the file, unless it has its name already."""
        with suppress(OSError, ValueError, pa.ArrowInvalid):
            self._writer.close()
        with suppress(OSError, ValueError):
            self._stream.close()
        with suppress(OSError):
            self._hidden.unlink(missing_ok=True)


def describe(layout: Layout, file: ParquetFile, stream: str, model: str, date: str, extent: Extent) -> StoredFile:
    """A complete file's entry, under the name it has or will have."""
    path = file.present
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    size, name = path.stat().st_size, layout.relative(file.path)
    return StoredFile(name, stream, extent.rows, size, digest, extent.first_us, extent.last_us, model, date)


def by_day(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """(UTC date, its rows), in order."""
    if not len(table):
        return
    days = pc.floor_temporal(_times(table), unit="day").cast(pa.int64())
    for day in sorted(pc.unique(days).to_pylist()):
        date = str(pa.scalar(day // DAY_US, pa.int32()).cast(pa.date32()).as_py())
        yield date, table.filter(pc.equal(days, day))


def _times(table: pa.Table) -> pa.ChunkedArray:
    return table["received" if "received" in table.column_names else "at"]


def _span(table: pa.Table) -> tuple[int, int]:
    found = pc.min_max(_times(table).cast(pa.int64())).as_py()
    return found["min"], found["max"]


def digests(layout: Layout) -> set[str]:
    """Digests of the model versions that sealed rows are of, as long as any file with rows of theirs is kept."""
    merged = [one for ledger in layout.ledgers().values() for one in ledger.merges] + [
        one for _, one in layout.merges()
    ]
    became = {name: one.output.path for one in merged for name in one.replaces}
    there = {layout.relative(path) for path in layout.parquet("requests")}

    def is_kept(name: str) -> bool:
        while name not in there and name in became:
            name = became[name]
        return name in there

    commits = layout.commits().values()
    return {
        digest for commit in commits if any(is_kept(file.path) for file in commit.files) for digest in commit.digests
    }
