"""Fingerprints, the denylist and the watches over what breaks replicas."""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.poison import (
    ALONE_S,
    CRASHES,
    CrashWatch,
    Denylist,
    OutageWatch,
    QuarantineAllowance,
    fingerprint,
)
from gateway.core.request import InferRequest, InputTensor
from gateway.core.tensor import DATATYPE, DATATYPES, pack_bytes

KEY = b"a secret of this process"


def request(
    *inputs: InputTensor | None, outputs: tuple[int, ...] = (0,), request_id: str | None = None
) -> InferRequest:
    return InferRequest(inputs, 1, 0, None, outputs, request_id)


def values(datatype: str, shape: tuple[int, ...], *elements: Any) -> InputTensor:
    return InputTensor(DATATYPE[datatype], shape, list(elements), None)


def mark(*inputs: InputTensor | None, outputs: tuple[int, ...] = (0,), model: str = "m", version: str = "1") -> bytes:
    return fingerprint(KEY, model, version, request(*inputs, outputs=outputs))


ELEMENTS: dict[str, st.SearchStrategy[Any]] = {
    "BOOL": st.booleans(),
    "UINT8": st.integers(0, 2**8 - 1),
    "INT64": st.integers(-(2**63), 2**63 - 1),
    "FP32": st.floats(width=32, allow_nan=False),
    "FP64": st.floats(allow_nan=False),
}
CODES = {"BOOL": "?", "UINT8": "B", "INT64": "q", "FP32": "f", "FP64": "d"}


@given(st.data(), st.sampled_from(sorted(ELEMENTS)))
def test_json_and_bytes_of_the_same_tensor_meet(data: st.DataObject, datatype: str) -> None:
    elements = data.draw(st.lists(ELEMENTS[datatype], min_size=1, max_size=20))
    shape = (1, len(elements))
    packed = struct.pack(f"<{len(elements)}{CODES[datatype]}", *elements)
    written = values(datatype, shape, *elements)
    for buffer in (packed, memoryview(packed)):
        assert mark(written) == mark(InputTensor(DATATYPE[datatype], shape, None, buffer))
    assert len(mark(written)) == 16


def test_whatever_an_answer_depends_on_counts() -> None:
    one, other = values("FP32", (1, 2), 1.0, 2.0), values("FP32", (1, 2), 1.0, 3.0)
    text = InputTensor(DATATYPE["BYTES"], (1, 2), None, pack_bytes([b"ab", b"c"]))
    shifted = InputTensor(DATATYPE["BYTES"], (1, 2), None, pack_bytes([b"a", b"bc"]))
    marks = [
        mark(one),
        mark(other),
        mark(values("FP32", (2, 1), 1.0, 2.0)),
        mark(values("FP64", (1, 2), 1.0, 2.0)),
        mark(one, other),
        mark(other, one),
        mark(one, None),
        mark(None, one),
        mark(one, outputs=(1,)),
        mark(one, outputs=(0, 1)),
        mark(one, model="n"),
        mark(one, version="2"),
        mark(one, model="m1", version=""),
        mark(text),
        mark(shifted),
        mark(),
    ]
    assert len(set(marks)) == len(marks)


def test_the_callers_id_does_not_count() -> None:
    one = values("FP32", (1, 1), 1.0)
    assert fingerprint(KEY, "m", "1", request(one, request_id="a")) == fingerprint(
        KEY, "m", "1", request(one, request_id="b")
    )


def test_what_a_backend_is_told_beside_the_tensors_is_part_of_it() -> None:
    plain, told, same, other = (request(values("INT64", (1,), 1)) for _ in range(4))
    told.parameters, same.parameters, other.parameters = {"b": 1, "a": "x"}, {"a": "x", "b": 1}, {"a": "y", "b": 1}
    marks = [fingerprint(KEY, "m", "1", one) for one in (plain, told, same, other)]
    assert marks[1] == marks[2]
    assert len(set(marks)) == 3


def test_nobody_can_make_one_without_the_key() -> None:
    one = request(values("INT64", (1,), 1))
    assert fingerprint(b"a", "m", "1", one) != fingerprint(b"b", "m", "1", one)


