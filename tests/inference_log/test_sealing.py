"""From WAL to Parquet: every row once whatever it is interrupted by, losses told, files that others can read."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import duckdb
import msgspec
import pyarrow.parquet as pq
import pytest

from gateway.inference_log import frame, merging, private_files, sealing, segments, wal
from gateway.inference_log.frame import Column, Event
from gateway.inference_log.sealer import Sealer
from gateway.inference_log.sealer_settings import SealerSettings
from gateway.inference_log.segments import Layout, Segment
from tests.inference_log.log_rows import (
    DAY_S,
    NOON,
    encoded,
    new_epoch,
    numbers_in_parquet,
    numbers_in_wal,
    requests,
    segment_bytes,
)

NOW_US = NOON * 1_000_000


def put(layout: Layout, data: bytes, epoch: str, number: int = 0) -> Segment:
    segments.prepare(layout.directory)
    one = Segment(epoch, number)
    private_files.make_directory(layout.epoch(epoch))
    layout.segment(one).write_bytes(data)
    return one


def filled(layout: Layout, count: int = 30, epoch: str = "") -> Segment:
    epoch = epoch or new_epoch()
    frames = [(encoded(range(start, start + 3)), 3) for start in range(0, count, 3)]
    return put(layout, segment_bytes(epoch, 0, 0, frames, end=True), epoch)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "log")


def test_a_segment_becomes_files_and_a_commit_record(layout: Layout) -> None:
    epoch = new_epoch()
    event = frame.encode(Event(NOON * 10**9, "lifecycle", "loaded", "digits", "3", "{}"))
    frames = [
        (encoded([1, 2]), 2),
        (encoded([3], model="a/b %"), 1),
        (event, 1),
        (encoded([4], at=NOON + DAY_S), 1),
        (encoded([5], model=""), 1),
    ]
    one = put(layout, segment_bytes(epoch, 0, 50, frames, end=True), epoch)
    data = layout.segment(one).read_bytes()
    commit = sealing.seal(layout, one, NOW_US)
    assert commit is not None
    assert commit == layout.commits()[one]
    assert (commit.first_position, commit.next_position, commit.rows, commit.losses) == (50, 56, 6, [])
    assert (commit.wal_sha256, commit.wal_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert commit.digests == ["sha256:aa"]
    places = {(file.stream, file.model, file.date, file.rows) for file in commit.files}
    assert places == {
        ("requests", "digits", "2026-09-21", 2),
        ("requests", "digits", "2026-09-22", 1),
        ("requests", "a/b %", "2026-09-21", 1),
        ("requests", "__unresolved__", "2026-09-21", 1),
        ("lifecycle", "", "2026-09-21", 1),
    }
    for file in commit.files:
        path = layout.directory / file.path
        assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
        assert path.stat().st_mode & 0o777 == 0o600
    assert not layout.segment(one).exists()
    assert sorted(numbers_in_parquet(layout.directory)) == [1, 2, 3, 4, 5]
    positions = [n for path in layout.parquet("requests") for n in pq.read_table(path)["position"].to_pylist()]
    assert sorted(positions) == [50, 51, 52, 54, 55]


def test_each_step_is_on_the_disk_before_the_next(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    one = filled(layout)
    synced: list[str] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        sync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append("date" if path.name.startswith("date=") else path.name)

    def step(name: str) -> None:
        seen[name] = list(synced)
        synced.clear()

    seen: dict[str, list[str]] = {}
    monkeypatch.setattr(os, "fsync", noted)
    sealing.seal(layout, one, NOW_US, step)
    assert f".{one.name}.parquet.tmp" in seen["written"]
    assert "date" in seen["shown"]
    assert seen["committed"] == [f".{one.name}.json.tmp", "sealed"]
    assert seen["removed"] == [one.epoch]


def test_plain_duckdb_and_arrow_datasets_read_the_directory(layout: Layout) -> None:
    epoch = new_epoch()
    frames = [(encoded([1], model="a/b"), 1), (encoded([2]), 1), (encoded([3], at=NOON + DAY_S), 1)]
    sealing.seal(layout, put(layout, segment_bytes(epoch, 0, 0, frames, end=True), epoch), NOW_US)
    text = (
        f"select model, date::text, count(*) from '{layout.directory}/requests/**/*.parquet' group by all order by all"
    )
    expected = [("a/b", "2026-09-21", 1), ("digits", "2026-09-21", 1), ("digits", "2026-09-22", 1)]
    assert duckdb.connect().execute(text).fetchall() == expected
    table = pq.read_table(layout.directory / "requests")  # what pandas.read_parquet does
    found = sorted(zip(table["model"].to_pylist(), table["date"].to_pylist(), strict=True))
    assert found == [(model, day) for model, day, _ in expected]


def test_names_cannot_leave_their_partition() -> None:
    for name in ("..", ".", "../../etc", "a/b", "x=y", "date=2026-01-01", "%2e%2e", "ü\u202e", "a\nb", "~"):
        partition = segments.partition_name(name)
        assert "/" not in partition
        assert partition not in (".", "..")
        assert segments.model_of(partition) == name


def test_an_empty_segment_leaves_nothing(layout: Layout) -> None:
    epoch = new_epoch()
    one = put(layout, segment_bytes(epoch, 0, 0, [], end=False), epoch)
    assert sealing.seal(layout, one, NOW_US) is None
    assert not layout.segment(one).exists()
    assert layout.commits() == {}


def gaps(layout: Layout) -> list[tuple[int, dict[str, object]]]:
    tables = [pq.ParquetFile(path).read().to_pylist() for path in layout.parquet("gap")]
    return [(line["position"], json.loads(line["details"])) for table in tables for line in table]


def test_damage_in_the_middle_is_told_and_the_segment_is_kept(layout: Layout) -> None:
    epoch = new_epoch()
    data = bytearray(segment_bytes(epoch, 0, 10, [(encoded([n, n + 1]), 2) for n in range(0, 8, 2)], end=True))
    at = wal.HEADER_BYTES + wal.RECORD_BYTES + len(encoded([0, 1])) + 60
    data[at] ^= 0x10
    one = put(layout, bytes(data), epoch)
    commit = sealing.seal(layout, one, NOW_US)
    assert commit is not None
    assert [(loss.rows, loss.torn, loss.start <= at < loss.end) for loss in commit.losses] == [(2, False, True)]
    assert numbers_in_parquet(layout.directory) == [0, 1, 4, 5, 6, 7]
    ((position, details),) = gaps(layout)
    assert (position, details["rows"], details["reason"]) == (12, 2, "damaged")
    assert (layout.damaged / f"{one.name}.wal").read_bytes() == bytes(data)


def test_a_torn_tail_is_told_and_the_next_segment_says_how_much_it_was(layout: Layout) -> None:
    epoch = new_epoch()
    data = segment_bytes(epoch, 0, 0, [(encoded([1, 2]), 2), (encoded([3, 4, 5]), 3)], end=False)[:-1]
    one = put(layout, data, epoch, 0)
    commit = sealing.seal(layout, one, NOW_US)
    assert commit is not None
    assert [(loss.rows, loss.torn) for loss in commit.losses] == [(None, True)]
    assert [(position, details["rows"]) for position, details in gaps(layout)] == [(2, None)]
    layout.commit(one).unlink()
    put(layout, segment_bytes(epoch, 1, 5, [(encoded([6]), 1)], end=True), epoch, 1)
    commit = sealing.seal(layout, put(layout, data, epoch, 0), NOW_US)
    assert commit is not None
    assert [(loss.rows, loss.torn) for loss in commit.losses] == [(3, True)]
    assert [(position, details["rows"]) for position, details in gaps(layout)] == [(2, 3)]
    assert not layout.damaged.exists()


def test_frames_that_cannot_be_read_are_told_and_their_neighbours_kept(layout: Layout) -> None:
    epoch = new_epoch()
    bad = requests([7, 8])
    contradiction = Column("x", "FP64", None, [(1,)], b"odd", None, "keep", None)
    bad = msgspec.structs.replace(bad, inputs=[contradiction])
    frames = [(encoded([1]), 1), (b"no frame", 4), (frame.encode(bad), 2), (encoded([9]), 1)]
    one = put(layout, segment_bytes(epoch, 0, 0, frames, end=True), epoch)
    commit = sealing.seal(layout, one, NOW_US)
    assert commit is not None
    assert numbers_in_parquet(layout.directory) == [1, 9]
    assert sorted(loss.rows or 0 for loss in commit.losses) == [2, 4]
    assert sorted(position for position, _ in gaps(layout)) == [1, 5]
    assert (layout.damaged / f"{one.name}.wal").exists()


def test_a_reader_between_the_steps_sees_every_row_once(layout: Layout) -> None:
    one = filled(layout)
    seen = []

    def look(step: str) -> None:
        seen.append(step)
        rows = numbers_in_parquet(layout.directory) + numbers_in_wal(layout.directory)
        assert sorted(rows) == list(range(30)), step

    sealing.seal(layout, one, NOW_US, look)
    assert seen == ["read", "written", "shown", "committed", "removed"]


CHILD = """
import os, signal, sys
from pathlib import Path
from gateway.inference_log.sealer import Sealer
from gateway.inference_log.sealer_settings import SealerSettings
left = int(sys.argv[2])
def step(name):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
sealer = Sealer(SealerSettings(Path(sys.argv[1])), lambda: int(sys.argv[3]), step)
sealer.open()
sealer.seal()
sealer.keep()
sealer.report()
"""


@pytest.mark.slow
def test_a_sealer_killed_at_any_step_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Two segments of a past day are sealed and merged; the process is killed at its 1st, 2nd, 3rd … step."""
    for at in range(1, 100):
        layout = Layout(tmp_path / f"log{at}")
        epoch = new_epoch()
        for number in range(2):
            start = number * 30
            frames = [(encoded(range(n, n + 3)), 3) for n in range(start, start + 30, 3)]
            put(layout, segment_bytes(epoch, number, start, frames, end=True), epoch, number)
        command = [sys.executable, "-c", CHILD, str(layout.directory), str(at), str(NOW_US + 9 * DAY_S * 10**6)]
        if subprocess.run(command, check=False).returncode == 0:
            break
        assert sorted(numbers_in_parquet(layout.directory) + numbers_in_wal(layout.directory)) == list(range(60)), at
        successor = Sealer(SealerSettings(layout.directory), lambda: NOW_US + 9 * DAY_S * 10**6)
        successor.open()
        successor.seal()
        successor.keep()
        successor.close()
        assert sorted(numbers_in_parquet(layout.directory)) == list(range(60)), at
        leftovers = [path for path in layout.directory.rglob(".*") if path.is_file()]
        assert (layout.epochs(), layout.merges(), leftovers) == ([], [], []), at
        assert len(layout.parquet("requests")) == 1, at
    assert at > 12, "the steps were not there to be killed at"


def test_the_digests_that_rows_refer_to_are_known_until_the_rows_go(layout: Layout) -> None:
    for _ in range(2):
        one = filled(layout)
        sealing.seal(layout, one, NOW_US)
    assert sealing.digests(layout) == {"sha256:aa"}
    merging.merge_all(layout, [layout], NOW_US + DAY_S * 10**6, {})
    (merged,) = layout.parquet("requests")
    assert sealing.digests(layout) == {"sha256:aa"}
    merged.unlink()
    assert sealing.digests(layout) == set()
