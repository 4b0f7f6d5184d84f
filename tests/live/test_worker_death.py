"""Workers are killed, frozen and killed again while clients keep asking: no client sees any of it."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.provenance.headers import parse
from tests.live import models
from tests.live.alone import Alone, check
from tests.live.gateway_process import GatewayProcess, gateway, until
from tests.live.in_process import gather_all
from tests.live.oip_wire import Answer, Connection, Request, Tensor, connect, decode

MODELS = {"whole": models.whole_linear(), "heavy": models.slow(256, 160)}
CONNECTIONS = 16
BACK_S = 60.0
"""Bound on a restart. A worker is back within a second; a loaded machine is given more."""
ROUNDS = 40
"""Most kills until one is seen to have hit a running batch."""


@pytest.fixture(scope="module")
def alone() -> dict[str, Alone]:
    return {name: Alone(data) for name, data in MODELS.items()}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[GatewayProcess]:
    with gateway("serve", str(models.repository(tmp_path, MODELS)), "--workers", "2") as process:
        yield process


class Load:
    """Clients that keep asking while the `with` block lasts; every answer is checked."""

    def __init__(self, port: int, alone: dict[str, Alone], connections: int = CONNECTIONS) -> None:
        self.answered = 0
        self.attempts: set[int] = set()
        self.slowest_s = 0.0
        self._port = port
        self._alone = alone
        self._connections = connections
        self._stop = False
        self._numbers = itertools.count()

    async def __aenter__(self) -> Load:
        self._clients = [asyncio.create_task(self._client(number)) for number in range(self._connections)]
        await self.more(self._connections)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop = True
        await gather_all(list(self._clients))

    async def more(self, answers: int) -> None:
        """Returns when that many further answers have come."""
        goal = self.answered + answers
        await eventually(lambda: self.answered >= goal or any(client.done() for client in self._clients), "no answers")
        for client in self._clients:
            if client.done():
                client.result()

    async def _client(self, number: int) -> None:
        rng = np.random.default_rng(number)
        async with connect(self._port) as connection:
            while not self._stop:
                request = self._request(rng)
                start = time.monotonic()
                answer = await connection.ask(request)
                self.slowest_s = max(self.slowest_s, time.monotonic() - start)
                check(request, answer, self._alone[request.model], 1e-5 if request.model == "heavy" else 0.0)
                self.attempts |= {member.attempt for member in parse(answer.headers).members}
                self.answered += 1

    def _request(self, rng: np.random.Generator) -> Request:
        request_id = str(next(self._numbers))
        if "heavy" in self._alone and rng.random() < 0.7:
            array = rng.standard_normal((int(rng.integers(1, 4)), 256)).astype(np.float32)
            return Request("heavy", [Tensor("x", "FP32", array, binary=True)], request_id=request_id)
        array = rng.integers(-99, 100, (int(rng.integers(1, 4)), 6)).astype(np.float32)
        return Request("whole", [Tensor("x", "FP32", array)], request_id=request_id)


async def eventually(condition: Callable[[], bool], otherwise: str, timeout_s: float = BACK_S) -> float:
    """Wait in an event loop until `condition` holds; returns the seconds it took."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > timeout_s:
            raise AssertionError(otherwise)
        await asyncio.sleep(0.005)
    return time.monotonic() - start


async def workers(served: GatewayProcess) -> list[dict[str, Any]]:
    return await asyncio.to_thread(served.workers)


async def failed_attempts(served: GatewayProcess, *outcomes: str) -> float:
    def count() -> float:
        return sum(served.metric("gateway_backend_attempts_total", outcome=outcome) for outcome in outcomes)

    return await asyncio.to_thread(count)


async def all_back(served: GatewayProcess, gone: set[int]) -> float:
    """Seconds until every worker is ready again under a process id not in `gone`."""
    start = time.monotonic()
    while True:
        now = await workers(served)
        if all(worker["state"] == "ready" and worker["pid"] and worker["pid"] not in gone for worker in now):
            return time.monotonic() - start
        assert time.monotonic() - start < BACK_S, now


