"""A real Triton, without a container: the server inside NVIDIA's `nvidia-pytriton` wheel, and its best flags.

The wheel (0.7.0, x86-64, glibc 2.35) holds tritonserver 2.51 with its Python backend. It is downloaded once and
unpacked below `.bench/`, never installed. The model runs in Triton's own way: dynamic batching in front of a
`model.py` that calls the same onnxruntime on the same file.

Rules: an opponent is tuned before it is beaten. `triton_flags.json` holds the best flags found by `tune()` for each
scenario, with the machine they were found on; the search covers instances, queue delay, HTTP threads and preferred
batch sizes.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import onnxruntime

from benchmarks.server import BenchmarkError, Server, free_port
from benchmarks.workload import CACHE, Workload

WHEEL: Final = "nvidia-pytriton==0.7.0"
HOME: Final = CACHE / "triton"
FLAGS_FILE: Final = Path(__file__).parent / "triton_flags.json"

MODEL_PY: Final = """\
import json
import os
import sys

sys.path.insert(0, os.environ["BENCH_SITE_PACKAGES"])

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(json.loads(args["model_config"])["parameters"]["threads"]["string_value"])
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.run = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(r, "x").as_numpy() for r in requests]
        y = self.run(["y"], {"x": np.concatenate(inputs) if len(inputs) > 1 else inputs[0]})[0]
        responses, first = [], 0
        for x in inputs:
            tensor = pb_utils.Tensor("y", y[first : first + len(x)])
            responses.append(pb_utils.InferenceResponse(output_tensors=[tensor]))
            first += len(x)
        return responses
"""

CONFIG: Final = """\
name: "{model}"
backend: "python"
max_batch_size: {max_batch}
input [ {{ name: "x" data_type: TYPE_FP32 dims: [ 16 ] }} ]
output [ {{ name: "y" data_type: TYPE_FP32 dims: [ 4 ] }} ]
instance_group [ {{ count: {instances} kind: KIND_CPU }} ]
dynamic_batching {{ {preferred} max_queue_delay_microseconds: {delay_us} }}
parameters {{ key: "threads" value {{ string_value: "{threads}" }} }}
"""


@dataclass(frozen=True)
class Flags:
    """What can be tuned. `preferred` 0: none stated. `threads` are onnxruntime's, per instance."""

    instances: int = 1
    delay_us: int = 3000
    http_threads: int = 2
    preferred: int = 0
    max_batch: int = 64
    threads: int = 1
    grpc_pool: int = 8
    """Requests kept for reuse by the gRPC front end, whose threads cannot be chosen."""

    def __str__(self) -> str:
        texts = [
            f"{self.instances} instances",
            f"{self.delay_us} µs delay",
            f"{self.http_threads} HTTP threads",
            f"max batch {self.max_batch}",
            f"{self.threads} ORT threads",
            f"gRPC pool {self.grpc_pool}",
        ]
        return ", ".join([*texts, f"preferred {self.preferred}"] if self.preferred else texts)


