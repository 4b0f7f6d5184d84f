"""Who waits where for another attempt, and in which company."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from gateway.core.fleet import Fleet, FleetPolicy, Member
from gateway.core.request import SETTLED, InferRequest, SequenceStep
from gateway.dispatcher_lanes import SLACK, Lane, Lanes, trouble_of
from tests.scripted import Backend, request_of, simulated


def members(count: int) -> list[Member]:
    fleet = Fleet(FleetPolicy(), random.Random(0), 8)
    return [fleet.join(replica, 0.0) for replica in Backend(count, 1).replicas]


def waiting_rows(count: int, tried: tuple[Member, ...] = (), key: str = "k") -> list[InferRequest]:
    made = [request_of([number], key=key) for number in range(count)]
    for request in made:
        trouble_of(request).tried = tried
    return made


@simulated
async def test_the_same_key_and_the_same_history_share_a_group() -> None:
    one, two = members(2)
    lanes = Lanes()
    lanes.retry(waiting_rows(2, (one,)), 0.0)
    lanes.retry(waiting_rows(1, (one,)), 0.0)
    lanes.retry(waiting_rows(1, (two,)), 0.0)
    lanes.retry(waiting_rows(1, (one,), key="other"), 0.0)
    assert [group.live for group in lanes.shared()] == [3, 1, 1]
    assert (lanes.count, lanes.rows, lanes.nbytes) == (5, 5, 40)


@simulated
async def test_who_pauses_holds_nobody_up_and_joins_a_pause_under_way() -> None:
    (one,) = members(1)
    lanes = Lanes()
    lanes.retry(waiting_rows(1, (one,)), 10.0)
    lanes.retry(waiting_rows(1, (one,)), 10.0, 10.5)
    lanes.retry(waiting_rows(1, (one,)), 10.1, 10.9)
    assert [(group.live, group.not_before) for group in lanes.shared()] == [(1, 0.0), (2, 10.5)]
    lanes.retry(waiting_rows(1, (one,)), 11.0, 11.2)  # that pause was over, and nobody could take them
    assert [(group.live, group.not_before) for group in lanes.shared()] == [(1, 0.0), (3, 11.2)]


@simulated
async def test_steps_of_a_sequence_keep_their_order_and_one_that_comes_back_is_first() -> None:
    lanes = Lanes()
    steps = [request_of([number], sequence=SequenceStep(7)) for number in range(3)]
    for step in steps:
        lanes.park(step, 7)
    (group,) = lanes.shared()
    assert lanes.take(group, 8, one=True) == steps[:1]
    lanes.park(steps[0], 7, 5.0, first=True)
    assert group.not_before == 5.0
    assert [lanes.take(group, 8, one=True) for _ in steps] == [[step] for step in steps]
    assert lanes.shared() == []


@simulated
async def test_ghosts_are_dropped_before_they_outnumber_the_living() -> None:
    lanes = Lanes()
    rows = waiting_rows(100)
    lanes.isolate(Lane.QUARANTINE, rows)
    head = lanes.head(Lane.QUARANTINE)
    assert head is not None
    for request in rows[:99]:
        request.state = SETTLED
        lanes.leave(request)
        assert len(head.members) <= 2 * head.live + SLACK + 1
    assert [*lanes] == rows[99:]
    rows[99].state = SETTLED
    lanes.leave(rows[99])
    lanes.leave(rows[99])  # harmless
    assert lanes.head(Lane.QUARANTINE) is None
    assert repr(lanes) == "<Lanes 0 requests, 0 rows>"


@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    gone=st.sets(st.integers(0, 11)),
    limit=st.integers(1, 8),
    one=st.booleans(),
)
def test_what_is_taken_fits_is_alive_and_keeps_its_order(
    rows: list[int], gone: set[int], limit: int, one: bool
) -> None:
    lanes = Lanes()
    requests = [request_of(list(range(count))) for count in rows]
    lanes.isolate(Lane.QUARANTINE, requests)
    for index in gone & set(range(len(rows))):
        requests[index].state = SETTLED
        lanes.leave(requests[index])
    alive = [request for request in requests if request.state != SETTLED]
    taken: list[InferRequest] = []
    while (head := lanes.head(Lane.QUARANTINE)) is not None:
        batch = lanes.take(head, limit, one)
        assert batch
        assert len(batch) == 1 or (not one and sum(request.rows for request in batch) <= limit)
        taken += batch
    assert taken == alive
    assert (lanes.count, lanes.rows, lanes.nbytes) == (0, 0, 0)
