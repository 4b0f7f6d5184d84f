"""Long campaigns: `python -m tests.fuzz TARGET --runs 1000000 [--seconds N]`, coverage-guided by atheris.

Prints what the campaign came to as one line for the table in README.md. An input that breaks the target is written to
`--artifacts` (default: the present directory); move it to corpus/TARGET/ once the fault is mended.
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

INSTRUMENTED = [
    "gateway.protocol",
    "gateway.ingress",
    "gateway.backends",
    "gateway.management_override",
    "gateway.shared_memory",
    "hpack",
]
MAX_INPUT_S = 10
MAX_RSS_MIB = 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("target")
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=0, help="stop after this time even if runs are left; 0: never")
    parser.add_argument("--artifacts", type=Path, default=Path())
    chosen = parser.parse_args()
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=INSTRUMENTED):
        targets = importlib.import_module("tests.fuzz.targets").TARGETS
    if chosen.target not in targets:
        parser.error(f"no target {chosen.target}; there are {', '.join(targets)}")
    campaign(atheris, targets[chosen.target], chosen)


def campaign(atheris: Any, target: Any, chosen: argparse.Namespace) -> None:
    directory = Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus = directory / "corpus"
    corpus.mkdir()
    for number, data in enumerate([*target.seeds, *target.found()]):
        (corpus / f"seed-{number}").write_bytes(data)
    words = directory / "words"
    words.write_text("".join(f'"{escaped(word)}"\n' for word in target.words))
    arguments = [
        sys.argv[0], str(corpus), f"-runs={chosen.runs}", f"-max_len={target.max_bytes}", f"-timeout={MAX_INPUT_S}",
        f"-rss_limit_mb={MAX_RSS_MIB}", f"-artifact_prefix={chosen.artifacts}/{target.name}-", f"-dict={words}",
        "-print_final_stats=1",
    ]  # fmt: skip
    if chosen.seconds:
        arguments.append(f"-max_total_time={chosen.seconds}")
    begun = time.monotonic()
    executed = slowest = first_rss = 0

    def one(data: bytes) -> None:
        nonlocal executed, slowest, first_rss
        executed += 1
        if executed == chosen.runs // 10:
            first_rss = rss_mib()
        start = time.perf_counter_ns()
        target.run(data)
        slowest = max(slowest, time.perf_counter_ns() - start)
        if executed == chosen.runs:
            seconds = time.monotonic() - begun
            print(  # noqa: T201  # a program's output
                f"\n| {target.name} | {executed} | {seconds:.0f} s | slowest {slowest / 1e6:.0f} ms | "
                f"memory {first_rss} → {rss_mib()} MiB |",
                flush=True,
            )

    atheris.Setup(arguments, one)
    atheris.Fuzz()


def escaped(word: bytes) -> str:
    """As libFuzzer's dictionaries have it."""
    return "".join(f"\\x{byte:02x}" for byte in word)


def rss_mib() -> int:
    """Resident memory now; the largest so far is in libFuzzer's own statistics."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 2**20


if __name__ == "__main__":
    os.nice(19)
    main()
