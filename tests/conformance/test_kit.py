"""The kit itself: a sound server passes, and each way of being wrong is noticed by the check that is there for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.conformance import rest, rpc
from tests.conformance.__main__ import as_json, examine, main
from tests.conformance.checks import CHECKS, Result, Verdict
from tests.conformance.subject import Subject, Unexaminable

TENSOR = {"datatype": "FP32", "shape": [-1, 2]}
METADATA = {
    "name": "twice",
    "versions": ["1"],
    "platform": "python",
    "inputs": [{"name": "x", **TENSOR}],
    "outputs": [{"name": "y", **TENSOR}, {"name": "z", **TENSOR}],
}
Fault = Callable[["SmallServer", str, str, dict[str, Any]], tuple[int, Any] | None]


class SmallServer(BaseHTTPRequestHandler):
    """The protocol in a page: the model `twice` gives y = 2x and z = x. `fault` may answer instead."""

    fault: Fault

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def _handle(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            request = json.loads(body or b"{}")
            status, document = type(self).fault(self, method, self.path, request) or answer(method, self.path, request)
        except ValueError as error:
            status, document = 400, {"error": f"no JSON: {error}"}
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def answer(method: str, path: str, request: dict[str, Any]) -> tuple[int, Any]:
    model = path.replace("/versions/1", "").removeprefix("/v2/models/twice")
    known: dict[str, Any] = {
        "/v2": {"name": "small", "version": "1", "extensions": []},
        "/v2/health/live": {"live": True},
        "/v2/health/ready": {"ready": True},
        "/v2/models": {"models": ["twice"]},
    }
    if path in known:
        return 200, known[path]
    if path.startswith("/v2/models/twice") and model in ("", "/ready", "/infer"):
        if model == "/infer":
            return (405, {"error": "Method Not Allowed"}) if method == "GET" else infer(request)
        return 200, METADATA if not model else {"name": "twice", "ready": True}
    return 404, {"error": f"{path} is not found"}


def infer(request: dict[str, Any]) -> tuple[int, Any]:
    wanted = [output["name"] for output in request.get("outputs") or []] or ["y", "z"]
    if len(request["inputs"]) != 1 or not set(wanted) <= {"y", "z"}:
        return 400, {"error": "unexpected inputs or outputs"}
    tensor = request["inputs"][0]
    data = [leaf for row in tensor["data"] for leaf in (row if isinstance(row, list) else [row])]
    if tensor.get("datatype") != "FP32" or tensor.get("shape") != [len(data) // 2, 2] or len(data) % 2:
        return 400, {"error": "the input does not fit the model"}
    columns = {"y": [2 * value for value in data], "z": data}
    outputs = [{"name": n, "datatype": "FP32", "shape": tensor["shape"], "data": columns[n]} for n in wanted]
    document: dict[str, Any] = {"model_name": "twice", "model_version": "1", "outputs": outputs}
    return 200, document | ({"id": request["id"]} if "id" in request else {})


@contextmanager
def served(fault: Fault) -> Iterator[str]:
    handler = type("Handler", (SmallServer,), {"fault": staticmethod(fault)})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def results_of(fault: Fault) -> dict[str, Result]:
    with served(fault) as url, Subject(url) as subject:
        subject.prepare()
        return {result.check.id: result for result in examine(subject)}


def sound(server: SmallServer, method: str, path: str, request: dict[str, Any]) -> None:
    return None


def test_a_sound_server_fails_nothing_and_what_it_lacks_is_not_held_against_it() -> None:
    results = results_of(sound)
    failed = {name: result.seen for name, result in results.items() if result.verdict is Verdict.FAILED}
    # It has no gzip; that is a recommendation it does not follow, and it says so with an error.
    assert failed == {}
    assert results["binary-in"].verdict is Verdict.NOT_OFFERED
    assert results["grpc-infer-raw"].verdict is Verdict.NOT_OFFERED


def _no_live(server: SmallServer, method: str, path: str, request: dict[str, Any]) -> tuple[int, Any] | None:
    return (404, {"error": "x"}) if path.endswith("/live") else None


def _unknown_is_ready(server: SmallServer, method: str, path: str, request: dict[str, Any]) -> tuple[int, Any] | None:
    return (200, {}) if path == "/v2/models/no-such-model/ready" else None


def _no_extensions(server: SmallServer, method: str, path: str, request: dict[str, Any]) -> tuple[int, Any] | None:
    return (200, {"name": "small", "version": "1"}) if path == "/v2" else None


def _padding(server: SmallServer, method: str, path: str, request: dict[str, Any]) -> tuple[int, Any] | None:
    tensor = (request.get("inputs") or [{}])[0]
    if path.endswith("/infer") and tensor.get("data") == [0.0] and "shape" in tensor:
        return infer({"inputs": [{**tensor, "data": [*tensor["data"], 0.0]}]})
    return None


def _all_outputs(server: SmallServer, method: str, path: str, request: dict[str, Any]) -> tuple[int, Any] | None:
    return infer({k: v for k, v in request.items() if k != "outputs"}) if "outputs" in request else None


def _forgets_id(server: SmallServer, method: str, path: str, request: dict[str, Any]) -> tuple[int, Any] | None:
    return infer({k: v for k, v in request.items() if k != "id"}) if "id" in request else None


def _nested_backwards(server: SmallServer, method: str, path: str, request: dict[str, Any]) -> tuple[int, Any] | None:
    data = (request.get("inputs") or [{}])[0].get("data") or [0]
    if not isinstance(data[0], list):
        return None
    return infer({"inputs": [{**request["inputs"][0], "data": [row[::-1] for row in data]}]})


def _error_as_detail(server: SmallServer, method: str, path: str, request: dict[str, Any]) -> tuple[int, Any] | None:
    return (404, {"detail": "nope"}) if "no-such-model" in path else None


def _server_fault(server: SmallServer, method: str, path: str, request: dict[str, Any]) -> tuple[int, Any] | None:
    kinds = [tensor.get("datatype") for tensor in request.get("inputs") or []]
    return (500, {"error": "boom"}) if "FP99" in kinds else None


@pytest.mark.parametrize(
    ("fault", "caught"),
    [
        (_no_live, {"server-live", "health-bodies"}),
        (_unknown_is_ready, {"unknown-model-not-ready"}),
        (_no_extensions, {"server-metadata"}),
        (_padding, {"too-few-elements"}),
        (_all_outputs, {"requested-outputs-only", "unknown-output"}),
        (_forgets_id, {"id-is-echoed"}),
        (_nested_backwards, {"nested-data"}),
        (_error_as_detail, {"unknown-model", "unknown-model-metadata"}),
        (_server_fault, {"unknown-datatype"}),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_each_fault_is_noticed_by_its_checks_and_by_no_other(fault: Fault, caught: set[str]) -> None:
    results = results_of(fault)
    assert {name for name, result in results.items() if result.verdict is Verdict.FAILED} == caught


def test_a_server_without_an_answering_model_cannot_be_examined() -> None:
    def broken(server: SmallServer, method: str, path: str, request: dict[str, Any]) -> tuple[int, Any] | None:
        return (500, {"error": "no"}) if path.endswith("/infer") else None

    with served(broken) as url, Subject(url) as subject, pytest.raises(Unexaminable, match="twice"):
        subject.prepare()


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with served(sound) as url:
        assert main([url]) == 0
    with served(_forgets_id) as url:
        assert main([url]) == 1
    assert main(["http://127.0.0.1:1"]) == 2
    assert "id-is-echoed" in capsys.readouterr().out


def test_every_check_says_what_has_to_hold_where_it_stands_and_has_a_name_of_its_own() -> None:
    assert len({found.id for found in CHECKS}) == len(CHECKS) > 70
    assert all(found.what.endswith(".") and found.source for found in CHECKS)
    assert {found.level for found in CHECKS} == {"required", "recommended", "extension"}
    assert any(found.section == rest.REFUSALS for found in CHECKS)
    assert any(found.section == rpc.INFER for found in CHECKS)


def test_results_as_json_hold_every_check() -> None:
    with served(sound) as url, Subject(url) as subject:
        subject.prepare()
        rows = json.loads(as_json(subject, examine(subject)))["checks"]
    assert [row["id"] for row in rows] == [found.id for found in CHECKS]
