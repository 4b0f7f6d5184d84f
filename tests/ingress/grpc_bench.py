"""The gRPC port without workers: `oip_bench`'s models behind the real transport, asked by grpcio."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from gateway.core.tensor import pack_bytes
from gateway.inference_log.handover import InferenceLog
from gateway.ingress.grpc_server import GrpcServer
from gateway.ingress.grpc_services import GrpcServices
from gateway.ingress.listener import listen
from gateway.management_access import Restrictions
from gateway.protocol import schema
from gateway.protocol.http2_limits import Http2Limits
from gateway.protocol.options import DEFAULT_OPTIONS, ProtocolOptions
from tests.ingress.oip_bench import PATIENCE_S, Bench
from tests.protocol.grpc_samples import infer_request

OIP = "inference.GRPCInferenceService"
Metadata = Sequence[tuple[str, str]]


class GrpcBench(Bench):
    """`channel` is a client's, to the application."""

    services: GrpcServices
    grpc_server: GrpcServer
    grpc_port: int
    channel: Any
    """grpcio's; its stubs know neither defaults nor iterators."""
    busy: list[asyncio.Future[Any]]
    """Calls that hold the replica."""

    def unary(self, method: str, request: str, response: str, service: str = OIP) -> Any:
        """A callable for an RPC by names."""
        package = service.rpartition(".")[0]
        return self.channel.unary_unary(
            f"/{service}/{method}",
            request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            response_deserializer=schema.message(f"{package}.{response}").FromString,
        )

    async def call(self, method: str, service: str = OIP, metadata: Metadata = (), **fields: Any) -> Any:
        """The answer to a unary RPC whose messages are named after it."""
        package = service.rpartition(".")[0]
        prefix = "HealthCheck" if method == "Check" else method
        names = (f"{prefix}Request", f"{prefix}Response")
        request = schema.message(f"{package}.{names[0]}")(**fields)
        return await self.unary(method, *names, service)(request, metadata=metadata)

    def infer(self, message: Any, **options: Any) -> Any:
        """A ModelInfer call, begun."""
        return self.unary("ModelInfer", "ModelInferRequest", "ModelInferResponse")(message, **options)

    def stream(self, method: str, request: str, response: str, service: str = OIP, **options: Any) -> Any:
        """A call of a streaming RPC, begun."""
        package = service.rpartition(".")[0]
        return self.channel.stream_stream(
            f"/{service}/{method}",
            request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            response_deserializer=schema.message(f"{package}.{response}").FromString,
        )(**options)

    def infer_stream(self, **options: Any) -> Any:
        return self.stream("ModelStreamInfer", "ModelInferRequest", "ModelStreamInferResponse", **options)


@asynccontextmanager
async def grpc_bench(
    models: bool = True,
    restrictions: Restrictions | None = None,
    options: ProtocolOptions = DEFAULT_OPTIONS,
    *,
    reflected: bool = False,
    log: InferenceLog | None = None,
    limits: Http2Limits | None = None,
) -> AsyncIterator[GrpcBench]:
    """With `models`: `numbers` in the versions 1 and 2. When it ends, nothing may be left waiting or held."""
    bench = GrpcBench(restrictions, options, log=log)
    if models:
        await bench.serve(version="1")
        await bench.serve(version="2")
    bench.services = GrpcServices(
        bench.catalog, bench.pipeline, bench.management, options, reflected=reflected, log=log
    )
    bench.grpc_server = GrpcServer(bench.services, limits, refused=bench.services.refused)
    bench.listener = await listen("127.0.0.1", 0, bench.server)
    listener = await listen("127.0.0.1", 0, bench.grpc_server)
    bench.grpc_port = listener.port
    own = [("grpc.use_local_subchannel_pool", 1)]
    bench.channel = grpc.aio.insecure_channel(f"127.0.0.1:{listener.port}", options=own)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield bench
    finally:
        await bench.channel.close()
        for client in bench.clients:
            client.writer.transport.abort()
        await bench.server.drain(0.0)
        bench.services.drain()
        await bench.grpc_server.drain(5.0)
        statistics = bench.grpc_server.statistics()
        assert (statistics.open_connections, statistics.held_bytes, statistics.in_flight) == (0, 0, 0)
        assert not bench.services._streams
        for version in bench.catalog.versions():
            assert version.scheduler is None or version.scheduler.pending == 0
        bench.catalog.stop()


def numbers_request(numbers: list[int], **how: Any) -> Any:
    """A ModelInferRequest to `numbers`, raw unless `typed`."""
    data: Any = struct.pack(f"<{len(numbers)}q", *numbers)
    if how.pop("typed", False):
        data = {"int64_contents": numbers}
    return infer_request(("number", "INT64", [len(numbers), 1], data), model=how.pop("model", "numbers"), **how)


def check_numbers(message: Any, numbers: list[int]) -> None:
    """A ModelInferResponse is the answer to `numbers`: all of it, and no more."""
    assert [(o.name, o.datatype, list(o.shape)) for o in message.outputs] == [
        ("triple", "INT64", [len(numbers), 1]),
        ("name", "BYTES", [len(numbers), 1]),
    ]
    assert list(message.raw_output_contents) == [
        struct.pack(f"<{len(numbers)}q", *[3 * number for number in numbers]),
        pack_bytes([b"n%d" % number for number in numbers]),
    ]
