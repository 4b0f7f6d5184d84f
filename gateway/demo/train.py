"""Trains the bundled digit classifiers and writes them, with their samples, next to this file.

    pip install 'oip-gateway[train]'
    python -m gateway.demo.train      # rewrites models/ and samples/, prints the accuracy on held-out digits

Data: the handwritten digits that come with scikit-learn (1797 images of 8x8 pixels, values 0 to 16; a copy of
the test part of the UCI "Optical Recognition of Handwritten Digits" set, CC BY 4.0). One fifth is held out.
The models take pixels as they are (0 to 16) and scale them inside the graph, so a client has nothing to know.

Rules: every random choice comes from one seed, so the same numpy on the same kind of processor writes the
same bytes; a model that scores below `REQUIRED_ACCURACY` on the held-out digits is not written. Answers are
computed by onnx's reference evaluator: onnxruntime belongs to the workers alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from gateway.demo.layers import Conv3x3, Dense, Floats, GraphWriter, Layer, MaxPoolFlatten, Relu

HERE: Final = Path(__file__).parent
SEED: Final = 2
REQUIRED_ACCURACY: Final = 0.95
OPSET: Final = 17
IR_VERSION: Final = 8
"""Old enough for every onnxruntime the package supports."""
BATCH_ROWS: Final = 32
SAMPLE_ROWS: Final = 8

Labels = NDArray[np.int64]

CNN_CONFIG: Final = """\
name: "digits_cnn"
platform: "onnxruntime_onnx"
max_batch_size: 32
dynamic_batching { }
"""


@dataclass(frozen=True)
class Recipe:
    """How one bundled model is made. `shape` is one row's input shape."""

    name: str
    shape: tuple[int, ...]
    epochs: int
    build: Callable[[np.random.Generator], list[Layer]]
    config: str = ""


def _mlp(rng: np.random.Generator) -> list[Layer]:
    return [Dense(rng, 64, 128), Relu(), Dense(rng, 128, 64), Relu(), Dense(rng, 64, 10)]


def _cnn(rng: np.random.Generator) -> list[Layer]:
    first: list[Layer] = [Conv3x3(rng, 1, 16), Relu(), Conv3x3(rng, 16, 32), Relu()]
    second: list[Layer] = [Conv3x3(rng, 32, 32), Relu(), MaxPoolFlatten()]
    return [*first, *second, Dense(rng, 512, 96), Relu(), Dense(rng, 96, 10)]


RECIPES: Final = (
    Recipe("digits", (64,), 60, _mlp),
    Recipe("digits_cnn", (1, 8, 8), 15, _cnn, CNN_CONFIG),
)


