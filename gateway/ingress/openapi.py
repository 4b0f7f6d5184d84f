"""The OpenAPI 3.1 description of the REST surface, made from the route table.

Rules: paths, methods and refusals come from the table; shapes of bodies and answers are `SCHEMAS`, named there. A
schema states what the gateway checks or promises and no more: unknown keys are ignored in requests, so none is
forbidden.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any, Final

from gateway import __version__
from gateway.ingress.routes import Operation, RouteTable

_TEXT: Final = {"type": "string"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_FLAG: Final = {"type": "boolean"}


def _object(required: dict[str, Any] | None = None, optional: dict[str, Any] | None = None) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": {**(required or {}), **(optional or {})}}
    if required:
        schema["required"] = list(required)
    return schema


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


_SHAPE: Final = _list({"type": "integer", "minimum": -1})
_TENSOR: Final = _object({"name": _TEXT, "datatype": _ref("Datatype"), "shape": _SHAPE})
_DURATIONS: Final = (
    "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss",
)  # fmt: skip
_DURATION: Final = _ref("Duration")
_PARAMETERS: Final = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
_SETTING: Final = {"type": ["string", "null"]}

SCHEMAS: Final[dict[str, dict[str, Any]]] = {
    "Error": _object({"error": _TEXT}),
    "Description": {"type": "object"},
    "ServerMetadata": _object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)}),
    "Live": _object({"live": _FLAG}),
    "Ready": _object({"ready": _FLAG}, {"reason": _TEXT}),
    "Models": _object({"models": _list(_TEXT)}),
    "ModelReady": _object({"name": _TEXT, "ready": _FLAG}, {"reason": _TEXT}),
    "Datatype": {
        "type": "string",
        "enum": [
            "BOOL",
            "UINT8",
            "UINT16",
            "UINT32",
            "UINT64",
            "INT8",
            "INT16",
            "INT32",
            "INT64",
            "FP16",
            "FP32",
            "FP64",
            "BYTES",
            "BF16",
        ],
    },
    "TensorMetadata": _TENSOR,
    "ModelMetadata": _object(
        {
            "name": _TEXT,
            "versions": _list(_TEXT),
            "platform": _TEXT,
            "inputs": _list(_ref("TensorMetadata")),
            "outputs": _list(_ref("TensorMetadata")),
        }
    ),
    "ModelConfig": _object(
        {
            "name": _TEXT,
            "platform": _TEXT,
            "backend": _TEXT,
            "max_batch_size": _COUNT,
            "input": _list({"type": "object"}),
            "output": _list({"type": "object"}),
        }
    ),
    "Provenance": {"type": "object"},
    "Duration": _object({"count": _COUNT, "ns": _COUNT}),
    "BatchStatistics": _object(
        {
            "batch_size": _COUNT,
            **dict.fromkeys(("compute_input", "compute_infer", "compute_output"), _DURATION),
        }
    ),
    "Statistics": _object(
        {
            "model_stats": _list(
                _object(
                    {
                        "name": _TEXT,
                        "version": _TEXT,
                        "last_inference": _COUNT,
                        "inference_count": _COUNT,
                        "execution_count": _COUNT,
                        "inference_stats": _object(dict.fromkeys(_DURATIONS, _DURATION)),
                        "response_stats": {"type": "object"},
                        "batch_stats": _list(_ref("BatchStatistics")),
                        "memory_usage": _list({"type": "object"}),
                    }
                )
            )
        }
    ),
    "IndexRequest": _object(optional={"ready": _FLAG}),
    "Index": _list(
        _object(
            {"name": _TEXT},
            {
                "version": _TEXT,
                "state": {"enum": ["UNKNOWN", "READY", "UNAVAILABLE", "LOADING", "UNLOADING"]},
                "reason": _TEXT,
            },
        )
    ),
    "LoadRequest": _object(
        optional={
            "parameters": {
                "type": "object",
                "properties": {"config": {**_TEXT, "description": "JSON text of a model configuration"}},
                "additionalProperties": {**_TEXT, "description": "`file:<version>/<name>`: a file in base64"},
            }
        }
    ),
    "UnloadRequest": _object(optional={"parameters": _object(optional={"unload_dependents": _FLAG})}),
    "TraceSettings": _object(
        {
            "trace_level": _list({"enum": ["OFF", "TIMESTAMPS", "TENSORS"]}),
            **dict.fromkeys(("trace_rate", "trace_count", "log_frequency", "trace_file", "trace_mode"), _TEXT),
        }
    ),
    "TraceChanges": _object(
        optional={
            "trace_level": {"type": ["array", "string", "null"], "items": _TEXT},
            **dict.fromkeys(("trace_rate", "trace_count", "log_frequency", "trace_file"), _SETTING),
        }
    ),
    "LogSettings": _object(
        {
            "log_file": _TEXT,
            **dict.fromkeys(("log_info", "log_warning", "log_error"), _FLAG),
            "log_verbose_level": _COUNT,
            "log_format": {"enum": ["default", "ISO8601"]},
        }
    ),
    "LogChanges": _object(
        optional={
            "log_file": _SETTING,
            **{key: {"type": ["boolean", "null"]} for key in ("log_info", "log_warning", "log_error")},
            "log_verbose_level": {"type": ["integer", "null"], "minimum": 0},
            "log_format": _SETTING,
        }
    ),
    "Regions": _list(_object({"name": _TEXT}, {"key": _TEXT, "offset": _COUNT, "byte_size": _COUNT})),
    "SystemRegion": _object({"key": _TEXT, "byte_size": _COUNT}, {"offset": _COUNT}),
    "CudaRegion": _object(
        {"raw_handle": _object({"b64": _TEXT}), "device_id": {"type": "integer"}, "byte_size": _COUNT}
    ),
    "InferRequest": _object(
        {
            "inputs": _list(
                _object(
                    {"name": _TEXT, "datatype": _ref("Datatype"), "shape": _list(_COUNT)},
                    {"parameters": _PARAMETERS, "data": {"type": "array", "items": {}}},
                )
            )
        },
        {
            "id": _TEXT,
            "parameters": _PARAMETERS,
            "outputs": _list(_object({"name": _TEXT}, {"parameters": _PARAMETERS})),
        },
    ),
    "InferResponse": _object(
        {
            "model_name": _TEXT,
            "outputs": _list(
                _object(
                    {"name": _TEXT, "datatype": _ref("Datatype"), "shape": _list(_COUNT)},
                    {"parameters": {"type": "object"}, "data": {"type": "array", "items": {}}},
                )
            ),
        },
        {"model_version": _TEXT, "id": _TEXT},
    ),
    "GenerateRequest": {
        "type": "object",
        "description": "Inputs by name, each a value or an array of values; every other key is a parameter.",
        "properties": {"id": _TEXT, "parameters": {"type": "object"}},
    },
    "GenerateResponse": _object({"model_name": _TEXT, "model_version": _TEXT}, {"id": _TEXT}),
}

_NAMES: Final = {
    "model": "Name of a model",
    "version": "Version of the model",
    "repository": "Name of a repository; it is ignored",
    "region": "Name of a shared memory region",
}
_ALWAYS: Final = (400, 403, 408, 413, 501, 503)
"""Refusals that the data port itself may give on any path: a bad head, a slow or large body, a full server."""
_PATH_NAME: Final = re.compile(r"\{(\w+)\}")


def document(table: RouteTable) -> dict[str, Any]:
    """The description of everything in `table`, as JSON values."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Open Inference Protocol",
            "version": __version__,
            "description": "Inference and management over HTTP; tensors may also travel as bytes behind the JSON.",
        },
        "paths": {
            path: {
                "parameters": [_parameter(name) for name in _PATH_NAME.findall(path)],
                **{method.decode().lower(): _operation(path, method, op) for method, op in operations.items()},
            }
            for path, operations in table.paths.items()
        },
        "components": {"schemas": SCHEMAS},
    }


def _parameter(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": _NAMES[name],
        "schema": {"type": "string", "minLength": 1},
    }


def _operation(path: str, method: bytes, operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": re.sub(r"\W", "_", f"{method.decode().lower()}{path}"),
        "summary": operation.summary,
        "tags": [operation.api],
        "responses": _responses(operation),
    }
    if operation.body:
        schema = {"application/json": {"schema": _ref(operation.body)}}
        described["requestBody"] = {"required": operation.body_required, "content": schema}
    return described


def _responses(operation: Operation) -> dict[str, Any]:
    ok: dict[str, Any] = {"description": "OK"}
    if operation.answer:
        json_only = {"schema": _ref(operation.answer)}
        ok["content"] = {media: json_only if media == "application/json" else {} for media in operation.media}
    responses = {"200": ok}
    for status in sorted({*_ALWAYS, *operation.errors}):
        error = {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": _ref("Error")}}}
        if status == 503 and operation.answer in ("Ready", "ModelReady"):
            either = {"anyOf": [_ref("Error"), _ref(operation.answer)]}
            error["content"] = {"application/json": {"schema": either}}
        responses[str(status)] = error
    return responses
