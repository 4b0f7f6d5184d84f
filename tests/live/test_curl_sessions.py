"""Sessions with curl as a user types them, against both ports of a whole gateway."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.protocol import schema
from tests.ingress.grpc_peer import prefixed
from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway
from tests.protocol.grpc_samples import infer_request

pytestmark = pytest.mark.slow
ROW = {"id": "7", "inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2.5, -0.5]}]}
GRPC = ("-H", "content-type: application/grpc", "-H", "te: trailers")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    root = models.repository(tmp_path_factory.mktemp("curl"), {"echo": models.identity("FP32")})
    control = ("--model-control", "explicit", "--load-model", "*")
    with gateway("serve", str(root), "--workers", "2", *control) as process:
        yield process


@dataclass(frozen=True)
class Said:
    code: int
    """curl's own."""
    body: bytes
    story: str
    """What curl tells with -v."""

    @property
    def status(self) -> list[str]:
        return re.findall(r"^< (HTTP/\S+ \d+)", self.story, re.MULTILINE)

    @property
    def headers(self) -> dict[str, str]:
        found = re.findall(r"^< ([\w-]+): ([^\r\n]*)", self.story, re.MULTILINE)
        return {name.lower(): value for name, value in found}

    def json(self) -> Any:
        return json.loads(self.body)


def curl(url: str, *arguments: str, body: bytes | None = None) -> Said:
    data = () if body is None else ("--data-binary", "@-")
    command = ["curl", "-sv", "--max-time", "60", *arguments, *data, url]
    done = subprocess.run(command, input=body or b"", capture_output=True, timeout=90, check=False)
    return Said(done.returncode, done.stdout, done.stderr.decode("latin-1").replace("\r\n", "\n"))


@pytest.fixture
def base(served: GatewayProcess) -> str:
    return f"http://127.0.0.1:{served.port}/v2"


def test_a_first_look_around(base: str) -> None:
    assert curl(f"{base}/health/live").json() == {"live": True}
    assert curl(f"{base}/health/ready").json() == {"ready": True}
    assert "binary_tensor_data" in curl(base).json()["extensions"]
    assert curl(f"{base}/models/echo/ready").status == ["HTTP/1.1 200"]
    assert curl(f"{base}/models/echo").json()["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]
    assert curl(f"{base}/models/echo/config").json()["backend"] == "onnxruntime"
    (entry,) = curl(f"{base}/repository/index", "-X", "POST").json()
    assert (entry["name"], entry["version"], entry["state"]) == ("echo", "1", "READY")


@pytest.mark.parametrize("kind", [(), ("-H", "Content-Type: application/json"), ("-H", "Content-Type:")])
def test_inference_whatever_curl_calls_the_content(base: str, kind: tuple[str, ...]) -> None:
    """Left alone it says application/x-www-form-urlencoded."""
    said = curl(f"{base}/models/echo/infer", *kind, body=json.dumps(ROW).encode())
    assert said.status == ["HTTP/1.1 200"]
    assert said.headers["content-type"] == "application/json"
    assert said.json() == {
        "id": "7",
        "model_name": "echo",
        "model_version": "1",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 3], "data": [1.0, 2.5, -0.5]}],
    }


def test_binary_tensors(base: str) -> None:
    x = np.array([[1, 2.5, -0.5]], np.float32)
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "parameters": {"binary_data_size": 12}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    length = ("-H", f"Inference-Header-Content-Length: {len(head)}")
    said = curl(f"{base}/models/echo/infer", *length, body=head + x.tobytes())
    cut = int(said.headers["inference-header-content-length"])
    assert said.headers["content-type"] == "application/octet-stream"
    assert json.loads(said.body[:cut])["outputs"][0]["parameters"] == {"binary_data_size": 12}
    assert said.body[cut:] == x.tobytes()
    raw = curl(f"{base}/models/echo/infer", "-H", "Inference-Header-Content-Length: 0", body=x.tobytes())
    assert raw.body.endswith(x.tobytes())


