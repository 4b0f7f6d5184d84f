"""Verification: an untouched log is good, in whatever state; every kind of tampering and loss is found and named."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gateway.inference_log import merging, private_files, retention, segments, wal
from gateway.inference_log.sealer import seal_by_hand
from gateway.inference_log.sealer_settings import SealerSettings
from gateway.inference_log.segments import Layout, Segment
from gateway.inference_log.store import Store
from gateway.inference_log.verification import Verdict, verify
from tests.inference_log.log_on_disk import event, seal, write
from tests.inference_log.log_rows import encoded, new_epoch, requests, segment_bytes


def verdict(log: Path) -> Verdict:
    return verify(Store(log))


def sealed_log(log: Path) -> Path:
    """Two epochs; the first has several segments' worth of rows of two models and a gap."""
    write(log, [requests(range(50)), requests(range(50, 60), "salary"), event("gap", "dropped", {"rows": 3})])
    write(log, [requests(range(60, 70))])
    seal(log)
    return log


def parquet(log: Path, stream: str = "requests", model: str = "*") -> Path:
    below = f"model={model}/date=*" if stream == "requests" else "date=*"
    return min((log / stream).glob(f"{below}/*.parquet"))


def test_an_untouched_log_is_good(tmp_path: Path) -> None:
    sealed_log(tmp_path)
    write(tmp_path, [requests(range(5))])
    found = verdict(tmp_path)
    assert (found.faults, found.notes) == ([], [])
    assert (found.rows, found.dropped_rows, found.lost_rows, found.segments) == (76, 3, 0, 3)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def rewritten(path: Path) -> None:
    """A forger's work: a readable file, one row fewer."""
    table = pq.ParquetFile(path).read()
    pq.write_table(table.slice(1), path)


def relisted(log: Path) -> None:
    """… who fixed the commit record's digest as well."""
    path = parquet(log, model="digits")
    rewritten(path)
    layout = Layout(log)
    for segment, commit in layout.commits().items():
        files = [
            segments.StoredFile(
                file.path,
                file.stream,
                file.rows - 1 if log / file.path == path else file.rows,
                path.stat().st_size,
                __import__("hashlib").sha256((log / file.path).read_bytes()).hexdigest(),
                file.first_us,
                file.last_us,
                file.model,
                file.date,
            )
            for file in commit.files
        ]
        fields = {name: getattr(commit, name) for name in commit.__struct_fields__} | {"files": files}
        private_files.write_json(layout.commit(segment), segments.Commit(**fields))


TAMPERING: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit flipped": (lambda log: flip(parquet(log), 100), "the SHA-256 differs"),
    "a row removed": (lambda log: rewritten(parquet(log)), "the SHA-256 differs"),
    "a row removed, record forged": (relisted, "1 positions are missing and nothing says why"),
    "a file removed": (lambda log: parquet(log).unlink(), "is gone, and retention did not delete it"),
    "a file copied": (
        lambda log: parquet(log).with_name("merged-x.parquet").write_bytes(parquet(log).read_bytes()),
        "no commit record names this file",
    ),
    "a gap record removed": (lambda log: parquet(log, "gap").unlink(), "is gone"),
}


@pytest.mark.parametrize("name", TAMPERING)
def test_tampering_is_found(tmp_path: Path, name: str) -> None:
    tamper, said = TAMPERING[name]
    tamper(sealed_log(tmp_path))
    faults = verdict(tmp_path).faults
    assert any(said in fault for fault in faults), faults
    assert not any(str(tmp_path) in fault for fault in faults)


def test_doubled_rows_are_found_even_where_records_name_them(tmp_path: Path) -> None:
    sealed_log(tmp_path)
    path = parquet(tmp_path, model="salary")
    table = pq.ParquetFile(path).read()
    copy = path.with_name(path.name.replace("00000000.parquet", "00000007.parquet"))
    pq.write_table(table, copy)
    faults = verdict(tmp_path).faults
    assert any("are there more than once" in fault for fault in faults), faults


