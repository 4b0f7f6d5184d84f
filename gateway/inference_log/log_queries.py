"""SQL over the log: one statement that reads, on views of the log and on nothing else.

The statement is DuckDB's, and so is its parser: what it takes for anything but a SELECT (that is `from …`, `describe`,
`summarize` and `explain` too) is refused before it runs. The connection was locked by `store.py` before.

Rules: a result is streamed, batch by batch; memory and threads are bounded there. Errors are DuckDB's own texts, since
they name what is wrong in the statement, without its stack of notes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from gateway.inference_log.store import VIEWS, LogReadError, Store

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

ROWS_PER_BATCH: Final = 2048
_READING: Final = ("SELECT", "EXPLAIN")


class QueryError(LogReadError):
    """The statement is wrong, not allowed, or asks for too much."""


@contextlib.contextmanager
def running(store: Store, sql: str) -> Iterator[pa.RecordBatchReader]:
    """Run `sql`; the reader gives its rows until the block ends.

    Raises:
        QueryError: see there; also raised while reading, through `explained`.
    """
    with explained(), store.opened(_streams(sql)) as connection:
        _check(connection, sql)
        yield _result(connection, sql)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns what DuckDB raises into QueryError."""
    import duckdb  # noqa: PLC0415 — heavy
    import pyarrow as pa  # noqa: PLC0415 — heavy

    try:
        yield
    except duckdb.IOException as error:
        again = "; if files were merged or deleted while they were read, run it again"
        raise QueryError(_text(str(error)) + again) from None
    except (duckdb.Error, pa.ArrowException) as error:
        raise QueryError(_text(str(error))) from None


def _streams(sql: str) -> list[str]:
    """Streams whose views the statement can be about: those whose name stands anywhere in it."""
    words = set(re.findall(r"[a-z_]+", sql.lower()))
    if {"labels", "labelled"} & words:
        words |= {"requests", "feedback"}
    asks_for_all = {"show", "tables", "query_table", "query", "information_schema", "duckdb_views"} & words
    return [stream for stream, view in VIEWS.items() if asks_for_all or view in words]


def _check(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise QueryError(f"write one statement; these are {len(statements)}")
    kind = statements[0].type.name
    if kind not in _READING:
        raise QueryError(f"the log is read, not changed: write a SELECT; {kind} is refused")


def _result(connection: duckdb.DuckDBPyConnection, sql: str) -> pa.RecordBatchReader:
    relation = connection.sql(sql)
    if relation is None:
        raise QueryError("the statement gives no rows")
    return relation.to_arrow_reader(ROWS_PER_BATCH)


def _text(error: str) -> str:
    """DuckDB's text on one line, without the drawing of the statement and without paths of its own."""
    first = error.split("\n\nLINE", maxsplit=1)[0]
    said = " ".join(first.split())[:600]
    return re.sub(r'Did you mean "sqlite_master"\?', f"There are {', '.join(VIEWS.values())}, labels, labelled", said)
