"""The unary RPCs that are documents of `management.py`: name, messages, API group, and the call.

Rules: an RPC takes its request's message and gives its response's document, at once or as a coroutine; refusals are the
management's own. Where gRPC differs from REST it is said here: an unknown model is not ready instead of unknown, an
unknown model's trace settings are INVALID_ARGUMENT, and no RPC takes a repository's name (wire notes §2.1, §2.3).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from gateway.core.api import Api
from gateway.errors import InvalidRequest, NotFound, Unsupported
from gateway.management import Management
from gateway.protocol.oip_grpc_documents import log_document, one_of, trace_document
from gateway.protocol.oip_plan import shown

Document = dict[str, Any]
Answer = Callable[[Management, Any], Document | Awaitable[Document]]

MAX_VERSION: Final = 2**63 - 1
_CHOICE: Final = "parameter_choice"


@dataclass(frozen=True, slots=True)
class Rpc:
    """One unary RPC; `request` and `response` are full names of messages."""

    request: str
    response: str
    api: Api
    answer: Answer


def version_of(text: str) -> str | None:
    """A version as the catalog has it, of a message's `version` field; None: the newest.

    Raises:
        InvalidRequest: not a whole number.
    """
    if text.isdecimal() and text.isascii():
        number = int(text) if len(text) <= 20 else MAX_VERSION + 1
        if number <= MAX_VERSION:
            return str(number)
    elif not text:
        return None
    raise InvalidRequest(
        f"failed to get model version from specified version string '{shown(text)}', version should be an integral "
        "value > 0"
    )


async def _index(management: Management, message: Any) -> Document:
    if message.repository_name:  # REST ignores it
        raise Unsupported("'repository_name' specification is not supported; leave it out")
    return {"models": await management.repository_index(message.ready)}


async def _load(management: Management, message: Any) -> Document:
    parameters = {name: one_of(value, _CHOICE) for name, value in message.parameters.items()}
    await management.load(message.model_name, parameters, message.repository_name)
    return {}


async def _unload(management: Management, message: Any) -> Document:
    dependents = False
    if "unload_dependents" in message.parameters:
        value = message.parameters["unload_dependents"]
        if value.WhichOneof(_CHOICE) != "bool_param":
            raise InvalidRequest("invalid value type for 'unload_dependents' parameter, expected bool_param.")
        dependents = value.bool_param
    await management.unload(message.model_name, dependents, message.repository_name)
    return {}


def _model_ready(management: Management, message: Any) -> Document:
    version = version_of(message.version)
    try:
        return {"ready": management.model_ready(message.name, version)}
    except NotFound:  # clients expect an answer, not an error
        return {"ready": False}


def _trace(management: Management, message: Any) -> Document:
    model = message.model_name or None
    changes = {name: list(setting.value) or None for name, setting in message.settings.items()}
    try:
        settings = management.update_trace_settings(model, changes) if changes else management.trace_settings(model)
    except NotFound as error:
        raise InvalidRequest(str(error)) from error
    return trace_document(settings)


def _log(management: Management, message: Any) -> Document:
    changes = {name: one_of(setting, _CHOICE) for name, setting in message.settings.items()}
    return log_document(management.update_log_settings(changes) if changes else management.log_settings())


def _regions(kind: str) -> Answer:
    def answer(management: Management, message: Any) -> Document:
        return {"regions": {region["name"]: region for region in management.shm_status(message.name or None, kind)}}

    return answer


def _register(management: Management, message: Any) -> Document:
    management.shm_register(message.name, message.key, message.offset, message.byte_size)
    return {}


def _unregister(management: Management, message: Any) -> Document:
    management.shm_unregister(message.name or None)
    return {}


def _register_cuda(management: Management, message: Any) -> Document:
    management.cuda_shm_register(message.name)
    return {}


def _health(management: Management, message: Any) -> Document:
    return {"status": "SERVING" if management.server_ready() else "NOT_SERVING"}


def _named(name: str, api: Api, answer: Answer) -> tuple[str, Rpc]:
    return f"/inference.GRPCInferenceService/{name}", Rpc(
        f"inference.{name}Request", f"inference.{name}Response", api, answer
    )


RPCS: Final[dict[str, Rpc]] = dict(
    [
        _named("ServerLive", "health", lambda m, _: {"live": m.server_live()}),
        _named("ServerReady", "health", lambda m, _: {"ready": m.server_ready()}),
        _named("ModelReady", "health", _model_ready),
        _named("ServerMetadata", "metadata", lambda m, _: m.server_metadata()),
        _named("ModelMetadata", "metadata", lambda m, q: m.model_metadata(q.name, version_of(q.version))),
        _named("ModelConfig", "model-config", lambda m, q: {"config": m.model_config(q.name, version_of(q.version))}),
        _named("ModelStatistics", "statistics", lambda m, q: m.statistics(q.name, version_of(q.version) or "")),
        _named("RepositoryIndex", "model-repository", _index),
        _named("RepositoryModelLoad", "model-repository", _load),
        _named("RepositoryModelUnload", "model-repository", _unload),
        _named("SystemSharedMemoryStatus", "shared-memory", _regions("system")),
        _named("SystemSharedMemoryRegister", "shared-memory", _register),
        _named("SystemSharedMemoryUnregister", "shared-memory", _unregister),
        _named("CudaSharedMemoryStatus", "shared-memory", _regions("cuda")),
        _named("CudaSharedMemoryRegister", "shared-memory", _register_cuda),
        _named("CudaSharedMemoryUnregister", "shared-memory", lambda m, _: {}),
        _named("TraceSetting", "trace", _trace),
        _named("LogSettings", "logging", _log),
        (
            "/grpc.health.v1.Health/Check",
            Rpc("grpc.health.v1.HealthCheckRequest", "grpc.health.v1.HealthCheckResponse", "health", _health),
        ),
    ]
)
"""By path."""
