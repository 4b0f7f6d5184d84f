"""SQL over the log reads, and does nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.inference_log.log_queries import QueryError, running
from gateway.inference_log.store import Limits, Store
from tests.inference_log.log_on_disk import event, write
from tests.inference_log.log_rows import requests


@pytest.fixture
def log(tmp_path: Path) -> Store:
    write(
        tmp_path, [requests(range(4)), event("gap", "dropped", {"rows": 3}), event("feedback", "label", {"label": 1})]
    )
    return Store(tmp_path)


def answer(log: Store, sql: str) -> list[dict[str, Any]]:
    with running(log, sql) as reader:
        rows: list[dict[str, Any]] = reader.read_all().to_pylist()
        return rows


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("select count(*) as n from requests", [{"n": 4}]),
        ("SELECT sum(cast(details->>'rows' as bigint)) as n FROM Gaps;", [{"n": 3}]),
        ("with f as (from feedback) select kind from f", [{"kind": "label"}]),
        ("select count(*) as n from lifecycle", [{"n": 0}]),
        ('select count(*) as n from "access" -- and a comment', [{"n": 0}]),
        ("select count(*) as n from requests r join gaps g on r.model = g.model", [{"n": 4}]),
        ("select count(*) as n from labelled", [{"n": 0}]),
        ("select count(*) as n from query('from requests')", [{"n": 4}]),
    ],
)
def test_what_reads_is_answered(log: Store, sql: str, expected: list[dict[str, Any]]) -> None:
    assert answer(log, sql) == expected


def test_columns_can_be_asked_for(log: Store) -> None:
    names = [row["column_name"] for row in answer(log, "describe requests")]
    assert {"request_id", "digest", "inputs", "date"} <= set(names)
    assert answer(log, "explain select 1 from requests")


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("drop view requests", "DROP is refused"),
        ("delete from requests", "DELETE is refused"),
        ("copy requests to 'x.parquet'", "COPY is refused"),
        ("create table t as select 1", "CREATE is refused"),
        ("set threads = 8", "SET is refused"),
        ("pragma database_list", "PRAGMA is refused"),
        ("attach 'x.db'", "ATTACH is refused"),
        ("install httpfs", "LOAD is refused"),
        ("select 1; drop view requests", "write one statement; these are 2"),
        ("", "write one statement; these are 0"),
        ("selec 1", "syntax error"),
        ("select nothing from requests", "nothing"),
        ("select * from read_text('/etc/hostname')", "Cannot access file"),
        ("select cast('x' as int)", "Could not convert"),
        ("select * from requests where", "syntax error"),
    ],
)
def test_everything_else_is_refused_in_words(log: Store, sql: str, said: str) -> None:
    with pytest.raises(QueryError, match=said) as caught:
        answer(log, sql)
    assert "\n" not in str(caught.value)


def test_memory_is_bounded(log: Store) -> None:
    with pytest.raises(QueryError, match="memory"):
        answer(log.limited(Limits(memory_mb=64, threads=1)), "select list(range) from range(100000000)")
