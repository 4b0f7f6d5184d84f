"""Answers as the protobuf library reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gateway.core.batch import FinishedBatch
from gateway.core.model import ModelSpec
from gateway.core.request import InferRequest
from gateway.protocol.oip_grpc_answer import AnswerWriter, BatchAnswers
from gateway.protocol.protobuf_wire import field
from tests.protocol.grpc_samples import RESPONSE, Codec, infer_request
from tests.protocol.oip_samples import NUMPY, batch_of, model, packed, tensor_spec

SPEC = model(
    [tensor_spec("X")],
    [tensor_spec("Y", "FP32", (2,)), tensor_spec("N", "BYTES", (1,)), tensor_spec("Z", "INT64", ())],
    version="3",
)
Y = np.arange(8, dtype="<f4").reshape(4, 2)
N = [b"a", b"", b"ccc", "é".encode()]
Z = np.array([7, -1, 2**62, 0])
BATCH = batch_of(SPEC, 4, [Y, N, Z])


def settled(spec: ModelSpec, batch: FinishedBatch, row: int, rows: int, **how: Any) -> InferRequest:
    width = how.pop("width", 1)
    content: Any = {"fp32_contents": [0.0] * rows * width} if how.pop("typed", False) else bytes(4 * rows * width)
    request = Codec(spec).read(infer_request(("X", "FP32", [rows, width], content), **how))
    request.batch, request.row = batch, row
    return request


def written(spec: ModelSpec, batch: FinishedBatch, row: int, rows: int, mirror: bool = False, **how: Any) -> Any:
    """The message, which is the same from a batch whose answers already share something."""
    request = settled(spec, batch, row, rows, **how)
    answers = BatchAnswers(spec, batch.outputs, batch.rows)
    writer = AnswerWriter(spec, mirror=mirror)
    found = []
    for _ in range(2):
        parts, length = writer.write(request, answers)
        data = b"".join(parts)
        assert length == len(data)
        found.append(data)
    assert found[0] == found[1]
    return RESPONSE.FromString(found[0])


@pytest.mark.parametrize(("row", "rows"), [(0, 1), (3, 1), (1, 2), (0, 4)])
def test_a_caller_gets_its_rows_of_every_output(row: int, rows: int) -> None:
    message = written(SPEC, BATCH, row, rows)
    assert (message.model_name, message.model_version, message.id) == ("m", "3", "")
    assert not message.parameters
    described = [(o.name, o.datatype, list(o.shape)) for o in message.outputs]
    assert described == [("Y", "FP32", [rows, 2]), ("N", "BYTES", [rows, 1]), ("Z", "INT64", [rows])]
    assert not any(o.HasField("contents") or o.parameters for o in message.outputs)
    mine = slice(row, row + rows)
    assert list(message.raw_output_contents) == [Y[mine].tobytes(), packed(N[mine]), Z[mine].tobytes()]


@pytest.mark.parametrize("outputs", [["Z"], ["Z", "Y"], ["N", "Z"]])
def test_outputs_stand_in_the_callers_order(outputs: list[str]) -> None:
    message = written(SPEC, BATCH, 1, 2, outputs=outputs)
    raw = {"Y": Y[1:3].tobytes(), "N": packed(N[1:3]), "Z": Z[1:3].tobytes()}
    assert [o.name for o in message.outputs] == outputs
    assert list(message.raw_output_contents) == [raw[name] for name in outputs]


def test_the_id_is_echoed_and_a_requests_own_fields_are_taken_along() -> None:
    assert written(SPEC, BATCH, 0, 1, request_id="é7").id == "é7"
    request = settled(SPEC, BATCH, 0, 1, request_id="7")
    parts, _ = AnswerWriter(SPEC).write(
        request, BatchAnswers(SPEC, BATCH.outputs, 4), field(4, b"\x0a\x01p\x12\x02\x08\x01")
    )
    message = RESPONSE.FromString(b"".join(parts))
    assert (message.id, message.parameters["p"].bool_param) == ("7", True)


@pytest.mark.parametrize("datatype", NUMPY)
def test_every_datatype_goes_raw(datatype: str) -> None:
    spec = model(outputs=[tensor_spec("Y", datatype)])
    values = np.array([[1, 0], [0, 1]], NUMPY[datatype])
    message = written(spec, batch_of(spec, 2, [values]), 1, 1)
    assert message.outputs[0].datatype == datatype
    assert list(message.raw_output_contents) == [values[1:].tobytes()]


def test_an_empty_output_has_its_entry() -> None:
    spec = model(outputs=[tensor_spec("Y"), tensor_spec("Z")])
    message = written(spec, batch_of(spec, 2, [np.zeros((2, 0)), np.ones((2, 1))]), 1, 1)
    assert [list(o.shape) for o in message.outputs] == [[1, 0], [1, 1]]
    assert list(message.raw_output_contents) == [b"", np.ones(1, "<f4").tobytes()]


def test_an_empty_output_of_strings_has_its_entry() -> None:
    spec = model(outputs=[tensor_spec("N", "BYTES"), tensor_spec("Z")])
    message = written(spec, batch_of(spec, 2, [[], np.ones((2, 1))]), 1, 1)
    assert list(message.raw_output_contents) == [b"", np.ones(1, "<f4").tobytes()]


def test_a_model_that_does_not_batch_gives_all_of_its_outputs() -> None:
    spec = model(
        [tensor_spec("X", "FP32", (-1, -1))],
        [tensor_spec("Y", "FP32", (3,)), tensor_spec("S", "FP32", ())],
        max_batch_size=0,
    )
    batch = batch_of(spec, 1, [np.arange(3), np.array(5.0)])
    message = written(spec, batch, 0, 1)
    assert [list(o.shape) for o in message.outputs] == [[3], []]
    assert list(message.raw_output_contents) == [np.arange(3, dtype="<f4").tobytes(), np.array(5, "<f4").tobytes()]


def test_a_large_output_is_not_copied() -> None:
    batch = batch_of(spec := model(), 2, [np.zeros((2, 50_000))])
    parts, _ = AnswerWriter(spec).write(settled(spec, batch, 1, 1), BatchAnswers(spec, batch.outputs, 2))
    view = parts[-1]
    assert isinstance(view, memoryview)
    assert view.obj is batch.outputs[0].data


def test_classification_is_an_output_of_strings() -> None:
    message = written(SPEC, BATCH, 2, 1, outputs=[("Y", {"classification": 1}), "Z"])
    first, second = message.outputs
    assert (first.datatype, list(first.shape), second.datatype) == ("BYTES", [1, 1], "INT64")
    assert list(message.raw_output_contents) == [packed([b"5.000000:1"]), Z[2:3].tobytes()]


def test_typed_requests_are_answered_raw_or_alike() -> None:
    assert len(written(SPEC, BATCH, 1, 2, typed=True).raw_output_contents) == 3
    assert len(written(SPEC, BATCH, 1, 2, mirror=True).raw_output_contents) == 3
    message = written(SPEC, BATCH, 1, 2, mirror=True, typed=True, request_id="7")
    assert (message.id, message.model_name, len(message.raw_output_contents)) == ("7", "m", 0)
    y, n, z = message.outputs
    assert (y.name, y.datatype, list(y.shape)) == ("Y", "FP32", [2, 2])
    assert list(y.contents.fp32_contents) == Y[1:3].ravel().tolist()
    assert list(n.contents.bytes_contents) == N[1:3]
    assert list(z.contents.int64_contents) == Z[1:3].tolist()


@pytest.mark.parametrize("datatype", [name for name in NUMPY if name not in {"FP16", "BF16"}])
def test_every_datatype_but_halves_is_answered_alike(datatype: str) -> None:
    spec = model(outputs=[tensor_spec("Y", datatype)])
    values = np.array([[1], [0]], NUMPY[datatype])
    message = written(spec, batch_of(spec, 2, [values]), 0, 2, mirror=True, typed=True)
    ((_, contents),) = message.outputs[0].contents.ListFields()
    assert list(contents) == [1, 0]
    half = model(outputs=[tensor_spec("Y", datatype), tensor_spec("H", "FP16")])
    message = written(half, batch_of(half, 2, [values, np.ones((2, 1))]), 0, 2, mirror=True, typed=True)
    assert len(message.raw_output_contents) == 2
