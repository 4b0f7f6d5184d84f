"""From frames to Arrow tables: the columns that are kept, and how frames become them.

Decides the schema of `requests` and of the side streams. Frames come columnar (`frame.py`), so rows are never touched
one by one where numpy or Arrow can take the bytes of many: tensors' data is joined and described by offsets.

Rules:
* (epoch, position) names a row of any stream for ever and is the key to recognise it again.
* What is not known is null: no version, no digest, no batch. A remote server's batch has no digest, because nobody here
  knows from which files it answered.
* `model` is what was served; requests that meant nothing served here have `__unresolved__` there and what they asked
  for in `asked_model`, so that names strangers invent make no partitions.
* `model` is dictionary-encoded: that way readers that know Hive-style directories merge the column of the file with the
  one they derive from the path.
* `inputs` and `outputs` are null where no payload was kept (not drawn, or never decoded); a tensor whose policy dropped
  it is there, with its shape and its original size and no data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gateway.inference_log.frame import Batch, Column, Event, Frame, Requests, Row
from gateway.inference_log.segments import UNRESOLVED

_TIME: Final = pa.timestamp("us", "UTC")
TENSOR: Final = pa.struct(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("datatype", pa.string(), nullable=False),
        pa.field("shape", pa.list_(pa.field("element", pa.int64(), nullable=False)), nullable=False),
        pa.field("data", pa.binary(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
    ]
)
"""One tensor of one row. `data`: little-endian, as served; BYTES length-prefixed. `policy`: keep, drop (no data), hash
(the SHA-256), truncate (the first bytes). `bytes`: size of the whole tensor."""

REQUESTS: Final = pa.schema(
    [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("client_request_id", pa.string()),
        pa.field("oip_id", pa.string()),
        pa.field("trace_id", pa.string()),
        pa.field("received", _TIME, nullable=False),
        pa.field("dispatched", _TIME),
        pa.field("done", _TIME, nullable=False),
        pa.field("model", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("asked_model", pa.string()),
        pa.field("version", pa.string()),
        pa.field("digest", pa.string()),
        pa.field("variant", pa.string()),
        pa.field("protocol", pa.string()),
        pa.field("endpoint", pa.string(), nullable=False),
        pa.field("status", pa.int16(), nullable=False),
        pa.field("grpc_code", pa.int16()),
        pa.field("error", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("backend", pa.string()),
        pa.field("attempt", pa.int32()),
        pa.field("batch_id", pa.string()),
        pa.field("batch_size", pa.int32()),
        pa.field("batch_row", pa.int32()),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("queue_ms", pa.float64()),
        pa.field("infer_ms", pa.float64()),
        pa.field("total_ms", pa.float64(), nullable=False),
        pa.field("executions", pa.string()),
        pa.field("cause", pa.string()),
        pa.field("inputs", pa.list_(pa.field("element", TENSOR, nullable=False))),
        pa.field("outputs", pa.list_(pa.field("element", TENSOR, nullable=False))),
        pa.field("parameters", pa.string()),
        pa.field("sampling", pa.float64(), nullable=False),
        pa.field("epoch", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
    ]
)
"""One request per row. `executions`: JSON list of {batch_id, backend, attempt, size, row} where there were several.
`cause`: request id of the row a shadow's row copies. `sampling`: probability with which such a row keeps payloads."""

