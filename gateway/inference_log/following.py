"""The log as it grows: rows in the order in which they were written, a little behind the writer.

Rules: every row once, from the moment `start` was called. A segment is read on from where the last look ended; what is
torn at its end is "not yet". A segment that was sealed before all of it was read is finished from its Parquet files.
Rows are bare of tensors: following is for people.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from gateway.inference_log import wal
from gateway.inference_log.private_files import read_file
from gateway.inference_log.segments import Layout, Segment
from gateway.inference_log.store import Store, tables_of

COLUMNS: Final = (
    "request_id",
    "received",
    "model",
    "asked_model",
    "version",
    "status",
    "backend",
    "attempt",
    "batch_id",
    "batch_size",
    "total_ms",
    "error",
    "reason",
    "variant",
    "protocol",
    "rows",
    "epoch",
    "position",
)
"""What a followed row has: names of `arrow_tables.REQUESTS`."""


class Follower:
    """Where following stands. Call `start` once, then `poll` as often as wanted."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._at: dict[Segment, tuple[int, int]] = {}
        """Segment → (bytes read, position of the next row)."""

    def __repr__(self) -> str:
        return f"Follower({self._store}, {len(self._at)} segments)"

    def start(self) -> None:
        """From now on: what is in the WAL already is skipped."""
        for _ in self._read():
            pass

    def poll(self) -> list[dict[str, Any]]:
        """Rows that were written since the last call."""
        return [row for table in self._read() for row in table]

    def _read(self) -> Iterator[list[dict[str, Any]]]:
        there: set[Segment] = set()
        for layout in self._store.wals:
            for segment in [one for epoch in layout.epochs() for one in layout.segments(epoch)]:
                there.add(segment)
                try:
                    yield self._read_on(layout, segment)
                except FileNotFoundError:
                    there.discard(segment)
        for segment in [one for one in self._at if one not in there]:
            _, position = self._at.pop(segment)
            yield self._store.sealed_rows(segment, position, COLUMNS)

    def _read_on(self, layout: Layout, segment: Segment) -> list[dict[str, Any]]:
        start, position = self._at.get(segment, (0, 0))
        data = read_file(layout.segment(segment), start)
        if start == 0:
            reading = wal.read(data, segment.epoch, segment.number)
            if reading.header is None and len(data) < wal.HEADER_BYTES:
                return []
        else:
            reading = wal.read_on(data, segment.epoch, segment.number, position)
        self._at[segment] = (start + _good_end(reading, len(data)), reading.next_position)
        table = tables_of(reading.records, segment.epoch, {"requests"}).get("requests")
        return [] if table is None else table.select(list(COLUMNS)).to_pylist()


def _good_end(reading: wal.Reading, size: int) -> int:
    """Where to read on: behind the last whole record."""
    torn = [damage for damage in reading.damages if damage.torn]
    return torn[0].start if torn else size
