"""Ensembles and the response cache in a live gateway: real models, real workers, both as a user states them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from onnx import helper

from gateway.provenance.headers import parse
from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway, until

WIDTH, OUT = 6, 3
WEIGHTS = np.random.default_rng(11).integers(-9, 10, (WIDTH, OUT)).astype(np.float32)
"""Of `models.whole_linear`."""

PIPELINE = """
platform: "ensemble"
max_batch_size: 8
input [ { name: "PIXELS" data_type: TYPE_FP32 dims: [ 6 ] } ]
output [
  { name: "SCORES" data_type: TYPE_FP32 dims: [ 3 ] },
  { name: "TWICE" data_type: TYPE_FP32 dims: [ 6 ] }
]
ensemble_scheduling {
  step [
    { model_name: "join" model_version: -1
      input_map { key: "a" value: "scores" } input_map { key: "b" value: "twice_scores" }
      output_map { key: "sum" value: "SCORES" } },
    { model_name: "linear" model_version: 1
      input_map { key: "x" value: "PIXELS" } output_map { key: "y" value: "scores" } },
    { model_name: "double" model_version: -1
      input_map { key: "x" value: "PIXELS" } output_map { key: "y" value: "TWICE" } },
    { model_name: "linear" model_version: -1
      input_map { key: "x" value: "TWICE" } output_map { key: "y" value: "twice_scores" } }
  ]
}
"""


def join() -> bytes:
    """`a`, `b` FP32 [batch, 3] → `sum` FP32 [batch, 3]."""
    shape: list[int | str | None] = ["batch", OUT]
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"])]
    return models.model(
        nodes,
        [models.value("a", "FP32", shape), models.value("b", "FP32", shape)],
        [models.value("sum", "FP32", shape)],
    )


def double() -> bytes:
    """`x` → `y` = 2·x, FP32 [batch, 6]."""
    shape: list[int | str | None] = ["batch", WIDTH]
    nodes = [helper.make_node("Add", ["x", "x"], ["y"])]
    return models.model(nodes, [models.value("x", "FP32", shape)], [models.value("y", "FP32", shape)])


def expected(pixels: np.ndarray[Any, Any]) -> dict[str, list[float]]:
    return {"SCORES": (pixels @ WEIGHTS * 3).ravel().tolist(), "TWICE": (pixels * 2).ravel().tolist()}


def ask(process: GatewayProcess, model: str, name: str, pixels: np.ndarray[Any, Any], **more: Any) -> Any:
    tensor = {"name": name, "shape": list(pixels.shape), "datatype": "FP32", "data": pixels.ravel().tolist()}
    return process.infer(model, {"inputs": [tensor], **more})


def outputs(answer: Any) -> dict[str, list[float]]:
    return {output["name"]: output["data"] for output in answer["outputs"]}


def pixels_of(seed: int, rows: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(-99, 100, (rows, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = models.repository(
        tmp_path_factory.mktemp("ensembles"),
        {"double": double(), "linear": models.whole_linear(WIDTH, OUT), "join": join(), "cached": double()},
        {"cached": "max_batch_size: 16\nresponse_cache { enable: true }\n"},
    )
    (root / "pipeline" / "1").mkdir(parents=True)
    (root / "pipeline" / "config.pbtxt").write_text(PIPELINE)
    return root


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[GatewayProcess]:
    with gateway("serve", str(root), "--workers", "2", "--model-control", "explicit", "--load-model", "*") as process:
        yield process


def statistics(process: GatewayProcess, model: str) -> dict[str, Any]:
    status, _, body = process.request("GET", f"/v2/models/{model}/stats")
    assert status == 200
    found: dict[str, Any] = json.loads(body)["model_stats"][0]
    return found


def test_an_ensemble_of_three_models_answers(served: GatewayProcess) -> None:
    pixels = pixels_of(1, 3)
    status, _, answer = ask(served, "pipeline", "PIXELS", pixels, id="7")
    assert (status, answer["id"], answer["model_name"], answer["model_version"]) == (200, "7", "pipeline", "1")
    assert outputs(answer) == expected(pixels)
    assert [output["shape"] for output in answer["outputs"]] == [[3, 3], [3, 6]]


def test_metadata_is_that_of_its_configuration(served: GatewayProcess) -> None:
    _, _, body = served.request("GET", "/v2/models/pipeline")
    assert json.loads(body) == {
        "name": "pipeline",
        "versions": ["1"],
        "platform": "ensemble",
        "inputs": [{"name": "PIXELS", "datatype": "FP32", "shape": [-1, 6]}],
        "outputs": [
            {"name": "SCORES", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "TWICE", "datatype": "FP32", "shape": [-1, 6]},
        ],
    }
    _, _, body = served.request("GET", "/v2/models/pipeline/config")
    steps = json.loads(body)["ensemble_scheduling"]["step"]
    assert [(one["model_name"], one["model_version"]) for one in steps] == [
        ("join", -1), ("linear", 1), ("double", -1), ("linear", -1),
    ]  # fmt: skip


def test_its_provenance_names_every_execution_and_every_digest(root: Path, served: GatewayProcess) -> None:
    _, headers, _ = ask(served, "pipeline", "PIXELS", pixels_of(2, 2))
    said = parse(headers.items())
    text = (root / "pipeline" / "config.pbtxt").read_bytes()
    listing = f"{hashlib.sha256(text).hexdigest()}  config.pbtxt\n"
    assert said.model is not None
    assert said.model.digest == "sha256:" + hashlib.sha256(listing.encode()).hexdigest()
    steps = [member.backend.rsplit("/", 1)[0] for member in said.members]
    assert steps == ["join/1", "linear/1", "double/1", "linear/1"]
    assert all(member.size >= 2 for member in said.members)
    manifest = json.loads(served.request("GET", "/v2/models/pipeline/provenance")[2])
    of_linear = json.loads(served.request("GET", "/v2/models/linear/provenance")[2])
    assert manifest["digest"] == said.model.digest
    assert [step["model"] for step in manifest["steps"]] == ["join", "linear", "double", "linear"]
    assert manifest["steps"][1] == {"model": "linear", "version": "1", "digest": of_linear["digest"]}


def test_grpc_gives_the_same(served: GatewayProcess) -> None:
    pixels = pixels_of(12, 2)
    with grpc_client.InferenceServerClient(f"127.0.0.1:{served.grpc_port}") as client:
        for model, name, wanted in (
            ("pipeline", "PIXELS", expected(pixels)),
            ("cached", "x", {"y": expected(pixels)["TWICE"]}),
        ):
            tensor = grpc_client.InferInput(name, list(pixels.shape), "FP32")
            tensor.set_data_from_numpy(pixels)
            for _ in range(2):
                result = client.infer(model, [tensor])
                assert {label: result.as_numpy(label).ravel().tolist() for label in wanted} == wanted
            result = client.infer(model, [tensor], outputs=[grpc_client.InferRequestedOutput(max(wanted))])
            assert len(result.get_response().outputs) == 1
    _, headers, _ = ask(served, "cached", "x", pixels)
    assert parse(headers.items()).members[0].backend == "cache"  # what gRPC asked, HTTP need not execute


def test_its_rules_are_those_of_any_model(served: GatewayProcess) -> None:
    status, _, answer = ask(served, "pipeline", "PIXELS", pixels_of(3, 9))
    assert (status, answer["error"]) == (400, "inference request batch-size must be <= 8 for 'pipeline'")
    status, _, answer = ask(served, "pipeline", "PIXELS", pixels_of(3, 2), outputs=[{"name": "TWICE"}])
    assert outputs(answer) == {"TWICE": expected(pixels_of(3, 2))["TWICE"]}


def test_it_counts_requests_and_the_sum_of_its_steps(served: GatewayProcess) -> None:
    before, linear = statistics(served, "pipeline"), statistics(served, "linear")
    for seed in range(3):
        ask(served, "pipeline", "PIXELS", pixels_of(seed, 2))
    after = statistics(served, "pipeline")
    assert after["inference_count"] - before["inference_count"] == 6
    assert after["execution_count"] - before["execution_count"] == 3
    assert after["inference_stats"]["success"]["count"] - before["inference_stats"]["success"]["count"] == 3
    assert after["inference_stats"]["compute_infer"]["ns"] > before["inference_stats"]["compute_infer"]["ns"]
    assert statistics(served, "linear")["inference_count"] - linear["inference_count"] == 12


def test_many_callers_get_their_own_rows_even_while_a_worker_dies(served: GatewayProcess) -> None:
    victim = served.workers()[0]["pid"]
    half = threading.Event()

    def caller(seed: int) -> None:
        for round_number in range(15):
            pixels = pixels_of(1000 * seed + round_number, 1 + seed % 4)
            status, _, answer = ask(served, "pipeline", "PIXELS", pixels)
            assert (status, outputs(answer)) == (200, expected(pixels))
            if round_number == 5:
                half.set()

    with ThreadPoolExecutor(8) as callers:
        futures = [callers.submit(caller, seed) for seed in range(8)]
        half.wait(60)
        os.kill(victim, signal.SIGKILL)
        for future in futures:
            future.result(60)


def test_reloading_its_models_fails_no_request(served: GatewayProcess) -> None:
    done = threading.Event()

    def caller(seed: int) -> int:
        count = 0
        while not done.is_set():
            pixels = pixels_of(77 * seed + count, 1 + seed % 3)
            status, _, answer = ask(served, "pipeline", "PIXELS", pixels)
            assert (status, outputs(answer)) == (200, expected(pixels)), answer
            count += 1
        return count

    with ThreadPoolExecutor(4) as callers:
        futures = [callers.submit(caller, seed) for seed in range(4)]
        try:
            for name in ("linear", "join", "pipeline", "double"):
                assert served.request("POST", f"/v2/repository/models/{name}/load")[0] == 200
        finally:
            done.set()
        assert all(future.result(60) for future in futures)


def test_without_one_of_its_models_it_is_not_ready_until_it_is_back(served: GatewayProcess) -> None:
    assert served.request("POST", "/v2/repository/models/double/unload")[0] == 200
    status, _, body = served.request("GET", "/v2/models/pipeline/ready")
    assert (status, json.loads(body)["ready"]) == (503, False)
    assert served.request("GET", "/v2/health/ready")[0] == 503
    status, _, answer = ask(served, "pipeline", "PIXELS", pixels_of(4, 1))
    assert status == 503
    assert "ensemble 'pipeline' is not ready" in answer["error"]
    assert "'double'" in answer["error"]
    index = json.loads(served.request("POST", "/v2/repository/index")[2])
    (entry,) = [entry for entry in index if entry["name"] == "pipeline"]
    assert entry["state"] == "UNAVAILABLE"
    assert "'double'" in entry["reason"]
    assert served.request("POST", "/v2/repository/models/double/load")[0] == 200
    until(lambda: served.request("GET", "/v2/models/pipeline/ready")[0] == 200, 30, "it did not become ready again")
    pixels = pixels_of(4, 1)
    assert outputs(ask(served, "pipeline", "PIXELS", pixels)[2]) == expected(pixels)


def test_loading_an_ensemble_loads_what_it_is_made_of(served: GatewayProcess) -> None:
    for name in ("pipeline", "double", "join"):
        assert served.request("POST", f"/v2/repository/models/{name}/unload")[0] == 200
    assert ask(served, "pipeline", "PIXELS", pixels_of(5, 1))[0] == 404
    status, _, body = served.request("POST", "/v2/repository/models/pipeline/load")
    assert (status, body) == (200, b"")
    pixels = pixels_of(5, 1)
    assert outputs(ask(served, "pipeline", "PIXELS", pixels)[2]) == expected(pixels)


def test_a_broken_ensemble_says_why_and_the_old_one_goes_on(served: GatewayProcess) -> None:
    config = {
        "platform": "ensemble",
        "max_batch_size": 8,
        "input": [{"name": "PIXELS", "data_type": "TYPE_FP32", "dims": [6]}],
        "output": [{"name": "SCORES", "data_type": "TYPE_FP32", "dims": [3]}],
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": "linear",
                    "model_version": -1,
                    "input_map": {"z": "PIXELS"},
                    "output_map": {"y": "SCORES"},
                }
            ]
        },
    }
    body = json.dumps({"parameters": {"config": json.dumps(config)}}).encode()
    status, _, answer = served.request("POST", "/v2/repository/models/pipeline/load", body)
    assert status == 500
    assert "maps the input 'z', but the model has ['x']" in json.loads(answer)["error"]
    pixels = pixels_of(6, 1)
    assert outputs(ask(served, "pipeline", "PIXELS", pixels)[2]) == expected(pixels)


# -- the cache -------------------------------------------------------------------------------------------------------


def test_trap_72_the_same_input_again_is_a_hit_whatever_its_parameters(served: GatewayProcess) -> None:
    before = statistics(served, "cached")
    pixels = pixels_of(7, 2)
    first, first_said, _ = ask(served, "cached", "x", pixels)
    status, headers, answer = ask(served, "cached", "x", pixels, parameters={"custom": 3}, id="other")
    assert (first, status, answer["id"]) == (200, 200, "other")
    assert outputs(answer) == {"y": (pixels * 2).ravel().tolist()}
    after = statistics(served, "cached")

    def grown(name: str) -> int:
        count: int = after["inference_stats"][name]["count"] - before["inference_stats"][name]["count"]
        return count

    assert {name: grown(name) for name in after["inference_stats"]} == {
        "success": 2, "fail": 0, "queue": 2, "compute_input": 1, "compute_infer": 1, "compute_output": 1,
        "cache_hit": 1, "cache_miss": 1,
    }  # fmt: skip
    assert after["inference_count"] - before["inference_count"] == 2
    assert after["execution_count"] - before["execution_count"] == 1
    (made,), (hit,) = parse(first_said.items()).members, parse(headers.items()).members
    assert (hit.backend, hit.batch_id, hit.size, hit.row) == ("cache", made.batch_id, made.size, made.row)


def test_a_hit_may_be_binary_or_json(served: GatewayProcess) -> None:
    pixels = pixels_of(8, 1)
    ask(served, "cached", "x", pixels)
    tensor = {"name": "x", "shape": [1, 6], "datatype": "FP32", "parameters": {"binary_data_size": 24}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    status, headers, body = served.request(
        "POST", "/v2/models/cached/infer", head + pixels.tobytes(), {"Inference-Header-Content-Length": str(len(head))}
    )
    assert status == 200
    assert parse(headers.items()).members[0].backend == "cache"
    assert body[int(headers["inference-header-content-length"]) :] == (pixels * 2).tobytes()


def test_equal_requests_at_once_all_get_the_answer(served: GatewayProcess) -> None:
    pixels = pixels_of(9, 3)
    before = statistics(served, "cached")
    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(lambda _: ask(served, "cached", "x", pixels), range(24)))
    assert all(status == 200 for status, _, _ in answers)
    assert all(outputs(answer) == {"y": (pixels * 2).ravel().tolist()} for _, _, answer in answers)
    assert statistics(served, "cached")["execution_count"] - before["execution_count"] == 1


def test_the_default_size_is_said_once_in_the_log(served: GatewayProcess) -> None:
    ask(served, "cached", "x", pixels_of(10, 1))
    assert served.output().count("server.response_cache does not state its size") == 1


def test_a_reloaded_model_starts_with_nothing_remembered(served: GatewayProcess) -> None:
    pixels = pixels_of(11, 1)
    ask(served, "cached", "x", pixels)
    assert served.request("POST", "/v2/repository/models/cached/load")[0] == 200
    _, headers, _ = ask(served, "cached", "x", pixels)
    assert parse(headers.items()).members[0].backend != "cache"
