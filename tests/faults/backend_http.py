"""The programmable backend's HTTP/1.1 side: enough of the protocol for a well-behaved client, and every fault by hand.

Requests are answered one after the other on a connection. Bytes are written exactly as the behaviour says, which is
why no HTTP library is used.
"""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
from collections.abc import Callable
from functools import cache
from typing import Any, Final, cast

import numpy as np
import orjson

from tests.faults.backend_documents import Documents
from tests.faults.backend_engine import Ended, Engine
from tests.faults.behaviour import Fault
from tests.faults.nonce import INPUT, MODEL, OUTPUT, Nonces

INFER: Final = (f"/v2/models/{MODEL}/infer", f"/v2/models/{MODEL}/versions/1/infer")
PHRASE: Final = {200: "OK", 400: "Bad Request", 404: "Not Found", 429: "Too Many Requests", 503: "Service Unavailable"}
ENDLESS_PIECE: Final = b"A" * (1 << 20)
SECRET: Final = "upstream-secret-7f3a"
"""Stands in every error text of a backend, so that a test can see whether it leaks to clients of others."""


class HttpConnection(asyncio.Protocol):
    def __init__(self, engine: Engine, documents: Documents, connections: set[Any]) -> None:
        self._engine = engine
        self._documents = documents
        self._connections = connections
        self._buffer = b""
        self._served = 0
        self._busy = False
        self._transport: asyncio.Transport = None  # type: ignore[assignment]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._advance()

    def reset(self) -> None:
        """End the connection with RST."""
        connection: socket.socket | None = self._transport.get_extra_info("socket")
        if connection is not None and not self._transport.is_closing():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _advance(self) -> None:
        if self._busy:
            return
        head, separator, rest = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        line, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = line.split(" ")
        headers = {name.strip().lower(): value.strip() for name, _, value in (text.partition(":") for text in lines)}
        if headers.get("transfer-encoding", "").lower() == "chunked":
            taken = _unchunk(rest)
            if taken is None:
                return
            body, self._buffer = taken
        else:
            length = int(headers.get("content-length", "0"))
            if len(rest) < length:
                return
            body, self._buffer = rest[:length], rest[length:]
        self._busy = True
        if method == "POST" and path in INFER:
            self._infer(headers, body)
        else:
            self._answer(*self._documents.answer(method, path))

    def _infer(self, headers: dict[str, str], body: bytes) -> None:
        behaviour = self._engine.behaviour
        if not behaviour.model:
            self._answer(404, {"error": f"Request for unknown model: '{MODEL}' is not found ({SECRET})"})
            return
        size = int(headers.get("inference-header-content-length", len(body)))
        document = orjson.loads(body[:size])
        nonces = _nonces(document, body[size:])
        reused, self._served = self._served > 0, self._served + 1
        asked = document.get("outputs") or []
        binary = bool(document.get("parameters", {}).get("binary_data_output")) or any(
            output.get("parameters", {}).get("binary_data") for output in asked
        )
        self._engine.submit(nonces, reused, lambda ended: self._executed(ended, binary, document.get("id", "")))

    def _executed(self, ended: Ended, binary: bool, ident: str) -> None:
        if self._transport.is_closing():
            return
        special = _BARE.get(ended.fault)
        if special is not None:
            special(self)
        elif ended.fault is Fault.STATUS:
            after = self._engine.behaviour.retry_after_s
            extra = f"Retry-After: {after:g}\r\n" if after else ""
            self._answer(ended.status, {"error": f"made to fail: {SECRET}"}, extra)
        else:
            head, body = _answer_bytes(ended, binary, ident)
            self._deliver(ended.fault, head, body)

    def _deliver(self, fault: Fault, head: str, body: bytes) -> None:
        whole = head.format(length=f"Content-Length: {len(body)}").encode() + body
        half = len(whole) - max(1, len(body) // 2)
        if fault is Fault.RESET_MID:
            self._transport.write(whole[:half])
            asyncio.get_running_loop().call_later(0.002, self.reset)
        elif fault is Fault.CLOSE_MID:
            self._transport.write(whole[:half])
            self._transport.close()
        elif fault is Fault.CHUNKED_UNENDED:
            chunk = f"{len(body):x}\r\n".encode() + body + b"\r\n"
            self._transport.write(head.format(length="Transfer-Encoding: chunked").encode() + chunk)
            self._transport.close()
        elif fault is Fault.DRIP:
            self._drip(whole, 0)
        elif fault is Fault.SLICED:
            for at in range(0, len(whole), 7):
                self._transport.write(whole[at : at + 7])
            self._finished()
        elif fault is Fault.ENDLESS:
            self._transport.write(head.format(length="Content-Length: 1099511627776").encode())
            self._pour()
        elif fault is Fault.ENCODED:
            bomb = _bomb()
            text = head.format(length=f"Content-Encoding: gzip\r\nContent-Length: {len(bomb)}")
            self._transport.write(text.encode() + bomb)
            self._finished()
        else:
            self._transport.write(whole)
            self._finished()

    def _drip(self, whole: bytes, at: int) -> None:
        if not self._transport.is_closing() and at < len(whole):
            self._transport.write(whole[at : at + 1])
            asyncio.get_running_loop().call_later(0.1, self._drip, whole, at + 1)

    def _pour(self) -> None:
        if not self._transport.is_closing():
            if self._transport.get_write_buffer_size() < 4 * len(ENDLESS_PIECE):
                self._transport.write(ENDLESS_PIECE)
            asyncio.get_running_loop().call_later(0.002, self._pour)

    def _garbage(self) -> None:
        self._transport.write(b"\x00\xff\x13\x37 this is no HTTP\r\n" + bytes(range(256)))
        self._transport.close()

    def _answer(self, status: int, document: Any, extra: str = "") -> None:
        body = b"" if document is None else orjson.dumps(document)
        head = (
            f"HTTP/1.1 {status} {PHRASE.get(status, 'Error')}\r\nContent-Type: application/json\r\n{extra}"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._transport.write(head.encode() + body)
        self._finished()

    def _finished(self) -> None:
        self._busy = False
        if self._buffer:
            self._advance()


_BARE: Final[dict[Fault, Callable[[HttpConnection], None]]] = {
    Fault.RESET_BEFORE: HttpConnection.reset,
    Fault.RESET_AFTER: HttpConnection.reset,
    Fault.REFUSED_STREAM: HttpConnection.reset,
    Fault.GOAWAY: HttpConnection.reset,
    Fault.CLOSE_REUSED: lambda connection: connection._transport.close(),
    Fault.GARBAGE: HttpConnection._garbage,
    Fault.HANG: lambda _: None,
}
"""Faults that need no answer to be made."""


@cache
def _bomb() -> bytes:
    return gzip.compress(bytes(64 << 20), 1)


def _nonces(document: dict[str, Any], blob: bytes) -> Nonces:
    (tensor,) = document["inputs"]
    assert tensor["name"] == INPUT
    assert tensor["datatype"] == "INT64"
    rows = tensor["shape"][0]
    if "binary_data_size" in tensor.get("parameters", {}):
        return np.frombuffer(blob, np.int64, rows)
    return np.array(tensor["data"], np.int64).reshape(rows)


def _answer_bytes(ended: Ended, binary: bool, ident: str) -> tuple[str, bytes]:
    """Head with a place for `length`, and body."""
    fault, values = ended.fault, reshaped(ended)
    output: dict[str, Any] = {
        "name": "not_" + OUTPUT if fault is Fault.WRONG_NAME else OUTPUT,
        "datatype": "FP64" if fault is Fault.WRONG_DATATYPE else "INT64",
        "shape": [len(values), 1, 1] if fault is Fault.WRONG_SHAPE else [len(values), 1],
    }
    blob = b""
    if binary:
        blob = values.tobytes()
        output["parameters"] = {"binary_data_size": len(blob)}
    else:
        output["data"] = values.tolist()
    document = {"model_name": MODEL, "model_version": "1", "outputs": [] if fault is Fault.MISSING_OUTPUT else [output]}
    if fault is Fault.MISSING_OUTPUT:
        blob = b""
    if ident:
        document["id"] = ident
    text = orjson.dumps(document)
    if fault is Fault.BAD_JSON:
        text = text[:-3] + b",,}"
    kind = "application/octet-stream" if binary else "application/json"
    size = f"Inference-Header-Content-Length: {len(text)}\r\n" if binary else ""
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{size}{{length}}\r\n\r\n", text + blob


def reshaped(ended: Ended) -> Nonces:
    """The values with as many rows as the fault wants."""
    if ended.fault is Fault.ROW_MORE:
        return np.append(ended.values, ended.values[-1:])
    if ended.fault is Fault.ROW_LESS:
        return ended.values[:-1]
    return ended.values[:0] if ended.fault is Fault.NO_ROWS else ended.values


def _unchunk(data: bytes) -> tuple[bytes, bytes] | None:
    """Body and what follows it; None: not all there yet."""
    body, rest = b"", data
    while True:
        line, separator, rest = rest.partition(b"\r\n")
        if not separator:
            return None
        size = int(line.partition(b";")[0], 16)
        if len(rest) < size + 2:
            return None
        body, rest = body + rest[:size], rest[size + 2 :]
        if size == 0:
            return body, rest
