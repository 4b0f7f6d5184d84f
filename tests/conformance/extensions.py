"""Checks of Triton's extensions over REST. One that the server does not name in `GET /v2` is not held against it."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

from tests.conformance.checks import Failed, NotOffered, check, expect
from tests.conformance.rest import expect_same_outputs, outputs_of, refused
from tests.conformance.subject import Answer, Subject, decoded, flat, raw, same

BINARY = "binary tensor data"
MANAGEMENT = "management extensions"
ENCODING = "compression"
DURATIONS = (
    "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss",
)  # fmt: skip


def needs(subject: Subject, extension: str) -> None:
    if not subject.offers(extension):
        raise NotOffered(f"'{extension}' is not among the extensions")


def binary_request(subject: Subject, *, binary_output: bool) -> tuple[bytes, dict[str, str]]:
    """The sample with its tensors behind the JSON part, and the header that says where that ends."""
    request, blobs = subject.without(), []
    for tensor in request["inputs"]:
        blobs.append(raw(tensor))
        del tensor["data"]
        tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
    if binary_output:
        request["parameters"] = {"binary_data_output": True}
    head = json.dumps(request).encode()
    return head + b"".join(blobs), {"Inference-Header-Content-Length": str(len(head))}


def binary_outputs(answer: Answer) -> dict[str, list[Any]]:
    """Every output's elements, from whichever form it has."""
    expect(answer.status == 200, f"answered {answer.status}: {answer.body[:120]!r}")
    length = int(answer.headers.get("inference-header-content-length", len(answer.body)))
    head, at, found = json.loads(answer.body[:length]), length, {}
    for output in head["outputs"]:
        size = (output.get("parameters") or {}).get("binary_data_size")
        if size is None:
            found[output["name"]] = flat(output["data"])
            continue
        found[output["name"]] = decoded(output["datatype"], answer.body[at : at + size])
        at += size
    expect(at == len(answer.body), f"{len(answer.body) - at} bytes behind the last tensor")
    return found


def expect_same(subject: Subject, found: dict[str, list[Any]]) -> None:
    for output in subject.answer["outputs"]:
        expect(output["name"] in found, f"output {output['name']} is missing")
        expect(same(found[output["name"]], flat(output["data"])), f"output {output['name']} differs from JSON's")


@check(BINARY, "extension", "Triton extension_binary_data")
def check_binary_in(subject: Subject) -> str:
    """Tensors behind the JSON part are understood."""
    needs(subject, "binary_tensor_data")
    body, headers = binary_request(subject, binary_output=False)
    expect_same(subject, binary_outputs(subject.ask("POST", f"{subject.model_path}/infer", body, headers)))
    return "same answer"


@check(BINARY, "extension", "Triton extension_binary_data")
def check_binary_out(subject: Subject) -> str:
    """binary_data_output sends every output behind the JSON part, with the header that says where that ends."""
    needs(subject, "binary_tensor_data")
    body, headers = binary_request(subject, binary_output=True)
    answer = subject.ask("POST", f"{subject.model_path}/infer", body, headers)
    expect("inference-header-content-length" in answer.headers, "no Inference-Header-Content-Length")
    kind = answer.headers.get("content-type")
    expect(kind == "application/octet-stream", f"Content-Type is {kind!r}")
    expect_same(subject, binary_outputs(answer))
    return f"{len(answer.body)} bytes"


@check(BINARY, "extension", "Triton extension_binary_data")
def check_binary_for_one_output(subject: Subject) -> str:
    """An output's binary_data: true sends that output as binary."""
    needs(subject, "binary_tensor_data")
    name = subject.metadata["outputs"][0]["name"]
    wanted = {**subject.sample, "outputs": [{"name": name, "parameters": {"binary_data": True}}]}
    answer = subject.infer(wanted)
    found = binary_outputs(answer)
    expect(list(found) == [name], f"asked for {name}, got {list(found)}")
    expect("inference-header-content-length" in answer.headers, "no Inference-Header-Content-Length")
    return str(name)


@check(BINARY, "extension", "Triton extension_binary_data")
def check_binary_too_short(subject: Subject) -> str:
    """A binary tensor that is cut short is refused."""
    needs(subject, "binary_tensor_data")
    body, headers = binary_request(subject, binary_output=False)
    return refused(subject.ask("POST", f"{subject.model_path}/infer", body[:-1], headers))


