"""Checks of the REST protocol: health, metadata, inference as JSON, refusals."""

from __future__ import annotations

import json
import math
from typing import Any

from tests.conformance.checks import OIP_REST, NotOffered, check, expect
from tests.conformance.subject import DATATYPES, Answer, Subject, flat, same

HEALTH = "REST health"
METADATA = "REST metadata"
INFERENCE = "REST inference"
REFUSALS = "REST refusals"
JSON_TYPE = {"Content-Type": "application/json"}


def refused(answer: Answer, *, client_fault: bool = True) -> str:
    """An answer that says no, in the protocol's form."""
    expect(400 <= answer.status < 600, f"answered {answer.status}, not with an error")
    if client_fault:
        expect(answer.status < 500, f"answered {answer.status}: the fault is the client's, a 4xx was due")
    try:
        text = answer.error()
    except (ValueError, KeyError, TypeError) as error:
        expect(False, f'{answer.status}, but the body is no {{"error": text}}: {answer.body[:80]!r} ({error})')
    return f'{answer.status} "{text[:80]}"'


def outputs_of(answer: Answer) -> dict[str, dict[str, Any]]:
    expect(answer.status == 200, f"answered {answer.status}: {answer.body[:120]!r}")
    return {output["name"]: output for output in answer.json()["outputs"]}


def expect_same_outputs(subject: Subject, answer: Answer) -> None:
    got = outputs_of(answer)
    for output in subject.answer["outputs"]:
        name = output["name"]
        expect(name in got, f"output {name} is missing")
        expect(same(flat(got[name]["data"]), flat(output["data"])), f"output {name} differs from the first answer's")


# -- health ----------------------------------------------------------------------------------------------------------


@check(HEALTH, "required", f"{OIP_REST}: Health")
def check_server_live(subject: Subject) -> str:
    """GET /v2/health/live answers 200."""
    status = subject.get("/v2/health/live").status
    expect(status == 200, f"answered {status}")
    return "200"


@check(HEALTH, "required", f"{OIP_REST}: Health")
def check_server_ready(subject: Subject) -> str:
    """GET /v2/health/ready answers 200 while a model answers."""
    status = subject.get("/v2/health/ready").status
    expect(status == 200, f"answered {status}")
    return "200"


@check(HEALTH, "required", f"{OIP_REST}: Health")
def check_model_ready(subject: Subject) -> str:
    """GET /v2/models/M/ready answers 200 for a model that answers."""
    status = subject.get(f"{subject.model_path}/ready").status
    expect(status == 200, f"answered {status}")
    return "200"


@check(HEALTH, "required", f"{OIP_REST}: Health")
def check_unknown_model_not_ready(subject: Subject) -> str:
    """GET /v2/models/M/ready answers 4xx for a model that does not exist."""
    status = subject.get("/v2/models/no-such-model/ready").status
    expect(400 <= status < 500, f"answered {status}")
    return str(status)


@check(HEALTH, "recommended", f"{OIP_REST}: Health")
def check_health_bodies(subject: Subject) -> str:
    """Health answers carry {"live": true} and {"ready": true}."""
    for path, key in (("/v2/health/live", "live"), ("/v2/health/ready", "ready")):
        body = subject.get(path).body
        expect(body, f"{path} has no body")
        document = subject.get(path).json()
        expect(document.get(key) is True, f"{path}: {body[:60]!r}")
    return "both"


# -- metadata --------------------------------------------------------------------------------------------------------


@check(METADATA, "required", f"{OIP_REST}: Server Metadata")
def check_server_metadata(subject: Subject) -> str:
    """GET /v2 names the server, its version and its extensions."""
    answer = subject.get("/v2")
    expect(answer.status == 200, f"answered {answer.status}")
    document = answer.json()
    for key in ("name", "version"):
        expect(isinstance(document.get(key), str) and document[key], f"'{key}' is {document.get(key)!r}")
    extensions = document.get("extensions")
    expect(isinstance(extensions, list), f"'extensions' is {extensions!r}")
    return f"{document['name']} {document['version']}, {len(extensions)} extensions"


