"""Sequences in a live gateway: real models with implicit state and with control inputs, over REST and gRPC streams."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from onnx import helper

from gateway.provenance.headers import parse
from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway, until

Shape = list[int | str | None]
ROW: Shape = ["batch", 1]

IDLE = "max_sequence_idle_microseconds: 60000000"
TENSORS = """
max_batch_size: 4
input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } ]
"""
STATE = 'state [ { input_name: "total" output_name: "total_out" data_type: TYPE_FP32 dims: [ 1 ] } ]'
CONTROLS = """
control_input [
  { name: "START" control [ { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } ] },
  { name: "END" control [ { kind: CONTROL_SEQUENCE_END int32_false_true: [ 5, 6 ] } ] },
  { name: "READY" control [ { kind: CONTROL_SEQUENCE_READY bool_false_true: [ false, true ] } ] },
  { name: "CORRID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } ] }
]
"""
CONFIGS = {
    "adds": f"{TENSORS} output [ {{ name: 'sum' data_type: TYPE_FP32 dims: [ 1 ] }} ] "
    f"sequence_batching {{ {IDLE} oldest {{ max_candidate_sequences: 8 }} {STATE} }}",
    "adds_direct": f"{TENSORS} sequence_batching {{ {IDLE} direct {{ }} {STATE} }}",
    "restless": f"{TENSORS} sequence_batching {{ max_sequence_idle_microseconds: 200000 {STATE} }}",
    "told": f"{TENSORS} sequence_batching {{ {IDLE} {CONTROLS} }}",
    "named": f"{TENSORS} sequence_batching {{ control_input [ {{ name: 'CORRID' control [ "
    "{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } ] } ] }",
    "named_adds": """
      platform: "ensemble"
      max_batch_size: 4
      input [ { name: "X" data_type: TYPE_FP32 dims: [ 1 ] } ]
      output [ { name: "SUM" data_type: TYPE_FP32 dims: [ 1 ] }, { name: "NAME" data_type: TYPE_STRING dims: [ 1 ] } ]
      ensemble_scheduling { step [
        { model_name: "adds" input_map { key: "x" value: "X" } output_map { key: "sum" value: "SUM" } },
        { model_name: "named" input_map { key: "x" value: "SUM" } output_map { key: "name" value: "NAME" } }
      ] }""",
    "grows": f"{TENSORS} output [ {{ name: 'all' data_type: TYPE_FP32 dims: [ -1 ] }} ] sequence_batching {{ {IDLE} "
    "state [ { input_name: 'past' output_name: 'all' data_type: TYPE_FP32 dims: [ -1 ] } ] }",
}


def accumulator() -> bytes:
    """`sum` = `total_out` = `x` + `total`, FP32 [batch, 1]."""
    return models.model(
        [helper.make_node("Add", ["x", "total"], ["sum"]), helper.make_node("Identity", ["sum"], ["total_out"])],
        [models.value("x", "FP32", ROW), models.value("total", "FP32", ROW)],
        [models.value("sum", "FP32", ROW), models.value("total_out", "FP32", ROW)],
    )


def echoes_controls() -> bytes:
    """`y` = `x` + 1000·START; `end`, `ready` and `id` are what the model was told."""
    return models.model(
        [
            helper.make_node("Mul", ["START", "thousand"], ["scaled"]),
            helper.make_node("Add", ["x", "scaled"], ["y"]),
            helper.make_node("Identity", ["END"], ["end"]),
            helper.make_node("Identity", ["READY"], ["ready"]),
            helper.make_node("Identity", ["CORRID"], ["id"]),
        ],
        [
            models.value(name, datatype, ROW)
            for name, datatype in (
                ("x", "FP32"),
                ("START", "FP32"),
                ("END", "INT32"),
                ("READY", "BOOL"),
                ("CORRID", "UINT64"),
            )
        ],
        [
            models.value(name, datatype, ROW)
            for name, datatype in (("y", "FP32"), ("end", "INT32"), ("ready", "BOOL"), ("id", "UINT64"))
        ],
        {"thousand": np.array([1000], np.float32)},
    )


def echoes_name() -> bytes:
    """`y` = `x`, `name` = CORRID."""
    return models.model(
        [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Identity", ["CORRID"], ["name"])],
        [models.value("x", "FP32", ROW), models.value("CORRID", "BYTES", ROW)],
        [models.value("y", "FP32", ROW), models.value("name", "BYTES", ROW)],
    )


def grows() -> bytes:
    """`all` = everything so far, and the newest `x` behind it."""
    return models.model(
        [helper.make_node("Concat", ["past", "x"], ["all"], axis=1)],
        [models.value("x", "FP32", ROW), models.value("past", "FP32", ["batch", "n"])],
        [models.value("all", "FP32", ["batch", "m"])],
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    files = {name: accumulator() for name in ("adds", "adds_direct", "restless")}
    files |= {"told": echoes_controls(), "named": echoes_name(), "grows": grows(), "plain": models.identity("FP32", 1)}
    root = tmp_path_factory.mktemp("sequences")
    (root / "named_adds" / "1").mkdir(parents=True)
    models.repository(root, files, CONFIGS)
    with gateway("serve", str(root), "--workers", "2") as process:
        yield process


def step(
    served: GatewayProcess, model: str, x: float, identity: int | str | None, *, start: bool = False, end: bool = False
) -> tuple[int, dict[str, str], Any]:
    parameters: dict[str, Any] = {"sequence_start": start, "sequence_end": end}
    if identity is not None:
        parameters["sequence_id"] = identity
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [x]}
    return served.infer(model, {"inputs": [tensor], "parameters": parameters})


def outputs(answer: Any) -> dict[str, Any]:
    return {output["name"]: output["data"] for output in answer["outputs"]}


@pytest.mark.parametrize("model", ["adds", "adds_direct"])
@pytest.mark.parametrize("identity", [11, "eleven"])
def test_sums_of_a_sequence(served: GatewayProcess, model: str, identity: int | str) -> None:
    found = []
    for x in (1, 2, 3, 4):
        status, headers, answer = step(served, model, x, identity, start=x == 1, end=x == 4)
        assert status == 200, answer
        found.append(outputs(answer))
        said = parse(headers.items())
        assert said.members[0].backend.startswith("onnx-")
        assert said.members[0].size == 1
    assert found == [{"sum": [1]}, {"sum": [3]}, {"sum": [6]}, {"sum": [10]}]


def test_controls_and_states_are_not_shown(served: GatewayProcess) -> None:
    for model, names in (("adds_direct", {"sum"}), ("told", {"y", "end", "ready", "id"})):
        document = json.loads(served.request("GET", f"/v2/models/{model}")[2])
        assert [tensor["name"] for tensor in document["inputs"]] == ["x"]
        assert {tensor["name"] for tensor in document["outputs"]} == names
    assert "sequence" in json.loads(served.request("GET", "/v2")[2])["extensions"]
    config = json.loads(served.request("GET", "/v2/models/told/config")[2])
    assert config["sequence_batching"]["control_input"][1]["control"][0]["int32_false_true"] == [5, 6]


def test_the_model_is_told_where_it_stands(served: GatewayProcess) -> None:
    found = [outputs(step(served, "told", x, 2**63 + 1, start=x == 1, end=x == 3)[2]) for x in (1, 2, 3)]
    assert found == [
        {"y": [1001], "end": [5], "ready": [True], "id": [2**63 + 1]},
        {"y": [2], "end": [5], "ready": [True], "id": [2**63 + 1]},
        {"y": [3], "end": [6], "ready": [True], "id": [2**63 + 1]},
    ]


def test_an_id_may_be_text_where_the_model_reads_text(served: GatewayProcess) -> None:
    for identity, text in (("héllo", "héllo"), (17, "17")):
        assert outputs(step(served, "named", 1, identity, start=True, end=True)[2])["name"] == [text]
    status, _, answer = step(served, "told", 1, "text", start=True)
    assert status == 400
    assert "'sequence_id' must be an integer of UINT64" in answer["error"]


def test_a_state_may_grow(served: GatewayProcess) -> None:
    def run(identity: int) -> list[float]:
        for x in range(20):
            status, _, answer = step(served, "grows", identity + x, identity, start=x == 0, end=x == 19)
            assert status == 200, answer
        last: list[float] = outputs(answer)["all"]
        return last

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run, range(100, 900, 100)))
    # A variable dim of a first state is 1, and its element 0.
    assert found == [[0, *range(identity, identity + 20)] for identity in range(100, 900, 100)]


@pytest.mark.parametrize(
    ("identity", "start", "rows", "text"),
    [
        (None, True, 1, "must specify a non-zero or non-empty correlation ID"),
        (0, True, 1, "must specify a non-zero or non-empty correlation ID"),
        ("", True, 1, "must specify a non-zero or non-empty correlation ID"),
        (999, False, 1, "must specify the START flag on the first request of the sequence"),
        (999, True, 2, "must specify batch-size 1 due to requirements of sequence batcher"),
        (999, True, 5, "inference request batch-size must be <= 4"),
    ],
)
def test_refusals_are_the_same_in_both_protocols(
    served: GatewayProcess, identity: Any, start: bool, rows: int, text: str
) -> None:
    parameters = {"sequence_start": start} | ({} if identity is None else {"sequence_id": identity})
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 1], "data": [1] * rows}
    status, _, answer = served.infer("adds", {"inputs": [tensor], "parameters": parameters})
    assert status == 400
    assert text in answer["error"]
    given = grpc_client.InferInput("x", [rows, 1], "FP32")
    given.set_data_from_numpy(np.ones((rows, 1), np.float32))
    with grpc_client.InferenceServerClient(f"127.0.0.1:{served.grpc_port}") as client:
        with pytest.raises(Exception, match=r"INVALID_ARGUMENT") as caught:
            client.infer("adds", [given], sequence_id=identity or 0, sequence_start=start)
        assert text in str(caught.value)


def test_a_plain_model_ignores_sequences(served: GatewayProcess) -> None:
    status, _, answer = step(served, "plain", 3, 5)
    assert (status, outputs(answer)) == (200, {"y": [3]})


def test_a_sequence_that_rests_too_long_has_to_start_again(served: GatewayProcess) -> None:
    assert step(served, "restless", 1, 3, start=True)[0] == 200

    answers: list[Any] = []

    def forgotten() -> bool:
        threading.Event().wait(0.3)  # longer than it may rest; the machine may be slower than that, so more than once
        answers.append(step(served, "restless", 1, 3))
        return bool(answers[-1][0] == 400)

    until(forgotten, 60, "it rests for ever")
    assert "must specify the START flag" in answers[-1][2]["error"]


def test_steps_of_an_ensemble_are_steps_of_their_models_sequences(served: GatewayProcess) -> None:
    found = []
    for x in (1, 2, 3):
        given = {"name": "X", "datatype": "FP32", "shape": [1, 1], "data": [x]}
        parameters = {"sequence_id": "inside", "sequence_start": x == 1, "sequence_end": x == 3}
        status, _, answer = served.infer("named_adds", {"inputs": [given], "parameters": parameters})
        assert status == 200, answer
        found.append(outputs(answer))
    assert found == [{"SUM": [total], "NAME": ["inside"]} for total in (1, 3, 6)]
    status, _, answer = served.infer("named_adds", {"inputs": [given], "parameters": {"sequence_id": "inside"}})
    assert status == 400
    assert "must specify the START flag" in answer["error"]


@pytest.mark.parametrize("model", ["adds", "adds_direct"])
def test_many_sequences_at_once_over_http(served: GatewayProcess, model: str) -> None:
    """More sequences than seats: the others wait for their turn."""

    def run(identity: int) -> list[float]:
        rng = np.random.default_rng(identity)
        xs = rng.integers(-50, 50, 6).tolist()
        with http_client.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
            sums = []
            for place, x in enumerate(xs):
                tensor = http_client.InferInput("x", [1, 1], "FP32")
                tensor.set_data_from_numpy(np.array([[x]], np.float32))
                answer = client.infer(
                    model, [tensor], sequence_id=identity, sequence_start=place == 0, sequence_end=place == 5
                )
                sums.append(float(answer.as_numpy("sum")[0, 0]))
        assert sums == np.cumsum(xs).tolist()
        return sums

    before = served.metric("nv_inference_request_success", model=model, version="1")
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(run, range(1, 41)))
    assert served.metric("nv_inference_request_success", model=model, version="1") == before + 240
    assert served.metric("nv_inference_exec_count", model=model, version="1") <= before + 240


def test_a_stream_carries_many_sequences_without_waiting_for_answers(served: GatewayProcess) -> None:
    """tritonclient's own way to send sequences: every step at once on one stream, answers in order."""
    answers: queue.Queue[Any] = queue.Queue()
    plan = [(identity, place) for place in range(5) for identity in (1, 2, 3, 4, 5, 6, 7, 8)]
    with grpc_client.InferenceServerClient(f"127.0.0.1:{served.grpc_port}") as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for identity, place in plan:
            tensor = grpc_client.InferInput("x", [1, 1], "FP32")
            tensor.set_data_from_numpy(np.array([[10 * identity + place]], np.float32))
            client.async_stream_infer(
                "adds", [tensor], request_id=f"{identity}/{place}", sequence_id=f"s{identity}",
                sequence_start=place == 0, sequence_end=place == 4,
            )  # fmt: skip
        found = [answers.get(timeout=60) for _ in plan]
        client.stop_stream()
    assert [error for _, error in found if error is not None] == []
    assert [result.get_response().id for result, _ in found] == [f"{identity}/{place}" for identity, place in plan]
    for (identity, place), (result, _) in zip(plan, found, strict=True):
        assert result.as_numpy("sum").tolist() == [[sum(10 * identity + at for at in range(place + 1))]]


def test_a_worker_that_dies_costs_no_sequence(served: GatewayProcess) -> None:
    """The state is the gateway's: the next step goes on with it, on whatever worker comes."""
    for identity in (501, 502, 503):
        assert step(served, "adds_direct", identity, identity, start=True)[0] == 200
    for worker in served.workers():
        os.kill(worker["pid"], signal.SIGKILL)
    for identity in (501, 502, 503):
        status, _, answer = step(served, "adds_direct", 1, identity, end=True)
        assert status == 200, answer
        assert outputs(answer) == {"sum": [identity + 1]}
