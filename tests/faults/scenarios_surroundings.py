"""The gateway's own surroundings fail it: descriptors, logs, the clock, the processor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Final

from tests.faults.processes import processor_s
from tests.faults.registry import scenario
from tests.faults.results import Result
from tests.faults.rig import Rig, Run, workers
from tests.faults.scenarios_workers import signal_worker, until_back
from tests.faults.servers import Where

JUMPING_CLOCK: Final = """\
import math, time
_time, _time_ns, _monotonic = time.time, time.time_ns, time.monotonic
_began = _monotonic()


def _shift():
    # Second 6 to 9 after the start: an hour ahead; 9 to 12: an hour back; then one second to and fro.
    age = _monotonic() - _began
    return 3600.0 if 6 <= age < 9 else -3600.0 if 9 <= age < 12 else math.copysign(1.0, math.sin(3 * age))


time.time = lambda: _time() + _shift()
time.time_ns = lambda: _time_ns() + int(1e9 * _shift())
"""
"""A `sitecustomize` for the gateway and its workers."""


@scenario("40-few-descriptors", "128 descriptors, 300 idle connections", "open connections live on; no busy loop")
async def few_descriptors(run: Run, result: Result) -> Result:
    where = Where(prefix=("sh", "-c", 'ulimit -n 128; exec "$0" "$@"'))
    async with workers(run, 2, where=where) as rig:
        await rig.before(3.0)
        await asyncio.sleep(1.0)
        pid = rig.gateway.child.pid
        used, began = processor_s(pid), time.monotonic()
        await asyncio.sleep(run.seconds(3.0, 1.0))
        usual = (processor_s(pid) - used) / (time.monotonic() - began)
        await rig.inject()
        tasks = [asyncio.create_task(_idle(rig.gateway.port)) for _ in range(300)]
        await asyncio.sleep(1.0)
        used, began = processor_s(pid), time.monotonic()
        await rig.hold(5.0, 2.0)
        spent = (processor_s(pid) - used) / (time.monotonic() - began)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await rig.heal()
        await rig.after(2.0)
        result.injected = 300
        await rig.finish(result, errors=None)
        result.at_most("requests on open connections that failed", _failed_on_open(result), 0)
        result.at_most("share of a core while refusing", max(0.0, spent - usual), 0.2, hard=False)
    return result


def _failed_on_open(result: Result) -> int:
    """A new connection that cannot be made is refused: `broken off`. Everything else must be right."""
    return sum(count for name, count in result.outcomes.items() if name not in {"200", "broken off", "503"})


async def _idle(port: int) -> None:
    with contextlib.suppress(OSError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            await reader.read(1)
            await asyncio.sleep(60)
        finally:
            writer.transport.abort()


@scenario("41-log-disk-full", "the log's disk is full from the start (/dev/full)", "the data path does not notice")
async def log_disk_full(run: Run, result: Result) -> Result:
    async with workers(run, where=Where(log=Path("/dev/full"))) as rig:
        return await _logging(run, result, rig)


@scenario("41-log-unread", "nobody reads the pipe that the log goes to", "the data path does not notice")
async def log_unread(run: Run, result: Result) -> Result:
    pipe = run.folder / f"log-{time.monotonic_ns()}"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDWR)
    try:
        async with workers(run, where=Where(log=pipe)) as rig:
            os.set_blocking(end, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(end, b"x" * 4096)  # full from here on
            return await _logging(run, result, rig)
    finally:
        os.close(end)


async def _logging(run: Run, result: Result, rig: Rig) -> Result:
    await rig.before(3.0)
    await rig.inject()
    for _ in range(2 if run.quick else 6):
        pid = signal_worker(rig, "onnx-1", signal.SIGKILL)  # each death is logged
        result.injected += 1
        await until_back(rig, "onnx-1", pid)
        await rig.hold(1.0, 0.5)
    await rig.heal()
    await rig.finish(result)
    return result


@scenario("42-clock", "the wall clock jumps by hours and seconds", "0 errors; only stamps in logs change")
async def clock(run: Run, result: Result) -> Result:
    folder = run.folder / "clock"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(JUMPING_CLOCK)
    async with workers(run, where=Where(env={"PYTHONPATH": str(folder)})) as rig:
        await rig.before(1.0)
        await rig.inject()
        await rig.hold(16.0, 12.0)
        await rig.heal()
        result.injected = 4
        await rig.finish(result)
    return result


@scenario("44-cpu-quota", "the gateway gets a fifth of a core, as a quota gives it", "slower; 0 wrong, refusals only")
async def cpu_quota(run: Run, result: Result) -> Result:
    async with workers(run, rate=60.0) as rig:
        await rig.before(3.0)
        await rig.inject()
        end = time.monotonic() + run.seconds(8.0, 3.0)
        while time.monotonic() < end:
            rig.gateway.child.stop()
            await asyncio.sleep(0.08)
            rig.gateway.child.go_on()
            await asyncio.sleep(0.02)
            result.injected += 1
        await rig.heal()
        await rig.after(3.0)
        await rig.finish(result, errors=None)
        only = sum(count for name, count in result.outcomes.items() if name in {"200", "503", "504"})
        result.at_most("outcomes but 200, 503 and 504", result.requests - only, 0)
        result.at_most("failed requests once it is over", rig.load.history.window(rig.healed_at + 1.0).errors, 0)
    return result
