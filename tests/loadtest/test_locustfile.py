"""The load test itself, run as its README says: locust in a process of its own because it patches the interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import gateway.demo
from benchmarks.server import Server, free_port
from loadtest.answers import CASE_NAMES

REPOSITORY = Path(__file__).parent.parent.parent
MODELS = Path(gateway.demo.__file__).parent / "models"


def locust(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=180, check=False)


def test_locust_lists_the_user_and_its_tasks() -> None:
    done = locust("--show-task-ratio")
    assert done.returncode == 0, done.stderr
    for name in ("Client", "one_row_json", "one_row_binary", "several_rows"):
        assert name in done.stdout + done.stderr


@pytest.mark.slow
def test_every_answer_of_the_demo_models_is_right_under_load() -> None:
    port, metrics_port = free_port(), free_port()
    ports = ["--http-port", str(port), "--metrics-port", str(metrics_port)]
    command: list[str | Path] = [sys.executable, "-m", "gateway", "serve", MODELS, *ports, "--workers", "2"]
    with Server("gateway-loadtest", command, port, "", "/v2/health/ready") as server:
        load = ("--headless", "--users", "16", "--spawn-rate", "16", "--run-time", "4s", "--json")
        done = locust(*load, "--host", f"http://127.0.0.1:{server.port}")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    assert sum(row["num_failures"] for row in rows) == 0
    assert {row["name"] for row in rows} == CASE_NAMES


@pytest.mark.slow
def test_a_load_test_that_reaches_nothing_fails() -> None:
    done = locust("--headless", "--users", "1", "--run-time", "1s", "--host", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 1
