"""A programmable OIP server on real sockets: HTTP and gRPC, its behaviour changed at run time over a control socket.

`python -m tests.faults.backend` runs one as a process; `Backend` runs inside a test's own loop too. Control: one JSON
document per line over a Unix socket. `{"behave": {…}}` sets a whole `Behaviour`, `{"ask": true}` changes nothing; both
are answered with the counters. Rules: the ports stay the same while it listens or not; the process ends when its
parent does.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import uvloop

from tests.faults.backend_documents import Documents
from tests.faults.backend_engine import Engine
from tests.faults.backend_grpc import GrpcConnection
from tests.faults.backend_http import HttpConnection
from tests.faults.backend_log import ExecutionLog
from tests.faults.behaviour import Behaviour, Pace


class Backend:
    """One server. `http_port`, `grpc_port`: 0 for any free one."""

    def __init__(
        self,
        log: Path,
        pace: Pace,
        seed: int = 0,
        http_port: int = 0,
        grpc_port: int = 0,
        host: str = "127.0.0.1",
    ) -> None:
        self._host = host
        self._log = ExecutionLog(log)
        self.engine = Engine(self._log, pace, seed)
        self.http_port = http_port
        self.grpc_port = grpc_port
        self._connections: set[Any] = set()
        self._servers: list[asyncio.Server] = []

    async def start(self) -> None:
        """Listen on both ports, those of last time if it listened before."""
        loop = asyncio.get_running_loop()
        documents = Documents(self.engine)
        for kind, port in ((HttpConnection, "http_port"), (GrpcConnection, "grpc_port")):
            listener = _listener(self._host, getattr(self, port))
            setattr(self, port, listener.getsockname()[1])
            made = partial(kind, self.engine, documents, self._connections)
            self._servers.append(await loop.create_server(made, sock=listener))

    async def stop(self) -> None:
        """Refuse and end every connection."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        for connection in list(self._connections):
            connection.reset()

    async def behave(self, behaviour: Behaviour) -> None:
        was = bool(self._servers)
        self.engine.behave(behaviour)
        if was and not behaviour.listening:
            await self.stop()
        elif not was and behaviour.listening:
            await self.start()

    def counters(self) -> dict[str, int]:
        engine = self.engine
        return {
            "http_port": self.http_port,
            "grpc_port": self.grpc_port,
            "requests": engine.requests,
            "hits": engine.hits,
            "injected": engine.injected,
            "connections": len(self._connections),
        }

    async def close(self) -> None:
        await self.stop()
        self._log.close()


def _listener(host: str, port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(256)
    return listener


async def _obey(backend: Backend, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        order = orjson.loads(line)
        if "behave" in order:
            await backend.behave(Behaviour.from_document(order["behave"]))
        writer.write(orjson.dumps(backend.counters()) + b"\n")
        await writer.drain()
    writer.close()


async def _serve(options: argparse.Namespace) -> None:
    pace = Pace(options.base_s, options.row_s)
    backend = Backend(options.log, pace, options.seed, options.http_port, options.grpc_port, options.host)
    backend.engine.behave(Behaviour.from_document(orjson.loads(options.behaviour)))
    await backend.start()
    options.control.unlink(missing_ok=True)
    control = await asyncio.start_unix_server(partial(_obey, backend), options.control)
    async with control:  # a server that nobody refers to may be collected, and listens no more
        await control.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.backend")
    parser.add_argument("--control", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--http-port", type=int, default=0)
    parser.add_argument("--grpc-port", type=int, default=0)
    parser.add_argument("--base-s", type=float, default=Pace().base_s)
    parser.add_argument("--row-s", type=float, default=Pace().row_s)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--behaviour", default="{}")
    uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
