"""When a batch is closed, of whom, and why: one pure decision.

Rule (wire notes §5.1; Triton's semantics, with one deliberate difference: groups of other shapes never wait behind
the head). "Pending" are a group's oldest requests, as many as `max_batch_size` holds.

Without a queue delay a free replica takes what is pending, of the group with the oldest head         → WORKER_FREE
With one, groups are looked at in the order of their heads, and of each, in this order:
  1. before its time is up, a preferred size that its oldest requests make up exactly goes at once,
     the largest such size; the rest stays                                                            → FULL
  2. what fills `max_batch_size`, or reaches the largest preferred size, goes at once                 → FULL
  3. ... and so does what the next request in line does not fit into                                  → SHAPE
  4. everything pending goes when the head has waited as long as the delay says                       → DELAY
  5. ... or when waiting on would cost the head its deadline                                          → DEADLINE
  6. otherwise wait until the earliest instant at which 4 or 5 can become true.
Time is up once 4 or 5 holds.
With priorities (core/policy_queue.py) the head is not always the oldest: 4 and 5 look at everyone pending. And a group
that still waits is sent, for reason SHAPE, before one of lower rank takes the replica from it: strict means strict.
Batches of a model that does not batch, or whose rows are not proven independent, hold one request each.
What was decided is cut where the whole would come too late for one of its members and less would not: `in_time`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Final, NamedTuple

from gateway.core.batch_queue import BatchQueue, Group
from gateway.core.model import BatchPolicy
from gateway.core.request import QUEUED


class Reason(enum.Enum):
    """Why a batch was closed; label of `gateway_batches_total`."""

    WORKER_FREE = "worker_free"
    FULL = "full"
    DELAY = "delay"
    DEADLINE = "deadline"
    SHAPE = "shape"
    """Closed early because others in line could not join: the next would not fit, or waits with less priority."""


SHORT_RUN_S: Final = 0.0005
"""A run shorter than this costs less than what surrounds it: waking a worker, reading its answer, one more batch's
worth of per-batch work in the gateway. Measured: about 0.2 ms in all on one core."""


MIN_PATIENCE_S: Final = 0.002
"""Timers have a resolution of a millisecond, and a short run is far below."""


def one_at_a_time(run_s: float, waiting_rows: int, limit: int) -> bool:
    """Whether requests should wait for the batch that is running although another replica is free.

    Idle replicas fragment batches: with runs this short (`run_s`: seconds inside the backend) the gateway is the
    bottleneck, and twice the batches would cost it more than the replica could save. A batch that is full goes
    anyway, and so does any once the run under way takes longer than `patience_s`."""
    return run_s < SHORT_RUN_S and waiting_rows < limit


def patience_s(run_s: float) -> float:
    """How long after a short run was sent it counts as under way; then it is an outlier, and others go elsewhere."""
    return max(MIN_PATIENCE_S, 4.0 * run_s)


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Take up to `rows` rows from `group` now."""

    group: Group
    rows: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Nothing to do before `instant` (monotonic seconds), unless a request arrives."""

    instant: float


@dataclass(frozen=True, slots=True)
class Idle:
    """Nobody waits."""


IDLE = Idle()
Decision = Dispatch | WaitUntil | Idle


def decide(queue: BatchQueue, policy: BatchPolicy, now: float, execute_s: float = 0.0) -> Decision:
    """What a free replica should do now. `execute_s`: how long a batch is expected to run."""
    if not queue.count:
        return IDLE
    limit = policy.max_batch_size
    if not limit or not policy.merge:
        return Dispatch(queue.first(), 1, Reason.WORKER_FREE)  # at least one request is taken, whatever its rows
    if policy.max_queue_delay_s <= 0.0:
        group = queue.first()
        return Dispatch(group, limit, Reason.FULL if group.rows >= limit else Reason.WORKER_FREE)
    return _decide_delayed(queue, policy, now, execute_s, limit)


def in_time(group: Group, rows: int, now: float, needed_s: Callable[[int], float]) -> int:
    """How many of the first `rows` rows of `group` are to share a batch, if each of its members who can be answered by
    its deadline is to be (resilience notes §1.8). At least the first request.

    `needed_s`: seconds that so many rows take; never fewer for more rows. Whoever would be late even alone does not
    count: others must not wait for what cannot be had.
    """
    total, urgent = 0, inf
    for request in group.requests:
        if request.state != QUEUED:
            continue
        together = total + request.rows
        if total and together > rows:
            break
        by = min(urgent, request.deadline) if now + needed_s(request.rows) <= request.deadline else urgent
        if total and now + needed_s(together) > by:
            break
        total, urgent = together, by
    return total


class _Pending(NamedTuple):
    """A group's oldest requests, as many as fit; remembered until the group changes."""

    rows: int
    preferred: int
    """The largest preferred size that the first of them make up exactly; 0: none."""
    closed: bool
    """Whether the next in line does not fit."""
    received: float
    """Arrival of the one that waits longest."""
    deadline: float
    """Of the head; in a ranked queue the earliest of all."""


def _decide_delayed(queue: BatchQueue, policy: BatchPolicy, now: float, execute_s: float, limit: int) -> Decision:
    wake = float("inf")
    preferred = policy.preferred_batch_sizes or (limit,)
    enough = min(limit, max(preferred))
    ahead: Group | None = None
    """The first group that waits on."""
    for group in queue.in_order():
        pending: _Pending = group.memo or _look_at(group, preferred, limit, queue.ranked)
        ripe = pending.received + policy.max_queue_delay_s
        # Twice the longest run seen lately: the next may be longer, and an answer after the deadline is worth nothing.
        urgent = pending.deadline - 2.0 * execute_s
        time_is_up = now >= ripe or now >= urgent
        if pending.preferred and not time_is_up:
            verdict = Dispatch(group, pending.preferred, Reason.FULL)
        elif pending.rows >= enough:
            verdict = Dispatch(group, limit, Reason.FULL)
        elif pending.closed:
            verdict = Dispatch(group, limit, Reason.SHAPE)
        elif time_is_up:
            verdict = Dispatch(group, limit, Reason.DELAY if now >= ripe else Reason.DEADLINE)
        else:
            wake = min(wake, ripe, urgent)
            ahead = ahead or group
            continue
        if ahead is not None and queue.outranks(ahead, group):
            return Dispatch(ahead, limit, Reason.SHAPE)
        return verdict
    return WaitUntil(wake)


def _look_at(group: Group, preferred: tuple[int, ...], limit: int, ranked: bool) -> _Pending:
    total, largest, closed = 0, 0, False
    received = deadline = float("inf")
    for request in group.requests:
        if request.state != QUEUED:
            continue
        if total + request.rows > limit:
            closed = True
            break
        if ranked or not total:
            received, deadline = min(received, request.received), min(deadline, request.deadline)
        total += request.rows
        if total in preferred:
            largest = total
    group.memo = found = _Pending(total, largest, closed, received, deadline)
    return found
