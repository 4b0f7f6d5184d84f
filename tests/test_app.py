"""What the composition root says of its parts, and passes between them. Its life as a process: tests/live."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway import terminal
from gateway.app import EXIT_CONFIG, Gateway
from gateway.backends.onnx import PoolEvent
from gateway.config import Config, Server
from gateway.core.model import ModelState
from gateway.errors import ConfigError, ModelError
from tests.ingress.oip_bench import check, infer, oip_bench, replica_of


@asynccontextmanager
async def gateway() -> AsyncIterator[Gateway]:
    """Serves `numbers` (two versions) from scripted replicas and knows a model that could not be loaded."""
    async with oip_bench() as bench:
        await bench.serve("broken", refuse=ModelError("the graph is odd"))
        found = Gateway(Config())
        found.catalog = bench.catalog
        yield found


async def test_ready_means_loaded_and_not_stopping_and_every_model_able_to_answer() -> None:
    async with oip_bench() as bench:
        subject = Gateway(Config())
        subject.catalog = bench.catalog
        assert subject.obstacle() == "models are still being loaded"
        subject._loaded = True
        assert subject._health() == {"ready": True}
        replica = replica_of(bench.catalog.find("numbers", "1"))
        replica.available = False
        why = "model 'numbers' version 1: no worker is available"
        assert subject._health() == {"ready": False, "reason": why}
        replica.available = True
        subject._draining = True
        assert subject.obstacle() == "the server is stopping"


async def test_what_happens_to_workers_reaches_the_catalog_and_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with gateway() as subject:
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
        subject = Gateway(Config())
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


async def test_faults_of_the_models_end_it_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(terminal, "show_error", said.append)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    subject = Gateway(Config().with_sources([str(tmp_path / "one"), str(tmp_path / "two")]))
    assert await subject.serve(demo=False) == EXIT_CONFIG
    assert [str(tmp_path / name) in text for name, text in zip(("one", "two"), said, strict=True)] == [True, True]
    assert not hasattr(subject, "pool")


async def test_a_demo_that_cannot_ask_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(terminal, "show_error", said.append)

    class Nobody:
        port = 0

    subject = Gateway(Config())
    subject.operations = Nobody()  # type: ignore[assignment]
    await subject._show_demo(0)
    (line,) = said
    assert line.startswith("the demo could not ask its models: ")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("control", "failed", "told"),
    [
        ("none", [], "the models of the configuration are served"),
        ("poll", ["m"], "the models of the configuration are served, but for m: see above"),
        ("explicit", [], "what is loaded stays as it is"),
    ],
)
async def test_sighup_claims_no_more_than_was_done(
    control: str, failed: list[str], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Reloaded:
        async def reload(self, config: Config) -> list[str]:
            return failed

    before = Config(Server.model_validate({"model_control": control}))
    now = Config(Server.model_validate({"model_control": control, "http_port": 1, "log_level": "debug"}))
    subject = Gateway(before, lambda: now)
    subject.repository = Reloaded()  # type: ignore[assignment]
    with caplog.at_level(logging.INFO, "gateway"):
        await subject._reload()
    restart, said = caplog.messages
    assert restart == "SIGHUP: changed too, but takes a restart: server.http_port, server.log_level"
    assert said.endswith(told)


async def test_a_reload_whose_variants_fail_at_the_last_moment_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Reloaded:
        async def reload(self, config: Config) -> list[str]:
            return []

    settled: list[str] = []

    class Undecided:
        async def configure(self, config: Config) -> None:
            raise ConfigError("belongs to one model, and models holds 2")

        async def settle(self) -> None:
            settled.append("settled")

    subject = Gateway(Config(), Config)
    subject.repository, subject.variants = Reloaded(), Undecided()  # type: ignore[assignment]
    with caplog.at_level(logging.INFO, "gateway"):
        await subject._reload()
    assert caplog.messages == [
        "SIGHUP: canaries and shadows stay as they were: belongs to one model, and models holds 2",
        "SIGHUP: the models of the configuration are served",
    ]
    assert settled == ["settled"]
