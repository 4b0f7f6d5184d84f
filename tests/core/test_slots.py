"""The limit of batches in flight, against small models of a replica."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.batch_time import BatchTime
from gateway.core.slots import AdaptiveSlots

ROWS = 16


def run(compute_s: float, network_s: float, maximum: int = 8, tells: bool = False, seconds: float = 60.0) -> list[int]:
    """A replica that works off one batch after the other, kept as busy as the limit allows; the limits over time."""
    time, slots, now = BatchTime(), AdaptiveSlots(maximum), 0.0
    limits = []
    while now < seconds:
        in_flight = slots.limit
        took_s = max(compute_s + network_s, in_flight * compute_s)
        now += took_s / in_flight
        time.observe(ROWS, took_s, now, in_flight)
        slots.observe(now, in_flight, took_s, time.predict_s(ROWS), compute_s if tells else 0.0)
        limits.append(slots.limit)
    return limits


def test_it_starts_with_one() -> None:
    assert AdaptiveSlots(8).limit == 1


@pytest.mark.parametrize(
    ("network_s", "limit"),
    [(0.0003, 1), (0.0012, 1), (0.0013, 2), (0.008, 2), (0.0126, 2), (0.02, 3), (0.5, 8)],
)
def test_by_compute_time_it_covers_the_round_trip(network_s: float, limit: int) -> None:
    # 12.6 ms batches and 4 ms one way: two in flight were measured best; with 0.3 ms in all, one.
    limits = run(0.0126, network_s, tells=True)
    assert limits[-1] == limit
    assert max(limits) == limit


@pytest.mark.parametrize("network_s", [0.0006, 0.008, 0.03])
def test_without_compute_times_it_settles_near_what_keeps_the_replica_busy(network_s: float) -> None:
    compute_s = 0.0126
    busy = (compute_s + network_s) / compute_s
    limits = run(compute_s, network_s)
    settled = limits[len(limits) // 2 :]
    assert busy - 1 < min(settled), "it keeps the replica busy"
    assert max(settled) <= 1.5 * busy + 1, "and does not queue there for ever"


def test_congestion_is_given_back() -> None:
    # Another gateway takes its share: what is left behaves as if every batch met three others.
    slots, now = AdaptiveSlots(8), 0.0
    for _ in range(1000):
        now += 0.1
        slots.observe(now, slots.limit, 0.01, 0.01, 0.0)
    assert slots.limit == 8
    for _ in range(400):
        now += 0.1
        slots.observe(now, slots.limit, 0.04, 0.01, 0.0)
    assert slots.limit == 2


@pytest.mark.parametrize("tells", [False, True])
def test_nothing_grows_that_is_not_used(tells: bool) -> None:
    slots, now = AdaptiveSlots(8), 0.0
    for _ in range(1000):
        now += 0.1
        slots.observe(now, 1, 0.2, 0.2, 0.001 if tells else 0.0)
    assert slots.limit <= (2 if not tells else 8)
    slots = AdaptiveSlots(8)
    for turn in range(1000):
        slots.observe(0.1 * turn, 0, 0.2, 0.2, 0.001 if tells else 0.0)
    assert slots.limit == 1


def test_it_takes_a_second_and_ten_batches_to_change() -> None:
    few, quick = AdaptiveSlots(8), AdaptiveSlots(8)
    for turn in range(9):
        few.observe(10.0 * turn, 1, 0.01, 0.01, 0.0)
    for turn in range(500):
        quick.observe(0.001 * turn, 1, 0.01, 0.01, 0.0)
    assert few.statistics().exact == quick.statistics().exact == 1.0
    few.observe(90.0, 1, 0.01, 0.01, 0.0)
    assert few.statistics().exact == pytest.approx(1.2)


@pytest.mark.parametrize("tells", [False, True])
def test_an_overload_costs_a_slot_at_once_and_growth_for_a_second(tells: bool) -> None:
    slots, now = AdaptiveSlots(4), 0.0
    compute_s = 0.002 if tells else 0.0
    for _ in range(400):
        now += 0.1
        slots.observe(now, slots.limit, 0.01, 0.01, compute_s)
    assert slots.limit == 4
    slots.overloaded(now)
    assert slots.limit == 3
    slots.overloaded(now)
    assert slots.limit == 2
    for _ in range(99):
        now += 0.01
        slots.observe(now, slots.limit, 0.01, 0.01, compute_s)
    assert slots.limit == 2
    for _ in range(400):
        now += 0.1
        slots.observe(now, slots.limit, 0.01, 0.01, compute_s)
    assert slots.limit == 4


events = st.one_of(
    st.none(),
    st.tuples(st.integers(0, 10), st.floats(0.0, 100.0), st.floats(0.0, 100.0), st.floats(0.0, 100.0)),
)


@given(st.integers(-1, 8), st.lists(st.tuples(st.floats(0.0, 2.0), events), max_size=200))
def test_the_limit_stays_within_its_range(
    maximum: int, history: list[tuple[float, tuple[int, float, float, float] | None]]
) -> None:
    slots, now = AdaptiveSlots(maximum), 0.0
    for passed, event in history:
        now += passed
        before = slots.limit
        if event is None:
            slots.overloaded(now)
            assert slots.limit in (max(before - 1, 1), before)
        else:
            slots.observe(now, *event)
        assert 1 <= slots.limit <= max(maximum, 1)
        assert slots.statistics().limit == slots.limit
        if maximum <= 1:
            assert slots.limit == 1
    assert f"{slots.limit} of" in repr(slots)
