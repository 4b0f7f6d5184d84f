"""Requests become lines: columns by name and index, predictions and probabilities where they can be told apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.tensor import pack_bytes
from gateway.inference_log.flattening import Plan, Roles, Unfit, flatten, plan_of, rows_of

NO_ROLES = Roles()


def tensor(name: str, values: Any, datatype: str = "FP32", policy: str = "keep") -> dict[str, Any]:
    if datatype == "BYTES":
        data, shape = pack_bytes([text.encode() for text in values]), [len(values)]
    else:
        kinds = {"FP32": "<f4", "FP64": "<f8", "INT64": "<i8", "INT32": "<i4"}
        array = np.array(values, kinds[datatype])
        data, shape = array.tobytes(), list(array.shape)
    return {"name": name, "datatype": datatype, "shape": shape, "data": data, "policy": policy, "bytes": len(data)}


def request(inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"inputs": inputs, "outputs": outputs}


def flat(one: dict[str, Any], roles: Roles = NO_ROLES) -> dict[str, list[Any]]:
    tensors = rows_of(one)
    return {name: values.tolist() for name, values in flatten(tensors, plan_of(tensors, roles)).items()}


X = tensor("x", [[1, 2], [3, 4]])


def test_a_wide_input_becomes_columns_a_narrow_one_keeps_its_name() -> None:
    found = flat(request([X, tensor("age", [30, 40], "INT64")], [tensor("y", [[0.5], [0.75]])]))
    assert found == {"x_0": [1, 3], "x_1": [2, 4], "age": [30, 40], "prediction": [0.5, 0.75]}


def test_names_are_used_in_order_and_must_be_as_many() -> None:
    one = request([X], [tensor("y", [1, 2], "INT64")])
    assert list(flat(one, Roles(("height", "width")))) == ["height", "width", "prediction"]
    with pytest.raises(Unfit, match="3 names were given for 2 columns"):
        flat(one, Roles(("a", "b", "c")))


def test_two_classes_give_one_probability_that_of_the_second() -> None:
    found = flat(request([X], [tensor("proba", [[0.25, 0.75], [0.5, 0.5]]), tensor("label", [1, 0], "INT64")]))
    assert (found["prediction"], found["prediction_probability"]) == ([1, 0], [0.75, 0.5])


def test_many_classes_and_no_label_give_the_greatest_s_index() -> None:
    one = request([X], [tensor("out", [[0.125, 0.125, 0.75], [0.5, 0.25, 0.25]])])
    found = flat(one)
    assert found["prediction"] == [2, 0]
    assert found["prediction_probability_2"] == [0.75, 0.25]
    tensors = rows_of(one)
    assert plan_of(tensors, NO_ROLES).origins["prediction"] == "index of the greatest value of output out"


def test_scores_are_not_called_probabilities() -> None:
    found = flat(request([X], [tensor("logits", [[-3.0, 5.0], [1.0, 1.0]])]))
    assert set(found) == {"x_0", "x_1", "logits_0", "logits_1"}


def test_the_caller_decides_where_names_do_not_tell() -> None:
    one = request([X], [tensor("a", [1, 2], "INT64"), tensor("b", [7, 8], "INT64"), tensor("c", [[0.5, 0.5]] * 2)])
    assert "prediction" not in {k: v for k, v in flat(one).items() if v == [7, 8]}
    found = flat(one, Roles(prediction="b", probability="c"))
    assert (found["prediction"], found["a"], found["prediction_probability"]) == ([7, 8], [1, 2], [0.5, 0.5])
    for roles in (Roles(prediction="nope"), Roles(probability="a")):
        with pytest.raises(Unfit, match="there is no output"):
            flat(one, roles)


def test_texts_stay_texts() -> None:
    found = flat(request([tensor("job", ["nurse", "smith"], "BYTES")], [tensor("label", ["yes", "no"], "BYTES")]))
    assert found == {"job": ["nurse", "smith"], "prediction": ["yes", "no"]}


def test_an_output_called_like_an_input_gets_another_name() -> None:
    found = flat(request([X], [tensor("x_0", [9, 9]), tensor("label", [1, 1], "INT64")]))
    assert (found["x_0"], found["output_x_0"]) == ([1, 3], [9, 9])


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (request([tensor("x", [[1.0]], policy="truncate")], []), "x was not kept"),
        (request([tensor("x", [[1.0]], policy="drop")], []), "x was not kept"),
        (request([X], [tensor("y", [1, 2, 3])]), "y has another number of rows"),
        (request([{**X, "shape": [2, 3]}], []), "x has another number of rows"),
        (request([], []), "it has no rows"),
        (request([tensor("x", [np.zeros(5000)])], []), "more than 4096"),
        (request([tensor("timestamp", [1.0])], []), "two columns would be called timestamp"),
    ],
)
def test_what_is_no_table_is_said(one: dict[str, Any], said: str) -> None:
    with pytest.raises(Unfit, match=said):
        flat(one)


def test_what_does_not_fit_the_first_is_left_out_not_bent() -> None:
    plan = plan_of(rows_of(request([X], [])), NO_ROLES)
    for other in (request([tensor("x", [[1, 2, 3]])], []), request([X], [tensor("y", [1, 2])])):
        with pytest.raises(Unfit, match=r"than (in )?the first request"):
            flatten(rows_of(other), plan)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4))
def test_every_value_is_there_once_in_its_own_row(rows: int, width: int, classes: int) -> None:
    inputs = np.arange(rows * width, dtype="<f4").reshape(rows, width)
    outputs = 1000 + np.arange(rows * classes, dtype="<f4").reshape(rows, classes)
    tensors = rows_of(request([tensor("x", inputs)], [tensor("y", outputs)]))
    plan: Plan = plan_of(tensors, NO_ROLES)
    lines = np.column_stack(list(flatten(tensors, plan).values()))
    assert (lines == np.concatenate([inputs, outputs], axis=1)).all()
    assert set(plan.origins) == set(flatten(tensors, plan))
