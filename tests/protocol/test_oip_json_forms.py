"""What is remembered of accepted requests weakens no check of the next one, and stays small."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.request import InferRequest, SequenceStep
from gateway.errors import InvalidRequest
from gateway.protocol.oip_json import LEARN_EVERY, REMEMBERED_FORMS, REMEMBERED_FRAMES, RequestDecoder

from .oip_samples import (
    ROADS,
    binary_body,
    by_road,
    decoded,
    model,
    naive_bytes,
    of_x,
    packed,
    request_body,
    tensor_spec,
    x_of,
)

# -- the only input's form -------------------------------------------------------------------------------------


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    ("datatype", "good", "bad"),
    [
        ("FP32", "[1,2,3]", ["[1,2]", "[1,2,3,4]", "[]", "[1,true,3]", "[1e400,2,3]"]),
        ("BOOL", "[true,false,true]", ["[true]", "[true,false,true,true]", "[true,1,false]"]),
        ("INT8", "[1,2,3]", ["[1,2,300]", "[1,2,-129]", "[1,2]", "[1,2,3.0]"]),
        ("UINT64", "[1,2,3]", ["[1,2,-1]", "[1,2,18446744073709551616]", "[1,2,3,4]"]),
        ("BYTES", '["a","b","c"]', ['["a","b"]', '["a","b",1]', '["a","b","\\ud800"]']),
    ],
)
def test_an_accepted_request_weakens_no_check_of_the_next(road: str, datatype: str, good: str, bad: list[str]) -> None:
    decoder = RequestDecoder(of_x(datatype))
    for data in bad:
        for _ in range(2):
            decoder.decode(by_road(road, request_body(datatype, good)))
            with pytest.raises(InvalidRequest):
                decoder.decode(by_road(road, request_body(datatype, data)))


def test_remembered_forms_keep_requests_apart() -> None:
    decoder = RequestDecoder(of_x())
    for extra, request_id in (("", None), ('"id":"a",', "a"), ('"id":"",', None), ('"id":"b",', "b")):
        for width in (1, 2, 3):
            for rows in (1, 2):
                data = [float(number) for number in range(rows * width)]
                request = decoder.decode(request_body(data=str(data), shape=f"[{rows},{width}]", extra=extra))
                assert decoded(decoder.spec, request) == {"X": ((rows, width), naive_bytes("FP32", data))}
                assert (request.rows, request.request_id) == (rows, request_id)


def test_remembered_forms_are_bounded() -> None:
    decoder = RequestDecoder(of_x())
    for width in range(REMEMBERED_FORMS + 20):
        decoder.decode(request_body(data=str([1] * width), shape=f"[1,{width}]"))
    assert len(decoder._single) <= REMEMBERED_FORMS


# -- what stood around the elements --------------------------------------------------------------------------

_FRAMES = [
    b'{"inputs":[{"name":"X","shape":[1,3],"datatype":"FP32","data":%b}]}',
    b' {"inputs" : [ {"datatype":"FP32", "name":"X", "shape":[1,3], "data" :\n %b } ] }\n',
    b'{"inputs":[{"data":%b,"name":"X","datatype":"FP32","shape":[1,3]}]}',  # the last list is not the data
    b'{"id":"a[1]","inputs":[{"name":"X","shape":[1,3],"datatype":"FP32","data":%b}]}',
    b'{"inputs":[{"name":"X","shape":[1,3],"datatype":"FP32","data":%b}],"id":"[1,2,3]"}',
    b'{"inputs":[{"name":"X","shape":[1,3],"datatype":"FP32","data":%b}],"id":"\\"data\\":[1,2,3]"}',
    b'{"\\u0069nputs":[{"name":"X","shape":[1,3],"datatype":"FP32","data":%b}]}',
]
_DATA = [
    b"[1,2,3]", b"[4.5,-5e-3,6]", b"[0,0.0,-0.0]", b"[-0,1,2]", b"[1,-0 ,2]", b"[1,2,-0]", b"[-0.5,0,1]", b"[ 7,\t8,9]",
    b"[[1,2,3]]", b"[1,2]", b"[1,2,3,4]", b"[]", b"", b"1", b'["1",2,3]', b"[1,2,true]", b"[1,2,null]", b"[NaN,1,2]",
    b"[1,2,3],", b"[1,2,3", b"1,2,3]", b'[1,2,3],"data":[4,5,6]', b'[1,2,3],"name":"Y"', b"[1,2,1e400]", b"[1,2,3]\xff",
    b'[1,2,3],"parameters":{"binary_data_size":1}', b'[1,2,3]},{"name":"X","data":[1,2,3]', b"[1,2,\xc3\x28]",
]  # fmt: skip


def _outcome(decoder: RequestDecoder, body: bytes) -> object:
    try:
        request = decoder.decode(body)
    except InvalidRequest as error:
        return type(error), str(error)
    tensor = request.inputs[0]
    assert tensor is not None
    return x_of(request), tensor.shape, request.rows, request.nbytes, request.key, request.request_id


@pytest.mark.parametrize("learnt", _FRAMES)
@pytest.mark.parametrize("frame", _FRAMES)
def test_a_body_means_the_same_whatever_was_decoded_before(learnt: bytes, frame: bytes) -> None:
    decoder = RequestDecoder(of_x())
    for first in (b"[1,2,3]", b"[9,8,7]"):
        decoder.decode(learnt % first)
    for data in _DATA:
        body = frame % data
        assert _outcome(decoder, body) == _outcome(RequestDecoder(of_x()), body)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40) | st.text('[]{}",:0123456789.-eE nulX', max_size=40).map(str.encode))
def test_whatever_stands_in_a_known_frame_is_read_as_if_it_were_new(data: bytes) -> None:
    decoder = RequestDecoder(of_x())
    for _ in range(2):
        decoder.decode(_FRAMES[0] % b"[1,2,3]")
    body = _FRAMES[0] % data
    assert _outcome(decoder, body) == _outcome(RequestDecoder(of_x()), body)


def test_a_frame_is_known_after_the_first_of_its_bodies_and_no_other_road_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = RequestDecoder(of_x())
    for data in (b"[1,2,3]", b"[1,2,3]"):
        decoder.decode(_FRAMES[1] % data)

    def refuse(body: bytes) -> InferRequest | None:
        raise AssertionError(body)

    monkeypatch.setattr(decoder, "_decode_typed", refuse)
    assert x_of(decoder.decode(_FRAMES[1] % b"[-4.5,0,6]")) == np.array([-4.5, 0, 6], "<f4").tobytes()


@pytest.mark.parametrize("frame", _FRAMES[2:])
def test_a_frame_is_not_remembered_where_the_elements_cannot_be_told_from_afar(frame: bytes) -> None:
    decoder = RequestDecoder(of_x())
    for _ in range(3 * LEARN_EVERY):
        decoder.decode(frame % b"[1,2,3]")
    assert all(known.opening.endswith(b'"data":') for known in decoder._frames)
    assert all(b'"id"' not in known.opening + known.closing for known in decoder._frames)


def test_frames_are_few_however_many_kinds_of_bodies_come() -> None:
    decoder = RequestDecoder(of_x())
    for number in range(20 * LEARN_EVERY):
        decoder.decode(b" " * number + _FRAMES[0] % b"[1,2,3]")
    assert len(decoder._frames) == REMEMBERED_FRAMES


def test_booleans_in_a_known_frame() -> None:
    decoder = RequestDecoder(of_x("BOOL"))
    for data in ("[true,false,true]", "[false,true,true]", "[false,false,true]"):
        body = request_body("BOOL", data=data)
        assert x_of(decoder.decode(body)) == bytes(json.loads(data))
    with pytest.raises(InvalidRequest):
        decoder.decode(request_body("BOOL", data="[1,0,1]"))


# -- the JSON part before binary tensors ---------------------------------------------------------------------


def test_remembered_headers_are_bounded_and_never_mix_requests() -> None:
    decoder = RequestDecoder(of_x())
    for number in range(REMEMBERED_FORMS * 2 + 10):
        blob = struct.pack("<f", number)
        body, length = binary_body(("X", "FP32", [1, 1], blob), extra=f'"id":"{number}",')
        for _ in range(2):
            request = decoder.decode(body, length)
            assert x_of(request) == blob
            assert request.request_id == str(number)
    assert len(decoder._binary) <= REMEMBERED_FORMS


def test_remembered_header_still_checks_the_blobs() -> None:
    for datatype, blob, bad in (
        ("BOOL", b"\0\1\1", b"\0\1\2"),
        ("BYTES", packed([b"a", b"", b"b"]), packed([b"a", b"c"])),
        ("INT16", bytes(6), b""),
        ("FP32", bytes(12), bytes(8)),
        ("FP16", bytes(6), bytes(8)),
    ):
        decoder = RequestDecoder(of_x(datatype))
        body, length = binary_body(("X", datatype, [1, 3], blob))
        for _ in range(2):
            assert x_of(decoder.decode(body, length)) == blob
            for wrong in (body[:length] + bad, body[:-1], body + b"\0", body[:length]):
                with pytest.raises(InvalidRequest):
                    decoder.decode(wrong, length)


def test_remembered_header_of_many_inputs() -> None:
    spec = model([tensor_spec("A"), tensor_spec("B", "INT8", optional=True), tensor_spec("C", "FP64")])
    decoder = RequestDecoder(spec)
    for number in range(4):
        c, a = struct.pack("<d", number), struct.pack("<ff", number, -number)
        body, length = binary_body(("C", "FP64", [1, 1], c), ("A", "FP32", [1, 2], a), extra='"id":"n",')
        request = decoder.decode(body, length)
        assert decoded(spec, request) == {"A": ((1, 2), a), "C": ((1, 1), c)}
        assert request.inputs[1] is None
        assert request.request_id == "n"


def test_a_remembered_request_keeps_its_options() -> None:
    decoder = RequestDecoder(of_x())
    extra = '"parameters":{"timeout":1500000,"priority":3,"sequence_id":"s","sequence_end":true},'
    body, length = binary_body(("X", "FP32", [1, 1], b"\0\0\0\0"), extra=extra)
    other, other_length = binary_body(("X", "FP32", [1, 1], b"\0\0\0\0"))
    for _ in range(3):
        request = decoder.decode(body, length)
        assert (request.stated_timeout_s, request.priority) == (1.5, 3)
        assert request.sequence == SequenceStep("s", end=True)
        plain = decoder.decode(other, other_length)
        assert (plain.stated_timeout_s, plain.priority, plain.sequence) == (0.0, 0, None)
