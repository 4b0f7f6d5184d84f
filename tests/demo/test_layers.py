"""Each layer's gradient is the slope of its forward pass, and its ONNX nodes compute the same thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from gateway.demo.layers import Conv3x3, Dense, GraphWriter, Layer, MaxPoolFlatten, Relu

CASES: list[tuple[Callable[[Any], Layer], tuple[int, ...]]] = [
    (lambda rng: Dense(rng, 6, 5), (3, 6)),
    (lambda rng: Conv3x3(rng, 2, 3), (2, 2, 4, 4)),
    (lambda rng: Relu(), (3, 7)),
    (lambda rng: MaxPoolFlatten(), (2, 3, 4, 4)),
]
IDS = ["dense", "conv", "relu", "pool"]


def slope(loss: Callable[[], float], at: Any, index: tuple[int, ...]) -> float:
    """Central difference of `loss` with respect to `at[index]`."""
    step, before = np.float32(1e-2), at[index]
    at[index] = before + step
    above = loss()
    at[index] = before - step
    below = loss()
    at[index] = before
    return float((above - below) / (2 * step))


@pytest.mark.parametrize(("build", "shape"), CASES, ids=IDS)
def test_backward_is_the_slope_of_forward(build: Callable[[Any], Layer], shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    layer = build(rng)
    # Distinct, well-separated values: a step of 0.01 crosses no kink of a rectifier or a maximum.
    x = (rng.permutation(int(np.prod(shape))).reshape(shape) * 0.1 - 1.05).astype(np.float32)
    weights = rng.standard_normal(layer.forward(x).shape).astype(np.float32)

    def loss() -> float:
        return float((layer.forward(x).astype(np.float64) * weights).sum())

    loss()
    grad = layer.backward(weights)
    for array, gradient in zip([x, *layer.parameters], [grad, *layer.gradients], strict=True):
        assert array.shape == gradient.shape
        for index in np.ndindex(array.shape):
            assert slope(loss, array, index) == pytest.approx(float(gradient[index]), abs=2e-2)


@pytest.mark.parametrize(("build", "shape"), CASES, ids=IDS)
def test_exported_nodes_compute_it_too(build: Callable[[Any], Layer], shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(4)
    layer = build(rng)
    for parameter in layer.parameters:
        parameter[...] = rng.standard_normal(parameter.shape)
    x = rng.standard_normal(shape).astype(np.float32)
    writer = GraphWriter()
    output = layer.export(writer, "x")
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        writer.nodes,
        "one_layer",
        [info("x", TensorProto.FLOAT, list(shape))],
        [info(output, TensorProto.FLOAT, list(layer.forward(x).shape))],
        writer.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], layer.forward(x), atol=1e-4)
