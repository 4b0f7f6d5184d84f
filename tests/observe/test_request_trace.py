"""Traces of single requests: which, what is in them, and a file that is one JSON array at all times."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.batch import FinishedBatch
from gateway.core.model import BatchPolicy, ModelSpec, TensorSpec
from gateway.core.request import InferRequest, InputTensor, OutputTensor
from gateway.core.tensor import DATATYPE, pack_bytes
from gateway.observe.request_trace import MAX_TENSOR_BYTES, MAX_WAITING, ModelTracer, TraceFile, TracePlan, append_rows

FP32, BYTES, BF16 = DATATYPE["FP32"], DATATYPE["BYTES"], DATATYPE["BF16"]
SPEC = ModelSpec(
    "m", "3", "sha256:0", "onnxruntime_onnx",
    (TensorSpec("x", FP32, (2,)), TensorSpec("s", BYTES, (1,), optional=True)), (TensorSpec("y", FP32, (1,)),),
    BatchPolicy(8),
)  # fmt: skip
EVERY = TracePlan(timestamps=True, tensors=True, rate=1, count=-1, log_frequency=0)


def request(row: int = 0, request_id: str | None = None, text: bytes | None = None) -> InferRequest:
    x = InputTensor(FP32, (1, 2), [1.5, float(row)], None)
    s = InputTensor(BYTES, (1, 1), None, pack_bytes([text])) if text is not None else None
    made = InferRequest((x, s), 1, 8, "k", (0,), request_id)
    made.received, made.row = 10.0, row
    return made


def batch(*members: InferRequest) -> FinishedBatch:
    data = np.arange(len(members), dtype="<f4").tobytes()
    made = FinishedBatch(
        "b-1", len(members), {0: OutputTensor("y", FP32, (len(members), 1), data)}, "onnx-1", 1, 10.5, 11.0, "full",
        (1_000, 2_000, 3_000),
    )  # fmt: skip
    for member in members:
        member.batch = made
    return made


async def traced(tmp_path: Path, plan: TracePlan, batches: list[list[InferRequest]]) -> list[dict[str, Any]]:
    file = TraceFile(tmp_path / "trace.json", 10**6)
    tracer = ModelTracer(SPEC, file, plan)
    for members in batches:
        tracer.batch(members, batch(*members))
    await file.close()
    return json.loads((tmp_path / "trace.json").read_bytes()) if (tmp_path / "trace.json").exists() else []


async def test_what_a_member_was_answered_with_is_traced(tmp_path: Path) -> None:
    """Outputs of a ragged batch are not rows: each member has a batch of its own."""
    members = [request(0), request(1)]
    whole = batch(*members)
    for place, member in enumerate(members):
        own = batch(member)
        own.outputs[0] = OutputTensor("y", FP32, (1, 2 + place), np.full(2 + place, place, "<f4").tobytes())
        member.row = 0
    file = TraceFile(tmp_path / "trace.json", 10**6)
    whole.outputs[0] = OutputTensor("y", FP32, (5,), bytes(20))
    ModelTracer(SPEC, file, EVERY).batch(members, whole)
    await file.close()
    rows = json.loads((tmp_path / "trace.json").read_bytes())
    tensors = [row["tensor"] for row in rows if row.get("activity") == "TENSOR_BACKEND_OUTPUT"]
    assert [(tensor["shape"], tensor["data"]) for tensor in tensors] == [("1,2", "0.0,0.0"), ("1,3", "1.0,1.0,1.0")]


async def test_what_a_trace_says(tmp_path: Path) -> None:
    members = [request(0), request(1, "mine", "é,".encode())]
    first, _, _, _, head, times, x, s, y = await traced(tmp_path, EVERY, [members])
    number = head["id"]
    assert number == first["id"] + 1
    assert head == {"id": number, "model_name": "m", "model_version": 3, "request_id": "mine"}
    assert [(mark["name"], mark["ns"]) for mark in times["timestamps"]] == [
        ("REQUEST_START", 10_000_000_000),
        ("QUEUE_START", 10_000_000_000),
        ("COMPUTE_START", 10_500_000_000),
        ("COMPUTE_INPUT_END", 10_500_001_000),
        ("COMPUTE_OUTPUT_START", 10_500_003_000),
        ("COMPUTE_END", 11_000_000_000),
        ("REQUEST_END", 11_000_000_000),
    ]
    tensors = [(row["activity"], row["tensor"]) for row in (x, s, y)]
    assert tensors == [
        ("TENSOR_QUEUE_INPUT", {"name": "x", "data": "1.5,1.0", "shape": "1,2", "dtype": "FP32"}),
        ("TENSOR_QUEUE_INPUT", {"name": "s", "data": "é,", "shape": "1,1", "dtype": "BYTES"}),
        ("TENSOR_BACKEND_OUTPUT", {"name": "y", "data": "1.0", "shape": "1,1", "dtype": "FP32"}),
    ]


@pytest.mark.parametrize(
    ("rate", "count", "expected"), [(1, -1, 10), (3, -1, 3), (1, 4, 4), (2, 3, 3), (11, -1, 0), (1, 0, 0)]
)
async def test_one_in_so_many_and_no_more_than_asked_for(tmp_path: Path, rate: int, count: int, expected: int) -> None:
    plan = TracePlan(timestamps=True, tensors=False, rate=rate, count=count, log_frequency=0)
    rows = await traced(tmp_path, plan, [[request(), request()] for _ in range(5)])
    assert len([row for row in rows if "model_name" in row]) == expected


async def test_only_what_was_asked_for_and_small_tensors(tmp_path: Path) -> None:
    large = InferRequest(
        (InputTensor(FP32, (1, 9000), None, bytes(36_000)), InputTensor(BF16, (1, 1), None, b"\x80\x3f")), 1, 1, "k",
        (0,), None,
    )  # fmt: skip
    plan = TracePlan(timestamps=False, tensors=True, rate=1, count=-1, log_frequency=0)
    rows = await traced(tmp_path, plan, [[large]])
    assert not [row for row in rows if "timestamps" in row]
    tensors = {row["tensor"]["name"]: row["tensor"] for row in rows if "tensor" in row}
    assert (tensors["x"]["data"], tensors["x"]["shape"]) == ("", "1,9000")
    assert tensors["s"]["data"] == "16256"
    assert len(json.dumps(rows)) < MAX_TENSOR_BYTES


async def test_a_log_frequency_makes_numbered_files(tmp_path: Path) -> None:
    file = TraceFile(tmp_path / "t", 10**6)
    for n in range(5):
        file.add([{"id": n}], 2)
    await file.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.0", "t.1", "t.2"]
    assert [json.loads((tmp_path / f"t.{n}").read_bytes()) for n in range(3)] == [
        [{"id": 0}, {"id": 1}], [{"id": 2}, {"id": 3}], [{"id": 4}],
    ]  # fmt: skip


async def test_a_file_for_more_traces_than_may_wait_is_filled_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.observe.request_trace.FLUSH_AFTER_S", 0.0)
    monkeypatch.setattr("gateway.observe.request_trace.MAX_WAITING", 4)
    file = TraceFile(tmp_path / "trace.json", 10**6)
    for number in range(16):
        file.add([{"id": number}], 10)
        async with asyncio.timeout(30):
            while len(file._waiting) >= 4:
                await asyncio.sleep(0.001)
    await file.close()
    assert file.dropped == 0
    files = [json.loads((tmp_path / f"trace.json.{n}").read_bytes()) for n in range(2)]
    assert [[row["id"] for row in rows] for rows in files] == [list(range(10)), list(range(10, 16))]


async def test_one_file_is_begun_anew_and_then_continued(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("what was there before")
    file = TraceFile(tmp_path / "t", 10**6)
    for n in range(3):
        file.add([{"id": n}, {"id": n, "more": True}], 0)
        await file.close()
        rows = json.loads((tmp_path / "t").read_bytes())
        assert [row["id"] for row in rows] == sorted([*range(n + 1), *range(n + 1)])


async def test_what_waits_and_what_is_written_is_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = TraceFile(tmp_path / "t", 200)
    for n in range(MAX_WAITING + 7):
        file.add([{"id": n}], 10)
    assert file.dropped == 7
    with caplog.at_level(logging.WARNING):
        await file.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 200
    assert "has reached its largest size" in caplog.text
    file.add([{"id": 1}], 0)
    assert file.dropped == 8


async def test_a_disk_that_refuses_ends_tracing_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = TraceFile(tmp_path / "missing" / "t", 10**6)
    file.add([{"id": 1}], 0)
    await file.close()
    assert "cannot be written" in caplog.text
    file.add([{"id": 2}], 0)
    assert file.dropped == 1


async def test_traces_are_written_soon_without_being_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.observe.request_trace.FLUSH_AFTER_S", 0.0)
    file = TraceFile(tmp_path / "t", 10**6)
    file.add([{"id": 1}], 0)
    async with asyncio.timeout(30):
        while not (tmp_path / "t").exists() or not (tmp_path / "t").stat().st_size:
            await asyncio.sleep(0.001)
    await file.close()
    assert json.loads((tmp_path / "t").read_bytes()) == [{"id": 1}]


@given(st.lists(st.binary(max_size=6).map(lambda data: json.dumps(data.hex()).encode()), min_size=1, max_size=5))
def test_the_file_is_an_array_after_every_write(rows: list[bytes]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "t"
        for n, row in enumerate(rows):
            append_rows(path, row, n == 0)
            assert json.loads(path.read_bytes()) == [json.loads(r) for r in rows[: n + 1]]
