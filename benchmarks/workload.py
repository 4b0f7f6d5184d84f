"""What is asked: two multi-layer perceptrons from a fixed seed, rows to ask them, and the answers onnxruntime gives.

Input `x` FP32 [-1, 16], output `y` FP32 [-1, 4] for both. `tiny` costs onnxruntime about 10 µs a row, so the server
is what is measured; `heavy` costs about 0.7 ms alone and a tenth of that in a batch, so batching is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

CACHE: Final = Path(__file__).parent.parent / ".bench"
"""Everything downloaded or generated; ignored by git, safe to delete."""
SEED: Final = 7
WIDTHS: Final = {"tiny": (16, 64, 64, 4), "heavy": (16, 2048, 2048, 4)}


@dataclass(frozen=True)
class Workload:
    """One model, its file, and the request that is sent over and over."""

    model: str
    repository: Path
    """Triton layout, holding this model alone."""
    model_file: Path
    rows: NDArray[np.float32]
    expected: NDArray[np.float32]
    body_file: Path
    """One OIP JSON request of one row, the first of `rows`."""

    def body(self, row: int) -> bytes:
        return request_body(self.rows[row])


def request_body(row: NDArray[np.float32]) -> bytes:
    data = [round(float(v), 4) for v in row]
    tensor = {"name": "x", "shape": [1, len(data)], "datatype": "FP32", "data": data}
    return json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode()


def perceptron(widths: tuple[int, ...]) -> bytes:
    """ONNX bytes of a perceptron with rectifiers between the layers; the same bytes for the same widths."""
    rng = np.random.default_rng(SEED)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    x = "x"
    for layer, (size_in, size_out) in enumerate(pairwise(widths)):
        last = layer == len(widths) - 2
        weight = (rng.standard_normal((size_in, size_out)) * np.sqrt(2 / size_in)).astype(np.float32)
        constants += [
            numpy_helper.from_array(weight, f"w{layer}"),
            numpy_helper.from_array(np.full(size_out, 0.1, np.float32), f"b{layer}"),
        ]
        out = "y" if last else f"h{layer}"
        nodes.append(helper.make_node("Gemm", [x, f"w{layer}", f"b{layer}"], [out]))
        if not last:
            nodes.append(helper.make_node("Relu", [out], [f"r{layer}"]))
            x = f"r{layer}"
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", widths[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", widths[-1]])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def session(model_file: Path, threads: int = 1) -> Any:
    """An onnxruntime session set up as the gateway's and Triton's are."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model_file, options, providers=["CPUExecutionProvider"])


def prepare(model: str) -> Workload:
    """Write the model and the request below `.bench/`; `model` is a key of `WIDTHS`."""
    repository = CACHE / "models" / model
    model_file = repository / model / "1" / "model.onnx"
    model_file.parent.mkdir(parents=True, exist_ok=True)
    content = perceptron(WIDTHS[model])
    if not model_file.exists() or model_file.read_bytes() != content:
        model_file.write_bytes(content)
    rng = np.random.default_rng(SEED + 1)
    rows = rng.uniform(-1, 1, (32, WIDTHS[model][0])).round(4).astype(np.float32)
    expected = session(model_file).run(["y"], {"x": rows})[0]
    body_file = CACHE / f"{model}.json"
    body_file.write_bytes(request_body(rows[0]))
    return Workload(model, repository, model_file, rows, expected, body_file)
