"""The model of the fault rig: every row is a 64-bit nonce `x`, its answer is y = x · MULTIPLIER + ADDEND modulo 2^64.

No two rows of a run carry the same nonce, so an answer that belongs to another row, or to another request, cannot
pass for a right one, and each execution can be traced to the row that asked for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

MODEL: Final = "nonce"
INPUT: Final = "x"
OUTPUT: Final = "y"
MAX_BATCH: Final = 64
MULTIPLIER: Final = 0x2545F4914F6CDD1D
ADDEND: Final = 0x1234567890ABCDEF

POISON: Final = 1 << 62
"""A nonce with this bit makes the model fail; how, is a matter of the backend's behaviour or of the graph."""

Nonces = NDArray[np.int64]


def answers(nonces: Nonces) -> Nonces:
    """What the model answers, wrapping like the processor does."""
    unsigned = nonces.view(np.uint64) * np.uint64(MULTIPLIER) + np.uint64(ADDEND)
    return unsigned.view(np.int64)


def metadata(datatype: str = "INT64") -> dict[str, Any]:
    """`GET /v2/models/nonce`."""
    return {
        "name": MODEL,
        "versions": ["1"],
        "platform": "fault_rig",
        "inputs": [{"name": INPUT, "datatype": datatype, "shape": [-1, 1]}],
        "outputs": [{"name": OUTPUT, "datatype": datatype, "shape": [-1, 1]}],
    }


def config(datatype: str = "INT64") -> dict[str, Any]:
    """`GET /v2/models/nonce/config`, in Triton's form."""
    return {
        "name": MODEL,
        "platform": "fault_rig",
        "backend": "fault_rig",
        "max_batch_size": MAX_BATCH,
        "input": [{"name": INPUT, "data_type": f"TYPE_{datatype}", "dims": ["1"]}],
        "output": [{"name": OUTPUT, "data_type": f"TYPE_{datatype}", "dims": ["1"]}],
    }


def graph(poison: str = "none", work: int = 0) -> bytes:
    """The same model as ONNX, for the gateway's own workers.

    Args:
        poison: what a poisoned row does to the run. `none`: nothing; `error`: the model refuses the input; `memory`:
            it asks for more memory than there is; `loop`: it computes for hours; `crash`: an integer division that
            overflows (least / -1) ends the whole process by SIGFPE.
        work: rounds of a matrix product that have no effect on the answer, to make a run last.
    """
    shape: list[int | str | None] = ["rows", 1]
    nodes = [
        helper.make_node("Mul", [INPUT, "multiplier"], ["product"]),
        helper.make_node("Add", ["product", "addend"], ["sum"]),
    ]
    weights = {
        "multiplier": np.array(MULTIPLIER, np.int64),
        "addend": np.array(ADDEND, np.int64),
    }
    if poison != "none" or work:
        weights["zero"] = np.array(0, np.int64)
    last = "sum"
    if poison != "none":
        # How many rows are poisoned: 0 or more, as one INT64.
        weights["flag"] = np.array(POISON, np.int64)
        nodes += [
            helper.make_node("BitwiseAnd", [INPUT, "flag"], ["bits"]),
            helper.make_node("Div", ["bits", "flag"], ["flags"]),
            helper.make_node("ReduceSum", ["flags"], ["poisoned"], keepdims=0),
        ]
        nodes += _harm(poison, weights)
        nodes.append(helper.make_node("Add", [last, "harmless"], ["after_poison"]))
        last = "after_poison"
    if work:
        nodes += _toil(work, weights)
        nodes.append(helper.make_node("Add", [last, "toil"], ["after_work"]))
        last = "after_work"
    nodes.append(helper.make_node("Identity", [last], [OUTPUT]))
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    body = helper.make_graph(
        nodes,
        "nonce",
        [helper.make_tensor_value_info(INPUT, TensorProto.INT64, shape)],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.INT64, shape)],
        tensors,
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    data: bytes = model.SerializeToString()
    return data


def _harm(poison: str, weights: dict[str, Any]) -> list[Any]:
    """Nodes from `poisoned` (a count) to `harmless` (0), unless the count is above 0."""
    if poison == "error":
        weights["one_place"] = np.zeros(1, np.int64)
        return [helper.make_node("Gather", ["one_place", "poisoned"], ["harmless"])]
    if poison == "memory":
        weights["huge"] = np.array([1 << 42], np.int64)
        return [
            helper.make_node("Mul", ["poisoned", "huge"], ["size"]),
            helper.make_node("ConstantOfShape", ["size"], ["hog"]),
            helper.make_node("ReduceSum", ["hog"], ["hogged"], keepdims=0),
            helper.make_node("Cast", ["hogged"], ["whole"], to=TensorProto.INT64),
            helper.make_node("Mul", ["whole", "zero"], ["harmless"]),
        ]
    if poison == "crash":
        weights["one"] = np.array(1, np.int64)
        weights["minus_two"] = np.array(-2, np.int64)
        weights["least"] = np.array(-(1 << 63), np.int64)
        return [
            helper.make_node("Greater", ["poisoned", "zero"], ["wanted"]),
            helper.make_node("Cast", ["wanted"], ["as_number"], to=TensorProto.INT64),
            helper.make_node("Mul", ["as_number", "minus_two"], ["step"]),
            helper.make_node("Add", ["step", "one"], ["divisor"]),
            helper.make_node("Div", ["least", "divisor"], ["quotient"]),
            helper.make_node("Mul", ["quotient", "zero"], ["harmless"]),
        ]
    assert poison == "loop", poison
    weights["for_ever"] = np.array(1 << 50, np.int64)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going_on"], ["still"]),
            helper.make_node("BitwiseXor", ["state", "round"], ["next_state"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("going_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_state", TensorProto.INT64, []),
        ],
    )
    return [
        helper.make_node("Mul", ["poisoned", "for_ever"], ["rounds"]),
        helper.make_node("Greater", ["poisoned", "zero"], ["wanted"]),
        helper.make_node("Loop", ["rounds", "wanted", "zero"], ["looped"], body=body),
        helper.make_node("Mul", ["looped", "zero"], ["harmless"]),
    ]


def _toil(work: int, weights: dict[str, Any]) -> list[Any]:
    """Nodes that give `toil`, 0 for every row, after `work` matrix products that depend on the input."""
    side = 192
    weights["seed"] = np.full((side, side), 1.0 / side, np.float32)
    nodes = [
        helper.make_node("Mul", [INPUT, "zero"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["nothing"], keepdims=0),
        helper.make_node("Cast", ["nothing"], ["float_nothing"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["seed", "float_nothing"], ["work_0"]),
    ]
    nodes += [helper.make_node("MatMul", [f"work_{n}", "seed"], [f"work_{n + 1}"]) for n in range(work)]
    nodes += [
        helper.make_node("ReduceMax", [f"work_{work}"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["whole_most"], to=TensorProto.INT64),
        helper.make_node("Mul", ["whole_most", "zero"], ["toil"]),
    ]
    return nodes


def repository(root: Path, **graph_arguments: Any) -> Path:
    """A model repository with the ONNX model; returns its directory."""
    folder = root / MODEL / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(graph(**graph_arguments))
    (root / MODEL / "config.pbtxt").write_text(
        f'name: "{MODEL}"\nbackend: "onnxruntime"\nmax_batch_size: {MAX_BATCH}\n'
    )
    return root
