"""One view of everything that the log's directory holds: rows that are Parquet already and rows that are still WAL.

Two ways in. `opened` gives a DuckDB connection with the views `requests`, `lifecycle`, `gaps`, `feedback`, `access`,
and `labels` and `labelled`, which join feedback to requests (`log_queries.py` runs SQL on it). `find` looks up one
request without reading more than has to be read: a request id is a UUIDv7, so its time says which days' files can hold
it, and statistics of row groups do the rest; WAL segments that do not contain the id's bytes are not even decoded.

Rules and invariants:
* A row is seen exactly once, whatever the sealer does meanwhile. A view is built from a snapshot and kept only if the
  same files counted before and after the WAL was read. `find` removes doubles by (epoch, position).
* Nothing here writes into the log's directory. DuckDB may read Parquet files below it and nothing else: no other file,
  no network, no extension; its memory and threads are bounded, and what does not fit goes to a temporary directory.
* Works while a gateway writes the log, and after it died: the torn end of a WAL segment is skipped.
"""

from __future__ import annotations

import contextlib
import copy
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gateway.errors import ConfigError, GatewayError
from gateway.inference_log import arrow_tables, frame, wal
from gateway.inference_log.feedback import LABELLED_VIEW, LABELS_VIEW, UNMATCHED_VIEW
from gateway.inference_log.private_files import read_file
from gateway.inference_log.segments import STREAMS, Layout, Segment, Snapshot

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

VIEWS: Final = {stream: "gaps" if stream == "gap" else stream for stream in STREAMS}
"""Stream → what its view is called."""
ATTEMPTS: Final = 8
"""Snapshots taken before giving up; each fails only if a segment is sealed while it is read."""
BACKWARDS: Final = timedelta(hours=24)
"""An id is made when its request settles; a row lies on the day on which it was received."""
MATE_DISTANCE: Final = 200_000
"""Positions. What was executed together settles together: batch-mates lie near each other in their epoch."""
_UUID7: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_TAG_OF_REQUESTS: Final = b"requests"
TAG_BYTES: Final = 16
"""A frame's tag stands within its first bytes."""
_ID_COLUMNS: Final = ("request_id", "client_request_id", "oip_id")
_MATE_COLUMNS: Final = (
    "request_id",
    "batch_id",
    "batch_row",
    "rows",
    "model",
    "version",
    "status",
    "executions",
    "epoch",
    "position",
)


class LogReadError(GatewayError):
    """The log cannot be read; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What reading may cost."""

    memory_mb: int = 1024
    threads: int = 2


DEFAULT_LIMITS: Final = Limits()


