"""What counts as the same request, and a store that never holds more than it may."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.assembly import encode_values
from gateway.core.batch import FinishedBatch
from gateway.core.remembered import MAX_KEYED_BYTES, Remembered, Store, key_of, remember
from gateway.core.request import InferRequest, InputTensor, OutputTensor
from gateway.core.tensor import DATATYPE, element_count, pack_bytes, unpack_bytes

FP32, INT32, INT64, BYTES = (DATATYPE[name] for name in ("FP32", "INT32", "INT64", "BYTES"))


def request_of(
    *inputs: InputTensor | None, outputs: tuple[int, ...] = (0,), request_id: str | None = None
) -> InferRequest:
    nbytes = sum(len(tensor.buffer or b"") for tensor in inputs if tensor is not None)
    return InferRequest(inputs, 1, nbytes, "k", outputs, request_id)


def raw(datatype: str, shape: tuple[int, ...], data: bytes) -> InputTensor:
    return InputTensor(DATATYPE[datatype], shape, None, data)


@pytest.mark.parametrize(
    ("datatype", "values"),
    [("FP32", [0.1, -0.0, 1e39]), ("INT64", [2**62, -1, 0]), ("BOOL", [True, False, True]), ("UINT8", [0, 7, 255])],
)
def test_inputs_hit_alike_whether_they_came_as_json_or_as_bytes(datatype: str, values: list[object]) -> None:
    known = DATATYPE[datatype]
    listed = InputTensor(known, (1, 3), values, None)
    packed = encode_values(known, values)
    assert key_of(b"m", request_of(listed)) == key_of(b"m", request_of(InputTensor(known, (1, 3), None, packed)))
    view = InputTensor(known, (1, 3), None, memoryview(b"xx" + packed)[2:])
    assert key_of(b"m", request_of(listed)) == key_of(b"m", request_of(view))


def test_the_sign_of_zero_counts() -> None:
    keys = {key_of(b"m", request_of(InputTensor(FP32, (1,), [zero], None))) for zero in (0.0, -0.0)}
    assert len(keys) == 2


def test_what_does_not_count() -> None:
    tensor = raw("INT32", (1, 2), bytes(8))
    one, other = request_of(tensor, outputs=(0,), request_id="a"), request_of(tensor, outputs=(1, 2), request_id="b")
    other.priority, other.timeout_s, other.form = 3, 1.5, object()
    assert key_of(b"m", one) == key_of(b"m", other)


DIFFERENT = [
    request_of(raw("INT32", (1, 2), bytes(8))),
    request_of(raw("INT32", (2, 1), bytes(8))),
    request_of(raw("INT32", (2,), bytes(8))),
    request_of(raw("FP32", (1, 2), bytes(8))),
    request_of(raw("INT64", (1,), bytes(8))),
    request_of(raw("INT32", (1, 2), b"\0" * 7 + b"\1")),
    request_of(raw("INT32", (1, 2), bytes(8)), None),
    request_of(None, raw("INT32", (1, 2), bytes(8))),
    request_of(raw("INT32", (1, 1), bytes(4)), raw("INT32", (1, 1), bytes(4))),
    request_of(raw("INT32", (1, 0), b"")),
    request_of(None, None),
    request_of(raw("BYTES", (1,), pack_bytes([b"ab"]))),
    request_of(raw("BYTES", (2,), pack_bytes([b"ab", b""]))),
]


def test_everything_else_does() -> None:
    keys = [key_of(b"m", request) for request in DIFFERENT]
    assert len(set(keys)) == len(DIFFERENT)
    assert set(keys).isdisjoint(key_of(b"n", request) for request in DIFFERENT)


def test_a_scope_cannot_be_taken_for_input() -> None:
    tensor = raw("UINT8", (1,), b"x")
    assert key_of(b"ab", request_of(tensor)) != key_of(b"a", request_of(tensor))


INPUT = st.builds(
    lambda datatype, shape, seed: InputTensor(
        DATATYPE[datatype], tuple(shape), None,
        np.random.default_rng(seed).bytes(element_count(shape) * DATATYPE[datatype].itemsize),
    ),
    st.sampled_from(["UINT8", "INT32", "FP32"]),
    st.lists(st.integers(0, 2), max_size=3),
    st.integers(0, 2),
)  # fmt: skip
INPUTS = st.lists(st.none() | INPUT, max_size=3).map(tuple)


@settings(max_examples=300, deadline=None)
@given(one=INPUTS, other=INPUTS)
def test_keys_are_equal_exactly_for_equal_inputs(
    one: tuple[InputTensor | None, ...], other: tuple[InputTensor | None, ...]
) -> None:
    def content(inputs: tuple[InputTensor | None, ...]) -> object:
        return [t and (t.datatype.name, t.shape, bytes(t.buffer or b"")) for t in inputs]

    equal = content(one) == content(other)
    assert (key_of(b"m", request_of(*one)) == key_of(b"m", request_of(*other))) == equal


def test_large_inputs_are_not_looked_up() -> None:
    request = request_of(raw("UINT8", (1,), b"x"))
    request.nbytes = MAX_KEYED_BYTES + 1
    assert key_of(b"m", request) is None


# -- what is kept ----------------------------------------------------------------------------------------------------


def batch_of(rows: int) -> FinishedBatch:
    numbers = OutputTensor("n", INT32, (rows, 2), memoryview(np.arange(2 * rows, dtype="<i4").tobytes()))
    names = OutputTensor("s", BYTES, (rows, 1), pack_bytes([b"r%d" % row for row in range(rows)]))
    return FinishedBatch("b-1", rows, {0: numbers, 1: names}, "onnx-1", 2, 1.0, 2.0, "full", (1, 2, 3))


def test_a_request_keeps_its_own_rows_and_nothing_of_its_mates() -> None:
    kept = remember(batch_of(4), 1, 2, batched=True)
    assert np.frombuffer(kept.outputs[0].data, "<i4").tolist() == [2, 3, 4, 5]
    assert kept.outputs[0].shape == (2, 2)
    assert unpack_bytes(kept.outputs[1].data) == [b"r1", b"r2"]
    assert all(type(output.data) is bytes for output in kept.outputs.values())
    assert [(e.backend, e.attempt, e.batch_id, e.rows, row) for e, row in kept.executions] == [
        ("onnx-1", 2, "b-1", 4, 1)
    ]


def test_a_model_that_does_not_batch_keeps_the_whole_answer() -> None:
    kept = remember(batch_of(3), 0, 1, batched=False)
    assert kept.outputs[0].shape == (3, 2)


def answer(size: int) -> Remembered:
    return Remembered({0: OutputTensor("y", DATATYPE["UINT8"], (size,), bytes(size))}, ())


def test_an_answer_is_there_until_its_time_is_up() -> None:
    store = Store(10_000, ttl_s=5.0)
    kept = answer(10)
    assert store.put(b"a", kept, 100.0)
    assert store.get(b"a", 104.999) is kept
    assert store.get(b"a", 105.0) is None
    assert (len(store), store.nbytes) == (0, 0)


def test_without_a_time_to_live_nothing_ages() -> None:
    store = Store(10_000, None)
    store.put(b"a", answer(10), 0.0)
    assert store.get(b"a", 1e12) is not None


def test_the_least_recently_used_goes_first() -> None:
    store = Store(3 * answer(100).nbytes, None)
    for key in (b"a", b"b", b"c"):
        store.put(key, answer(100), 0.0)
    store.get(b"a", 0.0)
    store.put(b"d", answer(100), 0.0)
    assert [key for key in (b"a", b"b", b"c", b"d") if store.get(key, 0.0)] == [b"a", b"c", b"d"]


def test_an_answer_larger_than_the_store_pushes_nobody_out() -> None:
    store = Store(2000, None)
    store.put(b"a", answer(10), 0.0)
    assert not store.put(b"b", answer(5000), 0.0)
    assert store.get(b"a", 0.0) is not None
    assert store.get(b"b", 0.0) is None


STEP = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 9), st.integers(0, 1500)),
    st.tuples(st.just("get"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("wait"), st.integers(1, 8), st.just(0)),
)


@settings(max_examples=300, deadline=None)
@given(steps=st.lists(STEP, max_size=60), max_bytes=st.integers(800, 6000), ttl_s=st.none() | st.just(5.0))
def test_the_bound_holds_whatever_happens(
    steps: list[tuple[str, int, int]], max_bytes: int, ttl_s: float | None
) -> None:
    store = Store(max_bytes, ttl_s)
    latest: dict[bytes, tuple[Remembered, float]] = {}
    now = 0.0
    for verb, number, size in steps:
        key = b"%d" % number
        if verb == "put":
            kept = answer(size)
            latest.pop(key, None)
            if store.put(key, kept, now):
                latest[key] = kept, now
        elif verb == "wait":
            now += number
        elif (found := store.get(key, now)) is not None:
            kept, since = latest[key]
            assert found is kept
            assert ttl_s is None or now - since < ttl_s
        entries = list(itertools.chain(store._entries.values()))
        assert store.nbytes == sum(entry.nbytes for entry in entries) <= max_bytes
