"""The directory: what lies where, and what a snapshot says is to be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ConfigError
from gateway.inference_log import private_files, segments
from gateway.inference_log.segments import Commit, Layout, Merge, Segment, StoredFile
from tests.inference_log.log_rows import new_epoch


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return segments.prepare(tmp_path / "log")


def place(layout: Layout, *names: str) -> list[Path]:
    paths = [layout.directory / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return paths


def test_epochs_are_ordered_by_their_start() -> None:
    earlier, later = segments.new_epoch(1000, os.urandom(10)), segments.new_epoch(1001, os.urandom(10))
    assert earlier < later
    assert (earlier[14], earlier[19] in "89ab") == ("7", True)


def test_a_segment_is_read_from_one_place_only(layout: Layout) -> None:
    epoch = new_epoch()
    both, unsealed, sealed = (Segment(epoch, number) for number in range(3))
    place(layout, *(f"wal/{epoch}/{one.number:08d}.wal" for one in (both, unsealed)))
    files = {
        one: place(layout, f"requests/model=m/date=2026-01-01/{one.name}.parquet")[0]
        for one in (both, unsealed, sealed)
    }
    for one in (both, sealed):
        private_files.write_json(layout.commit(one), Commit(epoch, one.number, 0, 0, 0, 0, "", 0, []))
    snapshot = layout.snapshot()
    assert snapshot.wal == (unsealed,)
    assert layout.parquet("requests", snapshot) == [files[both], files[sealed]]


@pytest.mark.parametrize(
    "model", ["..", ".", "...", "../../etc", "/etc", "a/b", "a\\b", "%2e%2e", "", "\n", "é", "a=b", "~"]
)
def test_a_model_s_name_never_leaves_its_partition(layout: Layout, model: str) -> None:
    check_partition(layout, model)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_no_name_leaves_its_partition(model: str) -> None:
    check_partition(Layout(Path("/log")), model)


def check_partition(layout: Layout, model: str) -> None:
    name = segments.partition_name(model)
    assert "/" not in name
    assert name.strip(".")
    assert name.isprintable()
    assert segments.model_of(name) == (model or segments.UNRESOLVED)
    path = layout.partition("requests", "2026-01-01", model)
    home = layout.directory / "requests"
    assert os.path.normpath(path) == str(path)
    assert path.parent.parent == home
    assert (path.parent.name, path.name) == (f"model={name}", "date=2026-01-01")


def test_a_merge_counts_from_the_moment_its_file_has_its_name(layout: Layout) -> None:
    home = "requests/model=m/date=2026-01-01/"
    small = place(layout, home + "a.parquet", home + "b.parquet")
    output = StoredFile(home + "merged.parquet", "requests", 0, 0, "", 0, 0)
    private_files.write_json(
        layout.sealed / "merge-x.json", Merge(output, [layout.relative(path) for path in small], 0)
    )
    assert layout.parquet("requests", layout.snapshot()) == small
    merged = place(layout, output.path)
    assert layout.parquet("requests", layout.snapshot()) == merged


def test_hidden_and_foreign_files_are_not_read(layout: Layout) -> None:
    place(layout, "requests/model=m/date=2026-01-01/.x.parquet.tmp", "requests/model=m/date=2026-01-01/note.txt")
    place(layout, "wal/not-an-epoch/00000000.wal", f"wal/{new_epoch()}/1.wal", "sealed/x.json", "sealed/ledger-.tmp")
    assert layout.parquet("requests") == []
    assert (layout.snapshot().wal, layout.commits()) == ((), {})


def test_a_lock_is_held_by_one_and_ends_with_its_descriptor(layout: Layout) -> None:
    epoch = new_epoch()
    private_files.make_directory(layout.epoch(epoch))
    assert not segments.is_alive(layout, epoch)
    path = layout.epoch(epoch) / "lock"
    lock = private_files.take_lock(path)
    assert lock is not None
    assert segments.is_alive(layout, epoch)
    assert private_files.take_lock(path) is None
    os.close(lock)
    assert not segments.is_alive(layout, epoch)


def test_a_room_that_is_not_ours_is_refused(layout: Layout) -> None:
    layout.holds.chmod(0o777)
    with pytest.raises(ConfigError, match="chmod 700"):
        segments.prepare(layout.directory)
    if os.geteuid() == 0:
        layout.holds.chmod(0o700)
        os.chown(layout.holds, 12345, 12345)
        with pytest.raises(ConfigError, match="belongs to another user"):
            segments.prepare(layout.directory)
