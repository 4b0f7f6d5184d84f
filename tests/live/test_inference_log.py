"""A real gateway with an inference log: what clients saw is what the log says afterwards, row for row."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http as triton_http

from gateway.inference_log.store import Store
from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway, until

X = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
Y = [-60.0, -48.0, 101.0]
INFER = "/v2/models/whole/infer"


def document(row: list[float], **more: Any) -> bytes:
    tensor = {"name": "x", "shape": [1, 6], "datatype": "FP32", "data": row}
    return json.dumps({"inputs": [tensor], **more}).encode()


def configured(directory: Path, *lines: str, **log: Any) -> Path:
    """A configuration with a log in `directory`; returns the file."""
    root = models.repository(directory / "models", {"whole": models.whole_linear()})
    section = json.dumps({"directory": str(directory / "log"), **log})
    file = directory / "gateway.yaml"
    server = "server: {drain_delay_s: 0, drain_timeout_s: 6, workers: 1, limits: {max_body_bytes: 100000}}"
    file.write_text("\n".join([server, f"inference_log: {section}", f"models: [{{source: {root}}}]", *lines, ""]))
    return file


def logged(directory: Path, view: str = "requests") -> list[dict[str, Any]]:
    """Every row of a view, in the order written."""
    with Store(directory / "log").opened() as connection:
        rows: list[dict[str, Any]] = (
            connection.sql(f"select * from {view} order by epoch, position").to_arrow_table().to_pylist()
        )
        return rows


def tensors(row: dict[str, Any], side: str) -> dict[str, bytes]:
    return {tensor["name"]: bytes(tensor["data"]) for tensor in row[side] or []}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """One of everything was sent to a gateway that then ended: (row by request id, what clients saw by name)."""
    directory = tmp_path_factory.mktemp("told")
    seen: dict[str, Any] = {}
    with gateway("serve", "-c", str(configured(directory))) as process:

        def post(name: str, path: str, body: bytes, **headers: str) -> None:
            status, fields, answer = process.request("POST", path, body, headers)
            seen[name] = (fields["x-request-id"], status, answer)

        post("json", INFER, document(X, id="mine"), **{"X-Request-Id": "theirs"})
        post("generate", "/v2/models/whole/generate", json.dumps({"x": X}).encode())
        post("broken", INFER, b"{")
        post("unknown", "/v2/models/nobody/infer", document(X))
        post("late", INFER, document(X), **{"X-Request-Timeout-Ms": "x"})
        post("coded", INFER, b"{}", **{"Content-Encoding": "br"})
        post("large", INFER, bytes(100_001))
        post("mistaken", INFER, document(X), **{"Content-Length": "1x"})
        _binary(process, seen)
        _over_grpc(process, seen)
        assert process.metric("gateway_inference_log_dropped_total") == 0
        state = json.loads(process.operations("/healthz"))["inference_log"]
        assert state["state"] == "ok", state
        assert process.stop() == 0
        assert "Traceback" not in process.output()
    rows = logged(directory)
    seen["rows"] = len(rows)
    seen["lifecycle"] = logged(directory, "lifecycle")
    return {row["request_id"]: row for row in rows}, seen


def _binary(process: GatewayProcess, seen: dict[str, Any]) -> None:
    with contextlib.closing(triton_http.InferenceServerClient(f"127.0.0.1:{process.port}")) as client:
        tensor = triton_http.InferInput("x", [1, 6], "FP32")
        tensor.set_data_from_numpy(np.array([X], np.float32), binary_data=True)
        result = client.infer("whole", [tensor])
        seen["binary"] = result.as_numpy("y").tobytes()


def _over_grpc(process: GatewayProcess, seen: dict[str, Any]) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{process.grpc_port}") as client:
        tensor = triton.InferInput("x", [1, 6], "FP32")
        tensor.set_data_from_numpy(np.array([X], np.float32))
        seen["raw"] = client.infer("whole", [tensor], request_id="over grpc").as_numpy("y").tobytes()
        with pytest.raises(triton.InferenceServerException):
            client.infer("nobody", [tensor])


def test_every_request_is_one_row(told: tuple[dict[str, dict[str, Any]], dict[str, Any]]) -> None:
    rows, seen = told
    assert seen["rows"] == len(rows) == 11
    for name in ("json", "generate", "broken", "unknown", "late", "coded", "large", "mistaken"):
        request_id, status, _ = seen[name]
        assert rows[request_id]["status"] == status, name
    assert sorted(row["status"] for row in rows.values()) == [
        *[200] * 4, *[400] * 3, *[404] * 2, 413, 501
    ]  # fmt: skip


def test_an_answer_is_logged_as_it_was_given(told: tuple[dict[str, dict[str, Any]], dict[str, Any]]) -> None:
    rows, seen = told
    for name in ("json", "generate"):
        request_id, _, _ = seen[name]
        row = rows[request_id]
        assert tensors(row, "inputs") == {"x": np.array(X, "<f4").tobytes()}
        assert tensors(row, "outputs") == {"y": np.array(Y, "<f4").tobytes()}
        assert (row["model"], row["version"], row["protocol"]) == ("whole", "1", "http")
        assert row["digest"].startswith("sha256:")
        assert row["received"] <= row["dispatched"] <= row["done"]
    row = rows[seen["json"][0]]
    assert (row["client_request_id"], row["oip_id"], row["endpoint"]) == ("theirs", "mine", "infer")
    assert (row["batch_size"], row["batch_row"], row["attempt"]) == (1, 0, 1)


def test_binary_and_grpc_are_logged_as_they_were_given(
    told: tuple[dict[str, dict[str, Any]], dict[str, Any]],
) -> None:
    rows, seen = told
    raw = {row["protocol"]: row for row in rows.values() if row["endpoint"] == "raw"}
    assert sorted(raw) == ["grpc", "http"]
    for protocol, name in (("http", "binary"), ("grpc", "raw")):
        assert tensors(raw[protocol], "inputs") == {"x": np.array(X, "<f4").tobytes()}
        assert tensors(raw[protocol], "outputs") == {"y": seen[name]} == {"y": np.array(Y, "<f4").tobytes()}
    assert (raw["grpc"]["grpc_code"], raw["grpc"]["oip_id"]) == (0, "over grpc")


def test_a_refusal_says_what_the_client_was_told(told: tuple[dict[str, dict[str, Any]], dict[str, Any]]) -> None:
    rows, seen = told
    for name in ("broken", "unknown", "late", "coded", "large", "mistaken"):
        request_id, _, answer = seen[name]
        assert rows[request_id]["error"] == json.loads(answer)["error"]
    assert rows[seen["unknown"][0]]["asked_model"] == "nobody"
    assert rows[seen["large"][0]]["asked_model"] == rows[seen["mistaken"][0]]["asked_model"] == "whole"
    (refused,) = [row for row in rows.values() if row["protocol"] == "grpc" and row["status"] == 404]
    assert (refused["grpc_code"], refused["asked_model"]) == (grpc.StatusCode.NOT_FOUND.value[0], "nobody")


def test_the_log_says_which_files_served(told: tuple[dict[str, dict[str, Any]], dict[str, Any]]) -> None:
    rows, seen = told
    (serving,) = [event for event in seen["lifecycle"] if event["kind"] == "serving"]
    assert (serving["model"], serving["version"]) == ("whole", "1")
    manifest = json.loads(serving["details"])
    assert manifest["digest"] == rows[seen["json"][0]]["digest"]


class Load:
    """Clients that keep the request id of every answer they got."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answered: dict[str, float] = {}
        self.faults: list[str] = []
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, number: int) -> None:
        value = float(number)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        while not self._over.is_set():
            value += 4.0
            try:
                connection.request("POST", INFER, document([value, 0, 0, 0, 0, 0]))
                answer = connection.getresponse()
                answer.read()
            except (http.client.HTTPException, OSError):
                connection.close()  # the old process has ended the connection; the new one takes the next
                continue
            if answer.status != 200:
                self.faults.append(f"{answer.status}")
                return
            with self._lock:
                self.answered[answer.headers["X-Request-Id"]] = value
            if answer.headers.get("Connection") == "close":
                connection.close()
        connection.close()