def install() -> Path:
    """Fetch and unpack the wheel unless that was done before; returns the directory of tritonserver's files.

    Raises:
        BenchmarkError: the wheel cannot be had, or this Python's stub is not in it.
    """
    server = HOME / "pytriton" / "tritonserver"
    stub = server / "backends" / "python" / "triton_python_backend_stub"
    if stub.exists():
        return server
    wheels = CACHE / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), WHEEL]
    if subprocess.run(command, check=False).returncode:
        raise BenchmarkError(f"pip could not download {WHEEL}; measure without it: --without triton")
    (wheel,) = wheels.glob("nvidia_pytriton-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(HOME)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub_in_wheel = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub_in_wheel.exists():
        raise BenchmarkError(f"{WHEEL} has no Python backend for Python {version}")
    (server / "bin" / "tritonserver").chmod(0o755)
    shutil.copy(stub_in_wheel, stub)
    stub.chmod(0o755)
    return server


def _packages() -> Path:
    """Directory with numpy 1 and the onnxruntime of this environment: the stub's binding predates numpy 2."""
    folder = CACHE / f"triton-packages-{onnxruntime.__version__}"
    if not (folder / "onnxruntime").exists():
        wanted = ["numpy<2", f"onnxruntime=={onnxruntime.__version__}"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.run([*pip, "--target", str(folder), *wanted], check=False).returncode:
            raise BenchmarkError(f"pip could not install {' '.join(wanted)} for Triton's model")
    return folder


def environment() -> dict[str, str]:
    """Environment variables that tritonserver and its Python backend need."""
    # The stub loads libpython of the running version, which may lie outside the loader's usual places.
    libraries = [str(HOME / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR") or "")]
    return {
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
        # The embedded interpreter ignores PYTHONPATH; model.py reads this itself.
        "BENCH_SITE_PACKAGES": str(_packages()),
    }


def triton(work: Workload, flags: Flags, cores: str = "", *, over_grpc: bool = False) -> Server:
    """A tritonserver with one model, quiet, gRPC only where asked, no metrics: what costs it time is off."""
    server = install()
    port = free_port()
    grpc_port = free_port() if over_grpc else 0
    grpc_flags = [f"--grpc-port={grpc_port}", f"--grpc-infer-allocation-pool-size={flags.grpc_pool}"]
    command: list[str | Path] = [
        server / "bin" / "tritonserver",
        f"--model-repository={_repository(work, flags)}",
        f"--backend-directory={server / 'backends'}",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
        f"--http-thread-count={flags.http_threads}",
        *(["--grpc-address=127.0.0.1", *grpc_flags] if over_grpc else ["--allow-grpc=false"]),
        "--allow-metrics=false",
        "--allow-gpu-metrics=false",
        "--log-info=false",
    ]
    path = f"/v2/models/{work.model}"
    infer, ready = f"{path}/infer", "/v2/health/ready"
    return Server("triton", command, port, infer, ready, cores, environment(), grpc_port=grpc_port, notes=str(flags))


def _repository(work: Workload, flags: Flags) -> Path:
    name = "-".join(str(v) for v in asdict(flags).values())
    repository = CACHE / "triton-models" / f"{work.model}-{name}"
    version = repository / work.model / "1"
    version.mkdir(parents=True, exist_ok=True)
    shutil.copy(work.model_file, version / "model.onnx")
    (version / "model.py").write_text(MODEL_PY)
    preferred = f"preferred_batch_size: [ {flags.preferred} ]" if flags.preferred else ""
    text = CONFIG.format(**asdict(flags) | {"model": work.model, "preferred": preferred})
    (version.parent / "config.pbtxt").write_text(text)
    return repository


def best_flags(scenario: str) -> Flags:
    """The flags stored for a scenario, or the defaults of `Flags`."""
    stored = json.loads(FLAGS_FILE.read_text()) if FLAGS_FILE.exists() else {}
    return Flags(**stored.get(scenario, {}).get("flags", {}))


def tune(
    scenario: str, work: Workload, cores: str, measure: Callable[[Server], float], *, over_grpc: bool = False
) -> Flags:
    """Coordinate search: the grid of what interacts, then the rest one by one; the winner is stored."""
    results: dict[Flags, float] = {}

    def rate(flags: Flags) -> float:
        if flags not in results:
            with triton(work, flags, cores, over_grpc=over_grpc) as server:
                server.check(work)
                results[flags] = measure(server)
            print(f"  {results[flags]:9.0f}/s  {flags}", flush=True)
        return results[flags]

    best = max(_grid(Flags(), over_grpc=over_grpc), key=rate)
    for name, values in (("max_batch", (32, 128, 256)), ("preferred", (16, 32, 64)), ("threads", (2,))):
        tried = [replace(best, **{name: value}) for value in values]
        best = max([best, *(f for f in tried if f.preferred <= f.max_batch)], key=rate)
    stored = json.loads(FLAGS_FILE.read_text()) if FLAGS_FILE.exists() else {}
    stored[scenario] = {"flags": asdict(best), "rate": round(results[best]), "tried": len(results)}
    FLAGS_FILE.write_text(json.dumps(stored, indent=2) + "\n")
    return best


def _grid(start: Flags, *, over_grpc: bool) -> Iterator[Flags]:
    front_end = ("grpc_pool", (8, 64, 256)) if over_grpc else ("http_threads", (1, 2, 4))
    for instances, delay_us, value in itertools.product((1, 2), (0, 1000, 3000), front_end[1]):
        yield replace(start, instances=instances, delay_us=delay_us, **{front_end[0]: value})
