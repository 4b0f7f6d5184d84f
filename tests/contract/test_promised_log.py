"""What the inference log promises: a row for every request, its columns, the commands that read it, and feedback."""

from __future__ import annotations

import hashlib
import http.client
import json
import stat
import struct
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.contract.black_box import Answer, ask, command, configuration, coreutils_digest, put, request, times
from tests.live.gateway_process import GatewayProcess, gateway, until

pytestmark = pytest.mark.slow
TRACE = "0af7651916cd43dd8448eb211c80319c"
X, Y = struct.pack("<2f", 1, 2), struct.pack("<2f", 3, 6)
TOKEN = "feedback-token-of-this-test"

COLUMNS = {
    **dict.fromkeys(("request_id", "client_request_id", "oip_id", "trace_id"), "VARCHAR"),
    **dict.fromkeys(("received", "dispatched", "done"), "TIMESTAMP WITH TIME ZONE"),
    **dict.fromkeys(("model", "version", "digest", "variant", "protocol", "endpoint"), "VARCHAR"),
    **dict.fromkeys(("status", "grpc_code"), "SMALLINT"),
    **dict.fromkeys(("error", "reason", "backend", "batch_id", "parameters", "epoch"), "VARCHAR"),
    **dict.fromkeys(("queue_ms", "infer_ms", "total_ms", "sampling"), "DOUBLE"),
    **dict.fromkeys(("attempt", "batch_size", "batch_row"), "INTEGER"),
    **dict.fromkeys(("rows", "position"), "BIGINT"),
}
"""Of `requests`: name and DuckDB's type; beside them `inputs` and `outputs`, lists of TENSOR."""
TENSOR = ("name", "datatype", "shape", "data", "policy", "bytes")


@dataclass
class Seen:
    """What callers of the gateway saw before it ended, and where its log lies."""

    root: Path
    answers: dict[str, Answer]
    grpc_id: str
    refused: dict[str, tuple[int, Any]]

    @property
    def log(self) -> tuple[str, str]:
        return "--dir", str(self.root / "log")

    def query(self, sql: str) -> list[dict[str, Any]]:
        done = command("log", "query", sql, "--format", "json", *self.log)
        assert done.returncode == 0, done.stderr
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows


def configured(root: Path) -> Path:
    put(root / "models", "m", "3", 3.0)
    for name in ("masked", "sampled", "silent"):
        put(root / "models", name, "1", 3.0)
    (root / "token").write_text(TOKEN)
    models: list[dict[str, Any]] = [
        {"name": "m", "source": "models/m"},
        {
            "name": "masked",
            "source": "models/masked",
            "inference_log": {
                "payloads": {"default": "truncate", "truncate_bytes": 3, "tensors": {"x": "hash"}},
            },
        },
        {"name": "sampled", "source": "models/sampled", "inference_log": {"sampling": 0}},
        {"name": "silent", "source": "models/silent", "inference_log": {"enabled": False}},
    ]
    log = {"directory": "log", "feedback_token_file": "token"}
    document = {"server": {"drain_delay_s": 0, "workers": 1}, "inference_log": log, "models": models}
    return configuration(root / "gateway.yaml", document)


def feedback(process: GatewayProcess, said: Any, token: str = TOKEN) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", process.operations_port, timeout=60)
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    connection.request("POST", "/api/feedback", body, headers)
    response = connection.getresponse()
    told = response.status, json.loads(response.read())
    assert response.headers["Content-Type"] == "application/json"
    connection.close()
    return told


