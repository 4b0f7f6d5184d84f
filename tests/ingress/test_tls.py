"""TLS of the data ports, with real handshakes."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from gateway.errors import ConfigError
from gateway.ingress.grpc_server import GrpcServer
from gateway.ingress.http_server import HttpServer
from gateway.ingress.listener import Listener, listen
from gateway.ingress.tls import GRPC, HTTP, TlsFiles, context
from tests.ingress.certificates import Certificates
from tests.ingress.grpc_peer import EchoApp
from tests.ingress.http_peer import LOOPS, App, run


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


def files(certificates: Certificates, *, client_ca: bool = False) -> TlsFiles:
    return TlsFiles(certificates["server"], certificates["server-key"], certificates["ca"] if client_ca else None)


@asynccontextmanager
async def grpc_over_tls(made: TlsFiles) -> AsyncIterator[Listener]:
    server = GrpcServer(EchoApp())
    listener = await listen("127.0.0.1", 0, server, tls=context(made, GRPC))
    try:
        yield listener
    finally:
        await server.drain(1.0)


async def echo(listener: Listener, credentials: grpc.ChannelCredentials, message: bytes) -> bytes:
    channel: Any
    async with grpc.aio.secure_channel(f"127.0.0.1:{listener.port}", credentials) as channel:
        answer: bytes = await channel.unary_unary("/test.Echo/Unary")(message, timeout=20)
        return answer


@pytest.mark.parametrize("loop", list(LOOPS))
def test_grpc_over_tls(loop: str, certificates: Certificates) -> None:
    async def test() -> None:
        async with grpc_over_tls(files(certificates)) as listener:
            credentials = grpc.ssl_channel_credentials(certificates["ca"].read_bytes())
            for size in (0, 10, 3_000_000):
                assert await echo(listener, credentials, bytes(size)) == bytes(size)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await echo(listener, grpc.ssl_channel_credentials(certificates["stranger"].read_bytes()), b"")
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    run(loop, test())


@pytest.mark.parametrize("loop", list(LOOPS))
def test_clients_must_show_a_certificate_where_that_is_asked(loop: str, certificates: Certificates) -> None:
    async def test() -> None:
        async with grpc_over_tls(files(certificates, client_ca=True)) as listener:
            authority = certificates["ca"].read_bytes()
            pairs = [
                (certificates[f"{name}-key"].read_bytes(), certificates[name].read_bytes())
                for name in ("client", "stranger")
            ]
            assert await echo(listener, grpc.ssl_channel_credentials(authority, *pairs[0]), b"in") == b"in"
            for refused in (
                grpc.ssl_channel_credentials(authority),
                grpc.ssl_channel_credentials(authority, *pairs[1]),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await echo(listener, refused, b"")
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    run(loop, test())


@pytest.mark.parametrize("loop", list(LOOPS))
def test_http_over_tls(loop: str, certificates: Certificates) -> None:
    async def test() -> None:
        server = HttpServer(App(echo=True))
        listener = await listen("127.0.0.1", 0, server, tls=context(files(certificates), HTTP))
        client = ssl.create_default_context(cafile=str(certificates["ca"]))
        client.set_alpn_protocols(["h2", "http/1.1"])
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port, ssl=client)
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
        body = bytes(1_000_000)
        writer.write(b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
        assert await reader.readexactly(len(body)) == body
        writer.close()
        await server.drain(5.0)

    run(loop, test())


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> ssl.SSLObject:
    """Both sides in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    far = server.wrap_bio(to_server, to_client, server_side=True)
    near = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    for _ in range(4):
        for side in (near, far):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return near


def trusting(certificates: Certificates) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificates["ca"]))


@pytest.mark.parametrize("protocol", [HTTP, GRPC])
def test_what_is_negotiated(certificates: Certificates, protocol: str) -> None:
    client = trusting(certificates)
    client.set_alpn_protocols(["h2", "http/1.1"])
    agreed = handshake(context(files(certificates), protocol), client)
    assert agreed.selected_alpn_protocol() == protocol
    assert agreed.version() == "TLSv1.3"
    assert agreed.compression() is None


def test_tls_1_2_is_the_oldest(certificates: Certificates) -> None:
    client = trusting(certificates)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    agreed = handshake(context(files(certificates), GRPC), client)
    cipher = agreed.cipher()
    assert cipher is not None
    assert cipher[0].startswith("ECDHE-")
    assert "GCM" in cipher[0] or "CHACHA20" in cipher[0]
    assert context(files(certificates), GRPC).minimum_version is ssl.TLSVersion.TLSv1_2
    client.set_ciphers("AES128-SHA")
    with pytest.raises(ssl.SSLError):
        handshake(context(files(certificates), GRPC), client)


def test_faults_name_the_file_and_its_key(certificates: Certificates, tmp_path: Path) -> None:
    good = {"cert": certificates["server"], "key": certificates["server-key"], "client_ca": certificates["ca"]}
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing")
    missing = tmp_path / "missing.pem"
    for key, path, text in (
        ("cert", missing, "cannot be read: no such file or directory"),
        ("key", missing, "cannot be read: no such file or directory"),
        ("client_ca", missing, "cannot be read: no such file or directory"),
        ("cert", tmp_path, "cannot be read: is a directory"),
        ("cert", empty, "holds no certificate in PEM form"),
        ("key", empty, "holds no private key in PEM form"),
        ("client_ca", empty, "holds no certificates in PEM form"),
        ("key", certificates["client-key"], "is not the key of the certificate in"),
        ("key", certificates["locked-key"], "is locked with a passphrase"),
    ):
        with pytest.raises(ConfigError) as caught:
            context(TlsFiles(**{**good, key: path}), GRPC)
        assert str(caught.value).startswith(f"server.tls.{key}: {path} {text}")
