"""The process that turns the WAL into Parquet, merges, and deletes what has expired: `python -m …sealer DIR`.

One per log directory, started by the gateway with the lowest priority, so that nothing of it shares an interpreter lock
or a core's attention with serving. It needs nothing from the gateway but the directory: it can be killed at any moment
and started again, by the gateway or by hand.

Rules:
* Whoever holds `<dir>/sealer.lock` seals. A second one waits for it (or says so, with `--once`).
* It ends with the process that started it, or on SIGTERM, after sealing what that one has left: stopped last, it leaves
  a log that is Parquet only.
* What fails for one segment is told in `sealer.json` and tried again; other epochs are sealed meanwhile.
* The garbage collector is off: everything here is freed by counting, and looking for cycles costs half the time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

import msgspec

from gateway.errors import ConfigError, GatewayError
from gateway.inference_log import merging, private_files, retention, sealing, segments, sinks
from gateway.inference_log.retention import RetentionPolicy
from gateway.inference_log.sealer_settings import SealerSettings
from gateway.inference_log.sealing import Step, quiet
from gateway.inference_log.segments import Layout, SealerState, Segment

TURN_S: Final = 1.0
"""Between two looks at the WAL."""
KEEP_S: Final = 60.0
"""Between two rounds of merging, retention and measuring the disk."""
NICE: Final = 19


class SealerBusy(GatewayError):
    """Another process seals this directory."""


class Sealer:
    """Seals, merges and deletes in one directory; holds its lock from `open` to `close`."""

    def __init__(self, settings: SealerSettings, now_us: Callable[[], int], step: Step = quiet) -> None:
        self._settings = settings
        self._now_us = now_us
        self._step = step
        self._layout = Layout(settings.directory)
        self._wals = [self._layout]
        if settings.spill is not None:
            self._wals.append(Layout(settings.directory, settings.spill))
        self._lock: int | None = None
        self._state = SealerState(os.getpid(), 0)
        self._faults: list[str] = []
        """Of the last round of sealing; `_keeping_faults` of the last round of the rest."""
        self._keeping_faults: list[str] = []

    def __repr__(self) -> str:
        return f"Sealer({self._layout.directory}, {self._state.sealed_segments} sealed, {self._state.failing})"

    def open(self) -> None:
        """Takes the lock; sweeps up what an earlier one left half-made.

        Raises:
            SealerBusy: another process has it.
            ConfigError: the directory cannot be used.
        """
        segments.prepare(self._layout.directory)
        self._lock = private_files.take_lock(self._layout.directory / "sealer.lock")
        if self._lock is None:
            raise SealerBusy(f"{self._layout.directory}: its sealer is running and seals by itself")
        for leftover in self._layout.directory.rglob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def statistics(self) -> SealerState:
        return self._state

    def seal(self) -> int:
        """Seals every segment that will not grow any more; returns how many."""
        self._faults = []
        done = waiting = size = 0
        for wals in self._wals:
            for epoch in wals.epochs():
                sealed, left, held = self._epoch(wals, epoch)
                done, waiting, size = done + sealed, waiting + left, size + held
        self._state = _changed(self._state, waiting_segments=waiting, waiting_bytes=size)
        return done

    def keep(self) -> None:
        """Merges, deletes what has expired, measures the disk."""
        now_us, shipped = self._now_us(), self._shipped()
        held = retention.holds(self._layout)
        self._keeping_faults = [
            f"holds/{name} cannot be read, so nothing is deleted; correct it or remove it" for name in held.unreadable
        ]
        deleted = retention.Deleted()
        with self._noted():
            merging.merge_all(self._layout, self._wals, now_us, shipped, self._step)
        with self._noted():
            deleted = retention.apply(self._layout, self._settings.policy, now_us, shipped)
        size = sum(_size(wals.wal) for wals in self._wals[1:]) + _size(self._layout.directory)
        limit = self._settings.max_disk_bytes
        self._state = _changed(
            self._state,
            disk_bytes=size,
            over_limit=bool(limit) and size > limit,
            deleted_partitions=self._state.deleted_partitions + deleted.partitions,
            holds=len(held.held) + len(held.unreadable),
        )

    def report(self) -> None:
        """Writes `sealer.json`."""
        failing = "; ".join([*self._faults[:4], *self._keeping_faults[:4]]) or None
        self._state = _changed(self._state, at_us=self._now_us(), failing=failing)
        with contextlib.suppress(OSError):
            private_files.write_json(self._layout.sealer_state, self._state)

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """What fails inside is told, and tried again in the next round."""
        try:
            yield
        except (OSError, ValueError, ConfigError) as error:
            self._keeping_faults.append(_text(error))

    def _shipped(self) -> Mapping[str, Mapping[str, int]]:
        return {name: sinks.shipped_up_to(self._layout.directory, name) for name in self._settings.sinks}

    def _epoch(self, wals: Layout, epoch: str) -> tuple[int, int, int]:
        """Segments sealed and left waiting, and the bytes of the WAL files that remain."""
        home = wals.epoch(epoch)
        if not (home / "lock").exists() and not wals.segments(epoch):
            with contextlib.suppress(OSError):  # just being made, or given up before it had a lock
                home.rmdir()
            return 0, 0, 0
        lock = private_files.take_lock(home / "lock")
        try:
            final = self._final(wals, epoch, alive=lock is None)
            done = sum(self._one(wals, segment) for segment in final)
            left = wals.segments(epoch)
            if lock is not None and not left:
                _sweep(home)
            size = sum(_file_size(wals.segment(segment)) for segment in left)
            return done, len([segment for segment in left if segment in final]), size
        finally:
            if lock is not None:
                os.close(lock)

    def _final(self, wals: Layout, epoch: str, *, alive: bool) -> list[Segment]:
        """The epoch's segments that will not grow any more."""
        found = wals.segments(epoch)
        if alive and found and not segments.is_final(wals, found[-1]):
            return found[:-1]
        return found

    def _one(self, wals: Layout, segment: Segment) -> int:
        """Seals a segment; 0 where it was sealed already or could not be."""
        try:
            if wals.commit(segment).exists():
                sealing.remove(wals, segment, self._step)
                return 0
            commit = sealing.seal(wals, segment, self._now_us(), self._step)
        except Exception as error:  # whatever it is, it stays with this segment: the others are sealed
            self._faults.append(f"{segment.name}: {_text(error)}")
            return 0
        if commit is None:
            return 0
        state = self._state
        self._state = _changed(
            state,
            sealed_segments=state.sealed_segments + 1,
            sealed_rows=state.sealed_rows + commit.rows,
            sealed_bytes=state.sealed_bytes + sum(file.bytes for file in commit.files),
            lost_rows=state.lost_rows + sum(loss.rows or 0 for loss in commit.losses),
            damaged_segments=state.damaged_segments + any(not loss.torn for loss in commit.losses),
        )
        return 1


