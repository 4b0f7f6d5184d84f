"""A replica of the scripted server's model, for the tests of remote backends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gateway.backends.one_shot import run_once
from gateway.backends.remote import Endpoint, RemoteReplica, RemoteServer, RemoteTls
from gateway.core.batchability import SignatureTensor
from gateway.core.outcome import Failure, FailureKind, Sign, Success
from gateway.core.request import BatchInput, InputTensor, SequenceStep
from gateway.core.tensor import DATATYPE
from gateway.core.traits import Traits
from gateway.protocol.schema import message
from tests.backends.oip_server import Request, serving
from tests.fakes import PlainBatch

FP32 = DATATYPE["FP32"]
X = SignatureTensor("x", FP32, (None, 2))
Y = SignatureTensor("y", FP32, (None, 2))
PATIENCE_S = 30.0
SCHEMES = ("http", "grpc")


def rows(*values: float) -> InputTensor:
    """One row per value, which stands in both places."""
    data = np.repeat(np.array(values, "<f4"), 2)
    return InputTensor(FP32, (len(values), 2), None, data.tobytes())


class Given(PlainBatch):
    """A batch of the rows; `outcome` is what it was done with, `times` how often."""

    def __init__(self, *values: float, deadline: float = math.inf) -> None:
        tensor = rows(*values)
        self.inputs = [BatchInput(0, FP32, tensor.shape, len(tensor.buffer or b""), [tensor])]
        self.outputs = (0,)
        self.rows = len(values)
        self.deadline = deadline
        self.outcome: asyncio.Future[Success | Failure] = asyncio.get_running_loop().create_future()
        self.times = 0

    def done(self, outcome: Success | Failure, /) -> None:
        self.times += 1
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    async def result(self) -> Success | Failure:
        async with asyncio.timeout(PATIENCE_S):
            return await self.outcome


class Stateful(Given):
    """With a step of a sequence and parameters of the caller."""

    sequence = SequenceStep(7, True, False)
    parameters: Mapping[str, object] = {"mood": "good", "n": 3, "half": 0.5, "flag": True}


def values(outcome: Success | Failure) -> list[float]:
    assert isinstance(outcome, Success), outcome
    return [float(value) for value in np.frombuffer(outcome.outputs[0].data, "<f4")[::2]]


def seen(outcome: Success | Failure) -> tuple[FailureKind, Sign]:
    assert isinstance(outcome, Failure), outcome
    return outcome.kind, outcome.sign


async def execute(replica: RemoteReplica, *given: float, timeout_s: float = PATIENCE_S) -> Success | Failure:
    async with asyncio.timeout(PATIENCE_S):
        return await run_once(replica, [rows(*given)], (0,), timeout_s)


async def until(true: Callable[[], bool], what: str) -> None:
    """Wait for something that happens by itself."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not true():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"never: {what}") from None


@dataclass
class Rig:
    peer: Any
    server: RemoteServer
    replica: RemoteReplica


def replica_of(server: RemoteServer, slots: int = 8, outputs: Sequence[SignatureTensor] = (Y,)) -> RemoteReplica:
    return RemoteReplica(server, "double", "", [X], outputs, Traits("oip", max_slots=slots))


@contextlib.asynccontextmanager
async def rig(
    scheme: str = "http",
    setup: Callable[[Any], None] | None = None,
    *,
    tls: RemoteTls | None = None,
    peer_tls: ssl.SSLContext | None = None,
    **more: Any,
) -> AsyncIterator[Rig]:
    """A scripted server and an available replica of its model."""
    async with serving(scheme, peer_tls, setup) as peer:
        endpoint = Endpoint(scheme, "127.0.0.1", peer.port, tls=tls or RemoteTls(), **more)  # type: ignore[arg-type]
        server = RemoteServer(endpoint)
        replica = replica_of(server)
        try:
            assert not await replica.verify()
            yield Rig(peer, server, replica)
        finally:
            await replica.close(0.0)
            await server.close()


def parameters_in(asked: Request) -> dict[str, Any]:
    """The parameters of an inference request, as they arrived."""
    length = asked.headers.get("inference-header-content-length")
    if asked.headers.get("content-type") == "application/grpc":
        parsed = message("inference.ModelInferRequest").FromString(asked.body)
        return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in parsed.parameters.items()}
    found: dict[str, Any] = json.loads(asked.body[: int(length or len(asked.body))])["parameters"]
    return found
