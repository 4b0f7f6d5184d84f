"""The inference log of a real gateway, kind of request by kind of request: each row has the tensors that its caller
sent and got, wherever these lay and whoever made the answer."""

from __future__ import annotations

import contextlib
import json
import os
import queue
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
import tritonclient.utils.shared_memory as shm
from onnx import helper
from tritonclient.utils import InferenceServerException

from gateway.inference_log.store import Store
from gateway.provenance.headers import Member, parse
from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway

Row = dict[str, Any]
Shape = list[int | str | None]
PAIR: Shape = ["batch", 2]
ONE: Shape = ["batch", 1]

CONFIGS = {
    "cached": "max_batch_size: 8\nresponse_cache { enable: true }",
    "small": "max_batch_size: 4\ndynamic_batching { }",
    "adds": "max_batch_size: 4\n"
    'input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } ] '
    'output [ { name: "sum" data_type: TYPE_FP32 dims: [ 1 ] } ]'
    ' sequence_batching { oldest { max_candidate_sequences: 8 } state [ { input_name: "total" output_name: "total_out" '
    "data_type: TYPE_FP32 dims: [ 1 ] } ] }",
    "chain": """
      platform: "ensemble"
      max_batch_size: 4
      input [ { name: "IN" data_type: TYPE_FP32 dims: [ 2 ] } ]
      output [ { name: "OUT" data_type: TYPE_FP32 dims: [ 2 ] }, { name: "MIDDLE" data_type: TYPE_FP32 dims: [ 2 ] } ]
      ensemble_scheduling { step [
        { model_name: "double" input_map { key: "x" value: "IN" } output_map { key: "y" value: "MIDDLE" } },
        { model_name: "small" input_map { key: "x" value: "MIDDLE" } output_map { key: "y" value: "OUT" } }
      ] }""",
}


def double() -> bytes:
    """`y` = 2·`x`, FP32 [batch, 2]."""
    nodes = [helper.make_node("Add", ["x", "x"], ["y"])]
    return models.model(nodes, [models.value("x", "FP32", PAIR)], [models.value("y", "FP32", PAIR)])


def accumulator() -> bytes:
    """`sum` = `total_out` = `x` + `total`, FP32 [batch, 1]."""
    return models.model(
        [helper.make_node("Add", ["x", "total"], ["sum"]), helper.make_node("Identity", ["sum"], ["total_out"])],
        [models.value("x", "FP32", ONE), models.value("total", "FP32", ONE)],
        [models.value("sum", "FP32", ONE), models.value("total_out", "FP32", ONE)],
    )


def fp32(*rows: list[float]) -> bytes:
    return np.array(rows, "<f4").tobytes()


def lengthened(*texts: bytes) -> bytes:
    """BYTES as the protocol has them in binary form."""
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


class Told:
    """What clients saw, by the name of the case; and the log, once the gateway has ended."""

    def __init__(self) -> None:
        self.ids: dict[str, str] = {}
        self.members: dict[str, Sequence[Member]] = {}
        self.answers: dict[str, Any] = {}
        self.rows: list[Row] = []

    def row(self, name: str) -> Row:
        """The one row of a case."""
        (found,) = [row for row in self.rows if row["request_id"] == self.ids[name]]
        return found

    def by_oip_id(self, oip_id: str) -> Row:
        (found,) = [row for row in self.rows if row["oip_id"] == oip_id]
        return found


def ask(process: GatewayProcess, told: Told, name: str, model: str, tensor: Row, **more: Any) -> None:
    status, headers, answer = process.infer(model, {"inputs": [tensor], **more})
    assert status == 200, answer
    told.ids[name] = headers["x-request-id"]
    told.members[name] = parse(headers.items()).members
    told.answers[name] = {output["name"]: output["data"] for output in answer["outputs"]}