def train(layers: list[Layer], images: Floats, labels: Labels, epochs: int, rng: np.random.Generator) -> None:
    """Adam (Kingma and Ba 2015) on the cross-entropy, the learning rate falling linearly to zero."""
    parameters = [p for layer in layers for p in layer.parameters]
    first = [np.zeros_like(p) for p in parameters]
    second = [np.zeros_like(p) for p in parameters]
    steps = epochs * (len(images) // BATCH_ROWS)
    step = 0
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for start in range(0, len(order) - BATCH_ROWS + 1, BATCH_ROWS):
            chosen = order[start : start + BATCH_ROWS]
            _accumulate(layers, images[chosen], labels[chosen])
            gradients = [g for layer in layers for g in layer.gradients]
            step += 1
            rate = 2e-3 * (1 - step / steps)
            for parameter, g, m, v in zip(parameters, gradients, first, second, strict=True):
                np.add(m, 0.1 * (g - m), out=m)
                np.add(v, 0.001 * (g * g - v), out=v)
                change = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
                np.subtract(parameter, rate * change, out=parameter, casting="same_kind")


def _accumulate(layers: list[Layer], images: Floats, labels: Labels) -> None:
    """One forward and one backward pass; leaves the gradients in the layers."""
    x = images / np.float32(16)
    for layer in layers:
        x = layer.forward(x)
    e = np.exp(x - x.max(1, keepdims=True))
    gradient = e / e.sum(1, keepdims=True)
    gradient[np.arange(len(labels)), labels] -= 1
    gradient /= len(labels)
    for layer in reversed(layers):
        gradient = layer.backward(gradient)


def export(recipe: Recipe, layers: list[Layer]) -> onnx.ModelProto:
    """The ONNX graph: `image` FP32 [-1, *shape] → `label` INT64 [-1], `probabilities` FP32 [-1, 10]."""
    graph = GraphWriter()
    x = graph.add("Mul", ["image", graph.constant(np.array(1 / 16, np.float32))])
    for layer in layers:
        x = layer.export(graph, x)
    graph.add("Softmax", [x], "probabilities", axis=1)
    graph.add("ArgMax", [x], "label", axis=1, keepdims=0)
    value = helper.make_tensor_value_info
    image = value("image", TensorProto.FLOAT, ["rows", *recipe.shape])
    label = value("label", TensorProto.INT64, ["rows"])
    probabilities = value("probabilities", TensorProto.FLOAT, ["rows", 10])
    model = helper.make_model(
        helper.make_graph(graph.nodes, recipe.name, [image], [label, probabilities], graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="oip-gateway",
        doc_string="Handwritten digits, pixels 0 to 16. Trained by gateway/demo/train.py. Apache-2.0.",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _predict(model: onnx.ModelProto, images: Floats) -> tuple[Labels, Floats]:
    label, probabilities = ReferenceEvaluator(model).run(["label", "probabilities"], {"image": images})
    return np.asarray(label, np.int64), np.asarray(probabilities, np.float32)


def _sample(recipe: Recipe, model: onnx.ModelProto, images: Floats, truth: Labels) -> dict[str, object]:
    """One OIP request body and what the model answers to it, for the demo, the load test and the tests."""
    label, probabilities = _predict(model, images)
    tensor = {"name": "image", "datatype": "FP32", "shape": list(images.shape)}
    data = images.astype(int).reshape(len(images), -1).tolist()
    rounded = [[float(f"{p:.6g}") for p in row] for row in probabilities]
    return {
        "model": recipe.name,
        "request": {"inputs": [tensor | {"data": data}]},
        "expected": {"label": label.tolist(), "probabilities": rounded},
        "truth": truth.tolist(),
    }


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, separators=(",", ":")) + "\n")


def build(recipe: Recipe, into: Path) -> float:
    """Train one model, write it and its sample below `into`; returns the accuracy on the held-out digits.

    Raises:
        SystemExit: the accuracy is below `REQUIRED_ACCURACY`; nothing is written.
    """
    data = load_digits()
    split = train_test_split(data.data, data.target, test_size=0.2, random_state=SEED, stratify=data.target)
    images = [part.astype(np.float32).reshape(-1, *recipe.shape) for part in split[:2]]
    labels = [part.astype(np.int64) for part in split[2:]]
    rng = np.random.default_rng(SEED)
    layers = recipe.build(rng)
    train(layers, images[0], labels[0], recipe.epochs, rng)
    model = export(recipe, layers)
    predicted, _ = _predict(model, images[1])
    accuracy = float((predicted == labels[1]).mean())
    if accuracy < REQUIRED_ACCURACY:
        sys.exit(f"{recipe.name}: {accuracy:.3f} of the held-out digits right, {REQUIRED_ACCURACY} required")
    version = into / "models" / recipe.name / "1"
    version.mkdir(parents=True, exist_ok=True)
    (version / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    if recipe.config:
        (version.parent / "config.pbtxt").write_text(recipe.config)
    samples = into / "samples"
    sample = _sample(recipe, model, images[1][:SAMPLE_ROWS], labels[1][:SAMPLE_ROWS])
    _write_json(samples / f"{recipe.name}.json", sample)
    pixels = images[1].reshape(-1, 64).astype(int).tolist()
    _write_json(samples / "held_out.json", {"pixels": pixels, "labels": labels[1].tolist()})
    return accuracy


def main() -> None:
    for recipe in RECIPES:
        accuracy = build(recipe, HERE)
        size = (HERE / "models" / recipe.name / "1" / "model.onnx").stat().st_size
        sys.stdout.write(f"{recipe.name}: {accuracy:.3f} of held-out digits right, {size / 1024:.0f} KiB\n")


if __name__ == "__main__":
    main()
