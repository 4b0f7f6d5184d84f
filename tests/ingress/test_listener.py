"""Listening: which address, which port, and what is said when it cannot be had."""

from __future__ import annotations

import socket

import pytest

from gateway.errors import BindError
from gateway.ingress.grpc_server import GrpcServer
from gateway.ingress.http_server import HttpServer
from gateway.ingress.listener import listen
from tests.ingress.grpc_peer import EchoApp
from tests.ingress.http_peer import LOOPS, App, run
from tests.protocol.test_http1_head import get

pytestmark = pytest.mark.parametrize("loop", list(LOOPS))


def test_port_0_takes_a_free_one(loop: str) -> None:
    async def test() -> None:
        listener = await listen("127.0.0.1", 0, HttpServer(App()))
        assert listener.port > 0
        with socket.create_connection(("127.0.0.1", listener.port)) as sock:
            assert sock.getpeername()[1] == listener.port
        listener.close()

    run(loop, test())


def test_a_taken_port_is_refused_with_what_to_do(loop: str) -> None:
    async def test() -> None:
        first = await listen("127.0.0.1", 0, HttpServer(App()))
        with pytest.raises(BindError) as caught:
            await listen("127.0.0.1", first.port, HttpServer(App()))
        assert (caught.value.host, caught.value.port) == ("127.0.0.1", first.port)
        assert f"127.0.0.1:{first.port}" in str(caught.value)
        assert "choose another port" in str(caught.value)
        first.close()

    run(loop, test())


def test_the_port_can_be_shared_when_asked(loop: str) -> None:
    async def test() -> None:
        first = await listen("127.0.0.1", 0, HttpServer(App()), reuse_port=True)
        second = await listen("127.0.0.1", first.port, HttpServer(App()), reuse_port=True)
        assert second.port == first.port
        first.close()
        second.close()

    run(loop, test())


@pytest.mark.parametrize(
    ("host", "text"), [("192.0.2.1", "does not belong"), ("no-such-host.invalid", "cannot be resolved")]
)
def test_an_address_that_is_not_ours(loop: str, host: str, text: str) -> None:
    async def test() -> None:
        with pytest.raises(BindError, match=text):
            await listen(host, 0, HttpServer(App()))

    run(loop, test())


def test_the_port_is_free_again_at_once_after_a_drain(loop: str) -> None:
    async def test() -> None:
        server = HttpServer(App(echo=True))
        first = await listen("127.0.0.1", 0, server)
        with socket.create_connection(("127.0.0.1", first.port)) as sock:
            sock.send(get())
            assert await server.drain(5.0) == 0
        second = await listen("127.0.0.1", first.port, HttpServer(App()))
        assert second.port == first.port
        second.close()

    run(loop, test())


def test_a_taken_port_names_the_option_to_change(loop: str) -> None:
    async def test() -> None:
        taken = await listen("127.0.0.1", 0, HttpServer(App()))
        with pytest.raises(BindError, match="choose another port with --grpc-port"):
            await listen("127.0.0.1", taken.port, GrpcServer(EchoApp()), option="--grpc-port")
        taken.close()

    run(loop, test())
