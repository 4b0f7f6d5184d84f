"""The parts of a request around its data: types, reserved names, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gateway.core.client_memory import Area
from gateway.core.request import SequenceStep
from gateway.errors import InvalidRequest
from gateway.protocol.oip_frame import read_frame
from gateway.protocol.oip_parameters import NO_OPTIONS
from gateway.protocol.oip_plan import MAX_INPUTS, MAX_OUTPUTS, WantedOutput

INPUT: dict[str, Any] = {"name": "X", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}


def document(**changes: Any) -> dict[str, Any]:
    return {"inputs": [dict(INPUT)], **changes}


def with_input(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{key: value for key, value in {**INPUT, **changes}.items() if value is not ...}]}


def refused(body: Any, *words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_frame(body)
    assert caught.value.status == 400
    for word in words:
        assert word in str(caught.value)


def test_plain_request() -> None:
    frame = read_frame(document(id="7"))
    assert frame.request_id == "7"
    assert frame.outputs is None
    assert frame.options is NO_OPTIONS
    (item,) = frame.inputs
    assert (item.name, item.datatype, item.shape, item.data) == ("X", "FP32", (1, 3), [1, 2, 3])
    assert item.binary_data_size is None


@pytest.mark.parametrize("body", [None, [], [1], "x", 1, True, 1.5])
def test_body_that_is_not_an_object(body: Any) -> None:
    refused(body, "JSON object")


def test_empty_id_is_no_id() -> None:
    assert read_frame(document(id="")).request_id is None


@pytest.mark.parametrize("value", [7, None, True, ["a"], {}, 1.5])
def test_id_that_is_not_a_string(value: Any) -> None:
    refused(document(id=value), "'id' must be a string")


@pytest.mark.parametrize("value", [None, {}, "x", 1, True])
def test_inputs_missing_or_mistyped(value: Any) -> None:
    refused({"inputs": value}, "'inputs' is missing or not an array")
    refused({}, "'inputs' is missing")


def test_too_many_inputs() -> None:
    refused({"inputs": [INPUT] * (MAX_INPUTS + 1)}, "'inputs'", str(MAX_INPUTS))


@pytest.mark.parametrize("value", [None, 1, "X", [], True])
def test_input_that_is_not_an_object(value: Any) -> None:
    refused({"inputs": [INPUT, value]}, "inputs[1] must be an object")


@pytest.mark.parametrize("value", [..., None, 1, ["X"]])
def test_name_missing_or_mistyped(value: Any) -> None:
    refused(with_input(name=value), "inputs[0]: 'name' is missing or not a string")


@pytest.mark.parametrize("value", [..., None, 1, ["FP32"]])
def test_datatype_missing_or_mistyped(value: Any) -> None:
    refused(with_input(datatype=value), "input 'X': 'datatype' is missing or not a string")


@pytest.mark.parametrize("value", [..., None, 3, "3", [1, 3.0], [True, 3], ["1", 3], [1, None], [[1, 3]], {}])
def test_shape_missing_or_mistyped(value: Any) -> None:
    refused(with_input(shape=value), "input 'X': 'shape' is missing or not an array of integers")


@pytest.mark.parametrize("value", [..., None])
def test_neither_data_nor_binary_size(value: Any) -> None:
    refused(with_input(data=value), "must set only one of the following fields", "'X' sets none")


def test_both_data_and_binary_size() -> None:
    refused(with_input(parameters={"binary_data_size": 12}), "must set only one", "'X' sets both")


@pytest.mark.parametrize("value", [-1, 1.0, "12", True])
def test_binary_size_mistyped(value: Any) -> None:
    refused(with_input(data=..., parameters={"binary_data_size": value}), "'X'", "'binary_data_size'")


def test_binary_size_null_is_a_parameter_of_a_wrong_type() -> None:
    refused(with_input(data=..., parameters={"binary_data_size": None}), "'X'", "'binary_data_size'")


def test_unknown_keys_are_ignored() -> None:
    assert read_frame({**with_input(foo=[{}]), "model_name": "m", "foo": None}) == read_frame(with_input())


PLACES: list[tuple[str, Any]] = [
    ("request", lambda parameters: document(parameters=parameters)),
    ("input 'X'", lambda parameters: with_input(parameters=parameters)),
    ("output 'Y'", lambda parameters: document(outputs=[{"name": "Y", "parameters": parameters}])),
]


@pytest.mark.parametrize(("where", "make"), PLACES)
class TestParameters:
    @pytest.mark.parametrize("value", [{}, [], None, {"a": {}}])
    def test_value_of_a_wrong_type(self, where: str, make: Any, value: Any) -> None:
        refused(make({"a": value}), where, "parameter 'a'", "string, integer, boolean or double")

    @pytest.mark.parametrize("value", [1.5, "x", 3, True, -1, 2**70])
    def test_custom_value(self, where: str, make: Any, value: Any) -> None:
        frame = read_frame(make({"a": value}))
        if where == "request" and value != 2**70:
            assert frame.options.unused == {"a": value}
            frame = replace(frame, options=replace(frame.options, unused={}))
        assert frame == read_frame(make({}))

    def test_reserved_prefix(self, where: str, make: Any) -> None:
        refused(make({"triton_x": 1}), where, "'triton_x'", "reserved")

    @pytest.mark.parametrize("value", [[], "x", 1, True])
    def test_not_an_object(self, where: str, make: Any, value: Any) -> None:
        refused(make(value), where, "'parameters' must be an object")

    def test_null_is_none(self, where: str, make: Any) -> None:
        assert read_frame(make(None)) == read_frame(make({}))


@pytest.mark.parametrize("value", [[], None])
def test_no_outputs_means_all(value: Any) -> None:
    assert read_frame(document(outputs=value)).outputs is None


def test_too_many_outputs() -> None:
    refused(document(outputs=[{"name": "Y"}] * (MAX_OUTPUTS + 1)), "'outputs'", str(MAX_OUTPUTS))


@pytest.mark.parametrize("value", [{}, "Y", 1, True])
def test_outputs_mistyped(value: Any) -> None:
    refused(document(outputs=value), "'outputs' must be an array")


@pytest.mark.parametrize("value", ["Y", None, 1, []])
def test_output_that_is_not_an_object(value: Any) -> None:
    refused(document(outputs=[{"name": "Y"}, value]), "outputs[1] must be an object")


@pytest.mark.parametrize("value", [{}, {"name": None}, {"name": 1}])
def test_output_without_a_name(value: Any) -> None:
    refused(document(outputs=[value]), "outputs[0]: 'name' is missing or not a string")


def test_binary_data_per_output() -> None:
    wanted = [{"name": "Y", "parameters": {"binary_data": True}}, {"name": "Z", "parameters": {"binary_data": False}}]
    assert read_frame(document(outputs=[*wanted, {"name": "W"}])).outputs == (
        WantedOutput("Y", binary=True),
        WantedOutput("Z"),
        WantedOutput("W"),
    )


@pytest.mark.parametrize("value", [1, "true", 1.0])
def test_binary_flags_mistyped(value: Any) -> None:
    refused(document(outputs=[{"name": "Y", "parameters": {"binary_data": value}}]), "'Y'", "'binary_data'")
    refused(document(parameters={"binary_data_output": value}), "'binary_data_output' must be true or false")


def test_options_of_the_request_reach_the_frame() -> None:
    parameters = {"sequence_id": 5, "sequence_start": True, "timeout": 1_500_000, "priority": 99, "note": "x"}
    options = read_frame(document(parameters=parameters)).options
    assert (options.stated_timeout_s, options.priority) == (1.5, 99)
    assert options.sequence == SequenceStep(5, start=True)


SHARED = {"shared_memory_region": "r", "shared_memory_byte_size": 12}


def test_tensors_in_shared_memory() -> None:
    (given,) = read_frame(with_input(data=..., parameters=SHARED)).inputs
    assert (given.area, given.data, given.binary_data_size) == (Area("r", 0, 12), None, None)
    outputs = [{"name": "Y", "parameters": {**SHARED, "shared_memory_offset": 4}}, {"name": "Z"}]
    assert read_frame(document(outputs=outputs)).outputs == (
        WantedOutput("Y", area=Area("r", 4, 12)), WantedOutput("Z"),
    )  # fmt: skip


def test_shared_memory_is_the_only_place_of_an_input() -> None:
    refused(with_input(parameters=SHARED), "must set only one", "'shared_memory_region'", "'X' sets both")
    sized = {**SHARED, "binary_data_size": 12}
    refused(with_input(data=..., parameters=sized), "must set only one", "'X' sets both")
    refused(with_input(parameters=sized), "must set only one", "'X' sets all")


def test_classification_of_each_output() -> None:
    outputs = [{"name": "Y", "parameters": {"classification": 2}}, {"name": "Z", "parameters": {"classification": 0}}]
    assert read_frame(document(outputs=outputs)).outputs == (WantedOutput("Y", classes=2), WantedOutput("Z"))


def test_negative_classification_is_the_callers_mistake() -> None:
    refused(document(outputs=[{"name": "Y", "parameters": {"classification": -1}}]), "'Y'", "'classification'")


def test_huge_names_are_not_echoed_whole() -> None:
    huge = "N" * 1_000_000
    for body in (
        with_input(name=huge, shape=None),
        document(parameters={huge: None}),
        with_input(data={huge: 1}, name=3),
    ):
        with pytest.raises(InvalidRequest) as caught:
            read_frame(body)
        assert len(str(caught.value)) < 1000
