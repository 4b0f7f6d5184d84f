"""What must hold in every history, checked from outside while it runs and once it is over.

Invariants (resilience notes §5), and what else the design promises:
  I1          exactly one terminal outcome per accepted request, by its deadline + 100 ms
  I2          no answer to the wrong request
  I3          a request that must not be repeated is executed at most once
  I4          repeated attempts stay within the retry budget
  I5          at the end everything is back to its baseline, and nothing ticks
  I6          what waits never exceeds the bounds of the queue
  answered    where the history promises it, everybody who can have an answer has one
  calm        where nothing fails, no replica is charged with anything
  avoid       no attempt on a replica that failed these rows while another one is usable
  ejected     a replica that was ejected, drained or removed gets no batch of clients
  slots       batches go to available replicas with a free slot only
  wasted      nobody is executed after being told something, or past the deadline, or twice at once unless hedged
  abandoned   a run whose callers are all gone is cancelled
  heals       once everything is well for a while, callers are answered and every replica is in full use
  sinkhole    one that does nothing but fail gets a few batches, and no more
  nobody      who waits while no replica can be reached is told so soon
  prompt      with one bad replica, or replicas that come and go beside a good one, answers come within seconds
  denied      bytes that were found to break replicas are refused when they come again
  pace        what nobody takes is not offered again and again without a pause
  reasons     every refusal is one of those documented, and has a cause in the history
  mishap      nothing is raised in a callback, nothing keeps the loop busy
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

from gateway.core.breaker import Breaker, State
from gateway.core.outcome import FailureKind, Sign
from gateway.errors import (
    BackendError,
    Cancelled,
    DeadlineExceeded,
    Draining,
    ModelError,
    NoBackend,
    Overloaded,
    PerhapsExecuted,
    PoisonRequest,
    RetryBudgetExhausted,
)
from gateway.scheduler import NO_BACKEND_S, NO_REMOTE_S, Scheduler
from tests.simulation.histories import History
from tests.simulation.world import Item, Run, ScriptedReplica, World, answer_to

GRACE_S: Final = 0.1
"""After its deadline; a stall of the loop comes on top."""
CANCEL_S: Final = 0.1
MOST_KEPT: Final = 20
"""Violations kept of one history."""
CREDIT_S: Final = 10.0
EPOCH: Final = 1000.0
"""Where the loop's clock starts."""
SINKHOLES: Final = frozenset({"error", "reset", "refuse", "missing"})
STREAK: Final = 5
"""Failures in a row that eject."""
SHORTEST_OPEN_S: Final = 0.8
"""... the first time; twice as long each time after: so many trials fit into a time."""
PROMPT: Final = frozenset({"calm", "one_bad", "dynamic"})
PROMPT_S: Final = 2.0
UNTAKEN: Final = 16
UNTAKEN_S: Final = 0.02
"""So many offers that nobody took need more time than this: pauses are drawn, and grow."""
FAULTLESS: Final = frozenset({Sign.BYSTANDER})

UNWANTED: Final = frozenset({FailureKind.NOT_SENT, FailureKind.OVERLOAD})

DOCUMENTED: Final = (
    BackendError, Cancelled, DeadlineExceeded, Draining, ModelError, NoBackend, Overloaded, PerhapsExecuted,
    PoisonRequest, RetryBudgetExhausted,
)  # fmt: skip
"""What a scheduler of a plain model may say."""


class Violation(NamedTuple):
    at: float
    """Seconds from the start of the history."""
    invariant: str
    text: str

    def __str__(self) -> str:
        return f"{self.invariant} at {self.at:.6f} s: {self.text}"


def charged(run: Run) -> bool:
    """Whether the run ended in a failure of its replica, or of its rows there."""
    kind = run.kind
    if kind is None or kind is FailureKind.CANCELLED or kind is FailureKind.NOT_SENT:
        return False
    return run.sign not in FAULTLESS


def run_slots(runs: list[Run]) -> int:
    """Batches that may have been under way when the first of them failed."""
    return runs[0].replica.plan.slots


def paid_executions(item: Item) -> int:
    """Executions beyond the first that the retry budget has to pay. Quarantine has an allowance of its own, and what
    was not executed because a process died of somebody else's batch is free."""
    paid = 0
    before: Run | None = None
    for run in item.attempts:
        if not run.executed:
            continue
        if before is not None and run.lane not in {"quarantine", "isolated"}:
            paid += before.sign is not Sign.BYSTANDER and before.kind is not FailureKind.CANCELLED
        before = run
    return paid