EVENTS: Final = pa.schema(
    [
        pa.field("at", _TIME, nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("model", pa.string()),
        pa.field("version", pa.string()),
        pa.field("details", pa.string(), nullable=False),
        pa.field("epoch", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
    ]
)
"""One entry of a side stream per row. `details`: a JSON object."""

_NO_BATCH: Final = Batch("", 0, "", 0, 0.0, 0.0, False)
_Ints = npt.NDArray[np.int64]


def to_tables(frames: Iterable[tuple[int, Frame]], epoch: str) -> dict[str, pa.Table]:
    """(position of its first row, frame) → stream → table, rows in order of position; no stream without rows."""
    requests, events = split(frames)
    tables = {stream: events_table(found, epoch) for stream, found in events.items()}
    if requests:
        tables["requests"] = requests_table(requests, epoch)
    return tables


def split(
    frames: Iterable[tuple[int, Frame]],
) -> tuple[list[tuple[int, Requests]], dict[str, list[tuple[int, Event]]]]:
    """Frames of requests, and the side streams' by stream."""
    requests: list[tuple[int, Requests]] = []
    events: dict[str, list[tuple[int, Event]]] = {}
    for position, frame in frames:
        if isinstance(frame, Requests):
            requests.append((position, frame))
        else:
            events.setdefault(frame.stream, []).append((position, frame))
    return requests, events


def events_table(events: Sequence[tuple[int, Event]], epoch: str) -> pa.Table:
    """A side stream's table."""
    columns = {
        "at": pa.array([event.at_ns // 1000 for _, event in events], _TIME),
        "kind": [event.kind for _, event in events],
        "model": [event.model or None for _, event in events],
        "version": [event.version or None for _, event in events],
        "details": [event.details for _, event in events],
        "epoch": [epoch] * len(events),
        "position": [position for position, _ in events],
    }
    return pa.table(columns, schema=EVENTS)


def requests_table(frames: Sequence[tuple[int, Requests]], epoch: str) -> pa.Table:
    """The table of all rows of these frames.

    Raises:
        ValueError: a frame that contradicts itself (a column of rows that are not there, sizes that do not add up), or
            holds numbers that no column takes.
    """
    try:
        return _requests_table(frames, epoch)
    except (OverflowError, TypeError) as error:
        raise ValueError(str(error)) from error


def _requests_table(frames: Sequence[tuple[int, Requests]], epoch: str) -> pa.Table:
    rows = _Rows()
    inputs, outputs = _Cells(), _Cells()
    for position, frame in frames:
        first, count = rows.count, len(frame.rows)
        for column in frame.inputs:
            inputs.add(column, first, count)
        for column in frame.outputs:
            outputs.add(column, first, count)
        if count:
            rows.add(position, frame)
    arrays = rows.arrays(epoch)
    arrays["inputs"] = inputs.array(rows.count)
    arrays["outputs"] = outputs.array(rows.count)
    return pa.table([arrays[name] for name in REQUESTS.names], schema=REQUESTS)


class _Rows:
    """Everything of the rows but their tensors, gathered as one list a column."""

    def __init__(self) -> None:
        self.count = 0
        self._frames: list[tuple[Any, ...]] = []
        """Per frame: what all of its rows share."""
        self._counts: list[int] = []
        self._rows: list[Row] = []
        self._batches: list[Batch] = []
        """Each row's first execution."""
        self._executions: dict[int, str] = {}

    def add(self, position: int, frame: Requests) -> None:
        base_ns = frame.wall_ns - round(frame.monotonic * 1e9)
        shared = (base_ns, position, frame.model or UNRESOLVED, frame.version, frame.digest, frame.variant or None)
        self._frames.append(shared)
        self._counts.append(len(frame.rows))
        batches = [*frame.batches, _NO_BATCH]  # NO_BATCH is -1: the last
        if not all(-1 <= row.batch < len(frame.batches) for row in frame.rows):
            raise ValueError("a row names a batch that its frame does not have")
        self._batches += [batches[row.batch] for row in frame.rows]
        for index, row in enumerate(frame.rows, self.count):
            if row.detail is not None and row.detail.executions:
                self._executions[index] = _executions(row.detail.executions, frame.batches)
        self._rows += frame.rows
        self.count += len(frame.rows)

    def arrays(self, epoch: str) -> dict[str, pa.Array]:
        if not self.count:
            return {name: pa.array([], REQUESTS.field(name).type) for name in REQUESTS.names}
        counts = np.array(self._counts)
        row = dict(zip(Row._fields, zip(*self._rows, strict=True), strict=True))
        batch = dict(zip(Batch._fields, zip(*self._batches, strict=True), strict=True))
        of_frame = list(zip(*self._frames, strict=True))
        found: dict[str, pa.Array] = {}
        self._places(found, of_frame, counts, epoch)
        self._plain(found, row, batch)
        self._times(found, row, batch, np.repeat(np.array(of_frame[0], np.int64), counts))
        self._details(found, row["detail"], batch["remote"], counts)
        return found

    def _places(self, found: dict[str, pa.Array], of_frame: list[Any], counts: _Ints, epoch: str) -> None:
        _, positions, models, versions, _, variants = of_frame
        starts = np.cumsum(counts) - counts
        found["position"] = pa.array(
            np.arange(self.count) + np.repeat(np.array(positions, np.int64) - starts, counts), pa.int64()
        )
        found["epoch"] = pa.repeat(pa.scalar(epoch), self.count)
        found["model"] = _repeated(models, counts, dictionary=True)
        found["version"] = _repeated([version or None for version in versions], counts)
        found["variant"] = _repeated(variants, counts)

    def _plain(self, found: dict[str, pa.Array], row: dict[str, Any], batch: dict[str, Any]) -> None:
        executed = np.array(row["batch"], np.int64) >= 0
        nothing = ~executed
        found["request_id"] = pa.array(row["request_id"], pa.binary()).cast(pa.string())
        for name in ("client_request_id", "oip_id", "trace_id", "endpoint", "status", "grpc_code", "rows", "sampling"):
            found[name] = pa.array(row[name], REQUESTS.field(name).type)
        found["protocol"] = pa.array([text or None for text in row["protocol"]], pa.string())
        attempt = np.array(row["attempt"], np.int64)
        found["attempt"] = pa.array(attempt, pa.int32(), mask=attempt == 0)
        found["batch_id"] = pa.array(np.array(batch["batch_id"], object), pa.string(), mask=nothing)
        found["batch_size"] = pa.array(np.array(batch["size"], np.int64), pa.int32(), mask=nothing)
        found["batch_row"] = pa.array(np.array(row["batch_row"], np.int64), pa.int32(), mask=nothing)
        found["backend"] = pa.array(np.array(batch["backend"], object), pa.string(), mask=nothing)

    def _times(self, found: dict[str, pa.Array], row: dict[str, Any], batch: dict[str, Any], base_ns: _Ints) -> None:
        received = np.array(row["received"])
        total = np.array(row["total_s"])
        started, finished = np.array(batch["dispatched"]), np.array(batch["finished"])
        known = started > 0
        queued, infer = np.where(known, started - received, np.nan), np.where(known, finished - started, np.nan)
        for index, detail in enumerate(row["detail"]):
            if detail is not None:
                queued[index] = detail.queued_s if detail.queued_s is not None else queued[index]
                infer[index] = detail.infer_s if detail.infer_s is not None else infer[index]
        found["received"] = _moments(received, base_ns)
        found["done"] = _moments(received + total, base_ns)
        found["dispatched"] = _moments(received + queued, base_ns)
        found["queue_ms"] = pa.array(queued * 1000, mask=np.isnan(queued))
        found["infer_ms"] = pa.array(infer * 1000, mask=np.isnan(infer))
        found["total_ms"] = pa.array(total * 1000)

    def _details(
        self, found: dict[str, pa.Array], details: tuple[Any, ...], remote: tuple[bool, ...], counts: _Ints
    ) -> None:
        """Columns that most rows have nothing in, and those that a detail may overrule."""
        rare = ("error", "reason", "parameters", "cause", "asked_model")
        texts: dict[str, list[str | None]] = {name: [None] * self.count for name in (*rare, "executions")}
        versions = backends = None
        for index, detail in enumerate(details):
            if detail is None:
                continue
            for name in rare:
                texts[name][index] = getattr(detail, name)
            if detail.asked_version:
                versions = found["version"].to_pylist() if versions is None else versions
                versions[index] = versions[index] or detail.asked_version
            if detail.backend:
                backends = found["backend"].to_pylist() if backends is None else backends
                backends[index] = backends[index] or detail.backend
        for index, text in self._executions.items():
            texts["executions"][index] = text
        for name, values in texts.items():
            found[name] = pa.array(values, pa.string())
        if versions is not None:
            found["version"] = pa.array(versions, pa.string())
        if backends is not None:
            found["backend"] = pa.array(backends, pa.string())
        digests = _repeated([shared[4] or None for shared in self._frames], counts)
        if any(remote):
            digests = pa.compute.if_else(pa.array(remote), None, digests)
        found["digest"] = digests


class _Cells:
    """The tensors of many rows, gathered column by column; put into the order of the rows at the end."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._counts: list[int] = []
        self._named: list[tuple[str, str, str]] = []
        """Name, datatype and policy of each column."""
        self._shapes: list[int] = []
        self._ranks: list[int] = []
        self._data: list[bytes] = []
        self._sizes: list[int] = []
        self._lengths: list[int] = []

    def add(self, column: Column, first: int, count: int) -> None:
        """A column of a frame whose `count` rows begin at `first`."""
        mine = count if column.rows is None else len(column.rows)
        if mine == 0:
            return
        sizes = [len(column.data) // mine] * mine if column.sizes is None else column.sizes
        lengths = sizes if column.lengths is None else column.lengths
        alike = len(column.shapes) == 1
        if not (len(sizes) == len(lengths) == mine and (alike or len(column.shapes) == mine)):
            raise ValueError(f"the column {column.name!r} does not describe its rows")
        if min(sizes) < 0 or sum(sizes) != len(column.data):
            raise ValueError(f"the column {column.name!r} does not add up to its data")
        if column.rows is None:
            self._rows += range(first, first + count)
        else:
            if column.rows[0] < 0 or column.rows[-1] >= count or any(a >= b for a, b in pairwise(column.rows)):
                raise ValueError(f"the column {column.name!r} names rows that its frame does not have")
            self._rows += [first + row for row in column.rows]
        self._counts.append(mine)
        self._named.append((column.name, column.datatype, column.policy))
        for shape in column.shapes:
            self._shapes += shape * (mine if alike else 1)
            self._ranks += [len(shape)] * (mine if alike else 1)
        self._data.append(column.data)
        self._sizes += sizes
        self._lengths += lengths

    def array(self, rows: int) -> pa.Array:
        """list<TENSOR>, one entry for each of `rows` rows."""
        kind = REQUESTS.field("inputs").type
        if not self._rows:
            return pa.nulls(rows, kind)
        counts = np.array(self._counts)
        names, datatypes, policies = (_repeated(list(values), counts) for values in zip(*self._named, strict=True))
        dims = pa.array(np.array(self._shapes, np.int64))
        shapes = pa.ListArray.from_arrays(_offsets(self._ranks), dims, TENSOR.field("shape").type)
        buffers = [None, pa.py_buffer(_offsets(self._sizes)), pa.py_buffer(b"".join(self._data))]
        data = pa.Array.from_buffers(pa.binary(), len(self._sizes), buffers)
        lengths = pa.array(np.array(self._lengths, np.int64))
        cells = pa.StructArray.from_arrays([names, datatypes, shapes, data, policies, lengths], fields=list(TENSOR))
        owners = np.array(self._rows)
        if bool((np.diff(owners) < 0).any()):
            order = np.argsort(owners, kind="stable")
            cells = cells.take(pa.array(order))
        per_row = np.bincount(owners, minlength=rows)
        mask = pa.array(per_row == 0)
        return pa.ListArray.from_arrays(pa.array(_offsets(per_row)), cells, kind, mask=mask)


def _offsets(sizes: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Where each of pieces of these sizes starts, and where the last ends.

    Raises:
        ValueError: together they are 2 GiB or more.
    """
    found = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(np.asarray(sizes, np.int64), out=found[1:])
    if found[-1] > 2**31 - 1:
        raise ValueError("more than 2 GiB in one table")
    return found.astype(np.int32)


def _repeated(values: Sequence[str | None], counts: _Ints, *, dictionary: bool = False) -> pa.Array:
    """Each value as often as `counts` says."""
    codes = {value: code for code, value in enumerate(dict.fromkeys(values))}
    indexes = np.repeat(np.array([codes[value] for value in values], np.int32), counts)
    known = pa.array(list(codes), pa.string())
    return pa.DictionaryArray.from_arrays(pa.array(indexes), known) if dictionary else known.take(pa.array(indexes))


def _moments(seconds: npt.NDArray[np.float64], base_ns: _Ints) -> pa.Array:
    """Monotonic seconds → timestamps; null where it is not a number."""
    unknown = np.isnan(seconds)
    ns = base_ns + np.round(np.where(unknown, 0.0, seconds) * 1e9).astype(np.int64)
    return pa.array(ns // 1000, pa.int64(), mask=unknown).cast(_TIME)


def _executions(places: Sequence[tuple[int, int]], batches: Sequence[Batch]) -> str:
    """JSON of a request's executions, in order."""
    found = []
    for index, row in places:
        if not 0 <= index < len(batches):
            raise ValueError("a row names a batch that its frame does not have")
        batch = batches[index]
        found.append(
            {
                "batch_id": batch.batch_id,
                "backend": batch.backend,
                "attempt": batch.attempt,
                "size": batch.size,
                "row": row,
            }
        )
    return msgspec.json.encode(found).decode()
