"""Small files become big ones: the same rows, each once at every step, for every reader that asks the snapshot."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gateway.inference_log import merging, private_files, sealing, segments
from gateway.inference_log.segments import Layout, Segment
from tests.inference_log.log_rows import DAY_S, NOON, encoded, new_epoch, numbers_in_parquet, segment_bytes

LATER_US = (NOON + DAY_S) * 10**6


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "log")


def sealed(layout: Layout, count: int, at: float = NOON) -> str:
    """`count` segments of three rows each, a row of another model among them."""
    epoch = new_epoch()
    segments.prepare(layout.directory)
    private_files.make_directory(layout.epoch(epoch))
    for number in range(count):
        start = number * 3
        frames = [(encoded([start, start + 1], at=at), 2), (encoded([start + 2], "salary", at), 1)]
        one = Segment(epoch, number)
        layout.segment(one).write_bytes(segment_bytes(epoch, number, start, frames, end=True))
        sealing.seal(layout, one, NOON * 10**6)
    return epoch


def merge(layout: Layout, now_us: int = LATER_US, **options: object) -> int:
    return merging.merge_all(layout, [layout], now_us, options.get("shipped", {}), options.get("step", sealing.quiet))  # type: ignore[arg-type]


def test_a_day_that_is_over_becomes_one_file_a_model(layout: Layout) -> None:
    epoch = sealed(layout, 5)
    before = {file.path: file.rows for commit in layout.commits().values() for file in commit.files}
    assert merge(layout) == 8
    files = layout.parquet("requests")
    assert len(files) == 2
    assert sorted(numbers_in_parquet(layout.directory)) == list(range(15))
    for path in files:
        positions = pq.ParquetFile(path).read(columns=["position"])["position"].to_pylist()
        assert positions == sorted(positions)
    (ledger,) = layout.ledgers().values()
    assert {name for one in ledger.merges for name in one.replaces} == set(before)
    assert sum(one.output.rows for one in ledger.merges) == 15
    assert all((layout.directory / one.output.path).exists() for one in ledger.merges)
    assert {segment.epoch for segment in layout.commits()} == {epoch}
    assert merge(layout) == 0


def test_the_day_that_is_under_way_is_merged_only_once_there_are_many_files(layout: Layout) -> None:
    sealed(layout, merging.MANY - 1)
    assert merge(layout, NOON * 10**6) == 0
    sealed(layout, 1)
    assert merge(layout, NOON * 10**6) == 2 * (merging.MANY - 1)
    assert len(layout.parquet("requests")) == 2
    assert merge(layout, NOON * 10**6) == 0, "merged files of today are left until the day is over"


def test_a_reader_sees_every_row_once_at_every_step(layout: Layout) -> None:
    sealed(layout, 4)
    seen = []

    def look(step: str) -> None:
        seen.append(step)
        assert sorted(numbers_in_parquet(layout.directory)) == list(range(12)), step

    merge(layout, step=look)
    assert seen[:4] == ["merged", "announced", "shown", "removed"]
    assert seen.count("filed") == 2


class Dies(BaseException):
    """Stands for the process's end."""


@pytest.mark.parametrize("at", range(1, 10))
def test_an_interrupted_merge_is_finished_or_forgotten(layout: Layout, at: int) -> None:
    sealed(layout, 4)
    steps = iter(range(1, 1000))

    def dies(_: str) -> None:
        if next(steps) == at:
            raise Dies

    with pytest.raises(Dies):
        merge(layout, step=dies)
    assert sorted(numbers_in_parquet(layout.directory)) == list(range(12))
    merge(layout, LATER_US + 1)
    assert sorted(numbers_in_parquet(layout.directory)) == list(range(12))
    assert layout.merges() == []
    assert len(layout.parquet("requests")) == 2


def test_what_a_sink_has_not_shipped_is_left_alone(layout: Layout) -> None:
    epoch = sealed(layout, 4)
    assert merge(layout, shipped={"postgres": {epoch: 11}}) == 3  # the last row is of the other model
    assert merge(layout, shipped={"postgres": {epoch: 12}}) == 3


def test_leftovers_of_an_unfinished_sealing_are_not_merged(layout: Layout) -> None:
    """A file whose segment is still WAL will be made again: merged, its rows would be there twice."""
    epoch = sealed(layout, 3)
    one = Segment(epoch, 1)
    frames = [(encoded([3, 4]), 2), (encoded([5], "salary"), 1)]
    layout.segment(one).parent.mkdir(exist_ok=True)
    layout.segment(one).write_bytes(segment_bytes(epoch, 1, 3, frames, end=True))
    layout.commit(one).unlink()
    assert merge(layout) == 2
    sealing.seal(layout, one, LATER_US)
    assert sorted(numbers_in_parquet(layout.directory)) == list(range(9))


def test_commit_records_are_folded_once_there_are_many(layout: Layout) -> None:
    sealed(layout, 5)
    before = layout.commits()
    assert merging.fold(layout, [layout], LATER_US, many=6) == 0
    assert merging.fold(layout, [layout], LATER_US, many=5) == 5
    assert layout.committed() == set()
    assert layout.commits() == before
    assert merging.fold(layout, [layout], LATER_US, many=0) == 0


def test_a_commit_record_stays_while_its_wal_file_is_there(layout: Layout, tmp_path: Path) -> None:
    """Of a spilt segment too, whose WAL lies elsewhere: without the record it would be sealed again."""
    epoch = sealed(layout, 2)
    spill = Layout(layout.directory, tmp_path / "spill")
    private_files.make_directory(spill.epoch(epoch))
    spill.segment(Segment(epoch, 1)).write_bytes(b"")
    assert merging.fold(layout, [layout, spill], LATER_US, many=1) == 1
    assert layout.committed() == {Segment(epoch, 1)}
