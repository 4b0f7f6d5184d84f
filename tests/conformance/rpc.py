"""Checks of the gRPC protocol: every call is made, and inference has to agree with REST."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import json_format

from gateway.protocol import schema
from tests.conformance.checks import OIP_GRPC, Failed, NotOffered, check, expect
from tests.conformance.extensions import expect_same, needs
from tests.conformance.subject import Subject, decoded, raw

CALLS = "gRPC health and metadata"
INFER = "gRPC inference"
MANAGE = "gRPC management extensions"
SERVICE = "inference.GRPCInferenceService"
CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


def call(subject: Subject, name: str, document: dict[str, Any] | None = None) -> Any:
    """One unary call; the reply as a message. Raises grpc.RpcError."""
    request = json_format.ParseDict(document or {}, schema.message(f"inference.{name}Request")())
    return send(subject, name, request)


def send(subject: Subject, name: str, request: Any) -> Any:
    if subject.channel is None:
        raise NotOffered("no gRPC address was given (--grpc)")
    method = subject.channel.unary_unary(
        f"/{SERVICE}/{name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=schema.message(f"inference.{name}Response").FromString,
    )
    return method(request, timeout=subject.timeout_s)


def expect_refused(subject: Subject, name: str, request: Any, *codes: grpc.StatusCode) -> str:
    try:
        reply = send(subject, name, request)
    except grpc.RpcError as error:
        expect(error.code() in codes, f"{error.code().name}: {error.details()}"[:150])
        return f'{error.code().name} "{(error.details() or "")[:70]}"'
    raise Failed(f"answered {str(reply)[:100]!r}")


def request_of(subject: Subject, *, typed: bool = False) -> Any:
    """The sample as a ModelInferRequest."""
    request = schema.message("inference.ModelInferRequest")(model_name=subject.model)
    for tensor in subject.sample["inputs"]:
        entry = request.inputs.add(name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"])
        if not typed:
            request.raw_input_contents.append(raw(tensor))
            continue
        data = tensor["data"]
        contents = getattr(entry.contents, CONTENTS[tensor["datatype"]])
        contents.extend([text.encode() for text in data] if tensor["datatype"] == "BYTES" else data)
    return request


def outputs_of(reply: Any) -> dict[str, list[Any]]:
    """Every output's elements, raw or typed."""
    found = {}
    for place, output in enumerate(reply.outputs):
        if reply.raw_output_contents:
            found[output.name] = decoded(output.datatype, reply.raw_output_contents[place])
            continue
        values = list(getattr(output.contents, CONTENTS[output.datatype]))
        found[output.name] = [v.decode("utf-8", "replace") for v in values] if output.datatype == "BYTES" else values
    return found


@check(CALLS, "required", f"{OIP_GRPC}: ServerLive, ServerReady")
def check_grpc_server_live_and_ready(subject: Subject) -> str:
    """ServerLive and ServerReady say true."""
    expect(call(subject, "ServerLive").live, "live is false")
    expect(call(subject, "ServerReady").ready, "ready is false")
    return "live, ready"


@check(CALLS, "required", f"{OIP_GRPC}: ModelReady")
def check_grpc_model_ready(subject: Subject) -> str:
    """ModelReady says true for a model that answers."""
    expect(call(subject, "ModelReady", {"name": subject.model}).ready, "ready is false")
    return "ready"


@check(CALLS, "required", f"{OIP_GRPC}: ModelReady")
def check_grpc_unknown_model_not_ready(subject: Subject) -> str:
    """ModelReady does not say true for a model that does not exist."""
    try:
        ready = call(subject, "ModelReady", {"name": "no-such-model"}).ready
    except grpc.RpcError as error:
        expect(error.code() is grpc.StatusCode.NOT_FOUND, error.code().name)
        return "NOT_FOUND"
    expect(not ready, "ready is true")
    return "false"


@check(CALLS, "required", f"{OIP_GRPC}: ServerMetadata")
def check_grpc_server_metadata(subject: Subject) -> str:
    """ServerMetadata says what GET /v2 says."""
    reply = call(subject, "ServerMetadata")
    document = subject.get("/v2").json()
    expect(reply.name == document["name"], f"{reply.name!r} over gRPC, {document['name']!r} over REST")
    return f"{reply.name} {reply.version}"


