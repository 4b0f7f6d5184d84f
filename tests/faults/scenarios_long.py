"""What takes minutes, and runs by name only: rolling kills, and campaigns of random faults over millions of rows."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Final

from tests.faults.behaviour import Behaviour, Fault, Pace
from tests.faults.load import Profile
from tests.faults.registry import scenario
from tests.faults.results import Result
from tests.faults.rig import PACE, Rig, Run, remote, workers
from tests.faults.scenarios_workers import signal_worker, until_back

EVERY_S: Final = 10.0
MISMATCHES: Final = frozenset(
    {
        *(Fault.ROW_MORE, Fault.ROW_LESS, Fault.NO_ROWS, Fault.WRONG_DATATYPE, Fault.WRONG_SHAPE, Fault.WRONG_NAME),
        Fault.MISSING_OUTPUT,
    }
)
"""Two of these within a minute eject a backend for a minute, so only one of the three is made to do it."""
ONE_BATCH_S: Final = PACE.time_s(64)
FAULTS: Final = tuple(
    fault for fault in Fault if fault not in {Fault.NONE, Fault.LIE, Fault.ENDLESS, Fault.ENCODED, Fault.SLICED}
)
"""What the campaigns draw from: all but the healthy, the undetectable, and the two that take seconds of processor."""


async def rolling(run: Run, result: Result, rig: Rig, kill: Callable[[int], Awaitable[str]], most_s: float) -> Result:
    """Kill one of three every ten seconds.

    Args:
        kill: kills the n-th, and returns when it runs again; gives the backend's name.
        most_s: bound on the time to detect each.
    """
    await rig.before(30.0, 2.0)
    await rig.inject()
    end = time.monotonic() + run.seconds(60 * run.minutes, 6.0)
    seen: list[float | None] = []
    while time.monotonic() < end:
        began = time.monotonic()
        name = await kill(result.injected % 3)
        result.injected += 1
        change = rig.watch.first(name, began, usable=False)
        seen.append(None if change is None else change.at - began)
        await asyncio.sleep(max(0.0, began + run.seconds(EVERY_S, 3.0) - time.monotonic()))
    await rig.heal()
    await rig.finish(result)
    known = sorted(one for one in seen if one is not None)
    result.detect_s = known[-1] if known else None
    result.notes.append(f"{result.injected} kills, detected within {[round(1000 * one) for one in known]} ms")
    result.at_most("worst time to detect, s", result.detect_s, most_s, hard=False)
    bound_s = 1.5 * rig.baseline.p99_s + ONE_BATCH_S
    result.at_most(f"p99 while killing, s (baseline {rig.baseline.p99_s:.4f})", rig.during.p99_s, bound_s, hard=False)
    result.at_most("p99.9 while killing over baseline", rig.during.p999_s / rig.baseline.p999_s, 3.0, hard=False)
    if rig.backends:
        result.at_most("executions for each row", result.amplification, 1.1, hard=False)
    return result


@scenario("rolling-remote", "kill -9 of one of three backends every 10 s", "0 errors; p99 ≤ 1.5 x baseline + a batch")
async def rolling_remote(run: Run, result: Result) -> Result:
    async with remote(run, protocol="mixed") as rig:

        async def kill(index: int) -> str:
            backend = rig.backends[index]
            backend.kill()
            await asyncio.sleep(1.0)
            await backend.restart()
            return backend.name

        return await rolling(run, result, rig, kill, 0.1)


@scenario("rolling-workers", "kill -9 of one of three workers every 10 s", "0 errors; p99 ≤ 1.5 x baseline + a batch")
async def rolling_workers(run: Run, result: Result) -> Result:
    async with workers(run) as rig:

        async def kill(index: int) -> str:
            name = f"onnx-{index + 1}"
            pid = signal_worker(rig, name, signal.SIGKILL)
            await until_back(rig, name, pid)
            return name

        return await rolling(run, result, rig, kill, 0.05)


@scenario("campaign", "random faults, kills and freezes of random backends for minutes", "0 lost, 0 wrong, 0 malformed")
async def campaign(run: Run, result: Result) -> Result:
    return await _campaign(run, result, idempotent=True)


@scenario("campaign-once", "the same for a model that is not idempotent", "no row runs twice; 0 lost, 0 wrong")
async def campaign_once(run: Run, result: Result) -> Result:
    return await _campaign(run, result, idempotent=False)


async def _campaign(run: Run, result: Result, *, idempotent: bool) -> Result:
    profile = Profile(rate=1.0, rows=(8, 16, 32, 64, 64, 64), connections=128, json=0.02, leave=0.002)
    settings = {"attempt_timeout_ms": 1000, "idempotent": idempotent}
    pace = Pace(0.0015, 0.00002)
    async with remote(run, protocol="mixed", pace=pace, profile=profile, model=settings) as rig:
        rig.idempotent = idempotent
        await rig.before(5.0)
        await rig.inject()
        end = time.monotonic() + run.seconds(60 * run.minutes, 8.0)
        kills = await _torment(rig, end)
        for backend in rig.backends:
            backend.child.go_on()
            await backend.behave()
        await rig.heal()
        await rig.after(10.0, 3.0)
        result.injected = kills
        for backend in rig.backends:
            result.injected += (await backend.counters())["injected"]
        await rig.finish(result, errors=None)
        result.at_most(
            "requests failed by the faults, %", result.error_percent, 1.0 if idempotent else 15.0, hard=False
        )
        result.at_most("requests that failed long after", rig.load.history.window(rig.healed_at + 8.0).errors, 0)
    return result


async def _torment(rig: Rig, end: float) -> int:
    """Faults at random until `end`; returns how many were kills, and injections lost with them."""
    rng = random.Random(7)
    lost = 0
    while time.monotonic() < end:
        backend = rng.choice(rig.backends)
        dice = rng.random()
        if dice < 0.04:
            lost += 1 + (await backend.counters())["injected"]
            backend.kill()
            await asyncio.sleep(rng.uniform(0.1, 1.0))
            await backend.restart()
        elif dice < 0.07:
            backend.child.stop()
            await asyncio.sleep(rng.uniform(0.05, 1.5))
            backend.child.go_on()
            lost += 1
        else:
            # Mostly a fault now and then, which does not eject; sometimes all the time, which does.
            share = 1.0 if dice > 0.95 else rng.uniform(0.02, 0.2)
            status = rng.choice((400, 404, 429, 500, 502, 503, 504))
            fault = rng.choice(FAULTS)
            backend = rig.backends[0] if fault in MISMATCHES else backend
            await backend.behave(Behaviour(fault, share=share, status=status))
            await asyncio.sleep(rng.uniform(0.1, 0.6))
            await backend.behave()
    with contextlib.suppress(OSError):
        for backend in rig.backends:
            backend.child.go_on()
    return lost
