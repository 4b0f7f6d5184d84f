"""What remote servers said of their models, the last time each of them said anything.

Rules: an answer holds until the next one: a server that is down takes nothing away. A server that does not answer, and
one that answers but lacks a model, are two things, and each says why. Nothing is asked for longer than `START_S`, and
no server more than a few things at a time; one that leaves several in a row unanswered is not asked on.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Awaitable, Collection, Container, Iterable
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

import orjson

from gateway.backends.remote_endpoint import IndexEntry, RemoteError, RemoteModel
from gateway.backends.remote_server import RemoteServer
from gateway.config import Backend, ModelEntry
from gateway.remote_sites import START_S, Site
from gateway.remote_versions import MAX_VERSIONS, Offer, advice, usable_versions

log = logging.getLogger("gateway.backends")

T = TypeVar("T")

PARALLEL: Final = 8
"""Servers that are asked whether they are there at one time, and questions to one server about its models."""
MAX_RAW_BYTES: Final = 16_384
"""Of a model's metadata as its server wrote it: more is not kept to be shown."""
UNLOADED: Final = "unloaded"
"""Triton's reason, and ours, in the index for a model that somebody took out of service."""
PATIENCE: Final = 3
"""Questions in a row without an answer after which a server counts as silent."""


@dataclass(frozen=True, slots=True)
class Line:
    """One backend of one model."""

    backend: Backend
    site: Site
    model: str
    """The model's name there."""

    @property
    def pinned(self) -> str:
        return self.backend.version or ""


@dataclass(slots=True)
class Redundant:
    """One model and its backends."""

    name: str
    entry: ModelEntry
    mixed: bool
    """Whether its source is on disk; its versions are those found there then."""
    lines: list[Line] = field(default_factory=list)

    def sites(self) -> list[Site]:
        return list(dict.fromkeys(line.site for line in self.lines))

    def servers(self) -> list[tuple[Line, RemoteServer]]:
        return [(line, server) for line in self.lines for server in line.site.servers.values()]


Heard = tuple[RemoteServer, str, str]
"""A server, the name of a model there, and the version asked for."""


