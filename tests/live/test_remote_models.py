"""A gateway in front of real servers of other makers: two Tritons, an MLServer, and its own workers beside them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.server import free_port
from tests.differential.triton_process import TritonProcess, triton
from tests.differential.zoo import MODEL_PY
from tests.live import models, venvs
from tests.live.gateway_process import GatewayProcess, gateway, until

pytestmark = pytest.mark.slow

WIDTH = 16
CONFIG = """
backend: "BACKEND" max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [ 16 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 4 ] }
"""
COMPUTE = """
WEIGHTS = np.load(PATH)


def compute(inputs, version):
    return {"y": np.tanh(inputs["x"] @ WEIGHTS["w"] + WEIGHTS["b"])}
"""
RUNTIME = """
import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Linear(MLModel):
    async def load(self):
        weights = np.load(WEIGHTS)
        self.w, self.b = weights["w"], weights["b"]
        return True

    async def predict(self, payload):
        x = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32)
        y = np.tanh(x @ self.w + self.b).astype(np.float32)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", y)])
"""
TENSORS = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, WIDTH]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model for our own workers."""
    config = CONFIG.replace("BACKEND", "onnxruntime")
    return models.repository(tmp_path_factory.mktemp("models"), {"linear": models.linear()}, {"linear": config})


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model for Triton, whose wheel executes Python."""
    root, files = tmp_path_factory.mktemp("theirs"), tmp_path_factory.mktemp("weights")
    version = root / "linear" / "1"
    version.mkdir(parents=True)
    compute = COMPUTE.replace("PATH", repr(str(weights(files))))
    (version / "model.py").write_text(MODEL_PY.format(compute=compute))
    (root / "linear" / "config.pbtxt").write_text(CONFIG.replace("BACKEND", "python"))
    return root


def weights(folder: Path) -> Path:
    found = models.linear_weights()
    np.savez(folder / "weights.npz", w=found["w"], b=found["b"])
    return folder / "weights.npz"


@pytest.fixture(scope="module")
def tritons(theirs: Path) -> Iterator[tuple[TritonProcess, TritonProcess]]:
    with triton(theirs, []) as a, triton(theirs, []) as b:
        yield a, b


@contextlib.contextmanager
def mlserver(folder: Path) -> Iterator[int]:
    """An MLServer with the model `linear`; yields its HTTP port."""
    program = venvs.need(venvs.mlserver)
    port, grpc_port, metrics_port = free_port(), free_port(), free_port()
    (folder / "runtime.py").write_text(f"WEIGHTS = {str(weights(folder))!r}\n{RUNTIME}")
    settings = {"http_port": port, "grpc_port": grpc_port, "metrics_port": metrics_port, "parallel_workers": 0}
    (folder / "settings.json").write_text(json.dumps({"host": "127.0.0.1", **settings}))
    model = {"name": "linear", "implementation": "runtime.Linear", "platform": "numpy", **TENSORS}
    (folder / "model-settings.json").write_text(json.dumps(model))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(program.path), "start", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **program.variables},
        )
    try:
        until(
            lambda: b"Uvicorn running" in (folder / "log").read_bytes() or process.poll() is not None, 120, "MLServer"
        )
        assert process.poll() is None, (folder / "log").read_text()[-4000:]
        yield port
    finally:
        process.kill()
        process.wait(30)


def rows(seed: int, count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def ask(subject: GatewayProcess, x: np.ndarray[Any, Any]) -> tuple[dict[str, str], np.ndarray[Any, Any]]:
    document = {"inputs": [{"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}]}
    status, headers, answer = subject.infer("linear", document)
    assert status == 200, answer
    (y,) = answer["outputs"]
    return headers, np.asarray(y["data"], np.float32).reshape(y["shape"])


def right(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    known = models.linear_weights()
    found: np.ndarray[Any, Any] = np.tanh(x @ known["w"] + known["b"])
    return found


def backends(subject: GatewayProcess) -> dict[str, bool]:
    (model,) = json.loads(subject.operations("/api/models"))
    return {backend["name"]: backend["available"] for backend in model["backends"]}


def executed_by(headers: dict[str, str]) -> str:
    return headers["inference-backend"].split('"')[1]


def test_two_tritons_and_an_mlserver_are_one_model(
    tritons: tuple[TritonProcess, TritonProcess], tmp_path: Path
) -> None:
    a, b = tritons
    with mlserver(tmp_path) as port:
        urls = [f"http://127.0.0.1:{a.port}", f"grpc://127.0.0.1:{b.grpc_port}", f"http://127.0.0.1:{port}"]
        with gateway("serve", *urls) as subject:
            until(lambda: list(backends(subject).values()) == [True] * 3, 60, subject.output())
            seen = set()
            errors: list[BaseException] = []

            def caller(number: int) -> None:
                try:
                    for turn in range(40):
                        x = rows(100 * number + turn, 1 + turn % 3)
                        headers, y = ask(subject, x)
                        np.testing.assert_allclose(y, right(x), rtol=1e-4, atol=1e-5)
                        assert headers["inference-model"] == '"linear";version="1"'
                        seen.add(executed_by(headers))
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=caller, args=(number,)) for number in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not errors, errors[0]
            assert seen == {f"127.0.0.1:{p}" for p in (a.port, b.grpc_port, port)}


def test_workers_and_a_triton_are_one_model_where_the_entry_says_so(
    repository: Path, tritons: tuple[TritonProcess, TritonProcess], tmp_path: Path
) -> None:
    a, b = tritons
    file = tmp_path / "gateway.yaml"

    def write(*ports: int) -> None:
        listed = ", ".join(f"{{url: 'http://127.0.0.1:{port}', name: triton-{port}}}" for port in ports)
        file.write_text(
            f"server: {{workers: 1}}\nmodels:\n  - {{name: linear, source: {repository / 'linear'}, instances: 1, "
            f"balancing: round_robin, backends: [{listed}]}}\n"
        )

    write(a.port)
    with gateway("serve", "-c", str(file)) as subject:
        until(lambda: backends(subject) == {"onnx-1": True, f"triton-{a.port}": True}, 60, subject.output())
        found: dict[str, str] = {}
        for seed in range(200):
            x = rows(seed, 2)
            headers, y = ask(subject, x)
            np.testing.assert_allclose(y, right(x), rtol=1e-4, atol=1e-5)
            found[executed_by(headers)] = headers["inference-model"]
            if len(found) == 2:
                break
        assert found[f"triton-{a.port}"] == '"linear";version="1"'
        assert found["onnx-1"].startswith('"linear";version="1";digest="sha256:')
        write(b.port)
        subject.process.send_signal(signal.SIGHUP)
        until(lambda: backends(subject) == {"onnx-1": True, f"triton-{b.port}": True}, 60, subject.output())
        assert subject.output().count("is ready:") == 1  # the model was not loaded again
        status, _, body = subject.request("GET", "/v2/models/linear/provenance")
        manifest = json.loads(body)
        assert (status, manifest["digest"][:7], manifest["backends"][0]["name"]) == (200, "sha256:", f"triton-{b.port}")


def test_a_gateway_whose_servers_are_all_down_says_so_and_ends() -> None:
    subject = GatewayProcess("serve", f"http://127.0.0.1:{free_port()}")
    try:
        assert subject.process.wait(60) == 4
        assert "there is nothing to serve: no server answers: http://127.0.0.1:" in subject.output()
    finally:
        subject.close()


def test_a_triton_that_dies_and_comes_back_costs_nobody_an_answer(theirs: Path) -> None:
    with triton(theirs, []) as a, triton(theirs, []) as b:
        urls = [f"http://127.0.0.1:{a.port}", f"http://127.0.0.1:{b.port}"]
        with gateway("serve", *urls) as subject:
            until(lambda: list(backends(subject).values()) == [True] * 2, 60, subject.output())
            stop = threading.Event()
            errors: list[BaseException] = []
            answered = [0]

            def caller() -> None:
                try:
                    while not stop.is_set():
                        x = rows(answered[0], 1)
                        np.testing.assert_allclose(ask(subject, x)[1], right(x), rtol=1e-4, atol=1e-5)
                        answered[0] += 1
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=caller) for _ in range(4)]
            for thread in threads:
                thread.start()
            try:
                until(lambda: answered[0] > 50, 60, "no answers")
                a.process.kill()
                a.process.wait()
                before = answered[0]
                until(lambda: answered[0] > before + 200 or bool(errors), 60, "no answers after the death")
                a.ensure()
                until(lambda: all(backends(subject).values()) or bool(errors), 60, subject.output())
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            assert not errors, errors[0]
