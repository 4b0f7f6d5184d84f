"""A neural network small enough to read: four layers, their gradients, and the ONNX nodes they stand for.

Used only by `train.py`, so that retraining the bundled models needs no framework.

Rules: a layer keeps what its backward pass needs from its last forward pass; `backward` returns the gradient
of its input and leaves its parameters' gradients in `gradients`, in the order of `parameters`. Images are
`[rows, channels, height, width]`, everything is float32.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Floats = NDArray[np.float32]


class Layer(Protocol):
    """One step of a network. `parameters` are updated in place by the optimiser."""

    parameters: list[Floats]
    gradients: list[Floats]

    def forward(self, x: Floats) -> Floats: ...
    def backward(self, grad: Floats) -> Floats: ...
    def export(self, graph: GraphWriter, x: str) -> str:
        """Add the layer to `graph` with input `x`; returns the name of its output."""
        ...


class GraphWriter:
    """Collects nodes and constants of one ONNX graph, naming them in order."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: NDArray[Any]) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, op: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        output = output or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output


class Dense:
    """[rows, in] → [rows, out]."""

    def __init__(self, rng: np.random.Generator, size_in: int, size_out: int) -> None:
        self.weight = _he(rng, (size_in, size_out), size_in)
        self.bias = np.zeros(size_out, np.float32)
        self.parameters = [self.weight, self.bias]
        self.gradients: list[Floats] = []

    def forward(self, x: Floats) -> Floats:
        self._x = x
        return x @ self.weight + self.bias

    def backward(self, grad: Floats) -> Floats:
        self.gradients = [self._x.T @ grad, grad.sum(0)]
        return grad @ self.weight.T

    def export(self, graph: GraphWriter, x: str) -> str:
        return graph.add("Gemm", [x, graph.constant(self.weight), graph.constant(self.bias)])


class Conv3x3:
    """[rows, in, h, w] → [rows, out, h, w], zero padding of one pixel."""

    def __init__(self, rng: np.random.Generator, size_in: int, size_out: int) -> None:
        self.weight = _he(rng, (size_out, size_in, 3, 3), size_in * 9)
        self.bias = np.zeros(size_out, np.float32)
        self.parameters = [self.weight, self.bias]
        self.gradients: list[Floats] = []

    def forward(self, x: Floats) -> Floats:
        rows, _, height, width = x.shape
        self._patches = _patches(x)
        y = self._patches @ self.weight.reshape(len(self.weight), -1).T + self.bias
        return y.reshape(rows, height, width, -1).transpose(0, 3, 1, 2)

    def backward(self, grad: Floats) -> Floats:
        flat = grad.transpose(0, 2, 3, 1).reshape(-1, grad.shape[1])
        self.gradients = [(flat.T @ self._patches).reshape(self.weight.shape), flat.sum(0)]
        # The transpose of a convolution is a convolution with the kernel turned by half a circle.
        turned = self.weight[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)
        rows, _, height, width = grad.shape
        y = _patches(grad) @ turned.reshape(len(turned), -1).T
        return y.reshape(rows, height, width, -1).transpose(0, 3, 1, 2)

    def export(self, graph: GraphWriter, x: str) -> str:
        constants = [graph.constant(self.weight), graph.constant(self.bias)]
        return graph.add("Conv", [x, *constants], kernel_shape=[3, 3], pads=[1, 1, 1, 1])


class Relu:
    def __init__(self) -> None:
        self.parameters: list[Floats] = []
        self.gradients: list[Floats] = []

    def forward(self, x: Floats) -> Floats:
        self._mask = x > 0
        return x * self._mask

    def backward(self, grad: Floats) -> Floats:
        return grad * self._mask

    def export(self, graph: GraphWriter, x: str) -> str:
        return graph.add("Relu", [x])


class MaxPoolFlatten:
    """[rows, channels, h, w] → [rows, channels * h/2 * w/2]: the largest of each square of four."""

    def __init__(self) -> None:
        self.parameters: list[Floats] = []
        self.gradients: list[Floats] = []

    def forward(self, x: Floats) -> Floats:
        rows, channels, height, width = x.shape
        squares: Floats = x.reshape(rows, channels, height // 2, 2, width // 2, 2)
        pooled: Floats = squares.max(axis=(3, 5), keepdims=True)
        self._shape = x.shape
        self._mask = squares == pooled
        flat: Floats = pooled.reshape(rows, -1)
        return flat

    def backward(self, grad: Floats) -> Floats:
        rows, channels, height, width = self._shape
        spread: Floats = self._mask * grad.reshape(rows, channels, height // 2, 1, width // 2, 1)
        unpooled: Floats = spread.reshape(self._shape)
        return unpooled

    def export(self, graph: GraphWriter, x: str) -> str:
        return graph.add("Flatten", [graph.add("MaxPool", [x], kernel_shape=[2, 2], strides=[2, 2])])


def _he(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int) -> Floats:
    """He et al. 2015: keeps the variance through layers of rectifiers."""
    values: Floats = (rng.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)
    return values


def _patches(x: Floats) -> Floats:
    """[rows, channels, h, w] → [rows * h * w, channels * 9]: what a 3x3 window sees at each pixel."""
    rows, channels, height, width = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = sliding_window_view(padded, (3, 3), axis=(2, 3))
    patches: Floats = windows.transpose(0, 2, 3, 1, 4, 5).reshape(rows * height * width, channels * 9)
    return patches
