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
import random
import time
from collections.abc import Callable, Sequence

from gateway.backends.interface import Replica
from gateway.core.admission import admit, deadline_of
from gateway.core.arrival_order import ArrivalOrder, Told
from gateway.core.batch import FinishedBatch
from gateway.core.batch_queue import BatchQueue, Group, QueueStatistics
from gateway.core.batching import Dispatch, Reason, WaitUntil, decide, in_time, one_at_a_time, patience_s
from gateway.core.duration import in_words
from gateway.core.fleet import Member
from gateway.core.model import ModelSpec
from gateway.core.policy_queue import PolicyQueue
from gateway.core.request import RUNNING, SETTLED, InferRequest
from gateway.dispatcher import Dispatcher
from gateway.errors import (
    Cancelled,
    DeadlineExceeded,
    GatewayError,
    QueueTimeout,
    Refused,
)
from gateway.observe.record import ModelStatistics
from gateway.observe.request_trace import ModelTracer
from gateway.scheduler_door import Door
from gateway.scheduler_replicas import NO_BACKEND_S, NO_REMOTE_S, BackendWatch, FleetAccess
from gateway.scheduler_timer import TIMER_SLACK_S, Timer, earlier

__all__ = ["NO_BACKEND_S", "NO_REMOTE_S", "TIMER_SLACK_S", "Scheduler"]

log = logging.getLogger("gateway.scheduler")


