"""Connections to remote servers: what a lost one means, how long one is kept, and TLS."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import pytest

from gateway.backends.remote import Endpoint, RemoteServer, RemoteTls
from gateway.backends.remote_http1 import Http1Connection
from gateway.core.outcome import Failure, FailureKind, Sign
from tests.backends.oip_server import Reply, binary_answer, doubled, serving
from tests.backends.remote_rig import SCHEMES, execute, replica_of, rig, seen, until, values
from tests.ingress.certificates import Certificates

BROKEN, NOT_SENT = FailureKind.BROKEN, FailureKind.NOT_SENT


# -- connections that are lost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("then", ["close", "reset"])
async def test_a_connection_that_is_lost_after_the_request_arrived_is_broken(scheme: str, then: str) -> None:
    async with rig(scheme) as r:
        r.peer.script = lambda _: Reply(b"", then)  # type: ignore[arg-type]
        assert seen(await execute(r.replica, 1)) == (BROKEN, Sign.NONE)
        assert len(r.peer.infers) == 1  # sent once, whatever comes of it


@pytest.mark.parametrize("then", ["close", "reset"])
async def test_an_answer_cut_short_is_broken(then: str) -> None:
    async with rig() as r:
        for end in (1, 20, 100, -1):
            r.peer.script = lambda asked, end=end: Reply(doubled(asked).data[:end], then)  # type: ignore[arg-type]
            assert seen(await execute(r.replica, 1)) == (BROKEN, Sign.NONE)


async def test_an_answer_in_pieces_is_an_answer() -> None:
    async with rig() as r:
        r.peer.script = lambda asked: Reply(doubled(asked).data, cuts=range(1, 200, 7))
        assert values(await execute(r.replica, 21)) == [42]


async def test_an_idle_connection_that_the_server_had_closed_took_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Http1Connection, "silent", lambda self: True)  # it closes just after that look
    """The server closes as the request is on its way: no byte of it was acknowledged, so it may be sent elsewhere."""
    listener = socket.create_server(("127.0.0.1", 0))
    answer = binary_answer([("y", "FP32", [1, 2], bytes(8))])
    with listener:
        server = RemoteServer(Endpoint("http", "127.0.0.1", listener.getsockname()[1]))
        try:
            settled: list[object] = []
            server.channel.begin(b"GET / HTTP/1.1\r\n\r\n", settled.append)
            await until(lambda: server.statistics().connections == 1, "connected")
            peer, _ = listener.accept()
            assert peer.recv(1000)
            peer.sendall(answer)
            await until(lambda: bool(settled), "the first answer")
            peer.close()
            server.channel.begin(b"GET / HTTP/1.1\r\n\r\n", settled.append)  # before the loop saw the end
            await until(lambda: len(settled) == 2, "the second outcome")
            failure = settled[1]
            assert isinstance(failure, Failure)
            assert (failure.kind, failure.sign) == (NOT_SENT, Sign.NONE)
        finally:
            await server.close()


async def test_nobody_there() -> None:
    async with rig() as r:
        await r.peer.stop()
        outcome = await execute(r.replica, 1)
        assert seen(outcome)[0] is NOT_SENT
        await until(lambda: "Connection refused" in r.replica.cause, "the cause")


async def test_a_server_that_takes_no_connection_is_given_up_in_time() -> None:
    """Its queue of connections is full: SYNs are dropped, as a firewall would."""
    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    fillers = []
    try:
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
            fillers.append(filler)
        server = RemoteServer(Endpoint("http", "127.0.0.1", full.getsockname()[1], connect_timeout_s=0.05))
        replica = replica_of(server)
        await until(lambda: "within 50 ms" in replica.cause, "given up")
        await replica.close()
    finally:
        for sock in (full, *fillers):
            sock.close()


async def test_an_answer_over_the_bound_is_cut_off() -> None:
    async with rig(max_answer_bytes=4000) as r:
        r.peer.script = lambda _: Reply(binary_answer([("y", "FP32", [1000, 2], bytes(8000))]))
        outcome = await execute(r.replica, 1)
        assert seen(outcome) == (BROKEN, Sign.NONE)
        assert isinstance(outcome, Failure)
        assert "more than 4000 bytes" in outcome.message


async def test_closing_leaves_no_connection_behind() -> None:
    async with rig() as r:
        await execute(r.replica, 1)
        assert r.server.statistics().connections > 0
        await r.replica.close()
        await r.server.close()
        assert r.server.statistics().connections == 0


# -- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    found = Certificates(tmp_path_factory.mktemp("tls"))
    for name, names, days in (("expired", "IP:127.0.0.1", "-1"), ("elsewhere", "DNS:elsewhere.example", "2")):
        (found.directory / "names").write_text(f"subjectAltName={names}")
        for command in (
            f"req -newkey rsa:2048 -nodes -subj /CN={name} -keyout {name}-key.pem -out {name}.csr",
            f"x509 -req -in {name}.csr -out {name}.pem -CA ca.pem -CAkey ca-key.pem -days {days} -extfile names",
        ):
            subprocess.run(["openssl", *command.split()], cwd=found.directory, check=True, capture_output=True)
    return found


def of_server(certificates: Certificates, name: str, scheme: str, *, mutual: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates[name], certificates[f"{name}-key"])
    context.set_alpn_protocols(["h2" if scheme == "grpcs" else "http/1.1"])
    if mutual:
        context.load_verify_locations(certificates["ca"])
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
async def test_over_tls_with_a_certificate_of_ours(certificates: Certificates, scheme: str) -> None:
    tls = RemoteTls(certificates["ca"], certificates["client"], certificates["client-key"])
    peer_tls = of_server(certificates, "server", scheme, mutual=True)
    async with rig(scheme, tls=tls, peer_tls=peer_tls, connect_timeout_s=5.0) as r:
        assert values(await execute(r.replica, 1)) == [2]


@pytest.mark.parametrize(
    ("name", "tls_of", "server_name", "text"),
    [
        ("expired", "ca", "", "certificate has expired"),
        ("elsewhere", "ca", "", "certificate is not valid for '127.0.0.1'; tls.server_name is"),
        ("server", "ca", "other.example", "Hostname mismatch"),
        ("server", "stranger", "", "; tls.ca names the authorities to trust"),
        ("server", None, "", "certificate is refused"),
        ("server", "no-such-file", "", "cannot be read"),
        ("server", "server-key", "", "cannot be used"),
    ],
)
async def test_certificates_that_are_refused(
    certificates: Certificates, name: str, tls_of: str | None, server_name: str, text: str
) -> None:
    async with serving("http", of_server(certificates, name, "https")) as peer:
        ca = None if tls_of is None else certificates[tls_of]
        tls = RemoteTls(ca, server_name=server_name)
        server = RemoteServer(Endpoint("https", "127.0.0.1", peer.port, tls=tls, connect_timeout_s=5.0))
        replica = replica_of(server)
        await until(lambda: text in replica.cause, f"{text} in {replica.cause}")
        assert not replica.available
        assert not peer.requests  # not a word was said
        await replica.close()


async def test_a_name_may_be_stated_for_an_address(certificates: Certificates) -> None:
    tls = RemoteTls(certificates["ca"], server_name="elsewhere.example")
    peer_tls = of_server(certificates, "elsewhere", "https")
    async with rig("https", tls=tls, peer_tls=peer_tls, connect_timeout_s=5.0) as r:
        assert values(await execute(r.replica, 1)) == [2]


async def test_without_our_certificate_a_server_that_wants_one_is_not_reached(certificates: Certificates) -> None:
    async with serving("http", of_server(certificates, "server", "https", mutual=True)) as peer:
        tls = RemoteTls(certificates["ca"])
        server = RemoteServer(Endpoint("https", "127.0.0.1", peer.port, tls=tls, connect_timeout_s=5.0))
        assert not await server.ready(5.0)
        assert not peer.requests
        await server.close()


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_plain_and_tls_do_not_mix(certificates: Certificates, scheme: str) -> None:
    peer_tls = of_server(certificates, "server", "https") if scheme == "http" else None
    async with serving("http", peer_tls) as peer:
        tls = RemoteTls(certificates["ca"])
        server = RemoteServer(Endpoint(scheme, "127.0.0.1", peer.port, tls=tls))  # type: ignore[arg-type]
        assert not await server.ready(1.5)
        assert not peer.requests
        await server.close()


async def test_a_handshake_that_stalls_is_given_up() -> None:
    async with serving("http", None, lambda peer: setattr(peer, "serve", _mute)) as peer:
        server = RemoteServer(Endpoint("https", "127.0.0.1", peer.port, connect_timeout_s=0.02))
        replica = replica_of(server)
        await until(lambda: "no connection" in replica.cause, "given up")
        await replica.close()


async def _mute(*_: object) -> None:
    await asyncio.get_running_loop().create_future()


async def test_new_files_count_from_the_next_connection_on(certificates: Certificates, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    shutil.copy(certificates["stranger"], ca)
    async with serving("http", of_server(certificates, "server", "https")) as peer:
        server = RemoteServer(Endpoint("https", "127.0.0.1", peer.port, tls=RemoteTls(ca), connect_timeout_s=5.0))
        assert not await server.ready(5.0)
        fresh = tmp_path / "new.pem"
        shutil.copy(certificates["ca"], fresh)
        fresh.replace(ca)
        assert await server.ready(5.0)
        await server.close()


def test_headers_that_would_break_their_line_are_refused() -> None:
    async def make() -> None:
        with pytest.raises(ValueError, match="cannot be sent"):
            RemoteServer(Endpoint("http", "h", 1, headers={"X": "a\r\nEvil: yes"}))

    asyncio.run(make())
