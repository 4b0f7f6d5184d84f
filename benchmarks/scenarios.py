"""What is measured, one function a scenario. Each returns an `Outcome`; nothing here prints or judges a machine.

Rules: systems run side by side and are loaded one at a time, in an order that rotates with every round; each is
warmed up and checked against onnxruntime before the first round.
"""

from __future__ import annotations

import http.client
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks import bare, grpc_load, log_show
from benchmarks.report import Claim, Outcome
from benchmarks.server import BenchmarkError, Server
from benchmarks.systems import batch_rows, gateway, gateway_before, gateway_logging, grpc_echo, log_rows, nginx
from benchmarks.triton import Flags, best_flags, triton, tune
from benchmarks.workload import CACHE, Workload, prepare
from benchmarks.wrk import Round, load

WARM_UP_S: Final = 1.0
IDLE_CONNECTIONS: Final = 2000
LOG_DRAIN_S: Final = 10.0
BARE_BATCHES: Final = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Plan:
    """How long and against whom."""

    rounds: int = 5
    seconds: float = 3.0
    without: frozenset[str] = frozenset()
    tune_triton: bool = False
    rows: int = 10_000_000
    """Of the inference log that is made to be read."""

    def has(self, system: str) -> bool:
        return system not in self.without


def rotate(systems: Sequence[str], round_number: int) -> list[str]:
    """The order of one round: every system comes first equally often."""
    first = round_number % len(systems)
    return [*systems[first:], *systems[:first]]


def interleave(outcome: Outcome, rounds: int, measures: dict[str, Callable[[], Round]]) -> None:
    """Run every measure once per round, in rotating order, into `outcome`."""
    for name in measures:
        outcome.rounds[name] = []
    for number in range(rounds):
        for name in rotate(list(measures), number):
            outcome.add(name, measures[name]())


def tiny_json(plan: Plan) -> Outcome:
    """One row of 16 floats as JSON, 64 connections, the whole system under test on core 0, the client on core 1."""
    work = prepare("tiny")
    outcome = Outcome("tiny-json", "MLP 16-64-64-4, JSON, 64 connections, server on core 0, client on core 1")

    def post(server: Server, seconds: float = plan.seconds) -> Round:
        return load(server, work.body_file, 64, seconds, cores="1")

    with ExitStack() as stack:
        flags = _triton_flags(plan, "tiny-json", work, "0", post)
        servers = [gateway(work, "0")]
        servers += [nginx("0")] if plan.has("nginx") else []
        servers += [triton(work, flags, "0")] if flags else []
        _measure(outcome, plan, work, stack, servers, post)
    if plan.has("nginx"):
        outcome.claims.append(Claim("gateway ÷ nginx return 200", outcome.ratio("gateway", "nginx"), 0.30))
    if plan.has("triton"):
        outcome.claims.append(Claim("gateway ÷ Triton at its best", outcome.ratio("gateway", "triton"), 3.5))
    return outcome


def tiny_grpc(plan: Plan) -> Outcome:
    """The same row over gRPC: 8 connections of 8 concurrent calls, the whole system under test on core 0."""
    work = prepare("tiny")
    what = "MLP 16-64-64-4, gRPC, 8 connections of 8 calls, server on core 0, client on core 1"
    outcome = Outcome("tiny-grpc", what, rate_unit="calls/s")
    answers: dict[int, int] = {}

    def call(server: Server, seconds: float = plan.seconds) -> Round:
        port = server.grpc_port
        if port not in answers:
            answers[port] = grpc_load.check(server, port, work, computes=server.checked)
        return grpc_load.load(server, port, work, answers[port], seconds, cores="1")

    with ExitStack() as stack:
        flags = _triton_flags(plan, "tiny-grpc", work, "0", call, over_grpc=True)
        servers = [gateway(work, "0"), grpc_echo("0")]
        servers += [triton(work, flags, "0", over_grpc=True)] if flags else []
        for server in servers:
            stack.enter_context(server)
            call(server, WARM_UP_S)
            outcome.notes[server.name] = server.notes
        interleave(outcome, plan.rounds, {server.name: partial(call, server) for server in servers})
    outcome.claims.append(Claim("gateway ÷ grpc.aio echo", outcome.ratio("gateway", "grpc.aio echo"), 8.0))
    if flags:
        outcome.claims.append(Claim("gateway ÷ Triton at its best", outcome.ratio("gateway", "triton"), 3.0))
    return outcome