class Census:
    """All that was heard."""

    def __init__(self) -> None:
        self._index: dict[RemoteServer, tuple[str, ...]] = {}
        """Ready models, of servers that were asked for all they have."""
        self._heard: dict[Heard, RemoteModel] = {}
        self._causes: dict[RemoteServer, str] = {}
        """Why a server did not answer when it was asked last; empty: it did."""
        self._lacking: dict[Heard, str] = {}
        """Why a server that answers said nothing of a model."""
        self._advised: set[str] = set()
        self._gates: weakref.WeakKeyDictionary[RemoteServer, asyncio.Semaphore] = weakref.WeakKeyDictionary()
        self._unanswered: weakref.WeakKeyDictionary[RemoteServer, int] = weakref.WeakKeyDictionary()
        """Questions about models in a row that a server left without an answer."""

    def __repr__(self) -> str:
        return f"<Census servers={len(self._causes)} models={len(self._heard)}>"

    def names(self, site: Site) -> list[str]:
        """Ready models of all servers of a site, in the order in which they said them."""
        return list(dict.fromkeys(name for server in site.servers.values() for name in self._index.get(server, ())))

    def answers(self, server: RemoteServer) -> bool:
        """Whether it answered when it was asked last."""
        return self._causes.get(server) == ""

    def known(self, server: RemoteServer, model: str, version: str) -> RemoteModel | None:
        """What it said of a version; an empty `version`: of the model."""
        return self._heard.get((server, model, version))

    def forget(self, kept: Collection[RemoteServer]) -> None:
        """Drop what is known of servers that are not among `kept`."""
        self._index = {server: said for server, said in self._index.items() if server in kept}
        self._causes = {server: said for server, said in self._causes.items() if server in kept}
        self._heard = {key: said for key, said in self._heard.items() if key[0] in kept}
        self._lacking = {key: said for key, said in self._lacking.items() if key[0] in kept}

    async def refresh(self, sites: Iterable[Site], sources: Container[Site]) -> None:
        """Ask the servers of `sites` whether they are there, and those of `sources` for all that they have."""
        gate = asyncio.Semaphore(PARALLEL)

        async def one(site: Site, server: RemoteServer) -> None:
            async with gate:
                try:
                    async with asyncio.timeout(START_S):
                        if site in sources:
                            self._take_index(server, await _readable(server.index()))
                        else:
                            await server.connect()
                    self._causes[server] = ""
                    self._unanswered[server] = 0
                except TimeoutError:
                    self._causes[server] = f"no answer within {START_S:g} s"
                except RemoteError as error:
                    self._causes[server] = str(error)

        await asyncio.gather(*[one(site, server) for site in sites for server in site.servers.values()])

    def _take_index(self, server: RemoteServer, entries: Iterable[IndexEntry]) -> None:
        """Models that are ready; and those that were, and are in trouble there, which is not the same as unloaded."""
        before = self._index.get(server, ())
        names = (e.name for e in entries if e.ready or (e.name in before and e.reason not in ("", UNLOADED)))
        self._index[server] = tuple(dict.fromkeys(names))

    async def ask(self, model: Redundant, *, unheard: bool = False) -> None:
        """Hear of a model from those of its servers that answer; `unheard`: only where nothing is known yet."""
        await asyncio.gather(
            *[
                self.hear(line, server, line.pinned)
                for line, server in model.servers()
                if self._causes.get(server) == "" and not (unheard and (server, line.model, line.pinned) in self._heard)
            ]
        )

    async def hear(self, line: Line, server: RemoteServer, version: str) -> RemoteModel | None:
        """What a server says of a version, now; None, and noted why, where it says nothing. A server that is silent is
        not asked."""
        async with self._gates.setdefault(server, asyncio.Semaphore(PARALLEL)):
            if cause := self._causes.get(server, ""):
                self._lacking[server, line.model, version] = cause
                return None
            found = await self._asked(line, server, version)
        if found is None:
            return None
        self._heard[server, line.model, version] = found
        self._lacking.pop((server, line.model, version), None)
        if (text := advice(line.backend, found)) and text not in self._advised:
            self._advised.add(text)
            log.warning("%s", text)
        return found

    async def _asked(self, line: Line, server: RemoteServer, version: str) -> RemoteModel | None:
        try:
            async with asyncio.timeout(START_S):
                found = await _readable(server.model(line.model, version))
            usable = usable_versions(found.versions)
            if found.versions and not usable:
                raise RemoteError(f"none of the versions of '{line.model}' that it lists has a usable name")
            if len(usable) == MAX_VERSIONS < len(found.versions):
                log.warning("%s lists %d versions of '%s'; the newest %d are served", server.endpoint.url,
                            len(found.versions), line.model, MAX_VERSIONS)  # fmt: skip
        except (RemoteError, TimeoutError) as error:
            self._lacking[server, line.model, version] = str(error) or f"no answer within {START_S:g} s"
            self._note_silence(server, error)
            if isinstance(error, RemoteError) and error.missing:
                self._heard.pop((server, line.model, version), None)
            return None
        self._unanswered[server] = 0
        small = len(orjson.dumps(found.raw)) <= MAX_RAW_BYTES
        return replace(found, versions=usable, raw=found.raw if small else {})

    def _note_silence(self, server: RemoteServer, error: RemoteError | TimeoutError) -> None:
        """A server that went away, or answers nothing any more, is not waited for again and again."""
        late = isinstance(error, TimeoutError) or error.late
        self._unanswered[server] = self._unanswered.get(server, 0) + 1 if late else 0
        if self._unanswered[server] >= PATIENCE or (isinstance(error, RemoteError) and error.connect):
            self._causes[server] = str(error) or f"no answer within {START_S:g} s"

    def offer(self, line: Line, server: RemoteServer) -> Offer:
        heard = self._heard.get((server, line.model, line.pinned))
        return Offer(line.pinned, None if heard is None else heard.versions)

    def offers(self, model: Redundant) -> list[Offer]:
        return [self.offer(line, server) for line, server in model.servers()]

    def most_rows(self, model: Redundant) -> int:
        """What all of its servers that were heard of take at once; 0: none of them states a limit."""
        known = [self._heard.get((server, line.model, line.pinned)) for line, server in model.servers()]
        return min([said.max_batch_size for said in known if said is not None and said.max_batch_size], default=0)

    def unheard(self, model: Redundant) -> bool:
        """Whether one of its servers that answer did not say yet what it has."""
        return any(
            self._causes.get(server) == "" and (server, line.model, line.pinned) not in self._heard
            for line, server in model.servers()
        )

    def silent(self, site: Site) -> list[str]:
        """Why servers of a site were not heard of yet, one text for each; empty where all were."""
        if not site.servers:
            return [site.cause or "its name does not resolve"]
        return [cause for server in site.servers.values() if (cause := self._causes.get(server, "not asked yet"))]

    def silence(self, model: Redundant) -> str:
        causes = [f"{site.endpoint.url}: {cause}" for site in model.sites() for cause in self.silent(site)]
        for line, server in model.servers():
            if cause := self._lacking.get((server, line.model, line.pinned), ""):
                causes.append(f"{server.endpoint.url}: {cause}")
        return "; ".join(causes) or "none has it"


async def _readable(answer: Awaitable[T]) -> T:
    """Raises RemoteError, whatever a server may have said."""
    try:
        return await answer
    except (RemoteError, TimeoutError):
        raise
    except Exception as error:
        log.exception("what a server says of its models could not be read")
        raise RemoteError(f"what it says of its models could not be read: {type(error).__name__}") from error
