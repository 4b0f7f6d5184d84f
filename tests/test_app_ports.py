"""The data ports as they are built from a configuration: bound both or not at all, and in step with each other."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway import app_ports
from gateway.app_models import Models
from gateway.app_ports import DataPorts
from gateway.app_takeover import GRPC, HTTP, Sockets
from gateway.config import Config, Server
from gateway.errors import BindError
from gateway.ingress.listener import Listener, listen

ASK_LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: h\r\n\r\n"


def data_ports(**server: object) -> DataPorts:
    config = Config(Server.model_validate({"host": "127.0.0.1", "http_port": 0, "grpc_port": 0} | server))
    return DataPorts(config, Models(config, asyncio.ensure_future), lambda: "", max_connections=7)


@asynccontextmanager
async def taken() -> AsyncIterator[socket.socket]:
    """A socket that listens on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setblocking(False)
        yield sock


async def test_what_is_true_of_one_port_is_true_of_the_other() -> None:
    ports = data_ports()
    assert ports.http.limits.max_connections == ports.grpc.limits.max_connections == 7
    ports.http.held.used_bytes = 4711
    assert (ports.http.statistics().held_bytes, ports.grpc.statistics().held_bytes) == (4711, 4711)


async def test_a_port_that_is_taken_is_named_and_the_other_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[Listener] = []

    async def noted(*arguments: Any, **options: Any) -> Listener:
        bound.append(await listen(*arguments, **options))
        return bound[-1]

    monkeypatch.setattr(app_ports, "listen", noted)
    async with taken() as sock:
        with pytest.raises(BindError, match="--grpc-port"):
            await data_ports(grpc_port=sock.getsockname()[1]).listen({})
    assert [listener.fds() for listener in bound] == [[]]


async def test_connections_wait_in_an_inherited_socket_until_they_are_accepted() -> None:
    async with taken() as http, taken() as grpc:
        inherited: Sockets = {HTTP: [http.dup()], GRPC: [grpc.dup()]}
        ports = data_ports()
        listeners = await ports.listen(inherited)
        assert listeners.fds() == {name: [sock.fileno() for sock in socks] for name, socks in inherited.items()}
        reader, writer = await asyncio.open_connection(*http.getsockname())
        writer.write(ASK_LIVE)
        for _ in range(20):
            await asyncio.sleep(0)
        assert ports.http.statistics().accepted_connections == 0
        await listeners.accept()
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        assert ports.requests() == 1.0
        assert ports.http_view().requests == 1
        assert ports.grpc_view().requests == 0
        writer.close()
        listeners.close()
        assert await ports.drain(10.0, 0.0) == 0
        assert listeners.fds() == {HTTP: [], GRPC: []}