def heavy(plan: Plan) -> Outcome:
    """A model that costs something: can the gateway keep onnxruntime as busy as a bare loop would?"""
    work = prepare("heavy")
    outcome = Outcome("heavy", "MLP 16-2048-2048-4, JSON, 256 connections, both cores, nothing pinned")

    def post(server: Server, seconds: float = plan.seconds) -> Round:
        if server.name != "gateway":
            return load(server, work.body_file, 256, seconds)
        rows, batches = batch_rows(server, work.model)
        result = load(server, work.body_file, 256, seconds)
        rows_after, batches_after = batch_rows(server, work.model)
        return replace(result, batch=(rows_after - rows) / max(1, batches_after - batches))

    def bare_at_the_same_batch() -> Round:
        reached = outcome.rounds["gateway"][-1].batch if outcome.rounds["gateway"] else 32
        return bare.run(work.model_file, 2, max(1, round(reached)), plan.seconds)

    with ExitStack() as stack:
        flags = _triton_flags(plan, "heavy", work, "", post)
        servers = [gateway(work)] + ([triton(work, flags)] if flags else [])
        _measure(outcome, plan, work, stack, servers, post, {"bare onnxruntime": bare_at_the_same_batch})
    sweep = {batch: bare.run(work.model_file, 2, batch, 1.0).rate for batch in BARE_BATCHES}
    best = max(sweep, key=lambda batch: sweep[batch])
    outcome.figures |= {f"bare onnxruntime, batch {batch}, rows/s": rate for batch, rate in sweep.items()}
    outcome.figures["batch at which bare onnxruntime is fastest"] = best
    ratio = outcome.ratio("gateway", "bare onnxruntime")
    outcome.claims.append(Claim("gateway ÷ bare onnxruntime at the batch reached", ratio, 0.85))
    if flags:
        outcome.claims.append(Claim("gateway ÷ Triton at its best", outcome.ratio("gateway", "triton"), 1.2))
    return outcome


def front_triton(plan: Plan, name: str = "front-triton", connections: int = 256) -> Outcome:
    """The gateway in front of one Triton against that Triton alone; each time everything shares the same two cores."""
    work = prepare("tiny")
    what = f"MLP 16-64-64-4, JSON, {connections} connections; server, gateway and client share both cores, not pinned"
    outcome = Outcome(name, what)

    def post(server: Server, seconds: float = plan.seconds) -> Round:
        if server.name == "triton":
            return load(server, work.body_file, connections, seconds)
        rows, batches = batch_rows(server, work.model)
        result = load(server, work.body_file, connections, seconds)
        rows_after, batches_after = batch_rows(server, work.model)
        return replace(result, batch=(rows_after - rows) / max(1, batches_after - batches))

    with ExitStack() as stack:
        flags = _triton_flags(plan, name, work, "", post)
        if flags is None:
            raise BenchmarkError(f"{name} measures the gateway in front of a Triton; leave out --without triton")
        alone = triton(work, flags)
        # Behind the gateway batches arrive formed: waiting for more there only costs time.
        behind = replace(flags, delay_us=0, instances=1)
        backends = [triton(work, behind), triton(work, behind, over_grpc=True)]
        for server in backends:
            stack.enter_context(server)
            server.check(work)
        fronts = [
            gateway_before("gateway, HTTP", f"http://127.0.0.1:{backends[0].port}", work),
            gateway_before("gateway, gRPC", f"grpc://127.0.0.1:{backends[1].grpc_port}", work),
        ]
        _measure(outcome, plan, work, stack, [*fronts, alone], post)
    outcome.notes["triton behind the gateway"] = str(behind)
    for front in fronts:
        outcome.claims.append(Claim(f"{front.name} ÷ Triton alone", outcome.ratio(front.name, "triton"), 2.0))
    return outcome


def inference_log(plan: Plan) -> Outcome:
    """What it costs to keep a row and the tensors of every request: the load of tiny-json, with the log off and on."""
    work = prepare("tiny")
    what = "MLP 16-64-64-4, JSON, 64 connections, gateway, workers and sealer on core 0, client on core 1"
    outcome = Outcome("inference-log", what)
    asked = 0.0

    def post(server: Server, seconds: float = plan.seconds) -> Round:
        nonlocal asked
        result = load(server, work.body_file, 64, seconds, cores="1")
        asked += result.requests if server.name == "gateway, log on" else 0
        return result

    with TemporaryDirectory(dir=CACHE, prefix="inference-log-") as directory, ExitStack() as stack:
        servers = [gateway(work, "0"), gateway_logging(work, Path(directory), "0")]
        _measure(outcome, plan, work, stack, servers, post)
        asked += len(work.expected)
        deadline = time.monotonic() + LOG_DRAIN_S
        while (rows := log_rows(servers[1]))[0] < asked and time.monotonic() < deadline:
            time.sleep(0.1)
        if rows[0] < asked or rows[1]:
            raise BenchmarkError(f"{asked:.0f} answers, but {rows[0]:.0f} rows on the disk and {rows[1]:.0f} lost")
    outcome.figures["answers that the client of the logging gateway counted"] = asked
    outcome.figures["rows on the disk"] = rows[0]
    pairs = zip(outcome.rounds["gateway"], outcome.rounds["gateway, log on"], strict=True)
    outcome.figures["median of the rounds' own ratios"] = median(on.rate / off.rate for off, on in pairs)
    outcome.claims.append(Claim("log on ÷ log off", outcome.ratio("gateway, log on", "gateway"), 0.85))
    return outcome


