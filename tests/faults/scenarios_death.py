"""Remote backends that die, freeze, slow down, flap, or say no: one of three, at 60 % of what the three can do."""

from __future__ import annotations

import asyncio
import time

from tests.faults.behaviour import Behaviour, Fault
from tests.faults.load import Profile
from tests.faults.registry import scenario
from tests.faults.results import Result
from tests.faults.rig import Rig, Run, remote

SLOW = 10.0


async def kill(rig: Rig, index: int = 0) -> None:
    rig.backends[index].kill()


async def attempt_timeout_s(rig: Rig) -> float:
    """What the gateway may wait for an answer at most, by the rule for it: a bound for figures, not for claims."""
    return max(0.05, 1.5 * rig.baseline.p999_s)


@scenario("02-kill-remote", "kill -9 of a remote backend mid-batch, later restarted", "0 errors; seen ≤ 100 ms")
async def kill_remote(run: Run, result: Result) -> Result:
    async with remote(run, protocol="mixed") as rig:
        await rig.before()
        await rig.inject(kill(rig))
        await rig.hold(6.0)
        await rig.heal(rig.backends[0].restart())
        await rig.after(20.0, 4.0)
        result.injected = 1
        await rig.finish(result, victim="b1")
    result.at_most("time to detect, s", result.detect_s, 0.1, hard=False)
    result.at_most("time to full share, s", result.recover_s, 15.0, hard=False)
    return result


@scenario("02-kill-remote-grpc", "the same, all over gRPC", "0 errors; seen ≤ 100 ms")
async def kill_remote_grpc(run: Run, result: Result) -> Result:
    async with remote(run, protocol="grpc") as rig:
        await rig.before()
        await rig.inject(kill(rig))
        await rig.hold(6.0)
        await rig.heal(rig.backends[0].restart())
        await rig.after(20.0, 4.0)
        result.injected = 1
        await rig.finish(result, victim="b1")
    result.at_most("time to detect, s", result.detect_s, 0.1, hard=False)
    result.at_most("time to full share, s", result.recover_s, 15.0, hard=False)
    return result


@scenario(
    "02-kill-once-only", "the same for a model that is not idempotent", "502 for what was sent; nothing runs twice"
)
async def kill_non_idempotent(run: Run, result: Result) -> Result:
    async with remote(run, protocol="mixed", model={"idempotent": False}) as rig:
        rig.idempotent = False
        await rig.before()
        rounds = 5 if not run.quick else 2
        await rig.inject()
        for n in range(rounds):
            rig.backends[n % 3].kill()
            await rig.hold(2.0, 0.7)
            await rig.backends[n % 3].restart()
            await rig.hold(4.0, 0.7)
        await rig.heal()
        await rig.after(2.0)
        result.injected = rounds
        await rig.finish(result, errors=None)
        # A batch in flight per slot: at most 8 slots of 64 rows die with a backend.
        result.at_most("failed requests", result.errors, rounds * 8 * 64)
        only = sum(count for name, count in result.outcomes.items() if name in {"200", "502", "503"})
        result.at_most("outcomes but 200, 502 and 503", result.requests - only, 0)
    return result


@scenario("03-freeze-remote", "SIGSTOP of a backend, SIGCONT later", "0 errors; ejected after one attempt timeout")
async def freeze_remote(run: Run, result: Result) -> Result:
    async with remote(run, protocol="mixed") as rig:
        await rig.before()
        rig.backends[0].child.stop()
        await rig.inject()
        await rig.hold(8.0, 3.0)
        await rig.heal()
        rig.backends[0].child.go_on()
        await rig.after(20.0, 4.0)
        result.injected = 1
        await rig.finish(result, victim="b1")
        limit_s = await attempt_timeout_s(rig)
        result.at_most("time to detect, s", result.detect_s, max(0.25, 2 * limit_s), hard=False)
        result.at_most("worst answer, s", rig.during.worst_s, 8 * limit_s + 0.5, hard=False)
    return result


