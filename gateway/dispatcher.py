"""One batch from its members to their outcome: route, execute, check; on failure decide who runs again and how.

The dispatcher never completes a caller: it hands outcomes to its `Owner` (the scheduler), which does. Rules:
`core/routing.py` says where, `core/retry.py` says what a failure means. Members isolated after a failure (halves,
singles) wait in a lane of their own, served before the queue and never mixed with anyone else.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from gateway.backends.interface import Replica
from gateway.core import assembly
from gateway.core.batch import FinishedBatch
from gateway.core.batching import Reason
from gateway.core.model import ModelSpec
from gateway.core.outcome import Failure, FailureKind, Success
from gateway.core.ragged import Ragged
from gateway.core.request import SETTLED, BatchInput, InferRequest, SequenceStep
from gateway.core.retry import FailedBatch, Verdict, after_failure, counts
from gateway.core.routing import route
from gateway.errors import BackendError, GatewayError, ModelError
from gateway.observe.record import ModelStatistics

log = logging.getLogger("gateway.dispatch")

ATTEMPT_TIMEOUT_FLOOR_S: Final = 5.0
"""Below this no attempt is given up: a machine that pauses for a second is not a hung model."""
ATTEMPT_TIMEOUT_FACTOR: Final = 10.0
"""... times the longest run seen, for its rows: peak-sensitive and slowly forgotten. Before any run was seen, the
members' deadlines bound it."""
PEAK_DECAY: Final = 0.99
LOG_INTERVAL_S: Final = 1.0
RUN_WEIGHT: Final = 0.1
"""Share of the newest batch in the mean run time."""

NO_PARAMETERS: Final[Mapping[str, object]] = {}

_PROCESS_TAG: Final = os.urandom(2).hex()
_BATCH_NUMBERS: Final = itertools.count(1)
"""One sequence for all models: a batch id names one batch of this process."""


class Owner(Protocol):
    """Who asked for the batch and completes its members."""

    def batch_succeeded(self, members: list[InferRequest], batch: FinishedBatch) -> None: ...
    def batch_failed(self, members: list[InferRequest], error: GatewayError) -> None: ...
    def call_soon(self, callback: Callable[..., None], *arguments: object) -> object: ...
    def batch_returned(self, members: list[InferRequest], taken: bool) -> None:
        """`members` wait again, and so may others in the isolated lane; `taken`: the replica did take the batch."""


class RunningBatch:
    """A batch on its way; fits `backends.interface.Batch`."""

    __slots__ = (
        "attempt", "backend", "deadline", "dispatched", "dispatcher", "inputs", "isolated", "members", "outputs",
        "parameters", "reason", "rows", "sequence",
    )  # fmt: skip

    def __init__(
        self, dispatcher: Dispatcher, members: list[InferRequest], rows: int, reason: Reason, replica: Replica
    ) -> None:
        self.dispatcher = dispatcher
        self.members = members
        self.rows = rows
        self.reason = reason
        self.backend = replica.name
        """Who executes it. The replica may move to another worker, and be named after it, while the batch runs."""
        self.outputs = members[0].outputs
        self.inputs: Sequence[BatchInput] = ()
        self.dispatched = 0.0
        self.deadline = math.inf
        self.sequence: SequenceStep | None = None
        self.parameters: Mapping[str, object] = NO_PARAMETERS
        self.attempt = 0
        self.isolated = False
        """Its members run by themselves: not even a rerun mixes them with others."""

    def done(self, outcome: Success | Failure, /) -> None:
        self.dispatcher.batch_done(self, outcome)


