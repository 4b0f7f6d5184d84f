"""Answers: what a client's own parser reads is bit for bit the request's rows of the batch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.batch import FinishedBatch
from gateway.core.model import ModelSpec
from gateway.core.request import InferRequest, OutputTensor
from gateway.core.tensor import DATATYPE, unpack_bytes
from gateway.errors import InvalidRequest
from gateway.protocol.oip_answer import AnswerEncoder, BatchEncoder
from gateway.protocol.oip_data import pack_half
from gateway.protocol.oip_plan import Planner, WantedOutput
from gateway.protocol.options import ProtocolOptions

from .oip_samples import NUMPY, PATIENT, batch_of, model, packed, tensor_spec

NUMERIC_JSON = [name for name in NUMPY if name not in {"FP16", "BF16"}]


def asked(
    spec: ModelSpec,
    row: int,
    rows: int,
    wanted: Sequence[tuple[str, bool] | tuple[str, bool, int]] | None = None,
    *,
    request_id: str | None = None,
    all_binary: bool = False,
) -> InferRequest:
    form = Planner(spec).response_form([WantedOutput(*item) for item in wanted or ()], all_binary)
    request = InferRequest((), rows, 0, None, form.needed, request_id, form)
    request.row = row
    return request


def shared_of(spec: ModelSpec, batch: FinishedBatch) -> BatchEncoder:
    return BatchEncoder(spec, batch.outputs, batch.rows)


def encode(spec: ModelSpec, batch: FinishedBatch, request: InferRequest) -> tuple[bytes, int | None]:
    request.batch = batch
    parts, total, json_length = AnswerEncoder(spec).encode(request, shared_of(spec, batch))
    body = b"".join(parts)
    assert len(body) == total
    return body, json_length


def numbers_of(output: dict[str, Any]) -> bytes:
    with np.errstate(over="ignore"):
        return np.array(output["data"], NUMPY[output["datatype"]]).tobytes()


def random_numbers(datatype: str, shape: tuple[int, ...], seed: int = 3) -> np.ndarray[Any, Any]:
    """Arbitrary bit patterns; NaNs made one NaN, since JSON has a single one."""
    dtype = np.dtype(NUMPY[datatype])
    rng = np.random.default_rng(seed)
    if datatype == "BOOL":
        return rng.integers(0, 2, shape).astype(bool)
    raw = rng.bytes(int(np.prod(shape)) * dtype.itemsize)
    numbers = np.frombuffer(raw, dtype).reshape(shape).copy()
    if dtype.kind == "f":
        numbers[np.isnan(numbers)] = np.nan
    return numbers


@pytest.mark.parametrize("datatype", NUMERIC_JSON)
@pytest.mark.parametrize("trailing", [(), (1,), (3,), (2, 3), (0,)])
def test_rows_read_back_bit_equal(datatype: str, trailing: tuple[int, ...]) -> None:
    spec = model(outputs=[tensor_spec("Y", datatype, trailing)])
    numbers = random_numbers(datatype, (6, *trailing))
    batch = batch_of(spec, 6, [numbers])
    for row in range(6):
        for rows in range(1, 7 - row):
            body, json_length = encode(spec, batch, asked(spec, row, rows))
            assert json_length is None
            (output,) = json.loads(body)["outputs"]
            assert output["shape"] == [rows, *trailing]
            assert output["datatype"] == datatype
            assert set(output) == {"name", "shape", "datatype", "data"}
            assert numbers_of(output) == numbers[row : row + rows].tobytes()


@settings(PATIENT, max_examples=200)
@given(st.lists(st.floats(width=32), min_size=1, max_size=12))
def test_fp32_is_the_shortest_text_that_reads_back(values: list[float]) -> None:
    spec = model(outputs=[tensor_spec("Y", "FP32", (1,))])
    numbers = np.array(values, "<f4").reshape(-1, 1)
    body, _ = encode(spec, batch_of(spec, len(values), [numbers]), asked(spec, 0, len(values)))
    text = body.partition(b'"data":[')[2].partition(b"]")[0].decode().split(",")
    for token, number in zip(text, numbers.ravel(), strict=True):
        if np.isfinite(number):
            assert np.float32(float(token)).tobytes() == number.tobytes()
            digits = sum(character.isdigit() for character in token.split("e")[0].replace(".", "").strip("-0"))
            assert digits <= sum(character.isdigit() for character in f"{number:.9g}".split("e")[0])
        else:
            assert token in {"NaN", "Infinity", "-Infinity"}


def test_fp32_tenth_is_written_as_such() -> None:
    spec = model(outputs=[tensor_spec("Y", "FP32", (1,))])
    body, _ = encode(spec, batch_of(spec, 1, [np.array([[0.1]], "<f4")]), asked(spec, 0, 1))
    assert b'"data":[0.1]' in body


def test_unbatched_model_keeps_its_shape() -> None:
    spec = model(outputs=[tensor_spec("Y", "INT64", (2, 3)), tensor_spec("S", "FP32", ())], max_batch_size=0)
    numbers = random_numbers("INT64", (2, 3))
    batch = batch_of(spec, 1, [numbers, np.array(1.5, "<f4")])
    first, second = json.loads(encode(spec, batch, asked(spec, 0, 1))[0])["outputs"]
    assert first["shape"] == [2, 3]
    assert numbers_of(first) == numbers.tobytes()
    assert second["shape"] == []
    assert second["data"] == [1.5]


def test_keys_stand_in_order_and_nothing_else_is_said() -> None:
    spec = model(outputs=[tensor_spec("P"), tensor_spec("Q")], version="17")
    batch = batch_of(spec, 1, [np.zeros((1, 2), "<f4"), np.zeros((1, 1), "<f4")])
    with_id = json.loads(encode(spec, batch, asked(spec, 0, 1, request_id="7"))[0])
    assert list(with_id) == ["id", "model_name", "model_version", "outputs"]
    assert with_id["id"] == "7"
    assert with_id["model_version"] == "17"
    without = json.loads(encode(spec, batch, asked(spec, 0, 1))[0])
    assert list(without) == ["model_name", "model_version", "outputs"]
    assert [list(output) for output in without["outputs"]] == [["name", "datatype", "shape", "data"]] * 2


def test_outputs_stand_in_the_order_asked_for() -> None:
    spec = model(outputs=[tensor_spec("P"), tensor_spec("Q")])
    batch = batch_of(spec, 1, [np.array([[1]], "<f4"), np.array([[2]], "<f4")])
    for wanted in (["P", "Q"], ["Q", "P"], ["Q"]):
        outputs = json.loads(encode(spec, batch, asked(spec, 0, 1, [(name, False) for name in wanted]))[0])["outputs"]
        assert [output["name"] for output in outputs] == wanted
        assert [output["data"] for output in outputs] == [[1.0] if name == "P" else [2.0] for name in wanted]


@pytest.mark.parametrize(
    "text", ['"', "\\", "%", "%%", "%d", "%b", "100%", "{}", "é😀", "\n\r\t\0", "\u2028", "a" * 1000, "'"]
)
def test_ids_and_names_with_odd_characters(text: str) -> None:
    spec = model(outputs=[tensor_spec(text), tensor_spec(text + "2")], name=text, version=text)
    batch = batch_of(spec, 2, [np.array([[1], [2]], "<f4"), np.array([[3], [4]], "<f4")])
    answer = json.loads(encode(spec, batch, asked(spec, 1, 1, request_id=text))[0])
    assert answer["id"] == answer["model_name"] == answer["model_version"] == answer["outputs"][0]["name"] == text
    assert answer["outputs"][1]["name"] == text + "2"
    assert [output["data"] for output in answer["outputs"]] == [[2.0], [4.0]]
    (only,) = json.loads(encode(spec, batch, asked(spec, 1, 1, [(text, False)]))[0])["outputs"]
    assert (only["name"], only["data"]) == (text, [2.0])
    assert json.loads(encode(spec, batch, asked(spec, 0, 1))[0])["model_name"] == text
    body, json_length = encode(spec, batch, asked(spec, 1, 1, request_id=text, all_binary=True))
    head = json.loads(body[:json_length])
    assert head["id"] == head["outputs"][0]["name"] == text


@settings(PATIENT)
@given(st.text(min_size=1))
def test_id_is_echoed(request_id: str) -> None:
    spec = model()
    batch = batch_of(spec, 1, [np.array([[1]], "<f4")])
    assert json.loads(encode(spec, batch, asked(spec, 0, 1, request_id=request_id))[0])["id"] == request_id


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
@pytest.mark.parametrize("width", [1, 3])
def test_nan_and_infinity_stand_only_where_they_are(datatype: str, width: int) -> None:
    spec = model(outputs=[tensor_spec("Y", datatype, (width,))])
    numbers = np.arange(5 * width, dtype=NUMPY[datatype]).reshape(5, width) - 0.5
    numbers[1, 0], numbers[2, width - 1], numbers[4, 0] = np.nan, np.inf, -np.inf
    batch = batch_of(spec, 5, [numbers])
    for row in range(5):
        body, _ = encode(spec, batch, asked(spec, row, 1))
        assert b"null" not in body
        assert (b"NaN" in body, b"-Infinity" in body) == (row == 1, row == 4)
        (output,) = json.loads(body)["outputs"]
        assert numbers_of(output) == numbers[row].tobytes()
    (output,) = json.loads(encode(spec, batch, asked(spec, 0, 5))[0])["outputs"]
    assert numbers_of(output) == numbers.tobytes()


def test_minus_zero_keeps_its_sign() -> None:
    spec = model(outputs=[tensor_spec("Y", "FP32", (2,))])
    (output,) = json.loads(encode(spec, batch_of(spec, 1, [np.array([[-0.0, 0.0]], "<f4")]), asked(spec, 0, 1))[0])[
        "outputs"
    ]
    assert [math.copysign(1, number) for number in output["data"]] == [-1, 1]


@pytest.mark.parametrize("datatype", sorted(NUMPY))
def test_binary_rows_are_the_batchs_bytes(datatype: str) -> None:
    spec = model(outputs=[tensor_spec("Y", datatype, (2, 2))])
    numbers = random_numbers(datatype, (5, 2, 2))
    batch = batch_of(spec, 5, [numbers])
    for row, rows in ((0, 1), (4, 1), (1, 3), (0, 5)):
        body, json_length = encode(spec, batch, asked(spec, row, rows, all_binary=True))
        assert json_length is not None
        (output,) = json.loads(body[:json_length])["outputs"]
        expected = numbers[row : row + rows].tobytes()
        assert body[json_length:] == expected
        assert output == {
            "name": "Y", "datatype": datatype, "shape": [rows, 2, 2], "parameters": {"binary_data_size": len(expected)},
        }  # fmt: skip


def test_binary_and_json_outputs_mixed() -> None:
    spec = model(outputs=[tensor_spec("P", "INT32"), tensor_spec("Q", "FP32"), tensor_spec("R", "FP16")])
    p, q = random_numbers("INT32", (4, 2)), np.arange(4, dtype="<f4").reshape(4, 1)
    r = random_numbers("FP16", (4, 3))
    batch = batch_of(spec, 4, [p, q, r])
    body, json_length = encode(spec, batch, asked(spec, 1, 2, [("R", True), ("Q", False), ("P", True)]))
    assert json_length is not None
    outputs = json.loads(body[:json_length])["outputs"]
    assert [output["name"] for output in outputs] == ["R", "Q", "P"]
    assert outputs[1]["data"] == [1.0, 2.0]
    assert "parameters" not in outputs[1]
    assert "data" not in outputs[0]
    assert [outputs[index]["parameters"] for index in (0, 2)] == [{"binary_data_size": 12}, {"binary_data_size": 16}]
    assert body[json_length:] == r[1:3].tobytes() + p[1:3].tobytes()


def test_all_empty_binary_output_is_plain_json() -> None:
    spec = model(outputs=[tensor_spec("Y", "FP32", (0,)), tensor_spec("B", "BYTES", (0,))])
    batch = batch_of(spec, 2, [np.zeros((2, 0), "<f4"), []])
    body, json_length = encode(spec, batch, asked(spec, 1, 1, all_binary=True))
    assert json_length is None
    assert [output["parameters"] for output in json.loads(body)["outputs"]] == [{"binary_data_size": 0}] * 2


def test_empty_and_filled_binary_outputs_together() -> None:
    spec = model(outputs=[tensor_spec("Y", "FP32", (0,)), tensor_spec("Z", "INT8", (1,))])
    batch = batch_of(spec, 2, [np.zeros((2, 0), "<f4"), np.array([[5], [6]], "i1")])
    body, json_length = encode(spec, batch, asked(spec, 1, 1, all_binary=True))
    assert json_length == len(body) - 1
    assert body[-1:] == b"\6"


ELEMENTS = [b"", "hé".encode(), b"a\0b", b'"q"\\', b"],[", b"\n", "😀".encode(), b"null"]


@pytest.mark.parametrize("per_row", [1, 2, 4])
def test_bytes_as_json_and_binary(per_row: int) -> None:
    spec = model(outputs=[tensor_spec("Y", "BYTES")])
    rows = len(ELEMENTS) // per_row
    batch = batch_of(spec, rows, [ELEMENTS])
    for row in range(rows):
        for count in range(1, rows - row + 1):
            expected = ELEMENTS[row * per_row : (row + count) * per_row]
            (output,) = json.loads(encode(spec, batch, asked(spec, row, count))[0])["outputs"]
            assert output["shape"] == [count, per_row]
            assert [element.encode() for element in output["data"]] == expected
            body, json_length = encode(spec, batch, asked(spec, row, count, all_binary=True))
            assert json_length is not None
            assert body[json_length:] == packed(expected)
            assert unpack_bytes(body[json_length:]) == expected


def test_bytes_that_are_not_utf8_fail_only_the_request_that_wants_them_as_json() -> None:
    spec = model(outputs=[tensor_spec("Y", "BYTES")])
    encoder, shared = AnswerEncoder(spec), shared_of(spec, batch_of(spec, 3, [[b"a", b"\xff\xfe", b"c"]]))
    for row, text in ((0, "a"), (2, "c")):
        parts, _, _ = encoder.encode(asked(spec, row, 1), shared)
        assert json.loads(b"".join(parts))["outputs"][0]["data"] == [text]
    for row, rows in ((1, 1), (0, 2), (0, 3)):
        with pytest.raises(InvalidRequest, match=r"'Y'.*UTF-8.*binary_data"):
            encoder.encode(asked(spec, row, rows), shared)
    parts, _, json_length = encoder.encode(asked(spec, 1, 1, all_binary=True), shared)
    assert b"".join(parts)[json_length:] == packed([b"\xff\xfe"])


@settings(PATIENT, max_examples=150)
@given(st.data())
def test_batch_shared_by_many_requests(data: st.DataObject) -> None:
    """One batch encoder, any sequence of slices, formats and ids: no answer is coloured by the ones before it."""
    datatype = data.draw(st.sampled_from(NUMERIC_JSON))
    total = data.draw(st.integers(1, 7))
    trailing = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
    spec = model(outputs=[tensor_spec("Y", datatype, trailing), tensor_spec("B", "BYTES")])
    numbers = random_numbers(datatype, (total, *trailing), seed=data.draw(st.integers(0, 99)))
    strings = [str(row).encode() * row for row in range(total)]
    encoder, shared = AnswerEncoder(spec), shared_of(spec, batch_of(spec, total, [numbers, strings]))
    for _ in range(data.draw(st.integers(1, 6))):
        row = data.draw(st.integers(0, total - 1))
        rows = data.draw(st.integers(1, total - row))
        binary = data.draw(st.booleans())
        request = asked(
            spec, row, rows, [("Y", binary), ("B", not binary)], request_id=data.draw(st.sampled_from([None, "%"]))
        )
        parts, length, json_length = encoder.encode(request, shared)
        body = b"".join(parts)
        assert len(body) == length
        first, second = json.loads(body[:json_length])["outputs"]
        assert first["shape"] == [rows, *trailing]
        assert second["shape"] == [rows, 1]
        blob = body[json_length:] if json_length is not None else b""
        expected = numbers[row : row + rows].tobytes()
        everything, _, json_length = encoder.encode(asked(spec, row, rows, [("Y", True)]), shared)
        body = b"".join(everything)
        (only,) = json.loads(body[:json_length])["outputs"]
        assert only["parameters"]["binary_data_size"] == len(expected)
        assert only["shape"] == [rows, *trailing]
        assert body[json_length:] == expected
        if binary:
            assert blob == expected
            assert second["data"] == [element.decode() for element in strings[row : row + rows]]
        else:
            assert numbers_of(first) == expected
            assert blob == packed(strings[row : row + rows])
        assert DATATYPE[first["datatype"]].name == datatype


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_halves_as_json_read_back_to_the_same_halves(datatype: str) -> None:
    """All 65536 of them, NaNs made one."""
    spec = model(outputs=[tensor_spec("Y", datatype)])
    form = Planner(spec, ProtocolOptions(json_half=True)).response_form(None, all_binary=False)
    bits = np.arange(2**16, dtype="<u2").reshape(4, -1)
    outputs = {0: OutputTensor("Y", DATATYPE[datatype], bits.shape, bits.tobytes())}
    request = InferRequest((), 3, 0, None, form.needed, None, form)
    request.row = 1
    (body,), _, _ = AnswerEncoder(spec).encode(request, BatchEncoder(spec, outputs, 4))
    (output,) = json.loads(bytes(body))["outputs"]
    assert (output["datatype"], output["shape"]) == (datatype, [3, 2**14])
    again = np.frombuffer(pack_half(DATATYPE[datatype], output["data"]), "<u2")
    expected = bits[1:].reshape(-1)
    exponent = 0x7F80 if datatype == "BF16" else 0x7C00
    finite = expected & 0x7FFF <= exponent
    np.testing.assert_array_equal(again[finite], expected[finite])
    assert (again[~finite] & 0x7FFF > exponent).all()
