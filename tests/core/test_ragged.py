"""Ragged batches, piece by piece: what is laid flat, what is made for a batch, and how its answer is cut."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.assembly import AssemblyError, part_nbytes, write_parts
from gateway.core.batch import Execution, FinishedBatch, executions
from gateway.core.model import BatchPolicy, ModelSpec, TensorSpec
from gateway.core.ragged import Ragged, agreeing_dims, asked_for, describe
from gateway.core.request import InferRequest, InputTensor, OutputTensor
from gateway.core.scheduling import PLAIN, BatchInputKind, BatchInputTensor, BatchOutputTensor, Scheduling
from gateway.core.tensor import DATATYPE, Datatype, element_count, pack_bytes, unpack_bytes

FP32, INT32, INT64, BYTES = (DATATYPE[name] for name in ("FP32", "INT32", "INT64", "BYTES"))
KINDS = get_args(BatchInputKind)
SHAPES = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=6)
"""Of one input of two dims in a batch of several requests."""


def made(kind: str, datatype: Datatype = INT32) -> BatchInputTensor:
    return BatchInputTensor(kind, (kind.lower(),), datatype, ("x",))  # type: ignore[arg-type]


def spec(
    x: TensorSpec, made: tuple[BatchInputTensor, ...] = (), scattered: tuple[TensorSpec, ...] = (), size: int = 64
) -> ModelSpec:
    """`x` ragged, `a` and `y` as ever, `scattered` cut by the shape of `x`."""
    scatter = (BatchOutputTensor(tuple(t.name for t in scattered), ("x",)),) if scattered else ()
    scheduling = Scheduling(batch_inputs=made, batch_outputs=scatter)
    outputs = (TensorSpec("y", FP32, (2,)), *scattered)
    inputs = (TensorSpec("a", INT64, (1,)), x)
    return ModelSpec("m", "1", "", "", inputs, outputs, BatchPolicy(size), scheduling=scheduling)


X = TensorSpec("x", FP32, (-1, -1), ragged=True)
FLAT = TensorSpec("flat", FP32, (-1, -1))


def request(shape: tuple[int, ...], start: int = 0) -> InferRequest:
    rows, count = shape[0], element_count(shape)
    x = InputTensor(FP32, shape, [float(start + i) for i in range(count)], None)
    a = InputTensor(INT64, (rows, 1), None, np.arange(rows, dtype="<i8").tobytes())
    return InferRequest((a, x), rows, 0, None, (0, 1), None)


def written(inputs: Any) -> list[bytes]:
    found = []
    for one in inputs:
        data = bytearray(one.nbytes)
        write_parts(one, memoryview(data))
        found.append(bytes(data))
    return found


# -- the documented example ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape", "values"),
    [
        ("BATCH_ELEMENT_COUNT", (2,), [6, 4]),
        ("BATCH_ACCUMULATED_ELEMENT_COUNT", (2,), [6, 10]),
        ("BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO", (3,), [0, 6, 10]),
        ("BATCH_MAX_ELEMENT_COUNT_AS_SHAPE", (6,), [0] * 6),
        ("BATCH_ITEM_SHAPE", (3, 1), [3, 3, 4]),
        ("BATCH_ITEM_SHAPE_FLATTEN", (3,), [3, 3, 4]),
    ],
)
@pytest.mark.parametrize("datatype", [INT32, FP32])
def test_every_kind_by_its_description(
    kind: str, shape: tuple[int, ...], values: list[int], datatype: Datatype
) -> None:
    tensor = describe(made(kind, datatype), [(2, 3), (1, 4)])
    assert (tensor.shape, tensor.datatype) == (shape, datatype)
    assert np.frombuffer(tensor.buffer or b"", datatype.numpy).tolist() == values
    assert part_nbytes(tensor) == 4 * len(values)


def test_items_of_several_dims() -> None:
    """The example of Triton's documentation: a request of two rows [3,1], and one of one row [2,2]."""
    tensor = describe(made("BATCH_ITEM_SHAPE"), [(2, 3, 1), (1, 2, 2)])
    assert tensor.shape == (3, 2)
    assert np.frombuffer(tensor.buffer or b"", "<i4").reshape(3, 2).tolist() == [[3, 1], [3, 1], [2, 2]]
    assert describe(made("BATCH_ITEM_SHAPE_FLATTEN"), [(2, 3, 1), (1, 2, 2)]).shape == (6,)