@scenario("04-short-freezes", "300 ms SIGSTOPs of a random backend", "0 errors; the others absorb it")
async def short_freezes(run: Run, result: Result) -> Result:
    async with remote(run, protocol="mixed") as rig:
        await rig.before()
        await rig.inject()
        for n in range(10 if not run.quick else 2):
            rig.backends[n % 3].child.stop()
            await asyncio.sleep(0.3)
            rig.backends[n % 3].child.go_on()
            result.injected += 1
            await asyncio.sleep(0.7)
        await rig.heal()
        await rig.after(3.0)
        await rig.finish(result)
        result.at_most("p99 ratio", result.p99_ratio, 2.0, hard=False)
    return result


@scenario("16-all-500", "every answer of one backend is 500", "open after 5 batches; 0 errors")
async def all_500(run: Run, result: Result) -> Result:
    async with remote(run, protocol="mixed") as rig:
        await rig.before()
        await rig.inject(rig.backends[0].behave(Behaviour(Fault.STATUS, status=500)))
        await rig.hold(6.0, 2.0)
        result.injected = (await rig.backends[0].counters())["injected"]
        await rig.heal(rig.backends[0].behave())
        await rig.after(20.0, 4.0)
        await rig.finish(result, victim="b1")
        sent = rig.arrivals(rig.backends[0], rig.injected_at, rig.healed_at)
        result.at_most("client batches sent to it while it failed", sent, 5 + 8)
    return result


@scenario("17-half-500", "half of one backend's answers are 500", "ratio trip; 0 errors")
async def half_500(run: Run, result: Result) -> Result:
    async with remote(run, protocol="mixed") as rig:
        await rig.before()
        await rig.inject(rig.backends[0].behave(Behaviour(Fault.STATUS, share=0.5)))
        await rig.hold(8.0, 3.0)
        result.injected = (await rig.backends[0].counters())["injected"]
        await rig.heal(rig.backends[0].behave())
        await rig.after(20.0, 3.0)
        await rig.finish(result, victim="b1")
    result.at_most("time to detect, s", result.detect_s, 2.0, hard=False)
    return result


@scenario("18-fast-500", "500 at once from one of three: the sinkhole", "it attracts < 1 % of the rows")
async def fast_500(run: Run, result: Result) -> Result:
    async with remote(run) as rig:
        await rig.before()
        await rig.inject(rig.backends[0].behave(Behaviour(Fault.STATUS)))
        await rig.hold(10.0, 3.0)
        await rig.heal()
        counters = await rig.backends[0].counters()
        result.injected = counters["injected"]
        until = rig.healed_at
        await rig.finish(result, victim="b1")
        to_him = rig.arrivals(rig.backends[0], rig.injected_at, until)
        to_all = sum(rig.arrivals(backend, rig.injected_at, until) for backend in rig.backends)
        result.at_most("its share of the batches, %", 100.0 * to_him / max(1, to_all), 1.0, hard=False)
        result.at_most("client batches sent to it", to_him, 13)
    return result


@scenario(
    "19-retry-after", "503 with Retry-After: 2 from one backend", "nothing is sent to it for 2 s; not a hard failure"
)
async def retry_after(run: Run, result: Result) -> Result:
    async with remote(run, protocol="http") as rig:
        await rig.before()
        busy = Behaviour(Fault.STATUS, status=503, retry_after_s=2.0)
        await rig.inject(rig.backends[0].behave(busy))
        await rig.hold(6.0, 3.5)
        result.injected = (await rig.backends[0].counters())["injected"]
        await rig.heal(rig.backends[0].behave())
        await rig.after(15.0, 3.0)
        await rig.finish(result, victim="b1")
        arrived = [
            record.at for record in rig.backends[0].executions()
            if record.kind == 1 and rig.injected_at <= record.at < rig.healed_at
        ]  # fmt: skip
        if arrived:
            # What was in flight when the first 503 came may still arrive: one round trip's grace.
            early = sum(0.1 < at - arrived[0] < 1.9 for at in arrived)
            result.at_most("requests sent to it within the 2 s", early, 0)
        result.at_most("refusals seen", 0 if arrived else 1, 0)
    return result


