"""How long `gateway log show ID` takes on a large log: a whole process, from the shell's exec to its last line.

The log is made here, in the layout and with the writers of the real one: segments of 200 000 rows of a small model in
batches of 8, all of one model and one day, so that no directory name helps; the last segment is left in the WAL.
The files are dropped from nothing: the page cache is as warm as writing them left it.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks.report import Claim, Outcome
from benchmarks.server import BenchmarkError
from gateway.inference_log import arrow_tables, frame, private_files, sealing, segments
from gateway.inference_log.writer import LogWriter, WriterSettings
from gateway.provenance.headers import uuid7_block

SEGMENT_ROWS: Final = 200_000
BATCH: Final = 8
GAP_US: Final = 100
"""Between two requests: 10 000 a second."""
MODEL: Final = "digits"
DIGEST: Final = "sha256:" + "5a" * 32
TARGET_S: Final = 1.0
LOOKUPS: Final = 15


def measure(rows: int, rounds: int) -> Outcome:
    """Make a log of `rows` rows and look requests up in it."""
    outcome = Outcome("log-show", f"gateway log show on {rows:,} rows: seconds of a whole process")
    with tempfile.TemporaryDirectory(prefix="log-show-") as scratch:
        directory = Path(scratch) / "inference-log"
        started = time.perf_counter()
        ids = make_log(directory, rows)
        outcome.figures["seconds to make the log"] = time.perf_counter() - started
        outcome.figures["GB on disk"] = sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()) / 1e9
        dice = random.Random(5)
        lookups = max(LOOKUPS, rounds)
        used = _cpu_s()
        found = [_show(directory, dice.choice(ids)) for _ in range(lookups)]
        outcome.figures["CPU s by request id"] = (_cpu_s() - used) / lookups
        by_client = [_show(directory, f"client-{dice.randrange(rows)}") for _ in range(lookups)]
    outcome.figures["median s by request id"] = median(found)
    outcome.figures["slowest s by request id"] = max(found)
    outcome.figures["median s by the client's id"] = median(by_client)
    outcome.figures["slowest s by the client's id"] = max(by_client)
    outcome.claims.append(Claim("median look-up by request id", median(found), TARGET_S, at_most=True, unit=" s"))
    return outcome


def _cpu_s() -> float:
    """Processor seconds of child processes that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _show(directory: Path, text: str) -> float:
    command = [sys.executable, "-m", "gateway", "log", "show", text, "--json", "--dir", str(directory)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    elapsed = time.perf_counter() - started
    if done.returncode or text not in done.stdout or '"batch_mates"' not in done.stdout:
        raise BenchmarkError(f"gateway log show {text} did not find it: {done.stderr.strip()[:300]}")
    return elapsed


def make_log(directory: Path, rows: int) -> list[str]:
    """Fill a log's directory; returns some of the request ids in it, evenly spread."""
    layout = segments.prepare(directory)
    start_us = (time.time_ns() // 1000) // sealing.DAY_US * sealing.DAY_US - rows * GAP_US - sealing.DAY_US // 4
    epoch = segments.new_epoch(start_us // 1000, os.urandom(10))
    ids: list[str] = []
    pattern = arrow_tables.requests_table([(0, _frame(0, SEGMENT_ROWS))], epoch)
    for first in range(0, rows, SEGMENT_ROWS):
        count = min(SEGMENT_ROWS, rows - first)
        table = _moved(pattern.slice(0, count), epoch, first, start_us)
        _seal(layout, segments.Segment(epoch, first // SEGMENT_ROWS), first, table)
        ids += table["request_id"].take(list(range(0, count, max(1, count // 64)))).to_pylist()
    return ids + _unsealed(directory)


def _frame(start_us: int, rows: int) -> frame.Requests:
    """Requests of one row, in batches of `BATCH`."""
    ids = uuid7_block(start_us // 1000, os.urandom(10), rows)
    batches = [
        frame.Batch(f"b3c4-{n:08d}", BATCH, "onnx-1", 1, 100.001, 100.0021, False)
        for n in range((rows + BATCH - 1) // BATCH)
    ]
    answered = [
        frame.Row(
            ids[n],
            100.0,
            0.0024,
            "http",
            "infer",
            200,
            None,
            1,
            1,
            n // BATCH,
            n % BATCH,
            1.0,
            f"tail-{n}",
            None,
            None,
            None,
        )
        for n in range(rows)
    ]
    values = np.random.default_rng(5).random((2, rows, 4), np.float32)
    inputs = [frame.Column("x", "FP32", None, [(1, 4)], values[0].tobytes(), None, "keep", None)]
    outputs = [frame.Column("y", "FP32", None, [(1, 4)], values[1].tobytes(), None, "keep", None)]
    return frame.Requests(start_us * 1000, 100.0, MODEL, "3", DIGEST, "", batches, answered, inputs, outputs)


def _moved(table: pa.Table, epoch: str, first: int, start_us: int) -> pa.Table:
    """The same requests later: other ids, times, batches and positions."""
    count = len(table)
    position = np.arange(first, first + count)
    received = start_us + position * GAP_US
    moment = {"received": 0, "dispatched": 1000, "done": 2400}
    changed: dict[str, pa.Array] = {
        name: pa.array(received + after).cast(arrow_tables.REQUESTS.field(name).type) for name, after in moment.items()
    }
    changed["request_id"] = _uuid7(received // 1000)
    changed["client_request_id"] = pa.array([f"client-{n}" for n in position.tolist()])
    changed["batch_id"] = pa.array([f"b3c4-{n:08d}" for n in (position // BATCH).tolist()])
    changed["position"] = pa.array(position)
    columns = [changed.get(name, table[name]) for name in arrow_tables.REQUESTS.names]
    return pa.table(columns, schema=arrow_tables.REQUESTS)


def _uuid7(unix_ms: npt.NDArray[np.int64]) -> pa.Array:
    """Random UUIDv7 texts of these instants."""
    raw = np.random.default_rng().integers(0, 256, (len(unix_ms), 16), np.uint8)
    raw[:, :6] = unix_ms.astype(">u8").view(np.uint8).reshape(-1, 8)[:, 2:]
    raw[:, 6] = 0x70 | raw[:, 6] & 0x0F
    raw[:, 8] = 0x80 | raw[:, 8] & 0x3F
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = np.full((len(unix_ms), 36), ord("-"), np.uint8)
    places = [n for n in range(36) if n not in (8, 13, 18, 23)]
    text[:, places[0::2]], text[:, places[1::2]] = digits[raw >> 4], digits[raw & 15]
    offsets = np.arange(0, 36 * (len(unix_ms) + 1), 36).astype(np.int32)
    return pa.Array.from_buffers(pa.string(), len(unix_ms), [None, pa.py_buffer(offsets), pa.py_buffer(text.tobytes())])


def _seal(layout: segments.Layout, segment: segments.Segment, first: int, table: pa.Table) -> None:
    files = []
    for date, mine in sealing.by_day(table):
        path = layout.partition("requests", date, MODEL) / f"{segment.name}.parquet"
        file = sealing.ParquetFile(path, arrow_tables.REQUESTS)
        for at in range(0, len(mine), sealing.CHUNK_ROWS):
            file.add(mine.slice(at, sealing.CHUNK_ROWS))
        extent = file.sync()
        files.append(sealing.describe(layout, file, "requests", MODEL, date, extent))
        file.show()
    end = first + len(table)
    commit = segments.Commit(segment.epoch, segment.number, first, end, len(table), 0, "", 0, files)
    private_files.write_json(layout.commit(segment), commit)


def _unsealed(directory: Path) -> list[str]:
    """A segment as a busy gateway has one; returns an id in it."""
    now_us = time.time_ns() // 1000
    writer = LogWriter(
        directory, segments.new_epoch(now_us // 1000, os.urandom(10)), WriterSettings(queue_bytes=1 << 30)
    )
    writer.start()
    last = ""
    for _ in range(1000):
        made = _frame(now_us, 200)
        writer.offer(frame.encode(made), len(made.rows))
        last = made.rows[-1].request_id.decode()
    writer.close()
    return [last]
