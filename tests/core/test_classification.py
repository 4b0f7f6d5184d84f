"""Classification: order, ties, texts and shapes, against a naive reading of the rule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.classification import MAX_STRINGS, check_classifiable, classify
from gateway.core.request import OutputTensor
from gateway.core.tensor import DATATYPE, DATATYPES, unpack_bytes
from gateway.errors import InvalidRequest

LABELS = ("a", "b", "", "d")


def output(datatype: str, values: Any, shape: tuple[int, ...]) -> OutputTensor:
    array = np.array(values, DATATYPE[datatype].numpy).reshape(shape)
    return OutputTensor("Y", DATATYPE[datatype], shape, array.tobytes())


def texts(tensor: OutputTensor) -> list[str]:
    assert tensor.datatype is DATATYPE["BYTES"]
    return [element.decode() for element in unpack_bytes(tensor.data)]


def test_two_rows() -> None:
    found = classify(output("FP32", [[0.1, 0.9, 0.5], [3, 2, 1]], (2, 3)), 2, LABELS, batched=True)
    assert found.shape == (2, 2)
    assert found.name == "Y"
    assert texts(found) == ["0.900000:1:b", "0.500000:2", "3.000000:0:a", "2.000000:1:b"]


def test_more_classes_than_elements_and_labels() -> None:
    found = classify(output("INT64", [5, -(2**63), 2**63 - 1, 0, 1], (1, 5)), 99, LABELS, batched=True)
    assert found.shape == (1, 5)
    assert texts(found) == [f"{2**63 - 1}:2", "5:0:a", "1:4", "0:3:d", f"{-(2**63)}:1:b"]


def test_without_batch_dimension() -> None:
    found = classify(output("UINT8", [7, 255], (2,)), 1, (), batched=False)
    assert found.shape == (1,)
    assert texts(found) == ["255:1"]


def test_inner_dimensions_are_one_row_of_elements() -> None:
    found = classify(output("FP64", [[[1, 2], [3, 0]]], (1, 2, 2)), 2, (), batched=True)
    assert found.shape == (1, 2)
    assert texts(found) == ["3.000000:2", "2.000000:1"]


def test_rows_without_elements() -> None:
    found = classify(output("FP32", [], (2, 0)), 3, (), batched=True)
    assert found.shape == (2, 0)
    assert texts(found) == []


def test_what_is_not_finite() -> None:
    found = classify(output("FP32", [math.nan, -math.inf, 1, math.inf], (1, 4)), 4, (), batched=True)
    assert texts(found) == ["inf:3", "1.000000:2", "nan:0", "-inf:1"]


@settings(deadline=None)
@given(
    st.sampled_from(["FP32", "FP64", "INT8", "UINT64", "INT64"]),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 50),
    st.data(),
)
def test_order_is_descending_and_ties_go_by_index(
    datatype: str, rows: int, length: int, classes: int, data: st.DataObject
) -> None:
    values = [[data.draw(st.integers(0, 6)) for _ in range(length)] for _ in range(rows)]
    found = texts(classify(output(datatype, values, (rows, length)), classes, LABELS, batched=True))
    expected = []
    for row in values:
        ranked = sorted((-number, index) for index, number in enumerate(row))[:classes]
        for _, index in ranked:
            value = f"{row[index]:f}" if datatype.startswith("FP") else str(row[index])
            label = LABELS[index] if index < len(LABELS) else ""
            expected.append(f"{value}:{index}" + (f":{label}" if label else ""))
    assert found == expected


@pytest.mark.parametrize(("rows", "length", "classes"), [(3, 300, 5), (2, 300, 300), (3000, 50, 2), (1, 70_000, 3)])
@pytest.mark.parametrize("datatype", ["FP32", "UINT64"])
def test_long_rows_and_many_of_them(datatype: str, rows: int, length: int, classes: int) -> None:
    values = np.random.default_rng(7).integers(0, 100, (rows, length))
    found = texts(classify(output(datatype, values, (rows, length)), classes, LABELS, batched=True))
    indexes = [int(text.split(":")[1]) for text in found]
    for row in range(rows):
        expected = sorted(range(length), key=lambda index, row=row: (-values[row, index], index))[:classes]  # type: ignore[misc]
        assert indexes[row * classes : (row + 1) * classes] == expected


def test_an_answer_is_bounded() -> None:
    rows = 4
    wide = output("UINT8", np.zeros(rows * MAX_STRINGS, np.uint8), (rows, MAX_STRINGS))
    assert len(texts(classify(wide, 10, (), batched=True))) == 40
    with pytest.raises(InvalidRequest, match=r"'Y'.*fewer classes"):
        classify(wide, MAX_STRINGS, (), batched=True)


def test_datatypes() -> None:
    taken = {"FP32", "FP64", *(f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64))}
    for datatype in DATATYPES:
        if datatype.name in taken:
            check_classifiable("Y", datatype)
            continue
        with pytest.raises(InvalidRequest, match=f"'Y'.*unsupported type '{datatype}'"):
            check_classifiable("Y", datatype)
