"""What the gateway makes of a configuration with remote servers, without ports of its own."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from gateway.backends.interface import Batch, Success
from gateway.backends.remote import RemoteReplica
from gateway.catalog import Catalog, ServedVersion
from gateway.config import Backend, Config, ModelEntry, ModelSettings
from gateway.core.assembly import write_parts
from gateway.core.batch import FinishedBatch
from gateway.core.batchability import SignatureTensor
from gateway.core.model import Artifact
from gateway.core.request import InferRequest, OutputTensor
from gateway.core.tensor import DATATYPE
from gateway.loading import LoadedModel
from gateway.management_repository import Repository
from gateway.protocol.oip_json import RequestDecoder
from gateway.remote_models import RemoteModels
from tests.ingress.oip_bench import NumberModel, NumberReplica

PATIENCE_S = 30.0


async def until(condition: Callable[[], bool]) -> None:
    """The bound is only there so that a failing test ends."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


class LocalDouble(NumberReplica):
    """An instance of the model `double` on a worker."""

    executed = 0

    def _answer(self, batch: Batch) -> None:
        (given,) = batch.inputs
        memory = bytearray(given.nbytes)
        write_parts(given, memoryview(memory))
        self.executed += 1
        self.in_flight -= 1
        values = np.frombuffer(memory, "<f4") * np.float32(2)
        batch.done(Success([OutputTensor("y", DATATYPE["FP32"], tuple(given.shape), values.tobytes())], 1, 2, 3))


class LocalModel(NumberModel):
    """`double` on a worker, with `between` dims of 1 that its config.pbtxt hides by reshape."""

    def __init__(self, between: int = 0) -> None:
        shape = (None, *[1] * between, 2)
        self.replicas = [LocalDouble("onnx-1")]
        self.inputs = (SignatureTensor("x", DATATYPE["FP32"], shape),)
        self.outputs = (SignatureTensor("y", DATATYPE["FP32"], shape),)


class Rig:
    """What the gateway makes of a configuration, without ports. `local`: what the workers load, again and again."""

    def __init__(self, config: Config) -> None:
        self.local: Callable[[], LoadedModel] = NumberModel
        self.catalog = Catalog()
        self.remotes = RemoteModels(config, self.catalog)
        self.repository = Repository(config, self.catalog, self._load, self.remotes)
        self.catalog.on_ready = self.remotes.attach
        self.remotes.on_discovered = lambda name: self.tasks.append(
            asyncio.ensure_future(self.repository.discovered(name))
        )
        self.tasks: list[asyncio.Future[None]] = []

    async def _load(self, artifact: Artifact, settings: ModelSettings) -> LoadedModel:
        return self.remotes.mixed(artifact.name, self.local())

    async def start(self) -> list[ServedVersion]:
        """Returns what could not be loaded."""
        wanted = self.repository.initial()
        await self.remotes.open()
        failed = await self.catalog.load_all([*wanted, *await self.repository.initial_remote()])
        self.repository.open = True
        await self.remotes.reconcile()
        self.tasks.append(asyncio.ensure_future(self.remotes.follow()))
        return failed

    def version(self, name: str = "double", version: str | None = None) -> ServedVersion:
        return self.catalog.find(name, version)

    def backends(self, name: str = "double", version: str | None = None) -> dict[str, bool]:
        return {replica.name: replica.available for replica in self.version(name, version).replicas}

    def replica(self, server: Any, name: str = "double") -> RemoteReplica:
        """That of a server which listens at 127.0.0.1."""
        found = next(r for r in self.version(name).replicas if r.name == f"127.0.0.1:{server.port}")
        assert isinstance(found, RemoteReplica)
        return found

    async def all_available(self, count: int, name: str = "double") -> None:
        await until(lambda: sum(self.backends(name).values()) == count)

    async def ask(
        self, number: float = 3.0, name: str = "double", **parameters: Any
    ) -> tuple[FinishedBatch, list[float]]:
        found = self.version(name)
        document = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [number, 0.5]}]}
        request = RequestDecoder(found.spec).decode(json.dumps({**document, "parameters": parameters}).encode())
        done: asyncio.Future[InferRequest] = asyncio.get_running_loop().create_future()
        request.received = asyncio.get_running_loop().time()
        request.settle = done.set_result
        assert found.scheduler is not None
        found.scheduler.submit(request)
        async with asyncio.timeout(PATIENCE_S):
            settled = await done
        if settled.error is not None:
            raise settled.error
        data = bytes(settled.batch.outputs[0].data)[8 * settled.row : 8 * settled.row + 8]
        return settled.batch, list(struct.unpack("<2f", data))

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for name in self.catalog.names():
            await self.catalog.unload(name)
        await self.remotes.close()


@asynccontextmanager
async def rig(*entries: ModelEntry, **keys: Any) -> AsyncIterator[Rig]:
    found = Rig(Config(models=entries, **keys))
    try:
        yield found
    finally:
        await found.close()


def url(server: Any, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{server.port}"


def double(*backends: Backend, **keys: Any) -> ModelEntry:
    return ModelEntry.model_validate({"name": "double", "backends": backends, **keys})
