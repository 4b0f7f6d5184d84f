"""One remote server at one address: whether it can be reached, what it says of itself, and who waits for it.

A server is unreachable after two failed connections in a row; its replicas are unavailable at once then. While
anything of it that is wanted is out of service, a loop asks again, with growing pauses of random length, for ever: the
server first, then each replica that is not verified. A connection that the server broke, or an answer that does not
fit, starts one check: a server that came back as somebody else is found out before it is trusted again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from gateway.backends.remote_connections import Channel
from gateway.backends.remote_endpoint import Endpoint, IndexEntry, RemoteError, RemoteModel, ServerInfo
from gateway.backends.remote_http1 import Http1Connection
from gateway.backends.remote_http2 import Http2Connection
from gateway.backends.remote_queries import GrpcQueries, HttpQueries, Queries
from gateway.backends.remote_wire import GrpcWire, HttpWire, grpc_block

_log = logging.getLogger("gateway.remote")

QUERY_S: Final = 2.0
"""Patience with a question that is no inference."""
FAILURES: Final = 2
"""Failed connections in a row after which a server counts as unreachable."""
FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 1.0
SETTLE_S: Final = 0.02
"""Pause before a check, so that a burst of lost connections leads to one."""
CHECK_EVERY_S: Final = 0.5
"""Least time between two checks."""
CONFIGURATION: Final = "model_configuration"


class Dependent(Protocol):
    """A replica, as its server sees it."""

    @property
    def verified(self) -> bool: ...
    async def verify(self, timeout_s: float = QUERY_S, /) -> str: ...
    def server_changed(self) -> None:
        """`reachable` flipped, or `cause` changed."""


@dataclass(frozen=True, slots=True)
class RemoteServerStatistics:
    name: str
    url: str
    address: str
    reachable: bool
    cause: str
    connections: int
    connect_failures: int
    """In all."""
    times_lost: int
    """How often it became unreachable."""
    replicas: int


class RemoteServer:
    """Constructing one does no I/O, but needs the running loop."""

    def __init__(self, endpoint: Endpoint, address: str = "", name: str = "") -> None:
        """`address`: the IP address to connect to; empty: the endpoint's host.

        Raises:
            ValueError: a header of the endpoint cannot be sent.
        """
        grpc_block(endpoint, "")  # refuses headers that cannot be sent
        self.endpoint = endpoint
        self.address = address
        self.name = name or endpoint.label
        self.reachable = False
        self.cause = "not reached yet"
        """Why it is not reachable; empty while it is."""
        self.info: ServerInfo | None = None
        self.owned = True
        """Whether it closes with its last replica."""
        self._grpc = endpoint.scheme in ("grpc", "grpcs")
        self.channel = Channel(endpoint, address, self.name, self, Http2Connection if self._grpc else Http1Connection)
        self._queries: Queries = (GrpcQueries if self._grpc else HttpQueries)(self.channel, endpoint)
        self.wire = GrpcWire if self._grpc else HttpWire
        self.on_connect_failed: Callable[[], None] = _nothing
        """Called with every failed connection: its name may mean another address by now."""
        self._dependents: list[Dependent] = []
        self._failures = 0
        self._all_failures = 0
        self._times_lost = 0
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._mending: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._checked = float("-inf")

    def __repr__(self) -> str:
        return f"<RemoteServer {self.name} {'reachable' if self.reachable else self.cause}>"

    @property
    def url(self) -> str:
        return self.endpoint.url

    def statistics(self) -> RemoteServerStatistics:
        return RemoteServerStatistics(
            self.name,
            self.url,
            self.address,
            self.reachable,
            self.cause,
            self.channel.connections,
            self._all_failures,
            self._times_lost,
            len(self._dependents),
        )

    # -- questions ---------------------------------------------------------------------------------------------

    async def connect(self, timeout_s: float = QUERY_S) -> ServerInfo:
        """Reach it and hear what it is. Raises RemoteError."""
        try:
            self.info = await self._queries.info(timeout_s)
        except RemoteError:
            raise
        except Exception as error:  # it must not end the loop that would take the server back
            _log.exception("an answer of %s could not be read", self.name)
            raise RemoteError(f"what {self.name} says of itself could not be read: {type(error).__name__}") from error
        self._reached()
        return self.info

    async def ready(self, timeout_s: float = QUERY_S) -> bool:
        """Whether it can be reached."""
        try:
            await self.connect(timeout_s)
        except RemoteError:
            return False
        return True

    async def index(self, timeout_s: float = QUERY_S) -> tuple[IndexEntry, ...]:
        """Its models, ready or not. Raises RemoteError."""
        return await self._queries.index(timeout_s)

    async def model(
        self, name: str, version: str = "", timeout_s: float = QUERY_S, *, config: bool = True
    ) -> RemoteModel:
        """What one model looks like. `config`: also what Triton's extension says, where the server has that.

        Raises:
            RemoteError: no answer, no such model, or one that cannot be served.
        """
        info = self.info or await self.connect(timeout_s)
        config = config and CONFIGURATION in info.extensions
        return await self._queries.model(name, version, timeout_s, config=config)

    async def model_ready(self, name: str, version: str = "", timeout_s: float = QUERY_S) -> bool:
        """Raises RemoteError: no usable answer."""
        return await self._queries.model_ready(name, version, timeout_s)

    # -- reachability ------------------------------------------------------------------------------------------

    @property
    def used(self) -> bool:
        """Whether a replica is there."""
        return bool(self._dependents)

    def connected(self) -> None:
        self._failures = 0

    def connect_failed(self, text: str) -> None:
        self._failures += 1
        self._all_failures += 1
        self.on_connect_failed()
        if self._failures >= FAILURES or not self.reachable:
            self._lost(text)
        else:
            self.check_soon()

    def disturbed(self) -> None:
        self.check_soon()

    def _lost(self, cause: str) -> None:
        was, self.reachable = self.reachable, False
        changed = was or cause != self.cause
        self.cause = cause
        if was:
            self._times_lost += 1
            _log.warning("backend %s is unreachable: %s", self.name, cause)
            self.channel.drop_idle()
        if changed:
            self._tell()
        self.mend()

    def _reached(self) -> None:
        if not self.reachable:
            self.reachable = True
            self.cause = ""
            self._failures = 0
            _log.info("backend %s is reachable", self.name)
            self._tell()

    def _tell(self) -> None:
        for dependent in [*self._dependents]:
            dependent.server_changed()

    def check_soon(self) -> None:
        """Something odd was seen: look whether the server is still there, and still the same."""
        if self._closed or self._checking is not None or not self._dependents or not self.reachable:
            return
        self._checking = self._loop.create_task(self._check())

    async def _check(self) -> None:
        try:
            pause = max(SETTLE_S, self._checked + CHECK_EVERY_S - self._loop.time())
            await asyncio.sleep(pause if self._failures == 0 else SETTLE_S)
            self._checked = self._loop.time()
            for _ in range(FAILURES):
                if await self.ready():
                    break
            if self.reachable:
                for dependent in [d for d in self._dependents if d.verified]:
                    await dependent.verify()
        finally:
            self._checking = None
        self.mend()

    def mend(self) -> None:
        """Begin to ask for the server and its unverified replicas again, if anything is missing."""
        if self._closed or self._mending is not None or self._whole():
            return
        self._mending = self._loop.create_task(self._mend())

    def _whole(self) -> bool:
        return not self._dependents or (self.reachable and all(d.verified for d in self._dependents))

    async def _mend(self) -> None:
        pauses = wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S)
        try:
            async for attempt in AsyncRetrying(retry=retry_if_exception_type(RemoteError), wait=pauses):
                with attempt:
                    await self._mend_once()
        finally:
            self._mending = None
        self.mend()  # what went wrong meanwhile

    async def _mend_once(self) -> None:
        """Raises RemoteError: something is still missing."""
        try:
            await self.connect()
        except RemoteError as error:
            if not self.reachable and self.cause != str(error):
                self.cause = str(error)
                self._tell()
            raise
        missing = ""
        for dependent in [d for d in self._dependents if not d.verified]:
            missing = await dependent.verify() or missing
        if missing:
            raise RemoteError(missing)

    # -- replicas ----------------------------------------------------------------------------------------------

    def join(self, dependent: Dependent) -> None:
        self._dependents.append(dependent)
        self.mend()

    async def leave(self, dependent: Dependent) -> None:
        if dependent in self._dependents:
            self._dependents.remove(dependent)
        if not self._dependents and self.owned:
            await self.close()

    async def close(self) -> None:
        """Stop asking and close every connection. Harmless when repeated."""
        self._closed = True
        tasks = [task for task in (self._mending, self._checking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.channel.close()


def _nothing() -> None:
    pass
