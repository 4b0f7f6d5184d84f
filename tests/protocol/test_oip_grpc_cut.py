"""Cutting: the walk, the guess and the protobuf library must agree on every message, whatever its bytes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import GatewayError, InvalidRequest
from gateway.protocol import oip_grpc_cut
from gateway.protocol.oip_grpc_cut import Cut, Openings
from gateway.protocol.oip_grpc_request import RequestReader
from tests.protocol.grpc_samples import REQUEST, Codec, infer_request
from tests.protocol.oip_samples import PATIENT, decoded, model, tensor_spec

SPEC = model(
    [
        tensor_spec("A", "FP32"),
        tensor_spec("B", "INT32", (2,), optional=True),
        tensor_spec("S", "BYTES", optional=True),
    ],
    [tensor_spec("Y"), tensor_spec("Z")],
)
ROWS = np.arange(3, dtype="<f4").tobytes()


def outcome(reader: RequestReader, cut: Any) -> Any:
    """All that a request says, or the refusal's text."""
    try:
        found: Cut = cut()
        request = reader.read(found)
    except GatewayError as error:
        return type(error), str(error)
    return (
        found.opening.model,
        found.opening.version,
        request.request_id,
        decoded(SPEC, request),
        request.rows,
        request.key,
        request.outputs,
        request.form.response,
        request.form.typed,
        request.stated_timeout_s,
        request.priority,
        request.sequence,
    )


def agree(codec: Codec, data: bytes) -> Any:
    """Every road's outcome, which must be one."""
    whole = outcome(RequestReader(SPEC), lambda: Openings().cut_whole(data))
    for message in (data, data, memoryview(data)):  # unknown, then remembered where it can be, then a view
        assert outcome(codec.reader, lambda message=message: codec.openings.cut(message)) == whole
    return whole


contents = st.one_of(
    st.none(),
    st.sampled_from([ROWS, ROWS[:8], b"", b"\x01\0\0\0a" * 3, b"\xff\0\0\0"]),
    st.fixed_dictionaries({}, optional={
        "fp32_contents": st.lists(st.floats(width=32, allow_nan=False), max_size=4),
        "int_contents": st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4),
        "bytes_contents": st.lists(st.binary(max_size=3), max_size=4),
    }),
)  # fmt: skip
parameters = st.dictionaries(
    st.sampled_from(["timeout", "priority", "sequence_id", "sequence_start", "mine", "triton_x", "binary_data_output"]),
    st.one_of(
        st.booleans(),
        st.integers(-5, 5),
        st.just("x"),
        st.just(1.5),
        st.just(("uint64_param", 7)),
        st.just(("", True)),
    ),
    max_size=2,
)
requests = st.builds(
    lambda inputs, **rest: infer_request(*inputs, **rest),
    st.lists(
        st.tuples(
            st.sampled_from(["A", "B", "S", "Q"]),
            st.sampled_from(["FP32", "INT32", "BYTES", "fp32"]),
            st.sampled_from([[1, 3], [1, 2], [3], [1, 0], [1, -1], [9, 1]]),
            contents,
        ),
        max_size=3,
    ),
    model=st.sampled_from(["m", ""]),
    version=st.sampled_from(["", "1"]),
    request_id=st.sampled_from(["", "7", "é" * 80]),
    outputs=st.lists(st.sampled_from(["Y", "Z", "N", ("Y", {"classification": 2})]), max_size=2),
    parameters=parameters,
    extra_raw=st.lists(st.just(b"more"), max_size=1),
)


def pieces_of(message: Any) -> list[bytes]:
    """Its top-level fields, each serialised on its own."""
    pieces = []
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
            for key in value:
                one = REQUEST()
                one.parameters[key].CopyFrom(value[key])
                pieces.append(one.SerializeToString())
            continue
        for entry in value if not isinstance(value, str | bytes) else [value]:
            one = REQUEST()
            if isinstance(value, str | bytes):
                setattr(one, descriptor.name, entry)
            elif isinstance(entry, bytes):
                getattr(one, descriptor.name).append(entry)
            else:
                getattr(one, descriptor.name).add().CopyFrom(entry)
            pieces.append(one.SerializeToString())
    return pieces


UNKNOWN = [b"\x40\x07", b"\x4a\x02hi", b"\x85\x01\x00\x00\x00\x00", b"\x82\x01\x01z"]
"""Fields 8, 9, 16 and 16 of other kinds."""


@settings(PATIENT, max_examples=400)
@given(requests, st.randoms(use_true_random=False), st.integers(0, 3))
def test_any_order_of_fields_means_the_same_on_every_road(message: Any, chance: random.Random, mixing: int) -> None:
    codec = Codec(SPEC)
    pieces = pieces_of(message)
    if mixing & 1:
        chance.shuffle(pieces)
    if mixing & 2:
        pieces.insert(chance.randint(0, len(pieces)), chance.choice(UNKNOWN))
    agree(codec, b"".join(pieces))


@settings(PATIENT, max_examples=400)
@given(requests, st.randoms(use_true_random=False))
def test_spoilt_bytes_are_refused_or_mean_the_same_on_every_road(message: Any, chance: random.Random) -> None:
    codec = Codec(SPEC)
    data = bytearray(message.SerializeToString())
    agree(codec, bytes(data))  # something is remembered
    for _ in range(chance.randint(1, 3)):
        if not data:
            break
        place = chance.randrange(len(data))
        match chance.randrange(3):
            case 0:
                data[place] = chance.randrange(256)
            case 1:
                del data[place:]
            case _:
                data.insert(place, chance.randrange(256))
    agree(codec, bytes(data))


