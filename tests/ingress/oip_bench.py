"""The data port without workers: real sockets, codec, catalog and scheduler; the test plays the replicas.

The model is arithmetic, so every answer can be told from its request: `number` INT64 [n, 1] → `triple` INT64 [n, 1]
and `name` BYTES [n, 1], which is `n<number>`; the name of `ILLEGIBLE` is not UTF-8, and `POISON` makes a run fail.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from gateway import plan
from gateway.backends.interface import Batch, Failure, FailureKind, Success
from gateway.catalog import Catalog, ServedVersion
from gateway.config import Config
from gateway.core.assembly import write_parts
from gateway.core.batchability import SignatureTensor
from gateway.core.log_policy import LOG_POLICY
from gateway.core.model import Artifact, ArtifactFile, ModelState
from gateway.core.request import InputTensor, OutputTensor
from gateway.core.tensor import DATATYPE, pack_bytes
from gateway.errors import GatewayError
from gateway.inference_log.handover import InferenceLog
from gateway.ingress.body_coding import BodyCoding
from gateway.ingress.endpoints import OipApplication
from gateway.ingress.http_server import HttpLimits, HttpServer
from gateway.ingress.listener import Listener, listen
from gateway.loading import WantedVersion
from gateway.management import Management
from gateway.management_access import Restrictions
from gateway.management_repository import Repository
from gateway.pipeline import Pipeline
from gateway.protocol.options import DEFAULT_OPTIONS, ProtocolOptions
from tests.fakes import PlainReplica

INT64, BYTES = DATATYPE["INT64"], DATATYPE["BYTES"]
ILLEGIBLE, POISON = -13, -66
MAX_QUEUE_ROWS = 15_000
PATIENCE_S = 30.0


class NumberReplica(PlainReplica):
    """Fits `backends.interface.Replica`. Answers in the loop's next turn, or when the test says so."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.available = True
        self.in_flight = 0
        self.held: list[Batch] | None = None
        """Batches waiting for `release`; None: nothing is held."""

    @property
    def free_slots(self) -> int:
        return 1 - self.in_flight if self.available else 0

    def set_listener(self, changed: Callable[[], None], /) -> None:
        self._changed = changed

    def execute(self, batch: Batch, timeout_s: float, /) -> None:
        self.in_flight += 1
        if self.held is None:
            asyncio.get_running_loop().call_soon(self._answer, batch)
        else:
            self.held.append(batch)

    def release(self) -> None:
        held, self.held = self.held or [], None
        for batch in held:
            self._answer(batch)

    def _answer(self, batch: Batch) -> None:
        memory = bytearray(batch.inputs[0].nbytes)
        write_parts(batch.inputs[0], memoryview(memory))
        numbers = np.frombuffer(memory, "<i8")
        self.in_flight -= 1
        if POISON in numbers:
            batch.done(Failure(FailureKind.SUSPECT, "poison"))
            return
        names = [b"\xff\xfe" if number == ILLEGIBLE else b"n%d" % number for number in numbers]
        shape = (len(numbers), 1)
        outputs = [
            OutputTensor("triple", INT64, shape, (numbers * 3).tobytes()),
            OutputTensor("name", BYTES, shape, pack_bytes(names)),
        ]
        batch.done(Success([outputs[index] for index in batch.outputs], 1, 2, 3))


class NumberModel:
    """Fits `catalog.LoadedModel`."""

    def __init__(self) -> None:
        self.replicas = [NumberReplica("onnx-1")]
        self.inputs: Sequence[SignatureTensor] = (SignatureTensor("number", INT64, (None, 1)),)
        self.outputs: Sequence[SignatureTensor] = (
            SignatureTensor("triple", INT64, (None, 1)),
            SignatureTensor("name", BYTES, (None, 1)),
        )

    def set_warm_up(self, batches: Sequence[Sequence[InputTensor | None]], /) -> None:
        assert len(batches) == 1

    async def unload(self) -> None:
        pass


