"""OIP over HTTP as a client writes it, in plain Python and numpy: independent of the gateway's own codec.

`encode` makes the bytes of an infer request, `Connection` is one socket, `decode` reads an answer's tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

NUMPY: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),  # its bits
    "BYTES": np.dtype("O"),  # of bytes
}
NEVER_JSON = frozenset({"FP16", "BF16"})
"""Datatypes that OIP only carries in binary."""


@dataclass
class Tensor:
    """One input. `array` of BYTES holds Python bytes; of BF16, the bits as uint16."""

    name: str
    datatype: str
    array: Array
    binary: bool = False


@dataclass
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def document(self) -> Any:
        """The JSON part of the body."""
        length = self.header("Inference-Header-Content-Length")
        return json.loads(self.body if length is None else self.body[: int(length)])

    @property
    def error(self) -> str:
        text: str = self.document()["error"]
        return text


@dataclass
class Request:
    """One infer request; `outputs`: None asks for nothing in particular, else (name, binary_data or None) pairs."""

    model: str
    inputs: Sequence[Tensor]
    outputs: Sequence[tuple[str, bool | None]] | None = None
    binary_output: bool | None = None
    request_id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    version: str | None = None

    def encode(self) -> bytes:
        """Head and body, ready for the socket."""
        document, blobs = self.document()
        text = json.dumps(document).encode()
        body = b"".join([text, *blobs])
        length = f"Inference-Header-Content-Length: {len(text)}\r\n" if blobs else ""
        return self.head(len(body), length) + body

    def head(self, length: int, more: str = "") -> bytes:
        version = f"/versions/{self.version}" if self.version else ""
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        return (
            f"POST /v2/models/{self.model}{version}/infer HTTP/1.1\r\nHost: test\r\n"
            f"Content-Length: {length}\r\n{more}{lines}\r\n"
        ).encode()

    def document(self) -> tuple[dict[str, Any], list[bytes]]:
        blobs: list[bytes] = []
        document: dict[str, Any] = {"inputs": [_input(tensor, blobs) for tensor in self.inputs]}
        parameters = dict(self.parameters)
        if self.binary_output is not None:
            parameters["binary_data_output"] = self.binary_output
        if parameters:
            document["parameters"] = parameters
        if self.request_id is not None:
            document["id"] = self.request_id
        if self.outputs is not None:
            document["outputs"] = [
                {"name": name} if binary is None else {"name": name, "parameters": {"binary_data": binary}}
                for name, binary in self.outputs
            ]
        return document, blobs


def _input(tensor: Tensor, blobs: list[bytes]) -> dict[str, Any]:
    head: dict[str, Any] = {
        "name": tensor.name,
        "shape": list(tensor.array.shape),
        "datatype": tensor.datatype,
    }
    if tensor.binary:
        blob = pack(tensor.datatype, tensor.array)
        blobs.append(blob)
        return {**head, "parameters": {"binary_data_size": len(blob)}}
    if tensor.datatype == "BYTES":
        return {**head, "data": [element.decode() for element in tensor.array.ravel()]}
    return {**head, "data": tensor.array.tolist()}


def pack(datatype: str, array: Array) -> bytes:
    """OIP binary form."""
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(element)) + element for element in array.ravel())
    return array.astype(NUMPY[datatype], copy=False).tobytes()


def unpack(datatype: str, blob: bytes, shape: Sequence[int]) -> Array:
    """From OIP binary form."""
    if datatype != "BYTES":
        return np.frombuffer(blob, NUMPY[datatype]).reshape(shape)
    elements, at = [], 0
    while at < len(blob):
        (size,) = struct.unpack_from("<I", blob, at)
        elements.append(blob[at + 4 : at + 4 + size])
        at += 4 + size
    return objects(elements, shape)


def objects(elements: Sequence[bytes], shape: Sequence[int]) -> Array:
    """An array of Python bytes; numpy would make `S` arrays that lose trailing NULs."""
    array = np.empty(len(elements), dtype=object)
    for place, element in enumerate(elements):
        array[place] = element
    return array.reshape(shape)


def decode(answer: Answer) -> dict[str, tuple[str, Array]]:
    """The outputs by name: datatype and array, whatever their encoding. Every byte of the body is accounted for."""
    length = answer.header("Inference-Header-Content-Length")
    at = len(answer.body) if length is None else int(length)
    outputs = {}
    for output in answer.document()["outputs"]:
        name, datatype, shape = output["name"], output["datatype"], output["shape"]
        size = output.get("parameters", {}).get("binary_data_size")
        if size is not None:
            assert "data" not in output
            array = unpack(datatype, answer.body[at : at + size], shape)
            at += size
        elif datatype == "BYTES":
            array = objects([text.encode() for text in output["data"]], shape)
        else:
            array = np.array(output["data"], NUMPY[datatype]).reshape(shape)
        assert name not in outputs
        outputs[name] = datatype, array
    assert at == len(answer.body), f"{len(answer.body) - at} bytes left over"
    return outputs


class Connection:
    """One client connection; requests may be written ahead of reading answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=2**20))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def receive(self) -> Answer:
        """The next answer; asyncio.IncompleteReadError if the gateway closes first."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines[1:] if line)]
        answer = Answer(int(lines[0].split(" ")[1]), headers, b"")
        length = answer.header("Content-Length")
        assert length is not None, lines
        answer.body = await self._reader.readexactly(int(length))
        return answer

    async def closed(self) -> bool:
        """Whether the gateway closed the connection with nothing left to read; waits until it tells."""
        return await self._reader.read(1) == b""

    async def ask(self, request: Request) -> Answer:
        await self.send(request.encode())
        return await self.receive()

    def abort(self) -> None:
        """Vanish without a word, as a crashed client does."""
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


@contextlib.asynccontextmanager
async def connect(port: int) -> AsyncIterator[Connection]:
    connection = await Connection.open(port)
    try:
        yield connection
    finally:
        await connection.close()
