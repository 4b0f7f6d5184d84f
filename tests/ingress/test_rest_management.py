"""REST management: bodies, statuses and what the answers look like; over real sockets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.core.api import Api
from gateway.management_access import Restrictions
from gateway.protocol.options import ProtocolOptions
from tests.ingress.oip_bench import Answer, Bench, check, http, infer, oip_bench

OFF = "explicit model load / unload is not allowed if polling is enabled"
REGION = "/v2/systemsharedmemory/region/r"


async def ask(bench: Bench, method: str, path: str, body: Any = b"") -> Answer:
    return await bench.ask(http(method, path, body if isinstance(body, bytes) else json.dumps(body).encode()))


def empty(answer: Answer) -> None:
    assert (answer.status, answer.body) == (200, b"")
    assert answer["Content-Type"] == "application/json"
    assert answer["X-Request-Id"]


async def test_every_document_is_what_management_says() -> None:
    async with oip_bench() as bench:
        m = bench.management
        for path, document in (
            ("/v2", m.server_metadata()),
            ("/v2/models", {"models": ["numbers"]}),
            ("/v2/models/numbers", m.model_metadata("numbers")),
            ("/v2/models/numbers/config", m.model_config("numbers")),
            ("/v2/models/numbers/versions/1/config", m.model_config("numbers", "1")),
            ("/v2/models/stats", m.statistics()),
            ("/v2/models/numbers/stats", m.statistics("numbers")),
            ("/v2/models/numbers/versions/2/stats", m.statistics("numbers", "2")),
            ("/v2/trace/setting", m.trace_settings()),
            ("/v2/models/numbers/trace/setting", m.trace_settings("numbers")),
            ("/v2/logging", m.log_settings()),
            ("/v2/systemsharedmemory/status", []),
            ("/v2/cudasharedmemory/status", []),
        ):
            answer = await ask(bench, "GET", path)
            assert (answer.status, answer.document) == (200, document), path
            assert answer["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/v2/models/none", 404, "unknown model: 'none'"),
        ("/v2/models/none/config", 404, "unknown model: 'none'"),
        ("/v2/models/none/ready", 404, "unknown model: 'none'"),
        ("/v2/models/none/stats", 400, "requested model 'none' is not available"),
        ("/v2/models/numbers/versions/9/stats", 400, "requested model version is not available"),
        ("/v2/models/none/trace/setting", 404, "Request for unknown model : none"),
        ("/v2/systemsharedmemory/region/r/status", 404, "Unable to find system shared memory region: 'r'"),
    ],
)
async def test_unknown_models_and_regions(path: str, status: int, text: str) -> None:
    async with oip_bench() as bench:
        answer = await ask(bench, "GET", path)
        assert answer.status == status
        assert text in answer.error


async def test_the_index_takes_an_empty_body_and_none_at_all() -> None:
    async with oip_bench() as bench:
        entries = [{"name": "numbers", "version": version, "state": "READY"} for version in "12"]
        await bench.catalog.unload("numbers")
        gone = [entry | {"state": "UNAVAILABLE", "reason": "unloaded"} for entry in entries]
        await bench.serve()
        for body in (b"", b" \n", {}, {"ready": False}, {"unknown": 1}):
            answer = await ask(bench, "POST", "/v2/repository/index", body)
            assert (answer.status, answer.document) == (200, [entries[0], gone[1]])
        lengthless = b"POST /v2/repository/index HTTP/1.1\r\nHost: test\r\n\r\n"
        assert (await bench.ask(lengthless)).document == [entries[0], gone[1]]
        ready = await ask(bench, "POST", "/v2/repository/some/index", {"ready": True})
        assert ready.document == [entries[0]]


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/v2/repository/index", {"ready": "yes"}, 400, "'ready' must be true or false"),
        ("/v2/repository/index", {"ready": None}, 400, "'ready' must be true or false"),
        ("/v2/repository/index", [], 400, "must be an object"),
        ("/v2/repository/index", b"{", 400, "failed to parse the request JSON buffer"),
        ("/v2/repository/index", b"x" * (1024 * 1024 + 1), 413, "may have at most 1048576 bytes"),
        ("/v2/repository/models/m/load", b"{", 400, "failed to parse the request JSON buffer"),
        ("/v2/repository/models/m/load", b" " * 300_000 + b"[", 400, "failed to parse"),
        ("/v2/repository/models/m/load", {"parameters": []}, 400, "'parameters' must be an object"),
        ("/v2/repository/models/m/load", b"", 503, OFF),
        ("/v2/repository/models/m/unload", b"", 503, OFF),
        ("/v2/repository/models/m/unload", {"parameters": {"unload_dependents": 1}}, 400, "unload_dependents"),
        ("/v2/repository/r/models/m/load", b"", 501, "'repository_name' specification is not supported"),
        ("/v2/repository/r/models/m/unload", b"", 501, "'repository_name' specification is not supported"),
        ("/v2/repository/models/%20/load", b"", 400, "Model name cannot be empty"),
        ("/v2/trace/setting", b"", 400, "failed to parse the request JSON buffer"),
        ("/v2/trace/setting", {"trace_rate": "x"}, 400, "Unable to parse 'trace_rate', got: x"),
        ("/v2/trace/setting", {"trace_rate": 5}, 400, "'trace_rate' must be a string"),
        ("/v2/trace/setting", {"trace_file": "y"}, 501, "trace file location can not be updated"),
        ("/v2/models/none/trace/setting", {}, 404, "unknown model : none"),
        ("/v2/logging", b"", 400, "failed to parse the request JSON buffer"),
        ("/v2/logging", {"log_info": 1}, 400, "expect boolean for 'log_info'"),
        ("/v2/logging", {"log_file": "y"}, 501, "log file location can not be updated"),
        ("/v2/logging", {"log_format": "xml"}, 503, "invalid argument for log_format, got: xml"),
        ("/v2/cudasharedmemory/region/r/register", {}, 400, "GPUs not supported"),
        (f"{REGION}/register", b"", 400, "failed to parse the request JSON buffer"),
        (f"{REGION}/register", {}, 400, "Shared memory register request has no 'key' field"),
        (f"{REGION}/register", {"key": "/k"}, 400, "Shared memory register request has no 'byte_size' field"),
        (f"{REGION}/register", {"key": 1, "byte_size": 1}, 400, "'key' must be a string"),
        (f"{REGION}/register", {"key": "/k", "byte_size": -1}, 400, "'byte_size' must be a whole number"),
        (f"{REGION}/register", {"key": "/k", "byte_size": 1, "offset": 1.5}, 400, "'offset' must be a whole number"),
        (f"{REGION}/register", {"key": "/k", "byte_size": 1}, 501, "--allow-client-shm"),
        (f"{REGION}/unregister", b"", 501, "--allow-client-shm"),
        ("/v2/systemsharedmemory/unregister", b"", 501, "--allow-client-shm"),
    ],
)
async def test_refusals(path: str, body: Any, status: int, text: str) -> None:
    async with oip_bench() as bench:
        answer = await ask(bench, "POST", path, body)
        assert answer.status == status
        assert text in answer.error


async def test_settings_are_echoed_whole_and_null_resets() -> None:
    async with oip_bench() as bench:
        path = "/v2/models/numbers/trace/setting"
        answer = await ask(bench, "POST", path, {"trace_rate": "5", "trace_count": "2", "nope": 1})
        assert answer.document == bench.management.trace_settings("numbers")
        assert (answer.document["trace_rate"], answer.document["trace_count"]) == ("5", "2")
        answer = await ask(bench, "POST", path, {"trace_rate": None})
        assert answer.document["trace_rate"] == "1000"
        assert (await ask(bench, "GET", "/v2/trace/setting")).document["trace_count"] == "-1"
        assert (await ask(bench, "POST", "/v2/logging", {})).document == bench.management.log_settings()


@pytest.mark.parametrize(("triton", "status"), [(False, 400), (True, 500)])
async def test_the_status_of_malformed_bodies_can_be_tritons(triton: bool, status: int) -> None:
    async with oip_bench(options=ProtocolOptions(triton_status_codes=triton)) as bench:
        for path, body in (("/v2/logging", b"{"), ("/v2/repository/models/m/load", b"{")):
            assert (await ask(bench, "POST", path, body)).status == status
        assert (await ask(bench, "POST", "/v2/trace/setting", {"trace_rate": "x"})).status == 400


GROUPS: list[tuple[Api, str, str]] = [
    ("health", "GET", "/v2/health/live"),
    ("health", "GET", "/v2/models/numbers/ready"),
    ("metadata", "GET", "/v2"),
    ("metadata", "GET", "/v2/models/numbers"),
    ("inference", "POST", "/v2/models/numbers/infer"),
    ("shared-memory", "GET", "/v2/systemsharedmemory/status"),
    ("model-config", "GET", "/v2/models/numbers/config"),
    ("model-repository", "POST", "/v2/repository/index"),
    ("statistics", "GET", "/v2/models/stats"),
    ("trace", "GET", "/v2/trace/setting"),
    ("logging", "GET", "/v2/logging"),
]


@pytest.mark.parametrize(("api", "method", "path"), GROUPS)
async def test_a_restricted_api_needs_its_header_and_no_other_api_does(api: Api, method: str, path: str) -> None:
    body = infer([4, 5]).partition(b"\r\n\r\n")[2] if api == "inference" else b""
    async with oip_bench(restrictions=Restrictions({api: ("X-Key", "open")})) as bench:
        for header in ((), ("X-Key: shut",), ("X-Other: open",)):
            answer = await bench.ask(http(method, path, body, *header))
            assert (answer.status, answer.error) == (403, "This API is restricted, expecting header 'X-Key'")
            assert "open" not in answer.error
        answer = await bench.ask(http(method, path, body, "x-kEY: open"))
        assert answer.status == 200
        for other, verb, place in GROUPS:
            if other not in (api, "inference"):
                assert (await bench.ask(http(verb, place))).status == 200, place
        if api != "inference":
            check(await bench.ask(infer([4, 5])), [4, 5])
