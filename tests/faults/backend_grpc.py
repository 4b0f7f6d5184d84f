"""The programmable backend's gRPC side: HTTP/2 frames by hand (RFC 9113), so that a fault can be any frame at all.

Enough for a well-behaved client: unary calls, flow control in both directions, PING and SETTINGS answered.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast

import hpack
import numpy as np
from google.protobuf import json_format

from gateway.protocol.schema import message
from tests.faults.backend_documents import SERVER, Documents
from tests.faults.backend_engine import Ended, Engine
from tests.faults.backend_http import SECRET, reshaped
from tests.faults.behaviour import Fault
from tests.faults.nonce import INPUT, MODEL, OUTPUT

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
REFUSED_STREAM: Final = 7
INTERNAL_ERROR: Final = 2
LARGE: Final = (1 << 31) - 1
PIECE: Final = 16_384
CODE: Final = {400: 3, 404: 5, 429: 8, 500: 13, 501: 12, 502: 14, 503: 14, 504: 4}
"""gRPC code for the HTTP status of a fault."""


@dataclass
class Stream:
    path: str
    body: bytearray = field(default_factory=bytearray)
    window: int = 65_535
    waiting: bytearray = field(default_factory=bytearray)
    """Bytes of DATA that no window has room for yet."""
    trailers: list[tuple[str, str]] = field(default_factory=list)


class GrpcConnection(asyncio.Protocol):
    def __init__(self, engine: Engine, documents: Documents, connections: set[Any]) -> None:
        self._engine = engine
        self._documents = documents
        self._connections = connections
        self._buffer = b""
        self._greeted = False
        self._decoder = hpack.Decoder()
        self._encoder = hpack.Encoder()
        self._streams: dict[int, Stream] = {}
        self._window = 65_535
        self._initial = 65_535
        self._served = 0
        self._block = b""
        self._transport: asyncio.Transport = None  # type: ignore[assignment]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._connections.add(self)
        settings = struct.pack(">HIHIHI", 4, LARGE, 3, 1000, 5, PIECE)
        self._frame(SETTINGS, 0, 0, settings)
        self._frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", LARGE - 65_535))

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)

    def reset(self) -> None:
        """End the connection with RST."""
        connection: socket.socket | None = self._transport.get_extra_info("socket")
        if connection is not None and not self._transport.is_closing():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._greeted:
            if len(self._buffer) < len(PREFACE):
                return
            self._buffer = self._buffer[len(PREFACE) :]
            self._greeted = True
        while len(self._buffer) >= 9:
            length = int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < 9 + length:
                return
            kind, flags = self._buffer[3], self._buffer[4]
            stream = int.from_bytes(self._buffer[5:9], "big") & LARGE
            payload, self._buffer = self._buffer[9 : 9 + length], self._buffer[9 + length :]
            self._received(kind, flags, stream, payload)

    def _received(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind in {HEADERS, CONTINUATION}:
            self._headers(kind, flags, number, payload)
        elif kind == DATA:
            self._data(flags, number, payload)
        elif kind == SETTINGS and not flags & ACK:
            self._settings(payload)
        elif kind == PING and not flags & ACK:
            self._frame(PING, ACK, 0, payload)
        elif kind == WINDOW_UPDATE:
            self._more_window(number, int.from_bytes(payload, "big"))
        elif kind == RST_STREAM:
            self._streams.pop(number, None)

    def _headers(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == HEADERS:
            if flags & PADDED:
                payload = payload[1 : len(payload) - payload[0]]
            if flags & PRIORITY:
                payload = payload[5:]
        self._block += payload
        if not flags & END_HEADERS:
            return
        fields: dict[Any, Any] = dict(self._decoder.decode(self._block))
        self._block = b""
        self._streams[number] = Stream(str(fields.get(":path", "")), window=self._initial)

    def _data(self, flags: int, number: int, payload: bytes) -> None:
        if payload:
            self._frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", len(payload)))
        stream = self._streams.get(number)
        if stream is None:
            return
        stream.body += payload[1 : len(payload) - payload[0]] if flags & PADDED else payload
        if flags & END_STREAM:
            self._call(number, stream)

    def _settings(self, payload: bytes) -> None:
        for key, value in struct.iter_unpack(">HI", payload):
            if key == 4:
                for stream in self._streams.values():
                    stream.window += value - self._initial
                self._initial = value
        self._frame(SETTINGS, ACK, 0, b"")

    def _more_window(self, number: int, increment: int) -> None:
        if number == 0:
            self._window += increment
            for each in list(self._streams):
                self._pump(each)
        elif number in self._streams:
            self._streams[number].window += increment
            self._pump(number)

    # --- Calls ------------------------------------------------------------------------------------------------------

    def _call(self, number: int, stream: Stream) -> None:
        method = stream.path.rpartition("/")[2]
        body = bytes(stream.body[5:])
        if method == "ModelInfer":
            self._infer(number, body)
            return
        answer = self._documents_of(method, body)
        if answer is None:
            self._fail(number, 5, f"no such thing: {method}")
        else:
            self._answer(number, answer.SerializeToString())

    def _documents_of(self, method: str, body: bytes) -> Any:
        behaviour = self._engine.behaviour
        made: dict[str, dict[str, Any]] = {
            "ServerLive": {"live": True},
            "ServerReady": {"ready": behaviour.ready},
            "ServerMetadata": SERVER,
        }
        if method in made:
            return json_format.ParseDict(made[method], message(f"inference.{method}Response")())
        if method == "RepositoryIndex":
            return json_format.ParseDict({"models": self._documents.index()}, message(f"inference.{method}Response")())
        if method not in {"ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"}:
            return None
        asked = message(f"inference.{method}Request").FromString(body)
        if asked.name != MODEL or not behaviour.model:
            return None
        made = {
            "ModelReady": {"ready": behaviour.ready},
            "ModelMetadata": self._documents.metadata(),
            "ModelConfig": {"config": self._documents.config()},
            "ModelStatistics": {"model_stats": [{"name": MODEL, "version": "1"}]},
        }
        return json_format.ParseDict(made[method], message(f"inference.{method}Response")())

    def _infer(self, number: int, body: bytes) -> None:
        request = message("inference.ModelInferRequest").FromString(body)
        if not self._engine.behaviour.model:
            self._fail(number, 5, f"Request for unknown model: '{MODEL}' is not found ({SECRET})")
            return
        (tensor,) = request.inputs
        assert (tensor.name, tensor.datatype) == (INPUT, "INT64")
        raw = request.raw_input_contents
        nonces = np.frombuffer(raw[0], np.int64) if raw else np.array(tensor.contents.int64_contents, np.int64)
        reused, self._served = self._served > 0, self._served + 1
        self._engine.submit(nonces, reused, lambda ended: self._executed(number, ended, request.id))

    def _executed(self, number: int, ended: Ended, ident: str) -> None:
        if self._transport.is_closing() or number not in self._streams:
            return
        bare = _BARE.get(ended.fault)
        if bare is not None:
            bare(self, number)
            return
        if ended.fault is Fault.STATUS:
            after = self._engine.behaviour.retry_after_s
            self._fail(number, CODE.get(ended.status, 13), f"made to fail: {SECRET}", after)
            return
        data = _answer_message(ended, ident)
        if ended.fault is Fault.BAD_JSON:
            data = b"\xff" * len(data)
        self._deliver(number, ended.fault, data)

    def _deliver(self, number: int, fault: Fault, data: bytes) -> None:
        whole = b"\0" + len(data).to_bytes(4, "big") + data
        if fault in {Fault.RESET_MID, Fault.CLOSE_MID, Fault.CHUNKED_UNENDED}:
            self._open(number)
            self._frame(DATA, 0, number, whole[: len(whole) // 2])
            if fault is Fault.RESET_MID:
                asyncio.get_running_loop().call_later(0.002, self.reset)
            else:
                self._transport.close()
        elif fault is Fault.DRIP:
            self._open(number)
            self._drip(number, whole, 0)
        elif fault is Fault.SLICED:
            self._open(number)
            for at in range(0, len(whole), 7):
                self._frame(DATA, 0, number, whole[at : at + 7])
            self._window -= len(whole)
            self._trailers(number, [("grpc-status", "0")])
        elif fault is Fault.ENDLESS:
            self._open(number)
            self._frame(DATA, 0, number, b"\0\xff\xff\xff\xff")
            self._streams[number].waiting += bytes(64 << 20)
            self._pump(number)
        else:
            self._answer(number, data)

    def _answer(self, number: int, data: bytes) -> None:
        self._open(number)
        stream = self._streams[number]
        stream.waiting += b"\0" + len(data).to_bytes(4, "big") + data
        stream.trailers = [("grpc-status", "0")]
        self._pump(number)

    def _open(self, number: int) -> None:
        block = self._encoder.encode([(":status", "200"), ("content-type", "application/grpc")])
        self._frame(HEADERS, END_HEADERS, number, block)

    def _pump(self, number: int) -> None:
        stream = self._streams[number]
        while stream.waiting and (room := min(self._window, stream.window, PIECE, len(stream.waiting))) > 0:
            self._frame(DATA, 0, number, bytes(stream.waiting[:room]))
            del stream.waiting[:room]
            stream.window -= room
            self._window -= room
        if not stream.waiting and stream.trailers:
            self._trailers(number, stream.trailers)

    def _trailers(self, number: int, fields: list[tuple[str, str]]) -> None:
        self._frame(HEADERS, END_HEADERS | END_STREAM, number, self._encoder.encode(fields))
        self._streams.pop(number, None)

    def _fail(self, number: int, code: int, text: str, push_back_s: float = 0.0) -> None:
        fields = [(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", str(code))]
        fields.append(("grpc-message", text))
        if push_back_s:
            fields.append(("grpc-retry-pushback-ms", str(round(push_back_s * 1000))))
        self._trailers(number, fields)

    def _drip(self, number: int, whole: bytes, at: int) -> None:
        if not self._transport.is_closing() and number in self._streams and at < len(whole):
            self._frame(DATA, 0, number, whole[at : at + 1])
            asyncio.get_running_loop().call_later(0.1, self._drip, number, whole, at + 1)

    def _garbage(self, _: int) -> None:
        self._transport.write(b"\x00\xff\x13\x37 this is no HTTP/2\r\n" + bytes(range(256)))
        self._transport.close()

    def _go_away(self, number: int) -> None:
        self._frame(GOAWAY, 0, 0, struct.pack(">II", max(0, number - 2), 0))
        self._transport.close()

    def _refuse(self, number: int) -> None:
        self._frame(RST_STREAM, 0, number, struct.pack(">I", REFUSED_STREAM))
        self._streams.pop(number, None)

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if not self._transport.is_closing():
            head = len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
            self._transport.write(head + payload)


_BARE: Final[dict[Fault, Callable[[GrpcConnection, int], None]]] = {
    Fault.RESET_BEFORE: lambda connection, _: connection.reset(),
    Fault.RESET_AFTER: lambda connection, _: connection.reset(),
    Fault.CLOSE_REUSED: GrpcConnection._go_away,
    Fault.GOAWAY: GrpcConnection._go_away,
    Fault.REFUSED_STREAM: GrpcConnection._refuse,
    Fault.GARBAGE: GrpcConnection._garbage,
    Fault.ENCODED: GrpcConnection._garbage,
    Fault.HANG: lambda *_: None,
}
"""Faults that need no answer to be made."""


def _answer_message(ended: Ended, ident: str) -> bytes:
    fault, values = ended.fault, reshaped(ended)
    response = message("inference.ModelInferResponse")(model_name=MODEL, model_version="1", id=ident)
    if fault is not Fault.MISSING_OUTPUT:
        response.outputs.add(
            name="not_" + OUTPUT if fault is Fault.WRONG_NAME else OUTPUT,
            datatype="FP64" if fault is Fault.WRONG_DATATYPE else "INT64",
            shape=[len(values), 1, 1] if fault is Fault.WRONG_SHAPE else [len(values), 1],
        )
        response.raw_output_contents.append(values.tobytes())
    data: bytes = response.SerializeToString()
    return data
