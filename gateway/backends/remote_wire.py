"""One model on one server, over HTTP or gRPC: what goes out for a batch, and what comes back is said in outcomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final, Protocol
from urllib.parse import quote

import orjson

from gateway.backends.interface import Batch, Failure, Success
from gateway.backends.remote_codec import most_bytes
from gateway.backends.remote_connections import Channel, Done, Exchange
from gateway.backends.remote_endpoint import Endpoint, ServerInfo, said
from gateway.backends.remote_grpc_codec import GrpcCodec
from gateway.backends.remote_http1 import HttpAnswer
from gateway.backends.remote_http2 import GrpcAnswer, GrpcRequest, literal
from gateway.backends.remote_http_codec import HttpCodec
from gateway.backends.remote_outcome import broken, milliseconds, of_code, of_status, retry_after_s
from gateway.core.batchability import SignatureTensor
from gateway.core.outcome import Sign

SERVICE: Final = "/inference.GRPCInferenceService/"
CODE_NAMES: Final = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
_GATEWAY_TIMEOUT: Final = 504
_DEADLINE_EXCEEDED: Final = 4
_MAX_TIMEOUT_MS: Final = 99_999_999
"""gRPC writes at most eight digits."""


class Wire(Protocol):
    def begin(self, batch: Batch, budget_s: float, done: Done, /) -> Exchange:
        """Send it. `budget_s`: what the server is told of the time that it has. Raises NotEncodable."""

    def outcome(self, result: Any, batch: Batch, /) -> Success | Failure:
        """What `done` was called with, read."""

    def out_of_time(self, result: Any, /) -> bool:
        """Whether the server says that the time it was told of is over."""


class HttpWire:
    """Fits `Wire`."""

    def __init__(
        self,
        channel: Channel,
        endpoint: Endpoint,
        info: ServerInfo,
        model: tuple[str, str],
        inputs: Sequence[SignatureTensor],
        outputs: Sequence[SignatureTensor],
    ) -> None:
        """`model`: its name and version, empty: whichever the server chooses."""
        self._channel = channel
        self._bound = _bounds(outputs, endpoint.max_answer_bytes)
        self._secrets = tuple(endpoint.headers.values())
        self._triton = info.is_triton
        binary = endpoint.json == "auto" and info.binary
        head = http_head(endpoint, "POST", f"{model_path(*model)}/infer")
        self._codec = HttpCodec(channel.name, head, inputs, outputs, binary=binary, version=model[1])

    def begin(self, batch: Batch, budget_s: float, done: Done) -> Exchange:
        request, tag = self._codec.request(batch, budget_s, _timeout_us(self._triton, budget_s))
        exchange = self._channel.begin(request, done, self._bound(batch.rows))
        exchange.tag = tag
        return exchange

    def outcome(self, result: Any, batch: Batch) -> Success | Failure:
        if isinstance(result, Failure):
            return result
        answer: HttpAnswer = result
        if answer.status == 200:
            outcome = self._codec.success(answer, batch.outputs)
            if isinstance(outcome, Failure) and outcome.sign is not Sign.MISMATCH:
                self._channel.drop_idle()  # who knows whose answers wait there
            return outcome
        after = retry_after_s(answer.header(b"retry-after"), answer.header(b"date"))
        return of_status(answer.status, http_words(answer, self._secrets), self._channel.name, after)

    def out_of_time(self, result: Any) -> bool:
        return isinstance(result, HttpAnswer) and result.status == _GATEWAY_TIMEOUT


class GrpcWire:
    """Fits `Wire`."""

    def __init__(
        self,
        channel: Channel,
        endpoint: Endpoint,
        info: ServerInfo,
        model: tuple[str, str],
        inputs: Sequence[SignatureTensor],
        outputs: Sequence[SignatureTensor],
    ) -> None:
        """`model`: its name and version, empty: whichever the server chooses."""
        self._channel = channel
        self._bound = _bounds(outputs, endpoint.max_answer_bytes)
        self._secrets = tuple(endpoint.headers.values())
        self._triton = info.is_triton
        self._block = grpc_block(endpoint, "ModelInfer")
        self._codec = GrpcCodec(channel.name, *model, inputs, outputs)

    def begin(self, batch: Batch, budget_s: float, done: Done) -> Exchange:
        message = self._codec.request(batch, _timeout_us(self._triton, budget_s))
        request = GrpcRequest(self._block + grpc_timeout(budget_s), message)
        return self._channel.begin(request, done, self._bound(batch.rows))

    def outcome(self, result: Any, batch: Batch) -> Success | Failure:
        if isinstance(result, Failure):
            return result
        answer: GrpcAnswer = result
        if answer.status == 200 and answer.code == 0:
            return self._codec.success(answer.message, batch.outputs)
        return grpc_refusal(answer, self._channel.name, self._secrets)

    def out_of_time(self, result: Any) -> bool:
        return isinstance(result, GrpcAnswer) and result.status == 200 and result.code == _DEADLINE_EXCEEDED


def _bounds(outputs: Sequence[SignatureTensor], most: int) -> Callable[[int], int]:
    """Rows of a batch → bytes that its answer may have."""

    def bound(rows: int) -> int:
        return min(most_bytes(outputs, rows) or most, most)

    return lru_cache(maxsize=64)(bound)


def _timeout_us(triton: bool, budget_s: float) -> int:
    """Triton's own parameter, which lets it drop a request that waited too long in its queue."""
    return max(int(budget_s * 1e6), 1) if triton and budget_s < math.inf else 0


