"""A real gateway as a child process, started the way a user starts it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

START_S = 120.0
"""Generous: a loaded two-core machine is slow, not broken."""


_ADDRESSES = re.compile(
    r"inference\s+https?://[^:]+:(\d+)/v2\s+grpc\s+[^:]+:(\d+)\b[^\n]*\n\s*operations\s+http://[^:]+:(\d+)/"
)


class GatewayProcess:
    """`python -m gateway serve …` on free ports unless told otherwise; stdout and stderr are kept in files."""

    def __init__(self, verb: str, *arguments: str, env: dict[str, str] | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.log = Path(self._directory.name) / "log"
        ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]  # the last of several wins
        command = [sys.executable, "-m", "gateway", verb, *ports, *arguments]
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})}
            )
        self.port = 0
        self.grpc_port = 0
        self.operations_port = 0

    def wait_started(self) -> None:
        def ports() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"the gateway ended with {self.process.returncode}:\n{self.output()}")
            found = _ADDRESSES.search(self.output())
            if found:
                self.port, self.grpc_port, self.operations_port = map(int, found.groups())
            return found is not None

        until(ports, START_S, "the gateway did not start")

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()

    def infer(self, model: str, document: Any) -> tuple[int, dict[str, str], Any]:
        status, headers, body = self.request("POST", f"/v2/models/{model}/infer", json.dumps(document).encode())
        return status, headers, json.loads(body)

    def operations(self, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.operations_port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().read()

    def workers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.operations("/api/workers"))
        return found

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples called `name` whose labels include `labels`."""
        total = 0.0
        for line in self.operations("/metrics").decode().splitlines():
            sample = re.match(r"([a-zA-Z_:]+)(?:\{(.*)\})? (\S+)", line)
            if sample and sample[1] == name:
                have = dict(re.findall(r'(\w+)="([^"]*)"', sample[2] or ""))
                if labels.items() <= have.items():
                    total += float(sample[3])
        return total

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it and wait for its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)
        self._directory.cleanup()


@contextlib.contextmanager
def gateway(*arguments: str, env: dict[str, str] | None = None) -> Iterator[GatewayProcess]:
    """A started gateway; killed at the end if the test has not stopped it."""
    process = GatewayProcess(*arguments, env=env)
    try:
        process.wait_started()
        yield process
    finally:
        process.close()


def until(condition: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
    """Poll until `condition` holds; the bound is only there so that a failing test ends."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(otherwise)
        time.sleep(0.02)