def numbers(rows: list[list[float]], name: str = "x") -> Row:
    return {"name": name, "datatype": "FP32", "shape": [len(rows), len(rows[0])], "data": rows}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    directory = tmp_path_factory.mktemp("kinds")
    files = {"cached": double(), "small": models.identity("FP32", 2), "double": double(), "adds": accumulator()}
    files |= {"text": models.identity("BYTES"), "wide": models.identity("FP32")}
    root = directory / "models"
    (root / "chain" / "1").mkdir(parents=True)
    models.repository(root, files, CONFIGS)
    file = directory / "gateway.yaml"
    file.write_text(
        "server: {drain_delay_s: 0, workers: 1}\ndefaults: {oversize: split}\n"
        f"inference_log: {{directory: {directory / 'log'}}}\nmodels: [{{source: {root}}}]\n"
    )
    told = Told()
    with gateway("serve", "-c", str(file), "--allow-client-shm") as process:
        _plain(process, told)
        _in_shared_memory(process)
        _streamed(process)
        assert process.metric("gateway_inference_log_dropped_total") == 0
        assert process.stop() == 0
        assert "Traceback" not in process.output()
    with Store(directory / "log").opened() as connection:
        told.rows = connection.sql("select * from requests order by epoch, position").to_arrow_table().to_pylist()
    return told


def _plain(process: GatewayProcess, told: Told) -> None:
    for x in (1, 2, 4):
        step = {"sequence_id": "s", "sequence_start": x == 1, "sequence_end": x == 4}
        ask(process, told, f"step {x}", "adds", numbers([[x]]), parameters=step)
    for name in ("made", "hit"):
        ask(process, told, name, "cached", numbers([[3, 4], [5, 6]]), id=name)
    ask(process, told, "split", "small", numbers([[n, -n] for n in range(10)]))
    ask(process, told, "chain", "chain", numbers([[1, 2], [3, 4]], "IN"))
    texts = ["", "é", "a\u0000b"]
    ask(process, told, "text", "text", {"name": "x", "datatype": "BYTES", "shape": [1, 3], "data": texts})


def _in_shared_memory(process: GatewayProcess) -> None:
    """The output goes to where the input lay, so that a row which looked later would have the wrong one."""
    for api, port in ((http_client, process.port), (grpc_client, process.grpc_port)):
        name = "http" if api is http_client else "grpc"
        key = f"/oip-log-{os.getpid()}-{name}"
        handle = shm.create_shared_memory_region(name, key, 64)
        try:
            with contextlib.closing(api.InferenceServerClient(f"127.0.0.1:{port}")) as client:
                client.register_system_shared_memory(name, key, 64)
                shm.set_shared_memory_region(handle, [np.array([[7, 8]], np.float32)])
                x, y = api.InferInput("x", [1, 2], "FP32"), api.InferRequestedOutput("y")
                x.set_shared_memory(name, 8)
                y.set_shared_memory(name, 8)
                client.infer("double", [x], outputs=[y], request_id=f"shared {name}")
                assert shm.get_contents_as_numpy(handle, np.float32, [1, 2]).tolist() == [[14, 16]]
                x.set_shared_memory(name, 8, 60)
                with pytest.raises(InferenceServerException):
                    client.infer("double", [x], request_id=f"beyond {name}")
                client.unregister_system_shared_memory(name)
        finally:
            shm.destroy_shared_memory_region(handle)


def _streamed(process: GatewayProcess) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    with contextlib.closing(grpc_client.InferenceServerClient(f"127.0.0.1:{process.grpc_port}")) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for number in range(6):
            x = grpc_client.InferInput("x", [1, 2], "FP32")
            x.set_data_from_numpy(np.array([[number, 1]], np.float32))
            client.async_stream_infer("nobody" if number == 3 else "double", [x], request_id=f"streamed {number}")
        errors = [answers.get(timeout=60)[1] for _ in range(6)]
        client.stop_stream()
    assert [error is not None for error in errors] == [number == 3 for number in range(6)]


