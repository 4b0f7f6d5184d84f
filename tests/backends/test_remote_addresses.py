"""Addresses of a name: the last good set stays whatever the name server does."""

from __future__ import annotations

import asyncio
import random
import socket

import pytest

from gateway.backends.remote import Endpoint, RemoteError
from gateway.backends.remote_addresses import Addresses, accepts, backend_name, literal_address, resolve
from tests.backends.remote_rig import until

ENDPOINT = Endpoint("http", "models.example", 8000)
Set = tuple[str, ...]


class Names:
    """A name server that gives what it is told to; `looks` counts."""

    def __init__(self, answer: Set | OSError) -> None:
        self.answer = answer
        self.looks = 0
        self.stuck: asyncio.Future[None] | None = None
        self.changes: list[tuple[Set, Set]] = []

    async def lookup(self, host: str, port: int) -> Set:
        assert (host, port) == ("models.example", 8000)
        self.looks += 1
        if self.stuck is not None:
            await self.stuck
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer

    def addresses(self, every_s: float = 0.01) -> Addresses:
        return Addresses(
            ENDPOINT, lambda *change: self.changes.append(change), self.lookup, random.Random(1), every_s, 0.005
        )

    async def look_twice(self) -> None:
        after = self.looks + 2
        await until(lambda: self.looks >= after, "looked twice more")


async def test_a_changed_set_is_told_and_a_lost_address_only_after_two_looks() -> None:
    names = Names(("10.0.0.1", "10.0.0.2"))
    addresses = names.addresses()
    assert await addresses.start(5) == ("10.0.0.1", "10.0.0.2")
    names.answer = ("10.0.0.2", "10.0.0.3")
    await until(lambda: len(names.changes) == 2, "both changes")
    assert names.changes == [(("10.0.0.3",), ()), ((), ("10.0.0.1",))]
    assert addresses.known == ("10.0.0.2", "10.0.0.3")
    await addresses.close()


@pytest.mark.parametrize("answer", [(), OSError(-2, "Name or service not known"), OSError(-3, "Temporary failure")])
async def test_no_answer_changes_nothing(answer: Set | OSError) -> None:
    names = Names(("10.0.0.1",))
    addresses = names.addresses()
    await addresses.start(5)
    names.answer = answer
    await names.look_twice()
    await names.look_twice()
    assert addresses.known == ("10.0.0.1",)
    assert not names.changes
    await addresses.close()


async def test_a_slow_answer_holds_nobody_up() -> None:
    names = Names(("10.0.0.1",))
    addresses = names.addresses()
    await addresses.start(5)
    names.stuck = asyncio.get_running_loop().create_future()
    await until(lambda: names.looks >= 2, "the slow look")
    assert addresses.known == ("10.0.0.1",)
    names.answer = ("10.0.0.9",)
    names.stuck.set_result(None)
    await until(lambda: addresses.known == ("10.0.0.9",), "the new set")
    await addresses.close()


async def test_a_name_without_an_address_is_told_when_it_has_one() -> None:
    names = Names(OSError(-2, "Name or service not known"))
    addresses = names.addresses()
    with pytest.raises(RemoteError, match=r"'models\.example' cannot be resolved: Name or service not known"):
        await addresses.start(5)
    names.answer = ("10.0.0.1",)
    await until(lambda: names.changes == [(("10.0.0.1",), ())], "found")
    await addresses.close()


async def test_a_name_server_that_does_not_answer_does_not_hold_up_the_start() -> None:
    names = Names(("10.0.0.1",))
    names.stuck = asyncio.get_running_loop().create_future()
    addresses = names.addresses()
    with pytest.raises(RemoteError, match=r"within 0\.01 s"):
        await addresses.start(0.01)
    names.stuck = None
    await until(lambda: bool(names.changes), "found")
    await addresses.close()


async def test_after_a_failed_connection_it_looks_soon() -> None:
    names = Names(("10.0.0.1",))
    addresses = names.addresses(every_s=1e6)
    await addresses.start(5)
    await asyncio.sleep(0)
    addresses.hint()
    await until(lambda: names.looks == 2, "looked")
    await addresses.close()