@scenario("20-grey-slow", "one backend is 10 times slower", "starved or ejected ≤ 3 s; p99 ≤ twice the baseline")
async def grey_slow(run: Run, result: Result) -> Result:
    async with remote(run, protocol="mixed") as rig:
        await rig.before()
        await rig.inject(rig.backends[0].behave(Behaviour(slowness=SLOW)))
        await rig.hold(12.0, 3.0)
        result.injected = 1
        await rig.heal(rig.backends[0].behave())
        await rig.after(20.0, 3.0)
        await rig.finish(result, victim="b1")
        late = rig.load.history.window(rig.injected_at + run.seconds(3.0, 1.5), rig.healed_at)
        result.at_most("its share of the rows after 3 s, %", 100 * late.shares.get("b1", 0.0), 12.0, hard=False)
        known = [one for one in (result.detect_s, starved_s(rig, "b1")) if one is not None]
        result.notes.append(f"ejected after {result.detect_s and round(result.detect_s, 1)} s")
        result.detect_s = min(known, default=None)
        result.at_most("time to detect, s", result.detect_s, 3.0, hard=False)
        result.at_most("p99 after 3 s over baseline", late.p99_s / rig.baseline.p99_s, 2.0, hard=False)
    return result


def starved_s(rig: Rig, backend: str) -> float | None:
    """From the fault until `backend` gives less than a third of a fair share in half a second."""
    at = rig.injected_at
    while at < (rig.healed_at or time.monotonic()) - 0.5:
        if rig.load.history.window(at, at + 0.5).shares.get(backend, 0.0) < 1 / 9:
            return at - rig.injected_at
        at += 0.1
    return None


@scenario("21-flap", "2 s dead, 2 s alive, over and over", "k grows, its share falls; ≤ 6 flips a minute; 0 errors")
async def flap(run: Run, result: Result) -> Result:
    async with remote(run, protocol="mixed") as rig:
        await rig.before()
        await rig.inject()
        for _ in range(8 if not run.quick else 2):
            await rig.backends[0].behave(Behaviour(Fault.STATUS))
            await asyncio.sleep(run.seconds(2.0, 0.7))
            await rig.backends[0].behave()
            await asyncio.sleep(run.seconds(2.0, 0.7))
            result.injected += 1
        await rig.heal()
        minutes = (rig.healed_at - rig.injected_at) / 60
        flips = rig.watch.flips("b1", rig.injected_at)
        await rig.after(3.0)
        await rig.finish(result)
        result.at_most("flips a minute", flips / minutes, 8.0, hard=False)
    return result


@scenario("22-all-down", "every backend is down", "503 fast with Retry-After; back when they are")
async def all_down(run: Run, result: Result) -> Result:
    async with remote(run, protocol="mixed") as rig:
        await rig.before()
        await rig.inject()
        for index in range(3):
            await kill(rig, index)
        await rig.hold(5.0, 3.0)
        status, _, headers = rig.gateway.post("/v2/models/nonce/infer", ROW)
        result.at_most("answers that are no 503", int(status != 503), 0)
        result.at_most("503s without Retry-After", int("retry-after" not in headers), 0)
        late = rig.load.history.window(rig.injected_at + 2.0)
        for backend in rig.backends:
            await backend.restart()
        await rig.heal()
        await rig.after(10.0, 5.0)
        result.injected = 3
        await rig.finish(result, errors=None)
        only = sum(count for name, count in result.outcomes.items() if name in {"200", "502", "503"})
        result.at_most("outcomes but 200, 502 and 503", result.requests - only, 0)
        # A request whose three attempts met the three kills, one after the other.
        result.at_most("502s", result.outcomes.get("502", 0), 8)
        refused = refusal_p99_s(rig, rig.injected_at + 2.0, rig.healed_at)
        result.at_most("p99 of refusals, s", refused, 0.01, hard=False)
        result.notes.append(f"{late.outcomes.get(503, 0)} refusals, p99 {1000 * refused:.1f} ms")
        result.at_most("failed requests once it is over", rig.load.history.window(rig.healed_at + 4.0).errors, 0)
        result.recover_s = first_success_s(rig)
        result.at_most("time to the first answer, s", result.recover_s, 3.0, hard=False)
    return result


