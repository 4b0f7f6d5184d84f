"""How each system under test is started, Triton excepted (`triton.py`)."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.server import BenchmarkError, Server, free_port
from benchmarks.workload import CACHE, Workload

NGINX_ANSWER: Final = (
    '{"model_name":"tiny","model_version":"1","outputs":[{"name":"y","datatype":"FP32",'
    '"shape":[1,4],"data":[0.12345678,-1.2345678,0.87654321,2.3456789]}]}'
)
NGINX_CONFIG: Final = """\
daemon off;
{user}
worker_processes 1;
pid {prefix}/nginx.pid;
error_log stderr;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  keepalive_requests 1000000000;
  keepalive_timeout 1h;
  client_body_temp_path {prefix}/body;
  proxy_temp_path {prefix}/proxy;
  fastcgi_temp_path {prefix}/fastcgi;
  uwsgi_temp_path {prefix}/uwsgi;
  scgi_temp_path {prefix}/scgi;
  default_type application/json;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{ return 200 '{answer}'; }}
  }}
}}
"""


def tool(name: str, package: str) -> str:
    """Path of a command.

    Raises:
        BenchmarkError: not installed; the text says which Debian package brings it.
    """
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if not found:
        raise BenchmarkError(f"{name} is not installed: apt-get install {package}")
    return found


def nginx(cores: str = "") -> Server:
    """The practical limit of HTTP on a core: reads the same request, answers the same bytes, computes nothing."""
    port = free_port()
    prefix = CACHE / "nginx"
    prefix.mkdir(parents=True, exist_ok=True)
    user = "user root;" if os.geteuid() == 0 else ""
    config = prefix / "nginx.conf"
    config.write_text(NGINX_CONFIG.format(prefix=prefix, port=port, user=user, answer=NGINX_ANSWER))
    command = [tool("nginx", "nginx-light"), "-p", str(prefix), "-c", str(config)]
    return Server("nginx", command, port, "/v2/models/tiny/infer", "/", cores, checked=False, notes="return 200")


def gateway(work: Workload, cores: str = "", workers: int = 2) -> Server:
    """The gateway as a user starts it: every default on."""
    port, grpc_port, metrics_port = free_port(), free_port(), free_port()
    ports = ["--http-port", str(port), "--grpc-port", str(grpc_port), "--metrics-port", str(metrics_port)]
    command = [sys.executable, "-m", "gateway", "serve", str(work.repository), *ports, "--workers", str(workers)]
    model = f"/v2/models/{work.model}"
    return Server(
        "gateway",
        command,
        port,
        f"{model}/infer",
        f"{model}/ready",
        cores,
        environment={"PYTHONPATH": str(Path(__file__).parent.parent)},
        metrics_port=metrics_port,
        grpc_port=grpc_port,
        notes=f"defaults, {workers} workers",
    )


def gateway_logging(work: Workload, directory: Path, cores: str = "") -> Server:
    """The gateway of `gateway()` with the inference log on at its defaults: a row and the tensors of every request."""
    settings = directory / "gateway.yaml"
    settings.write_text(f"inference_log: {{directory: {directory / 'log'}}}\nmodels: [{{source: {work.repository}}}]\n")
    server = gateway(work, cores)
    command = [str(settings) if part == str(work.repository) else part for part in server.command]
    command.insert(command.index(str(settings)), "--config")
    return replace(server, name="gateway, log on", command=command, notes=f"{server.notes}, inference_log: {{}}")


def gateway_before(name: str, backend: str, work: Workload, cores: str = "") -> Server:
    """The gateway with a running server as its only backend, every default on; `backend` is the server's URL."""
    port, grpc_port, metrics_port = free_port(), free_port(), free_port()
    ports = ["--http-port", str(port), "--grpc-port", str(grpc_port), "--metrics-port", str(metrics_port)]
    command = [sys.executable, "-m", "gateway", "serve", backend, *ports]
    model = f"/v2/models/{work.model}"
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return Server(
        name, command, port, f"{model}/infer", f"{model}/ready", cores, environment, metrics_port=metrics_port,
        notes=f"defaults, serve {backend.partition(':')[0]}://…",
    )  # fmt: skip


def grpc_echo(cores: str = "") -> Server:
    """What the stock Python server does with the same message when it neither parses nor computes anything."""
    port, grpc_port = free_port(), free_port()
    command = [sys.executable, "-m", "benchmarks.grpc_echo", str(grpc_port), str(port)]
    return Server(
        "grpc.aio echo",
        command,
        port,
        "/",
        "/",
        cores,
        environment={"PYTHONPATH": str(Path(__file__).parent.parent)},
        checked=False,
        grpc_port=grpc_port,
        notes="grpc.aio on uvloop",
    )


def log_rows(server: Server) -> tuple[float, float]:
    """(rows and events forced onto the disk for the inference log, those lost) so far, from the gateway's metrics."""
    status, text = server.request("GET", "/metrics", port=server.metrics_port)
    if status != 200:
        raise BenchmarkError(f"/metrics answers {status}")
    sums = {"gateway_inference_log_synced_records": 0.0, "gateway_inference_log_dropped": 0.0}
    for family in text_string_to_metric_families(text.decode()):
        if family.name in sums:
            sums[family.name] += sum(sample.value for sample in family.samples if sample.name.endswith("_total"))
    return sums["gateway_inference_log_synced_records"], sums["gateway_inference_log_dropped"]


def batch_rows(server: Server, model: str) -> tuple[float, float]:
    """(rows, batches) executed so far, from the gateway's own `gateway_batch_rows`."""
    status, text = server.request("GET", "/metrics", port=server.metrics_port)
    if status != 200:
        raise BenchmarkError(f"/metrics answers {status}")
    totals = {"sum": 0.0, "count": 0.0}
    for family in text_string_to_metric_families(text.decode()):
        if family.name == "gateway_batch_rows":
            for sample in family.samples:
                kind = sample.name.rpartition("_")[2]
                if kind in totals and sample.labels.get("model") == model:
                    totals[kind] += sample.value
    return totals["sum"], totals["count"]
