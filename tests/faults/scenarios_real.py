"""Servers of other makers behind the gateway: two Tritons and an MLServer, killed and frozen in turn."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from tests.faults import nonce
from tests.faults.load import Profile
from tests.faults.real_servers import RealServer, mlserver, triton
from tests.faults.registry import scenario
from tests.faults.results import Result
from tests.faults.rig import Rig, Run, with_rate
from tests.faults.servers import GatewayServer

Maker = Callable[[str, Path], RealServer]


@contextlib.asynccontextmanager
async def real(
    run: Run, makers: Sequence[tuple[Maker, str]], rate: float, **model: Any
) -> AsyncIterator[tuple[Rig, list[RealServer]]]:
    """A gateway in front of real servers, `b1`, `b2`, …; each is reached by the scheme beside its maker."""
    folder = Path(tempfile.mkdtemp(dir=run.folder))
    async with contextlib.AsyncExitStack() as stack:
        servers = []
        for number, (make, _) in enumerate(makers, start=1):
            servers.append(make(f"b{number}", folder))
            stack.callback(servers[-1].close)
        for server in servers:
            await server.wait_ready()
        backends = []
        for server, (_, scheme) in zip(servers, makers, strict=True):
            port = server.grpc_port if scheme == "grpc" else server.http_port
            backends.append({"name": server.name, "url": f"{scheme}://127.0.0.1:{port}"})
        gateway = GatewayServer(folder, [], {"models": [{"name": nonce.MODEL, "backends": backends, **model}]})
        stack.callback(gateway.close)
        await gateway.wait_started()
        rig = Rig(run, gateway, [], with_rate(run, Profile(rate=1.0), rate))
        stack.push_async_callback(rig.close)
        yield rig, servers


async def killed_in_turn(run: Run, result: Result, rig: Rig, servers: Sequence[RealServer]) -> Result:
    await rig.before(6.0, 2.0)
    await rig.inject()
    worst = 0.0
    for server in servers:
        began = asyncio.get_running_loop().time()
        server.kill()
        result.injected += 1
        await rig.hold(3.0, 1.0)
        change = rig.watch.first(server.name, began, usable=False)
        worst = max(worst, change.at - began if change else float("inf"))
        await server.restart()
        await rig.hold(8.0, 4.0)
        server.child.stop()
        result.injected += 1
        await asyncio.sleep(0.3)
        server.child.go_on()
        await rig.hold(2.0, 1.0)
    await rig.heal()
    await rig.after(5.0, 1.0)
    await rig.finish(result)
    result.detect_s = worst
    result.at_most("worst time to detect, s", worst, 0.1, hard=False)
    shares = ", ".join(f"{name} {share:.2f}" for name, share in sorted(rig.baseline.shares.items()))
    result.notes.append(f"shares of the rows before: {shares}")
    return result


@scenario("90-two-tritons", "kill -9 and short freezes of two real Tritons, HTTP and gRPC", "0 errors")
async def two_tritons(run: Run, result: Result) -> Result:
    async with real(run, [(triton, "http"), (triton, "grpc")], 150.0) as (rig, servers):
        return await killed_in_turn(run, result, rig, servers)


@scenario("91-three-makers", "the same for a Triton, another by gRPC, and an MLServer", "0 errors")
async def three_makers(run: Run, result: Result) -> Result:
    async with real(run, [(triton, "http"), (triton, "grpc"), (mlserver, "http")], 150.0) as (rig, servers):
        return await killed_in_turn(run, result, rig, servers)


@scenario("92-two-mlservers", "the same for two MLServers, HTTP (JSON only) and gRPC", "0 errors")
async def two_mlservers(run: Run, result: Result) -> Result:
    async with real(run, [(mlserver, "http"), (mlserver, "grpc")], 60.0) as (rig, servers):
        return await killed_in_turn(run, result, rig, servers)