class Client:
    """One connection. `ask` writes a request and reads its answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self, *, bodiless: bool = False) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("ascii")
        first, *lines = head[:-4].split("\r\n")
        fields = [tuple(line.split(": ", 1)) for line in lines]
        answer = Answer(int(first.split(" ")[1]), [(name, value) for name, value in fields], b"")
        if not bodiless:
            answer.body = await self.reader.readexactly(int(answer["Content-Length"]))
        return answer

    async def ask(self, data: bytes, *, bodiless: bool = False) -> Answer:
        self.send(data)
        return await self.answer(bodiless=bodiless)

    async def ended(self) -> bool:
        return await self.reader.read(1) == b""


class Answer:
    def __init__(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def __contains__(self, name: str) -> bool:
        return any(key == name for key, _ in self.headers)

    def __getitem__(self, name: str) -> str:
        (value,) = [value for key, value in self.headers if key == name]
        return value

    @property
    def document(self) -> Any:
        """The JSON part."""
        end = int(self["Inference-Header-Content-Length"]) if "Inference-Header-Content-Length" in self else None
        return json.loads(self.body[:end])

    @property
    def error(self) -> str:
        """The text of an error, which is an error in every respect."""
        assert self.status >= 400
        assert self["Content-Type"] == "application/json"
        assert list(self.document) == ["error"]
        text: str = self.document["error"]
        assert text
        assert "Traceback" not in text
        return text


class Bench:
    """The application, listening."""

    def __init__(
        self,
        restrictions: Restrictions | None = None,
        options: ProtocolOptions = DEFAULT_OPTIONS,
        bodies: BodyCoding | None = None,
        log: InferenceLog | None = None,
        limits: HttpLimits | None = None,
    ) -> None:
        self.ready = True
        self.log = log
        self.log_policy = LOG_POLICY
        self.catalog = Catalog()
        self.pipeline = Pipeline()
        self.management = Management(
            self.catalog, self._repository(), lambda: "" if self.ready else "it is stopping", restrictions=restrictions
        )
        self.application = OipApplication(
            self.catalog, self.pipeline, plan.manifest_of, self.management, options, bodies, log
        )
        self.server = HttpServer(self.application, limits, refused=self.application.refused)
        self.listener: Listener
        self.clients: list[Client] = []

    def _repository(self) -> Repository:
        """Of no models at all, and nothing can be loaded from it."""

        async def load(artifact: Artifact, settings: object) -> NumberModel:
            raise AssertionError("nothing is loaded by request here")

        return Repository(Config(), self.catalog, load)

    async def serve(
        self,
        name: str = "numbers",
        version: str = "1",
        *,
        max_batch_size: int = 8,
        oversize: bool = False,
        sidecar: bytes | None = None,
        refuse: GatewayError | None = None,
    ) -> ServedVersion:
        """Load a version; with `refuse` it fails to."""

        async def load(artifact: Artifact) -> NumberModel:
            if refuse is not None:
                raise refuse
            return NumberModel()

        files = (ArtifactFile("model.onnx", 5, "ab" * 32),)
        artifact = Artifact(name, version, "test", files, "sha256:" + "12" * 32, b"model")
        wanted = WantedVersion(
            name, version, lambda: (artifact, sidecar), load, None, "auto", max_batch_size, True, 0.0, (),
            "split" if oversize else "reject", MAX_QUEUE_ROWS, 10**8, 30.0,
        )  # fmt: skip
        found = await self.catalog.load(wanted)
        assert (found.state is ModelState.FAILED) == (refuse is not None), found.reason
        if self.log is not None and refuse is None:
            found.log = self.log.of(found.spec, self.log_policy)
        return found

    async def client(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.listener.port, limit=2**24))
        self.clients.append(client)
        return client

    async def ask(self, data: bytes, *, bodiless: bool = False) -> Answer:
        """On a connection of its own."""
        return await (await self.client()).ask(data, bodiless=bodiless)


@asynccontextmanager
async def oip_bench(
    models: bool = True,
    restrictions: Restrictions | None = None,
    options: ProtocolOptions = DEFAULT_OPTIONS,
    bodies: BodyCoding | None = None,
    log: InferenceLog | None = None,
    limits: HttpLimits | None = None,
) -> AsyncIterator[Bench]:
    """With `models`: `numbers` in the versions 1 and 2. When it ends, nothing may be left waiting or held."""
    bench = Bench(restrictions, options, bodies, log, limits)
    if models:
        await bench.serve(version="1")
        await bench.serve(version="2")
    bench.listener = await listen("127.0.0.1", 0, bench.server)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield bench
    finally:
        for client in bench.clients:
            client.writer.transport.abort()
        await bench.server.drain(0.0)
        statistics = bench.server.statistics()
        assert (statistics.open_connections, statistics.held_bytes, statistics.in_flight) == (0, 0, 0)
        for version in bench.catalog.versions():
            assert version.scheduler is None or version.scheduler.pending == 0
        bench.catalog.stop()


def replica_of(version: ServedVersion) -> NumberReplica:
    replica = version.replicas[0]
    assert isinstance(replica, NumberReplica)
    return replica


def http(method: str, path: str, body: bytes = b"", *headers: str, protocol: str = "HTTP/1.1") -> bytes:
    lines = [f"{method} {path} {protocol}", "Host: test", *headers]
    if body or method not in {"GET", "HEAD"}:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def infer(
    numbers: list[int],
    *headers: str,
    model: str = "numbers",
    binary: bool = False,
    outputs: Sequence[str] = (),
    parameters: dict[str, Any] | None = None,
    request_id: str | None = None,
    protocol: str = "HTTP/1.1",
) -> bytes:
    """A request; `binary`: tensors in binary form both ways."""
    tensor: dict[str, Any] = {"name": "number", "datatype": "INT64", "shape": [len(numbers), 1]}
    document: dict[str, Any] = {"inputs": [tensor]}
    blob = struct.pack(f"<{len(numbers)}q", *numbers) if binary else b""
    if binary:
        tensor["parameters"] = {"binary_data_size": len(blob)}
        document["parameters"] = {"binary_data_output": True}
    else:
        tensor["data"] = numbers
    if outputs:
        document["outputs"] = [{"name": name, "parameters": {"binary_data": binary}} for name in outputs]
    if parameters:
        document["parameters"] = {**document.get("parameters", {}), **parameters}
    if request_id is not None:
        document["id"] = request_id
    text = json.dumps(document).encode()
    more = (f"Inference-Header-Content-Length: {len(text)}",) if binary else ()
    return http("POST", f"/v2/models/{model}/infer", text + blob, *more, *headers, protocol=protocol)


def check(answer: Answer, numbers: list[int]) -> None:
    """The answer to `numbers`: all of it, in whatever encoding, and no byte more."""
    assert answer.status == 200, answer.body
    triples, names = [number * 3 for number in numbers], [f"n{number}" for number in numbers]
    triple, name = answer.document["outputs"]
    assert (triple["name"], triple["datatype"], triple["shape"]) == ("triple", "INT64", [len(numbers), 1])
    assert (name["name"], name["datatype"], name["shape"]) == ("name", "BYTES", [len(numbers), 1])
    if "Inference-Header-Content-Length" not in answer:
        assert (triple["data"], name["data"]) == (triples, names)
        assert answer["Content-Type"] == "application/json"
        return
    assert answer["Content-Type"] == "application/octet-stream"
    blobs = [struct.pack(f"<{len(triples)}q", *triples), pack_bytes([text.encode() for text in names])]
    assert [output["parameters"] for output in (triple, name)] == [{"binary_data_size": len(blob)} for blob in blobs]
    assert answer.body[int(answer["Inference-Header-Content-Length"]) :] == b"".join(blobs)
