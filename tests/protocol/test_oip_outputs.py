"""The tensors of answers that are more than rows of the outputs, and their encoding."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from gateway.core.classification import MAX_STRINGS
from gateway.core.request import InferRequest
from gateway.core.scheduling import Scheduling
from gateway.core.tensor import unpack_bytes
from gateway.errors import InvalidRequest
from gateway.protocol.oip_answer import AnswerEncoder, BatchEncoder
from gateway.protocol.oip_outputs import answer_tensors, labels_of
from gateway.protocol.oip_plan import Planner, WantedOutput

from .oip_samples import batch_of, model, packed, tensor_spec

SPEC = replace(
    model(outputs=[tensor_spec("Y"), tensor_spec("T", "BYTES")], max_batch_size=4),
    scheduling=Scheduling(labels=(("Z", ("z",)), ("Y", ("a", "b")))),
)
BATCH = batch_of(
    SPEC, 3, [np.array([[0.1, 0.9, 0.5], [3, 2, 1], [1, 1, 1]], "<f4"), [b"r0", b"r1", b"r2"]]
)  # fmt: skip
BOTH = [WantedOutput("T"), WantedOutput("Y", classes=2)]


def request(wanted: list[WantedOutput], row: int, rows: int) -> InferRequest:
    form = Planner(SPEC).response_form(wanted, all_binary=False)
    made = InferRequest((), rows, 0, None, form.needed, None, form)
    made.row, made.batch = row, BATCH
    return made


def test_labels() -> None:
    assert labels_of(SPEC, "Y") == ("a", "b")
    assert labels_of(SPEC, "T") == ()


def test_tensors_in_the_order_asked_for() -> None:
    form = Planner(SPEC).response_form(BOTH, all_binary=False)
    assert (form.plain, form.all_json, form.classes) == (False, False, (0, 2))
    text, classes = answer_tensors(SPEC, form, BATCH, 1, 2)
    assert (text.name, text.shape, unpack_bytes(text.data)) == ("T", (2, 1), [b"r1", b"r2"])
    assert (classes.name, classes.shape) == ("Y", (2, 2))
    assert unpack_bytes(classes.data) == [b"3.000000:0:a", b"2.000000:1:b", b"1.000000:0:a", b"1.000000:1:b"]


@pytest.mark.parametrize("binary", [False, True])
def test_encoded_for_rest(binary: bool) -> None:
    wanted = [WantedOutput("T", binary), WantedOutput("Y", binary, 1)]
    shared = BatchEncoder(SPEC, BATCH.outputs, BATCH.rows)
    parts, length, json_length = AnswerEncoder(SPEC).encode(request(wanted, 0, 2), shared)
    body = b"".join(parts)
    assert len(body) == length
    text, classes = json.loads(body[:json_length])["outputs"]
    expected = [b"0.900000:1:b", b"3.000000:0:a"]
    assert (classes["name"], classes["datatype"], classes["shape"]) == ("Y", "BYTES", [2, 1])
    assert text["shape"] == [2, 1]
    if binary:
        assert json_length is not None
        assert body[json_length:] == packed([b"r0", b"r1"]) + packed(expected)
        assert classes["parameters"] == {"binary_data_size": len(packed(expected))}
    else:
        assert json_length is None
        assert classes["data"] == [element.decode() for element in expected]
        assert text["data"] == ["r0", "r1"]


def test_one_callers_classification_leaves_the_batch_as_it_was() -> None:
    shared, encoder = BatchEncoder(SPEC, BATCH.outputs, BATCH.rows), AnswerEncoder(SPEC)
    plain = request([WantedOutput("Y")], 1, 1)
    before = encoder.encode(plain, shared)
    encoder.encode(request(BOTH, 0, 3), shared)
    assert encoder.encode(plain, shared) == before
    assert json.loads(bytes(before[0][0]))["outputs"][0]["data"] == [3, 2, 1]


def test_without_batch_dimension() -> None:
    spec = replace(model(outputs=[tensor_spec("Y", "INT32", (2, 2))]), policy=replace(SPEC.policy, max_batch_size=0))
    batch = batch_of(spec, 1, [np.array([[4, 9], [9, 1]], "<i4")])
    form = Planner(spec).response_form([WantedOutput("Y", classes=3)], all_binary=False)
    (classes,) = answer_tensors(spec, form, batch, 0, 1)
    assert classes.shape == (3,)
    assert unpack_bytes(classes.data) == [b"9:1", b"9:2", b"4:0"]
    made = InferRequest((), 1, 0, None, form.needed, None, form)
    made.batch = batch
    (body,), _, _ = AnswerEncoder(spec).encode(made, BatchEncoder(spec, batch.outputs, 1))
    assert json.loads(bytes(body))["outputs"][0]["data"] == ["9:1", "9:2", "4:0"]


@pytest.mark.parametrize("datatype", ["BYTES", "BOOL", "FP16", "BF16"])
def test_what_cannot_be_ranked_is_refused_before_it_runs(datatype: str) -> None:
    spec = model(outputs=[tensor_spec("Y", datatype)])
    with pytest.raises(InvalidRequest, match=f"'Y'.*class result not available.*'{datatype}'"):
        Planner(spec).response_form([WantedOutput("Y", binary=True, classes=1)], all_binary=False)


def test_classification_off_is_plain() -> None:
    form = Planner(SPEC).response_form([WantedOutput("Y", classes=0)], all_binary=False)
    assert (form.plain, form.all_json, form.classes) == (True, True, ())


def test_too_many_strings_are_refused() -> None:
    spec = model(outputs=[tensor_spec("Y", "UINT8")])
    batch = batch_of(spec, 2, [np.zeros((2, MAX_STRINGS), "u1")])
    form = Planner(spec).response_form([WantedOutput("Y", classes=MAX_STRINGS)], all_binary=False)
    with pytest.raises(InvalidRequest, match="fewer classes"):
        answer_tensors(spec, form, batch, 0, 2)
    answer_tensors(spec, form, batch, 1, 1)
