"""How frames lie in a segment of the write-ahead log: pure framing, bytes in and bytes out.

A segment is a header and then records, nothing between them:

    header  80 bytes   "OIPWAL01" · marker 8 · epoch 16 · number u32 · zero u32 · first position u64 · created µs i64 ·
                       20 reserved · CRC-32 u32 of all that stands before it
    record  32 bytes   marker 8 · position u64 · length u32 · rows u32 · payload's CRC-32 u32 · CRC-32 u32 of these 28
            length     the payload: one frame
    end     a record with no rows and no payload: the segment was closed on purpose

All integers are little-endian. *Position* is the number of rows and events of this epoch before the record, so that
(epoch, position) names a row for ever and a hole in the positions says exactly how many were lost.

Rules and invariants:
* The **marker** is derived from epoch and segment number, both of which stand in the file's path too. A reader that
  knows them finds records even where the header is damaged; and since an epoch has 74 random bits that no client ever
  sees, no payload can contain what looks like a record.
* The record's own CRC covers its length, so a reader never trusts a length that may be damaged; the payload's CRC says
  whether the frame is what was written.
* Damage in the middle: the reader reports the bytes it cannot use and goes on at the next **provable** record: marker,
  CRC, a position that is not before what was read already, and a payload that matches. What it delivers was written so.
* A tail that holds no provable record is *torn*: the usual end of a process that was killed.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from typing import Final
from uuid import UUID

MAGIC: Final = b"OIPWAL01"
_HEADER: Final = struct.Struct("<8s8s16sIIQq20s")
_CRC: Final = struct.Struct("<I")
_RECORD: Final = struct.Struct("<8sQIII")
HEADER_BYTES: Final = _HEADER.size + _CRC.size
RECORD_BYTES: Final = _RECORD.size + _CRC.size
MAX_PAYLOAD_BYTES: Final = 2**30
"""What a writer takes as one frame at most: readers hold the tensors of one frame in one Arrow array of under 2 GiB."""


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    epoch: str
    """UUIDv7 text of one start of one writing process."""
    number: int
    first_position: int
    created_us: int
    """Microseconds since 1970, UTC."""


@dataclass(frozen=True, slots=True)
class Record:
    position: int
    """Of the frame's first row or event."""
    rows: int
    payload: memoryview
    """One frame; a view of what `read` was given."""


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes `[start, end)` of the segment that hold nothing provable."""

    start: int
    end: int
    position: int | None
    """Of the first row that may be missing; None where a damaged header leaves it open."""
    rows: int | None
    """Rows and events lost there; None where nothing that follows in this segment says so."""
    torn: bool
    """Whether it is the segment's tail."""


@dataclass(frozen=True, slots=True)
class Reading:
    header: SegmentHeader | None
    """None where the header is damaged."""
    records: tuple[Record, ...]
    damages: tuple[Damage, ...]
    closed: bool
    """Whether the end record was found."""
    next_position: int
    """Of the row after the last one that was read."""
    good_bytes: int
    """Length of the undamaged beginning."""


def marker(epoch: str, number: int) -> bytes:
    """The 8 bytes that every record of the segment begins with."""
    return hashlib.sha256(b"oip-wal\0" + UUID(epoch).bytes + number.to_bytes(8, "little")).digest()[:8]


def segment_header(header: SegmentHeader) -> bytes:
    """The first `HEADER_BYTES` of a segment."""
    body = _HEADER.pack(
        MAGIC,
        marker(header.epoch, header.number),
        UUID(header.epoch).bytes,
        header.number,
        0,
        header.first_position,
        header.created_us,
        bytes(20),
    )
    return body + _CRC.pack(zlib.crc32(body))


def record_header(segment: bytes, position: int, rows: int, payload: bytes) -> bytes:
    """The `RECORD_BYTES` in front of `payload`; `segment` is the segment's `marker`."""
    body = _RECORD.pack(segment, position, len(payload), rows, zlib.crc32(payload))
    return body + _CRC.pack(zlib.crc32(body))


def end_record(segment: bytes, position: int) -> bytes:
    """What stands last in a segment that was closed on purpose."""
    return record_header(segment, position, 0, b"")


def is_end(tail: bytes, epoch: str, number: int) -> bool:
    """Whether `tail`, the last `RECORD_BYTES` of a segment, is its end record."""
    if len(tail) != RECORD_BYTES:
        return False
    segment, _position, length, rows, _crc = _RECORD.unpack_from(tail)
    mine = segment == marker(epoch, number) and length == 0 and rows == 0
    return mine and bool(zlib.crc32(tail[: _RECORD.size]) == _CRC.unpack_from(tail, _RECORD.size)[0])


