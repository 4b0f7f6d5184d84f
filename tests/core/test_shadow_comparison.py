"""Comparing a shadow's answers, in lots."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.agreement import ATOL, LARGEST, compare
from gateway.core.request import OutputTensor
from gateway.core.shadow_comparison import BOUNDS, ShadowComparison, Tolerance
from gateway.core.tensor import DATATYPE, pack_bytes


def floats(*rows: list[float], name: str = "y", datatype: str = "FP32") -> OutputTensor:
    kind = DATATYPE[datatype]
    data = np.array(rows, kind.numpy)
    return OutputTensor(name, kind, (len(rows), len(rows[0]) if rows else 2), data.tobytes())


def labels(*values: int) -> OutputTensor:
    return OutputTensor("label", DATATYPE["INT64"], (len(values),), np.array(values, "<i8").tobytes())


def texts(*values: bytes) -> OutputTensor:
    return OutputTensor("text", DATATYPE["BYTES"], (len(values),), pack_bytes(list(values)))


def test_equal_answers_agree_and_count_in_the_lowest_bucket() -> None:
    comparison = ShadowComparison(Tolerance())
    assert comparison.compare([([floats([1.0, 2.0])], [floats([1.0, 2.0])])] * 3) == [True] * 3
    (seen,) = comparison.statistics().outputs
    assert (seen.requests, seen.differing, seen.rows, seen.equal_rows) == (3, 0, 3, 3)
    assert seen.buckets[0] == 3
    assert seen.max_absolute == 0.0


def test_the_largest_difference_of_each_request_counts() -> None:
    comparison = ShadowComparison(Tolerance(0.0, 0.05))
    lot = [
        ([floats([1.0, 2.0], [3.0, 4.0])], [floats([1.0, 2.0], [3.0, 4.5])]),
        ([floats([1.0, 2.0])], [floats([1.0, 2.02])]),
    ]
    assert comparison.compare(lot) == [False, True]
    (seen,) = comparison.statistics().outputs
    assert seen.max_absolute == pytest.approx(0.5)
    assert (seen.differing, seen.rows, seen.equal_rows) == (1, 3, 1)
    assert [at for at, n in enumerate(seen.buckets) if n] == [BOUNDS.index(0.1), BOUNDS.index(1.0)]
    assert seen.sum_absolute == pytest.approx(0.52, rel=1e-4)
    statistics = comparison.statistics()
    assert (statistics.agreed, statistics.differed) == (1, 1)


def test_labels_agree_row_by_row() -> None:
    comparison = ShadowComparison(Tolerance(1.0, 1e9))  # no tolerance helps a label
    assert comparison.compare([([labels(1, 2, 3)], [labels(1, 7, 3)])]) == [False]
    (seen,) = comparison.statistics().outputs
    assert (seen.rows, seen.equal_rows) == (3, 2)


def test_texts_are_equal_or_they_are_not() -> None:
    comparison = ShadowComparison(Tolerance())
    lot = [([texts(b"a", b"b")], [texts(b"a", b"c")]), ([texts(b"")], [texts(b"")])]
    assert comparison.compare(lot) == [False, True]
    (seen,) = comparison.statistics().outputs
    assert (seen.rows, seen.equal_rows, seen.max_absolute, seen.buckets) == (3, 2, None, ())


def test_one_output_that_differs_is_enough_whatever_the_others_say() -> None:
    comparison = ShadowComparison(Tolerance(0.0, 0.1))
    far, near = floats([1.0, 2.0], name="far"), floats([1.0, 2.0], name="near")
    pair = ([far, near], [floats([1.0, 9.0], name="far"), floats([1.0, 2.05], name="near")])
    other = ([near, far], [floats([1.0, 2.05], name="near"), floats([1.0, 9.0], name="far")])
    assert comparison.compare([pair]) == [False]
    assert comparison.compare([other]) == [False]
    assert comparison.statistics().differed == 2


def test_fewer_texts_than_the_shape_says_are_not_equal() -> None:
    short = OutputTensor("text", DATATYPE["BYTES"], (2,), pack_bytes([b"a"]))
    assert ShadowComparison(Tolerance()).compare([([texts(b"a", b"b")], [short])]) == [False]


def test_another_shape_or_datatype_differs_and_breaks_nothing() -> None:
    comparison = ShadowComparison(Tolerance())
    lot = [
        ([floats([1.0, 2.0])], [floats([1.0, 2.0, 3.0])]),
        ([floats([1.0, 2.0])], [floats([1.0, 2.0], datatype="FP64")]),
        ([floats([1.0, 2.0])], [floats([1.0, 2.0])]),
    ]
    assert comparison.compare(lot) == [False, False, True]
    (seen,) = comparison.statistics().outputs
    assert (seen.differing, seen.max_absolute) == (2, LARGEST)
    assert math.isfinite(seen.sum_absolute)


def test_nothing_at_all_can_be_compared() -> None:
    comparison = ShadowComparison(Tolerance())
    assert comparison.compare([]) == []
    empty = OutputTensor("y", DATATYPE["FP32"], (0, 2), b"")
    assert comparison.compare([([empty], [empty])]) == [True]


def test_tolerances_default_to_those_of_agreeing_backends() -> None:
    assert Tolerance().atol == ATOL
    comparison = ShadowComparison(Tolerance())
    assert comparison.compare([([floats([1000.0])], [floats([1000.9])])]) == [True]
    assert ShadowComparison(Tolerance(1e-6)).compare([([floats([1000.0])], [floats([1000.9])])]) == [False]


element = st.floats(width=32) | st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1.0, 1.0001])
answer = st.lists(st.lists(element, min_size=2, max_size=2), min_size=0, max_size=3)


@given(st.lists(st.tuples(answer, answer), max_size=6))
def test_a_lot_is_compared_as_each_pair_by_itself(lot: list[tuple[list[list[float]], list[list[float]]]]) -> None:
    """`core/agreement.py` compares pairs one by one, and has tests of its own."""
    pairs = [([floats(*left)], [floats(*right)]) for left, right in lot]
    comparison = ShadowComparison(Tolerance())
    agreed = comparison.compare(pairs)
    single = [compare(left, right)[0] for left, right in pairs]
    assert agreed == [one.agreed for one in single]
    statistics = comparison.statistics()
    assert statistics.agreed + statistics.differed == len(pairs)
    for seen in statistics.outputs:
        assert seen.max_absolute == max(one.absolute for one in single if one.absolute is not None)
        assert sum(seen.buckets) == seen.requests == len(pairs)
        assert seen.equal_rows <= seen.rows
        assert math.isfinite(seen.sum_absolute)
