"""Which sequences live, where each has its seat, and whose turn it is: the pure half of sequence batching.

A *lane* is what a sequence's steps are executed on, from its first to its last: one replica (`direct`), or all of them
together (`oldest`). A lane has seats; a sequence holds one from its START to its end, and waits for one in the backlog,
in order of arrival, while all are taken. With `direct` a seat's number is a row of the batch: what Triton calls a slot.

Rules (wire notes §5.3):
  * steps of a sequence run in order of arrival, one at a time;
  * START begins a sequence; on one that lives, it begins it anew in the same seat, behind the steps that still wait;
  * behind END nothing joins a sequence: a START with the same id is another sequence, with a seat of its own;
  * a sequence ends when END was executed, when nothing was asked of it for the idle time, or when one of its steps was
    given up: steps behind it were meant to follow it, so they are given up too, up to the next START;
  * a seat that gets free goes to whoever waits longest.
Invariants: every seat has at most one sequence; a sequence waits in the backlog or has a seat, never both; whoever is
idle has neither a step that waits nor one that runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from heapq import heappop, heappush

from gateway.core.admission import MAX_GROUPS, Rejected
from gateway.core.model import BatchPolicy
from gateway.core.request import InferRequest, InputTensor
from gateway.core.sequence_tensors import States, nbytes
from gateway.errors import TooLarge


class Seat:
    """`row` of `lane`, both from 0."""

    __slots__ = ("lane", "row")

    def __init__(self, lane: int, row: int) -> None:
        self.lane = lane
        self.row = row


class OpenSequence:
    """One life of one correlation id."""

    __slots__ = ("correlation", "ending", "identity", "over", "running", "seat", "state_bytes", "states")

    def __init__(self, identity: int | str, correlation: InputTensor | None, first: States) -> None:
        self.identity = identity
        self.correlation = correlation
        self.states = first
        self.state_bytes = 0
        """Bytes of `states` that are this sequence's own; those it begins with belong to the model."""
        self.seat: Seat | None = None
        self.running: InferRequest | None = None
        """Its step that is being executed, as the model is asked."""
        self.ending = False
        """Nothing joins it any more."""
        self.over = False
        """It has no seat any more, and is not in the backlog."""

    def __repr__(self) -> str:
        return f"<OpenSequence {self.identity!r}>"


class _Lane:
    __slots__ = ("_fresh", "_released", "taken")

    def __init__(self) -> None:
        self._fresh = 0
        self._released: list[int] = []
        self.taken: set[int] = set()

    def lowest(self, seats: int) -> int | None:
        """The lowest free row of `seats` (0: there is no end of them)."""
        if self._released:
            return self._released[0]
        return self._fresh if not seats or self._fresh < seats else None

    def take(self, row: int) -> None:
        if self._released:
            heappop(self._released)
        else:
            self._fresh += 1
        self.taken.add(row)

    def release(self, row: int) -> None:
        self.taken.remove(row)
        if self.taken:
            heappush(self._released, row)
        else:
            self._fresh, self._released = 0, []


