"""Where members of failed batches wait for their next attempt, apart from the queue and ahead of it.

Four lanes, served in this order (the lane says who may share a run, and what is risked by one):
  1. ISOLATED    parts of a batch that the model itself refused: the replica lives, so as many run at once as fit;
  2. QUARANTINE  suspects: whoever runs them may break. One of these batches is under way at a time, so that one replica
                 at most is at risk, and each group runs by itself;
  3. RETRY       innocent as far as anybody knows: grouped by key and by the replicas that failed them, whoever has the
                 same history shares a batch;
  4. SEQUENCE    steps of a sequence whose replica is busy: one at a time for each sequence, in their order.
None is ever mixed with requests from the queue, nor one lane with another.

Invariants: `rows`, `nbytes` and `count` cover exactly the unsettled requests in here; whoever leaves is taken out at
once (`leave`), and what is left of it is dropped before it outnumbers the living; a group without anyone alive is never
handed out.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, cast

from gateway.core.fleet import Member
from gateway.core.request import SETTLED, InferRequest, Trouble

SLACK: Final = 16
"""Dead entries of a group that are not worth a clean-up."""


RetryPlace = tuple[object, frozenset[Member], bool]
"""Key of the requests, who failed them, and whether they pause first."""


class Lane(enum.Enum):
    ISOLATED = "isolated"
    QUARANTINE = "quarantine"
    RETRY = "retry"
    SEQUENCE = "sequence"


class Waiting:
    """Requests of one lane that may run together. `live` and `rows` cover the unsettled ones only."""

    __slots__ = ("lane", "live", "members", "not_before", "place", "rows", "suspects", "tried", "whole_rows")

    def __init__(self, lane: Lane, tried: tuple[Member, ...], not_before: float = 0.0) -> None:
        self.lane = lane
        self.tried = tried
        """Replicas not to be used while there are others."""
        self.not_before = not_before
        """Monotonic instant of the next attempt; 0.0: at once."""
        self.place: object = None
        """What the lane knows it by."""
        self.suspects: Member | None = None
        """Who is to blame if exactly the rows that it failed succeed elsewhere."""
        self.whole_rows = 0
        """How many those were."""
        self.members: list[InferRequest] = []
        self.live = 0
        self.rows = 0

    @property
    def apart(self) -> bool:
        """Whether the group runs by itself, whole."""
        return self.lane is Lane.ISOLATED or self.lane is Lane.QUARANTINE

    @property
    def failed_alone(self) -> tuple[Member, ...]:
        """Where its only member failed when it was alone; nothing for several."""
        if self.live != 1:
            return ()
        (member,) = [member for member in self.members if member.state != SETTLED]
        return trouble_of(member).alone

    def __repr__(self) -> str:
        return f"<Waiting {self.lane.value} {self.live} requests, {self.rows} rows, tried {len(self.tried)}>"


@dataclass(frozen=True, slots=True)
class LaneStatistics:
    requests: int
    rows: int
    nbytes: int
    isolated: int
    """Groups, as are the others."""
    quarantined: int
    retried: int
    sequences: int


def trouble_of(request: InferRequest) -> Trouble:
    """What happened to it so far; made when first needed."""
    trouble = request.trouble
    if trouble is None:
        trouble = request.trouble = Trouble()
    return trouble


class Lanes:
    """See the module's docstring."""

    __slots__ = ("_apart", "_retry", "_sequences", "count", "nbytes", "rows")

    def __init__(self) -> None:
        self.count = 0
        self.rows = 0
        self.nbytes = 0
        self._apart: dict[Lane, deque[Waiting]] = {Lane.ISOLATED: deque(), Lane.QUARANTINE: deque()}
        self._retry: dict[RetryPlace, Waiting] = {}
        self._sequences: dict[object, Waiting] = {}

    # -- in ------------------------------------------------------------------------------------------------------

    def isolate(
        self,
        lane: Lane,
        members: list[InferRequest],
        tried: tuple[Member, ...] = (),
        *,
        suspects: Member | None = None,
        not_before: float = 0.0,
        first: bool = False,
    ) -> None:
        """`members` (at least one) run by themselves; `first`: ahead of the others of their lane."""
        waiting = Waiting(lane, tried, not_before)
        waiting.suspects = suspects
        self._put(waiting, members)
        waiting.whole_rows = waiting.rows
        line = self._apart[lane]
        if first:
            line.appendleft(waiting)
        else:
            line.append(waiting)

    def retry(self, members: list[InferRequest], now: float, not_before: float = 0.0) -> None:
        """Each joins those of the same key whom the same replicas failed, and who pause too, or do not."""
        for member in members:
            tried = trouble_of(member).tried
            place = (member.key, frozenset(tried), not_before > now)
            waiting = self._retry.get(place)
            if waiting is None:
                waiting = self._retry[place] = Waiting(Lane.RETRY, tried, not_before)
                waiting.place = place
            elif waiting.not_before <= now:  # whoever is pausing is joined, not held up
                waiting.not_before = not_before
            self._put(waiting, [member])

    def park(self, member: InferRequest, sequence: object, not_before: float = 0.0, *, first: bool = False) -> Waiting:
        """A step of `sequence`; `first`: it was there before and comes back."""
        waiting = self._sequences.get(sequence)
        if waiting is None:
            waiting = self._sequences[sequence] = Waiting(Lane.SEQUENCE, ())
            waiting.place = sequence
        waiting.not_before = max(waiting.not_before, not_before)
        self._put(waiting, [member])
        if first:
            waiting.members.insert(0, waiting.members.pop())
        return waiting

    def _put(self, waiting: Waiting, members: list[InferRequest]) -> None:
        for member in members:
            trouble_of(member).lane = waiting
            waiting.members.append(member)
            waiting.live += 1
            waiting.rows += member.rows
            self.count += 1
            self.rows += member.rows
            self.nbytes += member.nbytes

    # -- out -----------------------------------------------------------------------------------------------------

    def head(self, lane: Lane) -> Waiting | None:
        """Who goes first in one of the two lanes whose groups run by themselves."""
        line = self._apart[lane]
        return line[0] if line else None

    def shared(self) -> list[Waiting]:
        """The groups of the other two, in the order in which they are to be looked at."""
        return [*self._retry.values(), *self._sequences.values()]

    def take(self, waiting: Waiting, max_rows: int, one: bool = False) -> list[InferRequest]:
        """The first of its members that fit `max_rows`, at least one; `one`: no more than that. They are out."""
        taken: list[InferRequest] = []
        rest: list[InferRequest] = []
        room = max_rows
        for member in waiting.members:
            if member.state == SETTLED:
                continue
            if rest or (taken and (one or member.rows > room)):
                rest.append(member)
            else:
                room -= member.rows
                taken.append(member)
        for member in taken:
            self._forget(waiting, member)
        waiting.members = rest
        if not waiting.live:
            self._drop(waiting)
        elif waiting.lane is Lane.SEQUENCE:
            waiting.not_before = 0.0
        return taken

    def leave(self, request: InferRequest) -> None:
        """`request` was settled while it may have waited here."""
        trouble = request.trouble
        waiting: Waiting | None = trouble.lane if trouble is not None else None
        if waiting is None:
            return
        self._forget(waiting, request)
        if not waiting.live:
            self._drop(waiting)
        elif len(waiting.members) > 2 * waiting.live + SLACK:
            waiting.members = [member for member in waiting.members if member.state != SETTLED]

    def _forget(self, waiting: Waiting, member: InferRequest) -> None:
        trouble_of(member).lane = None
        waiting.live -= 1
        waiting.rows -= member.rows
        self.count -= 1
        self.rows -= member.rows
        self.nbytes -= member.nbytes

    def _drop(self, waiting: Waiting) -> None:
        """Nobody in it is alive."""
        if waiting.lane is Lane.RETRY:
            del self._retry[cast("RetryPlace", waiting.place)]
        elif waiting.lane is Lane.SEQUENCE:
            del self._sequences[waiting.place]
        else:
            self._apart[waiting.lane].remove(waiting)

    def __iter__(self) -> Iterator[InferRequest]:
        """Everyone who waits."""
        for waiting in [*self._apart[Lane.ISOLATED], *self._apart[Lane.QUARANTINE], *self.shared()]:
            for member in waiting.members:
                if member.state != SETTLED:
                    yield member

    def statistics(self) -> LaneStatistics:
        return LaneStatistics(
            self.count, self.rows, self.nbytes, len(self._apart[Lane.ISOLATED]), len(self._apart[Lane.QUARANTINE]),
            len(self._retry), len(self._sequences),
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<Lanes {self.count} requests, {self.rows} rows>"
