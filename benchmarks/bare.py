"""onnxruntime alone: as many sessions as the gateway has instances, no server, no queue; the ceiling.

    python -m benchmarks.bare model.onnx --sessions 2 --batch 32 --seconds 3

Runs in a process of its own so that it can be pinned; sessions run in threads, onnxruntime releases the GIL.
Prints one JSON object: rows per second over all sessions, and the p50 and p99 of one call in microseconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.server import taskset
from benchmarks.workload import session
from benchmarks.wrk import Round


def run(model_file: Path, sessions: int, batch: int, seconds: float, cores: str = "") -> Round:
    """Measure in a fresh process, confined to `cores` if given; `rate` is rows per second."""
    where = ["--sessions", str(sessions), "--batch", str(batch), "--seconds", str(seconds)]
    command = [*taskset(cores), sys.executable, "-m", "benchmarks.bare", str(model_file), *where]
    printed = subprocess.run(
        command, capture_output=True, check=True, timeout=seconds + 60, cwd=Path(__file__).parent.parent
    ).stdout
    result = json.loads(printed)
    return Round(result["rows_per_second"], result["p50_us"], result["p99_us"], float(batch))


def _loop(model_file: Path, batch: int, seconds: float, start: threading.Barrier, durations: list[float]) -> None:
    running = session(model_file)
    x = np.random.default_rng(1).uniform(-1, 1, (batch, 16)).astype(np.float32)
    for _ in range(20):
        running.run(["y"], {"x": x})
    start.wait()
    clock = time.perf_counter
    now = clock()
    end = now + seconds
    while now < end:
        running.run(["y"], {"x": x})
        before, now = now, clock()
        durations.append(now - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_file", type=Path)
    parser.add_argument("--sessions", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    barrier = threading.Barrier(args.sessions)
    per_session: list[list[float]] = [[] for _ in range(args.sessions)]
    threads = [
        threading.Thread(target=_loop, args=(args.model_file, args.batch, args.seconds, barrier, durations))
        for durations in per_session
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = sum(len(d) * args.batch / sum(d) for d in per_session)
    p50, p99 = np.percentile(np.concatenate(per_session), [50, 99]) * 1e6
    print(json.dumps({"rows_per_second": rate, "p50_us": float(p50), "p99_us": float(p99)}))


if __name__ == "__main__":
    main()
