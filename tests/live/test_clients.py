"""Clients people have: tritonclient (sync and aio) unchanged, curl, and a socket that pipelines; and what every answer
says about where it came from."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as sync_client
import tritonclient.http.aio as aio_client
from tritonclient.utils import InferenceServerException

from gateway.provenance.headers import parse
from tests.live import models
from tests.live.alone import Alone, check
from tests.live.gateway_process import GatewayProcess, gateway
from tests.live.oip_wire import Request, Tensor, connect

MODELS = {f"id_{datatype.lower()}": models.identity(datatype) for datatype in models.ONNX_TYPE} | {
    "linear": models.linear(),
    "two": models.two_inputs(),
}
SAMPLES: dict[str, Any] = {
    "BOOL": np.array([[True, False, True]]),
    "UINT8": np.array([[0, 255]], np.uint8),
    "UINT16": np.array([[0, 65535]], np.uint16),
    "UINT32": np.array([[0, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 2**64 - 1]], np.uint64),
    "INT8": np.array([[-128, 127]], np.int8),
    "INT16": np.array([[-32768, 32767]], np.int16),
    "INT32": np.array([[-(2**31), 2**31 - 1]], np.int32),
    "INT64": np.array([[-(2**63), 2**63 - 1, 9007199254740993]], np.int64),
    "FP16": np.array([[1.5, -65504.0]], np.float16),
    "FP32": np.array([[0.1, 3.4e38], [1e-40, -0.0]], np.float32),
    "FP64": np.array([[0.1, 1e308]], np.float64),
    "BYTES": np.array([["héllo", "", "日本\0x"]], object),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = models.repository(tmp_path_factory.mktemp("clients"), MODELS)
    (root / "linear" / "1" / "labels.txt").write_text("a\nb\nc\nd\n")
    (root / "linear" / "1" / "more").mkdir()
    (root / "linear" / "1" / "more" / "notes with spaces.txt").write_text("read with care\n")
    return root


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[GatewayProcess]:
    with gateway("serve", str(root), "--workers", "2") as process:
        yield process


@pytest.fixture
def client(served: GatewayProcess) -> Iterator[Any]:
    with sync_client.InferenceServerClient(f"127.0.0.1:{served.port}") as found:
        yield found


def row(value: float = 0.5, rows: int = 1) -> Any:
    return np.full((rows, 16), value, np.float32)


# -- tritonclient ----------------------------------------------------------------------------------------------------


def test_tritonclient_asks_for_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("linear")
    assert client.is_model_ready("linear", "1")
    assert not client.is_model_ready("nobody")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("linear") == {
        "name": "linear",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
    }


@pytest.mark.parametrize(
    ("datatype", "binary_in", "binary_out"),
    [
        (datatype, binary_in, binary_out)
        for datatype in sorted(SAMPLES)
        for binary_in in (True, False)
        for binary_out in (True, False)
        if datatype != "FP16" or (binary_in and binary_out)  # OIP has no FP16 in JSON
    ],
)
def test_tritonclient_infers_every_datatype_both_ways(
    client: Any, datatype: str, binary_in: bool, binary_out: bool
) -> None:
    sample = SAMPLES[datatype]
    tensor = sync_client.InferInput("x", list(sample.shape), datatype)
    tensor.set_data_from_numpy(sample, binary_data=binary_in)
    wanted = [sync_client.InferRequestedOutput("y", binary_data=binary_out)]
    result = client.infer(f"id_{datatype.lower()}", [tensor], outputs=wanted, request_id=f"of {datatype}")
    answer = result.get_response()
    assert answer["id"] == f"of {datatype}"
    assert ("data" in answer["outputs"][0]) != binary_out
    got = result.as_numpy("y")
    if datatype == "BYTES":
        assert [e.decode() if isinstance(e, bytes) else e for e in got.ravel()] == list(sample.ravel())
    else:
        assert got.dtype == sample.dtype
        assert got.tobytes() == sample.tobytes()


def test_tritonclient_without_named_outputs_gets_all_of_them(client: Any) -> None:
    a, b = np.array([[2, 3]], np.int32), np.array([[10, 20]], np.int32)
    inputs = [sync_client.InferInput(name, [1, 2], "INT32") for name in ("a", "b")]
    inputs[0].set_data_from_numpy(a, binary_data=False)
    inputs[1].set_data_from_numpy(b)
    result = client.infer("two", inputs)
    assert result.as_numpy("sum").tolist() == [[12, 23]]
    assert result.as_numpy("product").tolist() == [[20, 60]]


def test_tritonclient_sends_parameters_timeouts_and_versions(client: Any) -> None:
    tensor = sync_client.InferInput("x", [1, 16], "FP32")
    tensor.set_data_from_numpy(row())
    result = client.infer(
        "linear", [tensor], model_version="1", parameters={"tenant": "a"}, timeout=10_000_000, priority=1
    )
    assert "parameters" not in result.get_response()
    assert result.get_response()["model_version"] == "1"


@pytest.mark.parametrize(
    ("model", "shape", "datatype", "name", "says"),
    [
        ("nobody", [1, 16], "FP32", "x", "Request for unknown model: 'nobody' is not found"),
        ("linear", [1, 15], "FP32", "x", "unexpected shape for input 'x' for model 'linear'"),
        ("linear", [1, 16], "FP64", "x", "'FP64'"),
        ("linear", [1, 16], "FP32", "z", "'z'"),
    ],
)
def test_tritonclient_shows_what_was_wrong(
    client: Any, model: str, shape: list[int], datatype: str, name: str, says: str
) -> None:
    tensor = sync_client.InferInput(name, shape, datatype)
    tensor.set_data_from_numpy(np.zeros(shape, np.float32 if datatype == "FP32" else np.float64))
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, [tensor])
    assert says in caught.value.message()
    assert caught.value.status() in {"400", "404"}


def test_tritonclient_is_told_of_an_unknown_version(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="version 9 is not found"):
        client.get_model_metadata("linear", "9")


def test_tritonclient_async_infer_from_many_greenlets(served: GatewayProcess) -> None:
    alone = Alone(MODELS["linear"])
    with sync_client.InferenceServerClient(f"127.0.0.1:{served.port}", concurrency=8) as client:
        pending = []
        for number in range(40):
            tensor = sync_client.InferInput("x", [1, 16], "FP32")
            tensor.set_data_from_numpy(row(number / 40))
            pending.append(client.async_infer("linear", [tensor]))
        for number, handle in enumerate(pending):
            expected = alone.run(Request("linear", [Tensor("x", "FP32", row(number / 40))]))["y"]
            np.testing.assert_allclose(handle.get_result().as_numpy("y"), expected, rtol=0, atol=1e-6)


async def test_tritonclient_aio(served: GatewayProcess) -> None:
    """It advertises `gzip, deflate, br` and decodes by hand: every endpoint must answer in a form that it reads."""
    async with aio_client.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("linear")
        assert (await client.get_server_metadata())["name"]
        assert (await client.get_model_metadata("two"))["inputs"][1]["name"] == "b"
        for binary in (True, False):
            tensor = aio_client.InferInput("x", [1, 3], "INT64")
            tensor.set_data_from_numpy(SAMPLES["INT64"], binary_data=binary)
            wanted = [aio_client.InferRequestedOutput("y", binary_data=binary)]
            result = await client.infer("id_int64", [tensor], outputs=wanted, request_id="7")
            assert result.as_numpy("y").tolist() == SAMPLES["INT64"].tolist()
            assert result.get_response()["id"] == "7"
        with pytest.raises(InferenceServerException, match="unknown model"):
            await client.get_model_metadata("nobody")


# -- curl ------------------------------------------------------------------------------------------------------------


def curl(*arguments: str, body: bytes = b"") -> tuple[bytes, str]:
    """Output, and what curl tells about the exchange (-v)."""
    done = subprocess.run(["curl", "-sv", *arguments], input=body, capture_output=True, timeout=60, check=True)
    return done.stdout, done.stderr.decode("latin-1")


def linear_body(rows: int) -> bytes:
    data = row(0.25, rows).ravel().tolist()
    return json.dumps({"inputs": [{"name": "x", "shape": [rows, 16], "datatype": "FP32", "data": data}]}).encode()


def test_curl_is_told_to_continue_before_a_large_body(served: GatewayProcess) -> None:
    body = linear_body(14_000)
    assert len(body) > 1 << 20, "curl only asks first for more than 1 MiB"
    url = f"http://127.0.0.1:{served.port}/v2/models/linear/infer"
    output, story = curl("--data-binary", "@-", "-H", "Expect: 100-continue", url, body=body)
    assert "< HTTP/1.1 100 Continue" in story
    answer = json.loads(output)["outputs"][0]
    assert answer["shape"] == [14_000, 4]
    expected = Alone(MODELS["linear"]).run(Request("linear", [Tensor("x", "FP32", row(0.25))]))["y"]
    np.testing.assert_allclose(
        np.array(answer["data"]).reshape(-1, 4), np.repeat(expected, 14_000, axis=0), rtol=0, atol=1e-6
    )


def test_curl_uploads_in_chunks(served: GatewayProcess) -> None:
    url = f"http://127.0.0.1:{served.port}/v2/models/linear/infer"
    output, story = curl("-T", "-", "-X", "POST", "-H", "Transfer-Encoding: chunked", url, body=linear_body(100))
    assert "Content-Length" not in story.partition("< HTTP/1.1 200")[0]
    assert json.loads(output)["outputs"][0]["shape"] == [100, 4]


def test_curl_reuses_one_connection_and_sees_plain_errors(served: GatewayProcess) -> None:
    base = f"http://127.0.0.1:{served.port}/v2"
    output, story = curl(base, f"{base}/nope", f"{base}/models/linear/infer", f"{base}/health/live")
    assert re.findall(r"< HTTP/1.1 (\d+)", story) == ["200", "404", "405", "200"]
    assert "Content-Type: application/json\r\n" in story
    assert len(re.findall(r"^\* Connected to", story, re.MULTILINE)) == 1
    assert b'{"live":true}' in output


# -- pipelining ------------------------------------------------------------------------------------------------------


async def test_a_thousand_pipelined_requests_are_answered_in_order(served: GatewayProcess) -> None:
    """Far more than are looked at ahead; small and large ones, and some that fail."""
    alone = Alone(MODELS["id_fp32"])
    asked: list[Request | None] = []
    stream = []
    for number in range(1000):
        if number % 97 == 5:
            asked.append(None)
            stream.append(b"GET /v2/models/nobody HTTP/1.1\r\nHost: test\r\n\r\n")
            continue
        array = np.full((1 + number % 3, 1 + number % 50), number, np.float32)
        request = Request("id_fp32", [Tensor("x", "FP32", array, binary=number % 2 == 0)], request_id=str(number))
        asked.append(request)
        stream.append(request.encode())
    async with connect(served.port) as connection:
        connection.writer.write(b"".join(stream))
        for expected in asked:
            answer = await connection.receive()
            if expected is None:
                assert answer.status == 404
            else:
                check(expected, answer, alone)


# -- provenance ------------------------------------------------------------------------------------------------------


def coreutils_digest(directory: Path) -> str:
    """As contracts say anyone can check it."""
    pipeline = r"find . -type f -printf '%P\n' | LC_ALL=C sort | xargs -d '\n' sha256sum | sha256sum"
    done = subprocess.run(["sh", "-c", pipeline], cwd=directory, capture_output=True, text=True, check=True)
    return "sha256:" + done.stdout.split()[0]


async def test_every_answer_says_where_it_came_from(served: GatewayProcess, root: Path) -> None:
    digest = coreutils_digest(root / "linear" / "1")
    workers = {worker["name"] for worker in served.workers()}
    seen = set()
    async with connect(served.port) as connection:
        for binary in (False, True):
            for rows in (1, 3, 130):
                request = Request("linear", [Tensor("x", "FP32", row(0.5, rows), binary)], binary_output=binary)
                answer = await connection.ask(request)
                provenance = parse(answer.headers)
                assert provenance.model is not None
                assert (provenance.model.name, provenance.model.version) == ("linear", "1")
                assert provenance.model.digest == digest
                assert len(provenance.members) == -(-rows // 64)
                assert {member.backend for member in provenance.members} <= workers
                assert {member.attempt for member in provenance.members} == {1}
                assert set(provenance.timings_ms) == {"queue", "infer", "total"}
                assert 0 <= provenance.timings_ms["queue"] <= provenance.timings_ms["total"]
                assert provenance.request_id is not None
                assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
                                    provenance.request_id)  # fmt: skip
                seen.add(provenance.request_id)
    assert len(seen) == 6


async def test_a_refusal_says_which_model_refused(served: GatewayProcess, root: Path) -> None:
    async with connect(served.port) as connection:
        bad = Request("linear", [Tensor("x", "FP32", np.zeros((1, 3), np.float32))])
        answer = await connection.ask(bad)
        assert answer.status == 400
        assert answer.header("Content-Type") == "application/json"
        assert "[-1,16]" in answer.error
        assert "[1,3]" in answer.error
        provenance = parse(answer.headers)
        assert provenance.model is not None
        assert provenance.model.digest == coreutils_digest(root / "linear" / "1")
        assert (await connection.ask(Request("linear", [Tensor("x", "FP32", row())]))).status == 200


def test_the_manifest_is_behind_the_digest(served: GatewayProcess, root: Path) -> None:
    for path in ("/v2/models/linear/provenance", "/v2/models/linear/versions/1/provenance"):
        status, _, body = served.request("GET", path)
        manifest = json.loads(body)
        assert status == 200
        assert manifest["digest"] == coreutils_digest(root / "linear" / "1")
        assert [entry["path"] for entry in manifest["files"]] == [
            "labels.txt", "model.onnx", "more/notes with spaces.txt",
        ]  # fmt: skip
        assert manifest["runtime"]["onnxruntime"]
    listing = served.operations("/api/models")
    assert manifest["digest"] in listing.decode()


def test_hanging_up_after_a_half_closed_request_still_answers_it(served: GatewayProcess) -> None:
    """`printf … | nc`: the client sends no more but listens."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as client:
        client.sendall(Request("linear", [Tensor("x", "FP32", row())]).encode())
        client.shutdown(socket.SHUT_WR)
        assert b"HTTP/1.1 200 OK" in client.makefile("rb").read()
