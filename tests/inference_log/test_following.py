"""Following: each row once and in order, while segments grow, are closed and are sealed."""

from __future__ import annotations

import time
from pathlib import Path

from gateway.inference_log import frame, wal
from gateway.inference_log.following import COLUMNS, Follower
from gateway.inference_log.segments import Layout, Segment
from gateway.inference_log.store import Store
from tests.inference_log.log_on_disk import ids, new_log, seal, write
from tests.inference_log.log_rows import new_epoch, requests


def texts(found: list[dict[str, object]]) -> list[object]:
    return [row["request_id"] for row in found]


def test_only_what_comes_after_the_start(tmp_path: Path) -> None:
    write(tmp_path, [requests(range(3))])
    follower = Follower(Store(tmp_path))
    follower.start()
    assert follower.poll() == []
    later = requests(range(3, 6))
    write(tmp_path, [later])
    found = follower.poll()
    assert texts(found) == ids(later)
    assert set(found[0]) == set(COLUMNS)
    assert follower.poll() == []


def test_a_segment_is_followed_byte_by_byte(tmp_path: Path) -> None:
    """Whatever part of a record is on the disk: nothing early, nothing twice, nothing left out."""
    new_log(tmp_path)
    layout, segment = Layout(tmp_path), Segment(new_epoch(), 0)
    layout.epoch(segment.epoch).mkdir()
    frames = [requests(range(n, n + 2)) for n in range(0, 6, 2)]
    mark = wal.marker(segment.epoch, 0)
    parts = [wal.segment_header(wal.SegmentHeader(segment.epoch, 0, 0, 0))]
    for n, one in enumerate(frames):
        data = frame.encode(one)
        parts.append(wal.record_header(mark, n * 2, 2, data) + data)
    whole = b"".join([*parts, wal.end_record(mark, 6)])
    follower = Follower(Store(tmp_path))
    follower.start()
    seen: list[object] = []
    for end in range(0, len(whole) + 1, 7):
        layout.segment(segment).write_bytes(whole[:end])
        seen += texts(follower.poll())
    layout.segment(segment).write_bytes(whole)
    assert seen + texts(follower.poll()) == [one for made in frames for one in ids(made)]


def test_what_was_sealed_before_it_was_read_comes_from_parquet(tmp_path: Path) -> None:
    new_log(tmp_path)
    layout, segment = Layout(tmp_path), Segment(new_epoch(time.time()), 0)
    layout.epoch(segment.epoch).mkdir()
    first, second = requests(range(2)), requests(range(2, 5))
    mark = wal.marker(segment.epoch, 0)
    data, more = frame.encode(first), frame.encode(second)
    beginning = (
        wal.segment_header(wal.SegmentHeader(segment.epoch, 0, 0, 0)) + wal.record_header(mark, 0, 2, data) + data
    )
    layout.segment(segment).write_bytes(beginning)
    follower = Follower(Store(tmp_path))
    follower.start()
    whole = beginning + wal.record_header(mark, 2, 3, more) + more + wal.end_record(mark, 5)
    layout.segment(segment).write_bytes(whole)
    seal(tmp_path)
    assert texts(follower.poll()) == ids(second)
    assert follower.poll() == []
