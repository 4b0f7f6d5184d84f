"""The directory: what a snapshot says is to be read, and files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ConfigError
from gateway.inference_log import segments
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
        segments.write_json(layout.commit(one), Commit(epoch, one.number, 0, 0, 0, 0, "", 0, []))
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


def test_everything_is_private_even_under_a_umask_that_takes_our_own_rights(layout: Layout) -> None:
    earlier = layout.directory / "earlier"
    earlier.write_bytes(b"long content of before")
    earlier.chmod(0o644)
    before = os.umask(0o777)
    try:
        segments.make_directory(layout.directory / "a" / "b")
        for name in ("new", "earlier"):
            with segments.open_new(layout.directory / name) as stream:
                stream.write(b"x")
    finally:
        os.umask(before)
    modes = [(layout.directory / name).stat().st_mode & 0o777 for name in ("a", "a/b", "new", "earlier")]
    assert modes == [0o700, 0o700, 0o600, 0o600]
    assert earlier.read_bytes() == b"x"


def test_a_lock_is_not_taken_through_a_link(layout: Layout, tmp_path: Path) -> None:
    (layout.directory / "sealer.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        segments.take_lock(layout.directory / "sealer.lock")
    assert not (tmp_path / "elsewhere").exists()


def test_a_merge_counts_from_the_moment_its_file_has_its_name(layout: Layout) -> None:
    home = "requests/model=m/date=2026-01-01/"
    small = place(layout, home + "a.parquet", home + "b.parquet")
    output = StoredFile(home + "merged.parquet", "requests", 0, 0, "", 0, 0)
    segments.write_json(layout.sealed / "merge-x.json", Merge(output, [layout.relative(path) for path in small], 0))
    assert layout.parquet("requests", layout.snapshot()) == small
    merged = place(layout, output.path)
    assert layout.parquet("requests", layout.snapshot()) == merged


def test_hidden_and_foreign_files_are_not_read(layout: Layout) -> None:
    place(layout, "requests/model=m/date=2026-01-01/.x.parquet.tmp", "requests/model=m/date=2026-01-01/note.txt")
    place(layout, "wal/not-an-epoch/00000000.wal", f"wal/{new_epoch()}/1.wal", "sealed/x.json", "sealed/ledger-.tmp")
    assert layout.parquet("requests") == []
    assert (layout.snapshot().wal, layout.commits()) == ((), {})


def test_a_file_is_there_whole_or_not_at_all(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    path = layout.directory / "x.json"
    segments.write_json(path, {"a": 1})

    def dies(_: int) -> None:
        raise OSError("no power")

    monkeypatch.setattr(os, "fsync", dies)
    with pytest.raises(OSError, match="no power"):
        segments.write_json(path, {"a": 2})
    assert msgspec.json.decode(path.read_bytes()) == {"a": 1}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"epoch": 5}', b"\xff"])
def test_a_record_that_cannot_be_read_is_none(layout: Layout, content: bytes) -> None:
    path = layout.directory / "broken.json"
    path.write_bytes(content)
    assert segments.read_json(path, Commit) is None
    assert segments.read_json(layout.directory / "missing.json", Commit) is None


def test_links_are_not_followed(layout: Layout, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    link = layout.directory / "link"
    link.symlink_to(secret)
    with pytest.raises(OSError, match="symbolic link"):
        segments.read_file(link)
    with pytest.raises(OSError, match="symbolic link"), segments.open_new(link):
        pass
    assert secret.read_bytes() == b"secret"


def test_a_lock_is_held_by_one_and_ends_with_its_descriptor(layout: Layout) -> None:
    epoch = new_epoch()
    segments.make_directory(layout.epoch(epoch))
    assert not segments.is_alive(layout, epoch)
    path = layout.epoch(epoch) / "lock"
    lock = segments.take_lock(path)
    assert lock is not None
    assert segments.is_alive(layout, epoch)
    assert segments.take_lock(path) is None
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