def over_grpc(process: GatewayProcess) -> str:
    with grpc.insecure_channel(f"127.0.0.1:{process.grpc_port}") as channel:
        sent = service_pb2.ModelInferRequest(model_name="m", id="over-grpc")
        sent.inputs.add(name="x", datatype="FP32", shape=[1, 2])
        sent.raw_input_contents.append(np.array([1, 2], np.float32).tobytes())
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        _, call = infer.with_call(sent, timeout=60, metadata=(("x-request-id", "theirs"),))
        return str(dict(call.initial_metadata())["x-request-id"])


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """One of everything was sent to a gateway that then ended."""
    root = tmp_path_factory.mktemp("promised-log")
    with gateway("serve", "-c", str(configured(root))) as process:
        traced = {"X_Request_Id": "client-7", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        answers = {
            "whole": ask(process, "m", request(id="oip-7", parameters={"timeout": 60_000_000}), **traced),
            "malformed": ask(process, "m", b"{"),
            "unknown": ask(process, "nobody"),
            "masked": ask(process, "masked"),
            "sampled": ask(process, "sampled"),
            "sampled, refused": ask(process, "sampled", request().replace(b"FP32", b"INT32")),
            "silent": ask(process, "silent"),
        }
        grpc_id = over_grpc(process)
        whole = {"request_id": answers["whole"].id}
        once = {**whole, "label": 6, "who": "a person", "row": 0, "idempotency_key": "once"}
        refused = {
            "token": feedback(process, whole | {"label": 1}, token=""),
            "wrong token": feedback(process, whole | {"label": 1}, token="another"),
            "neither": feedback(process, whole),
            "both": feedback(process, whole | {"label": 1, "override": {"old": 1, "new": 2}}),
            "no id": feedback(process, {"label": 1}),
            "not json": feedback(process, b"{"),
            "unknown key": feedback(process, whole | {"label": 1, "lable": 1}),
            "too many": feedback(process, [whole | {"label": n} for n in range(1001)]),
        }
        assert feedback(process, once)[0] == 202
        assert feedback(process, once)[1]["duplicates"] == 1
        override: dict[str, Any] = {
            "override": {"old": "3", "new": "4"},
            "note": "looked at it",
            "at": "2026-01-31T10:00:00Z",
        }
        many: list[dict[str, Any]] = [{"request_id": answers["masked"].id, **override}]
        many += [{"request_id": grpc_id, "label": n} for n in range(999)]
        status, told = feedback(process, many)
        assert (status, told["accepted"]) == (202, 1000), told
        url = f"http://127.0.0.1:{process.operations_port}"
        token = ("--token-file", str(root / "token"), "--ops-url", url)
        assert command("log", "feedback", answers["sampled"].id, "--label", '{"a": [1]}', *token).returncode == 0
        assert command("log", "feedback", "no-uuid", "--label", "1", *token).returncode == 1
        # it is read beside a running gateway
        done = None

        def readable() -> bool:
            nonlocal done
            done = command("log", "show", answers["whole"].id, "--dir", str(root / "log"))
            return done.returncode == 0

        until(readable, 60, "the log does not show a request while the gateway runs")
        assert process.stop() == 0
    return Seen(root, answers, grpc_id, refused)


@pytest.fixture(scope="module")
def rows(seen: Seen) -> dict[str, dict[str, Any]]:
    """Every row by its request id; bytes of tensors as hex."""
    fields = "name: t.name, datatype: t.datatype, shape: t.shape, data: hex(t.data), policy: t.policy, bytes: t.bytes"
    tensors = ", ".join(f"[{{{fields}}} for t in {side}] as {side}" for side in ("inputs", "outputs"))
    found = seen.query(f"select * replace ({tensors}) from requests")
    by_id = {row["request_id"]: row for row in found}
    assert len(by_id) == len(found)
    return by_id


# -- rows --------------------------------------------------------------------------------------------------------------


def test_every_request_is_one_row_but_of_a_model_that_is_not_logged(
    seen: Seen, rows: dict[str, dict[str, Any]]
) -> None:
    expected = {answer.id: answer.status for name, answer in seen.answers.items() if name != "silent"}
    assert {id_: row["status"] for id_, row in rows.items()} == {**expected, seen.grpc_id: 200}


def test_the_columns_are_those_promised(seen: Seen) -> None:
    described = {row["column_name"]: row["column_type"] for row in seen.query("describe requests")}
    assert {name: described.get(name) for name in COLUMNS} == COLUMNS
    for side in ("inputs", "outputs"):
        for field in TENSOR:
            assert field in described[side]
        assert described[side].endswith("[]")
        assert "BLOB" in described[side]


def test_a_row_says_what_the_caller_was_told(seen: Seen, rows: dict[str, dict[str, Any]]) -> None:
    answer = seen.answers["whole"]
    row = rows[answer.id]
    told = answer.model()
    assert (row["model"], row["version"], row["digest"]) == (told["name"], told["version"], told["digest"])
    assert told["digest"] == coreutils_digest(seen.root / "models/m/3")
    assert (row["client_request_id"], row["oip_id"], row["trace_id"]) == ("client-7", "oip-7", TRACE)
    assert (row["protocol"], row["endpoint"], row["grpc_code"]) == ("http", "infer", None)
    assert row["backend"] == "onnx-1"
    assert json.loads(row["parameters"]) == {"timeout": 60_000_000}
    batch = f'"{row["batch_id"]}";size={row["batch_size"]};row={row["batch_row"]}'
    assert batch == answer.headers["inference-batch"]
    received, dispatched, done = (datetime.fromisoformat(row[name]) for name in ("received", "dispatched", "done"))
    assert received.utcoffset() == timedelta(0)
    assert received <= dispatched <= done
    assert 0 < row["infer_ms"] <= row["total_ms"]
    (given,), (served,) = row["inputs"], row["outputs"]
    assert given == {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": X.hex().upper()} | {
        "policy": "keep",
        "bytes": 8,
    }
    assert (served["name"], served["data"], row["sampling"]) == ("y", Y.hex().upper(), 1.0)


def test_grpc_is_logged_as_http_is(seen: Seen, rows: dict[str, dict[str, Any]]) -> None:
    row = rows[seen.grpc_id]
    assert (row["protocol"], row["grpc_code"], row["status"]) == ("grpc", 0, 200)
    assert (row["client_request_id"], row["oip_id"]) == ("theirs", "over-grpc")
    assert (row["inputs"][0]["data"], row["outputs"][0]["data"]) == (X.hex().upper(), Y.hex().upper())


def test_refusals_are_rows_with_what_was_said(seen: Seen, rows: dict[str, dict[str, Any]]) -> None:
    for name in ("malformed", "unknown", "sampled, refused"):
        answer = seen.answers[name]
        row = rows[answer.id]
        assert (row["status"], row["error"]) == (answer.status, answer.document["error"])
        assert (row["backend"], row["batch_id"], row["outputs"]) == (None, None, None)
    malformed = rows[seen.answers["malformed"].id]
    assert malformed["digest"] == seen.answers["malformed"].model()["digest"]


def test_payload_policies_and_sampling(seen: Seen, rows: dict[str, dict[str, Any]]) -> None:
    (given,), (served,) = (rows[seen.answers["masked"].id][side] for side in ("inputs", "outputs"))
    assert (given["policy"], given["data"]) == ("hash", hashlib.sha256(X).hexdigest().upper())
    assert (served["policy"], served["data"]) == ("truncate", Y[:3].hex().upper())
    assert (given["bytes"], served["bytes"]) == (8, 8), "the original size"
    sampled = rows[seen.answers["sampled"].id]
    assert (sampled["inputs"], sampled["outputs"], sampled["sampling"]) == (None, None, 0.0)
    assert sampled["digest"].startswith("sha256:")


def test_nobody_else_may_read_the_log(seen: Seen) -> None:
    assert stat.S_IMODE((seen.root / "log").stat().st_mode) == 0o700


# -- commands ----------------------------------------------------------------------------------------------------------


def test_show_finds_a_request_by_each_of_its_ids(seen: Seen) -> None:
    for name in (seen.answers["whole"].id, "client-7", "oip-7"):
        done = command("log", "show", name, "--json", *seen.log)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["request_id"] == seen.answers["whole"].id
        assert told["request"]["inputs"][0]["data"] == [[1, 2]]
        assert told["response"]["outputs"][0]["data"] == [[3, 6]]
        assert told["provenance"]["digest"] == seen.answers["whole"].model()["digest"]
        assert told["provenance"]["files"][0]["path"] == "model.onnx"
        assert [entry["label"] for entry in told["feedback"]] == [6]
    missing = command("log", "show", "nobody-said-this", *seen.log)
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: ")


def test_tail_selects(seen: Seen) -> None:
    done = command("log", "tail", "--json", "--status", "error", *seen.log)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["status"] for line in told] == [400, 404, 400]
    one = command("log", "tail", "-n", "1", "--model", "m", *seen.log)
    assert len(one.stdout.splitlines()) == 1
    assert seen.grpc_id in one.stdout
    assert command("log", "tail", "--status", "sometimes", *seen.log).returncode == 2


