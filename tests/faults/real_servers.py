"""Servers of other makers with the rig's model: Triton out of NVIDIA's wheel, and Seldon's MLServer.

Both are children of the rig like all others. Each gives the model of `nonce.py` in its own way of running Python.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import time
from pathlib import Path
from typing import Final

from benchmarks import triton as wheel
from benchmarks.server import BenchmarkError
from tests.faults import nonce
from tests.faults.processes import Child
from tests.faults.registry import Unavailable
from tests.faults.servers import free_port
from tests.live import venvs

SHM: Final = f"faults_{os.getpid()}_"
"""Beginning of the names of what Triton's Python backend leaves in /dev/shm when it is killed; ours to remove."""
START_S: Final = 120.0

TRITON_MODEL: Final = f"""\
import os
import sys

sys.path.insert(0, os.environ["BENCH_SITE_PACKAGES"])

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "{nonce.INPUT}").as_numpy().view(np.uint64)
            y = x * np.uint64({nonce.MULTIPLIER}) + np.uint64({nonce.ADDEND})
            tensor = pb_utils.Tensor("{nonce.OUTPUT}", y.view(np.int64))
            responses.append(pb_utils.InferenceResponse(output_tensors=[tensor]))
        return responses
"""

TRITON_CONFIG: Final = f"""\
name: "{nonce.MODEL}"
backend: "python"
max_batch_size: {nonce.MAX_BATCH}
input [ {{ name: "{nonce.INPUT}" data_type: TYPE_INT64 dims: [ 1 ] }} ]
output [ {{ name: "{nonce.OUTPUT}" data_type: TYPE_INT64 dims: [ 1 ] }} ]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
"""

MLSERVER_MODEL: Final = f"""\
import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse, MetadataTensor


class Nonce(MLModel):
    async def load(self):
        self.inputs = [MetadataTensor(name="{nonce.INPUT}", datatype="INT64", shape=[-1, 1])]
        self.outputs = [MetadataTensor(name="{nonce.OUTPUT}", datatype="INT64", shape=[-1, 1])]
        return True

    async def predict(self, payload):
        x = NumpyCodec.decode_input(payload.inputs[0]).astype(np.int64).view(np.uint64)
        y = (x * np.uint64({nonce.MULTIPLIER}) + np.uint64({nonce.ADDEND})).view(np.int64)
        output = NumpyCodec.encode_output("{nonce.OUTPUT}", y.reshape(-1, 1))
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=[output])
"""


class RealServer:
    """One process group on ports that stay. `kill` ends it with all that it started."""

    def __init__(self, name: str, child: Child, http_port: int, grpc_port: int) -> None:
        self.name = name
        self.child = child
        self.http_port, self.grpc_port = http_port, grpc_port

    async def wait_ready(self) -> None:
        """Raises AssertionError: it ended, or did not become ready in time."""
        give_up = time.monotonic() + START_S
        while not await asyncio.to_thread(self._ready):
            assert self.child.alive, f"{self.name} ended:\n{self.child.output()[-2000:]}"
            assert time.monotonic() < give_up, f"{self.name} does not become ready:\n{self.child.output()[-2000:]}"
            await asyncio.sleep(0.1)

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=5)
        try:
            connection.request("GET", f"/v2/models/{nonce.MODEL}/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def kill(self) -> None:
        """SIGKILL to everything in its group."""
        os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait(30)

    async def restart(self) -> None:
        self.child.restart()
        await self.wait_ready()

    def close(self) -> None:
        self.child.close()
        for path in Path("/dev/shm").glob(f"{SHM}{self.name}_*"):
            path.unlink(missing_ok=True)


def triton(name: str, folder: Path) -> RealServer:
    """Raises Unavailable: the wheel cannot be had."""
    try:
        server = wheel.install()
        env = wheel.environment()
    except BenchmarkError as why:
        raise Unavailable(str(why)) from why
    place = folder / name / nonce.MODEL / "1"
    place.mkdir(parents=True)
    (place / "model.py").write_text(TRITON_MODEL)
    (place.parent / "config.pbtxt").write_text(TRITON_CONFIG)
    http_port, grpc_port = free_port(), free_port()
    command = [
        str(server / "bin" / "tritonserver"),
        f"--model-repository={folder / name}",
        f"--backend-directory={server / 'backends'}",
        *("--http-address=127.0.0.1", f"--http-port={http_port}", "--grpc-address=127.0.0.1"),
        *(
            f"--grpc-port={grpc_port}",
            "--allow-metrics=false",
            f"--backend-config=python,shm-region-prefix-name={name}",
        ),
    ]
    return RealServer(name, Child(command, folder / f"{name}.out", env), http_port, grpc_port)


def mlserver(name: str, folder: Path) -> RealServer:
    """Raises Unavailable: MLServer cannot be had."""
    try:
        program = venvs.mlserver()
    except venvs.NotToBeHad as why:
        raise Unavailable(str(why)) from why
    place = folder / name
    place.mkdir()
    (place / "nonce_runtime.py").write_text(MLSERVER_MODEL)
    (place / "model-settings.json").write_text(
        json.dumps({"name": nonce.MODEL, "implementation": "nonce_runtime.Nonce", "parameters": {"version": "1"}})
    )
    ports = free_port(), free_port(), free_port()
    (place / "settings.json").write_text(
        json.dumps({"host": "127.0.0.1", "http_port": ports[0], "grpc_port": ports[1], "metrics_port": ports[2],
                    "parallel_workers": 0, "debug": False})
    )  # fmt: skip
    env = {**program.variables, "PYTHONPATH": str(place)}
    return RealServer(name, Child([str(program.path), "start", str(place)], folder / f"{name}.out", env), *ports[:2])
