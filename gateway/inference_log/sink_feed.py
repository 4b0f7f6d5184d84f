"""Everything in the log's directory in the order in which it has to be shipped: pieces of an epoch, by position.

A sink keeps one number for each epoch: every position below it is shipped. `Feed.pieces` goes from there, oldest epoch
first, and reads a segment from wherever it lies now: its WAL file, its Parquet files, or the file that those were
merged into. It follows WAL segments as they grow and reads no byte of them twice.

Rules and invariants:
* WAL files are listed before commit records. A segment that is in neither list was deleted on purpose; one whose WAL
  file is gone when it is opened was sealed meanwhile, so the rest of its epoch waits for the next look. So no position
  is passed over that will be readable later.
* Positions that are nowhere (damage, retention, a record that cannot be read) are counted in `missing_rows` once.
* A torn tail is "not yet" while the segment may still grow, and ends it otherwise.
* Memory is bounded by one segment and what its rows need as a table.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gateway.inference_log import arrow_tables, frame, wal
from gateway.inference_log.private_files import read_file, read_json
from gateway.inference_log.segments import Commit, Layout, Ledger, Merge, Segment, StoredFile

log = logging.getLogger("gateway.inference_log")

PIECE_BYTES: Final = 32 * 2**20
"""Most payload of one piece, roughly."""
LOOKS: Final = 16
"""Tries to read commit records while they are being folded; folding is rare and short."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows and events of one epoch: all that there is from `first` up to `next`."""

    epoch: str
    first: int
    next: int
    tables: Mapping[str, pa.Table]
    """By stream, sorted by position; no stream without rows."""
    rows: int
    oldest_us: int
    """When its earliest row arrived, microseconds since 1970."""
    missing: int = 0
    """Positions before `first` that are nowhere."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits, by what the files' sizes say."""

    bytes: int
    """As WAL bytes."""
    rows: int
    """Exact where segments are sealed, else guessed from the bytes of a row so far."""


@dataclass(slots=True)
class _Tail:
    """How far a WAL file was shipped: bytes, and the position of the record that starts there."""

    offset: int = 0
    position: int = 0


