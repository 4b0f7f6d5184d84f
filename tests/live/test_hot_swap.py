"""Versions change under load in a real gateway: a directory's files, and an alias of a real MLflow server.

Every answer is held against what it claims: the digest in its head must be that of the weights its numbers come from.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.core.release import OUTCOMES
from gateway.registry.digest import read_artifact
from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway, until
from tests.live.mlflow_server import MlflowServer, mlflow
from tests.swap import FACTORS, WIDTH, Clients, Repository, configured, rss_mib, scale, swap_under_load

__all__ = ["mlflow"]

SWAPS = 20
PATIENCE_S = 60.0
SECRET = "between us"
DATA = [float(place + 1) for place in range(WIDTH)]
REQUEST = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, WIDTH], "data": DATA}]}


class Alias:
    """An MLflow model with a version for each of the factors, and an alias that means one of them."""

    def __init__(self, server: MlflowServer, name: str) -> None:
        self.server = server
        self.name = name
        self.factors: dict[str, float] = {}
        self.digests: list[str] = []
        self.turn = 0
        for factor in FACTORS:
            self.publish(scale(factor), factor)
        self.server.set_alias(name, "champion", "1")

    def publish(self, content: bytes, factor: float = 0.0) -> str:
        published = self.server.publish(self.name, content)
        digest = read_artifact(self.server.files(published), "m", published.version).digest
        self.factors[digest] = factor
        self.digests.append(digest)
        return published.version

    def means(self, version: str) -> None:
        self.server.set_alias(self.name, "champion", version)

    def move(self) -> None:
        self.turn += 1
        self.means(str(1 + self.turn % 2))

    def config(self, root: Path, *more: str, interval_s: float = 3600.0) -> Path:
        (root / "webhook-secret").write_text(SECRET)
        text = [
            "registries:",
            f"  mlflow: {{url: '{self.server.url}', webhook_secret: 'file:webhook-secret'}}",
            f"  cache: {root / 'cache'}",
            f"  lock: {root / 'models.lock'}",
            "models:",
            "  - name: m",
            f"    source: models:/{self.name}@champion",
            f"    poll_interval_s: {interval_s:g}",
            *[f"    {line}" for line in more],
        ]
        config = root / "gateway.yaml"
        config.write_text("\n".join(text) + "\n")
        return config


def cli(process: GatewayProcess, *arguments: str, code: int = 0) -> str:
    """`gateway models …` against the process; its output."""
    command = [sys.executable, "-m", "gateway", "models", *arguments]
    addresses = {
        "GATEWAY_URL": f"http://127.0.0.1:{process.port}",
        "GATEWAY_OPS_URL": f"http://127.0.0.1:{process.operations_port}",
    }
    done = subprocess.run(command, env=os.environ | addresses, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout + done.stderr


def lifecycle(directory: Path) -> list[str]:
    """Kinds of the inference log's lifecycle entries, in their order."""
    question = "select kind from lifecycle order by position"
    command = [sys.executable, "-m", "gateway", "log", "query", question, "--dir", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return [row["kind"] for row in json.loads(done.stdout)]


def status(process: GatewayProcess) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(process.operations("/api/models/m/releases"))
    return found


def answered(process: GatewayProcess, model: str = "m") -> tuple[float, str]:
    """The factor that an answer shows, and its Inference-Model."""
    code, headers, document = process.infer(model, REQUEST)
    assert code == 200, document
    (factor,) = {y / x for x, y in zip(DATA, document["outputs"][0]["data"], strict=True)}
    return factor, headers["inference-model"]


def outcomes(process: GatewayProcess) -> list[str]:
    return [one["outcome"] for one in status(process)["history"]]


@contextlib.contextmanager
def asked_all_the_time(process: GatewayProcess, factors: dict[str, float]) -> Iterator[Clients]:
    """Clients in a thread of their own; at the end all of them were answered, by what their answers name."""
    clients = Clients(process.port, factors, connections=4)
    with asyncio.Runner() as runner:
        thread = threading.Thread(target=lambda: runner.run(clients.run()))
        thread.start()
        try:
            yield clients
        finally:
            clients.stopped = True
            thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert (clients.found.failed, clients.found.mismatched, clients.found.mixed) == ([], 0, 0)


@pytest.mark.slow
async def test_swaps_and_rollbacks_under_load_lose_and_mix_nothing(tmp_path: Path) -> None:
    source = Repository(tmp_path / "models")
    with gateway("serve", "-c", str(configured(tmp_path, source))) as process:
        outcome = await swap_under_load(process, source, SWAPS, calibrate_s=0.5, rollback_every=5)
        assert (outcome.found.failed, outcome.found.mismatched, outcome.found.mixed) == ([], 0, 0)
        assert outcome.swaps == SWAPS
        assert outcome.rollbacks
        assert set(outcome.found.by_digest) == set(source.factors)
        assert process.metric("gateway_model_swaps_total", model="m", outcome="swapped") == SWAPS - outcome.rollbacks
        assert process.metric("gateway_model_release_info", model="m") == 2
        assert rss_mib(process) < outcome.rss[0] * 1.5
        assert "Traceback" not in process.output()
        assert process.stop() == 0


@pytest.mark.slow
def test_an_alias_is_followed_rolled_back_from_and_followed_again(tmp_path: Path, mlflow: MlflowServer) -> None:
    alias = Alias(mlflow, "followed")
    with gateway("serve", "-c", str(alias.config(tmp_path, interval_s=0.2))) as process:
        assert answered(process) == (FACTORS[0], f'"m";version="1";digest="{alias.digests[0]}"')
        with asked_all_the_time(process, alias.factors):
            alias.means("2")
            until(lambda: answered(process)[0] == FACTORS[1], PATIENCE_S, "the alias was not followed")
            assert answered(process) == (FACTORS[1], f'"m";version="2";digest="{alias.digests[1]}"')
            assert answered(process, "m/versions/1")[0] == FACTORS[0]
            assert "version 1 serves now, version 2 before" in cli(process, "rollback", "m")
            assert answered(process)[0] == FACTORS[0]
            asked = status(process)["asked_at"]
            until(lambda: status(process)["asked_at"] > asked, PATIENCE_S, "the source is not asked any more")
            assert answered(process)[0] == FACTORS[0]
            assert status(process)["withheld"]
            assert "was rolled back from" in cli(process, "refresh", "m")
            assert "version 2 serves now" in cli(process, "refresh", "m", "--force")
            assert answered(process)[0] == FACTORS[1]
            third = alias.publish(scale(FACTORS[0] + 5), FACTORS[0] + 5)
            alias.means(third)
            until(lambda: answered(process)[0] == FACTORS[0] + 5, PATIENCE_S, "the alias was not followed")
        assert outcomes(process) == ["loaded", "swapped", "rolled_back", "swapped", "swapped"]
        history = cli(process, "history", "m").splitlines()
        assert [line.split("\t")[1] for line in history] == outcomes(process)
        code, _, document = process.request("GET", "/v2/models/m/versions/1")
        assert code == 404, document
        assert f"models:/followed/{third}" in (tmp_path / "models.lock").read_text()


@pytest.mark.slow
def test_a_rollback_outlives_the_process_until_the_alias_moves(tmp_path: Path, mlflow: MlflowServer) -> None:
    alias = Alias(mlflow, "outlives")
    config = str(alias.config(tmp_path, interval_s=0.2))
    with gateway("serve", "-c", config) as process:
        alias.means("2")
        until(lambda: answered(process)[0] == FACTORS[1], PATIENCE_S, "the alias was not followed")
        cli(process, "rollback", "m")
        assert process.stop() == 0
    with gateway("serve", "-c", config) as process:
        assert answered(process) == (FACTORS[0], f'"m";version="1";digest="{alias.digests[0]}"')
        assert "an operator chose" in process.output()
        asked = status(process)["asked_at"] or 0.0
        until(lambda: (status(process)["asked_at"] or 0.0) > asked, PATIENCE_S, "the source is not asked any more")
        assert status(process)["withheld"]
        assert answered(process)[0] == FACTORS[0]
        third = alias.publish(scale(FACTORS[0] + 5), FACTORS[0] + 5)
        alias.means(third)
        until(lambda: answered(process)[0] == FACTORS[0] + 5, PATIENCE_S, "the alias was not followed")
        assert process.stop() == 0
    with gateway("serve", "-c", config) as process:
        assert answered(process)[0] == FACTORS[0] + 5
        assert "an operator chose" not in process.output()


@pytest.mark.slow
def test_what_must_not_serve_does_not_and_what_serves_goes_on(tmp_path: Path, mlflow: MlflowServer) -> None:
    alias = Alias(mlflow, "guarded")
    right = {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1, WIDTH], "data": [2 * x for x in DATA]}]}
    (tmp_path / "golden.json").write_text(json.dumps([REQUEST | right]))
    config = alias.config(tmp_path, "golden: {file: golden.json}", interval_s=0.2)
    with gateway("serve", "-c", str(config)) as process, asked_all_the_time(process, alias.factors):
        alias.means("2")
        until(lambda: status(process)["refused"] != "", PATIENCE_S, "nothing was refused")
        assert "golden input 1" in status(process)["refused"]
        assert "output 'y' is 3 in element 0, expected 2" in status(process)["refused"]
        assert answered(process)[0] == FACTORS[0]
        assert process.metric("gateway_model_release_refused", model="m") == 1
        asked = status(process)["asked_at"]
        until(lambda: status(process)["asked_at"] > asked, PATIENCE_S, "the source is not asked any more")
        assert outcomes(process) == ["loaded", "refused"], "it is told and tried once"
        assert "not tried again" in cli(process, "refresh", "m", code=1)
        alias.means(alias.publish(models.identity("FP32", WIDTH + 1)))
        until(lambda: len(outcomes(process)) > 2, PATIENCE_S, "the alias was not followed")
        assert "golden" in status(process)["refused"]
        alias.means("1")
        until(lambda: not status(process)["refused"], PATIENCE_S, "what it means now serves")
        assert outcomes(process) == ["loaded", "refused", "refused"]
        assert "Traceback" not in process.output()