def rows_match(directory: Path, load: Load) -> None:
    """Every answer that a client got has its row, once, with that client's input."""
    rows = [row for row in logged(directory) if row["status"] == 200]
    by_id = {row["request_id"]: row for row in rows}
    assert len(by_id) == len(rows)
    assert load.answered.keys() <= by_id.keys()
    for request_id, value in load.answered.items():
        assert struct.unpack("<6f", tensors(by_id[request_id], "inputs")["x"])[0] == value


def test_after_sigterm_every_answer_is_in_the_log(tmp_path: Path) -> None:
    with gateway("serve", "-c", str(configured(tmp_path, sync_ms=5000))) as process, Load(process.port) as load:
        until(lambda: len(load.answered) > 500 or bool(load.faults), 60, "no answers")
        assert process.stop() == 0
    assert len(load.answered) > 500
    rows_match(tmp_path, load)
    positions = [
        (row["epoch"], row["position"]) for view in ("requests", "lifecycle") for row in logged(tmp_path, view)
    ]
    assert sorted(position for _, position in positions) == list(range(len(positions)))


@pytest.mark.slow
def test_a_takeover_loses_no_row(tmp_path: Path) -> None:
    with gateway("serve", "-c", str(configured(tmp_path, seal_s=3600))) as process, Load(process.port) as load:
        until(lambda: len(load.answered) > 200 or bool(load.faults), 60, "no answers")
        process.process.send_signal(signal.SIGUSR2)
        process.process.wait(90)
        enough = len(load.answered) + 200
        until(lambda: len(load.answered) > enough or bool(load.faults), 60, "the successor does not answer")
        (successor,) = [pid for pid in gateways(tmp_path) if pid != process.process.pid]
        os.kill(successor, signal.SIGTERM)
        until(lambda: not gateways(tmp_path), 60, "the successor does not end")
    assert not load.faults
    rows_match(tmp_path, load)
    assert len({row["epoch"] for row in logged(tmp_path)}) == 2