class _Commits:
    """Commit records of segments that are not shipped yet, and where merged files went; no file is parsed twice."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._seen: dict[str, int] = {}
        """Name in `sealed/` → modification time when it was read."""
        self._moved: dict[str, str] = {}
        self.found: dict[Segment, Commit] = {}

    def look(self, shipped: Mapping[str, int]) -> None:
        for _ in range(LOOKS):
            if self._look():
                break
        for segment in [one for one, record in self.found.items() if record.next_position <= shipped.get(one.epoch, 0)]:
            del self.found[segment]

    def _look(self) -> bool:
        """Read what is new. False: a record was folded into a ledger meanwhile, which may have been read before."""
        names: dict[str, int] = {}
        whole = True
        for path in sorted(self._layout.sealed.glob("[!.]*.json")):
            try:
                names[path.name] = path.stat().st_mtime_ns
            except FileNotFoundError:
                whole = False
                continue
            if self._seen.get(path.name) != names[path.name]:
                self._read(path)
                whole = whole and path.exists()
        self._seen = names
        return whole

    def now_at(self, path: str) -> str:
        """Where the rows of a file are now that it was merged; itself if it was not."""
        while path in self._moved:
            path = self._moved[path]
        return path

    def look_again(self, path: str) -> bool:
        """After a file was not there: whether it was merged meanwhile, and is elsewhere now."""
        before = self.now_at(path)
        self.look({})
        return self.now_at(path) != before

    def _read(self, path: Path) -> None:
        if path.name.startswith("ledger-"):
            ledger = read_json(path, Ledger) or Ledger()
            self.found.update({Segment(one.epoch, one.number): one for one in ledger.commits})
            merges = ledger.merges
        elif path.name.startswith("merge-"):
            merges = [merge for merge in (read_json(path, Merge),) if merge is not None]
        else:
            merges = []
            if (record := read_json(path, Commit)) is not None:
                self.found[Segment(record.epoch, record.number)] = record
        for merge in merges:
            self._moved.update(dict.fromkeys(merge.replaces, merge.output.path))


class Feed:
    """One reader of one log.

    Args:
        directory: the log's.
        spill: the spill directory, if there is one: a second place for WAL segments.
        rows: most positions of one piece, but a frame is never cut.
    """

    def __init__(self, directory: Path, spill: Path | None = None, rows: int = 5000) -> None:
        self.layout = Layout(directory)
        self._wals = [self.layout, *([Layout(spill)] if spill is not None else [])]
        self._commits = _Commits(self.layout)
        self._tails: dict[Segment, _Tail] = {}
        self._bytes_per_row = 200.0
        self.piece_rows = rows
        """May be changed between pieces."""
        self.unreadable_rows = 0
        """Rows in frames or files that are listed but cannot be read."""

    def __repr__(self) -> str:
        return f"Feed({self.layout.directory}, {len(self._tails)} growing, {len(self._commits.found)} sealed to do)"

    def epochs(self) -> set[str]:
        """Every epoch that the directory says anything about. Reads all commit records."""
        named = {epoch for layout in self._wals for epoch in layout.epochs()}
        return named | {segment.epoch for segment in self.layout.commits()}

    def pieces(self, shipped: Mapping[str, int]) -> Generator[Piece, None, None]:
        """What is not shipped yet and can be read now, in the order in which it has to be shipped.

        A piece counts as shipped when the next one is asked for; whoever could not ship one closes the iterator.
        """
        growing = self._growing()
        self._commits.look(shipped)
        self._tails = {segment: tail for segment, tail in self._tails.items() if segment in growing}
        for epoch, segments in groupby(sorted({*growing, *self._commits.found}), lambda segment: segment.epoch):
            yield from self._epoch(epoch, segments, growing, shipped.get(epoch, 0))

    def backlog(self, shipped: Mapping[str, int]) -> Backlog:
        """What waits behind `shipped`."""
        growing = self._growing()
        self._commits.look(shipped)
        size = rows = 0
        for record in self._commits.found.values():
            all_rows = max(1, record.next_position - record.first_position)
            left = record.next_position - max(shipped.get(record.epoch, 0), record.first_position)
            rows += left
            size += record.wal_bytes * left // all_rows
        committed = self.layout.committed()
        for segment, path in growing.items():
            if segment not in committed:
                with contextlib.suppress(FileNotFoundError):
                    tail = self._tails.get(segment, _Tail())
                    waiting = path.stat().st_size - max(tail.offset, wal.HEADER_BYTES)
                    if waiting > wal.RECORD_BYTES:  # more than the record that ends it
                        size += waiting
                        rows += math.ceil(waiting / self._bytes_per_row)
        return Backlog(size, rows)

    def _growing(self) -> dict[Segment, Path]:
        """WAL files; looked for before the commit records."""
        return {
            segment: layout.segment(segment)
            for layout in self._wals
            for epoch in layout.epochs()
            for segment in layout.segments(epoch)
        }

    def _epoch(
        self, epoch: str, segments: Iterable[Segment], growing: Mapping[Segment, Path], position: int
    ) -> Iterator[Piece]:
        for segment in segments:
            record = self._commits.found.get(segment)
            try:
                found = self._sealed(record, position) if record else self._wal(segment, growing[segment], position)
                for first, end, tables in found:
                    if end > position:
                        yield _piece(epoch, max(first, position), end, tables, max(0, first - position))
                        position = end
            except FileNotFoundError:
                return  # sealed or merged while we looked; the next look finds it

    def _wal(self, segment: Segment, path: Path, position: int) -> Iterator[_Part]:
        """What a WAL file holds from `position` on."""
        tail = self._tails.setdefault(segment, _Tail())
        data = read_file(path, tail.offset)
        if tail.offset:
            reading = wal.read_on(data, segment.epoch, segment.number, tail.position)
        else:
            reading = wal.read(data, segment.epoch, segment.number)
        start = tail.offset
        first = 0 if start or reading.header is None else wal.HEADER_BYTES
        for group in _groups(reading, first, position, lambda: self.piece_rows):
            if group.records:
                self._bytes_per_row = max(1.0, group.nbytes / group.rows)
                yield group.records[0].position, group.next, self._tables(group.records, segment.epoch, position)
                position = group.next
            tail.offset, tail.position = start + group.end, group.next

    def _tables(self, records: Sequence[wal.Record], epoch: str, position: int) -> dict[str, pa.Table]:
        """The records' rows from `position` on. What is no frame, or contradicts itself, is counted and left out."""
        frames: list[tuple[int, frame.Frame]] = []
        for record in records:
            try:
                frames.append((record.position, frame.decode(record.payload)))
            except frame.FrameError:
                self.unreadable_rows += record.rows
        try:
            tables = arrow_tables.to_tables(frames, epoch)
        except ValueError:
            tables = arrow_tables.to_tables([one for one in frames if self._is_whole(one)], epoch)
        if records[0].position >= position:
            return tables
        return {
            stream: _between(table, position, records[-1].position + records[-1].rows)
            for stream, table in tables.items()
        }

    def _is_whole(self, one: tuple[int, frame.Frame]) -> bool:
        try:
            arrow_tables.to_tables([one], "")
        except ValueError:
            self.unreadable_rows += frame.rows_in(one[1])
            return False
        return True

    def _sealed(self, record: Commit, position: int) -> Iterator[_Part]:
        """What the Parquet files of a sealed segment hold from `position` on."""
        found: dict[str, list[pa.Table]] = {}
        for file in record.files:
            if (table := self._file(file, record, position)) is not None:
                found.setdefault(file.stream, []).append(table)
        tables = {stream: pa.concat_tables(parts).sort_by("position") for stream, parts in found.items()}
        first, end = record.first_position, record.next_position
        per_row = sum(table.nbytes for table in tables.values()) / max(1, end - max(first, position))
        at = max(first, position)
        while at < end:
            most = max(1, min(self.piece_rows, round(PIECE_BYTES / max(1.0, per_row))))
            to = min(end, at + most)
            yield at, to, {stream: _between(table, at, to) for stream, table in tables.items()}
            at = to

    def _file(self, file: StoredFile, record: Commit, position: int) -> pa.Table | None:
        """This segment's rows of one of its files, or of what that was merged into; None where they are gone."""
        path = self.layout.directory / self._commits.now_at(file.path)
        try:
            table = pq.ParquetFile(path).read()
        except FileNotFoundError:
            if self._commits.look_again(file.path):
                raise
            self.unreadable_rows += file.rows  # retention came first
            return None
        except (pa.ArrowException, OSError) as error:
            log.error("%s cannot be read and is not shipped: %s", path, error)
            self.unreadable_rows += file.rows
            return None
        mine = pc.and_(pc.equal(table["epoch"], record.epoch), pc.greater_equal(table["position"], position))
        return table.filter(pc.and_(mine, _inside(table, record.first_position, record.next_position)))


