"""The log as files for other programs: answered requests, flat, labels joined, one file per model version and digest.

    parquet, nannyml   <model>-<version>-<12 hex digits of the digest>.parquet
    evidently          … .csv
    jsonl              … .jsonl
    export.json        every file with its digest, what each column is, and the settings its program needs

Rules:
* Requests are read as a stream and written in pieces: memory does not grow with the log.
* Refused and failed requests, shadows, and requests whose tensors were not kept have no lines; how many there were, by
  reason, stands in `export.json` and is told. Losses that the log recorded are told as well.
* `target` is the last label that was given for a request or a row of it, `human_override` the last value a person
  put in the answer's place; both are empty where nobody said anything. A label of a row that is not there joins
  nothing.
* A file is there complete or not at all; a directory that holds something already is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
import numpy as np
import orjson

from gateway.errors import ConfigError
from gateway.inference_log import segments
from gateway.inference_log.flattening import Plan, Roles, Unfit, Values, flatten, plan_of, rows_of
from gateway.inference_log.log_queries import explained
from gateway.inference_log.rendering import moment
from gateway.inference_log.store import LogReadError, Store

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

FORMS: Final = {"parquet": ".parquet", "jsonl": ".jsonl", "evidently": ".csv", "nannyml": ".parquet"}
REQUESTS_PER_BATCH: Final = 1024
PIECE_ROWS: Final = 16_384
MAX_FILES: Final = 256
_WANTED: Final = "request_id, received, model, version, digest, variant, sampling, inputs, outputs"
_LABELS: Final = """
with entry as (
    select details ->> 'request_id' as id, cast(details ->> 'row' as bigint) as row, kind,
        cast(coalesce(details -> 'label', details -> 'new') as varchar) as value,
        cast(details ->> 'at_us' as bigint) as said, "at", epoch, position,
        row_number() over (partition by details ->> 'idempotency_key' order by "at", epoch, position) as repeated
    from feedback
)
select id, list(struct_pack(row := row, kind := kind, value := value) order by said, "at", epoch, position) as said
from entry where repeated = 1 group by id
"""
"""What was said of each request, in the order in which it was said, or came; a post that was repeated counts once."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which requests: those of one model, received in [start, end)."""

    model: str | None = None
    start: datetime | None = None
    end: datetime | None = None

    def where(self) -> tuple[str, dict[str, Any]]:
        """As SQL, with its parameters."""
        given = {"model": self.model, "start": self.start, "end": self.end}
        texts = {"model": "model = $model", "start": "received >= $start", "end": "received < $end"}
        used = {name: value for name, value in given.items() if value is not None}
        return " and ".join(["true", *(texts[name] for name in used)]), used


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


@dataclass(slots=True)
class Exported:
    files: list[ExportedFile] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    """Why → requests."""
    notes: list[str] = field(default_factory=list)


def export_log(store: Store, form: str, directory: Path, selection: Selection, roles: Roles) -> Exported:
    """Write the files.

    Raises:
        ConfigError: no such form, or the directory cannot be used.
        LogReadError: the log cannot be read.
    """
    if form not in FORMS:
        raise ConfigError(f"--as {form[:32]!r} does not exist; write {', '.join(FORMS)}")
    _prepare(directory)
    made = Exported()
    outputs: dict[tuple[Any, ...], _Output] = {}
    with explained(), store.opened(["requests", "feedback", "gap", "lifecycle"]) as connection:
        kinds, stated = _label_types(connection), _stated_names(connection)
        for request in _answered(connection, selection):
            key = (request["model"], request["version"], request["digest"])
            try:
                tensors = rows_of(request)
                if key not in outputs:
                    if len(outputs) >= MAX_FILES:
                        raise ConfigError(
                            f"more than {MAX_FILES} versions of models; choose with --model, --from, --to"
                        )
                    named = _named(roles, stated.get(key, ()), tensors)
                    outputs[key] = _Output(directory, form, key, plan_of(tensors, named), kinds)
                outputs[key].add(request, flatten(tensors, outputs[key].plan))
            except Unfit as why:
                made.skipped[str(why)] = made.skipped.get(str(why), 0) + 1
        _left_out(connection, selection, made)
    made.files = [output.finish() for _, output in sorted(outputs.items(), key=lambda item: str(item[0]))]
    made.notes = [
        f"{number} request{'' if number == 1 else 's'} left out: {why}" for why, number in made.skipped.items()
    ] + made.notes
    _describe(directory, form, selection, made)
    return made


