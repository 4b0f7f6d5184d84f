"""What is sent to both servers, and what came back, as data.

`Http` and `Grpc` describe one request each; `Case` is a named series of them that every server gets in order. `Asker`
sends one and returns a `Reply` in a form that can be compared: an HTTP body split at the header length and read as
JSON, a gRPC answer as a dictionary with the proto's field names. gRPC messages are those of tritonclient, so the
corpus shares no code with the gateway.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message
from tritonclient.grpc import service_pb2 as pb

TIMEOUT_S: Final = 30
HEADERS: Final = ("content-type", "inference-header-content-length", "content-encoding", "accept-encoding")
"""Headers of an answer that are compared; the length of the JSON part only by presence."""
SERVICE: Final = "inference.GRPCInferenceService"


@dataclass(frozen=True)
class Http:
    method: str
    path: str
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    says: tuple[str, ...] = ()
    """Texts that both answers must contain."""
    names: tuple[str, ...] = ()
    """Texts that at least ours must contain: the field at fault."""


@dataclass(frozen=True)
class Grpc:
    method: str
    """`Service/Method`, or a method of the inference service."""
    message: bytes = b""
    says: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    stream: tuple[bytes, ...] | None = None
    """Messages of a bidirectional call instead of `message`."""
    metadata: tuple[tuple[str, str], ...] = ()
    compression: int = 0
    """grpc.Compression: 0 none, 1 deflate, 2 gzip."""

    @property
    def path(self) -> str:
        return f"/{self.method}" if "/" in self.method else f"/{SERVICE}/{self.method}"


Step = Http | Grpc


@dataclass(frozen=True)
class Case:
    name: str
    steps: tuple[Step, ...]


@dataclass
class Reply:
    """One answer. `body`: JSON of HTTP, message of gRPC (a list of them for a stream); text where it is neither."""

    status: int | str
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    blobs: tuple[bytes, ...] = ()
    text: str = ""
    """Where an error's words are looked for."""
    keys: tuple[tuple[str, ...], ...] = ()
    """Order of the keys of an infer answer: the document's, then each output's."""

    @property
    def ok(self) -> bool:
        return self.status in (200, "OK")


class Asker:
    """One server as seen by a client."""

    def __init__(self, port: int, grpc_port: int) -> None:
        self.port = port
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.insecure_channel(f"127.0.0.1:{grpc_port}", options=options)

    def close(self) -> None:
        self._channel.close()

    def ask(self, step: Step) -> Reply:
        return self._http(step) if isinstance(step, Http) else self._grpc(step)

    def _http(self, step: Http) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        with contextlib.closing(connection):
            try:
                connection.putrequest(step.method, step.path, skip_accept_encoding=True)
                if step.body is not None:
                    connection.putheader("Content-Length", str(len(step.body)))
                for name, text in step.headers.items():
                    connection.putheader(name, text)
                connection.endheaders(step.body)
                response = connection.getresponse()
                return read_http(response.status, dict(response.getheaders()), response.read())
            except (OSError, http.client.HTTPException) as error:
                return Reply("connection lost", text=type(error).__name__)

    def _grpc(self, step: Grpc) -> Reply:
        answer = ANSWERS.get(step.path.rpartition("/")[2])
        timed: dict[str, Any] = {
            "timeout": TIMEOUT_S,
            "metadata": step.metadata,
            "compression": grpc.Compression(step.compression),
        }
        try:
            if step.stream is not None:
                call = self._channel.stream_stream(step.path, None, None)
                replies = list(call(iter(step.stream), **timed))
                return Reply("OK", body=[document(pb.ModelStreamInferResponse, data) for data in replies])
            return Reply(
                "OK", body=document(answer, self._channel.unary_unary(step.path, None, None)(step.message, **timed))
            )
        except grpc.RpcError as error:
            return Reply(error.code().name, text=str(error.details()))


ANSWERS: Final[Mapping[str, type[Message]]] = {
    method.name: getattr(pb, method.output_type.name)
    for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
    if hasattr(pb, method.output_type.name)
}


def document(kind: type[Message] | None, data: bytes) -> Any:
    """A message as a dictionary; fields at their default are left out. Of a kind that is not OIP's: its bytes."""
    if kind is None:
        return data.hex()
    message = kind()
    message.ParseFromString(data)
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def read_http(status: int, received: Mapping[str, str], body: bytes) -> Reply:
    headers = {name.lower(): text for name, text in received.items()}
    reply = Reply(status, {name: headers[name] for name in HEADERS if name in headers})
    encoding = headers.get("content-encoding")
    if encoding in ("gzip", "deflate"):
        body = zlib.decompress(body, 47)
    at = int(headers.get("inference-header-content-length", len(body)))
    reply.text = body[:at].decode(errors="replace")
    if headers.get("content-type", "").startswith("text/event-stream"):
        reply.body = [json.loads(event.removeprefix("data: ")) for event in reply.text.split("\n\n") if event]
        return reply
    try:
        reply.body = json.loads(body[:at]) if at else ""
    except ValueError:
        reply.body = reply.text
        return reply
    if isinstance(reply.body, dict) and isinstance(reply.body.get("outputs"), list):
        reply.blobs = tuple(_blobs(reply.body["outputs"], body, at))
        reply.keys = (tuple(reply.body), *(tuple(output) for output in reply.body["outputs"]))
    return reply


def _blobs(outputs: Sequence[Any], body: bytes, at: int) -> Iterator[bytes]:
    for output in outputs:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is not None:
            yield body[at : at + size]
            at += size
    assert at == len(body), f"{len(body) - at} bytes are nobody's"
