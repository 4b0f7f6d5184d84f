"""Small real ONNX models for tests, written with onnx.helper, and Triton-layout repositories of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ONNX_TYPE = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
    "BF16": TensorProto.BFLOAT16,
}


def value(name: str, datatype: str, shape: list[int | str | None]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ONNX_TYPE[datatype], shape)


def model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray[Any, Any]] | None = None,
) -> bytes:
    initializers = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto)
    data: bytes = proto.SerializeToString()
    return data


def identity(datatype: str, trailing: str | int = "n") -> bytes:
    """`x` → `y`, shape [batch, trailing]."""
    shape: list[int | str | None] = ["batch", trailing]
    return model(
        [helper.make_node("Identity", ["x"], ["y"])], [value("x", datatype, shape)], [value("y", datatype, shape)]
    )


def linear_weights(seed: int = 7, width: int = 16, out: int = 4) -> dict[str, np.ndarray[Any, Any]]:
    """`w` and `b` of `linear`."""
    rng = np.random.default_rng(seed)
    return {
        "w": rng.standard_normal((width, out)).astype(np.float32),
        "b": rng.standard_normal(out).astype(np.float32),
    }


def linear(seed: int = 7, width: int = 16, out: int = 4) -> bytes:
    """`x` FP32 [batch, width] → `y` = tanh(x·w + b) FP32 [batch, out]."""
    weights = linear_weights(seed, width, out)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["z"]),
        helper.make_node("Tanh", ["z"], ["y"]),
    ]
    return model(nodes, [value("x", "FP32", ["batch", width])], [value("y", "FP32", ["batch", out])], weights)


def whole_linear(width: int = 6, out: int = 3) -> bytes:
    """`x` FP32 [batch, width] → `y` = x·w FP32 [batch, out], w small whole numbers: exact for whole-numbered x,
    however many rows run together."""
    weights = {"w": np.random.default_rng(11).integers(-9, 10, (width, out)).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    return model(nodes, [value("x", "FP32", ["batch", width])], [value("y", "FP32", ["batch", out])], weights)


def two_inputs() -> bytes:
    """`a`, `b` INT32 [batch, n] → `sum`, `product` INT32 [batch, n]."""
    shape: list[int | str | None] = ["batch", "n"]
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Mul", ["a", "b"], ["product"])]
    return model(
        nodes,
        [value("a", "INT32", shape), value("b", "INT32", shape)],
        [value("sum", "INT32", shape), value("product", "INT32", shape)],
    )


def mixes_rows() -> bytes:
    """`x` FP32 [batch, 4] minus the mean over the batch: a model that must never be batched across callers."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    return model(nodes, [value("x", "FP32", ["batch", 4])], [value("y", "FP32", ["batch", 4])])


def lookup(size: int = 8) -> bytes:
    """`index` INT64 [batch] → `row` FP32 [batch, 3]; an index out of range fails inside the model."""
    table = np.arange(size * 3, dtype=np.float32).reshape(size, 3)
    return model(
        [helper.make_node("Gather", ["table", "index"], ["row"], axis=0)],
        [value("index", "INT64", ["batch"])],
        [value("row", "FP32", ["batch", 3])],
        {"table": table},
    )


def looper() -> bytes:
    """`turns` INT64 [batch] → `y` INT64 [batch], the same, after a loop of max(turns) turns: a large one never ends."""
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
        helper.make_node("ReduceMax", ["turns"], ["most"], keepdims=0),
        helper.make_node("Loop", ["most", "", "zero"], ["end"], body=body),
        helper.make_node("Mul", ["end", "zero"], ["nothing"]),
        helper.make_node("Add", ["turns", "nothing"], ["y"]),
    ]
    shape: list[int | str | None] = ["batch"]
    weights = {"zero": np.array(0, np.int64)}
    return model(nodes, [value("turns", "INT64", shape)], [value("y", "INT64", shape)], weights)


def slow(width: int = 768, layers: int = 24) -> bytes:
    """`x` FP32 [batch, width] through `layers` square matrices: milliseconds a run."""
    rng = np.random.default_rng(3)
    nodes, weights, last = [], {}, "x"
    for layer in range(layers):
        weights[f"w{layer}"] = (rng.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32)
        nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [f"h{layer}"]))
        last = f"h{layer}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    return model(nodes, [value("x", "FP32", ["batch", width])], [value("y", "FP32", ["batch", width])], weights)


def difference() -> bytes:
    """`a`, `b` FP32 [batch, n] → `d` = a − b, `s` = a + b FP32 [batch, n]."""
    shape: list[int | str | None] = ["batch", "n"]
    return model(
        [helper.make_node("Sub", ["a", "b"], ["d"]), helper.make_node("Add", ["a", "b"], ["s"])],
        [value("a", "FP32", shape), value("b", "FP32", shape)],
        [value("d", "FP32", shape), value("s", "FP32", shape)],
    )


