"""What a trap says to a gateway and how it looks at the answer; nothing here comes from the gateway's own code."""

from __future__ import annotations

import json
from typing import Any

import grpc
from google.protobuf.message import Message

from tests.differential.build import call, infer
from tests.differential.exchange import SERVICE, Asker, Http, Reply, Step
from tests.live.gateway_process import GatewayProcess


class Client:
    """One gateway, asked over HTTP and gRPC."""

    def __init__(self, process: GatewayProcess) -> None:
        self.process = process
        self._asker = Asker(process.port, process.grpc_port)

    def close(self) -> None:
        self._asker.close()

    def ask(self, step: Step) -> Reply:
        return self._asker.ask(step)

    def infer(self, body: Any, model: str = "m", *blobs: bytes, **more: Any) -> Reply:
        return self.ask(infer(body, model, *blobs, **more))

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask(Http("GET", path, headers=headers))

    def post(self, path: str, body: Any = b"") -> Reply:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask(Http("POST", path, data))

    def rpc(self, message: Message, method: str = "ModelInfer", **more: Any) -> Reply:
        return self.ask(call(message, method, **more))

    def channel(self) -> grpc.Channel:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        return grpc.insecure_channel(f"127.0.0.1:{self.process.grpc_port}", options=options)

    def statistics(self, model: str) -> dict[str, Any]:
        """The one version's statistics."""
        reply = self.get(f"/v2/models/{model}/stats")
        assert reply.status == 200, reply.text
        (found,) = reply.body["model_stats"]
        assert isinstance(found, dict)
        return found

    def config(self, model: str) -> dict[str, Any]:
        reply = self.get(f"/v2/models/{model}/config")
        assert reply.status == 200, reply.text
        found: dict[str, Any] = reply.body
        return found


STREAM = f"/{SERVICE}/ModelStreamInfer"
INFER = f"/{SERVICE}/ModelInfer"


def refused(reply: Reply, status: int | str, *words: str) -> None:
    """An error of this status whose text has these words; over HTTP its body is {"error": text}, typed JSON exactly."""
    assert reply.status == status, f"{reply.status}: {reply.text[:400]}"
    if isinstance(reply.status, int):
        assert reply.headers["content-type"] == "application/json"
        assert list(reply.body) == ["error"]
        assert isinstance(reply.body["error"], str)
    for word in words:
        assert word in reply.text, f"{word!r} is not in {reply.text[:400]!r}"


def output(reply: Reply, place: int = 0) -> dict[str, Any]:
    """One output of an infer answer that succeeded."""
    assert reply.status == 200, f"{reply.status}: {reply.text[:400]}"
    found: dict[str, Any] = reply.body["outputs"][place]
    return found
