"""The load test's checker accepts right answers in both encodings and names what is wrong with any other."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime
import pytest

from loadtest.answers import CASE_NAMES, HEADER_LENGTH, MODELS, SAMPLES, Case, cases, decode, fault

CASES = cases()
ONE_OF_EACH = [next(c for c in CASES if (c.model, c.encoding) == (m, e)) for m in MODELS for e in ("json", "binary")]


def right_answer(case: Case, **changes: Any) -> tuple[dict[str, str], bytes]:
    """An OIP answer made from what the case expects; `changes` replace labels, probabilities, id."""
    labels = np.array(changes.get("labels", case.labels), "<i8")
    probabilities = np.array(changes.get("probabilities", case.probabilities), "<f4")
    document: dict[str, Any] = {"model_name": case.model, "model_version": "1", "id": changes.get("id", case.id)}
    headers = {"inference-model": f'"{case.model}";version="1"', "Content-Type": "application/json"}
    outputs = [
        {"name": "label", "datatype": "INT64", "shape": list(labels.shape)},
        {"name": "probabilities", "datatype": "FP32", "shape": list(probabilities.shape)},
    ]
    arrays = (labels, probabilities)
    if case.encoding == "json":
        document["outputs"] = [o | {"data": a.reshape(-1).tolist()} for o, a in zip(outputs, arrays, strict=True)]
        return headers, json.dumps(document).encode()
    sizes = [{"parameters": {"binary_data_size": a.nbytes}} for a in arrays]
    document["outputs"] = [o | s for o, s in zip(outputs, sizes, strict=True)]
    head = json.dumps(document).encode()
    return headers | {HEADER_LENGTH: str(len(head))}, head + labels.tobytes() + probabilities.tobytes()


def test_every_model_is_asked_in_both_encodings_with_one_and_several_rows() -> None:
    asked = {(c.model, c.encoding, len(c.labels) > 1) for c in CASES}
    assert asked == {(m, e, several) for m in MODELS for e in ("json", "binary") for several in (False, True)}
    assert len(CASES) == len(MODELS) * 2 * 9
    assert {c.id for c in CASES} == CASE_NAMES


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_request_bodies_hold_the_rows_the_model_was_asked(case: Case) -> None:
    """Both encodings are read back and run: they must give the expected labels."""
    length = int(case.headers.get(HEADER_LENGTH, len(case.body)))
    (tensor,) = json.loads(case.body[:length])["inputs"]
    raw = tensor["data"] if case.encoding == "json" else np.frombuffer(case.body[length:], "<f4")
    image = np.array(raw, np.float32).reshape(tensor["shape"])
    path = SAMPLES.parent / "models" / case.model / "1" / "model.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert tuple(session.run(["label"], {"image": image})[0].tolist()) == case.labels


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda c: c.id)
def test_a_right_answer_has_no_fault(case: Case) -> None:
    headers, body = right_answer(case)
    assert fault(case, 200, headers, body) is None


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda c: c.id)
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": (11,)}, "labels are [11]"),
        ({"probabilities": np.full((1, 10), 0.1)}, "probabilities differ"),
        ({"probabilities": np.zeros((10,))}, "probabilities differ"),
        ({"id": "someone else's"}, "id is"),
    ],
)
def test_a_wrong_answer_is_named(case: Case, changes: dict[str, Any], expected: str) -> None:
    headers, body = right_answer(case, **changes)
    assert expected in (fault(case, 200, headers, body) or "")


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda c: c.id)
def test_broken_answers_are_named(case: Case) -> None:
    headers, body = right_answer(case)
    assert "status 503" in (fault(case, 503, headers, b'{"error":"queue full"}') or "")
    assert "Inference-Model is None" in (fault(case, 200, {}, body) or "")
    assert "cannot be read" in (fault(case, 200, headers, body[:-3]) or "")
    assert "cannot be read" in (fault(case, 200, headers, body + b"xx") or "")
    assert "cannot be read" in (fault(case, 200, headers, b"{}") or "")


def test_decode_reads_mixed_outputs() -> None:
    head = json.dumps(
        {
            "outputs": [
                {"name": "a", "datatype": "INT64", "shape": [1], "data": [5]},
                {"name": "b", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}},
            ]
        }
    ).encode()
    _, outputs = decode({HEADER_LENGTH.lower(): str(len(head))}, head + np.array([1, 2], "<f4").tobytes())
    assert outputs["a"].tolist() == [5]
    assert outputs["b"].tolist() == [1.0, 2.0]
