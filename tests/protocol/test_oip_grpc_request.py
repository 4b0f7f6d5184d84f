"""Rules of a request over gRPC, one by one (wire notes §2.3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gateway.core.model import ModelSpec
from gateway.core.request import SequenceStep
from gateway.errors import GatewayError, InvalidRequest, Unsupported
from gateway.protocol import schema
from gateway.protocol.oip_grpc_cut import Openings
from gateway.protocol.oip_grpc_request import LISTED_ELEMENTS, MAX_PARAMETERS, RequestReader
from tests.protocol.grpc_samples import Codec, infer_request, read
from tests.protocol.oip_samples import NUMPY, decoded, model, packed, tensor_spec

ROWS = np.arange(3, dtype="<f4").tobytes()
TWO = model([tensor_spec("A"), tensor_spec("B", "INT32", (2,), optional=True)], [tensor_spec("Y"), tensor_spec("Z")])
PLAIN = ("A", "FP32", [1, 3], ROWS)


def refused(message: Any, *words: str, spec: ModelSpec = TWO, error: type[GatewayError] = InvalidRequest) -> None:
    codec = Codec(spec)
    for _ in range(3):  # nothing remembered from the first refusal lets the second through
        with pytest.raises(error) as caught:
            codec.read(message)
        for word in words:
            assert word in str(caught.value)


# -- raw -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", [*NUMPY])
def test_every_datatype_comes_raw(datatype: str) -> None:
    spec = model([tensor_spec("X", datatype)])
    data = np.array([[0, 1, 1], [1, 0, 1]], NUMPY[datatype]).tobytes()
    codec = Codec(spec)
    for _ in range(3):
        request = codec.read(infer_request(("X", datatype, [2, 3], data)))
        assert decoded(spec, request) == {"X": ((2, 3), data)}
        assert request.rows == 2


def test_strings_come_raw() -> None:
    spec = model([tensor_spec("X", "BYTES")])
    codec = Codec(spec)
    for elements in ([b"a", b""], [b"hello", "hé".encode()], [b"b", b"\0"]):
        assert decoded(spec, codec.read(infer_request(("X", "BYTES", [1, 2], packed(elements)))))["X"][1] == packed(
            elements
        )


def test_inputs_are_put_in_the_models_order_and_those_left_out_stay_out() -> None:
    codec = Codec(TWO)
    for _ in range(3):
        request = codec.read(infer_request(("B", "INT32", [1, 2], b"\1\0\0\0\2\0\0\0"), PLAIN))
        assert decoded(TWO, request) == {"A": ((1, 3), ROWS), "B": ((1, 2), b"\1\0\0\0\2\0\0\0")}
        request = codec.read(infer_request(PLAIN))
        assert request.inputs[1] is None


def test_the_only_input_of_a_model_is_read_alike_every_time_whatever_else_is_asked() -> None:
    spec = model([tensor_spec("X", "FP32")])
    codec = Codec(spec)
    for turn in range(4):
        data = np.full(3, turn, "<f4").tobytes()
        plain = codec.read(infer_request(("X", "FP32", [1, 3], data)))
        asked = codec.read(infer_request(("X", "FP32", [1, 3], data), parameters={"priority": 2, "timeout": 1500}))
        for request in (plain, asked):
            assert decoded(spec, request) == {"X": ((1, 3), data)}
            assert (request.rows, request.nbytes, request.request_id) == (1, 12, None)
            assert request.key == plain.key
        assert (plain.priority, plain.stated_timeout_s) == (0, 0.0)
        assert (asked.priority, asked.stated_timeout_s) == (2, 0.0015)


def test_further_raw_entries_are_ignored() -> None:
    codec = Codec(TWO)
    for _ in range(3):
        assert decoded(TWO, codec.read(infer_request(PLAIN, extra_raw=[b"", b"more"]))) == {"A": ((1, 3), ROWS)}


def test_an_empty_tensor_comes_raw() -> None:
    assert decoded(TWO, read(TWO, infer_request(("A", "FP32", [1, 0], b"")))) == {"A": ((1, 0), b"")}


@pytest.mark.parametrize("size", [0, 8, 11, 13, 16])
def test_a_raw_tensor_has_the_size_of_its_shape(size: int) -> None:
    codec = Codec(TWO)
    for _ in range(2):
        codec.read(infer_request(PLAIN))
        with pytest.raises(InvalidRequest, match=f"input byte size mismatch for input 'A'.*Expected 12, got {size}"):
            codec.read(infer_request(("A", "FP32", [1, 3], bytes(size))))


def test_a_bool_is_0_or_1() -> None:
    refused(infer_request(("X", "BOOL", [1, 1], b"\2")), "BOOL", "'X'", spec=model([tensor_spec("X", "BOOL")]))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\1\0", "incomplete string length indicator"),
        (b"\5\0\0\0ab", "incomplete string data"),
        (b"", "expected 1 string elements for inference input 'X', got 0"),
        (packed([b"a", b"b"]), "unexpected number of string elements 2 for inference input 'X', expecting 1"),
        (packed([b"\xff"]), "not valid UTF-8"),
    ],
)
def test_strings_are_framed(data: bytes, words: str) -> None:
    refused(infer_request(("X", "BYTES", [1, 1], data)), words, spec=model([tensor_spec("X", "BYTES")]))


# -- typed -----------------------------------------------------------------------------------------------------------

TYPED: dict[str, tuple[str, list[Any]]] = {
    "BOOL": ("bool_contents", [True, False]), "INT8": ("int_contents", [-128, 127]), "INT16": ("int_contents", [-7, 9]),
    "INT32": ("int_contents", [-(2**31), 2**31 - 1]), "INT64": ("int64_contents", [-(2**63), 2**53 + 1]),
    "UINT8": ("uint_contents", [0, 255]), "UINT16": ("uint_contents", [0, 65535]),
    "UINT32": ("uint_contents", [0, 2**32 - 1]), "UINT64": ("uint64_contents", [0, 2**64 - 1]),
    "FP32": ("fp32_contents", [0.1, float("inf")]),
    "FP64": ("fp64_contents", [0.1, -0.0]),
}  # fmt: skip


@pytest.mark.parametrize("datatype", TYPED)
def test_every_datatype_comes_typed(datatype: str) -> None:
    spec = model([tensor_spec("X", datatype)])
    field, values = TYPED[datatype]
    request = read(spec, infer_request(("X", datatype, [2, 1], {field: values})))
    assert decoded(spec, request) == {"X": ((2, 1), np.array(values, NUMPY[datatype]).tobytes())}
    assert request.form.typed


@pytest.mark.parametrize("datatype", TYPED)
@pytest.mark.parametrize("count", [LISTED_ELEMENTS, LISTED_ELEMENTS + 1, 3000])
def test_many_typed_elements_mean_the_same(datatype: str, count: int) -> None:
    spec = model([tensor_spec("X", datatype)])
    field, values = TYPED[datatype]
    many = (values * count)[:count]
    request = read(spec, infer_request(("X", datatype, [1, count], {field: many})))
    assert decoded(spec, request) == {"X": ((1, count), np.array(many, NUMPY[datatype]).tobytes())}
    if datatype in {"INT8", "UINT8", "INT16", "UINT16"}:
        message = infer_request(("X", datatype, [1, count], {field: [*many[1:], 70_000]}))
        refused(message, "70000", "out of range", spec=spec)


def test_unknown_fields_of_contents_are_ignored() -> None:
    message = infer_request(("A", "FP32", [1, 3000], None))
    values = np.arange(3000, dtype="<f4")
    written = schema.message("inference.InferTensorContents")(fp32_contents=values.tolist()).SerializeToString()
    for contents in (b"\x4a\x02hi" + written, written + b"\x4a\x02hi"):
        message.inputs[0].contents.ParseFromString(contents)
        assert decoded(TWO, read(TWO, message)) == {"A": ((1, 3000), values.tobytes())}


def test_strings_come_typed() -> None:
    spec = model([tensor_spec("X", "BYTES")])
    request = read(spec, infer_request(("X", "BYTES", [1, 2], {"bytes_contents": [b"a", b""]})))
    assert decoded(spec, request)["X"][1] == packed([b"a", b""])
    refused(infer_request(("X", "BYTES", [1, 1], {"bytes_contents": [b"\xff"]})), "not valid UTF-8", spec=spec)


def test_an_empty_tensor_comes_typed() -> None:
    assert decoded(TWO, read(TWO, infer_request(("A", "FP32", [1, 0], {})))) == {"A": ((1, 0), b"")}


def test_typed_and_raw_together_are_refused() -> None:
    refused(
        infer_request(("A", "FP32", [1, 3], {"fp32_contents": [1, 2, 3]}), extra_raw=[ROWS]),
        "contents field must not be specified when using raw_input_contents for 'A' for model 'm'",
    )
    message = infer_request(PLAIN, ("B", "INT32", [1, 2], {"int_contents": [1, 2]}))
    refused(message, "contents field must not be specified when using raw_input_contents for 'B'")


def test_an_input_without_data_is_refused() -> None:
    refused(
        infer_request(("A", "FP32", [1, 3], None)), "unable to find data for input tensor 'A' for model 'm' in request."
    )
    refused(infer_request(PLAIN, ("B", "INT32", [1, 2], None)), "unable to find data for input tensor 'B'")


@pytest.mark.parametrize("count", [0, 2, 4])
def test_typed_data_fill_the_shape(count: int) -> None:
    refused(
        infer_request(("A", "FP32", [1, 3], {"fp32_contents": [1.0] * count})),
        f"input byte size mismatch for input 'A' for model 'm'. Expected 12, got {4 * count}",
    )


def test_typed_data_stand_in_the_field_of_their_datatype() -> None:
    words = (
        "unexpected explicit tensor data for input tensor 'A' for model 'm' of type 'INT64', expected datatype 'FP32'"
    )
    refused(infer_request(("A", "FP32", [1, 3], {"int64_contents": [1, 2, 3]})), words)
    refused(infer_request(("A", "FP32", [1, 3], {"int64_contents": [1], "fp32_contents": [1, 2, 3]})), words)
    half = model([tensor_spec("X", "FP16")])
    refused(infer_request(("X", "FP16", [1, 1], {"fp32_contents": [1]})), "unexpected explicit", "raw_input", spec=half)


@pytest.mark.parametrize(("datatype", "value"), [("INT8", 300), ("INT8", -129), ("UINT8", 256), ("INT16", 2**15)])
def test_an_integer_out_of_range_is_refused_not_wrapped(datatype: str, value: int) -> None:
    field = TYPED[datatype][0]
    spec = model([tensor_spec("X", datatype)])
    refused(infer_request(("X", datatype, [1, 1], {field: [value]})), str(value), "out of range", datatype, spec=spec)


# -- inputs and outputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (("Q", "FP32", [1, 3], ROWS), "unexpected inference input 'Q' for model 'm'"),
        (("A", "INT32", [1, 3], ROWS), "inference input 'A' data-type is 'INT32', but model 'm' expects 'FP32'"),
        (("A", "fp32", [1, 3], ROWS), "inference input 'A' data-type is '<invalid>', but model 'm' expects 'FP32'"),
        (("A", "", [1, 3], ROWS), "inference input 'A' data-type is '<invalid>'"),
        (
            ("A", "FP32", [1, -1], ROWS),
            "All input dimensions should be specified for input 'A' for model 'm', got [1,-1]",
        ),
        (("A", "FP32", [3], ROWS), "unexpected shape for input 'A'"),
        (("A", "FP32", [0, 3], b""), "batch-size must be >= 1"),
        (("A", "FP32", [9, 1], bytes(36)), "inference request batch-size must be <= 8 for 'm'"),
        (("A", "FP32", [2**40, 2**40], b""), "causes total element count to exceed maximum size of"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(item: Any, words: str) -> None:
    refused(infer_request(item), words)


def test_inputs_given_twice_or_left_out_are_refused() -> None:
    refused(infer_request(PLAIN, PLAIN), "input 'A' already exists in request")
    refused(infer_request(), "missing required input(s) ['A']")
    refused(infer_request(*[PLAIN] * 65), "at most 64")
    refused(infer_request(PLAIN, outputs=["Y"] * 257), "at most 256")


def test_outputs_are_chosen_by_name() -> None:
    codec = Codec(TWO)
    for _ in range(2):
        assert codec.read(infer_request(PLAIN)).form.outputs == (0, 1)
        request = codec.read(infer_request(PLAIN, outputs=["Z"]))
        assert (request.form.outputs, request.outputs) == ((1,), (1,))
        request = codec.read(infer_request(PLAIN, outputs=["Z", "Y"]))
        assert (request.form.outputs, request.outputs) == ((1, 0), (0, 1))
    refused(infer_request(PLAIN, outputs=["N"]), "unexpected inference output 'N' for model 'm'")
    refused(infer_request(PLAIN, outputs=["Y", "Y"]), "requested twice")


def test_a_half_output_needs_no_asking() -> None:
    spec = model(outputs=[tensor_spec("H", "FP16")])
    assert read(spec, infer_request(("X", "FP32", [1, 3], ROWS))).form.outputs == (0,)


def test_the_id_is_kept() -> None:
    codec = Codec(TWO)
    for request_id in ("1", "2", "", "é" * 100, "3"):
        assert codec.read(infer_request(PLAIN, request_id=request_id)).request_id == (request_id or None)


# -- parameters ------------------------------------------------------------------------------------------------------


def test_parameters_of_the_protocol_reach_the_request() -> None:
    codec = Codec(TWO)
    for kind in ("int64_param", "uint64_param"):
        for _ in range(3):
            request = codec.read(infer_request(PLAIN, parameters={"priority": (kind, 2), "timeout": 1500}))
            assert (request.priority, request.stated_timeout_s) == (2, 0.0015)
        plain = codec.read(infer_request(PLAIN))
        assert (plain.priority, plain.stated_timeout_s, plain.sequence) == (0, 0.0, None)


@pytest.mark.parametrize("identity", [5, ("uint64_param", 5), "five"])
def test_a_sequence_id_is_a_number_or_a_text(identity: Any) -> None:
    request = read(TWO, infer_request(PLAIN, parameters={"sequence_id": identity, "sequence_start": True}))
    assert request.sequence == SequenceStep("five" if identity == "five" else 5, True, False)


def test_a_correlation_id_may_be_any_64_bits() -> None:
    request = read(TWO, infer_request(PLAIN, parameters={"sequence_id": -2}))
    assert request.sequence == SequenceStep(2**64 - 2)


@pytest.mark.parametrize("value", [1.5, "x", 3, True])
def test_parameters_of_the_callers_own_are_taken(value: Any) -> None:
    assert read(TWO, infer_request(PLAIN, parameters={"mine": value})).priority == 0


def test_the_wish_for_an_empty_last_answer_is_taken() -> None:
    assert read(TWO, infer_request(PLAIN, parameters={"triton_enable_empty_final_response": True})).rows == 1


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"mine": ("uint64_param", 1)}, "'mine'"),
        ({"mine": ("", None)}, "'mine'"),
        ({"priority": ("", None)}, "'priority'"),
        ({"triton_x": 1}, "'triton_x'"),
        ({"priority": -1}, "'priority'"),
        ({"timeout": "5"}, "invalid value type for 'timeout' parameter, expected int64_param"),
        ({"timeout": ("uint64_param", 5)}, "invalid value type for 'timeout' parameter"),
        ({"sequence_id": 1.5}, "invalid value type for 'sequence_id' parameter"),
        ({"sequence_start": 1}, "invalid value type for 'sequence_start' parameter"),
        ({"triton_enable_empty_final_response": 1}, "expected bool_param"),
    ],
)
def test_parameters_that_cannot_be_are_refused(parameters: dict[str, Any], words: str) -> None:
    refused(infer_request(PLAIN, parameters=parameters), words)


def test_what_is_known_for_one_version_says_nothing_of_another() -> None:
    codec = Codec(TWO)
    for _ in range(3):
        codec.read(infer_request(PLAIN))
    other = model([tensor_spec("A", "FP32", (2,))])
    data = infer_request(PLAIN).SerializeToString()
    with pytest.raises(InvalidRequest, match="unexpected shape"):
        RequestReader(other).read(codec.openings.cut(data))
    swapped = model([tensor_spec("B", "FP32", optional=True), tensor_spec("A", "FP32")], [tensor_spec("Z")])
    request = RequestReader(swapped).read(codec.openings.cut(data))
    assert decoded(swapped, request) == {"A": ((1, 3), ROWS)}
    assert (request.inputs[0], request.outputs) == (None, (0,))
    assert codec.read(data).outputs == (0, 1)


def test_two_versions_that_take_turns_read_an_opening_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """A canary beside a champion: the same clients, now here, now there."""
    readers = [RequestReader(TWO), RequestReader(TWO)]
    made: list[int] = []
    known = RequestReader._known

    def counted(self: RequestReader, message: Any) -> Any:
        made.append(id(self))
        return known(self, message)

    monkeypatch.setattr(RequestReader, "_known", counted)
    openings = Openings()
    for turn, number in enumerate([1, 2, 3, 4, 5, 6, 7]):
        data = np.full((1, 3), number, "<f4").tobytes()
        message = infer_request(("A", "FP32", [1, 3], data))
        request = readers[turn % 2].read(openings.cut(message.SerializeToString()))
        assert request.inputs[0] is not None
        assert bytes(request.inputs[0].buffer or b"") == data
    assert len(made) == 2


def test_what_a_client_can_make_grow_is_bounded() -> None:
    many = {f"p{n}": n for n in range(MAX_PARAMETERS + 1)}
    refused(infer_request(PLAIN, parameters=many), "257 parameters, at most 256")
    refused(infer_request(("A", "FP32", [1] * 100_000, ROWS)), "at most 16")
    refused(infer_request(PLAIN, extra_raw=[b""] * 5000), "more than 4096")
    refused(b"\x2a\x00" * 5000, "more than 4096")


def test_classification_is_asked_for_per_output() -> None:
    request = read(TWO, infer_request(PLAIN, outputs=["Z", ("Y", {"classification": 2})]))
    assert (request.form.response.classes, request.form.response.plain) == ((0, 2), False)
    for wrong in (0, -1, "2", 1.0):
        refused(infer_request(PLAIN, outputs=[("Y", {"classification": wrong})]), "classification", "'Y'")


def test_shared_memory_is_refused_where_it_is_off() -> None:
    shared = {"shared_memory_region": "r", "shared_memory_byte_size": 12}
    refused(infer_request(PLAIN, outputs=[("Y", shared)]), "'r'", "shared memory", "switched off", error=Unsupported)
    refused(infer_request(PLAIN, outputs=[("Y", {"shared_memory_region": 1})]), "'shared_memory_region'", "'Y'")