def run(story: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(300):
            await story

    asyncio.run(bounded())


def test_killing_workers_in_turn_is_invisible_to_clients(
    served: GatewayProcess, alone: dict[str, Alone], capsys: pytest.CaptureFixture[str]
) -> None:
    async def story() -> None:
        back_s, kills = [], 0
        async with Load(served.port, alone) as load:
            while kills < ROUNDS and (kills < 4 or await failed_attempts(served, "broken") == 0):
                victim = (await workers(served))[kills % 2]["pid"]
                os.kill(victim, signal.SIGKILL)
                kills += 1
                await load.more(CONNECTIONS)
                back_s.append(await all_back(served, {victim}))
                await load.more(CONNECTIONS)
        assert await failed_attempts(served, "broken") >= 1, "no kill hit a running batch"
        assert max(load.attempts) >= 2
        with capsys.disabled():
            print(  # noqa: T201  # the measurement is worth seeing; nothing depends on it
                f"\n{kills} kills, {load.answered} answers, slowest {load.slowest_s:.2f} s, "
                f"back after {max(back_s):.2f} s at most"
            )
        assert served.metric("gateway_worker_restarts_total", model="heavy") == kills
        assert served.metric("gateway_retries_total") >= 1
        assert served.metric("gateway_requests_total", code="200") == load.answered
        assert served.metric("gateway_queue_rows") == 0
        assert served.metric("gateway_backend_inflight_batches") == 0

    run(story())


def test_when_every_worker_dies_at_once_requests_wait(served: GatewayProcess, alone: dict[str, Alone]) -> None:
    async def story() -> None:
        async with Load(served.port, alone) as load:
            pids = {worker["pid"] for worker in await workers(served)}
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            await load.more(4 * CONNECTIONS)
            await all_back(served, pids)
        assert served.request("GET", "/v2/health/ready")[0] == 200

    run(story())


def test_kills_from_outside_blame_no_model(tmp_path: Path, alone: dict[str, Alone]) -> None:
    """More deaths than a crash loop needs, on workers of its own: neither that model nor its neighbours suffer."""
    root = models.repository(tmp_path / "models", MODELS)
    config = tmp_path / "gateway.yaml"
    config.write_text(
        f"server: {{workers: 2}}\nmodels:\n  - {{source: {root}/heavy, isolation: dedicated, instances: 1}}\n"
        f"  - {{source: {root}/whole}}\n"
    )
    with gateway("serve", "-c", str(config)) as served:
        shared = {w["name"]: w["pid"] for w in served.workers() if w["models"] == ["whole/1"]}
        assert len(shared) == 2
        for _ in range(3):
            victim = next(worker for worker in served.workers() if worker["models"] == ["heavy/1"])
            os.kill(victim["pid"], signal.SIGKILL)
            until(partial(dedicated_back, served, victim["pid"]), BACK_S, "it did not come back")
        assert {w["name"]: w["pid"] for w in served.workers() if w["models"] == ["whole/1"]} == shared
        for name, width in (("heavy", 256), ("whole", 6)):
            request = Request(name, [Tensor("x", "FP32", np.ones((1, width), np.float32))])
            status, headers, _ = served.infer(name, request.document()[0])
            assert status == 200
            assert parse(headers.items()).members[0].attempt == 1


def dedicated_back(served: GatewayProcess, gone: int) -> bool:
    worker = next(worker for worker in served.workers() if "heavy" in worker["name"])
    return worker["state"] == "ready" and worker["pid"] not in {0, gone} and "heavy/1" in worker["models"]


@pytest.mark.slow
def test_a_frozen_worker_is_replaced_and_its_batch_answered_elsewhere(
    served: GatewayProcess, alone: dict[str, Alone]
) -> None:
    """SIGSTOP: the process is there and says nothing. After the attempt timeout it is killed."""

    async def story() -> None:
        victim = (await workers(served))[0]["pid"]
        async with Load(served.port, alone) as load:
            os.kill(victim, signal.SIGSTOP)
            await all_back(served, {victim})
            await load.more(CONNECTIONS)
        # What it had begun ran out of time; what it had not was never sent, as far as anybody is concerned.
        assert await failed_attempts(served, "timeout", "not_sent") >= 1

    run(story())


@pytest.mark.slow
def test_input_that_never_returns_harms_nobody_else(tmp_path: Path) -> None:
    """One request sends its model into an endless loop: it fails alone, its batch-mates and neighbours are answered.
    No worker dies of it, because such a run can be ended; and the next time it is not executed at all."""
    root = models.repository(tmp_path, {"looper": models.looper(), "whole": models.whole_linear()})
    alone = {"whole": Alone(models.whole_linear())}
    poison = 5

    async def ask(port: int, number: int) -> Answer:
        turns = np.array([2**62 if number == poison else number])
        async with connect(port) as connection:
            return await connection.ask(Request("looper", [Tensor("turns", "INT64", turns)], request_id=str(number)))

    async def story(served: GatewayProcess) -> list[Answer]:
        async with Load(served.port, alone, connections=2):
            return await gather_all([ask(served.port, number) for number in range(12)])

    with gateway("serve", str(root), "--workers", "2") as served:
        assert asyncio.run(ask(served.port, 3)).status == 200  # from here on it is known how long a run takes
        answers = asyncio.run(story(served))
        for number, answer in enumerate(answers):
            if number == poison:
                assert answer.status == 500
                assert "failed on this input alone" in answer.error
            else:
                assert decode(answer)["y"][1].tolist() == [number]
        assert served.metric("gateway_worker_restarts_total") == 0
        executed = served.metric("gateway_backend_attempts_total", model="looper")
        assert asyncio.run(ask(served.port, poison)).status == 500
        assert served.metric("gateway_backend_attempts_total", model="looper") == executed
        assert asyncio.run(ask(served.port, 3)).status == 200


@pytest.mark.slow
def test_connections_opened_while_no_worker_is_up_are_served(served: GatewayProcess, alone: dict[str, Alone]) -> None:
    async def story() -> None:
        pids = {worker["pid"] for worker in await workers(served)}
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        rng = np.random.default_rng(5)

        async def one() -> None:
            request = Request("heavy", [Tensor("x", "FP32", rng.standard_normal((1, 256)).astype(np.float32))])
            connection = await Connection.open(served.port)
            check(request, await connection.ask(request), alone["heavy"], 1e-5)
            await connection.close()

        await gather_all([one() for _ in range(64)])
        await all_back(served, pids)

    run(story())
