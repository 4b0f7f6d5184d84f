"""A real gateway whose log goes to a real PostgreSQL: what clients were told is what stands there afterwards."""

from __future__ import annotations

import http.client
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live import models, venvs
from tests.live.gateway_process import GatewayProcess, gateway, until
from tests.live.postgres_server import PostgresServer, postgres

pytestmark = pytest.mark.slow
WAIT_S = 60.0
REQUESTS = 25


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres() as started:
        yield started


def configured(directory: Path) -> Path:
    root = models.repository(directory / "models", {"whole": models.whole_linear()})
    file = directory / "gateway.yaml"
    sink = {"dsn": "env:LOG_DSN", "showcase_tables": True}
    section = {"directory": str(directory / "log"), "segment_mb": 1, "seal_s": 1, "postgres": sink}
    file.write_text(
        "server: {drain_delay_s: 0, drain_timeout_s: 6, workers: 1}\n"
        f"inference_log: {json.dumps(section)}\nmodels: [{{source: {root}}}]\n"
    )
    return file


def ask(process: GatewayProcess, number: int, columns: int = 6) -> tuple[int, dict[str, str]]:
    tensor = {"name": "x", "shape": [1, columns], "datatype": "FP32", "data": [float(number)] * columns}
    status, headers, _ = process.infer("whole", {"id": f"mine-{number}", "inputs": [tensor]})
    return status, headers


def post(process: GatewayProcess, path: str, document: Any) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", process.operations_port, timeout=60)
    connection.request("POST", path, json.dumps(document), {"Content-Type": "application/json"})
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


def command(*arguments: str, dsn: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "log", *arguments],
        env=os.environ | {"LOG_DSN": dsn},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_clients_were_told_stands_in_the_tables(tmp_path: Path, server: PostgresServer) -> None:
    dsn, file = server.database(), configured(tmp_path)

    def count(table: str) -> int:
        if server.rows(dsn, "SELECT to_regclass($1) IS NULL", table) == [(True,)]:
            return 0
        ((found,),) = server.rows(dsn, f"SELECT count(*) FROM {table}")
        return int(found)

    with gateway("serve", "-c", str(file), env={"LOG_DSN": dsn}) as process:
        answers = [ask(process, number) for number in range(REQUESTS)]
        refused, _ = ask(process, 1, columns=5)
        assert {status for status, _ in answers} == {200}
        assert refused == 400
        ids = [headers["x-request-id"] for _, headers in answers]
        status, done = post(process, "/api/feedback", [{"request_id": ids[0], "label": 1}, {"request_id": "?"}])
        assert (status, done["accepted"], len(done["faults"])) == (202, 1, 1)
        said = ("--old", "1", "--new", "two words", "--who", "ada")
        operations = f"http://127.0.0.1:{process.operations_port}"
        assert "taken" in command("feedback", ids[1], *said, "--ops-url", operations, dsn=dsn)
        until(lambda: count("gateway_requests") == REQUESTS + 1, WAIT_S, "the rows did not arrive")
        until(lambda: count("gateway_feedback") == 2, WAIT_S, "the feedback did not arrive")
        shipped = "gateway_inference_log_records_total"
        until(lambda: process.metric(shipped, sink="postgres") > REQUESTS, WAIT_S, "no metric says what was shipped")
        server.stop()
        until(lambda: b"postgres" in process.operations("/healthz"), WAIT_S, "/healthz does not say that it is away")
        assert [ask(process, number)[0] for number in range(3)] == [200] * 3, "serving goes on"
        server.start()
        until(lambda: count("gateway_requests") == REQUESTS + 4, WAIT_S, "it did not go on")
        assert process.stop() == 0

    found = server.rows(
        dsn,
        "SELECT request_id, oip_id, 'sha256:' || split_part(digest, ':', 2), batch_id, input_data[1], status "
        "FROM gateway_requests ORDER BY position",
    )
    for number, ((_, headers), row) in enumerate(zip(answers, found, strict=False)):
        assert row[0] == headers["x-request-id"]
        assert row[1] == f"mine-{number}"
        assert f'digest="{row[2]}"' in headers["inference-model"]
        assert headers["inference-batch"].startswith(f'"{row[3]}"')
        assert row[4] == struct.pack("<6f", *[number] * 6)
    assert found[REQUESTS][5] == 400
    labels = server.rows(dsn, "SELECT request_id, feedback_label::text, feedback_new::text FROM gateway_labelled")
    assert sorted(labels) == sorted([(ids[0], "1", None), (ids[1], None, '"two words"')])
    ((metadata,),) = server.rows(dsn, "SELECT metadata::text FROM inference_metadata WHERE id = $1", ids[0])
    known = json.loads(metadata)
    assert known["source"]
    assert known["digest"] in answers[0][1]["inference-model"]
    assert count("inference_errors") == 1
    assert "0 rows shipped" in command("ship", "-c", str(file), dsn=dsn)
    _read_as_the_showcase_does(server, dsn, ids)


def _read_as_the_showcase_does(server: PostgresServer, dsn: str, ids: list[str]) -> None:
    program = venvs.need(venvs.mlserver)
    joined = server.rows(
        dsn,
        "SELECT req.raw_request::text, resp.raw_response::text FROM inference_requests req "
        "INNER JOIN inference_responses resp ON (req.id = resp.id) WHERE req.id = ANY($1) ORDER BY req.timestamp",
        ids,
    )
    done = subprocess.run(
        [program.path.parent / "python", Path(__file__).with_name("showcase_reader.py")],
        input=json.dumps([[json.loads(one) for one in pair] for pair in joined]),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(read) == REQUESTS
    for number, (oip_id, columns, version, outputs) in enumerate(read):
        assert (oip_id, version) == (f"mine-{number}", "1")
        assert list(columns) == ["x"]
        assert list(outputs) == ["y"]
        assert len(outputs["y"]) == 1
