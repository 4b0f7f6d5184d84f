"""Sockets that are handed over: by whom, which, and what is said of those that cannot be used."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Iterator

import pytest

from gateway import app_takeover
from gateway.app_takeover import GRPC, HTTP, METRICS, Successor, inherited, not_handed_over, tell_ready
from gateway.errors import BindError
from gateway.releases_model import ModelReleasesStatus, ReleaseStatus
from gateway.variants_status import CanaryStatus, TrafficStatus


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A listening socket in the place where the first one is looked for; closed by whoever takes it."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        monkeypatch.setattr(app_takeover, "_FIRST_FD", os.dup(sock.fileno()))
        yield sock


def given(count: int, names: str = "", pid: int | None = None) -> dict[str, str]:
    environment = {"LISTEN_FDS": str(count), "LISTEN_PID": str(os.getpid() if pid is None else pid), "HOME": "/"}
    return {**environment, "LISTEN_FDNAMES": names} if names else environment


@pytest.mark.parametrize(("names", "name"), [("", HTTP), ("grpc", GRPC), ("metrics:unused", METRICS)])
def test_a_socket_is_known_by_its_name_or_place(listening: socket.socket, names: str, name: str) -> None:
    environment = given(1, names)
    found = inherited(environment)
    assert list(found) == [name]
    (sock,) = found[name]
    with sock:
        assert sock.getsockname() == listening.getsockname()
        assert not sock.get_inheritable(), "workers must not have it"
        assert not sock.getblocking()
    assert environment == {"HOME": "/"}, "it is for nobody else"


@pytest.mark.parametrize("environment", [{}, given(1, pid=1), {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"}])
def test_what_is_meant_for_others_is_left_alone(environment: dict[str, str]) -> None:
    assert inherited(environment) == {}
    assert "LISTEN_FDS" not in environment


def test_an_unknown_name_is_refused(listening: socket.socket) -> None:
    with pytest.raises(BindError, match="a socket is called 'htpp'; name sockets http, grpc, metrics"):
        inherited(given(1, "htpp"))
    os.close(app_takeover._FIRST_FD)


def test_too_few_names_are_refused() -> None:
    with pytest.raises(BindError, match="2 sockets are given, but only 1 names"):
        inherited(given(2, "http"))


def test_what_does_not_listen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as idle:
        fd = os.dup(idle.fileno())
        monkeypatch.setattr(app_takeover, "_FIRST_FD", fd)
        with pytest.raises(BindError, match="does not listen for TCP connections"):
            inherited(given(1))
    read, write = os.pipe()
    monkeypatch.setattr(app_takeover, "_FIRST_FD", read)
    with pytest.raises(BindError, match="is none"):
        inherited(given(1))
    os.close(write)
    os.close(read)


CHILD = """
import os, socket, sys
from gateway.app_takeover import inherited, tell_ready
found = inherited(os.environ)
assert {name: len(sockets) for name, sockets in found.items()} == {"http": 2, "metrics": 1}, found
assert sys.argv[1:] == ["an argument"]
tell_ready(os.environ)
assert "GATEWAY_READY_FD" not in os.environ
"""


async def test_a_successor_finds_the_sockets_and_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        fds = {HTTP: [one.fileno(), other.fileno()], METRICS: [one.fileno()]}
        successor = Successor(fds, [sys.executable, "-c", CHILD, "an argument"])
        assert await successor.serves() == ""
        assert await asyncio.to_thread(successor._process.wait) == 0


async def test_a_successor_that_ends_or_never_serves_is_noticed() -> None:
    ended = Successor({}, [sys.executable, "-c", "raise SystemExit(7)"])
    assert await ended.serves() == "it ended with exit code 7; see what it wrote"
    silent = Successor({}, [sys.executable, "-c", "import time; time.sleep(600)"])
    assert "it did not serve within 0.2 s" in await silent.serves(0.2)
    assert silent._process.returncode == -9


def test_telling_nobody_is_harmless() -> None:
    tell_ready({})
    tell_ready({"GATEWAY_READY_FD": "no number"})


def _releases(withheld: str, *, remembers: bool = False) -> ModelReleasesStatus:
    live = ReleaseStatus("live", "3", "sha256:ab", "three", "models:/digits/3", 0.0)
    return ModelReleasesStatus(
        "digits", True, 30.0, "models:/digits@champion", 0.0, "", "", withheld, remembers, [live], []
    )


def _traffic(percent: float) -> TrafficStatus:
    canary = CanaryStatus("models:/digits@next", "4", "", "ready", "", percent, 5.0, 0, {}, None, 0)
    return TrafficStatus("digits", "3", 0, canary, None)


def test_what_a_successor_will_not_repeat_is_told() -> None:
    assert not_handed_over([_releases("")], [_traffic(5.0)]) == []
    assert not_handed_over([_releases("four", remembers=True)], []) == [], "models.lock tells the successor"
    rolled_back, share = not_handed_over([_releases("four")], [_traffic(25.0)])
    assert "version 3 serves by an operator's choice" in rolled_back
    assert "models:/digits@champion" in rolled_back
    assert "25 %" in share
    assert "5 % of the configuration" in share