def model_path(name: str, version: str) -> str:
    path = f"/v2/models/{quote(name, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def http_head(endpoint: Endpoint, method: str, path: str) -> bytes:
    """Request line and the fields that every request has.

    Raises:
        ValueError: a configured header would break the line it stands in.
    """
    lines = [f"{method} {path} HTTP/1.1", f"Host: {endpoint.authority}", "Accept-Encoding: identity"]
    for name, value in endpoint.headers.items():
        if not name or not name.isascii() or any(c in name + value for c in "\r\n\0") or ":" in name:
            raise ValueError(f"the header '{name[:64]}' cannot be sent: it holds a line end, a NUL or a colon")
        lines.append(f"{name}: {value}")
    return "".join([f"{line}\r\n" for line in lines]).encode("latin-1")


def grpc_block(endpoint: Endpoint, method: str) -> bytes:
    """The header block of every call of a method. Raises ValueError: a configured header cannot be sent."""
    http_head(endpoint, "POST", "/")
    scheme = "https" if endpoint.secure else "http"
    fields = [
        literal(":method", "POST"),
        literal(":scheme", scheme),
        literal(":path", SERVICE + method),
        literal(":authority", endpoint.authority),
        literal("te", "trailers"),
        literal("content-type", "application/grpc"),
        *[literal(name.lower(), value, secret=True) for name, value in endpoint.headers.items()],
    ]
    block = b"".join(fields)
    if len(block) > 16_000:
        raise ValueError("the configured headers are longer than 16000 bytes together")
    return block


def grpc_timeout(budget_s: float) -> bytes:
    if budget_s == math.inf:
        return b""
    return literal("grpc-timeout", f"{min(max(int(budget_s * 1000), 1), _MAX_TIMEOUT_MS)}m")


def http_words(answer: HttpAnswer, secrets: Sequence[str]) -> str:
    """The server's text, whatever its dialect: `error` (OIP), `detail` (MLServer, KServe) or plain text."""
    try:
        document = orjson.loads(answer.body) if len(answer.body) < 65_536 else None
    except orjson.JSONDecodeError:
        document = None
    if isinstance(document, dict):
        for key in ("error", "detail"):
            if words := said(document.get(key) or "", secrets):
                return words
    return said(answer.body, secrets)


def grpc_refusal(answer: GrpcAnswer, server: str, secrets: Sequence[str]) -> Failure:
    """An answer that is not OK."""
    text = said(answer.text, secrets)
    if answer.status != 200:
        return of_status(answer.status, text, server, _retry_after_s(answer))
    if not 0 <= answer.code < len(CODE_NAMES):
        return broken(f"{server} gave an answer without a status of gRPC")
    after = milliseconds(answer.trailers.get("grpc-retry-pushback-ms", "")) or _retry_after_s(answer)
    return of_code(answer.code, CODE_NAMES[answer.code], text, server, after)


def _retry_after_s(answer: GrpcAnswer) -> float:
    return retry_after_s(answer.trailers.get("retry-after", ""), answer.trailers.get("date", ""))
