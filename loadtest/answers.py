"""The requests the load test sends, and the one rule that says whether an answer is right. No locust in here.

Rules: requests come from the bundled models' samples; an answer is right if its status is 200, its labels are
exactly the expected ones, its probabilities are within `TOLERANCE`, its `id` is the request's, and its headers
name the model. JSON and binary answers pass the same check.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

import gateway.demo

SAMPLES: Final = Path(gateway.demo.__file__).parent / "samples"
MODELS: Final = ("digits", "digits_cnn")
TOLERANCE: Final = 1e-4
CASE_NAMES: Final = {f"{m} {e} x{n}" for m in MODELS for e in ("json", "binary") for n in (1, 8)}
"""The names under which requests are listed: model, encoding, rows."""
HEADER_LENGTH: Final = "Inference-Header-Content-Length"

Encoding = Literal["json", "binary"]


@dataclass(frozen=True)
class Case:
    """One request that can be sent again and again, and what must come back."""

    id: str
    """Also the name under which the load generator lists it."""
    model: str
    encoding: Encoding
    headers: Mapping[str, str]
    body: bytes
    labels: tuple[int, ...]
    probabilities: NDArray[np.float64]

    @property
    def path(self) -> str:
        return f"/v2/models/{self.model}/infer"


def cases() -> list[Case]:
    """Every sample row alone and all rows together, as JSON and as binary tensors, for every bundled model."""
    found = []
    for model in MODELS:
        sample = json.loads((SAMPLES / f"{model}.json").read_text())
        tensor = sample["request"]["inputs"][0]
        rows = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
        for first, last in [*((r, r + 1) for r in range(len(rows))), (0, len(rows))]:
            expected = sample["expected"]
            found += [
                _case(model, encoding, rows[first:last], _cut(expected, first, last)) for encoding in ("json", "binary")
            ]
    return found


def _cut(expected: dict[str, list[Any]], first: int, last: int) -> tuple[list[int], list[list[float]]]:
    return expected["label"][first:last], expected["probabilities"][first:last]


def _case(model: str, encoding: str, rows: NDArray[np.float32], expected: tuple[list[int], list[list[float]]]) -> Case:
    name = f"{model} {encoding} x{len(rows)}"
    tensor: dict[str, Any] = {"name": "image", "datatype": "FP32", "shape": list(rows.shape)}
    labels, probabilities = tuple(expected[0]), np.array(expected[1])
    if encoding == "json":
        tensor["data"] = rows.reshape(-1).tolist()
        body = json.dumps({"id": name, "inputs": [tensor]}).encode()
        return Case(name, model, "json", {"Content-Type": "application/json"}, body, labels, probabilities)
    raw = rows.astype("<f4").tobytes()
    tensor["parameters"] = {"binary_data_size": len(raw)}
    document = {"id": name, "parameters": {"binary_data_output": True}, "inputs": [tensor]}
    head = json.dumps(document).encode()
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
    return Case(name, model, "binary", headers, head + raw, labels, probabilities)


def fault(case: Case, status: int, headers: Mapping[str, str], body: bytes) -> str | None:
    """What is wrong with an answer, in one line; None if it is right. `headers` are looked up by lower case."""
    if status != 200:
        return f"status {status}: {body[:200]!r}"
    lower = {name.lower(): value for name, value in headers.items()}
    if not lower.get("inference-model", "").startswith(f'"{case.model}";'):
        return f"Inference-Model is {lower.get('inference-model')!r}"
    try:
        document, outputs = decode(lower, body)
    except (ValueError, KeyError, TypeError) as error:
        return f"answer cannot be read: {error!r}"
    return _difference(case, document, outputs)


def _difference(case: Case, document: dict[str, Any], outputs: dict[str, NDArray[Any]]) -> str | None:
    if document.get("id") != case.id:
        return f"id is {document.get('id')!r}"
    if set(outputs) != {"label", "probabilities"}:
        return f"outputs are {sorted(outputs)}"
    if tuple(outputs["label"].tolist()) != case.labels:
        return f"labels are {outputs['label'].tolist()}, expected {list(case.labels)}"
    got = outputs["probabilities"]
    if got.shape != case.probabilities.shape or not np.allclose(got, case.probabilities, atol=TOLERANCE, rtol=0):
        return "probabilities differ from the model's"
    return None


def decode(headers: Mapping[str, str], body: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The JSON part and the outputs of an OIP answer, JSON or binary. `headers` have lower-case names.

    Raises:
        ValueError, KeyError, TypeError: the answer is not what the protocol says.
    """
    length = int(headers.get(HEADER_LENGTH.lower(), len(body)))
    document: dict[str, Any] = json.loads(body[:length])
    outputs, at = {}, length
    for output in document["outputs"]:
        kind = {"INT64": "<i8", "FP32": "<f4"}[output["datatype"]]
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            values = np.array(output["data"], kind)
        else:
            values = np.frombuffer(body[at : at + size], kind)
            at += size
        outputs[output["name"]] = values.reshape(output["shape"])
    if at != len(body):
        raise ValueError(f"{len(body) - at} bytes more than announced")
    return document, outputs
