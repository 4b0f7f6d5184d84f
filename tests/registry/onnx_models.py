"""ONNX models made with onnx's own tools, for tests of files that belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def scaled(factor: float = 2.0, rows: int = 4) -> Any:
    """y = x @ w with w = factor · ones((rows, 3)): x is [n, rows], y is [n, 3]."""
    weights = numpy_helper.from_array(np.full((rows, 3), factor, np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "scaled",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [weights],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def save(directory: Path, model: Any, data: str = "", name: str = "model.onnx") -> Path:
    """Save a model; with `data` all of its tensors lie in that file. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    if data:
        (directory / data).parent.mkdir(parents=True, exist_ok=True)
        onnx.save_model(model, directory / name, save_as_external_data=True, location=data, size_threshold=0)
    else:
        onnx.save_model(model, directory / name)
    return directory


def relocated(path: Path, location: str) -> None:
    """Make every external tensor of a saved model name `location` instead."""
    model = onnx.load_model(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
