from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.agreement import LARGEST, RTOL, Agreement, Difference, compare
from gateway.core.request import OutputTensor
from gateway.core.tensor import DATATYPE, pack_bytes


def tensor(datatype: str, values: Any, shape: tuple[int, ...] | None = None, name: str = "y") -> OutputTensor:
    kind = DATATYPE[datatype]
    if datatype == "BYTES":
        data = pack_bytes(values)
    elif datatype == "BF16":
        data = (np.array(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    else:
        data = np.array(values, kind.numpy).tobytes()
    return OutputTensor(name, kind, shape if shape is not None else (len(values), 1), data)


def difference(datatype: str, a: Any, b: Any, shape: tuple[int, ...] | None = None) -> Difference:
    (found,) = compare([tensor(datatype, a, shape)], [tensor(datatype, b, shape)])
    return found


@pytest.mark.parametrize("datatype", [name for name in DATATYPE if name != "BYTES"])
def test_what_is_equal_agrees(datatype: str) -> None:
    found = difference(datatype, [0, 1, 1], [0, 1, 1])
    assert found.agreed
    assert found.equal_rows == 1.0
    assert found.absolute == found.relative == (None if datatype == "BOOL" else 0.0)


@pytest.mark.parametrize(
    ("datatype", "a", "b", "agreed"),
    [
        ("FP32", 1.0, 1.0009, True),
        ("FP32", 1.0, 1.0012, False),
        ("FP32", 0.0, 9e-6, True),
        ("FP32", 0.0, 2e-5, False),
        ("FP64", -1000.0, -1000.9, True),
        ("FP64", 1000.0, -1000.0, False),
        ("FP16", 1.0, 1.003, True),
        ("FP16", 1.0, 1.01, False),
        ("BF16", 1.0, 1.0234375, True),
        ("BF16", 1.0, 1.0625, False),
        ("FP32", math.nan, math.nan, True),
        ("FP32", math.inf, math.inf, True),
        ("FP32", math.inf, -math.inf, False),
        ("FP32", math.inf, 3.0, False),
        ("FP32", math.nan, 3.0, False),
        ("INT64", 2**62, 2**62 + 1, False),
        ("UINT64", 2**64 - 1, 2**64 - 2, False),
        ("INT8", -128, 127, False),
        ("BOOL", True, False, False),
    ],
)
def test_the_tolerance_of_each_datatype(datatype: str, a: Any, b: Any, agreed: bool) -> None:
    for found in (difference(datatype, [a], [b]), difference(datatype, [b], [a])):
        assert found.agreed is agreed
        assert found.absolute is None or 0 <= found.absolute <= LARGEST


def test_the_largest_difference_and_the_share_of_equal_rows() -> None:
    found = difference("FP32", [1, 2, 3, 4, 5, 6], [1, 2, 3, 5, 5, 6], shape=(3, 2))
    assert found.absolute == 1.0
    assert found.relative == pytest.approx(0.2)
    assert found.equal_rows == pytest.approx(2 / 3)
    found = difference("INT32", [1, -7], [1, 7])
    assert (found.absolute, found.relative, found.equal_rows, found.agreed) == (14.0, 2.0, 0.5, False)


def test_strings_are_compared_row_by_row() -> None:
    found = difference("BYTES", [b"a", b"b", b"c", b"d"], [b"a", b"b", b"c", b"x"], shape=(2, 2))
    assert found == Difference("y", None, None, 0.5, agreed=False)
    assert difference("BYTES", [b"", b"x"], [b"", b"x"]).agreed


def test_another_shape_or_name_is_no_answer_to_the_same_question() -> None:
    one = tensor("FP32", [1, 2], (2, 1))
    for other in (tensor("FP32", [1, 2], (1, 2)), tensor("FP32", [1, 2], (2, 1), "z"), tensor("INT32", [1, 2], (2, 1))):
        (found,) = compare([one], [other])
        assert not found.agreed
        assert found.equal_rows == 0.0
        assert found.absolute == LARGEST


def test_no_rows_agree() -> None:
    assert difference("FP32", [], [], (0, 3)) == Difference("y", 0.0, 0.0, 1.0, agreed=True)
    assert difference("FP32", [1.0], [1.0], ()).agreed


@given(st.sampled_from(sorted(RTOL)), st.lists(st.tuples(st.floats(), st.floats()), min_size=1, max_size=8))
def test_everything_shown_is_finite_and_the_order_does_not_matter(
    datatype: str, pairs: list[tuple[float, float]]
) -> None:
    with np.errstate(all="ignore"):
        a, b = tensor(datatype, [x for x, _ in pairs]), tensor(datatype, [y for _, y in pairs])
    (found,) = compare([a], [b])
    assert (found,) == compare([b], [a])
    assert compare([a], [a])[0].agreed
    assert found.absolute is not None
    assert found.relative is not None
    assert math.isfinite(found.absolute)
    assert math.isfinite(found.relative)
    assert 0.0 <= found.equal_rows <= 1.0
    if found.equal_rows == 1.0:
        assert found.agreed
        assert found.absolute == 0.0


def test_the_worst_is_remembered() -> None:
    agreement = Agreement()
    assert agreement.compared([difference("FP32", [1.0], [1.0001])])
    assert not agreement.compared([difference("FP32", [1.0, 1.0], [1.0, 3.0])])
    assert agreement.compared([difference("FP32", [1.0], [1.0])])
    agreement.count("skipped")
    found = agreement.statistics()
    assert found.batches == {"agreed": 2, "differed": 1, "failed": 0, "skipped": 1}
    (output,) = found.outputs
    assert output.max_absolute == 2.0
    assert output.max_relative == pytest.approx(2 / 3)
    assert output.min_equal_rows == 0.0
    json.dumps(output.max_absolute, allow_nan=False)
