"""The log's Arrow tables as records for COPY: what goes into which column of the sink's tables.

Rules:
* Texts hold no NUL character and JSON no escaped one: PostgreSQL takes neither, so U+FFFD stands there. The exact bytes
  of tensors are kept as bytes.
* What is not known is NULL. The showcase's `url` of an error is null: which path was asked for is not logged.
* The showcase's requests and responses hold tensors' values as JSON: only what was kept whole can stand there. An
  answer whose tensors were hashed, truncated, dropped or not drawn has no row in those two, but has its metadata.
* `inference_metadata` says what the gateway knows of the version that answered, as the lifecycle stream states it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import numpy as np
import orjson
import pyarrow as pa

from gateway.core.tensor import DATATYPE, unpack_bytes

Record = tuple[Any, ...]
Known = Mapping[tuple[str, str | None, str | None], Mapping[str, Any]]
"""(model, version, digest) → what the lifecycle stream says of it."""

MAX_REMEMBERED: Final = 4096
_NUL: Final = re.compile(r"((?:^|[^\\])(?:\\\\)*)\\u0000")
_TEXTS: Final = ("client_request_id", "oip_id", "trace_id", "model", "asked_model", "version", "error", "reason")
SERVING: Final = "serving"
"""Kind of the lifecycle entry that states a version's manifest, made before it serves."""
PROVENANCE: Final = ("source", "uri", "immutable_id", "run_id", "git_commit", "datasets", "experiment", "signature")
"""What `inference_metadata` repeats of a version's provenance."""


class Tensor(NamedTuple):
    """One tensor of one row, as `arrow_tables.TENSOR` has it."""

    name: str
    datatype: str
    shape: list[int]
    data: bytes
    policy: str
    bytes: int


def text(value: str | None) -> str | None:
    """As PostgreSQL takes it."""
    return value if value is None or "\0" not in value else value.replace("\0", "\ufffd")


def json_text(value: str | None) -> str | None:
    """JSON as PostgreSQL takes it; what is no JSON becomes a JSON string of itself."""
    if value is None:
        return None
    try:
        orjson.loads(value)
    except orjson.JSONDecodeError:
        value = orjson.dumps(value).decode()
    return _without_nul(value)


def _without_nul(value: str) -> str:
    while "\\u0000" in value and (changed := _NUL.sub(r"\1\\ufffd", value)) != value:
        value = changed
    return value


def _dumped(value: object) -> str:
    return _without_nul(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode())


class RequestRows:
    """One piece's requests, column by column.

    Args:
        table: of `arrow_tables.REQUESTS`.
        epoch: of all its rows.
    """

    def __init__(self, table: pa.Table, epoch: UUID) -> None:
        self.count = table.num_rows
        self._epoch = epoch
        self._columns: dict[str, list[Any]] = {}
        for name in table.column_names:
            if name in ("received", "dispatched", "done"):
                self._columns[f"{name}_us"] = table[name].cast(pa.int64()).to_pylist()
            elif name not in ("inputs", "outputs", "epoch"):
                self._columns[name] = table[name].to_pylist()
        for name in _TEXTS:
            if any(value is not None and "\0" in value for value in self._columns[name]):
                self._columns[name] = [text(value) for value in self._columns[name]]
        for name in ("executions", "parameters"):
            self._columns[name] = [json_text(value) for value in self._columns[name]]
        self._columns["epoch"] = [epoch] * self.count
        self.inputs = tensors(table["inputs"])
        self.outputs = tensors(table["outputs"])

    def records(self, names: Sequence[str]) -> Iterable[Record]:
        """For `postgres_schema.REQUESTS`."""
        described: dict[tuple[Any, ...], str] = {}
        for name, rows in (("input", self.inputs), ("output", self.outputs)):
            self._columns[f"{name}s"] = [None if row is None else _described(row, described) for row in rows]
            self._columns[f"{name}_data"] = [None if row is None else [one.data for one in row] for row in rows]
        return zip(*(self._columns[name] for name in names), strict=True)

    def four(self, names: Sequence[str], known: Known) -> Iterable[Record]:
        """For `postgres_schema.FOUR`; copies that were only compared (shadow) have no place there."""
        column = self._columns
        for index in range(self.count):
            if column["variant"][index] != "shadow":
                row = {name: values[index] for name, values in column.items()}
                values = _showcase(row, self.inputs[index], self.outputs[index], known)
                yield tuple(values.get(name) for name in names)


def tensors(column: pa.ChunkedArray) -> list[list[Tensor] | None]:
    """list<struct> → each row's tensors; None where no payload was kept."""
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        whole = whole.chunk(0) if whole.num_chunks else pa.array([], column.type)
    offsets = whole.offsets.to_numpy()
    if len(offsets) < 2:
        return []
    fields = whole.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0])).flatten()
    cells = [Tensor(*values) for values in zip(*(field.to_pylist() for field in fields), strict=True)]
    starts = (offsets - offsets[0]).tolist()
    present = whole.is_valid().to_pylist()
    return [
        cells[start:end] if there else None for start, end, there in zip(starts[:-1], starts[1:], present, strict=True)
    ]


def _described(row: Sequence[Tensor], remembered: dict[tuple[Any, ...], str]) -> str:
    """Everything of the tensors but their bytes, as JSON; the same again for rows that are alike."""
    key = tuple((one.name, one.datatype, tuple(one.shape), one.policy, one.bytes) for one in row)
    found = remembered.get(key)
    if found is None:
        named = ("name", "datatype", "shape", "policy", "bytes")
        found = _dumped([{name: getattr(one, name) for name in named} for one in row])
        if len(remembered) < MAX_REMEMBERED:
            remembered[key] = found
    return found