def gateways(directory: Path) -> list[int]:
    """Gateways that serve the configuration in `directory`."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"serve" in words and str(directory / "gateway.yaml").encode() in words:
                    found.append(int(entry.name))
    return found


def refused_start(*arguments: str) -> tuple[int, str]:
    process = GatewayProcess("serve", *arguments)
    try:
        return process.process.wait(60), process.output()
    finally:
        process.close()


def test_a_directory_that_cannot_be_used_is_a_fault_of_the_configuration(tmp_path: Path) -> None:
    file = configured(tmp_path)
    (tmp_path / "log").write_text("a file")
    code, output = refused_start("-c", str(file))
    assert code == 2, output
    assert "inference_log" in output
    assert "Traceback" not in output


def test_a_port_that_is_taken_leaves_a_log_that_can_be_read(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, output = refused_start("-c", str(configured(tmp_path)), "--http-port", str(taken.getsockname()[1]))
    assert code == 3, output
    assert logged(tmp_path) == []


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system that is full, apart from room for the first few rows."""
    directory = tmp_path / "small"
    directory.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=8m none {directory} 2>/dev/null"):
        pytest.skip("a small tmpfs cannot be mounted here; run as root with the right to mount")
    try:
        yield directory
    finally:
        os.system(f"umount -l {directory}")


LARGE = {"inputs": [{"name": "x", "shape": [500, 6], "datatype": "FP32", "data": X * 500}]}


def on_full_disk(full_disk: Path, elsewhere: Path, overflow: str, **log: Any) -> Path:
    """A configuration whose log lies on the small disk; everything else does not."""
    root = models.repository(elsewhere / "models", {"whole": models.whole_linear()})
    section = json.dumps({"directory": str(full_disk / "log"), "queue_mb": 1, **log})
    file = elsewhere / "gateway.yaml"
    file.write_text(
        f"server: {{drain_delay_s: 0, workers: 1}}\ninference_log: {section}\n"
        f"defaults: {{inference_log: {{overflow: {overflow}}}}}\nmodels: [{{source: {root}}}]\n"
    )
    return file


def fill(filler: Path) -> None:
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))