class Store:
    """The log in one directory.

    Args:
        directory: the log's.
        spill: `inference_log.spill_directory`; WAL segments lie there too.

    Raises:
        ConfigError: there is no log.
    """

    def __init__(self, directory: Path, spill: Path | None = None, limits: Limits = DEFAULT_LIMITS) -> None:
        if not (directory / "wal").is_dir() and not (directory / "requests").is_dir():
            raise ConfigError(f"{directory} holds no inference log; name its directory with --dir, or -c gateway.yaml")
        self.layout = Layout(directory)
        self._wals = [self.layout]
        if spill is not None and spill.is_dir():
            spilt = Layout(spill)
            spilt.sealed = self.layout.sealed  # what is spilt is sealed into the log's own directory
            self._wals.append(spilt)
        self._limits = limits

    def __repr__(self) -> str:
        return f"Store({self.layout.directory})"

    @property
    def wals(self) -> Sequence[Layout]:
        """Where WAL segments lie: the log's directory, and the spill directory."""
        return self._wals

    def limited(self, limits: Limits) -> Store:
        """The same log, read at other costs."""
        other = copy.copy(self)
        other._limits = limits
        return other

    # One request.

    def find(self, text: str) -> list[dict[str, Any]]:
        """Rows whose request id is `text`; if there is none, those whose client_request_id or OIP id it is.

        Each is a dict by the names of `arrow_tables.REQUESTS`, ordered by time of arrival. A request id names one row;
        the client's ids may name many.
        """
        if _UUID7.fullmatch(text.lower()):
            found = self._rows(text.lower(), ["request_id = $id"], self._near(text.lower()))
            if found:
                return found
        # One condition each, not one with "or": statistics of row groups rule out most files for one column only.
        wheres = [f"{name} = $id" for name in _ID_COLUMNS]
        return self._rows(text, wheres, self.layout.parquet("requests"))

    def mates(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Rows that were executed in the same batches as `row`, without itself: `_MATE_COLUMNS` of each."""
        batches = batches_of(row)
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for batch in batches:
            near = {
                "epoch": row["epoch"],
                "low": row["position"] - MATE_DISTANCE,
                "high": row["position"] + MATE_DISTANCE,
            }
            here = "epoch = $epoch and position between $low and $high and "
            wheres = [here + "batch_id = $id", here + """contains(executions, '"batch_id":"' || $id || '"')"""]
            files = self._near(row["request_id"], row["model"])
            for mate in self._rows(batch, wheres, files, near, _MATE_COLUMNS):
                found.setdefault((mate["epoch"], mate["position"]), mate)
        found.pop((row["epoch"], row["position"]), None)
        return list(found.values())

    def sealed_rows(self, segment: Segment, position: int, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Rows of `requests` that lie at `position` or behind it in a segment that has become Parquet."""
        found: dict[tuple[str, int], dict[str, Any]] = {}
        names = (f"{segment.name}.parquet", "merged-")
        files = [path for path in self.layout.parquet("requests") if path.name.startswith(names)]
        with _connection(self._limits) as connection:
            parameters = {"epoch": segment.epoch, "low": position}
            _gather_files(found, connection, columns, files, "epoch = $epoch and position >= $low", parameters)
        return sorted(found.values(), key=lambda row: row["position"])

    def _rows(
        self,
        text: str,
        wheres: Sequence[str],
        files: Sequence[Path],
        values: dict[str, Any] | None = None,
        columns: Sequence[str] = tuple(arrow_tables.REQUESTS.names),
    ) -> list[dict[str, Any]]:
        """Rows of WAL and of these files for which one of `wheres` holds; `text`, their `$id`, stands in each row."""
        parameters = {"id": text} | (values or {})
        found: dict[tuple[str, int], dict[str, Any]] = {}
        with _connection(self._limits) as connection:
            # The WAL first: what is sealed between the two looks is seen in both, never in neither.
            for table in self._tail_with(text.encode()):
                connection.register("_tail", table)
                for where in wheres:
                    _gather(found, connection, f"select {', '.join(columns)} from _tail where {where}", parameters)  # noqa: S608 — our names
                connection.unregister("_tail")
            for where in wheres:
                _gather_files(found, connection, columns, files, where, parameters)
        return sorted(found.values(), key=lambda row: (row.get("received") or 0, row["position"]))

    def _near(self, request_id: str, model: str | None = None) -> list[Path]:
        """Files of `requests` that can hold this id, going by the time in it; of one model only if it is named."""
        try:
            when = datetime.fromtimestamp(int(request_id.replace("-", "")[:12], 16) / 1000, UTC)
            days = {(when + shift).date() for shift in (-BACKWARDS, timedelta(0), timedelta(hours=1))}
        except (ValueError, OverflowError, OSError):  # a client's id may look like any time
            return []
        models = (
            [self.layout.partition("requests", "x", model).parent]
            if model
            else _folders(self.layout.directory / "requests")
        )
        paths = [folder / f"date={day}" for folder in models for day in days]
        return sorted(path for folder in paths for path in folder.glob("[!.]*.parquet"))

    def _tail_with(self, needle: bytes) -> Iterator[pa.Table]:
        """Tables of the frames of unsealed segments that contain these bytes."""
        for layout in self._wals:
            for segment in [segment for epoch in layout.epochs() for segment in layout.segments(epoch)]:
                with contextlib.suppress(FileNotFoundError):  # sealed meanwhile: its Parquet files are there
                    data = read_file(layout.segment(segment))
                    if needle in data:
                        reading = wal.read(data, segment.epoch, segment.number)
                        chosen = [one for one in reading.records if needle in bytes(one.payload)]
                        table = tables_of(chosen, segment.epoch, {"requests"}).get("requests")
                        if table is not None:
                            yield table

    # Everything, as tables.

    @contextlib.contextmanager
    def opened(self, streams: Iterable[str] = STREAMS) -> Iterator[duckdb.DuckDBPyConnection]:
        """A locked-down connection on which the views of these streams stand, all of one instant.

        Raises:
            LogReadError: the log changes faster than it can be read.
        """
        wanted = list(streams)
        with _connection(self._limits) as connection:
            for _ in range(ATTEMPTS):
                snapshots, files = self._state(wanted)
                try:
                    self._load(connection, snapshots, wanted)
                except FileNotFoundError:
                    continue
                if self._is_still(snapshots, files, wanted):
                    break
            else:
                raise LogReadError(f"{self.layout.directory} changes faster than it can be read; try again")
            for stream in wanted:
                _make_view(connection, stream, files[stream])
            if {"requests", "feedback"} <= set(wanted):
                connection.execute(f"create view labels as {LABELS_VIEW}")
                connection.execute(f"create view labelled as {LABELLED_VIEW}")
                connection.execute(f"create view unmatched_feedback as {UNMATCHED_VIEW}")
            _lock_down(connection, self.layout.directory)
            yield connection

    def _state(self, streams: Sequence[str]) -> tuple[list[Snapshot], dict[str, list[str]]]:
        """The WAL segments and Parquet files that count now."""
        snapshots = [layout.snapshot() for layout in self._wals]
        unsealed = {f"{segment.name}.parquet" for snapshot in snapshots for segment in snapshot.wal}
        files = {
            stream: [str(path) for path in self.layout.parquet(stream, snapshots[0]) if path.name not in unsealed]
            for stream in streams
        }
        return snapshots, files

    def _is_still(self, before: Sequence[Snapshot], files: dict[str, list[str]], streams: Sequence[str]) -> bool:
        after, now = self._state(streams)
        same = all(set(old.wal) <= set(new.wal) for old, new in zip(before, after, strict=True))
        return same and files == now

    def _load(
        self, connection: duckdb.DuckDBPyConnection, snapshots: Sequence[Snapshot], streams: Sequence[str]
    ) -> None:
        """Puts the rows of unsealed segments into the tables of the schema `unsealed`."""
        connection.execute("create schema if not exists unsealed")
        for stream in streams:
            kind = arrow_tables.REQUESTS if stream == "requests" else arrow_tables.EVENTS
            connection.register("_rows", kind.empty_table())
            connection.execute(f"create or replace table unsealed.{stream} as select * from _rows")  # noqa: S608 — our names
            connection.unregister("_rows")
        for layout, snapshot in zip(self._wals, snapshots, strict=True):
            for segment in snapshot.wal:
                for stream, table in segment_tables(layout, segment, streams).items():
                    connection.register("_rows", table)
                    connection.execute(f"insert into unsealed.{stream} select * from _rows")  # noqa: S608
                    connection.unregister("_rows")


def segment_tables(layout: Layout, segment: Segment, streams: Collection[str] = STREAMS) -> dict[str, pa.Table]:
    """Stream → rows of one WAL segment, as far as they can be proved; only of these streams.

    Raises:
        FileNotFoundError: it has been sealed.
    """
    reading = wal.read(read_file(layout.segment(segment)), segment.epoch, segment.number)
    return tables_of(reading.records, segment.epoch, streams)


def batches_of(row: dict[str, Any]) -> list[str]:
    """Ids of the batches that a row was executed in, the first one first."""
    found = [row["batch_id"]] if row.get("batch_id") else []
    found += re.findall(r'"batch_id":"([^"]{1,256})"', row.get("executions") or "")
    return list(dict.fromkeys(found))


def tables_of(records: Iterable[wal.Record], epoch: str, streams: Collection[str] = STREAMS) -> dict[str, pa.Table]:
    """Records of one epoch → stream → table. What a newer gateway wrote, or what contradicts itself, is left out."""
    frames = []
    for record in records:
        if "requests" not in streams and _TAG_OF_REQUESTS in bytes(record.payload[:TAG_BYTES]):
            continue  # by far the most and the largest
        with contextlib.suppress(frame.FrameError):
            one = frame.decode(record.payload)
            if isinstance(one, frame.Requests) or one.stream in streams:
                frames.append((record.position, one))
    try:
        return arrow_tables.to_tables(frames, epoch)
    except ValueError:
        return _one_by_one(frames, epoch)


def _one_by_one(frames: list[tuple[int, frame.Frame]], epoch: str) -> dict[str, pa.Table]:
    import pyarrow as pa  # noqa: PLC0415 — heavy, and needed only where something is odd

    found: dict[str, list[pa.Table]] = {}
    for one in frames:
        with contextlib.suppress(ValueError):
            for stream, table in arrow_tables.to_tables([one], epoch).items():
                found.setdefault(stream, []).append(table)
    return {stream: pa.concat_tables(tables).unify_dictionaries() for stream, tables in found.items()}


def _gather_files(
    found: dict[tuple[str, int], dict[str, Any]],
    connection: duckdb.DuckDBPyConnection,
    columns: Sequence[str],
    files: Iterable[Path],
    where: str,
    parameters: dict[str, Any],
) -> None:
    """As `_gather`, of Parquet files."""
    present = [str(path) for path in files if path.exists()]
    if present:
        connection.execute("set variable files = $files", {"files": present})
        source = "read_parquet(getvariable('files'), hive_partitioning = false)"
        _gather(found, connection, f"select {', '.join(columns)} from {source} where {where}", parameters)  # noqa: S608


def _gather(
    found: dict[tuple[str, int], dict[str, Any]],
    connection: duckdb.DuckDBPyConnection,
    sql: str,
    parameters: dict[str, Any],
) -> None:
    import duckdb  # noqa: PLC0415 — heavy

    used = {name: value for name, value in parameters.items() if f"${name}" in sql}
    try:
        rows = connection.sql(sql, params=used).to_arrow_table().to_pylist()
    except duckdb.Error as error:
        raise LogReadError(f"the log cannot be read: {' '.join(str(error).split())[:300]}") from None
    for row in rows:
        found.setdefault((row["epoch"], row["position"]), row)


def _folders(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("model=*") if path.is_dir())


@contextlib.contextmanager
def _connection(limits: Limits) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database in memory that cannot load extensions or see Python's variables."""
    import duckdb  # noqa: PLC0415 — heavy

    with tempfile.TemporaryDirectory(prefix="gateway-log-") as scratch:
        config: dict[str, Any] = {
            "memory_limit": f"{limits.memory_mb}MB",
            "threads": limits.threads,
            "temp_directory": scratch,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
            "python_enable_replacements": False,
        }
        connection = duckdb.connect(":memory:", config=config)
        try:
            connection.execute("set timezone = 'UTC'")
            yield connection
        finally:
            connection.close()


def _make_view(connection: duckdb.DuckDBPyConnection, stream: str, files: Sequence[str]) -> None:
    """The view of a stream: its files, and the table of what is unsealed. Both get the partition's `date`."""
    day = "received" if stream == "requests" else '"at"'
    parts = [f"select *, cast({day} as date) as date from unsealed.{stream}"]  # noqa: S608 — our names
    if files:
        listed = ", ".join("'" + path.replace("'", "''") + "'" for path in files)
        hive = "hive_partitioning = true, hive_types = {'date': date, 'model': varchar}"
        if stream != "requests":
            hive = "hive_partitioning = true, hive_types = {'date': date}"
        names = arrow_tables.REQUESTS.names if stream == "requests" else arrow_tables.EVENTS.names
        columns = ", ".join(f'"{name}"' for name in names)
        parts.append(f"select {columns}, date from read_parquet([{listed}], {hive})")  # noqa: S608
    connection.execute(f"create view {VIEWS[stream]} as {' union all '.join(parts)}")


def _lock_down(connection: duckdb.DuckDBPyConnection, directory: Path) -> None:
    """From here on: files below the log's streams may be read, nothing else, and no setting may be changed."""
    allowed = [str(directory / stream) + "/" for stream in STREAMS]
    connection.execute("set allowed_directories = $allowed", {"allowed": allowed})
    connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")
