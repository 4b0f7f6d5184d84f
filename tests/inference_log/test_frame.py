"""Frames survive the way there and back, and no bytes are taken for one that are none."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.inference_log import frame
from gateway.inference_log.frame import Batch, Column, Detail, Event, FrameError, Requests, Row

TEXT = st.text(max_size=20)
TIME = st.floats(0, 1e9)
COUNT = st.integers(0, 2**40)
MAYBE = st.none() | TEXT
DETAIL = st.builds(
    Detail,
    error=MAYBE,
    reason=MAYBE,
    backend=MAYBE,
    asked_model=MAYBE,
    parameters=MAYBE,
    executions=st.lists(st.tuples(COUNT, COUNT), max_size=3).map(tuple),
    queued_s=st.none() | TIME,
    cause=MAYBE,
)
ROW = st.builds(
    Row, st.binary(max_size=36), TIME, TIME, TEXT, TEXT, COUNT, st.none() | COUNT, COUNT, COUNT, st.integers(-1, 9),
    COUNT, TIME, MAYBE, MAYBE, MAYBE, st.none() | DETAIL,
)  # fmt: skip
COLUMN = st.builds(
    Column,
    TEXT,
    TEXT,
    st.none() | st.lists(COUNT, max_size=4),
    st.lists(st.lists(COUNT, max_size=3).map(tuple), max_size=3),
    st.binary(max_size=40),
    st.none() | st.lists(COUNT, max_size=4),
    st.sampled_from(["keep", "drop", "hash", "truncate"]),
    st.none() | st.lists(COUNT, max_size=4),
)
BATCH = st.builds(Batch, TEXT, COUNT, TEXT, COUNT, TIME, TIME, st.booleans())
REQUESTS = st.builds(
    Requests, COUNT, TIME, TEXT, TEXT, TEXT, TEXT, st.lists(BATCH, max_size=2), st.lists(ROW, max_size=4),
    st.lists(COLUMN, max_size=2), st.lists(COLUMN, max_size=2),
)  # fmt: skip
EVENT = st.builds(Event, COUNT, st.sampled_from(["lifecycle", "gap", "feedback", "access"]), TEXT, TEXT, TEXT, TEXT)


@given(REQUESTS | EVENT)
def test_what_was_encoded_comes_back(found: Requests | Event) -> None:
    assert frame.decode(frame.encode(found)) == found
    assert frame.rows_in(found) == (len(found.rows) if isinstance(found, Requests) else 1)


@given(st.binary(max_size=200))
def test_other_bytes_are_refused(data: bytes) -> None:
    try:
        found = frame.decode(data)
    except FrameError:
        return
    assert isinstance(found, Requests | Event)


@given(REQUESTS, st.data())
def test_a_changed_byte_is_another_frame_or_none(found: Requests, data: st.DataObject) -> None:
    encoded = bytearray(frame.encode(found))
    place = data.draw(st.integers(0, len(encoded) - 1))
    encoded[place] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(FrameError):
        assert frame.decode(bytes(encoded)) is not found


def test_a_frame_that_ends_early_is_refused() -> None:
    encoded = frame.encode(Event(1, "gap", "dropped", "m", "1", "{}"))
    for length in range(len(encoded)):
        with pytest.raises(FrameError):
            frame.decode(encoded[:length])


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(FrameError):
        frame.decode(b"\x91" * 100_000)


def test_rows_may_be_noted_as_plain_tuples() -> None:
    row = Row(b"id", 1.0, 2.0, "http", "infer", 200, None, 1, 1, -1, 0, 1.0, None, None, None, None)
    made = Requests(1, 1.0, "m", "1", "", "", [], [row], [], [])
    plain = Requests(1, 1.0, "m", "1", "", "", [], [tuple(row)], [], [])  # type: ignore[list-item]
    assert frame.encode(plain) == frame.encode(made)
    assert type(frame.decode(frame.encode(plain)).rows[0]) is Row  # type: ignore[union-attr]


def test_what_a_later_version_appends_does_not_disturb() -> None:
    values = msgspec.msgpack.decode(frame.encode(Event(1, "gap", "dropped", "m", "1", "{}")))
    longer = msgspec.msgpack.encode([*values, "of a later version"])
    assert frame.decode(longer) == Event(1, "gap", "dropped", "m", "1", "{}")