ROW = {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1, 1], "data": [1]}]}


def refusal_p99_s(rig: Rig, since: float, until: float) -> float:
    history = rig.load.history
    due = history.column("due")
    chosen = (due >= since) & (due < until) & (history.column("outcome") == 503)
    took = sorted(history.column("ended")[chosen] - due[chosen])
    return float(took[int(0.99 * len(took))]) if took else 0.0


def first_success_s(rig: Rig) -> float | None:
    history = rig.load.history
    ended = history.column("ended")[history.column("outcome") == 200]
    ended = ended[ended >= rig.healed_at]
    return float(ended.min() - rig.healed_at) if len(ended) else None


@scenario("23-return-at-once", "all return at once after 4 s, clients in a closed loop", "ramp; no second collapse")
async def return_at_once(run: Run, result: Result) -> Result:
    profile = Profile(rate=0.0, connections=24)
    async with remote(run, protocol="mixed", profile=profile) as rig:
        await rig.before()
        await rig.inject()
        for backend in rig.backends:
            await backend.behave(Behaviour(listening=False))
        await rig.hold(4.0, 1.5)
        for backend in rig.backends:
            await backend.behave()
        await rig.heal()
        await rig.after(10.0, 5.0)
        result.injected = 3
        await rig.finish(result, errors=None)
        result.at_most("failed requests once it is over", rig.load.history.window(rig.healed_at + 4.0).errors, 0)
        result.recover_s = first_success_s(rig)
        result.at_most("time to the first answer, s", result.recover_s, 5.0, hard=False)
    return result


@scenario("24-half-dies", "two of four die at 70 % load", "what the other two can do is answered; the rest is refused")
async def half_dies(run: Run, result: Result) -> Result:
    async with remote(run, 4, protocol="mixed", utilisation=0.7, profile=Profile(rate=1.0, connections=256)) as rig:
        await rig.before()
        await rig.inject()
        await kill(rig, 0)
        await kill(rig, 1)
        await rig.hold(8.0, 2.0)
        await rig.backends[0].restart()
        await rig.backends[1].restart()
        await rig.heal()
        await rig.after(10.0, 4.0)
        result.injected = 2
        await rig.finish(result, errors=None)
        only = sum(count for name, count in result.outcomes.items() if name in {"200", "503", "504"})
        result.at_most("outcomes but 200, 503 and 504", result.requests - only, 0)
        during = rig.during
        can = 2 / (4 * 0.7)
        result.at_least("answered, of what two can do", during.right / during.requests / min(1, can), 0.85, hard=False)
    return result


@scenario("27-refuse", "one backend refuses connections, then listens again", "0 errors; back by itself")
async def refuse(run: Run, result: Result) -> Result:
    async with remote(run, protocol="mixed") as rig:
        await rig.before()
        await rig.inject(rig.backends[0].behave(Behaviour(listening=False)))
        await rig.hold(5.0, 2.0)
        await rig.heal(rig.backends[0].behave())
        await rig.after(20.0, 4.0)
        result.injected = 1
        await rig.finish(result, victim="b1")
    result.at_most("time to detect, s", result.detect_s, 0.1, hard=False)
    result.at_most("time to full share, s", result.recover_s, 15.0, hard=False)
    return result
