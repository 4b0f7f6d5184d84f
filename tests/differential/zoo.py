"""The models that the differential tests and the traps ask: each as ONNX for the gateway and as Python for Triton.

Rules: twins have the same name, signature and `config.pbtxt`; only the line that names the backend differs. Both
compute the same values bit for bit (copies, whole-numbered arithmetic). The ONNX side is written with onnx.helper, the
Python side is one `compute(inputs) -> outputs` over numpy arrays, put into `MODEL_PY`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from onnx import helper, numpy_helper

from tests.live.models import ONNX_TYPE, model, value

MODEL_PY: Final = """\
import json
import os
import sys

sys.path.insert(0, os.environ["BENCH_SITE_PACKAGES"])

import numpy as np
import triton_python_backend_utils as pb_utils


{compute}


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.version = int(args["model_version"])
        controls = config.get("sequence_batching", {{}}).get("control_input", [])
        self.inputs = [i["name"] for i in (*config["input"], *controls)]
        self.outputs = {{o["name"]: o["data_type"] for o in config["output"]}}

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        try:
            wanted = request.requested_output_names()
            found = {{name: pb_utils.get_input_tensor_by_name(request, name) for name in self.inputs}}
            if "TYPE_BF16" in self.outputs.values():  # numpy has no bfloat16
                copy = pb_utils.Tensor.from_dlpack("OUTPUT0", found["INPUT0"].to_dlpack())
                return pb_utils.InferenceResponse([copy])
            outputs = compute({{k: v.as_numpy() for k, v in found.items() if v is not None}}, self.version)
            tensors = [pb_utils.Tensor(k, self.cast(k, v)) for k, v in outputs.items() if k in wanted]
            return pb_utils.InferenceResponse(tensors)
        except Exception as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))

    def cast(self, name, array):
        return np.ascontiguousarray(array.astype(pb_utils.triton_string_to_numpy(self.outputs[name]), copy=False))
"""
COPY: Final = """\
def compute(inputs, version):
    return {"OUTPUT" + name[5:]: array for name, array in inputs.items()}
"""
CONFIG_TYPE: Final = {name: f"TYPE_{name}" for name in ONNX_TYPE} | {"BYTES": "TYPE_STRING"}
Dims = Sequence[int]
Tensor = tuple[str, str, Dims]
"""Name, datatype, dims without the batch."""


@dataclass(frozen=True)
class Twin:
    """One model on both servers. `onnx` maps a version to the file's bytes (or nothing for an ensemble)."""

    name: str
    onnx: Mapping[int, bytes]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    max_batch: int = 8
    compute: str = COPY
    more: str = ""
    """Further text of config.pbtxt; `<INPUT0>` … in `details` go inside the tensor's own section."""
    details: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    """Text files beside config.pbtxt."""
    python: bool = True
    """False: the Python twin's file is invalid on purpose."""

    def config(self, backend: str) -> str:
        lines = [f'name: "{self.name}"', backend, f"max_batch_size: {self.max_batch}"]
        for section, tensors in (("input", self.inputs), ("output", self.outputs)):
            for name, datatype, dims in tensors:
                more = self.details.get(name, "")
                sizes = ", ".join(map(str, dims))
                lines.append(
                    f'{section} {{ name: "{name}" data_type: {CONFIG_TYPE[datatype]} dims: [ {sizes} ] {more} }}'
                )
        return "\n".join([*lines, self.more, ""])

    def write(self, root: Path, *, triton: bool) -> None:
        """`<root>/<name>/…` as Triton's Python backend or the gateway reads it."""
        home = root / self.name
        home.mkdir(parents=True)
        if not self.onnx:
            backend = 'platform: "ensemble"'
            (home / "1").mkdir()
        else:
            backend = 'backend: "python"' if triton else 'backend: "onnxruntime"'
        for version, data in self.onnx.items():
            folder = home / str(version)
            folder.mkdir()
            if triton:
                text = MODEL_PY.format(compute=self.compute) if self.python else "raise RuntimeError('no model')\n"
                (folder / "model.py").write_text(text)
            else:
                (folder / "model.onnx").write_bytes(data)
        (home / "config.pbtxt").write_text(self.config(backend))
        for name, text in self.files.items():
            (home / name).write_text(text)


def write_repository(root: Path, twins: Sequence[Twin], *, triton: bool) -> Path:
    for twin in twins:
        twin.write(root, triton=triton)
    return root


# --- ONNX graphs


def copies(pairs: Sequence[tuple[str, str, str]], shape: Sequence[int | str | None]) -> bytes:
    """Identities: (input, output, datatype) each, all of one shape."""
    dims = list(shape)
    return model(
        [helper.make_node("Identity", [x], [y]) for x, y, _ in pairs],
        [value(x, datatype, dims) for x, _, datatype in pairs],
        [value(y, datatype, dims) for _, y, datatype in pairs],
    )