@check(METADATA, "required", f"{OIP_REST}: Model Metadata")
def check_model_metadata(subject: Subject) -> str:
    """GET /v2/models/M gives its name and each tensor's name, datatype and shape."""
    document = subject.metadata
    expect(document.get("name") == subject.model, f"'name' is {document.get('name')!r}")
    for role in ("inputs", "outputs"):
        expect(isinstance(document.get(role), list) and document[role], f"'{role}' is {document.get(role)!r}")
        for tensor in document[role]:
            expect(isinstance(tensor.get("name"), str), f"{role}: a tensor without a name")
            allowed = (*DATATYPES, "BF16")
            expect(tensor.get("datatype") in allowed, f"{tensor['name']}: datatype {tensor.get('datatype')!r}")
            shape = tensor.get("shape")
            sound = isinstance(shape, list) and all(type(dim) is int and dim >= -1 for dim in shape)
            expect(sound, f"{tensor['name']}: shape {shape!r}")
    return f"{len(document['inputs'])} inputs, {len(document['outputs'])} outputs"


@check(METADATA, "required", f"{OIP_REST}: Model Metadata")
def check_model_platform(subject: Subject) -> str:
    """Model metadata names the platform."""
    platform = subject.metadata.get("platform")
    expect(isinstance(platform, str), f"'platform' is {platform!r}")
    return repr(platform)


@check(METADATA, "required", f"{OIP_REST}: Model Metadata")
def check_unknown_model_metadata(subject: Subject) -> str:
    """Metadata of a model that does not exist is refused with 4xx and an error text."""
    return refused(subject.get("/v2/models/no-such-model"))


@check(METADATA, "required", f"{OIP_REST}: Model Metadata")
def check_version_in_path(subject: Subject) -> str:
    """Where metadata lists versions, /v2/models/M/versions/V answers for each."""
    versions = subject.metadata.get("versions") or []
    if not versions:
        raise NotOffered("metadata lists no versions")
    for version in versions:
        expect(isinstance(version, str), f"version {version!r} is no string")
        status = subject.get(f"{subject.model_path}/versions/{version}").status
        expect(status == 200, f"version {version} answers {status}")
    return ", ".join(versions)


# -- inference -------------------------------------------------------------------------------------------------------


@check(INFERENCE, "required", f"{OIP_REST}: Inference")
def check_answer_form(subject: Subject) -> str:
    """An answer names the model and, for each output, name, datatype, shape and as much data as the shape says."""
    answer = subject.answer
    expect(answer.get("model_name") == subject.model, f"'model_name' is {answer.get('model_name')!r}")
    expect(answer.get("outputs"), "there are no outputs")
    for output in answer["outputs"]:
        name, shape = output.get("name"), output.get("shape")
        expect(isinstance(name, str) and isinstance(shape, list), f"an output without name or shape: {output}"[:150])
        expect(output.get("datatype") in DATATYPES, f"{name}: datatype {output.get('datatype')!r}")
        count = len(flat(output.get("data", [])))
        expect(count == math.prod(shape), f"{name}: {count} elements for shape {shape}")
    return f"{len(answer['outputs'])} outputs"


@check(INFERENCE, "required", f"{OIP_REST}: Inference")
def check_outputs_are_those_of_metadata(subject: Subject) -> str:
    """Outputs have the names and datatypes that metadata promised."""
    promised = {tensor["name"]: tensor["datatype"] for tensor in subject.metadata["outputs"]}
    for output in subject.answer["outputs"]:
        kind = promised.get(output["name"])
        expect(kind == output["datatype"], f"{output['name']}: {output['datatype']}, metadata says {kind}")
    return f"{len(promised)} promised"


@check(INFERENCE, "required", f"{OIP_REST}: Inference Response JSON Object")
def check_content_type(subject: Subject) -> str:
    """JSON is answered as application/json."""
    kind = subject.infer(subject.sample).headers.get("content-type", "")
    expect(kind.split(";")[0].strip() == "application/json", f"Content-Type is {kind!r}")
    return str(kind)


@check(INFERENCE, "required", f"{OIP_REST}: Inference Request JSON Object")
def check_id_is_echoed(subject: Subject) -> str:
    """The request's id comes back."""
    found = subject.infer({"id": "conformance-42", **subject.sample}).json().get("id")
    expect(found == "conformance-42", f"'id' is {found!r}")
    return str(found)


@check(INFERENCE, "required", f"{OIP_REST}: Tensor Data")
def check_nested_data(subject: Subject) -> str:
    """Data may be nested in the shape of the tensor; it means the same as flat."""
    request = subject.without()
    for tensor in request["inputs"]:
        tensor["data"] = _nest(tensor["data"], tensor["shape"])
    expect_same_outputs(subject, subject.infer(request))
    return "same answer"


