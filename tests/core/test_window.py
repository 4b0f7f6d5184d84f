from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.core.window import BUCKETS, Window

STEPS = st.lists(st.tuples(st.floats(0, 4), st.booleans(), st.booleans()), max_size=120)


@given(STEPS)
def test_it_counts_exactly_this_second_and_the_nine_before(steps: list[tuple[float, bool, bool]]) -> None:
    window, now = Window(), 100.0
    attempts: list[tuple[int, bool]] = []
    times: list[tuple[int, bool]] = []
    for wait, failed, timed in steps:
        now += wait
        window.attempt(failed, now)
        attempts.append((int(now), failed))
        if timed:
            window.time(failed, now)
            times.append((int(now), failed))
        oldest = int(now) - BUCKETS + 1
        window.advance(now)
        assert window.total == sum(at >= oldest for at, _ in attempts)
        assert window.failed == sum(at >= oldest and bad for at, bad in attempts)
        assert window.timed == sum(at >= oldest for at, _ in times)
        assert window.slow == sum(at >= oldest and bad for at, bad in times)


def test_a_burst_is_not_hidden_by_what_came_long_before() -> None:
    window = Window()
    for _ in range(10_000):
        window.attempt(False, 5.0)
    window.attempt(True, 15.0)
    assert (window.total, window.failed) == (1, 1)


def test_a_clock_that_goes_back_counts_in_the_newest_second() -> None:
    window = Window()
    window.attempt(True, 20.0)
    window.attempt(True, 3.0)
    assert window.failed == 2
    window.advance(29.9)
    assert window.failed == 2
    window.advance(30.0)
    assert window.failed == 0


def test_cleared_it_is_empty() -> None:
    window = Window()
    window.attempt(True, 1.0)
    window.time(True, 1.0)
    window.clear()
    window.advance(1.5)
    assert (window.total, window.failed, window.timed, window.slow) == (0, 0, 0, 0)