def with_default(bias_shape: list[int | str | None]) -> bytes:
    """`x` FP32 [batch, 2], `bias` FP32 (default 10, 20) → `y` = x + bias FP32 [batch, 2]."""
    shape: list[int | str | None] = ["batch", 2]
    default = np.array([10, 20], np.float32).reshape([1, 2] if len(bias_shape) == 2 else [2])
    return model(
        [helper.make_node("Add", ["x", "bias"], ["y"])],
        [value("x", "FP32", shape), value("bias", "FP32", bias_shape)],
        [value("y", "FP32", shape)],
        {"bias": default},
    )


def segments(datatype: str = "FP32", *, running: bool = False) -> bytes:
    """A model of ragged rows, laid flat: `x` [elements]; made by the gateway: `ends` INT32 [requests], where each
    request ends. → `sum` [requests, 1], of each request's elements; `double` [elements] = x + x.

    Sums are exact for small whole numbers, whoever else is in the batch; an empty request sums to 0. `running`: as
    differences of one running sum, into which a neighbour's NaN gets."""
    nodes = [
        helper.make_node("Slice", ["ends", "first", "last"], ["but_last"]),
        helper.make_node("Concat", ["none", "but_last"], ["starts"], axis=0),
        helper.make_node("Add", ["x", "x"], ["double"]),
    ]
    if running:
        nodes += [
            helper.make_node("CumSum", ["x", "axis"], ["upto"]),
            helper.make_node("Concat", ["zeros", "upto"], ["c"], axis=0),
            helper.make_node("Gather", ["c", "ends"], ["at_end"]),
            helper.make_node("Gather", ["c", "starts"], ["at_start"]),
            helper.make_node("Sub", ["at_end", "at_start"], ["each"]),
            helper.make_node("Unsqueeze", ["each", "one"], ["sum"]),
        ]
    else:
        nodes += [
            helper.make_node("Shape", ["x"], ["length"]),
            helper.make_node("Squeeze", ["length"], ["stop"]),
            helper.make_node("Range", ["axis", "stop", "step"], ["places"]),
            helper.make_node("Cast", ["places"], ["place"], to=TensorProto.INT32),
            helper.make_node("Unsqueeze", ["starts", "one"], ["from"]),
            helper.make_node("Unsqueeze", ["ends", "one"], ["to"]),
            helper.make_node("GreaterOrEqual", ["place", "from"], ["begun"]),
            helper.make_node("Less", ["place", "to"], ["open"]),
            helper.make_node("And", ["begun", "open"], ["inside"]),
            helper.make_node("Where", ["inside", "x", "zeros"], ["own"]),
            helper.make_node("ReduceSum", ["own", "one"], ["sum"], keepdims=1),
        ]
    weights: dict[str, np.ndarray[Any, Any]] = {
        "axis": np.array(0, np.int64),
        "step": np.array(1, np.int64),
        "zeros": np.zeros(1, helper.tensor_dtype_to_np_dtype(ONNX_TYPE[datatype])),
        "none": np.zeros(1, np.int32),
        "first": np.array([0], np.int64),
        "last": np.array([-1], np.int64),
        "one": np.array([1], np.int64),
    }
    return model(
        nodes,
        [value("x", datatype, ["elements"]), value("ends", "INT32", ["requests"])],
        [value("sum", datatype, ["requests", 1]), value("double", datatype, ["elements"])],
        weights,
    )


SEGMENTS_CONFIG = """max_batch_size: 8
  input { name: "x" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }
  output [ { name: "sum" data_type: TYPE_FP32 dims: [ 1 ] }, { name: "double" data_type: TYPE_FP32 dims: [ -1 ] } ]
  batch_input { kind: BATCH_ACCUMULATED_ELEMENT_COUNT target_name: "ends" data_type: TYPE_INT32 source_input: "x" }
  batch_output { target_name: "double" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "x" }
"""
"""For `segments`."""


def running_sum() -> bytes:
    """`INPUT` INT32 [batch, 1] + `PAST` → `OUTPUT` = `NOW` INT32 [batch, 1]; as a sequence with RUNNING_SUM."""
    shape: list[int | str | None] = ["batch", 1]
    return model(
        [helper.make_node("Add", ["INPUT", "PAST"], ["OUTPUT"]), helper.make_node("Identity", ["OUTPUT"], ["NOW"])],
        [value(name, "INT32", shape) for name in ("INPUT", "PAST")],
        [value(name, "INT32", shape) for name in ("OUTPUT", "NOW")],
    )


RUNNING_SUM = """
max_batch_size: 8
input [ { name: "INPUT" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "OUTPUT" data_type: TYPE_INT32 dims: [ 1 ] } ]
sequence_batching {
  max_sequence_idle_microseconds: 60000000
  %s
  state [ { input_name: "PAST" output_name: "NOW" data_type: TYPE_INT32 dims: [ 1 ] } ]
}
"""
"""Configuration of `running_sum`, to be filled with a strategy: `direct { }` or `oldest { … }`."""


def repository(root: Path, models: dict[str, bytes], configs: dict[str, str] | None = None) -> Path:
    """Write `<root>/<name>/1/model.onnx` [+ config.pbtxt] for each model; returns `root`."""
    for name, data in models.items():
        version = root / name / "1"
        version.mkdir(parents=True, exist_ok=True)
        (version / "model.onnx").write_bytes(data)
    for name, text in (configs or {}).items():
        (root / name / "config.pbtxt").write_text(text)
    return root
