"""A small OIP server on real sockets, in the test's own process, scripted byte by byte; HTTP/1.1 and gRPC.

By default it serves one model, `double` (input x and output y, FP32 [-1, 2], y = 2x), well. A test replaces `script`, a
function from each inference request to what is sent: a `Reply` says the exact bytes, where they are cut into pieces,
and what becomes of the connection. Everything received is kept in `requests`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import hpack
import numpy as np

from gateway.protocol.schema import message

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int = 0
    stream: int = 0


@dataclass
class Reply:
    """`cuts`: places in `data` after which there is a pause. `flood`: `more` for ever behind it."""

    data: bytes
    then: Literal["keep", "close", "reset", "hang", "flood"] = "keep"
    cuts: Sequence[int] = ()
    more: bytes = b""


Script = Callable[[Request], Reply]

METADATA: dict[str, Any] = {
    "name": "double",
    "versions": ["1"],
    "platform": "test",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
}


def http(body: bytes, status: int = 200, headers: Sequence[tuple[str, str]] = ()) -> bytes:
    """An answer in HTTP/1.1 with Content-Length."""
    lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(body)}", *[f"{k}: {v}" for k, v in headers]]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def http_json(document: Any, status: int = 200, headers: Sequence[tuple[str, str]] = ()) -> bytes:
    return http(json.dumps(document).encode(), status, headers)


def binary_answer(outputs: Sequence[tuple[str, str, Sequence[int], bytes]]) -> bytes:
    """An inference answer with binary tensors: name, datatype, shape, bytes of each."""
    document = {
        "model_name": "double",
        "outputs": [
            {"name": n, "datatype": d, "shape": list(s), "parameters": {"binary_data_size": len(b)}}
            for n, d, s, b in outputs
        ],
    }
    head = json.dumps(document).encode()
    blobs = b"".join([blob for *_, blob in outputs])
    return http(head + blobs, headers=[("Inference-Header-Content-Length", str(len(head)))])


def doubled(request: Request) -> Reply:
    """What the model `double` answers, in the form in which it was asked."""
    length = request.headers.get("inference-header-content-length")
    if length is None:
        document = json.loads(request.body)
        (given,) = document["inputs"]
        y = {"name": "y", "datatype": "FP32", "shape": given["shape"], "data": [2 * v for v in given["data"]]}
        return Reply(http_json({"model_name": "double", "outputs": [y]}))
    document = json.loads(request.body[: int(length)])
    (given,) = document["inputs"]
    values = np.frombuffer(request.body[int(length) :], "<f4") * np.float32(2)
    return Reply(binary_answer([("y", "FP32", given["shape"], values.tobytes())]))


class Server:
    """What both protocols share. Use `serving`."""

    def __init__(self) -> None:
        self.script: Script = doubled
        self.requests: list[Request] = []
        self.metadata: dict[str, Any] = dict(METADATA)
        self.config: dict[str, Any] = {"max_batch_size": 8, "input": [], "dynamic_batching": {}}
        self.extensions = ["binary_tensor_data", "model_configuration", "model_repository"]
        self.index: list[dict[str, str]] = [{"name": "double", "version": "1", "state": "READY"}, {"name": "cold"}]
        self.name = "scripted"
        self.ready = True
        self.missing = False
        """Whether it does not have the model any more."""
        self.connections = 0
        self.host, self.port = "127.0.0.1", 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def infers(self) -> list[Request]:
        return [request for request in self.requests if request.path.endswith(("/infer", "/ModelInfer"))]

    async def start(self, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._accept, self.host, port or self.port, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and reset every connection."""
        if self._server is not None:
            self._server.close()
            self._server = None
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._run(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
                await self.serve(reader, writer, self.connections)
        finally:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        raise NotImplementedError

    async def send(self, writer: asyncio.StreamWriter, reply: Reply) -> bool:
        """Whether the connection goes on."""
        at = 0
        for cut in [*reply.cuts, len(reply.data)]:
            writer.write(reply.data[at:cut])
            await writer.drain()
            at = cut
            if cut < len(reply.data):
                await asyncio.sleep(0.001)  # so that the pieces arrive apart
        while reply.then == "flood":
            writer.write(reply.more)
            await writer.drain()
        if reply.then == "hang":
            await asyncio.get_running_loop().create_future()
        if reply.then == "close":
            writer.close()
            await writer.wait_closed()
        if reply.then == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        return reply.then == "keep"


class HttpServer(Server):
    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            method, path, _ = head[0].split(" ")
            headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            request = Request(method, path, headers, body, number)
            self.requests.append(request)
            if not await self.send(writer, self._reply(request)):
                return

    def _reply(self, request: Request) -> Reply:
        path = request.path
        if path.endswith("/infer"):
            return self.script(request)
        if path == "/v2":
            return Reply(http_json({"name": self.name, "version": "1", "extensions": self.extensions}))
        if path == "/v2/repository/index":
            return Reply(http_json(self.index))
        if self.missing or "/models/double" not in path:
            return Reply(http_json({"error": "Request for unknown model"}, 400))
        if path.endswith("/ready"):
            return Reply(http(b"", 200 if self.ready else 400))
        return Reply(http_json(self.config if path.endswith("/config") else self.metadata))


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">HBBBL", len(payload) >> 8, len(payload) & 255, kind, flags, stream) + payload


