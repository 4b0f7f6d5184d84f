"""What every answer promises: headers and their grammar, errors, the provenance document, names of metrics."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import http.client
import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as exposition
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.contract.black_box import (
    DIGEST,
    UUID7,
    Answer,
    ask,
    configuration,
    coreutils_digest,
    item,
    put,
    request,
)
from tests.live.gateway_process import GatewayProcess, gateway, until

pytestmark = pytest.mark.slow
LINEAGE = {"run_id": "run-1", "git_commit": "0123456789abcdef0123456789abcdef01234567"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers")


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[GatewayProcess]:
    """Version 3 of `m` multiplies by 3 and has lineage, `plain` by 5 and has none; batches wait for company."""
    (put(root / "models", "m", "3", 3.0) / "provenance.json").write_text(json.dumps(LINEAGE))
    put(root / "models", "plain", "1", 5.0)
    document = {
        "server": {"drain_delay_s": 0, "workers": 1},
        "inference_log": {"directory": "log"},
        "models": [
            {"name": "m", "source": "models/m", "max_queue_delay_ms": 250},
            {"name": "plain", "source": "models/plain"},
        ],
    }
    with gateway("serve", "-c", str(configuration(root / "gateway.yaml", document))) as process:
        yield process


def families(process: GatewayProcess, accept: str = "") -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", process.operations_port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics", headers={"Accept": accept} if accept else {})
        text = connection.getresponse().read().decode()
    parse = openmetrics if accept else exposition
    return {family.name: family for family in parse(text)}


def message(model: str, version: str = "", **more: Any) -> Any:
    made = service_pb2.ModelInferRequest(model_name=model, model_version=version, **more)
    made.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    made.raw_input_contents.append(np.array([1, 2], np.float32).tobytes())
    return made


# -- headers -----------------------------------------------------------------------------------------------------------


def test_the_headers_of_an_answer(served: GatewayProcess, root: Path) -> None:
    answer = ask(served, "m", request(2, id="the caller's"))
    assert answer.status == 200
    assert UUID7.fullmatch(answer.id)
    name, parameters = item(answer.headers["inference-model"])
    assert (name, list(parameters)) == ("m", ["version", "digest"])
    assert parameters["version"] == "3", "a String, not an Integer"
    assert parameters["digest"] == coreutils_digest(root / "models/m/3")
    backend, how = item(answer.headers["inference-backend"])
    assert (backend, how) == ("onnx-1", {"attempt": 1})
    batch, place = item(answer.headers["inference-batch"])
    assert re.fullmatch(r"[0-9a-f]+-\d+", str(batch))
    assert place == {"size": 2, "row": 0}
    timing = re.fullmatch(
        r"queue;dur=([\d.]+), infer;dur=([\d.]+), total;dur=([\d.]+)", answer.headers["server-timing"]
    )
    assert timing is not None, answer.headers["server-timing"]
    queue, infer, total = map(float, timing.groups())
    assert 0 <= queue <= total
    assert 0 < infer <= total
    assert answer.document["id"] == "the caller's"


def test_a_client_s_request_id_does_not_replace_ours(served: GatewayProcess) -> None:
    mine = str(uuid.uuid4())
    answers = [ask(served, "plain", X_Request_Id=mine) for _ in range(3)]
    ids = [answer.id for answer in answers]
    assert mine not in ids
    assert len(set(ids)) == len(ids)
    times = [one[:13] for one in ids]
    assert times == sorted(times), "UUIDv7 begin with the time in milliseconds"
    assert "id" not in answers[0].document, "an id that nobody gave is not invented"


def test_request_parameters_are_never_echoed(served: GatewayProcess) -> None:
    answer = ask(served, "plain", request(parameters={"customer": "secret", "priority": 1}))
    assert answer.status == 200
    assert "parameters" not in answer.document
    assert b"secret" not in answer.body + json.dumps(answer.headers).encode()


def test_requests_that_shared_a_batch_say_so(served: GatewayProcess) -> None:
    def two() -> list[Answer]:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda rows: ask(served, "m", request(rows)), (2, 3)))

    def together() -> bool:
        answers = two()
        told = [item(answer.headers["inference-batch"]) for answer in answers]
        if told[0][0] != told[1][0]:
            return False
        assert [place["size"] for _, place in told] == [5, 5]
        assert (told[0][1]["row"], told[1][1]["row"]) in {(0, 2), (3, 0)}
        return True

    until(together, 60, "two requests at a time never shared a batch")


def test_grpc_tells_the_same_as_initial_metadata(served: GatewayProcess, root: Path) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        answer, call = infer.with_call(message("m", id="mine"), timeout=60, metadata=(("x-request-id", "theirs"),))
        told = dict(call.initial_metadata())
        assert answer.id == "mine"
        assert UUID7.fullmatch(told["x-request-id"])
        digest = coreutils_digest(root / "models/m/3")
        assert item(told["inference-model"]) == ("m", {"version": "3", "digest": digest})
        assert item(told["inference-backend"]) == ("onnx-1", {"attempt": 1})
        assert item(told["inference-batch"])[1] == {"size": 1, "row": 0}
        assert told["server-timing"].startswith("queue;dur=")
        wrong = message("m")
        wrong.inputs[0].datatype = "INT32"
        for sent, code, known in ((wrong, "INVALID_ARGUMENT", True), (message("nobody"), "NOT_FOUND", False)):
            with pytest.raises(grpc.RpcError) as refused:
                infer(sent, timeout=60)
            assert refused.value.code().name == code
            told = dict(refused.value.initial_metadata() or ()) or dict(refused.value.trailing_metadata())
            assert UUID7.fullmatch(told["x-request-id"])
            assert ("inference-model" in told) is known


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "known"),
    [
        ("/v2/models/m/infer", b"{", 400, True),
        ("/v2/models/m/infer", b'{"inputs":[]}', 400, True),
        ("/v2/models/m/versions/3/infer", request().replace(b"FP32", b"INT32"), 400, True),
        ("/v2/models/m/generate", b"{}", 400, True),
        ("/v2/models/nobody/infer", request(), 404, False),
        ("/v2/models/m/versions/4/infer", request(), 404, False),
    ],
)
def test_errors_have_the_protocol_s_form(
    served: GatewayProcess, path: str, body: bytes, status: int, known: bool
) -> None:
    answer = Answer(*served.request("POST", path, body))
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.document) == ["error"]
    assert answer.document["error"]
    assert UUID7.fullmatch(answer.id)
    if known:
        assert answer.model()["version"] == "3"
        assert DIGEST.fullmatch(answer.model()["digest"])
    else:
        assert "inference-model" not in answer.headers
    assert "inference-backend" not in answer.headers, "nobody executed it"
    assert "inference-batch" not in answer.headers


# -- provenance --------------------------------------------------------------------------------------------------------


def test_the_manifest_is_what_is_behind_the_digest(served: GatewayProcess, root: Path) -> None:
    newest, exact = (Answer(*served.request("GET", f"/v2/models/m{path}/provenance")) for path in ("", "/versions/3"))
    assert newest.status == 200
    assert newest.headers["content-type"] == "application/json"
    assert newest.document == exact.document
    told = newest.document
    digest = coreutils_digest(root / "models/m/3")
    assert (told["name"], told["version"], told["digest"]) == ("m", "3", digest)
    assert [file["path"] for file in told["files"]] == ["model.onnx", "provenance.json"]
    for file in told["files"]:
        assert file["size"] == (root / "models/m/3" / file["path"]).stat().st_size
    listing = "".join(f"{file['sha256']}  {file['path']}\n" for file in told["files"])
    assert hashlib.sha256(listing.encode()).hexdigest() == digest.removeprefix("sha256:")
    assert told["source"].endswith("models/m/3")
    assert {key: told[key] for key in LINEAGE} == LINEAGE
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", told["runtime"]["onnxruntime"])


def test_what_is_unknown_is_listed_as_unknown(served: GatewayProcess) -> None:
    told = json.loads(served.request("GET", "/v2/models/plain/provenance")[2])
    assert {"run_id", "git_commit", "immutable_id"} <= set(told["unknown"])
    for key in told["unknown"]:
        assert told.get(key) is None, f"{key} is unknown and has a value"
    known = json.loads(served.request("GET", "/v2/models/m/provenance")[2])
    assert not {"run_id", "git_commit"} & set(known["unknown"])


@pytest.mark.parametrize("path", ["/v2/models/nobody/provenance", "/v2/models/m/versions/9/provenance"])
def test_provenance_of_what_is_not_there(served: GatewayProcess, path: str) -> None:
    answer = Answer(*served.request("GET", path))
    assert (answer.status, list(answer.document)) == (404, ["error"])
    assert answer.headers["content-type"] == "application/json"


# -- the operations port -----------------------------------------------------------------------------------------------

NAMES = {
    "gateway_requests": {"model", "version", "protocol", "code"},
    "gateway_request_duration_seconds": {"model", "version", "protocol"},
    "gateway_phase_duration_seconds": {"model", "version", "phase"},
    "gateway_batch_rows": {"model", "version"},
    "gateway_batches": {"model", "version", "reason"},
    "gateway_inference_log_records": {"sink"},
    "gateway_inference_log_dropped": {"sink"},
    "gateway_build_info": {"version", "python", "onnxruntime"},
}
KINDS = {"gateway_build_info": "gauge", "gateway_batch_rows": "histogram"}


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_metrics_have_the_names_and_labels_promised(served: GatewayProcess, accept: str) -> None:
    assert ask(served, "m").status == 200
    assert ask(served, "m", b"{").status == 400
    found = families(served, accept)
    for name, labels in NAMES.items():
        family = found[name]
        expected = KINDS.get(name, "histogram" if name.endswith("_seconds") else "counter")
        if accept and expected == "gauge":
            assert family.type in {"gauge", "info"}
        else:
            assert family.type == expected, name
        assert family.samples, name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == labels, name
    ids = [value for f in found.values() for s in f.samples for value in s.labels.values() if UUID7.search(value)]
    assert not ids, "labels never carry request ids"


def test_the_log_s_records_are_counted_and_health_speaks_of_them(served: GatewayProcess) -> None:
    name = "gateway_inference_log_records_total"
    before = served.metric(name)
    for _ in range(5):
        ask(served, "plain")
    ask(served, "nobody")
    until(lambda: served.metric(name) >= before + 6, 30, "rows are not counted")
    assert served.metric(name) == before + 6, "one record a request, refused ones included"
    assert served.metric("gateway_inference_log_dropped_total") == 0
    health = json.loads(served.operations("/healthz"))
    assert health["inference_log"]["state"] == "ok"