class Dispatcher:
    """Executes the batches of one model version on its replicas."""

    def __init__(
        self,
        spec: ModelSpec,
        replicas: Sequence[Replica],
        statistics: ModelStatistics,
        clock: Callable[[], float],
        owner: Owner,
        row_s: float = 0.0,
    ) -> None:
        """`row_s`: seconds a row took on trial, 0.0 if nobody knows."""
        self.spec = spec
        self.replicas = replicas
        self.statistics = statistics
        self.execute_s = row_s
        """The longest recent run, seconds: peak-sensitive, slowly decaying."""
        self.last_dispatched = 0.0
        """When the newest batch was sent, monotonic seconds."""
        self._row_s = row_s
        """Like `execute_s`, per row."""
        self.run_s = float("inf")
        """Seconds that batches spend inside the backend: a moving mean; infinite before the first."""
        self.running = 0
        self._logged = float("-inf")
        self._owner = owner
        self._now = clock
        self._turn = 0
        self._isolated: deque[list[InferRequest]] = deque()
        self._ragged = Ragged.of(spec)

    def free_replica(self, avoid: str | None = None) -> Replica | None:
        return route(self.replicas, self._turn, avoid)

    @property
    def isolated(self) -> int:
        """Groups of members waiting to run by themselves."""
        return len(self._isolated)

    def isolated_members(self) -> list[InferRequest]:
        """Everyone who waits to run by itself."""
        return [member for members in self._isolated for member in members if member.state != SETTLED]

    def next_isolated(self) -> list[InferRequest] | None:
        """The next members to run by themselves, without those who left meanwhile."""
        while self._isolated:
            members = [member for member in self._isolated.popleft() if member.state != SETTLED]
            if members:
                return members
        return None

    def dispatch(self, members: list[InferRequest], reason: Reason, replica: Replica, isolated: bool = False) -> None:
        """Execute `members` (equal keys, not settled) on `replica`, which has a free slot."""
        rows = attempt = 0
        for member in members:
            rows += member.rows
            member.attempt += 1
            attempt = max(attempt, member.attempt)
        batch = RunningBatch(self, members, rows, reason, replica)
        batch.dispatched = self.last_dispatched = now = self._now()
        batch.attempt = attempt
        batch.isolated = isolated
        self._turn += 1
        self.running += 1
        try:
            ragged = self._ragged
            batch.inputs = (
                assembly.concat(members, rows, self.spec.batched) if ragged is None else ragged.concat(members, rows)
            )
            replica.execute(batch, self._timeout_s(batch, now))
        except Exception as error:
            # Whatever it was, these members get an outcome, and the model goes on.
            log.exception("model %s: a batch could not be put together", self.spec.name)
            failure = Failure(FailureKind.SUSPECT, f"the batch could not be put together ({type(error).__name__})")
            self._owner.call_soon(batch.done, failure)

    def _timeout_s(self, batch: RunningBatch, now: float) -> float:
        if not self.execute_s:
            return max(ATTEMPT_TIMEOUT_FLOOR_S, max([member.deadline for member in batch.members]) - now)
        longest = max(self.execute_s, self._row_s * batch.rows)
        return max(ATTEMPT_TIMEOUT_FLOOR_S, ATTEMPT_TIMEOUT_FACTOR * longest)

    def batch_done(self, batch: RunningBatch, outcome: Success | Failure) -> None:
        self.running -= 1
        if isinstance(outcome, Success):
            outcome = self._checked(batch, outcome)
        if isinstance(outcome, Success):
            self._succeeded(batch, outcome)
        else:
            self._failed(batch, outcome)

    def _checked(self, batch: RunningBatch, answer: Success) -> Success | Failure:
        """The answer, if it is the batch's; of a ragged batch the requests' own shapes may be why it is not."""
        outputs, kind = list(answer.outputs), FailureKind.BROKEN
        try:
            if self._ragged is None:
                assembly.check_outputs(self.spec, batch.outputs, batch.rows, outputs)
            else:
                kind = FailureKind.SUSPECT
                self._ragged.check_outputs(batch.members, batch.outputs, batch.rows, outputs)
        except assembly.AssemblyError as error:
            return Failure(kind, f"the backend's answer failed its checks: {error}")
        return answer

    def _succeeded(self, batch: RunningBatch, outcome: Success) -> None:
        now = self._now()
        execute_s = now - batch.dispatched
        self.execute_s = max(execute_s, self.execute_s * PEAK_DECAY)
        self._row_s = max(execute_s / batch.rows, self._row_s * PEAK_DECAY)
        spent_s = (outcome.compute_input_ns + outcome.compute_infer_ns + outcome.compute_output_ns) / 1e9
        self.run_s = spent_s if math.isinf(self.run_s) else self.run_s + RUN_WEIGHT * (spent_s - self.run_s)
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
        if self._ragged is not None:
            finished.own = self._ragged.answers(batch.members, finished)
        self._owner.batch_succeeded(batch.members, finished)

    def _failed(self, batch: RunningBatch, failure: Failure) -> None:
        self.statistics.attempt(batch.backend, failure.kind.value)
        members = [member for member in batch.members if member.state != SETTLED]
        if not members:
            self._owner.batch_returned([], True)
            return
        taken = failure.kind not in (FailureKind.NOT_SENT, FailureKind.OVERLOAD)
        if not taken:
            for member in members:
                member.attempt -= 1  # nothing was executed
        broken = int(counts(failure.kind))
        for member in members:
            member.avoid = batch.backend
            member.broken += broken
        most = max([member.broken for member in members])
        verdict = after_failure(FailedBatch(len(members), most, failure.kind))
        # One line a second is enough to know; input that the model refuses must not fill a disk.
        now = self._now()
        loud = taken and now - self._logged >= LOG_INTERVAL_S
        self._logged = now if loud else self._logged
        log.log(
            logging.INFO if loud else logging.DEBUG,
            "model %s: batch of %d requests on %s failed (%s: %s): %s",
            self.spec.name, len(members), batch.backend, failure.kind.value, failure.message, verdict.value,
        )  # fmt: skip
        self._carry_out(verdict, members, batch.isolated, failure, taken)

    def _carry_out(
        self, verdict: Verdict, members: list[InferRequest], isolated: bool, failure: Failure, taken: bool
    ) -> None:
        if verdict is Verdict.FAIL_MODEL:
            self._owner.batch_failed(members, ModelError(f"model '{self.spec.name}' failed: {failure.message}"))
            return
        if verdict is Verdict.FAIL_BACKEND:
            self._owner.batch_failed(
                members, BackendError(f"model '{self.spec.name}': every attempt failed, the last: {failure.message}")
            )
            return
        if taken:
            self.statistics.retry(len(members))
        if verdict is Verdict.HALVE:
            middle = (len(members) + 1) // 2
            self._isolated += [members[:middle], members[middle:]]
        elif verdict is Verdict.SINGLES:
            self._isolated += [[member] for member in members]
        elif isolated:
            self._isolated.appendleft(members)
        self._owner.batch_returned(members if verdict is Verdict.REQUEUE and not isolated else [], taken)