@given(SHAPES)
def test_every_kind_against_numpy(shapes: list[tuple[int, ...]]) -> None:
    arrays = [np.zeros(shape) for shape in shapes]
    counts = np.array([array.size for array in arrays])
    items = np.concatenate([np.tile(np.array(a.shape[1:]), (a.shape[0], 1)) for a in arrays])
    expected = {
        "BATCH_ELEMENT_COUNT": counts,
        "BATCH_ACCUMULATED_ELEMENT_COUNT": np.cumsum(counts),
        "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO": np.concatenate([[0], np.cumsum(counts)]),
        "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE": np.zeros(counts.max()),
        "BATCH_ITEM_SHAPE": items,
        "BATCH_ITEM_SHAPE_FLATTEN": items.ravel(),
    }
    assert set(expected) == set(KINDS)
    found = dict(Ragged(spec(X, tuple(map(made, KINDS)))).made({1: shapes}))
    for kind, array in expected.items():
        tensor = found[kind.lower()]
        assert tensor.shape == array.shape, kind
        assert np.frombuffer(tensor.buffer or b"", "<i4").tolist() == array.ravel().tolist(), kind


def test_a_count_that_int32_cannot_hold_is_an_error_and_never_wraps() -> None:
    with pytest.raises(OverflowError):
        describe(made("BATCH_ELEMENT_COUNT"), [(1, 2**31)])


def test_all_targets_of_one_block_get_the_same() -> None:
    block = BatchInputTensor("BATCH_ELEMENT_COUNT", ("n", "m"), INT32, ("x",))
    (n, first), (m, second) = Ragged(spec(X, (block,))).made({1: [(1, 2, 3)]})
    assert (n, m) == ("n", "m")
    assert first.buffer == second.buffer


def test_shapes_are_the_models_where_clients_see_others() -> None:
    x = TensorSpec("x", FP32, (-1, 6), reshape=(-1, 2, 3), ragged=True)
    ragged = Ragged(spec(x, (made("BATCH_ITEM_SHAPE"), made("BATCH_ELEMENT_COUNT"))))
    shapes, counts = (tensor for _, tensor in ragged.made({1: [(1, 4, 6), (2, 1, 6)]}))
    assert np.frombuffer(shapes.buffer or b"", "<i4").reshape(-1, 3).tolist() == [[4, 2, 3], [1, 2, 3], [1, 2, 3]]
    assert np.frombuffer(counts.buffer or b"", "<i4").tolist() == [24, 12]


# -- the way in ----------------------------------------------------------------------------------------------------


@given(SHAPES)
def test_ragged_rows_are_laid_flat_in_order_and_others_stay_rows(shapes: list[tuple[int, ...]]) -> None:
    members = [request(shape, 100 * place) for place, shape in enumerate(shapes)]
    rows = sum(shape[0] for shape in shapes)
    a, x = Ragged(spec(X)).concat(members, rows)
    data = np.concatenate([np.array(member.inputs[1].values, np.float32) for member in members])  # type: ignore[union-attr]
    assert (a.shape, x.shape) == ((rows, 1), (data.size,))
    assert written([a, x])[1] == data.tobytes()
    assert np.frombuffer(written([a])[0], "<i8").tolist() == [row for shape in shapes for row in range(shape[0])]


def test_strings_are_laid_flat_too() -> None:
    x = TensorSpec("x", BYTES, (-1,), ragged=True)
    a = InputTensor(INT64, (1, 1), [0], None)
    packed = [pack_bytes([b"a", b"", b"cc"]), pack_bytes([b"d"])]
    members = [
        InferRequest((a, InputTensor(BYTES, (1, count), None, data)), 1, 0, None, (0,), None)
        for count, data in zip((3, 1), packed, strict=True)
    ]
    _, flat = Ragged(spec(x)).concat(members, 2)
    assert (flat.shape, flat.nbytes) == ((4,), sum(map(len, packed)))
    assert unpack_bytes(written([flat])[0]) == [b"a", b"", b"cc", b"d"]


def test_only_dims_of_ragged_inputs_may_differ_within_a_batch() -> None:
    inputs = (TensorSpec("a", INT64, (-1,)), X, TensorSpec("b", INT64, (1,), optional=True))
    assert agreeing_dims(inputs, [(2, 5), (2, 3, 4), None], True) == ((5,), (), None)
    assert agreeing_dims(inputs, [(2, 5), (2, 9, 9), (2, 1)], True) == ((5,), (), (1,))
    assert agreeing_dims(inputs[:1], [(2, 5)], False) == ((2, 5),)


def test_it_knows_whom_it_concerns() -> None:
    assert not asked_for(PLAIN, (TensorSpec("a", INT64, (1,)),))
    assert asked_for(PLAIN, (X,))
    assert asked_for(Scheduling(batch_inputs=(made("BATCH_ITEM_SHAPE"),)), ())
    assert asked_for(Scheduling(batch_outputs=(BatchOutputTensor(("y",), ("x",)),)), ())
    plain = ModelSpec("m", "1", "", "", (TensorSpec("a", INT64, (1,)),), (), BatchPolicy(8))
    assert Ragged.of(plain) is None


# -- the way back --------------------------------------------------------------------------------------------------


