"""The gateway's own ONNX workers: killed, frozen, poisoned, and made to loop, while clients keep asking."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.faults import nonce
from tests.faults.history import UNSENT
from tests.faults.load import Profile
from tests.faults.processes import left_behind
from tests.faults.registry import scenario
from tests.faults.results import Result
from tests.faults.rig import Rig, Run, workers
from tests.faults.servers import eventually

BACK_S = 60.0


def worker_pid(rig: Rig, name: str = "onnx-1") -> int:
    """0 while it has none."""
    return next((int(worker["pid"] or 0) for worker in rig.gateway.workers() if worker["name"] == name), 0)


def signal_worker(rig: Rig, name: str, number: int) -> int:
    """Returns its process id. Never 0, which would mean the rig's own process group."""
    pid = worker_pid(rig, name)
    assert pid > 0, f"worker {name} is not running"
    os.kill(pid, number)
    return pid


def deaths(rig: Rig) -> int:
    """Workers that ended so far, by the log: a model that crashes is moved to others, and their counters start anew."""
    return rig.gateway.child.output().count(") died: ")


async def until_back(rig: Rig, name: str, not_pid: int) -> None:
    """Returns when the worker runs again under another process id."""
    await eventually(lambda: worker_pid(rig, name) not in {0, not_pid}, BACK_S, f"worker {name} did not come back")


async def status_of(rig: Rig, tensor: dict[str, Any], model: str = nonce.MODEL) -> int:
    """Status of the answer to one request."""
    return (await asyncio.to_thread(rig.gateway.post, f"/v2/models/{model}/infer", {"inputs": [tensor]}))[0]


@scenario("01-kill-worker", "kill -9 of a worker mid-batch", "0 errors; seen ≤ 50 ms; back after a load")
async def kill_worker(run: Run, result: Result) -> Result:
    async with workers(run) as rig:
        await rig.before()
        await rig.inject()
        pid = signal_worker(rig, "onnx-1", signal.SIGKILL)
        await until_back(rig, "onnx-1", pid)
        await rig.heal()
        await rig.after(10.0, 3.0)
        result.injected = 1
        await rig.finish(result, victim="onnx-1")
    result.at_most("time to detect, s", result.detect_s, 0.05, hard=False)
    result.at_most("time to full share, s", result.recover_s, 15.0, hard=False)
    return result


@scenario("03-freeze-worker", "SIGSTOP of a worker", "its batches time out, it is replaced; 0 errors")
async def freeze_worker(run: Run, result: Result) -> Result:
    async with workers(run, model={"attempt_timeout_ms": 1000}) as rig:
        await rig.before()
        await rig.inject()
        pid = signal_worker(rig, "onnx-1", signal.SIGSTOP)
        await until_back(rig, "onnx-1", pid)
        await rig.heal()
        await rig.after(10.0, 3.0)
        result.injected = 1
        await rig.finish(result, victim="onnx-1")
    result.at_most("time to detect, s", result.detect_s, 1.5, hard=False)
    return result


@scenario("13-nan", "a model whose output is NaN and infinite", "the literals that Triton writes, read back as such")
async def nan_outputs(run: Run, result: Result) -> Result:
    async with workers(run, 1) as rig:
        folder = rig.gateway.folder / "models" / "nan" / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(_division())
        config = {"models": [{"name": "nan", "source": str(folder.parent), "instances": 1}]}
        rig.gateway.close()
        rig.gateway.configure(config)
        rig.gateway.child.restart()
        await rig.gateway.wait_started()
        tensor = {"name": "x", "datatype": "FP32", "shape": [3, 1], "data": [0.0, 1.0, -1.0]}
        for _ in range(20):
            status, body, _ = rig.gateway.post("/v2/models/nan/infer", {"inputs": [tensor]})
            result.requests += 1
            result.rows += 3
            data = json.loads(body)["outputs"][0]["data"]
            result.errors += not (math.isnan(data[0]) and data[1:] == [math.inf, -math.inf])
            result.outcomes[str(status)] = result.outcomes.get(str(status), 0) + 1
        result.injected = result.requests
    result.at_most("answers with other values", result.errors, 0)
    return result