def test_a_large_upload_waits_to_be_told_to_continue(base: str) -> None:
    """Of more than 1 MiB curl asks first, if the server has a second to say so."""
    width = 300_000
    tensor = {"name": "x", "shape": [1, width], "datatype": "FP32", "data": [1, 2.5, -0.5] * (width // 3)}
    body = json.dumps({"inputs": [tensor]}).encode()
    assert len(body) > 1 << 20
    said = curl(f"{base}/models/echo/infer", "-H", "Expect: 100-continue", body=body)
    assert said.status == ["HTTP/1.1 100", "HTTP/1.1 200"]
    assert said.json()["outputs"][0]["shape"] == [1, width]
    refused = curl(f"{base}/models/nobody/infer", "-H", "Expect: 100-continue", body=body)
    assert refused.status[-1] == "HTTP/1.1 404"
    unknown = curl(f"{base}/models/echo/infer", "-H", "Expect: 200-maybe", body=b"{}")
    assert unknown.status[-1] in {"HTTP/1.1 417", "HTTP/1.1 400"}


def test_compressed_both_ways(base: str) -> None:
    rows = 5_000
    tensor = {"name": "x", "shape": [rows, 3], "datatype": "FP32", "data": [1, 2.5, -0.5] * rows}
    body = gzip.compress(json.dumps({"inputs": [tensor]}).encode())
    said = curl(f"{base}/models/echo/infer", "-H", "Content-Encoding: gzip", "--compressed", body=body)
    assert said.headers["content-encoding"] in {"gzip", "deflate"}
    assert said.json()["outputs"][0]["data"] == [1.0, 2.5, -0.5] * rows
    refused = curl(f"{base}/models/echo/infer", "-H", "Content-Encoding: br", body=body)
    assert (refused.status, refused.headers["accept-encoding"]) == (["HTTP/1.1 501"], "gzip, deflate")


@pytest.mark.parametrize(
    ("path", "arguments", "status", "says"),
    [
        ("nope", (), 404, "Not Found"),
        ("models/nobody", (), 404, "Request for unknown model: 'nobody' is not found"),
        ("models/nobody/stats", (), 400, "requested model 'nobody' is not available"),
        ("models/echo/versions/2", (), 404, "version 2 is not found"),
        ("models/echo/infer", (), 405, "Method Not Allowed"),
        ("health/live", ("-X", "DELETE"), 405, "Method Not Allowed"),
        ("models/echo/infer", ("-d", "{"), 400, ""),
        ("models/echo/infer", ("-d", "{}"), 400, "inputs"),
        ("repository/models/nobody/load", ("-d", "{}"), 500, "failed to load 'nobody'"),
        ("systemsharedmemory/region/a/register", ("-d", '{"key":"/a","byte_size":8}'), 501, ""),
    ],
)
def test_refusals(base: str, path: str, arguments: tuple[str, ...], status: int, says: str) -> None:
    said = curl(f"{base}/{path}", *arguments)
    assert said.status == [f"HTTP/1.1 {status}"]
    assert said.headers["content-type"] == "application/json"
    assert list(said.json()) == ["error"]
    assert says in said.json()["error"]


def test_statistics_after_a_few_requests(base: str) -> None:
    def stats() -> tuple[int, int]:
        (found,) = curl(f"{base}/models/echo/stats").json()["model_stats"]
        return found["inference_count"], found["inference_stats"]["success"]["count"]

    before = stats()
    for _ in range(3):
        curl(f"{base}/models/echo/versions/1/infer", body=json.dumps(ROW).encode())
    assert [after - was for after, was in zip(stats(), before, strict=True)] == [3, 3]


# -- HTTP/2 ---------------------------------------------------------------------------------------------------------


def test_an_offer_of_http2_is_not_taken_up(base: str) -> None:
    said = curl(f"{base}/models/echo/infer", "--http2", body=json.dumps(ROW).encode())
    assert "Upgrade: h2c" in said.story
    assert said.status == ["HTTP/1.1 200"]
    assert said.json()["id"] == "7"


def test_http2_on_the_http_port_ends_at_once(base: str) -> None:
    """It is told 505 in HTTP/1.1, which curl does not read then; the port goes on."""
    said = curl(f"{base}/health/live", "--http2-prior-knowledge")
    assert said.code not in {0, 28}, "28 would be the timeout"
    assert curl(f"{base}/health/live").json() == {"live": True}


def test_a_grpc_call(served: GatewayProcess, tmp_path: Path) -> None:
    tensor = ("x", "FP32", [1, 2], np.array([1, 2.5], np.float32).tobytes())
    url = f"http://127.0.0.1:{served.grpc_port}/inference.GRPCInferenceService/ModelInfer"
    said = curl(
        url, "--http2-prior-knowledge", *GRPC, body=prefixed(infer_request(tensor, model="echo").SerializeToString())
    )
    assert said.status == ["HTTP/2 200"]
    assert said.headers["grpc-status"] == "0"
    response = schema.message("inference.ModelInferResponse")()
    response.ParseFromString(said.body[5:])
    assert np.frombuffer(response.raw_output_contents[0], np.float32).tolist() == [1, 2.5]
    nobody = infer_request(tensor, model="nobody").SerializeToString()
    unknown = curl(url, "--http2-prior-knowledge", *GRPC, body=prefixed(nobody))
    assert unknown.headers["grpc-status"] == "5"


def test_whoever_takes_the_grpc_port_for_the_other_is_told(served: GatewayProcess) -> None:
    url = f"http://127.0.0.1:{served.grpc_port}/v2/health/live"
    for version, status in (("--http1.1", "HTTP/1.1 505"), ("--http2-prior-knowledge", "HTTP/2 415")):
        said = curl(url, version)
        assert said.status == [status]
        assert b"This port speaks gRPC" in said.body
