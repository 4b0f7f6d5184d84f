"""Documents as messages: the quick road and the general one say the same."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import json_format

from gateway.errors import InvalidRequest
from gateway.protocol import schema
from gateway.protocol.oip_grpc_documents import log_document, read, trace_document, write

DURATION = {"count": 3, "ns": 2**40}
STATISTICS = {
    "name": "m",
    "version": "1",
    "last_inference": 5,
    "inference_count": 2,
    "inference_stats": {"success": DURATION, "queue": DURATION},
    "response_stats": {},
    "batch_stats": [{"batch_size": size, "compute_infer": DURATION} for size in (1, 8)],
    "memory_usage": [],
}
CONFIG = {
    "name": "m",
    "max_batch_size": 8,
    "input": [{"name": "x", "data_type": "TYPE_FP32", "format": "FORMAT_NONE", "dims": [-1]}],
    "instance_group": [{"name": "m_0", "kind": "KIND_CPU", "count": 2}],
    "parameters": {"threads": {"string_value": "2"}},
    "metric_tags": {"team": "vision"},
}


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("inference.ModelStatisticsResponse", {"model_stats": [STATISTICS, STATISTICS]}),
        ("inference.ModelConfigResponse", {"config": CONFIG}),
        ("inference.ServerMetadataResponse", {"name": "s", "extensions": ["a", "b"], "of_json_only": 1}),
        ("inference.TraceSettingResponse", trace_document({"trace_rate": "1", "trace_level": ["OFF"]})),
        ("inference.LogSettingsResponse", log_document({"log_info": True, "log_verbose_level": 1, "log_file": ""})),
        ("grpc.health.v1.HealthCheckResponse", {"status": "NOT_SERVING"}),
        ("inference.ServerLiveResponse", {"live": True}),
    ],
)
def test_a_message_says_what_its_document_says(name: str, document: dict[str, Any]) -> None:
    general = json_format.ParseDict(document, schema.message(name)(), ignore_unknown_fields=True)
    assert read(name, write(name, document)) == general


def test_statistics_of_many_models_go_the_quick_road(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_format, "ParseDict", None)
    name = "inference.ModelStatisticsResponse"
    message = read(name, write(name, {"model_stats": [STATISTICS] * 3}))
    assert [one.inference_stats.success.ns for one in message.model_stats] == [2**40] * 3


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"not a valid inference\.ServerLiveRequest"):
        read("inference.ServerLiveRequest", b"\xff")
