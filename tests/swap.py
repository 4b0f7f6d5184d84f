"""A model's version is swapped again and again under load, and every single answer is held against what it claims.

    python -m tests.swap --swaps 100            prints a table

The two variants of the model have different weights, so the numbers of an answer tell which variant computed it, and
the digest in its head must be that variant's. Clients send at a fixed share of what the gateway took at full speed.
Counted: answers that were not 200, answers whose digest is not that of the weights that computed them, and batches
(`Inference-Batch`) whose members name more than one digest. Memory is that of the gateway and all of its workers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

from gateway.registry.digest import read_artifact
from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway

FACTORS = (2.0, 3.0)
WIDTH = 4
_DIGEST = re.compile(rb'digest="(sha256:[0-9a-f]{64})"')
_BATCH = re.compile(rb'(?im)^inference-batch: "([^"]+)"')
_MODEL = re.compile(rb"(?im)^inference-model: ([^\r]*)")


def scale(factor: float) -> bytes:
    """`x` FP32 [batch, WIDTH] → `y` = factor · x."""
    x, y = (models.value(name, "FP32", ["batch", WIDTH]) for name in "xy")
    return models.model([helper.make_node("Mul", ["x", "w"], ["y"])], [x], [y], {"w": np.array([factor], np.float32)})


class Repository:
    """A model's directory, whose file one variant after another takes; other places of models fit the same shape."""

    def __init__(self, root: Path) -> None:
        self.place = root / "m" / "1" / "model.onnx"
        self.place.parent.mkdir(parents=True)
        self.factors: dict[str, float] = {}
        self.turn = 0
        for factor in FACTORS:
            self.put(factor)
            self.factors[read_artifact(self.place.parent, "m", "1").digest] = factor
        self.put(FACTORS[0])

    def put(self, factor: float) -> None:
        other = self.place.parent.parent / "coming"
        other.write_bytes(scale(factor))
        other.replace(self.place)

    def move(self) -> None:
        """The source means the other variant from now on."""
        self.turn += 1
        self.put(FACTORS[self.turn % 2])


@dataclass
class Found:
    """What clients saw."""

    answers: int = 0
    failed: list[str] = field(default_factory=list)
    mismatched: int = 0
    by_digest: Counter[str] = field(default_factory=Counter)
    batches: dict[str, set[str]] = field(default_factory=dict)
    took_ms: list[float] = field(default_factory=list)

    @property
    def mixed(self) -> int:
        return sum(len(digests) > 1 for digests in self.batches.values())