def test_a_damaged_wal_segment_is_a_fault_a_torn_tail_is_not(tmp_path: Path) -> None:
    epoch = write(tmp_path, [requests(range(5)), requests(range(5, 9)), requests(range(9, 12))])
    path = tmp_path / "wal" / epoch / "00000000.wal"
    whole = path.read_bytes()
    path.write_bytes(whole[:-60])
    found = verdict(tmp_path)
    assert found.faults == []
    assert any("no whole record" in note for note in found.notes)
    reading = wal.read(whole, epoch, 0)
    middle = reading.records[1]
    at = whole.find(bytes(middle.payload)) + 5
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    found = verdict(tmp_path)
    assert any("are damaged; 4 rows are lost" in fault for fault in found.faults)
    seal(tmp_path)
    after = verdict(tmp_path)
    assert any("were damaged before it was sealed; 4 rows" in fault for fault in after.faults)
    assert (after.lost_rows, len(after.faults)) == (4, 1)


def test_a_missing_segment_is_a_fault(tmp_path: Path) -> None:
    """Positions tell, though neither of its neighbours is damaged."""
    sealed_log(tmp_path)
    layout = Layout(tmp_path)
    first = min(layout.commits())
    commit = layout.commits()[first]
    moved = {name: getattr(commit, name) for name in commit.__struct_fields__}
    moved |= {"next_position": commit.next_position + 5}
    private_files.write_json(layout.commit(first), segments.Commit(**moved))
    assert any("5 positions are missing" in fault for fault in verdict(tmp_path).faults)


def test_segments_whose_positions_overlap_are_a_fault(tmp_path: Path) -> None:
    layout, epoch = segments.prepare(tmp_path), new_epoch()
    private_files.make_directory(layout.epoch(epoch))
    for number, first in enumerate((0, 3)):
        data = segment_bytes(epoch, number, first, [(encoded(range(5)), 5)], end=True)
        layout.segment(Segment(epoch, number)).write_bytes(data)
    name = Segment(epoch, 1).name
    assert f"{name}: its positions begin at 3, within those of the segment before (5)" in verdict(tmp_path).faults


def test_what_retention_deleted_is_no_fault(tmp_path: Path) -> None:
    sealed_log(tmp_path)
    policy = retention.RetentionPolicy(1, {"salary": 36_000})
    later = time.time_ns() // 1000 + 400 * 86_400_000_000
    deleted = retention.apply(Layout(tmp_path), policy, later, {})
    assert deleted.partitions >= 1
    assert list(tmp_path.glob("requests/model=digits/*/*.parquet")) == []
    seal_by_hand(SealerSettings(tmp_path, policy=retention.RetentionPolicy(36_000)))
    found = verdict(tmp_path)
    assert found.faults == []


def test_merging_is_no_fault(tmp_path: Path) -> None:
    for n in range(4):
        write(tmp_path, [requests(range(n * 10, n * 10 + 10))])
    seal(tmp_path)
    merging.merge_all(Layout(tmp_path), [Layout(tmp_path)], time.time_ns() // 1000 + 10 * 86_400_000_000, {})
    assert len(list(tmp_path.glob("requests/model=digits/*/*.parquet"))) == 1
    found = verdict(tmp_path)
    assert (found.faults, found.rows) == ([], 40)
    (merged,) = tmp_path.glob("requests/model=digits/*/merged-*.parquet")
    flip(merged, 200)
    assert any("SHA-256 differs" in fault for fault in verdict(tmp_path).faults)


def test_the_verdict_is_the_same_before_and_after_sealing(tmp_path: Path) -> None:
    write(tmp_path, [requests(range(7)), event("lifecycle", "loaded", {}), requests(range(7, 9), "")])
    before = verdict(tmp_path)
    seal(tmp_path)
    after = verdict(tmp_path)
    assert (before.rows, before.faults) == (after.rows, after.faults) == (10, [])
    assert json.loads(json.dumps(before.faults)) == []