def _changed(state: SealerState, **changes: Any) -> SealerState:
    """The state with some fields changed."""
    return msgspec.structs.replace(state, **changes)


def seal_by_hand(settings: SealerSettings) -> SealerState:
    """One round over a directory: what `gateway log seal` does.

    Raises:
        SealerBusy, ConfigError: see `Sealer.open`.
    """
    sealer = Sealer(settings, lambda: time.time_ns() // 1000)
    sealer.open()
    try:
        sealer.seal()
        sealer.keep()
        sealer.seal()  # what retention recorded
        sealer.report()
        return sealer.statistics()
    finally:
        sealer.close()


def run(settings: SealerSettings, parent: int, stop: threading.Event) -> None:
    """Seals until `stop` is set or the process `parent` is gone. Waits for the lock if another has it."""
    sealer = Sealer(settings, lambda: time.time_ns() // 1000)

    def over() -> bool:
        return stop.is_set() or os.getppid() != parent

    while True:
        try:
            sealer.open()
            break
        except SealerBusy:
            if over():
                return
            stop.wait(TURN_S)
    kept = -KEEP_S
    while not over():
        sealer.seal()
        if time.monotonic() - kept >= KEEP_S:
            sealer.keep()
            kept = time.monotonic()
        sealer.report()
        stop.wait(TURN_S)
    sealer.seal()
    sealer.report()
    sealer.close()


def _sweep(home: Path) -> None:
    """Removes the directory of an epoch that is over; its lock is held. What is there besides the lock stays."""
    if [path.name for path in home.iterdir()] == ["lock"]:
        (home / "lock").unlink()
        home.rmdir()
        private_files.sync_directory(home.parent)


def _size(directory: Path) -> int:
    return sum(_file_size(Path(root) / name) for root, _, names in os.walk(directory) for name in names)


def _file_size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _text(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def main(command: Sequence[str]) -> int:
    """The process. Exit codes: 0 stopped, 2 the directory cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m gateway.inference_log.sealer")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--spill", type=Path)
    parser.add_argument("--retention", default="{}", help="JSON: {days, models: {name: days}}")
    parser.add_argument("--sink", action="append", default=[])
    parser.add_argument("--max-disk-bytes", type=int, default=0)
    parser.add_argument("--parent", type=int, help="end when this process is gone (the one that started it)")
    given = parser.parse_args(command)
    parent = given.parent or os.getppid()
    policy = msgspec.json.decode(given.retention, type=RetentionPolicy)
    settings = SealerSettings(given.directory, given.spill, policy, tuple(given.sink), given.max_disk_bytes)
    stop = threading.Event()

    def asked(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, asked)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the gateway too, which stops us
    os.nice(NICE)
    gc.disable()
    try:
        run(settings, parent, stop)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
