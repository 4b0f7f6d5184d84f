"""Run by the Python of `venvs.kserve`: KServe's own clients ask a server everything that they can ask.

Arguments: the server's REST URL, its gRPC address. Prints one JSON object: what each question was answered with.
The models are those of test_kserve_client.py.
"""

from __future__ import annotations

# mypy: disable-error-code="import-not-found"
import asyncio
import json
import logging
import sys
from collections.abc import Awaitable
from typing import Any

import grpc
import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

ROWS = np.arange(12, dtype=np.float32).reshape(2, 6)
SAMPLES: dict[str, Any] = {
    "BOOL": np.array([[True, False]]),
    "UINT8": np.array([[0, 255]], np.uint8),
    "INT32": np.array([[-(2**31), 2**31 - 1]], np.int32),
    "INT64": np.array([[2**53 + 1, -(2**63)]], np.int64),
    "FP16": np.array([[1.5, -65504.0]], np.float16),
    "FP32": np.array([[0.1, 3.4e38]], np.float32),
    "FP64": np.array([[0.1, 1e308]], np.float64),
    "BYTES": np.array([["héllo", ""]], object),
}


def rows(binary: bool, width: int = 6, **more: Any) -> InferRequest:
    x = ROWS[:, :width]
    tensor = InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary)
    return InferRequest("linear", [tensor], **more)


def sample(datatype: str, binary: bool, **more: Any) -> InferRequest:
    array = SAMPLES[datatype]
    tensor = InferInput("x", list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return InferRequest(f"id_{datatype.lower()}", [tensor], **more)


def plain(answer: Any) -> dict[str, Any]:
    """An InferResponse as JSON can hold it."""
    outputs = {}
    for output in answer.outputs:
        elements = [e.decode() if isinstance(e, bytes) else e for e in output.as_numpy().ravel().tolist()]
        outputs[output.name] = [output.datatype, list(output.shape), elements]
    return {"id": answer.id, "model": answer.model_name, "version": answer.model_version, "outputs": outputs}


async def failure(call: Awaitable[Any]) -> list[str]:
    try:
        await call
    except httpx.HTTPStatusError as error:
        return [str(error.response.status_code), str(error)]
    except grpc.RpcError as error:
        return [error.code().name, error.details()]
    return ["no failure", ""]


async def over_rest(url: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with InferenceRESTClient(RESTConfig(protocol="v2", retries=1)) as client:
        found["live"] = await client.is_server_live(url)
        found["ready"] = await client.is_server_ready(url)
        found["model_ready"] = [await client.is_model_ready(url, name) for name in ("linear", "nobody")]
        for form, request in {
            "json": rows(False, request_id="7"),
            "binary in": rows(True, request_id="7"),
            "binary out": rows(False, request_id="7", parameters={"binary_data_output": True}),
            "named binary out": rows(
                True, request_id="7", request_outputs=[RequestedOutput("y", {"binary_data": True})]
            ),
        }.items():
            found[form] = plain(await client.infer(url, request, model_name="linear"))
        dictionary = {"inputs": [{"name": "x", "shape": [2, 6], "datatype": "FP32", "data": ROWS.tolist()}]}
        found["dictionary"] = plain(await client.infer(url, dictionary, model_name="linear"))
        for datatype in SAMPLES:
            for binary in (True,) if datatype == "FP16" else (True, False):
                request = sample(datatype, binary, parameters={"binary_data_output": binary})
                answer = await client.infer(url, request, model_name=request.model_name)
                found[f"{datatype} {'binary' if binary else 'json'}"] = plain(answer)["outputs"]["y"]
        found["unknown"] = await failure(client.infer(url, rows(False), model_name="nobody"))
        found["narrow"] = await failure(client.infer(url, rows(True, 5), model_name="linear"))
    return found


async def over_grpc(address: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with InferenceGRPCClient(address) as client:
        found["live"] = await client.is_server_live()
        found["ready"] = await client.is_server_ready()
        found["model_ready"] = [await client.is_model_ready(name) for name in ("linear", "nobody")]
        found["typed"] = plain(await client.infer(rows(False, request_id="7")))
        found["raw"] = plain(await client.infer(rows(True, request_id="7")))
        for datatype in SAMPLES:
            for binary in (True,) if datatype == "FP16" else (True, False):
                answer = plain(await client.infer(sample(datatype, binary)))
                found[f"{datatype} {'raw' if binary else 'typed'}"] = answer["outputs"]["y"]
        unknown = rows(True)
        unknown.model_name = "nobody"
        found["unknown"] = await failure(client.infer(unknown))
        found["narrow"] = await failure(client.infer(rows(True, 5)))
    return found


async def main(url: str, address: str) -> None:
    logging.disable(logging.CRITICAL)  # it logs the failures that are asked for
    found = {"rest": await over_rest(url), "grpc": await over_grpc(address)}
    sys.stdout.write(json.dumps(found))


asyncio.run(main(*sys.argv[1:]))
