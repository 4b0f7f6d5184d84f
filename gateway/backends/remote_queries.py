"""Questions to a server besides inference: what it is, which models it has, what they look like.

Rules: every question has a time limit and a bound on its answer; whatever a server says is checked before it is used.
Extensions of the protocol are asked for only where the server says that it has them, but for the index, which some
servers have without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Protocol, TypeGuard

import orjson

from gateway.backends.remote_codec import MAX_DIM
from gateway.backends.remote_connections import Channel
from gateway.backends.remote_endpoint import (
    Endpoint,
    IndexEntry,
    RemoteError,
    RemoteModel,
    ServerInfo,
    Unreadable,
    said,
)
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
MAX_VERSION: Final = 128
MAX_LISTED: Final = 1000
"""Versions and extensions that are looked at."""
MAX_INT32: Final = 2**31 - 1
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
            raise RemoteError(failure.in_full, missing=answer.status // 100 == 4 or failure.sign is Sign.MISSING)
        try:
            return orjson.loads(answer.body)
        except orjson.JSONDecodeError:
            raise Unreadable(f"{self._channel.name} did not answer with JSON: is it an inference server?") from None

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
        return _info({"name": found.name, "version": found.version, "extensions": [*found.extensions]})

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
            raise RemoteError(failure.in_full, missing=failure.sign is Sign.MISSING)
        try:
            return message(f"inference.{method}Response").FromString(bytes(answer.message))
        except DecodeError:
            raise Unreadable(f"{self._channel.name} answered with a message that cannot be read") from None


async def _asked(channel: Channel, request: Any, timeout_s: float) -> Any:
    try:
        answer = await channel.ask(request, timeout_s)
    except TimeoutError:
        raise RemoteError(f"{channel.name} gave no answer within {timeout_s:g} s", late=True) from None
    if isinstance(answer, Failure):
        raise RemoteError(answer.message, connect=answer.sign is Sign.CONNECT)
    return answer


# -- answers -------------------------------------------------------------------------------------------------------


def _object(document: Any) -> Mapping[str, Any]:
    if not isinstance(document, dict):
        raise Unreadable("the server answered with something else than a JSON object")
    return document


def _info(document: Mapping[str, Any]) -> ServerInfo:
    extensions = document.get("extensions")
    listed = tuple([e for e in extensions if isinstance(e, str)]) if isinstance(extensions, list) else ()
    return ServerInfo(said(document.get("name", "")), said(document.get("version", "")), listed[:MAX_LISTED])


def _index(items: list[Any]) -> tuple[IndexEntry, ...]:
    found = []
    for item in items[:MAX_MODELS]:
        name = item.get("name") if isinstance(item, dict) else None
        if _is_name(name):
            ready = said(item.get("state")).rpartition(".")[2] == "READY"  # MLServer's gRPC says State.READY
            found.append(IndexEntry(name, _version(item.get("version")), ready, said(item.get("reason"))))
    return tuple(found)


def described(metadata: Mapping[str, Any], config: Mapping[str, Any] | None, name: str, version: str) -> RemoteModel:
    """Metadata, and the configuration where the server has one, as a model.

    Raises:
        RemoteError: they cannot be used, or the model answers with streams.
    """
    stated = config or {}
    policy = stated.get("model_transaction_policy")
    if isinstance(policy, dict) and policy.get("decoupled") is True:
        raise Unreadable(f"model '{name}' answers one request with many (decoupled), which is not served")
    batching = stated.get("dynamic_batching")
    delay = batching.get("max_queue_delay_microseconds") if isinstance(batching, dict) else 0
    rows = stated.get("max_batch_size", 0) if config is not None else None
    inputs = stated.get("input")
    optional = {item["name"] for item in (inputs if isinstance(inputs, list) else ()) if _is_optional(item)}
    versions = metadata.get("versions")
    return RemoteModel(
        name,
        version,
        tuple([v for v in map(_version, versions[:MAX_LISTED]) if v]) if isinstance(versions, list) else (),
        said(metadata.get("platform")),
        _tensors(metadata.get("inputs"), "input", optional),
        _tensors(metadata.get("outputs"), "output", set()),
        rows if type(rows) is int and 0 <= rows <= MAX_INT32 else None,
        False,
        bool(stated.get("sequence_batching")),
        min(_whole(delay) or 0, MAX_INT32),
        metadata,
    )


def _is_optional(item: Any) -> bool:
    return isinstance(item, dict) and item.get("optional") is True and isinstance(item.get("name"), str)


def _is_name(name: object) -> TypeGuard[str]:
    """Names get into messages, logs and headers."""
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()


def _version(value: object) -> str:
    """Empty: it is none that can be asked for."""
    text = str(value) if type(value) in (str, int) else ""
    return text if len(text) <= MAX_VERSION and text.isprintable() else ""


def _whole(value: object) -> int | None:
    """Servers write integers of 64 bits as numbers or as text."""
    if type(value) is str and re.fullmatch("-?[0-9]{1,19}", value):
        value = int(value)
    return value if type(value) is int and abs(value) <= MAX_DIM else None


def _tensors(items: Any, role: str, optional: set[Any]) -> tuple[SignatureTensor, ...]:
    if items is None:
        return ()
    if not isinstance(items, list) or len(items) > MAX_TENSORS:
        raise Unreadable(f"the server lists the model's {role}s in a form that cannot be read")
    found = [_tensor(item, role, optional) for item in items]
    if len({tensor.name for tensor in found}) != len(found):
        raise Unreadable(f"the server lists an {role} of the model twice")
    return tuple(found)


def _tensor(item: Any, role: str, optional: set[Any]) -> SignatureTensor:
    name = item.get("name") if isinstance(item, dict) else None
    if not _is_name(name):
        raise Unreadable(f"the server lists an {role} of the model without a name that can be used")
    where = f"{role} '{said(name)}' of the model"
    stated = said(item.get("datatype"))
    datatype = DATATYPE.get(stated)
    if datatype is None:
        raise Unreadable(f"{where} has the datatype '{stated}', which is none of the protocol")
    listed = item.get("shape")
    shape = [_whole(dim) for dim in listed] if isinstance(listed, list) and len(listed) <= MAX_RANK else [None]
    if not all(dim is not None and dim >= -1 for dim in shape):
        raise Unreadable(f"{where} has a shape that cannot be read")
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
    inputs: tuple[SignatureTensor, ...], outputs: tuple[SignatureTensor, ...], found: RemoteModel, max_rows: int = 0
) -> str:
    """Why a server's model cannot stand in for one with these tensors; empty where it can. `max_rows`: of the largest
    batch that it would get; 0: not known.

    It must take whatever is taken here: inputs must be the same, but the server's may have more optional ones, and dims
    that vary where ours are fixed; one that callers may leave out must be optional there too. Its outputs must be at
    least these; dims agree where they are equal or either side has a variable one, since each answer is checked. What
    the server does not describe is not judged.
    """
    if found.max_batch_size and found.max_batch_size < max_rows:
        return (
            f"signature mismatch: it takes at most {found.max_batch_size} rows, and batches have up to {max_rows}; "
            f"write max_batch_size: {found.max_batch_size} for the model"
        )
    for role, wanted, given in (("input", inputs, found.inputs), ("output", outputs, found.outputs)):
        if not given:
            continue
        of_server = {tensor.name: tensor for tensor in given}
        for tensor in wanted:
            fault = _fault_of(role, tensor, of_server.pop(tensor.name, None), found.max_batch_size is not None)
            if fault:
                return f"signature mismatch: {fault}"
        if role == "input" and (more := [t.name for t in of_server.values() if not t.optional]):
            return f"signature mismatch: it wants an input '{said(more[0])}'"
    return ""


def _fault_of(role: str, ours: SignatureTensor, theirs: SignatureTensor | None, optional_is_known: bool) -> str:
    if theirs is None:
        return f"it has no {role} '{ours.name}'"
    if theirs.datatype is not ours.datatype:
        return f"its {role} '{ours.name}' is {theirs.datatype}, not {ours.datatype}"
    if ours.optional and not theirs.optional and optional_is_known:
        return f"it wants {role} '{ours.name}', which callers may leave out"
    agree = _takes if role == "input" else _agree
    if not agree(ours.shape, theirs.shape):
        return f"its {role} '{ours.name}' has shape {_shown(theirs.shape)}, not {_shown(ours.shape)}"
    return ""


def _agree(ours: tuple[int | None, ...], theirs: tuple[int | None, ...]) -> bool:
    return len(ours) == len(theirs) and all(a is None or b is None or a == b for a, b in zip(ours, theirs, strict=True))


def _takes(ours: tuple[int | None, ...], theirs: tuple[int | None, ...]) -> bool:
    return len(ours) == len(theirs) and all(b is None or a == b for a, b in zip(ours, theirs, strict=True))


def _shown(shape: tuple[int | None, ...]) -> str:
    return str([-1 if dim is None else dim for dim in shape])
