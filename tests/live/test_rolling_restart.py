"""A gateway is replaced by another under load, and no client notices: not a reset, not a refused connection."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton

from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway, until
from tests.live.test_lifecycle import alive, all_gone

END_S = 90.0
X = [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
Y = [-60.0, -48.0, 101.0]
DOCUMENT = json.dumps({"inputs": [{"name": "x", "shape": [1, 6], "datatype": "FP32", "data": X[0]}]})
PATH = "/v2/models/whole/infer"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[GatewayProcess]:
    root = models.repository(tmp_path / "models", {"whole": models.whole_linear()})
    config = tmp_path / "gateway.yaml"
    config.write_text("server: {drain_delay_s: 0, drain_timeout_s: 6, workers: 1}\n")
    with gateway("serve", str(root), "-c", str(config)) as process:
        yield process


class Load:
    """Clients that go on until told to stop; whatever is not a right answer is a fault. Nothing is tried again."""

    def __init__(self, port: int, grpc_port: int) -> None:
        self.port, self.grpc_port = port, grpc_port
        self.answers = 0
        self.reconnects = 0
        self.faults: list[str] = []
        self._over = threading.Event()
        self._lock = threading.Lock()
        clients: list[Callable[[], None]] = [*[self._keep_alive] * 4, *[self._fresh] * 2, *[self._grpc] * 2]
        self._threads = [threading.Thread(target=self._guarded, args=(client,)) for client in clients]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(END_S)

    def _guarded(self, client: Callable[[], None]) -> None:
        while not self._over.is_set():
            try:
                client()
            except Exception as error:
                self.faults.append(f"{client.__name__}: {type(error).__name__}: {error}")
                time.sleep(0.01)

    def _answered(self) -> None:
        with self._lock:
            self.answers += 1

    def _exchange(self, connection: http.client.HTTPConnection) -> bool:
        """Returns whether the connection can be used again."""
        connection.request("POST", PATH, DOCUMENT)
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        assert json.loads(body)["outputs"][0]["data"] == Y, body
        self._answered()
        return response.getheader("Connection") != "close"

    def _keep_alive(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=END_S)
        while self._exchange(connection):
            if self._over.wait(0.002):
                break
        else:
            self.reconnects += 1
        connection.close()

    def _fresh(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=END_S)
        self._exchange(connection)
        connection.close()
        self._over.wait(0.005)

    def _grpc(self) -> None:
        with triton.InferenceServerClient(f"127.0.0.1:{self.grpc_port}") as client:
            tensor = triton.InferInput("x", [1, 6], "FP32")
            tensor.set_data_from_numpy(np.array(X, np.float32))
            while not self._over.wait(0.005):
                assert client.infer("whole", [tensor]).as_numpy("y").tolist() == [Y]
                self._answered()


def successor_of(served: GatewayProcess, count: int) -> int:
    """The process id of the `count`th successor, once it serves."""
    pattern = r"the successor serves \(pid (\d+)\)"
    until(lambda: len(re.findall(pattern, served.output())) >= count, END_S, "no successor serves")
    return int(re.findall(pattern, served.output())[count - 1])


@pytest.mark.slow
def test_three_restarts_in_a_row_fail_no_request(served: GatewayProcess) -> None:
    pids = [served.process.pid]
    try:
        with Load(served.port, served.grpc_port) as load:
            for count in (1, 2, 3):
                seen = load.answers
                until(lambda: load.answers > seen + 50, END_S, "no load")  # noqa: B023
                os.kill(pids[-1], signal.SIGUSR2)
                pids.append(successor_of(served, count))
                until(all_gone(pids[:-1]), END_S, "the old one does not end")
            seen = load.answers
            until(lambda: load.answers > seen + 50, END_S, "no load")
        assert load.faults == []
        assert load.reconnects >= 3 * 4, "every keep-alive client was told to come anew"
        assert served.process.wait(END_S) == 0
        assert "Traceback" not in served.output()
    finally:
        for pid in pids[1:]:
            if alive(pid):
                os.kill(pid, signal.SIGTERM)
    until(all_gone(pids), END_S, "something is left")


def test_a_successor_that_cannot_start_changes_nothing(served: GatewayProcess, tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text("server: {no_such_key: 1}\n")
    served.process.send_signal(signal.SIGUSR2)
    until(lambda: "the successor does not serve, this process goes on" in served.output(), END_S, "not noticed")
    assert "it ended with exit code 2" in served.output()
    status, headers, _ = served.infer("whole", json.loads(DOCUMENT))
    assert (status, headers.get("connection")) == (200, None)
    assert served.stop() == 0


def test_ready_stays_ready_on_old_connections(served: GatewayProcess) -> None:
    """A balancer that probes over a kept connection must not take the ports for dead."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=END_S)
    connection.request("GET", "/v2/health/ready")
    assert json.loads(connection.getresponse().read()) == {"ready": True}
    served.process.send_signal(signal.SIGUSR2)
    pid = successor_of(served, 1)
    try:
        until(lambda: "stopping: answering" in served.output(), END_S, "not stopping")
        connection.request("GET", "/v2/health/ready")
        response = connection.getresponse()
        assert (response.status, response.getheader("Connection")) == (200, "close")
        assert served.process.wait(END_S) == 0
    finally:
        os.kill(pid, signal.SIGTERM)
    until(all_gone([pid]), END_S, "the successor does not end")


ACTIVATE = """
import os, sys
for place, fd in enumerate(map(int, sys.argv[1].split(","))):
    os.dup2(fd, 3 + place)
os.environ |= {"LISTEN_FDS": "3", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": "metrics:grpc:http"}
os.execv(sys.executable, [sys.executable, "-m", "gateway", *sys.argv[2:]])
"""


def test_sockets_of_a_service_manager_are_served(tmp_path: Path) -> None:
    """And a connection that came before the gateway waits for it."""
    root = models.repository(tmp_path, {"whole": models.whole_linear()})
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    high = [os.dup(sock.fileno()) for sock in held]
    metrics, _, data = [sock.getsockname()[1] for sock in held]
    early = http.client.HTTPConnection("127.0.0.1", data, timeout=END_S)
    early.request("POST", PATH, DOCUMENT)
    places = ",".join(map(str, high))
    process = subprocess.Popen(
        [sys.executable, "-c", ACTIVATE, places, "serve", str(root), "--workers", "1"], pass_fds=high
    )
    try:
        response = early.getresponse()
        assert (response.status, json.loads(response.read())["outputs"][0]["data"]) == (200, Y)
        early.close()
        until(lambda: answers(metrics, "/healthz") == 200, END_S, "no operations port")
        until(lambda: answers(data, "/v2/health/ready") == 200, END_S, "not ready")
        process.send_signal(signal.SIGTERM)
        assert process.wait(END_S) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for sock in held:
            sock.close()
        for fd in high:
            os.close(fd)


def answers(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=END_S)
    connection.request("GET", path)
    status = connection.getresponse().status
    connection.close()
    return status
