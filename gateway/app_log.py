"""The inference log's life in a serving process: its writers, what is told of them, and the order of start and stop.

Start: the directory is made and checked and the writers run, before a port is bound: a log that cannot be written is a
fault of the configuration, not of the first request. Stop: when every request is answered, what was noted goes to the
writers, these write and sync all they have, and only then the process ends; both steps are bounded in time.

A successor (SIGUSR2) writes an epoch of its own beside ours, so both may serve and log at the same time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gateway import plan
from gateway.app_log_processes import Companions
from gateway.catalog import ServedVersion
from gateway.config import Config
from gateway.config_log import InferenceLog as Section
from gateway.config_postgres import anchored_dsn
from gateway.errors import GatewayError
from gateway.inference_log import sealer_settings, sink_state
from gateway.inference_log.handover import InferenceLog, Wall
from gateway.inference_log.outlet import Outlet
from gateway.inference_log.private_files import read_json
from gateway.inference_log.retention import RetentionPolicy
from gateway.inference_log.segments import SealerState, new_epoch
from gateway.inference_log.writer import LogWriter, WriterSettings
from gateway.observe.exposition import Family
from gateway.observe.metrics_log import LogView, SealerView, SinkView, WalView, families

log = logging.getLogger("gateway.inference_log")

MIB: Final = 1024 * 1024
CLOSE_S: Final = 15.0
"""Longest wait at the end for a disk that does not take what is left."""
_FINISH_TURN_S: Final = 0.02


class ServingLog:
    """The inference log of one serving process."""

    def __init__(self, config: Config, section: Section) -> None:
        directory = config.base / section.directory
        now_ms = time.time_ns() // 1_000_000
        settings = WriterSettings(
            queue_bytes=section.queue_mb * MIB,
            reserve_bytes=max(section.queue_mb * MIB // 4, MIB),
            segment_bytes=section.segment_mb * MIB,
            seal_s=section.seal_s,
            sync_ms=section.sync_ms,
        )
        self.directory = directory
        self._ships = section.postgres is not None
        self._writers = {"wal": LogWriter(directory, new_epoch(now_ms, os.urandom(10)), settings)}
        if section.spill_directory is not None:
            spill = config.base / section.spill_directory
            self._writers["spill"] = LogWriter(spill, new_epoch(now_ms, os.urandom(10)), settings)
        self._started: list[LogWriter] = []
        loop = asyncio.get_running_loop()
        self._outlet = Outlet(
            self._writers["wal"],
            settings.queue_bytes,
            loop.call_later,
            time.monotonic,
            time.time_ns,
            self._writers.get("spill"),
        )
        draw = random.Random().random  # noqa: S311  # a sample
        self.log = InferenceLog(self._outlet, loop.call_soon, Wall(time.time_ns, time.monotonic), draw)
        self._companions = Companions(_commands(config, section))

    def start(self) -> None:
        """Make the directories and begin to write; blocks on the disk.

        Raises:
            ConfigError: a directory cannot be used; the text says why.
        """
        for writer in self._writers.values():
            writer.start()
            self._started.append(writer)

    def start_companions(self) -> None:
        """Begin to seal, and to ship, in processes of their own."""
        self._companions.start()

    def attach(self, version: ServedVersion) -> None:
        """Note the requests of a version that is about to serve."""
        version.log = self.log.of(version.spec, version.wanted.logged)
        try:
            manifest = plan.manifest_of(version)
        except GatewayError as error:  # an ensemble's steps may not be there yet
            manifest = {"digest": version.spec.digest, "unknown": str(error)}
        self.log.event("lifecycle", "serving", version.name, version.version, manifest)

    async def close(self) -> None:
        """Every request was answered: write what is left. Returns in bounded time, whatever the disk does."""
        self.log.flush()
        deadline = time.monotonic() + CLOSE_S
        while self._started and not self._outlet.finish() and time.monotonic() < deadline:  # noqa: ASYNC110  # no event
            await asyncio.sleep(_FINISH_TURN_S)
        lost = self._outlet.give_up()
        for writer in self._started:
            await asyncio.to_thread(writer.close, max(deadline - time.monotonic(), 1.0))
            lost += writer.statistics().lost_rows
        self._started.clear()
        if lost:
            log.error("the inference log could not take everything before the end: %d rows are lost", lost)
        await self._companions.close()

    # -- what is told of it ----------------------------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        """For /healthz."""
        statistics = self._outlet.statistics()
        failing = {name: text for name, w in self._writers.items() if (text := w.statistics().failing)}
        failing |= self._companions.failing()
        if (sink := self._sink()) is not None and sink.failing is not None:
            failing[sink.name] = sink.failing
        if (sealer := self._sealer()) is not None and sealer.failing is not None:
            failing["sealer"] = sealer.failing
        if statistics.blocked:
            state = "blocked"
        elif failing:
            state = "failing"
        else:
            state = "ok"
        return {
            "inference_log": {
                "state": state,
                "failing": failing,
                "lost_rows": statistics.lost_rows,
                "refused_requests": statistics.refused_requests,
            }
        }

    def _sealer(self) -> SealerState | None:
        """What the sealer last said; None where it has said nothing yet."""
        return read_json(self.directory / "sealer.json", SealerState)

    def _sink(self) -> sink_state.SinkState | None:
        """What the configured sink last said; None where there is none."""
        if not self._ships:
            return None
        return sink_state.read_state(self.directory, sink_state.NAME) or sink_state.SinkState(name=sink_state.NAME)

    def families(self) -> Sequence[Family]:
        """For /metrics."""
        return families(self.view())

    def view(self) -> LogView:
        """The numbers now; reads a small file or two."""
        outlet = self._outlet.statistics()
        sinks, wals = [], []
        for name, writer in self._writers.items():
            seen = writer.statistics()
            lost = seen.lost_rows + (outlet.lost_rows if name == "wal" else 0)
            sinks.append(SinkView(name, seen.written_rows, lost, seen.failing is not None))
            wals.append(
                WalView(
                    name,
                    seen.pending_bytes,
                    seen.written_bytes,
                    seen.synced_rows,
                    seen.syncs,
                    seen.sync_seconds,
                    seen.last_sync_seconds,
                )
            )
        if (sink := self._sink()) is not None:
            sinks.append(_sink_view(sink, time.time()))
        return LogView(
            sinks,
            wals,
            outlet.refused_requests,
            outlet.blocked,
            outlet.waiting_bytes,
            outlet.gap_records,
            None if (sealer := self._sealer()) is None else _sealer_view(sealer),
        )


def _sealer_view(sealer: SealerState) -> SealerView:
    return SealerView(
        sealer.sealed_rows,
        sealer.lost_rows,
        sealer.waiting_bytes,
        sealer.disk_bytes,
        sealer.over_limit,
        sealer.failing is not None,
    )


def _sink_view(sink: sink_state.SinkState, now: float) -> SinkView:
    waits_s = 0.0 if sink.oldest_unshipped_us is None else max(0.0, now - sink.oldest_unshipped_us / 1e6)
    lost = sink.refused_rows + sink.missing_rows
    return SinkView(sink.name, sink.shipped_rows, lost, sink.failing is not None, sink.lag_rows, waits_s)


def _commands(config: Config, section: Section) -> dict[str, list[str]]:
    """What runs beside the gateway, by name."""
    found = {"sealer": sealer_settings.command(sealing_of(config, section))}
    if section.postgres is not None:
        job = sink_job(section, config.base)
        found[sink_state.NAME] = sink_state.command(job, config.server.log_level, config.server.log_format)
    return found


def sealing_of(config: Config, section: Section) -> sealer_settings.SealerSettings:
    """What the sealer is to do. Where an entry without a name states days, they count for all models if that is longer:
    nothing may go before its time."""
    days, models = section.retention_days, {}
    for entry in (config.defaults, *config.models):
        stated = entry.inference_log.retention_days if entry.inference_log is not None else None
        name = getattr(entry, "name", None)
        if stated is not None and name is not None:
            models[name] = stated
        elif stated is not None:
            days = stated if entry is config.defaults else max(days, stated)
    return sealer_settings.SealerSettings(
        config.base / section.directory,
        config.base / section.spill_directory if section.spill_directory is not None else None,
        RetentionPolicy(days, models),
        (sink_state.NAME,) if section.postgres is not None else (),
        int((section.max_disk_gb or 0) * 10**9),
    )


def sink_job(section: Section, base: Path) -> sink_state.Job:
    """What is shipped to PostgreSQL; only for a section that says so."""
    keys = section.postgres
    assert keys is not None  # noqa: S101
    return sink_state.Job(
        base / section.directory,
        base / section.spill_directory if section.spill_directory is not None else None,
        anchored_dsn(keys, base),
        keys.db_schema,
        keys.showcase_tables,
        keys.batch_rows,
        keys.timeout_s,
    )


def serving_log(config: Config) -> ServingLog | None:
    """What the configuration asks for; None: there is no log."""
    return ServingLog(config, config.inference_log) if config.inference_log is not None else None
