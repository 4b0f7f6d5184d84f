"""What one process says of itself before, while and after it serves. Its life as a process: tests/live."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway import terminal
from gateway.app import EXIT_CONFIG, Gateway
from gateway.config import Config
from tests.ingress.oip_bench import oip_bench, replica_of


async def test_ready_means_loaded_and_not_stopping_and_every_model_able_to_answer() -> None:
    async with oip_bench() as bench:
        subject = Gateway(Config())
        subject.models.catalog = bench.catalog
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
    assert not hasattr(subject, "ports")
    assert subject.models.pool.statistics().workers == ()


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
