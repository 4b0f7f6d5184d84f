"""A real gateway keeps what its OpenAPI description promises, whatever is sent to it (schemathesis)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway

pytestmark = pytest.mark.slow
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
KNOWN, DOOMED = "known", "doomed"
"""Models: one that always serves, one that is loaded and unloaded."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    root = models.repository(
        tmp_path_factory.mktemp("repository"), {KNOWN: models.identity("FP32"), DOOMED: models.identity("INT64")}
    )
    with gateway("serve", str(root), "--model-control", "explicit", "--load-model", "*", "--workers", "1") as process:
        yield process


def test_answers_are_as_described(served: GatewayProcess) -> None:
    load_all_checks()
    _, _, body = served.request("GET", "/v2/openapi.json")
    schema = schemathesis.openapi.from_dict(json.loads(body))
    schema.config.update(base_url=f"http://127.0.0.1:{served.port}")
    tried = set()
    for result in schema.get_all_operations():
        operation = result.ok()  # type: ignore[union-attr]

        @settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
        @given(case=operation.as_strategy(), known=st.booleans())
        def answers_are_as_described(case: Any, known: bool) -> None:
            if known and "model" in case.path_parameters:
                case.path_parameters["model"] = DOOMED if case.path.endswith("load") else KNOWN
            response = case.call(timeout=60)
            tried.add((case.path, case.method, response.status_code))
            case.validate_response(response, checks=CHECKS)

        answers_are_as_described()
    described = json.loads(body)["paths"]
    assert {path for path, _, _ in tried} == set(described)
    assert {status for path, _, status in tried if path.endswith(("/stats", "/config"))} >= {200, 400, 404}


def test_afterwards_it_serves_as_before(served: GatewayProcess) -> None:
    status, _, answer = served.infer(
        KNOWN, {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
    )
    assert (status, answer["outputs"][0]["data"]) == (200, [1, 2])
    assert "nobody foresaw" not in served.output()
    assert "Traceback" not in served.output()