def outputs_of(members: list[InferRequest]) -> list[OutputTensor]:
    """`y`: two numbers a row; `flat`: the elements of `x`, as one tensor."""
    rows = sum(member.rows for member in members)
    data = [value for member in members for value in member.inputs[1].values]  # type: ignore[union-attr]
    return [
        OutputTensor("y", FP32, (rows, 2), np.arange(rows * 2, dtype=np.float32).tobytes()),
        OutputTensor("flat", FP32, (len(data),), np.array(data, np.float32).tobytes()),
    ]


def finished(outputs: list[OutputTensor], rows: int) -> FinishedBatch:
    return FinishedBatch("id", rows, dict(enumerate(outputs)), "onnx-1", 2, 1.0, 2.0, "full", (1, 2, 3))


@given(SHAPES)
def test_each_gets_its_own_elements_in_its_own_shape(shapes: list[tuple[int, ...]]) -> None:
    ragged = Ragged(spec(X, scattered=(FLAT,)))
    members = [request(shape, 100 * place) for place, shape in enumerate(shapes)]
    outputs = outputs_of(members)
    rows = sum(shape[0] for shape in shapes)
    ragged.check_outputs(members, (0, 1), rows, outputs)
    answers = ragged.answers(members, finished(outputs, rows))
    assert answers is not None
    row = 0
    for member in members:
        own = answers[row]
        assert own.rows == member.rows
        assert [tensor.shape for tensor in own.outputs.values()] == [(member.rows, 2), member.inputs[1].shape]  # type: ignore[union-attr]
        assert np.frombuffer(own.outputs[1].data, np.float32).tolist() == member.inputs[1].values  # type: ignore[union-attr]
        assert np.frombuffer(own.outputs[0].data, np.float32).tolist() == list(range(row * 2, (row + member.rows) * 2))
        assert list(executions(own, 0)) == [(Execution("onnx-1", 2, "id", rows, remote=False), row)]
        assert (own.dispatched, own.finished, own.infer_ns, own.reason) == (1.0, 2.0, 2, "full")
        row += member.rows
    assert len(answers) == len(members)


def test_fixed_dims_of_an_output_are_its_own() -> None:
    """Variable dims come from the source, place by place; what is fixed may differ from it."""
    ragged = Ragged(spec(X, scattered=(TensorSpec("flat", FP32, (-1, 2)),)))
    members = [request((1, 3, 5)), request((2, 1, 7))]
    output = OutputTensor("flat", FP32, (10,), np.arange(10, dtype=np.float32).tobytes())
    first, second = ragged.cut(members, {1: output})
    assert (first[1].shape, second[1].shape) == ((1, 3, 2), (2, 1, 2))
    assert np.frombuffer(second[1].data, np.float32).tolist() == [6, 7, 8, 9]


def test_strings_are_cut_where_they_end() -> None:
    ragged = Ragged(spec(X, scattered=(TensorSpec("flat", BYTES, (-1, -1)),)))
    words = [b"a", b"", b"ccc", b"dd"]
    output = OutputTensor("flat", BYTES, (4,), pack_bytes(words))
    parts = ragged.cut([request((1, 1, 1)), request((1, 0, 1)), request((1, 3, 1))], {1: output})
    assert [unpack_bytes(part[1].data) for part in parts] == [words[:1], [], words[1:]]


def test_who_does_not_want_the_output_that_is_cut_gets_plain_rows() -> None:
    ragged = Ragged(spec(X, scattered=(FLAT,)))
    members = [request((1, 2, 2)), request((1, 1, 1))]
    assert ragged.answers(members, finished(outputs_of(members)[:1], 2)) is None


@pytest.mark.parametrize("count", [4, 6])
def test_an_output_that_holds_more_or_less_than_is_due_reaches_nobody(count: int) -> None:
    ragged = Ragged(spec(X, scattered=(FLAT,)))
    members = [request((1, 2, 2)), request((1, 1, 1))]
    y = outputs_of(members)[0]
    flat = OutputTensor("flat", FP32, (count,), bytes(4 * count))
    with pytest.raises(
        AssemblyError, match=f"output 'flat' has {count} elements, where the shapes of input 'x' make 5"
    ):
        ragged.check_outputs(members, (0, 1), 2, [y, flat])


def test_other_outputs_must_have_the_batchs_rows() -> None:
    ragged = Ragged(spec(X, (made("BATCH_ELEMENT_COUNT"),), (FLAT,)))
    members = [request((2, 2, 2))]
    short = OutputTensor("y", FP32, (1, 2), bytes(8))
    text = (
        r"output 'y' has shape \[1, 2\] for a batch of 2 rows; its batch_input counts requests, not rows: send one row"
    )
    with pytest.raises(AssemblyError, match=text):
        ragged.check_outputs(members, (0,), 2, [short])
    with pytest.raises(AssemblyError, match=r"for a batch of 2 rows$"):
        ragged.check_outputs([request((1, 1, 1))] * 2, (0,), 2, [short])
