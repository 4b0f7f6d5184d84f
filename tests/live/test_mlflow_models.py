"""Models out of a real MLflow registry: what is served, what is said of it, and what is refused.

The server and the client that publishes are MLflow's own (mlflow_server.py).
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.registry.lock import LockFile
from gateway.registry.mlflow import MlflowResolver, MlflowSettings
from gateway.registry.resolver import Bounds
from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway
from tests.live.mlflow_server import MlflowServer, mlflow

__all__ = ["mlflow"]
pytestmark = pytest.mark.slow
STATED = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": [-1, 16]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": [-1, 4]}],
}
ROW = np.arange(16, dtype=np.float32)


def config(tmp_path: Path, url: str, *entries: str, more: str = "") -> list[str]:
    listed = "".join(f"  - {entry}\n" for entry in entries)
    (tmp_path / "gateway.yaml").write_text(
        f"registries: {{cache: cache, mlflow: {{url: '{url}'}}{more}}}\ndefaults: {{instances: 1}}\nmodels:\n{listed}"
    )
    return ["-c", str(tmp_path / "gateway.yaml"), "--workers", "1"]


def ask(process: GatewayProcess, model: str = "digits") -> tuple[str, np.ndarray[Any, Any]]:
    """The Inference-Model header, and the answer."""
    request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": ROW.tolist()}]}
    status, headers, document = process.infer(model, request)
    assert status == 200, document
    return headers["inference-model"], np.array(document["outputs"][0]["data"])


def expected(seed: int) -> np.ndarray[Any, Any]:
    weights = models.linear_weights(seed)
    answer: np.ndarray[Any, Any] = np.tanh(ROW @ weights["w"] + weights["b"])
    return answer


def provenance(process: GatewayProcess, model: str = "digits") -> dict[str, Any]:
    status, _, body = process.request("GET", f"/v2/models/{model}/provenance")
    assert status == 200
    document: dict[str, Any] = json.loads(body)
    return document


def refused(arguments: Sequence[str], code: int) -> str:
    """What a gateway that cannot start says."""
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    command = [sys.executable, "-m", "gateway", "serve", *ports, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@contextlib.contextmanager
def forwarded(port: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """A second address of a local server, and what makes nobody listen there any more."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", port)) as server:
            back = threading.Thread(target=pump, args=(server, client))
            back.start()
            pump(client, server)
            back.join()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                threads[-1].start()

    def cut() -> None:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()

    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    threads.append(threading.Thread(target=accept))
    threads[0].start()
    try:
        yield url, cut
    finally:
        cut()
        for thread in threads:
            thread.join(30)


def sha256sum(directory: Path) -> str:
    """The digest of a directory as contracts.md says one checks it with coreutils."""
    script = "find . -type f -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum"
    done = subprocess.run(["bash", "-c", script], cwd=directory, capture_output=True, text=True, check=True)
    return "sha256:" + done.stdout.split()[0]


