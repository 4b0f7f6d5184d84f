"""The asyncio shell of sequence batching: what takes requests for a model whose config.pbtxt says sequence_batching.

It stands before ordinary schedulers, one for each lane, and lets one step of each sequence through at a time, as a
request of its own with the control inputs and the sequence's state behind the caller's inputs. Batches, preferred
sizes, delays, retries, deadlines while a step is executed, statistics: all that is the lanes' (scheduler.py). Who has a
seat and whose turn it is, is `core/sequencing.py`'s; what the added tensors hold, `core/sequence_tensors.py`'s.

Where sequences run. `direct`: a sequence stays on one replica; as many as replicas × `max_batch_size` live at once. It
also stays in one row of the batches if the model has a READY control and its rows are proven independent. `oldest`:
all replicas together execute the steps of up to `max_candidate_sequences` sequences for each of them; a model executed
here keeps nothing between runs, so any replica may serve any step. What a sequence carries from step to step is held by
the gateway, so a worker that dies costs it nothing: the step is executed again.

A step is all or nothing: its caller gets the answer and the sequence its new state, or neither happens.
  * The model refuses a step (ModelError): the sequence goes on from where it was, as with Triton.
  * A step is given up for any other reason, waiting or running (its time is up, its caller left, no worker is there):
    what comes behind it was meant to follow it, so the sequence ends. Steps that wait behind it get `SequenceLost`,
    later ones have to begin with START.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

from gateway.backends.interface import Replica
from gateway.backends.slotted import Slots, SlottedReplica
from gateway.core.admission import deadline_of
from gateway.core.batch_queue import BatchQueue, QueueStatistics
from gateway.core.duration import in_words
from gateway.core.model import ModelSpec
from gateway.core.request import QUEUED, SETTLED, InferRequest, SequenceStep
from gateway.core.sequence_tensors import SequenceTensors
from gateway.core.sequencing import OpenSequence, SequenceRoom, admit_step
from gateway.dispatcher import Dispatcher
from gateway.errors import (
    BackendError,
    Cancelled,
    DeadlineExceeded,
    GatewayError,
    InvalidRequest,
    ModelError,
    SequenceLost,
)
from gateway.observe.record import ModelStatistics
from gateway.observe.request_trace import ModelTracer
from gateway.scheduler import Scheduler
from gateway.scheduler_replicas import FleetAccess
from gateway.scheduler_timer import Timer

log = logging.getLogger("gateway.scheduler")


class SequenceScheduler(FleetAccess):
    """The intake of one version of a sequence model; fits `intake.Intake`."""

    def __init__(
        self,
        spec: ModelSpec,
        replicas: Sequence[Replica],
        statistics: ModelStatistics,
        clock: Callable[[], float] = time.monotonic,
        row_s: float = 0.0,
    ) -> None:
        """`replicas` take the tensors of `SequenceTensors(spec).model_spec`. Otherwise as `Scheduler`."""
        policy = spec.scheduling.sequence
        if policy is None:
            raise ValueError(f"model '{spec.name}' has no sequences")
        self.spec = spec
        self.statistics = statistics
        self._policy = spec.policy
        self._tensors = SequenceTensors(spec)
        self._loop = asyncio.get_running_loop()
        self._now = clock
        direct = policy.strategy == "direct"
        seats = max(1, spec.policy.max_batch_size) if direct else policy.max_candidate_sequences * len(replicas)
        groups = [[replica] for replica in replicas] if direct else [[*replicas]]
        self._room = SequenceRoom(len(groups), seats, policy.max_sequence_idle_s)
        # Rows that nobody asked for are rows of others: they may only stand beside rows proven independent.
        self._slotted = direct and spec.batched and spec.policy.merge and self._tensors.ready_place is not None
        self._replicas = groups
        self._direct = direct
        self._lanes = [
            # Who is let in is decided here; a step that was must not be refused when its turn comes.
            Scheduler(self._tensors.model_spec, self._with_slots(group, lane), statistics, clock, row_s, bounded=False)
            for lane, group in enumerate(groups)
        ]
        self._queue = BatchQueue()
        """Every accepted step by its sequence, as its caller sent it; those that a lane has are RUNNING here."""
        self._closed: GatewayError | None = None
        self._idle = asyncio.Event()
        self._timer = Timer(self._loop, clock, self._time_is_up)

    def _with_slots(self, replicas: list[Replica], lane: int) -> list[Replica]:
        place = self._tensors.ready_place
        if place is None or not self._slotted:
            return replicas
        slots = Slots(place, self._tensors.idle_row(), partial(self._room.highest_row, lane))
        return [SlottedReplica(replica, slots) for replica in replicas]

    @property
    def tracer(self) -> ModelTracer | None:
        return self._lanes[0].tracer

    @tracer.setter
    def tracer(self, tracer: ModelTracer | None) -> None:
        for lane in self._lanes:
            lane.tracer = tracer

    # -- what callers do -----------------------------------------------------------------------------------------

    def submit(self, request: InferRequest) -> None:
        """Take a step of a sequence; otherwise as `Scheduler.submit`.

        Raises:
            InvalidRequest: it names no sequence, or one that was not started.
        """
        if self._closed is not None:
            self.statistics.reject(self._closed.reason)
            raise type(self._closed)(str(self._closed))
        step = self._step_of(request)
        sequence = self._room.find(step.id)
        if sequence is None and not step.start:
            raise InvalidRequest(
                f"inference request for sequence {step.id} to model '{self.spec.name}' must specify the START flag on "
                "the first request of the sequence"
            )
        correlation = self._tensors.correlation(step.id) if sequence is None else None
        self._admit(request, begins=sequence is None)
        if sequence is None:
            sequence = OpenSequence(step.id, correlation, self._tensors.first)
            self._room.begin(sequence, [any(r.available for r in replicas) for replicas in self._replicas])
            self._accept(request, sequence, new=True)
        else:
            self._accept(request, sequence, new=False)
        if step.end:
            self._room.close(sequence)
        self._arm()

    def holds(self, identity: int | str) -> bool:
        """Whether a sequence of this id goes on here."""
        return self._room.find(identity) is not None

    def submit_parts(self, whole: InferRequest, parts: Sequence[InferRequest]) -> None:
        """Raises InvalidRequest: a step has one row, so it is never cut."""
        self._step_of(whole)

    def _step_of(self, request: InferRequest) -> SequenceStep:
        step = request.sequence
        if step is None or not step.id:
            raise InvalidRequest(
                f"inference request to model '{self.spec.name}' must specify a non-zero or non-empty correlation ID "
                "(parameter sequence_id)"
            )
        if request.rows > 1:
            raise InvalidRequest(
                f"inference request to model '{self.spec.name}' must specify batch-size 1 due to requirements of "
                f"sequence batcher, got {request.rows} rows"
            )
        return step

    def _admit(self, request: InferRequest, *, begins: bool) -> None:
        rows, held, groups = self._queue.rows, self._queue.nbytes, 0
        for lane in self._lanes:
            more = lane.waiting
            rows, held, groups = rows + more[0], held + more[1], max(groups, more[2])
        rejected = admit_step(self._room, self._policy, (rows, held, groups), request, begins=begins)
        if rejected is not None:
            self.statistics.reject(rejected.reason)
            raise rejected.error(rejected.message)

    def _accept(self, request: InferRequest, sequence: OpenSequence, *, new: bool) -> None:
        """Raises GatewayError: it is its turn, and its lane does not take it. Then it is as if it had never come."""
        first_in_line = sequence not in self._queue.groups
        self._room.busy(sequence)
        request.owner = self
        request.deadline = deadline_of(self._policy, request)
        request.key = sequence
        self._queue.push(request)
        refused = self._next_step(sequence) if first_in_line else None
        if refused is None:
            return
        self._queue.settled(request)
        request.owner, request.state = None, QUEUED
        if new:
            self._over(sequence)
        else:
            self._rest(sequence)
        raise refused[1]

    def abort(self, request: InferRequest) -> None:
        """The caller left: its step is given up, and with it the sequence."""
        if request.state == SETTLED:
            return
        running = _sequence(request).running
        if running is not None and running.context is request:
            running.abort()
        else:
            self.statistics.fail("CANCELED", spent_s=self._now() - request.received)
            self._give_up(request, Cancelled("the caller left"))

    def close(self, error: GatewayError) -> None:
        self._closed = error

    def fail_waiting(self, error: GatewayError) -> None:
        waiting = self._queue.waiting()
        for request in waiting:
            if request.state != SETTLED:  # the answer to one may have made another leave
                self.statistics.reject(error.reason)
                self._room.close(_sequence(request))
                self._settle(request, error)
        for lane in self._lanes:
            lane.fail_waiting(error)
        for request in waiting:
            self._go_on(_sequence(request))

    def reopen(self) -> None:
        self._closed = None
        for lane in self._lanes:
            lane.reopen()

    @property
    def dispatchers(self) -> tuple[Dispatcher, ...]:
        return tuple(dispatcher for lane in self._lanes for dispatcher in lane.dispatchers)

    def kick(self) -> None:
        for lane in self._lanes:
            lane.kick()

    def add_replica(self, replica: Replica) -> None:
        """It executes steps of the sequences there are; their number stays what it was.

        Raises:
            ValueError: with strategy `direct`, where a sequence lives on one replica, their set is fixed.
        """
        if self._direct:
            raise ValueError(f"model '{self.spec.name}': replicas of sequences that stay on one cannot be added")
        self._replicas[0].append(replica)
        self._lanes[0].add_replica(replica)

    async def remove_replica(self, replica: Replica) -> None:
        """No step is executed there any more; returns when those under way are over.

        Raises:
            ValueError: as `add_replica`.
        """
        if self._direct:
            raise ValueError(f"model '{self.spec.name}': replicas of sequences that stay on one cannot be removed")
        self._replicas[0] = [other for other in self._replicas[0] if other is not replica]
        await self._lanes[0].remove_replica(replica)

    async def drained(self) -> None:
        while True:
            while self._queue.unsettled:
                self._idle.clear()
                await self._idle.wait()
            for lane in self._lanes:
                await lane.drained()
            if not self._queue.unsettled:
                return

    def stop(self) -> None:
        self._timer.cancel()
        for lane in self._lanes:
            lane.stop()

    def queue_statistics(self) -> QueueStatistics:
        found = [self._queue.statistics(), *[lane.queue_statistics() for lane in self._lanes]]
        oldest = min([of.oldest for of in found if of.oldest is not None], default=None)
        return QueueStatistics(
            sum(of.requests for of in found), sum(of.rows for of in found), sum(of.nbytes for of in found),
            sum(of.groups for of in found), oldest,
        )  # fmt: skip

    @property
    def pending(self) -> int:
        return self._queue.unsettled

    @property
    def sequences(self) -> int:
        """That live: with a seat or waiting for one."""
        return self._room.count

    def __repr__(self) -> str:
        return f"<SequenceScheduler {self.spec.name}/{self.spec.version} {self._room!r} {self._queue!r}>"

    # -- step after step -------------------------------------------------------------------------------------------

    def _go_on(self, sequence: OpenSequence) -> None:
        """The sequence's next step, if there is one and it is time for it; else it rests, or is over."""
        while (refused := self._next_step(sequence)) is not None:
            request, error = refused  # the lane has counted it
            self._give_up(request, error, then_go_on=False)
        if sequence.over or sequence.running is not None or sequence in self._queue.groups:
            return
        if sequence.ending:
            self._over(sequence)
        else:
            self._rest(sequence)

    def _next_step(self, sequence: OpenSequence) -> tuple[InferRequest, GatewayError] | None:
        """Hand the next step to the sequence's lane if it is time for it. Returns what the lane refused, and why."""
        group = self._queue.groups.get(sequence)
        if group is None or sequence.seat is None or sequence.running is not None:
            return None
        request = self._queue.take(group, 1)[0]
        sequence.running = inner = self._as_asked(sequence, request)
        try:
            self._lanes[sequence.seat.lane].submit(inner)
        except GatewayError as error:
            sequence.running = None
            return request, error
        return None

    def _as_asked(self, sequence: OpenSequence, request: InferRequest) -> InferRequest:
        """The step as the model is asked: with controls and states, for all outputs."""
        step = _step(request)
        slot = sequence.seat.row if self._slotted and sequence.seat is not None else None
        states = self._tensors.first if step.start else sequence.states
        inputs = (*request.inputs, *self._tensors.added(step, sequence.correlation, states, slot))
        skip = 1 if self.spec.batched else 0
        key = tuple([None if tensor is None else tensor.shape[skip:] for tensor in inputs])
        inner = InferRequest(
            inputs, 1, request.nbytes, key, self._tensors.outputs, request.request_id, request.form, request.timeout_s
        )
        inner.stated_timeout_s, inner.priority = request.stated_timeout_s, request.priority
        inner.received, inner.context, inner.settle = request.received, request, self._step_ended
        return inner

    def _step_ended(self, inner: InferRequest) -> None:
        """A lane has settled a step: the state moves on, then the sequence, and then its caller is told."""
        request: InferRequest = inner.context
        sequence = _sequence(request)
        sequence.running = None
        request.attempt, request.avoid = inner.attempt, inner.avoid
        error = inner.error
        if error is None:
            try:
                states = self._tensors.next_states(inner.batch, inner.row)
            except Exception as fault:  # whatever it was, the caller gets an answer and the sequence ends
                log.exception("model %s: the state of a sequence could not be read", self.spec.name)
                error = BackendError(f"model '{self.spec.name}': the state of the sequence is broken: {fault}")
            else:
                self._room.keep(sequence, states)
                request.batch, request.row = inner.batch, inner.row
        elif isinstance(error, ModelError) and _step(request).start:
            self._room.restart(sequence, self._tensors.first)
        if error is not None and not isinstance(error, ModelError):
            self._give_up(request, error)
            return
        request.error = error
        self._queue.settled(request)
        self._go_on(sequence)
        self._tell(request)

    def _give_up(self, request: InferRequest, error: Exception, *, then_go_on: bool = True) -> None:
        """A step was accepted and is not going to be executed: what waits behind it goes with it, up to a START."""
        sequence = _sequence(request)
        behind, begins_anew = self._behind(request, sequence)
        if not begins_anew:
            self._room.close(sequence)
        self._settle(request, error)
        lost = SequenceLost(
            f"an earlier request of sequence {sequence.identity} to model '{self.spec.name}' was given up ({error}); "
            "begin the sequence again"
        )
        for other in behind:
            if other.state != SETTLED:  # the answer to one may have made another leave
                self.statistics.reject(lost.reason, spent_s=self._now() - other.received)
                self._settle(other, lost)
        if then_go_on:
            self._go_on(sequence)

    def _behind(self, request: InferRequest, sequence: OpenSequence) -> tuple[list[InferRequest], bool]:
        """Who waits behind `request`, up to a START, and whether there is one."""
        group = self._queue.groups.get(sequence)
        reached = request.state != QUEUED
        found: list[InferRequest] = []
        for other in group.requests if group is not None else ():
            if other is request:
                reached = True
            elif reached and other.state == QUEUED:
                if _step(other).start:
                    return found, True
                found.append(other)
        return found, False

    def _rest(self, sequence: OpenSequence) -> None:
        self._room.rests(sequence, self._now())
        self._arm()

    def _over(self, sequence: OpenSequence) -> None:
        heir = self._room.end(sequence)
        if heir is not None:
            self._loop.call_soon(self._go_on, heir)  # not at once: a long backlog may be refused one after the other

    # -- telling ---------------------------------------------------------------------------------------------------

    def _settle(self, request: InferRequest, error: Exception) -> None:
        request.error = error
        self._queue.settled(request)
        self._tell(request)

    def _tell(self, request: InferRequest) -> None:
        try:
            request.settle(request)
        except Exception:
            log.exception("model %s: an answer could not be written", self.spec.name)
        if not self._queue.unsettled:
            self._idle.set()

    # -- time ------------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        instants = [at for at in (self._queue.next_deadline(), self._room.next_idle()) if at is not None]
        if instants:
            self._timer.arm(min(instants))

    def _time_is_up(self) -> None:
        now = self._now()
        while (request := self._queue.expired(now)) is not None:
            if request.state != QUEUED:
                continue  # its lane has the same deadline, and says so
            waited_s = now - request.received
            self.statistics.reject("deadline", spent_s=waited_s)
            self._give_up(request, DeadlineExceeded(f"Request timeout expired in the queue after {in_words(waited_s)}"))
        while (sequence := self._room.overslept(now)) is not None:
            self._over(sequence)
        self._arm()


def _sequence(request: InferRequest) -> OpenSequence:
    """Whoever was accepted belongs to one."""
    return cast("OpenSequence", request.key)


def _step(request: InferRequest) -> SequenceStep:
    """Whoever was accepted has one."""
    return request.sequence or SequenceStep(0)
