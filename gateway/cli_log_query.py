"""`gateway log query` and what `export` prints: results as a table, JSON, CSV or Parquet.

Rules: rows are written as they come, so a result may be larger than memory; a table is for eyes and ends after
`MAX_ROWS_SHOWN` rows, which it says. Tensors become values in table and JSON; CSV has JSON in such cells; Parquet keeps
every type and every byte.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TextIO

import orjson
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.cli_text import count, harmless
from gateway.errors import ConfigError
from gateway.inference_log.log_queries import explained, running
from gateway.inference_log.rendering import json_text, jsonable
from gateway.inference_log.store import Limits, Store

if TYPE_CHECKING:
    import pyarrow as pa

    from gateway.inference_log.exporting import Exported

FORMATS: Final = ("table", "json", "csv", "parquet")
MAX_ROWS_SHOWN: Final = 200
MAX_CELL: Final = 200
NARROWEST: Final = 8
"""Columns of a terminal that a column of a table needs at least."""


@dataclass(frozen=True, slots=True)
class Wanted:
    sql: str
    form: str | None
    output: Path | None
    memory_mb: int
    threads: int

    def check(self) -> None:
        """
        Raises:
            ConfigError: no such format, or one that does not go where it is wanted.
        """
        if self.form is not None and self.form not in FORMATS:
            raise ConfigError(f"--format {self.form[:32]!r} does not exist; write {', '.join(FORMATS)}")
        if self.form == "parquet" and self.output is None and sys.stdout.isatty():
            raise ConfigError("Parquet is not for a terminal; name a file with -o, or pipe it")


def query(out: Console, err: Console, store: Store, wanted: Wanted) -> None:
    """Run the statement and write its rows.

    Raises:
        QueryError: the statement is wrong or not allowed.
    """
    store = store.limited(Limits(wanted.memory_mb, wanted.threads))
    suffix = wanted.output.suffix.lstrip(".") if wanted.output is not None else ""
    form = wanted.form or (
        suffix if suffix in FORMATS else "table" if out.is_terminal and not wanted.output else "json"
    )
    with running(store, wanted.sql) as reader, explained():
        if form == "table":
            with _text(wanted.output) as stream:
                _table(Console(file=stream, highlight=False) if wanted.output else out, reader)
        elif form == "parquet":
            rows = _parquet(wanted.output, reader)
            err.print(count(rows, "row"), highlight=False)
        else:
            with _text(wanted.output) as stream:
                (_json if form == "json" else _csv)(stream, reader)


@contextmanager
def _text(output: Path | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    try:
        with output.open("w", newline="") as stream:
            yield stream
    except OSError as error:
        raise ConfigError(f"-o {output}: {error.strerror}") from None


def _rows(reader: pa.RecordBatchReader) -> Iterator[dict[str, Any]]:
    for batch in reader:
        yield from batch.to_pylist()


def _json(stream: TextIO, reader: pa.RecordBatchReader) -> None:
    """One array, an object a line."""
    before = "["
    for row in _rows(reader):
        stream.write(before + "\n" + json_text(jsonable(row)))
        before = ","
    stream.write("[]\n" if before == "[" else "\n]\n")


def _csv(stream: TextIO, reader: pa.RecordBatchReader) -> None:
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(reader.schema.names)
    for row in _rows(reader):
        cells = [_cell(value) for value in row.values()]
        writer.writerow([harmless(cell) for cell in cells] if stream.isatty() else cells)


def _parquet(output: Path | None, reader: pa.RecordBatchReader) -> int:
    import pyarrow.parquet as pq  # noqa: PLC0415 — heavy

    rows = 0
    target: Path | BinaryIO = output if output is not None else sys.stdout.buffer
    try:
        with pq.ParquetWriter(target, reader.schema, compression="zstd") as writer:
            for batch in reader:
                writer.write_batch(batch)
                rows += batch.num_rows
    except OSError as error:
        raise ConfigError(f"-o {output}: {error.strerror or error}") from None
    return rows


def _table(out: Console, reader: pa.RecordBatchReader) -> None:
    """As wide as the terminal; where the columns cannot fit, a block a row, without what is empty."""
    table = Table(show_edge=False)
    narrow = len(reader.schema) * NARROWEST > out.width
    names = [f"{name:<{max(map(len, reader.schema.names))}}" for name in reader.schema.names]
    for field in reader.schema:
        numeric = str(field.type).startswith(("int", "uint", "float", "double", "decimal"))
        table.add_column(escape(field.name), overflow="fold", justify="right" if numeric else "left")
    shown = more = 0
    for row in _rows(reader):
        if shown == MAX_ROWS_SHOWN:
            more = 1
            break
        cells = [_short(_cell(value)) for value in row.values()]
        if narrow:
            lines = [f"{name} {cell}" for name, cell in zip(names, cells, strict=True) if cell]
            out.print("\n".join(["", *lines][not shown :]), markup=False, highlight=False, soft_wrap=True)
        else:
            table.add_row(*map(escape, cells))
        shown += 1
    if not narrow:
        out.print(table)
    if more:
        out.print(f"the first {MAX_ROWS_SHOWN} rows; --format json, csv or parquet gives all of them", highlight=False)
    elif shown == 0:
        out.print("no rows", highlight=False)


def _cell(value: Any) -> str:
    plain = jsonable(value)
    if plain is None:
        return ""
    if isinstance(plain, float):
        return f"{plain:.15g}"
    return orjson.dumps(plain).decode() if isinstance(plain, dict | list | bool) else str(plain)


def _short(text: str) -> str:
    clean = harmless(text)
    return clean if len(clean) <= MAX_CELL or "\n" in clean else clean[:MAX_CELL] + "…"


def moment_of(text: str | None, option: str) -> datetime | None:
    """A time as people write it: a date, or date and time; without a zone it is UTC.

    Raises:
        ConfigError: it is none.
    """
    if text is None:
        return None
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{option} {text[:40]!r}: write 2026-11-23 or 2026-11-23T10:00, in UTC") from None
    return read if read.tzinfo else read.replace(tzinfo=UTC)


def show_export(out: Console, result: Exported, directory: Path) -> None:
    """What was written."""
    for file in result.files:
        labels = f", {count(file.labelled, 'label')}" if file.labelled else ""
        out.print(f"{directory / file.path}: {count(file.rows, 'row')}{labels}", markup=False, soft_wrap=True)
    for text in result.notes:
        out.print(f"note: {text}", markup=False, soft_wrap=True)
    if not result.files:
        out.print("nothing to export: no answered request with its tensors was found", markup=False, soft_wrap=True)