def _prepare(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise ConfigError(f"-o {directory}: it holds something already; name a new directory")
    except OSError as error:
        raise ConfigError(f"-o {directory}: {error.strerror}") from None


def _bound(outputs: Mapping[Any, Any]) -> None:
    if len(outputs) >= MAX_FILES:
        raise ConfigError(
            f"more than {MAX_FILES} versions of models lie in this time; choose with --model, --from, --to"
        )


def _label_types(connection: duckdb.DuckDBPyConnection) -> dict[str, type]:
    """Type of the values of `target` and `human_override`: the narrowest that has all of them."""
    said = (
        f"select one.kind as kind, cast(one.value as json) as value from (select unnest(said) as one from ({_LABELS}))"  # noqa: S608 — ours
    )
    # A list is a label for each row.
    each = "unnest(case json_type(value) when 'ARRAY' then cast(value as json[]) else [value] end)"
    sql = f"select distinct kind, json_type(one) as type from (select kind, {each} as one from ({said}))"  # noqa: S608
    found: dict[str, set[str]] = {"label": set(), "override": set()}
    for row in connection.sql(sql).to_arrow_table().to_pylist():
        found.setdefault(row["kind"], set()).add(str(row["type"]))
    return {kind: _type_of(types) for kind, types in found.items()}


def _type_of(types: set[str]) -> type:
    if types <= {"UBIGINT", "BIGINT", "HUGEINT"}:
        return int
    return float if types <= {"UBIGINT", "BIGINT", "HUGEINT", "DOUBLE"} else str


def _stated_names(connection: duckdb.DuckDBPyConnection) -> dict[tuple[Any, ...], tuple[str, ...]]:
    """(model, version, digest) → names of the inputs in the signature that its registry stated when it was served."""
    sql = """select model, version, details ->> 'digest' as digest, details -> 'signature' -> 'inputs' as inputs
        from lifecycle where json_type(details, '$.signature.inputs') = 'ARRAY' order by "at" """
    found: dict[tuple[Any, ...], tuple[str, ...]] = {}
    for row in connection.sql(sql).to_arrow_table().to_pylist():
        entries = orjson.loads(row["inputs"])
        names = [entry["name"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
        if len(names) == len(entries):
            found[row["model"], row["version"], row["digest"]] = tuple(names)
    return found


def _named(roles: Roles, stated: tuple[str, ...], tensors: Mapping[str, Values]) -> Roles:
    """The caller's names; else those of the signature, if it names each column and not whole tensors."""
    width = sum(array.shape[1] for name, array in tensors.items() if name.startswith("in."))
    fits = len(stated) == len(set(stated)) == width
    return roles if roles.features or not fits else replace(roles, features=stated)


def _answered(connection: duckdb.DuckDBPyConnection, selection: Selection) -> Iterator[dict[str, Any]]:
    where, values = selection.where()
    sql = (
        f"select {_WANTED}, said from requests left join ({_LABELS}) as labels on request_id = id "  # noqa: S608 — ours
        f"where status = 200 and coalesce(variant, '') <> 'shadow' and outputs is not null and {where}"
    )
    for batch in connection.sql(sql, params=values).to_arrow_reader(REQUESTS_PER_BATCH):
        yield from batch.to_pylist()


def _left_out(connection: duckdb.DuckDBPyConnection, selection: Selection, made: Exported) -> None:
    where, values = selection.where()
    sql = f"""select count(*) filter (where status <> 200) as failed,
        count(*) filter (where status = 200 and variant = 'shadow') as shadows,
        count(*) filter (where status = 200 and coalesce(variant, '') <> 'shadow' and outputs is null) as bare,
        (select sum(cast(details ->> 'rows' as bigint)) from gaps) as lost from requests where {where}"""  # noqa: S608
    (row,) = connection.sql(sql, params=values).to_arrow_table().to_pylist()
    texts = {"failed": "they were refused or failed", "shadows": "they were shadows, which answer nobody"}
    texts["bare"] = "their tensors were not kept (sampling)"
    for name, text in texts.items():
        if row[name]:
            made.skipped[text] = row[name]
    if row["lost"]:
        made.notes.append(
            f"the log records {row['lost']} lost rows (of any model and time): gateway log query 'from gaps'"
        )


def _describe(directory: Path, form: str, selection: Selection, made: Exported) -> None:
    document = {
        "form": form,
        "selection": {"model": selection.model, "from": moment(selection.start), "to": moment(selection.end)},
        "files": [asdict(file) for file in made.files],
        "left_out": made.skipped,
        "notes": made.notes,
    }
    segments.write_whole(directory / "export.json", msgspec.json.format(orjson.dumps(document), indent=2) + b"\n")


class _Sink(Protocol):
    def write(self, table: pa.Table) -> None: ...

    def close(self) -> None: ...


class _Output:
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
        digest = hashlib.sha256(self._partial.read_bytes()).hexdigest()
        self._partial.replace(self._path)
        origins = {name: self.plan.origins.get(name, SHARED.get(name, "")) for name in self._schema.names}
        counts = (self._requests, self._rows, self._labelled)
        settings = _settings(self._form, self.plan, self._schema, labelled=self._labelled > 0)
        return ExportedFile(
            self._path.name, self._model, self._version, self._digest, *counts, digest, origins, settings
        )


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
