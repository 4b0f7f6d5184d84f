"""Batches to bytes and answers to tensors, for both protocols: what is taken is exactly what the signature says."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.backends.remote_codec import REMEMBERED, NotEncodable
from gateway.backends.remote_grpc_codec import GrpcCodec
from gateway.backends.remote_http1 import HttpAnswer
from gateway.backends.remote_http_codec import HttpCodec
from gateway.core.batchability import SignatureTensor
from gateway.core.outcome import Failure, FailureKind, Sign, Success
from gateway.core.request import BatchInput, InputTensor
from gateway.core.tensor import DATATYPE, DATATYPES, pack_bytes
from gateway.protocol.schema import message
from tests.fakes import PlainBatch

HEAD = b"POST /v2/models/m/infer HTTP/1.1\r\n"
NUMBERS = [datatype for datatype in DATATYPES if datatype.kind not in ("bytes", "half")]


def signature(datatype: str, *names: str, shape: tuple[int | None, ...] = (None, 2)) -> list[SignatureTensor]:
    return [SignatureTensor(name, DATATYPE[datatype], shape) for name in names]


class Fed(PlainBatch):
    def __init__(self, *tensors: InputTensor, outputs: tuple[int, ...] = (0,)) -> None:
        self.inputs = [BatchInput(n, t.datatype, t.shape, _nbytes(t), [t]) for n, t in enumerate(tensors)]
        self.outputs = outputs
        self.rows = 1

    def done(self, outcome: Success | Failure, /) -> None:
        raise AssertionError


def _nbytes(tensor: InputTensor) -> int:
    return len(tensor.buffer) if tensor.buffer is not None else len(tensor.values or ()) * tensor.datatype.itemsize


def http_codec(datatype: str = "FP32", *, binary: bool = True, outputs: tuple[str, ...] = ("y",)) -> HttpCodec:
    return HttpCodec("peer", HEAD, signature(datatype, "x"), signature(datatype, *outputs), binary=binary)


def grpc_codec(datatype: str = "FP32", outputs: tuple[str, ...] = ("y",)) -> GrpcCodec:
    return GrpcCodec("peer", "m", "3", signature(datatype, "x"), signature(datatype, *outputs))


def body_of(asked: tuple[bytes | bytearray, str]) -> tuple[dict[str, str], Any, bytes]:
    request, tag = asked
    assert tag.encode() in request
    head, _, body = bytes(request).partition(b"\r\n\r\n")
    fields = dict(line.split(": ") for line in head.decode().split("\r\n")[1:])
    assert int(fields["Content-Length"]) == len(body)
    length = int(fields.get("Inference-Header-Content-Length", len(body)))
    return fields, json.loads(body[:length]), body[length:]


def answer(document: Any, blobs: bytes | None = None, **headers: str) -> HttpAnswer:
    head = document if isinstance(document, bytes) else json.dumps(document).encode()
    fields = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    if blobs is not None:
        fields[b"inference-header-content-length"] = str(len(head)).encode()
    return HttpAnswer(200, fields, head + (blobs or b""))


def entry(**more: Any) -> dict[str, Any]:
    return {"name": "y", "datatype": "FP32", "shape": [1, 2]} | more


# -- requests --------------------------------------------------------------------------------------------------------


def test_a_binary_request_has_its_tensors_behind_it() -> None:
    codec = http_codec()
    fields, document, blobs = body_of(
        codec.request(Fed(InputTensor(DATATYPE["FP32"], (1, 2), [1.0, 2.0], None)), math.inf)
    )
    assert "X-Request-Timeout-Ms" not in fields
    assert document == {
        "id": document["id"],
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
    }
    assert np.frombuffer(blobs, "<f4").tolist() == [1.0, 2.0]


def test_what_is_remembered_is_remembered_by_shape_and_outputs() -> None:
    codec = http_codec(outputs=("y", "z"))
    grpc = grpc_codec(outputs=("y", "z"))
    for rows, outputs in ((1, (0,)), (2, (0,)), (1, (1,)), (1, (0, 1)), (1, (0,))):
        given = Fed(InputTensor(DATATYPE["FP32"], (rows, 2), None, bytes(8 * rows)), outputs=outputs)
        _, document, blobs = body_of(codec.request(given, 1.5))
        assert document["inputs"][0]["shape"] == [rows, 2]
        assert [output["name"] for output in document["outputs"]] == ["yz"[place] for place in outputs]
        assert len(blobs) == 8 * rows
        parsed = message("inference.ModelInferRequest").FromString(bytes(grpc.request(given))[5:])
        assert [*parsed.inputs[0].shape] == [rows, 2]
        assert [output.name for output in parsed.outputs] == ["yz"[place] for place in outputs]


@pytest.mark.parametrize("datatype", [*DATATYPES], ids=str)
@given(data=st.data())
def test_json_requests_hold_every_value_exactly(datatype: Any, data: Any) -> None:
    if datatype.kind == "bytes":
        strings = data.draw(st.lists(st.text(max_size=9), min_size=2, max_size=2))
        packed = pack_bytes([text.encode() for text in strings])
    else:
        packed = data.draw(st.binary(min_size=2 * datatype.itemsize, max_size=2 * datatype.itemsize))
        if datatype.kind == "bool":
            packed = bytes(b & 1 for b in packed)
    codec = http_codec(datatype.name, binary=False)
    given = Fed(InputTensor(datatype, (1, 2), None, packed))
    try:
        _, document, blobs = body_of(codec.request(given, math.inf))
    except NotEncodable as error:
        assert "no NaN or infinity" in str(error)  # noqa: PT017
        return
    assert not blobs
    (sent,) = document["inputs"]
    found = codec.success(answer({"outputs": [sent | {"name": "y"}]}), (0,))
    assert isinstance(found, Success)
    assert bytes(found.outputs[0].data) == packed  # and back


def test_text_that_is_none_has_no_json_form() -> None:
    given = Fed(InputTensor(DATATYPE["BYTES"], (1, 2), None, pack_bytes([b"\xff", b""])))
    with pytest.raises(NotEncodable, match="not text"):
        http_codec("BYTES", binary=False).request(given, math.inf)


@pytest.mark.parametrize("value", [2**64, object(), {"a": 1}, b"x"])
def test_parameters_without_a_form(value: object) -> None:
    given = Fed(InputTensor(DATATYPE["FP32"], (1, 2), None, bytes(8)))
    given.parameters = {"odd": value}
    with pytest.raises(NotEncodable, match="odd"):
        grpc_codec().request(given)


def test_parameters_of_grpc_of_all_kinds() -> None:
    given = Fed(InputTensor(DATATYPE["FP32"], (1, 2), None, bytes(8)))
    given.parameters = {"a": -5, "b": 2**64 - 1, "c": "", "d": False, "e": -0.5, "f": 2**63 - 1}
    parsed = message("inference.ModelInferRequest").FromString(bytes(grpc_codec().request(given))[5:])
    found = {name: getattr(v, v.WhichOneof("parameter_choice")) for name, v in parsed.parameters.items()}
    assert found == given.parameters
    assert (parsed.model_name, parsed.model_version) == ("m", "3")
    assert parsed.raw_input_contents[0] == bytes(8)


# -- answers ---------------------------------------------------------------------------------------------------------

BINARY = entry(parameters={"binary_data_size": 8})
MISMATCHED = [
    answer({"outputs": []}),
    answer({"outputs": [entry(name="other", data=[1, 2])]}),
    answer({"outputs": [entry(datatype="FP64", data=[1, 2])]}),
    answer({"outputs": [entry(datatype=None, data=[1, 2])]}),
    answer({"outputs": [entry(shape=[2], data=[1, 2])]}),
    answer({"outputs": [entry(shape=[1, 3], data=[1, 2, 3])]}),
    answer({"outputs": [entry(shape=[-1, 2], data=[1, 2])]}),
    answer({"outputs": [entry(shape=[True, 2], data=[1, 2])]}),
    answer({"outputs": [entry(shape=[2**70, 2], data=[1, 2])]}),
    answer({"outputs": [entry(shape="1", data=[1, 2])]}),
    answer({"outputs": [entry(data=[1, 2, 3])]}),
    answer({"outputs": [entry(data=[1])]}),
    answer({"outputs": [entry(data=["1", "2"])]}),
    answer({"outputs": [entry(data=[1, None])]}),
    answer({"outputs": [entry(data={"0": 1})]}),
    answer({"outputs": [entry()]}),
    answer({"outputs": [entry(data=[1, 2]), entry(data=[1, 2])]}),
    answer({"outputs": [entry(shape=[2, 2], parameters={"binary_data_size": 8})]}, bytes(8)),
]
GARBLED = [
    answer(b""),
    answer(b"{"),
    answer(b"[]"),
    answer({}),
    answer({"outputs": {}}),
    answer({"outputs": [7]}),
    answer({"outputs": [{"datatype": "FP32"}]}),
    answer(b'{"outputs": [], "outputs": []}'),
    answer({"outputs": [BINARY]}, bytes(7)),
    answer({"outputs": [BINARY]}, bytes(9)),
    answer({"outputs": [BINARY]}),
    answer({"outputs": [entry(parameters={"binary_data_size": -1})]}, b""),
    answer({"outputs": [entry(parameters={"binary_data_size": 8.0})]}, bytes(8)),
    answer({"outputs": [entry(data=[1, 2])]}, inference_header_content_length="9999"),
    answer({"outputs": [entry(data=[1, 2])]}, inference_header_content_length="-1"),
    answer({"outputs": [entry(data=[1, 2])]}, inference_header_content_length="1_0"),
    answer(b"[" * 200_000),
]


@pytest.mark.parametrize(
    ("given_answers", "sign"), [(MISMATCHED, Sign.MISMATCH), (GARBLED, Sign.NONE)], ids=["wrong", "no"]
)
def test_answers_that_are_none(given_answers: list[HttpAnswer], sign: Sign) -> None:
    codec = http_codec()
    for one in given_answers:
        found = codec.success(one, (0,))
        assert isinstance(found, Failure), one
        assert (found.kind, found.sign) == (FailureKind.BROKEN, sign), one
        assert len(found.message) < 300


def test_answers_may_mix_forms_and_come_in_any_order_with_more_than_was_asked() -> None:
    codec = http_codec(outputs=("y", "z"))
    items = [
        entry(name="more", datatype="ODD", parameters={"binary_data_size": 3}),
        entry(name="z", data=[[3], [4.5]]),
        entry(parameters={"binary_data_size": 8, "other": 1}),
    ]
    found = codec.success(answer({"outputs": items}, b"abc" + np.array([1, 2], "<f4").tobytes()), (0, 1))
    assert isinstance(found, Success)
    assert [np.frombuffer(output.data, "<f4").tolist() for output in found.outputs] == [[1, 2], [3, 4.5]]


def test_nan_and_infinity_come_back() -> None:
    found = http_codec().success(
        answer(b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1,2],"data":[NaN,-Infinity]}]}'), (0,)
    )
    assert isinstance(found, Success)
    assert np.isnan(np.frombuffer(found.outputs[0].data, "<f4")[0])


def test_a_gateway_behind_says_how_long_the_run_took() -> None:
    timing = "queue;dur=0.10, infer;dur=1.50, total;dur=2.00"
    found = http_codec().success(answer({"outputs": [entry(data=[1, 2])]}, server_timing=timing), (0,))
    assert isinstance(found, Success)
    assert (found.compute_input_ns, found.compute_infer_ns, found.compute_output_ns) == (0, 1_500_000, 0)


def test_a_bool_is_zero_or_one() -> None:
    item = entry(datatype="BOOL", parameters={"binary_data_size": 2})
    codec = http_codec("BOOL")
    assert isinstance(codec.success(answer({"outputs": [item]}, b"\x01\x00"), (0,)), Success)
    assert isinstance(codec.success(answer({"outputs": [item]}, b"\x01\x02"), (0,)), Failure)


@pytest.mark.parametrize("data", [pack_bytes([b"a"]), pack_bytes([b"a"] * 3), b"\xff\xff\xff\xff", b"\1\0\0\0"])
def test_strings_must_be_as_many_as_the_shape_says(data: bytes) -> None:
    item = entry(datatype="BYTES", parameters={"binary_data_size": len(data)})
    assert isinstance(http_codec("BYTES").success(answer({"outputs": [item]}, data), (0,)), Failure)


@given(st.binary(max_size=200), st.integers(0, 220))
def test_no_bytes_raise(body: bytes, length: int) -> None:
    headers = {b"inference-header-content-length": str(length).encode()}
    assert isinstance(http_codec().success(HttpAnswer(200, headers, body), (0,)), Failure)
    assert isinstance(grpc_codec().success(memoryview(body), (0,)), Failure)


# -- answers of gRPC ---------------------------------------------------------------------------------------------------

CONTENTS = {"BOOL": "bool", "FP32": "fp32", "FP64": "fp64", "BYTES": "bytes", "INT64": "int64", "UINT64": "uint64"}


@pytest.mark.parametrize("datatype", [d for d in DATATYPES if d.kind != "half"], ids=str)
@given(data=st.data())
def test_typed_and_raw_answers_say_the_same(datatype: Any, data: Any) -> None:
    if datatype.kind == "bytes":
        elements: list[Any] = data.draw(st.lists(st.binary(max_size=9), min_size=2, max_size=2))
        packed = pack_bytes(elements)
    else:
        packed = data.draw(st.binary(min_size=2 * datatype.itemsize, max_size=2 * datatype.itemsize))
        packed = bytes(b & 1 for b in packed) if datatype.kind == "bool" else packed
        array = np.frombuffer(packed, datatype.numpy)
        if datatype.kind == "float" and np.isnan(array).any():
            return  # a NaN's bits may change on their way through Python's floats
        elements = array.tolist()
    kind = CONTENTS.get(datatype.name) or ("int" if datatype.kind == "int" else "uint")
    made = message("inference.ModelInferResponse")
    typed, raw = made(), made()
    for parsed in (typed, raw):
        parsed.outputs.add(name="y", datatype=datatype.name, shape=[1, 2])
    getattr(typed.outputs[0].contents, f"{kind}_contents").extend(elements)
    raw.raw_output_contents.append(packed)
    for parsed in (typed, raw):
        found = grpc_codec(datatype.name).success(memoryview(parsed.SerializeToString()), (0,))
        assert isinstance(found, Success), found
        assert bytes(found.outputs[0].data) == packed


def test_answers_of_grpc_that_are_none() -> None:
    made: list[tuple[Any, Sign]] = []

    def response(sign: Sign, name: str = "y", datatype: str = "FP32", shape: tuple[int, ...] = (1, 2)) -> Any:
        parsed = message("inference.ModelInferResponse")()
        parsed.outputs.add(name=name, datatype=datatype, shape=shape)
        made.append((parsed, sign))
        return parsed

    made.append((message("inference.ModelInferResponse")(), Sign.MISMATCH))
    response(Sign.MISMATCH)
    response(Sign.MISMATCH, "other").raw_output_contents.append(bytes(8))
    response(Sign.MISMATCH, datatype="INT32").raw_output_contents.append(bytes(8))
    response(Sign.MISMATCH, shape=(2, 2)).raw_output_contents.append(bytes(8))
    response(Sign.MISMATCH, shape=(-1, 2)).raw_output_contents.append(bytes(8))
    response(Sign.NONE).raw_output_contents.extend([bytes(8), bytes(8)])
    response(Sign.MISMATCH).outputs[0].contents.fp64_contents.extend([1, 2])
    response(Sign.MISMATCH).outputs[0].contents.fp32_contents.extend([1])
    twice = response(Sign.MISMATCH)
    twice.outputs.add(name="y", datatype="FP32", shape=[1, 2])
    twice.raw_output_contents.extend([bytes(8), bytes(8)])
    for parsed, sign in made:
        found = grpc_codec().success(memoryview(parsed.SerializeToString()), (0,))
        assert isinstance(found, Failure)
        assert (found.kind, found.sign) == (FailureKind.BROKEN, sign), parsed


def test_small_integers_of_grpc_are_checked_for_their_range() -> None:
    parsed = message("inference.ModelInferResponse")()
    parsed.outputs.add(name="y", datatype="INT8", shape=[1, 2]).contents.int_contents.extend([1, 128])
    found = grpc_codec("INT8").success(memoryview(parsed.SerializeToString()), (0,))
    assert isinstance(found, Failure)
    assert found.sign is Sign.MISMATCH


def raw_answer(tensors: dict[str, bytes], datatype: str = "FP32", version: str = "3", **more: Any) -> memoryview:
    parsed = message("inference.ModelInferResponse")(model_name="m", model_version=version, **more)
    for name, data in tensors.items():
        size = DATATYPE[datatype].itemsize or len(data)
        parsed.outputs.add(name=name, datatype=datatype, shape=[len(data) // size // 2, 2])
        parsed.raw_output_contents.append(data)
    return memoryview(parsed.SerializeToString())


@given(
    st.lists(st.tuples(st.sampled_from([(0,), (1,), (0, 1), (1, 0)]), st.integers(1, 3), st.booleans()), max_size=12)
)
def test_an_answer_like_one_before_it_holds_its_own_numbers(asked: list[tuple[tuple[int, ...], int, bool]]) -> None:
    codec = grpc_codec(outputs=("y", "z"))
    for turn, (outputs, rows, swapped) in enumerate(asked * 2):
        values = {name: np.full((rows, 2), turn * 10 + n, "<f4").tobytes() for n, name in enumerate("yz")}
        names = "zy" if swapped else "yz"
        found = codec.success(raw_answer({name: values[name] for name in names}), outputs)
        assert isinstance(found, Success), found
        assert [output.name for output in found.outputs] == ["yz"[place] for place in outputs]
        assert [bytes(output.data) for output in found.outputs] == [values["yz"[place]] for place in outputs]
        assert {output.shape for output in found.outputs} == {(rows, 2)}


@pytest.mark.parametrize("at", range(len(raw_answer({"y": bytes(8)})) - 8))
def test_an_answer_is_like_another_only_if_all_but_the_numbers_is_the_same(at: int) -> None:
    usual = raw_answer({"y": bytes(8)})
    changed = bytearray(usual)
    changed[at] ^= 1
    codec = grpc_codec()
    for _ in range(2):
        assert isinstance(codec.success(usual, (0,)), Success)
    told, fresh = (c.success(memoryview(bytes(changed)), (0,)) for c in (codec, grpc_codec()))
    assert type(told) is type(fresh)
    if isinstance(told, Failure) and isinstance(fresh, Failure):
        assert (told.kind, told.sign, told.message) == (fresh.kind, fresh.sign, fresh.message)


def test_the_same_description_with_another_version_or_bool_is_looked_at_again() -> None:
    codec, of_bools = grpc_codec(), grpc_codec("BOOL")
    for _ in range(2):
        assert isinstance(codec.success(raw_answer({"y": bytes(8)}), (0,)), Success)
        assert isinstance(of_bools.success(raw_answer({"y": bytes(2)}, "BOOL"), (0,)), Success)
    assert isinstance(codec.success(raw_answer({"y": bytes(8)}, version="4"), (0,)), Failure)
    assert isinstance(of_bools.success(raw_answer({"y": b"\0\2"}, "BOOL"), (0,)), Failure)


def test_layouts_that_are_remembered_are_few() -> None:
    codec = grpc_codec()
    for rows in range(1, 3 * REMEMBERED):
        assert isinstance(codec.success(raw_answer({"y": bytes(8 * rows)}), (0,)), Success)
    assert len(codec._layouts) <= REMEMBERED
