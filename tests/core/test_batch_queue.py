"""A naive queue of lists is run beside the real one; after every step they must agree."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from gateway.core.batch_queue import SLACK, BatchQueue, Group
from gateway.core.request import QUEUED, RUNNING, SETTLED, InferRequest
from tests.scripted import request_of

KEYS = st.sampled_from(["a", "b", "c"])


def waiting_request(key: object = "a", rows: int = 1, deadline: float = 100.0) -> InferRequest:
    request = request_of(list(range(rows)))
    request.key, request.deadline = key, deadline
    return request


class QueueMachine(RuleBasedStateMachine):
    requests: Bundle[Any] = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.queue = BatchQueue()
        self.lines: dict[object, list[InferRequest]] = {}
        self.running: list[list[InferRequest]] = []
        self.settled: list[InferRequest] = []
        self.timed: list[InferRequest] = []
        """Requests whose deadline has not been reported yet."""
        self.now = 0.0

    @rule(target=requests, key=KEYS, rows=st.integers(1, 5), patience=st.integers(1, 20))
    def push(self, key: str, rows: int, patience: int) -> InferRequest:
        request = waiting_request(key, rows, self.now + patience)
        self.queue.push(request)
        # The room may hold dead entries, but never many more than living ones.
        assert max(len(self.queue._in_turn), len(self.queue._early)) <= 2 * self.queue.unsettled + SLACK + 1
        self.lines.setdefault(key, []).append(request)
        self.timed.append(request)
        return request

    @rule(key=KEYS, max_rows=st.integers(1, 8))
    def take(self, key: str, max_rows: int) -> None:
        line = self.lines.get(key, [])
        if not line:
            assert key not in self.queue.groups
            return
        expected: list[InferRequest] = []
        room = max_rows
        while line and (line[0].rows <= room or not expected):
            room -= line[0].rows
            expected.append(line.pop(0))
        taken = self.queue.take(self.queue.groups[key], max_rows)
        assert taken == expected
        assert all(request.state == RUNNING for request in taken)
        self.running.append(taken)

    @rule(request=requests)
    def settle(self, request: InferRequest) -> None:
        if request.state == SETTLED:
            return
        if request.state == QUEUED:
            self.lines[request.key].remove(request)
        self.queue.settled(request)
        assert request.state == SETTLED
        self.settled.append(request)

    @rule(step=st.integers(0, 8))
    def expire(self, step: int) -> None:
        self.now += step
        due = [r for r in self.timed if r.deadline <= self.now and r.state != SETTLED]
        self.timed = [r for r in self.timed if r.deadline > self.now]
        while (request := self.queue.expired(self.now)) is not None:
            due.remove(request)
            self.settle(request)
        assert due == []

    @invariant()
    def counters_never_drift(self) -> None:
        everyone = [request for line in self.lines.values() for request in line]
        assert self.queue.count == len(everyone)
        assert self.queue.rows == sum(request.rows for request in everyone)
        assert self.queue.nbytes == sum(request.nbytes for request in everyone)
        held = [r for batch in self.running for r in batch if r.state != SETTLED]
        assert self.queue.unsettled == len(everyone) + len(held)
        for key, line in self.lines.items():
            group = self.queue.groups.get(key)
            assert (group is None) == (not line)
            if group is not None:
                assert (group.rows, group.count) == (sum(request.rows for request in line), len(line))
                assert group.head() is line[0]

    @invariant()
    def who_waits_is_who_waits(self) -> None:
        everyone = [request for line in self.lines.values() for request in line]
        assert sorted(map(id, self.queue.waiting())) == sorted(map(id, everyone))
        assert all(request.state == SETTLED for request in self.settled)
        live = [r for r in self.timed if r.state != SETTLED]
        assert self.queue.next_deadline() == min((r.deadline for r in live), default=None)


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("deadline", [1.0, 3.0])
def test_ghosts_grow_neither_the_deadlines_nor_the_line(deadline: float) -> None:
    queue = BatchQueue()
    head = waiting_request(deadline=deadline)
    queue.push(head)
    longest = 0
    for _ in range(10_000):
        request = waiting_request(deadline=2.0)
        queue.push(request)
        queue.settled(request)
        longest = max(longest, len(queue._in_turn), len(queue._early), len(queue.groups["a"].requests))
    assert longest <= 2 * 2 + SLACK + 1
    assert queue.take(queue.groups["a"], 8) == [head]


def test_a_request_larger_than_asked_for_goes_alone() -> None:
    queue = BatchQueue()
    large, small = waiting_request(rows=5), waiting_request()
    queue.push(large)
    queue.push(small)
    assert queue.take(queue.groups["a"], 3) == [large]
    assert (queue.rows, queue.count) == (1, 1)
    assert queue.take(queue.groups["a"], 3) == [small]
    assert not queue.groups


def test_nothing_is_taken_from_a_group_of_ghosts() -> None:
    queue = BatchQueue()
    gone = waiting_request()
    queue.push(gone)
    group = queue.groups["a"]
    queue.settled(gone)
    assert not queue.groups
    assert queue.take(group, 8) == []
    assert (queue.rows, queue.nbytes, queue.count, queue.unsettled) == (0, 0, 0, 0)


def test_a_request_without_rows_is_not_lost() -> None:
    queue = BatchQueue()
    empty, other = waiting_request(rows=0), waiting_request(rows=0)
    queue.push(empty)
    queue.push(other)
    queue.settled(other)
    assert queue.waiting() == [empty]
    assert queue.take(queue.groups["a"], 1) == [empty]


def test_statistics_show_the_longest_wait() -> None:
    queue = BatchQueue()
    for received, key in ((5.0, "a"), (3.0, "b"), (4.0, "b")):
        request = waiting_request(key, rows=2)
        request.received = received
        queue.push(request)
    shown = queue.statistics()
    assert (shown.requests, shown.rows, shown.nbytes, shown.groups, shown.oldest) == (3, 6, 48, 2, 3.0)
    assert repr(queue) == "<BatchQueue 3 requests, 6 rows, 2 groups>"
    assert Group("x", deque()).head() is None


def test_groups_stand_in_the_order_of_their_heads() -> None:
    queue = BatchQueue()
    for received, key in ((5.0, "a"), (3.0, "b"), (4.0, "c"), (6.0, "b")):
        request = waiting_request(key)
        request.received = received
        queue.push(request)
    assert [group.key for group in queue.in_order()] == ["b", "c", "a"]
    queue.take(queue.first(), 1)
    assert [group.key for group in queue.in_order()] == ["c", "a", "b"]
    assert queue.first().key == "c"
    assert not queue.outranks(queue.groups["c"], queue.groups["a"])