@check(CALLS, "required", f"{OIP_GRPC}: ModelMetadata")
def check_grpc_model_metadata(subject: Subject) -> str:
    """ModelMetadata says what GET /v2/models/M says."""
    reply = call(subject, "ModelMetadata", {"name": subject.model})
    for role in ("inputs", "outputs"):
        ours = [(t.name, t.datatype, list(t.shape)) for t in getattr(reply, role)]
        theirs = [(t["name"], t["datatype"], t["shape"]) for t in subject.metadata[role]]
        expect(ours == theirs, f"{role}: {ours} over gRPC, {theirs} over REST"[:200])
    return f"{len(reply.inputs)} inputs, {len(reply.outputs)} outputs"


@check(CALLS, "required", f"{OIP_GRPC}: ModelMetadata")
def check_grpc_unknown_model_metadata(subject: Subject) -> str:
    """ModelMetadata of a model that does not exist is NOT_FOUND."""
    request = schema.message("inference.ModelMetadataRequest")(name="no-such-model")
    return expect_refused(subject, "ModelMetadata", request, grpc.StatusCode.NOT_FOUND)


@check(CALLS, "recommended", "grpc.health.v1")
def check_grpc_health_service(subject: Subject) -> str:
    """The standard health service says SERVING."""
    if subject.channel is None:
        raise NotOffered("no gRPC address was given (--grpc)")
    method = subject.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=bytes,
        response_deserializer=schema.message("grpc.health.v1.HealthCheckResponse").FromString,
    )
    try:
        status = method(b"", timeout=subject.timeout_s).status
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise NotOffered("UNIMPLEMENTED") from error
        raise
    expect(status == 1, f"status {status}")
    return "SERVING"


@check(INFER, "required", f"{OIP_GRPC}: ModelInfer")
def check_grpc_infer_raw(subject: Subject) -> str:
    """Raw contents are answered as over REST."""
    reply = send(subject, "ModelInfer", request_of(subject))
    expect(reply.model_name == subject.model, f"model_name {reply.model_name!r}")
    expect_same(subject, outputs_of(reply))
    return "same answer"


@check(INFER, "required", f"{OIP_GRPC}: ModelInfer, InferTensorContents")
def check_grpc_infer_typed(subject: Subject) -> str:
    """Typed contents are answered as over REST."""
    expect_same(subject, outputs_of(send(subject, "ModelInfer", request_of(subject, typed=True))))
    return "same answer"


@check(INFER, "recommended", "tritonclient reads raw_output_contents by index")
def check_grpc_one_raw_entry_per_output(subject: Subject) -> str:
    """A raw reply has one raw entry per output."""
    reply = send(subject, "ModelInfer", request_of(subject))
    count = len(reply.raw_output_contents)
    expect(count == len(reply.outputs), f"{count} raw entries for {len(reply.outputs)} outputs")
    return str(count)


@check(INFER, "required", f"{OIP_GRPC}: ModelInferRequest.id")
def check_grpc_id_is_echoed(subject: Subject) -> str:
    """The request's id comes back."""
    request = request_of(subject)
    request.id = "conformance-42"
    found = send(subject, "ModelInfer", request).id
    expect(found == "conformance-42", f"id is {found!r}")
    return str(found)


@check(INFER, "required", f"{OIP_GRPC}: InferRequestedOutputTensor")
def check_grpc_requested_outputs_only(subject: Subject) -> str:
    """Outputs that are not asked for are left out."""
    request = request_of(subject)
    request.outputs.add(name=subject.metadata["outputs"][-1]["name"])
    names = list(outputs_of(send(subject, "ModelInfer", request)))
    expect(names == [request.outputs[0].name], f"asked for {request.outputs[0].name}, got {names}")
    return str(names[0])


@check(INFER, "required", f"{OIP_GRPC}: ModelInfer")
def check_grpc_unknown_model(subject: Subject) -> str:
    """Inference on a model that does not exist is NOT_FOUND."""
    request = request_of(subject)
    request.model_name = "no-such-model"
    return expect_refused(subject, "ModelInfer", request, grpc.StatusCode.NOT_FOUND)