@pytest.mark.slow
def test_an_alias_that_mlflow_says_was_moved_is_followed_at_once(tmp_path: Path, mlflow: MlflowServer) -> None:
    alias = Alias(mlflow, "announced")
    with gateway("serve", "-c", str(alias.config(tmp_path))) as process:
        assert answered(process)[0] == FACTORS[0]
        mlflow.webhook(f"http://127.0.0.1:{process.operations_port}/api/webhooks/mlflow", SECRET)
        alias.means("2")
        until(lambda: answered(process)[0] == FACTORS[1], PATIENCE_S, "the event did not come")
        assert [one["by"] for one in status(process)["history"]] == ["start", "webhook"]


@pytest.mark.slow
def test_a_signal_has_the_alias_asked_for(tmp_path: Path, mlflow: MlflowServer) -> None:
    alias = Alias(mlflow, "signalled")
    with gateway("serve", "-c", str(alias.config(tmp_path))) as process:
        alias.means("2")
        process.process.send_signal(signal.SIGHUP)
        until(lambda: answered(process)[0] == FACTORS[1], PATIENCE_S, "the alias was not asked for")
        assert [one["by"] for one in status(process)["history"]] == ["start", "SIGHUP"]


def _wait(condition: Callable[[], bool]) -> None:
    until(condition, PATIENCE_S, "it did not happen")