class Checker:
    """Fits `world.Watch`."""

    def __init__(self, history: History, world: World) -> None:
        self.history = history
        self.world = world
        self.scheduler: Scheduler
        self.violations: list[Violation] = []
        self.waiting_rows = 0
        """Accepted, not settled, not running."""
        self.stalled_s = 0.0
        self.accepted = 0
        self.idempotent = history.resilience.idempotent
        self.closed = False
        """Whether new requests are to be refused."""
        self.condemned: set[int] = set()
        """First nonces of requests that were told that they break replicas."""
        self.hedged = 0
        self.patience_s = NO_BACKEND_S if any(plan.kind == "onnx" for plan in history.replicas) else NO_REMOTE_S
        self.hedges = history.resilience.hedging > 0
        self.most_slots = sum(plan.slots for plan in history.replicas)

    def violated(self, invariant: str, text: str) -> None:
        self.world.note(f"VIOLATION {invariant}: {text}")
        if len(self.violations) < MOST_KEPT:
            self.violations.append(Violation(self.world.loop.now - EPOCH, invariant, text))

    # -- callers -------------------------------------------------------------------------------------------------

    def accepted_one(self, item: Item) -> None:
        self.accepted += 1
        if item.repeats is not None:
            self._denied(item, False)
        item.deadline = item.request.deadline
        self.waiting_rows += item.request.rows
        bound = self.history.policy.max_queue_rows
        if item.arrival.follows:  # it came while the members of a batch are being told, some of them not yet
            bound += self.history.policy.max_batch_size
        if self.waiting_rows > bound:  # those that come back from a failed batch are kept, and keep others out
            self.violated("I6", f"{self.waiting_rows} rows wait with {item} let in; the bound is {bound}")

    def _denied(self, item: Item, refused: bool) -> None:
        """The very bytes that broke replicas are refused unexecuted for a while, and no others."""
        if (item.nonces[0] in self.condemned) is not refused:
            self.violated("denied", f"{item}, which repeats {item.repeats}, was {'' if refused else 'not '}refused")

    def refused(self, item: Item, error: Exception) -> None:
        item.refused = error
        if item.settled:
            self.violated("I1", f"{item} was refused and told something")
        self._reason(item, error)
        if isinstance(error, PoisonRequest):
            self._denied(item, True)

    def settled(self, item: Item) -> None:
        world = self.world
        if world.trace is not None:
            world.note(f"{item} is told {'its answer' if item.error is None else repr(item.error)}")
        if item.settled > 1 or item.refused is not None:
            self.violated("I1", f"{item} was told something {item.settled} times, and refused: {item.refused!r}")
            return
        if item.error is not None:
            self._reason(item, item.error)
            if isinstance(item.error, PoisonRequest):
                self.condemned.add(item.nonces[0])
        elif item.left:
            self.violated("I1", f"{item} was answered although its caller had left")
        elif item.answer() != [answer_to(nonce) for nonce in item.nonces]:
            self.violated("I2", f"{item} was told {item.answer()}")
        self._in_time(item, world.loop.now)

    def _in_time(self, item: Item, now: float) -> None:
        if now - item.deadline > GRACE_S + self.stalled_s:
            self.violated("I1", f"{item} was told {now - item.deadline:.3f} s after its deadline")
        if item.running:
            for run in reversed(item.attempts):
                if run.ended < 0 and all(mate.settled for mate in run.items):
                    run.abandoned_at = now
        else:
            self.waiting_rows -= item.request.rows
            since = item.attempts[-1].ended if item.attempts else item.request.received
            alone_s = now - max(self.world.nobody_since, since)
            if alone_s > self.patience_s + GRACE_S + self.stalled_s:
                self.violated("nobody", f"{item} waited {alone_s:.3f} s although no replica could be reached")

    def _reason(self, item: Item, error: Exception) -> None:
        kind = type(error)
        if kind not in DOCUMENTED:
            self.violated("reasons", f"{item} was told {error!r}")
        elif not self._has_cause(item, kind):
            self.violated("reasons", f"{item} was told {error!r}, for which there is no cause")

    def _has_cause(self, item: Item, kind: type[Exception]) -> bool:
        failed = [run for run in item.attempts if run.kind is not None]
        has = bool(failed)  # BackendError, RetryBudgetExhausted
        if kind is DeadlineExceeded:
            left_s = item.deadline - self.world.loop.now
            # ... or a run took all its time, and what is left is too short for another one.
            has = left_s <= 1e-9 or (left_s < PROMPT_S and any(run.kind is FailureKind.TIMEOUT for run in failed))
        elif kind is Cancelled:
            has = item.left
        elif kind is Draining:
            has = self.closed
        elif kind is NoBackend:
            has = any(replica.faulty or replica.drained or replica.removed for replica in self.world.replicas) or any(
                other.poison in {"crash", "hang"} for other in self.world.items
            )
        elif kind is ModelError:
            has = any(run.sign is Sign.ANSWERED for run in failed) or item.poison == "error"
        elif kind is PoisonRequest:
            has = bool(item.poison) or any(charged(run) and len(run.items) == 1 for run in failed)
        elif kind is Overloaded:
            full = self.waiting_rows + item.request.rows > min(self.history.policy.max_queue_rows, 512)
            has = full or any(run.kind is FailureKind.OVERLOAD for run in failed)
        return has

    # -- replicas ------------------------------------------------------------------------------------------------

    def handed_over(self, run: Run) -> None:
        replica = run.replica
        now = self.world.loop.now
        if not replica.up or len(replica.running) >= replica.plan.slots:
            self.violated("slots", f"{run} was handed over: up {replica.up}, {len(replica.running)} running")
        if not run.items:
            return  # a probe
        if replica.removed or replica.drained:
            self.violated("ejected", f"{run} was handed over after it was drained or removed")
        rows = 0
        for item in run.items:
            rows += item.request.rows
            self._handed_over(run, item, now)
        most = self.history.policy.max_batch_size
        if rows != len(run.nonces) or rows != run.batch.rows or (rows > most and len(run.items) > 1):
            self.violated("I2", f"{run} has {len(run.nonces)} rows of requests with {rows}")
        self._ejected(run)

    def _handed_over(self, run: Run, item: Item, now: float) -> None:
        if item.settled or item.refused is not None:
            self.violated("wasted", f"{run}: {item} is over")
        elif item.deadline <= now and not run.lane:
            self.violated("wasted", f"{run}: the deadline of {item} has passed")
        if item.running:
            self.hedged += 1
            if not self.hedges or item.running > 1:
                self.violated("wasted", f"{run}: {item} is running already")
        if item.attempts:
            self._again(run, item, now)
        if not item.running and not item.settled:
            self.waiting_rows -= item.request.rows
        item.running += 1
        item.attempts.append(run)

    def _again(self, run: Run, item: Item, now: float) -> None:
        """`item` was handed over before."""
        executed = [before for before in item.attempts if before.executed]
        if item.arrival.sequence:  # a worker keeps no state between the steps
            once = [before for before in executed if before.replica.remote or not self.idempotent]
        else:
            once = [] if self.idempotent else executed
        if once:
            self.violated("I3", f"{run}: {item} may have been executed by {once[-1]!r}")
        if len(item.attempts) >= UNTAKEN:
            lately = item.attempts[-UNTAKEN:]
            if now - lately[0].begun < UNTAKEN_S and all(before.kind in UNWANTED for before in lately):
                self.violated("pace", f"{run}: {item} was refused {UNTAKEN} times in {now - lately[0].begun:.6f} s")
        if run.replica in [before.replica for before in item.attempts if self._failed_there(before)]:
            tried = [before.replica for before in item.attempts]
            other = next((other for other in self.world.replicas if other not in tried and self.usable(other)), None)
            if other is not None and not item.arrival.sequence:  # whose state is where it was begun
                self.violated("avoid", f"{run}: {item} failed there before, and {other.name} is usable")

    def _failed_there(self, run: Run) -> bool:
        """What a worker's model refuses, every other one of the same build refuses too: those may run there again."""
        return charged(run) and not (run.kind is FailureKind.SUSPECT and not run.replica.remote)

    def usable(self, replica: ScriptedReplica) -> bool:
        """In service without reservations, as far as the gateway can know."""
        if not replica.up or replica.removed or replica.drained:
            return False
        breaker = self.breaker(replica)
        return breaker is not None and breaker.state is State.CLOSED and breaker.blocked_until <= self.world.loop.now

    def breaker(self, replica: ScriptedReplica) -> Breaker | None:
        """The breaker as the gateway has it; None: not a member."""
        for member in self.scheduler.fleets[0].members:
            if member.replica is replica:
                return member.breaker
        return None

    def _ejected(self, run: Run) -> None:
        breaker = self.breaker(run.replica)
        if breaker is not None and breaker.state is State.OPEN and not self.scheduler.fleets[0].panic:
            self.violated("ejected", f"{run} was handed over while its breaker is open")

    def ended(self, run: Run) -> None:
        if self.world.trace is not None:
            how = "answered" if run.kind is None else f"{run.kind.value}/{run.sign.value}"
            self.world.note(f"{run!r}: {how}")
        for item in run.items:
            item.running -= 1
            if not item.running and not item.settled:
                self.waiting_rows += item.request.rows
        if run.abandoned_at >= 0 and not run.cancelled and run.ended - run.abandoned_at > CANCEL_S + self.stalled_s:
            self.violated("abandoned", f"{run} went on for {run.ended - run.abandoned_at:.3f} s for nobody")

    def cancelled(self, run: Run) -> None:
        if self.world.trace is not None:
            self.world.note(f"{run!r}: cancelled by the gateway")
        now = self.world.loop.now
        if not self.hedges and not all(item.settled or item.left or item.deadline <= now for item in run.items):
            self.violated("answered", f"{run} was cancelled while somebody waits for it")

    # -- at the end ----------------------------------------------------------------------------------------------

    def over(self) -> None:
        """Everything has come to rest."""
        for item in self.world.items:
            if item.refused is None and item.settled != 1:
                self.violated("I1", f"{item} was told something {item.settled} times")
        self._promises()
        self._sinkhole()
        self._budget()
        self._baseline()

    def _promises(self) -> None:
        promise = self.history.promise
        if promise.answered:
            for item in self.world.items:
                error = item.error or item.refused
                hurried = item.arrival.timeout_s and isinstance(error, DeadlineExceeded)
                if error is not None and not item.left and not item.poison and not hurried:
                    self.violated("answered", f"{item} was told {error!r}")
                took_s = item.settled_at - item.request.received
                if error is None and self.history.theme in PROMPT and took_s > PROMPT_S:
                    self.violated("prompt", f"{item} waited {took_s:.3f} s for its answer")
        if promise.calm:
            for member in self.scheduler.fleets[0].statistics(self.world.loop.now).members:
                if member.trips or member.state != "closed":
                    self.violated("calm", f"{member.name}: {member.trips} trips, {member.state}")

    def _sinkhole(self) -> None:
        """Holds where the guard does not: one bad replica, and nobody ordered anything."""
        if self.history.theme != "one_bad":
            return
        changes = self.history.changes
        for change, following in zip(changes, [*changes[1:], None], strict=True):
            if change.what not in SINKHOLES:
                continue
            end = following.at if following is not None else math.inf
            begun = [run for run in self.world.runs if run.items and run.replica.place == change.place]
            begun = [run for run in begun if change.at + EPOCH <= run.begun < end + EPOCH and run.kind is not None]
            if not begun:
                continue
            lasted_s = begun[-1].begun - begun[0].begun
            bound = STREAK + run_slots(begun) + math.log2(1.0 + lasted_s / SHORTEST_OPEN_S)
            if len(begun) > bound:
                self.violated(
                    "sinkhole",
                    f"{begun[0].replica.name} got {len(begun)} batches in {lasted_s:.3f} s of '{change.what}'",
                )

    def healed(self, latest: list[Item]) -> None:
        """Callers came one by one while everything was well."""
        for item in latest:
            error = item.error or item.refused
            if error is not None or not item.settled:
                self.violated("heals", f"{item} was told {error!r}")
        for replica in self.world.replicas:
            breaker = self.breaker(replica)
            if breaker is not None and not self.usable(replica):
                self.violated("heals", f"{replica.name}: up {replica.up}, {breaker!r}")
        if self.scheduler.fleets[0].panic:
            self.violated("heals", "panic")

    def _budget(self) -> None:
        resilience, policy = self.history.resilience, self.history.policy
        floor = max(100, 2 * policy.max_batch_size * self.most_slots)
        last = max([run.begun for run in self.world.runs], default=EPOCH)
        bound = floor * (1 + (last - EPOCH) / CREDIT_S) + resilience.retry_budget * self.accepted
        repeated = sum(map(paid_executions, self.world.items))
        if repeated > bound:
            self.violated("I4", f"{repeated} repeated executions of {self.accepted} requests; {bound:.0f} may be")

    def _baseline(self) -> None:
        scheduler, loop = self.scheduler, self.world.loop
        left: dict[str, Any] = {
            "pending": scheduler.pending,
            "waiting": sum(scheduler.waiting),
            "running": scheduler.dispatchers[0].running,
            "in the lanes": scheduler.dispatchers[0].lanes.count,
            "on replicas": sum(len(replica.running) for replica in self.world.replicas),
            "timers": loop.timers,
            "rows waiting, as counted here": self.waiting_rows,
        }
        for member in scheduler.fleets[0].members:
            left[f"batches of {member.name}, as the fleet counts them"] = member.batches
            left[f"rows of {member.name}, as the fleet counts them"] = member.rows_in_flight
        remaining = {what: count for what, count in left.items() if count}
        if remaining:
            self.violated("I5", f"at the end there are {remaining}")
        for mishap in loop.mishaps:
            self.violated("mishap", mishap)
