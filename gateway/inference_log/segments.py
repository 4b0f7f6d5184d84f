"""The directory of the inference log: what lies where, who owns what, and which copy of a segment is the one to read.

    <dir>/wal/<epoch>/lock                        held (flock) by the process that writes this epoch
    <dir>/wal/<epoch>/<nnnnnnnn>.wal              segments, see `wal.py`
    <dir>/requests/model=<m>/date=<d>/*.parquet   rows, by the UTC date on which the request was received
    <dir>/<stream>/date=<d>/*.parquet             the side streams: lifecycle, gap, feedback, access
    <dir>/sealed/<epoch>-<nnnnnnnn>.json          commit record of one segment: its Parquet files, rows and digests
    <dir>/sealed/merge-<id>.json                  a merge of small files that is under way (`merging.py`)
    <dir>/sealed/ledger-<d>.json                  commit records and merges of earlier, in one file per day
    <dir>/damaged/<epoch>-<nnnnnnnn>.wal          segments that were damaged in their middle, kept as they were found
    <dir>/holds/<name>.json                       legal holds (`retention.py`)
    <dir>/sinks/<name>.json                       how far a sink has come
    <dir>/sealer.json                             what the sealer did last

Rules:
* A segment is read from its commit record's Parquet files if that record exists, else from its WAL file, never from
  both. The commit record is the one atomic step of sealing: before it the WAL counts and Parquet files of that name
  are leftovers, after it the WAL file is a leftover.
* An epoch without a living owner (nobody holds its lock) is *orphaned*; only the sealer touches it then, holding that
  lock itself. A segment of a living epoch is final once it ends with the end record or a later one exists.
* The directory itself is a real one that belongs to the user of this process and that no one else can write to; how
  files come to lie in it: `private_files.py`.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID

import msgspec

from gateway.errors import ConfigError
from gateway.inference_log import wal
from gateway.inference_log.private_files import make_directory, open_new, read_file, read_json

SIDE_STREAMS: Final = ("lifecycle", "gap", "feedback", "access")
STREAMS: Final = ("requests", *SIDE_STREAMS)
UNRESOLVED: Final = "__unresolved__"
"""Partition of requests whose model is none of ours, so that what strangers ask for makes no directories."""
_EPOCH: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")
_SEGMENT: Final = re.compile(r"(\d{8,10})\.wal")
_PARQUET: Final = re.compile(rf"({_EPOCH.pattern})-(\d{{8,10}})\.parquet")
_COMMIT: Final = re.compile(rf"({_EPOCH.pattern})-(\d{{8,10}})\.json")


@dataclass(frozen=True, slots=True, order=True)
class Segment:
    """One segment, wherever it lies. Ordered as it was written."""

    epoch: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.epoch}-{self.number:08d}"


class StoredFile(msgspec.Struct, frozen=True):
    """One Parquet file as its commit record knows it."""

    path: str
    """Relative to the log's directory."""
    stream: str
    rows: int
    bytes: int
    sha256: str
    first_us: int
    """Time of the earliest row, microseconds since 1970 UTC; 0 where a row states none."""
    last_us: int
    model: str = ""
    """The partition's; empty for side streams."""
    date: str = ""


class Loss(msgspec.Struct, frozen=True):
    """Bytes of a segment that could not be recovered."""

    start: int
    end: int
    rows: int | None
    """None where it cannot be known: the torn tail of a process that was killed."""
    torn: bool


class Commit(msgspec.Struct, frozen=True):
    """The commit record of one sealed segment."""

    epoch: str
    number: int
    first_position: int
    next_position: int
    rows: int
    """Rows and events of all files together."""
    wal_bytes: int
    wal_sha256: str
    sealed_us: int
    files: list[StoredFile]
    losses: list[Loss] = []
    digests: list[str] = []
    """Of the model versions its rows are of."""
    format: int = 1


class Merge(msgspec.Struct, frozen=True):
    """Small files of one partition that became one. `replaces` are paths relative to the log's directory."""

    output: StoredFile
    replaces: list[str]
    merged_us: int


