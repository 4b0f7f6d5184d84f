"""Ragged batches through a whole gateway: requests of different lengths share a run, and each answer is its own."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import aiohttp
import numpy as np
import pytest
import tritonclient.grpc.aio as triton_grpc
import tritonclient.http as triton_http
from onnx import helper

from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway

TOGETHER = 6
"""Rows of a full batch; a smaller one would wait for longer than any test does."""
FULL = models.SEGMENTS_CONFIG.replace("max_batch_size: 8", f"max_batch_size: {TOGETHER}") + (
    "dynamic_batching { max_queue_delay_microseconds: 25000000 }"
)
ENSEMBLE = """platform: "ensemble" max_batch_size: 4
  input { name: "IN" data_type: TYPE_FP32 dims: [ -1 ] }
  output [ { name: "OUT" data_type: TYPE_FP32 dims: [ 1 ] }, { name: "TWICE" data_type: TYPE_FP32 dims: [ -1 ] } ]
  ensemble_scheduling { step {
    model_name: "eager" model_version: -1
    input_map { key: "x" value: "IN" }
    output_map { key: "sum" value: "OUT" } output_map { key: "double" value: "TWICE" } } }"""
ROWS = """max_batch_size: 8
  input { name: "x" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }
  output { name: "double" data_type: TYPE_FP32 dims: [ -1 ] }
  batch_output { target_name: "double" source_input: "x" }"""
"""The output alone says nothing of requests, so a request may have several rows."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    root = tmp_path_factory.mktemp("ragged")
    cached = models.SEGMENTS_CONFIG + "response_cache { enable: true }"
    double = models.model(
        [helper.make_node("Add", ["x", "x"], ["double"])],
        [models.value("x", "FP32", ["e"])],
        [models.value("double", "FP32", ["e"])],
    )
    contents = {name: models.segments() for name in ("full", "eager", "cached")}
    configs = {"full": FULL, "eager": models.SEGMENTS_CONFIG, "cached": cached, "rows": ROWS, "chain": ENSEMBLE}
    models.repository(root, {**contents, "rows": double}, {n: c for n, c in configs.items() if n != "chain"})
    (root / "chain" / "1").mkdir(parents=True)
    (root / "chain" / "config.pbtxt").write_text(ENSEMBLE)
    with gateway("serve", str(root), "--workers", "1", "--instances", "1") as process:
        yield process