def test_every_datatype_has_a_fingerprint() -> None:
    marks = {mark(InputTensor(datatype, (1, 0), None, b"")) for datatype in DATATYPES}
    assert len(marks) == len(DATATYPES)


# -- the denylist ------------------------------------------------------------------------------------------------------


def test_a_verdict_holds_for_ten_minutes() -> None:
    denylist = Denylist()
    denylist.deny(b"x", 100.0)
    assert denylist.denied(b"x", 699.9)
    assert not denylist.denied(b"y", 699.9)
    assert not denylist.denied(b"x", 700.0)
    assert len(denylist) == 0
    assert (denylist.statistics().denied, denylist.statistics().hits) == (1, 1)


def test_what_is_found_guilty_again_starts_anew() -> None:
    denylist = Denylist()
    denylist.deny(b"x", 0.0)
    denylist.deny(b"y", 1.0)
    denylist.deny(b"x", 300.0)
    assert denylist.denied(b"x", 800.0)
    assert not denylist.denied(b"y", 800.0)
    denylist.clear()
    assert not denylist.denied(b"x", 800.0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12), st.floats(0.0, 9.0)), max_size=150), st.integers(1, 6))
def test_the_denylist_is_what_it_says_and_never_larger(history: list[tuple[bool, int, float]], most: int) -> None:
    denylist, model, now = Denylist(ttl_s=20.0, most=most), OrderedDict[bytes, float](), 0.0
    for deny, number, passed in history:
        now += passed
        name = bytes([number])
        for old in [key for key, until in model.items() if until <= now]:
            del model[old]
        if deny:
            model.pop(name, None)
            while len(model) >= most:
                model.popitem(last=False)
            model[name] = now + 20.0
            denylist.deny(name, now)
        assert denylist.denied(name, now) == (name in model)
        assert len(denylist) == len(model) <= most
    assert f"{len(model)} of {most}" in repr(denylist)


# -- allowance and watches ---------------------------------------------------------------------------------------------


def test_the_allowance_is_so_many_a_second() -> None:
    allowance = QuarantineAllowance(64.0)
    assert sum(allowance.take(0.0) for _ in range(200)) == 64
    assert sum(allowance.take(0.5) for _ in range(200)) == 32
    assert sum(allowance.take(100.0) for _ in range(200)) == 64
    assert allowance.spent == 160


@given(st.lists(st.floats(0.0, 0.2), max_size=300), st.floats(1.0, 100.0))
def test_the_next_run_may_start_when_it_says(pauses: list[float], per_s: float) -> None:
    allowance, now = QuarantineAllowance(per_s), 0.0
    for pause in pauses:
        now += pause
        then = allowance.next_at(now)
        if allowance.take(now):
            assert then == now
        else:
            assert now < then <= now + 1.0 / per_s + 1e-5
            now = then
            assert allowance.take(now)
    assert allowance.spent <= per_s * (1 + now) + 1e-6
    assert allowance.spent == len(pauses)


def test_more_than_four_crashes_a_minute_isolate_a_model_for_a_while() -> None:
    watch = CrashWatch()
    for turn in range(CRASHES):
        watch.crashed(10.0 * turn)
        assert not watch.alone(10.0 * turn)
    watch.crashed(60.0)
    assert watch.alone(60.0)
    assert watch.alone(59.9 + ALONE_S)
    assert not watch.alone(60.0 + ALONE_S)


@pytest.mark.parametrize("every", [15.1, 60.0])
def test_a_crash_now_and_then_does_not(every: float) -> None:
    watch = CrashWatch()
    for turn in range(50):
        watch.crashed(every * turn)
        assert not watch.alone(every * turn)


def test_an_outage_is_many_failures_without_a_success() -> None:
    watch = OutageWatch()
    seen = []
    for _ in range(64):
        watch.failed()
        seen.append(watch.outage)
    assert seen == [False] * 63 + [True], "63 runs are what halving a batch of 32 guilty rows takes"
    watch.succeeded()
    assert not watch.outage