class SealerState(msgspec.Struct, frozen=True):
    """What the sealer did last; `<dir>/sealer.json`."""

    pid: int
    at_us: int
    """When this was written, microseconds since 1970 UTC."""
    sealed_segments: int = 0
    """By this process, as the other counts."""
    sealed_rows: int = 0
    sealed_bytes: int = 0
    """Of Parquet."""
    lost_rows: int = 0
    """Rows that segments it recovered had lost, as far as that can be known."""
    damaged_segments: int = 0
    waiting_segments: int = 0
    """WAL files that will not grow any more and are not sealed yet."""
    waiting_bytes: int = 0
    """Of all WAL files."""
    disk_bytes: int = 0
    """Of the whole directory, spill included."""
    over_limit: bool = False
    """Whether that is more than `max_disk_gb`. Nothing is deleted for it."""
    deleted_partitions: int = 0
    holds: int = 0
    failing: str | None = None
    """What the disk, a hold or a segment says at present; None while all is well."""


class Ledger(msgspec.Struct):
    """Commit records and merges of one UTC day, folded into one file."""

    commits: list[Commit] = []
    merges: list[Merge] = []


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What there is to read at one instant. Listing WAL files before commit records makes it exact."""

    wal: tuple[Segment, ...]
    """Segments to read from the WAL, in order."""
    excluded: frozenset[str] = field(repr=False)
    """Parquet files that do not count, relative to the directory."""


class Layout:
    """Paths below one log directory. Makes nothing by itself but what `prepare` says."""

    def __init__(self, directory: Path, wal_in: Path | None = None) -> None:
        """`wal_in`: where the WAL lies, if not in the directory itself: a spill directory is sealed into the log's."""
        self.directory = directory
        self.wal = (wal_in or directory) / "wal"
        self.damaged = directory / "damaged"
        self.sealed = directory / "sealed"
        self.holds = directory / "holds"
        self.sinks = directory / "sinks"
        self.sealer_state = directory / "sealer.json"

    def __repr__(self) -> str:
        return f"Layout({self.directory})"

    def epoch(self, epoch: str) -> Path:
        return self.wal / epoch

    def segment(self, segment: Segment) -> Path:
        return self.wal / segment.epoch / f"{segment.number:08d}.wal"

    def commit(self, segment: Segment) -> Path:
        return self.sealed / f"{segment.name}.json"

    def ledger(self, date: str) -> Path:
        return self.sealed / f"ledger-{date}.json"

    def partition(self, stream: str, date: str, model: str = "") -> Path:
        """Directory of the files of one stream and day; of one model too for `requests`."""
        below = self.directory / stream
        return (below / f"model={partition_name(model)}" if stream == "requests" else below) / f"date={date}"

    def relative(self, path: Path) -> str:
        return str(path.relative_to(self.directory))

    def epochs(self) -> list[str]:
        """Epochs that have a directory under `wal/`, oldest first."""
        return sorted(name for name in _names(self.wal) if _EPOCH.fullmatch(name))

    def segments(self, epoch: str) -> list[Segment]:
        """Segments of an epoch that have a WAL file, in order."""
        found = (_SEGMENT.fullmatch(name) for name in _names(self.epoch(epoch)))
        return sorted(Segment(epoch, int(match[1])) for match in found if match)

    def commits(self) -> dict[Segment, Commit]:
        """Every commit record that is kept, folded ones included. A record that cannot be read is left out."""
        found: dict[Segment, Commit] = {}
        for name in _names(self.sealed):
            if _COMMIT.fullmatch(name) and (commit := read_json(self.sealed / name, Commit)):
                found[Segment(commit.epoch, commit.number)] = commit
        for ledger in self.ledgers().values():
            for commit in ledger.commits:
                found.setdefault(Segment(commit.epoch, commit.number), commit)
        return found

    def ledgers(self) -> dict[str, Ledger]:
        """Day → ledger."""
        found = {}
        for name in _names(self.sealed):
            if name.startswith("ledger-") and name.endswith(".json") and (one := read_json(self.sealed / name, Ledger)):
                found[name.removeprefix("ledger-").removesuffix(".json")] = one
        return dict(sorted(found.items()))

    def committed(self) -> set[Segment]:
        """Segments with a commit record of their own: those whose WAL file may still be there. Reads no file."""
        found = (_COMMIT.fullmatch(name) for name in _names(self.sealed))
        return {Segment(match[1], int(match[2])) for match in found if match}

    def merges(self) -> list[tuple[Path, Merge]]:
        """Merges under way, with the file that says so."""
        paths = [self.sealed / name for name in _names(self.sealed) if name.startswith("merge-")]
        return [(path, merge) for path in sorted(paths) if (merge := read_json(path, Merge))]

    def snapshot(self) -> Snapshot:
        """What is to be read now. A WAL file that is gone when it is opened has been sealed: take a new snapshot."""
        everything = [segment for epoch in self.epochs() for segment in self.segments(epoch)]
        committed = self.committed()
        unsealed = [segment for segment in everything if segment not in committed]
        excluded = set(self._leftovers(unsealed)) if unsealed else set()
        for _, merge in self.merges():
            excluded.update(merge.replaces if (self.directory / merge.output.path).exists() else [merge.output.path])
        return Snapshot(tuple(unsealed), frozenset(excluded))

    def parquet(self, stream: str, snapshot: Snapshot | None = None) -> list[Path]:
        """The files of a stream that count, sorted. All of them without a snapshot."""
        found = sorted((self.directory / stream).rglob("[!.]*.parquet"))
        if snapshot is None or not snapshot.excluded:
            return found
        return [path for path in found if self.relative(path) not in snapshot.excluded]

    def _leftovers(self, unsealed: list[Segment]) -> Iterator[str]:
        """Parquet files of segments whose commit record is missing."""
        names = {f"{segment.name}.parquet" for segment in unsealed}
        for stream in STREAMS:
            for path in (self.directory / stream).rglob("[!.]*.parquet"):
                if path.name in names:
                    yield self.relative(path)