def grpc_frames(
    stream: int, body: bytes | None, code: int = 0, text: str = "", extra: Sequence[tuple[str, str]] = ()
) -> bytes:
    """A whole answer of gRPC; `body` None: trailers only. Header blocks use no table, so they may be cut anywhere."""
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    head = [(":status", "200"), ("content-type", "application/grpc")]
    tail = [("grpc-status", str(code)), ("grpc-message", text), *extra]
    if body is None:
        return frame(1, 5, stream, encoder.encode([*head, *tail]))
    framed = b"\0" + len(body).to_bytes(4, "big") + body
    data = b"".join([frame(0, 0, stream, framed[at : at + 16_384]) for at in range(0, len(framed), 16_384)])
    return frame(1, 4, stream, encoder.encode(head)) + data + frame(1, 5, stream, encoder.encode(tail))


def infer_response(outputs: Sequence[tuple[str, str, Sequence[int], bytes]]) -> bytes:
    answer = message("inference.ModelInferResponse")(model_name="double")
    for name, datatype, shape, data in outputs:
        answer.outputs.add(name=name, datatype=datatype, shape=shape)
        answer.raw_output_contents.append(data)
    return bytes(answer.SerializeToString())


def doubled_grpc(request: Request) -> Reply:
    asked = message("inference.ModelInferRequest").FromString(request.body)
    values = np.frombuffer(asked.raw_input_contents[0], "<f4") * np.float32(2)
    answer = infer_response([("y", "FP32", [*asked.inputs[0].shape], values.tobytes())])
    return Reply(grpc_frames(request.stream, answer))


@dataclass
class _Stream:
    headers: dict[str, str] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)


class GrpcServer(Server):
    """Frames by hand; replies are bytes of frames, for the stream that the request names."""

    def __init__(self) -> None:
        super().__init__()
        self.script = doubled_grpc
        self.settings = b""
        """Payload of its SETTINGS frame."""
        self.generous = True
        """Whether it opens its windows as data come."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        assert await reader.readexactly(len(PREFACE)) == PREFACE
        writer.write(frame(4, 0, 0, self.settings))
        decoder = hpack.Decoder()
        streams: dict[int, _Stream] = {}
        while True:
            head = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
            if kind == 1:
                fields = decoder.decode(payload)
                streams[stream] = _Stream({str(k): str(v) for k, v in fields})
            elif kind == 0:
                streams[stream].data += payload
                if self.generous and payload:
                    more = struct.pack(">L", len(payload))
                    writer.write(frame(8, 0, 0, more) + frame(8, 0, stream, more))
            if kind in (0, 1) and flags & 1:
                whole = streams.pop(stream)
                request = Request("POST", whole.headers[":path"], whole.headers, bytes(whole.data[5:]), number, stream)
                self.requests.append(request)
                if not await self.send(writer, self._reply(request)):
                    return

    def _reply(self, request: Request) -> Reply:
        method = request.path.rpartition("/")[2]
        if method == "ModelInfer":
            return self.script(request)
        found = self._document(method)
        if found is None:
            return Reply(grpc_frames(request.stream, None, 5, "Request for unknown model"))
        return Reply(grpc_frames(request.stream, found.SerializeToString()))

    def _document(self, method: str) -> Any:
        answer = message(f"inference.{method}Response")
        if method == "ServerMetadata":
            return answer(name=self.name, version="1", extensions=self.extensions)
        if method == "RepositoryIndex":
            return answer(models=[{"name": "double", "version": "1", "state": "READY"}, {"name": "cold"}])
        if self.missing:
            return None
        if method == "ModelReady":
            return answer(ready=self.ready)
        if method == "ModelConfig":
            return answer(config={"max_batch_size": self.config["max_batch_size"]})
        return answer(**self.metadata)


@contextlib.asynccontextmanager
async def serving(
    scheme: str = "http", tls: ssl.SSLContext | None = None, setup: Callable[[Any], None] | None = None
) -> AsyncIterator[Any]:
    """An `HttpServer` or `GrpcServer` for the length of the block."""
    server: Server = GrpcServer() if scheme.startswith("grpc") else HttpServer()
    if setup is not None:
        setup(server)
    await server.start(tls)
    try:
        yield server
    finally:
        await server.stop()


def refused_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


NEVER = math.inf
