"""One server process under test: started pinned or not, waited for, checked, stopped.

Rules: the process and all its children inherit the pinning; its output goes to a file below `.bench/logs/`; it is
stopped by its own process id. A server whose answers differ from onnxruntime's is never measured.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import numpy as np

from benchmarks.workload import CACHE, Workload

START_TIMEOUT_S: Final = 90.0
STOP_TIMEOUT_S: Final = 20.0


class BenchmarkError(Exception):
    """A run that cannot be trusted or cannot be made; the text says what to do."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def taskset(cores: str) -> list[str]:
    """Command prefix that confines a process to `cores` ("0", "0,1"); empty: anywhere."""
    return ["taskset", "-c", cores] if cores else []


@dataclass
class Server:
    """What to start and how to ask it. Use as a context manager."""

    name: str
    command: Sequence[str | Path]
    port: int
    path: str
    """Path that is posted to."""
    ready_path: str
    cores: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    checked: bool = True
    """False for a peer that does not compute (nginx)."""
    metrics_port: int = 0
    grpc_port: int = 0
    notes: str = ""
    """Flags worth printing next to the figure."""

    def __enter__(self) -> Self:
        logs = CACHE / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self._log = logs / f"{self.name}-{self.port}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*taskset(self.cores), *map(str, self.command)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(self.environment),
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"

    def request(self, method: str, path: str, body: bytes | None = None, port: int = 0) -> tuple[int, bytes]:
        """One request on a connection of its own; returns status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=30)
        try:
            headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def check(self, work: Workload) -> None:
        """Ask every row once and compare with onnxruntime.

        Raises:
            BenchmarkError: a status other than 200, or an answer that differs.
        """
        for row, expected in enumerate(work.expected):
            status, answer = self.request("POST", self.path, work.body(row))
            if status != 200:
                raise BenchmarkError(f"{self.name} answers {status}: {answer[:300]!r}")
            if not self.checked:
                continue
            got = np.array(json.loads(answer)["outputs"][0]["data"], np.float32).reshape(-1)
            if not np.allclose(got, expected, rtol=1e-4, atol=1e-5):
                raise BenchmarkError(f"{self.name}: row {row} is {got.tolist()}, onnxruntime says {expected}")

    def rss_bytes(self) -> int:
        """Proportional memory of the process and all its descendants."""
        return sum(_pss_bytes(pid) for pid in _family(self.pid))

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                if self.request("GET", self.ready_path)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        tail = self._log.read_text(errors="replace")[-2000:]
        raise BenchmarkError(f"{self.name} did not become ready. Its last words:\n{tail}")


def _family(pid: int) -> list[int]:
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += _family(int(child))
    return found


def _pss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError(f"/proc/{pid}/smaps_rollup has no Pss line")
