"""The committed models are what the documentation says: small, right, batchable, and their samples true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import gateway.demo

DEMO = Path(gateway.demo.__file__).parent
NAMES = ("digits", "digits_cnn")
ROW_SHAPE = {"digits": (64,), "digits_cnn": (1, 8, 8)}


def model_path(name: str) -> Path:
    return DEMO / "models" / name / "1" / "model.onnx"


def session(name: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model_path(name), options, providers=["CPUExecutionProvider"])


def held_out(name: str) -> tuple[Any, Any]:
    stored = json.loads((DEMO / "samples" / "held_out.json").read_text())
    pixels = np.array(stored["pixels"], np.float32).reshape(-1, *ROW_SHAPE[name])
    return pixels, np.array(stored["labels"], np.int64)


def test_every_bundled_model_is_tested_here() -> None:
    assert sorted(p.name for p in (DEMO / "models").iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    running = session(name)
    signature = [(t.name, t.type, t.shape) for t in (*running.get_inputs(), *running.get_outputs())]
    assert signature == [
        ("image", "tensor(float)", ["rows", *ROW_SHAPE[name]]),
        ("label", "tensor(int64)", ["rows"]),
        ("probabilities", "tensor(float)", ["rows", 10]),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_reads_at_least_95_of_100_digits_it_has_never_seen(name: str) -> None:
    pixels, truth = held_out(name)
    assert len(truth) >= 300
    label, probabilities = session(name).run(["label", "probabilities"], {"image": pixels})
    assert (label == truth).mean() >= 0.95
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert (probabilities.argmax(1) == label).all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_influence_each_other(name: str) -> None:
    pixels, _ = held_out(name)
    running = session(name)
    together = running.run(["probabilities"], {"image": pixels[:32]})[0]
    alone = np.concatenate([running.run(["probabilities"], {"image": row[None]})[0] for row in pixels[:32]])
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_sample_request_gets_its_stored_answer(name: str) -> None:
    sample = json.loads((DEMO / "samples" / f"{name}.json").read_text())
    (tensor,) = sample["request"]["inputs"]
    assert (sample["model"], tensor["name"], tensor["datatype"]) == (name, "image", "FP32")
    assert tuple(tensor["shape"][1:]) == ROW_SHAPE[name]
    image = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
    label, probabilities = session(name).run(["label", "probabilities"], {"image": image})
    assert label.tolist() == sample["expected"]["label"]
    np.testing.assert_allclose(probabilities, sample["expected"]["probabilities"], atol=1e-5)
    assert (label == sample["truth"]).mean() >= 0.75, "the demo shows answers that are right"


@pytest.mark.parametrize("name", NAMES)
def test_file_is_small_plain_onnx(name: str) -> None:
    assert model_path(name).stat().st_size < 400 * 1024
    model = onnx.load(str(model_path(name)))
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert {node.domain for node in model.graph.node} == {""}


def test_only_the_cnn_brings_a_config() -> None:
    assert not (DEMO / "models" / "digits" / "config.pbtxt").exists()
    text = (DEMO / "models" / "digits_cnn" / "config.pbtxt").read_text()
    assert "max_batch_size: 32" in text
    assert "dynamic_batching" in text
