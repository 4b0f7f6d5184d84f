"""What the network does between the gateway and one of three backends."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from tests.faults.behaviour import Behaviour
from tests.faults.proxy import CLEAR, Toxic
from tests.faults.registry import scenario
from tests.faults.results import Result
from tests.faults.rig import Rig, Run, remote
from tests.faults.watch import USABLE


async def toxic_network(run: Run, result: Result, protocol: str, toxic: Toxic, hold_s: float = 8.0) -> Result:
    async with remote(run, protocol=protocol, proxied=[0], model={"attempt_timeout_ms": 1000}) as rig:
        await rig.before()
        rig.proxies[0].poison(toxic)
        await rig.inject()
        await rig.hold(hold_s, 3.0)
        await rig.heal()
        rig.proxies[0].poison(CLEAR)
        if toxic.black_hole:
            rig.proxies[0].reset_all()
        await rig.after(20.0, 4.0)
        result.injected = 1
        await rig.finish(result, victim="b1")
    return result


@scenario("25-half-open-http", "packets vanish on open connections (http)", "attempt timers; ejected; 0 errors")
async def half_open_http(run: Run, result: Result) -> Result:
    await toxic_network(run, result, "http", Toxic(black_hole=True))
    result.at_most("time to detect, s", result.detect_s, 1.5, hard=False)
    return result


@scenario("25-half-open-grpc", "packets vanish on open connections (grpc)", "attempt timers; ejected; 0 errors")
async def half_open_grpc(run: Run, result: Result) -> Result:
    await toxic_network(run, result, "grpc", Toxic(black_hole=True))
    result.at_most("time to detect, s", result.detect_s, 1.5, hard=False)
    return result


@scenario("25-latency", "120 ms more, each way, to one backend (http)", "0 errors; the others take its work")
async def latency(run: Run, result: Result) -> Result:
    return await toxic_network(run, result, "http", Toxic(latency_s=0.12, jitter_s=0.03))


@scenario("25-narrow", "2 kB a second to one backend (http)", "0 errors")
async def narrow(run: Run, result: Result) -> Result:
    return await toxic_network(run, result, "http", Toxic(bandwidth=2_000.0))


@scenario("25-limit", "each connection is cut after 3 kB of answers (http)", "0 errors, 0 partial answers")
async def limit(run: Run, result: Result) -> Result:
    return await toxic_network(run, result, "http", Toxic(limit_bytes=3_000))


@scenario("25-sliced-grpc", "everything in slices of 5 bytes (grpc)", "0 errors")
async def sliced(run: Run, result: Result) -> Result:
    return await toxic_network(run, result, "grpc", Toxic(slice_bytes=5))


@scenario("26-black-hole", "SYNs to one backend are dropped", "connect timeout ≤ 250 ms; 0 errors")
async def black_hole(run: Run, result: Result) -> Result:
    async with remote(run, protocol="http") as rig:
        await rig.before()
        port = rig.backends[0].http_port
        await rig.backends[0].behave(Behaviour(listening=False))
        close = _full_queue(port)
        try:
            await rig.inject()
            await rig.hold(6.0, 3.0)
        finally:
            close()
        await rig.heal(rig.backends[0].behave())
        await rig.after(20.0, 4.0)
        result.injected = 1
        await rig.finish(result, victim="b1")
        _worst(rig, result)
    return result


def _worst(rig: Rig, result: Result) -> None:
    result.at_most("worst answer while it lasted, s", rig.during.worst_s, 0.25 + 10 * rig.baseline.p99_s, hard=False)


def _full_queue(port: int) -> Callable[[], None]:
    """Take `port` with a listen queue that is full: Linux then drops every further SYN. Returns what ends it."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(0)
    fillers = []
    for _ in range(4):
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(("127.0.0.1", port))
        fillers.append(filler)

    def close() -> None:
        for one in (*fillers, listener):
            one.close()

    return close


@scenario("29-tls", "one https backend speaks plain HTTP, one never answers the handshake", "refused; nothing in clear")
async def tls(run: Run, result: Result) -> Result:
    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))
    silent.listen(128)  # it takes connections and says nothing

    def to_https(entries: list[dict[str, Any]]) -> None:
        entries[0]["url"] = str(entries[0]["url"]).replace("http:", "https:")
        entries.append({"name": "silent", "url": f"https://127.0.0.1:{silent.getsockname()[1]}"})

    try:
        async with remote(run, edit=to_https, utilisation=0.4) as rig:
            await rig.before(2.0)
            await rig.inject()
            await rig.hold(6.0, 2.0)
            await rig.heal()
            result.injected = 2
            states = {backend.name: backend for backend in rig.gateway.backends()}
            result.notes += [f"{name}: {states[name].state}, {states[name].cause}" for name in ("b1", "silent")]
            usable = sum(states[name].state in USABLE for name in ("b1", "silent"))
            result.at_most("backends without TLS that are used", usable, 0)
            result.at_most("requests that reached it in clear", len(rig.backends[0].executions()), 0)
            await rig.finish(result)
    finally:
        silent.close()
    return result