def partition_name(model: str) -> str:
    """A model's name as a directory: percent-encoded where it is not plain, as Hive-style readers expect."""
    quoted = urllib.parse.quote(model or UNRESOLVED, safe=" -_.+@,;!()[]{}~^$&'")
    return quoted if quoted.strip(".") else quoted.replace(".", "%2E")


def model_of(partition: str) -> str:
    """The reverse of `partition_name`."""
    return urllib.parse.unquote(partition)


def new_epoch(unix_ms: int, rand: bytes) -> str:
    """UUIDv7 text of a process start. `rand`: 10 bytes from a good source."""
    high = (unix_ms & 0xFFFF_FFFF_FFFF) << 16 | 0x7000 | int.from_bytes(rand[:2], "big") & 0x0FFF
    low = 0x8000_0000_0000_0000 | int.from_bytes(rand[2:10], "big") & 0x3FFF_FFFF_FFFF_FFFF
    return str(UUID(int=high << 64 | low))


def prepare(directory: Path, what: str = "inference_log.directory:") -> Layout:
    """Makes the directory and its rooms; checks that it is ours alone. `what`: the configuration's key, for the text.

    Raises:
        ConfigError: it cannot be made, is a link, or belongs to or is writable by somebody else.
    """
    layout = Layout(directory)
    try:
        make_directory(directory)
        _check_ours(directory, what)
        for room in (layout.wal, layout.sealed, layout.holds, layout.sinks):
            make_directory(room)
            _check_ours(room, what)
        probe = directory / f".probe-{os.getpid()}"
        with open_new(probe):
            pass
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{what} {directory} cannot be used: {error.strerror}; choose another or fix it") from None
    return layout


def _check_ours(directory: Path, what: str) -> None:
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{what} {directory} is not a directory (links are not followed); choose another")
    if found.st_uid != os.geteuid():
        raise ConfigError(f"{what} {directory} belongs to another user; chown it or choose another")
    if found.st_mode & 0o022:
        raise ConfigError(f"{what} {directory} can be written to by others; run chmod 700 {directory}")


def is_alive(layout: Layout, epoch: str) -> bool:
    """Whether some process holds the epoch: its writer, or the sealer that recovers it."""
    try:
        descriptor = os.open(layout.epoch(epoch) / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def is_final(layout: Layout, segment: Segment) -> bool:
    """Whether a living epoch's segment will not grow any more: it ends with its end record."""
    path = layout.segment(segment)
    size = path.stat().st_size
    tail = read_file(path, max(0, size - wal.RECORD_BYTES))
    return wal.is_end(tail, segment.epoch, segment.number)


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)  # noqa: PTH208 — names, not paths: there may be many
    except FileNotFoundError:
        return []
