"""`gateway log …`: what people and programs get to see, and that each reading is itself recorded."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from gateway import cli_log, cli_log_tail
from gateway.cli import main
from gateway.errors import ConfigError
from gateway.inference_log.frame import NO_BATCH, Column, Detail, Requests
from gateway.inference_log.store import Store
from tests.inference_log.log_on_disk import event, ids, seal, write
from tests.inference_log.log_rows import NOON, requests

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GATEWAY_CONFIG", "GATEWAY_INFERENCE_LOG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Four answered requests and one refused; `answered[1]` has a label and a known origin."""
    directory = tmp_path / "inference-log"
    made = requests(range(4))
    refused = requests([9])
    rows = [
        refused.rows[0]._replace(
            batch=NO_BATCH,
            status=404,
            attempt=0,
            rows=0,
            client_request_id="mine",
            detail=Detail(error="no model 'n\x1b[2Jope' is served", reason="not_found", asked_model="n\x1b[2Jope"),
        )
    ]
    origin = {"source": "models:/digits@champion", "uri": "models:/digits/3", "run_id": "r17", "digest": "sha256:aa"}
    loaded = event("lifecycle", "serving", origin)
    early = type(loaded)((NOON - 60) * 10**9, "lifecycle", "serving", "digits", "3", loaded.details)
    label = {"request_id": ids(made)[1], "row": None, "label": 7, "who": "anna", "at_us": 5, "idempotency_key": "k"}
    other = Requests(refused.wall_ns, 100.0, "", "", "", "", [], rows, [], [])
    write(
        directory,
        [
            early,
            made,
            other,
            event("feedback", "label", label),
            event("gap", "dropped", {"rows": 2, "reason": "queue_full"}),
        ],
    )
    return directory


def answered(log: Path) -> list[str]:
    with Store(log).opened(["requests"]) as connection:
        found = connection.sql("select request_id from requests where status = 200 order by position")
        return [row["request_id"] for row in found.to_arrow_table().to_pylist()]


def run(log: Path, *arguments: str) -> int:
    return main(["log", *arguments, "--dir", str(log)])


def access(log: Path) -> list[dict[str, Any]]:
    with Store(log).opened(["access"]) as connection:
        rows = connection.sql('select kind, details from access order by "at"').to_arrow_table().to_pylist()
    return [{"kind": row["kind"]} | json.loads(row["details"]) for row in rows]


@pytest.mark.parametrize("sealed", [False, True])
def test_show_tells_a_request_s_whole_story(log: Path, capsys: Output, sealed: bool) -> None:
    wanted = answered(log)[1]
    if sealed:
        seal(log)
    assert run(log, "show", wanted) == 0
    lines = capsys.readouterr().out.splitlines()
    story = {line[:10].strip(): line[11:] for line in reversed(lines) if line[:10].strip()}
    assert story["request"] == wanted
    assert story["status"] == "200"
    assert story["model"] == "digits version 3"
    assert story["digest"] == "sha256:aa"
    assert story["source"] == "models:/digits@champion"
    assert story["run"] == "r17"
    assert story["backend"] == "onnx-1, attempt 1"
    assert story["batch"] == "a1f3-000042 of 64 rows, this request's 1 row from row 1"
    assert story["with"] == f"{answered(log)[0]} row 0"
    assert any("60 rows of the batch are of requests that are not in the log" in line for line in lines)
    assert (story["input"], story["output"]) == ("x FP64 [1] 1", "y FP64 [1] 1")
    assert story["feedback"].startswith("label 7, by anna")
    assert max(map(len, lines)) <= 100
    assert access(log) == [{"kind": "show", "who": access(log)[0]["who"], "id": wanted}]


