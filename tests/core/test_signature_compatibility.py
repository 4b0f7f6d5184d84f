"""Whether a version can answer another's clients."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.model import BatchPolicy, ModelSpec, TensorSpec
from gateway.core.scheduling import PLAIN, SequencePolicy
from gateway.core.signature_compatibility import incompatibilities
from gateway.core.tensor import DATATYPE

F32, F64, I64 = DATATYPE["FP32"], DATATYPE["FP64"], DATATYPE["INT64"]


def spec(
    inputs: tuple[TensorSpec, ...] = (TensorSpec("x", F32, (4,)),),
    outputs: tuple[TensorSpec, ...] = (TensorSpec("y", F32, (3,)), TensorSpec("label", I64, ())),
    policy: BatchPolicy | None = None,
) -> ModelSpec:
    return ModelSpec("digits", "1", "", "onnxruntime_onnx", inputs, outputs, policy or BatchPolicy(8, oversize="split"))


def test_a_model_is_compatible_with_itself() -> None:
    assert incompatibilities(spec(), spec()) == ()


@pytest.mark.parametrize(
    ("candidate", "told"),
    [
        (spec(inputs=(TensorSpec("z", F32, (4,)),)), "input 'x'"),
        (spec(inputs=(TensorSpec("x", F64, (4,)),)), "FP64"),
        (spec(inputs=(TensorSpec("x", F32, (5,)),)), "[-1, 5]"),
        (spec(inputs=(TensorSpec("x", F32, (4, 1)),)), "[-1, 4, 1]"),
        (spec(inputs=(TensorSpec("x", F32, (4,)), TensorSpec("mask", I64, (4,)))), "'mask'"),
        (spec(outputs=(TensorSpec("y", F32, (3,)),)), "output 'label'"),
        (spec(outputs=(TensorSpec("y", F64, (3,)), TensorSpec("label", I64, ()))), "FP64"),
        (spec(outputs=(TensorSpec("y", F32, (4,)), TensorSpec("label", I64, ()))), "[-1, 4]"),
        (spec(outputs=(TensorSpec("label", I64, ()), TensorSpec("y", F32, (3,)))), "order"),
        (
            spec(outputs=(TensorSpec("new", I64, ()), TensorSpec("y", F32, (3,)), TensorSpec("label", I64, ()))),
            "order",
        ),
        (spec(policy=BatchPolicy(4)), "up to 4 rows"),
        (
            replace(spec(), scheduling=replace(PLAIN, sequence=SequencePolicy())),
            "needs sequences",
        ),
        (spec(policy=BatchPolicy(0)), "takes shape [4]"),
    ],
)
def test_what_would_break_clients_is_named(candidate: ModelSpec, told: str) -> None:
    assert any(told in reason for reason in incompatibilities(spec(), candidate))


@pytest.mark.parametrize(
    "candidate",
    [
        spec(inputs=(TensorSpec("x", F32, (-1,)),)),
        spec(inputs=(TensorSpec("x", F32, (4,)), TensorSpec("mask", I64, (4,), optional=True))),
        spec(inputs=(TensorSpec("x", F32, (4,), optional=True),)),
        spec(outputs=(TensorSpec("y", F32, (-1,)), TensorSpec("label", I64, ()))),
        spec(outputs=(TensorSpec("y", F32, (3,)), TensorSpec("label", I64, ()), TensorSpec("why", F32, (3,)))),
        spec(policy=BatchPolicy(64, oversize="split")),
        spec(
            (TensorSpec("x", F32, (-1, 4)),),
            (TensorSpec("y", F32, (-1, 3)), TensorSpec("label", I64, (-1,))),
            BatchPolicy(0),
        ),
    ],
)
def test_what_takes_more_and_gives_more_fits(candidate: ModelSpec) -> None:
    assert incompatibilities(spec(), candidate) == ()


def test_a_free_dimension_may_not_become_fixed() -> None:
    free = spec(inputs=(TensorSpec("x", F32, (-1,)),))
    assert incompatibilities(spec(), free) == ()
    assert incompatibilities(free, spec()) != ()


def test_an_optional_input_stays_optional() -> None:
    serving = spec(inputs=(TensorSpec("x", F32, (4,)), TensorSpec("mask", I64, (4,), optional=True)))
    needs = spec(inputs=(TensorSpec("x", F32, (4,)), TensorSpec("mask", I64, (4,))))
    (reason,) = incompatibilities(serving, needs)
    assert "'mask' is required" in reason


tensors = st.builds(
    TensorSpec,
    st.sampled_from(["a", "b"]),
    st.sampled_from([F32, I64]),
    st.lists(st.sampled_from([-1, 2, 3]), max_size=3).map(tuple),
    st.booleans(),
)
signatures = st.lists(tensors, min_size=1, max_size=2, unique_by=lambda t: t.name).map(tuple)
specs = st.builds(spec, signatures, signatures, st.sampled_from([BatchPolicy(0), BatchPolicy(4, oversize="split")]))


@given(specs, st.data())
def test_whatever_a_client_of_the_one_sends_the_other_takes(serving: ModelSpec, data: st.DataObject) -> None:
    """Requests are drawn from what the serving version takes; a compatible one must take each of them."""
    candidate = data.draw(specs)
    if incompatibilities(serving, candidate):
        return
    sent = {}
    for tensor in serving.inputs:
        if tensor.optional and data.draw(st.booleans()):
            continue
        dims = (-1, *tensor.dims) if serving.batched else tensor.dims
        sent[tensor.name] = (tensor.datatype, tuple(data.draw(st.integers(1, 4)) if d == -1 else d for d in dims))
    offered = {tensor.name: tensor for tensor in candidate.inputs}
    for name, (datatype, shape) in sent.items():
        tensor = offered[name]
        dims = (-1, *tensor.dims) if candidate.batched else tensor.dims
        assert tensor.datatype is datatype
        assert len(dims) == len(shape)
        assert all(d in (-1, n) for d, n in zip(dims, shape, strict=True))
    assert all(tensor.optional or name in sent for name, tensor in offered.items())


@given(specs, specs, specs)
def test_what_fits_the_fitting_takes_the_same_requests(a: ModelSpec, b: ModelSpec, c: ModelSpec) -> None:
    """Of inputs the relation can be chained, so a row of swaps keeps the first one's clients."""
    if not incompatibilities(a, b) and not incompatibilities(b, c):
        assert not [reason for reason in incompatibilities(a, c) if "input" in reason]
