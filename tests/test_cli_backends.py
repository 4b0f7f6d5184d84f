"""`gateway backends` against a server on a real socket."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from rich.console import Console

from gateway import cli_backends
from gateway.cli import main
from gateway.client import Access
from tests.test_client import Reply, serving

Said = pytest.CaptureFixture[str]


def backend(name: str, **changed: Any) -> dict[str, Any]:
    return {
        "model": "digits", "version": "3", "backend": name, "server": "", "kind": "onnx", "url": "", "zone": "",
        "weight": 1.0, "state": "closed", "cause": "", "until": None, "seconds_left": None, "slots": 1.0,
        "in_flight": 0, "latency_ms": 1.25, "share": 0.5, **changed,
    }  # fmt: skip


LISTED = [
    backend("onnx-10"),
    backend("onnx-2", in_flight=1),
    backend(
        "triton-a:8000", server="triton-a:8000", kind="oip", url="http://triton-a:8000", zone="rack-1", state="open",
        cause="5 failures in a row: status 500 [boom]", until="2026-11-23T07:00:03.000+00:00", seconds_left=3.4,
        share=None, latency_ms=None,
    ),
    backend("triton-a:8000", model="salary", server="triton-a:8000", kind="oip", state="drained", cause="an operator"),
]  # fmt: skip


class Port:
    """Answers like the operations port and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.reply: Reply | None = None

    def __call__(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        self.asked.append((method, path, headers, body))
        if self.reply is not None:
            return self.reply
        if path == "/api/backends":
            return 200, {}, json.dumps(LISTED).encode()
        action = urlsplit(path).path.rsplit("/", 1)[1]
        changed = {"model": "digits", "version": "3", "backend": "onnx-2", "state": "drained", "in_flight": 2}
        done = {"action": action, "name": "onnx-2", "backends": [changed], "idle": False}
        return 200, {}, json.dumps(done).encode()


@pytest.fixture
def port() -> Port:
    return Port()


def test_a_program_gets_every_field_of_every_backend(port: Port, capsys: Said) -> None:
    with serving(port) as url:
        assert main(["backends", "--ops-url", url]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert main(["backends", "list", "triton-a:8000", "--model", "salary", "--ops-url", url]) == 0
        one = capsys.readouterr().out
    assert [line.split("\t")[:3] for line in lines] == [
        ["digits", "3", "onnx-2"],
        ["digits", "3", "onnx-10"],
        ["digits", "3", "triton-a:8000"],
        ["salary", "3", "triton-a:8000"],
    ]
    assert lines[2].split("\t")[3:] == [
        "open", "5 failures in a row: status 500 [boom]", "2026-11-23T07:00:03.000+00:00", "1.0", "0", "-", "-", "oip",
        "rack-1", "http://triton-a:8000",
    ]  # fmt: skip
    assert one == "salary\t3\ttriton-a:8000\tdrained\tan operator\t-\t1.0\t0\t1.25\t0.5\toip\t-\t-\n"


def test_an_address_or_url_lists_everything_there_whatever_it_is_called(port: Port, capsys: Said) -> None:
    named = backend("blue", server="blue", kind="oip", url="http://triton-a:8000")
    port.reply = 200, {}, json.dumps([*LISTED[:3], named]).encode()
    with serving(port) as url:
        for name in ("triton-a:8000", "http://triton-a:8000"):
            assert main(["backends", "list", name, "--ops-url", url]) == 0
            assert [line.split("\t")[2] for line in capsys.readouterr().out.splitlines()] == ["blue", "triton-a:8000"]
        assert main(["backends", "list", "blue", "--ops-url", url]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("width", [80, 120])
def test_a_person_sees_why_and_until_when(port: Port, width: int) -> None:
    text = io.StringIO()
    out = Console(file=text, force_terminal=True, width=width, color_system=None)
    with serving(port) as url:
        cli_backends.show(out, url, Access(10), name=None, model=None)
    said = text.getvalue()
    assert max(len(line) for line in said.splitlines()) <= width
    words = " ".join(said.replace("│", " ").split())
    assert "in use" in words
    assert "drained" in words
    assert "ejected" in words
    for word in ("failures", "[boom]", "more", "operator"):
        assert word in words
    assert ("rack-1" in words) is (width == 120)
    assert ("triton-a:8000: 5 failures in a row: status 500 [boom]" in words) is (width == 80)  # below the table
    assert all("triton-a:8000" in line for line in said.splitlines() if "triton" in line)  # no name is broken


def test_what_does_not_exist_is_said_with_what_does(port: Port, capsys: Said) -> None:
    with serving(port) as url:
        assert main(["backends", "list", "nope", "--ops-url", url]) == 1
        assert "no backend is named 'nope'; there are: onnx-2, onnx-10, triton-a:8000" in capsys.readouterr().err
        assert main(["backends", "list", "--model", "nope", "--ops-url", url]) == 1
        assert "model 'nope' has no backend here" in capsys.readouterr().err
        assert main(["backends", "stop", "--ops-url", url]) == 2
        assert "'backends stop' does not exist; write list, drain or undrain" in capsys.readouterr().err
        assert main(["backends", "drain", "--ops-url", url]) == 2
        assert "name the backend: gateway backends drain NAME" in capsys.readouterr().err


def test_drain_asks_for_what_it_was_told_and_says_what_is_still_under_way(
    port: Port, capsys: Said, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("secret\n")
    with serving(port) as url:
        arguments = ["backends", "drain", "a/b:1", "--model", "d i", "--force", "--wait", "2.5", "--ops-url", url]
        assert main([*arguments, "--token-file", str(tmp_path / "token")]) == 0
        assert main(["backends", "undrain", "onnx-2", "--ops-url", url]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "a/b:1 is drained (digits version 3 on onnx-2); 2 batches still under way there",
        "onnx-2 is undrained (digits version 3 on onnx-2); now drained",
    ]
    (method, path, headers, body), (_, plain, bare, _) = port.asked
    assert (method, urlsplit(path).path, body) == ("POST", "/api/backends/a%2Fb%3A1/drain", b"{}")
    assert parse_qs(urlsplit(path).query) == {"model": ["d i"], "force": ["true"], "wait_s": ["2.500"]}
    assert headers["authorization"] == "Bearer secret"
    assert headers["content-type"] == "application/json"
    assert plain == "/api/backends/onnx-2/undrain"
    assert "authorization" not in bare


def test_a_refusal_is_shown_as_the_server_put_it(port: Port, capsys: Said) -> None:
    port.reply = (409, {}, b'{"error": "\'onnx-2\' is all that can serve digits version 3 now"}')
    with serving(port) as url:
        assert main(["backends", "drain", "onnx-2", "--ops-url", url]) == 1
    assert capsys.readouterr().err == "error: 'onnx-2' is all that can serve digits version 3 now (status 409)\n"


@pytest.mark.parametrize("content", [b"", b"a\nsecret", b"se\xffcret"])
def test_a_token_file_without_a_token_is_refused_without_showing_it(
    port: Port, capsys: Said, tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    for path in (file, tmp_path / "nothing"):
        assert main(["backends", "drain", "onnx-2", "--token-file", str(path)]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: cannot use --token-file {path}: ")
        assert "secret" not in said
    assert port.asked == []


@pytest.mark.parametrize("reply", [(404, {}, b'{"error":"Not Found"}'), (200, {}, b'{"a": 1}'), (200, {}, b"[1]")])
def test_the_wrong_port_is_named(reply: Any, capsys: Said) -> None:
    with serving(lambda *_: reply) as url:
        assert main(["backends", "--ops-url", url]) == 1
    assert "operations port" in capsys.readouterr().err


def test_who_has_no_token_is_told_how_to_give_one(port: Port, capsys: Said) -> None:
    port.reply = 401, {}, b'{"error": "this needs the token"}'
    with serving(port) as url:
        assert main(["backends", "drain", "onnx-2", "--ops-url", url]) == 1
    assert "this needs the token (status 401); name a file that holds the token with --token-file" in (
        capsys.readouterr().err
    )
