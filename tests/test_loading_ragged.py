"""Loading models with ragged inputs on real workers: what is refused, what is proven, what is served.

The rig is test_catalog's: one pool of real workers, a catalog for each test.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from gateway.core.model import ONE_ROW, TensorSpec
from gateway.core.tensor import DATATYPE
from gateway.errors import InvalidRequest
from gateway.protocol.oip_plan import Planner
from tests import test_catalog
from tests.live import models
from tests.live.models import SEGMENTS_CONFIG, value
from tests.test_catalog import Rig
from tests.test_loading import ask

FP32 = DATATYPE["FP32"]
runner, pool, rig = test_catalog.runner, test_catalog.pool, test_catalog.rig
AXES = {"one": np.array([1], np.int64), "zero": np.array([0], np.int64)}


def config(inside: str, size: int = 8) -> str:
    x = 'name: "x" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true'
    return f"max_batch_size: {size} input {{ {x} }} {inside}"


def made(kind: str, name: str = "n", datatype: str = "INT32") -> str:
    return f'batch_input {{ kind: {kind} target_name: "{name}" data_type: TYPE_{datatype} source_input: "x" }}\n'


SCATTER = 'batch_output { target_name: "y" source_input: "x" }'
Y = 'output { name: "y" data_type: TYPE_FP32 dims: [ -1 ] }'


def doubled(shape: list[int | str | None]) -> bytes:
    """`x` FP32, twice itself; whatever shape."""
    return models.model(
        [helper.make_node("Add", ["x", "x"], ["y"])], [value("x", "FP32", shape)], [value("y", "FP32", shape)]
    )


def described(kind_shape: list[int | str | None], datatype: str = "INT32") -> bytes:
    """`x` [elements] is not looked at; what is made for the batch, `n`, comes back as `y` FP32."""
    nodes = [
        helper.make_node("Size", ["x"], ["size"]),
        helper.make_node("Cast", ["size"], ["count"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["count", "none"], ["nothing"]),
        helper.make_node("Cast", ["n"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["numbers", "nothing"], ["y"]),
    ]
    return models.model(
        nodes,
        [value("x", "FP32", ["elements"]), value("n", datatype, kind_shape)],
        [value("y", "FP32", kind_shape)],
        {"none": np.zeros(1, np.float32)},
    )


# -- served --------------------------------------------------------------------------------------------------------


def test_clients_see_rows_of_any_length(rig: Rig) -> None:
    version = rig.one(models.segments(), SEGMENTS_CONFIG)
    spec = version.spec
    assert spec.inputs == (TensorSpec("x", FP32, (-1,), ragged=True),)
    assert [tensor.dims for tensor in spec.outputs] == [(1,), (-1,)]
    assert (spec.policy.merge, spec.policy.max_batch_size, spec.policy.oversize) == (True, 8, "reject")
    assert spec.batching_note.startswith("batches up to 8 rows: 5 random requests of different shapes gave the same")
    for count in (0, 1, 5):
        x = np.arange(float(count)).reshape(1, count)
        answer = ask(rig, version, x)
        assert answer["sum"].tolist() == [[x.sum()]]
        assert answer["double"].tolist() == (2 * x).tolist()
    document = version.config_document
    assert document["input"][0]["allow_ragged_batch"] is True
    assert document["batch_input"][0]["kind"] == "BATCH_ACCUMULATED_ELEMENT_COUNT"
    assert document["batch_output"] == [
        {"target_name": ["double"], "kind": "BATCH_SCATTER_WITH_INPUT_SHAPE", "source_input": ["x"]}
    ]
    assert document["dynamic_batching"]["preferred_batch_size"] == [8]


def test_requests_have_one_row_where_the_model_answers_requests(rig: Rig) -> None:
    version = rig.one(models.segments(), SEGMENTS_CONFIG)
    assert version.spec.policy.one_row
    assert version.spec.batching_note.endswith(f"; {ONE_ROW}")
    planner = Planner(version.spec)
    assert planner.plan((("x", "FP32", (1, 7)),)).rows == 1
    with pytest.raises(InvalidRequest, match=f"batch-size must be <= 1 for 'm': {ONE_ROW}"):
        planner.plan((("x", "FP32", (2, 3)),))


def test_batches_of_one(rig: Rig) -> None:
    version = rig.one(models.segments(), SEGMENTS_CONFIG.replace("max_batch_size: 8", "max_batch_size: 1"))
    assert (version.spec.policy.max_batch_size, version.spec.policy.request_rows) == (1, 1)
    assert ask(rig, version, np.array([[1.0, 2.0]]))["sum"].tolist() == [[3]]


def test_several_rows_where_the_model_answers_rows(rig: Rig) -> None:
    """Shapes are told row by row, so an answer for each row can be made."""
    version = rig.one(described(["rows", 1]), config(made("BATCH_ITEM_SHAPE")))
    assert (version.spec.policy.merge, version.spec.policy.one_row) == (True, False)
    assert ask(rig, version, np.zeros((3, 5)))["y"].tolist() == [[5]] * 3


@pytest.mark.parametrize(
    ("kind", "shape", "alone"),
    [
        ("BATCH_ELEMENT_COUNT", ["n"], [5]),
        ("BATCH_ACCUMULATED_ELEMENT_COUNT", ["n"], [5]),
        ("BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO", ["n"], None),
        ("BATCH_MAX_ELEMENT_COUNT_AS_SHAPE", ["n"], None),
        ("BATCH_ITEM_SHAPE", ["n", "rank"], [[5]]),
        ("BATCH_ITEM_SHAPE", ["n", 1], [[5]]),
        ("BATCH_ITEM_SHAPE_FLATTEN", ["n"], [5]),
    ],
)
@pytest.mark.parametrize("datatype", ["INT32", "FP32"])
def test_every_kind_reaches_the_model(
    rig: Rig, kind: str, shape: list[int | str | None], alone: Any, datatype: str
) -> None:
    """What does not tell one request from another (accumulated, or the longest of all) is not merged as an answer."""
    version = rig.one(described(shape, datatype), config(made(kind, datatype=datatype)))
    assert version.spec.policy.merge is (kind != "BATCH_ACCUMULATED_ELEMENT_COUNT" and alone is not None)
    if alone is not None:
        assert ask(rig, version, np.zeros((1, 5)))["y"].tolist() == alone


def test_other_inputs_stay_rows(rig: Rig) -> None:
    """`b` is of the ordinary kind: its dims separate batches, and its rows lie behind each other."""
    content = models.model(
        [
            helper.make_node("Cast", ["n"], ["count"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["count", "one"], ["column"]),
            helper.make_node("Add", ["b", "column"], ["y"]),
            helper.make_node("Add", ["x", "x"], ["z"]),
        ],
        [value("x", "FP32", ["e"]), value("b", "FP32", ["rows", "m"]), value("n", "INT32", ["requests"])],
        [value("y", "FP32", ["rows", "m"]), value("z", "FP32", ["e"])],
        AXES,
    )
    rest = 'input { name: "b" data_type: TYPE_FP32 dims: [ -1 ] }' + Y
    version = rig.one(content, config(rest + made("BATCH_ELEMENT_COUNT")))
    # Two rows of `b` and one count: that goes well alone, by broadcasting, and beside nobody.
    assert (version.spec.policy.merge, version.spec.policy.one_row) == (True, True)
    assert ask(rig, version, np.zeros((1, 4)), np.array([[1.0, 2.0]]))["y"].tolist() == [[5, 6]]
    plan = Planner(version.spec).plan((("x", "FP32", (1, 4)), ("b", "FP32", (1, 2))))
    assert plan.trailing == ((), (2,))


def test_dims_of_clients_and_of_the_model(rig: Rig) -> None:
    """The model is told the shapes after the reshape."""
    text = config(made("BATCH_ITEM_SHAPE")).replace("dims: [ -1 ]", "dims: [ -1, 6 ] reshape { shape: [ -1, 2, 3 ] }")
    version = rig.one(described(["rows", 3]), text)
    assert version.spec.inputs[0].dims == (-1, 6)
    assert ask(rig, version, np.zeros((2, 4, 6)))["y"].tolist() == [[4, 2, 3]] * 2


def test_a_batch_input_may_describe_rows_that_are_not_ragged(rig: Rig) -> None:
    content = models.model(
        [helper.make_node("Cast", ["n"], ["y"], to=TensorProto.FLOAT), helper.make_node("Identity", ["x"], ["z"])],
        [value("x", "FP32", ["rows", "m"]), value("n", "INT32", ["rows", 1])],
        [value("y", "FP32", ["rows", 1]), value("z", "FP32", ["rows", "m"])],
    )
    version = rig.one(content, "max_batch_size: 8 " + made("BATCH_ITEM_SHAPE"))
    assert version.spec.policy.merge
    answer = ask(rig, version, np.ones((2, 3)))
    assert (answer["y"].tolist(), answer["z"].tolist()) == ([[3], [3]], [[1] * 3] * 2)


# -- proven --------------------------------------------------------------------------------------------------------


def test_what_carries_a_neighbours_numbers_into_an_answer_is_not_merged(rig: Rig) -> None:
    """A running sum over the whole batch: right on good numbers, and one caller's NaN is everyone's behind him."""
    version = rig.one(models.segments(running=True), SEGMENTS_CONFIG)
    assert not version.spec.policy.merge
    assert "output 'sum' of request" in version.spec.batching_note
    assert "nan] together, where those hold NaN;" in version.spec.batching_note
    assert ask(rig, version, np.array([[1.0, 2.0]]))["sum"].tolist() == [[3]]  # alone it serves


def test_whole_numbers_have_no_nan(rig: Rig) -> None:
    version = rig.one(models.segments("INT64", running=True), SEGMENTS_CONFIG.replace("FP32", "INT64"))
    assert version.spec.policy.merge


def test_a_model_that_mixes_requests_is_not_merged_unless_somebody_says_so(rig: Rig) -> None:
    """Everything minus the mean of everything."""
    content = models.model(
        [helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=1), helper.make_node("Sub", ["x", "mean"], ["y"])],
        [value("x", "FP32", ["e"])],
        [value("y", "FP32", ["e"])],
    )
    version = rig.one(content, config(Y + SCATTER))
    assert not version.spec.policy.merge
    assert version.spec.batching_note.startswith(
        "not batched: output 'y' of request 0 differs when run with other requ"
    )
    assert "if an output is to count over the whole batch" in version.spec.batching_note
    assert "set batching: on for the model" in version.spec.batching_note
    assert ask(rig, version, np.array([[1.0, 3.0]]))["y"].tolist() == [[-1, 1]]


@pytest.mark.parametrize(("batching", "merge"), [("on", True), ("off", False)])
def test_somebody_may_decide(rig: Rig, batching: str, merge: bool) -> None:
    version = rig.one(models.segments(running=batching == "on"), SEGMENTS_CONFIG, f"batching: {batching}")
    assert version.spec.policy.merge is merge
    assert f"batching is {batching}" in version.spec.batching_note
    assert ask(rig, version, np.array([[1.0, 2.0]]))["sum"].tolist() == [[3]]


def test_a_padded_answer_depends_on_who_else_is_there(rig: Rig) -> None:
    """As wide as the longest request of the batch: its own shape would tell a caller about the others."""
    content = models.model(
        [
            helper.make_node("Cast", ["n"], ["count"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["count", "one"], ["column"]),
            helper.make_node("Unsqueeze", ["pad", "zero"], ["row"]),
            helper.make_node("Add", ["column", "row"], ["y"]),
            helper.make_node("Add", ["x", "x"], ["z"]),
        ],
        [value("x", "FP32", ["e"]), value("n", "INT32", ["requests"]), value("pad", "FP32", ["longest"])],
        [value("y", "FP32", ["requests", "longest"]), value("z", "FP32", ["e"])],
        AXES,
    )
    text = config('output { name: "y" data_type: TYPE_FP32 dims: [ -1 ] }' + made("BATCH_ELEMENT_COUNT"))
    version = rig.one(content, text + made("BATCH_MAX_ELEMENT_COUNT_AS_SHAPE", "pad", "FP32"))
    assert not version.spec.policy.merge
    assert "shape [1, 3] alone, [1, 8] together" in version.spec.batching_note
    assert ask(rig, version, np.zeros((1, 3)))["y"].tolist() == [[3, 3, 3]]


# -- refused -------------------------------------------------------------------------------------------------------

FLAT = doubled(["e"])


@pytest.mark.parametrize(
    ("content", "text", "reason"),
    [
        (
            doubled(["rows", "e"]),
            config(Y),
            "expects that the model provides input with shape [-1] for ragged input 'x', the model file says [-1, -1]",
        ),
        (doubled([5]), config(Y), "with shape [-1] for ragged input 'x', the model file says [5]"),
        (FLAT, config(Y + SCATTER, size=0), "allow_ragged_batch needs a max_batch_size of 1 or more"),
        (FLAT, config(Y + SCATTER)[17:], "allow_ragged_batch needs a max_batch_size of 1 or more"),
        (
            doubled(["rows", "e"]),
            "max_batch_size: 0 " + made("BATCH_ITEM_SHAPE"),
            "config.pbtxt names the input 'n', but the model file has ['x']",
        ),
        (
            described(["n"]),
            config(made("BATCH_ELEMENT_COUNT")).replace("dims", "optional: true dims"),
            "config.pbtxt says input 'x' is optional, but the model file has no default for it",
        ),
        (
            described(["n"]),
            config(made("BATCH_ITEM_SHAPE")),
            "batch_input kind BATCH_ITEM_SHAPE makes the shape [-1, 1], the model file says [-1] for input 'n'",
        ),
        (
            described([3]),
            config(made("BATCH_ELEMENT_COUNT")),
            "batch_input kind BATCH_ELEMENT_COUNT makes the shape [-1], the model file says [3] for input 'n'",
        ),
        (
            described(["n"]),
            config(made("BATCH_ELEMENT_COUNT", datatype="FP32")),
            "config.pbtxt says input 'n' is FP32, the model file says INT32",
        ),
        (
            described(["n"]),
            config(made("BATCH_ELEMENT_COUNT") + made("BATCH_ELEMENT_COUNT")),
            "batch_input makes the input 'n' twice",
        ),
        (
            described(["n"]),
            config('input { name: "n" data_type: TYPE_INT32 dims: [ -1 ] }' + made("BATCH_ELEMENT_COUNT")),
            "input 'n' is made by batch_input; do not list it under input",
        ),
        (FLAT, config(SCATTER), "batch_output names the output 'y'; list it under output, with its dims"),
        (
            FLAT,
            config('output { name: "y" data_type: TYPE_FP32 dims: [ -1, -1 ] }' + SCATTER),
            "output 'y' has dims [-1, -1], whose variable ones are to be those of input 'x', which has 1",
        ),
        (
            FLAT,
            config('output { name: "y" data_type: TYPE_FP32 dims: [ -1 ] reshape { shape: [ -1, 1 ] } }' + SCATTER),
            "output 'y' has a reshape, and batch_output gives it a shape",
        ),
        (
            FLAT,
            config(Y + SCATTER + "sequence_batching { }"),
            "allow_ragged_batch is not supported together with sequence_batching",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_words(rig: Rig, content: bytes, text: str, reason: str) -> None:
    assert reason in rig.refused(content, text)


# -- warm-up -------------------------------------------------------------------------------------------------------


def test_samples_are_laid_flat_and_described_also_after_a_restart(rig: Rig) -> None:
    sample = """model_warmup { name: "w" batch_size: 1
      inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 5 ] random_data: true } } }"""
    version = rig.one(models.segments(), SEGMENTS_CONFIG + sample)
    batches = version.loaded.warm_up  # type: ignore[union-attr]
    trial, warm = ([(given.index, given.shape, given.nbytes) for given in batch] for batch in batches)
    assert trial == [(0, (19,), 76), (1, (5,), 20)]  # 3 + 8 + 1 + 5 + 2 elements of five requests
    assert warm == [(0, (5,), 20), (1, (1,), 4)]
    refused = sample.replace("batch_size: 1", "batch_size: 2")
    other = Rig(rig.runner, rig.pool, rig.root / "other")
    other.root.mkdir()
    assert "batch-size must be <= 1 for 'm'" in other.refused(models.segments(), SEGMENTS_CONFIG + refused)
