"""`decide` against an independent reading of the rules, which works on plain tuples."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.batch_queue import BatchQueue
from gateway.core.batching import IDLE, Dispatch, Reason, WaitUntil, decide, in_time
from gateway.core.model import BatchPolicy
from tests.core.test_batch_queue import waiting_request

DELAY = 0.1


@dataclass(frozen=True)
class Waiting:
    key: str
    rows: int
    received: float
    deadline: float = 1e9


def queue_of(line: list[Waiting]) -> BatchQueue:
    queue = BatchQueue()
    for waiting in line:
        request = waiting_request(waiting.key, waiting.rows, waiting.deadline)
        request.received = waiting.received
        queue.push(request)
    return queue


def policy_of(limit: int = 8, delay: float = DELAY, preferred: tuple[int, ...] = (), merge: bool = True) -> BatchPolicy:
    return BatchPolicy(limit, merge, delay, preferred)


def run(line: list[Waiting], policy: BatchPolicy, now: float, execute_s: float = 0.0) -> tuple[object, ...]:
    """The decision carried out: ("go", key, rows that leave, reason), ("wait", instant) or ("idle",)."""
    queue = queue_of(line)
    decision = decide(queue, policy, now, execute_s)
    if isinstance(decision, Dispatch):
        taken = queue.take(decision.group, decision.rows)
        assert taken
        return ("go", decision.group.key, sum(request.rows for request in taken), decision.reason)
    return ("wait", decision.instant) if isinstance(decision, WaitUntil) else ("idle",)


def naive(line: list[Waiting], policy: BatchPolicy, now: float, execute_s: float) -> tuple[object, ...]:
    if not line:
        return ("idle",)
    keys = list(dict.fromkeys(waiting.key for waiting in sorted(line, key=lambda waiting: waiting.received)))
    groups = [[waiting for waiting in line if waiting.key == key] for key in keys]
    if policy.max_batch_size == 0 or not policy.merge:
        return ("go", keys[0], groups[0][0].rows, Reason.WORKER_FREE)
    verdicts = [naive_of_group(group, policy, now, execute_s) for group in groups]
    if policy.max_queue_delay_s == 0:
        return verdicts[0]
    going = [verdict for verdict in verdicts if verdict[0] == "go"]
    return going[0] if going else min(verdicts)


def naive_of_group(group: list[Waiting], policy: BatchPolicy, now: float, execute_s: float) -> tuple[object, ...]:
    limit, head = policy.max_batch_size, group[0]
    totals = [sum(waiting.rows for waiting in group[: count + 1]) for count in range(len(group))]
    sums = [total for total in totals if total <= limit]
    pending = sums[-1]
    if policy.max_queue_delay_s == 0:
        return ("go", head.key, pending, Reason.FULL if totals[-1] >= limit else Reason.WORKER_FREE)
    preferred = policy.preferred_batch_sizes or (limit,)
    passed = [total for total in sums if total in preferred]
    ripe, urgent = head.received + policy.max_queue_delay_s, head.deadline - 2 * execute_s
    if passed and now < min(ripe, urgent):
        return ("go", head.key, max(passed), Reason.FULL)
    why = {
        Reason.FULL: pending >= limit or pending >= max(preferred),
        Reason.SHAPE: pending < totals[-1],
        Reason.DELAY: now >= ripe,
        Reason.DEADLINE: now >= urgent,
    }
    reasons = [reason for reason, holds in why.items() if holds]
    return ("go", head.key, pending, reasons[0]) if reasons else ("wait", min(ripe, urgent))


def lines() -> st.SearchStrategy[list[Waiting]]:
    one = st.tuples(st.sampled_from("ab"), st.integers(1, 6), st.integers(0, 5), st.integers(5, 40))
    return st.lists(one, max_size=12).map(
        lambda items: [
            Waiting(key, rows, 10.0 + 0.03 * at, 10.0 + 0.03 * at + patience / 100)
            for key, rows, at, patience in sorted(items, key=lambda item: item[2])
        ]
    )


@settings(max_examples=600, deadline=None)
@given(
    lines(),
    st.sampled_from([0, 6, 8]),
    st.sampled_from([0.0, DELAY]),
    st.sets(st.integers(1, 6), max_size=3),
    st.booleans(),
    st.integers(0, 40),
    st.sampled_from([0.0, 0.02]),
)
def test_decide_agrees_with_the_naive_reading(
    line: list[Waiting], limit: int, delay: float, preferred: set[int], merge: bool, later: int, execute_s: float
) -> None:
    policy = policy_of(limit, delay, tuple(sorted(preferred)), merge)
    now = 10.0 + later / 100
    assert run(line, policy, now, execute_s) == naive(line, policy, now, execute_s)


@settings(max_examples=200, deadline=None)
@given(lines(), st.sets(st.integers(1, 6), max_size=3), st.sampled_from([0.0, 0.02]))
def test_waiting_ends_at_the_announced_instant(line: list[Waiting], preferred: set[int], execute_s: float) -> None:
    policy = policy_of(preferred=tuple(sorted(preferred)))
    decision = decide(queue_of(line), policy, 10.0, execute_s)
    if isinstance(decision, WaitUntil):
        # A wake-up that decides to wait until the same instant again would keep the loop busy.
        assert isinstance(decide(queue_of(line), policy, decision.instant, execute_s), Dispatch)


# Triton 51, measured: preferred [4], delay 100 ms.


def test_one_request_waits_for_the_delay() -> None:
    line = [Waiting("a", 1, 10.0)]
    assert run(line, policy_of(preferred=(4,)), 10.0) == ("wait", 10.1)
    assert run(line, policy_of(preferred=(4,)), 10.1) == ("go", "a", 1, Reason.DELAY)


def test_a_preferred_size_goes_at_once() -> None:
    assert run([Waiting("a", 1, 10.0)] * 4, policy_of(preferred=(4,)), 10.0) == ("go", "a", 4, Reason.FULL)


def test_five_make_four_now_and_one_after_the_delay() -> None:
    queue = queue_of([Waiting("a", 1, 10.0)] * 5)
    policy = policy_of(preferred=(4,))
    first = decide(queue, policy, 10.0)
    assert isinstance(first, Dispatch)
    assert len(queue.take(first.group, first.rows)) == 4
    assert decide(queue, policy, 10.0) == WaitUntil(10.1)
    second = decide(queue, policy, 10.1)
    assert isinstance(second, Dispatch)
    assert (len(queue.take(second.group, second.rows)), second.reason) == (1, Reason.DELAY)


def test_after_the_delay_all_pending_go_preferred_or_not() -> None:
    assert run([Waiting("a", 1, 10.0)] * 5, policy_of(preferred=(4,)), 10.2)[2] == 5


def test_rows_that_jump_over_the_largest_preferred_size_do_not_wait() -> None:
    line = [Waiting("a", 3, 10.0), Waiting("a", 2, 10.0)]
    assert run(line, policy_of(preferred=(4,)), 10.0) == ("go", "a", 5, Reason.FULL)


def test_a_request_that_does_not_fit_closes_the_batch() -> None:
    line = [Waiting("a", 5, 10.0), Waiting("a", 4, 10.0)]
    assert run(line, policy_of(), 10.0) == ("go", "a", 5, Reason.SHAPE)


def test_other_shapes_do_not_wait_behind_the_head() -> None:
    line = [Waiting("a", 1, 10.0), *[Waiting("b", 1, 10.01)] * 8]
    assert run(line, policy_of(), 10.02) == ("go", "b", 8, Reason.FULL)


def test_a_deadline_cuts_the_delay_short() -> None:
    line = [Waiting("a", 1, 10.0, deadline=10.05)]
    assert run(line, policy_of(), 10.0, execute_s=0.01) == ("wait", pytest.approx(10.03))
    assert run(line, policy_of(), 10.031, execute_s=0.01) == ("go", "a", 1, Reason.DEADLINE)


def test_without_a_delay_nothing_waits_for_a_preferred_size() -> None:
    assert run([Waiting("a", 1, 10.0)] * 3, policy_of(delay=0.0, preferred=(4,)), 10.0)[:3] == ("go", "a", 3)


@pytest.mark.parametrize("policy", [policy_of(limit=0), policy_of(merge=False)])
def test_requests_that_may_not_be_merged_go_one_by_one_in_order(policy: BatchPolicy) -> None:
    line = [Waiting("a", 2, 10.0), Waiting("b", 1, 10.001), Waiting("a", 3, 10.002)]
    queue = queue_of(line)
    order = []
    while isinstance(decision := decide(queue, policy, 10.0), Dispatch):
        taken = queue.take(decision.group, decision.rows)
        assert len(taken) == 1
        order.append(taken[0].received)
    assert order == [10.0, 10.001, 10.002]


def test_nobody_waits() -> None:
    assert decide(BatchQueue(), policy_of(), 1.0) is IDLE


NEAR = st.builds(
    Waiting,
    st.just("k"),
    st.integers(1, 4),
    st.just(0.0),
    st.sampled_from([0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 1e9]),
)


@settings(max_examples=500, deadline=None)
@given(line=st.lists(NEAR, min_size=1, max_size=12), rows=st.integers(1, 16), base=st.sampled_from([0.0, 0.25, 1.0]))
def test_a_batch_is_no_larger_than_its_most_urgent_member_can_wait_for(
    line: list[Waiting], rows: int, base: float
) -> None:
    """Against trying every length: the longest before the first that costs a member its deadline."""

    def late(count: int) -> set[int]:
        needed = base + 0.5 * sum(waiting.rows for waiting in line[:count])
        return {index for index, waiting in enumerate(line[:count]) if needed > waiting.deadline}

    hopeless = {index for index, waiting in enumerate(line) if base + 0.5 * waiting.rows > waiting.deadline}
    expected = 1
    while expected < len(line) and sum(waiting.rows for waiting in line[: expected + 1]) <= rows:
        if late(expected + 1) - hopeless:
            break
        expected += 1
    queue = queue_of(line)
    found = in_time(queue.groups[next(iter(queue.groups))], rows, 0.0, lambda b: base + 0.5 * b)
    assert found == sum(waiting.rows for waiting in line[:expected])