@check(BINARY, "extension", "Triton extension_binary_data")
def check_binary_too_long(subject: Subject) -> str:
    """Bytes behind the last tensor are refused."""
    needs(subject, "binary_tensor_data")
    body, headers = binary_request(subject, binary_output=False)
    return refused(subject.ask("POST", f"{subject.model_path}/infer", body + b"x", headers))


@check(BINARY, "extension", "Triton extension_binary_data")
def check_binary_header_out_of_range(subject: Subject) -> str:
    """A header length beyond the body is refused."""
    needs(subject, "binary_tensor_data")
    body, _ = binary_request(subject, binary_output=False)
    headers = {"Inference-Header-Content-Length": str(len(body) + 1)}
    return refused(subject.ask("POST", f"{subject.model_path}/infer", body, headers))


@check(MANAGEMENT, "extension", "Triton extension_statistics")
def check_statistics_form(subject: Subject) -> str:
    """Statistics name the model and hold all eight durations."""
    stats = _statistics(subject)
    for name in DURATIONS:
        duration = stats["inference_stats"].get(name)
        sound = isinstance(duration, dict) and all(type(duration.get(key, 0)) is int for key in ("count", "ns"))
        expect(sound, f"'{name}' is {duration!r}")
    return f"{stats['inference_count']} rows in {stats['execution_count']} executions"


@check(MANAGEMENT, "extension", "Triton extension_statistics")
def check_statistics_count(subject: Subject) -> str:
    """Three requests raise success.count and queue.count by three."""
    before = _statistics(subject)["inference_stats"]
    for _ in range(3):
        outputs_of(subject.infer(subject.sample))
    after = _statistics(subject)["inference_stats"]
    for name in ("success", "queue"):
        grown = after[name]["count"] - before[name]["count"]
        expect(grown == 3, f"'{name}.count' grew by {grown}")
    return "+3"


def _statistics(subject: Subject) -> Any:
    needs(subject, "statistics")
    answer = subject.get(f"{subject.model_path}/stats")
    expect(answer.status == 200, f"answered {answer.status}")
    return answer.json()["model_stats"][-1]


@check(MANAGEMENT, "extension", "Triton extension_statistics")
def check_statistics_of_all(subject: Subject) -> str:
    """GET /v2/models/stats has every model."""
    needs(subject, "statistics")
    names = {entry["name"] for entry in subject.get("/v2/models/stats").json()["model_stats"]}
    expect(subject.model in names, f"{subject.model} is not among {sorted(names)}")
    return f"{len(names)} models"


@check(MANAGEMENT, "extension", "Triton extension_model_configuration")
def check_configuration(subject: Subject) -> str:
    """The configuration has the model's name, its tensors as in metadata, and max_batch_size."""
    needs(subject, "model_configuration")
    answer = subject.get(f"{subject.model_path}/config")
    expect(answer.status == 200, f"answered {answer.status}")
    config = answer.json()
    expect(config.get("name") == subject.model, f"'name' is {config.get('name')!r}")
    expect(type(config.get("max_batch_size")) is int, f"'max_batch_size' is {config.get('max_batch_size')!r}")
    for mine, theirs in (("input", "inputs"), ("output", "outputs")):
        names = {tensor["name"] for tensor in config[mine]}
        promised = {tensor["name"] for tensor in subject.metadata[theirs]}
        expect(names == promised, f"'{mine}' has {sorted(names)}, metadata {sorted(promised)}")
    return f"max_batch_size {config['max_batch_size']}"


@check(MANAGEMENT, "extension", "Triton extension_model_repository")
def check_repository_index(subject: Subject) -> str:
    """POST /v2/repository/index lists the model, with its state."""
    needs(subject, "model_repository")
    answer = subject.ask("POST", "/v2/repository/index", b"")
    expect(answer.status == 200, f"answered {answer.status} to an empty body")
    states = {entry["name"]: entry.get("state") for entry in answer.json()}
    expect(states.get(subject.model) == "READY", f"{subject.model} is {states.get(subject.model)!r}")
    return f"{len(states)} models"


@check(MANAGEMENT, "extension", "Triton extension_model_repository")
def check_load_unknown(subject: Subject) -> str:
    """Loading a model that does not exist fails, with an error text."""
    needs(subject, "model_repository")
    return refused(subject.post("/v2/repository/models/no-such-model/load", {}), client_fault=False)


