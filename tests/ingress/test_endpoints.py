"""Which path means what on the data port, and what everything but inference answers; over real sockets."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gateway import __version__, plan
from gateway.errors import ModelError
from gateway.management import EXTENSIONS
from tests.ingress.oip_bench import Answer, Bench, check, http, infer, oip_bench

UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
BODY = infer([4, 5]).partition(b"\r\n\r\n")[2]

GETS = [
    "/v2",
    "/v2/",
    "/v2?verbose=1",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/health/ready?x=/v2/nope",
    "/v2/models",
    "/v2/models/numbers",
    "/v2/models/numbers/ready",
    "/v2/models/numbers/provenance",
    "/v2/models/numbers/config",
    "/v2/models/numbers/stats",
    "/v2/models/numbers/versions/2/config",
    "/v2/models/numbers/versions/2/stats",
    "/v2/models/stats",
    "/v2/openapi.json",
    "/v2/systemsharedmemory/status",
    "/v2/cudasharedmemory/status",
    "/v2/models/numbers/versions/1",
    "/v2/models/numbers/versions/1/ready",
    "/v2/models/numbers/versions/2/provenance",
    "/v2/models/%6Eumbers/versions/%31/read%79",
    "/%762/m%6fdels/numbers",
    "http://test/v2/health/live",
]
POSTS = [
    "/v2/models/numbers/infer",
    "/v2/models/numbers/infer?a=b",
    "/v2/models/numbers/versions/1/infer",
    "/v2/models/num%62ers/versions/2/inf%65r",
]
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]
NOWHERE = [
    "/",
    "//v2",
    "/v2//",
    "/v2x",
    "/V2",
    "/v1/models/numbers",
    "/v2/health",
    "/v2/health/",
    "/v2/health/live/",
    "/v2/health/ready/",
    "/v2%2Fhealth%2Flive",
    "/v2/models/",
    "/v2/models//infer",
    "/v2/models/numbers/",
    "/v2/models/numbers/infer/",
    "/v2/models/numbers/infer/x",
    "/v2/models/numbers/Infer",
    "/v2/models/numbers/configs",
    "/v2/models/stats/",
    "/v2/models/numbers/versions/1/trace/setting",
    "/v2/trace",
    "/v2/systemsharedmemory/region//status",
    "/v2/models/numbers/versions",
    "/v2/models/numbers/versions/",
    "/v2/models/numbers/versions//infer",
    "/v2/models/numbers/versions/1/",
    "/v2/models/numbers/versions/1/versions/2",
    "/v2/repository",
    "/v2/repository//index",
    "/v2/repository/index/x",
    "/v2/repository/models//load",
    "/v2/models/%ff/infer",
    "/v2/models/numbers%C3/ready",
    "/v2/models/%ed%a0%80",
    "/metrics",
]


def valid(answer: Answer) -> None:
    assert UUID7.fullmatch(answer["X-Request-Id"])
    assert answer["Content-Type"] == "application/json"


async def test_every_path_answers_its_own_method_and_refuses_the_others() -> None:
    async with oip_bench() as bench:
        client = await bench.client()
        ids = set()
        for path in GETS + POSTS:
            own = "POST" if path in POSTS else "GET"
            for method in METHODS:
                answer = await client.ask(
                    http(method, path, b"" if method in {"GET", "HEAD"} else BODY), bodiless=method == "HEAD"
                )
                valid(answer)
                ids.add(answer["X-Request-Id"])
                assert (answer.status, "Allow" in answer) == ((200, False) if method == own else (405, True)), path
                if method == own == "POST":
                    check(answer, [4, 5])
                elif method != own:
                    assert answer["Allow"] == own
                    assert method == "HEAD" or answer.error == "Method Not Allowed"
        assert len(ids) == len(GETS + POSTS) * len(METHODS)


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_every_other_path_is_not_found(method: str) -> None:
    async with oip_bench() as bench:
        client = await bench.client()
        for path in NOWHERE:
            answer = await client.ask(http(method, path))
            assert (answer.status, answer.error) == (404, "Not Found"), path
            valid(answer)
            assert "Allow" not in answer


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/v2/models/x", "Request for unknown model: 'x' is not found"),
        ("/v2/models/x/ready", "Request for unknown model: 'x' is not found"),
        ("/v2/models/x/provenance", "Request for unknown model: 'x' is not found"),
        ("/v2/models/x/infer", "Request for unknown model: 'x' is not found"),
        ("/v2/models/stats/ready", "Request for unknown model: 'stats' is not found"),
        ("/v2/models/x/config", "Request for unknown model: 'x' is not found"),
        ("/v2/models/numbers%2Fready", "Request for unknown model: 'numbers/ready' is not found"),
        ("/v2/models/%00%0D%0A/infer", "Request for unknown model: '\0\r\n' is not found"),
        ("/v2/models/caf%C3%A9/infer", "Request for unknown model: 'café' is not found"),
        ("/v2/models/%zz", "Request for unknown model: '%zz' is not found"),
        ("/v2/models/numbers/versions/3", "Request for unknown model: 'numbers' version 3 is not found"),
        ("/v2/models/numbers/versions/01/ready", "Request for unknown model: 'numbers' version 01 is not found"),
        ("/v2/models/numbers/versions/abc/infer", "Request for unknown model: 'numbers' version abc is not found"),
        ("/v2/models/numbers/versions/-1/infer", "Request for unknown model: 'numbers' version -1 is not found"),
        ("/v2/models/versions/versions/versions", "Request for unknown model: 'versions' is not found"),
    ],
)
async def test_unknown_models_and_versions(path: str, text: str) -> None:
    async with oip_bench() as bench:
        method = "POST" if path.endswith("/infer") else "GET"
        answer = await bench.ask(http(method, path, BODY if method == "POST" else b""))
        assert (answer.status, answer.error) == (404, text)
        valid(answer)
        assert "Inference-Model" not in answer


async def test_bytes_that_cannot_stand_in_a_path_are_refused() -> None:
    async with oip_bench() as bench:
        answer = await bench.ask(http("GET", "/v2/models/\xff\xfe"))
        assert answer.status == 400
        assert answer.error


async def document(bench: Bench, path: str) -> Any:
    answer = await bench.ask(http("GET", path))
    assert answer.status == 200, answer.body
    return answer.document


async def test_server_metadata_and_models() -> None:
    async with oip_bench() as bench:
        assert await document(bench, "/v2") == {
            "name": "oip-gateway",
            "version": __version__,
            "extensions": [name for name in EXTENSIONS if name != "system_shared_memory"],  # it is off
        }
        await bench.serve("another")
        assert await document(bench, "/v2/models") == {"models": ["another", "numbers"]}
        assert await document(bench, "/v2/health/live") == {"live": True}


async def test_server_readiness_is_what_the_application_says() -> None:
    async with oip_bench() as bench:
        assert await document(bench, "/v2/health/ready") == {"ready": True}
        bench.ready = False
        answer = await bench.ask(http("GET", "/v2/health/ready"))
        assert (answer.status, answer.document) == (503, {"ready": False, "reason": "it is stopping"})
        assert await document(bench, "/v2/health/live") == {"live": True}


def metadata(name: str, versions: list[str]) -> dict[str, Any]:
    return {
        "name": name,
        "versions": versions,
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "number", "datatype": "INT64", "shape": [-1, 1]}],
        "outputs": [
            {"name": "triple", "datatype": "INT64", "shape": [-1, 1]},
            {"name": "name", "datatype": "BYTES", "shape": [-1, 1]},
        ],
    }


async def test_model_metadata_lists_the_ready_versions() -> None:
    async with oip_bench() as bench:
        await bench.serve(version="10")
        assert await document(bench, "/v2/models/numbers") == metadata("numbers", ["1", "2", "10"])
        assert await document(bench, "/v2/models/numbers/versions/2") == metadata("numbers", ["2"])
        bench.catalog.failed("numbers", "10", "crashes")
        assert await document(bench, "/v2/models/numbers") == metadata("numbers", ["1", "2"])


@pytest.mark.parametrize("max_batch_size", [0, 8])
async def test_the_batch_dimension_is_shown_once(max_batch_size: int) -> None:
    async with oip_bench(models=False) as bench:
        await bench.serve("m", max_batch_size=max_batch_size)
        assert await document(bench, "/v2/models/m") == metadata("m", ["1"])


async def test_a_model_that_failed_to_load() -> None:
    async with oip_bench() as bench:
        await bench.serve("broken", refuse=ModelError("the graph is odd"))
        answer = await bench.ask(http("GET", "/v2/models/broken/ready"))
        why = "the graph is odd"
        assert (answer.status, answer.document) == (503, {"name": "broken", "ready": False, "reason": why})
        for method, path in (("GET", "/v2/models/broken"), ("POST", "/v2/models/broken/versions/1/infer")):
            answer = await bench.ask(http(method, path, BODY if method == "POST" else b""))
            assert answer.status == 503
            assert answer.error == "Request for model 'broken' version 1, which is not at ready state: the graph is odd"
            assert int(answer["Retry-After"]) >= 1
            valid(answer)
        check(await bench.ask(infer([2])), [2])


async def test_model_readiness_follows_its_workers() -> None:
    async with oip_bench() as bench:
        for path in ("/v2/models/numbers/ready", "/v2/models/numbers/versions/2/ready"):
            assert await document(bench, path) == {"name": "numbers", "ready": True}
        bench.catalog.failed("numbers", "2", "crashes")
        answer = await bench.ask(http("GET", "/v2/models/numbers/versions/2/ready"))
        why = {"name": "numbers", "ready": False, "reason": "crashes"}
        assert (answer.status, answer.document) == (503, why)
        assert await document(bench, "/v2/models/numbers/ready") == {"name": "numbers", "ready": True}
        bench.catalog.recovered("numbers", "2")
        assert await document(bench, "/v2/models/numbers/versions/2/ready") == {"name": "numbers", "ready": True}


async def test_a_version_that_failed_while_serving_refuses_counts_and_says_which_it_is() -> None:
    async with oip_bench() as bench:
        version = bench.catalog.find("numbers", "2")
        bench.catalog.failed("numbers", "2", "its worker crashed")
        answer = await bench.ask(http("POST", "/v2/models/numbers/versions/2/infer", BODY))
        assert answer.status == 503
        assert "version 2, which is not at ready state: its worker crashed" in answer.error
        assert answer["Inference-Model"].startswith('"numbers";version="2";digest="sha256:1212')
        assert "Retry-After" in answer
        assert version.statistics.protocol("http").codes == {503: 1}
        assert version.statistics.failures["REJECTED"] == 1
        check(await bench.ask(infer([3])), [3])


async def test_provenance_is_the_manifest_of_each_version() -> None:
    async with oip_bench() as bench:
        for path, version in (("", "2"), ("/versions/1", "1"), ("/versions/2", "2")):
            found = await document(bench, f"/v2/models/numbers{path}/provenance")
            assert found == plan.manifest_of(bench.catalog.find("numbers", version))
            assert (found["version"], found["digest"]) == (version, "sha256:" + "12" * 32)
            assert found["files"] == [{"path": "model.onnx", "size": 5, "sha256": "ab" * 32}]


async def test_provenance_outlives_a_crash_and_explains_a_bad_sidecar() -> None:
    async with oip_bench() as bench:
        bench.catalog.failed("numbers", "2", "crashes")
        assert (await document(bench, "/v2/models/numbers/versions/2/provenance"))["version"] == "2"
        await bench.serve("odd", sidecar=b"{")
        answer = await bench.ask(http("GET", "/v2/models/odd/provenance"))
        assert answer.status == 500
        assert "odd/1/provenance.json" in answer.error
        check(await bench.ask(infer([9], model="odd")), [9])


async def test_a_route_that_was_remembered_means_the_newest_version_at_each_request() -> None:
    async with oip_bench() as bench:
        client = await bench.client()
        seen = []
        for event in ("", "failed", "recovered"):
            if event == "failed":
                bench.catalog.failed("numbers", "2", "crashes")
            elif event == "recovered":
                bench.catalog.recovered("numbers", "2")
            answer = await client.ask(infer([1]))
            check(answer, [1])
            seen.append(answer.document["model_version"])
        assert seen == ["2", "1", "2"]
        assert bench.server.statistics().remembered_heads == 1


async def test_a_fault_of_ours_is_a_500_that_harms_nobody_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with oip_bench() as bench:

        def broken(*_: object) -> None:
            raise ZeroDivisionError("secret detail")

        client = await bench.client()
        with monkeypatch.context() as patch:
            patch.setattr(type(bench.pipeline), "infer", broken)
            answer = await client.ask(infer([1]))
        assert (answer.status, answer.error) == (500, "the gateway failed on this request")
        valid(answer)
        assert answer["Inference-Model"].startswith('"numbers"')
        assert bench.catalog.find("numbers", None).statistics.protocol("http").codes == {500: 1}
        assert "secret detail" in caplog.text
        check(await client.ask(infer([1])), [1])