class Scheduler(FleetAccess):
    """Queue, dispatcher and timer of one model version."""

    def __init__(
        self,
        spec: ModelSpec,
        replicas: Sequence[Replica],
        statistics: ModelStatistics,
        clock: Callable[[], float] = time.monotonic,
        row_s: float = 0.0,
        bounded: bool = True,
        rng: random.Random | None = None,
    ) -> None:
        """`clock`: monotonic seconds, the one that requests' `received` is read from. `row_s`: seconds a row took on
        trial, 0.0 if nobody knows. `bounded`: False where somebody before it decides who may wait. `rng`: for whatever
        is left to chance; seeded where a run is to be repeated."""
        self.spec = spec
        self.statistics = statistics
        self.tracer: ModelTracer | None = None
        """Notes single requests, where somebody asked for it."""
        self._policy = spec.policy
        self._deadline_s = spec.policy.deadline_s
        self._rows = max(spec.policy.max_batch_size, 1)
        self._loop = asyncio.get_running_loop()
        stated = spec.scheduling
        self._levels = PolicyQueue(stated) if stated.priority_levels or stated.states_queue_policy else None
        """The queue, where the model has priority levels or queue policies."""
        self._queue: BatchQueue = self._levels or BatchQueue()
        self._order = ArrivalOrder() if stated.preserve_ordering else None
        self._now = clock  # the loop's own time is cached and, on uvloop, rounded to milliseconds
        rng = rng or random.Random()  # noqa: S311 - which replica goes first is no secret
        self._dispatcher = Dispatcher(spec, statistics, clock, self, row_s, rng)
        self._pumping = False
        self._let_more_in = False
        """Whether the pump should let the loop turn once more before it decides."""
        self._timer = Timer(self._loop, clock, self._pump)
        self._idle = asyncio.Event()
        self._watch = BackendWatch(self._dispatcher, self._loop, clock, self.fail_waiting, self.kick)
        self._door = Door(spec, self._queue, self._order, self._dispatcher, self._watch, statistics, clock, bounded)
        for replica in replicas:
            self._watch.join(replica)
        self._watch.look(clock())

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
        if self._dispatcher.failures.denies:
            for part in parts:
                self._door.keep_out(part)
        if self._order is not None:
            self._keep_in_order(whole, self._order)
        for part in parts:
            self._accept(part)

    def _admit(self, request: InferRequest) -> None:
        if self._door.closed is not None or self._watch.hopeless is not None:
            self._door.refuse()
        dispatcher = self._dispatcher
        if dispatcher.failures.denies:
            self._door.keep_out(request)
        if self._door.plain and not dispatcher.lanes.count:
            rejected = admit(self._queue, self._policy, request)
        else:
            rejected = self._door.why_not(request)
        if rejected is None:
            return
        if self._pumping and dispatcher.fleet.choose(self._now(), 1) is not None:
            # Who came in this very turn only waits because nothing was handed out yet: that is no reason to refuse.
            self._let_more_in = False
            self._pump()
            rejected = self._door.why_not(request)
        if rejected is not None:
            self.statistics.reject(rejected.reason)
            raise rejected.error(rejected.message)

    def _accept(self, request: InferRequest) -> None:
        request.owner = self
        if self._levels is None:
            # Most callers say nothing of time.
            asked = request.timeout_s or request.stated_timeout_s
            request.deadline = deadline_of(self._policy, request) if asked else request.received + self._deadline_s
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
        self._door.closed = error

    def fail_waiting(self, error: GatewayError) -> None:
        """Settle everyone who waits with `error`, and who comes back from a failed batch later, until a replica is
        available again (no backend came back, or the model failed for good)."""
        self._watch.hopeless = error
        for request in [*self._queue.waiting(), *self._dispatcher.lanes]:
            if request.state != SETTLED:  # the answer to one may have made another leave
                self.statistics.reject(error.reason)
                self._settle(request, error)

    def reopen(self) -> None:
        self._door.closed = None
        self._watch.forget()
        self.kick()

    @property
    def dispatchers(self) -> tuple[Dispatcher, ...]:
        return (self._dispatcher,)

    def kick(self) -> None:
        """Look again: something about the replicas may have changed."""
        self._watch.look(self._now())
        self._pump_soon()

    def add_replica(self, replica: Replica) -> None:
        """It takes part from now on, slowly at first."""
        self._watch.join(replica)
        self.kick()

    async def remove_replica(self, replica: Replica) -> None:
        """No batch goes there any more; returns when those under way are over. Harmless for one that is not here."""
        await self._watch.part_from(replica)

    async def drained(self) -> None:
        """Returns when no accepted request is unsettled and no batch is running."""
        while self._queue.unsettled or self._dispatcher.running:
            self._idle.clear()
            await self._idle.wait()

    def stop(self) -> None:
        """Disarm the timer; the queue must be empty."""
        self._timer.cancel()

    def queue_statistics(self) -> QueueStatistics:
        return self._queue.statistics()

    @property
    def pending(self) -> int:
        """Accepted and not yet settled."""
        return self._queue.unsettled

    @property
    def waiting(self) -> tuple[int, int, int]:
        """Rows and bytes that wait for a batch, or whose answers are held back, and groups that cannot share one."""
        lanes = self._dispatcher.lanes
        rows, nbytes = self._queue.rows + lanes.rows, self._queue.nbytes + lanes.nbytes
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
        deadline, choose, limit = queue.next_deadline(), dispatcher.fleet.choose, self._rows
        wake = dispatcher.serve(now) if dispatcher.lanes.count else None
        while queue.count:
            if dispatcher.running and self._one_at_a_time():
                patient_until = dispatcher.last_dispatched + patience_s(dispatcher.run_s)
                if now < patient_until:
                    wake = earlier(wake, patient_until)
                    break
            member = choose(now, min(queue.rows, limit))
            if member is None:
                break
            decision = decide(queue, self._policy, now, dispatcher.execute_s)
            if not isinstance(decision, Dispatch):
                if isinstance(decision, WaitUntil):
                    wake = earlier(wake, decision.instant)
                break
            group = decision.group
            if dispatcher.keeps_sequences and (head := group.head()) is not None and head.sequence is not None:
                wake = earlier(wake, dispatcher.step(queue.take(group, 1)[0], now))
                continue
            self._send(decision, member, now, deadline)
        waiting = bool(queue.count or dispatcher.lanes.count)
        if waiting:
            wake = earlier(wake, self._change_of_backends(now))
        if dispatcher.hedges is not None:
            wake = earlier(wake, dispatcher.hedges.send(now, waiting))
        self._timer_for(wake, deadline)

    def _send(self, decision: Dispatch, member: Member, now: float, deadline: float | None) -> None:
        """`deadline`: the earliest of anybody here."""
        group, reason, dispatcher = decision.group, decision.reason, self._dispatcher
        rows = dispatcher.row_limit(member, decision.rows, now)
        if deadline is not None and now + member.time.predict_s(min(rows, group.rows)) > deadline:
            member, rows, reason = self._in_time(group, member, rows, reason, now)
        members = self._queue.take(group, rows)
        if members:
            dispatcher.dispatch(members, reason, member)

    def _in_time(
        self, group: Group, member: Member, rows: int, reason: Reason, now: float
    ) -> tuple[Member, int, Reason]:
        """Somebody's deadline is near: who takes how many rows instead, so that it is met if it can be."""
        head = group.head()
        if head is None:
            return member, rows, reason
        fleet = self._dispatcher.fleet
        member = fleet.in_time(member, head.rows, now, head.deadline)
        rows = min(rows, self._dispatcher.row_limit(member, rows, now))
        fit = in_time(group, rows, now, member.time.predict_s)
        return (member, fit, Reason.DEADLINE) if fit < min(rows, group.rows) else (member, rows, reason)

    def _change_of_backends(self, now: float) -> float | None:
        """Somebody waits: the instant at which something about the replicas changes by itself."""
        if self._watch.since is None:
            self._watch.look(now)
        return self._dispatcher.fleet.next_wake(now)

    def _one_at_a_time(self) -> bool:
        return one_at_a_time(self._dispatcher.run_s, self._queue.rows, self._rows)

    def _timer_for(self, wake: float | None, deadline: float | None) -> None:
        wake = earlier(wake, deadline)
        if wake is not None:
            self._timer.arm(wake)

    def _expire(self, now: float) -> None:
        """Settle whose time is up, one by one: each is out of the queue before anyone else is told anything."""
        queue, levels = self._queue, self._levels
        deadline = queue.next_deadline()
        if deadline is None or deadline > now:
            return
        while (request := queue.expired(now)) is not None:
            waited_s = now - request.received
            if request.state == RUNNING and request.attempt:
                trouble = request.trouble
                again = trouble is not None and trouble.lane is not None
                where = "before another attempt could be made" if again else "while the model ran"
                self.statistics.fail("OTHER", spent_s=waited_s)
            else:
                where = "in the queue"
                self.statistics.reject("deadline", spent_s=waited_s)
            self._settle(request, DeadlineExceeded(f"Request timeout expired {where} after {in_words(waited_s)}"))
        while levels is not None and (request := levels.overdue(now)) is not None:
            if request.state == RUNNING and (request.trouble is None or request.trouble.lane is None):
                continue  # somebody is trying right now
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
        if self._queue.count or self._dispatcher.lanes.count:
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
                spent_s = self._now() - request.received
                if isinstance(error, DeadlineExceeded):
                    self.statistics.fail("OTHER", spent_s=spent_s)
                elif isinstance(error, Refused):
                    self.statistics.reject(error.reason, spent_s=spent_s)
                else:
                    self.statistics.fail("BACKEND", spent_s=spent_s)
                self._settle(request, error)
        self._after_batch()

    def batch_returned(self) -> None:
        if self._watch.hopeless is not None:
            self.fail_waiting(self._watch.hopeless)
        if self._levels is not None:
            for request in self._dispatcher.lanes:
                if not request.attempt:  # nobody took it: it waits as it did before
                    self._levels.beside(request)
        self._after_batch()

    def _after_batch(self) -> None:
        if self._queue.count or self._dispatcher.lanes.count:
            self._pump_soon()
        self._check_drained()

    def _settle(self, request: InferRequest, error: GatewayError) -> None:
        if request.state == SETTLED:
            return
        was_running = request.state == RUNNING
        self._queue.settled(request)
        if was_running:
            self._dispatcher.left(request)
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
