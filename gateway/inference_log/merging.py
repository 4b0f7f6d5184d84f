"""Small Parquet files become big ones, so that a day of a model is a few files however often segments were sealed.

What is merged: the files of a partition whose day is over, and the oldest files of the day that is under way once there
are many. Rows stay as they are and keep their epoch and position; the order of the files is that of their rows.

    merged file under a hidden name, synced → `sealed/merge-<id>.json` → renamed → replaced files removed → ledger

Rules: whoever reads through `segments.snapshot` sees every row once at any moment: while the merge's record exists, the
merged file counts if it has its name, else the files it replaces. Readers that only look for `*.parquet` may see the
rows twice for the moment between the renaming and the removal. A merge that was interrupted is finished, or forgotten
if it had not been renamed, before anything else is done. Rows that a configured sink has not shipped are left alone.

Commit records go the same way: those of segments whose WAL file is gone are folded into one ledger per day.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from gateway.inference_log import private_files, retention, sealing
from gateway.inference_log.sealing import Step, quiet
from gateway.inference_log.segments import Commit, Layout, Ledger, Merge

MANY: Final = 64
"""Files of a day that is not over, at which the oldest of them are merged; and commit records to fold at once."""
MAX_BYTES: Final = 256 << 20
"""No merge makes a bigger file, and none touches a file of half this size."""
LATE_US: Final = 15 * 60 * 1_000_000
"""A day counts as over this long after its end: until then rows of it may still be sealed."""
MERGED: Final = "merged-"


def merge_all(
    layout: Layout,
    wals: Sequence[Layout],
    now_us: int,
    shipped: Mapping[str, Mapping[str, int]],
    step: Step = quiet,
) -> int:
    """Merges what is to be merged; returns how many files became fewer. `wals`: where segments lie, spill included.

    Raises:
        OSError: the disk refused; nothing that counts has changed.
    """
    finish_merges(layout, step)
    today = _day(now_us - LATE_US)
    unsealed = frozenset(f"{segment.name}.parquet" for wal in wals for segment in wal.snapshot().wal)
    saved = 0
    for partition in retention.partitions(layout):
        for files in _groups(partition.path, unsealed, over=partition.date < today):
            if all(retention.is_shipped(path, shipped) for path in files):
                _merge(layout, partition, files, now_us, step)
                saved += len(files) - 1
    fold(layout, wals, now_us)
    return saved


def finish_merges(layout: Layout, step: Step = quiet) -> None:
    """Completes merges that were interrupted after their file got its name; forgets the others."""
    for path, merge in layout.merges():
        if (layout.directory / merge.output.path).exists():
            _finish(layout, path, merge, step)
        else:
            path.unlink()


def _groups(directory: Path, unsealed: frozenset[str], *, over: bool) -> list[list[Path]]:
    """Files to merge, each group into one; oldest first. `unsealed`: names of files whose segment is still WAL."""
    found = [path for path in sorted(directory.glob("[!.]*.parquet")) if path.name not in unsealed]
    small = [path for path in found if path.stat().st_size < MAX_BYTES // 2]
    if not over:
        small = [path for path in small if not path.name.startswith(MERGED)]
        small = small[:MANY] if len(small) >= MANY else []
    groups: list[list[Path]] = []
    room = 0
    for path in sorted(small, key=_order):
        size = path.stat().st_size
        if not groups or size > room:
            groups.append([])
            room = MAX_BYTES
        groups[-1].append(path)
        room -= size
    return [group for group in groups if len(group) > 1]


def _order(path: Path) -> str:
    """Sorts merged files to where the first of their files was."""
    return path.name.removeprefix(MERGED)


def _merge(layout: Layout, partition: retention.Partition, files: Sequence[Path], now_us: int, step: Step) -> None:
    first = _order(files[0]).removesuffix(".parquet")[:45]
    identity = f"{first}-{now_us}"
    output = sealing.ParquetFile(partition.path / f"{MERGED}{identity}.parquet", pq.read_schema(files[0]))
    try:
        _copy(files, output)
        extent = output.sync()
        stored = sealing.describe(layout, output, partition.stream, partition.model, partition.date, extent)
        step("merged")
        merge = Merge(stored, [layout.relative(path) for path in files], now_us)
        record = layout.sealed / f"merge-{identity}.json"
        private_files.write_json(record, merge)
        step("announced")
        output.show()
        step("shown")
    except BaseException:
        output.give_up()
        raise
    _finish(layout, record, merge, step)


def _copy(files: Sequence[Path], output: sealing.ParquetFile) -> None:
    """All rows, in row groups of the usual size."""
    waiting: list[Any] = []
    rows = 0
    for path in files:
        with pq.ParquetFile(path) as source:
            for batch in source.iter_batches(sealing.CHUNK_ROWS):
                waiting.append(batch)
                rows += len(batch)
                if rows >= sealing.CHUNK_ROWS:
                    output.add(pa.Table.from_batches(waiting))
                    waiting, rows = [], 0
    if waiting:
        output.add(pa.Table.from_batches(waiting))


def _finish(layout: Layout, record: Path, merge: Merge, step: Step) -> None:
    """The merged file counts: removes what it replaces and files the merge's record."""
    for name in merge.replaces:
        (layout.directory / name).unlink(missing_ok=True)
        step("removed")
    private_files.sync_directory((layout.directory / merge.output.path).parent)
    _file(layout, _day(merge.merged_us), [], [merge])
    step("filed")
    record.unlink()


def fold(layout: Layout, wals: Sequence[Layout], now_us: int, many: int = MANY) -> int:
    """Puts commit records whose WAL file is gone into the ledgers, once there are many of them; returns how many."""
    left = {segment for wal in wals for epoch in wal.epochs() for segment in wal.segments(epoch)}
    waiting = sorted(layout.committed() - left)
    found = [(segment, private_files.read_json(layout.commit(segment), Commit)) for segment in waiting]
    done = [(segment, commit) for segment, commit in found if commit and now_us - commit.sealed_us > 60_000_000]
    if len(done) < many:
        return 0
    for day in sorted({_day(commit.sealed_us) for _, commit in done}):
        _file(layout, day, [commit for _, commit in done if _day(commit.sealed_us) == day], [])
    for segment, _ in done:
        layout.commit(segment).unlink()
    return len(done)


def _file(layout: Layout, day: str, commits: list[Commit], merges: list[Merge]) -> None:
    """Adds entries to a day's ledger; those it has already are not added again."""
    path = layout.ledger(day)
    ledger = private_files.read_json(path, Ledger) if path.exists() else Ledger()
    if ledger is None:
        raise OSError(f"{path} cannot be read; put it back from a backup, or move it away")
    known = {(commit.epoch, commit.number) for commit in ledger.commits}
    outputs = {merge.output.path for merge in ledger.merges}
    ledger.commits += [commit for commit in commits if (commit.epoch, commit.number) not in known]
    ledger.merges += [merge for merge in merges if merge.output.path not in outputs]
    private_files.write_json(path, ledger)


def _day(us: int) -> str:
    return str(datetime.fromtimestamp(us / 1e6, UTC).date())
