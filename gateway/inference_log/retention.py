"""How long the log is kept: what may go, what must stay whatever else is wished, and what is written down about it.

Whole partitions go, a model's day at a time, once every row in them is older than the model's `retention_days`. Rules,
the strongest first:
* A **legal hold** keeps everything it names, for as long as its file is there. A hold that cannot be read keeps
  everything: nobody knows what it names.
* What a configured **sink** has not shipped stays.
* Retention is a promise in both directions: nothing goes earlier because a disk fills up. `max_disk_gb` is an alarm
  (`over_limit` in the sealer's state), never a reason to delete.
* The `lifecycle` stream is never deleted: it is small, and it is where the deletions stand. Other side streams are kept
  as long as the model that is kept longest.
* A deletion is recorded in `lifecycle` (synced) **before** it is done: a process killed in between deletes the rest
  later and records that too.

Pure parts take the day as an argument; `apply` is what touches files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec

from gateway.errors import ConfigError
from gateway.inference_log import private_files, segments
from gateway.inference_log.frame import Event
from gateway.inference_log.segments import Layout
from gateway.inference_log.writer import write_events

MIN_DAYS: Final = 183
"""At least six months, as the AI Act's Articles 19 and 26(6) ask of logs; less needs `allow_short_retention`."""
HOLD_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DATE: Final = re.compile(r"date=(\d{4}-\d\d-\d\d)")


class RetentionPolicy(msgspec.Struct, frozen=True):
    """Days for which rows are kept, counted from the end of their day."""

    days: int = MIN_DAYS
    models: dict[str, int] = {}
    """Models with a rule of their own."""

    def of(self, stream: str, model: str) -> int | None:
        """Days for a partition; None: for ever."""
        if stream == "lifecycle":
            return None
        return self.models.get(model, self.days) if stream == "requests" else max([self.days, *self.models.values()])


