"""Names, datatypes, shapes and wanted outputs: every refusal names the field and says what was expected."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.core.model import ModelSpec
from gateway.core.tensor import MAX_RANK
from gateway.errors import InvalidRequest
from gateway.protocol.oip_plan import REMEMBERED, InputKey, Planner, WantedOutput

from .oip_samples import model, tensor_spec


def refused(spec: ModelSpec, keys: list[InputKey], *words: str) -> None:
    planner = Planner(spec)
    for _ in range(2):  # a refusal is never remembered as a success
        with pytest.raises(InvalidRequest) as caught:
            planner.plan(tuple(keys))
        assert caught.value.status == 400
        for word in words:
            assert word in str(caught.value)


TWO = model([tensor_spec("A"), tensor_spec("B", "INT64", (2,))])
OPTIONAL = model([tensor_spec("A"), tensor_spec("B", optional=True), tensor_spec("C", optional=True)])


def test_plan_of_a_batched_model() -> None:
    plan = Planner(TWO).plan((("B", "INT64", (3, 2)), ("A", "FP32", (3, 5))))
    assert [item.name for item in plan.inputs] == ["B", "A"]
    assert [item.place for item in plan.inputs] == [1, 0]
    assert [item.elements for item in plan.inputs] == [6, 15]
    assert plan.rows == 3
    assert plan.trailing == ((5,), (2,))


def test_plan_of_an_unbatched_model_keeps_whole_shapes() -> None:
    plan = Planner(model([tensor_spec("A", dims=(-1, 2))], max_batch_size=0)).plan((("A", "FP32", (7, 2)),))
    assert plan.rows == 1
    assert plan.trailing == ((7, 2),)


def test_absent_optional_input_is_part_of_the_batch_key() -> None:
    planner = Planner(OPTIONAL)
    assert planner.plan((("A", "FP32", (1, 5)),)).trailing == ((5,), None, None)
    assert planner.plan((("A", "FP32", (1, 5)), ("C", "FP32", (1, 2)))).trailing == ((5,), None, (2,))


def test_dims_of_ragged_inputs_are_checked_and_separate_no_batches() -> None:
    planner = Planner(model([replace(tensor_spec("A", dims=(-1, 2)), ragged=True), tensor_spec("B")]))
    plans = [planner.plan((("A", "FP32", (1, n, 2)), ("B", "FP32", (1, 3)))) for n in (0, 1, 7)]
    assert {plan.trailing for plan in plans} == {((), (3,))}
    assert [plan.inputs[0].elements for plan in plans] == [0, 2, 14]
    assert [plan.inputs[0].shape for plan in plans] == [(1, 0, 2), (1, 1, 2), (1, 7, 2)]
    refused(planner.spec, [("A", "FP32", (1, 7, 3)), ("B", "FP32", (1, 3))], "unexpected shape for input 'A'")
    refused(planner.spec, [("A", "FP32", (1, 7)), ("B", "FP32", (1, 3))], "Expected [-1,-1,2], got [1,7]")


def test_a_model_may_take_one_row_at_a_time() -> None:
    spec = model([tensor_spec("A")])
    one_row = replace(spec, policy=replace(spec.policy, one_row=True))
    assert Planner(one_row).plan((("A", "FP32", (1, 3)),)).rows == 1
    refused(one_row, [("A", "FP32", (2, 3))], "inference request batch-size must be <= 1 for 'm'")
    assert (one_row.policy.request_rows, spec.policy.request_rows) == (1, spec.policy.max_batch_size)


def test_equal_forms_share_one_plan_and_the_memory_is_bounded() -> None:
    planner = Planner(model())
    key: tuple[InputKey, ...] = (("X", "FP32", (1, 3)),)
    assert planner.plan(key) is planner.plan(key)
    for width in range(REMEMBERED * 3):
        assert planner.plan((("X", "FP32", (1, width)),)).trailing == ((width,),)
    assert len(planner._plans) <= REMEMBERED


def test_unknown_input() -> None:
    refused(TWO, [("Q", "FP32", (1, 3))], "unexpected inference input 'Q'", "model 'm'")


def test_unknown_input_with_a_huge_name_is_not_echoed_whole() -> None:
    with pytest.raises(InvalidRequest) as caught:
        Planner(TWO).plan((("Q" * 1_000_000, "FP32", (1, 3)),))
    assert len(str(caught.value)) < 1000


def test_duplicate_input() -> None:
    refused(TWO, [("A", "FP32", (1, 3)), ("A", "FP32", (1, 3))], "input 'A' already exists in request")


def test_missing_input_names_both_lists() -> None:
    refused(TWO, [("A", "FP32", (1, 3))], "expected 2 inputs but got 1 inputs for model 'm'", "['A']", "['B']")


def test_missing_input_of_a_model_with_optional_ones() -> None:
    refused(OPTIONAL, [("B", "FP32", (1, 3))], "expected number of inputs between 1 and 3 but got 1", "['A']")


@pytest.mark.parametrize("datatype", ["fp32", "FP99", "", "TYPE_FP32", "float32", "FP32 "])
def test_invalid_datatype(datatype: str) -> None:
    refused(model(), [("X", datatype, (1, 3))], "invalid datatype for input X", "FP32")


def test_invalid_datatype_of_huge_length_is_not_echoed_whole() -> None:
    with pytest.raises(InvalidRequest) as caught:
        Planner(TWO).plan((("A", "F" * 1_000_000, (1, 3)),))
    assert len(str(caught.value)) < 1000


def test_other_datatype() -> None:
    refused(model(), [("X", "INT32", (1, 3))], "inference input 'X' data-type is 'INT32', but model 'm' expects 'FP32'")


def test_no_shape() -> None:
    refused(model(), [("X", "FP32", ())], "'X' has no shape but model requires batch dimension")


@pytest.mark.parametrize("shape", [(3,), (1, 4), (1, 3, 1), (3, 1)])
def test_other_rank_or_dims(shape: tuple[int, ...]) -> None:
    got = ",".join(map(str, shape))
    refused(
        model([tensor_spec("X", dims=(3,))]), [("X", "FP32", shape)],
        f"unexpected shape for input 'X' for model 'm'. Expected [-1,3], got [{got}]",
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, -3), (-1, 3), (-1, -1), (1, -(2**63)), (1, -(2**200))])
def test_negative_dim(shape: tuple[int, ...]) -> None:
    refused(model(), [("X", "FP32", shape)], "'X'", "'shape'", "negative")


@pytest.mark.parametrize(
    "shape", [(2**40, 2**40), (1, 2**63), (1, 2**64), (1, 2**63 - 1), (1, 10**300), (2**63, 0), (0, 2**64)]
)
def test_element_count_over_int64(shape: tuple[int, ...]) -> None:
    refused(model(), [("X", "FP32", shape)], "'X'", "causes total element count to exceed maximum size of")


def test_byte_size_over_int64() -> None:
    refused(model([tensor_spec("X", "FP64")]), [("X", "FP64", (1, 2**61))], "exceed maximum size")


def test_too_many_dims() -> None:
    refused(model(), [("X", "FP32", (1,) * (MAX_RANK + 1))], "'X'", str(MAX_RANK))


def test_empty_trailing_dim_is_fine() -> None:
    assert Planner(model()).plan((("X", "FP32", (1, 0)),)).inputs[0].elements == 0


def test_batch_of_no_rows() -> None:
    refused(model(), [("X", "FP32", (0, 3))], "batch-size must be >= 1")


def test_batch_over_the_stated_size() -> None:
    refused(model(), [("X", "FP32", (9, 1))], "inference request batch-size must be <= 8 for 'm'")


def test_batch_over_a_size_the_gateway_chose_is_let_through_to_be_split() -> None:
    assert Planner(model(oversize="split")).plan((("X", "FP32", (9, 1)),)).rows == 9


@pytest.mark.parametrize("shape", [(65, 1), (2**30, 0)])
def test_split_request_that_no_queue_could_hold(shape: tuple[int, ...]) -> None:
    refused(model(oversize="split", max_queue_rows=64), [("X", "FP32", shape)], "batch-size must be <= 64", "'m'")


@pytest.mark.parametrize("shape", [(1, 0, 2**62), (1, 2**40, 0), (1, 0, 2**16, 2**16)])
def test_a_zero_hides_no_impossible_dimensions(shape: tuple[int, ...]) -> None:
    dynamic = model([tensor_spec("X", dims=(-1,) * (len(shape) - 1))])
    refused(dynamic, [("X", "FP32", shape)], "input 'X'", "exceed maximum size")


def test_unequal_batch_dims() -> None:
    refused(TWO, [("A", "FP32", (1, 3)), ("B", "INT64", (2, 2))], "'B' batch size 2", "'A' has 1")


OUTPUTS = model(outputs=[tensor_spec("P"), tensor_spec("Q"), tensor_spec("H", "FP16"), tensor_spec("B", "BF16")])


def test_no_outputs_named_means_all() -> None:
    form = Planner(OUTPUTS).response_form(None, all_binary=True)
    assert form.outputs == form.needed == (0, 1, 2, 3)
    assert form.binary == (True, True, True, True)
    assert any(form.binary)
    assert Planner(OUTPUTS).response_form([], all_binary=True) == form


def test_named_outputs_keep_their_order_and_ignore_the_request_wide_flag() -> None:
    form = Planner(OUTPUTS).response_form([WantedOutput("Q"), WantedOutput("P")], all_binary=True)
    assert form.outputs == (1, 0)
    assert form.needed == (0, 1)
    assert form.binary == (False, False)
    assert not any(form.binary)


def test_unknown_output() -> None:
    with pytest.raises(InvalidRequest, match="unexpected inference output 'Z' for model 'm'"):
        Planner(OUTPUTS).response_form([WantedOutput("Z")], all_binary=False)


def test_unknown_output_with_a_huge_name_is_not_echoed_whole() -> None:
    with pytest.raises(InvalidRequest) as caught:
        Planner(OUTPUTS).response_form([WantedOutput("Z" * 1_000_000)], all_binary=False)
    assert len(str(caught.value)) < 1000


def test_output_named_twice() -> None:
    with pytest.raises(InvalidRequest, match="twice"):
        Planner(OUTPUTS).response_form([WantedOutput("P", binary=True), WantedOutput("P")], all_binary=False)


@pytest.mark.parametrize(("name", "datatype"), [("H", "FP16"), ("B", "BF16")])
def test_half_precision_output_as_json(name: str, datatype: str) -> None:
    planner = Planner(OUTPUTS)
    with pytest.raises(
        InvalidRequest, match=f"sending {datatype} data via JSON is not supported.*'{name}'.*binary_data"
    ):
        planner.response_form([WantedOutput(name)], all_binary=False)
    assert any(planner.response_form([WantedOutput(name, binary=True)], all_binary=False).binary)
