"""Frames survive the way there and back, and nothing that was altered on the way is believed."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.batchability import SignatureTensor
from gateway.core.tensor import DATATYPES, MAX_RANK
from gateway.protocol import ipc

GENERATION = 7
dims = st.lists(st.integers(0, 2**40), max_size=MAX_RANK).map(tuple)
u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)
size = st.integers(0, 2**40)
run_inputs = st.lists(st.tuples(u16, size, size, dims), max_size=6)
result_outputs = st.lists(
    st.builds(ipc.ResultOutput, u16, st.sampled_from(DATATYPES), dims, size, size), max_size=6
).map(tuple)


def unframe(frame: bytes) -> tuple[int, int, memoryview]:
    return ipc.decode(memoryview(frame), GENERATION)


def a_run(generation: int = GENERATION) -> bytes:
    inputs = [(0, 0, 64, (4, 4)), (1, 64, 16, (2,))]
    return ipc.encode_run(generation, 42, instance=3, buffer=9, input_size=4096, inputs=inputs, outputs=(0, 2))


@given(identity=st.integers(0, 2**64 - 1), kind=st.integers(ipc.HELLO, ipc.DETACH), payload=st.binary(max_size=300))
def test_frames_round_trip(identity: int, kind: int, payload: bytes) -> None:
    back = unframe(ipc.encode(kind, GENERATION, identity, payload))
    assert (*back[:2], bytes(back[2])) == (kind, identity, payload)


@given(instance=u32, buffer=u32, inputs=run_inputs, outputs=st.lists(u16, max_size=8).map(tuple))
def test_run_round_trips(
    instance: int, buffer: int, inputs: list[tuple[int, int, int, tuple[int, ...]]], outputs: tuple[int, ...]
) -> None:
    area = max((offset + nbytes for _, offset, nbytes, _ in inputs), default=0)
    frame = ipc.encode_run(
        GENERATION, 5, instance=instance, buffer=buffer, input_size=area, inputs=inputs, outputs=outputs
    )
    kind, identity, payload = unframe(frame)
    assert (kind, identity) == (ipc.RUN, 5)
    expected = ipc.Run(instance, buffer, area, tuple(ipc.RunInput(*item) for item in inputs), outputs)
    assert ipc.decode_run(payload) == expected


@given(outputs=result_outputs, times=st.tuples(size, size, size))
def test_result_round_trips(outputs: tuple[ipc.ResultOutput, ...], times: tuple[int, int, int]) -> None:
    area = max((place.offset + place.nbytes for place in outputs), default=0)
    result = ipc.Result(area, *times, outputs)
    kind, identity, payload = unframe(ipc.encode_result(GENERATION, 6, result))
    assert (kind, identity) == (ipc.RESULT, 6)
    assert ipc.decode_result(payload) == result


def test_every_single_bit_flip_of_a_run_is_refused() -> None:
    frame = a_run()
    for bit in range(8 * len(frame)):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(ipc.FrameError):
            ipc.decode(memoryview(flipped), GENERATION)


@given(st.data())
def test_truncated_or_extended_frames_are_refused(data: st.DataObject) -> None:
    frame = a_run()
    cut = data.draw(st.integers(0, len(frame) - 1))
    tail = data.draw(st.binary(min_size=1, max_size=64))
    for wrong in (frame[:cut], frame + tail, frame[:cut] + tail + frame[cut:]):
        with pytest.raises(ipc.FrameError):
            ipc.decode(memoryview(wrong), GENERATION)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(noise: bytes) -> None:
    with pytest.raises(ipc.FrameError):
        ipc.decode(memoryview(noise), GENERATION)


def test_a_frame_of_another_generation_is_refused() -> None:
    with pytest.raises(ipc.FrameError, match="generation 6"):
        unframe(a_run(generation=GENERATION - 1))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ipc.FrameError, match="kind 99"):
        unframe(ipc.encode(99, GENERATION, 0))


@given(st.binary(max_size=120))
def test_payloads_never_raise_anything_but_frame_errors(noise: bytes) -> None:
    for decode in (ipc.decode_run, ipc.decode_result, ipc.decode_load, ipc.decode_number, ipc.decode_hello):
        with contextlib.suppress(ipc.FrameError):
            decode(memoryview(noise))
    with contextlib.suppress(ipc.FrameError):
        ipc.decode_signature(memoryview(noise))


def test_a_tensor_beyond_its_area_is_refused() -> None:
    inputs = [(0, 0, 65, (65,))]
    frame = ipc.encode_run(GENERATION, 1, instance=1, buffer=1, input_size=64, inputs=inputs, outputs=(0,))
    with pytest.raises(ipc.FrameError, match="beyond the input area"):
        ipc.decode_run(unframe(frame)[2])
    place = ipc.ResultOutput(0, DATATYPES[0], (65,), 0, 65)
    frame = ipc.encode_result(GENERATION, 1, ipc.Result(64, 0, 0, 0, (place,)))
    with pytest.raises(ipc.FrameError, match="beyond the output area"):
        ipc.decode_result(unframe(frame)[2])


def test_a_negative_dimension_is_refused() -> None:
    inputs = [(0, 0, 0, (-1,))]
    frame = ipc.encode_run(GENERATION, 1, instance=1, buffer=1, input_size=64, inputs=inputs, outputs=(0,))
    with pytest.raises(ipc.FrameError, match="negative"):
        ipc.decode_run(unframe(frame)[2])


def test_what_does_not_fit_into_a_frame_is_not_sent() -> None:
    inputs = [(n, 0, 0, (1,) * MAX_RANK) for n in range(500)]
    with pytest.raises(ipc.FrameTooLargeError, match="limit of one frame"):
        ipc.encode_run(GENERATION, 1, instance=1, buffer=1, input_size=0, inputs=inputs, outputs=(0,))
    with pytest.raises(ipc.FrameTooLargeError):
        ipc.encode(ipc.HELLO, GENERATION, 0, bytes(ipc.FRAME_LIMIT))
    assert len(ipc.encode(ipc.HELLO, GENERATION, 0, bytes(ipc.FRAME_LIMIT - 28))) == ipc.FRAME_LIMIT


def test_control_payloads_round_trip() -> None:
    load = ipc.Load(4, 2, 1)
    assert ipc.decode_load(memoryview(ipc.encode_load(load))) == load
    assert ipc.decode_number(memoryview(ipc.encode_number(77))) == 77
    hello = ipc.Hello(123, "1.2.3")
    assert ipc.decode_hello(memoryview(ipc.encode_hello(hello))) == hello
    tensors = tuple(SignatureTensor(f"t{d.code}", d, (None, d.code), d.code % 2 == 1) for d in DATATYPES)
    signature = ipc.Signature(tensors, tensors[:1])
    assert ipc.decode_signature(memoryview(ipc.encode_signature(signature))) == signature


def test_tensors_start_aligned() -> None:
    assert [ipc.aligned(n) for n in (0, 1, 63, 64, 65)] == [0, 64, 64, 64, 128]