@settings(PATIENT, max_examples=300)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    agree(Codec(SPEC), data)


def cut_twice(message: Any) -> tuple[Openings, bytes, Cut]:
    codec = Codec(SPEC)
    data = message.SerializeToString()
    codec.read(data)
    codec.read(data)
    return codec.openings, data, codec.openings.cut(data)


@pytest.mark.parametrize("request_id", ["", "7", "x" * 127])
def test_a_request_that_comes_again_is_not_parsed_again(request_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    openings, data, _ = cut_twice(infer_request(("A", "FP32", [1, 3], ROWS), request_id=request_id))
    monkeypatch.setattr(openings, "_parse", None)
    monkeypatch.setattr(openings, "_walk", None)
    cut = openings.cut(data)
    assert (cut.request_id, cut.raw) == (request_id, None)
    other = data.replace(ROWS, bytes(12))
    assert openings.cut(other).opening is cut.opening


def test_other_ids_of_the_same_length_share_an_opening() -> None:
    openings, data, cut = cut_twice(infer_request(("A", "FP32", [1, 3], ROWS), request_id="aa"))
    other = openings.cut(data.replace(b"\x1a\x02aa", b"\x1a\x02bb"))
    assert (other.request_id, other.opening) == ("bb", cut.opening)


def test_a_field_behind_the_tensors_counts() -> None:
    """The last of several model names is the one, and a guess must not miss it."""
    openings, data, _ = cut_twice(infer_request(("A", "FP32", [1, 3], ROWS)))
    assert openings.cut(data + b"\x0a\x01q").opening.model == "q"
    shorter = infer_request(("A", "FP32", [1, 3], ROWS[:-3])).SerializeToString() + b"\x0a\x01q"
    assert len(shorter) == len(data)
    assert openings.cut(shorter).opening.model == "q"


def test_a_guess_counts_only_where_everything_fits() -> None:
    openings, data, _ = cut_twice(infer_request(("A", "FP32", [1, 3], ROWS)))
    for _ in range(2):  # a tensor of a wrong size, which has the length of a message with one more field
        openings.cut(infer_request(("A", "FP32", [1, 3], ROWS + b"123")).SerializeToString())
    assert openings.cut(data + b"\x0a\x01q").opening.model == "q"


def test_what_stands_where_an_id_stood_is_looked_at() -> None:
    with_id = infer_request(("A", "FP32", [1, 3], ROWS), request_id="1")
    openings, data, _ = cut_twice(with_id)
    with_version = infer_request(("A", "FP32", [1, 3], ROWS), version="1").SerializeToString()
    assert len(with_version) == len(data)
    cut = openings.cut(with_version)
    assert (cut.request_id, cut.opening.version) == ("", "1")


def test_what_the_library_reads_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = infer_request(("A", "FP32", [1, 3000], {"fp32_contents": [1.0] * 3000})).SerializeToString()
    raw = infer_request(("A", "FP32", [1, 3000], bytes(12_000))).SerializeToString()
    codec = Codec(SPEC)
    codec.read(typed)
    codec.read(raw + b"\x40\x07")
    monkeypatch.setattr(oip_grpc_cut, "MAX_OPENING_BYTES", 5000)
    monkeypatch.setattr(oip_grpc_cut, "MAX_WHOLE_BYTES", 5000)
    codec.read(raw)
    for message in (typed, raw + b"\x40\x07"):
        with pytest.raises(InvalidRequest, match="send large tensors in raw_input_contents"):
            codec.read(message)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oip_grpc_cut, "REMEMBERED_OPENINGS", 4)
    codec = Codec(SPEC)
    for width in range(1, 20):
        for _ in range(3):
            codec.read(infer_request(("A", "FP32", [1, width], bytes(4 * width))))
        assert len(codec.openings._openings) <= 4
        assert len(codec.openings._places) <= 4
    long = infer_request(("A", "FP32", [1, 3], ROWS), parameters={"mine": "x" * 5000})
    before = dict(codec.openings._openings)
    codec.read(long)
    codec.read(infer_request(("A", "FP32", [1, 3], {"fp32_contents": [1, 2, 3]})))
    assert codec.openings._openings == before


@pytest.mark.parametrize(
    "data", [b"\xff", b"\x0a\x05m", b"\x0a\x01\xff", b"\x1a\x01\xff", b"\x3a\x7f", b"\x2a\x02\x0a\x09"]
)
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="is not a valid inference"):
        Openings().cut(data)


def test_a_large_tensor_is_not_copied() -> None:
    data = infer_request(("A", "FP32", [1, 10_000], bytes(40_000))).SerializeToString()
    codec = Codec(SPEC)
    for _ in range(3):
        tensor = codec.read(data).inputs[0]
        assert tensor is not None
        assert isinstance(tensor.buffer, memoryview)
        assert tensor.buffer.obj is data


def test_what_is_remembered_is_bounded_in_bytes() -> None:
    openings = Openings()
    for number in range(1024):  # 2000 inputs each, of two bytes: some 100 KiB once they are read
        openings.cut(b"\x0a\x06%06d" % number + b"\x2a\x00" * 2000)
        remembered = sum([len(key) if isinstance(key, bytes) else sum(map(len, key)) for key in openings._openings])
        assert remembered <= 512 * 1024
    assert openings._openings
