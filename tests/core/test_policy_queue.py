"""A naive room, which keeps everyone in one list and sorts it, is run beside the real one; they must always agree."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from gateway.core.batch_queue import SLACK
from gateway.core.policy_queue import Line, PolicyQueue, queue_time_s
from gateway.core.request import QUEUED, SETTLED, InferRequest
from gateway.core.scheduling import QueuePolicy, Scheduling
from tests.scripted import request_of

KEYS = st.sampled_from(["a", "b"])
REJECT = QueuePolicy("REJECT", default_timeout_s=5.0, allow_timeout_override=True, max_queue_size=4)
DELAY = QueuePolicy("DELAY", default_timeout_s=3.0, allow_timeout_override=True)
STATED = Scheduling(3, 2, DELAY, ((1, QueuePolicy(max_queue_size=6)), (3, REJECT)))


def waiting_request(
    key: object = "a",
    rows: int = 1,
    priority: int = 0,
    received: float = 0.0,
    stated_timeout_s: float = 0.0,
    deadline: float = 1e6,
) -> InferRequest:
    request = request_of(list(range(rows)), priority=priority, stated_timeout_s=stated_timeout_s)
    request.key, request.received, request.deadline = key, received, deadline
    return request


@dataclass
class Naive:
    request: InferRequest
    level: int
    arrival: int
    until: float
    delayed: bool = False
    waits: bool = True

    @property
    def order(self) -> tuple[int, bool, int]:
        return self.level, self.delayed, self.arrival


class PolicyMachine(RuleBasedStateMachine):
    requests: Bundle[Any] = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.queue = PolicyQueue(STATED)
        self.known: dict[InferRequest, Naive] = {}
        self.running: list[list[InferRequest]] = []
        self.now = 0.0
        self.arrivals = 0

    def line(self, key: object) -> list[InferRequest]:
        waiting = [naive for naive in self.known.values() if naive.waits and naive.request.key == key]
        return [naive.request for naive in sorted(waiting, key=lambda naive: naive.order)]

    @rule(
        target=requests,
        key=KEYS,
        rows=st.integers(1, 4),
        priority=st.integers(0, 5),
        stated=st.sampled_from([0.0, 1.0, 4.0, 9.0]),
        patience=st.integers(1, 30),
    )
    def push(self, key: str, rows: int, priority: int, stated: float, patience: int) -> InferRequest:
        self.arrivals += 1
        request = waiting_request(key, rows, priority, self.now, stated, self.now + patience)
        level = priority if priority in (1, 2, 3) else 2
        allowed = {1: inf, 2: min(stated or inf, 3.0), 3: min(stated or inf, 5.0)}[level]
        self.queue.push(request)
        self.known[request] = Naive(request, level, self.arrivals, self.now + allowed)
        return request

    @rule(max_rows=st.integers(1, 8))
    def take_the_first(self, max_rows: int) -> None:
        heads = [line[0] for key in "ab" if (line := self.line(key))]
        if not heads:
            assert not self.queue.groups
            return
        head = min(heads, key=lambda request: self.known[request].order)
        line, room = self.line(head.key), max_rows
        expected: list[InferRequest] = []
        while line and (line[0].rows <= room or not expected):
            room -= line[0].rows
            expected.append(line.pop(0))
        taken = self.queue.take(self.queue.first(), max_rows)
        assert taken == expected
        for request in taken:
            self.known[request].waits = False
        self.running.append(taken)

    @rule(request=requests)
    def settle(self, request: InferRequest) -> None:
        if request.state != SETTLED:
            self.queue.settled(request)
            del self.known[request]

    @rule(step=st.integers(0, 4))
    def time_passes(self, step: int) -> None:
        self.now += step
        late = [request for request, naive in self.known.items() if request.deadline <= self.now]
        while (request := self.queue.expired(self.now)) is not None:
            late.remove(request)
            self.settle(request)
        assert late == []
        due = [naive for naive in self.known.values() if naive.waits and naive.until <= self.now]
        refused = [naive.request for naive in due if naive.level == 3]
        while (request := self.queue.overdue(self.now)) is not None:
            assert request.state == QUEUED
            refused.remove(request)
            self.settle(request)
        assert refused == []
        for naive in due:
            naive.delayed, naive.until = True, inf

    @invariant()
    def the_rooms_agree(self) -> None:
        waiting = [naive for naive in self.known.values() if naive.waits]
        assert self.queue.count == len(waiting)
        assert self.queue.rows == sum(naive.request.rows for naive in waiting)
        assert self.queue.unsettled == len(self.known) == len(self.queue._standings)
        assert sorted(map(id, self.queue.waiting())) == sorted(id(naive.request) for naive in waiting)
        heads = []
        for key in "ab":
            line = self.line(key)
            group = self.queue.groups.get(key)
            assert (group is None) == (not line)
            if group is not None:
                assert list(group.requests) == line
                assert len(group.requests) == len(line) == group.count
                assert group.head() is line[0]
                heads.append(self.known[line[0]])
        order = [self.known[group.requests[0]].order for group in self.queue.in_order()]
        assert order == sorted(naive.order for naive in heads)
        instants = [request.deadline for request in self.known] + [naive.until for naive in waiting]
        assert self.queue.next_deadline() == min((i for i in instants if i < inf), default=None)

    @invariant()
    def levels_are_full_when_they_are(self) -> None:
        for level, bound in ((1, 6), (2, 0), (3, 4)):
            count = sum(naive.level == level for naive in self.known.values() if naive.waits)
            full = bound if bound and count >= bound else 0
            assert self.queue.full_for(waiting_request(priority=level)) == full


TestPolicyQueue = PolicyMachine.TestCase
TestPolicyQueue.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(("priority", "level"), [(0, 2), (1, 1), (3, 3), (4, 2), (99, 2), (2**64 - 1, 2)])
def test_a_priority_that_does_not_exist_is_the_default(priority: int, level: int) -> None:
    assert PolicyQueue(STATED).level_of(waiting_request(priority=priority)) == level


def test_without_levels_a_priority_means_nothing() -> None:
    queue = PolicyQueue(Scheduling(default_queue_policy=REJECT))
    first, second = waiting_request(priority=2), waiting_request(priority=1)
    queue.push(first)
    queue.push(second)
    assert queue.level_of(second) == 0
    assert queue.policy_of(second) is REJECT
    assert queue.take(queue.first(), 1) == [first]


@pytest.mark.parametrize(
    ("default_s", "override", "stated_s", "expected"),
    [
        (0.0, True, 0.05, inf),  # Triton 51, measured: nothing to shorten
        (0.0, False, 0.0, inf),
        (10.0, True, 0.05, 0.05),
        (10.0, True, 0.0, 10.0),
        (10.0, True, 20.0, 10.0),  # only shorter
        (10.0, False, 0.05, 10.0),
    ],
)
def test_how_long_a_request_may_wait(default_s: float, override: bool, stated_s: float, expected: float) -> None:
    policy = QueuePolicy("REJECT", default_s, override)
    assert queue_time_s(policy, waiting_request(stated_timeout_s=stated_s)) == expected


def test_where_nothing_is_stated_nothing_limits_the_queue() -> None:
    assert queue_time_s(None, waiting_request(stated_timeout_s=0.05)) == inf
    assert PolicyQueue(Scheduling(2, 1)).full_for(waiting_request()) == 0


def test_a_level_may_state_its_own_policy() -> None:
    queue = PolicyQueue(STATED)
    assert queue.policy_of(waiting_request(priority=3)) is REJECT
    assert queue.policy_of(waiting_request(priority=2)) is DELAY


def test_timers_of_those_who_left_do_not_pile_up() -> None:
    queue = PolicyQueue(Scheduling(default_queue_policy=QueuePolicy(default_timeout_s=1e6)))
    queue.push(waiting_request())
    longest = 0
    for _ in range(5_000):
        request = waiting_request()
        queue.push(request)
        queue.settled(request)
        longest = max(longest, len(queue._timers))
    assert longest <= 2 * 2 + SLACK + 1


def test_a_long_line_lets_go_of_whom_it_served() -> None:
    queue = PolicyQueue(Scheduling(2, 1))
    for _ in range(1000):
        queue.push(waiting_request())
    group = queue.first()
    line = group.requests
    assert isinstance(line, Line)
    for left in range(999, -1, -1):
        queue.take(group, 1)
        assert len(line) == left
        assert len(line._entries) <= 2 * left + 64
    assert not queue.groups


def test_many_levels_cost_only_those_that_are_used() -> None:
    queue = PolicyQueue(Scheduling(2**64 - 1, 2**63))
    request = waiting_request(priority=2**64 - 1)
    queue.push(request)
    queue.push(urgent := waiting_request(priority=1))
    assert queue.take(queue.first(), 8) == [urgent, request]
    assert queue._waiting == {}
