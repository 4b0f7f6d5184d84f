from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.batching import Reason
from gateway.observe.record import (
    DURATION_BOUNDS_S,
    FAILURE_REASONS,
    FOLD_AT,
    PHASE_BOUNDS_S,
    RECENT_BATCHES,
    ROW_BOUNDS,
    Histogram,
    ModelStatistics,
    Recent,
    RowHistogram,
)

# Values on, just below and just above the bounds are where a histogram goes wrong.
EDGES = [v for b in DURATION_BOUNDS_S for v in (b, float(np.nextafter(b, 0)), float(np.nextafter(b, 1e9)))]
SECONDS = st.one_of(st.floats(0, 100, allow_nan=False), st.sampled_from(EDGES))


def batch(statistics: ModelStatistics, **given_values: Any) -> None:
    values: dict[str, Any] = {
        "backend": "onnx-1", "rows": 8, "requests": 3, "reason": "full",
        "compute_input_ns": 10, "compute_infer_ns": 100, "compute_output_ns": 5,
        "queue_s_total": 0.25, "execute_s": 0.002,
    }  # fmt: skip
    statistics.record_batch(**(values | given_values))


@given(st.lists(st.lists(SECONDS, max_size=30), max_size=8))
def test_folding_in_any_portions_gives_what_comparing_each_value_gives(portions: list[list[float]]) -> None:
    histogram = Histogram(DURATION_BOUNDS_S)
    for portion in portions:
        histogram.pending.extend(portion)
        histogram.fold()
    values = [v for portion in portions for v in portion]
    expected = [sum(v <= bound for v in values) for bound in DURATION_BOUNDS_S]
    assert histogram.cumulative() == [*expected, len(values)]
    assert histogram.count == len(values)
    assert histogram.sum == pytest.approx(sum(values), rel=1e-12, abs=1e-12)


def test_folding_agrees_with_numpys_histogram() -> None:
    values = np.random.default_rng(7).exponential(0.02, 10_000)
    histogram = Histogram(DURATION_BOUNDS_S)
    histogram.pending.extend(values.tolist())
    counts, _ = np.histogram(values, bins=[0.0, *DURATION_BOUNDS_S, np.inf])
    histogram.fold()
    assert histogram.counts == counts.tolist()


@pytest.mark.parametrize("way", ["add", "append"])
def test_parked_values_are_bounded(way: str) -> None:
    histogram = Histogram(DURATION_BOUNDS_S)
    pending = histogram.pending
    most = 0
    for _ in range(3 * FOLD_AT):
        if way == "add":
            histogram.add(0.1)
        else:
            pending.append(0.1)
            histogram.fold_if_full()
        most = max(most, len(histogram.pending))
    assert most < FOLD_AT
    assert histogram.pending is pending
    assert histogram.cumulative()[-1] == 3 * FOLD_AT


@given(st.lists(st.integers(1, 2000), max_size=50))
def test_rows_fall_into_the_bucket_that_holds_them(sizes: list[int]) -> None:
    histogram = RowHistogram()
    for rows in sizes:
        histogram.add(rows)
    assert histogram.cumulative() == [*[sum(r <= bound for r in sizes) for bound in ROW_BOUNDS], len(sizes)]
    assert histogram.sum == sum(sizes)


def test_every_request_of_a_batch_is_charged_the_whole_batchs_compute_time() -> None:
    statistics = ModelStatistics()
    batch(statistics)
    batch(statistics, requests=2, rows=2, reason="worker_free", backend="onnx-2")
    assert statistics.success == 5
    assert statistics.inference_count == 10
    assert statistics.execution_count == 2
    assert statistics.compute_input_ns == 10 * 5
    assert statistics.compute_infer_ns == 100 * 5
    assert statistics.compute_output_ns == 5 * 5
    assert statistics.queue_ns == 500_000_000
    assert statistics.batches == {r.value: int(r.value in {"full", "worker_free"}) for r in Reason}
    assert statistics.attempts == {("onnx-1", "ok"): 1, ("onnx-2", "ok"): 1}
    assert statistics.execute.cumulative()[-1] == 2


def test_an_answered_request_is_counted_in_every_place_once() -> None:
    statistics = ModelStatistics()
    http = statistics.protocol("http")
    assert statistics.protocol("http") is http
    http.answered(0.010, 0.004, 0.005)
    http.answered(0.020, 0.004, 0.005)
    statistics.protocol("grpc").answered(0.030, 0.0, 0.030, code=0)
    assert http.codes == {200: 2}
    assert statistics.queue_waits.cumulative()[-1] == 3
    statistics.overhead.fold()
    assert statistics.overhead.sum == pytest.approx(0.001 + 0.011)


def test_overhead_is_never_negative() -> None:
    statistics = ModelStatistics()
    statistics.protocol("http").answered(0.003, 0.001, 0.002000001)
    statistics.overhead.fold()
    assert statistics.overhead.sum == 0.0