def _division() -> bytes:
    """x / 0: NaN, infinity, -infinity."""
    nodes = [helper.make_node("Sub", ["x", "x"], ["zero"]), helper.make_node("Div", ["x", "zero"], ["y"])]
    shape: list[int | str | None] = ["rows", 1]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    model = helper.make_model(
        helper.make_graph(nodes, "nan", [x], [y]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    data: bytes = model.SerializeToString()
    return data


async def poisoned(run: Run, result: Result, poison: str, **model: Any) -> Result:
    """Some requests carry a row that harms the model; nobody else's may suffer."""
    profile = Profile(rate=1.0, poison=0.01 if poison == "error" else 0.002)
    async with workers(run, poison=poison, profile=profile, model=model) as rig:
        await rig.before(2.0)
        await rig.inject()
        await rig.hold(10.0, 4.0)
        if not rig.load.poisoned:  # a short run may have drawn none
            rig.load.poisoned.add(len(rig.load.history))
            await asyncio.sleep(2.0)
        await rig.heal()
        await rig.finish(result, errors=None)
        outcome = rig.load.history.column("outcome")
        guilty = np.zeros(len(outcome), bool)
        guilty[[index for index in rig.load.poisoned if index < len(outcome)]] = True
        sent = outcome != UNSENT
        outcome, guilty = outcome[sent], guilty[sent]
        result.injected = int(guilty.sum())
        result.at_most("innocent requests that failed", int((outcome[~guilty] != 200).sum()), 0)
        result.at_most("poisoned requests answered", int((outcome[guilty] == 200).sum()), 0)
        result.at_most("other outcomes of poison than 500", int((outcome[guilty] != 500).sum()), 0)
        result.notes.append(f"{deaths(rig)} deaths of workers for {result.injected} poisoned requests")
        if poison == "crash":
            # Those that share a batch with it, or that run beside it, may cost one more.
            result.at_most("deaths of workers for each poisoned request", deaths(rig) / max(1, result.injected), 3)
    return result


@scenario("34-memory", "rows that make the run ask for more memory than there is", "500 for them; innocents 100 %")
async def memory(run: Run, result: Result) -> Result:
    return await poisoned(run, result, "memory")


@scenario("35-poison-crash", "rows that crash the process that runs them", "≤ 2 more crashes, 500; innocents 100 %")
async def poison_crash(run: Run, result: Result) -> Result:
    return await poisoned(run, result, "crash")


@scenario("35-poison-again", "the same crashing row, sent again and again", "a verdict; then it costs no crash at all")
async def poison_again(run: Run, result: Result) -> Result:
    async with workers(run, poison="crash") as rig:
        await rig.before(1.0)
        await rig.inject()
        x = {"name": "x", "datatype": "INT64", "shape": [1, 1], "data": [nonce.POISON | 77]}
        statuses = []
        died = []
        for _ in range(10):
            statuses.append(await status_of(rig, x))
            await asyncio.sleep(0.2)
            died.append(deaths(rig))
        await until_back(rig, "onnx-1", 0)
        result.injected = len(statuses)
        await rig.heal()
        await rig.after(2.0)
        await rig.finish(result)
        result.at_most("answers to it other than 500", sum(status != 500 for status in statuses), 0)
        result.at_most("deaths of workers in all", deaths(rig), 3)
        result.at_least("deaths of workers in all", deaths(rig), 1)
        result.notes.append(f"deaths of workers after each of {len(statuses)}: {died}")
    return result


@scenario("36-poison-error", "rows that the model refuses", "500 for them; innocents 100 %")
async def poison_error(run: Run, result: Result) -> Result:
    return await poisoned(run, result, "error")


@scenario("37-poison-loop", "a row on which the model computes for hours", "timeout, a verdict; innocents 100 %")
async def poison_loop(run: Run, result: Result) -> Result:
    async with workers(run, poison="loop", model={"attempt_timeout_ms": 1000}) as rig:
        await rig.before(1.0)
        await rig.inject()
        x = {"name": "x", "datatype": "INT64", "shape": [1, 1], "data": [nonce.POISON | 99]}
        began = time.monotonic()
        statuses = [await status_of(rig, x) for _ in range(3)]
        result.notes.append(f"answers {statuses}, {time.monotonic() - began:.1f} s in all")
        await rig.heal()
        await until_back(rig, "onnx-1", 0)
        await rig.after(3.0)
        result.injected = len(statuses)
        await rig.finish(result)
        result.at_most("answers to it other than 500 or 504", sum(code not in {500, 504} for code in statuses), 0)
    return result


@scenario("38-crash-loop", "a model that crashes on every input, beside a good one", "the good one is not touched")
async def crash_loop(run: Run, result: Result) -> Result:
    async with workers(run, poison="crash") as rig:
        bad = rig.gateway.folder / "models" / "bad" / "1"
        bad.mkdir(parents=True)
        (bad / "model.onnx").write_bytes(nonce.graph("crash"))
        good = {"name": nonce.MODEL, "source": str(rig.gateway.folder / "models" / nonce.MODEL), "instances": 3}
        dedicated = {"name": "bad", "source": str(bad.parent), "instances": 2, "isolation": "dedicated"}
        rig.gateway.close()
        rig.gateway.configure({"server": {"workers": 3}, "models": [good, dedicated]})
        rig.gateway.child.restart()
        await rig.gateway.wait_started()
        await rig.before(1.0)
        await rig.inject()
        end = time.monotonic() + run.seconds(20.0, 5.0)
        number = 0
        while time.monotonic() < end:
            number += 1  # another row each time: no fingerprint helps
            x = {"name": "x", "datatype": "INT64", "shape": [1, 1], "data": [nonce.POISON | number]}
            await status_of(rig, x, "bad")
            await asyncio.sleep(0.1)
        result.injected = number
        await rig.heal()
        await rig.after(2.0)
        await rig.finish(result)
        result.notes.append(f"{number} crashing requests, {deaths(rig)} deaths of workers")
    return result


@scenario("32-reloads", "the configuration is reloaded again and again under load", "0 errors, no version mix")
async def reloads(run: Run, result: Result) -> Result:
    async with workers(run) as rig:
        entry = {"name": nonce.MODEL, "source": str(rig.gateway.folder / "models" / nonce.MODEL), "instances": 3}
        await rig.before(2.0)
        await rig.inject()
        for n in range(100 if not run.quick else 5):
            rig.gateway.configure({"server": {"workers": 3}, "models": [{**entry, "max_queue_delay_ms": n % 2}]})
            rig.gateway.child.signal(signal.SIGHUP)
            result.injected += 1
            await asyncio.sleep(0.3)
        await rig.heal()
        await rig.after(5.0)
        await rig.finish(result)
    return result


@scenario("46-stop", "SIGTERM under load, after a storm of SIGHUPs", "what was accepted is answered; 0 orphans")
async def stop_under_load(run: Run, result: Result) -> Result:
    async with workers(run, rate=300.0, profile=Profile(rate=1.0, connections=32)) as rig:
        rig.load.start()
        await asyncio.sleep(run.seconds(3.0, 1.0))
        for _ in range(50):
            rig.gateway.child.signal(signal.SIGHUP)
            await asyncio.sleep(0.01)
        asked = time.monotonic()
        rig.gateway.child.signal(signal.SIGTERM)
        code = await asyncio.to_thread(rig.gateway.child.wait, 60.0)
        ended = time.monotonic()
        await rig.load.stop()
        result.injected = 51
        window = rig.load.history.window(0.0, asked - 0.05)
        result.requests, result.rows, result.errors = window.requests, window.rows, window.errors
        result.at_most("requests sent before it that failed", window.errors, 0)
        result.at_most("exit code", code, 0)
        result.at_most("rows answered wrong", rig.load.history.window().outcomes.get(2, 0), 0)
        result.notes.append(f"stopped within {ended - asked:.1f} s")
        await orphans(result)
    return result


@scenario("46-kill-gateway", "kill -9 of the gateway under load", "its workers die with it; /dev/shm is clean")
async def kill_gateway(run: Run, result: Result) -> Result:
    before = set(Path("/dev/shm").iterdir())
    async with workers(run, rate=300.0) as rig:
        rig.load.start()
        await asyncio.sleep(run.seconds(3.0, 1.0))
        rig.gateway.child.kill()
        killed = time.monotonic()
        await eventually(lambda: not left_behind(), 10.0, "workers outlive the gateway")
        result.recover_s = time.monotonic() - killed
        await rig.load.stop()
        result.injected = 1
        window = rig.load.history.window(0.0, killed - 0.5)
        result.requests, result.rows, result.errors = window.requests, window.rows, window.errors
        result.at_most("requests failed before it", window.errors, 0)
        await orphans(result)
    result.at_most("files left in /dev/shm", len(set(Path("/dev/shm").iterdir()) - before), 0)
    return result


async def orphans(result: Result) -> None:
    try:
        await eventually(lambda: not left_behind(), 10.0, "processes are left")
    except AssertionError:
        names = [Path(f"/proc/{pid}/cmdline").read_bytes()[:80] for pid in left_behind()]
        result.notes.append(f"left behind: {names}")
    result.at_most("orphans", len(left_behind()), 0)