@pytest.mark.slow
def test_a_directory_is_followed_and_a_candidate_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    source = Repository(tmp_path / "models")
    config = configured(tmp_path, source, interval_s=0.1)
    config.write_text(config.read_text() + f"inference_log: {{directory: {tmp_path / 'log'}}}\n")
    with gateway("serve", "-c", str(config)) as process:
        with asked_all_the_time(process, source.factors):
            source.move()
            _wait(lambda: answered(process)[0] == FACTORS[1])
            source.place.write_bytes(models.identity("FP32", WIDTH + 1))
            _wait(lambda: status(process)["refused"] != "")
            assert "does not fit the clients of version 1" in status(process)["refused"]
            assert answered(process)[0] == FACTORS[1]
            source.put(FACTORS[0])
            _wait(lambda: answered(process)[0] == FACTORS[0])
        history = outcomes(process)
        assert history[:3] == ["loaded", "swapped", "refused"]
        assert history[-1] == "swapped"
        assert process.stop() == 0
    assert [kind for kind in lifecycle(tmp_path / "log") if kind in OUTCOMES] == history


@pytest.mark.slow
def test_a_hand_over_says_which_rollback_its_successor_does_not_repeat(tmp_path: Path) -> None:
    source = Repository(tmp_path / "models")
    with gateway("serve", "-c", str(configured(tmp_path, source, interval_s=0.1))) as process:
        source.move()
        _wait(lambda: answered(process)[0] == FACTORS[1])
        cli(process, "rollback", "m")
        assert answered(process)[0] == FACTORS[0]
        process.process.send_signal(signal.SIGUSR2)
        _wait(lambda: "the successor serves (pid " in process.output())
        successor = int(process.output().rpartition("the successor serves (pid ")[2].partition(")")[0])
        try:
            assert "SIGUSR2: model m: version 1 serves by an operator's choice" in process.output()
            assert process.process.wait(PATIENCE_S) == 0
            assert answered(process)[0] == FACTORS[1]
        finally:
            os.kill(successor, signal.SIGTERM)
            _wait(lambda: not Path(f"/proc/{successor}").exists())