@pytest.mark.slow
@pytest.mark.parametrize("overflow", ["drop", "block"])
def test_a_full_disk(full_disk: Path, tmp_path: Path, overflow: str) -> None:
    """`drop` goes on serving and counts; `block` refuses, says why, and comes back by itself when there is room."""
    file = on_full_disk(full_disk, tmp_path, overflow)
    filler = full_disk / "filler"
    with gateway("serve", "-c", str(file)) as process:
        fill(filler)
        statuses = []

        def full() -> bool:
            status, headers, _ = process.infer("whole", LARGE)
            statuses.append(status)
            assert ("retry-after" in headers) == (status == 503)
            lost = process.metric("gateway_inference_log_dropped_total") > 0
            return lost if overflow == "drop" else statuses[-1] == 503

        until(full, 90, "the log never filled up")
        state = json.loads(process.operations("/healthz"))["inference_log"]
        assert state["state"] == ("failing" if overflow == "drop" else "blocked")
        assert any("No space left" in text for text in state["failing"].values()), state
        ready = process.request("GET", "/v2/models/whole/ready")[0]
        assert ready == (200 if overflow == "drop" else 503)
        assert process.request("GET", "/v2/health/ready")[0] == ready
        if overflow == "drop":
            assert set(statuses) == {200}
        filler.unlink()
        until(lambda: process.request("GET", "/v2/models/whole/ready")[0] == 200, 60, "it does not come back")
        until(lambda: process.metric("gateway_inference_log_gaps_total") > 0, 60, "no gap was recorded")
        assert process.infer("whole", json.loads(document(X)))[0] == 200
        lost = process.metric("gateway_inference_log_dropped_total")
        assert process.stop() == 0
    with Store(full_disk / "log").opened() as connection:
        ((rows,),) = connection.sql("select count(*) from requests").fetchall()
        gaps = connection.sql("select kind, details from gaps").fetchall()
    told = {kind: sum(json.loads(text)["rows"] for k, text in gaps if k == kind) for kind, _ in gaps}
    answered, refused = statuses.count(200) + 1, statuses.count(503)
    assert rows + lost == answered
    assert told.get("dropped", 0) == lost
    assert told.get("refused", 0) == refused


def command(*arguments: str) -> str:
    """Output of a `gateway log` command that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "log", *arguments], check=False, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_what_a_full_disk_refuses_lies_in_the_second_place_until_it_is_sealed(full_disk: Path, tmp_path: Path) -> None:
    """`spill` loses nothing; readers know both places, and sealing brings all rows together."""
    spill = tmp_path / "spill"
    file = on_full_disk(full_disk, tmp_path, "spill", spill_directory=str(spill))
    filler = full_disk / "filler"
    answered: list[str] = []
    with gateway("serve", "-c", str(file)) as process:
        fill(filler)

        def spilt() -> bool:
            status, headers, _ = process.infer("whole", LARGE)
            assert status == 200
            answered.append(headers["x-request-id"])
            return process.metric("gateway_inference_log_synced_records_total", sink="spill") > 5

        until(spilt, 90, "nothing was spilt")
        state = json.loads(process.operations("/healthz"))["inference_log"]
        assert (state["state"], list(state["failing"])) == ("failing", ["wal"])
        assert list(spill.glob("wal/*/*.wal"))
        filler.unlink()
        until(
            lambda: "wal" not in json.loads(process.operations("/healthz"))["inference_log"]["failing"], 60, "no room"
        )
        answered.append(process.infer("whole", LARGE)[1]["x-request-id"])
        assert process.metric("gateway_inference_log_dropped_total") == 0
        assert process.stop() == 0

    def read() -> list[str]:
        text = command("query", "select request_id from requests order by 1", "--format", "json", "-c", str(file))
        return [row["request_id"] for row in json.loads(text)]

    assert read() == sorted(answered)
    command("seal", "-c", str(file))
    assert not list(spill.glob("wal/*/*.wal"))
    assert read() == sorted(answered)
    command("verify", "-c", str(file))
    shown = json.loads(command("show", answered[-2], "--json", "-c", str(file)))
    assert shown["model"]["model"] == "whole"