@check(MANAGEMENT, "extension", "Triton extension_trace")
def check_trace_settings(subject: Subject) -> str:
    """Trace settings can be read; numbers are strings."""
    needs(subject, "trace")
    answer = subject.get("/v2/trace/setting")
    expect(answer.status == 200, f"answered {answer.status}")
    settings = answer.json()
    for key in ("trace_level", "trace_rate", "trace_count", "log_frequency"):
        expect(key in settings, f"'{key}' is missing")
    expect(isinstance(settings["trace_rate"], str), f"'trace_rate' is {settings['trace_rate']!r}")
    return f"level {settings['trace_level']}"


@check(MANAGEMENT, "extension", "Triton extension_logging")
def check_log_settings(subject: Subject) -> str:
    """Log settings can be read."""
    needs(subject, "logging")
    answer = subject.get("/v2/logging")
    expect(answer.status == 200, f"answered {answer.status}")
    settings = answer.json()
    for key in ("log_info", "log_warning", "log_error", "log_verbose_level"):
        expect(key in settings, f"'{key}' is missing")
    return f"verbose {settings['log_verbose_level']}"


@check(MANAGEMENT, "extension", "Triton extension_shared_memory")
def check_shared_memory_status(subject: Subject) -> str:
    """The status of system shared memory is a list of regions."""
    needs(subject, "system_shared_memory")
    answer = subject.get("/v2/systemsharedmemory/status")
    expect(answer.status == 200, f"answered {answer.status}")
    expect(isinstance(answer.json(), list), f"{answer.body[:80]!r}")
    return f"{len(answer.json())} regions"


@check(MANAGEMENT, "extension", "Triton extension_classification")
def check_classification(subject: Subject) -> str:
    """classification: 1 turns a numeric output into the text "value:index"."""
    needs(subject, "classification")
    numeric = [t for t in subject.metadata["outputs"] if t["datatype"] not in ("BYTES", "BOOL", "FP16", "BF16")]
    if not numeric:
        raise NotOffered("the model has no numeric output")
    wanted = {"name": numeric[0]["name"], "parameters": {"classification": 1}}
    output = outputs_of(subject.infer({**subject.sample, "outputs": [wanted]}))[numeric[0]["name"]]
    expect(output["datatype"] == "BYTES", f"datatype {output['datatype']}")
    value, index, *_ = flat(output["data"])[0].split(":")
    plain = flat(next(o for o in subject.answer["outputs"] if o["name"] == numeric[0]["name"])["data"])
    expect(abs(float(value) - max(plain)) < 1e-4 * max(1.0, abs(max(plain))), f"{value} where {max(plain)} is highest")
    expect(abs(plain[int(index)] - max(plain)) < 1e-6, f"index {index} is not the highest's")
    return str(flat(output["data"])[0])


@check(ENCODING, "recommended", "Triton http_server: Content-Encoding")
def check_gzip_request(subject: Subject) -> str:
    """A gzip body is understood, or refused with an error."""
    return _encoded(subject, gzip.compress(json.dumps(subject.sample).encode()), "gzip")


@check(ENCODING, "recommended", "Triton http_server: Content-Encoding")
def check_deflate_request(subject: Subject) -> str:
    """A deflate body is understood, or refused with an error."""
    return _encoded(subject, zlib.compress(json.dumps(subject.sample).encode()), "deflate")


def _encoded(subject: Subject, body: bytes, coding: str) -> str:
    answer = subject.ask(
        "POST", f"{subject.model_path}/infer", body, {"Content-Type": "application/json", "Content-Encoding": coding}
    )
    if answer.status != 200:
        raise NotOffered(refused(answer, client_fault=False))
    expect_same_outputs(subject, answer)
    return "same answer"


@check(ENCODING, "recommended", "RFC 9110: Accept-Encoding")
def check_answer_is_in_an_accepted_coding(subject: Subject) -> str:
    """An answer to `Accept-Encoding: gzip` is gzip or plain, and says so."""
    answer = subject.infer(subject.sample, {"Accept-Encoding": "gzip"})
    coding = answer.headers.get("content-encoding", "identity")
    if coding not in ("gzip", "identity"):
        raise Failed(f"Content-Encoding is {coding!r}")
    body = gzip.decompress(answer.body) if coding == "gzip" else answer.body
    expect_same_outputs(subject, Answer(answer.status, answer.headers, body))
    return coding
