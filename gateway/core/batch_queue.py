"""The waiting room of one model version: who waits, in what order, until when.

Requests that may share a batch stand in one group (their `key`); groups do not wait for each other, so a request of
another shape behind the head loses no time. Within a group the order is arrival. Nobody comes back: whoever has to be
executed again waits elsewhere (dispatcher_lanes.py).

Invariants: `rows`, `nbytes` and `count` cover exactly the requests in state QUEUED; a request that was removed
(caller left, deadline passed) is never handed out; entries of deadlines that no longer matter are dropped before there
are more of them than of those that matter, and so are the ghosts of removed requests in a group's line.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any, ClassVar, Final, Protocol

from gateway.core.request import QUEUED, RUNNING, SETTLED, InferRequest

SLACK: Final = 64
"""Dead entries tolerated whatever the queue's length, so that short queues are not rebuilt all the time."""


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    requests: int
    rows: int
    nbytes: int
    groups: int
    oldest: float | None
    """Arrival of the request that waits longest, monotonic seconds."""


class Line(Protocol):
    """Requests of a group in the order they are served: a deque, or `policy_queue.Line`."""

    def append(self, request: InferRequest, /) -> None: ...
    def popleft(self) -> InferRequest: ...
    def __getitem__(self, index: Any, /) -> InferRequest: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[InferRequest]: ...


class Group:
    """Queued requests with equal keys. `count` and `rows` cover QUEUED ones only."""

    __slots__ = ("count", "key", "memo", "requests", "rows")

    def __init__(self, key: object, line: Line) -> None:
        self.key = key
        self.requests = line
        self.memo: Any = None
        """What core/batching.py found out about it; forgotten with every change."""
        self.count = 0
        self.rows = 0

    def head(self) -> InferRequest | None:
        """The oldest request still waiting; drops the ghosts of removed ones on the way."""
        requests = self.requests
        while requests:
            if requests[0].state == QUEUED:
                return requests[0]
            requests.popleft()
        return None


Deadline = list[Any]
"""[instant, number, request]; numbers put equal instants of the heap in order. The request is taken out when it is
settled, so that an entry that waits to be dropped keeps nobody's bytes alive."""


