"""The small HTTP client: answers, refusals and absences in plain words, against a real socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from gateway.client import ClientError, ServerError, Unreachable, fetch

Reply = tuple[int, dict[str, str], bytes]


@contextmanager
def serving(reply: Callable[[str, str, dict[str, str], bytes], Reply]) -> Iterator[str]:
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

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
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
            fetch(url, "/", timeout_s=0.05)
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
