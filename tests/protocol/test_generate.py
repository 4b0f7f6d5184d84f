"""The generate mapping: keys to tensors and parameters, shapes that fit, and answers."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.model import ModelSpec
from gateway.core.request import InferRequest, SequenceStep
from gateway.core.tensor import element_count
from gateway.errors import InvalidRequest, Malformed
from gateway.protocol.generate import MAX_BODY_BYTES, Generate, as_event, fitting_shape
from gateway.protocol.oip_answer import BatchEncoder
from gateway.protocol.oip_json import RequestDecoder

from .oip_samples import PATIENT, batch_of, decoded, model, naive_bytes, tensor_spec

TEXT = model([tensor_spec("prompt", "BYTES", (1,)), tensor_spec("heat", "FP32", (1,), optional=True)], max_batch_size=4)


def read(document: Any, spec: ModelSpec = TEXT) -> InferRequest:
    return Generate(RequestDecoder(spec)).decode(json.dumps(document).encode())


def refused(document: Any, *words: str, spec: ModelSpec = TEXT, kind: type[InvalidRequest] = InvalidRequest) -> None:
    with pytest.raises(kind) as caught:
        read(document, spec)
    for word in words:
        assert word in str(caught.value)


def test_inputs_id_and_parameters() -> None:
    request = read({"prompt": "hello", "heat": 0.5, "id": "7", "stream": False, "timeout": 2_000_000})
    assert decoded(TEXT, request) == {
        "prompt": ((1, 1), naive_bytes("BYTES", ["hello"])),
        "heat": ((1, 1), naive_bytes("FP32", [0.5])),
    }
    assert request.request_id == "7"
    assert request.stated_timeout_s == 2.0
    assert request.form.all_json


def test_nested_parameters_are_keys_like_others() -> None:
    request = read({"prompt": ["hello"], "parameters": {"heat": 1, "sequence_id": 5, "note": "x"}})
    assert decoded(TEXT, request)["heat"] == ((1, 1), naive_bytes("FP32", [1]))
    assert request.sequence == SequenceStep(5)


def test_an_input_may_be_called_id() -> None:
    spec = model([tensor_spec("id", "INT64", (1,))])
    assert decoded(spec, read({"id": 3}, spec))["id"] == ((1, 1), naive_bytes("INT64", [3]))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], ["must be a JSON object"]),
        ("x", ["must be a JSON object"]),
        ({"prompt": 5}, ["'prompt'", "strings"]),
        ({"prompt": None}, ["'prompt'", "null"]),
        ({"prompt": {"a": 1}}, ["'prompt'", "object"]),
        ({"prompt": "x", "id": 5}, ["'id'"]),
        ({"prompt": "x", "parameters": []}, ["Expected JSON object for keyword: 'parameters'"]),
        ({"prompt": "x", "priority": -1}, ["'priority'"]),
    ],
)
def test_malformed(document: Any, words: list[str]) -> None:
    refused(document, *words, kind=Malformed)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, ["expected number of inputs between 1 and 2 but got 0", "'prompt'"]),
        ({"heat": 1}, ["'prompt'"]),
        ({"prompt": "x", "other": None}, ["'other'", "invalid type"]),
        ({"prompt": "x", "other": {}}, ["'other'", "invalid type"]),
        ({"prompt": "x", "triton_a": 1}, ["'triton_a'", "reserved"]),
        ({"prompt": "x", "parameters": {"prompt": "y"}}, ["'prompt' already exists"]),
        ({"prompt": ["a", "b", "c", "d", "e"]}, ["batch-size must be <= 4"]),
        ({"prompt": []}, ["batch-size must be >= 1"]),
    ],
)
def test_invalid(document: Any, words: list[str]) -> None:
    refused(document, *words)


def test_a_keyword_that_is_an_input_too() -> None:
    spec = model([tensor_spec("parameters", "FP32", (1,))])
    refused({"parameters": 1}, "Keyword 'parameters'", "input tensor name", spec=spec)


def test_broken_json_and_large_bodies() -> None:
    generate = Generate(RequestDecoder(TEXT))
    for body in (b"", b"{", b'{"prompt":"a","prompt":"b"}', b"[" * 200_000, b"\xff"):
        with pytest.raises(Malformed):
            generate.decode(body)
    with pytest.raises(InvalidRequest, match=f"{MAX_BODY_BYTES} bytes"):
        generate.decode(b" " * (MAX_BODY_BYTES + 1))


@pytest.mark.parametrize(
    ("dims", "elements", "batched", "shape"),
    [
        ((-1,), 3, True, (1, 3)),
        ((-1,), 0, True, (1, 0)),
        ((1,), 3, True, (3, 1)),
        ((3,), 6, True, (2, 3)),
        ((3,), 3, False, (3,)),
        ((), 2, True, (2,)),
        ((), 1, False, ()),
        ((-1, 2), 6, True, (1, 3, 2)),
        ((2, -1), 6, False, (2, 3)),
        ((-1, -1), 5, False, (1, 5)),
        ((0, -1), 0, False, (0, 1)),
    ],
)
def test_shapes_that_fit(dims: tuple[int, ...], elements: int, batched: bool, shape: tuple[int, ...]) -> None:
    assert fitting_shape(tensor_spec("X", dims=dims), elements, batched) == shape


@pytest.mark.parametrize(
    ("dims", "elements", "batched"),
    [((3,), 4, True), ((3,), 6, False), ((), 2, False), ((2, -1), 3, False), ((0,), 1, False), ((0,), 1, True)],
)
def test_shapes_that_do_not_fit(dims: tuple[int, ...], elements: int, batched: bool) -> None:
    with pytest.raises(InvalidRequest, match="can not convert input 'X' to tensor with proper shape"):
        fitting_shape(tensor_spec("X", dims=dims), elements, batched)


@PATIENT
@given(st.lists(st.sampled_from([-1, 0, 1, 2, 3, 5]), max_size=4), st.integers(0, 60), st.booleans())
def test_a_shape_that_fits_has_the_elements_and_the_fixed_dimensions(
    dims: list[int], elements: int, batched: bool
) -> None:
    try:
        shape = fitting_shape(tensor_spec("X", dims=tuple(dims)), elements, batched)
    except InvalidRequest:
        return
    assert element_count(shape) == elements
    expected = [-1, *dims] if batched else dims
    assert len(shape) == len(expected)
    assert all(want in (-1, got) for want, got in zip(expected, shape, strict=True))


def test_answers() -> None:
    spec = model(outputs=[tensor_spec("Y", "FP32", (1,)), tensor_spec("T", "BYTES", (2,))], name='m"')
    generate = Generate(RequestDecoder(spec))
    batch = batch_of(spec, 3, [np.array([[1.5], [float("nan")], [3]], "<f4"), [b"a", b"\n", b"c", b"d", b"e", b"f"]])
    encoded = BatchEncoder(spec, batch.outputs, batch.rows)
    request = generate.decode(b'{"X":[1,2]}')
    request.row = 0
    answer = json.loads(generate.encode(request, encoded))
    assert answer == {"model_name": 'm"', "model_version": "1", "Y": 1.5, "T": ["a", "\n"]}
    assert list(answer) == ["model_name", "model_version", "Y", "T"]
    request.row, request.rows, request.request_id = 1, 2, "7"
    text = generate.encode(request, encoded)
    answer = json.loads(text)
    assert (answer["id"], answer["T"], str(answer["Y"])) == ("7", ["c", "d", "e", "f"], "[nan, 3.0]")
    assert b"\n" not in text
    assert as_event(text) == b"data: " + text + b"\n\n"


def test_an_output_without_elements_is_an_empty_array() -> None:
    spec = model()
    generate = Generate(RequestDecoder(spec))
    batch = batch_of(spec, 1, [np.zeros((1, 0), "<f4")])
    request = generate.decode(b'{"X":[]}')
    assert json.loads(generate.encode(request, BatchEncoder(spec, batch.outputs, 1)))["Y"] == []


def test_an_answer_that_json_cannot_hold() -> None:
    spec = model(outputs=[tensor_spec("Y", "BYTES", (1,))])
    generate = Generate(RequestDecoder(spec))
    batch = batch_of(spec, 1, [[b"\xff"]])
    with pytest.raises(InvalidRequest, match="'Y'"):
        generate.encode(generate.decode(b'{"X":1}'), BatchEncoder(spec, batch.outputs, 1))
    half = model(outputs=[tensor_spec("Y", "FP16", (1,))])
    with pytest.raises(InvalidRequest, match="FP16 data via JSON"):
        Generate(RequestDecoder(half)).decode(b'{"X":1}')


@PATIENT
@given(
    st.dictionaries(
        st.sampled_from(["prompt", "heat", "id", "parameters", "timeout", "x"]),
        st.none() | st.booleans() | st.integers() | st.text(max_size=3)
        | st.lists(st.integers() | st.text(), max_size=3)
        | st.dictionaries(st.sampled_from(["heat", "x"]), st.integers(), max_size=2),
        max_size=4,
    )
)  # fmt: skip
def test_anything_is_read_or_refused(document: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidRequest):
        assert read(document).rows >= 1
