"""A real Triton as a child process: HTTP, gRPC and metrics on free ports, models under explicit control.

Rules: the wheel is fetched and unpacked by benchmarks/triton.py, once; nothing is installed. `start` returns when the
server is ready; a server that dies is started again by `ensure` and the death is counted, because some requests are
known to kill this version.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from benchmarks.server import free_port
from benchmarks.triton import environment, install
from tests.live.gateway_process import until

START_S: Final = 180.0


class TritonProcess:
    """One tritonserver. `models`: what is loaded under explicit control; none: the whole repository, for good."""

    def __init__(self, repository: Path, models: Sequence[str], *flags: str) -> None:
        self.port, self.grpc_port, self.operations_port = free_port(), free_port(), free_port()
        server = install()
        self._directory = tempfile.TemporaryDirectory()
        self.log = Path(self._directory.name) / "log"
        self.deaths = 0
        control = ["--model-control-mode=explicit", *(f"--load-model={model}" for model in models)] if models else []
        self._command = [
            str(server / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={server / 'backends'}",
            f"--cache-directory={server / 'caches'}",
            "--cache-config=local,size=1048576",
            "--http-address=127.0.0.1",
            f"--http-port={self.port}",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self.grpc_port}",
            "--metrics-address=127.0.0.1",
            f"--metrics-port={self.operations_port}",
            "--allow-gpu-metrics=false",
            *control,
            *flags,
        ]
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=os.environ | environment(),
            )

    def wait_ready(self) -> None:
        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"Triton ended with {self.process.returncode}:\n{self.output()[-6000:]}")
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
                with contextlib.closing(connection):
                    connection.request("GET", "/v2/health/ready")
                    return connection.getresponse().status == 200
            return False

        until(ready, START_S, "Triton did not become ready")

    def ensure(self) -> None:
        """Start it again if the last request ended it."""
        if self.process.poll() is not None:
            self.deaths += 1
            self._start()
            self.wait_ready()

    def metrics(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.operations_port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(30)
        self._directory.cleanup()


@contextlib.contextmanager
def triton(repository: Path, models: Sequence[str], *flags: str) -> Iterator[TritonProcess]:
    process = TritonProcess(repository, models, *flags)
    try:
        process.wait_ready()
        yield process
    finally:
        process.close()
