"""Tensors in shared memory through both protocols: decoded from regions, answered into regions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.core.model import ModelSpec
from gateway.core.request import InferRequest
from gateway.errors import GatewayError, InvalidRequest, NotFound, RegionFailed, TooLarge, Unsupported
from gateway.protocol.oip_answer import AnswerEncoder, BatchEncoder
from gateway.protocol.oip_grpc_answer import AnswerWriter, BatchAnswers
from gateway.protocol.oip_json import LARGE_BYTES, RequestDecoder
from gateway.protocol.options import ProtocolOptions
from gateway.shared_memory import RegionPlace, SharedMemory

from .grpc_samples import RESPONSE, Codec, infer_request
from .oip_samples import batch_of, decoded, model, packed, tensor_spec

SPEC = model(
    [tensor_spec("A"), tensor_spec("B", "BYTES", (1,), optional=True), tensor_spec("C", "BOOL", (1,), optional=True)],
    [tensor_spec("Y"), tensor_spec("N", "BYTES", (1,)), tensor_spec("H", "FP16", (1,))],
)
Y = np.arange(8, dtype="<f4").reshape(4, 2)
N = [b"a", b"", b"ccc", b"dd"]
H = np.array([[1], [2], [3], [4]], "<f2")
BATCH = batch_of(SPEC, 4, [Y, N, H])
ROWS = np.arange(3, dtype="<f4").tobytes()
SIZE = 200


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "object"
    path.write_bytes(ROWS + bytes(SIZE - len(ROWS)))
    return path


@pytest.fixture
def memory(file: Path) -> SharedMemory:
    found = SharedMemory(100, str(file.parent))
    found.register("r", "/object", 0, SIZE)
    return found


def area(nbytes: int, offset: int = 0, region: str = "r") -> dict[str, Any]:
    where: dict[str, Any] = {"shared_memory_region": region, "shared_memory_byte_size": nbytes}
    return {**where, "shared_memory_offset": offset} if offset else where


Content = dict[str, Any] | bytes | None
Input = tuple[str, str, list[int], Content]
"""A dict is where in shared memory, bytes are raw."""
Reader = Callable[..., InferRequest]

PLAIN: Input = ("A", "FP32", [1, 3], ROWS)
SHARED: Input = ("A", "FP32", [1, 3], area(12))


class Rest:
    """REST, as a server has it: one decoder for all requests."""

    def __init__(self, spec: ModelSpec, memory: SharedMemory | None, size: int = 0) -> None:
        """`size`: bodies are made at least so long, with blanks."""
        options = ProtocolOptions() if memory is None else ProtocolOptions(memory=memory)
        self.decoder = RequestDecoder(spec, options)
        self.spec = spec
        self.size = size

    def __call__(self, *inputs: Input, outputs: list[Any] | None = None) -> InferRequest:
        items, blobs = [], b""
        for name, datatype, shape, content in inputs:
            item: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
            if isinstance(content, bytes):
                item["parameters"] = {"binary_data_size": len(content)}
                blobs += content
            elif content is not None:
                item["parameters"] = content
            items.append(item)
        wanted = [
            {"name": o} if isinstance(o, str) else {"name": o[0], "parameters": o[1]}
            for o in outputs or ["Y"]  # FP16 has no form in JSON
        ]
        document = {"inputs": items, "outputs": wanted}
        head = json.dumps(document).encode().ljust(self.size)
        return self.decoder.decode(head + blobs, len(head) if blobs else None)

    def answer(self, request: InferRequest) -> tuple[list[dict[str, Any]], bytes]:
        """Output objects, and what stands behind the JSON."""
        encoder = AnswerEncoder(self.spec)
        parts, length, json_length = encoder.encode(request, BatchEncoder(self.spec, BATCH.outputs, BATCH.rows))
        body = b"".join(parts)
        assert len(body) == length
        return json.loads(body[:json_length])["outputs"], body[json_length:] if json_length else b""


class Rpc:
    """gRPC, likewise."""

    def __init__(self, spec: ModelSpec, memory: SharedMemory | None) -> None:
        self.codec = Codec(spec) if memory is None else Codec(spec, memory)
        self.spec = spec

    def __call__(self, *inputs: Input, outputs: list[Any] | None = None) -> InferRequest:
        plain = [(n, d, s, None if isinstance(content, dict) else content) for n, d, s, content in inputs]
        message = infer_request(*plain, outputs=outputs)
        for tensor, (*_, content) in zip(message.inputs, inputs, strict=True):
            for name, value in content.items() if isinstance(content, dict) else ():
                kind = "string_param" if isinstance(value, str) else "int64_param"
                setattr(tensor.parameters[name], kind, value)
        return self.codec.read(message)

    def answer(self, request: InferRequest, mirror: bool = False) -> Any:
        writer = AnswerWriter(self.spec, mirror=mirror)
        parts, length = writer.write(request, BatchAnswers(self.spec, BATCH.outputs, BATCH.rows))
        data = b"".join(parts)
        assert len(data) == length
        return RESPONSE.FromString(data)


@pytest.fixture(params=["rest", "large rest", "grpc"])
def reader(request: pytest.FixtureRequest, memory: SharedMemory) -> Reader:
    if request.param == "grpc":
        return Rpc(SPEC, memory)
    return Rest(SPEC, memory, LARGE_BYTES if request.param == "large rest" else 0)


def refused(reader: Reader, error: type[GatewayError], words: str, *inputs: Input, **how: Any) -> None:
    for _ in range(3):  # nothing remembered from the first refusal lets the second through
        with pytest.raises(error, match=words):
            reader(*inputs, **how)


def settled(request: InferRequest, row: int, rows: int) -> InferRequest:
    request.batch, request.row, request.rows = BATCH, row, rows
    return request


# -- inputs ----------------------------------------------------------------------------------------------------------


def test_an_input_is_what_its_area_holds_at_that_time(reader: Reader, file: Path) -> None:
    first = reader(SHARED)
    assert decoded(SPEC, first) == {"A": ((1, 3), ROWS)}
    file.write_bytes(ROWS[::-1] + bytes(SIZE))
    assert decoded(SPEC, reader(SHARED)) == {"A": ((1, 3), ROWS[::-1])}
    assert decoded(SPEC, first) == {"A": ((1, 3), ROWS)}  # a copy of its own
    assert first.key == reader(PLAIN).key  # it shares batches with all others


def test_inputs_of_every_kind_side_by_side(reader: Reader, file: Path) -> None:
    texts = packed([b"hello"])
    file.write_bytes(bytes(20) + texts + b"\1" + bytes(SIZE))
    for inputs in (
        [PLAIN, ("B", "BYTES", [1, 1], area(9, 20)), ("C", "BOOL", [1, 1], b"\1")],
        [("C", "BOOL", [1, 1], area(1, 29)), ("B", "BYTES", [1, 1], texts), PLAIN],
    ):
        assert decoded(SPEC, reader(*inputs)) == {"A": ((1, 3), ROWS), "B": ((1, 1), texts), "C": ((1, 1), b"\1")}


def test_a_tensor_of_no_elements(reader: Reader) -> None:
    assert decoded(SPEC, reader(("A", "FP32", [1, 0], area(0, 7)))) == {"A": ((1, 0), b"")}


@pytest.mark.parametrize("size", [0, 8, 13, 16])
def test_an_area_has_the_size_of_the_shape(reader: Reader, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    words = f"input byte size mismatch for input 'A' for model 'm'. Expected 12, got {size}"
    monkeypatch.setattr(RegionPlace, "read", None)  # nothing is read for a request that is refused anyway
    refused(reader, InvalidRequest, words, ("A", "FP32", [1, 3], area(size)))


@pytest.mark.parametrize(
    ("error", "words", "given"),
    [
        (NotFound, "Unable to find shared memory region: 'nobody'", area(12, region="nobody")),
        (InvalidRequest, "Invalid offset for shared memory region: 'r'", area(12, SIZE)),
        (InvalidRequest, r"Invalid offset \+ byte size for shared memory region: 'r'", area(12, SIZE - 11)),
        (InvalidRequest, "'A'.*'shared_memory_byte_size' must be specified", {"shared_memory_region": "r"}),
    ],
)
def test_areas_that_are_not_there(reader: Reader, error: type[GatewayError], words: str, given: dict[str, Any]) -> None:
    refused(reader, error, words, ("A", "FP32", [1, 3], given))
    if "byte_size" not in words:
        refused(reader, error, words, PLAIN, outputs=[("Y", given)])


def test_bytes_are_checked_wherever_they_come_from(reader: Reader, file: Path) -> None:
    file.write_bytes(b"\2" + bytes(SIZE))
    refused(reader, InvalidRequest, "'C'.*BOOL", PLAIN, ("C", "BOOL", [1, 1], area(1)))
    refused(reader, InvalidRequest, "incomplete string", PLAIN, ("B", "BYTES", [1, 1], area(3)))
    file.write_bytes(packed([b"\xff"]) + bytes(SIZE))
    refused(reader, InvalidRequest, "not valid UTF-8", PLAIN, ("B", "BYTES", [1, 1], area(5)))


def test_an_object_cut_short_is_the_callers_fault(reader: Reader, file: Path) -> None:
    reader(SHARED)
    file.write_bytes(ROWS[:11])
    refused(reader, InvalidRequest, "region 'r'.*made shorter", SHARED)


def test_what_one_request_takes_from_regions_is_bounded(reader: Reader, memory: SharedMemory) -> None:
    memory.max_bytes = 99
    inputs: list[Input] = [("A", "FP32", [1, 20], area(80)), ("B", "BYTES", [1, 1], area(20))]
    refused(reader, TooLarge, "100 bytes in shared memory, at most 99", *inputs)
    memory.max_bytes = 80
    assert reader(inputs[0]).nbytes == 80


def test_a_region_is_looked_up_for_every_request(reader: Reader, memory: SharedMemory, file: Path) -> None:
    """What is remembered of requests never outlives a registration."""
    (file.parent / "other").write_bytes(ROWS[::-1])
    wanted = [("Y", area(8))]
    for _ in range(3):
        reader(SHARED), reader(PLAIN, outputs=wanted)
    memory.unregister("r")
    refused(reader, NotFound, "'r'", SHARED)
    refused(reader, NotFound, "'r'", PLAIN, outputs=wanted)
    memory.register("r", "/other", 0, 12)
    assert decoded(SPEC, reader(SHARED)) == {"A": ((1, 3), ROWS[::-1])}
    (place,) = response_form(reader(PLAIN, outputs=wanted)).targets
    place.write(b"new")
    assert (file.parent / "other").read_bytes() == b"new" + ROWS[::-1][3:]


def response_form(request: InferRequest) -> Any:
    return getattr(request.form, "response", request.form)


@pytest.mark.parametrize("kind", [Rest, Rpc])
def test_off_is_501_for_inputs_and_outputs(kind: Any) -> None:
    reader = kind(SPEC, None)
    refused(reader, Unsupported, "'r' cannot be used.*switched off", SHARED, outputs=["Y"])
    refused(reader, Unsupported, "'r' cannot be used.*switched off", PLAIN, outputs=[("Y", area(8))])
    assert decoded(SPEC, reader(PLAIN, outputs=["Y"])) == {"A": ((1, 3), ROWS)}


def test_typed_contents_beside_an_area_are_refused(memory: SharedMemory) -> None:
    message = infer_request(("A", "FP32", [1, 3], {"fp32_contents": [1.0, 2.0, 3.0]}))
    message.inputs[0].parameters["shared_memory_region"].string_param = "r"
    message.inputs[0].parameters["shared_memory_byte_size"].int64_param = 12
    with pytest.raises(InvalidRequest, match=r"unexpected 'content' provided when using shared memory.*'A'"):
        Codec(SPEC, memory).read(message)


def test_raw_tensors_belong_to_the_inputs_that_are_not_in_shared_memory(memory: SharedMemory) -> None:
    reader = Rpc(SPEC, memory)
    texts = packed([b"x"])
    for _ in range(3):
        request = reader(SHARED, ("B", "BYTES", [1, 1], texts), ("C", "BOOL", [1, 1], b"\0"))
        assert decoded(SPEC, request) == {"A": ((1, 3), ROWS), "B": ((1, 1), texts), "C": ((1, 1), b"\0")}
    refused(reader, InvalidRequest, "unable to find data for input tensor 'B'", SHARED, ("B", "BYTES", [1, 1], None))


def test_a_raw_tensor_too_many_is_not_taken_for_the_one_in_shared_memory(memory: SharedMemory) -> None:
    codec = Codec(SPEC, memory)
    message = infer_request(PLAIN)
    message.raw_input_contents[0] = bytes(12)
    message.inputs[0].parameters["shared_memory_region"].string_param = "r"
    message.inputs[0].parameters["shared_memory_byte_size"].int64_param = 12
    for _ in range(3):
        assert decoded(SPEC, codec.read(message)) == {"A": ((1, 3), ROWS)}


# -- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "rows"), [(0, 1), (2, 2), (0, 4)])
def test_rest_describes_what_it_wrote(memory: SharedMemory, file: Path, row: int, rows: int) -> None:
    rest = Rest(SPEC, memory)
    wanted = [("N", area(22, 150)), ("Y", {"binary_data": True}), ("H", area(8, 100))]
    found, blobs = rest.answer(settled(rest(PLAIN, outputs=wanted), row, rows))
    mine = slice(row, row + rows)
    assert found == [
        {"name": "N", "datatype": "BYTES", "shape": [rows, 1]},
        {"name": "Y", "datatype": "FP32", "shape": [rows, 2], "parameters": {"binary_data_size": 8 * rows}},
        {"name": "H", "datatype": "FP16", "shape": [rows, 1]},
    ]
    assert blobs == Y[mine].tobytes()
    texts, content = packed(N[mine]), file.read_bytes()
    assert content[100 : 100 + 2 * rows] == H[mine].tobytes()
    assert content[150 : 150 + len(texts)] == texts
    assert content[:12] == ROWS
    assert not any(content[12:100] + content[100 + 2 * rows : 150] + content[150 + len(texts) :])


def test_rest_with_json_beside_shared_memory(memory: SharedMemory, file: Path) -> None:
    rest = Rest(SPEC, memory)
    found, blobs = rest.answer(settled(rest(SHARED, outputs=["Y", ("N", area(20, 50))]), 1, 1))
    assert found == [
        {"name": "Y", "datatype": "FP32", "shape": [1, 2], "data": [2, 3]},
        {"name": "N", "datatype": "BYTES", "shape": [1, 1]},
    ]
    assert blobs == b""
    assert file.read_bytes()[50:54] == packed([b""])


@pytest.mark.parametrize("mirror", [False, True])
def test_grpc_has_an_empty_raw_entry_for_it(memory: SharedMemory, file: Path, mirror: bool) -> None:
    rpc = Rpc(SPEC, memory)
    message = infer_request(("A", "FP32", [1, 1], {"fp32_contents": [0.0]}), outputs=["N", ("Y", area(8, 40))])
    answer = rpc.answer(settled(rpc.codec.read(message), 3, 1), mirror)
    described = [(o.name, o.datatype, list(o.shape)) for o in answer.outputs]
    assert described == [("N", "BYTES", [1, 1]), ("Y", "FP32", [1, 2])]
    assert list(answer.raw_output_contents) == [packed([b"dd"]), b""]
    assert not any(o.parameters or o.HasField("contents") for o in answer.outputs)
    assert file.read_bytes()[40:48] == Y[3:].tobytes()


def test_an_area_that_is_too_small_gets_nothing_and_nor_do_the_others(memory: SharedMemory, file: Path) -> None:
    before = file.read_bytes()
    words = r"output 'Y' \(31 bytes\) should be at least 32 bytes to hold the results"
    wanted = [("H", area(8, 50)), ("Y", area(31, 100))]
    for reader in (Rest(SPEC, memory), Rpc(SPEC, memory)):
        with pytest.raises(RegionFailed, match=words) as caught:
            reader.answer(settled(reader(PLAIN, outputs=wanted), 0, 4))
        assert (caught.value.status, caught.value.grpc_code) == (500, 13)
    assert file.read_bytes() == before


def test_an_object_cut_short_before_the_answer(memory: SharedMemory, file: Path) -> None:
    reader = Rest(SPEC, memory)
    request = settled(reader(PLAIN, outputs=[("Y", area(8, 100))]), 0, 1)
    file.write_bytes(bytes(107))
    with pytest.raises(InvalidRequest, match=r"region 'r'.*made shorter"):
        reader.answer(request)
    assert file.stat().st_size == 107


def test_a_region_unregistered_meanwhile_is_still_written(memory: SharedMemory, file: Path) -> None:
    reader = Rest(SPEC, memory)
    request = settled(reader(PLAIN, outputs=[("Y", area(8, 100))]), 0, 1)
    memory.unregister(None)
    reader.answer(request)
    assert file.read_bytes()[100:108] == Y[0].tobytes()


def test_outputs_in_overlapping_areas_are_written_in_order(memory: SharedMemory, file: Path) -> None:
    reader = Rest(SPEC, memory)
    reader.answer(settled(reader(SHARED, outputs=[("Y", area(8)), ("H", area(2, 4))]), 1, 1))
    assert file.read_bytes()[:8] == Y[1].tobytes()[:4] + H[1].tobytes() + Y[1].tobytes()[6:]


@pytest.mark.parametrize("other", [{"classification": 1}, {"binary_data": True}])
def test_an_output_in_shared_memory_has_no_other_form(memory: SharedMemory, other: dict[str, Any]) -> None:
    refused(Rest(SPEC, memory), InvalidRequest, "'Y'.*together", PLAIN, outputs=[("Y", {**area(8), **other})])
    if "classification" in other:
        refused(Rpc(SPEC, memory), InvalidRequest, "'Y'.*together", PLAIN, outputs=[("Y", {**area(8), **other})])


def test_what_a_model_cannot_answer_is_remembered_without_the_request_that_came_first() -> None:
    """An exception holds its traceback, the traceback its frames, and these a request with its tensors and regions."""
    remembered = RequestDecoder(SPEC)._all_json
    assert isinstance(remembered, InvalidRequest)
    assert remembered.__traceback__ is None
    assert remembered.__context__ is None
