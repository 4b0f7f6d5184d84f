"""Counts what the inference log keeps of a gateway that is killed under load: `python -m tests.log_crash`.

A real gateway with the log on answers requests over many connections; it is ended with SIGKILL, started again, and so
on, and stopped cleanly at the end. The client keeps the X-Request-Id of every answer it got and the number it had sent.
Then the log is sealed and compared:

* every row is there once, with the payload of its own request;
* every answer is there, but those of the last moments before a kill, which the gateway had not handed to the kernel
  yet: how many these were, and how old, is reported;
* rows that nobody got an answer to are at most those that were under way when the gateway was killed;
* positions of an epoch have no holes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import struct
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from gateway.inference_log.sealer import SealerBusy, seal_by_hand
from gateway.inference_log.sealer_settings import SealerSettings
from gateway.inference_log.segments import Layout
from tests.live.gateway_process import GatewayProcess

MODEL = Path(__file__).parent.parent / "gateway" / "demo" / "models" / "digits"
YOUNG_S = 5.0
"""Younger answers than this may be missing after a kill. A busy machine may hold up the writer's thread; usual are
some milliseconds."""
MAX_NUMBER = 1 << 24
"""Numbers travel as FP32."""
ID = b"X-Request-Id: "
LENGTH = b"Content-Length: "


@dataclass
class Answers:
    """What the client got. `numbers` and `times` by request id; times are monotonic seconds."""

    numbers: dict[bytes, int] = field(default_factory=dict)
    times: dict[bytes, float] = field(default_factory=dict)
    sent: int = 0
    kills: list[float] = field(default_factory=list)


class Caller(asyncio.Protocol):
    """One connection: sends the next request when the last is answered."""

    def __init__(self, answers: Answers, most: int, done: asyncio.Event) -> None:
        self._answers = answers
        self._most = most
        self._done = done
        self._buffer = b""
        self._number = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head = self._buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        length = self._buffer.index(LENGTH) + len(LENGTH)
        size = int(self._buffer[length : self._buffer.index(b"\r\n", length)])
        if len(self._buffer) < head + 4 + size:
            return
        assert self._buffer.startswith(b"HTTP/1.1 200"), self._buffer[:400]
        at = self._buffer.index(ID) + len(ID)
        request_id = self._buffer[at : at + 36]
        assert request_id not in self._answers.numbers, "an id was given twice"
        self._answers.numbers[request_id] = self._number
        self._answers.times[request_id] = time.monotonic()
        self._buffer = b""
        if len(self._answers.numbers) >= self._most:
            self._done.set()
        else:
            self._send()

    def connection_lost(self, error: Exception | None) -> None:
        self._done.set()

    def _send(self) -> None:
        assert self._transport is not None
        self._answers.sent += 1
        self._number = self._answers.sent % MAX_NUMBER
        body = b'{"inputs":[{"name":"image","shape":[1,64],"datatype":"FP32","data":[%d%b]}]}' % (
            self._number,
            b",0" * 63,
        )
        head = b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)


async def ask(port: int, answers: Answers, most: int, connections: int, kill: GatewayProcess | None) -> None:
    """Asks until there are `most` answers; then kills the gateway, while requests are under way."""
    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda: Caller(answers, most, done), "127.0.0.1", port) for _ in range(connections)
    ]
    await done.wait()
    if kill is not None:
        answers.kills.append(time.monotonic())
        kill.process.send_signal(signal.SIGKILL)
    for transport, _ in made:
        transport.abort()


def loaded(directory: Path, rows: int, kills: int, connections: int) -> Answers:
    """Serves, asks and kills; returns what was answered."""
    config = directory / "gateway.yaml"
    section = {"directory": str(directory / "log"), "segment_mb": 4, "seal_s": 5}
    model = {"name": "digits", "source": str(MODEL), "inference_log": {"overflow": "block"}}
    config.write_text(json.dumps({"inference_log": section, "models": [model]}))
    answers = Answers()
    for life in range(1, kills + 2):
        gateway = GatewayProcess("serve", "-c", str(config))
        try:
            gateway.wait_started()
            last = life > kills
            asyncio.run(ask(gateway.port, answers, rows * life // (kills + 1), connections, None if last else gateway))
            code = gateway.stop() if last else gateway.process.wait(60)
            assert code == (0 if last else -signal.SIGKILL), gateway.output()
        finally:
            gateway.close()
    return answers


@dataclass(frozen=True)
class Findings:
    answered: int
    rows: int
    lost: int
    """Answers without a row."""
    oldest_lost_ms: float
    """How long before the kill the oldest of them came."""
    unasked: int
    """Rows whose answer never reached the client."""


def _seal(settings: SealerSettings) -> None:
    """The gateway's own sealer finishes what it has begun when the gateway ends, at the lowest priority."""
    deadline = time.monotonic() + 60
    while True:
        try:
            seal_by_hand(settings)
        except SealerBusy:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def compared(directory: Path, answers: Answers, connections: int) -> Findings:
    """The log against the answers.

    Raises:
        AssertionError: a row too many, twice, with another's payload, or missing without excuse.
    """
    _seal(SealerSettings(directory / "log"))
    layout = Layout(directory / "log")
    assert layout.snapshot().wal == ()
    found: dict[bytes, int] = {}
    places: dict[str, set[int]] = {}
    for path in layout.parquet("requests"):
        for batch in pq.ParquetFile(path).iter_batches(columns=["request_id", "inputs", "epoch", "position"]):
            for line in batch.to_pylist():
                key = line["request_id"].encode()
                assert key not in found, f"{key!r} is there twice"
                found[key] = int(struct.unpack_from("<f", line["inputs"][0]["data"])[0])
                places.setdefault(line["epoch"], set()).add(line["position"])
    for stream in ("lifecycle", "gap"):
        for path in layout.parquet(stream):
            for line in pq.ParquetFile(path).read(columns=["epoch", "position"]).to_pylist():
                places.setdefault(line["epoch"], set()).add(line["position"])
    for epoch, positions in places.items():
        assert positions == set(range(len(positions))), f"epoch {epoch} has holes"
    mixed = {key for key in found.keys() & answers.numbers.keys() if found[key] != answers.numbers[key]}
    assert not mixed, f"{len(mixed)} rows carry another's payload"
    ages = [_age_s(answers, answers.times[key]) for key in answers.numbers.keys() - found.keys()]
    assert all(age <= YOUNG_S for age in ages), f"an answer {max(ages)} s before the kill is missing"
    unasked = len(found.keys() - answers.numbers.keys())
    assert unasked <= len(answers.kills) * connections + connections, f"{unasked} rows were answered to nobody"
    return Findings(len(answers.numbers), len(found), len(ages), max(ages, default=0.0) * 1000, unasked)


def _age_s(answers: Answers, answered: float) -> float:
    """How long before the next kill it was; endless where none followed."""
    return min([kill - answered for kill in answers.kills if kill >= answered], default=float("inf"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.log_crash")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--connections", type=int, default=64)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        started = time.monotonic()
        answers = loaded(Path(name), given.rows, given.kills, given.connections)
        took = time.monotonic() - started
        found = compared(Path(name), answers, given.connections)
    sys.stdout.write(
        f"{found.answered} answers in {took:.0f} s with {given.kills} kills; {found.rows} rows, none twice, "
        f"{found.unasked} of them for answers that a kill cut off; {found.lost} answers of the last "
        f"{found.oldest_lost_ms:.0f} ms before a kill were not written yet\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