def test_an_alias_is_served_with_all_that_mlflow_knows_of_it(mlflow: MlflowServer, tmp_path: Path) -> None:
    published = mlflow.publish(
        "full",
        models.linear(1),
        alias="champion",
        signature=STATED,
        dataset="train",
        run_tags={"mlflow.source.git.commit": "0123abcd"},
        tags={"team": "blue"},
    )
    environment = {"MLFLOW_TRACKING_URI": mlflow.url, "GATEWAY_MODEL_CACHE": str(tmp_path / "cache")}
    arguments = ("serve", "models:/full@champion", "--workers", "1", "--instances", "1")
    with gateway(*arguments, env=environment) as process:
        header, answer = ask(process, "full")
        said = provenance(process, "full")
        listed = json.loads(process.operations("/api/models"))[0]
        asked = process.metric("gateway_registry_requests_total", registry="mlflow", outcome="ok")
    np.testing.assert_allclose(answer, expected(1), rtol=1e-5)
    digest = sha256sum(mlflow.files(published))
    assert header == f'"full";version="1";digest="{digest}"'
    assert (said["name"], said["version"], said["digest"]) == ("full", "1", digest)
    assert (said["reference"], said["source"]) == ("models:/full@champion", "models:/full/1")
    assert (said["immutable_id"], said["run_id"]) == (published.model_id, published.run_id)
    assert (said["git_commit"], said["experiment"], said["tags"]) == ("0123abcd", "Default", {"team": "blue"})
    (dataset,) = said["datasets"]
    assert (dataset["name"], dataset["context"], len(dataset["digest"])) == ("train", "training", 8)
    assert "first 10000 rows" in dataset["digest_kind"]
    assert said["signature"]["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}]
    assert said["warnings"] == said["unknown"] == []
    assert said["runtime"]["onnxruntime"]
    assert (listed["source"], listed["reference"]) == ("models:/full/1", "models:/full@champion")
    assert asked >= 2, "resolved, and fetched"
    entry = LockFile(tmp_path / "cache" / "models.lock").read()["models:/full@champion"]
    assert (entry.uri, entry.digest) == ("models:/full/1", digest)


def test_what_nobody_stated_is_unknown_and_a_wrong_signature_is_told(mlflow: MlflowServer, tmp_path: Path) -> None:
    wrong = {"inputs": [{"name": "rows", "dtype": "float64", "shape": [-1, 16]}], "outputs": STATED["outputs"]}
    mlflow.publish("wrong", models.linear(1), signature=wrong)
    with gateway("serve", *config(tmp_path, mlflow.url, "{source: models:/wrong/latest}")) as process:
        said = provenance(process, "wrong")
    assert "datasets" in said["unknown"]
    assert said["datasets"] is None
    assert said["warnings"] == [
        "the signature in MLflow calls the input 'rows', the file 'x'",
        "the signature in MLflow says the input 'x' is FP64, the file says FP32",
    ]


def test_a_registry_that_is_gone_does_not_keep_a_known_model_from_starting(
    mlflow: MlflowServer, tmp_path: Path
) -> None:
    mlflow.publish("digits", models.linear(1), alias="champion")
    with forwarded(mlflow.port) as (url, cut):
        arguments = config(tmp_path, url, "{source: models:/digits@champion}")
        with gateway("serve", *arguments) as process:
            before, _ = ask(process)
            cut()
            assert ask(process)[0] == before, "who serves is not disturbed"
        with gateway("serve", *arguments) as process:
            assert ask(process)[0] == before
            assert process.metric("gateway_registry_stale", model="digits") == 1
            assert any("did not answer when it was asked last" in note for note in provenance(process)["notes"])
            assert "its registry cannot be asked, so it serves models:/digits/1 as it did last" in process.output()
        for place in (tmp_path / "models.lock", *(tmp_path / "cache" / "sha256").glob("*.json")):
            place.unlink()
        assert "refuses connections" in refused(arguments, code=4)


def test_pins_overwritten_files_and_a_tampered_cache(mlflow: MlflowServer, tmp_path: Path) -> None:
    published = mlflow.publish("pinned", models.linear(1), alias="champion")
    arguments = config(tmp_path, mlflow.url, "{source: models:/pinned@champion}")
    with gateway("serve", *arguments) as process:
        header, _ = ask(process, "pinned")
    digest = sha256sum(mlflow.files(published))
    cached = tmp_path / "cache" / "sha256" / digest.removeprefix("sha256:")
    # Somebody changes the cache: never served, fetched anew.
    (cached / "model.onnx").chmod(0o644)
    (cached / "model.onnx").write_bytes(models.linear(2))
    with gateway("serve", *arguments) as process:
        again, answer = ask(process, "pinned")
        assert "are not what they were" in process.output()
        assert process.metric("gateway_model_cache_damaged_total") == 1
    assert again == header
    np.testing.assert_allclose(answer, expected(1), rtol=1e-5)
    # Somebody overwrites the version in the registry: refused with both digests, unless the cache still has it.
    (mlflow.files(published) / "model.onnx").write_bytes(models.linear(2))
    with gateway("serve", *arguments) as process:
        assert ask(process, "pinned")[0] == header
    (cached / "model.onnx").chmod(0o644)
    (cached / "model.onnx").write_bytes(b"broken")
    changed = sha256sum(mlflow.files(published))
    said = refused(arguments, code=4)
    assert f"have digest {changed}, but models.lock says of {published.model_id} {digest}" in said
    assert not cached.exists()
    # A pin is refused with both digests, too.
    (tmp_path / "models.lock").unlink()
    pinned = config(tmp_path, mlflow.url, f"{{source: models:/pinned@champion, digest: '{digest}'}}")
    assert f"have digest {changed}, but the configuration pins {digest}" in refused(pinned, code=4)


def test_pickles_and_what_is_not_there(mlflow: MlflowServer, tmp_path: Path) -> None:
    mlflow.publish_pickle("pickled")
    said = refused(config(tmp_path, mlflow.url, "{source: models:/pickled/1}"), code=4)
    assert "and no onnx; only ONNX is served" in said
    assert "gateway convert model.pkl" in said
    said = refused(config(tmp_path, mlflow.url, "{source: models:/nothing@x}", "{source: models:/pickled@y}"), code=4)
    assert "has no model 'nothing' with the alias 'x'" in said
    assert "has no model 'pickled' with the alias 'y'" in said


def test_locking_and_serving_from_the_lock(mlflow: MlflowServer, tmp_path: Path) -> None:
    first = mlflow.publish("locked", models.linear(1), alias="champion")
    arguments = config(tmp_path, mlflow.url, "{source: models:/locked@champion}")

    def lock() -> str:
        command = [sys.executable, "-m", "gateway", "lock", *arguments[:2]]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    digest = sha256sum(mlflow.files(first))
    assert f"models:/locked@champion: models:/locked/1, {digest}" in lock()
    second = mlflow.publish("locked", models.linear(2), alias="champion")
    with gateway("serve", *arguments, "--locked") as process:
        header, answer = ask(process, "locked")
        assert process.metric("gateway_registry_requests_total") == 0
    assert digest in header
    np.testing.assert_allclose(answer, expected(1), rtol=1e-5)
    assert f"-> models:/locked/2, {sha256sum(mlflow.files(second))}" in lock()
    assert "as before: models:/locked/2" in lock()


def test_tensors_in_a_file_of_their_own_and_one_logged_model(mlflow: MlflowServer, tmp_path: Path) -> None:
    published = mlflow.publish("external", models.linear(3), external=True)
    entries = ("{source: models:/external/1}", f"{{source: 'models:/{published.model_id}', name: by-id}}")
    with gateway("serve", *config(tmp_path, mlflow.url, *entries)) as process:
        by_version, answer = ask(process, "external")
        by_id, same = ask(process, "by-id")
    np.testing.assert_allclose(answer, expected(3), rtol=1e-5)
    np.testing.assert_array_equal(answer, same)
    digest = sha256sum(mlflow.files(published))
    assert digest in by_version
    assert digest in by_id


def test_a_server_that_is_too_slow_or_sends_too_much_is_given_up(mlflow: MlflowServer, tmp_path: Path) -> None:
    published = mlflow.publish("large", models.linear(1, width=16, out=4))
    resolver = MlflowResolver(MlflowSettings(mlflow.url), Bounds(max_bytes=100))
    resolved = resolver.resolve("models:/large/1")
    assert resolved.immutable_id == published.model_id
    with pytest.raises(Exception, match=r"more than registries\.max_model_mb allows"):
        resolver.fetch(resolved, tmp_path)
    assert list(tmp_path.iterdir()) == []