@pytest.mark.parametrize(
    "sql", ["delete from requests", "select * from read_text('/etc/passwd')", "copy requests to 'x.csv'"]
)
def test_query_reads_the_log_and_nothing_else(seen: Seen, sql: str) -> None:
    done = command("log", "query", sql, *seen.log)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "root:" not in done.stdout


def test_query_has_the_views_and_formats_promised(seen: Seen, tmp_path: Path) -> None:
    sql = "select count(*) as n from requests where status < 400"
    file = tmp_path / "n.parquet"
    assert command("log", "query", sql, "--format", "parquet", "-o", str(file), *seen.log).returncode == 0
    assert duckdb.execute(f"select n from '{file}'").fetchall() == [(4,)]
    union = " union all ".join(
        f"select '{view}' as view, count(*) as n from {view}"
        for view in ("lifecycle", "gaps", "feedback", "labels", "labelled", "access")
    )
    counted = {row["view"]: row["n"] for row in seen.query(union)}
    assert counted["gaps"] == 0, "nothing was lost"
    assert counted["lifecycle"] >= 4, "four models were loaded"
    assert counted["access"] >= 3, "who reads the log is logged"


def test_who_reads_is_logged(seen: Seen) -> None:
    mark = "select 'who-reads-is-logged' as mark"
    command("log", "query", mark, *seen.log)
    command("log", "show", "who-reads-is-logged", *seen.log)
    told = seen.query("select kind, details from access where details like '%who-reads-is-logged%'")
    assert sorted(row["kind"] for row in told) == ["query", "query", "show"], "this reading is one itself"


