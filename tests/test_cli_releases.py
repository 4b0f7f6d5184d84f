"""`gateway models history|refresh|rollback|status` against a server on a real socket."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gateway import cli_releases
from gateway.cli import main
from gateway.client import Access
from tests.test_client import Reply, serving

Said = pytest.CaptureFixture[str]
STATUS: dict[str, Any] = {
    "model": "digits", "followed": True, "interval_s": 30.0, "reference": "models:/digits@champion",
    "asked_at": 1_800_000_000.0, "trouble": "", "refused": "output 'y' is 3 in element 0, expected 2", "withheld": "",
    "releases": [
        {"role": "live", "version": "4", "digest": "sha256:b", "identity": "i4", "uri": "models:/digits/4", "since": 1},
        {"role": "previous", "version": "3", "digest": "", "identity": "i3", "uri": "models:/digits/3", "since": 1},
    ],
    "history": [
        {
            "at": 1_800_000_000.0, "outcome": "swapped", "by": "poll", "from_version": "3", "from_digest": "sha256:a",
            "to_version": "4", "to_digest": "sha256:b", "to_uri": "models:/digits/4", "why": "", "took_s": 0.25,
        },
        {
            "at": 1_800_000_060.0, "outcome": "refused", "by": "poll", "from_version": "4", "from_digest": "sha256:b",
            "to_version": "5", "to_digest": "", "to_uri": "models:/digits/5", "why": "wrong [answer]", "took_s": 0.1,
        },
    ],
}  # fmt: skip


class Port:
    """Answers like the operations port and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.reply: Reply | None = None

    def __call__(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        self.asked.append((method, path, headers))
        if self.reply is not None:
            return self.reply
        if method == "GET":
            return 200, {}, json.dumps(STATUS).encode()
        return 200, {}, json.dumps({"text": "version 3 serves now, version 4 before"}).encode()


@pytest.fixture
def port() -> Port:
    return Port()


def test_a_program_gets_every_field_of_the_history(port: Port, capsys: Said) -> None:
    with serving(port) as url:
        assert main(["models", "history", "digits", "--ops-url", url]) == 0
    first, second = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert first == [
        "2027-01-15T08:00:00Z", "swapped", "poll", "3", "sha256:a", "4", "sha256:b", "models:/digits/4", "0.25", "-",
    ]  # fmt: skip
    assert second[-1] == "wrong [answer]"
    assert port.asked[0][:2] == ("GET", "/api/models/digits/releases")


def shown(width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def text_of(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_a_person_gets_a_table(port: Port) -> None:
    with serving(port) as url:
        out = shown()
        cli_releases.history(out, url, "digits", Access(5.0))
    assert "wrong [answer]" in text_of(out)
    assert "0.25 s" in text_of(out)


def test_the_status_names_releases_refusals_and_what_happened_last(port: Port) -> None:
    with serving(port) as url:
        out = shown()
        cli_releases.show(out, url, "digits", Access(5.0))
    text = text_of(out)
    assert "live            version 4  sha256:b  models:/digits/4" in text
    assert "previous        version 3  -  models:/digits/3" in text
    assert "models:/digits@champion, every 30 s, asked last 2027-01-15T08:00:00Z" in text
    assert "refused         output 'y' is 3 in element 0, expected 2" in text
    assert "refused by poll, 4 -> 5: wrong [answer]" in text
    assert "withheld" not in text


def test_what_is_withheld_and_what_was_never_asked_is_said_in_words(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STATUS, "withheld", "m-5")
    monkeypatch.setitem(STATUS, "asked_at", None)
    with serving(port) as url:
        out = shown()
        cli_releases.show(out, url, "digits", Access(5.0))
    assert "every 30 s, not asked since the start" in text_of(out)
    assert "m-5, until the source means something else, or: gateway models refresh digits --force" in text_of(out)


def test_people_read_what_happened_in_words(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    first = STATUS["history"][0] | {"outcome": "loaded", "by": "start", "from_version": "", "to_version": "3"}
    back = STATUS["history"][0] | {"outcome": "rolled_back", "by": "operator", "from_version": "4", "to_version": "3"}
    monkeypatch.setitem(STATUS, "history", [first, back])
    with serving(port) as url:
        out, table = shown(), shown()
        cli_releases.show(out, url, "digits", Access(5.0))
        cli_releases.history(table, url, "digits", Access(5.0))
    assert "loaded by start, 3\n" in text_of(out)
    assert "rolled back by operator, 4 -> 3\n" in text_of(out)
    assert "rolled back" in text_of(table)


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (["rollback", "digits"], "/api/models/digits/rollback?wait_s=600"),
        (["refresh", "digits"], "/api/models/digits/refresh?wait_s=600"),
        (["refresh", "a b/c", "--force"], "/api/models/a%20b%2Fc/refresh?wait_s=600&force=true"),
    ],
)
def test_an_action_is_sent_and_its_outcome_said(port: Port, capsys: Said, arguments: list[str], path: str) -> None:
    with serving(port) as url:
        assert main(["models", *arguments, "--ops-url", url]) == 0
    assert "version 3 serves now, version 4 before" in capsys.readouterr().out
    ((method, asked, headers),) = port.asked
    assert (method, asked, headers["content-type"]) == ("POST", path, "application/json")


def test_a_token_is_read_from_its_file_and_one_that_lacks_is_asked_for(
    port: Port, capsys: Said, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("secret\n")
    with serving(port) as url:
        arguments = ["models", "rollback", "digits", "--ops-url", url]
        assert main([*arguments, "--token-file", str(tmp_path / "token")]) == 0
        assert port.asked[0][2]["authorization"] == "Bearer secret"
        port.reply = 401, {}, b'{"error":"this needs the token"}'
        assert main(arguments) == 1
    assert "--token-file" in capsys.readouterr().err


def test_a_refusal_is_an_error(port: Port, capsys: Said) -> None:
    port.reply = 409, {}, b'{"error":"model \'digits\' has no former version loaded"}'
    with serving(port) as url:
        assert main(["models", "rollback", "digits", "--ops-url", url]) == 1
    assert "no former version" in capsys.readouterr().err


def test_an_action_needs_a_name(capsys: Said) -> None:
    assert main(["models", "rollback"]) == 2
    assert "gateway models rollback NAME" in capsys.readouterr().err