class BatchQueue:
    """See the module's docstring. What happens to a request is amortised O(1); what looks at groups, O(groups)."""

    ranked: ClassVar[bool] = False
    """Whether anything but arrival decides who goes first."""

    __slots__ = ("_early", "_in_turn", "_sequence", "_unsettled", "count", "groups", "nbytes", "rows")

    def __init__(self) -> None:
        self.groups: dict[object, Group] = {}
        self.rows = 0
        self.nbytes = 0
        self.count = 0
        self._in_turn: deque[Deadline] = deque()
        """Deadlines in their order, of those who came in it: mostly everyone, since all have equally long."""
        self._early: list[Deadline] = []
        """Heap of the others."""
        self._sequence = 0
        self._unsettled = 0

    def push(self, request: InferRequest) -> None:
        """A new request; its `deadline` must be set."""
        self._unsettled = unsettled = self._unsettled + 1
        deadline, in_turn = request.deadline, self._in_turn
        if not in_turn or in_turn[-1][0] <= deadline:
            request.place = place = [deadline, 0, request]
            in_turn.append(place)
            if len(in_turn) > 2 * unsettled + SLACK:
                self._in_turn = deque([entry for entry in in_turn if entry[2] is not None])
        else:
            self._push_early(request)
        group = self.groups.get(request.key) or self._group(request)
        group.requests.append(request)
        group.memo = None
        group.count += 1
        group.rows += request.rows
        self.rows += request.rows
        self.nbytes += request.nbytes
        self.count += 1

    def _push_early(self, request: InferRequest) -> None:
        """Its deadline comes before that of somebody who was here first."""
        self._sequence += 1
        request.place = place = [request.deadline, self._sequence, request]
        heap = self._early
        heappush(heap, place)
        if len(heap) > 2 * self._unsettled + SLACK:
            self._early = [entry for entry in heap if entry[2] is not None]
            heapify(self._early)

    def take(self, group: Group, max_rows: int) -> list[InferRequest]:
        """The longest run of waiting requests from the front that fits `max_rows`; at least one if any waits.

        Taken requests are RUNNING. A request of more rows than `max_rows` is handed out alone.
        """
        taken: list[InferRequest] = []
        room = max_rows
        nbytes = 0
        requests = group.requests
        while requests:
            request = requests[0]
            if request.state == QUEUED:
                if request.rows > room and taken:
                    break
                room -= request.rows
                nbytes += request.nbytes
                request.state = RUNNING
                taken.append(request)
                requests.popleft()
                if room <= 0:
                    break
            else:
                requests.popleft()
        rows = max_rows - room
        group.memo = None
        group.count -= len(taken)
        group.rows -= rows
        self.rows -= rows
        self.nbytes -= nbytes
        self.count -= len(taken)
        if not group.count:  # whatever is left in it are ghosts
            self.groups.pop(group.key, None)
        return taken

    def settled(self, request: InferRequest) -> None:
        """`request` has its answer or needs none: mark it, and take it out of the room if it still waits."""
        waited = request.state == QUEUED
        request.state = SETTLED
        if request.place is not None:
            request.place[2] = None
            request.place = None
        self._unsettled -= 1
        if waited:
            self._left(self.groups[request.key], request)

    def expired(self, now: float) -> InferRequest | None:
        """An unsettled request, waiting or running, whose deadline is not after `now`: one at a time, each once. The
        caller must settle it before it does anything else here."""
        earliest = self._earliest()
        if earliest is None or earliest[0] > now:
            return None
        if self._in_turn and self._in_turn[0] is earliest:
            self._in_turn.popleft()
        else:
            heappop(self._early)
        request: InferRequest = earliest[2]
        return request

    def next_deadline(self) -> float | None:
        """The earliest deadline of an unsettled request."""
        earliest = self._earliest()
        return None if earliest is None else earliest[0]

    def _earliest(self) -> Deadline | None:
        """The first entry that matters; those before it are dropped."""
        in_turn, heap = self._in_turn, self._early
        while in_turn and in_turn[0][2] is None:
            in_turn.popleft()
        while heap and heap[0][2] is None:
            heappop(heap)
        if in_turn and not (heap and heap[0][0] < in_turn[0][0]):
            return in_turn[0]
        return heap[0] if heap else None

    def first(self) -> Group:
        """The group whose head goes first; somebody must wait."""
        groups = self.groups
        if len(groups) == 1:
            return next(iter(groups.values()))
        return min(groups.values(), key=_head_received)

    def in_order(self) -> Sequence[Group]:
        """All groups, in the order of their heads."""
        groups = self.groups
        return [*groups.values()] if len(groups) == 1 else sorted(groups.values(), key=_head_received)

    def outranks(self, one: Group, other: Group) -> bool:
        """Whether the head of `one` goes before that of `other` whoever came first."""
        return False

    def waiting(self) -> list[InferRequest]:
        """Every request that waits, for shutting the room."""
        return [r for group in self.groups.values() for r in group.requests if r.state == QUEUED]

    @property
    def unsettled(self) -> int:
        """Requests accepted and not yet settled, waiting or running."""
        return self._unsettled

    def statistics(self) -> QueueStatistics:
        heads = [head.received for group in self.groups.values() if (head := group.head()) is not None]
        return QueueStatistics(self.count, self.rows, self.nbytes, len(self.groups), min(heads, default=None))

    def __repr__(self) -> str:
        return f"<BatchQueue {self.count} requests, {self.rows} rows, {len(self.groups)} groups>"

    def _group(self, request: InferRequest) -> Group:
        group = self.groups.get(request.key)
        if group is None:
            group = self.groups[request.key] = Group(request.key, self._line())
        return group

    def _line(self) -> Line:
        """A line for a new group."""
        return deque()

    def _left(self, group: Group, request: InferRequest) -> None:
        """`request` waits no more. Ghosts are dropped before they outnumber the living: they hold callers' bytes."""
        group.memo = None
        group.count -= 1
        group.rows -= request.rows
        self.rows -= request.rows
        self.nbytes -= request.nbytes
        self.count -= 1
        if not group.count:
            del self.groups[group.key]
        elif len(group.requests) > 2 * group.count + SLACK:
            group.requests = deque([request for request in group.requests if request.state == QUEUED])


def _head_received(group: Group) -> float:
    head = group.head()
    return head.received if head is not None else float("inf")
