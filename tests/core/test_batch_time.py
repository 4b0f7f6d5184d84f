"""What is learned from how long batches take, and that nothing observed can make it absurd."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.batch_time import (
    EARLY_SAMPLES,
    FAILURE_S,
    MAX_BACKOFF,
    P95_SAMPLES,
    TIMEOUT_FLOOR_S,
    TIMEOUT_SAMPLES,
    WORKER_TIMEOUT_FLOOR_S,
    BatchTime,
    normalised,
)

times = st.one_of(st.just(0.0), st.floats(1e-7, 600.0))


def work(rows: int) -> float:
    """3 ms and 0.3 ms a row."""
    return 0.003 + 0.0003 * rows


def learned(batches: int = 200, factor: float = 1.0, seed: int = 1, sizes: tuple[int, int] = (1, 32)) -> BatchTime:
    time, rng = BatchTime(), random.Random(seed)
    for turn in range(batches):
        rows = rng.randint(*sizes)
        time.observe(rows, factor * work(rows) * rng.uniform(0.9, 1.1), 0.02 * turn)
    return time


def test_the_fit_finds_what_a_batch_and_what_a_row_cost() -> None:
    time = learned()
    for rows in (1, 8, 32, 64):
        assert time.predict_s(rows) == pytest.approx(work(rows), rel=0.15)
    assert time.beta == pytest.approx(0.0003, rel=0.25)


def test_nothing_is_predicted_before_anything_was_seen() -> None:
    time = BatchTime()
    assert time.predict_s(8) == 0.0
    assert time.p95_s(8) is None
    assert time.attempt_timeout_s(8) is None
    assert not time.known


def test_one_size_only_is_predicted_well_and_others_without_absurdity() -> None:
    time = BatchTime()
    for turn in range(100):
        time.observe(16, work(16), 0.02 * turn)
    assert time.predict_s(16) == pytest.approx(work(16), rel=1e-6)
    assert work(16) <= time.predict_s(32) <= 2 * work(16)
    assert work(16) / 16 <= time.predict_s(1) <= work(16)


def test_a_machine_that_pauses_once_does_not_change_the_fit() -> None:
    time = learned()
    before = time.predict_s(16)
    time.observe(16, 30.0, 4.1)
    assert time.predict_s(16) < 1.15 * before


def test_a_replica_that_becomes_slower_for_good_is_believed() -> None:
    time, rng = learned(), random.Random(2)
    for turn in range(500):
        rows = rng.randint(1, 32)
        time.observe(rows, 10 * work(rows), 10 + 0.1 * turn)
        if turn == 0:
            assert time.load(10.0) > 3.0, "at first it is only the load"
    assert time.predict_s(16) == pytest.approx(10 * work(16), rel=0.2)
    assert time.load(60.0) < 1.3


def test_company_is_no_reason_to_expect_longer_times() -> None:
    # The server works off one after the other: two at once take twice as long each, which is congestion.
    time = learned()
    for turn in range(500):
        time.observe(16, 2 * work(16), 5 + 0.02 * turn, in_flight=2)
    assert time.predict_s(16) == pytest.approx(work(16), rel=0.15)
    assert time.load(15.0) == pytest.approx(2.0, rel=0.15)


def test_what_company_cannot_explain_is_believed() -> None:
    time = learned()
    for turn in range(500):
        time.observe(16, 6 * work(16), 5 + 0.02 * turn, in_flight=2)
    assert time.predict_s(16) == pytest.approx(3 * work(16), rel=0.15)


@given(st.lists(st.tuples(st.integers(1, 512), times, st.integers(1, 8)), max_size=120), st.integers(1, 1024))
def test_the_fit_stays_sane_whatever_is_observed(batches: list[tuple[int, float, int]], rows: int) -> None:
    time = BatchTime()
    for turn, (size, took_s, in_flight) in enumerate(batches):
        time.observe(size, took_s, 0.1 * turn, in_flight)
        assert time.alpha >= 0.0
        assert time.beta >= 0.0
    now = 0.1 * len(batches)
    longest = max((took_s for _, took_s, _ in batches), default=0.0)
    for answer in (time.predict_s(rows), time.score(rows, 3, now), time.load(now)):
        assert math.isfinite(answer)
        assert answer >= 0.0
    assert time.predict_s(rows) <= time.predict_s(rows + 1)
    assert time.predict_s(1) <= longest + 1e-9


def test_large_batches_that_cost_more_than_their_share_are_not_overestimated() -> None:
    time = BatchTime()
    for turn in range(200):
        time.observe(64, 0.1, 0.0)
        time.observe(1, 0.0, 0.0)
        assert time.alpha == pytest.approx(0.0, abs=1e-12) or turn < 20
    assert 0.08 < time.predict_s(64) <= 0.1


@given(st.lists(st.tuples(st.integers(1, 64), times), min_size=1, max_size=60))
def test_the_fit_is_least_squares_with_forgetting(batches: list[tuple[int, float]]) -> None:
    # With enough spread the pull of the former slope is gone; compare with the sums written out.
    time = BatchTime()
    spread = [(1 + 63 * (turn % 2), took_s) for turn, (_, took_s) in enumerate(batches * 8)]
    for rows, _ in spread:
        time.observe(rows, work(rows), 0.0)
    weights = [0.98 ** (len(spread) - 1 - turn) for turn in range(len(spread))]
    total = sum(weights)
    mean_b = sum(w * rows for w, (rows, _) in zip(weights, spread, strict=True)) / total
    mean_t = sum(w * work(rows) for w, (rows, _) in zip(weights, spread, strict=True)) / total
    assert time.predict_s(1) + time.beta * (mean_b - 1) == pytest.approx(mean_t, rel=1e-6)


# -- load and score ----------------------------------------------------------------------------------------------------


def test_the_load_jumps_up_and_comes_down_with_its_time_constant() -> None:
    time = learned()
    time.observe(16, 3 * work(16), 4.0)
    peak = time.load(4.0)
    assert peak == pytest.approx(3.0, rel=0.2)
    assert time.load(14.0) - 1.0 == pytest.approx((peak - 1.0) * math.exp(-1), rel=0.25)
    for turn in range(100):
        time.observe(16, work(16), 4.0 + 0.1 * turn)
    assert time.load(14.0) - 1.0 == pytest.approx((peak - 1.0) * math.exp(-1), rel=0.25)


def test_a_failure_counts_as_five_seconds_however_fast_it_was() -> None:
    well, failing = learned(seed=1), learned(seed=2)
    failing.failed(4.0)
    assert failing.score(16, 0, 4.0) == pytest.approx(FAILURE_S * work(16) / work(16), rel=0.2)
    assert failing.score(16, 0, 4.0) > 100 * well.score(16, 3, 4.0)


def test_in_silence_a_punished_replica_is_forgiven() -> None:
    well, failing = learned(seed=1), learned(seed=2)
    failing.failed(4.0)
    assert failing.score(16, 0, 34.0) > 5 * well.score(16, 0, 34.0)
    assert failing.score(16, 0, 120.0) < 1.5 * well.score(16, 0, 120.0)
    assert failing.load(500.0) == pytest.approx(1.0, abs=0.15)


def test_a_replica_that_nobody_tried_is_tried_by_one_batch() -> None:
    fresh, known = BatchTime(), learned()
    assert fresh.score(8, 0, 4.0) < known.score(8, 0, 4.0) < fresh.score(8, 1, 4.0)
    fresh.failed(4.0)
    assert fresh.score(8, 0, 4.0) > known.score(8, 7, 4.0)


@given(st.integers(0, 6), st.integers(1, 64), st.floats(0.0, 100.0))
def test_more_in_flight_never_looks_better(in_flight: int, rows: int, now: float) -> None:
    time = learned(50)
    assert time.score(rows, in_flight, now) < time.score(rows, in_flight + 1, now)


@given(st.lists(st.one_of(st.none(), times), min_size=1, max_size=40))
def test_a_clock_that_stands_still_or_goes_back_harms_nothing(events: list[float | None]) -> None:
    time, clocks = BatchTime(), iter_clock()
    for took_s in events:
        now = next(clocks)
        if took_s is None:
            time.timed_out(4, now)
        else:
            time.observe(4, took_s, now)
        assert math.isfinite(time.load(now))
        assert time.load(now) >= 0.0


def iter_clock() -> Iterator[float]:
    while True:
        yield from (5.0, 5.0, 3.0, 7.0)


# -- quantiles and timeouts --------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.floats(1e-4, 1.0))
def test_quantiles_are_right_to_ten_percent(seed: int, scale: float) -> None:
    time, rng = BatchTime(), random.Random(seed)
    sample = [scale * rng.lognormvariate(0.0, 0.5) for _ in range(400)]
    for took_s in sample:
        time.observe(8, took_s, 0.0)
    exact = sorted(sample)
    p95 = time.p95_s(8)
    assert p95 is not None
    assert exact[360] <= p95 <= exact[395] * 1.1
    timeout = time.attempt_timeout_s(8)
    assert timeout is not None
    assert max(1.5 * exact[-2], TIMEOUT_FLOOR_S) <= timeout <= max(1.5 * 1.11 * exact[-1], TIMEOUT_FLOOR_S)


def test_quantiles_need_enough_observations_of_that_size() -> None:
    time = BatchTime()
    for count in range(1, TIMEOUT_SAMPLES + 1):
        time.observe(8, 0.1, 0.0)
        assert (time.p95_s(8) is None) == (count < P95_SAMPLES)
        timeout_s = time.attempt_timeout_s(8)
        if count < EARLY_SAMPLES:
            assert timeout_s is None
        elif count < TIMEOUT_SAMPLES:
            assert timeout_s == pytest.approx(1.0), "ten times the longest run"
        else:
            assert timeout_s == pytest.approx(0.15, rel=0.11)
    assert time.p95_s(5) is not None, "5 to 8 rows are one class"
    assert time.p95_s(4) is None
    assert time.attempt_timeout_s(4) == time.attempt_timeout_s(8), "what suffices for 8 rows suffices for 4"
    assert time.attempt_timeout_s(16) == pytest.approx(2.0, rel=0.05), "by rows, where that size was never seen"


def test_no_timeout_is_shorter_than_the_floor() -> None:
    time = BatchTime()
    for _ in range(TIMEOUT_SAMPLES):
        time.observe(1, 0.0001, 0.0)
    assert time.attempt_timeout_s(1) == TIMEOUT_FLOOR_S


def test_quantiles_forget() -> None:
    time = BatchTime()
    for _ in range(1000):
        time.observe(1, 1.0, 0.0)
    for _ in range(20_000):
        time.observe(1, 0.01, 0.0)
    timeout = time.attempt_timeout_s(1)
    assert timeout is not None
    assert timeout < 0.06


def test_counts_survive_being_scaled_down() -> None:
    # 1e100 is reached after about 460 000 observations of 1 / 2000; the 95 % quantile must not notice.
    time = BatchTime()
    for turn in range(470_000):
        time.observe(1, 0.01 if turn % 10 else 0.1, 0.0)
    p95 = time.p95_s(1)
    assert p95 is not None
    assert p95 == pytest.approx(0.1, rel=0.11)


def test_every_timeout_doubles_the_next_until_one_succeeds() -> None:
    time = learned(2000, factor=100.0, sizes=(8, 8))
    first = time.attempt_timeout_s(8)
    assert first is not None
    time.timed_out(8, 50.0)
    assert time.attempt_timeout_s(8) == 2 * first
    time.timed_out(8, 51.0)
    assert time.attempt_timeout_s(8) == 4 * first
    assert time.load(51.0) > 5, "a timeout is a failure too"
    for _ in range(20):
        time.observe(8, 3 * first, 52.0)
    then = time.attempt_timeout_s(8)
    assert then is not None
    assert 3 * first < then, "what took that long teaches the quantile"


def test_the_backoff_belongs_to_the_size_that_timed_out_not_to_the_one_that_lent_its_quantile() -> None:
    time = learned(2000, factor=100.0, sizes=(8, 8))
    first = time.attempt_timeout_s(8)
    assert first is not None
    time.timed_out(4, 50.0)
    assert (time.attempt_timeout_s(4), time.attempt_timeout_s(8)) == (2 * first, first)
    time.observe(8, 0.5, 51.0)
    assert time.attempt_timeout_s(4) == 2 * first
    time.observe(4, 0.5, 51.0)
    assert time.attempt_timeout_s(4) == first


def test_timeouts_in_a_row_do_not_grow_without_bound() -> None:
    time = learned(2000, sizes=(8, 8))
    for _ in range(100):
        time.timed_out(8, 50.0)
    assert time.attempt_timeout_s(8) == TIMEOUT_FLOOR_S * MAX_BACKOFF


def test_who_proved_itself_is_as_good_as_before() -> None:
    time = learned()
    before = time.score(8, 0, 60.0)
    time.failed(60.0)
    assert time.score(8, 0, 60.0) > 50 * before
    time.forgive()
    assert time.score(8, 0, 60.0) == pytest.approx(before, rel=0.1)


def test_a_worker_is_given_ten_times_the_longest_run_and_five_seconds_at_least() -> None:
    time = BatchTime()
    assert time.worker_timeout_s(4, 30.0) == 30.0
    assert time.worker_timeout_s(4, 1.0) == WORKER_TIMEOUT_FLOOR_S
    assert BatchTime(row_s=1.0).worker_timeout_s(4, 300.0) == pytest.approx(40.0), "the trial at load counts as seen"
    time.observe(4, 2.0, 0.0)
    assert time.worker_timeout_s(4, 30.0) == pytest.approx(20.0)
    assert time.worker_timeout_s(8, 30.0) == pytest.approx(40.0, rel=0.02), "by rows"
    quick = learned()
    assert quick.worker_timeout_s(32, 0.1) == WORKER_TIMEOUT_FLOOR_S


# -- compared with others ----------------------------------------------------------------------------------------------


def test_big_batches_are_not_slow_and_slow_replicas_are() -> None:
    peers = [learned(seed=3), learned(seed=4)]
    for rows in (1, 32):
        usual, slow = normalised(rows, work(rows), peers), normalised(rows, 10 * work(rows), peers)
        assert usual is not None
        assert slow is not None
        assert usual == pytest.approx(1.0, rel=0.2)
        assert slow == pytest.approx(10.0, rel=0.2)


def test_it_takes_two_others_to_compare_with() -> None:
    assert normalised(4, 1.0, []) is None
    assert normalised(4, 1.0, [learned()]) is None
    assert normalised(4, 1.0, [learned(), BatchTime()]) is None
    instant = BatchTime()
    instant.observe(1, 0.0, 0.0)
    assert normalised(4, 1.0, [instant, instant]) is None


def test_what_it_knows_can_be_seen() -> None:
    time = learned(10)
    time.failed(1.0)
    seen = time.statistics(1.0)
    assert (seen.observations, seen.failures) == (10, 1)
    assert seen.base_s + 8 * seen.row_s == pytest.approx(time.predict_s(8))
    assert "ms/row" in repr(time)
