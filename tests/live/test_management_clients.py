"""Management with the clients people have: tritonclient, the command line, Prometheus; on a real gateway process."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway, until

PATIENCE_S = 60.0
ROWS = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}]}
DURATIONS = {
    "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    contents = {name: models.identity("FP32") for name in ("steady", "moving", "counted", "spare")}
    tags = 'metric_tags { key: "team" value: "vision" }'
    return models.repository(tmp_path_factory.mktemp("repository"), contents, {"counted": tags})


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trace") / "trace.json"


@pytest.fixture(scope="module")
def served(root: Path, trace_file: Path) -> Iterator[GatewayProcess]:
    file = root.parent / "gateway.yaml"
    file.write_text(
        f"server:\n  trace: {{file: {trace_file}}}\n  metrics: {{nv_summaries: true}}\n"
        "  restricted_apis: [{apis: [logging], header: x-admin, value: sesame}]\n"
        f"models: [{{source: {root}}}]\n"
    )
    loads = [argument for name in ("steady", "moving", "counted") for argument in ("--load-model", name)]
    with gateway("serve", "-c", str(file), "--workers", "2", "--model-control", "explicit", *loads) as process:
        yield process


@pytest.fixture(scope="module")
def client(served: GatewayProcess) -> Iterator[Any]:
    with contextlib.closing(http_client.InferenceServerClient(f"127.0.0.1:{served.port}")) as client:
        yield client


def states(client: Any) -> dict[str, str]:
    return {entry["name"]: entry.get("state", "never loaded") for entry in client.get_model_repository_index()}


def test_tritonclient_loads_overrides_and_unloads(client: Any, served: GatewayProcess) -> None:
    assert states(client)["spare"] == "never loaded"
    client.load_model("spare")
    assert client.is_model_ready("spare")
    client.load_model("spare", config=json.dumps({"max_batch_size": "16"}))
    assert client.get_model_config("spare")["max_batch_size"] == 16
    client.load_model("spare", config="{}", files={"file:5/model.onnx": models.identity("INT32")})
    metadata = client.get_model_metadata("spare")
    assert (metadata["versions"], metadata["inputs"][0]["datatype"]) == (["5"], "INT32")
    with pytest.raises(InferenceServerException, match="failed to load"):
        client.load_model("spare", config="{}", files={"file:1/model.onnx": b"this is no model"})
    assert client.get_model_metadata("spare")["versions"] == ["5"]
    client.load_model("spare")
    assert client.get_model_metadata("spare")["inputs"][0]["datatype"] == "FP32"
    client.unload_model("spare")
    assert not client.is_model_ready("spare")
    assert client.is_server_ready()
    assert states(client)["spare"] == "UNAVAILABLE"
    with pytest.raises(InferenceServerException, match="has no available versions"):
        client.infer("spare", [])
    with pytest.raises(InferenceServerException, match="failed to load 'nobody', failed to poll from model repository"):
        client.load_model("nobody")
    client.unload_model("nobody")


def test_statistics_as_a_load_tool_reads_them(client: Any) -> None:
    """What perf_analyzer asks for and requires, in its order."""
    metadata = client.get_model_metadata("counted")
    config = client.get_model_config("counted")
    assert {tensor["name"] for tensor in config["input"]} == {tensor["name"] for tensor in metadata["inputs"]}
    assert metadata["inputs"][0]["shape"][0] == -1
    assert config["max_batch_size"] > 0
    assert "statistics" in client.get_server_metadata()["extensions"]
    (before,) = client.get_inference_statistics("counted")["model_stats"]
    assert {name: d["count"] for name, d in before["inference_stats"].items()} == dict.fromkeys(DURATIONS, 0)
    tensor = http_client.InferInput("x", [2, 3], "FP32")
    tensor.set_data_from_numpy(np.ones((2, 3), np.float32))
    for _ in range(4):
        client.infer("counted", [tensor])
    (after,) = client.get_inference_statistics("counted", "1")["model_stats"]
    assert (after["inference_count"], after["execution_count"]) == (8, 4)
    stats = after["inference_stats"]
    assert stats["queue"]["count"] == stats["success"]["count"] == stats["compute_infer"]["count"] == 4
    spent = sum(stats[name]["ns"] for name in ("queue", "compute_input", "compute_infer", "compute_output"))
    assert 0 < spent <= stats["success"]["ns"]
    (size,) = after["batch_stats"]
    assert (size["batch_size"], size["compute_infer"]["count"]) == (2, 4)
    assert after["last_inference"] >= before["last_inference"]
    with pytest.raises(InferenceServerException, match="requested model 'nobody' is not available") as caught:
        client.get_inference_statistics("nobody")
    assert caught.value.status() == "400"


def test_no_request_fails_while_its_model_is_loaded_again_and_again(client: Any, served: GatewayProcess) -> None:
    stop = threading.Event()
    answers: list[tuple[int, Any]] = []

    def ask() -> None:
        while not stop.is_set():
            status, _, answer = served.infer("moving", ROWS)
            answers.append((status, answer.get("outputs", [{}])[0].get("data")))

    callers = [threading.Thread(target=ask) for _ in range(4)]
    for caller in callers:
        caller.start()
    try:
        for n in range(6):
            asked = len(answers)
            client.load_model("moving", config=json.dumps({"max_batch_size": 4 + n}))
            assert client.get_model_config("moving")["max_batch_size"] == 4 + n
            until(lambda asked=asked: len(answers) > asked + 4, PATIENCE_S, "nobody is answered")  # type: ignore[misc]
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert {(status, tuple(data or ())) for status, data in answers} == {(200, (1.0, 2.0, 3.0, 4.0))}
    (entry,) = client.get_inference_statistics("moving")["model_stats"]
    assert entry["inference_stats"]["success"]["count"] == len(answers)  # nothing was lost from the books either


def test_traces_are_written_where_the_owner_said(client: Any, served: GatewayProcess, trace_file: Path) -> None:
    with pytest.raises(InferenceServerException, match="trace file location can not be updated"):
        client.update_trace_settings(settings={"trace_file": "/tmp/elsewhere"})
    settings = client.update_trace_settings(
        "steady", {"trace_level": ["TIMESTAMPS", "TENSORS"], "trace_rate": "2", "trace_count": "3"}
    )
    assert (settings["trace_level"], settings["trace_rate"]) == (["TIMESTAMPS", "TENSORS"], "2")
    assert client.get_trace_settings("moving")["trace_level"] == ["OFF"]
    for _ in range(10):
        served.infer("steady", ROWS)
        served.infer("moving", ROWS)

    def rows() -> list[dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError):
            found: list[dict[str, Any]] = json.loads(trace_file.read_bytes())
            return found
        return []

    until(lambda: len([row for row in rows() if "model_name" in row]) == 3, PATIENCE_S, "no traces were written")
    assert {row["model_name"] for row in rows() if "model_name" in row} == {"steady"}
    tensors = [row["tensor"]["data"] for row in rows() if "tensor" in row]
    assert tensors in (["1.0,2.0,3.0,4.0"] * 6, ["1,2,3,4", "1.0,2.0,3.0,4.0"] * 3)
    cleared = client.update_trace_settings("steady", {"trace_level": None, "trace_rate": None, "trace_count": None})
    assert (cleared["trace_level"], cleared["trace_rate"]) == (["OFF"], "1000")


def test_a_restricted_api_needs_its_header(client: Any, served: GatewayProcess) -> None:
    with pytest.raises(InferenceServerException, match="This API is restricted, expecting header 'x-admin'"):
        client.get_log_settings()
    headers = {"X-Admin": "sesame"}
    assert client.get_log_settings(headers=headers)["log_verbose_level"] == 0
    assert client.update_log_settings({"log_verbose_level": 1}, headers=headers)["log_verbose_level"] == 1
    assert client.update_log_settings({"log_verbose_level": 0}, headers=headers)["log_verbose_level"] == 0


def test_metrics_have_tritons_names(served: GatewayProcess) -> None:
    text = served.operations("/metrics").decode()
    for reason in ("BACKEND", "CANCELED", "OTHER", "REJECTED"):
        assert f'nv_inference_request_failure{{model="counted",reason="{reason}",team="vision",version="1"}} ' in text
    assert served.metric("nv_model_load_duration_secs", model="counted", team="vision") > 0
    assert served.metric("nv_cpu_memory_total_bytes") > served.metric("nv_cpu_memory_used_bytes") > 0
    assert 'nv_inference_queue_summary_us{model="counted",team="vision",version="1",quantile="0.99"} ' in text
    assert "nv_cache_num_hits_per_model" not in text


def test_the_command_line_loads_and_unloads(served: GatewayProcess, client: Any) -> None:
    def models_command(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gateway", "models", *arguments, "--url", f"http://127.0.0.1:{served.port}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)

    assert models_command("load", "spare").stdout == "spare is loaded\n"
    assert client.is_model_ready("spare")
    assert models_command("unload", "spare").stdout == "spare is unloaded\n"
    assert not client.is_model_ready("spare")
    refused = models_command("load", "nobody")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "failed to load 'nobody'" in refused.stderr


@pytest.mark.slow
def test_a_gateway_that_polls_follows_the_directory(tmp_path: Path) -> None:
    root = models.repository(tmp_path / "repository", {"first": models.identity("FP32")})
    file = tmp_path / "gateway.yaml"
    file.write_text(f"server: {{model_control: poll, repository_poll_s: 0.2}}\nmodels: [{{source: {root}}}]\n")
    with gateway("serve", "-c", str(file), "--workers", "1") as process:

        def ready(name: str) -> bool:
            return process.request("GET", f"/v2/models/{name}/ready")[0] == 200

        assert ready("first")
        models.repository(tmp_path / "aside", {"second": models.identity("FP32")})
        (tmp_path / "aside" / "second").rename(root / "second")
        until(lambda: ready("second"), PATIENCE_S, "the new model was not loaded")
        (root / "first").rename(tmp_path / "gone")
        until(lambda: not ready("first"), PATIENCE_S, "the model that left was not unloaded")
        assert process.request("POST", "/v2/repository/models/second/load", b"")[0] == 503
        assert process.request("GET", "/v2/health/ready")[0] == 200
        assert process.stop() == 0


@pytest.mark.slow
def test_sighup_takes_over_the_models_of_the_file_and_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    root = models.repository(
        tmp_path / "repository", {"first": models.identity("FP32"), "second": models.identity("FP32")}
    )
    file = tmp_path / "gateway.yaml"
    file.write_text(f"models: [{{source: {root}/first}}]\n")
    with gateway("serve", "-c", str(file), "--workers", "1") as process:

        def ready(name: str) -> bool:
            return process.request("GET", f"/v2/models/{name}/ready")[0] == 200

        file.write_text("modles: []\n")
        process.process.send_signal(signal.SIGHUP)
        until(lambda: "SIGHUP: nothing was changed" in process.output(), PATIENCE_S, "the fault was not told")
        assert ready("first")
        file.write_text(f"server: {{http_port: 1}}\nmodels: [{{source: {root}/second}}]\n")
        process.process.send_signal(signal.SIGHUP)
        until(lambda: "the models of the configuration are served" in process.output(), PATIENCE_S, "no reload")
        assert ready("second")
        assert not ready("first")
        assert process.stop() == 0
