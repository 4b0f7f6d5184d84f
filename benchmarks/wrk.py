"""One round of load by `wrk`, and what came out of it."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.server import BenchmarkError, Server, taskset
from benchmarks.systems import tool

SCRIPT: Final = Path(__file__).parent / "post.lua"


@dataclass(frozen=True)
class Round:
    """One system, one round. `rate` is requests (for a bare run: rows) per second; latencies in microseconds."""

    rate: float
    p50_us: float
    p99_us: float
    batch: float = 0.0
    """Mean rows of an executed batch; 0 where it is not known."""
    requests: int = 0
    """Answers counted by the client."""


def load(server: Server, body_file: Path, connections: int, seconds: float, cores: str = "") -> Round:
    """Post `body_file` on `connections` keep-alive connections for `seconds`, one client thread.

    Raises:
        BenchmarkError: wrk failed, or a single request was not answered with 200.
    """
    command = [tool("wrk", "wrk"), "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "10s"]
    finished = subprocess.run(
        [*taskset(cores), *command, "-s", str(SCRIPT), server.url],
        env=os.environ | {"BENCH_BODY": str(body_file)},
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    lines = [line for line in finished.stdout.splitlines() if line.startswith("RESULT ")]
    if finished.returncode or not lines:
        raise BenchmarkError(f"wrk failed on {server.name}: {finished.stderr or finished.stdout}")
    result = json.loads(lines[0].removeprefix("RESULT "))
    if result["bad_status"] or result["socket_errors"] or not result["requests"]:
        raise BenchmarkError(f"{server.name} failed requests: {result}")
    rate = result["requests"] / result["duration_us"] * 1e6
    return Round(rate, result["p50_us"], result["p99_us"], requests=result["requests"])
