"""Whether the log is what was written: checksums, commit records, and every position accounted for.

What is checked, and what counts as a fault:
* a Parquet file that a commit record or a merge names and that is gone, though retention did not record its deletion;
* one whose bytes are not those of the recorded SHA-256, or whose rows are not as many;
* a Parquet file that no record names;
* in a segment: a position that is there twice, or positions that are neither there, nor recorded as lost, nor deleted
  by retention; between segments of an epoch: positions that belong to none;
* damage in the middle of a WAL segment, sealed or not. Its rows are recorded as lost, but a disk or a hand did it.

Not a fault, and told: the torn tail of a process that was killed (rows that were never synced), and rows that were
dropped under load, which are gap records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from gateway.inference_log import wal
from gateway.inference_log.log_queries import explained
from gateway.inference_log.private_files import read_file
from gateway.inference_log.segments import Commit, Layout, Merge, Segment, StoredFile
from gateway.inference_log.store import VIEWS, LogReadError, Store

CHUNK_BYTES: Final = 1 << 20
MAX_FAULTS: Final = 1000


@dataclass(slots=True)
class Verdict:
    """What was found; texts name files relative to the log's directory."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    segments: int = 0
    files: int = 0
    rows: int = 0
    """Rows and events that are there."""
    lost_rows: int = 0
    """Recorded as lost when a segment was recovered."""
    dropped_rows: int = 0
    """Recorded as dropped under load."""

    @property
    def good(self) -> bool:
        return not self.faults

    def fault(self, text: str) -> None:
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(text)


def verify(store: Store) -> Verdict:
    """Check everything in the log's directory.

    Raises:
        LogReadError: it cannot be read at all.
    """
    verdict = Verdict()
    layout = store.layout
    # WAL first: a segment that is sealed while this runs is then met again as a commit record, and checked there.
    unsealed = {segment: one for one in store.wals for epoch in one.epochs() for segment in one.segments(epoch)}
    commits = layout.commits()
    spans = _check_wal(verdict, {s: one for s, one in unsealed.items() if s not in commits})
    deleted = _check_files(verdict, layout, commits.values(), _merges(layout))
    _check_positions(verdict, store, commits, spans, deleted)
    for commit in commits.values():
        _tell_losses(verdict, commit)
    verdict.segments = len(commits) + len(spans)
    return verdict


def _merges(layout: Layout) -> list[Merge]:
    done = [merge for ledger in layout.ledgers().values() for merge in ledger.merges]
    return done + [merge for _, merge in layout.merges()]


def _tell_losses(verdict: Verdict, commit: Commit) -> None:
    name = Segment(commit.epoch, commit.number).name
    for loss in commit.losses:
        verdict.lost_rows += loss.rows or 0
        if not loss.torn:
            verdict.fault(
                f"{name}: bytes {loss.start} to {loss.end} were damaged before it was sealed; {_many(loss.rows)}"
            )
        elif loss.rows != 0:
            verdict.notes.append(f"{name}: its writer was killed; {_many(loss.rows)} that were not synced yet")


def _many(rows: int | None) -> str:
    return "an unknown number of rows" if rows is None else f"{rows} rows"


def _check_wal(verdict: Verdict, unsealed: dict[Segment, Layout]) -> dict[Segment, tuple[int, int]]:
    """First and next position of every segment that is WAL."""
    spans = {}
    for segment, layout in sorted(unsealed.items(), key=lambda item: item[0]):
        try:
            reading = wal.read(read_file(layout.segment(segment)), segment.epoch, segment.number)
        except FileNotFoundError:
            continue
        place = f"wal/{segment.epoch}/{segment.number:08d}.wal"
        if reading.header is None and reading.records:
            verdict.fault(f"{place}: its header is damaged")
        for damage in reading.damages:
            if damage.torn:
                verdict.notes.append(
                    f"{place}: ends in {damage.end - damage.start} bytes that are no whole record (yet)"
                )
            else:
                verdict.fault(
                    f"{place}: bytes {damage.start} to {damage.end} are damaged; {_many(damage.rows)} are lost"
                )
        first = reading.header.first_position if reading.header else (reading.records or [_NOTHING])[0].position
        if reading.header is not None or reading.records:
            spans[segment] = (first, reading.next_position)
    return spans


_NOTHING: Final = wal.Record(0, 0, memoryview(b""))


def _check_files(
    verdict: Verdict, layout: Layout, commits: Iterable[Commit], merges: Iterable[Merge]
) -> dict[Segment, int]:
    """Rows of each segment that retention deleted. Checks each file that should be there; there may be no other."""
    replaced = {name: merge.output for merge in merges for name in merge.replaces}
    gone = _deleted_partitions(layout)
    deleted: dict[Segment, int] = {}
    expected: dict[str, StoredFile] = {}
    for commit in commits:
        for file in commit.files:
            current = file
            while current.path in replaced and not (layout.directory / current.path).exists():
                current = replaced[current.path]
            if str(Path(current.path).parent) in gone and not (layout.directory / current.path).exists():
                segment = Segment(commit.epoch, commit.number)
                deleted[segment] = deleted.get(segment, 0) + file.rows
            else:
                expected[current.path] = current
    for file in expected.values():
        _check_file(verdict, layout, file)
    found = {layout.relative(path) for stream in VIEWS for path in layout.parquet(stream, layout.snapshot())}
    for name in sorted(found - expected.keys() - replaced.keys()):
        if not _is_new(layout, name):
            verdict.fault(f"{name}: no commit record names this file")
    return deleted


