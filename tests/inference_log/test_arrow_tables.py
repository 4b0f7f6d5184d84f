"""Frames become tables: each row with its own values, in its own place, as it was served."""

from __future__ import annotations

import json
import random
import struct
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.inference_log import arrow_tables
from gateway.inference_log.frame import NO_BATCH, Batch, Column, Detail, Event, Requests
from tests.inference_log.log_rows import BATCH, NOON, requests, row


def one(frame: Requests, position: int = 0) -> dict[str, Any]:
    (found,) = arrow_tables.requests_table([(position, frame)], "epoch").to_pylist()
    return dict(found)


def changed(frame: Requests, **fields: Any) -> Requests:
    return Requests(**{name: fields.get(name, getattr(frame, name)) for name in frame.__struct_fields__})


def test_an_answered_request_has_everything_that_is_known() -> None:
    found = one(requests([7]), 41)
    ids = {name: found.pop(name) for name in ("request_id", "received", "dispatched", "done")}
    assert len(ids["request_id"]) == 36
    noon = datetime.fromtimestamp(NOON, UTC)
    assert (ids["received"], ids["dispatched"].microsecond, ids["done"].microsecond) == (noon, 1000, 4000)
    times = {name: found.pop(name) for name in ("queue_ms", "infer_ms", "total_ms")}
    assert times == pytest.approx({"queue_ms": 1.0, "infer_ms": 2.0, "total_ms": 4.0})
    assert found.pop("inputs") == [tensor("x", 7)]
    assert found.pop("outputs") == [tensor("y", 49)]
    assert {name: value for name, value in found.items() if value is not None} == {
        "model": "digits",
        "version": "3",
        "digest": "sha256:aa",
        "protocol": "http",
        "endpoint": "infer",
        "status": 200,
        "backend": "onnx-1",
        "attempt": 1,
        "batch_id": "a1f3-000042",
        "batch_size": 64,
        "batch_row": 0,
        "rows": 1,
        "sampling": 1.0,
        "epoch": "epoch",
        "position": 41,
    }


def tensor(name: str, value: float) -> dict[str, Any]:
    data = struct.pack("<d", value)
    return {"name": name, "datatype": "FP64", "shape": [1], "data": data, "policy": "keep", "bytes": 8}


def test_a_refusal_says_what_was_asked_and_makes_up_nothing() -> None:
    detail = Detail("no model 'x'", "not_found", asked_model="x/../y", asked_version="9", parameters='{"a":1}')
    frame = changed(requests([1]), model="", version="", digest="", batches=[], inputs=[], outputs=[])
    frame = changed(frame, rows=[row(b"i" * 36, detail=detail, batch=NO_BATCH)])
    found = one(frame)
    assert found["model"] == "__unresolved__"
    assert (found["asked_model"], found["version"]) == ("x/../y", "9")
    assert (found["error"], found["reason"], found["parameters"]) == ("no model 'x'", "not_found", '{"a":1}')
    unknown = ("digest", "backend", "attempt", "batch_id", "batch_size", "batch_row", "queue_ms", "infer_ms")
    assert {found[name] for name in (*unknown, "dispatched", "executions")} == {None}
    assert (found["inputs"], found["outputs"]) == (None, None)


def test_a_remote_batch_has_no_digest_and_its_neighbour_keeps_its_own() -> None:
    frame = changed(requests([1, 2]), batches=[BATCH, BATCH._replace(remote=True, backend="triton-a")])
    frame = changed(frame, rows=[row(b"a" * 36), row(b"b" * 36, batch=1)])
    found = arrow_tables.requests_table([(0, frame)], "e").to_pylist()
    assert [(line["backend"], line["digest"]) for line in found] == [("onnx-1", "sha256:aa"), ("triton-a", None)]


def test_several_executions_and_times_of_their_own() -> None:
    detail = Detail(executions=((1, 5), (0, 0)), queued_s=0.25, infer_s=0.5, backend="never")
    second = Batch("b2", 8, "onnx-2", 2, 0.0, 0.0, False)
    found = one(changed(requests([1]), batches=[BATCH, second], rows=[row(b"a" * 36, detail=detail, batch=1)]))
    assert (found["queue_ms"], found["infer_ms"], found["backend"]) == (250.0, 500.0, "onnx-2")
    assert found["dispatched"].microsecond == 250_000
    assert json.loads(found["executions"]) == [
        {"batch_id": "b2", "backend": "onnx-2", "attempt": 2, "size": 8, "row": 5},
        {"batch_id": "a1f3-000042", "backend": "onnx-1", "attempt": 1, "size": 64, "row": 0},
    ]


def test_what_was_not_kept_of_a_tensor_is_said() -> None:
    columns = [
        Column("dropped", "INT8", None, [(4,)], b"", None, "drop", [4]),
        Column("hashed", "BYTES", None, [(1,)], b"h" * 32, None, "hash", [900]),
        Column("cut", "FP32", None, [(9, 9)], b"12", None, "truncate", [324]),
    ]
    found = one(changed(requests([1]), inputs=columns))["inputs"]
    assert [(cell["name"], cell["policy"], cell["data"], cell["bytes"], cell["shape"]) for cell in found] == [
        ("dropped", "drop", b"", 4, [4]),
        ("hashed", "hash", b"h" * 32, 900, [1]),
        ("cut", "truncate", b"12", 324, [9, 9]),
    ]


