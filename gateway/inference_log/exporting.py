"""The log as files for other programs: answered requests, flat, labels joined, one file per model version and digest.

    parquet, nannyml   <model>-<version>-<12 hex digits of the digest>.parquet
    evidently          … .csv
    jsonl              … .jsonl
    export.json        every file with its digest, what each column is, and the settings its program needs

Rules:
* Requests are read as a stream and written in pieces (`exported_file.py`): memory does not grow with the log.
* Refused and failed requests, shadows, and requests whose tensors were not kept have no lines; how many there were, by
  reason, stands in `export.json` and is told. Losses that the log recorded are told as well.
* `target` is the last label that was given for a request or a row of it, `human_override` the last value a person
  put in the answer's place; both are empty where nobody said anything. A label of a row that is not there joins
  nothing.
* A directory that holds something already is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import orjson

from gateway.errors import ConfigError
from gateway.inference_log import private_files
from gateway.inference_log.exported_file import FORMS, ExportedFile, Output
from gateway.inference_log.flattening import Roles, Unfit, Values, flatten, plan_of, rows_of
from gateway.inference_log.log_queries import explained
from gateway.inference_log.rendering import moment
from gateway.inference_log.store import Store

if TYPE_CHECKING:
    import duckdb

REQUESTS_PER_BATCH: Final = 1024
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
    outputs: dict[tuple[Any, ...], Output] = {}
    with explained(), store.opened(["requests", "feedback", "gap", "lifecycle"]) as connection:
        kinds, stated = _label_types(connection), _stated_names(connection)
        for request in _answered(connection, selection):
            key = (request["model"], request["version"], request["digest"])
            try:
                tensors = rows_of(request)
                if key not in outputs:
                    _bound(outputs)
                    named = _named(roles, stated.get(key, ()), tensors)
                    outputs[key] = Output(directory, form, key, plan_of(tensors, named), kinds)
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
    private_files.write_whole(directory / "export.json", msgspec.json.format(orjson.dumps(document), indent=2) + b"\n")
