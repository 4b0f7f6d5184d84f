"""A log's directory for tests of reading: written with the real writer, sealed with the real sealer."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gateway.inference_log import frame, sealing, segments
from gateway.inference_log.frame import Event, Frame, Requests
from gateway.inference_log.segments import Layout, Segment
from gateway.inference_log.writer import LogWriter, WriterSettings
from tests.inference_log import log_rows


def write(directory: Path, frames: Sequence[Frame]) -> str:
    """The frames as one epoch, closed; its name."""
    epoch = log_rows.new_epoch(time.time())
    writer = LogWriter(directory, epoch, WriterSettings())
    writer.start()
    for one in frames:
        assert writer.offer(frame.encode(one), frame.rows_in(one))
    writer.close()
    assert writer.statistics().lost_rows == 0
    return epoch


def seal(directory: Path) -> list[Segment]:
    """Every closed segment becomes Parquet."""
    layout = Layout(directory)
    done = [segment for epoch in layout.epochs() for segment in layout.segments(epoch)]
    for segment in done:
        sealing.seal(layout, segment, time.time_ns() // 1000)
        sealing.remove(layout, segment)
    return done


def event(stream: frame.Stream, kind: str, details: dict[str, Any], model: str = "digits", version: str = "3") -> Event:
    return Event(time.time_ns(), stream, kind, model, version, json.dumps(details))


def ids(frame_: Requests) -> list[str]:
    return [row.request_id.decode() for row in frame_.rows]


def new_log(directory: Path) -> Path:
    segments.prepare(directory)
    return directory