def test_answers_alone_keep_every_list_bounded() -> None:
    statistics = ModelStatistics()
    http, grpc = statistics.protocol("http"), statistics.protocol("grpc")
    most_own = most_shared = 0
    # Strictly in turns, so that one of the two is always the one whose answer fills a shared list.
    for _ in range(4 * FOLD_AT):
        for part in (grpc, http):
            part.answered(0.01, 0.001, 0.002)
            most_own = max(most_own, len(part.durations.pending))
            most_shared = max(most_shared, len(statistics.overhead.pending), len(statistics.queue_waits.pending))
    assert most_own < FOLD_AT
    assert most_shared < FOLD_AT * 2
    assert http.durations.cumulative()[-1] == grpc.durations.cumulative()[-1] == 4 * FOLD_AT


def test_refusals_and_failures() -> None:
    statistics = ModelStatistics()
    assert statistics.failures == dict.fromkeys(FAILURE_REASONS, 0)
    statistics.reject("overloaded")
    statistics.reject("deadline", 2)
    statistics.fail("BACKEND", 4)
    statistics.count("http", 400, 7)
    statistics.attempt("onnx-1", "broken")
    statistics.retry(3)
    assert statistics.failures == {"REJECTED": 3, "CANCELED": 0, "BACKEND": 4, "OTHER": 0}
    assert statistics.rejected == {"overloaded": 1, "deadline": 2}
    assert statistics.protocols["http"].codes == {400: 7}
    assert statistics.attempts == {("onnx-1", "broken"): 1}
    assert statistics.retries == 3
    assert statistics.success == 0


def test_bounds_are_strictly_increasing() -> None:
    for bounds in (DURATION_BOUNDS_S, PHASE_BOUNDS_S, ROW_BOUNDS):
        assert list(bounds) == sorted(set(bounds))


def test_executions_are_counted_by_rows_and_not_by_request() -> None:
    statistics = ModelStatistics()
    batch(statistics, rows=8, requests=3)
    batch(statistics, rows=8, requests=1)
    batch(statistics, rows=2, requests=2)
    sizes = {
        rows: (s.count, s.compute_input_ns, s.compute_infer_ns, s.compute_output_ns)
        for rows, s in statistics.batch_sizes.items()
    }
    assert sizes == {8: (2, 20, 200, 10), 2: (1, 10, 100, 5)}


def test_success_lasts_from_arrival_to_the_end_of_the_execution() -> None:
    statistics = ModelStatistics()
    batch(statistics, requests=3, queue_s_total=0.25, execute_s=0.002)
    assert statistics.success_ns == 250_000_000 + 3 * 2_000_000
    assert statistics.success_ns >= statistics.queue_ns + statistics.compute_infer_ns


def test_when_the_last_inference_was() -> None:
    now = [1_000_000_000_000_000_000]
    statistics = ModelStatistics(lambda: now[0])
    assert statistics.last_inference_ms == 0
    batch(statistics)
    assert statistics.last_inference_ms == 1_000_000_000_000
    now[0] += 5_000_000
    statistics.record_cache_hit(1)
    assert statistics.last_inference_ms == 1_000_000_000_005


def test_an_answer_from_the_cache_is_a_success_that_was_not_executed() -> None:
    statistics = ModelStatistics()
    statistics.record_cache_miss(500)
    batch(statistics, rows=1, requests=1, queue_s_total=0.0, execute_s=0.001)
    statistics.record_cache_miss(70, 0)
    statistics.record_cache_hit(30, 2, queue_ns=1_000)
    assert (statistics.success, statistics.inference_count, statistics.execution_count) == (3, 1, 1)
    assert (statistics.cache_hits, statistics.cache_hit_ns) == (2, 30)
    assert (statistics.cache_misses, statistics.cache_miss_ns) == (1, 570)
    assert statistics.queue_ns == 1_000
    assert statistics.success_ns == 1_000_000 + 1_030


def test_what_was_turned_away_at_once_has_not_failed_and_what_waited_in_vain_has() -> None:
    statistics = ModelStatistics()
    statistics.reject("overloaded", 3)
    assert (statistics.failed, statistics.failed_ns) == (0, 0)
    statistics.reject("timeout", spent_s=0.5)
    statistics.fail("BACKEND", spent_s=0.25)
    assert (statistics.failed, statistics.failed_ns) == (2, 750_000_000)
    assert statistics.failures["REJECTED"] == 4


def test_newest_durations_are_bounded_and_weighted_by_requests() -> None:
    recent = Recent()
    for _ in range(RECENT_BATCHES):
        recent.add(1, 9_000, 9, 9, 9)
    for n in range(RECENT_BATCHES):
        recent.add(1 + 10_000 * (n == 0), 100 * (1 + 10_000 * (n == 0)), n, 0, 0)
    quantiles = recent.quantiles([0.0, 0.5, 1.0])
    assert quantiles["queue"] == [100.0, 100.0, 100.0]
    assert quantiles["compute_input"] == [0.0, 0.0, RECENT_BATCHES - 1]
    assert quantiles["request"][0] == 100.0
