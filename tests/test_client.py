"""The small HTTP client: answers, refusals and absences in plain words, against a real socket."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from gateway.client import Access, ClientError, ServerError, Unreachable, fetch
from tests.ingress.certificates import Certificates

Reply = tuple[int, dict[str, str], bytes]


@contextmanager
def serving(
    reply: Callable[[str, str, dict[str, str], bytes], Reply], tls: ssl.SSLContext | None = None
) -> Iterator[str]:
    """A server whose answers come from `reply(method, path, headers in lower case, body)`; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, fields, content = reply(self.command, self.path, headers, body)
            self.send_response(status)
            for name, value in {**fields, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer  # noqa: N815  # names that http.server looks for

        def log_message(self, *_: object) -> None:
            """Tests keep quiet."""

    class Server(HTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that ends the handshake is no news."""

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"{'https' if tls is not None else 'http'}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_get_and_post_reach_the_path_below_the_url() -> None:
    seen = []

    def reply(method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        seen.append((method, path, headers.get("x-a"), body))
        return 200, {"X-B": "1"}, b'{"a": [1]}'

    with serving(reply) as url:
        answer = fetch(url + "/prefix/", "/v2")
        fetch(url, "/v2/models/m/infer", b"body", {"X-A": "2"})
    assert answer.json() == {"a": [1]}
    assert (answer.header("x-b"), answer.header("missing")) == ("1", None)
    assert answer.elapsed_s > 0
    assert seen == [("GET", "/prefix/v2", None, b""), ("POST", "/v2/models/m/infer", "2", b"body")]


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (404, b'{"error":"Request for unknown model"}', "Request for unknown model (status 404)"),
        (422, b'{"detail":"bad rows"}', "bad rows (status 422)"),
        (502, b"<html>\n bad gateway", "status 502: '<html> bad gateway'"),
        (500, b"", "status 500: empty"),
        (301, b"[1]", "status 301: '[1]'"),
    ],
)
def test_a_refusal_carries_the_servers_own_text(status: int, body: bytes, text: str) -> None:
    with serving(lambda *_: (status, {}, body)) as url, pytest.raises(ServerError) as caught:
        fetch(url, "/")
    assert (caught.value.http_status, str(caught.value)) == (status, text)


def test_an_answer_that_is_not_json_is_named_as_such() -> None:
    with (
        serving(lambda *_: (200, {}, b"hello\nthere")) as url,
        pytest.raises(ClientError, match="not JSON: 'hello there'"),
    ):
        fetch(url, "/").json()


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(Unreachable, match=f"cannot reach http://127.0.0.1:{port}: Connection refused; is the gateway"):
        fetch(f"http://127.0.0.1:{port}", "/")


def accept_and_close(listener: socket.socket) -> None:
    for _ in range(2):
        listener.accept()[0].close()


def test_a_server_that_hangs_up_or_keeps_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(Unreachable, match=r"gave no answer within 0\.05 s"):
            fetch(url, "/", access=Access(0.05))
        hang_up = threading.Thread(target=accept_and_close, args=(listener,))
        hang_up.start()
        with pytest.raises(Unreachable, match="cannot reach"):
            fetch(url, "/")
        hang_up.join()


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://h", "http://", "http://h:port", "http://h:99999999"])
def test_texts_that_are_no_address(url: str) -> None:
    with pytest.raises(
        ClientError, match=r"is not the address of a server; write for example http://127\.0\.0\.1:8000"
    ):
        fetch(url, "/")


def test_headers_of_the_caller_do_not_displace_those_of_the_request() -> None:
    seen: list[tuple[str | None, str | None]] = []

    def reply(method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        seen.append((headers.get("x-key"), headers.get("content-type")))
        return 200, {}, b"{}"

    with serving(reply) as url:
        fetch(url, "/", b"", {"Content-Type": "a/b"}, Access(headers={"X-Key": "secret", "Content-Type": "c/d"}))
    assert seen == [("secret", "a/b")]


def test_certificates_are_checked_and_faults_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Certificates(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(made["server"], made["server-key"])
    trusted = Access(ca=str(made["ca"]))
    with serving(lambda *_: (200, {}, b"{}"), tls) as url:
        assert fetch(url, "/", access=trusted).json() == {}
        for access in (Access(), Access(ca=str(made["stranger"]))):
            with pytest.raises(Unreachable, match=r"certificate is not trusted .*: name its authority with --ca FILE$"):
                fetch(url, "/", access=access)
        monkeypatch.setenv("SSL_CERT_FILE", str(made["ca"]))
        assert fetch(url, "/").json() == {}
        for ca, why in (
            (tmp_path / "nowhere.pem", "No such file"),
            (made.directory / "names", "no certificate in PEM"),
        ):
            with pytest.raises(ClientError, match=f"cannot use --ca .*{ca.name}: .*{why}"):
                fetch(url, "/", access=Access(ca=str(ca)))
        elsewhere = url.replace("127.0.0.1", "127.0.0.2")
        monkeypatch.setattr(http.client.HTTPSConnection, "connect", _connect_to("127.0.0.1"))
        with pytest.raises(Unreachable, match=r"certificate is not for this address .*127\.0\.0\.2"):
            fetch(elsewhere, "/", access=trusted)
    with (
        serving(lambda *_: (200, {}, b"{}")) as url,
        pytest.raises(Unreachable, match="there is no TLS there; write htt"),
    ):
        fetch(url.replace("http:", "https:"), "/")


def _connect_to(host: str) -> Callable[[http.client.HTTPSConnection], None]:
    """As if the connection's name meant `host`."""

    def connect(self: http.client.HTTPSConnection) -> None:
        plain = socket.create_connection((host, self.port), 10)
        self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)

    return connect
