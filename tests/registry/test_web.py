"""The client towards registries: bounds in time and bytes, redirects, credentials, and what is told of failures."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from gateway.errors import SourceError, SourceUnavailable
from gateway.registry import web as module
from gateway.registry.web import MAX_REDIRECTS, STALL_S, Answer, Web, basic, refusal, shown
from tests.registry.scripted_http import Scripted, answer, scripted

CHUNKED = b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n"


def says(data: bytes):  # type: ignore[no-untyped-def]  # a script
    return lambda head, connection: connection.sendall(data)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_a_question_and_its_answer() -> None:
    with scripted(says(answer(200, b'{"a": 1}', X_Y="z"))) as server:
        web = Web(server.url + "/prefix/", lambda: {"Authorization": "Bearer t"})
        got = web.ask("/api/x", query={"name": "a b&c"}, document={"q": 1}, method="POST")
        assert (got.status, got.json(), got.headers["x-y"]) == (200, {"a": 1}, "z")
        assert got.url == f"{server.url}/prefix/api/x"
    (request,) = server.requests
    assert request.startswith(b"POST /prefix/api/x?name=a+b%26c HTTP/1.1\r\n")
    assert request.endswith(b'\r\n\r\n{"q": 1}')
    assert server.heads("authorization") == ["Bearer t"]
    assert server.heads("accept-encoding") == ["identity"]


def test_a_file_is_written_and_hashed_and_its_progress_told() -> None:
    content, seen = bytes(range(256)) * 4000, []
    with scripted(says(answer(200, content))) as server:
        into = io.BytesIO()
        got = Web(server.url).save("f", into, timeout_s=30, limit=len(content), told=lambda *at: seen.append(at))
    assert into.getvalue() == content
    assert (got.size, got.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert seen[-1] == (len(content), len(content))


@pytest.mark.parametrize(
    ("data", "said", "error"),
    [
        (answer(200, b"x" * 101), "101 bytes, more than the 100", SourceError),
        (b"HTTP/1.1 200 X\r\n\r\n" + b"x" * 101, "more than the 100 bytes", SourceError),
        (CHUNKED + b"65\r\n" + b"x" * 101 + b"\r\n0\r\n\r\n", "more than the 100", SourceError),
        (b"HTTP/1.1 200 X\r\nContent-Length: 50\r\n\r\nhalf", "sent 4 bytes of 50", SourceUnavailable),
        (CHUNKED + b"40\r\nhalf", "was cut short", SourceUnavailable),
        (b"SSH-2.0-OpenSSH\r\n", "does not answer as an HTTP server", SourceUnavailable),
        (b"", "without an answer", SourceUnavailable),
        (answer(404, b'{"message": "no such\\u0007 thing"}'), "answered 404: no such thing", SourceError),
        (answer(500, b"<html>"), "answered 500$", SourceUnavailable),
        (answer(429), "answered 429", SourceUnavailable),
        (answer(401), "answered 401; check the credentials", SourceUnavailable),
        (answer(302, Location="http://127.0.0.1:1/x?token=hidden"), "redirects to http://127.0.0.1:1/x,", SourceError),
    ],
)  # fmt: skip
def test_what_is_no_file_is_told(data: bytes, said: str, error: type[SourceError]) -> None:
    with scripted(says(data)) as server, pytest.raises(SourceError, match=said) as told:
        Web(server.url).save("f?sig=hidden", io.BytesIO(), timeout_s=30, limit=100)
    assert type(told.value) is error
    assert "hidden" not in str(told.value)


def test_a_server_that_trickles_is_cut_off_at_the_deadline() -> None:
    def trickle(head: bytes, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 X\r\nContent-Length: 100000\r\n\r\n")
        while not holder[0].hold.wait(0.01):
            connection.sendall(b"x")

    holder: list[Scripted] = []
    with scripted(trickle) as server:
        holder.append(server)
        started = time.monotonic()
        with pytest.raises(SourceUnavailable, match="in time"):
            Web(server.url).save("f", io.BytesIO(), timeout_s=0.3, limit=10**6)
        assert time.monotonic() - started < 20


@pytest.mark.parametrize("before", [b"", b"HTTP/1.1 200 X\r\nX-A: "])
def test_a_server_that_says_nothing_or_half_a_head_is_cut_off(before: bytes) -> None:
    holder: list[Scripted] = []

    def silent(head: bytes, connection: socket.socket) -> None:
        connection.sendall(before)
        holder[0].hold.wait(60)

    with scripted(silent) as server:
        holder.append(server)
        started = time.monotonic()
        with pytest.raises(SourceUnavailable, match="in time"):
            Web(server.url).ask("f", timeout_s=0.3)
        assert time.monotonic() - started < STALL_S / 2, "the deadline did it, and not the silence"


def test_an_answer_without_a_length_that_is_cut_at_the_deadline_is_not_taken_for_whole() -> None:
    holder: list[Scripted] = []

    def endless(head: bytes, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 X\r\n\r\nhalf")
        holder[0].hold.wait(60)

    with scripted(endless) as server:
        holder.append(server)
        started = time.monotonic()
        with pytest.raises(SourceUnavailable, match="in time"):
            Web(server.url).save("f", io.BytesIO(), timeout_s=0.3, limit=100)
        assert time.monotonic() - started < STALL_S / 2


def test_credentials_stay_with_the_host_they_are_for() -> None:
    with scripted(says(answer(200, b"found"))) as other:

        def redirect(head: bytes, connection: socket.socket) -> None:
            connection.sendall(answer(307, Location=f"{other.url}/elsewhere?signed=1"))

        with scripted(redirect) as server:
            web = Web(server.url, lambda: {"Authorization": "Bearer t"}, allowed=lambda url: url.startswith(other.url))
            assert web.ask("f").body == b"found"
        assert server.heads("authorization") == ["Bearer t"]
    assert other.heads("authorization") == [""]
    assert other.requests[0].startswith(b"GET /elsewhere?signed=1 ")


class Hop:
    """An answer without a socket: on to `target`, or the end of the way."""

    length = 0

    def __init__(self, target: str | None) -> None:
        self.status = 200 if target is None else 302
        self.headers = {} if target is None else {"Location": target}

    def read1(self, _: int) -> bytes:
        return b""


def led(monkeypatch: pytest.MonkeyPatch, *targets: str) -> list[tuple[str, Mapping[str, str]]]:
    """Whoever is asked leads on to the next target; what was asked, and with which headers, is noted."""
    asked: list[tuple[str, Mapping[str, str]]] = []

    @contextlib.contextmanager
    def once(_: str, url: str, body: bytes | None, headers: Mapping[str, str], *more: object) -> Iterator[Hop]:
        asked.append((url, dict(headers)))
        yield Hop(targets[len(asked) - 1] if len(asked) <= len(targets) else None)

    monkeypatch.setattr(module, "_once", once)
    return asked


@pytest.mark.parametrize("target", ["http://h/y", "HTTP://h/y", "ftp://h/y"])
def test_nobody_is_led_out_of_tls(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    asked = led(monkeypatch, target)
    with pytest.raises(SourceError, match="does not allow"):
        Web("https://h", allowed=lambda url: True).ask("x")
    assert [url for url, _ in asked] == ["https://h/x"]


@pytest.mark.parametrize("target", ["https://h/y", "http://h:8080/y", "http://other/y", "http://h@other/y"])
def test_no_credential_follows_to_another_origin(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    asked = led(monkeypatch, target, "http://h/back")
    mine = Web("http://h", lambda: {"Authorization": "Bearer mine"}, allowed=lambda url: True)
    if target.startswith("https:"):
        asked = led(monkeypatch, target)
    mine.ask("x", headers={"authorization": "Bearer given", "X-Y": "z"})
    home, away, *back = [{name.lower(): value for name, value in headers.items()} for _, headers in asked]
    assert "authorization" in home
    assert "authorization" not in away
    assert away["x-y"] == "z"
    assert all("authorization" in headers for headers in back)


def test_a_redirect_in_a_circle_ends() -> None:
    holder: list[Scripted] = []
    with scripted(lambda head, connection: connection.sendall(answer(302, Location=f"{holder[0].url}/x"))) as server:
        holder.append(server)
        with pytest.raises(SourceError, match=f"more than {MAX_REDIRECTS} times"):
            Web(server.url, allowed=lambda url: True).ask("x")
    assert len(server.requests) == MAX_REDIRECTS + 1


@pytest.mark.parametrize("target", ["http://[bad", "http://127.0.0.1:99999/", "http://h:abc/"])
def test_a_redirect_to_what_is_no_address_is_refused(target: str) -> None:
    with scripted(says(answer(302, Location=target))) as server, pytest.raises(SourceError, match="no address"):
        Web(server.url, allowed=lambda url: True).ask("x")


def test_nobody_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        with pytest.raises(SourceUnavailable, match="refuses connections") as told:
            Web(f"http://127.0.0.1:{port}").ask("x")
    assert told.value.soon


def test_a_disk_that_is_full_is_not_blamed_on_the_server() -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    with scripted(says(answer(200, b"x"))) as server, pytest.raises(SourceUnavailable, match="No space left") as told:
        Web(server.url).save("f", Full(), timeout_s=30, limit=10)
    assert not told.value.soon
    assert server.url not in str(told.value)


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(says(answer(200, b"via"))) as proxy:
        monkeypatch.setenv("http_proxy", f"http://user:pa%20ss@127.0.0.1:{proxy.port}")
        assert Web("http://registry.invalid:5000").ask("x", query={"a": "b"}).body == b"via"
    assert proxy.requests[0].startswith(b"GET http://registry.invalid:5000/x?a=b HTTP/1.1\r\n")
    assert proxy.heads("proxy-authorization") == [basic("user", "pa ss")]


def test_what_is_shown_of_an_address() -> None:
    assert shown("https://user:secret@h:1/p?token=secret#f") == "https://h:1/p"
    assert shown("http://h/\x1b[2J\u202e") == "http://h/?[2J?"
    assert basic("a", "b") == "Basic YTpi"


def test_an_answer_that_is_no_json_is_told() -> None:
    with pytest.raises(SourceUnavailable, match="not JSON"):
        Answer(200, {}, b"<html>", "http://h/x").json()
    with pytest.raises(SourceUnavailable, match="not JSON"):  # half a surrogate pair
        Answer(200, {}, b'{"key": "\\ud800"}', "http://h/x").json()
    assert str(refusal(Answer(403, {}, b'{"error": ["x"]}', "http://h/x"))).startswith("http://h/x answered 403: ['x']")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that is its own authority; its key lies beside it as key.pem."""
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=registry"
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(
        [*command.split(), *files, "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return folder / "cert.pem"


def test_over_tls_only_who_has_a_trusted_certificate_is_asked(certificate: Path, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_: object) -> None:
            """Nobody wants to know."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"https://127.0.0.1:{server.server_port}"
        try:
            assert Web(url, ca=certificate).ask("x").body == b"ok"
            with pytest.raises(SourceUnavailable, match="its certificate is not trusted"):
                Web(url).ask("x")
            with pytest.raises(SourceUnavailable, match="cannot be used as authorities"):
                Web(url, ca=tmp_path / "none.pem").ask("x")
        finally:
            server.shutdown()
