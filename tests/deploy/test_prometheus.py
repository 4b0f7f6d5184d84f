"""A real Prometheus, started from deploy/'s configuration, scrapes a real gateway and evaluates every alert."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import gateway.demo
from benchmarks.server import Server, free_port

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
MODELS = Path(gateway.demo.__file__).parent / "models"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]


def eventually(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Poll until `condition()` is true; returns its value, or the last one when time is up."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > end:
            return value
        time.sleep(0.1)


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """A function that asks the running Prometheus's API for a path below /api/v1/."""
    port, metrics_port = free_port(), free_port()
    ports = ["--http-port", str(port), "--metrics-port", str(metrics_port)]
    command: list[str | Path] = [sys.executable, "-m", "gateway", "serve", MODELS, *ports, "--workers", "2"]
    config = (DEPLOY / "prometheus.yml").read_text()
    assert '"gateway:8002"' in config
    config = config.replace('"gateway:8002"', f'"127.0.0.1:{metrics_port}"').replace(" 5s", " 1s")
    (tmp_path / "prometheus.yml").write_text(config)
    shutil.copy(DEPLOY / "alerts.yml", tmp_path)
    listen = free_port()

    def ask(path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{listen}/api/v1/{path}", timeout=10) as response:
            return json.load(response)["data"]

    arguments: list[str | Path] = [
        "prometheus",
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{listen}",
    ]
    with (
        Server("gateway-prometheus", command, port, "", "/v2/health/ready"),
        Server("prometheus", arguments, listen, "", "/-/ready"),
    ):
        yield ask


def test_prometheus_scrapes_the_gateway_and_no_alert_fires(prometheus: Callable[[str], Any]) -> None:
    def target() -> Any:
        return [t["scrapeUrl"] for t in prometheus("targets")["activeTargets"] if t["health"] == "up"]

    assert len(eventually(target)) == 1, prometheus("targets")["activeTargets"]
    query = urllib.parse.quote('gateway_backend_state{state="closed"}')
    ready = eventually(lambda: prometheus(f"query?query={query}")["result"])
    assert {(s["metric"]["model"], s["metric"]["backend"], s["value"][1]) for s in ready} == {
        (model, backend, "1") for model in ("digits", "digits_cnn") for backend in ("onnx-1", "onnx-2")
    }

    def rules() -> Any:
        (group,) = prometheus("rules")["groups"]
        return group["rules"] if all(rule["health"] == "ok" for rule in group["rules"]) else None

    assert [rule["name"] for rule in eventually(rules) or [] if rule["state"] == "firing"] == []
    assert len(eventually(rules) or []) == 12


def test_negative_control_a_target_that_is_down_is_seen() -> None:
    """The alert's expression would select a gateway that does not answer: checked with promtool's own engine."""
    tests = DEPLOY / "alerts.yml"
    document = {
        "rule_files": [str(tests)],
        "evaluation_interval": "5s",
        "tests": [
            {
                "interval": "5s",
                "input_series": [
                    {"series": 'up{job="gateway",instance="a"}', "values": "0x20"},
                    {"series": 'gateway_backend_state{instance="a",model="m",state="closed"}', "values": "0x20"},
                ],
                "alert_rule_test": [
                    {"eval_time": "60s", "alertname": name, "exp_alerts": []}
                    for name in ("GatewayDown", "ModelHasNoBackend")
                ],
            }
        ],
    }
    done = subprocess.run(
        ["promtool", "test", "rules", "/dev/stdin"],
        input=json.dumps(document),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "GatewayDown" in done.stdout + done.stderr
    assert "ModelHasNoBackend" in done.stdout + done.stderr
