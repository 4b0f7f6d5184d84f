"""The remote servers that the configuration names, each with all addresses behind its name, shared by their models.

Rules: entries that say the same of a URL share its servers. A site whose name does not resolve, or whose servers do not
answer, is there all the same: it says why, and tells when that changes. A server that leaves the address list is closed
only after nobody uses it any more, which `RemoteModels` knows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from gateway.backends.remote_addresses import Addresses, backend_name
from gateway.backends.remote_endpoint import Endpoint, RemoteError, RemoteTls
from gateway.backends.remote_server import RemoteServer
from gateway.config import Backend, Config
from gateway.registry.reference import parse_server

log = logging.getLogger("gateway.backends")

START_S: Final = 5.0
"""How long a start waits for a server; the rest is the rediscovery's business."""

SiteKey = tuple[object, ...]


def endpoint_of(config: Config, backend: Backend) -> Endpoint:
    """Where `backend` is, credentials included; blocks on the disk.

    Raises:
        ConfigError: a header's variable or file cannot be read.
    """
    url = parse_server(backend.url)
    tls = backend.tls

    def path(text: str | None) -> Path | None:
        return None if text is None else config.base / text

    return Endpoint(
        scheme=url.scheme,
        host=url.host,
        port=url.port,
        name=backend.name or "",
        headers=config.headers(backend),
        tls=RemoteTls()
        if tls is None
        else RemoteTls(path(tls.ca), path(tls.cert), path(tls.key), tls.server_name or ""),
        connect_timeout_s=backend.connect_timeout_ms / 1e3,
        json=backend.json_tensors,
    )


def key_of(endpoint: Endpoint) -> SiteKey:
    """Equal for endpoints that may share their connections."""
    headers = tuple(sorted(endpoint.headers.items()))
    return (endpoint.url, endpoint.name, headers, endpoint.tls, endpoint.connect_timeout_s, endpoint.json)


class Site:
    """One endpoint and the servers behind its name."""

    def __init__(self, endpoint: Endpoint, changed: Callable[[], None]) -> None:
        """`changed` is called when servers came or went."""
        self.endpoint = endpoint
        self.servers: dict[str, RemoteServer] = {}
        """By address, in the order in which they were found."""
        self.cause = ""
        """Why there are none, in words."""
        self._changed = changed
        self._gone: list[RemoteServer] = []
        self._addresses = Addresses(endpoint, self._moved)

    async def start(self) -> None:
        """Returns when its addresses are known, or could not be found in time; never raises."""
        try:
            self._take(await self._addresses.start(START_S))
        except RemoteError as error:
            self.cause = str(error)

    def _take(self, addresses: Iterable[str]) -> None:
        found = [address for address in addresses if address not in self.servers]
        several = len(self.servers) + len(found) > 1
        for address in found:
            name = backend_name(self.endpoint, address, several)
            server = self.servers[address] = RemoteServer(self.endpoint, address, name)
            server.owned = False  # it also answers questions while no model has a replica there
            server.on_connect_failed = self._addresses.hint
        if self.servers:
            self.cause = ""

    def _moved(self, added: tuple[str, ...], removed: tuple[str, ...]) -> None:
        log.info("%s: addresses added: %s; removed: %s", self.endpoint.label, _listed(added), _listed(removed))
        self._gone += [self.servers.pop(address) for address in removed if address in self.servers]
        self._take(added)
        self._changed()

    async def close_gone(self) -> None:
        """Close the servers that left. One that a replica still uses closes with its last one."""
        gone, self._gone = self._gone, []
        for server in gone:
            server.owned = True
            if not server.used:
                await server.close()

    async def leave(self) -> None:
        """It is not wanted any more; otherwise as `close_gone`."""
        await self._addresses.close()
        self._gone += self.servers.values()
        self.servers = {}
        await self.close_gone()

    async def close(self) -> None:
        """Close everything, whoever uses it."""
        await self._addresses.close()
        gone, self._gone = [*self._gone, *self.servers.values()], []
        self.servers = {}
        await asyncio.gather(*[server.close() for server in gone])

    def __repr__(self) -> str:
        return f"<Site {self.endpoint.label} servers={len(self.servers)}>"


def _listed(addresses: Iterable[str]) -> str:
    return ", ".join(addresses) or "none"