def test_show_as_json_has_every_value(log: Path, capsys: Output) -> None:
    wanted = answered(log)[2]
    assert run(log, "show", wanted, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["request"]["inputs"] == [{"name": "x", "datatype": "FP64", "shape": [1], "data": [2.0]}]
    assert found["response"]["outputs"][0]["data"] == [4.0]
    assert found["execution"]["batch_mates"] == [one for one in answered(log) if one != wanted]
    assert found["provenance"]["run_id"] == "r17"
    assert found["feedback"] == []


def test_a_refused_request_is_shown_without_what_it_never_had(log: Path, capsys: Output) -> None:
    assert run(log, "show", "mine") == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "none that is served here; asked for n\N{REPLACEMENT CHARACTER}[2Jope" in shown
    assert "none: it was not executed here" in shown
    assert "digest" not in shown


def test_what_is_not_there_is_an_error_in_words_and_recorded(log: Path, capsys: Output) -> None:
    assert run(log, "show", "nobody") == 1
    assert "no request 'nobody' is in the log" in capsys.readouterr().err
    assert [one["id"] for one in access(log)] == ["nobody"]


def test_policies_are_told(log: Path, capsys: Output) -> None:
    made = requests([1])
    inputs = [Column("x", "FP32", None, [(100,)], b"", None, "drop", [400])]
    outputs = [Column("y", "FP32", None, [(100,)], bytes(8), None, "truncate", [400])]
    write(log, [Requests(made.wall_ns, 100.0, "digits", "3", "", "", made.batches, made.rows, inputs, outputs)])
    assert run(log, "show", ids(made)[0]) == 0
    shown = capsys.readouterr().out
    assert "x FP32 [100] [400 bytes, not kept]" in shown
    assert "y FP32 [100] 0, 0 [400 bytes, of which the first 8 are kept]" in shown


def test_tail_shows_the_newest_last_and_chooses(log: Path, capsys: Output) -> None:
    assert run(log, "tail", "-n", "2", "--model", "digits") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == answered(log)[-2:]
    assert run(log, "tail", "--status", "4xx", "--json") == 0
    (refused,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (refused["status"], refused["asked_model"]) == (404, "n\x1b[2Jope")
    assert run(log, "tail", "--status", "error") == 0
    assert "\x1b" not in capsys.readouterr().out
    assert run(log, "tail", "--status", "teapot") == 2
    assert "write a status such as 503" in capsys.readouterr().err


def test_what_strangers_asked_for_cannot_command_a_terminal(log: Path, capsys: Output) -> None:
    made = requests([1])
    for number in range(3):
        asked = Detail(error="no \x1b[2J", asked_model="", asked_version=f"\x1b]0;{number}\x07")
        row = made.rows[0]._replace(batch=NO_BATCH, status=400, rows=0, oip_id="\x1b[2J", detail=asked)
        write(log, [Requests(made.wall_ns, 100.0, "", "", "", "", [], [row], [], [])])
    assert run(log, "tail") == 0
    assert run(log, "stats") == 0
    assert run(log, "stats", "--json") == 0
    assert run(log, "show", made.rows[0].request_id.decode()) == 0
    assert run(log, "query", "select cast(oip_id as int) from requests where oip_id is not null") == 1
    shown = capsys.readouterr()
    assert "Could not convert" in shown.err
    assert "\x1b" not in shown.out + shown.err
    assert "\\u001b" not in shown.out, "one line for all that was asked for, whatever it was"


def test_a_narrow_terminal_gets_lines_that_fit(log: Path) -> None:
    (row,) = cli_log_tail.newest(Store(log), cli_log_tail.Choice("digits"), 1)
    assert len(cli_log_tail.line_of(row, narrow=True)) <= 80
    assert len(cli_log_tail.line_of(row)) <= cli_log_tail.WIDE


def test_tail_follows_until_it_is_interrupted(log: Path) -> None:
    tail = [sys.executable, "-m", "gateway", "log", "tail", "-f", "-n", "1", "--json", "--dir", str(log)]
    # Whoever runs the tests in the background has SIGINT ignored, and children inherit that.
    command = ["env", "--default-signal=INT", *tail]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["status"] in (200, 404)
        later = requests(range(20, 23))
        write(log, [later])
        seen = [json.loads(process.stdout.readline())["request_id"] for _ in range(3)]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert seen == ids(later)
    assert (process.returncode, errors) == (130, "")


def test_query_in_every_format(log: Path, capsys: Output, tmp_path: Path) -> None:
    sql = "select status, count(*) as n from requests group by status order by status"
    assert run(log, "query", sql) == 0
    assert json.loads(capsys.readouterr().out) == [{"status": 200, "n": 4}, {"status": 404, "n": 1}]
    assert run(log, "query", sql, "--format", "csv") == 0
    assert capsys.readouterr().out == "status,n\n200,4\n404,1\n"
    assert run(log, "query", sql, "--format", "table") == 0
    assert re.search(r"200 │ 4", capsys.readouterr().out)
    for file in ("x.parquet", "x.csv", "x.json"):
        assert run(log, "query", sql, "-o", str(tmp_path / file)) == 0
    assert pq.read_table(tmp_path / "x.parquet").to_pylist()[0] == {"status": 200, "n": 4}
    assert (tmp_path / "x.csv").read_text().startswith("status,n\n")
    assert json.loads((tmp_path / "x.json").read_text())[1]["n"] == 1
    capsys.readouterr()
    assert run(log, "query", "select * from requests where false") == 0
    assert json.loads(capsys.readouterr().out) == []
    assert [one["sql"] for one in access(log)][:2] == [sql, sql]


def test_tensors_in_a_query_are_values(log: Path, capsys: Output) -> None:
    assert run(log, "query", "select inputs[1] as x from requests where status = 200 order by position limit 1") == 0
    assert json.loads(capsys.readouterr().out) == [
        {"x": {"name": "x", "datatype": "FP64", "shape": [1], "data": [0.0]}}
    ]


def test_a_query_that_is_none(log: Path, capsys: Output) -> None:
    assert run(log, "query", "drop view requests") == 1
    assert "the log is read, not changed" in capsys.readouterr().err
    assert run(log, "query", "select 1", "--format", "xml") == 2
    assert "write table, json, csv, parquet" in capsys.readouterr().err
    assert run(log, "query", "select 1", "-o", str(log / "no" / "such")) == 2
    assert "No such file" in capsys.readouterr().err
    assert run(log, "query", "select * from requsts") == 1
    assert "There are requests, " in capsys.readouterr().err


def test_more_columns_than_fit_are_a_block_a_row(log: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    sql = "select * from requests where status = 200 order by position limit 2"
    assert run(log, "query", sql, "--format", "table") == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert re.search(r"^model +digits$", first, re.MULTILINE)
    assert re.search(r"^position +[0-9]+$", second, re.MULTILINE)
    assert "grpc_code" not in first  # of HTTP there is none


def test_export_and_its_record(log: Path, capsys: Output, tmp_path: Path) -> None:
    assert (
        run(log, "export", "--as", "jsonl", "-o", str(tmp_path / "out"), "--from", "2026-01-01", "--names", "height")
        == 0
    )
    shown = capsys.readouterr().out
    assert "digits-3-aa.jsonl: 4 rows, 1 label" in shown
    assert "note: 1 request left out: they were refused or failed" in shown
    lines = [json.loads(line) for line in (tmp_path / "out" / "digits-3-aa.jsonl").read_text().splitlines()]
    assert [(line["height"], line["prediction"], line["target"]) for line in lines] == [
        (0, 0, None),
        (1, 1, 7),
        (2, 4, None),
        (3, 9, None),
    ]
    assert access(log)[-1]["as"] == "jsonl"
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o600}
    assert run(log, "export", "--as", "jsonl", "-o", str(tmp_path / "o2"), "--to", "yesterday") == 2
    assert "write 2026-11-23" in capsys.readouterr().err


def test_stats(log: Path, capsys: Output) -> None:
    assert run(log, "stats") == 0
    shown = capsys.readouterr().out
    assert re.search(r"digits +│ 3 +│ +4 │ +4 │", shown)
    assert "(none of ours)" in shown
    assert "lost       2 rows of digits: queue_full, 1 gap" in shown
    assert "1 segment unsealed" in shown
    assert run(log, "seal") == 0
    assert capsys.readouterr().out == "1 segment sealed, 8 rows\n"
    assert run(log, "stats", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["unsealed_segments"], found["streams"]["gaps"], found["losses"][0]["rows"]) == (0, 1, 2)


def test_verify_has_an_exit_code(log: Path, capsys: Output) -> None:
    assert run(log, "seal") == 0
    assert run(log, "verify") == 0
    assert "no faults: 1 segment" in capsys.readouterr().out
    path = next(log.glob("requests/model=digits/*/*.parquet"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert run(log, "verify") == 1
    assert re.search(r"fault: requests/model=digits/.*SHA-256 differs", capsys.readouterr().out)
    assert run(log, "verify", "--json") == 1
    assert json.loads(capsys.readouterr().out)["good"] is False


def test_holds_come_and_go_and_are_recorded(log: Path, capsys: Output) -> None:
    assert run(log, "hold", "add", "case-17") == 2
    assert "say why" in capsys.readouterr().err
    options = ("--reason", "case 17/2026", "--model", "digits", "--from", "2026-09-01")
    assert run(log, "hold", "add", "case-17", *options) == 0
    assert run(log, "hold") == 0
    assert "case-17: digits, 2026-09-01 to open end" in capsys.readouterr().out
    assert run(log, "stats") == 0
    assert "hold       case-17: digits, 2026-09-01 to open end" in capsys.readouterr().out
    assert run(log, "hold", "release", "case-17") == 0
    assert run(log, "hold", "release", "../../x") == 2
    assert run(log, "hold", "list") == 0
    assert "no holds" in capsys.readouterr().out
    with Store(log).opened(["lifecycle"]) as connection:
        kinds = connection.sql("select kind from lifecycle where kind like 'hold%' order by \"at\"").to_arrow_table()
    assert kinds["kind"].to_pylist() == ["hold_placed", "hold_released"]


def test_where_the_log_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "gateway.yaml"
    config.write_text(
        "inference_log: {directory: kept, spill_directory: spilt, retention_days: 200}\n"
        "models: [{name: digits, source: ./gone, inference_log: {retention_days: 400}}]\n"
    )
    found = cli_log.place(None, config)
    assert (found.directory, found.spill) == (tmp_path / "kept", tmp_path / "spilt")
    assert (found.policy().days, found.policy().models) == (200, {"digits": 400})
    assert cli_log.place(Path("here"), config).directory == Path("here")
    assert cli_log.place(None, None).directory == Path("inference-log")
    assert cli_log.place(Path("x"), None).policy().days > 36_500
    config.write_text("server: {http_port: 1}\n")
    with pytest.raises(ConfigError, match="keeps no inference log"):
        cli_log.place(None, config)
    monkeypatch.setenv("GATEWAY_INFERENCE_LOG", str(tmp_path / "nothing"))
    assert main(["log", "stats"]) == 2


def test_sealing_by_hand_deletes_nothing_that_no_configuration_names(log: Path) -> None:
    """The rows of this log are weeks or years old, whenever the test runs; without -c nobody said how long to keep."""
    assert run(log, "seal") == 0
    assert len(answered(log)) == 4


def test_a_missing_extra_is_named(log: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    assert run(log, "stats") == 2
    assert "pip install 'oip-gateway[log]'" in capsys.readouterr().err


def test_help_is_instant() -> None:
    """Arrow and DuckDB are not imported to say what there is."""
    heavy = "any(name in sys.modules for name in ('duckdb', 'pyarrow'))"
    code = f"import sys; from gateway.cli import main; main(['log', '--help']); sys.exit({heavy})"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert (done.returncode, "tail" in done.stdout) == (0, True), done.stderr


def test_how_far_a_sink_is_behind_is_an_estimate() -> None:
    from gateway.cli_log_stats import _sink_line

    sink = {"name": "postgres", "at_us": 0, "shipped_rows": 1200, "lag_rows": 30, "failing": ""}
    assert _sink_line(sink).endswith(": 1,200 rows shipped, about 30 behind")
    assert _sink_line(sink | {"lag_rows": 0}).endswith(": 1,200 rows shipped, none behind")


def test_output_fits_eighty_columns(log: Path) -> None:
    from gateway import cli_log_stats

    out = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    cli_log_stats.stats(out, Store(log), 183, as_json=False)
    text = out.export_text()
    assert max(map(len, text.splitlines())) <= 110
    assert "retention  183 days" in text
    out.file.close()
