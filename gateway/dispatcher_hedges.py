"""The second, simultaneous attempt of a batch that is late: sent to an idle replica, and the first answer wins.

Whether a batch may be hedged is decided in core/hedging.py; here it is carried out. The twin has the members who still
wait.
Rules: the first answer is everybody's, the other attempt is cancelled and told nobody; while one of the two is under
way, a failure of the other is nobody's; if both fail, both replicas have failed these rows. Only batches from the queue
are hedged, and no steps of sequences: whoever waited in a lane had a second attempt already, and a step is executed
once.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.core.fleet import Fleet, Member, State
from gateway.core.hedging import Hedge, HedgeShare, Later, RunningAttempt, Surroundings, may_hedge
from gateway.core.outcome import Failure, FailureKind
from gateway.core.resilience import Resilience
from gateway.core.retry_budget import RetryBudget
from gateway.dispatcher_batch import RunningBatch
from gateway.observe.record import ModelStatistics


class Hedges:
    """Of one model version."""

    def __init__(
        self,
        resilience: Resilience,
        fleet: Fleet,
        budget: RetryBudget,
        statistics: ModelStatistics,
        execute: Callable[[RunningBatch, float], None],
    ) -> None:
        """`execute`: hands a batch to its replica."""
        self.share = HedgeShare(resilience.hedging)
        self._resilience = resilience
        self._fleet = fleet
        self._budget = budget
        self._statistics = statistics
        self._execute = execute
        self._watched: dict[RunningBatch, None] = {}
        """Batches under way that may still be hedged, oldest first."""

    def began(self, batch: RunningBatch) -> None:
        """A batch from the queue was sent."""
        self.share.deposit(len(batch.members))
        if batch.members[0].sequence is None:
            self._watched[batch] = None

    def over(self, batch: RunningBatch) -> None:
        self._watched.pop(batch, None)

    def send(self, now: float, waiting: bool) -> float | None:
        """Send the twins that are due. Returns when to look again. `waiting`: whether anybody waits for a replica."""
        wake: float | None = None
        for batch in [*self._watched]:
            other = self._idle(batch, now)
            decision = may_hedge(self._attempt(batch, other), self._around(other, waiting, now), self.share, now)
            if isinstance(decision, Later):
                wake = decision.instant if wake is None else min(wake, decision.instant)
                continue
            del self._watched[batch]
            if isinstance(decision, Hedge) and other is not None and self._budget.withdraw(len(batch.alive), now):
                self._send(batch, other, now)
        return wake

    def _send(self, batch: RunningBatch, other: Member, now: float) -> None:
        members = batch.alive
        self.share.spend(len(members))
        twin = RunningBatch(batch.sender, members, sum([request.rows for request in members]), batch.reason, other)
        twin.deadline, twin.attempt = batch.deadline, batch.attempt + 1
        twin.second = True
        batch.twin, twin.twin = twin, batch
        for request in members:
            request.attempt += 1
        self._execute(twin, now)

    def first(self, batch: RunningBatch, twin: RunningBatch) -> None:
        """`batch` was answered while its twin was still under way: whatever that comes to is told nobody."""
        twin.over = True
        self._statistics.hedge("won" if batch.second else "lost")

    def failed(self, batch: RunningBatch, twin: RunningBatch, failure: Failure) -> None:
        """`batch` failed while its twin is still under way: nothing is lost yet."""
        twin.failed_twins = (*twin.failed_twins, (batch, failure))
        same_rows = batch.rows == twin.rows
        if failure.kind is FailureKind.SUSPECT and batch.member.kind == "oip" and same_rows:
            twin.suspects = batch.member
        if batch.second:
            self._statistics.hedge("failed")

    def _idle(self, batch: RunningBatch, now: float) -> Member | None:
        other = self._fleet.choose(now, batch.rows, (batch.member,))
        return other if other is not None and not other.replica.in_flight else None

    def _attempt(self, batch: RunningBatch, other: Member | None) -> RunningAttempt:
        return RunningAttempt(
            len(batch.alive),
            batch.dispatched,
            batch.deadline,
            batch.member.time.p95_s(batch.rows),
            other.time.predict_s(batch.rows) if other is not None else 0.0,
            batch.attempt,
            batch.twin is not None or batch.cancelled,
        )

    def _around(self, other: Member | None, waiting: bool, now: float) -> Surroundings:
        return Surroundings(
            self._resilience.idempotent,
            self._resilience.max_attempts,
            other is not None,
            waiting,
            all(member.breaker.state in (State.CLOSED, State.PINNED) for member in self._fleet.members),
            self._budget.available(now),
        )
