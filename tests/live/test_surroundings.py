"""What the machine does to a gateway: signals in crowds, few descriptors, no shared memory file system, no backend."""

from __future__ import annotations

import contextlib
import http.client
import json
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway, until
from tests.live.test_lifecycle import all_gone, cpu_s, worker_pids

END_S = 60.0
Y = [-60.0, -48.0, 101.0]
DOCUMENT = {"inputs": [{"name": "x", "shape": [1, 6], "datatype": "FP32", "data": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}]}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    models.repository(tmp_path / "models", {"whole": models.whole_linear()})
    path = tmp_path / "gateway.yaml"
    path.write_text("server: {drain_delay_s: 0, workers: 2}\nmodels: [{source: models}]\n")
    return path


@pytest.fixture
def served(config: Path) -> Iterator[GatewayProcess]:
    with gateway("serve", "-c", str(config)) as process:
        yield process


def answered(served: GatewayProcess) -> bool:
    status, _, document = served.infer("whole", DOCUMENT)
    return status == 200 and document["outputs"][0]["data"] == Y


def test_a_storm_of_signals_fails_no_request(served: GatewayProcess) -> None:
    """Twenty SIGHUPs, SIGUSR1 left alone; then SIGTERM ends it in order, and nothing is left."""
    pids = worker_pids(served)
    over = threading.Event()
    results: list[bool] = []

    def client() -> None:
        while not over.is_set():
            results.append(answered(served))

    thread = threading.Thread(target=client)
    thread.start()
    for _ in range(20):
        served.process.send_signal(signal.SIGHUP)
        time.sleep(0.02)  # a storm, not one signal: equal ones that are pending are merged
    until(lambda: served.output().count("SIGHUP: the models of the configuration are served") >= 2, END_S, "no reload")
    over.set()
    thread.join(END_S)
    assert results
    assert all(results)
    assert served.stop() == 0
    until(all_gone(pids), END_S, "workers outlived the gateway")


def test_without_a_usable_backend_it_is_alive_and_not_ready(served: GatewayProcess) -> None:
    def health() -> tuple[int, int, int]:
        paths = ("/v2/health/live", "/v2/health/ready", "/v2/models/whole/ready")
        live, ready, model = (served.request("GET", path)[0] for path in paths)
        return live, ready, model

    def act(action: str) -> None:
        for worker in ("onnx-1", "onnx-2"):
            connection = http.client.HTTPConnection("127.0.0.1", served.operations_port, timeout=END_S)
            with contextlib.closing(connection):
                path = f"/api/backends/{worker}/{action}{'?force=true' * (action == 'drain')}"
                connection.request("POST", path, "{}", {"Content-Type": "application/json"})
                response = connection.getresponse()
                assert response.status == 200, response.read()

    assert health() == (200, 200, 200)
    act("drain")
    live, *not_ready = health()
    assert live == 200
    assert all(status >= 400 for status in not_ready)
    act("undrain")
    assert health() == (200, 200, 200)
    assert answered(served)


def few_files(count: int, *arguments: str) -> list[str]:
    code = (
        "import os, resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({count}, {count}))\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'gateway', *sys.argv[1:]])"
    )
    return [sys.executable, "-c", code, *arguments]


def test_without_descriptors_it_neither_spins_nor_drops_who_is_there(served: GatewayProcess) -> None:
    kept = http.client.HTTPConnection("127.0.0.1", served.port, timeout=END_S)
    body = json.dumps(DOCUMENT)

    def right() -> bool:
        kept.request("POST", "/v2/models/whole/infer", body)
        return bool(json.loads(kept.getresponse().read())["outputs"][0]["data"] == Y)

    assert right()
    pid = served.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    open_now = max(int(fd.name) for fd in Path(f"/proc/{pid}/fd").iterdir())
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_now + 8, hard))
    crowd = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(60)]
    try:
        used = []
        for _ in range(3):  # the best of three, as for idling
            before = cpu_s([pid])
            time.sleep(1.0)  # the measurement itself
            used.append(cpu_s([pid]) - before)
        assert min(used) < 0.2, used
        assert right()
    finally:
        for sock in crowd:
            sock.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert right()
    until(lambda: answered(served), END_S, "it does not accept any more")
    kept.close()


def test_with_few_descriptors_connections_are_refused_politely(config: Path) -> None:
    """128 of them: 32 connections a port, and the 33rd is told so."""
    arguments = ["serve", "-c", str(config), "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    log = config.with_name("log")
    with log.open("wb") as stream:
        process = subprocess.Popen(few_files(128, *arguments), stdout=stream, stderr=stream)
    try:
        until(lambda: "/v2" in log.read_text() or process.poll() is not None, END_S, "it does not start")
        text = log.read_text()
        assert "at most 32 connections are taken on each data port, and not 4096" in text
        port = int(text.partition("inference   http://127.0.0.1:")[2].partition("/")[0])
        with contextlib.ExitStack() as stack:
            crowd = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(33)]
            for number, sock in enumerate(crowd):
                sock.settimeout(END_S)
                sock.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n\r\n")
                assert sock.recv(4096).startswith(b"HTTP/1.1 200" if number < 32 else b"HTTP/1.1 503")
        process.send_signal(signal.SIGTERM)
        assert process.wait(END_S) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare(1)")
def test_it_needs_no_shared_memory_file_system(config: Path) -> None:
    """Its shared memory has no name: a full /dev/shm does not matter, and nothing stale can be left behind."""
    small = "mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 1M /dev/zero > /dev/shm/full 2>/dev/null; "
    tried = subprocess.run(["unshare", "-m", "sh", "-c", small + "ls /dev/shm"], capture_output=True, check=False)
    if tried.stdout != b"full\n":
        pytest.skip("no permission to mount")
    arguments = f"serve -c {config} --http-port 0 --grpc-port 0 --metrics-port 0"
    log = config.with_name("log")
    with log.open("wb") as stream:
        command = ["unshare", "-m", "sh", "-c", f"{small} exec {sys.executable} -m gateway {arguments}"]
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        until(lambda: "/v2" in log.read_text() or process.poll() is not None, END_S, "it does not start")
        port = int(log.read_text().partition("inference   http://127.0.0.1:")[2].partition("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=END_S)
        with contextlib.closing(connection):
            connection.request("POST", "/v2/models/whole/infer", json.dumps(DOCUMENT))
            assert connection.getresponse().status == 200
        seen = Path("/proc", str(process.pid), "root", "dev", "shm")
        assert [path.name for path in seen.iterdir()] == ["full"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(END_S) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