class Clients:
    """Connections that send one request after another, each at its own beat; no answer goes unchecked."""

    def __init__(self, port: int, factors: dict[str, float], connections: int) -> None:
        self._port = port
        self._factors = factors
        self._connections = connections
        self.found = Found()
        self.stopped = False
        self.beat_s = 0.0
        """Between two requests of a connection; 0.0: as fast as they are answered."""

    async def run(self) -> None:
        await asyncio.gather(*[self._one(number) for number in range(self._connections)])

    async def _one(self, number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        due = time.monotonic() + self.beat_s * number / self._connections
        turn = number
        while not self.stopped:
            turn += self._connections
            if self.beat_s:
                due += self.beat_s
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            sent = float(1 + turn % 1000)
            data = [sent + place for place in range(WIDTH)]
            body = json.dumps(
                {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, WIDTH], "data": data}]}
            ).encode()
            at = time.monotonic()
            writer.write(
                b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
            answer = await reader.readexactly(length)
            self.found.took_ms.append((time.monotonic() - at) * 1e3)
            self._check(head, answer, data)
        writer.close()

    def _check(self, head: bytes, body: bytes, sent: list[float]) -> None:
        found = self.found
        found.answers += 1
        if b" 200 " not in head[:20]:
            found.failed.append(body.decode(errors="replace")[:200])
            return
        digest = _DIGEST.search(_MODEL.search(head)[1])[1].decode()  # type: ignore[index]
        batch = _BATCH.search(head)[1].decode()  # type: ignore[index]
        answered = json.loads(body)["outputs"][0]["data"]
        expected = self._factors.get(digest)
        if expected is None or answered != [expected * value for value in sent]:
            found.mismatched += 1
        found.by_digest[digest] += 1
        found.batches.setdefault(batch, set()).add(digest)


def rss_mib(process: GatewayProcess) -> float:
    """Of the gateway and everything it started."""
    return sum(_rss(pid) for pid in _family(process.process.pid)) / 1024


def _family(pid: int) -> Iterator[int]:
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            yield from _family(int(child))


def _rss(pid: int) -> int:
    try:
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


async def act(port: int, path: str) -> dict[str, Any]:
    """POST to the operations port; AssertionError if it is refused."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
        b"Connection: close\r\n\r\n{}" % path.encode()
    )
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b" 200 " in head[:20], answer.decode()
    document: dict[str, Any] = json.loads(body)
    return document


@dataclass
class Outcome:
    found: Found
    swaps: int
    rollbacks: int
    full_speed: float
    """Requests a second."""
    sent: float
    swap_ms: list[float]
    calm_ms: list[float]
    """How long answers took at the same pace before the first swap."""
    rss: list[float]
    """MiB, before and after every tenth of the swaps."""

    def table(self) -> str:
        rss = ", ".join(f"{value:.0f}" for value in self.rss)
        took = np.percentile(self.found.took_ms, [50, 99, 100])
        calm = np.percentile(self.calm_ms, [50, 99, 100])
        swap = np.percentile(self.swap_ms, [50, 99]) if self.swap_ms else [0, 0]
        rows = [
            ("swaps (of these by rollback)", f"{self.swaps} ({self.rollbacks})"),
            ("requests a second, full speed", f"{self.full_speed:.0f}"),
            ("requests a second, while swapping", f"{self.sent:.0f} ({self.sent / max(self.full_speed, 1):.0%})"),
            ("answers checked", f"{self.found.answers}"),
            ("failed", f"{len(self.found.failed)}"),
            ("digest does not fit the values", f"{self.found.mismatched}"),
            ("batches of two digests", f"{self.found.mixed} of {len(self.found.batches)}"),
            ("answers of each variant", ", ".join(map(str, self.found.by_digest.values()))),
            ("answered after, ms (50, 99, 100 %)", f"{took[0]:.1f}, {took[1]:.1f}, {took[2]:.1f}"),
            ("the same while nothing is swapped", f"{calm[0]:.1f}, {calm[1]:.1f}, {calm[2]:.1f}"),
            ("noticed to flipped, ms (50, 99 %)", f"{swap[0]:.0f}, {swap[1]:.0f}"),
            ("resident memory, MiB", rss),
        ]
        return "\n".join(f"{name:<36}{value}" for name, value in rows)


async def swap_under_load(
    process: GatewayProcess,
    source: Any,
    swaps: int,
    *,
    load: float = 0.8,
    connections: int = 16,
    calibrate_s: float = 2.0,
    rollback_every: int = 10,
    answers_each: int = 100,
) -> Outcome:
    """Swap `swaps` times while clients send `load` of what the gateway takes at full speed.

    Args:
        source: see `Repository`; `move` changes what the model's source means, `factors` tells variants by digest.
        rollback_every: so many changes later one is a rollback, and the next undoes it; 0: none is.
        answers_each: from one change to the next.
    """
    clients = Clients(process.port, source.factors, connections)
    running = asyncio.ensure_future(clients.run())
    await asyncio.sleep(calibrate_s / 4)  # connections are made, batches have found their size
    before, started = clients.found.answers, time.monotonic()
    await asyncio.sleep(calibrate_s)
    full = (clients.found.answers - before) / (time.monotonic() - started)
    clients.beat_s = connections / (full * load)
    clients.found.took_ms.clear()
    await asyncio.sleep(calibrate_s)
    calm, clients.found.took_ms = clients.found.took_ms, []
    rss, spent, rollbacks = [rss_mib(process)], [], 0
    before, started = clients.found.answers, time.monotonic()
    number = 0
    while number < swaps and not running.done():
        at = time.monotonic()
        if rollback_every and number % rollback_every == rollback_every - 1 and number + 1 < swaps:
            for _ in range(2):
                done = await act(process.operations_port, "/api/models/m/rollback")
                assert done["outcome"] == "rolled_back", done
            number, rollbacks = number + 2, rollbacks + 2
        else:
            source.move()
            done = await act(process.operations_port, "/api/models/m/refresh?wait_s=120")
            assert done["outcome"] == "swapped", done
            spent.append((time.monotonic() - at) * 1e3)
            number += 1
        while clients.found.answers - before < answers_each * number and not running.done():
            await asyncio.sleep(0.001)
        if number >= len(rss) * swaps / 10:
            rss.append(rss_mib(process))
    sent = (clients.found.answers - before) / (time.monotonic() - started)
    clients.stopped = True
    await running
    return Outcome(clients.found, number, rollbacks, full, sent, spent, calm, rss)


def main(arguments: list[str] | None = None) -> int:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.swap", description=about)
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--load", type=float, default=0.8, help="share of full speed (default 0.8)")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--keep-previous", type=int, default=1)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        outcome = asyncio.run(_run(Path(directory), given))
    sys.stdout.write(outcome.table() + "\n")
    bad = outcome.found.failed or outcome.found.mismatched or outcome.found.mixed
    return 1 if bad else 0


async def _run(root: Path, given: argparse.Namespace) -> Outcome:
    source = Repository(root / "models")
    config = configured(root, source, keep_previous=given.keep_previous)
    with gateway("serve", "-c", str(config)) as process:
        return await swap_under_load(
            process,
            source,
            given.swaps,
            load=given.load,
            connections=given.connections,
            rollback_every=10 if given.keep_previous else 0,
            answers_each=500,
        )


def configured(root: Path, source: Repository, *, keep_previous: int = 1, interval_s: float = 3600.0) -> Path:
    """A configuration that follows the directory, and asks only when it is told to."""
    config = root / "gateway.yaml"
    config.write_text(
        f"models:\n  - source: {source.place.parent.parent}\n    poll_interval_s: {interval_s:g}\n"
        f"    keep_previous: {keep_previous}\n"
    )
    return config


if __name__ == "__main__":
    sys.exit(main())
