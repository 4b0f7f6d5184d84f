"""KServe's InferenceRESTClient and InferenceGRPCClient, unchanged against a whole gateway, over one session of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.live import models, venvs
from tests.live.gateway_process import gateway

pytestmark = pytest.mark.slow
DATATYPES = ("BOOL", "UINT8", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES")
MODELS = {"linear": models.whole_linear()} | {f"id_{name.lower()}": models.identity(name) for name in DATATYPES}
SESSION = Path(__file__).parent / "kserve_session.py"
ANSWER = {"id": "7", "model": "linear"}
VERSION = {"rest": None, "grpc": "1"}
"""The REST client does not read it from the answer."""
SENT = {
    "BOOL": [True, False],
    "UINT8": [0, 255],
    "INT32": [-(2**31), 2**31 - 1],
    "INT64": [2**53 + 1, -(2**63)],
    "FP16": [1.5, -65504.0],
    "FP32": np.array([0.1, 3.4e38], np.float32).tolist(),
    "FP64": [0.1, 1e308],
    "BYTES": ["héllo", ""],
}


def run_session(folder: Path, *settings: str) -> dict[str, Any]:
    """What both clients were answered by a gateway that serves the models."""
    python = venvs.need(venvs.kserve)
    root = models.repository(folder / "models", MODELS)
    with gateway("serve", str(root), "--workers", "2", *settings) as served:
        done = python.run(str(SESSION), f"http://127.0.0.1:{served.port}", f"127.0.0.1:{served.grpc_port}")
    assert done.returncode == 0, done.stdout
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_session(tmp_path_factory.mktemp("kserve"))


@pytest.fixture(scope="module")
def product() -> list[Any]:
    weights = np.random.default_rng(11).integers(-9, 10, (6, 3)).astype(np.float32)  # of models.whole_linear
    y = np.arange(12, dtype=np.float32).reshape(2, 6) @ weights
    return ["FP32", [2, 3], y.ravel().tolist()]


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_health(session: dict[str, Any], protocol: str) -> None:
    found = session[protocol]
    assert (found["live"], found["ready"], found["model_ready"]) == (True, True, [True, False])


@pytest.mark.parametrize(
    ("protocol", "form"),
    [
        ("rest", "json"),
        ("rest", "binary in"),
        ("rest", "binary out"),
        ("rest", "named binary out"),
        ("grpc", "typed"),
        ("grpc", "raw"),
    ],
)
def test_every_form_of_a_request(session: dict[str, Any], product: list[Any], protocol: str, form: str) -> None:
    assert session[protocol][form] == {**ANSWER, "version": VERSION[protocol], "outputs": {"y": product}}


def test_a_dictionary_in_place_of_a_request(session: dict[str, Any], product: list[Any]) -> None:
    assert session["rest"]["dictionary"]["outputs"] == {"y": product}


@pytest.mark.parametrize(
    ("datatype", "protocol", "form"),
    [
        (datatype, protocol, form)
        for datatype in DATATYPES
        for protocol, form in (("rest", "binary"), ("rest", "json"), ("grpc", "raw"), ("grpc", "typed"))
        if datatype != "FP16" or form in {"binary", "raw"}  # the protocol has no other
    ],
)
def test_every_datatype(session: dict[str, Any], datatype: str, protocol: str, form: str) -> None:
    assert session[protocol][f"{datatype} {form}"] == [datatype, [1, 2], SENT[datatype]]


@pytest.mark.parametrize(
    ("protocol", "question", "status", "says"),
    [
        ("rest", "unknown", "404", "Request for unknown model: 'nobody' is not found"),
        ("rest", "narrow", "400", "unexpected shape for input 'x' for model 'linear'. Expected [-1,6], got [2,5]"),
        ("grpc", "unknown", "NOT_FOUND", "Request for unknown model: 'nobody' is not found"),
        ("grpc", "narrow", "INVALID_ARGUMENT", "unexpected shape for input 'x' for model 'linear'"),
    ],
)
def test_failures_are_told(session: dict[str, Any], protocol: str, question: str, status: str, says: str) -> None:
    found, text = session[protocol][question]
    assert found == status
    assert says in text


def test_typed_answers_where_the_server_mirrors(tmp_path: Path, product: list[Any]) -> None:
    """KServe's own server answers typed contents with typed contents; `typed_responses: mirror` does the same."""
    config = tmp_path / "gateway.yaml"
    config.write_text("server:\n  protocol:\n    typed_responses: mirror\n")
    found = run_session(tmp_path, "-c", str(config))["grpc"]
    assert found["typed"]["outputs"] == found["raw"]["outputs"] == {"y": product}
    assert found["BYTES typed"] == ["BYTES", [1, 2], SENT["BYTES"]]
