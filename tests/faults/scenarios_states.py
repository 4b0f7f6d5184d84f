"""Backends that come back as something else, a gateway that stands still, and the runs that judge the rig: nothing is
wrong, and everything is.
"""

from __future__ import annotations

import asyncio
import time

from tests.faults.behaviour import Behaviour, Fault
from tests.faults.history import WRONG
from tests.faults.load import Profile
from tests.faults.registry import scenario
from tests.faults.results import Result
from tests.faults.rig import Run, remote
from tests.faults.scenarios_death import kill
from tests.faults.servers import metric


@scenario(
    "31-lacks-model", "one server no longer has the model (404)", "out for this model; 0 errors; back when it has it"
)
async def lacks_model(run: Run, result: Result) -> Result:
    async with remote(run, protocol="mixed") as rig:
        await rig.before()
        await rig.inject(rig.backends[0].behave(Behaviour(model=False)))
        await rig.hold(5.0, 2.0)
        await rig.heal(rig.backends[0].behave())
        await rig.after(20.0, 5.0)
        result.injected = 1
        await rig.finish(result, victim="b1")
    result.at_most("time to full share, s", result.recover_s, 15.0, hard=False)
    return result


@scenario("33-other-metadata", "a killed backend returns with another datatype", "refused until it matches; 0 wrong")
async def other_metadata(run: Run, result: Result) -> Result:
    async with remote(run, protocol="mixed") as rig:
        await rig.before()
        await rig.inject(kill(rig))
        await rig.hold(1.0, 0.5)
        back = time.monotonic()
        await rig.backends[0].restart(Behaviour(datatype="FP64"))
        await rig.hold(5.0, 2.5)
        sent = rig.arrivals(rig.backends[0], back)
        result.at_most("client batches sent while it differs", sent, 0)
        await rig.heal(rig.backends[0].behave())
        await rig.after(20.0, 6.0)
        result.injected = 2
        await rig.finish(result, victim="b1")
    result.at_most("time to full share, s", result.recover_s, 15.0, hard=False)
    return result


@scenario("43-blocked-loop", "the gateway itself stands still for 500 ms, five times", "no healthy backend is ejected")
async def blocked_loop(run: Run, result: Result) -> Result:
    async with remote(run, protocol="mixed") as rig:
        await rig.before()
        await rig.inject()
        for _ in range(5 if not run.quick else 2):
            rig.gateway.child.stop()
            await asyncio.sleep(0.5)
            rig.gateway.child.go_on()
            result.injected += 1
            await asyncio.sleep(1.0)
        await rig.heal()
        await rig.after(3.0)
        ejected = sum(rig.watch.flips(f"b{n + 1}", rig.injected_at) for n in range(3))
        result.at_most("healthy backends ejected", ejected, 0, hard=False)
        text = rig.gateway.metrics()
        timeouts = metric(text, "gateway_backend_attempts_total", outcome="timeout")
        result.notes.append(f"{timeouts:.0f} attempts timed out")
        await rig.finish(result)
    return result


@scenario("00-healthy", "nothing, with bursts of other sizes", "0 errors, 0 ejections")
async def healthy(run: Run, result: Result) -> Result:
    profile = Profile(rate=1.0, rows=(1, 1, 1, 1, 2, 4, 8, 16, 32, 64))
    async with remote(run, protocol="mixed", profile=profile) as rig:
        await rig.before()
        await rig.inject()
        await rig.hold(30.0, 3.0)
        await rig.heal()
        ejected = sum(rig.watch.flips(f"b{n + 1}", rig.injected_at) for n in range(3))
        result.at_most("healthy backends ejected", ejected, 0, hard=False)
        await rig.finish(result)
        result.at_most("attempts for one row", rig.load.history.column("attempt").max(initial=0), 2)
    return result


@scenario("99-control", "one backend lies: right form, wrong values", "the checker must see it; no gateway can")
async def control(run: Run, result: Result) -> Result:
    async with remote(run, protocol="mixed") as rig:
        await rig.before(1.0, 0.5)
        await rig.inject(rig.backends[0].behave(Behaviour(Fault.LIE)))
        await rig.hold(2.0, 1.0)
        await rig.heal()
        await rig.load.stop()
        result.injected = (await rig.backends[0].counters())["injected"]
        window = rig.load.history.window()
        result.requests, result.rows = window.requests, window.rows
        result.at_least("wrong answers that the clients saw", window.outcomes.get(WRONG, 0), 1)
    return result
