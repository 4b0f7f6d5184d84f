"""Redundancy made measurable: a share of the batches is executed a second time, elsewhere, and the answers compared.

Opt-in per model (`agreement_percent`). What an answer must be like to agree is `core/agreement.py`'s to say. Rules:
  * callers pay nothing: they have the first answer, and the second run takes a slot only where nobody waits, the other
    backend is idle, and a slot stays free for whoever comes next;
  * "elsewhere" is another kind of backend or another server: two workers run the same file, and agree by construction;
  * only rows that may be executed twice, and batches of a plain form: no sequences, no ragged inputs, no model that is
    not idempotent;
  * the inputs are copied while they are still whole, at most `MAX_BYTES` of them, and one batch per model version is
    compared at a time: memory is bounded. What was drawn and could not be run is counted as skipped.
A disagreement is counted each time and told to the log once a minute.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from gateway.catalog import ServedVersion
from gateway.core.agreement import Agreement, AgreementStatistics, Difference, compare
from gateway.core.assembly import AssemblyError, check_outputs, write_parts
from gateway.core.fleet import Fleet, Member
from gateway.core.model import ModelSpec
from gateway.core.outcome import Failure, Success
from gateway.core.ragged import Ragged
from gateway.core.request import NO_PARAMETERS, BatchInput, InputTensor, SequenceStep
from gateway.dispatcher import RunningBatch
from gateway.scheduler import Scheduler

log = logging.getLogger("gateway.agreement")

MAX_BYTES: Final = 4 * 1024 * 1024
"""Of inputs that are copied for a second run, about a millisecond, and of the outputs that are kept for it."""
TIMEOUT_S: Final = 30.0
LOG_INTERVAL_S: Final = 60.0
MAX_TOLD: Final = 4
"""Outputs named in one line of the log."""


class Chance(Protocol):
    """`random.Random` fits."""

    def random(self) -> float: ...


class _Again:
    """A copy of a batch that was executed; fits `backends.interface.Batch`. Nobody waits for its answer."""

    __slots__ = ("deadline", "first", "inputs", "outputs", "over", "parameters", "rows", "sequence")

    def __init__(self, batch: RunningBatch, first: Success, over: Callable[[_Again, Success | Failure], None]) -> None:
        self.inputs = [_copied(one) for one in batch.inputs]
        self.outputs = batch.outputs
        self.rows = batch.rows
        self.deadline = math.inf
        self.sequence: SequenceStep | None = None
        self.parameters: Mapping[str, object] = batch.parameters or NO_PARAMETERS
        self.first = first
        self.over = over

    def done(self, outcome: Success | Failure, /) -> None:
        self.over(self, outcome)


def _copied(given: BatchInput) -> BatchInput:
    data = bytearray(given.nbytes)
    write_parts(given, memoryview(data))
    whole = InputTensor(given.datatype, given.shape, None, bytes(data))
    return BatchInput(given.index, given.datatype, given.shape, given.nbytes, [whole])


class AgreementSampler:
    """The comparisons of one model version."""

    def __init__(
        self,
        spec: ModelSpec,
        scheduler: Scheduler,
        chance: Chance,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock`: the scheduler's; `spec.resilience.agreement` is the share that is drawn."""
        self._spec = spec
        self._scheduler = scheduler
        self._share = spec.resilience.agreement
        self._chance = chance
        self._now = clock
        self._loop = asyncio.get_running_loop()
        self._agreement = Agreement()
        self._running: tuple[Member, _Again] | None = None
        self._told = -math.inf
        self._untold = 0

    def start(self) -> None:
        self._scheduler.on_executed = self.executed

    def close(self) -> None:
        """Draw no more, and give up the run that is under way."""
        self._scheduler.on_executed = None
        if self._running is not None:
            member, again = self._running
            member.replica.cancel(again)

    def statistics(self) -> AgreementStatistics:
        return self._agreement.statistics()

    def executed(self, batch: RunningBatch, first: Success) -> None:
        """`batch` was executed; its members have not been told yet."""
        if self._chance.random() >= self._share or batch.isolated or batch.sequence is not None:
            return
        now = self._now()
        nbytes = sum(one.nbytes for one in batch.inputs)
        kept = sum(len(output.data) for output in first.outputs)
        found = None if self._running is not None or max(nbytes, kept) > MAX_BYTES else self._other(batch.member, now)
        if found is None:
            self._agreement.count("skipped")
            return
        self._running = (found, _Again(batch, first, self._ended))
        # The members first: this run begins when they have been answered, if there is room then too.
        self._loop.call_soon(self._begin, now)

    def _begin(self, drawn: float) -> None:
        if self._running is None:
            return
        member, again = self._running
        fleet = self._fleet_of(member)
        if fleet is None or not self._has_leisure(fleet, member, drawn):
            self._running = None
            self._agreement.count("skipped")
            return
        try:
            member.replica.execute(again, TIMEOUT_S)
        except Exception:
            log.exception("model %s: a batch could not be executed a second time", self._spec.name)
            self._running = None
            self._agreement.count("failed")

    def _other(self, first: Member, now: float) -> Member | None:
        """An idle backend of another kind, or on another server."""
        mine = first.replica.traits
        fleet = self._fleet_of(first)
        for member in fleet.members if fleet is not None else ():
            traits = member.replica.traits
            apart = traits.kind != mine.kind or (traits.server != mine.server and bool(traits.server or mine.server))
            if fleet is not None and member is not first and apart and self._has_leisure(fleet, member, now):
                return member
        return None

    def _fleet_of(self, member: Member) -> Fleet | None:
        return next((fleet for fleet in self._scheduler.fleets if member in fleet.members), None)

    def _has_leisure(self, fleet: Fleet, member: Member, now: float) -> bool:
        """Nobody waits, nothing runs there, and whoever comes next finds another backend free."""
        replica = member.replica
        if replica.in_flight or replica.free_slots <= 0 or not fleet.usable(member, now):
            return False
        lanes = any(dispatcher.lanes.count for dispatcher in self._scheduler.dispatchers)
        if lanes or self._scheduler.queue_statistics().requests:
            return False
        others = [other for other in fleet.members if other is not member]
        return any(other.replica.free_slots > 0 and fleet.usable(other, now) for other in others)

    def _ended(self, again: _Again, outcome: Success | Failure) -> None:
        """Called once per run, by the replica."""
        running, self._running = self._running, None
        if running is None:
            return
        name = running[0].replica.name
        self._scheduler.kick()
        if isinstance(outcome, Success):
            try:
                check_outputs(self._spec, again.outputs, again.rows, list(outcome.outputs))
                differences = compare(again.first.outputs, outcome.outputs)
            except (AssemblyError, ValueError) as error:
                outcome_text = str(error)
            else:
                if not self._agreement.compared(differences):
                    self._tell(name, differences)
                return
        else:
            outcome_text = outcome.in_full
        self._agreement.count("failed")
        log.debug("model %s: the second run on %s gave no answer: %s", self._spec.name, name, outcome_text)

    def _tell(self, name: str, differences: Sequence[Difference]) -> None:
        now = self._now()
        if now - self._told < LOG_INTERVAL_S:
            self._untold += 1
            return
        more = f" ({self._untold} more since the last such line)" if self._untold else ""
        self._told, self._untold = now, 0
        apart = [_in_words(one) for one in differences if not one.agreed][:MAX_TOLD]
        log.warning(
            "model %s: %s answers otherwise than the backend that answered the caller: %s%s",
            self._spec.name, name, "; ".join(apart), more,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<AgreementSampler {self._spec.name}/{self._spec.version} {self._agreement!r}>"


def _in_words(one: Difference) -> str:
    rows = f"{one.equal_rows:.0%} of the rows are equal"
    if one.absolute is None or one.relative is None:
        return f"output '{one.output}': {rows}"
    return f"output '{one.output}' by up to {one.absolute:.3g} (relative {one.relative:.3g}), {rows}"


class AgreementSamplers:
    """The samplers of all model versions whose configuration asks for it."""

    def __init__(self, chance: Chance) -> None:
        self._chance = chance
        self._by_version: dict[ServedVersion, AgreementSampler] = {}

    def attach(self, version: ServedVersion) -> None:
        """`version` is loaded. Nothing happens unless it has a share to draw, and may execute rows twice."""
        scheduler, resilience = version.scheduler, version.spec.resilience
        if not isinstance(scheduler, Scheduler) or Ragged.of(version.spec) is not None:
            return
        if resilience.agreement > 0.0 and resilience.idempotent:
            sampler = AgreementSampler(version.spec, scheduler, self._chance)
            self._by_version[version] = sampler
            sampler.start()

    def detach(self, version: ServedVersion) -> None:
        """`version` is going to be freed; harmless for one that has no sampler."""
        sampler = self._by_version.pop(version, None)
        if sampler is not None:
            sampler.close()

    def statistics(self, version: ServedVersion) -> AgreementStatistics | None:
        """None where nothing is compared."""
        sampler = self._by_version.get(version)
        return sampler.statistics() if sampler is not None else None

    def __repr__(self) -> str:
        return f"<AgreementSamplers {len(self._by_version)}>"