def _nest(data: list[Any], shape: list[int]) -> Any:
    if len(shape) <= 1:
        return data
    step = len(data) // max(1, shape[0])
    return [_nest(data[n * step : (n + 1) * step], shape[1:]) for n in range(shape[0])]


@check(INFERENCE, "required", f"{OIP_REST}: Request Output")
def check_requested_outputs_only(subject: Subject) -> str:
    """Outputs that are not asked for are left out."""
    wanted = subject.metadata["outputs"][-1]["name"]
    got = outputs_of(subject.infer({**subject.sample, "outputs": [{"name": wanted}]}))
    expect(list(got) == [wanted], f"asked for {wanted}, got {list(got)}")
    return str(wanted)


@check(INFERENCE, "recommended", f"{OIP_REST}: Request Output")
def check_empty_outputs_means_all(subject: Subject) -> str:
    """An empty list of outputs asks for all of them."""
    got = outputs_of(subject.infer({**subject.sample, "outputs": []}))
    expect(len(got) == len(subject.answer["outputs"]), f"{len(got)} of {len(subject.answer['outputs'])} outputs")
    return f"{len(got)} outputs"


@check(INFERENCE, "required", f"{OIP_REST}: Parameters")
def check_parameters_are_accepted(subject: Subject) -> str:
    """Parameters of the request and of a tensor may be strings, numbers and booleans; unknown ones do no harm."""
    request = subject.without()
    request["parameters"] = {"conformance_text": "x", "conformance_number": 3, "conformance_flag": True}
    request["inputs"][0]["parameters"] = {"conformance_text": "x"}
    expect_same_outputs(subject, subject.infer(request))
    return "same answer"


@check(INFERENCE, "recommended", "clients of KServe send `model_name`")
def check_unknown_keys_are_ignored(subject: Subject) -> str:
    """Keys that the protocol does not know are ignored."""
    expect_same_outputs(subject, subject.infer({**subject.sample, "model_name": subject.model, "more": [1]}))
    return "same answer"


@check(INFERENCE, "required", f"{OIP_REST}: Inference")
def check_version_in_inference_path(subject: Subject) -> str:
    """Where metadata lists versions, the newest can be asked by its path."""
    versions = subject.metadata.get("versions") or []
    if not versions:
        raise NotOffered("metadata lists no versions")
    answer = subject.post(f"{subject.model_path}/versions/{versions[-1]}/infer", subject.sample)
    expect_same_outputs(subject, answer)
    found = answer.json().get("model_version")
    expect(found == versions[-1], f"'model_version' is {found!r}")
    return str(versions[-1])


@check(INFERENCE, "recommended", "clients keep connections open")
def check_content_type_is_not_needed(subject: Subject) -> str:
    """A request without a Content-Type is understood."""
    answer = subject.ask("POST", f"{subject.model_path}/infer", _json(subject.sample))
    expect_same_outputs(subject, answer)
    return "same answer"


@check(INFERENCE, "recommended", "JSON has no bound on integers, INT64 has")
def check_large_integers_are_exact(subject: Subject) -> str:
    """An INT64 above 2^53 goes in without a change through doubles (checked where a model hands it back)."""
    tensor = subject.sample["inputs"][0]
    if tensor["datatype"] != "INT64" or len(subject.sample["inputs"]) != 1:
        raise NotOffered("the model has other inputs than one of INT64")
    request = subject.without()
    request["inputs"][0]["data"] = [9007199254740993] * len(tensor["data"])
    got = [leaf for output in outputs_of(subject.infer(request)).values() for leaf in flat(output["data"])]
    expect(9007199254740992 not in got, "2^53 + 1 came back as 2^53")
    return "not rounded"


# -- refusals --------------------------------------------------------------------------------------------------------


@check(REFUSALS, "required", f"{OIP_REST}: Inference Response JSON Error Object")
def check_unknown_model(subject: Subject) -> str:
    """Inference on a model that does not exist is refused with 4xx and an error text."""
    return refused(subject.post("/v2/models/no-such-model/infer", subject.sample))


@check(REFUSALS, "required", f"{OIP_REST}: Inference Response JSON Error Object")
def check_unknown_version(subject: Subject) -> str:
    """A version that does not exist is refused with 4xx."""
    answer = subject.post(f"{subject.model_path}/versions/987654/infer", subject.sample)
    if not subject.metadata.get("versions"):
        raise NotOffered(f"metadata lists no versions; answered {answer.status}")
    return refused(answer)


