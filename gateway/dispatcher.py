"""One batch from its members to their outcome: choose a replica, execute, check; what fails waits for another attempt.

The dispatcher never completes a caller: it hands outcomes to its `Owner` (the scheduler), which does. What it knows of
its replicas is in `fleet` (core/fleet.py says where a batch may go); members of failed batches wait in `lanes`, apart
from the queue and ahead of it (dispatcher_lanes.py); what becomes of them is decided in dispatcher_failures.py. A batch
that is late may be sent a second time (dispatcher_hedges.py).

Rules:
  * a batch is bound to a replica only when that one can take it (late binding);
  * no row goes to a replica that failed it while another one is usable, busy or not;
  * a batch that nobody waits for any more is cancelled, and that is nobody's fault;
  * the fleet hears of every attempt exactly twice: that it began, and how it ended.
Invariants: a batch under way holds its replica's slot; at the end of each the owner is told its outcome or, where there
is none to tell (its members wait again, or have another answer), that it is over.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
import zlib
from collections.abc import Callable
from typing import Final

from gateway.backends.interface import Replica
from gateway.core import assembly
from gateway.core.batch import FinishedBatch
from gateway.core.batching import Reason
from gateway.core.fleet import Fleet, FleetPolicy, Member, State
from gateway.core.model import ModelSpec
from gateway.core.outcome import Failure, FailureKind, Sign, Success
from gateway.core.ragged import Ragged
from gateway.core.request import InferRequest
from gateway.core.retry_budget import RetryBudget
from gateway.dispatcher_batch import Owner, RunningBatch
from gateway.dispatcher_failures import NEAR_S, Failures
from gateway.dispatcher_hedges import Hedges
from gateway.dispatcher_lanes import Lane, Lanes, Waiting
from gateway.observe.record import ModelStatistics

__all__ = ["Dispatcher", "Owner", "RunningBatch"]

log = logging.getLogger("gateway.dispatch")

PEAK_DECAY: Final = 0.99
RUN_WEIGHT: Final = 0.1
"""Share of the newest batch in the mean run time."""

_PROCESS_TAG: Final = os.urandom(2).hex()
_BATCH_NUMBERS: Final = itertools.count(1)
"""One sequence for all models: a batch id names one batch of this process."""

Observer = Callable[[RunningBatch, Success], None]


class Dispatcher:
    """Executes the batches of one model version on its replicas."""

    def __init__(
        self,
        spec: ModelSpec,
        statistics: ModelStatistics,
        clock: Callable[[], float],
        owner: Owner,
        row_s: float,
        rng: random.Random,
    ) -> None:
        """`row_s`: seconds a row took on trial, 0.0 if nobody knows."""
        resilience = spec.resilience
        rows = max(spec.policy.max_batch_size, 1)
        self.spec = spec
        self.statistics = statistics
        self.fleet = Fleet(FleetPolicy(resilience.balancing, resilience.attempt_timeout_s), rng, rows, row_s)
        self.lanes = Lanes()
        self.budget = RetryBudget(resilience.retry_budget, rows)
        self.on_executed: Observer | None = None
        """Told of every batch that succeeded, before anyone is answered: its inputs are still readable."""
        self.on_fleet_changed: Callable[[], None] | None = None
        """Told whenever an attempt failed or a replica came or went: what the fleet wants next may have changed."""
        self.execute_s = row_s
        """The longest recent run, seconds: peak-sensitive, slowly decaying."""
        self.last_dispatched = 0.0
        """When the newest batch was sent, monotonic seconds."""
        self.run_s = math.inf
        """Seconds that batches spend inside the backend: a moving mean; infinite before the first."""
        self.has_workers = False
        """Whether a replica is an instance on one of our own workers."""
        self.keeps_sequences = False
        """Whether a replica may keep state between the requests of a sequence."""
        self._rows = rows
        self._merges = spec.policy.merge and spec.policy.max_batch_size > 0
        self._running: dict[RunningBatch, None] = {}
        """Batches under way, in the order in which they were sent: what happens to them can be repeated."""
        self._members: dict[Replica, Member] = {}
        self._left: dict[Member, Callable[[], None]] = {}
        """Replicas that were removed and still have batches, and who waits for that."""
        self._owner = owner
        self._now = clock
        self._rng = rng
        self._ragged = Ragged.of(spec)
        self._steps_running: set[object] = set()
        """Sequences with a step under way."""
        self._quarantined: RunningBatch | None = None
        self.failures = Failures(spec, self.fleet, self.lanes, self.budget, statistics, owner, rng)
        self.hedges: Hedges | None = None
        if resilience.hedging and resilience.idempotent:
            self.hedges = Hedges(resilience, self.fleet, self.budget, statistics, self.execute)

    # -- replicas --------------------------------------------------------------------------------------------------

    def join(self, replica: Replica) -> Member:
        """`replica` may be used from now on."""
        member = self._members[replica] = self.fleet.join(replica, self._now())
        self._look_at_traits()
        self.fleet_changed()
        return member

    def member_of(self, replica: Replica) -> Member | None:
        return self._members.get(replica)

    def leave(self, member: Member, over: Callable[[], None]) -> None:
        """No batch goes there any more; those under way go on. `over` is called when there are none (any more)."""
        self.fleet.leave(member)
        self._members = {replica: known for replica, known in self._members.items() if known is not member}
        if self.runs_on(member):
            self._left[member] = over
        else:
            over()
        self._look_at_traits()
        self.fleet_changed()

    def runs_on(self, member: Member) -> bool:
        """Whether a batch is under way there."""
        return any(batch.member is member for batch in self._running)

    def reachable(self, now: float) -> bool:
        """Whether anyone could take a batch, were it free, if only as a trial."""
        usable = self.fleet.usable
        return any(usable(member, now) for member in self.fleet.members) or self.fleet.choose(now, 1) is not None

    def _look_at_traits(self) -> None:
        kinds = {replica.traits.kind for replica in self._members}
        self.has_workers = "onnx" in kinds
        self.keeps_sequences = "oip" in kinds
        self.budget.resize(self._rows, sum([replica.traits.max_slots for replica in self._members]))

    # -- from the queue --------------------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Batches under way."""
        return len(self._running)

    def row_limit(self, member: Member, rows: int, now: float) -> int:
        """How many of `rows` rows of the queue may go there at once."""
        if now < self.failures.crashes.alone_until:
            return 1
        if member.breaker.state is State.CLOSED:
            return rows
        return min(rows, self.fleet.row_limit(member, now))

    def step(self, request: InferRequest, now: float) -> float | None:
        """A step of a sequence: it goes where the sequence's other steps went, when the one before it is done. Returns
        when to look again if nothing happens before."""
        step = request.sequence
        waiting = self.lanes.park(request, step.id if step is not None else None)
        self._serve(waiting, now)
        return waiting.not_before if waiting.live and waiting.not_before > now else None

    def dispatch(self, members: list[InferRequest], reason: Reason, member: Member) -> None:
        """Execute `members` (equal keys, not settled) from the queue on `member`, which can take them."""
        now = self._now()
        self.budget.deposit(len(members), now)
        batch = self._send(members, reason, member, None, now)
        if self.hedges is not None:
            self.hedges.began(batch)

    # -- from the lanes --------------------------------------------------------------------------------------------

    def serve(self, now: float) -> float | None:
        """Send what can go now, in the order of the lanes. Returns when to look again if nothing happens before."""
        if self.fleet.choose(now, 1) is None:
            return None  # before anyone is free again, something happens
        lanes = self.lanes
        wake: float | None = None
        while (waiting := lanes.head(Lane.ISOLATED)) is not None and self._serve(waiting, now):
            pass
        if waiting is not None and waiting.not_before > now:
            wake = waiting.not_before
        waiting = lanes.head(Lane.QUARANTINE)
        if waiting is not None and self._quarantined is None:
            instant = max(waiting.not_before, self.failures.allowance.next_at(now))
            if instant > now:
                wake = instant if wake is None else min(wake, instant)
            elif self._serve(waiting, now):
                self.failures.allowance.take(now)
                self.statistics.quarantine()
        for waiting in lanes.shared():
            if waiting.not_before > now:
                wake = waiting.not_before if wake is None else min(wake, waiting.not_before)
            while waiting.live and self._serve(waiting, now):
                pass
        return wake

    def _serve(self, waiting: Waiting, now: float) -> bool:
        """Send as many of the group as fit, if somebody can take them now."""
        if waiting.not_before > now:
            return False
        affinity: int | None = None
        if waiting.lane is Lane.SEQUENCE:
            if waiting.place in self._steps_running:
                return False
            affinity = zlib.crc32(str(waiting.place).encode())
        rows = min(waiting.rows, self._rows)
        fleet, tried = self.fleet, waiting.tried
        member = fleet.choose(now, rows, tried, affinity)
        if member is None and tried and not fleet.others(now, tried):
            alone = waiting.failed_alone
            member = fleet.choose(now, rows, alone, affinity)
            if member is None and alone and not fleet.others(now, alone):
                member = fleet.choose(now, rows, (), affinity)
        if member is None:
            return False
        one = waiting.lane is Lane.SEQUENCE or not self._merges
        limit = min(fleet.row_limit(member, now), waiting.rows if waiting.apart else self._rows)
        members = self.lanes.take(waiting, limit, one)
        self._send(members, Reason.WORKER_FREE, member, waiting, self._now())
        return True

    # -- under way -------------------------------------------------------------------------------------------------

    def _send(
        self, members: list[InferRequest], reason: Reason, member: Member, waiting: Waiting | None, now: float
    ) -> RunningBatch:
        rows = attempt = 0
        deadline = 0.0
        for request in members:
            rows += request.rows
            request.attempt += 1
            if request.attempt > attempt:  # noqa: PLR1730 - max() costs a call per request
                attempt = request.attempt
            if request.deadline > deadline:  # noqa: PLR1730
                deadline = request.deadline
        batch = RunningBatch(self, members, rows, reason, member)
        batch.deadline = deadline
        batch.attempt = attempt
        if waiting is not None:
            batch.lane = waiting.lane
            batch.suspects = waiting.suspects if rows == waiting.whole_rows else None
            if waiting.lane is Lane.QUARANTINE:
                self._quarantined = batch
            elif waiting.lane is Lane.SEQUENCE:
                self._steps_running.add(waiting.place)
                batch.place = waiting.place
        self.last_dispatched = now
        self.execute(batch, now)
        return batch

    def execute(self, batch: RunningBatch, now: float) -> None:
        """Hand `batch` to its replica; the answer comes to `batch_done`."""
        member, members, rows = batch.member, batch.members, batch.rows
        batch.dispatched = now
        if self.keeps_sequences and member.kind == "oip":
            batch.sequence, batch.parameters = members[0].sequence, members[0].parameters
        self._running[batch] = None
        self.fleet.began(member, rows, now)
        try:
            ragged = self._ragged
            batch.inputs = (
                assembly.concat(members, rows, self.spec.batched) if ragged is None else ragged.concat(members, rows)
            )
            batch.replica.execute(batch, self.fleet.attempt_timeout_s(member, rows, now, batch.deadline))
        except Exception as error:
            # Whatever it was, these members get an outcome, and the model goes on.
            log.exception("model %s: a batch could not be put together", self.spec.name)
            failure = Failure(FailureKind.SUSPECT, f"the batch could not be put together ({type(error).__name__})")
            self._owner.call_soon(batch.done, failure)

    def left(self, request: InferRequest) -> None:
        """`request`, which was handed out, was settled with an error: its caller left, or its time is up."""
        self.lanes.leave(request)
        for batch in [*self._running]:
            if request in batch.members and not batch.cancelled and not batch.alive:
                self.cancel(batch)

    def cancel(self, batch: RunningBatch) -> None:
        """Nobody waits for it any more. It is still done once."""
        batch.cancelled = True
        batch.replica.cancel(batch)

    def batch_done(self, batch: RunningBatch, outcome: Success | Failure) -> None:
        now = self._now()
        took_s = now - batch.dispatched
        self._returned(batch)
        if isinstance(outcome, Success):
            outcome = self._checked(batch, outcome)
        if isinstance(outcome, Success):
            compute_s = (outcome.compute_input_ns + outcome.compute_infer_ns + outcome.compute_output_ns) / 1e9
            self.fleet.succeeded(batch.member, batch.rows, took_s, compute_s, now)
            self.failures.outage.succeeded()
            if self.hedges is None or self._tells(self.hedges, batch, outcome):
                self._succeeded(batch, outcome, took_s, compute_s, now)
            else:
                self.statistics.attempt(batch.backend, "ok")
                self._owner.batch_returned()
            return
        if self._cut_short(batch, outcome, took_s, now):
            outcome = Failure(FailureKind.CANCELLED, "its callers' deadlines passed")
        self.fleet.failed(batch.member, batch.rows, outcome, took_s, now)
        self.statistics.attempt(batch.backend, outcome.kind.value)
        self.failures.watch(batch, outcome, now)
        if self.hedges is None or self._tells(self.hedges, batch, outcome):
            self.failures.handle(batch, outcome, now)
        else:
            self._owner.batch_returned()
        self.fleet_changed()

    def _cut_short(self, batch: RunningBatch, failure: Failure, took_s: float, now: float) -> bool:
        """Whether its time was up because its callers had no more, long before a replica has to be done: that says
        nothing about the replica."""
        return (
            failure.kind is FailureKind.TIMEOUT
            and batch.deadline <= now + NEAR_S
            and took_s < self.fleet.patience_s(batch.member, batch.rows) - NEAR_S
        )

    def _tells(self, hedges: Hedges, batch: RunningBatch, outcome: Success | Failure) -> bool:
        """Whether what `batch` came to is its members' outcome: not if its twin was first, or is still under way and
        this one failed."""
        hedges.over(batch)
        twin = batch.twin
        if twin is not None:
            batch.twin = twin.twin = None
            if isinstance(outcome, Failure):
                hedges.failed(batch, twin, outcome)
                return False
            hedges.first(batch, twin)
            if not twin.cancelled:
                self.cancel(twin)
        return not batch.over

    def _tell_observer(self, observer: Observer, batch: RunningBatch, outcome: Success) -> None:
        try:
            observer(batch, outcome)
        except Exception:  # whoever looks on must not hold up the answers
            log.exception("model %s: a batch could not be observed", self.spec.name)

    def fleet_changed(self) -> None:
        if self.on_fleet_changed is not None:
            self.on_fleet_changed()

    def _returned(self, batch: RunningBatch) -> None:
        """Give back what the batch held."""
        self._running.pop(batch, None)
        if batch is self._quarantined:
            self._quarantined = None
        if batch.lane is Lane.SEQUENCE:
            self._steps_running.discard(batch.place)
        if self._left and batch.member in self._left and not self.runs_on(batch.member):
            self._left.pop(batch.member)()

    def _checked(self, batch: RunningBatch, answer: Success) -> Success | Failure:
        """The answer, if it is the batch's; of a ragged batch the requests' own shapes may be why it is not."""
        outputs, failure = list(answer.outputs), (FailureKind.BROKEN, Sign.MISMATCH)
        try:
            if self._ragged is None:
                assembly.check_outputs(self.spec, batch.outputs, batch.rows, outputs)
            else:
                failure = FailureKind.SUSPECT, Sign.NONE
                self._ragged.check_outputs(batch.members, batch.outputs, batch.rows, outputs)
        except assembly.AssemblyError as error:
            kind, sign = failure
            return Failure(kind, f"the backend's answer failed its checks: {error}", sign)
        return answer

    def _succeeded(self, batch: RunningBatch, outcome: Success, took_s: float, compute_s: float, now: float) -> None:
        self.execute_s = max(took_s, self.execute_s * PEAK_DECAY)
        spent_s = compute_s if batch.replica.traits.kind == "onnx" else took_s
        self.run_s = spent_s if math.isinf(self.run_s) else self.run_s + RUN_WEIGHT * (spent_s - self.run_s)
        if batch.suspects is not None:
            self.fleet.blamed(batch.suspects, now)
            self.fleet_changed()
        if self.on_executed is not None:
            self._tell_observer(self.on_executed, batch, outcome)
        finished = FinishedBatch(
            f"{_PROCESS_TAG}-{next(_BATCH_NUMBERS):06d}",
            batch.rows,
            dict(zip(batch.outputs, outcome.outputs, strict=True)),
            batch.backend,
            batch.attempt,
            batch.dispatched,
            now,
            batch.reason.value,
            (outcome.compute_input_ns, outcome.compute_infer_ns, outcome.compute_output_ns),
        )
        finished.remote = batch.replica.traits.kind == "oip"
        if self._ragged is not None:
            finished.own = self._ragged.answers(batch.members, finished)
        self._owner.batch_succeeded(batch.members, finished)