@check(INFER, "required", f"{OIP_GRPC}: raw_input_contents")
def check_grpc_raw_too_short(subject: Subject) -> str:
    """Raw contents of the wrong size are refused as the client's fault."""
    request = request_of(subject)
    request.raw_input_contents[0] = request.raw_input_contents[0][:-1]
    return expect_refused(subject, "ModelInfer", request, grpc.StatusCode.INVALID_ARGUMENT)


@check(INFER, "required", f"{OIP_GRPC}: ModelInfer")
def check_grpc_wrong_input_name(subject: Subject) -> str:
    """An input that the model does not have is refused as the client's fault."""
    request = request_of(subject)
    request.inputs[0].name = "no_such_input"
    return expect_refused(subject, "ModelInfer", request, grpc.StatusCode.INVALID_ARGUMENT)


@check(INFER, "recommended", "gRPC over HTTP/2")
def check_grpc_large_message(subject: Subject) -> str:
    """A message of more than 4 MiB is read (grpcio's default would refuse it)."""
    request = request_of(subject)
    request.parameters["conformance_text"].string_param = "x" * (5 * 1024 * 1024)
    expect_same(subject, outputs_of(send(subject, "ModelInfer", request)))
    return "5 MiB"


@check(INFER, "extension", "Triton ModelStreamInfer")
def check_grpc_stream(subject: Subject) -> str:
    """A stream answers in order, and a bad request in it does not end it."""
    if subject.channel is None:
        raise NotOffered("no gRPC address was given (--grpc)")
    method = subject.channel.stream_stream(
        f"/{SERVICE}/ModelStreamInfer",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=schema.message("inference.ModelStreamInferResponse").FromString,
    )
    requests = [request_of(subject) for _ in range(3)]
    for number, request in enumerate(requests):
        request.id = f"stream-{number}"
    requests[1].inputs[0].name = "no_such_input"
    try:
        replies = list(method(iter(requests), timeout=subject.timeout_s))
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise NotOffered("UNIMPLEMENTED") from error
        raise Failed(f"the stream ended with {error.code().name}: {error.details()}"[:150]) from error
    ids = [reply.infer_response.id for reply in replies]
    expect(ids == ["stream-0", "stream-1", "stream-2"], f"answers {ids}")
    expect([bool(reply.error_message) for reply in replies] == [False, True, False], "the wrong ones failed")
    return "3 in order, 1 refused"


@check(MANAGE, "extension", "Triton ModelConfig")
def check_grpc_model_config(subject: Subject) -> str:
    """ModelConfig says what GET …/config says."""
    needs(subject, "model_configuration")
    config = call(subject, "ModelConfig", {"name": subject.model}).config
    document = subject.get(f"{subject.model_path}/config").json()
    expect(config.max_batch_size == document["max_batch_size"], f"max_batch_size {config.max_batch_size}")
    expect([t.name for t in config.input] == [t["name"] for t in document["input"]], "other inputs than over REST")
    return f"max_batch_size {config.max_batch_size}"


@check(MANAGE, "extension", "Triton ModelStatistics")
def check_grpc_model_statistics(subject: Subject) -> str:
    """ModelStatistics counts what was asked over both protocols."""
    needs(subject, "statistics")
    before = call(subject, "ModelStatistics", {"name": subject.model}).model_stats[-1].inference_stats.success.count
    send(subject, "ModelInfer", request_of(subject))
    after = call(subject, "ModelStatistics", {"name": subject.model}).model_stats[-1].inference_stats.success.count
    expect(after == before + 1, f"success.count went from {before} to {after}")
    return "+1"


@check(MANAGE, "extension", "Triton RepositoryIndex")
def check_grpc_repository_index(subject: Subject) -> str:
    """RepositoryIndex lists the model as READY."""
    needs(subject, "model_repository")
    states = {model.name: model.state for model in call(subject, "RepositoryIndex").models}
    expect(states.get(subject.model) == "READY", f"{subject.model} is {states.get(subject.model)!r}")
    return f"{len(states)} models"
