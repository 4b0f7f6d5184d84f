"""The models that the examples of Triton's client libraries run against, and what those examples do again and again.

Every model exists twice: in ONNX for the gateway, in Python for a real Triton, which has no ONNX backend here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
from google.protobuf.json_format import MessageToJson
from onnx import helper

from tests.differential.zoo import MODEL_PY
from tests.live import models

WIDTH = 16
Shape = list[int | str | None]


def simple(datatype: str) -> bytes:
    """`OUTPUT0`, `OUTPUT1` = `INPUT0` ± `INPUT1`, all [batch, 16]; text holds decimal numbers."""
    shape: Shape = ["batch", WIDTH]
    inner, nodes = ["INPUT0", "INPUT1", "OUTPUT0", "OUTPUT1"], []
    if datatype == "BYTES":
        inner = [f"{name}_number" for name in inner]
        nodes += [helper.make_node("Cast", [f"INPUT{n}"], [inner[n]], to=models.ONNX_TYPE["INT32"]) for n in (0, 1)]
        nodes += [
            helper.make_node("Cast", [inner[2 + n]], [f"OUTPUT{n}"], to=models.ONNX_TYPE["BYTES"]) for n in (0, 1)
        ]
    arithmetic = [helper.make_node(name, inner[:2], [inner[2 + n]]) for n, name in enumerate(("Add", "Sub"))]
    return models.model(
        nodes[:2] + arithmetic + nodes[2:],
        [models.value(f"INPUT{n}", datatype, shape) for n in (0, 1)],
        [models.value(f"OUTPUT{n}", datatype, shape) for n in (0, 1)],
    )


def config(datatype: str) -> str:
    """As Triton's quick start has it."""
    tensors = [
        f'{kind} [ {{ name: "{kind.upper()}{n}" data_type: TYPE_{datatype} dims: [ {WIDTH} ] }} ]'
        for kind in ("input", "output")
        for n in (0, 1)
    ]
    return "\n".join(['platform: "onnxruntime_onnx"', "max_batch_size: 8", *tensors])


MODELS = {
    "simple": simple("INT32"),
    "simple_int8": simple("INT8"),
    "simple_uint8": simple("UINT8"),
    "simple_string": simple("BYTES"),
    "simple_identity": models.identity("BYTES"),
    "simple_sequence": models.running_sum(),
    "simple_dyna_sequence": models.running_sum(),
    "classes": models.identity("FP32", 4),
}
CONFIGS = {
    "simple": config("INT32"),
    "simple_int8": config("INT8"),
    "simple_uint8": config("UINT8"),
    "simple_string": config("STRING"),
    "simple_sequence": models.RUNNING_SUM % "direct { }",
    "simple_dyna_sequence": models.RUNNING_SUM % "oldest { max_candidate_sequences: 4 }",
    "classes": """
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 4 ] label_filename: "labels.txt" } ]
""",
}
SIMPLE: Final = ("simple", "simple_int8", "simple_uint8", "simple_string")
LABELS: Final = "ant\nbee\ncow\ndog\n"

ARITHMETIC: Final = """\
def compute(inputs, version):
    a, b = inputs["INPUT0"], inputs["INPUT1"]
    if a.dtype != object:
        return {"OUTPUT0": a + b, "OUTPUT1": a - b}
    a, b = a.astype(int), b.astype(int)
    text = lambda numbers: np.array([[str(number).encode() for number in row] for row in numbers], object)
    return {"OUTPUT0": text(a + b), "OUTPUT1": text(a - b)}
"""
IDENTITY: Final = """\
def compute(inputs, version):
    return {"y": inputs["x"]}
"""
SUM: Final = """\
past = {}


def compute(inputs, version):
    identity = inputs["CORRID"].item()
    past[identity] = inputs["INPUT"] + (0 if inputs["START"].item() else past[identity])
    return {"OUTPUT": past[identity]}
"""
CONTROLS: Final = """control_input [
  { name: "START" control [ { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } ] },
  { name: "CORRID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } ] }
]"""
"""In place of the state, which Triton's Python backend does not have."""
WORDS: Final = """
max_batch_size: 8
input [ { name: "x" data_type: TYPE_STRING dims: [ -1 ] } ]
output [ { name: "y" data_type: TYPE_STRING dims: [ -1 ] } ]
"""


def for_gateway(root: Path) -> Path:
    models.repository(root, MODELS, CONFIGS)
    (root / "classes" / "labels.txt").write_text(LABELS)
    return root


def for_triton(root: Path) -> Path:
    """The same models; one instance each, so that the sums of a sequence are in one place."""
    for name in MODELS:
        compute = SUM if name.endswith("sequence") else ARITHMETIC if name in SIMPLE else IDENTITY
        text = CONFIGS.get(name, WORDS).replace('platform: "onnxruntime_onnx"', "")
        lines = [CONTROLS if line.strip().startswith("state [") else line for line in text.splitlines()]
        version = root / name / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(MODEL_PY.format(compute=compute))
        instances = "instance_group [ { count: 1 kind: KIND_CPU } ]"
        (root / name / "config.pbtxt").write_text("\n".join(['backend: "python"', *lines, instances]))
    (root / "classes" / "labels.txt").write_text(LABELS)
    return root


FIRST = np.arange(WIDTH, dtype=np.int32).reshape(1, WIDTH)
SECOND = np.ones((1, WIDTH), np.int32)
VALUES = (11, 7, 5, 3, 2, 0, 1)
SUMS = list(itertools.accumulate(VALUES))
NEGATIVE = list(itertools.accumulate(-value for value in VALUES))


def tensor(api: ModuleType, name: str, datatype: str, array: Any, **more: Any) -> Any:
    found = api.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array, **more)
    return found


def pair(api: ModuleType, datatype: str = "INT32", kind: Any = np.int32, **more: Any) -> list[Any]:
    arrays: list[Any] = [FIRST, SECOND]
    if kind is object:
        arrays = [np.array([[str(v).encode() for v in array[0]]], object) for array in arrays]
    return [tensor(api, f"INPUT{n}", datatype, array.astype(kind), **more) for n, array in enumerate(arrays)]


def check_pair(result: Any, kind: Callable[[Any], int] = int) -> None:
    total, difference = ([kind(v) for v in result.as_numpy(f"OUTPUT{n}").ravel()] for n in (0, 1))
    assert total == (FIRST + SECOND).ravel().tolist()
    assert difference == (FIRST - SECOND).ravel().tolist()


def document(answer: Any) -> Any:
    """gRPC clients answer with messages where HTTP clients answer with dictionaries."""
    if isinstance(answer, dict | list):
        return answer
    return json.loads(MessageToJson(answer, preserving_proto_field_name=True))


def steps(api: ModuleType, values: Any, identity: int | str) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Inputs and parameters of the requests of one sequence."""
    for place, value in enumerate(values):
        given = [tensor(api, "INPUT", "INT32", np.array([[value]], np.int32))]
        ends = {"sequence_start": place == 0, "sequence_end": place == len(values) - 1}
        yield given, {"sequence_id": identity, **ends}
