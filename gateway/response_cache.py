"""The response cache of one model version: hits, misses, and one execution for equal requests that wait together.

It stands before splitting and queueing; models that do not ask for it never meet it. What "equal" means and what is
kept is `core/remembered.py`'s. Rules:
  * a miss is executed as a *flight*: a request of the gateway's own for every output. Equal requests that arrive
    meanwhile wait for it. It has no client: a caller that leaves does not take the flight along while another waits;
  * a flight that was refused or ran out of time ends for the caller it was made for; the next in line is asked anew, as
    if it had come only now (but with its own arrival and deadline). A failure of the execution is the answer to this
    input, and goes to all of them: inputs that break a worker are not tried once for each caller;
  * every caller is settled exactly once and never inside `infer`; who waits for a flight keeps its own deadline;
    requests of another priority or timeout do not share a flight, only the answer once it is there;
  * `Inference-Backend` says "cache", with the batch that once made the answer, exactly for the requests that count as
    cache hits: those that were not executed. One request of a flight counts as executed;
  * those who wait for flights are bounded in rows, like a queue;
  * an ensemble may hold steps of sequences, now or after a reload: what belongs to a sequence goes past the cache of an
    ensemble.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final, Protocol

from gateway.core.admission import deadline_of
from gateway.core.batch import Execution, FinishedBatch
from gateway.core.duration import in_words
from gateway.core.inner_request import inner_request
from gateway.core.model import ModelSpec
from gateway.core.remembered import Remembered, Store, key_of, remember
from gateway.core.request import SETTLED, InferRequest
from gateway.errors import BackendError, Cancelled, DeadlineExceeded, GatewayError, Overloaded, Refused
from gateway.observe.record import FailureReason, ModelStatistics

log = logging.getLogger("gateway.cache")

BACKEND: Final = "cache"
REASON: Final = "cache"

Forward = Callable[[InferRequest], None]
FlightKey = tuple[bytes, int, float]


class CachedModel(Protocol):
    """What the cache needs to know of a served version."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def statistics(self) -> ModelStatistics: ...

    def fingerprint(self) -> bytes:
        """Names what would answer now, and changes whenever that does: load of the version, steps of an ensemble."""


