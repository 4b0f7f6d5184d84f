"""Which addresses a server's name has at the moment: each is a backend of its own.

Rules (fault matrix, F28): looked up off the loop, again every half minute and soon after a failed connection. Whatever
goes wrong (no answer, an empty one, an error), the last good set stays. An address is gone after two looks in a row
without it, since name servers may tell a part of them at a time. An IP address is itself, for ever.

A name with addresses of both kinds (`localhost` is often one) is the same machines twice, of which one kind is used:
IPv4, unless only IPv6 takes connections. That is tried at the first look, and again after a connection failed; the kind
in use stays while it, or nobody, takes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import random
import socket
from collections.abc import Awaitable, Callable
from typing import Final

from gateway.backends.remote_endpoint import Endpoint, RemoteError

_log = logging.getLogger("gateway.remote")

EVERY_S: Final = 30.0
SPREAD: Final = 0.2
"""Share by which the pause varies, so that many gateways do not ask at once."""
SOON_S: Final = 1.0
"""Pause after a failed look, a failed connection, or one without a known address."""
MAX_ADDRESSES: Final = 64
MAX_TRIED: Final = 4
"""Addresses of each kind that are connected to in order to choose the kind."""
ABSENCES: Final = 2

Resolve = Callable[[str, int], Awaitable[tuple[str, ...]]]
Accepts = Callable[[str, int, float], Awaitable[bool]]
"""Takes an address, a port, and seconds; says whether a connection is taken there in that time."""
Changed = Callable[[tuple[str, ...], tuple[str, ...]], None]
"""Takes the addresses added and removed."""


async def resolve(host: str, port: int) -> tuple[str, ...]:
    """All addresses of a name, of both kinds, sorted.

    Raises:
        OSError: it has none, or nobody says.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(sorted({str(address[0]) for _, _, _, _, address in found}))


async def accepts(address: str, port: int, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(address, port)
    except OSError:  # TimeoutError is one
        return False
    writer.transport.abort()  # nothing was said, and nobody waits for the end of it
    return True


def literal_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _kind(address: str) -> int:
    return 6 if ":" in address else 4


def backend_name(endpoint: Endpoint, address: str, several: bool) -> str:
    """What people call one of the servers behind an endpoint."""
    return f"{endpoint.label}/{address}" if several else endpoint.label


class Addresses:
    """Of one endpoint. `changed` is called for every change after `start` has returned the first set."""

    def __init__(
        self,
        endpoint: Endpoint,
        changed: Changed,
        lookup: Resolve = resolve,
        rng: random.Random | None = None,
        every_s: float = EVERY_S,
        soon_s: float = SOON_S,
        accepts: Accepts = accepts,
    ) -> None:
        self._endpoint = endpoint
        self._changed = changed
        self._lookup = lookup
        self._rng = rng or random.Random()  # noqa: S311  # spreads load, guards nothing
        self._every_s = every_s
        self._soon_s = soon_s
        self._absent: dict[str, int] = {}
        """By known address: looks in a row without it."""
        self._accepts = accepts
        self._kind = 4
        """Of the addresses in use, where there are two: 4 or 6."""
        self._hinted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._failing = False

    def __repr__(self) -> str:
        return f"<Addresses of {self._endpoint.host}: {', '.join(self.known) or 'none'}>"

    @property
    def known(self) -> tuple[str, ...]:
        return tuple(sorted(self._absent))

    async def start(self, timeout_s: float) -> tuple[str, ...]:
        """The first set.

        Raises:
            RemoteError: the name has no address, for now: `changed` is called when it has.
        """
        host = self._endpoint.host
        if literal_address(host):
            self._absent[host] = 0
            return (host,)
        cause = f"the name '{host}' was not resolved within {timeout_s:g} s"
        try:
            async with asyncio.timeout(timeout_s):
                for address in await self._look():
                    self._absent[address] = 0
        except TimeoutError:
            pass
        except OSError as error:
            cause = f"the name '{host}' cannot be resolved: {error.strerror or error}"
        self._task = asyncio.get_running_loop().create_task(self._watch())
        if not self._absent:
            raise RemoteError(cause, connect=True)
        return self.known

    def hint(self) -> None:
        """A connection failed: look again soon."""
        self._hinted.set()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _look(self) -> tuple[str, ...]:
        found = await self._lookup(self._endpoint.host, self._endpoint.port)
        if not found:
            raise OSError("it has no address")
        if len({_kind(address) for address in found}) > 1:
            if not self._absent or self._hinted.is_set():
                await self._choose_kind(found)
            found = tuple([address for address in found if _kind(address) == self._kind])
        return found[:MAX_ADDRESSES]

    async def _choose_kind(self, found: tuple[str, ...]) -> None:
        async def any_accepts(kind: int) -> bool:
            tried = [address for address in found if _kind(address) == kind][:MAX_TRIED]
            port, timeout_s = self._endpoint.port, self._endpoint.connect_timeout_s
            return any(await asyncio.gather(*[self._accepts(address, port, timeout_s) for address in tried]))

        other = 10 - self._kind
        ours, theirs = await asyncio.gather(any_accepts(self._kind), any_accepts(other))
        if theirs and not ours:
            _log.info("%s: its IPv%d addresses are used; no other takes connections", self._endpoint.label, other)
            self._kind = other
            for address in self._absent:
                if _kind(address) != other:
                    self._absent[address] = ABSENCES  # it was just tried in vain

    async def _watch(self) -> None:
        while True:
            await self._pause()
            try:
                found = await self._look()
            except OSError as error:
                if not self._failing:
                    _log.warning("the name %s cannot be resolved: %s", self._endpoint.host, error.strerror or error)
                self._failing = True
                continue
            self._failing = False
            self._take(found)

    async def _pause(self) -> None:
        certain = self._absent and not self._failing and not any(self._absent.values())
        if not certain:
            await asyncio.sleep(self._soon_s)
            return
        spread = 1.0 + self._rng.uniform(-SPREAD, SPREAD)
        self._hinted.clear()
        try:
            async with asyncio.timeout(self._every_s * spread):
                await self._hinted.wait()
            await asyncio.sleep(self._soon_s)
        except TimeoutError:
            pass

    def _take(self, found: tuple[str, ...]) -> None:
        added = tuple([address for address in found if address not in self._absent])
        for address in self._absent:
            self._absent[address] = 0 if address in found else self._absent[address] + 1
        removed = tuple([address for address, absences in self._absent.items() if absences >= ABSENCES])
        for address in removed:
            del self._absent[address]
        for address in added:
            self._absent[address] = 0
        if added or removed:
            self._changed(added, removed)
