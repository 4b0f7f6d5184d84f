"""Clients that leave, do not read, or send their heads a byte at a time; everybody else must not notice."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import numpy as np

from tests.faults.behaviour import Behaviour, Fault, Pace
from tests.faults.checker import check
from tests.faults.history import LEFT
from tests.faults.load import Load, Profile
from tests.faults.load_grpc import GrpcLoad
from tests.faults.processes import resident_mib
from tests.faults.registry import scenario
from tests.faults.results import Result
from tests.faults.rig import Rig, Run, remote, workers
from tests.faults.servers import eventually, metric


@scenario("48-leave-queued", "clients leave while their requests are queued", "their rows do not run")
async def leave_queued(run: Run, result: Result) -> Result:
    pace = Pace(0.4, 0.0)
    async with remote(run, pace=pace, profile=Profile(rate=0.0, connections=24)) as rig:
        rig.load.start()  # a closed loop keeps every slot busy
        await asyncio.sleep(3.0)
        await rig.inject()
        leavers = Load(rig.gateway.port, Profile(rate=100.0, rows=(4,), leave=1.0, leave_after_s=0.03, seed=9))
        leavers.start()
        await asyncio.sleep(run.seconds(6.0, 3.0))
        await leavers.stop()
        await rig.heal()
        await rig.finish(result)
        left = leavers.history
        first, total = left.nonce[0], int(left.column("rows").sum())
        nonces = [record.nonces for backend in rig.backends for record in backend.executions() if record.kind == 2]
        ran = np.concatenate(nonces)
        wasted = int(((ran >= first) & (ran < first + total)).sum())
        result.injected = int((left.column("outcome") == LEFT).sum())
        result.at_least("clients that left", result.injected, 50)
        # A slot that falls free within the 3 to 60 ms that they stay takes them along: that is right.
        result.at_most("rows of theirs that ran, %", 100.0 * wasted / total, 40.0, hard=False)
        result.notes.append(f"{wasted} of {total} rows of clients who left had begun to run")
    return result


@scenario("49-leave-mid-batch", "a third of the clients leave while their batch runs", "their mates are all answered")
async def leave_mid_batch(run: Run, result: Result) -> Result:
    profile = Profile(rate=1.0, leave=0.33, leave_after_s=0.012)
    async with remote(run, protocol="mixed", profile=profile) as rig:
        await rig.before(2.0)
        await rig.inject()
        await rig.hold(10.0, 3.0)
        await rig.heal()
        await rig.finish(result)
        result.injected = rig.load.history.window().left
        result.at_least("clients that left", result.injected, 20)
        ejected = sum(rig.watch.flips(f"b{n + 1}", rig.injected_at) for n in range(3))
        result.at_most("backends ejected for it", ejected, 0)
    return result


@scenario("50-all-leave", "everyone in a batch leaves while the backend hangs", "the batch is cancelled, its slot free")
async def all_leave(run: Run, result: Result) -> Result:
    async with remote(run, 1, server={"probe_interval_s": 60}) as rig:  # a probe holds a slot too
        for number in range(5 if run.quick else 20):
            await rig.backends[0].behave(Behaviour(Fault.HANG))
            burst = Load(rig.gateway.port, Profile(rate=0.0, connections=4, leave=1.0, leave_after_s=0.05, seed=number))
            burst.start()
            await asyncio.sleep(0.12)
            await burst.stop()
            began = asyncio.get_running_loop().time()
            result.injected += burst.history.window().left
            try:
                await eventually(lambda: _under_way(rig) == 0, 20.0, "something is still under way", every_s=0.005)
            except AssertionError:
                result.at_most("rows or batches under way 20 s after the last client left", _under_way(rig), 0)
            result.recover_s = max(result.recover_s or 0.0, asyncio.get_running_loop().time() - began)
            await rig.backends[0].behave()
        rig.load.start()
        await rig.inject()
        await asyncio.sleep(1.0)
        await rig.heal()
        await rig.finish(result)
        result.at_least("clients that left", result.injected, 5)
        result.at_most("slots free after, s", result.recover_s, 0.1, hard=False)
    return result


def _under_way(rig: Rig) -> float:
    text = rig.gateway.metrics()
    return metric(text, "gateway_backend_inflight_batches") + metric(text, "gateway_queue_rows")


@scenario("51-never-read", "clients pipeline requests and never read", "bounded memory; the others do not notice")
async def never_read(run: Run, result: Result) -> Result:
    async with workers(run) as rig:
        await rig.before(3.0)
        before_mib = resident_mib(rig.gateway.child.pid)
        writer = Load(rig.gateway.port, Profile(rate=1.0, rows=(4,), json=1.0, seed=3))
        writer.history.new(0.0, 1 << 50, 4)
        one = writer.request(0)
        await rig.inject()
        streams = [await asyncio.open_connection("127.0.0.1", rig.gateway.port, limit=1) for _ in range(20)]
        pours = [asyncio.create_task(_pour(stream[1], one)) for stream in streams]
        most = 0.0
        for _ in range(10):
            await rig.hold(1.0, 0.3)
            most = max(most, resident_mib(rig.gateway.child.pid) - before_mib)
        for pour in pours:
            pour.cancel()
        await asyncio.gather(*pours, return_exceptions=True)
        for _, stream in streams:
            stream.transport.abort()
        await rig.heal()
        result.injected = 20
        await rig.finish(result)
        result.at_most("MiB of memory for 20 of them", most, 80)
    return result


async def _pour(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(OSError):
        for _ in range(3000):
            writer.write(data)
            await writer.drain()


@scenario("52-slowloris", "2,000 connections send their heads a byte a second", "the others do not notice")
async def slowloris(run: Run, result: Result) -> Result:
    count = 300 if run.quick else 2000
    async with workers(run) as rig:
        await rig.before(4.0)
        await rig.inject()
        tasks = [asyncio.create_task(_dribble(rig.gateway.port)) for _ in range(count)]
        await rig.hold(12.0, 3.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await rig.heal()
        result.injected = count
        await rig.finish(result)
        result.at_most("p99 ratio", result.p99_ratio, 1.5, hard=False)
    return result


async def _dribble(port: int) -> None:
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for (
                byte
            ) in b"POST /v2/models/nonce/infer HTTP/1.1\r\nHost: slow\r\nX-Filler: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa":
                writer.write(bytes((byte,)))
                await asyncio.sleep(1.0)
        finally:
            writer.transport.abort()


@scenario("12-mixed-rows", "1 to 200 rows, split and joined, cancels and kills", "every row gets its own answer")
async def mixed_rows(run: Run, result: Result) -> Result:
    profile = Profile(rate=1.0, rows=(1, 1, 2, 3, 5, 8, 13, 64, 100, 200), leave=0.05, leave_after_s=0.02)
    split = {"oversize": "split", "max_batch_size": 64}
    async with remote(run, protocol="mixed", profile=replace(profile, connections=128), model=split) as rig:
        await rig.before(2.0)
        await rig.inject()
        for n in range(6 if not run.quick else 2):
            rig.backends[n % 3].kill()
            await rig.hold(2.0, 0.8)
            await rig.backends[n % 3].restart()
            await rig.hold(3.0, 0.8)
            result.injected += 1
        await rig.heal()
        await rig.after(2.0)
        await rig.finish(result)
    return result


@scenario("12-grpc-clients", "gRPC clients beside HTTP ones while backends are killed", "every row gets its own answer")
async def grpc_clients(run: Run, result: Result) -> Result:
    async with remote(run, protocol="mixed", utilisation=0.4) as rig:
        callers = GrpcLoad(rig.gateway.grpc_port)
        callers.start()
        await rig.before(2.0)
        await rig.inject()
        for n in range(4 if not run.quick else 1):
            rig.backends[n % 3].kill()
            await rig.hold(2.0, 0.8)
            await rig.backends[n % 3].restart()
            await rig.hold(3.0, 0.8)
            result.injected += 1
        await rig.heal()
        await callers.stop()
        await rig.finish(result)
        verdict = check(callers.history, [backend.executions() for backend in rig.backends])
        window = callers.history.window()
        result.requests += window.requests
        result.rows += window.rows
        result.errors += window.errors
        result.lost += verdict.lost
        result.wrong += verdict.wrong
        result.at_most("failed calls", window.errors, 0)
        result.at_most("calls lost, wrong or unexplained", 0 if verdict.clean else 1, 0)
        result.notes.append(f"{window.requests} calls, p99 {1000 * window.p99_s:.0f} ms, {callers.history.texts}")
    return result