_Part = tuple[int, int, dict[str, pa.Table]]
"""First position, the one after the last, tables by stream."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Records of one piece; none where they are all shipped already."""

    records: Sequence[wal.Record]
    nbytes: int
    rows: int
    end: int
    """Where the last one ends, counted like the damages of the reading."""
    next: int
    """The position after it."""


def _groups(reading: wal.Reading, at: int, position: int, most: Callable[[], int]) -> Iterator[_Group]:
    """The records of a reading in pieces of at least `most()` rows; those below `position` in a piece without any."""
    gaps = {damage.start: damage.end for damage in reading.damages if not damage.torn}
    chosen: list[wal.Record] = []
    rows = nbytes = 0
    for record in reading.records:
        at = gaps.get(at, at)
        at += wal.RECORD_BYTES + len(record.payload)
        end = record.position + record.rows
        if end <= position:
            yield _Group((), 0, 0, at, end)
            continue
        chosen.append(record)
        rows += record.rows
        nbytes += len(record.payload)
        if rows >= most() or nbytes >= PIECE_BYTES:
            yield _Group(chosen, nbytes, rows, at, end)
            chosen, rows, nbytes = [], 0, 0
    if chosen:
        yield _Group(chosen, nbytes, rows, at, chosen[-1].position + chosen[-1].rows)


def _inside(table: pa.Table, first: int, end: int) -> pa.ChunkedArray:
    return pc.and_(pc.greater_equal(table["position"], first), pc.less(table["position"], end))


def _between(table: pa.Table, first: int, end: int) -> pa.Table:
    """Rows with first <= position < end of a table that is sorted by position."""
    positions = table["position"].to_numpy()
    low, high = np.searchsorted(positions, [first, end])
    return table.slice(int(low), int(high - low))


def _piece(epoch: str, first: int, end: int, tables: Mapping[str, pa.Table], missing: int) -> Piece:
    tables = {stream: table for stream, table in tables.items() if table.num_rows}
    times = [pc.min(table["received" if stream == "requests" else "at"]) for stream, table in tables.items()]
    oldest = min((time.cast(pa.int64()).as_py() for time in times), default=0)
    return Piece(epoch, first, end, tables, sum(table.num_rows for table in tables.values()), oldest, missing)
