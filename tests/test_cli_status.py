"""The last column of `gateway models status` for programs, against a server on a real socket."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.cli import main
from tests.test_client import Reply, serving

Said = pytest.CaptureFixture[str]
MODELS: list[dict[str, Any]] = [
    {"name": "a/b", "version": "3", "state": "READY", "reason": ""},
    {"name": "a/b", "version": "4", "state": "READY", "role": "previous", "reason": "its worker\tis\nlost"},
    {"name": "well", "version": "1", "state": "READY", "reason": "", "notes": ["a\tnote"]},
]
RELEASES = {"trouble": "the registry\tis silent", "refused": "golden input 1:\nwrong", "withheld": "sha256:ab"}
SPLITS = [
    {"model": "a/b", "canary": {"reason": "the files have another digest"}, "shadow": {"reason": ""}},
    {"model": "elsewhere", "canary": {"reason": "not asked for"}},
]


def port(method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
    pages: dict[str, Any] = {"/api/models": MODELS, "/api/splits": SPLITS, "/api/models/a%2Fb/releases": RELEASES}
    return (200, {}, json.dumps(pages[path]).encode()) if path in pages else (404, {}, b'{"error": "no such page"}')


def test_a_program_is_told_why(capsys: Said) -> None:
    with serving(port) as url:
        assert main(["models", "status", "--ops-url", url]) == 0
        first, second, third = (line.split("\t") for line in capsys.readouterr().out.split("\n")[:-1])
        assert main(["models", "status", "well", "--ops-url", url]) == 0
        assert capsys.readouterr().out.split("\t")[0] == "well"
    assert first[-1] == (
        "its source cannot be asked: the registry is silent; refused: golden input 1: wrong; withheld: sha256:ab; "
        "its canary takes no part: the files have another digest"
    )
    assert second[-1] == "not ready: its worker is lost", "what holds for the model is said once"
    assert third[-2:] == ["a note", "-"]
    assert len(first) == len(second) == len(third)


def test_a_server_without_those_pages_is_listed_all_the_same(capsys: Said) -> None:
    def old(method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        return (200, {}, json.dumps(MODELS[:1]).encode()) if path == "/api/models" else (404, {}, b"{}")

    with serving(old) as url:
        assert main(["models", "status", "--ops-url", url]) == 0
    assert capsys.readouterr().out.endswith("\t-\n")
