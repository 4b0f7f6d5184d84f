"""Replicas on remote servers that speak the Open Inference Protocol: Triton, MLServer, KServe, this gateway.

A batch travels as one request, is sent at most once, and ends in one outcome (`remote_outcome`, resilience notes §1.1):
unsendable → SUSPECT; no answer by the attempt's timer → TIMEOUT, and its connection is closed; given up by us →
CANCELLED; whatever the server or its connection did → as `remote_wire` reads it. The server is told how long it has:
the shorter of attempt and deadline, less a little for the way back.

A replica is available while its server is reachable and the server's model was last seen to fit the signature; what it
lacks is said in `cause`. It becomes available again after the same proof, and one trial run where there is a sample.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from gateway.backends.interface import Batch, Failure, FailureKind, Sign, Success, Traits
from gateway.backends.one_shot import run_once
from gateway.backends.remote_codec import NotEncodable
from gateway.backends.remote_connections import Exchange
from gateway.backends.remote_endpoint import (
    Endpoint,
    IndexEntry,
    RemoteError,
    RemoteModel,
    RemoteTls,
    ServerInfo,
    Unreadable,
)
from gateway.backends.remote_outcome import not_sent
from gateway.backends.remote_queries import signature_fault
from gateway.backends.remote_server import QUERY_S, RemoteServer, RemoteServerStatistics
from gateway.backends.remote_wire import Wire
from gateway.backends.wrapped import WrappedReplica
from gateway.core.batchability import SignatureTensor
from gateway.core.request import InputTensor

__all__ = [
    "Endpoint",
    "IndexEntry",
    "RemoteError",
    "RemoteModel",
    "RemoteReplica",
    "RemoteServer",
    "RemoteServerStatistics",
    "RemoteTls",
    "ServerInfo",
]

_log = logging.getLogger("gateway.remote")

RESERVE_S: Final = 0.005
"""Of the time there is, kept for the way back."""
LATE_S: Final = 0.02
"""A timer that fires so much too late says that this process was held up, not the server: answers that have arrived
are read first."""
NEAR_S: Final = 0.1
"""A server that says sooner before the deadline that it has passed has not kept to it."""
WARM_UP_S: Final = 10.0
DRAIN_S: Final = 30.0
"""Longest that closing waits for batches in flight."""


class _Attempt:
    """One batch on its way; settles once."""

    __slots__ = ("_due", "_exchange", "_late", "_over", "_replica", "_timer", "batch")

    def __init__(self, replica: RemoteReplica, batch: Batch) -> None:
        self._replica = replica
        self.batch = batch
        self._exchange: Exchange | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._late = False
        self._over = False

    def start(self, wire: Wire, timeout_s: float) -> None:
        now = time.monotonic()
        self._due = now + timeout_s
        budget_s = min(self._due, self.batch.deadline) - now
        if budget_s < math.inf:
            budget_s = max(budget_s - RESERVE_S, 0.001)
        self._exchange = wire.begin(self.batch, budget_s, self._answered)
        if timeout_s < math.inf:
            self._arm(timeout_s)

    def _arm(self, delay_s: float) -> None:
        self._timer = self._replica.loop.call_later(delay_s, self._expired)

    def _expired(self) -> None:
        late_s = time.monotonic() - self._due
        if late_s > LATE_S and not self._late:
            self._late = True
            self._arm(LATE_S)
            return
        self._abandon()
        what = f"{self._replica.name} gave no answer in time"
        self.settle(Failure(FailureKind.TIMEOUT, what))

    def _nobody_waits(self) -> None:
        self.settle(Failure(FailureKind.CANCELLED, "its deadline passed"))

    def cancel(self) -> None:
        self._abandon()
        self._replica.loop.call_soon(self.settle, Failure(FailureKind.CANCELLED, "nobody waited for it any more"))

    def _abandon(self) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.abandon()

    def _answered(self, result: Any) -> None:
        self._exchange = None
        wire, deadline = self._replica.wire, self.batch.deadline
        near = deadline < self._due and deadline - time.monotonic() < NEAR_S
        if near and wire is not None and wire.out_of_time(result) and self._timer is not None:
            # The server kept to the deadline that it was told: nobody's fault. Whoever owns the batch is about to see
            # the same.
            self._timer.cancel()
            delay_s = max(deadline - time.monotonic(), 0.0)
            self._timer = self._replica.loop.call_later(delay_s, self._nobody_waits)
            return
        try:
            outcome = self._replica.read(result, self.batch)
        except Exception as error:
            _log.exception("an answer of %s could not be read", self._replica.name)
            outcome = Failure(FailureKind.BROKEN, f"the answer could not be read: {type(error).__name__}")
        self.settle(outcome)

    def settle(self, outcome: Success | Failure) -> None:
        if self._over:
            return
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        self._replica.settled(self, outcome)


class RemoteReplica:
    """Fits `backends.interface.Replica`. One model version on one server; several may share the server."""

    __slots__ = (
        "_attempts",
        "_cause",
        "_changed",
        "_closed",
        "_drained",
        "_sample",
        "_shown",
        "_verifying",
        "inputs",
        "loop",
        "max_rows",
        "model",
        "name",
        "outputs",
        "server",
        "traits",
        "verified",
        "version",
        "wire",
    )

    def __init__(
        self,
        server: RemoteServer,
        model: str,
        version: str,
        inputs: Sequence[SignatureTensor],
        outputs: Sequence[SignatureTensor],
        traits: Traits,
        name: str = "",
    ) -> None:
        """`model`, `version`: as the server calls them; an empty version: whichever it chooses. `inputs`, `outputs`:
        the signature in the order that batches use, shapes in full. It is not available before it was verified, which
        the server begins by itself."""
        self.server = server
        self.model = model
        self.version = version
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.traits = traits
        self.name = name or server.name
        self.verified = False
        """Whether the server was last seen to have the model, with this signature."""
        self.max_rows = 0
        """Of the largest batch that it may get: a server that takes less does not fit; 0: not known yet."""
        self.wire: Wire | None = None
        self.loop = asyncio.get_running_loop()
        self._cause = "not verified yet"
        self._attempts: dict[int, _Attempt] = {}
        self._changed: Callable[[], None] = _nothing
        self._shown = False
        self._sample: list[InputTensor | None] | None = None
        self._closed = False
        self._drained: asyncio.Future[None] | None = None
        self._verifying: asyncio.Lock = asyncio.Lock()
        server.join(self)

    def __repr__(self) -> str:
        return f"<RemoteReplica {self.name} of {self.model} in_flight={self.in_flight} {self.cause or 'available'}>"

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def cause(self) -> str:
        """Why it is not available; empty while it is."""
        if self._closed:
            return "closed"
        return self.server.cause if not self.server.reachable else "" if self.verified else self._cause

    @property
    def available(self) -> bool:
        return self.verified and self.server.reachable and not self._closed

    @property
    def free_slots(self) -> int:
        return max(0, self.traits.max_slots - len(self._attempts)) if self.available else 0

    @property
    def in_flight(self) -> int:
        return len(self._attempts)

    def set_listener(self, changed: Callable[[], None], /) -> None:
        self._changed = changed
        self._shown = self.available

    def set_warm_up(self, inputs: Sequence[InputTensor | None] | None, /) -> None:
        """What is run once (one tensor per input, None: left out) before it is available again; None: nothing."""
        self._sample = None if inputs is None else list(inputs)

    # -- batches -----------------------------------------------------------------------------------------------

    def execute(self, batch: Batch, timeout_s: float, /) -> None:
        """`timeout_s`: for this attempt, connecting and both ways included."""
        wire = self.wire if self.available else None
        self.begin(batch, timeout_s, wire)

    def begin(self, batch: Batch, timeout_s: float, wire: Wire | None) -> None:
        """Without a look at whether it is available."""
        attempt = self._attempts[id(batch)] = _Attempt(self, batch)
        if wire is None:
            self.loop.call_soon(attempt.settle, not_sent(f"{self.name} is not available: {self.cause}"))
            return
        try:
            attempt.start(wire, timeout_s)
        except NotEncodable as error:
            self.loop.call_soon(attempt.settle, Failure(FailureKind.SUSPECT, str(error)))
        except Exception as error:
            # This is the batch itself, which could not say what is in it.
            _log.exception("a batch for %s could not be read", self.name)
            text = f"the batch could not be read: {type(error).__name__}"
            self.loop.call_soon(attempt.settle, Failure(FailureKind.SUSPECT, text))

    def cancel(self, batch: Batch, /) -> None:
        """The connection of the batch is closed, by which the server may know."""
        attempt = self._attempts.get(id(batch))
        if attempt is not None and attempt.batch is batch:
            attempt.cancel()

    def read(self, result: Any, batch: Batch) -> Success | Failure:
        """What the exchange of a batch came to."""
        if isinstance(result, Failure):
            return result
        wire = self.wire
        return not_sent(f"{self.name} has left") if wire is None else wire.outcome(result, batch)

    def settled(self, attempt: _Attempt, outcome: Success | Failure) -> None:
        """An attempt ended; its slot is free."""
        self._attempts.pop(id(attempt.batch), None)
        if isinstance(outcome, Failure):
            if outcome.sign is Sign.MISSING:
                self._unverified(outcome.in_full)
            elif outcome.sign is Sign.MISMATCH or outcome.kind is FailureKind.SUSPECT:
                self.server.check_soon()
        if self._drained is not None and not self._attempts and not self._drained.done():
            self._drained.set_result(None)
        attempt.batch.done(outcome)

    # -- availability ------------------------------------------------------------------------------------------

    async def verify(self, timeout_s: float = QUERY_S) -> str:
        """Ask whether the server has the model and it fits; returns why not, empty: it is available now."""
        async with self._verifying:
            try:
                cause = await self._fault(timeout_s)
            except Exception as error:
                # Whatever a server says must not end the loop that would take it back.
                _log.exception("an answer of %s could not be read", self.name)
                cause = f"{self.name}: what it says of the model could not be read: {type(error).__name__}"
            if cause:
                self._unverified(cause)
            elif not self._closed:
                self.verified = True
                self._show()
            return cause

    async def _fault(self, timeout_s: float) -> str:
        server = self.server
        try:
            found = await server.model(self.model, self.version, timeout_s)
            cause = signature_fault(self.inputs, self.outputs, found, self.max_rows)
            if cause:
                return f"{self.name}: {cause}"
            if not await server.model_ready(self.model, self.version, timeout_s):
                return f"{self.name}: model '{self.model}' is not ready"
        except RemoteError as error:
            # No answer is no news of the model; whether the server is there is the server's business.
            return "" if self.verified and not error.missing and not isinstance(error, Unreadable) else str(error)
        if not self.verified or self.wire is None:
            info = server.info or ServerInfo("", "")
            names = (self.model, self.version)
            self.wire = server.wire(server.channel, server.endpoint, info, names, self.inputs, self.outputs)
            return await self._trial(self.wire)
        return ""

    async def _trial(self, wire: Wire) -> str:
        if self._sample is None:
            return ""
        outcome = await run_once(_OnTrial(self, wire), self._sample, tuple(range(len(self.outputs))), WARM_UP_S)
        return "" if isinstance(outcome, Success) else f"{self.name}: its trial run failed: {outcome.in_full}"

    async def ping(self, timeout_s: float) -> bool:
        """Whether the server says that the model is ready."""
        try:
            return await self.server.model_ready(self.model, self.version, timeout_s)
        except RemoteError:
            return False

    def server_changed(self) -> None:
        if not self.server.reachable:
            self.verified = False  # whoever answers there next may be somebody else
            self._cause = "not verified since it came back"
        self._show()

    def _unverified(self, cause: str) -> None:
        if self.verified or cause != self._cause:
            _log.warning("backend %s: %s", self.name, cause)
        self.verified = False
        self._cause = cause
        self._show()
        self.server.mend()

    def _show(self) -> None:
        if self.available != self._shown:
            self._shown = self.available
            self._changed()

    async def close(self, drain_s: float = DRAIN_S) -> None:
        """Take no more, wait for what is in flight, end what is left then. Harmless when repeated."""
        self._closed = True
        self._show()
        if self._attempts:
            self._drained = self.loop.create_future()
            await asyncio.wait([self._drained], timeout=drain_s)
        for attempt in [*self._attempts.values()]:
            attempt.cancel()
        await self.server.leave(self)


class _OnTrial(WrappedReplica):
    """A replica that takes a batch although it is not available yet."""

    __slots__ = ("_of", "_wire")

    def __init__(self, replica: RemoteReplica, wire: Wire) -> None:
        super().__init__(replica)
        self._of = replica
        self._wire = wire

    def execute(self, batch: Batch, timeout_s: float, /) -> None:
        self._of.begin(batch, timeout_s, self._wire)

    def cancel(self, batch: Batch, /) -> None:
        self._of.cancel(batch)


def _nothing() -> None:
    pass
