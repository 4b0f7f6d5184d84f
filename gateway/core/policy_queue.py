"""A waiting room with priority levels and queue policies, for models whose owners state any (wire notes §5.2).

It is a `BatchQueue` in which the line of a group is ordered by rank, and by arrival within a rank. Each level has
two ranks: requests whose queue time is not up, and behind them those that a DELAY policy put back. So a batch is filled
strictly by level; a request that a DELAY policy put back goes after all of its own and of higher levels whose time is
not up.

Rules:
  * a request's level is its `priority`, or the default where it states none or one that does not exist;
  * `max_queue_size` bounds the requests of a level that wait, put back or not;
  * queue time counts from arrival and covers waiting only: it stops when a batch takes the request, and goes on only
    if that batch was never executed;
  * a caller's own `timeout` may shorten the queue time where the policy allows it; where there is none it does nothing.
Models that state nothing of this have a plain `BatchQueue` and pay for none of it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any, Final, cast

from gateway.core.batch_queue import SLACK, BatchQueue, Deadline, Group
from gateway.core.request import QUEUED, InferRequest
from gateway.core.scheduling import QueuePolicy, Scheduling

_COMPACT_FROM: Final = 64
"""Served places at the front of a line that are kept before they are cut off."""


def queue_time_s(policy: QueuePolicy | None, request: InferRequest) -> float:
    """How long `request` may wait for a batch, seconds; infinite where nothing limits it."""
    if policy is None or policy.default_timeout_s <= 0.0:
        return inf
    stated = request.stated_timeout_s
    if policy.allow_timeout_override and 0.0 < stated < policy.default_timeout_s:
        return stated
    return policy.default_timeout_s


class Standing:
    """What the room knows of one unsettled request."""

    __slots__ = ("arrival", "delays", "level", "rank", "timer", "until")

    def __init__(self, arrival: int, level: int, delays: bool, until: float) -> None:
        self.arrival = arrival
        self.level = level
        self.delays = delays
        """Put back when its time is up, not refused."""
        self.until = until
        """Instant at which its queue time is up, monotonic seconds."""
        self.rank = 2 * level
        """Odd: it was put back."""
        self.timer: Deadline | None = None
        """Its entry among the timers while it waits."""


class Line:
    """A group's requests in the order they are served. Fits `batch_queue.Line`."""

    __slots__ = ("_entries", "_served", "_standing")

    def __init__(self, standing: Callable[[InferRequest], Standing]) -> None:
        self._entries: list[Any] = []
        """(rank, arrival, request), ascending: rank and arrival are unique together, so requests are not compared."""
        self._served = 0
        """Entries at the front that were taken; they are None."""
        self._standing = standing

    def append(self, request: InferRequest, /) -> None:
        standing = self._standing(request)
        insort(self._entries, (standing.rank, standing.arrival, request), lo=self._served)

    def popleft(self) -> InferRequest:
        request: InferRequest = self._entries[self._served][2]
        self._entries[self._served] = None
        self._served += 1
        if self._served >= _COMPACT_FROM and 2 * self._served >= len(self._entries):
            del self._entries[: self._served]
            self._served = 0
        return request

    def remove(self, request: InferRequest) -> None:
        standing = self._standing(request)
        wanted = (standing.rank, standing.arrival)
        del self._entries[bisect_left(self._entries, wanted, lo=self._served)]

    def __getitem__(self, index: int, /) -> InferRequest:
        """Only the front is ever looked at: `index` is 0."""
        request: InferRequest = self._entries[self._served + index][2]
        return request

    def __len__(self) -> int:
        return len(self._entries) - self._served

    def __iter__(self) -> Iterator[InferRequest]:
        for place in range(self._served, len(self._entries)):
            yield self._entries[place][2]


