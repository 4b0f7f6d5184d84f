"""Questions to a server besides inference: what it is, which models it has, what they look like.

Rules: every question has a time limit and a bound on its answer; whatever a server says is checked before it is used.
Extensions of the protocol are asked for only where the server says that it has them, but for the index, which some
servers have without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

import orjson

from gateway.backends.remote_connections import Channel
from gateway.backends.remote_endpoint import Endpoint, IndexEntry, RemoteError, RemoteModel, ServerInfo, said
from gateway.backends.remote_http1 import HttpAnswer
from gateway.backends.remote_http2 import GrpcAnswer, GrpcRequest
from gateway.backends.remote_outcome import of_status
from gateway.backends.remote_wire import (
    grpc_block,
    grpc_refusal,
    grpc_timeout,
    http_head,
    http_words,
    model_path,
)
from gateway.core.batchability import SignatureTensor
from gateway.core.outcome import Failure, Sign
from gateway.core.tensor import DATATYPE, MAX_RANK
from gateway.protocol.schema import DecodeError, message

MAX_MODELS: Final = 10_000
MAX_TENSORS: Final = 256
MAX_NAME: Final = 1024
_CONFIGURATION: Final = "model_configuration"
"""Extension of the protocol."""


class Queries(Protocol):
    """Each raises RemoteError: no usable answer within `timeout_s`."""

    async def info(self, timeout_s: float, /) -> ServerInfo: ...
    async def index(self, timeout_s: float, /) -> tuple[IndexEntry, ...]: ...
    async def model(self, name: str, version: str, timeout_s: float, /, *, config: bool) -> RemoteModel: ...
    async def model_ready(self, name: str, version: str, timeout_s: float, /) -> bool: ...


class HttpQueries:
    """Fits `Queries`."""

    def __init__(self, channel: Channel, endpoint: Endpoint) -> None:
        self._channel = channel
        self._endpoint = endpoint
        self._secrets = tuple(endpoint.headers.values())

    async def info(self, timeout_s: float) -> ServerInfo:
        try:
            document = _object(await self._json("GET", "/v2", timeout_s))
        except RemoteError as error:
            if error.missing:
                return ServerInfo("", "")  # alive, and silent about itself
            raise
        return _info(document)

    async def index(self, timeout_s: float) -> tuple[IndexEntry, ...]:
        try:
            items = await self._json("POST", "/v2/repository/index", timeout_s)
        except RemoteError as error:
            if not error.missing:
                raise
            listed = _object(await self._json("GET", "/v2/models", timeout_s)).get("models")
            items = [{"name": name, "state": "READY"} for name in listed] if isinstance(listed, list) else None
        if not isinstance(items, list):
            raise RemoteError(f"{self._channel.name} has no model index that can be read; name its models instead")
        return _index(items)

    async def model(self, name: str, version: str, timeout_s: float, *, config: bool) -> RemoteModel:
        path = model_path(name, version)
        metadata = _object(await self._json("GET", path, timeout_s))
        stated: Mapping[str, Any] | None = None
        if config:
            try:
                stated = _object(await self._json("GET", f"{path}/config", timeout_s))
            except RemoteError as error:
                if not error.missing:
                    raise
        return described(metadata, stated, name, version)

    async def model_ready(self, name: str, version: str, timeout_s: float) -> bool:
        answer = await self._ask("GET", f"{model_path(name, version)}/ready", timeout_s)
        if answer.status != 200:
            return False
        try:
            document = orjson.loads(answer.body) if answer.body else None
        except orjson.JSONDecodeError:
            return True
        return not (isinstance(document, dict) and document.get("ready") is False)  # KServe says it in the body

    async def _json(self, method: str, path: str, timeout_s: float) -> Any:
        answer = await self._ask(method, path, timeout_s)
        if answer.status != 200:
            failure = of_status(answer.status, http_words(answer, self._secrets), self._channel.name)
            raise RemoteError(failure.message, missing=answer.status // 100 == 4 or failure.sign is Sign.MISSING)
        try:
            return orjson.loads(answer.body)
        except orjson.JSONDecodeError:
            raise RemoteError(f"{self._channel.name} did not answer with JSON: is it an inference server?") from None

    async def _ask(self, method: str, path: str, timeout_s: float) -> HttpAnswer:
        request = http_head(self._endpoint, method, path)
        request += b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}" if method == "POST" else b"\r\n"
        answer = await _asked(self._channel, request, timeout_s)
        assert isinstance(answer, HttpAnswer)  # noqa: S101  # what the channel's connections give
        return answer


class GrpcQueries:
    """Fits `Queries`."""

    def __init__(self, channel: Channel, endpoint: Endpoint) -> None:
        self._channel = channel
        self._endpoint = endpoint
        self._secrets = tuple(endpoint.headers.values())

    async def info(self, timeout_s: float) -> ServerInfo:
        try:
            found = await self._call("ServerMetadata", timeout_s)
        except RemoteError as error:
            if error.missing:
                return ServerInfo("", "")
            raise
        return ServerInfo(found.name, found.version, tuple(found.extensions))

    async def index(self, timeout_s: float) -> tuple[IndexEntry, ...]:
        found = await self._call("RepositoryIndex", timeout_s)
        return _index(
            [{"name": m.name, "version": m.version, "state": m.state, "reason": m.reason} for m in found.models]
        )

    async def model(self, name: str, version: str, timeout_s: float, *, config: bool) -> RemoteModel:
        found = await self._call("ModelMetadata", timeout_s, name=name, version=version)
        metadata = {
            "name": found.name,
            "versions": [*found.versions],
            "platform": found.platform,
            "inputs": [_tensor_document(tensor) for tensor in found.inputs],
            "outputs": [_tensor_document(tensor) for tensor in found.outputs],
        }
        stated: dict[str, Any] | None = None
        if config:
            try:
                answer = await self._call("ModelConfig", timeout_s, name=name, version=version)
                stated = _config_document(answer.config)
            except RemoteError as error:
                if not error.missing:
                    raise
        return described(metadata, stated, name, version)

    async def model_ready(self, name: str, version: str, timeout_s: float) -> bool:
        return bool((await self._call("ModelReady", timeout_s, name=name, version=version)).ready)

    async def _call(self, method: str, timeout_s: float, **fields: str) -> Any:
        body = message(f"inference.{method}Request")(**fields).SerializeToString()
        request = GrpcRequest(
            grpc_block(self._endpoint, method) + grpc_timeout(timeout_s), b"\0" + len(body).to_bytes(4, "big") + body
        )
        answer = await _asked(self._channel, request, timeout_s)
        assert isinstance(answer, GrpcAnswer)  # noqa: S101  # what the channel's connections give
        if answer.status != 200 or answer.code:
            failure = grpc_refusal(answer, self._channel.name, self._secrets)
            raise RemoteError(failure.message, missing=failure.sign is Sign.MISSING)
        try:
            return message(f"inference.{method}Response").FromString(bytes(answer.message))
        except DecodeError:
            raise RemoteError(f"{self._channel.name} answered with a message that cannot be read") from None


async def _asked(channel: Channel, request: Any, timeout_s: float) -> Any:
    try:
        answer = await channel.ask(request, timeout_s)
    except TimeoutError:
        raise RemoteError(f"{channel.name} gave no answer within {timeout_s:g} s") from None
    if isinstance(answer, Failure):
        raise RemoteError(answer.message, connect=answer.sign is Sign.CONNECT)
    return answer


# -- answers -------------------------------------------------------------------------------------------------------


def _object(document: Any) -> Mapping[str, Any]:
    if not isinstance(document, dict):
        raise RemoteError("the server answered with something else than a JSON object")
    return document


def _info(document: Mapping[str, Any]) -> ServerInfo:
    extensions = document.get("extensions")
    listed = tuple([e for e in extensions if isinstance(e, str)]) if isinstance(extensions, list) else ()
    return ServerInfo(said(str(document.get("name", ""))), said(str(document.get("version", ""))), listed)


def _index(items: list[Any]) -> tuple[IndexEntry, ...]:
    found = []
    for item in items[:MAX_MODELS]:
        name = item.get("name") if isinstance(item, dict) else None
        if isinstance(name, str) and 0 < len(name) <= MAX_NAME:
            ready = str(item.get("state")).rpartition(".")[2] == "READY"  # MLServer's gRPC says State.READY
            version = item.get("version")
            text = said(str(item.get("reason") or ""))
            found.append(IndexEntry(name, version if isinstance(version, str) else "", ready, text))
    return tuple(found)


def described(metadata: Mapping[str, Any], config: Mapping[str, Any] | None, name: str, version: str) -> RemoteModel:
    """Metadata, and the configuration where the server has one, as a model.

    Raises:
        RemoteError: they cannot be used, or the model answers with streams.
    """
    stated = config or {}
    policy = stated.get("model_transaction_policy")
    if isinstance(policy, dict) and policy.get("decoupled") is True:
        raise RemoteError(f"model '{name}' answers one request with many (decoupled), which is not served")
    batching = stated.get("dynamic_batching")
    delay = batching.get("max_queue_delay_microseconds") if isinstance(batching, dict) else 0
    rows = stated.get("max_batch_size", 0) if config is not None else None
    inputs = stated.get("input")
    optional = {item.get("name") for item in (inputs if isinstance(inputs, list) else ()) if _is_optional(item)}
    versions = metadata.get("versions")
    return RemoteModel(
        name,
        version,
        tuple([str(v) for v in versions]) if isinstance(versions, list) else (),
        said(str(metadata.get("platform") or "")),
        _tensors(metadata.get("inputs"), "input", optional),
        _tensors(metadata.get("outputs"), "output", set()),
        rows if type(rows) is int and rows >= 0 else None,
        False,
        bool(stated.get("sequence_batching")),
        int(delay) if isinstance(delay, (int, str)) and str(delay).isdigit() else 0,
        metadata,
    )


def _is_optional(item: Any) -> bool:
    return isinstance(item, dict) and item.get("optional") is True


def _tensors(items: Any, role: str, optional: set[Any]) -> tuple[SignatureTensor, ...]:
    if items is None:
        return ()
    if not isinstance(items, list) or len(items) > MAX_TENSORS:
        raise RemoteError(f"the server lists the model's {role}s in a form that cannot be read")
    found = [_tensor(item, role, optional) for item in items]
    if len({tensor.name for tensor in found}) != len(found):
        raise RemoteError(f"the server lists an {role} of the model twice")
    return tuple(found)


def _tensor(item: Any, role: str, optional: set[Any]) -> SignatureTensor:
    name = item.get("name") if isinstance(item, dict) else None
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise RemoteError(f"the server lists an {role} of the model without a name")
    where = f"{role} '{said(name)}' of the model"
    datatype = DATATYPE.get(str(item.get("datatype")))
    if datatype is None:
        raise RemoteError(
            f"{where} has the datatype '{said(str(item.get('datatype')))}', which is none of the protocol"
        )
    shape = item.get("shape")
    if isinstance(shape, list):
        shape = [int(dim) if isinstance(dim, str) and dim.lstrip("-").isdigit() else dim for dim in shape]
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(type(dim) is int and dim >= -1 for dim in shape):
        raise RemoteError(f"{where} has a shape that cannot be read")
    return SignatureTensor(name, datatype, tuple([None if dim == -1 else dim for dim in shape]), name in optional)


def _tensor_document(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": [*tensor.shape]}


def _config_document(config: Any) -> dict[str, Any]:
    """What `described` looks at, as Triton's JSON has it."""
    found: dict[str, Any] = {
        "max_batch_size": config.max_batch_size,
        "model_transaction_policy": {"decoupled": config.model_transaction_policy.decoupled},
        "input": [{"name": item.name, "optional": item.optional} for item in config.input],
    }
    if config.HasField("sequence_batching"):
        found["sequence_batching"] = {"stated": True}
    if config.HasField("dynamic_batching"):
        delay = config.dynamic_batching.max_queue_delay_microseconds
        found["dynamic_batching"] = {"max_queue_delay_microseconds": delay}
    return found


