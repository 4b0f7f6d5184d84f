"""Metric families of the inference log: what was written where, what was lost, and whether it keeps up.

Labels: a sink is `wal` (the write-ahead log), `spill` (the second one) or what a sink process is called. Without an
inference log there are none of these families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.observe.exposition import Family, labels


@dataclass(frozen=True, slots=True)
class SinkView:
    """One place that rows go to. Counters count rows and events together."""

    sink: str
    records: int
    dropped: int
    """Lost on the way there, or refused by it."""
    failing: bool
    lag_rows: int | None = None
    """Rows that it does not have yet; None: that is not measured in rows."""
    lag_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class WalView:
    """The process's own writers."""

    sink: str
    queue_bytes: int
    written_bytes: int
    synced_records: int
    syncs: int
    sync_seconds: float
    last_sync_seconds: float


@dataclass(frozen=True, slots=True)
class SealerView:
    sealed_rows: int
    lost_rows: int
    unsealed_bytes: int
    disk_bytes: int
    over_limit: bool
    """Whether that is more than the configuration allows."""
    failing: bool


@dataclass(frozen=True, slots=True)
class LogView:
    sinks: Sequence[SinkView]
    wals: Sequence[WalView]
    refused: int
    """Requests refused because their rows would have found no room."""
    blocked: bool
    waiting_bytes: int
    """Of rows that wait in memory for room in the queue."""
    gaps: int
    """Gap records written."""
    sealer: SealerView | None = None


def families(view: LogView) -> list[Family]:
    """All of them, with their samples."""
    return [*_of_sinks(view), *_of_writers(view), *_of_sealer(view.sealer)]


def _of_sinks(view: LogView) -> list[Family]:
    records = Family("gateway_inference_log_records_total", "counter", "Rows and events written, by where")
    dropped = Family("gateway_inference_log_dropped_total", "counter", "Rows and events lost, by where")
    failing = Family("gateway_inference_log_failing", "gauge", "1 while what is written to refuses")
    rows = Family("gateway_inference_log_lag_rows", "gauge", "Rows that a sink does not have yet")
    seconds = Family("gateway_inference_log_lag_seconds", "gauge", "Age of the oldest row that a sink does not have")
    for sink in view.sinks:
        name = labels(sink=sink.sink)
        records.add(name, sink.records)
        dropped.add(name, sink.dropped)
        failing.add(name, int(sink.failing))
        if sink.lag_rows is not None:
            rows.add(name, sink.lag_rows)
        if sink.lag_seconds is not None:
            seconds.add(name, sink.lag_seconds)
    return [family for family in (records, dropped, failing, rows, seconds) if family.lines]


def _of_writers(view: LogView) -> list[Family]:
    queue = Family("gateway_inference_log_queue_bytes", "gauge", "Rows in memory that are not synced to the disk yet")
    nbytes = Family("gateway_inference_log_written_bytes_total", "counter", "Bytes written to the write-ahead log")
    synced = Family("gateway_inference_log_synced_records_total", "counter", "Rows and events forced onto the disk")
    syncs = Family("gateway_inference_log_syncs_total", "counter", "Times that the disk was asked to keep what it has")
    spent = Family("gateway_inference_log_sync_seconds_total", "counter", "Time spent in these")
    last = Family("gateway_inference_log_last_sync_seconds", "gauge", "Time that the last one took")
    for wal in view.wals:
        name = labels(sink=wal.sink)
        queue.add(name, wal.queue_bytes)
        nbytes.add(name, wal.written_bytes)
        synced.add(name, wal.synced_records)
        syncs.add(name, wal.syncs)
        spent.add(name, round(wal.sync_seconds, 6))
        last.add(name, round(wal.last_sync_seconds, 6))
    refused = Family("gateway_inference_log_refused_total", "counter", "Requests refused for want of room in the log")
    refused.add("", view.refused)
    blocked = Family("gateway_inference_log_blocked", "gauge", "1 while models that block refuse requests")
    blocked.add("", int(view.blocked))
    waiting = Family("gateway_inference_log_waiting_bytes", "gauge", "Rows of models that block, waiting for the queue")
    waiting.add("", view.waiting_bytes)
    gaps = Family("gateway_inference_log_gaps_total", "counter", "Gap records written")
    gaps.add("", view.gaps)
    return [queue, nbytes, synced, syncs, spent, last, refused, blocked, waiting, gaps]


def _of_sealer(sealer: SealerView | None) -> list[Family]:
    if sealer is None:
        return []
    sealed = Family("gateway_inference_log_sealed_rows", "gauge", "Rows and events that are in Parquet files")
    sealed.add("", sealer.sealed_rows)
    lost = Family("gateway_inference_log_damaged_rows", "gauge", "Rows that were damaged on the disk before sealing")
    lost.add("", sealer.lost_rows)
    waiting = Family("gateway_inference_log_unsealed_bytes", "gauge", "Write-ahead log that is not in Parquet yet")
    waiting.add("", sealer.unsealed_bytes)
    disk = Family("gateway_inference_log_disk_bytes", "gauge", "Space that the inference log takes")
    disk.add("", sealer.disk_bytes)
    over = Family("gateway_inference_log_over_limit", "gauge", "1 while that is more than max_disk_gb")
    over.add("", int(sealer.over_limit))
    failing = Family("gateway_inference_log_sealer_failing", "gauge", "1 while segments cannot be sealed")
    failing.add("", int(sealer.failing))
    return [sealed, lost, waiting, disk, over, failing]