def event_records(stream: str, table: pa.Table, epoch: UUID) -> list[Record]:
    """For `postgres_schema.EVENTS`."""
    names = ("kind", "model", "version", "details", "position")
    at = table["at"].cast(pa.int64()).to_pylist()
    rows = zip(at, *(table[name].to_pylist() for name in names), strict=True)
    return [
        (stream, us, text(kind), text(model), text(version), json_text(details), epoch, position)
        for us, kind, model, version, details, position in rows
    ]


def feedback_records(table: pa.Table, epoch: UUID) -> list[Record]:
    """For `postgres_schema.FEEDBACK`; an entry that is not as `feedback.py` writes them is left out of it."""
    found: list[Record] = []
    at = table["at"].cast(pa.int64()).to_pylist()
    for us, kind, details, position in zip(
        at, table["kind"].to_pylist(), table["details"].to_pylist(), table["position"].to_pylist(), strict=True
    ):
        said = orjson.loads(details)
        values = {name: _dumped(said[name]) if name in said else None for name in ("label", "old", "new")}
        found.append(
            (
                *(text(said["request_id"]), said.get("row"), kind, values["label"], values["old"], values["new"]),
                *(text(said.get("who")), said["at_us"], text(said.get("note")), text(said["idempotency_key"])),
                *(us, epoch, position),
            )
        )
    return found


def provenance(table: pa.Table) -> dict[tuple[str, str | None, str | None], dict[str, Any]]:
    """What the lifecycle stream says about versions: by model, version and digest."""
    found: dict[tuple[str, str | None, str | None], dict[str, Any]] = {}
    columns = (table[name].to_pylist() for name in ("kind", "model", "version", "details"))
    for kind, model, version, details in zip(*columns, strict=True):
        said = stated(details)
        if kind == SERVING and model:
            found[model, version, said.get("digest")] = said
    return found


def stated(details: str) -> dict[str, Any]:
    """What a lifecycle entry says; nothing where it is no JSON object."""
    try:
        found = orjson.loads(details)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _showcase(
    row: Mapping[str, Any], inputs: Sequence[Tensor] | None, outputs: Sequence[Tensor] | None, known: Known
) -> dict[str, Any]:
    answered = row["error"] is None and row["status"] < 400
    taken, given = _oip(inputs), _oip(outputs)
    shown = row["oip_id"] or row["request_id"]
    parameters = row["parameters"] or "{}"
    found: dict[str, Any] = {"id": row["request_id"], "at_us": row["received_us"], "parameters": parameters}
    if not answered or (taken is not None and given is not None):
        taken = taken or []
        found["inputs"] = _dumped(taken)
        found["raw_request"] = _dumped({"id": shown, "parameters": orjson.loads(parameters), "inputs": taken})
    if answered and taken is not None and given is not None:
        found |= {"model_name": row["model"], "model_version": row["version"], "given": "{}", "outputs": _dumped(given)}
        answer = {"model_name": row["model"], "model_version": row["version"], "id": shown, "parameters": {}}
        found["raw_response"] = _dumped(answer | {"outputs": given})
    if not answered:
        found["error"] = row["error"] or f"status {row['status']}"
        found["response"] = _dumped(
            {
                "status_code": row["status"],
                "url": None,
                "duration": row["total_ms"] / 1000,
                "method": "POST",
                "headers": {"x-request-id": row["request_id"]},
                "body": _dumped({"error": found["error"]}),
            }
        )
    found["metadata"] = _dumped(_metadata(row, known))
    return found


def _metadata(row: Mapping[str, Any], known: Known) -> dict[str, Any]:
    said = known.get((row["model"], row["version"], row["digest"]), {})
    same = ("model", "version", "digest", "variant", "asked_model", "protocol", "endpoint", "status", "grpc_code")
    return {
        **{name: row[name] for name in same},
        **{name: said.get(name) for name in PROVENANCE},
        "backend": row["backend"],
        "attempt": row["attempt"],
        "batch": {"id": row["batch_id"], "size": row["batch_size"], "row": row["batch_row"]},
        "rows": row["rows"],
        "timings_ms": {"queue": row["queue_ms"], "infer": row["infer_ms"], "total": row["total_ms"]},
        "client_request_id": row["client_request_id"],
        "oip_id": row["oip_id"],
        "trace_id": row["trace_id"],
        "epoch": str(row["epoch"]),
        "position": row["position"],
    }


def _oip(row: Sequence[Tensor] | None) -> list[dict[str, Any]] | None:
    """OIP's JSON tensors; None where something of them was not kept."""
    if row is None or any(one.policy != "keep" for one in row):
        return None
    return [_oip_tensor(one) for one in row]


def _oip_tensor(one: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {"name": one.name, "shape": one.shape, "datatype": one.datatype, "parameters": {}}
    if one.datatype == "BYTES":
        elements = unpack_bytes(one.data)
        try:
            found["data"] = [element.decode() for element in elements]
        except UnicodeDecodeError:
            found["data"] = [base64.b64encode(element).decode() for element in elements]
            found["parameters"] = {"content_type": "base64"}
    elif one.datatype == "BF16":
        found["data"] = (np.frombuffer(one.data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        found["data"] = np.frombuffer(one.data, DATATYPE[one.datatype].numpy)
    return found