@check(REFUSALS, "required", f"{OIP_REST}: Inference Response JSON Error Object")
def check_malformed_json(subject: Subject) -> str:
    """A body that is no JSON is refused with an error text."""
    body = _json(subject.sample)[:-7]
    return refused(subject.ask("POST", f"{subject.model_path}/infer", body, JSON_TYPE), client_fault=False)


@check(REFUSALS, "recommended", f'{OIP_REST}: "typically 400"')
def check_malformed_json_is_the_clients_fault(subject: Subject) -> str:
    """... with 4xx, because the fault is the client's."""
    return refused(subject.ask("POST", f"{subject.model_path}/infer", _json(subject.sample)[:-7], JSON_TYPE))


@check(REFUSALS, "required", f"{OIP_REST}: Request Input")
def check_too_few_elements(subject: Subject) -> str:
    """Fewer elements than the shape says are refused, not padded."""
    request = subject.without()
    request["inputs"][0]["data"] = request["inputs"][0]["data"][:-1]
    return refused(subject.infer(request), client_fault=False)


@check(REFUSALS, "required", f"{OIP_REST}: Request Input")
def check_too_many_elements(subject: Subject) -> str:
    """More elements than the shape says are refused, not cut off."""
    request = subject.without()
    request["inputs"][0]["data"] = [*request["inputs"][0]["data"], request["inputs"][0]["data"][0]]
    return refused(subject.infer(request), client_fault=False)


@check(REFUSALS, "required", f"{OIP_REST}: Request Input")
def check_no_inputs(subject: Subject) -> str:
    """A request without inputs is refused."""
    return refused(subject.infer({"inputs": []}), client_fault=False)


@check(REFUSALS, "required", f"{OIP_REST}: Request Input")
def check_missing_shape(subject: Subject) -> str:
    """A tensor without a shape is refused."""
    request = subject.without()
    del request["inputs"][0]["shape"]
    return refused(subject.infer(request), client_fault=False)


@check(REFUSALS, "required", f"{OIP_REST}: Request Input")
def check_unknown_datatype(subject: Subject) -> str:
    """A datatype that does not exist is refused with 4xx."""
    request = subject.without()
    request["inputs"][0]["datatype"] = "FP99"
    return refused(subject.infer(request))


@check(REFUSALS, "recommended", f"{OIP_REST}: Request Input")
def check_wrong_datatype(subject: Subject) -> str:
    """A datatype other than the model's is refused with 4xx."""
    request = subject.without()
    request["inputs"][0]["datatype"] = "INT32" if request["inputs"][0]["datatype"] != "INT32" else "INT64"
    request["inputs"][0]["data"] = [1] * len(request["inputs"][0]["data"])
    return refused(subject.infer(request))


@check(REFUSALS, "recommended", f"{OIP_REST}: Request Input")
def check_unknown_input(subject: Subject) -> str:
    """An input that the model does not have is refused with 4xx."""
    request = subject.without()
    request["inputs"].append({**request["inputs"][0], "name": "no_such_input"})
    return refused(subject.infer(request))


@check(REFUSALS, "required", f"{OIP_REST}: Request Output")
def check_unknown_output(subject: Subject) -> str:
    """An output that the model does not have is refused with 4xx."""
    return refused(subject.infer({**subject.sample, "outputs": [{"name": "no_such_output"}]}))


@check(REFUSALS, "recommended", "every client reads `error` from an application/json body")
def check_errors_are_json(subject: Subject) -> str:
    """Errors are labelled application/json."""
    kind = subject.infer({"inputs": []}).headers.get("content-type", "")
    expect(kind.split(";")[0].strip() == "application/json", f"Content-Type is {kind!r}")
    return str(kind)


@check(REFUSALS, "recommended", "RFC 9110")
def check_wrong_method(subject: Subject) -> str:
    """GET on inference is refused."""
    status = subject.get(f"{subject.model_path}/infer").status
    expect(status in (404, 405), f"answered {status}")
    return str(status)


@check(REFUSALS, "required", "one client's mistake is not another's")
def check_still_answers(subject: Subject) -> str:
    """After all these refusals the first request is answered as before."""
    expect_same_outputs(subject, subject.infer(subject.sample))
    return "same answer"


def _json(document: Any) -> bytes:
    return json.dumps(document).encode()