def latency_1(plan: Plan) -> Outcome:
    """One connection: what the gateway adds to one bare run."""
    work = prepare("tiny")
    outcome = Outcome("latency-1", "MLP 16-64-64-4, JSON, one connection, nothing pinned")

    def post(server: Server, seconds: float = plan.seconds) -> Round:
        return load(server, work.body_file, 1, seconds)

    with ExitStack() as stack:
        flags = _triton_flags(plan, "latency-1", work, "", post)
        servers = [gateway(work)]
        servers += [nginx()] if plan.has("nginx") else []
        servers += [triton(work, flags)] if flags else []
        alone = {"bare onnxruntime": lambda: bare.run(work.model_file, 1, 1, plan.seconds)}
        _measure(outcome, plan, work, stack, servers, post, alone)
    added_ms = (outcome.p50_us("gateway") - outcome.p50_us("bare onnxruntime")) / 1e3
    outcome.claims.append(Claim("p50 above the bare run", added_ms, 0.35, at_most=True, unit=" ms"))
    return outcome


def idle_connections(plan: Plan) -> Outcome:
    """Memory of connections that have been used once and are kept alive."""
    work = prepare("tiny")
    outcome = Outcome("idle-connections", f"memory per idle keep-alive connection, {IDLE_CONNECTIONS} of them")
    costs: dict[str, list[float]] = {}
    for _ in range(min(plan.rounds, 3)):
        for server in [gateway(work)] + ([nginx()] if plan.has("nginx") else []):
            with server:
                server.check(work)
                costs.setdefault(server.name, []).append(_idle_cost_kib(server, work))
    for name, values in costs.items():
        outcome.figures[f"{name}, KiB per idle connection"] = median(values)
    cost = median(costs["gateway"])
    outcome.claims.append(Claim("memory per idle connection", cost, 20, at_most=True, unit=" KiB"))
    return outcome


SCENARIOS: Final[dict[str, Callable[[Plan], Outcome]]] = {
    "tiny-json": tiny_json,
    "tiny-grpc": tiny_grpc,
    "heavy": heavy,
    "front-triton": front_triton,
    "front-triton-64": partial(front_triton, name="front-triton-64", connections=64),
    "inference-log": inference_log,
    "latency-1": latency_1,
    "idle-connections": idle_connections,
    "log-show": lambda plan: log_show.measure(plan.rows, plan.rounds),
}


def _measure(
    outcome: Outcome,
    plan: Plan,
    work: Workload,
    stack: ExitStack,
    servers: list[Server],
    post: Callable[..., Round],
    others: dict[str, Callable[[], Round]] | None = None,
) -> None:
    """Start, check and warm up all servers, then interleave them with `others`, the gateway first."""
    for server in servers:
        stack.enter_context(server)
        server.check(work)
        post(server, WARM_UP_S)
        outcome.notes[server.name] = server.notes
    measures: dict[str, Callable[[], Round]] = {s.name: partial(post, s) for s in servers}
    interleave(outcome, plan.rounds, measures | (others or {}))


def _triton_flags(
    plan: Plan, scenario: str, work: Workload, cores: str, post: Callable[..., Round], *, over_grpc: bool = False
) -> Flags | None:
    """Triton's flags for a scenario, searched first where the plan says so; None: it does not take part."""
    if not plan.has("triton"):
        return None
    if plan.tune_triton:
        return tune(scenario, work, cores, lambda server: post(server, plan.seconds).rate, over_grpc=over_grpc)
    return best_flags(scenario)


def _idle_cost_kib(server: Server, work: Workload) -> float:
    """Open the connections, let each do one request, and divide the memory they added."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < IDLE_CONNECTIONS + 100:
        raise BenchmarkError(f"{IDLE_CONNECTIONS} connections need a higher limit of open files: ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, IDLE_CONNECTIONS + 100), hard))
    body = work.body_file.read_bytes()
    before = server.rss_bytes()
    connections = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(IDLE_CONNECTIONS)]
    try:
        for connection in connections:
            connection.request("POST", server.path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            if response.status != 200 or connection.sock is None:
                raise BenchmarkError(f"{server.name} does not keep {IDLE_CONNECTIONS} connections: {response.status}")
        return (server.rss_bytes() - before) / IDLE_CONNECTIONS / 1024
    finally:
        for connection in connections:
            connection.close()