class Hold(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A legal hold: rows that must not go, whatever retention says."""

    name: str
    reason: str
    by: str
    at: str
    """When it was placed, RFC 3339."""
    models: list[str] = []
    """Empty: all of them."""
    first: str = ""
    """First UTC date it covers, YYYY-MM-DD; empty: from the beginning."""
    last: str = ""
    """Last UTC date; empty: open end."""

    def covers(self, stream: str, model: str, day: str) -> bool:
        mine = stream != "requests" or not self.models or model in self.models
        return mine and self.first <= day and (not self.last or day <= self.last)


@dataclass(frozen=True, slots=True)
class Partition:
    """The files of one stream and day; of one model too for `requests`."""

    stream: str
    model: str
    date: str
    path: Path


@dataclass(frozen=True, slots=True)
class Holds:
    held: tuple[Hold, ...]
    unreadable: tuple[str, ...]
    """Names of hold files that say nothing intelligible. While there is one, nothing is deleted."""

    def keep(self, partition: Partition) -> bool:
        covered = (hold.covers(partition.stream, partition.model, partition.date) for hold in self.held)
        return bool(self.unreadable) or any(covered)


def holds(layout: Layout) -> Holds:
    """All holds in force."""
    held: list[Hold] = []
    unreadable: list[str] = []
    for path in sorted(layout.holds.glob("*")) if layout.holds.is_dir() else []:
        if path.name.startswith("."):
            continue
        hold = private_files.read_json(path, Hold)
        if hold is None or not _dates_are_sound(hold):
            unreadable.append(path.name)
        else:
            held.append(hold)
    return Holds(tuple(held), tuple(unreadable))


def place_hold(layout: Layout, hold: Hold) -> Path:
    """Puts a hold into force; the lifecycle stream says so.

    Raises:
        ConfigError: a name or a date that cannot be used, or a hold of that name is in force.
    """
    if not HOLD_NAME.fullmatch(hold.name):
        raise ConfigError(f"hold {hold.name[:64]!r}: use letters, digits and - _ . in its name, at most 64")
    if not _dates_are_sound(hold):
        raise ConfigError(f"hold {hold.name}: write its dates as 2026-01-31, the first not after the last")
    path = layout.holds / f"{hold.name}.json"
    if path.exists():
        raise ConfigError(f"hold {hold.name} is in force already; release it first or choose another name")
    private_files.make_directory(layout.holds)
    private_files.write_json(path, hold)
    return path


def release_hold(layout: Layout, name: str) -> None:
    """Ends a hold.

    Raises:
        ConfigError: there is none of that name.
    """
    path = layout.holds / f"{name}.json"
    if not HOLD_NAME.fullmatch(name) or not path.exists():
        raise ConfigError(f"there is no hold named {name[:64]!r}; see: gateway log hold list")
    path.unlink()
    private_files.sync_directory(layout.holds)


def _dates_are_sound(hold: Hold) -> bool:
    try:
        days = [date.fromisoformat(day) for day in (hold.first, hold.last) if day]
    except ValueError:
        return False
    return all(len(day) in (0, 10) for day in (hold.first, hold.last)) and days == sorted(days)


def partitions(layout: Layout) -> list[Partition]:
    """Every partition there is."""
    found = []
    for stream in segments.STREAMS:
        for path in sorted((layout.directory / stream).glob("model=*/date=*" if stream == "requests" else "date=*")):
            if (match := _DATE.fullmatch(path.name)) and path.is_dir():
                model = segments.model_of(path.parent.name.removeprefix("model=")) if stream == "requests" else ""
                found.append(Partition(stream, model, match[1], path))
    return found


def expired(found: Iterable[Partition], policy: RetentionPolicy, today: date, held: Holds) -> list[Partition]:
    """Partitions whose time is over and that no hold keeps."""
    gone = []
    for partition in found:
        days = policy.of(partition.stream, partition.model)
        if days is None or held.keep(partition):
            continue
        if date.fromisoformat(partition.date) + timedelta(days=days) < today:
            gone.append(partition)
    return gone


@dataclass(frozen=True, slots=True)
class Deleted:
    partitions: int = 0
    files: int = 0
    bytes: int = 0


def apply(layout: Layout, policy: RetentionPolicy, now_us: int, shipped: Mapping[str, Mapping[str, int]]) -> Deleted:
    """Deletes what has expired. `shipped`: of each configured sink, epoch → every position below it is shipped.

    Raises:
        OSError: the disk refused; what was not deleted is tried again next time.
    """
    today = datetime.fromtimestamp(now_us / 1e6, UTC).date()
    gone = expired(partitions(layout), policy, today, holds(layout))
    total = Deleted()
    for partition in gone:
        files = sorted(path for path in partition.path.iterdir() if path.is_file())
        if not all(is_shipped(path, shipped) for path in files if path.suffix == ".parquet"):
            continue
        one = Deleted(1, len(files), sum(path.stat().st_size for path in files))
        write_events(layout.directory, [_event(layout, partition, one, policy, now_us)], now_us * 1000)
        for path in files:
            path.unlink()
        partition.path.rmdir()
        private_files.sync_directory(partition.path.parent)
        total = Deleted(total.partitions + 1, total.files + one.files, total.bytes + one.bytes)
    return total


def _event(layout: Layout, partition: Partition, deleted: Deleted, policy: RetentionPolicy, now_us: int) -> Event:
    details = {
        "partition": layout.relative(partition.path),
        "date": partition.date,
        "files": deleted.files,
        "bytes": deleted.bytes,
        "retention_days": policy.of(partition.stream, partition.model),
    }
    return Event(now_us * 1000, "lifecycle", "retention", partition.model, "", msgspec.json.encode(details).decode())


def is_shipped(path: Path, shipped: Mapping[str, Mapping[str, int]]) -> bool:
    """Whether every sink has all rows of a Parquet file."""
    if not shipped:
        return True
    import pyarrow.parquet as pq  # noqa: PLC0415 — only where a sink is configured

    places = pq.ParquetFile(path).read(columns=["epoch", "position"])
    last = places.group_by("epoch").aggregate([("position", "max")])
    ends = dict(zip(last["epoch"].to_pylist(), last["position_max"].to_pylist(), strict=True))
    return all(end < sink.get(epoch, 0) for sink in shipped.values() for epoch, end in ends.items())