class ResponseCache:
    """In front of one model version; `store` may be shared with others."""

    def __init__(
        self, model: CachedModel, store: Store, forward: Forward, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`forward` executes a request (`Pipeline`'s way without the cache); `clock`: monotonic seconds."""
        self.store = store
        self.statistics = model.statistics
        self.spec = model.spec
        self._model = model
        self._forward = forward
        self._now = clock
        self._loop = asyncio.get_running_loop()
        self._flights: dict[FlightKey, _Flight] = {}
        self._outputs = tuple(range(len(self.spec.outputs)))
        self.waiting_rows = 0
        """Of requests that wait for a flight made for another."""

    def infer(self, request: InferRequest) -> None:
        """Answer from the cache, wait for an equal request, or execute; `settle` is called later.

        Raises:
            Refused: the request was not taken; `settle` will not be called.
        """
        begun = self._now()
        if request.sequence is not None and self.spec.scheduling.ensemble:
            self._forward(request)
            return
        scope = self._model.fingerprint()
        key = key_of(scope, request)
        if key is None:
            self._forward(request)
            return
        found = self.store.get(key, begun)
        if found is not None:
            request.owner = self
            self._loop.call_soon(self._hit, request, found, self._ns_since(begun))
            return
        flight_key = (key, request.priority, request.stated_timeout_s)
        flight = self._flights.get(flight_key)
        if flight is not None:
            flight.join(request)
            return
        flight = _Flight(self, flight_key, scope, request)
        inner = flight.inner = inner_request(self.spec, request.inputs, request.rows, self._outputs, request)
        inner.received, inner.timeout_s = request.received, request.timeout_s
        inner.settle = flight.settled
        request.owner = flight
        self._flights[flight_key] = flight
        try:
            self._forward(inner)
        except BaseException:
            self.landed(flight)
            request.owner = flight.inner = None  # a cycle would hold the inputs until the garbage collector comes by
            raise
        self.statistics.record_cache_miss(self._ns_since(begun))

    def abort(self, request: InferRequest) -> None:
        """The caller left before its hit was delivered."""
        if request.state != SETTLED:
            self.fail("CANCELED", request)
            self.settle(request, error=Cancelled("the caller left"))

    def _hit(self, request: InferRequest, found: Remembered, lookup_ns: int) -> None:
        if request.state != SETTLED:
            self.answer(request, found, self._now(), lookup_ns)

    # -- what flights need -----------------------------------------------------------------------------------------

    def answer(self, request: InferRequest, found: Remembered, now: float, lookup_ns: int = 0) -> None:
        """Settle a request that was not executed itself."""
        batch = FinishedBatch(
            found.executions[0][0].batch_id, request.rows, found.outputs, BACKEND, 1, now, now, REASON, (0, 0, 0)
        )
        batch.parts = [
            (Execution(BACKEND, execution.attempt, execution.batch_id, execution.rows, execution.remote), row)
            for execution, row in found.executions
        ]
        batch.remote = any(execution.remote for execution, _ in found.executions)
        waited_ns = max(0, round((now - request.received) * 1e9) - lookup_ns)
        self.statistics.record_cache_hit(lookup_ns, queue_ns=waited_ns)
        request.row = 0
        self.settle(request, batch)

    def settle(self, request: InferRequest, batch: FinishedBatch | None = None, error: Exception | None = None) -> None:
        request.owner = None
        request.state = SETTLED
        request.batch, request.error = batch, error
        try:
            request.settle(request)
        except Exception:
            log.exception("model %s: an answer could not be written", self.spec.name)

    def fail(self, reason: FailureReason, request: InferRequest) -> None:
        self.statistics.fail(reason, spent_s=self._now() - request.received)

    def landed(self, flight: _Flight) -> None:
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    def keep(self, flight: _Flight, batch: FinishedBatch, row: int, rows: int) -> Remembered:
        """Store the answer of a flight, unless another one would be given by now."""
        begun = self._now()
        answer = remember(batch, row, rows, self.spec.batched)
        if self._model.fingerprint() == flight.scope:
            self.store.put(flight.key[0], answer, begun)
        self.statistics.record_cache_miss(self._ns_since(begun), n=0)
        return answer

    def again(self, request: InferRequest) -> None:
        """Ask anew for somebody whose flight ended without an answer."""
        try:
            self.infer(request)
        except Exception as error:  # whatever it was, the caller gets an answer
            if not isinstance(error, GatewayError):
                log.exception("model %s: a request could not be repeated", self.spec.name)
                error = GatewayError("the gateway failed on this request")
            self.settle(request, error=error)

    def check_room(self, request: InferRequest) -> None:
        """Raises Overloaded if too many wait for flights already."""
        limit = self.spec.policy.max_queue_rows
        if self.waiting_rows + request.rows > limit:
            self.statistics.reject("queue_rows")
            raise Overloaded(f"Exceeds maximum queue size: {self.waiting_rows} of {limit} rows wait; retry later")

    def expire_at(self, request: InferRequest, expire: Callable[[InferRequest], None]) -> asyncio.TimerHandle:
        """A timer for the instant at which the caller's time is up."""
        stated = self.spec.scheduling
        level = request.priority if 1 <= request.priority <= stated.priority_levels else stated.default_priority_level
        deadline = deadline_of(self.spec.policy, request, stated.queue_policy(level))
        left_s = max(0.0, deadline - self._now())
        return self._loop.call_later(left_s, expire, request)

    def refuse_late(self, request: InferRequest) -> None:
        waited_s = self._now() - request.received
        self.statistics.reject("deadline", spent_s=waited_s)
        self.settle(
            request,
            error=DeadlineExceeded(f"Request timeout expired while an equal request ran, after {in_words(waited_s)}"),
        )

    def now(self) -> float:
        return self._now()

    def _ns_since(self, instant: float) -> int:
        return round((self._now() - instant) * 1e9)


class _Flight:
    """One execution and those who wait for it. `inner` is what the scheduler has; it counts as the leader's."""

    __slots__ = ("_cache", "_leader", "_waiters", "inner", "key", "scope")

    def __init__(self, cache: ResponseCache, key: FlightKey, scope: bytes, leader: InferRequest) -> None:
        self.key = key
        self.scope = scope
        self.inner: InferRequest | None = None
        self._cache = cache
        self._leader: InferRequest | None = leader
        """Who it was made for; None once that caller left."""
        self._waiters: dict[int, InferRequest] = {}
        """The others, oldest first, by identity; the `place` of each is its timer."""

    def join(self, request: InferRequest) -> None:
        cache = self._cache
        cache.check_room(request)
        if self.inner is not None:
            request.inputs = self.inner.inputs  # equal ones: its own need not be kept
        request.owner = self
        request.place = cache.expire_at(request, self._expired)
        self._waiters[id(request)] = request
        cache.waiting_rows += request.rows

    def abort(self, request: InferRequest) -> None:
        """A caller left. The flight goes on if anybody is still there."""
        if request.state == SETTLED:
            return
        if request is self._leader:
            self._leader = None  # counted with what becomes of the flight
        else:
            if id(request) in self._waiters:  # not so while the flight's outcome is being told
                self._remove(request)
            self._cache.fail("CANCELED", request)
        self._cache.settle(request, error=Cancelled("the caller left"))
        self._end_if_deserted()

    def _expired(self, request: InferRequest) -> None:
        self._remove(request)
        self._cache.refuse_late(request)
        self._end_if_deserted()

    def _end_if_deserted(self) -> None:
        if self._leader is None and not self._waiters and self.inner is not None:
            self._cache.landed(self)
            self.inner.abort()

    def _remove(self, request: InferRequest) -> None:
        del self._waiters[id(request)]
        self._cache.waiting_rows -= request.rows
        request.place.cancel()
        request.place = None

    def settled(self, inner: InferRequest) -> None:
        """The execution ended, one way or another; it was counted by whoever executed it."""
        cache, leader = self._cache, self._leader
        cache.landed(self)
        self.inner = self._leader = None
        waiters = list(self._waiters.values())
        for request in waiters:
            self._remove(request)
        if inner.error is None:
            self._answered(inner, leader, waiters)
        elif isinstance(inner.error, Refused | Cancelled):
            if leader is not None:
                leader.avoid, leader.attempt = inner.avoid, inner.attempt
                cache.settle(leader, error=inner.error)
            for request in waiters:
                if request.state != SETTLED:
                    cache.again(request)
        else:
            self._failed(inner, inner.error, leader, waiters)

    def _answered(self, inner: InferRequest, leader: InferRequest | None, waiters: list[InferRequest]) -> None:
        cache = self._cache
        try:
            answer = cache.keep(self, inner.batch, inner.row, inner.rows)
        except Exception:  # whatever it was, everybody gets an answer
            log.exception("model %s: an answer could not be kept", cache.spec.name)
            error = BackendError(f"model '{cache.spec.name}': the backend's answer could not be used")
            self._failed(inner, error, leader, waiters)
            return
        if leader is None:
            cache.fail("CANCELED", inner)
            leader = waiters.pop(0)
        leader.row, leader.attempt = inner.row, inner.attempt
        cache.settle(leader, inner.batch)
        now = cache.now()
        for request in waiters:
            if request.state != SETTLED:  # the answer to one may have made another leave
                cache.answer(request, answer, now)

    def _failed(
        self, inner: InferRequest, error: Exception, leader: InferRequest | None, waiters: list[InferRequest]
    ) -> None:
        cache = self._cache
        if leader is None:
            cache.fail("CANCELED", inner)
            leader = waiters.pop(0)
        for request in [leader, *waiters]:
            if request.state == SETTLED:
                continue
            if request is not leader:
                cache.fail("BACKEND", request)
            request.avoid, request.attempt = inner.avoid, inner.attempt
            cache.settle(request, error=error)
