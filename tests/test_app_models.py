"""What the parts that serve models are told of each other, and pass between them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gateway.app_models import Models
from gateway.backends.onnx import PoolEvent
from gateway.catalog import ServedVersion
from gateway.config import Config, Server
from gateway.core.model import ModelState
from gateway.core.release import Happened
from gateway.errors import ModelError, NotReady
from gateway.management_repository import Repository
from tests.ingress.oip_bench import check, infer, oip_bench, replica_of


def models(config: Config | None = None) -> Models:
    """Nothing of it is started."""
    return Models(config or Config(), asyncio.ensure_future)


@asynccontextmanager
async def serving() -> AsyncIterator[Models]:
    """Serves `numbers` (two versions) from scripted replicas and knows a model that could not be loaded."""
    async with oip_bench() as bench:
        await bench.serve("broken", refuse=ModelError("the graph is odd"))
        found = models()
        found.catalog = bench.catalog
        yield found


async def test_what_happens_to_workers_reaches_the_catalog_and_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as subject:
        version = subject.catalog.find("numbers", "2")
        with caplog.at_level(logging.INFO, "gateway"):
            subject._pool_event(PoolEvent("worker_died", worker="onnx-1", pid=42, text="signal SIGSEGV"))
            assert version.state is ModelState.READY
            subject._pool_event(PoolEvent("model_failed", model="numbers", version="2", text="it crashes"))
            assert (version.state, version.reason) == (ModelState.FAILED, "it crashes")
            subject._pool_event(PoolEvent("model_recovered", model="numbers", version="2"))
            assert (version.state, version.reason) == (ModelState.READY, "")
            subject._pool_event(PoolEvent("worker_ready", worker="onnx-1", pid=43, generation=2))
        for said in (
            "onnx-1 (pid 42) died: signal SIGSEGV",
            "numbers version 2 failed: it crashes",
            "is back (pid 43)",
        ):
            assert said in caplog.text


async def test_pending_counts_what_was_accepted() -> None:
    async with oip_bench() as bench:
        subject = models()
        subject.catalog = bench.catalog
        replica = replica_of(bench.catalog.find("numbers", "2"))
        replica.held = []
        client = await bench.client()
        client.send(infer([1]))
        while not replica.held:
            await asyncio.sleep(0)
        assert subject.pending() == 1
        replica.release()
        check(await client.answer(), [1])
        assert subject.pending() == 0


async def test_workers_are_started_once_however_many_models_ask_at_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = models()
    starts: list[str] = []

    async def start() -> None:
        starts.append("begun")
        await asyncio.sleep(0)

    monkeypatch.setattr(subject.pool, "start", start)
    await asyncio.gather(*[subject.start_workers() for _ in range(3)])
    await subject.start_workers()
    assert starts == ["begun"]


async def test_a_version_is_logged_before_anything_else_sees_it_and_a_release_is_an_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[object] = []

    class Log:
        def event(self, *what: object) -> None:
            seen.append(what)

    class Serving:
        log = Log()

        def attach(self, version: ServedVersion) -> None:
            seen.append("log")

    async with oip_bench() as bench:
        subject = models(Config(Server.model_validate({"metrics": {"nv_summaries": True}})))
        subject.serving_log = Serving()  # type: ignore[assignment]
        for name in ("tracing", "remotes", "backends", "probers", "agreement"):
            watcher = getattr(subject, name)
            monkeypatch.setattr(watcher, "attach", lambda version, name=name: seen.append(name))
        version = bench.catalog.find("numbers", "2")
        subject.catalog.on_ready(version)
        assert seen[0] == "log"
        assert set(seen[1:]) == {"tracing", "remotes", "backends", "probers", "agreement"}
        assert version.statistics.recent is not None
    seen.clear()
    subject.releases.on_happened("numbers", Happened(1.0, "swapped", "poll", "1", "", "2", "", "", "", 0.5))
    ((*who, details),) = [what for what in seen if isinstance(what, tuple)]
    assert who == ["lifecycle", "swapped", "numbers", "2"]
    assert (details["from_version"], details["took_s"]) == ("1", 0.5)


async def test_freezing_ends_changes_and_nothing_that_serves() -> None:
    async with serving() as subject:
        subject.repository = Repository(
            Config(Server.model_validate({"model_control": "explicit"})), subject.catalog, subject.load
        )
        subject.repository.open = True
        await subject.freeze()
        with pytest.raises(NotReady):
            await subject.repository.load("numbers", {})
        assert subject.catalog.find("numbers", "2").state is ModelState.READY
