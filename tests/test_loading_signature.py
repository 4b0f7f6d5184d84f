"""Which tensors of a file are served, and with which dims: config.pbtxt may only agree."""

from __future__ import annotations

import pytest

from gateway.core.batchability import SignatureTensor
from gateway.core.model import TensorSpec
from gateway.core.scheduling import (
    BatchInputTensor,
    ControlInput,
    Scheduling,
    SequencePolicy,
    StateTensor,
)
from gateway.core.tensor import DATATYPE
from gateway.errors import ConfigError
from gateway.loading_signature import check_filled, chosen, hidden_tensors, narrowed, served

FP32, INT32 = DATATYPE["FP32"], DATATYPE["INT32"]
X, Y = SignatureTensor("x", FP32, (None, 3, None)), SignatureTensor("y", FP32, (None,))
BIAS = SignatureTensor("bias", FP32, (None, 2), optional=True)
SEQUENCE = Scheduling(
    sequence=SequencePolicy(
        controls=(ControlInput("start", "CONTROL_SEQUENCE_START", INT32),),
        states=(StateTensor("si", "so", FP32, (1,)),),
    ),
    batch_inputs=(BatchInputTensor("BATCH_ELEMENT_COUNT", ("n",), FP32, ("x",)),),
)
START, STATE = SignatureTensor("start", INT32, (None, 1)), SignatureTensor("si", FP32, (None, 1))
COUNT, STATE_OUT = SignatureTensor("n", FP32, (None,)), SignatureTensor("so", FP32, (None, 1))


def stated(name: str, *dims: int, reshape: tuple[int, ...] | None = None, optional: bool = False) -> TensorSpec:
    return TensorSpec(name, FP32, dims, optional, reshape)


def test_nothing_stated_is_everything_but_defaults_and_what_the_gateway_fills() -> None:
    hidden, kept = hidden_tensors(SEQUENCE)
    assert (sorted(hidden), sorted(kept)) == (["n", "si", "start"], ["so"])
    assert chosen("input", (X, START, STATE, COUNT, BIAS), (), hidden) == (X,)
    assert chosen("output", (Y, STATE_OUT), (), kept) == (Y,)


def test_a_list_of_inputs_need_not_name_what_the_gateway_fills() -> None:
    hidden, _ = hidden_tensors(SEQUENCE)
    assert chosen("input", (START, STATE, X, COUNT), (stated("x", 3, -1),), hidden) == (X,)
    with pytest.raises(ConfigError, match=r"lists no input \['y'\], which the model file has"):
        chosen("input", (START, STATE, X, Y, COUNT), (stated("x", 3, -1),), hidden)


def test_the_file_has_what_the_gateway_is_to_fill() -> None:
    check_filled(SEQUENCE, (X, START, STATE, COUNT), (Y, STATE_OUT))
    check_filled(Scheduling(), (), ())
    with pytest.raises(ConfigError, match=r"names the input 'start', but the model file has \['n', 'si', 'x'\]"):
        check_filled(SEQUENCE, (X, STATE, COUNT), (Y, STATE_OUT))
    with pytest.raises(ConfigError, match=r"names the output 'so', but the model file has \['y'\]"):
        check_filled(SEQUENCE, (X, START, STATE, COUNT), (Y,))
    other = SignatureTensor("start", FP32, (None, 1))
    with pytest.raises(ConfigError, match="says input 'start' is INT32, the model file says FP32"):
        check_filled(SEQUENCE, (X, other, STATE, COUNT), (Y, STATE_OUT))


@pytest.mark.parametrize(
    ("dims", "expected"),
    [((3, 7), (3, 7)), ((3, -1), (3, -1)), ((-1, -1), (3, -1)), ((-1, 7), (3, 7))],
)
def test_dims_may_only_become_narrower(dims: tuple[int, ...], expected: tuple[int, ...]) -> None:
    (spec,) = served("input", (X,), (stated("x", *dims),), batched=True, short=False)
    assert spec.dims == expected
    (tried,) = narrowed((X,), (stated("x", *dims),), batched=True)
    assert tried.shape == (None, *[None if dim == -1 else dim for dim in expected])


def test_dims_that_contradict_are_refused_and_not_tried() -> None:
    for dims in ((4, 7), (3,), (3, 7, 1)):
        with pytest.raises(ConfigError, match=r"has dims \[.*\], the model file says \[3, -1\]"):
            served("input", (X,), (stated("x", *dims),), batched=True, short=False)
    assert narrowed((X,), (stated("x", 3),), batched=True) == (X,)


def test_a_reshape_is_compared_with_the_file_and_its_dims_are_served() -> None:
    want = stated("x", 1, 3, 5, reshape=(3, 5))
    (spec,) = served("input", (X,), (want,), batched=True, short=False)
    assert spec == want
    assert narrowed((X,), (want,), batched=True)[0].shape == (None, 3, 5)
    with pytest.raises(ConfigError, match=r"has the reshape \[5, 3\], the model file says \[3, -1\]"):
        served("input", (X,), (stated("x", 15, reshape=(5, 3)),), batched=True, short=False)


@pytest.mark.parametrize(
    ("dims", "of_file", "hint"),
    [
        ((1,), (None,), "; to serve it with dims of its own, write reshape { shape: [ ] } beside dims: [ 1 ]"),
        ((6, -1), (None, 2, 3, None), "write reshape { shape: [ 2, 3, -1 ] } beside dims: [ 6, -1 ]"),
        ((5, -1), (None, 2, 3, None), "the model file says [2, 3, -1]"),
        ((2,), (None,), "the model file says []"),
    ],
)
def test_dims_that_hold_the_same_elements_can_stand_with_a_reshape(
    dims: tuple[int, ...], of_file: tuple[int | None, ...], hint: str
) -> None:
    tensor = SignatureTensor("x", FP32, of_file)
    with pytest.raises(ConfigError) as caught:
        served("output", (tensor,), (stated("x", *dims),), batched=True, short=False)
    assert str(caught.value).endswith(hint)
    if "reshape" in hint:  # what it says to write is accepted
        own = tuple([-1 if dim is None else dim for dim in of_file[1:]])
        assert served("output", (tensor,), (stated("x", *dims, reshape=own),), batched=True, short=False)


def test_dims_without_the_first_where_nobody_stated_a_size() -> None:
    (spec,) = served("input", (X,), (stated("x", 3, 4),), batched=False, short=True)
    assert spec.dims == (-1, 3, 4)
    (spec,) = served("input", (X,), (stated("x", 12, reshape=(3, 4)),), batched=False, short=True)
    assert (spec.dims, spec.reshape) == ((-1, 12), (-1, 3, 4))


def test_an_optional_input_needs_a_default() -> None:
    assert chosen("input", (X, BIAS), (stated("bias", 2, optional=True), stated("x", 3, -1)), frozenset()) == (BIAS, X)
    with pytest.raises(ConfigError, match="says input 'x' is optional, but the model file has no default for it"):
        chosen("input", (X, BIAS), (stated("x", 3, -1, optional=True),), frozenset())
