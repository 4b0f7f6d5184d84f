"""A real MLflow tracking server with its model registry, and MLflow's own client to publish models with.

Rules: server and client are MLflow's, in an environment of their own (venvs.py); it listens on loopback and keeps all
it has in a directory of its own. A test that moves aliases uses a model name of its own, so that a server may be
shared. What cannot be had skips the test that asks.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from tests.live import venvs
from tests.live.gateway_process import until

START_S: Final = 180.0
QUIET: Final = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "GIT_PYTHON_REFRESH": "quiet"}
WEBHOOKS: Final = {
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
    "MLFLOW_WEBHOOK_CACHE_TTL": "0",
    "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=",
}
"""Lets the server send events to this machine."""


@dataclass(frozen=True)
class Published:
    """A model version as MLflow knows it."""

    name: str
    version: str
    model_id: str
    run_id: str


class MlflowServer:
    """One server. `url` stays the same over `kill` and `start`."""

    def __init__(self) -> None:
        self._program = venvs.need(venvs.mlflow)
        self.directory = Path(tempfile.mkdtemp(prefix="mlflow-"))
        self.artifacts = self.directory / "artifacts"
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._server: subprocess.Popen[bytes] | None = None
        self._client: subprocess.Popen[str] | None = None

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Returns when it answers."""
        log = (self.directory / "server.log").open("ab")
        command = [
            *(str(self._program.path), "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self.directory / 'mlflow.db'}"),
            *("--artifacts-destination", str(self.artifacts)),
        ]
        with log:
            self._server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | QUIET | WEBHOOKS,
                start_new_session=True,
            )
        until(self._answers, START_S, "MLflow's server did not start")

    def _answers(self) -> bool:
        assert self._server is not None
        if self._server.poll() is not None:
            pytest.fail(f"MLflow's server ended:\n{(self.directory / 'server.log').read_text()[-3000:]}")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    def kill(self) -> None:
        """The server and its workers are gone at once; what it stored stays."""
        if self._server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait(30)
            self._server = None

    def close(self) -> None:
        if self._client is not None:
            self._client.kill()
            self._client.wait(30)
            for pipe in (self._client.stdin, self._client.stdout):
                if pipe is not None:
                    pipe.close()
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- MLflow's client -------------------------------------------------------------------------------------------

    def publish(
        self,
        name: str,
        model: bytes,
        *,
        alias: str = "",
        signature: Mapping[str, list[dict[str, Any]]] | None = None,
        dataset: str = "",
        run_tags: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        external: bool = False,
    ) -> Published:
        """Log an ONNX model in a run and register it as the next version of `name`.

        `signature`: {"inputs": [{"name", "dtype", "shape"}], "outputs": […]}; `dataset`: name of a training set;
        `tags`: of the version; `external`: tensors in a file of their own.
        """
        path = self.directory / "to-publish.onnx"
        path.write_bytes(model)
        said = self._ask(
            do="publish",
            name=name,
            path=str(path),
            alias=alias,
            signature=signature,
            dataset=dataset,
            run_tags=dict(run_tags or {}),
            tags=dict(tags or {}),
            external=external,
        )
        return Published(name, **said)

    def publish_pickle(self, name: str) -> Published:
        """A scikit-learn model, as MLflow stores it."""
        return Published(name, **self._ask(do="sklearn", name=name))

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """The alias means this version from now on."""
        self._ask(do="alias", name=name, alias=alias, version=version)

    def delete_alias(self, name: str, alias: str) -> None:
        self._ask(do="alias", name=name, alias=alias, version="")

    def webhook(self, url: str, secret: str) -> None:
        """Events of aliases are sent to `url` from now on, signed with `secret`."""
        self._ask(do="webhook", url=url, secret=secret)

    def files(self, published: Published) -> Path:
        """Where the server keeps the version's files, for tests that tamper with them."""
        (found,) = self.artifacts.glob(f"*/models/{published.model_id}/artifacts")
        return found

    def _ask(self, **command: Any) -> dict[str, Any]:
        client = self._client
        if client is None:
            script = Path(__file__).with_name("mlflow_publisher.py")
            with (self.directory / "client.log").open("wb") as log:
                client = self._client = subprocess.Popen(
                    [self._program.path.with_name("python"), script, self.url],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=os.environ | QUIET,
                    cwd=self.directory,
                )
            assert client.stdout is not None
            client.stdout.readline()
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(json.dumps(command) + "\n")
        client.stdin.flush()
        line = client.stdout.readline()
        said: dict[str, Any] = (
            json.loads(line) if line else {"error": (self.directory / "client.log").read_text()[-2000:]}
        )
        if "error" in said:
            pytest.fail(f"MLflow's client: {said['error']}")
        return said


@contextlib.contextmanager
def mlflow_server() -> Iterator[MlflowServer]:
    """A started server; gone at the end."""
    server = MlflowServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@functools.cache
def _shared() -> MlflowServer:
    server = MlflowServer()
    atexit.register(server.close)
    server.start()
    return server


@pytest.fixture(scope="module")
def mlflow() -> MlflowServer:
    """One server for all tests of a run, whichever module imports this. Do not kill it: make your own for that."""
    return _shared()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