async def test_an_address_is_itself() -> None:
    addresses = Addresses(Endpoint("http", "::1", 1), lambda *_: None)
    assert await addresses.start(0) == ("::1",)
    await addresses.close()


async def test_names_are_resolved_to_addresses_of_both_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    v4 = [(socket.AF_INET, 1, 6, "", (address, 80)) for address in ("10.0.0.2", "10.0.0.1", "10.0.0.2")]
    v6 = [(socket.AF_INET6, 1, 6, "", ("fe80::1", 80, 0, 0))]
    for found, wanted in ((v6 + v4, ("10.0.0.1", "10.0.0.2", "fe80::1")), (v6, ("fe80::1",))):

        async def answer(*_: object, found: object = found, **__: object) -> object:
            return found

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", answer, raising=False)
        assert await resolve("models.example", 80) == wanted


class Machines:
    """Where connections are taken; `tried` counts."""

    def __init__(self, *listening: str) -> None:
        self.listening = set(listening)
        self.tried: list[str] = []

    async def accepts(self, address: str, port: int, timeout_s: float) -> bool:
        assert (port, timeout_s) == (8000, ENDPOINT.connect_timeout_s)
        self.tried.append(address)
        return address in self.listening

    def addresses(self, names: Names, every_s: float = 1e6) -> Addresses:
        return Addresses(
            ENDPOINT, lambda *change: names.changes.append(change), names.lookup, random.Random(1), every_s, 0.005,
            self.accepts,
        )  # fmt: skip


BOTH = ("10.0.0.1", "10.0.0.2", "fe80::1", "fe80::2")
FOUR, SIX = BOTH[:2], BOTH[2:]


@pytest.mark.parametrize(
    ("listening", "wanted"), [((), FOUR), (BOTH, FOUR), (("10.0.0.2",), FOUR), (("fe80::2",), SIX)]
)
async def test_of_two_kinds_of_addresses_that_is_used_which_takes_connections(listening: Set, wanted: Set) -> None:
    addresses = Machines(*listening).addresses(Names(BOTH))
    assert await addresses.start(5) == wanted
    await addresses.close()


async def test_the_kind_changes_when_a_connection_failed_and_only_the_other_takes_any() -> None:
    names, machines = Names(BOTH), Machines()
    addresses = machines.addresses(names)
    assert await addresses.start(5) == FOUR

    async def look() -> None:
        looks = names.looks
        addresses.hint()
        await until(lambda: names.looks > looks, "looked")

    await asyncio.sleep(0)
    machines.listening = {"fe80::1"}
    await look()
    await until(lambda: addresses.known == SIX, "the other kind")
    assert names.changes == [(SIX, FOUR)], "at once: they were tried in vain"
    machines.listening = set(BOTH)
    await look()
    assert addresses.known == SIX, "who works is not left"
    machines.listening = set()
    await look()
    assert addresses.known == SIX, "and neither is who is as bad as the other"
    await addresses.close()


async def test_nobody_is_connected_to_while_there_is_nothing_to_choose_or_to_doubt() -> None:
    names, machines = Names(FOUR), Machines()
    addresses = machines.addresses(names, every_s=0.01)
    await addresses.start(5)
    await names.look_twice()
    names.answer = BOTH
    await names.look_twice()
    assert not machines.tried
    assert addresses.known == FOUR
    await addresses.close()


async def test_whether_a_connection_is_taken_is_found_out_by_connecting() -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert await accepts("127.0.0.1", port, 5)
    server.close()
    await server.wait_closed()
    assert not await accepts("127.0.0.1", port, 5)
    assert not await accepts("127.0.0.1", port, 0.0)


def test_names_of_backends() -> None:
    assert backend_name(ENDPOINT, "10.0.0.1", several=False) == "models.example:8000"
    assert backend_name(ENDPOINT, "10.0.0.1", several=True) == "models.example:8000/10.0.0.1"
    assert backend_name(Endpoint("grpc", "::1", 8001, name="mine"), "::1", several=False) == "mine"
    assert Endpoint("grpc", "::1", 8001).url == "grpc://[::1]:8001"
    assert [literal_address(host) for host in ("127.0.0.1", "::1", "localhost", "1.2.3")] == [True, True, False, False]