def read(data: bytes, epoch: str, number: int) -> Reading:
    """Everything provable in a segment; never raises, whatever the bytes are.

    Args:
        data: the whole file, or what has been written of it so far.
        epoch, number: from the file's path.
    """
    header = _read_header(data, epoch, number)
    scan = _Scan(data, marker(epoch, number), min(HEADER_BYTES, len(data)), header.first_position if header else None)
    if header is None:
        scan.damaged_from(0)
    return scan.run(header)


def read_on(data: bytes, epoch: str, number: int, position: int) -> Reading:
    """As `read`, of a segment's bytes from the end of a record on; `position` is the next one's.

    For readers that follow a segment as it grows: what is `torn` today may be whole tomorrow, so they go on from
    `good_bytes` (counted from the start of `data`) and `next_position`.
    """
    return _Scan(data, marker(epoch, number), 0, position).run(None)


def _read_header(data: bytes, epoch: str, number: int) -> SegmentHeader | None:
    if len(data) < HEADER_BYTES:
        return None
    magic, found, owner, which, zero, position, created, reserved = _HEADER.unpack_from(data)
    (crc,) = _CRC.unpack_from(data, _HEADER.size)
    fixed = (MAGIC, marker(epoch, number), UUID(epoch).bytes, number, 0, bytes(20))
    if (magic, found, owner, which, zero, reserved) != fixed or zlib.crc32(data[: _HEADER.size]) != crc:
        return None
    return SegmentHeader(epoch, number, position, created)


class _Scan:
    """One pass over the records; `at` only ever grows."""

    def __init__(self, data: bytes, segment: bytes, at: int, position: int | None) -> None:
        self._data = data
        self._view = memoryview(data)
        self._segment = segment
        self._at = at
        self._position = position
        """Of the next row; None until the first record behind a damaged header was found."""
        self._damaged: int | None = None
        """Where the bytes begin that could not be used so far."""
        self._records: list[Record] = []
        self._damages: list[Damage] = []
        self._closed = False

    def damaged_from(self, start: int) -> None:
        self._damaged = start

    def run(self, header: SegmentHeader | None) -> Reading:
        while self._at < len(self._data) and not self._closed:
            found = self._record_at(self._at)
            if found is None and (found := self._search()) is None:
                break
            self._take(*found)
        if self._damaged is None and self._at < len(self._data):
            self._damaged = self._at
        if self._damaged is not None and self._damaged < len(self._data):
            lost = 0 if self._closed else None
            self._damages.append(Damage(self._damaged, len(self._data), self._position, lost, torn=True))
        good = self._damages[0].start if self._damages else len(self._data)
        position = self._position or 0
        return Reading(header, tuple(self._records), tuple(self._damages), self._closed, position, good)

    def _search(self) -> tuple[Record, int] | None:
        """The next provable record at or behind `at`; what lies before it is damaged."""
        if self._damaged is None:
            self._damaged = self._at
        at = self._at
        while (at := self._data.find(self._segment, at)) >= 0:
            if (found := self._record_at(at)) is not None:
                return found
            at += 1
        return None

    def _take(self, record: Record, end: int) -> None:
        begin = end - RECORD_BYTES - len(record.payload)
        if self._damaged is not None:
            lost = None if self._position is None else record.position - self._position
            self._damages.append(Damage(self._damaged, begin, self._position, lost, torn=False))
            self._damaged = None
        self._at = end
        self._position = record.position + record.rows
        if record.rows:
            self._records.append(record)
        else:
            self._closed = True

    def _record_at(self, at: int) -> tuple[Record, int] | None:
        """The record that begins at `at`, if all of it is proved, and where it ends."""
        data, start = self._data, at + RECORD_BYTES
        if start > len(data):
            return None
        segment, position, length, rows, payload_crc = _RECORD.unpack_from(data, at)
        if segment != self._segment or zlib.crc32(data[at : start - _CRC.size]) != _CRC.unpack_from(data, start - 4)[0]:
            return None
        if start + length > len(data) or not self._follows(position) or (rows == 0) != (length == 0):
            return None
        payload = self._view[start : start + length]
        return (Record(position, rows, payload), start + length) if zlib.crc32(payload) == payload_crc else None

    def _follows(self, position: int) -> bool:
        """Without damage in between, positions have no holes; behind damage they have not been read before."""
        if self._position is None:
            return True
        return position >= self._position if self._damaged is not None else position == self._position
