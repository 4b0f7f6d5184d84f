"""`gateway log ship` and `gateway log feedback`: what is sent, and what is said when it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.cli import main
from gateway.cli_log_ship import Said, item, shipped_line
from gateway.errors import ConfigError
from gateway.inference_log import segments
from gateway.inference_log.sink_state import SinkState

ID = "01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e77"


def said(**given: object) -> Said:
    fields = dict.fromkeys(("label", "old", "new", "row", "who", "note", "key"))
    return Said(request_id=ID, **(fields | given))


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"label": "1"}, {"label": 1}),
        ({"label": "cat"}, {"label": "cat"}),
        ({"label": '"1"'}, {"label": "1"}),
        ({"label": "[1, 2]", "row": 0, "who": "ada"}, {"label": [1, 2], "row": 0, "who": "ada"}),
        ({"old": "1", "new": "two", "key": "k"}, {"override": {"old": 1, "new": "two"}, "idempotency_key": "k"}),
    ],
)
def test_values_are_json_or_text(given: dict[str, object], sent: dict[str, object]) -> None:
    assert item(said(**given)) == {"request_id": ID, **sent}


@pytest.mark.parametrize("given", [{}, {"label": "1", "old": "1", "new": "2"}, {"old": "1"}, {"new": "1"}])
def test_a_label_or_a_change_and_not_both(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="either --label"):
        item(said(**given))


def test_what_a_run_did_in_a_line() -> None:
    after = SinkState(name="postgres", shipped_rows=12, refused_rows=1, missing_rows=2)
    assert shipped_line(None, after) == (
        "12 rows shipped; 1 row refused, see the table gateway_refused; 2 rows of the log could not be read"
    )
    assert shipped_line(SinkState(name="postgres", shipped_rows=11), SinkState(name="postgres", shipped_rows=12)) == (
        "1 row shipped"
    )


def test_the_tables_are_printed_for_whoever_owns_the_database(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["log", "ship", "--print-sql", "--showcase-tables"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("BEGIN;")
    assert "CREATE TABLE gateway_requests" in printed
    assert "inference_metadata" in printed


def test_faults_say_what_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOG_DSN", "postgresql://u:s3cret@127.0.0.1:1/d")
    assert main(["log", "ship", "--dir", str(tmp_path)]) == 2
    assert "--dsn env:NAME" in capsys.readouterr().err
    directory = segments.prepare(tmp_path / "log").directory
    assert main(["log", "ship", "--dir", str(directory), "--dsn", "env:NOT_SET_ANYWHERE"]) == 2
    assert "NOT_SET_ANYWHERE" in capsys.readouterr().err
    assert main(["log", "ship", "--dir", str(directory), "--dsn", "env:LOG_DSN", "--wait", "0.5"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("note: PostgreSQL cannot be reached"), "who waits is told at once what for"
    assert "; trying on for 0.5 s (--wait)" in told
    assert "not everything was shipped within 0.5 s: PostgreSQL cannot be reached" in told
    assert "s3cret" not in told


def test_nobody_there_to_take_feedback(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["log", "feedback", ID, "--label", json.dumps(1), "--ops-url", "http://127.0.0.1:1"])
    assert code == 1
    assert "--ops-url" in capsys.readouterr().err
