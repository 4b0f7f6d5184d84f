from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.admission import MAX_TIMEOUT_S, admit, admit_in_order, admit_to_level, deadline_of
from gateway.core.arrival_order import ArrivalOrder
from gateway.core.batch_queue import BatchQueue
from gateway.core.model import BatchPolicy
from gateway.core.policy_queue import PolicyQueue
from gateway.core.request import InferRequest
from gateway.core.scheduling import QueuePolicy, Scheduling
from gateway.errors import Overloaded, TooLarge
from tests.scripted import request_of

POLICY = BatchPolicy(8, max_queue_rows=10, max_queue_bytes=1000)


def sized(rows: int, nbytes: int) -> InferRequest:
    request = request_of(list(range(rows)))
    request.nbytes = nbytes
    return request


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 700)), max_size=20))
def test_the_queue_never_exceeds_its_bounds_and_refuses_only_what_would(sizes: list[tuple[int, int]]) -> None:
    queue = BatchQueue()
    for rows, nbytes in sizes:
        request = sized(rows, nbytes)
        rejected = admit(queue, POLICY, request)
        fits = queue.rows + rows <= 10 and queue.nbytes + nbytes <= 1000
        assert (rejected is None) is fits
        if rejected is None:
            queue.push(request)
    assert queue.rows <= 10
    assert queue.nbytes <= 1000


@pytest.mark.parametrize(("rows", "nbytes", "reason"), [(6, 0, "queue_rows"), (1, 501, "queue_bytes")])
def test_a_refusal_says_which_bound(rows: int, nbytes: int, reason: str) -> None:
    queue = BatchQueue()
    queue.push(sized(5, 500))
    rejected = admit(queue, POLICY, sized(rows, nbytes))
    assert rejected is not None
    assert (rejected.reason, rejected.error) == (reason, Overloaded)
    assert rejected.message.startswith("Exceeds maximum queue size")


@pytest.mark.parametrize(("rows", "nbytes"), [(11, 0), (1, 1001)])
def test_what_can_never_fit_is_not_told_to_come_back(rows: int, nbytes: int) -> None:
    rejected = admit(BatchQueue(), POLICY, sized(rows, nbytes))
    assert rejected is not None
    assert rejected.error is TooLarge
    assert not rejected.error.retryable
    assert "send smaller requests" in rejected.message


def test_the_bounds_themselves_are_allowed() -> None:
    assert admit(BatchQueue(), POLICY, sized(10, 1000)) is None


@pytest.mark.parametrize(
    ("timeout_s", "expected"), [(0.0, 130.0), (0.25, 100.25), (60.0, 160.0), (1e18, 100.0 + MAX_TIMEOUT_S)]
)
def test_deadlines(timeout_s: float, expected: float) -> None:
    request = sized(1, 0)
    request.timeout_s, request.received = timeout_s, 100.0
    assert deadline_of(BatchPolicy(8, deadline_s=30.0), request) == expected


@pytest.mark.parametrize(
    ("timeout_s", "stated_s", "alone", "with_policy"),
    [
        (0.0, 0.5, 100.5, 130.0),
        (2.0, 0.5, 100.5, 102.0),
        (0.5, 2.0, 100.5, 100.5),
        (0.0, 1e18, 100.0 + MAX_TIMEOUT_S, 130.0),
    ],
)
def test_a_stated_timeout_is_a_deadline_only_where_no_queue_policy_is(
    timeout_s: float, stated_s: float, alone: float, with_policy: float
) -> None:
    request = sized(1, 0)
    request.timeout_s, request.stated_timeout_s, request.received = timeout_s, stated_s, 100.0
    policy = BatchPolicy(8, deadline_s=30.0)
    assert deadline_of(policy, request) == alone
    assert deadline_of(policy, request, QueuePolicy()) == with_policy


def test_a_level_is_full_when_as_many_requests_wait_as_its_policy_says() -> None:
    queue = PolicyQueue(Scheduling(2, 1, QueuePolicy(max_queue_size=2)))
    for _ in range(2):
        assert admit_to_level(queue, sized(5, 0)) is None
        queue.push(sized(5, 0))
    rejected = admit_to_level(queue, sized(5, 0))
    assert rejected is not None
    assert (rejected.reason, rejected.error) == ("queue_size", Overloaded)
    assert rejected.message.startswith("Exceeds maximum queue size: 2 requests with priority 1 wait")
    other = sized(1, 0)
    other.priority = 2
    assert admit_to_level(queue, other) is None


@pytest.mark.parametrize(("rows", "nbytes", "fits"), [(4, 100, True), (5, 100, False), (4, 101, False)])
def test_answers_that_are_held_take_room_in_the_queue(rows: int, nbytes: int, fits: bool) -> None:
    queue, order = BatchQueue(), ArrivalOrder()
    queue.push(sized(3, 400))
    for held in (False, True):
        request = sized(3, 500)
        request.settle = lambda _: None
        order.enter(request)
        if held:
            order.settled(request)
    assert (admit_in_order(queue, order, POLICY, sized(rows, nbytes)) is None) is fits