def _is_new(layout: Layout, name: str) -> bool:
    """Whether a record of it was made since the records were read, or the file is gone again."""
    known = {file.path for commit in layout.commits().values() for file in commit.files}
    known |= {merge.output.path for merge in _merges(layout)}
    return name in known or not (layout.directory / name).exists()


def _deleted_partitions(layout: Layout) -> set[str]:
    """Partitions that retention's entries in the lifecycle stream name."""
    import pyarrow.parquet as pq  # noqa: PLC0415 — heavy

    found: set[str] = set()
    for path in layout.parquet("lifecycle"):
        table = pq.ParquetFile(path).read(columns=["kind", "details"])
        for kind, details in zip(table["kind"].to_pylist(), table["details"].to_pylist(), strict=True):
            if kind == "retention":
                found.add(_partition_in(details))
    return found


def _partition_in(details: str) -> str:
    import json  # noqa: PLC0415

    try:
        return str(json.loads(details).get("partition", ""))
    except (ValueError, AttributeError):
        return ""


def _check_file(verdict: Verdict, layout: Layout, file: StoredFile) -> None:
    import pyarrow as pa  # noqa: PLC0415 — heavy
    import pyarrow.parquet as pq  # noqa: PLC0415

    path = layout.directory / file.path
    try:
        if _sha256(path) != file.sha256.removeprefix("sha256:"):
            verdict.fault(f"{file.path}: its bytes are not those that were written: the SHA-256 differs")
            return
        rows = pq.ParquetFile(path).metadata.num_rows
    except FileNotFoundError:
        if any(file.path in merge.replaces for merge in _merges(layout)):
            return  # merged while this runs
        verdict.fault(f"{file.path}: this file is gone, and retention did not delete it")
    except (OSError, pa.ArrowException) as error:
        verdict.fault(f"{file.path}: cannot be read: {' '.join(str(error).split())[:200]}")
    else:
        verdict.files += 1
        if rows != file.rows:
            verdict.fault(f"{file.path}: holds {rows} rows, {file.rows} were written")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _check_positions(
    verdict: Verdict,
    store: Store,
    commits: dict[Segment, Commit],
    spans: dict[Segment, tuple[int, int]],
    deleted: dict[Segment, int],
) -> None:
    """Each position of each segment is there once, or recorded as lost or deleted."""
    every = {segment: (one.first_position, one.next_position) for segment, one in commits.items()} | spans
    for fault in _between(every):
        verdict.fault(fault)
    try:
        with explained():
            counts = _count(store, every)
        verdict.dropped_rows = _dropped(store)
    except LogReadError:
        if verdict.good:
            raise
        verdict.notes.append("positions were not counted, because files cannot be read")
        return
    verdict.rows = sum(rows for rows, _ in counts.values())
    for segment, commit in commits.items():
        rows, different = counts.get(segment, (0, 0))
        if rows > different:
            verdict.fault(f"{segment.name}: {rows - different} positions are there more than once")
        lost = sum(loss.rows or 0 for loss in commit.losses)
        missing = commit.next_position - commit.first_position - different - deleted.get(segment, 0)
        # Positions behind a torn tail are told by the following segment and lie outside this one's span.
        if missing > lost:
            verdict.fault(f"{segment.name}: {missing - lost} positions are missing and nothing says why")


def _between(spans: dict[Segment, tuple[int, int]]) -> Iterator[str]:
    before: Segment | None = None
    for segment in sorted(spans):
        first, end = spans[segment]
        if before is not None and before.epoch == segment.epoch and before.number + 1 == segment.number:
            expected = spans[before][1]
            if first < expected:
                yield f"{segment.name}: its positions begin at {first}, within those of the segment before ({expected})"
        if end < first:
            yield f"{segment.name}: its positions end before they begin"
        before = segment


def _count(store: Store, spans: dict[Segment, tuple[int, int]]) -> dict[Segment, tuple[int, int]]:
    """Segment → rows and events, and different positions among them."""
    import pyarrow as pa  # noqa: PLC0415 — heavy

    order = sorted(spans)
    table = pa.table(
        {
            "epoch": pa.array([segment.epoch for segment in order], pa.string()),
            "number": pa.array([segment.number for segment in order], pa.int64()),
            "first": pa.array([spans[segment][0] for segment in order], pa.int64()),
        }
    )
    kept = " union all ".join(
        f"select epoch, position from {view}"  # noqa: S608 — our names
        + (" where kind <> 'recovery'" if view == "gaps" else "")
        for view in VIEWS.values()
    )
    sql = (
        f"select s.epoch, s.number, count(*) as rows, count(distinct p.position) as different from ({kept}) as p "  # noqa: S608 — our names
        "asof join segments as s on p.epoch = s.epoch and p.position >= s.first group by s.epoch, s.number"
    )
    with store.opened() as connection:
        connection.register("segments", table)
        rows: list[dict[str, Any]] = connection.sql(sql).to_arrow_table().to_pylist()
    return {Segment(row["epoch"], row["number"]): (row["rows"], row["different"]) for row in rows}


def _dropped(store: Store) -> int:
    sql = "select sum(cast(details ->> 'rows' as bigint)) as rows from gaps where kind <> 'recovery'"
    with explained(), store.opened(["gap"]) as connection:
        (row,) = connection.sql(sql).to_arrow_table().to_pylist()
    return int(row["rows"] or 0)