def signature_fault(
    inputs: tuple[SignatureTensor, ...], outputs: tuple[SignatureTensor, ...], found: RemoteModel
) -> str:
    """Why a server's model cannot stand in for one with these tensors; empty where it can.

    Inputs must be the same, but the server's may have more optional ones; its outputs must be at least these. Dims
    agree where they are equal or either side has a variable one. What the server does not describe is not judged.
    """
    for role, wanted, given in (("input", inputs, found.inputs), ("output", outputs, found.outputs)):
        if not given:
            continue
        of_server = {tensor.name: tensor for tensor in given}
        for tensor in wanted:
            other = of_server.pop(tensor.name, None)
            if other is None:
                if tensor.optional:
                    continue
                return f"signature mismatch: it has no {role} '{tensor.name}'"
            if other.datatype is not tensor.datatype:
                return f"signature mismatch: its {role} '{tensor.name}' is {other.datatype}, not {tensor.datatype}"
            if not _agree(tensor.shape, other.shape):
                return f"signature mismatch: its {role} '{tensor.name}' has shape {_shown(other.shape)}, not " + _shown(
                    tensor.shape
                )
        if role == "input" and (more := [t.name for t in of_server.values() if not t.optional]):
            return f"signature mismatch: it wants an input '{more[0]}'"
    return ""


def _agree(ours: tuple[int | None, ...], theirs: tuple[int | None, ...]) -> bool:
    return len(ours) == len(theirs) and all(a is None or b is None or a == b for a, b in zip(ours, theirs, strict=True))


def _shown(shape: tuple[int | None, ...]) -> str:
    return str([-1 if dim is None else dim for dim in shape])
