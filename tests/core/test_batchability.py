"""The proof is run on small models written in numpy: honest ones pass, ones that mix rows are found out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.batchability import (
    ATOL_OF_SCALE,
    HALF_RTOL,
    MAX_TRIAL_ELEMENTS,
    PROOF_ROWS,
    RTOL,
    VARIABLE_DIMS,
    SignatureTensor,
    Verdict,
    compare,
    obstacle,
    one_row,
    trial_inputs,
)
from gateway.core.request import InputTensor, OutputTensor
from gateway.core.tensor import DATATYPE, DATATYPES, Datatype, element_count, pack_bytes, unpack_bytes

FP32, FP16, BF16, INT64, BYTES = (DATATYPE[name] for name in ("FP32", "FP16", "BF16", "INT64", "BYTES"))
Array = np.ndarray[Any, Any]


def floats(tensor: InputTensor) -> Array:
    return np.frombuffer(tensor.buffer or b"", "<f4").reshape(tensor.shape)


def result(array: Array) -> OutputTensor:
    return OutputTensor("y", FP32, array.shape, array.astype("<f4").tobytes())


def prove(model: Callable[[Array], Array], seed: int = 1) -> Verdict:
    rng = np.random.default_rng(seed)
    inputs = next(trial_inputs((SignatureTensor("x", FP32, (None, 6)),), PROOF_ROWS, rng))
    together = [result(model(floats(inputs[0])))]
    alone = [[result(model(floats(one_row(inputs, row)[0])))] for row in range(PROOF_ROWS)]
    return compare(together, alone)


WEIGHTS = np.random.default_rng(5).standard_normal((6, 4)).astype(np.float32)
HONEST: dict[str, Callable[[Array], Array]] = {
    "linear": lambda x: x @ WEIGHTS,
    "softmax of a row": lambda x: np.exp(x) / np.exp(x).sum(axis=1, keepdims=True),
    "not a number": lambda x: np.log(x - 0.5),
    "infinite": lambda x: x / np.zeros_like(x),
    "constant": lambda x: np.ones((len(x), 2)),
    "empty": lambda x: x[:, :0],
    "one number a row": lambda x: x.sum(axis=1),
}
MIXING: dict[str, Callable[[Array], Array]] = {
    "minus the batch's mean": lambda x: x - x.mean(axis=0),
    "a hundredth of the batch's mean": lambda x: x + 0.01 * x.mean(axis=0),
    "softmax over the batch": lambda x: np.exp(x) / np.exp(x).sum(axis=0),
    "running sum": lambda x: np.cumsum(x, axis=0),
    "the row before": lambda x: np.roll(x, 1, axis=0),
    "reversed": lambda x: x[::-1],
    "by place": lambda x: x + np.arange(len(x))[:, None],
    "by size": lambda x: x * len(x),
    "first row for all": lambda x: np.repeat(x[:1], len(x), axis=0),
    "one answer for all": lambda x: x.mean(axis=0, keepdims=True),
    "no row axis": lambda x: np.asarray(x.sum()),
    "width by size": lambda x: np.repeat(x, len(x), axis=1),
    "not a number for a neighbour": lambda x: np.where(np.arange(len(x))[:, None] == 3, np.nan, x),
}


@pytest.mark.parametrize("name", HONEST)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_models_with_independent_rows_pass(name: str, seed: int) -> None:
    verdict = prove(HONEST[name], seed)
    assert verdict.batchable, verdict.why
    assert str(PROOF_ROWS) in verdict.why


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("seed", range(5))
def test_models_that_mix_rows_are_found_out(name: str, seed: int) -> None:
    verdict = prove(MIXING[name], seed)
    assert not verdict.batchable
    assert "'y'" in verdict.why


def pair(datatype: Datatype, together: Array, alone: Array) -> Verdict:
    """Two rows together against themselves alone, as given."""

    def tensor(array: Array) -> OutputTensor:
        shaped = array.astype(datatype.numpy)
        return OutputTensor("y", datatype, shaped.shape, shaped.tobytes())

    return compare([tensor(together)], [[tensor(alone[:1])], [tensor(alone[1:])]])


@pytest.mark.parametrize(("datatype", "rtol"), [(FP32, RTOL), (DATATYPE["FP64"], RTOL), (FP16, HALF_RTOL)], ids=repr)
def test_tolerance_is_relative(datatype: Datatype, rtol: float) -> None:
    alone = np.array([[100.0, 100.0], [100.0, 100.0]])
    edge = 100.0 * (rtol + ATOL_OF_SCALE)
    assert pair(datatype, alone + 0.8 * edge, alone).batchable
    assert not pair(datatype, alone + 1.2 * edge, alone).batchable


def test_small_numbers_are_measured_against_the_largest_of_their_row() -> None:
    alone = np.array([[1000.0, 0.0], [1000.0, 0.0]])
    assert pair(FP32, alone + np.array([[0, 0.09], [0, 0]]), alone).batchable
    assert not pair(FP32, alone + np.array([[0, 0.11], [0, 0]]), alone).batchable


def test_a_row_of_zeros_must_stay_zero() -> None:
    zeros = np.zeros((2, 2))
    assert pair(FP32, zeros, zeros).batchable
    assert not pair(FP32, zeros + 1e-6, zeros).batchable


def test_whole_numbers_must_be_equal() -> None:
    alone = np.array([[10**12, 7], [3, 4]])
    assert pair(INT64, alone, alone).batchable
    assert not pair(INT64, alone + np.array([[1, 0], [0, 0]]), alone).batchable


def test_bf16_is_compared_as_numbers() -> None:
    def bits(*numbers: float) -> Array:
        return (np.array(numbers, np.float32).view(np.uint32) >> 16).astype(np.uint16).reshape(2, 1)

    assert pair(BF16, bits(1.0, 100.0), bits(1.01, 101.0)).batchable
    assert not pair(BF16, bits(1.0, 100.0), bits(1.2, 100.0)).batchable


@given(st.lists(st.binary(max_size=5), min_size=3, max_size=3), st.integers(0, 2))
def test_strings_must_be_equal(words: list[bytes], place: int) -> None:
    def strings(elements: list[bytes]) -> OutputTensor:
        return OutputTensor("y", BYTES, (len(elements),), pack_bytes(elements))

    alone = [[strings([word])] for word in words]
    assert compare([strings(words)], alone).batchable
    changed = list(words)
    changed[place] += b"!"
    assert not compare([strings(changed)], alone).batchable


@given(st.lists(st.integers(0, 1000), min_size=5, max_size=5, unique=True), st.permutations(range(5)))
def test_swapped_rows_are_noticed(values: list[int], order: list[int]) -> None:
    array = np.array(values)
    alone = [[OutputTensor("y", INT64, (1,), array[row : row + 1].astype("<i8").tobytes())] for row in range(5)]
    together = OutputTensor("y", INT64, (5,), array[order].astype("<i8").tobytes())
    assert compare([together], alone).batchable is (list(order) == list(range(5)))


@pytest.mark.parametrize("datatype", DATATYPES, ids=repr)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_trial_inputs_hold_what_their_shapes_say_and_rows_add_up(datatype: Datatype, seed: int) -> None:
    signature = (SignatureTensor("x", datatype, (None, 3, None)),)
    for (tensor,) in islice(trial_inputs(signature, PROOF_ROWS, np.random.default_rng(seed)), 3):
        count = element_count(tensor.shape)
        assert tensor.shape[:2] == (PROOF_ROWS, 3)
        data = bytes(tensor.buffer or b"")
        assert (len(unpack_bytes(data)) if datatype.kind == "bytes" else len(data) // datatype.itemsize) == count
        rows = [one_row([tensor], row)[0] for row in range(PROOF_ROWS)]
        assert all(row.shape == (1, *tensor.shape[1:]) for row in rows)
        assert b"".join(bytes(row.buffer or b"") for row in rows) == data


def test_the_same_seed_gives_the_same_trial() -> None:
    signature = (SignatureTensor("x", FP32, (None, None)),)
    first, second = (next(trial_inputs(signature, 5, np.random.default_rng(3)))[0].buffer for _ in range(2))
    assert first == second


def test_variable_sizes_are_tried_in_turn_and_fixed_shapes_only_for_their_values() -> None:
    rng = np.random.default_rng(0)
    variable = [t[0].shape for t in trial_inputs((SignatureTensor("x", INT64, (None, None)),), 5, rng)]
    assert variable == [(5, size) for size in VARIABLE_DIMS] * 3
    fixed = list(trial_inputs((SignatureTensor("x", INT64, (None, 4)),), 5, rng))
    ceilings = [int(np.frombuffer(t[0].buffer or b"", "<i8").max()) for t in fixed]
    assert len(fixed) == 3
    assert ceilings[0] > ceilings[1] >= ceilings[2] == 0
    whole = [t[0].shape for t in trial_inputs((SignatureTensor("x", INT64, (None,)),), None, rng)]
    assert whole[:2] == [(VARIABLE_DIMS[0],), (VARIABLE_DIMS[1],)]


def test_signatures_that_rule_batching_out() -> None:
    good = SignatureTensor("x", FP32, (None, 4))
    assert obstacle((good,), (good,)) is None
    assert obstacle((), (good,)) == "the model has no inputs"
    assert obstacle((good,), (SignatureTensor("y", FP32, ()),)) == "output 'y' has no dimensions"
    fixed = obstacle((SignatureTensor("x", FP32, (1, 4)),), (good,))
    assert fixed == "the first dimension of input 'x' is fixed to 1"


def test_no_trial_is_larger_than_memory_may_bear() -> None:
    rng = np.random.default_rng(1)
    wide = SignatureTensor("x", DATATYPE["FP32"], (None, MAX_TRIAL_ELEMENTS // 2 + 1))
    assert list(trial_inputs((wide,), 2, rng)) == []
    many = SignatureTensor("x", DATATYPE["FP32"], (None, None, None, None, None))
    first = next(trial_inputs((many,), 1, rng))  # the smaller sizes are tried
    assert 0 < element_count(first[0].shape) <= MAX_TRIAL_ELEMENTS