def one(datatype: str, *trailing: int | str) -> bytes:
    """`INPUT0` → `OUTPUT0`, the same, [batch, *trailing]."""
    return copies([("INPUT0", "OUTPUT0", datatype)], ["batch", *(trailing or ("n",))])


def add_sub(datatype: str = "INT32", trailing: int | str = "n") -> bytes:
    """`INPUT0`, `INPUT1` → `OUTPUT0` their sum, `OUTPUT1` their difference."""
    shape: list[int | str | None] = ["batch", trailing]
    nodes = [
        helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
        helper.make_node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"]),
    ]
    return model(
        nodes,
        [value(f"INPUT{i}", datatype, shape) for i in (0, 1)],
        [value(f"OUTPUT{i}", datatype, shape) for i in (0, 1)],
    )


def times(factor: float, reads: str = "INPUT0", writes: str = "OUTPUT0") -> bytes:
    """FP32 [batch, n] → the same times `factor`."""
    shape: list[int | str | None] = ["batch", "n"]
    return model(
        [helper.make_node("Mul", [reads, "factor"], [writes])],
        [value(reads, "FP32", shape)],
        [value(writes, "FP32", shape)],
        {"factor": np.array(factor, np.float32)},
    )


def with_default() -> bytes:
    """`INPUT0`, `INPUT1` (1.0 unless given) FP32 [batch, 1] → `OUTPUT0` their sum."""
    shape: list[int | str | None] = ["batch", 1]
    return model(
        [helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"])],
        [value("INPUT0", "FP32", shape), value("INPUT1", "FP32", shape)],
        [value("OUTPUT0", "FP32", shape)],
        {"INPUT1": np.ones((1, 1), np.float32)},
    )


def table(rows: int = 8) -> bytes:
    """`index` INT64 [batch, 1] → `row` FP32 [batch, 1, 3]; an index out of range fails inside the model."""
    return model(
        [helper.make_node("Gather", ["table", "index"], ["row"], axis=0)],
        [value("index", "INT64", ["batch", 1])],
        [value("row", "FP32", ["batch", 1, 3])],
        {"table": np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)},
    )


def turning(most: int, each: int = 1) -> bytes:
    """`INPUT0` INT64 [batch, 1] → `OUTPUT0`, the same, after a loop of min(max(INPUT0) · `each`, `most`) turns: a model
    whose time its caller chooses, within bounds."""
    scalar: list[int | str | None] = []
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["still"]),
            helper.make_node("Mul", ["state", "three"], ["tripled"]),
            helper.make_node("Add", ["tripled", "turn"], ["next"]),
        ],
        "body",
        [value("turn", "INT64", scalar), value("go", "BOOL", scalar), value("state", "INT64", scalar)],
        [value("still", "BOOL", scalar), value("next", "INT64", scalar)],
        [numpy_helper.from_array(np.array(3, np.int64), "three")],
    )
    nodes = [
        helper.make_node("ReduceMax", ["INPUT0"], ["largest"], keepdims=0),
        helper.make_node("Mul", ["largest", "each"], ["asked"]),
        helper.make_node("Min", ["asked", "most"], ["turns"]),
        helper.make_node("Loop", ["turns", "", "zero"], ["end"], body=body),
        helper.make_node("Mul", ["end", "zero"], ["nothing"]),
        helper.make_node("Add", ["INPUT0", "nothing"], ["OUTPUT0"]),
    ]
    shape: list[int | str | None] = ["batch", 1]
    weights = {name: np.array(number, np.int64) for name, number in (("zero", 0), ("most", most), ("each", each))}
    return model(nodes, [value("INPUT0", "INT64", shape)], [value("OUTPUT0", "INT64", shape)], weights)


# --- the set

BATCHING: Final = "dynamic_batching { }"
ADD_SUB: Final = """\
def compute(inputs, version):
    a, b = inputs["INPUT0"], inputs["INPUT1"]
    return {"OUTPUT0": a + b, "OUTPUT1": a - b}
"""
TABLE: Final = """\
def compute(inputs, version):
    table = np.arange(24, dtype=np.float32).reshape(8, 3)
    return {"row": table[inputs["index"]]}
"""
VERSIONED: Final = """\
def compute(inputs, version):
    return {"OUTPUT0": inputs["INPUT0"] * np.float32(version)}
"""
DOUBLE: Final = """\
def compute(inputs, version):
    return {"OUTPUT0": inputs["INPUT0"] * np.float32(2)}
"""
DEFAULT: Final = """\
def compute(inputs, version):
    return {"OUTPUT0": inputs["INPUT0"] + inputs.get("INPUT1", np.float32(1))}
"""
ENSEMBLE: Final = """\
ensemble_scheduling {
  step [
    { model_name: "double" model_version: -1
      input_map { key: "INPUT0" value: "RAW" } output_map { key: "OUTPUT0" value: "half_way" } },
    { model_name: "m" model_version: -1
      input_map { key: "INPUT0" value: "half_way" } output_map { key: "OUTPUT0" value: "DOUBLED" } }
  ]
}
"""
PRIORITIES: Final = """\
dynamic_batching {
  priority_levels: 2
  default_priority_level: 2
  default_queue_policy { max_queue_size: 4 default_timeout_microseconds: 30000000 allow_timeout_override: true }
}
"""