def test_stats_and_verify_account_for_every_row(seen: Seen) -> None:
    told = json.loads(command("log", "stats", "--json", "-c", str(seen.root / "gateway.yaml")).stdout)
    assert sum(entry["requests"] for entry in told["requests"]) == 7
    assert told["losses"] == []
    assert told["retention_days"] == 183
    done = command("log", "verify", "--json", *seen.log)
    assert done.returncode == 0
    verified = json.loads(done.stdout)
    assert (verified["faults"], verified["lost_rows"], verified["dropped_rows"]) == ([], 0, 0)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "evidently", "nannyml"])
def test_export_writes_one_file_a_digest_with_labels_joined(seen: Seen, tmp_path: Path, form: str) -> None:
    done = command("log", "export", "--as", form, "-o", str(tmp_path / "out"), "--model", "m", *seen.log)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out/export.json").read_text())
    (file,) = told["files"]
    assert file["digest"] == seen.answers["whole"].model()["digest"]
    path = tmp_path / "out" / file["path"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == file["sha256"]
    reader = {".parquet": "read_parquet", ".jsonl": "read_json", ".csv": "read_csv"}[path.suffix]
    found = duckdb.execute(
        f"select request_id::text, x_0, y_0, target::int from {reader}('{path}') order by 1"
    ).fetchall()
    assert found == [(seen.answers["whole"].id, 1, 3, 6), (seen.grpc_id, 1, 3, 998)]


def test_holds(seen: Seen) -> None:
    assert command("log", "hold", "add", "case-17", "--reason", "why", "--model", "m", *seen.log).returncode == 0
    listed = command("log", "hold", "list", *seen.log).stdout
    assert "case-17" in listed
    assert "why" in listed
    for wrong in (("add", "case-17", "--reason", "again"), ("release", "case-19")):
        refused = command("log", "hold", *wrong, *seen.log)
        assert refused.returncode in {1, 2}
        assert refused.stderr.startswith("error: ")
    assert command("log", "hold", "release", "case-17", *seen.log).returncode == 0


def test_a_directory_without_a_log_is_said_so(tmp_path: Path) -> None:
    done = command("log", "stats", "--dir", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "no inference log" in done.stderr
    assert not list(tmp_path.iterdir()), "reading makes nothing"


# -- feedback ----------------------------------------------------------------------------------------------------------


def test_feedback_is_refused_in_words(seen: Seen) -> None:
    statuses = {name: status for name, (status, _) in seen.refused.items()}
    assert statuses.pop("token") == 401
    assert statuses.pop("wrong token") in {401, 403}
    assert set(statuses.values()) == {400}, statuses
    for name, (_, told) in seen.refused.items():
        assert next(iter(told)) == "error", name
    assert "1000" in seen.refused["too many"][1]["error"]
    assert "lable" in seen.refused["unknown key"][1]["error"]


def test_feedback_joins_truth_to_predictions(seen: Seen) -> None:
    wanted = "request_id, feedback_kind, feedback_label, feedback_old, feedback_new, feedback_who, feedback_note"
    told = {row.pop("request_id"): row for row in seen.query(f"select {wanted} from labelled")}
    assert set(told) == {seen.answers[name].id for name in ("whole", "masked", "sampled")} | {seen.grpc_id}
    whole = told[seen.answers["whole"].id]
    assert (whole["feedback_kind"], whole["feedback_label"], whole["feedback_who"]) == ("label", "6", "a person")
    masked = told[seen.answers["masked"].id]
    assert (masked["feedback_kind"], masked["feedback_note"]) == ("override", "looked at it")
    assert [json.loads(masked[name]) for name in ("feedback_old", "feedback_new")] == ["3", "4"]
    assert json.loads(told[seen.answers["sampled"].id]["feedback_label"]) == {"a": [1]}
    assert told[seen.grpc_id]["feedback_label"] == "998", "the last word"


# -- what is done to the files: last, because the log is another one afterwards ----------------------------------------


def test_sealed_rows_are_parquet_that_anybody_reads(seen: Seen) -> None:
    done = command("log", "seal", *seen.log)
    assert done.returncode == 0, done.stderr
    files = seen.root / "log/requests/**/*.parquet"
    found = duckdb.execute(f"select model, count(*) from read_parquet('{files}') group by 1 order by 1").fetchall()
    assert dict(found)["m"] == 3
    assert sum(count for _, count in found) == 7
    assert [row["n"] for row in seen.query("select count(*) as n from requests")] == [7], "no row is read twice"


def test_verify_finds_a_changed_file(seen: Seen) -> None:
    (file,) = (seen.root / "log/requests/model=masked").rglob("*.parquet")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.chmod(0o600)
    file.write_bytes(data)
    done = command("log", "verify", *seen.log)
    assert done.returncode == 1
    assert file.name in done.stdout + done.stderr


def test_without_the_section_there_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(times(3.0))
    file = configuration(tmp_path / "gateway.yaml", {"models": [{"source": "m.onnx"}]})
    with gateway("serve", "-c", str(file), "--workers", "1") as process:
        assert ask(process, "m").factor() == 3
        assert feedback(process, {"request_id": ask(process, "m").id, "label": 1}, "")[0] >= 400
        assert process.metric("gateway_inference_log_records_total") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gateway.yaml", "m.onnx"]
