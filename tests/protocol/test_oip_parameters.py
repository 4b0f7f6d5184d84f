"""Parameters of requests, inputs and outputs: types, ranges, reserved names."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.client_memory import Area
from gateway.core.request import InferRequest, SequenceStep
from gateway.errors import InvalidRequest, Malformed
from gateway.protocol.json_strict import MinusZero
from gateway.protocol.oip_parameters import (
    MAX_FORWARDED,
    MAX_FORWARDED_BYTES,
    MAX_SEQUENCE_ID_BYTES,
    MAX_UINT64,
    NO_OPTIONS,
    OutputOptions,
    RequestOptions,
    Uint64,
    input_options,
    memory_area,
    output_options,
    request_options,
)

from .oip_samples import PATIENT

OUTPUT = "output 'Y'"
INPUT = "input 'X'"


def refused(parameters: dict[str, Any], *words: str, kind: type[InvalidRequest] = InvalidRequest) -> None:
    with pytest.raises(kind) as caught:
        request_options(parameters)
    assert caught.value.status == 400
    for word in words:
        assert word in str(caught.value)


def test_nothing_said_is_one_shared_value() -> None:
    assert request_options({}) is NO_OPTIONS
    own = {"note": "x", "n": 3, "yes": True, "share": 1.5, "minus": -1}
    assert request_options(own) == RequestOptions(unused=own)
    assert RequestOptions() == NO_OPTIONS


def test_everything_said() -> None:
    options = request_options(
        {"timeout": 1_500_000, "priority": 2, "sequence_id": 7, "sequence_start": True, "binary_data_output": True}
    )
    assert options == RequestOptions(1.5, 2, SequenceStep(7, start=True), binary_data_output=True)
    request = InferRequest((), 1, 0, None, (), None)
    options.apply(request)
    assert (request.stated_timeout_s, request.priority, request.sequence) == (1.5, 2, SequenceStep(7, start=True))
    assert request.timeout_s == 0.0


@pytest.mark.parametrize("name", ["timeout", "priority"])
@pytest.mark.parametrize("value", [-1, "5", 1.0, True, None, [], {}, 2**64])
def test_counts_of_a_wrong_type_or_size(name: str, value: Any) -> None:
    refused({name: value}, f"parameter '{name}'", "must be an integer that is not negative", kind=Malformed)


@pytest.mark.parametrize("value", [0, MAX_UINT64, MinusZero(0), Uint64(3)])
def test_counts(value: int) -> None:
    priority = request_options({"priority": value}).priority
    assert priority == value
    assert type(priority) is int


@pytest.mark.parametrize("value", [0, 5, MAX_UINT64, "abc", "", Uint64(9), "x" * MAX_SEQUENCE_ID_BYTES])
def test_sequence_ids(value: int | str) -> None:
    assert request_options({"sequence_id": value}).sequence == SequenceStep(value)


@pytest.mark.parametrize("value", [-1, True, 1.0, None, [], 2**64])
def test_sequence_ids_mistyped(value: Any) -> None:
    refused({"sequence_id": value}, "'sequence_id'", kind=Malformed)


def test_a_sequence_id_is_bounded() -> None:
    refused({"sequence_id": "é" * MAX_SEQUENCE_ID_BYTES}, "'sequence_id'", str(MAX_SEQUENCE_ID_BYTES))


def test_flags_of_a_sequence_without_id_are_kept() -> None:
    assert request_options({"sequence_end": True}).sequence == SequenceStep(0, end=True)


@pytest.mark.parametrize("name", ["sequence_start", "sequence_end", "binary_data_output"])
@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_flags_mistyped(name: str, value: Any) -> None:
    refused({name: value}, f"'{name}' must be true or false", kind=Malformed)


def test_reserved_prefix() -> None:
    name = "triton_enable_empty_final_response"
    refused({name: True}, name, "reserved for Triton usage")
    assert request_options({name: True}, frozenset({name})) is NO_OPTIONS
    refused({"triton_x": 1}, "reserved for Triton usage")


@pytest.mark.parametrize("value", [{}, [], None, {"a": 1}, Uint64(3)])
def test_custom_parameters_of_a_wrong_type(value: Any) -> None:
    refused({"mine": value}, "'mine'", "invalid type")
    for read in (input_options, output_options):
        with pytest.raises(InvalidRequest, match="'mine'"):
            read({"mine": value}, OUTPUT)


def test_outputs() -> None:
    assert output_options({}, OUTPUT) == OutputOptions()
    assert output_options({"binary_data": True, "classification": 3, "mine": 1}, OUTPUT) == OutputOptions(True, 3)
    assert output_options({"classification": Uint64(2**40)}, OUTPUT).classes == 2**31 - 1


@pytest.mark.parametrize("parameters", [{"binary_data": 1}, {"classification": -1}, {"classification": "2"}])
def test_outputs_mistyped(parameters: dict[str, Any]) -> None:
    with pytest.raises(Malformed, match=f"'Y'.*'{next(iter(parameters))}'"):
        output_options(parameters, OUTPUT)


def test_inputs() -> None:
    assert input_options({}, INPUT) is None
    assert input_options({"mine": 1}, INPUT) is None
    assert input_options({"binary_data_size": 12}, INPUT) == 12
    with pytest.raises(Malformed, match=r"'X'.*'binary_data_size'"):
        input_options({"binary_data_size": -1}, INPUT)


SHARED = {"shared_memory_region": "r", "shared_memory_byte_size": 12}


def test_areas_of_shared_memory() -> None:
    assert memory_area({}, INPUT) is memory_area({"mine": 1}, INPUT) is None
    assert memory_area(SHARED, INPUT) == Area("r", 0, 12)
    assert memory_area({**SHARED, "shared_memory_offset": Uint64(2**63)}, INPUT) == Area("r", 2**63, 12)
    assert input_options({**SHARED, "mine": 1}, INPUT) is None
    assert output_options({**SHARED, "binary_data": False, "classification": 0}, OUTPUT).area == Area("r", 0, 12)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"shared_memory_byte_size": 1}, "'shared_memory_byte_size' can not be specified without"),
        ({"shared_memory_offset": 1}, "'shared_memory_offset' can not be specified without"),
        ({"shared_memory_region": "r"}, "'shared_memory_byte_size' must be specified along with"),
        ({**SHARED, "shared_memory_region": 1}, "'shared_memory_region' must be a string"),
        ({**SHARED, "shared_memory_byte_size": -1}, "'shared_memory_byte_size' must be an integer"),
        ({**SHARED, "shared_memory_byte_size": 2**64}, "'shared_memory_byte_size' must be an integer"),
        ({**SHARED, "shared_memory_offset": "0"}, "'shared_memory_offset' must be an integer"),
        ({**SHARED, "shared_memory_offset": True}, "'shared_memory_offset' must be an integer"),
        ({**SHARED, "shared_memory_offset": 1.0}, "'shared_memory_offset' must be an integer"),
    ],
)
def test_areas_that_make_no_sense(parameters: dict[str, Any], words: str) -> None:
    for read in (memory_area, output_options):
        with pytest.raises(InvalidRequest, match=f"'Y'.*{words}"):
            read(parameters, OUTPUT)


@pytest.mark.parametrize("other", [{"binary_data": True}, {"classification": 1}])
def test_an_output_in_shared_memory_has_no_other_form(other: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"'Y'.*'{next(iter(other))}' cannot be asked for together"):
        output_options({**SHARED, **other}, OUTPUT)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
)
NAMES = st.sampled_from(
    ["timeout", "priority", "sequence_id", "sequence_start", "binary_data_output", "classification", "binary_data",
     "binary_data_size", "shared_memory_region", "shared_memory_offset", "shared_memory_byte_size", "triton_x", "mine"]
)  # fmt: skip


@PATIENT
@given(st.dictionaries(NAMES, JSON_VALUES, max_size=4))
def test_anything_is_read_or_refused(parameters: dict[str, Any]) -> None:
    for read in (request_options, lambda p: input_options(p, INPUT), lambda p: output_options(p, OUTPUT)):
        result: object = None
        with contextlib.suppress(InvalidRequest):
            result = read(parameters)
        if isinstance(result, RequestOptions):
            assert result.stated_timeout_s >= 0
            assert 0 <= result.priority <= MAX_UINT64


# -- a model on a remote server: what callers say goes there ---------------------------------------------------------

OWN: dict[str, Any] = {"note": "x", "n": 3, "yes": True, "share": 1.5}


def request_with(parameters: dict[str, Any], *, forwarded: bool = True) -> InferRequest:
    request = InferRequest((), 1, 0, "key", (), None)
    options = request_options(parameters, frozenset({"triton_enable_empty_final_response"}), forwarded=forwarded)
    if options is not NO_OPTIONS:
        options.apply(request)
    return request


def test_own_parameters_are_forwarded_only_where_asked_for_and_those_of_the_protocol_never() -> None:
    said = {**OWN, "timeout": 5, "priority": 1, "binary_data_output": True, "triton_enable_empty_final_response": True}
    assert dict(request_with(said).parameters) == OWN
    local = request_with(said, forwarded=False)
    assert (dict(local.parameters), local.key) == ({}, "key")
    assert (dict(local.unused), dict(request_with(said).unused)) == (OWN, {})
    assert request_options({}, forwarded=True) is NO_OPTIONS
    assert request_with({"timeout": 5}).key == "key"


def test_requests_share_a_batch_only_with_those_that_say_the_same() -> None:
    assert request_with(OWN).key == request_with(dict(reversed(OWN.items()))).key
    different: list[dict[str, Any]] = [{"a": 1}, {"a": True}, {"a": 1.0}, {"a": "1"}, {"b": 1}, {"a": 1, "b": 1}]
    assert len({request_with(said).key for said in different}) == len(different)


def test_steps_of_a_servers_sequences_wait_together_apart_from_others() -> None:
    first, second = request_with({"sequence_id": 7}), request_with({"sequence_id": 8, **OWN})
    assert first.key == second.key
    assert first.key not in (request_with({}).key, request_with(OWN).key)
    assert (first.sequence, second.sequence) == (SequenceStep(7), SequenceStep(8))
    assert request_with({"sequence_id": 7}, forwarded=False).key == "key"


@pytest.mark.parametrize("said", [OWN, {"sequence_id": 1}, {"sequence_id": 1, **OWN}, {"timeout": 1}, {}])
def test_the_key_without_the_parameters_is_found_again(said: dict[str, Any]) -> None:
    assert request_options(said, forwarded=True).plain_key(request_with(said)) == "key"


@pytest.mark.parametrize(
    "said",
    [
        {f"p{n}": 1 for n in range(MAX_FORWARDED + 1)},
        {"text": "x" * MAX_FORWARDED_BYTES},
        {"x" * MAX_FORWARDED_BYTES: 1, "y": 1},
        {"n": 2**63},
        {"n": -(2**63) - 1},
    ],
)
def test_what_is_forwarded_is_bounded(said: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"can be forwarded|must fit in 64 bits"):
        request_options(said, forwarded=True)
    assert request_options(said).unused == {}, "nor logged"