def copy(
    name: str, datatype: str = "FP32", dims: Dims = (-1,), batch: int = 8, more: str = BATCHING, **rest: object
) -> Twin:
    """An identity `INPUT0` → `OUTPUT0`."""
    names = [f"d{place}" if dim < 0 else dim for place, dim in enumerate(dims)]
    data = copies([("INPUT0", "OUTPUT0", datatype)], ["batch", *names] if batch else names)
    tensors = [("INPUT0", datatype, dims)], [("OUTPUT0", datatype, dims)]
    return Twin(name, {1: data}, *tensors, max_batch=batch, more=more, **rest)  # type: ignore[arg-type]


def typed(datatype: str) -> str:
    """Name of the identity of a datatype."""
    return f"id_{datatype.lower()}"


M: Final = copy("m")
CACHED: Final = copy("cached", more="response_cache { enable: true }\n" + BATCHING)
LABELLED: Final = copy(
    "labelled", details={"OUTPUT0": 'label_filename: "labels.txt"'}, files={"labels.txt": "a\nb\nc\n"}
)
TWINS: Final[tuple[Twin, ...]] = (
    M,
    *(copy(typed(datatype), datatype) for datatype in ONNX_TYPE),
    Twin(
        "add_sub",
        {1: add_sub()},
        [("INPUT0", "INT32", [-1]), ("INPUT1", "INT32", [-1])],
        [("OUTPUT0", "INT32", [-1]), ("OUTPUT1", "INT32", [-1])],
        compute=ADD_SUB,
        more=BATCHING,
    ),
    LABELLED,
    copy(
        "label_ints", "INT32", [4], details={"OUTPUT0": 'label_filename: "labels.txt"'}, files={"labels.txt": "a\nb\n"}
    ),
    copy("flat", dims=[-1, 2], batch=0, more=""),
    copy("fixed", dims=[3], batch=4),
    copy("deep", "INT32", [2, -1, 2]),
    copy("text", "BYTES", [1]),
    CACHED,
    copy("prio", more=PRIORITIES),
    copy("counted"),
    copy("untouched"),
    copy("traced"),
    copy("managed"),
    copy("sleeper"),
    Twin("table", {1: table()}, [("index", "INT64", [1])], [("row", "FP32", [1, 3])], compute=TABLE, more=BATCHING),
    Twin(
        "versions",
        {version: times(version) for version in (1, 2, 3)},
        [("INPUT0", "FP32", [-1])],
        [("OUTPUT0", "FP32", [-1])],
        compute=VERSIONED,
        more="version_policy { specific { versions: [ 1, 3 ] } }\n" + BATCHING,
    ),
    Twin(
        "double",
        {1: times(2)},
        [("INPUT0", "FP32", [-1])],
        [("OUTPUT0", "FP32", [-1])],
        compute=DOUBLE,
        more=BATCHING,
    ),
    Twin("ensemble", {}, [("RAW", "FP32", [-1])], [("DOUBLED", "FP32", [-1])], more=ENSEMBLE),
    Twin(
        "optional",
        {1: with_default()},
        [("INPUT0", "FP32", [1]), ("INPUT1", "FP32", [1])],
        [("OUTPUT0", "FP32", [1])],
        compute=DEFAULT,
        details={"INPUT1": "optional: true"},
        more=BATCHING,
    ),
    Twin(
        "reshaped",
        {1: copies([("INPUT0", "OUTPUT0", "FP32")], ["batch"])},
        [("INPUT0", "FP32", [1])],
        [("OUTPUT0", "FP32", [1])],
        details={"INPUT0": "reshape { shape: [ ] }", "OUTPUT0": "reshape { shape: [ ] }"},
        more=BATCHING,
    ),
    Twin("broken", {1: b"no model"}, [("INPUT0", "FP32", [1])], [("OUTPUT0", "FP32", [1])], python=False),
)
NOT_LOADED: Final = ("sleeper", "broken")
"""Models of the repository that nobody loads at start."""
