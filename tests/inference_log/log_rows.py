"""Frames for tests of the log: every row's payload says which row it is, so that a mix-up shows."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from gateway.inference_log import frame, private_files, segments, wal
from gateway.inference_log.frame import Batch, Column, Detail, Requests, Row
from gateway.inference_log.segments import Layout
from gateway.provenance.headers import UUID7_RANDOM_BYTES, uuid7_block

DAY_S = 86_400
NOON = 1_790_000_000 // DAY_S * DAY_S + DAY_S // 2
"""Seconds since 1970: noon of a UTC day in September 2026."""
BATCH = Batch("a1f3-000042", 64, "onnx-1", 1, 100.001, 100.003, False)


def new_epoch(at: float = NOON) -> str:
    return segments.new_epoch(int(at * 1000), os.urandom(10))


def row(request_id: bytes, *, detail: Detail | None = None, batch: int = 0, batch_row: int = 0) -> Row:
    found = batch != frame.NO_BATCH
    status = 200 if found else 503
    attempt = int(found)
    return Row(
        request_id,
        100.0,
        0.004,
        "http",
        "infer",
        status,
        None,
        1,
        attempt,
        batch,
        batch_row,
        1.0,
        None,
        None,
        None,
        detail,
    )


def requests(numbers: Sequence[int], model: str = "digits", at: float = NOON, digest: str = "sha256:aa") -> Requests:
    """One row a number; input and output are that number and its square, as one FP64 each."""
    ids = uuid7_block(int(at * 1000), os.urandom(UUID7_RANDOM_BYTES), len(numbers))
    inputs = b"".join(struct.pack("<d", number) for number in numbers)
    outputs = b"".join(struct.pack("<d", number * number) for number in numbers)
    return Requests(
        int(at * 1e9),
        100.0,
        model,
        "3",
        digest,
        "",
        [BATCH],
        [row(request_id, batch_row=index) for index, request_id in enumerate(ids)],
        [Column("x", "FP64", None, [(1,)], inputs, None, "keep", None)],
        [Column("y", "FP64", None, [(1,)], outputs, None, "keep", None)],
    )


def encoded(numbers: Sequence[int], model: str = "digits", at: float = NOON) -> bytes:
    return frame.encode(requests(numbers, model, at))


def segment_bytes(epoch: str, number: int, position: int, frames: Sequence[tuple[bytes, int]], *, end: bool) -> bytes:
    """A whole segment as the writer makes it."""
    marker = wal.marker(epoch, number)
    parts = [wal.segment_header(wal.SegmentHeader(epoch, number, position, 0))]
    for data, rows in frames:
        parts += [wal.record_header(marker, position, rows, data), data]
        position += rows
    return b"".join([*parts, wal.end_record(marker, position) if end else b""])


def numbers_in_parquet(directory: Path) -> list[int]:
    """The numbers of all rows in Parquet files that count; checks that each row's output is its input's square."""
    layout = Layout(directory)
    return [n for path in layout.parquet("requests", layout.snapshot()) for n in numbers_in_file(path)]


def numbers_in_file(path: Path) -> list[int]:
    found = []
    for one in pq.ParquetFile(path).read(columns=["inputs", "outputs"]).to_pylist():
        (number,) = struct.unpack("<d", one["inputs"][0]["data"])
        (square,) = struct.unpack("<d", one["outputs"][0]["data"])
        assert square == number * number, "a row's output is not its own"
        found.append(int(number))
    return found


def numbers_in_wal(directory: Path) -> list[int]:
    """The numbers of all rows that are still to be read from the WAL."""
    layout = Layout(directory)
    found = []
    for segment in layout.snapshot().wal:
        data = private_files.read_file(layout.segment(segment))
        for record in wal.read(data, segment.epoch, segment.number).records:
            found += numbers_of(record.payload)
    return found


def numbers_of(payload: bytes | memoryview) -> list[int]:
    one = frame.decode(payload)
    if not isinstance(one, Requests):
        return []
    count = len(one.rows)
    inputs = struct.unpack(f"<{count}d", one.inputs[0].data)
    assert struct.unpack(f"<{count}d", one.outputs[0].data) == tuple(n * n for n in inputs)
    return [int(n) for n in inputs]
