"""A model is replaced again and again while clients of both protocols use it, alone and through ensembles.

Each variant multiplies by a number of its own; two of them list their outputs in another order. So an answer tells
which variant made it, and whoever mixes up a request, a plan or a remembered answer of two variants is found out.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import pytest
from onnx import helper

from gateway.protocol import schema
from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway

RELOADS = 40
CACHED = "response_cache { enable: true }"
ENSEMBLE = """platform: "ensemble" max_batch_size: 16 CACHE
input { name: "x" data_type: TYPE_FP32 dims: [ 2 ] } output { name: "y" data_type: TYPE_FP32 dims: [ 2 ] }
ensemble_scheduling { step {
  model_name: "m" model_version: -1 input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }
} }"""
Array = np.ndarray[Any, Any]


def variant(factor: int, *, second: bool) -> bytes:
    """`y` = factor·x; with `second` behind another output, `z` = 1000·x."""
    x, y, z = (models.value(name, "FP32", ["batch", 2]) for name in "xyz")
    nodes, weights = [helper.make_node("Mul", ["x", "w"], ["y"])], {"w": np.array([factor], np.float32)}
    if not second:
        return models.model(nodes, [x], [y], weights)
    nodes.append(helper.make_node("Mul", ["x", "v"], ["z"]))
    return models.model(nodes, [x], [z, y], {**weights, "v": np.array([1000], np.float32)})


VARIANTS = {
    2: variant(2, second=False),
    3: variant(3, second=False),
    5: variant(5, second=True),
    7: variant(7, second=True),
}


class Clients:
    """Ask until told to stop, and check every answer."""

    def __init__(self, process: GatewayProcess, session: aiohttp.ClientSession, channel: grpc.aio.Channel) -> None:
        self.url = f"http://127.0.0.1:{process.port}/v2"
        self.session = session
        self.stopped = False
        self.answers: Counter[tuple[str, str]] = Counter()
        self.factors: dict[str, float] = {}
        self.rpc = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=schema.message("inference.ModelInferResponse").FromString,
        )

    def check(self, how: str, name: str, x: Array, y: Array, model: str) -> None:
        factors = set((y.reshape(x.shape) / x).ravel().tolist())
        assert len(factors) == 1, (how, name, x, y)
        (factor,) = factors
        assert factor in VARIANTS
        if name == "m":
            assert self.factors.setdefault(model, factor) == factor, "the digest is that of the variant that answered"
        self.answers[how, name] += 1

    async def ask(self, how: str, seed: int) -> None:
        chance = random.Random(seed)
        while not self.stopped:
            rows = chance.choice([1, 1, 2, 3])
            x = np.array([[chance.randint(1, 6), chance.randint(1, 6)] for _ in range(rows)], "<f4")
            name = chance.choice(["m", "plain", "cached"])
            y, model = await (self.grpc(chance, name, x) if how == "grpc" else self.rest(how, chance, name, x))
            self.check(how, name, x, y, model)

    async def rest(self, how: str, chance: random.Random, name: str, x: Array) -> tuple[Array, str]:
        item: dict[str, Any] = {"name": "x", "shape": list(x.shape), "datatype": "FP32"}
        document: dict[str, Any] = {"inputs": [item]}
        headers, behind = {}, b""
        if how == "binary":
            item["parameters"], behind = {"binary_data_size": x.nbytes}, x.tobytes()
            document["outputs"] = [{"name": "y", "parameters": {"binary_data": True}}]
        else:
            item["data"] = x.ravel().tolist()
            document |= chance.choice([{}, {"outputs": [{"name": "y"}]}])
        body = json.dumps(document).encode()
        if how == "binary":
            headers["Inference-Header-Content-Length"] = str(len(body))
        elif how == "gzip":  # so long that it is inflated in a thread
            body, headers["Content-Encoding"] = gzip.compress(body + b" " * 100_000), "gzip"
        async with self.session.post(f"{self.url}/models/{name}/infer", data=body + behind, headers=headers) as answer:
            found = await answer.read()
            assert answer.status == 200, found
            model = answer.headers["Inference-Model"]
            if how == "binary":
                return np.frombuffer(found[int(answer.headers["Inference-Header-Content-Length"]) :], "<f4"), model
            outputs = {output["name"]: output["data"] for output in json.loads(found)["outputs"]}
            return np.array(outputs["y"]), model

    async def grpc(self, chance: random.Random, name: str, x: Array) -> tuple[Array, str]:
        message = schema.message("inference.ModelInferRequest")(model_name=name, id=chance.choice(["", "7"]))
        item = message.inputs.add(name="x", datatype="FP32", shape=x.shape)
        if chance.random() < 0.7:
            message.raw_input_contents.append(x.tobytes())
        else:
            item.contents.fp32_contents.extend(x.ravel().tolist())
        if chance.random() < 0.5:
            message.outputs.add(name="y")
        call = self.rpc(message)
        answer = await call
        metadata = dict(await call.initial_metadata())
        place = [output.name for output in answer.outputs].index("y")
        return np.frombuffer(answer.raw_output_contents[place], "<f4"), metadata["inference-model"]


@pytest.mark.slow
async def test_nobody_is_refused_and_no_answer_is_of_two_variants(tmp_path: Path) -> None:
    config = f"max_batch_size: 16 {CACHED} dynamic_batching {{ max_queue_delay_microseconds: 500 }}"
    root = models.repository(tmp_path / "repository", {"m": VARIANTS[2]}, {"m": config})
    for name, cache in (("plain", ""), ("cached", CACHED)):
        (root / name / "1").mkdir(parents=True)
        (root / name / "config.pbtxt").write_text(ENSEMBLE.replace("CACHE", cache))
    loads = [argument for name in ("m", "plain", "cached") for argument in ("--load-model", name)]
    with gateway("serve", str(root), "--workers", "1", "--model-control", "explicit", *loads) as process:
        async with (
            aiohttp.ClientSession() as session,
            grpc.aio.insecure_channel(f"127.0.0.1:{process.grpc_port}") as channel,
        ):
            clients = Clients(process, session, channel)
            ways = ["json", "binary", "gzip", "grpc", "grpc"] * 2
            asking = [asyncio.ensure_future(clients.ask(how, seed)) for seed, how in enumerate(ways)]
            for number in range(RELOADS):
                (root / "m" / "1" / "model.onnx").write_bytes(VARIANTS[[2, 5, 3, 7][number % 4]])
                async with session.post(f"{clients.url}/repository/models/m/load") as answer:
                    assert answer.status == 200, await answer.text()
                enough = clients.answers.total() + 20
                while clients.answers.total() < enough and not any(task.done() for task in asking):
                    await asyncio.sleep(0.001)
            clients.stopped = True
            await asyncio.gather(*asking)
        assert set(clients.factors.values()) == set(VARIANTS)
        assert {how for how, _ in clients.answers} == set(ways)
        assert "Traceback" not in process.output()
