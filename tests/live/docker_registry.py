"""Debian's docker-registry (CNCF distribution) as a child process, and what pushes artefacts to it as ORAS does."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

USER, PASSWORD = "alice", "s3cret"
_HTPASSWD = "alice:$2y$05$abcdefghijklmnopqrstuuLK7U1u6pVRmL7L1BBM2aS35PSZnDXlK\n"
EMPTY = "application/vnd.oci.empty.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
START_S = 60.0


class DockerRegistry:
    """`host` is host:port. `push` needs no credentials of the caller."""

    def __init__(self, host: str, *, locked: bool) -> None:
        self.host = host
        self._secret = {}
        if locked:
            self._secret = {"Authorization": "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.host, timeout=60)
        with contextlib.closing(connection):
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {**self._secret, **sent})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()

    def blob(self, repository: str, content: bytes) -> str:
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        status, headers, _ = self.request("POST", f"/v2/{repository}/blobs/uploads/")
        assert status == 202
        place = headers["location"].partition(self.host)[2] or headers["location"]
        place += ("&" if "?" in place else "?") + f"digest={digest}"
        status, _, body = self.request("PUT", place, content, Content_Type="application/octet-stream")
        assert status == 201, body
        return digest

    def layer(self, repository: str, content: bytes, media_type: str, **annotations: str) -> dict[str, Any]:
        """`annotations`: with `__` for dots."""
        named = {name.replace("__", "."): value for name, value in annotations.items()}
        digest = self.blob(repository, content)
        return {"mediaType": media_type, "digest": digest, "size": len(content), "annotations": named}

    def file(self, repository: str, name: str, content: bytes, media_type: str = "application/octet-stream") -> Any:
        """A layer as `oras push` makes it of a file."""
        return self.layer(repository, content, media_type, org__opencontainers__image__title=name)

    def push(
        self,
        repository: str,
        tag: str,
        layers: list[Any],
        annotations: dict[str, str] | None = None,
        *,
        artifact_type: str = "application/vnd.unknown.artifact.v1",
        config_type: str = EMPTY,
    ) -> str:
        """Returns the manifest's digest."""
        config = {"mediaType": config_type, "digest": self.blob(repository, b"{}"), "size": 2}
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": artifact_type,
            "config": config,
            "layers": layers,
            "annotations": annotations or {},
        }
        body = json.dumps(manifest).encode()
        status, _, answer = self.request("PUT", f"/v2/{repository}/manifests/{tag}", body, Content_Type=MANIFEST)
        assert status == 201, answer
        return "sha256:" + hashlib.sha256(body).hexdigest()


@contextlib.contextmanager
def docker_registry(*, locked: bool = False) -> Iterator[DockerRegistry]:
    """`locked`: only for `USER` with `PASSWORD`."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("needs docker-registry: apt-get install docker-registry")
    with tempfile.TemporaryDirectory() as name, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        folder = Path(name)
        (folder / "htpasswd").write_text(_HTPASSWD)
        config: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
            "http": {"addr": host},
        }
        if locked:
            config["auth"] = {"htpasswd": {"realm": "tests", "path": str(folder / "htpasswd")}}
        (folder / "config.yml").write_text(json.dumps(config))  # YAML holds JSON
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [program, "serve", str(folder / "config.yml")], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        try:
            _wait(process, host, folder / "log")
            yield DockerRegistry(host, locked=locked)
        finally:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], host: str, log: Path) -> None:
    ends = time.monotonic() + START_S
    address, port = host.split(":")
    while True:
        with contextlib.suppress(OSError), socket.create_connection((address, int(port)), 1):
            return
        if process.poll() is not None or time.monotonic() > ends:
            raise AssertionError(f"docker-registry did not start:\n{log.read_text(errors='replace')}")
        time.sleep(0.02)
