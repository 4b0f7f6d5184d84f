"""A backend that an operator drained stays drained through a reload and a rolling restart; a model of which all
backends are drained is ready nowhere, and every interface says why."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import sys
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import tritonclient.grpc as triton

from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway, until
from tests.live.test_lifecycle import all_gone
from tests.live.test_rolling_restart import DOCUMENT, END_S, successor_of

CONFIG = """
server: {{drain_delay_s: 0, drain_timeout_s: 6, workers: 2}}
models: [{{name: whole, source: models, instances: 2, max_queue_delay_ms: {delay}}}]
"""


def backends(process: GatewayProcess) -> dict[str, str]:
    return {one["backend"]: one["state"] for one in json.loads(process.operations("/api/backends"))}


def act(process: GatewayProcess, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", process.operations_port, timeout=END_S)
    connection.request("POST", f"/api/backends/{path}", b"{}", {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    connection.close()


def document(process: GatewayProcess, path: str, method: str = "GET") -> tuple[int, Any]:
    status, _, body = process.request(method, path)
    return status, json.loads(body)


@pytest.mark.slow
def test_drained_outlives_a_reload_and_a_rolling_restart_and_shows_in_readiness(tmp_path: Path) -> None:
    models.repository(tmp_path / "models", {"whole": models.whole_linear()})
    config = tmp_path / "gateway.yaml"
    config.write_text(CONFIG.format(delay=0))
    with gateway("serve", "-c", str(config)) as process:
        act(process, "onnx-1/drain")
        config.write_text(CONFIG.format(delay=1))
        process.process.send_signal(signal.SIGHUP)
        until(lambda: "SIGHUP: the models of the configuration are served" in process.output(), END_S, "not reloaded")
        assert backends(process) == {"onnx-1": "drained", "onnx-2": "closed"}
        process.process.send_signal(signal.SIGUSR2)
        pid = successor_of(process, 1)
        try:
            assert process.process.wait(END_S) == 0
            found = re.findall(r"operations\s+http://127\.0\.0\.1:(\d+)/", process.output())
            process.operations_port = int(found[-1])
            assert backends(process) == {"onnx-1": "drained", "onnx-2": "closed"}
            for _ in range(5):
                _, headers, _ = process.infer("whole", json.loads(DOCUMENT))
                assert headers["inference-backend"].startswith('"onnx-2"')
            ready_nowhere(process)
            act(process, "onnx-1/undrain")
            assert document(process, "/v2/models/whole/ready") == (200, {"name": "whole", "ready": True})
            assert document(process, "/v2/health/ready") == (200, {"ready": True})
        finally:
            os.kill(pid, signal.SIGTERM)
        until(all_gone([pid]), END_S, "the successor does not end")


def ready_nowhere(process: GatewayProcess) -> None:
    act(process, "onnx-2/drain?force=true")
    why = "all its backends are drained"
    whole = f"model 'whole' version 1: {why}"
    assert document(process, "/v2/models/whole/ready") == (503, {"name": "whole", "ready": False, "reason": why})
    assert document(process, "/v2/health/ready") == (503, {"ready": False, "reason": whole})
    assert document(process, "/v2/health/live") == (200, {"live": True})
    index = [{"name": "whole", "version": "1", "state": "UNAVAILABLE", "reason": why}]
    assert document(process, "/v2/repository/index", "POST") == (200, index)
    health = json.loads(process.operations("/healthz"))
    assert health == {"status": "alive", "ready": False, "reason": whole}
    with triton.InferenceServerClient(f"127.0.0.1:{process.grpc_port}") as client:
        assert not client.is_server_ready()
        assert not client.is_model_ready("whole")
        (entry,) = client.get_model_repository_index().models
        assert (entry.state, entry.reason) == ("UNAVAILABLE", why)
    url = f"http://127.0.0.1:{process.operations_port}"
    status = run(
        [sys.executable, "-m", "gateway", "models", "status", "--ops-url", url],
        capture_output=True, text=True, check=True,
    ).stdout.split("\t")  # fmt: skip
    assert status[:3] == ["whole", "1", "UNAVAILABLE"]
    assert why in status
