"""Triton's own client libraries against the REST extensions: compression both ways, classification, generate."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as sync_client
import tritonclient.http.aio as aio_client
from tritonclient.utils import InferenceServerException

from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway

ALGORITHMS = [None, "gzip", "deflate"]
HALVES = {"half": models.identity("FP16")}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    root = models.repository(
        tmp_path_factory.mktemp("extensions"),
        {"numbers": models.identity("FP32"), "text": models.identity("BYTES"), **HALVES},
    )
    options = root.parent / "extensions.yaml"
    options.write_text("server: {workers: 2, protocol: {json_half: true, invent_ids: true}}\n")
    with gateway("serve", str(root), "-c", str(options)) as process:
        yield process


def names(served: GatewayProcess, model: str) -> tuple[str, str]:
    found = json.loads(served.request("GET", f"/v2/models/{model}")[2])
    return found["inputs"][0]["name"], found["outputs"][0]["name"]


def asked(library: Any, name: str, values: Any, binary: bool) -> Any:
    tensor = library.InferInput(name, list(values.shape), "FP32")
    tensor.set_data_from_numpy(values, binary_data=binary)
    return tensor


@pytest.mark.parametrize("request_algorithm", ALGORITHMS)
@pytest.mark.parametrize("response_algorithm", ALGORITHMS)
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("columns", [4, 100_000])
def test_compression_sync(
    served: GatewayProcess, request_algorithm: str | None, response_algorithm: str | None, binary: bool, columns: int
) -> None:
    given, made = names(served, "numbers")
    values = np.arange(columns, dtype=np.float32).reshape(1, columns)
    with sync_client.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
        result = client.infer(
            "numbers",
            [asked(sync_client, given, values, binary)],
            outputs=[sync_client.InferRequestedOutput(made, binary_data=binary)],
            request_compression_algorithm=request_algorithm,
            response_compression_algorithm=response_algorithm,
        )
        np.testing.assert_array_equal(result.as_numpy(made), values)


@pytest.mark.parametrize("columns", [4, 100_000])
async def test_compression_aio_and_every_endpoint_it_reads(served: GatewayProcess, columns: int) -> None:
    given, made = names(served, "numbers")
    values = np.arange(columns, dtype=np.float32).reshape(1, columns)
    async with aio_client.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
        for algorithm in ALGORITHMS:
            for binary in (False, True):
                result = await client.infer(
                    "numbers",
                    [asked(aio_client, given, values, binary)],
                    outputs=[aio_client.InferRequestedOutput(made, binary_data=binary)],
                    request_compression_algorithm=algorithm,
                    response_compression_algorithm=algorithm,
                )
                np.testing.assert_array_equal(result.as_numpy(made), values)
        assert await client.is_server_ready()
        assert (await client.get_server_metadata())["name"]
        assert (await client.get_model_metadata("numbers"))["name"] == "numbers"


def test_classification(served: GatewayProcess) -> None:
    given, made = names(served, "numbers")
    values = np.array([[0.1, 0.9, 0.5], [3, 2, 1]], np.float32)
    with sync_client.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
        for binary in (False, True):
            wanted = sync_client.InferRequestedOutput(made, binary_data=binary, class_count=2)
            result = client.infer("numbers", [asked(sync_client, given, values, True)], outputs=[wanted])
            found = [[str(v, "utf-8") if isinstance(v, bytes) else v for v in r] for r in result.as_numpy(made)]
            assert found == [["0.900000:1", "0.500000:2"], ["3.000000:0", "2.000000:1"]]
        given, made = names(served, "text")
        text = sync_client.InferInput(given, [1, 1], "BYTES")
        text.set_data_from_numpy(np.array([["a"]], object))
        wanted = sync_client.InferRequestedOutput(made, class_count=1)
        with pytest.raises(InferenceServerException, match="class result not available"):
            client.infer("text", [text], outputs=[wanted])


def test_halves_as_json_and_invented_ids(served: GatewayProcess) -> None:
    given, made = names(served, "half")
    tensor = {"name": given, "datatype": "FP16", "shape": [1, 4], "data": [1, -0.1, 1e9, 65504]}
    status, _, answer = served.infer("half", {"inputs": [tensor]})
    assert status == 200, answer
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"]) == (made, "FP16")
    assert np.array(output["data"], np.float16).tolist() == np.array([1, -0.1, np.inf, 65504], np.float16).tolist()
    assert answer["id"]


def test_generate(served: GatewayProcess) -> None:
    given, made = names(served, "text")
    body = json.dumps({given: "hello", "id": "7", "parameters": {"temperature": 0.5}}).encode()
    for path in ("/v2/models/text/generate", "/v2/models/text/versions/1/generate"):
        assert json.loads(served.request("POST", path, body)[2]) == {
            "id": "7", "model_name": "text", "model_version": "1", made: "hello",
        }  # fmt: skip
    status, headers, event = served.request("POST", "/v2/models/text/generate_stream", body)
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert json.loads(event.decode().removeprefix("data: "))[made] == "hello"


def test_a_bomb_is_refused_and_others_are_served(served: GatewayProcess) -> None:
    bomb = gzip.compress(b'{"inputs":' + b" " * (80 * 1024 * 1024), 6)
    status, _, body = served.request("POST", "/v2/models/numbers/infer", bomb, {"Content-Encoding": "gzip"})
    assert status == 413
    assert "maximum allowed input size" in json.loads(body)["error"]
    assert served.request("GET", "/v2/health/ready")[0] == 200