def carries(row: Row, inputs: dict[str, bytes], outputs: dict[str, bytes]) -> None:
    assert (row["status"], row["error"]) == (200, None)
    assert {tensor["name"]: bytes(tensor["data"]) for tensor in row["inputs"]} == inputs
    assert {tensor["name"]: bytes(tensor["data"]) for tensor in row["outputs"]} == outputs


def test_every_request_is_one_row(told: Told) -> None:
    ids = [row["request_id"] for row in told.rows]
    assert len(ids) == len(set(ids))
    assert len(ids) == 18
    assert sum(row["endpoint"] == "stream" for row in told.rows) == 6


def test_steps_of_a_sequence_are_rows_without_its_hidden_state(told: Told) -> None:
    for x, total in ((1, 1), (2, 3), (4, 7)):
        row = told.row(f"step {x}")
        carries(row, {"x": fp32([x])}, {"sum": fp32([total])})
        step = {"sequence_id": "s", "sequence_start": x == 1, "sequence_end": x == 4}
        assert json.loads(row["parameters"]) == step


def test_a_cached_answer_is_a_row_with_the_execution_that_made_it(told: Told) -> None:
    tensors = {"x": fp32([3, 4], [5, 6])}, {"y": fp32([6, 8], [10, 12])}
    made, hit = told.row("made"), told.row("hit")
    for row, name in ((made, "made"), (hit, "hit")):
        carries(row, *tensors)
        assert (row["oip_id"], row["rows"]) == (name, 2)
        (member,) = told.members[name]
        assert (row["backend"], row["batch_id"], row["batch_row"]) == (member.backend, member.batch_id, member.row)
    assert (hit["backend"], hit["batch_id"]) == ("cache", made["batch_id"])


def test_a_split_request_is_one_row(told: Told) -> None:
    row = told.row("split")
    data = fp32(*[[float(n), float(-n)] for n in range(10)])
    carries(row, {"x": data}, {"y": data})
    assert row["rows"] == 10
    assert row["inputs"][0]["shape"] == [10, 2]
    assert len(told.members["split"]) == 3
    first = told.members["split"][0]
    assert (row["batch_id"], row["batch_row"]) == (first.batch_id, first.row)


def test_an_ensemble_is_one_row_and_its_steps_are_none(told: Told) -> None:
    row = told.row("chain")
    carries(row, {"IN": fp32([1, 2], [3, 4])}, {"OUT": fp32([2, 4], [6, 8]), "MIDDLE": fp32([2, 4], [6, 8])})
    assert row["model"] == "chain"
    assert sum(row["model"] in ("double", "small") and row["rows"] == 2 for row in told.rows) == 0


def test_bytes_are_kept_in_the_protocols_binary_form(told: Told) -> None:
    data = lengthened(b"", "é".encode(), b"a\0b")
    row = told.row("text")
    carries(row, {"x": data}, {"y": data})
    assert row["outputs"][0]["datatype"] == "BYTES"
    assert told.answers["text"] == {"y": ["", "é", "a\0b"]}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_shared_memory_is_logged_as_it_was_when_it_was_read(told: Told, protocol: str) -> None:
    row = told.by_oip_id(f"shared {protocol}")
    carries(row, {"x": fp32([7, 8])}, {"y": fp32([14, 16])})
    assert row["protocol"] == protocol
    beyond = [row for row in told.rows if row["protocol"] == protocol and row["status"] == 400]
    assert len(beyond) == 1
    assert "Invalid offset" in beyond[0]["error"]


def test_every_request_of_a_stream_is_a_row(told: Told) -> None:
    for number in (0, 1, 2, 4, 5):
        row = told.by_oip_id(f"streamed {number}")
        carries(row, {"x": fp32([number, 1])}, {"y": fp32([2 * number, 2])})
        assert (row["endpoint"], row["grpc_code"]) == ("stream", 0)
    (lost,) = [row for row in told.rows if row["endpoint"] == "stream" and row["status"] == 404]
    assert (lost["asked_model"], lost["model"], lost["inputs"]) == ("nobody", "__unresolved__", None)