class SequenceRoom:
    """The sequences of one model version."""

    def __init__(self, lanes: int, seats: int, idle_s: float) -> None:
        """`seats`: per lane; 0: no bound. `idle_s`: what a sequence may rest without a step."""
        self._lanes = [_Lane() for _ in range(lanes)]
        self._seats = seats
        self._idle_s = idle_s
        self._known: dict[int | str, OpenSequence] = {}
        """Those that steps may join."""
        self._backlog: OrderedDict[OpenSequence, None] = OrderedDict()
        self._idle: OrderedDict[OpenSequence, float] = OrderedDict()
        """Since when; always the same idle time, so the first is the first to end."""
        self.count = 0
        """Sequences that live, the backlog's included."""
        self.state_bytes = 0
        """Held for their states."""

    def find(self, identity: int | str) -> OpenSequence | None:
        """The sequence that a step with this id belongs to."""
        return self._known.get(identity)

    def begin(self, sequence: OpenSequence, available: Sequence[bool]) -> None:
        """A new sequence takes a seat, or a place in the backlog. `available`: by lane, whether it can execute now; a
        lane that cannot only gets a sequence if no other has a seat."""
        self._known[sequence.identity] = sequence
        self.count += 1
        sequence.seat = None if self._backlog else self._free_seat(available)
        if sequence.seat is None:
            self._backlog[sequence] = None

    def _free_seat(self, available: Sequence[bool]) -> Seat | None:
        rows = [lane.lowest(self._seats) for lane in self._lanes]
        free = [(not available[at], row, at) for at, row in enumerate(rows) if row is not None]
        if not free:
            return None
        _, row, at = min(free)
        self._lanes[at].take(row)
        return Seat(at, row)

    def close(self, sequence: OpenSequence) -> None:
        """Nothing joins it any more: its END is in, or it was given up."""
        sequence.ending = True
        if self._known.get(sequence.identity) is sequence:
            del self._known[sequence.identity]

    def end(self, sequence: OpenSequence) -> OpenSequence | None:
        """It is over. Returns who got its seat, and has steps that wait."""
        self.close(sequence)
        sequence.over = True
        self.busy(sequence)
        self.keep(sequence, ())
        self.count -= 1
        seat, sequence.seat = sequence.seat, None
        if seat is None:
            del self._backlog[sequence]
            return None
        if not self._backlog:
            self._lanes[seat.lane].release(seat.row)
            return None
        heir, _ = self._backlog.popitem(last=False)
        heir.seat = seat
        return heir

    def keep(self, sequence: OpenSequence, states: States) -> None:
        """`states` are the sequence's from now on, and its own."""
        sequence.states = states
        self.state_bytes -= sequence.state_bytes
        sequence.state_bytes = nbytes(states)
        self.state_bytes += sequence.state_bytes

    def restart(self, sequence: OpenSequence, first: States) -> None:
        """START: it is back where every sequence begins."""
        self.keep(sequence, ())
        sequence.states = first

    def highest_row(self, lane: int) -> int:
        """The highest row of the lane that a sequence has; −1 if none has."""
        return max(self._lanes[lane].taken, default=-1)

    # -- idleness --------------------------------------------------------------------------------------------------

    def rests(self, sequence: OpenSequence, now: float) -> None:
        """It has no step that waits or runs."""
        self._idle[sequence] = now

    def busy(self, sequence: OpenSequence) -> None:
        self._idle.pop(sequence, None)

    def next_idle(self) -> float | None:
        """When the next sequence will have rested too long."""
        for since in self._idle.values():
            return since + self._idle_s
        return None

    def overslept(self, now: float) -> OpenSequence | None:
        """One that rested too long, one at a time; the caller must end it."""
        for sequence, since in self._idle.items():
            return sequence if since + self._idle_s <= now else None
        return None

    def __repr__(self) -> str:
        return f"<SequenceRoom {self.count} sequences, {len(self._backlog)} without a seat, {len(self._idle)} idle>"


def admit_step(
    room: SequenceRoom, policy: BatchPolicy, waiting: tuple[int, int, int], request: InferRequest, *, begins: bool
) -> Rejected | None:
    """Whether a step is let in; None: it is. `waiting`: rows and bytes that wait, and kinds of steps (shapes of inputs
    and states) that wait for a batch in one lane; `begins`: it makes a new sequence.

    States are bounded as a queue's inputs are. While they exceed the bound, only steps that end a sequence get in.
    """
    rows, held, groups = waiting
    if request.nbytes > policy.max_queue_bytes:
        return Rejected(
            "too_large",
            f"the request holds {request.nbytes} bytes, but only {policy.max_queue_bytes} bytes may wait for this "
            "model; send smaller requests",
            TooLarge,
        )
    if rows + request.rows > policy.max_queue_rows:
        return Rejected(
            "queue_rows", f"Exceeds maximum queue size: {rows} of {policy.max_queue_rows} rows wait; retry later"
        )
    if held + request.nbytes > policy.max_queue_bytes:
        return Rejected(
            "queue_bytes", f"Exceeds maximum queue size: {held} of {policy.max_queue_bytes} bytes wait; retry later"
        )
    if groups >= MAX_GROUPS:
        return Rejected(
            "queue_shapes",
            f"Exceeds maximum queue size: steps of {groups} different shapes wait, which cannot share batches; retry "
            "later",
        )
    return _admit_sequence(room, policy, request, begins=begins)


def _admit_sequence(room: SequenceRoom, policy: BatchPolicy, request: InferRequest, *, begins: bool) -> Rejected | None:
    if begins and room.count >= policy.max_queue_rows:
        return Rejected("queue_sequences", f"Exceeds maximum queue size: {room.count} sequences live; retry later")
    ends = request.sequence is not None and request.sequence.end
    if room.state_bytes > policy.max_queue_bytes and not ends:
        return Rejected(
            "sequence_states",
            f"Exceeds maximum queue size: the states of {room.count} sequences hold {room.state_bytes} bytes, of "
            f"{policy.max_queue_bytes} bytes; end sequences, or retry later",
        )
    return None
