"""The files under deploy/ agree with each other and with the gateway: ports, paths, metric names, safety settings.

No container can be started in every place that runs these tests, so structure is checked here, and promtool checks
Prometheus's own files wherever it is installed (Debian: apt-get install prometheus).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.config_schema import Server
from gateway.observe.metrics import Scrape

REPOSITORY = Path(__file__).parent.parent.parent
DEPLOY = REPOSITORY / "deploy"


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def dockerfile() -> list[str]:
    """Instructions with continued lines joined, comments dropped."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text())
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def instruction(name: str) -> str:
    return next(line.removeprefix(name).strip() for line in reversed(dockerfile()) if line.startswith(name + " "))


def test_image_runs_the_gateway_as_a_user_without_rights() -> None:
    assert instruction("ENTRYPOINT") == '["gateway"]'
    assert yaml.safe_load(instruction("CMD"))[:2] == ["serve", "/models"]
    assert int(instruction("USER")) > 0
    assert [line.split()[1] for line in dockerfile() if line.startswith("FROM ")] == ["python:3.12-slim"] * 2


def test_everything_the_image_copies_exists_and_is_not_ignored() -> None:
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    sources = [
        source
        for line in dockerfile()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    assert sources
    for source in sources:
        assert f"!{source}" in ignore
        assert (REPOSITORY / source).exists()


def test_services_are_health_checked_and_reachable_from_this_machine_only() -> None:
    services = read("compose.yaml")["services"]
    assert set(services) == {"gateway", "prometheus"}
    for service in services.values():
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert all(re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port) for port in service["ports"])


def test_compose_builds_this_dockerfile_and_mounts_files_that_exist() -> None:
    services = read("compose.yaml")["services"]
    build = services["gateway"]["build"]
    context = (DEPLOY / build["context"]).resolve()
    assert (context / build["dockerfile"]).resolve() == (DEPLOY / "Dockerfile").resolve()
    models = re.sub(r"\$\{MODELS:-(.*)\}", r"\1", services["gateway"]["volumes"][0]["source"])
    assert (DEPLOY / models / "digits" / "1" / "model.onnx").exists()
    mounted = [v.split(":")[0] for v in services["prometheus"]["volumes"] if v.startswith("./")]
    assert {"./prometheus.yml", "./alerts.yml"} == set(mounted)
    assert all((DEPLOY / name).exists() for name in mounted)


def test_image_and_compose_ask_the_same_health_question() -> None:
    in_image = yaml.safe_load(instruction("HEALTHCHECK").partition("CMD ")[2])
    in_compose = read("compose.yaml")["services"]["gateway"]["healthcheck"]["test"]
    assert in_compose == ["CMD", *in_image]
    assert "/v2/health/ready" in in_image[-1]


def test_every_port_the_gateway_listens_on_is_published() -> None:
    server = Server()
    ports = {str(port) for port in (server.http_port, server.grpc_port, server.metrics_port)}
    assert set(instruction("EXPOSE").split()) == ports
    assert {port.rpartition(":")[2] for port in read("compose.yaml")["services"]["gateway"]["ports"]} == ports
    run = next(line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if "docker run" in line)
    (first, last) = re.findall(r"127\.0\.0\.1:(\d+)-(\d+):\1-\2", run)[0]
    assert {str(port) for port in range(int(first), int(last) + 1)} == ports


def test_gateway_has_longer_to_stop_than_it_gives_its_requests() -> None:
    grace = read("compose.yaml")["services"]["gateway"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > 30


def test_prometheus_scrapes_the_published_operations_port() -> None:
    (job,) = read("prometheus.yml")["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    ports = read("compose.yaml")["services"][host]["ports"]
    assert f"127.0.0.1:{port}:{port}" in ports
    assert job["metrics_path"] == "/metrics"


def test_alerts_use_metrics_the_gateway_has() -> None:
    known = {family.name for family in Scrape(0.0).families()}
    rules = [rule for group in read("alerts.yml")["groups"] for rule in group["rules"]]
    for rule in rules:
        used = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bgateway_\w+", rule["expr"])}
        assert used <= known, rule["alert"]
        assert used or rule["alert"] == "GatewayDown"
        assert {"summary", "action"} <= set(rule["annotations"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_configuration_and_the_alerts() -> None:
    done = subprocess.run(
        ["promtool", "check", "config", str(DEPLOY / "prometheus.yml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 rules found" in done.stdout


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_refuses_a_broken_expression(tmp_path: Path) -> None:
    broken = (DEPLOY / "alerts.yml").read_text().replace("up{job=", "up{{job=")
    (tmp_path / "alerts.yml").write_text(broken)
    done = subprocess.run(
        ["promtool", "check", "rules", str(tmp_path / "alerts.yml")],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
