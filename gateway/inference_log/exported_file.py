"""One exported file: the lines of one model version, labels joined, written in pieces as Parquet, CSV or JSON lines.

Rules:
* What is held is one piece of `PIECE_ROWS` rows, however long the file becomes.
* The columns are those of the plan, their types those of the first piece; whoever adds leaves out what does not fit
  (`flattening.Unfit`).
* The file is there complete or not at all: until `finish` it has another name, which begins with a dot. It is as
  private as the log that it comes from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import orjson

from gateway.inference_log import segments
from gateway.inference_log.flattening import Plan, Values
from gateway.inference_log.rendering import moment
from gateway.inference_log.store import LogReadError

if TYPE_CHECKING:
    import pyarrow as pa

FORMS: Final = {"parquet": ".parquet", "jsonl": ".jsonl", "evidently": ".csv", "nannyml": ".parquet"}
"""What the files end with, by form."""
PIECE_ROWS: Final = 16_384
SHARED: Final = {
    "request_id": "X-Request-Id of the answer",
    "row": "row within the request",
    "timestamp": "when the request was received, UTC",
    "model_version": "version of the model that answered",
    "digest": "SHA-256 of the model version's files",
    "variant": "champion or canary, where traffic was split",
    "target": "last label from feedback",
    "human_override": "last value that a person put in the answer's place",
}
"""Columns that every file has, and what they are."""


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """`path` relative to the directory of the export; `columns`: name → what it is."""

    path: str
    model: str
    version: str | None
    digest: str | None
    requests: int
    rows: int
    labelled: int
    sha256: str
    columns: dict[str, str]
    settings: dict[str, Any]
    """What the program that reads the file wants to be told about its columns."""


class _Sink(Protocol):
    def write(self, table: pa.Table) -> None: ...

    def close(self) -> None: ...


class Output:
    """One file that grows."""

    def __init__(
        self, directory: Path, form: str, key: tuple[Any, ...], plan: Plan, label_types: Mapping[str, type]
    ) -> None:
        self.plan = plan
        self._form = form
        self._model, self._version, self._digest = key
        short = (self._digest or "").removeprefix("sha256:")[:12] or "digest-unknown"
        name = f"{segments.partition_name(self._model)}-{segments.partition_name(self._version or 'unknown')}-{short}"
        self._path = directory / f"{name}{FORMS[form]}"
        self._partial = directory / f".{self._path.name}.partial"
        self._types = label_types
        self._columns: dict[str, list[Values]] = {}
        self._waiting = self._rows = self._requests = self._labelled = 0
        self._sink: _Sink | None = None
        self._schema: pa.Schema | None = None

    def add(self, request: Mapping[str, Any], columns: Mapping[str, Values]) -> None:
        rows = len(next(iter(columns.values())))
        targets, overrides = self._said(request["said"] or (), rows)
        shared = {
            "request_id": np.full(rows, request["request_id"], object),
            "row": np.arange(rows),
            "timestamp": np.full(rows, request["received"], object),
            "model_version": np.full(rows, self._version, object),
            "digest": np.full(rows, self._digest, object),
            "variant": np.full(rows, request["variant"], object),
        }
        for name, array in {**shared, **columns, "target": targets, "human_override": overrides}.items():
            self._columns.setdefault(name, []).append(array)
        self._requests += 1
        self._waiting += rows
        self._labelled += sum(value is not None for value in targets)
        if self._waiting >= PIECE_ROWS:
            self._flush()

    def _said(self, entries: Sequence[Mapping[str, Any]], rows: int) -> tuple[Values, Values]:
        """Labels and overrides of each row, None where there is none; the last word wins."""
        found = {"label": np.full(rows, None, object), "override": np.full(rows, None, object)}
        for entry in entries:
            column, value = found.get(entry["kind"]), orjson.loads(entry["value"] or "null")
            if column is None or value is None:
                continue
            row = entry["row"]
            if row is None and isinstance(value, list) and len(value) == rows:
                for index, one in enumerate(value):
                    column[index] = self._typed(entry["kind"], one)
            elif row is None or 0 <= row < rows:
                column[slice(None) if row is None else row] = self._typed(entry["kind"], value)
        return found["label"], found["override"]

    def _typed(self, kind: str, value: Any) -> Any:
        if self._types[kind] is str:
            return value if isinstance(value, str) else orjson.dumps(value).decode()
        return self._types[kind](value)

    def _flush(self) -> None:
        import pyarrow as pa  # noqa: PLC0415 — heavy

        arrays = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        self._schema = self._schema or self._schema_of(arrays)
        columns = [pa.array(arrays[field.name], field.type, from_pandas=False) for field in self._schema]
        table = pa.Table.from_arrays(columns, schema=self._schema)
        self._sink = self._sink or _open(self._partial, self._form, self._schema)
        self._sink.write(table)
        self._rows += self._waiting
        self._waiting = 0
        self._columns = {}

    def _schema_of(self, arrays: Mapping[str, Values]) -> pa.Schema:
        import pyarrow as pa  # noqa: PLC0415 — heavy

        plain = {int: pa.int64(), float: pa.float64(), str: pa.string()}
        fixed = {
            "timestamp": pa.timestamp("us", "UTC"),
            "target": plain[self._types["label"]],
            "human_override": plain[self._types["override"]],
        }
        kinds = {
            name: fixed.get(name) or (pa.string() if array.dtype == object else pa.from_numpy_dtype(array.dtype))
            for name, array in arrays.items()
        }
        return pa.schema(list(kinds.items()))

    def finish(self) -> ExportedFile:
        """Write the rest, and show the file."""
        if self._waiting:
            self._flush()
        if self._sink is None or self._schema is None:  # made for a request that did not fit its own plan
            raise LogReadError(f"{self._path.name}: nothing was written")
        self._sink.close()
        digest = _digest_of(self._partial)
        self._partial.replace(self._path)
        origins = {name: self.plan.origins.get(name, SHARED.get(name, "")) for name in self._schema.names}
        counts = (self._requests, self._rows, self._labelled)
        settings = _settings(self._form, self.plan, self._schema, labelled=self._labelled > 0)
        return ExportedFile(
            self._path.name, self._model, self._version, self._digest, *counts, digest, origins, settings
        )


def _settings(form: str, plan: Plan, schema: pa.Schema, *, labelled: bool) -> dict[str, Any]:
    import pyarrow as pa  # noqa: PLC0415 — heavy

    text = [name for name in plan.features if pa.types.is_string(schema.field(name).type)]
    features = {
        "numerical_features": [name for name in plan.features if name not in text],
        "categorical_features": text,
        "timestamp": "timestamp",
        "prediction": "prediction" if plan.has_prediction else None,
        "target": "target" if labelled else None,
        "probabilities": list(plan.probabilities),
    }
    if form != "nannyml" or not plan.has_prediction:
        return features
    cases = {0: "regression", 2: "classification_binary"}
    several = {str(index): name for index, name in enumerate(plan.probabilities)}
    probability: Any = plan.probabilities[0] if plan.classes == 2 else several or None
    arguments = {
        "problem_type": cases.get(plan.classes, "classification_multiclass"),
        "y_pred": "prediction",
        "y_pred_proba": probability,
        "y_true": "target",
        "timestamp_column_name": "timestamp",
    }
    return features | {"nannyml": arguments}


def _digest_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _open(path: Path, form: str, schema: pa.Schema) -> _Sink:
    path.touch(mode=0o600)  # as private as the log it comes from
    if FORMS[form] == ".parquet":
        import pyarrow.parquet as pq  # noqa: PLC0415 — heavy

        writer: _Sink = pq.ParquetWriter(path, schema, compression="zstd")
        return writer
    if FORMS[form] == ".csv":
        import pyarrow.csv as pc  # noqa: PLC0415 — heavy

        lines: _Sink = pc.CSVWriter(path, schema)
        return lines
    return _JsonLines(path)


class _JsonLines:
    """One object a line."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")

    def write(self, table: pa.Table) -> None:
        for row in table.to_pylist():
            row["timestamp"] = moment(row["timestamp"])
            self._stream.write(orjson.dumps(row) + b"\n")

    def close(self) -> None:
        self._stream.close()