@settings(max_examples=60)
@given(st.randoms(use_true_random=False))
def test_no_row_ever_carries_anothers_payload(rng: random.Random) -> None:
    """Any mixture of frames, columns that only some rows have, sizes of their own and several tensors a row."""
    frames, expected, position = [], {}, 0
    for _ in range(rng.randrange(1, 6)):
        count = rng.randrange(1, 9)
        ids = [f"{rng.getrandbits(128):036x}".encode() for _ in range(count)]
        kept: list[list[Any]] = [[] for _ in range(count)]
        columns = [column(rng, f"t{index}", count, kept) for index in range(rng.randrange(4))]
        frames.append((position, changed(requests(range(count)), rows=[row(one) for one in ids], inputs=columns)))
        for index, one_id in enumerate(ids):
            expected[one_id.decode()] = (kept[index] or None, position + index)
        position += count
    table = arrow_tables.requests_table(frames, "e")
    table.validate(full=True)
    found = {
        line["request_id"]: (
            line["inputs"] and [(cell["name"], cell["shape"], cell["data"]) for cell in line["inputs"]],
            line["position"],
        )
        for line in table.to_pylist()
    }
    assert found == expected


def column(rng: random.Random, name: str, count: int, kept: list[list[Any]]) -> Column:
    every = rng.random() < 0.5
    rows = list(range(count)) if every else sorted(rng.sample(range(count), rng.randrange(1, count + 1)))
    alike = rng.random() < 0.5
    sizes = [3] * len(rows) if alike else [rng.randrange(5) for _ in rows]
    data = [rng.randbytes(size) for size in sizes]
    for index, value in zip(rows, data, strict=True):
        kept[index].append((name, [len(value)], value))
    shapes: list[tuple[int, ...]] = [(3,)] if alike else [(len(value),) for value in data]
    return Column(
        name, "UINT8", None if every else rows, shapes, b"".join(data), None if alike else sizes, "keep", None
    )


CONTRADICTIONS = [
    Column("x", "UINT8", [0, 5], [(1,)], b"ab", None, "keep", None),
    Column("x", "UINT8", [1, 0], [(1,)], b"ab", None, "keep", None),
    Column("x", "UINT8", [-1, 0], [(1,)], b"ab", None, "keep", None),
    Column("x", "UINT8", None, [(1,)], b"abc", None, "keep", None),
    Column("x", "UINT8", None, [(1,)], b"abc", [1, 1], "keep", None),
    Column("x", "UINT8", None, [(1,)], b"abc", [4, -1], "keep", None),
    Column("x", "UINT8", None, [(1,), (1,), (1,)], b"ab", None, "keep", None),
    Column("x", "UINT8", None, [(1,)], b"ab", None, "truncate", [5]),
]


@pytest.mark.parametrize("bad", CONTRADICTIONS)
def test_a_column_that_contradicts_itself_is_refused(bad: Column) -> None:
    with pytest.raises(ValueError, match="column 'x'"):
        arrow_tables.requests_table([(0, changed(requests([1, 2]), inputs=[bad]))], "e")


def test_a_number_that_no_column_takes_is_refused() -> None:
    vast = Column("x", "UINT8", None, [(0, 2**63)], b"", None, "keep", None)
    many = changed(requests([1]), rows=[row(b"a" * 36)._replace(rows=2**63)])
    for bad in (changed(requests([1]), inputs=[vast]), many):
        with pytest.raises(ValueError, match="too large"):
            arrow_tables.requests_table([(0, bad)], "e")


def test_what_is_said_of_one_row_stands_with_that_row() -> None:
    frame = requests([1, 2, 3])
    detail = Detail(error="no", reason="overloaded", backend="b-2", asked_version="9", parameters="{}", cause="c")
    rows = [frame.rows[0], frame.rows[1]._replace(batch=NO_BATCH, status=503, detail=detail), frame.rows[2]]
    found = arrow_tables.requests_table([(0, changed(frame, rows=rows))], "epoch")
    for name, value in (("error", "no"), ("reason", "overloaded"), ("parameters", "{}"), ("cause", "c")):
        assert found[name].to_pylist() == [None, value, None]
    assert found["backend"].to_pylist() == ["onnx-1", "b-2", "onnx-1"]
    assert found["batch_id"].to_pylist() == ["a1f3-000042", None, "a1f3-000042"]
    assert found["version"].to_pylist() == ["3"] * 3


def test_more_than_one_array_can_hold_is_refused_and_not_wrapped() -> None:
    assert arrow_tables._offsets([2**30, 2**30 - 1]).tolist() == [0, 2**30, 2**31 - 1]
    with pytest.raises(ValueError, match="more than 2 GiB"):
        arrow_tables._offsets([2**30, 2**30])


def test_a_batch_that_is_not_there_is_refused() -> None:
    for rows in ([row(b"a" * 36, batch=1)], [row(b"a" * 36, detail=Detail(executions=((3, 0),)))]):
        with pytest.raises(ValueError, match="batch that its frame does not have"):
            arrow_tables.requests_table([(0, changed(requests([1]), rows=rows))], "e")


def test_streams_are_told_apart() -> None:
    event = Event(NOON * 10**9, "lifecycle", "swapped", "digits", "", '{"to":"4"}')
    tables = arrow_tables.to_tables([(0, requests([1, 2])), (2, event), (3, requests([3]))], "e")
    assert tables["requests"]["position"].to_pylist() == [0, 1, 3]
    (found,) = tables["lifecycle"].to_pylist()
    assert found.pop("at") == datetime.fromtimestamp(NOON, UTC)
    details = {"kind": "swapped", "model": "digits", "version": None, "details": '{"to":"4"}'}
    assert found == details | {"epoch": "e", "position": 2}
    assert set(tables) == {"requests", "lifecycle"}
    assert tables["requests"].schema == arrow_tables.REQUESTS
