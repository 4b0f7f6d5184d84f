"""Rows of the log as people and programs read them: tensors as values, one request as one document.

Rules: pure. Values are those of the bytes that are kept, by datatype: numbers little-endian and row-major, BYTES with
length prefixes, text where it is UTF-8 and {"base64": …} where it is not. What was not kept is said, never made up: a
tensor that was dropped, hashed or truncated has a `note`, and only a tensor that was kept whole has a nested form.
JSON has no NaN and no infinities: they become "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from gateway.core.tensor import DATATYPE, element_count, unpack_bytes

_UNSEEN: Final = {
    code: f"\\u{code:04x}"
    for code in (*range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
}
"""What JSON lets stand as it is, and terminals obey: DEL, C1 (0x9b is ESC [), marks that turn text around."""
_TENSOR_KEYS: Final = frozenset(("name", "datatype", "shape", "data", "policy", "bytes"))


def values_of(tensor: Mapping[str, Any]) -> npt.NDArray[Any] | list[bytes] | None:
    """What is kept of a tensor, flat: numbers as an array (BF16 as float32), BYTES as a list; None: nothing readable.

    A truncated tensor gives the elements that are whole.
    """
    datatype, data = DATATYPE.get(tensor["datatype"]), tensor["data"]
    if datatype is None or tensor["policy"] in ("drop", "hash"):
        return None
    try:
        if datatype.kind == "bytes":
            return _elements(data, whole=tensor["policy"] == "keep")
        whole = len(data) // datatype.itemsize * datatype.itemsize
        array = np.frombuffer(data[:whole], datatype.numpy)
    except ValueError:
        return None
    if datatype.name == "BF16":
        return (array.astype("<u4") << np.uint32(16)).view("<f4")
    return array


def _elements(data: bytes, *, whole: bool) -> list[bytes]:
    """BYTES elements; of truncated data those that are complete. ValueError if `whole` data is not."""
    if whole:
        return unpack_bytes(data)
    found, at = [], 0
    while at + 4 <= len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data):
            break
        found.append(data[at + 4 : end])
        at = end
    return found


def note_of(tensor: Mapping[str, Any]) -> str:
    """What is not kept of a tensor, in words; empty where all of it is."""
    size = f"{tensor['bytes']} bytes"
    match tensor["policy"]:
        case "keep":
            return ""
        case "hash":
            return f"{size}, of which the SHA-256 is kept: {tensor['data'].hex()}"
        case "truncate":
            return f"{size}, of which the first {len(tensor['data'])} are kept"
        case _:
            return f"{size}, not kept"


def document_of(tensor: Mapping[str, Any]) -> dict[str, Any]:
    """A tensor as OIP writes it in JSON, with a `note` where it is not whole: `data` is flat then, or absent."""
    found = {"name": tensor["name"], "datatype": tensor["datatype"], "shape": list(tensor["shape"])}
    note, values = note_of(tensor), values_of(tensor)
    if values is not None and (values_plain := plain(values)) is not None:
        found["data"] = values_plain if note else _nested(values_plain, found["shape"])
    elif not note:
        note = "the bytes are not what the datatype says; they are given as base64"
        found["base64"] = base64.b64encode(tensor["data"]).decode()
    if note:
        found["note"] = note
    return found


def plain(values: npt.NDArray[Any] | list[bytes]) -> list[Any]:
    """Values that JSON has: FP32 by the shortest decimal that means the same number."""
    if isinstance(values, list):
        return [_text(element) for element in values]
    if values.dtype.kind != "f":
        found: list[Any] = values.tolist()
        return found
    short = values.dtype.itemsize < 8
    numbers = [float(text) for text in values.astype("U32").tolist()] if short else values.tolist()
    if np.isfinite(values).all():
        return numbers
    return [number if np.isfinite(number) else _odd(number) for number in numbers]


def _odd(number: float) -> str:
    return "NaN" if number != number else "Infinity" if number > 0 else "-Infinity"  # noqa: PLR0124 — that is NaN's mark


def _text(element: bytes) -> Any:
    try:
        return element.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(element).decode()}


def _nested(values: list[Any], shape: Sequence[int]) -> Any:
    """Flat values as nested lists; flat where they do not fill the shape."""
    if element_count(list(shape)) != len(values):
        return values
    if not shape:
        return values[0]
    nested: list[Any] = values
    for size in reversed(shape[1:]):
        if size == 0:
            return []
        nested = [nested[at : at + size] for at in range(0, len(nested), size)]
    return nested


def request_document(row: Mapping[str, Any], mates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of `requests` as a document; what is not known is null."""
    return {
        "request_id": row["request_id"],
        "client_request_id": row["client_request_id"],
        "oip_id": row["oip_id"],
        "trace_id": row["trace_id"],
        "received": moment(row["received"]),
        "dispatched": moment(row["dispatched"]),
        "done": moment(row["done"]),
        "model": {key: row[key] for key in ("model", "asked_model", "version", "digest", "variant")},
        "request": {
            "protocol": row["protocol"],
            "endpoint": row["endpoint"],
            "rows": row["rows"],
            "parameters": _json(row["parameters"]),
            "inputs": _tensors(row["inputs"]),
        },
        "response": {
            "status": row["status"],
            "grpc_code": row["grpc_code"],
            "error": row["error"],
            "reason": row["reason"],
            "outputs": _tensors(row["outputs"]),
        },
        "execution": {
            "backend": row["backend"],
            "attempt": row["attempt"],
            "batch_id": row["batch_id"],
            "batch_size": row["batch_size"],
            "batch_row": row["batch_row"],
            "executions": _json(row["executions"]),
            "batch_mates": [mate["request_id"] for mate in mates],
        },
        "timings_ms": {"queue": row["queue_ms"], "infer": row["infer_ms"], "total": row["total_ms"]},
        "sampling": row["sampling"],
        "cause": row["cause"],
        "place": {"epoch": row["epoch"], "position": row["position"]},
    }


def _tensors(tensors: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    return None if tensors is None else [document_of(tensor) for tensor in tensors]


def _json(text: str | None) -> Any:
    """JSON of the log's own columns; the text itself where it is none."""
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return text


def moment(value: datetime | None) -> str | None:
    """ISO 8601 in UTC, microseconds: `2026-11-23T11:28:20.142633Z`."""
    if value is None:
        return None
    return value.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def json_text(document: Any, *, indented: bool = False) -> str:
    """JSON that does a terminal no harm, whatever clients wrote; read back it is the same."""
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 if indented else None).decode().translate(_UNSEEN)


def _is_tensor(value: Mapping[str, Any]) -> bool:
    """Whether it is a tensor as the log keeps it, and not what a query made of one."""
    if not value.keys() >= _TENSOR_KEYS or not isinstance(value["bytes"], int) or not isinstance(value["shape"], list):
        return False
    kept = isinstance(value["data"], bytes) or (value["data"] is None and value["policy"] == "drop")
    return kept and all(isinstance(value[key], str) for key in ("name", "datatype", "policy"))


def jsonable(value: Any) -> Any:  # noqa: PLR0911 — a kind of value each
    """Any value out of a query as JSON has it: a tensor as values, other bytes as base64, times as ISO 8601."""
    if isinstance(value, dict):
        if _is_tensor(value):
            return document_of(value)
        return {str(key): jsonable(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(element) for element in value]
    if isinstance(value, datetime):
        return moment(value) if value.tzinfo else value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not np.isfinite(value):
        return _odd(value)
    if isinstance(value, date):
        return value.isoformat()
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
