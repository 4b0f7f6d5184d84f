"""What becomes of the members of a batch that failed: `core/retry.py` decides, this file carries it out.

Rules:
  * every member is remembered with the replicas that failed it, and goes back to none of them while there are others;
  * whoever is to run again waits in a lane (dispatcher_lanes.py), never in the queue;
  * a repeated execution is paid from the model's retry budget; short of credit, the highest priority goes first, then
    the earliest deadline, and the rest are told so. What was never executed is free, and quarantine has an allowance
    of its own;
  * who was given up on (TIMEOUT) is not tried again if even the fastest replica would need longer than there is time;
  * a first retry goes at once. What no backend took while there is no other to ask goes after a pause with full jitter:
    a backend that takes nothing must not keep the loop busy.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterable
from typing import Final

from gateway.core.fleet import Fleet, Member
from gateway.core.model import ModelSpec
from gateway.core.outcome import Failure, FailureKind, Sign
from gateway.core.poison import CrashWatch, Denylist, OutageWatch, QuarantineAllowance, fingerprint
from gateway.core.request import SETTLED, InferRequest
from gateway.core.retry import DIED, FailedBatch, Verdict, after_failure, counts, needs_budget, pause_s, ran
from gateway.core.retry import Lane as Origin
from gateway.core.retry_budget import RetryBudget
from gateway.dispatcher_batch import Owner, RunningBatch
from gateway.dispatcher_lanes import Lane, Lanes, trouble_of
from gateway.errors import (
    BackendError,
    DeadlineExceeded,
    GatewayError,
    ModelError,
    Overloaded,
    PerhapsExecuted,
    PoisonRequest,
    RetryBudgetExhausted,
)
from gateway.observe.record import ModelStatistics

log = logging.getLogger("gateway.dispatch")

LOG_INTERVAL_S: Final = 1.0
SILENCES: Final = 2
DOUBT_S: Final = 0.5
"""Longer than it takes to find out that a server does not accept connections any more."""
NEAR_S: Final = 0.002
"""Resolution of timers: what is due within it is due."""
_KEY: Final = os.urandom(32)

ORIGIN: Final[dict[Lane | None, Origin]] = {
    None: Origin.CLEAN,
    Lane.SEQUENCE: Origin.CLEAN,
    Lane.RETRY: Origin.RETRY,
    Lane.ISOLATED: Origin.QUARANTINE,
    Lane.QUARANTINE: Origin.QUARANTINE,
}
"""How `core/retry.py` calls the place a batch came from."""


class Failures:
    """Of one model version."""

    def __init__(
        self,
        spec: ModelSpec,
        fleet: Fleet,
        lanes: Lanes,
        budget: RetryBudget,
        statistics: ModelStatistics,
        owner: Owner,
        rng: random.Random,
    ) -> None:
        self.allowance = QuarantineAllowance()
        self.crashes = CrashWatch()
        self.outage = OutageWatch()
        self.denylist = Denylist()
        self.denies = False
        """Whether the denylist may hold anything: spares every request the question while it does not."""
        self._spec = spec
        self._fleet = fleet
        self._lanes = lanes
        self._budget = budget
        self._statistics = statistics
        self._owner = owner
        self._rng = rng
        self._logged = float("-inf")

    def denied(self, request: InferRequest, now: float) -> bool:
        """Whether it was found to break backends by itself lately."""
        hit = self.denylist.denied(fingerprint(_KEY, self._spec.name, self._spec.version, request), now)
        self.denies = len(self.denylist) > 0
        if hit:
            self._statistics.poison()
        return hit

    def watch(self, batch: RunningBatch, failure: Failure, now: float) -> None:
        """An attempt failed, whether or not that is its members' outcome."""
        if ran(failure.kind) and failure.kind is not FailureKind.CANCELLED:
            self.outage.failed()
            if failure.sign in DIED or (
                failure.kind is FailureKind.TIMEOUT and batch.replica.traits.kind == "onnx"  # it has to be killed
            ):
                self.crashes.crashed(now)

    def handle(self, batch: RunningBatch, failure: Failure, now: float) -> None:
        """Decide on the members of `batch` who still wait, and tell the owner that it is over."""
        members = batch.alive
        if failure.kind is FailureKind.CANCELLED:
            members = self._in_time(members, 0.0, now)
        if not members:
            self._owner.batch_returned()
            return
        for twin, earlier in batch.failed_twins:
            self._remember(twin, members, earlier)
        self._remember(batch, members, failure)
        batch, failure = _decisive(batch, failure)
        case = self._case(batch, members, failure, now)
        verdict = after_failure(case)
        self._log(batch, members, failure, verdict, now)
        error = self._final_error(verdict, failure, case)
        if error is not None:
            if verdict is Verdict.POISON:
                self._condemn(members, now)
            self._owner.batch_failed(members, error)
            return
        self._again(batch, members, failure, verdict, now)
        self._owner.batch_returned()

    @staticmethod
    def _remember(batch: RunningBatch, members: list[InferRequest], failure: Failure) -> None:
        replica = batch.member
        taken = ran(failure.kind)
        broken = int(counts(failure.kind, failure.sign))
        # What a worker says of the input, every worker would say.
        same_everywhere = failure.kind is FailureKind.SUSPECT and replica.kind == "onnx"
        alone = len(batch.members) == 1 and not _blameless(failure)
        for request in members:
            request.avoid = batch.backend
            trouble = trouble_of(request)
            if replica not in trouble.tried and not same_everywhere:
                trouble.tried = (*trouble.tried, replica)
            if alone and replica not in trouble.alone:
                trouble.alone = (*trouble.alone, replica)
            trouble.broken += broken
            trouble.refused = trouble.refused + 1 if _blameless(failure) else 0
            if not taken:
                request.attempt -= 1

    def _case(self, batch: RunningBatch, members: list[InferRequest], failure: Failure, now: float) -> FailedBatch:
        resilience = self._spec.resilience
        remote = batch.member.kind == "oip"
        troubles = [trouble_of(request) for request in members]
        return FailedBatch(
            len(batch.members),  # those who left were executed too: who is left was not alone
            max([trouble.broken for trouble in troubles]),
            failure.kind,
            failure.sign,
            not remote,
            ORIGIN[batch.lane],
            max([len(trouble.alone) for trouble in troubles]),
            # Who was alone has to fail alone elsewhere before it is its own fault, wherever it was in company before.
            self._fleet.others(now, troubles[0].alone if len(batch.members) == 1 else _tried(members)),
            resilience.idempotent and not (remote and members[0].sequence is not None),
            resilience.max_attempts,
            self.crashes.alone(now),
            self.outage.outage,
        )

    def _final_error(self, verdict: Verdict, failure: Failure, case: FailedBatch) -> GatewayError | None:
        name = self._spec.name
        if verdict is Verdict.FAIL_MODEL:
            # Where nobody else's rows were in the batch, what a server says of its input is about this one's.
            return ModelError(f"model '{name}' failed: {failure.in_full if case.members == 1 else failure.message}")
        if verdict is Verdict.FAIL_BACKEND:
            if case.idempotent:
                return BackendError(f"model '{name}': every attempt failed, the last: {failure.message}")
            why = "" if self._spec.resilience.idempotent else " (idempotent: false)"
            return PerhapsExecuted(
                f"model '{name}': an attempt failed, and what may have run is not sent again{why}: {failure.message}"
            )
        if verdict is Verdict.FAIL_OVERLOADED:
            return Overloaded(f"model '{name}': its backends have too much to do: {failure.message}; retry later")
        if verdict is Verdict.POISON:
            return PoisonRequest(
                f"model '{name}' failed on this input alone, wherever it was executed, the last time: {failure.message}"
            )
        return None

    def _condemn(self, members: list[InferRequest], now: float) -> None:
        self._statistics.poison(len(members))
        if self._spec.resilience.poison_denylist:
            for request in members:
                self.denylist.deny(fingerprint(_KEY, self._spec.name, self._spec.version, request), now)
            self.denies = True

    # -- another attempt -------------------------------------------------------------------------------------------

    def _again(
        self, batch: RunningBatch, members: list[InferRequest], failure: Failure, verdict: Verdict, now: float
    ) -> None:
        if failure.kind is FailureKind.TIMEOUT:
            members = self._in_time(members, self._fleet.soonest_s(batch.rows, now), now)
        if members and needs_budget(verdict, failure.kind):
            members = self._affordable(members, now)
        if not members:
            return
        taken = ran(failure.kind)
        if taken:
            self._statistics.retry(len(members))
        calm = _blameless(failure)
        pause = self._pause_until(batch, members, now) if calm else _doubt_until(batch, members, failure, now)
        lanes = self._lanes
        if batch.lane is Lane.SEQUENCE:
            lanes.park(members[0], batch.place, pause, first=True)
        elif verdict is Verdict.HALVE:
            polite = failure.kind is FailureKind.SUSPECT and batch.member.kind == "onnx"
            lane = Lane.ISOLATED if polite and batch.lane is not Lane.QUARANTINE else Lane.QUARANTINE
            middle = (len(members) + 1) // 2
            for half in filter(None, (members[:middle], members[middle:])):
                lanes.isolate(lane, half, _tried(half))
        elif verdict is Verdict.SINGLES:
            for request in members:
                lanes.isolate(Lane.QUARANTINE, [request], trouble_of(request).tried)
        elif verdict is Verdict.QUARANTINE or batch.isolated:
            lane = batch.lane if calm and batch.lane is not None else Lane.QUARANTINE
            # Whoever refused politely is to blame if the same rows succeed elsewhere; the rest was counted already.
            suspects = batch.suspects if calm else batch.member if failure.kind is FailureKind.SUSPECT else None
            if len(members) < len(batch.members):
                suspects = None
            lanes.isolate(lane, members, _tried(members), suspects=suspects, not_before=pause, first=calm)
        else:
            lanes.retry(members, now, pause)

    def _pause_until(self, batch: RunningBatch, members: list[InferRequest], now: float) -> float:
        """When to offer `members` again who were not taken; 0.0: at once, there is another one to ask. A step of a
        sequence belongs to one replica, and asks that one again for as long as it can be asked."""
        bound = batch.lane is Lane.SEQUENCE and self._fleet.usable(batch.member, now)
        if not bound and self._fleet.others(now, _tried(members)):
            return 0.0
        return now + pause_s(max([trouble_of(request).refused for request in members]), self._rng)

    def _affordable(self, members: list[InferRequest], now: float) -> list[InferRequest]:
        """Those who are paid for; the others are told."""
        if self._budget.withdraw(len(members), now):
            return members
        default = self._spec.scheduling.default_priority_level
        by_rank = sorted(members, key=lambda request: (request.priority or default, request.deadline))
        count = min(int(self._budget.available(now)), len(members) - 1)
        if count and not self._budget.withdraw(count, now):
            count = 0
        chosen = {id(request) for request in by_rank[:count]}
        error = RetryBudgetExhausted(
            f"model '{self._spec.name}': an attempt failed, and too many are being repeated already to repeat this one"
        )
        self._owner.batch_failed(by_rank[count:], error)
        # The answer to one may have made another leave.
        return [request for request in members if id(request) in chosen and request.state != SETTLED]

    def _in_time(self, members: list[InferRequest], needed_s: float, now: float) -> list[InferRequest]:
        """Those whose deadline leaves that long; the others are told."""
        bound = now + max(needed_s, NEAR_S)
        late = [request for request in members if request.deadline < bound]
        if not late:
            return members
        text = f"Request timeout expired while model '{self._spec.name}' ran: no time is left for another attempt"
        self._owner.batch_failed(late, DeadlineExceeded(text))
        return [request for request in members if request.state != SETTLED]

    def _log(
        self, batch: RunningBatch, members: list[InferRequest], failure: Failure, verdict: Verdict, now: float
    ) -> None:
        # One line a second is enough to know; input that the model refuses must not fill a disk.
        loud = ran(failure.kind) and now - self._logged >= LOG_INTERVAL_S
        self._logged = now if loud else self._logged
        log.log(
            logging.INFO if loud else logging.DEBUG,
            "model %s: batch of %d request%s on %s failed (%s: %s): %s",
            self._spec.name, len(members), "" if len(members) == 1 else "s", batch.backend,
            failure.kind.value, failure.in_full, verdict.value,
        )  # fmt: skip


