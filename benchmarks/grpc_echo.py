"""The strawman-proof peer for gRPC: grpc.aio on uvloop, handing every message back as it came, parsing nothing.

`python -m benchmarks.grpc_echo GRPC_PORT HTTP_PORT`; the HTTP port answers 200 once the other is open.
"""

from __future__ import annotations

import asyncio
import sys

import grpc
import uvloop


async def _echo(message: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    return message


async def _ready(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    await writer.drain()
    writer.close()


async def serve(grpc_port: int, http_port: int) -> None:
    """Echo until killed."""
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(_echo)
    service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": handler})
    server.add_generic_rpc_handlers((service,))
    server.add_insecure_port(f"127.0.0.1:{grpc_port}")
    await server.start()
    async with await asyncio.start_server(_ready, "127.0.0.1", http_port):
        await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
