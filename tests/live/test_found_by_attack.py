"""What hostile clients once got away with, against a real gateway: each of these broke something for others."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway, until

from onnx import helper  # isort: skip


def dynamic() -> bytes:
    """`x` → `y` FP32 [batch, n, m]: both trailing dims are the client's to choose."""
    shape: list[int | str | None] = ["batch", "n", "m"]
    return models.model(
        [helper.make_node("Identity", ["x"], ["y"])],
        [models.value("x", "FP32", shape)],
        [models.value("y", "FP32", shape)],
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    root = models.repository(tmp_path_factory.mktemp("attack"), {"dynamic": dynamic(), "linear": models.linear()})
    with gateway("serve", str(root)) as process:
        yield process


def pids(served: GatewayProcess) -> list[int]:
    return sorted(worker["pid"] for worker in served.workers())


@pytest.mark.parametrize("shape", [[1, 0, 2**62], [1, 0, 2**40], [1, 2**33, 0], [0, 2**62, 2**62]])
def test_a_zero_does_not_hide_dimensions_that_kill_workers(served: GatewayProcess, shape: list[int]) -> None:
    before = pids(served)
    tensor = {"name": "x", "datatype": "FP32", "shape": shape, "data": []}
    status, _, answer = served.infer("dynamic", {"inputs": [tensor]})
    assert status == 400
    assert "x" in answer["error"]
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 0, 3], "data": []}
    assert served.infer("dynamic", {"inputs": [tensor]})[0] == 200
    assert pids(served) == before


@pytest.mark.parametrize(
    "body",
    [
        b'{"x":[' + b"[]," * 400_000 + b'[]],"inputs":[]}',
        b'{"x":' + b'{"a":1},' * 200_000,
    ],
    ids=["many small arrays", "broken"],
)
def test_large_json_that_only_slow_parsers_read_is_refused(served: GatewayProcess, body: bytes) -> None:
    status, headers, answer = served.request("POST", "/v2/models/linear/infer", body)
    assert status == 400
    assert "binary tensor extension" in json.loads(answer)["error"]
    assert "x-request-id" in headers


def test_a_nan_in_a_large_body_is_read_like_any_number(served: GatewayProcess) -> None:
    row = b",".join([b"1"] * 15 + [b"NaN"])
    rows = b",".join([row] * 40_000)  # 1.3 MB: literals used to end on a road that only small bodies may take
    body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,16],"data":[' + rows + b"]}]}"
    status, _, answer = served.request("POST", "/v2/models/linear/infer", body)
    assert status == 400
    assert "640000" in json.loads(answer)["error"]  # all were counted; there are too many for the shape


def test_after_sigterm_readiness_is_refused_while_requests_are_still_served(tmp_path: Path) -> None:
    root = models.repository(tmp_path, {"linear": models.linear()})
    row = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [0.5] * 16}]}
    with gateway("serve", str(root)) as served:
        assert served.request("GET", "/v2/health/ready")[0] == 200
        served.process.send_signal(signal.SIGTERM)
        until(lambda: "not ready any more" in served.output(), 30, "the signal was not seen")
        assert served.request("GET", "/v2/health/ready")[0] == 503
        assert served.infer("linear", row)[0] == 200
        assert served.process.wait(30) == 0
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", served.port), 5).close()


async def test_a_body_sent_without_waiting_leaves_no_stray_100_continue() -> None:
    from tests.ingress.oip_bench import infer, oip_bench, replica_of

    async with oip_bench() as bench:
        replica = replica_of(bench.catalog.find("numbers", "2"))
        replica.held = []
        client = await bench.client()
        first = infer([1])
        head, _, body = infer([2]).partition(b"\r\n\r\n")
        client.send(first + head + b"\r\nExpect: 100-continue\r\n\r\n")
        while not replica.held:
            await asyncio.sleep(0)
        client.send(body)  # before it was told to
        await asyncio.sleep(0.05)
        replica.release()
        assert [(await client.answer()).status for _ in range(2)] == [200, 200]
        client.send(infer([3]))
        assert (await client.answer()).status == 200
