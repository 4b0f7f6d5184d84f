"""Priorities, queue policies and their statistics as clients see them: one real instance, kept busy by a real run.

The model loops as often as its input says, so a request can keep the instance busy for as long as a test needs; what
is compared is the order of events, not how long they take.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import numpy as np
import pytest

from gateway.provenance.headers import parse
from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway, until
from tests.live.in_process import gather_all
from tests.live.oip_wire import Answer, Request, Tensor, connect

CONFIGS = {
    "levels": "dynamic_batching { priority_levels: 2 default_priority_level: 2 }",
    "small": "dynamic_batching { default_queue_policy { max_queue_size: 1 } }",
    "impatient": """dynamic_batching { default_queue_policy {
        default_timeout_microseconds: 60000000 allow_timeout_override: true max_queue_size: 8 } }""",
    "stoic": "dynamic_batching { default_queue_policy { allow_timeout_override: true } }",
    "putting_off": """dynamic_batching { default_queue_policy {
        timeout_action: DELAY default_timeout_microseconds: 60000000 allow_timeout_override: true } }""",
}
BUSY_S = 0.8
T = TypeVar("T")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    root = models.repository(
        tmp_path_factory.mktemp("policies"),
        dict.fromkeys(CONFIGS, models.looper()),
        {name: f"max_batch_size: 0 {text}\n" for name, text in CONFIGS.items()},
    )
    with gateway("serve", str(root), "--workers", "1", "--instances", "1") as process:
        yield process


@pytest.fixture(scope="module")
def turns(served: GatewayProcess) -> int:
    """How often the model must loop to keep its instance busy for `BUSY_S`."""
    few = 20_000
    begun = time.monotonic()
    status, _, _ = served.infer("levels", {"inputs": [_input(few)]})
    assert status == 200
    return int(few * BUSY_S / (time.monotonic() - begun))


def _input(turns: int) -> dict[str, object]:
    return {"name": "turns", "datatype": "INT64", "shape": [1], "data": [turns]}


async def ask(served: GatewayProcess, model: str, turns: int = 1, **parameters: int) -> Answer:
    request = Request(model, [Tensor("turns", "INT64", np.array([turns], np.int64))], parameters=parameters)
    async with connect(served.port) as connection:
        return await connection.ask(request)


class TooSlow(Exception):
    """The instance was free again before the scene was set; nothing can be said about what happened."""


class Scene:
    """The model's only instance is busy with a request of somebody else's."""

    def __init__(self, served: GatewayProcess, model: str, running: asyncio.Task[Answer]) -> None:
        self.served = served
        self.model = model
        self._running = running

    def ask(self, **parameters: int) -> asyncio.Task[Answer]:
        return asyncio.create_task(ask(self.served, self.model, **parameters))

    async def wait_for(self, metric: str, value: float) -> None:
        def reached() -> bool:
            return self.served.metric(metric, model=self.model) >= value or self._running.done()

        await asyncio.to_thread(until, reached, 60, f"{metric} does not become {value}")
        self.still_set()

    async def queued(self, count: int) -> None:
        """Returns when `count` requests wait; each has one row."""
        await self.wait_for("gateway_queue_rows", count)

    def still_set(self) -> None:
        if self._running.done():
            raise TooSlow


def play(served: GatewayProcess, model: str, turns: int, story: Callable[[Scene], Awaitable[T]]) -> T:
    """What `story` returns, told while the instance is busy: for longer, should the machine be too slow for it."""

    async def once(turns: int) -> T:
        running = asyncio.create_task(ask(served, model, turns))
        scene = Scene(served, model, running)
        try:
            await scene.wait_for("gateway_backend_inflight_batches", 1)
            return await story(scene)
        finally:
            assert (await running).status == 200

    for longer in (1, 4):
        with contextlib.suppress(TooSlow):
            return asyncio.run(once(turns * longer))
    return asyncio.run(once(turns * 16))


def batch_number(answer: Answer) -> int:
    (member,) = parse(answer.headers).members
    return int(member.batch_id.partition("-")[2])


def test_the_higher_level_goes_first_and_in_order(served: GatewayProcess, turns: int) -> None:
    async def story(scene: Scene) -> list[Answer]:
        tasks: list[Awaitable[Answer]] = []
        for place, priority in enumerate((2, 0, 99, 1, 1, 1)):
            tasks.append(scene.ask(priority=priority))
            await scene.queued(place + 1)
        return await gather_all(tasks)

    answers = play(served, "levels", turns, story)
    assert {answer.status for answer in answers} == {200}
    numbers = [batch_number(answer) for answer in (*answers[3:], *answers[:3])]
    assert numbers == sorted(numbers)


def test_a_full_queue_refuses_at_once_and_is_no_failure(served: GatewayProcess, turns: int) -> None:
    async def story(scene: Scene) -> tuple[Answer, Answer, Answer]:
        waiting = scene.ask()
        await scene.queued(1)
        refused = await scene.ask(), await scene.ask()
        scene.still_set()
        return *refused, await waiting

    *refused, waited = play(served, "small", turns, story)
    assert waited.status == 200
    for answer in refused:
        assert answer.status == 503
        assert "Exceeds maximum queue size" in answer.error
    assert served.metric("gateway_rejected_total", model="small", reason="queue_size") >= 2


def test_a_timeout_fires_while_the_instance_is_busy(served: GatewayProcess, turns: int) -> None:
    async def story(scene: Scene) -> tuple[Answer, float, Answer]:
        patient = scene.ask()
        begun = time.monotonic()
        late = await scene.ask(timeout=50_000)
        took_s = time.monotonic() - begun
        scene.still_set()
        return late, took_s, await patient

    late, took_s, patient = play(served, "impatient", turns, story)
    assert took_s >= 0.05
    assert late.status == 503
    assert "Request timeout expired" in late.error
    assert patient.status == 200
    assert served.metric("nv_inference_request_failure", model="impatient", reason="REJECTED") >= 1


def test_a_timeout_where_there_is_none_to_shorten_does_nothing(served: GatewayProcess, turns: int) -> None:
    async def story(scene: Scene) -> Answer:
        return await scene.ask(timeout=1_000)

    assert play(served, "stoic", turns, story).status == 200


def test_who_is_put_off_goes_last(served: GatewayProcess, turns: int) -> None:
    async def story(scene: Scene) -> tuple[Answer, Answer]:
        first = scene.ask(timeout=1_000)
        await scene.queued(1)
        await asyncio.sleep(0.05)  # its time runs out; later than that changes nothing
        second = scene.ask()
        await scene.queued(2)
        return await first, await second

    put_off, fresh = play(served, "putting_off", turns, story)
    assert (put_off.status, fresh.status) == (200, 200)
    assert batch_number(fresh) < batch_number(put_off)