def body(values: list[float], **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": [1, len(values)], "datatype": "FP32", "data": values}], **more}


def answer_of(document: Any) -> dict[str, tuple[list[int], list[float]]]:
    return {output["name"]: (output["shape"], output["data"]) for output in document["outputs"]}


def alone(values: list[float]) -> dict[str, tuple[list[int], list[float]]]:
    return {"sum": ([1, 1], [sum(values)]), "double": ([1, len(values)], [2 * value for value in values])}


def test_one_run_for_requests_of_different_lengths(served: GatewayProcess) -> None:
    """REST as JSON, REST as binary tensors, and gRPC, in one batch."""
    before = served.metric("nv_inference_exec_count", model="full")
    lengths = [3, 0, 1, 7, 2, 40]
    sent = [[float(10 * place + i) for i in range(length)] for place, length in enumerate(lengths)]
    url = f"http://127.0.0.1:{served.port}/v2/models/full/infer"

    async def plain(session: aiohttp.ClientSession, values: list[float]) -> tuple[Any, str]:
        async with session.post(url, json=body(values)) as response:
            assert response.status == 200, await response.text()
            return answer_of(json.loads(await response.read())), response.headers["Inference-Batch"]

    async def binary(session: aiohttp.ClientSession, values: list[float]) -> tuple[Any, str]:
        tensor = triton_http.InferInput("x", [1, len(values)], "FP32")
        tensor.set_data_from_numpy(np.array([values], np.float32))
        request, size = triton_http.InferenceServerClient.generate_request_body([tensor])
        headers = {} if size is None else {"Inference-Header-Content-Length": str(size)}
        async with session.post(url, data=request, headers=headers) as response:
            assert response.status == 200, await response.text()
            size = response.headers.get("Inference-Header-Content-Length")
            reply = await response.read()
            result = triton_http.InferenceServerClient.parse_response_body(
                reply, header_length=None if size is None else int(size)
            )
            return arrays(result), response.headers["Inference-Batch"]

    async def rpc(client: Any, values: list[float]) -> tuple[Any, str]:
        tensor = triton_grpc.InferInput("x", [1, len(values)], "FP32")
        tensor.set_data_from_numpy(np.array([values], np.float32))
        return arrays(await client.infer("full", [tensor])), ""

    async def run() -> list[tuple[Any, str]]:
        async with (
            aiohttp.ClientSession() as session,
            triton_grpc.InferenceServerClient(f"127.0.0.1:{served.grpc_port}") as client,
        ):
            ways = [
                plain(session, sent[0]), plain(session, sent[1]), binary(session, sent[2]), binary(session, sent[3]),
                rpc(client, sent[4]), rpc(client, sent[5]),
            ]  # fmt: skip
            return await asyncio.gather(*ways)

    answers = asyncio.run(run())
    assert [answer for answer, _ in answers] == [alone(values) for values in sent]
    assert served.metric("nv_inference_exec_count", model="full") - before == 1
    named = [re.fullmatch(r'"([^"]+)";size=6;row=(\d)', batch) for _, batch in answers[:4]]
    assert len({match[1] for match in named if match}) == 1  # one batch
    assert len({match[2] for match in named if match}) == 4  # and a row each


def arrays(result: Any) -> dict[str, tuple[list[int], list[float]]]:
    found = {}
    for name in ("sum", "double"):
        array = result.as_numpy(name)
        found[name] = (list(array.shape), array.ravel().tolist())
    return found


def test_mixed_lengths_under_load(served: GatewayProcess) -> None:
    rng = np.random.default_rng(17)
    sent = [rng.integers(-50, 50, rng.integers(0, 30)).astype(float).tolist() for _ in range(300)]
    url = f"http://127.0.0.1:{served.port}/v2/models/eager/infer"

    async def run() -> list[Any]:
        gate = asyncio.Semaphore(32)
        async with aiohttp.ClientSession() as session:

            async def one(values: list[float]) -> Any:
                async with gate, session.post(url, json=body(values)) as response:
                    assert response.status == 200, await response.text()
                    return answer_of(json.loads(await response.read()))

            return await asyncio.gather(*map(one, sent))

    assert asyncio.run(run()) == [alone(values) for values in sent]


def test_outputs_one_by_one_and_in_every_form(served: GatewayProcess) -> None:
    values = [3.0, 9.0, 1.0]
    for name in ("sum", "double"):
        _, _, document = served.infer("eager", body(values, outputs=[{"name": name}]))
        assert answer_of(document) == {name: alone(values)[name]}
    ranked = {"name": "double", "parameters": {"classification": 2}}
    _, _, document = served.infer("eager", body(values, outputs=[ranked]))
    (output,) = document["outputs"]
    assert (output["shape"], output["data"]) == ([1, 2], ["18.000000:1", "6.000000:0"])


def test_an_answer_from_the_cache_is_the_requests_own(served: GatewayProcess) -> None:
    for values in ([1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 2.0]):
        status, _, document = served.infer("cached", body(values))
        assert (status, answer_of(document)) == (200, alone(values))
    assert served.metric("nv_cache_num_hits_per_model", model="cached") == 1


def test_a_step_of_an_ensemble(served: GatewayProcess) -> None:
    request = body([4.0, 5.0])
    request["inputs"][0]["name"] = "IN"
    status, _, document = served.infer("chain", request)
    assert status == 200, document
    assert answer_of(document) == {"OUT": ([1, 1], [9]), "TWICE": ([1, 2], [8, 10])}


def test_several_rows_of_one_request(served: GatewayProcess) -> None:
    request = {"inputs": [{"name": "x", "shape": [2, 3], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6]}]}
    status, _, document = served.infer("rows", request)
    assert (status, answer_of(document)) == (200, {"double": ([2, 3], [2, 4, 6, 8, 10, 12])})
    status, _, document = served.infer("eager", request)
    assert status == 400
    assert document["error"].startswith(
        "inference request batch-size must be <= 1 for 'eager': a request may have only one row: "
    )


def test_what_clients_are_told(served: GatewayProcess) -> None:
    with triton_http.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
        metadata, config = client.get_model_metadata("eager"), client.get_model_config("eager")
    assert [(tensor["name"], tensor["shape"]) for tensor in metadata["inputs"]] == [("x", [-1, -1])]
    assert [(tensor["name"], tensor["shape"]) for tensor in metadata["outputs"]] == [
        ("sum", [-1, 1]),
        ("double", [-1, -1]),
    ]
    assert [tensor["name"] for tensor in config["input"]] == ["x"]
    assert config["input"][0]["allow_ragged_batch"] is True
    assert config["batch_input"][0]["target_name"] == ["ends"]