class PolicyQueue(BatchQueue):
    """See the module's docstring. All methods are O(log n) for each request, but for moving pointers in a line."""

    __slots__ = (
        "_arrivals", "_default_level", "_levels", "_policies", "_standings", "_timed", "_timers", "_waiting", "_whole",
    )  # fmt: skip

    ranked = True

    def __init__(self, scheduling: Scheduling) -> None:
        super().__init__()
        self._levels = scheduling.priority_levels
        self._default_level = scheduling.default_priority_level if self._levels else 0
        self._whole = scheduling.default_queue_policy
        self._policies = dict(scheduling.priority_queue_policies)
        self._standings: dict[InferRequest, Standing] = {}
        self._timers: list[Deadline] = []
        """Heap of [until, number, request]; the request is taken out when its time does not matter any more. Numbers
        are never used twice: the dead entry of one that comes back may still be there."""
        self._timed = 0
        self._waiting: dict[int, int] = {}
        """Requests that wait, by level; no zeros, since a model may have more levels than requests."""
        self._arrivals = 0

    # -- what the owner of the model said --------------------------------------------------------------------------

    def level_of(self, request: InferRequest) -> int:
        """Its priority level, 1 the highest; 0 where the model has none."""
        return request.priority if 1 <= request.priority <= self._levels else self._default_level

    def policy_of(self, request: InferRequest) -> QueuePolicy | None:
        """The policy of its level; None: nothing is stated for it."""
        return self._policies.get(self.level_of(request), self._whole)

    def full_for(self, request: InferRequest) -> int:
        """The bound that its level has reached, in requests; 0: there is room for it."""
        policy = self.policy_of(request)
        bound = policy.max_queue_size if policy is not None else 0
        return bound if bound and self._waiting.get(self.level_of(request), 0) >= bound else 0

    # -- in and out ------------------------------------------------------------------------------------------------

    def push(self, request: InferRequest) -> None:
        """A new request; its `received` and `deadline` must be set."""
        self._arrivals += 1
        policy = self.policy_of(request)
        until = request.received + queue_time_s(policy, request)
        delays = policy is not None and policy.timeout_action == "DELAY"
        standing = Standing(self._arrivals, self.level_of(request), delays, until)
        self._standings[request] = standing
        super().push(request)
        self._waits(request, standing)

    def take(self, group: Group, max_rows: int) -> list[InferRequest]:
        taken = super().take(group, max_rows)
        for request in taken:
            self._waits_no_more(self._standings[request])
        return taken

    def beside(self, request: InferRequest) -> None:
        """`request` was handed out, but nobody took it: it waits elsewhere for the next attempt, and how long it may
        wait is still what its policy says."""
        standing = self._standings[request]
        if standing.until != inf and standing.timer is None:
            self._set_timer(request, standing)

    def settled(self, request: InferRequest) -> None:
        standing = self._standings[request]
        if request.state == QUEUED:
            self._waits_no_more(standing)
            self._line_of(request).remove(request)
        elif standing.timer is not None:
            standing.timer[2] = None
        super().settled(request)
        del self._standings[request]

    # -- time ------------------------------------------------------------------------------------------------------

    def overdue(self, now: float) -> InferRequest | None:
        """A request that waits and whose policy refuses it at `now`, one at a time; the caller must settle it.

        Except one that waited elsewhere (`beside`) and does not any more. Those that a DELAY policy puts back instead
        are put back on the way.
        """
        timers = self._timers
        while timers and (timers[0][2] is None or timers[0][0] <= now):
            request: InferRequest | None = heappop(timers)[2]
            if request is None:
                continue
            standing = self._standings[request]
            standing.timer = None
            if not standing.delays:
                return request
            if request.state != QUEUED:
                standing.until = inf
                continue
            line = self._line_of(request)
            line.remove(request)
            standing.rank += 1
            standing.until = inf
            line.append(request)
            self.groups[request.key].memo = None
        return None

    def next_deadline(self) -> float | None:
        """The earliest instant at which a deadline passes or a queue time is up."""
        deadline = super().next_deadline()
        timers = self._timers
        while timers and timers[0][2] is None:
            heappop(timers)
        if not timers:
            return deadline
        until: float = timers[0][0]
        return until if deadline is None or until < deadline else deadline

    # -- who goes first --------------------------------------------------------------------------------------------

    def first(self) -> Group:
        """The group whose head has the best rank; among equals, the one whose head came first."""
        return min(self.groups.values(), key=self._order)

    def in_order(self) -> list[Group]:
        return sorted(self.groups.values(), key=self._order)

    def outranks(self, one: Group, other: Group) -> bool:
        """By level, and within a level by whether its time is up."""
        return self._order(one)[0] < self._order(other)[0]

    def _order(self, group: Group) -> tuple[int, int]:
        standing = self._standings[group.requests[0]]
        return standing.rank, standing.arrival

    # -- within ----------------------------------------------------------------------------------------------------

    def _line(self) -> Line:
        return Line(self._standings.__getitem__)

    def _line_of(self, request: InferRequest) -> Line:
        return cast("Line", self.groups[request.key].requests)

    def _waits(self, request: InferRequest, standing: Standing) -> None:
        self._waiting[standing.level] = self._waiting.get(standing.level, 0) + 1
        if standing.until != inf:
            self._set_timer(request, standing)

    def _set_timer(self, request: InferRequest, standing: Standing) -> None:
        timers = self._timers
        self._timed += 1
        standing.timer = [standing.until, self._timed, request]
        heappush(timers, standing.timer)
        if len(timers) > 2 * self.count + SLACK:
            self._timers = [timer for timer in timers if timer[2] is not None]
            heapify(self._timers)

    def _waits_no_more(self, standing: Standing) -> None:
        left = self._waiting[standing.level] - 1
        if left:
            self._waiting[standing.level] = left
        else:
            del self._waiting[standing.level]
        if standing.timer is not None:
            standing.timer[2] = None
            standing.timer = None
