"""The same elements under other dims: there and back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.reshape import fits, reshaped


@pytest.mark.parametrize(
    ("shape", "of", "to", "expected"),
    [
        ((1, 3), (1, 3), (3,), (3,)),
        ((1,), (1,), (), ()),
        ((), (), (1,), (1,)),
        ((7, 1), (-1, 1), (-1,), (7,)),
        ((2, 7, 2, 3), (2, -1, 2, 3), (2, -1, 6), (2, 7, 6)),
        ((4, 5), (-1, -1), (-1, 1, -1), (4, 1, 5)),
        ((0,), (-1,), (-1, 1), (0, 1)),
    ],
)
def test_shapes(shape: tuple[int, ...], of: tuple[int, ...], to: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert reshaped(shape, of, to) == expected


def test_a_shape_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[4\] where \[3\] was expected"):
        reshaped((4,), (3,), (1, 3))
    with pytest.raises(ValueError, match="was expected"):
        reshaped((3, 1), (3,), (1, 3))
    with pytest.raises(ValueError, match="differ in their variable dims"):
        reshaped((3,), (-1,), (3,))


@given(st.lists(st.integers(0, 6)), st.lists(st.booleans()))
def test_there_and_back_keeps_shape_and_elements(shape: list[int], variable: list[bool]) -> None:
    of = tuple(-1 if free else size for size, free in zip(shape, variable, strict=False))
    shape = shape[: len(of)]
    to = tuple(dim for size in of for dim in (1, size))
    there = reshaped(tuple(shape), of, to)
    assert math.prod(there) == math.prod(shape)
    assert fits(there, to)
    assert reshaped(there, to, of) == tuple(shape)
