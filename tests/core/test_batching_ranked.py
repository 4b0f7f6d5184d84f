"""`decide` on a queue with priority levels, against an independent reading of the rules."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.batch_queue import BatchQueue
from gateway.core.batching import Dispatch, Reason, WaitUntil, decide
from gateway.core.model import BatchPolicy
from gateway.core.policy_queue import PolicyQueue
from gateway.core.scheduling import QueuePolicy, Scheduling
from tests.core.test_policy_queue import waiting_request

DELAY = 0.1
LEVELS = Scheduling(3, 3)


@dataclass(frozen=True)
class Waiting:
    key: str
    rows: int
    priority: int
    received: float = 10.0
    deadline: float = 1e9


def queue_of(line: list[Waiting]) -> PolicyQueue:
    queue = PolicyQueue(LEVELS)
    for one in line:
        queue.push(waiting_request(one.key, one.rows, one.priority, one.received, 0.0, one.deadline))
    return queue


def policy_of(limit: int = 8, delay: float = DELAY, preferred: tuple[int, ...] = ()) -> BatchPolicy:
    return BatchPolicy(limit, True, delay, preferred)


def run(line: list[Waiting], policy: BatchPolicy, now: float, execute_s: float = 0.0) -> tuple[object, ...]:
    """The decision carried out: ("go", key, priorities of those who leave, reason) or ("wait", instant)."""
    queue = queue_of(line)
    decision = decide(queue, policy, now, execute_s)
    if isinstance(decision, Dispatch):
        taken = queue.take(decision.group, decision.rows)
        return ("go", decision.group.key, tuple((r.priority, r.rows) for r in taken), decision.reason)
    return ("wait", decision.instant) if isinstance(decision, WaitUntil) else ("idle",)


def naive(line: list[Waiting], policy: BatchPolicy, now: float, execute_s: float) -> tuple[object, ...]:
    if not line:
        return ("idle",)
    ordered = sorted(line, key=lambda one: one.priority)
    groups = [[one for one in ordered if one.key == key] for key in dict.fromkeys(one.key for one in ordered)]
    wakes: list[float] = []
    waits: list[Waiting] | None = None
    for group in groups:
        pending = naive_prefix(group, policy.max_batch_size)
        verdict = naive_of_group(group, pending, policy, now, execute_s)
        if isinstance(verdict, float):
            wakes.append(verdict)
            waits = waits or group
            continue
        who, reason = verdict
        if waits is not None and waits[0].priority < group[0].priority:
            who, reason = naive_prefix(waits, policy.max_batch_size), Reason.SHAPE
        return ("go", who[0].key, tuple((one.priority, one.rows) for one in who), reason)
    return ("wait", min(wakes))


def naive_prefix(group: list[Waiting], limit: int) -> list[Waiting]:
    return [one for place, one in enumerate(group) if sum(w.rows for w in group[: place + 1]) <= limit]


def naive_of_group(
    group: list[Waiting], pending: list[Waiting], policy: BatchPolicy, now: float, execute_s: float
) -> tuple[list[Waiting], Reason] | float:
    rows = sum(one.rows for one in pending)
    if policy.max_queue_delay_s == 0.0:
        total = sum(one.rows for one in group)
        return pending, Reason.FULL if total >= policy.max_batch_size else Reason.WORKER_FREE
    preferred = policy.preferred_batch_sizes or (policy.max_batch_size,)
    ripe = min(one.received for one in pending) + policy.max_queue_delay_s
    urgent = min(one.deadline for one in pending) - 2 * execute_s
    exact = [n for n in range(1, len(pending) + 1) if sum(one.rows for one in pending[:n]) in preferred]
    if exact and now < min(ripe, urgent):
        return pending[: exact[-1]], Reason.FULL
    if rows >= policy.max_batch_size or rows >= max(preferred):
        return pending, Reason.FULL
    if len(pending) < len(group):
        return pending, Reason.SHAPE
    if now >= ripe:
        return pending, Reason.DELAY
    return (pending, Reason.DEADLINE) if now >= urgent else min(ripe, urgent)


def lines() -> st.SearchStrategy[list[Waiting]]:
    one = st.tuples(st.sampled_from("abc"), st.integers(1, 6), st.integers(1, 3), st.integers(0, 5), st.integers(5, 40))
    return st.lists(one, max_size=12).map(
        lambda items: [
            Waiting(key, rows, priority, 10.0 + 0.03 * at, 10.0 + 0.03 * at + patience / 100)
            for key, rows, priority, at, patience in sorted(items, key=lambda item: item[3])
        ]
    )


@settings(max_examples=600, deadline=None)
@given(
    lines(),
    st.sampled_from([6, 8]),
    st.sampled_from([0.0, DELAY]),
    st.sets(st.integers(1, 6), max_size=3),
    st.integers(0, 40),
    st.sampled_from([0.0, 0.02]),
)
def test_decide_agrees_with_the_naive_reading(
    line: list[Waiting], limit: int, delay: float, preferred: set[int], later: int, execute_s: float
) -> None:
    policy = policy_of(limit, delay, tuple(sorted(preferred)))
    now = 10.0 + later / 100
    assert run(line, policy, now, execute_s) == naive(line, policy, now, execute_s)


@settings(max_examples=200, deadline=None)
@given(lines(), st.integers(0, 40))
def test_nobody_of_a_lower_level_goes_before_anybody_who_waits(line: list[Waiting], later: int) -> None:
    queue, now = queue_of(line), 10.0 + later / 100
    while isinstance(decision := decide(queue, policy_of(), now), Dispatch):
        taken = queue.take(decision.group, decision.rows)
        best_left = min((request.priority for request in queue.waiting()), default=9)
        assert taken[0].priority <= best_left
        priorities = [request.priority for request in taken]
        assert priorities == sorted(priorities)


def test_a_batch_mixes_levels_in_their_order() -> None:
    line = [Waiting("a", 1, 3), Waiting("a", 2, 1), Waiting("a", 1, 2), Waiting("a", 3, 1)]
    went = ("go", "a", ((1, 2), (1, 3), (2, 1), (3, 1)), Reason.WORKER_FREE)
    assert run(line, policy_of(delay=0.0), 10.0) == went


def test_the_oldest_ends_the_delay_though_it_is_not_the_head() -> None:
    line = [Waiting("a", 1, 3, 10.0), Waiting("a", 1, 1, 10.08)]
    assert run(line, policy_of(), 10.09) == ("wait", pytest.approx(10.1))
    assert run(line, policy_of(), 10.1) == ("go", "a", ((1, 1), (3, 1)), Reason.DELAY)


def test_a_full_batch_of_a_lower_level_does_not_take_the_replica_from_a_higher_one() -> None:
    line = [*[Waiting("a", 1, 2)] * 8, Waiting("b", 1, 1)]
    assert run(line, policy_of(), 10.0) == ("go", "b", ((1, 1),), Reason.SHAPE)
    # Of the same level, the full one goes.
    line = [Waiting("b", 1, 2), *[Waiting("a", 1, 2)] * 8]
    assert run(line, policy_of(), 10.0) == ("go", "a", ((2, 1),) * 8, Reason.FULL)


def test_a_request_larger_than_the_batch_is_looked_at_alone() -> None:
    line = [Waiting("a", 9, 1, 10.02), Waiting("a", 1, 2, 10.0)]
    assert run(line, policy_of(), 10.03) == ("go", "a", ((1, 9),), Reason.SHAPE)


def test_who_was_put_back_goes_behind_the_fresh_of_other_shapes_too() -> None:
    queue = PolicyQueue(Scheduling(default_queue_policy=QueuePolicy("DELAY", default_timeout_s=1.0)))
    queue.push(waiting_request("a", received=10.0))
    queue.push(waiting_request("b", received=10.5))
    assert queue.overdue(11.0) is None
    decision = decide(queue, policy_of(delay=0.0), 11.0)
    assert isinstance(decision, Dispatch)
    assert decision.group.key == "b"


DELAYED = Scheduling(2, 2, QueuePolicy("DELAY", default_timeout_s=0.05))
CHANGES = st.lists(
    st.tuples(st.sampled_from(["push", "push", "leave", "take", "later"]), st.integers(0, 20)), max_size=30
)


@settings(max_examples=300, deadline=None)
@given(CHANGES, st.booleans())
def test_what_is_remembered_of_a_group_is_forgotten_when_it_changes(
    changes: list[tuple[str, int]], ranked: bool
) -> None:
    queue = PolicyQueue(DELAYED) if ranked else BatchQueue()
    policy, now = policy_of(preferred=(3, 5)), 10.0
    for what, number in changes:
        waiting = queue.waiting()
        if what == "push":
            queue.push(waiting_request("ab"[number % 2], 1 + number % 4, 1 + number % 3 % 2, now))
        elif what == "leave" and waiting:
            queue.settled(waiting[number % len(waiting)])
        elif what == "take" and queue.groups:
            queue.take(queue.first(), 1 + number % 5)
        now += 0.02 if what == "later" else 0.0
        if isinstance(queue, PolicyQueue):
            assert queue.overdue(now) is None
        remembered = decide(queue, policy, now)
        for group in queue.groups.values():
            group.memo = None
        assert remembered == decide(queue, policy, now)
