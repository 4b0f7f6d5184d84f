"""The asyncio shell of one model version's queue: submit, pump, timer, settle, abort, drain.

Decisions are `core/batching.py`'s; this file carries them out. Rules:
  * one call per loop turn decides for all requests that arrived in it (`_pump`), so requests read from the sockets
    in one turn share a batch without waiting for each other;
  * one timer per model version, armed for the exact instant the core asked for; nothing ticks while nobody waits;
  * every request settles exactly once, through `_settle`; a caller that left is normal;
  * a batch-mate's fate never depends on another: an error while answering one caller is kept from the others;
  * a model whose owner states priorities, queue policies or an order of answers gets the parts for that; any other
    pays for none of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from gateway.backends.interface import Replica
from gateway.core.admission import Rejected, admit, admit_in_order, admit_to_level, deadline_of
from gateway.core.arrival_order import ArrivalOrder, Told
from gateway.core.batch import FinishedBatch
from gateway.core.batch_queue import BatchQueue, QueueStatistics
from gateway.core.batching import Dispatch, Reason, WaitUntil, decide, one_at_a_time, patience_s
from gateway.core.duration import in_words
from gateway.core.model import ModelSpec
from gateway.core.policy_queue import PolicyQueue
from gateway.core.request import RUNNING, SETTLED, InferRequest
from gateway.dispatcher import Dispatcher
from gateway.errors import Cancelled, DeadlineExceeded, GatewayError, NoBackend, QueueTimeout
from gateway.observe.record import ModelStatistics
from gateway.observe.request_trace import ModelTracer

log = logging.getLogger("gateway.scheduler")

NO_BACKEND_S: Final = 5.0
"""How long requests wait for a replica to come back before they are refused. A worker is back within a second;
this leaves room for a large model to load."""

TIMER_SLACK_S: Final = 0.0005
"""uvloop rounds timers to milliseconds; without this one could fire just before its instant, and again."""


RETRY_PAUSE_S: Final = 0.01
"""A batch that a replica did not take is offered again after this, or when anything else happens: a replica that takes
nothing must not keep the loop busy."""


class Scheduler:
    """Queue, dispatcher and timer of one model version."""

    def __init__(
        self,
        spec: ModelSpec,
        replicas: Sequence[Replica],
        statistics: ModelStatistics,
        clock: Callable[[], float] = time.monotonic,
        row_s: float = 0.0,
        bounded: bool = True,
    ) -> None:
        """`clock`: monotonic seconds, the one that requests' `received` is read from. `row_s`: seconds a row took on
        trial, 0.0 if nobody knows. `bounded`: False where somebody before it decides who may wait."""
        self.spec = spec
        self.statistics = statistics
        self.tracer: ModelTracer | None = None
        """Notes single requests, where somebody asked for it."""
        self._policy = spec.policy
        self._loop = asyncio.get_running_loop()
        stated = spec.scheduling
        self._levels = PolicyQueue(stated) if stated.priority_levels or stated.states_queue_policy else None
        """The queue, where the model has priority levels or queue policies."""
        self._queue: BatchQueue = self._levels or BatchQueue()
        self._order = ArrivalOrder() if stated.preserve_ordering else None
        self._plain = bounded and self._levels is None and self._order is None
        self._bounded = bounded
        self._now = clock  # the loop's own time is cached and, on uvloop, rounded to milliseconds
        self._dispatcher = Dispatcher(spec, replicas, statistics, clock, self, row_s)
        self._pumping = False
        self._let_more_in = False
        """Whether the pump should let the loop turn once more before it decides."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_instant = 0.0
        self._closed: GatewayError | None = None
        self._idle = asyncio.Event()
        self._no_backend_since: float | None = None
        self._hopeless: GatewayError | None = None
        """What those who wait were told when no replica was left to wait for."""
        for replica in replicas:
            replica.set_listener(self._replica_changed)
        if not any(replica.available for replica in replicas):
            self._replica_changed()

    # -- what callers do -----------------------------------------------------------------------------------------

    def submit(self, request: InferRequest) -> None:
        """Queue a validated request; `received`, `context` and `settle` must be set. Its `settle` is called later.

        Raises:
            Overloaded: a bound of the queue is reached.
            NotReady, NoBackend, Draining: the model cannot take requests now.
        """
        self._admit(request)
        if self._order is not None:
            self._keep_in_order(request, self._order)
        self._accept(request)

    def submit_parts(self, whole: InferRequest, parts: Sequence[InferRequest]) -> None:
        """Queue the parts of one request, all of them or none; otherwise as `submit`."""
        self._admit(whole)
        if self._order is not None:
            self._keep_in_order(whole, self._order)
        for part in parts:
            self._accept(part)

    def _admit(self, request: InferRequest) -> None:
        refusal = self._closed or self._hopeless
        if refusal is not None:
            self.statistics.reject(refusal.reason)
            raise type(refusal)(str(refusal))
        rejected = admit(self._queue, self._policy, request) if self._plain else self._why_not(request)
        if rejected is None:
            return
        if self._pumping and self._dispatcher.free_replica() is not None:
            # Who came in this very turn only waits because nothing was handed out yet: that is no reason to refuse.
            self._let_more_in = False
            self._pump()
            rejected = self._why_not(request)
        if rejected is not None:
            self.statistics.reject(rejected.reason)
            raise rejected.error(rejected.message)

    def _why_not(self, request: InferRequest) -> Rejected | None:
        if not self._bounded:
            return None
        rejected = admit(self._queue, self._policy, request)
        if rejected is None and self._order is not None:
            rejected = admit_in_order(self._queue, self._order, self._policy, request)
        if rejected is None and self._levels is not None:
            rejected = admit_to_level(self._levels, request)
        return rejected

    def _accept(self, request: InferRequest) -> None:
        request.owner = self
        if self._levels is None:
            request.deadline = deadline_of(self._policy, request)
        else:
            request.deadline = deadline_of(self._policy, request, self._levels.policy_of(request))
        self._queue.push(request)
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def abort(self, request: InferRequest) -> None:
        """The caller left: drop the request, waiting or running. Batch-mates do not notice."""
        if request.state != SETTLED:
            if not request.part:
                self.statistics.fail("CANCELED", spent_s=self._now() - request.received)
            self._settle(request, Cancelled("the caller left"))
        elif self._order is not None:
            self._tell(self._order.leave(request))

    def close(self, error: GatewayError) -> None:
        """Refuse new requests with `error` from now on; those inside are still answered."""
        self._closed = error

    def fail_waiting(self, error: GatewayError) -> None:
        """Settle everyone who waits with `error`, and who comes back from a failed batch later, until a replica is
        available again (no backend came back, or the model failed for good)."""
        self._hopeless = error
        for request in [*self._queue.waiting(), *self._dispatcher.isolated_members()]:
            if request.state != SETTLED:  # the answer to one may have made another leave
                self.statistics.reject(error.reason)
                self._settle(request, error)

    def reopen(self) -> None:
        self._closed = self._hopeless = None
        self._replica_changed()

    async def drained(self) -> None:
        """Returns when no accepted request is unsettled and no batch is running."""
        while self._queue.unsettled or self._dispatcher.running:
            self._idle.clear()
            await self._idle.wait()

    def stop(self) -> None:
        """Disarm the timer; the queue must be empty."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def queue_statistics(self) -> QueueStatistics:
        return self._queue.statistics()

    @property
    def pending(self) -> int:
        """Accepted and not yet settled."""
        return self._queue.unsettled

    @property
    def waiting(self) -> tuple[int, int, int]:
        """Rows and bytes that wait for a batch, or whose answers are held back, and groups that cannot share one."""
        rows, nbytes = self._queue.rows, self._queue.nbytes
        if self._order is not None:
            rows, nbytes = rows + self._order.rows, nbytes + self._order.nbytes
        return rows, nbytes, len(self._queue.groups)

    def __repr__(self) -> str:
        return f"<Scheduler {self.spec.name}/{self.spec.version} {self._queue!r} running={self._dispatcher.running}>"

    # -- the pump ------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Hand out batches while replicas have room and the core says so; then arm the timer."""
        if self._let_more_in:
            self._let_more_in = False
            self._loop.call_soon(self._pump)
            return
        self._pumping = False
        queue, dispatcher = self._queue, self._dispatcher
        now = self._now()
        self._expire(now)  # first: rows of a caller whose time is up never reach a replica
        wake: float | None = None
        while queue.count or dispatcher.isolated:
            if dispatcher.running and not dispatcher.isolated and self._one_at_a_time():
                patient_until = dispatcher.last_dispatched + patience_s(dispatcher.run_s)
                if now < patient_until:
                    wake = patient_until
                    break
            replica = dispatcher.free_replica()
            if replica is None:
                break
            members = dispatcher.next_isolated() if dispatcher.isolated else None
            isolated, reason = members is not None, Reason.WORKER_FREE
            if members is None:
                decision = decide(queue, self._policy, now, dispatcher.execute_s)
                if isinstance(decision, WaitUntil):
                    wake = decision.instant
                    break
                if not isinstance(decision, Dispatch):
                    break
                members, reason = queue.take(decision.group, decision.rows), decision.reason
                if not members:
                    continue
            if replica.name == members[0].avoid:
                replica = dispatcher.free_replica(members[0].avoid) or replica
            dispatcher.dispatch(members, reason, replica, isolated)
        self._arm(wake)

    def _one_at_a_time(self) -> bool:
        return one_at_a_time(self._dispatcher.run_s, self._queue.rows, max(self._policy.max_batch_size, 1))

    def _arm(self, wake: float | None) -> None:
        deadline = self._queue.next_deadline()
        if deadline is not None and (wake is None or deadline < wake):
            wake = deadline
        if wake is None:
            return
        if self._timer is not None:
            if self._timer_instant <= wake:
                return  # fires early enough; it looks again then
            self._timer.cancel()
        self._timer_instant = wake
        self._timer = self._loop.call_later(max(0.0, wake - self._now()) + TIMER_SLACK_S, self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        self._pump()

    def _expire(self, now: float) -> None:
        """Settle whose time is up, one by one: each is out of the queue before anyone else is told anything."""
        queue, levels = self._queue, self._levels
        deadline = queue.next_deadline()
        if deadline is None or deadline > now:
            return
        while (request := queue.expired(now)) is not None:
            waited_s = now - request.received
            if request.state == RUNNING:
                where = "while the model ran"
                self.statistics.fail("OTHER", spent_s=waited_s)
            else:
                where = "in the queue"
                self.statistics.reject("deadline", spent_s=waited_s)
            self._settle(request, DeadlineExceeded(f"Request timeout expired {where} after {in_words(waited_s)}"))
        while levels is not None and (request := levels.overdue(now)) is not None:
            waited_s = now - request.received
            error = QueueTimeout(f"Request timeout expired after {in_words(waited_s)} in the queue; retry later")
            self.statistics.reject(error.reason, spent_s=waited_s)
            self._settle(request, error)

    def _pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def call_soon(self, callback: Callable[..., None], *arguments: object) -> object:
        """For the dispatcher, which knows no loop."""
        return self._loop.call_soon(callback, *arguments)

    # -- what the dispatcher reports -------------------------------------------------------------------------------

    def batch_succeeded(self, members: list[InferRequest], batch: FinishedBatch) -> None:
        if self._queue.count or self._dispatcher.isolated:
            if self._one_at_a_time():
                # Short runs: write the answers, read once what clients send next, and let that join the next batch.
                self._let_more_in = True
            else:
                self._pump()  # the replica starts on the next batch while this one's answers are written
        settled = self._queue.settled
        dispatched = batch.dispatched
        own = batch.own
        answered, waited_s, row = 0, 0.0, 0
        for request in members:
            if request.state != SETTLED:
                settled(request)
                if own is None:
                    request.batch = batch
                    request.row = row
                else:
                    request.batch = own[row]
                    request.row = 0
                answered += not request.part
                waited_s += dispatched - request.received
                try:
                    request.settle(request)
                except Exception:
                    log.exception("model %s: an answer could not be written", self.spec.name)
            row += request.rows
        self.statistics.record_batch(
            batch.backend, batch.rows, answered, batch.reason, batch.input_ns, batch.infer_ns, batch.output_ns,
            waited_s, batch.finished - dispatched,
        )  # fmt: skip
        if self.tracer is not None:
            self._trace(self.tracer, members, batch)
        self._after_batch()

    def _trace(self, tracer: ModelTracer, members: list[InferRequest], batch: FinishedBatch) -> None:
        try:
            tracer.batch(members, batch)
        except Exception:  # a record that could not be made must not hold up the queue
            log.exception("model %s: a trace could not be noted", self.spec.name)

    def batch_failed(self, members: list[InferRequest], error: GatewayError) -> None:
        for request in members:
            if request.state != SETTLED:
                self.statistics.fail("BACKEND", spent_s=self._now() - request.received)
                self._settle(request, error)
        self._after_batch()

    def batch_returned(self, members: list[InferRequest], taken: bool) -> None:
        self._queue.push_front(members)
        if self._hopeless is not None:
            self.fail_waiting(self._hopeless)
        self._after_batch(0.0 if taken else RETRY_PAUSE_S)

    def _after_batch(self, pause_s: float = 0.0) -> None:
        if self._queue.count or self._dispatcher.isolated:
            if pause_s:
                self._loop.call_later(pause_s, self._pump_soon)
                self._arm(None)  # for those whose time is up before
            else:
                self._pump_soon()
        self._check_drained()

    def _settle(self, request: InferRequest, error: GatewayError) -> None:
        if request.state == SETTLED:
            return
        self._queue.settled(request)
        request.error = error
        try:
            request.settle(request)
        except Exception:
            log.exception("model %s: an error could not be written", self.spec.name)
        self._check_drained()

    def _keep_in_order(self, request: InferRequest, order: ArrivalOrder) -> None:
        order.enter(request)
        request.settle = self._settled_in_order

    def _settled_in_order(self, request: InferRequest) -> None:
        if self._order is not None:
            self._tell(self._order.settled(request))

    def _tell(self, told: list[Told]) -> None:
        for request, settle in told:
            try:
                settle(request)
            except Exception:
                log.exception("model %s: an answer could not be written", self.spec.name)

    def _check_drained(self) -> None:
        if not (self._queue.unsettled or self._dispatcher.running):
            self._idle.set()

    # -- replicas come and go --------------------------------------------------------------------------------------

    def _replica_changed(self) -> None:
        if any(replica.available for replica in self._dispatcher.replicas):
            self._no_backend_since = self._hopeless = None
            self._pump_soon()
        elif self._no_backend_since is None:
            self._no_backend_since = self._now()
            self._loop.call_later(NO_BACKEND_S, self._give_up, self._no_backend_since)

    def _give_up(self, since: float) -> None:
        if self._no_backend_since == since:
            self.fail_waiting(NoBackend(f"model '{self.spec.name}': no worker is available; retry later"))