def _doubt_until(batch: RunningBatch, members: list[InferRequest], failure: Failure, now: float) -> float:
    """When a lone request may be tried once more whose attempts on remote servers ended in silence again; 0.0: at once.

    Servers that die together must have been noticed by then: their deaths are no proof against who was there.
    """
    silent = batch.member.kind == "oip" and failure.kind is FailureKind.BROKEN and failure.sign is Sign.NONE
    if not silent or len(members) > 1 or trouble_of(members[0]).broken < SILENCES:
        return 0.0
    return now + min(DOUBT_S, (members[0].deadline - now) / 2.0)


def _decisive(batch: RunningBatch, failure: Failure) -> tuple[RunningBatch, Failure]:
    """Of a batch and its twins, the last failure that means something for the members, and whose it was."""
    failures = [*batch.failed_twins, (batch, failure)]
    return next((found for found in reversed(failures) if not _blameless(found[1])), failures[-1])


def _blameless(failure: Failure) -> bool:
    """Whether the members have nothing to do with it: nothing ran, or it was ended for other reasons. As often as it
    takes then, but with pauses."""
    return not ran(failure.kind) or failure.sign is Sign.BYSTANDER or failure.kind is FailureKind.CANCELLED


def _tried(members: Iterable[InferRequest]) -> tuple[Member, ...]:
    """Every replica that failed any of them, each once."""
    found: dict[Member, None] = {}
    for request in members:
        found.update(dict.fromkeys(trouble_of(request).tried))
    return tuple(found)
