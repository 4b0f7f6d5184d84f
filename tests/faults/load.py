"""Clients: raw HTTP on keep-alive connections at a set rate, every answer checked against the nonces that were sent.

Rules: arrivals are a Poisson process that waits for nobody (a slow answer does not lower the rate); latency counts
from the instant a request was due, so that a stall is seen by every request it delays; a connection carries one
request at a time; nothing is ever sent again by the client.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import orjson

from tests.faults.history import BROKEN_OFF, LEFT, MALFORMED, OPEN, RIGHT, TWICE, UNSENT, WRONG, History
from tests.faults.nonce import INPUT, MODEL, OUTPUT, POISON, answers

DOCUMENTED: Final = frozenset({400, 404, 408, 413, 415, 422, 429, 431, 499, 500, 502, 503, 504})
MODEL_ERROR: Final = 500
PATIENCE_S: Final = 40.0
"""How long after the end of the load an answer may still come."""
_FIRST: Final = 1 << 44
"""Nonces start here: no probe or warm-up of a gateway comes near."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What the clients do."""

    rate: float
    """Requests per second; 0.0: as fast as `connections` clients can, each after its last answer."""
    rows: tuple[int, ...] = (1, 2, 4, 8, 8, 16, 16)
    """A request's rows are drawn from these."""
    connections: int = 64
    """Most connections at a time; a request that finds none free waits its turn."""
    json: float = 0.1
    """Share of the requests whose tensors are JSON instead of binary."""
    leave: float = 0.0
    """Share of the requests whose client hangs up before the answer."""
    leave_after_s: float = 0.005
    poison: float = 0.0
    """Share of the requests with a poisoned row."""
    timeout_ms: int = 0
    """Sent as `X-Request-Timeout-Ms`; 0: nothing is said."""
    seed: int = 1

    @property
    def mean_rows(self) -> float:
        return sum(self.rows) / len(self.rows)


class Load:
    """Runs a profile against a port until told to stop."""

    def __init__(self, port: int, profile: Profile, model: str = MODEL) -> None:
        self.history = History()
        self.poisoned: set[int] = set()
        """Indexes of the requests that carry a poisoned row."""
        self.leaks = 0
        """Answers that hold a text which only a backend knows. With status 500 they may: a model's own refusal of this
        very request is meant for whoever sent it."""
        self._port = port
        self._profile = profile
        self._rng = random.Random(profile.seed)
        self._head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: faults\r\n"
        if profile.timeout_ms:
            self._head += f"X-Request-Timeout-Ms: {profile.timeout_ms}\r\n"
        self._next_nonce = _FIRST + (profile.seed << 32)
        self._free: deque[_Client] = deque()
        self._connected: set[_Client] = set()
        self._clients = 0
        self._waiting: deque[tuple[int, float]] = deque()
        self._due = 0.0
        self._running = False
        self._open = 0
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._templates: dict[int, bytes] = {}

    def start(self) -> None:
        self._running = True
        if self._profile.rate:
            self._due = time.monotonic()
            self._tick()
        else:
            for _ in range(self._profile.connections):
                self._issue(time.monotonic())

    async def stop(self) -> None:
        """No new requests; returns when all that were sent have ended, or patience has."""
        self._running = False
        self._idle.clear()
        while self._waiting:
            self.ended(self._waiting.popleft()[0], UNSENT)
        if self._open:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self._idle.wait()
            except TimeoutError:
                pass
        self.close()
        await asyncio.sleep(0)  # the loop closes the sockets

    def close(self) -> None:
        """Hang up, in the middle of an answer if need be."""
        self._running = False
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()
        for client in list(self._connected):
            client.close()

    @property
    def outstanding(self) -> int:
        return self._open

    def _tick(self) -> None:
        now = time.monotonic()
        while self._running and self._due <= now:
            self._issue(self._due)
            self._due += self._rng.expovariate(self._profile.rate)
        if self._running:
            self._loop.call_later(max(0.0, self._due - now), self._tick)

    def _issue(self, due: float) -> None:
        rng = self._rng
        rows = rng.choice(self._profile.rows)
        index = self.history.new(due, self._next_nonce, rows)
        self._next_nonce += rows
        if self._profile.poison and rng.random() < self._profile.poison:
            self.poisoned.add(index)
        self._open += 1
        if self._free:
            self._free.popleft().ask(index)
        elif self._clients < self._profile.connections:
            self._clients += 1
            task = self._loop.create_task(self._connect(index))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._waiting.append((index, due))

    async def _connect(self, index: int) -> None:
        try:
            _, client = await self._loop.create_connection(lambda: _Client(self), "127.0.0.1", self._port)
        except OSError:
            self._clients -= 1
            self.ended(index, BROKEN_OFF)
            return
        self._connected.add(client)
        client.ask(index)

    def request(self, index: int) -> bytes:
        """Head and body of a request."""
        history = self.history
        rows = history.rows[index]
        nonces = np.arange(rows, dtype=np.int64) + history.nonce[index]
        if index in self.poisoned:
            nonces[self._rng.randrange(rows)] |= POISON
        if self._profile.json and self._rng.random() < self._profile.json:
            tensor = {"name": INPUT, "datatype": "INT64", "shape": [rows, 1], "data": nonces.tolist()}
            body = orjson.dumps({"inputs": [tensor]})
            return f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        template = self._templates.get(rows)
        if template is None:
            template = self._templates[rows] = self._binary(rows)
        return template + nonces.tobytes()

    def _binary(self, rows: int) -> bytes:
        parameters = {"binary_data_size": rows * 8}
        tensor = {"name": INPUT, "datatype": "INT64", "shape": [rows, 1], "parameters": parameters}
        text = orjson.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}})
        size = f"Inference-Header-Content-Length: {len(text)}\r\nContent-Length: {len(text) + rows * 8}\r\n\r\n"
        return f"{self._head}{size}".encode() + text

    def leaves(self) -> float:
        """Seconds after which the client of the next request hangs up; 0.0: it stays."""
        profile = self._profile
        if profile.leave and self._rng.random() < profile.leave:
            return profile.leave_after_s * (0.1 + 1.9 * self._rng.random())
        return 0.0

    def ended(self, index: int, outcome: int, backend: str = "", attempt: int = 0) -> None:
        if self.history.outcome[index] == OPEN:
            self._open -= 1
        self.history.end(index, time.monotonic(), outcome, backend, attempt)
        if not self._profile.rate and self._running:
            self._issue(time.monotonic())
        elif not self._open and not self._running:
            self._idle.set()

    def free(self, client: _Client) -> None:
        if self._waiting:
            client.ask(self._waiting.popleft()[0])
        else:
            self._free.append(client)

    def gone(self, client: _Client) -> None:
        """A connection ended."""
        self._clients -= 1
        self._connected.discard(client)
        if client in self._free:
            self._free.remove(client)
        if self._waiting:
            index, _ = self._waiting.popleft()
            self._clients += 1
            task = self._loop.create_task(self._connect(index))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


class _Client(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._index = -1
        self._buffer = b""
        self._leaving: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport = None  # type: ignore[assignment]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._index >= 0:
            index, self._index = self._index, -1
            self._load.ended(index, BROKEN_OFF)
        self._load.gone(self)

    def close(self) -> None:
        self._transport.abort()

    def ask(self, index: int) -> None:
        self._index = index
        self._transport.write(self._load.request(index))
        leave_s = self._load.leaves()
        if leave_s:
            self._leaving = asyncio.get_running_loop().call_later(leave_s, self._leave, index)

    def _leave(self, index: int) -> None:
        if self._index == index:
            self._index = -1
            self._load.ended(index, LEFT)
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._index < 0:
            self._load.history.end(len(self._load.history) - 1, time.monotonic(), TWICE)
            return
        self._buffer += data
        at = self._buffer.find(b"\r\n\r\n")
        if at < 0:
            return
        head = self._buffer[:at].decode("latin-1")
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:])
        length = int(fields.get("Content-Length", 0))
        if len(self._buffer) < at + 4 + length:
            return
        body, rest = self._buffer[at + 4 : at + 4 + length], self._buffer[at + 4 + length :]
        self._buffer = b""
        index, self._index = self._index, -1
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        outcome = TWICE if rest else self._outcome(index, int(head[9:12]), fields, body)
        # A request that was split names each backend that answered a part; it counts for the first.
        first, *more = [part.partition(";attempt=") for part in fields.get("Inference-Backend", "").split(", ")]
        attempt = max(int(number or 0) for _, _, number in (first, *more))
        self._load.ended(index, outcome, first[0].strip('"'), attempt)
        if fields.get("Connection", "").lower() == "close":
            self._transport.close()
        else:
            self._load.free(self)

    def _outcome(self, index: int, status: int, fields: dict[str, str], body: bytes) -> int:
        load = self._load
        if b"upstream-secret" in body and status != MODEL_ERROR:
            load.leaks += 1
        if status != RIGHT:
            return _refusal(load, status, body)
        try:
            size = int(fields.get("Inference-Header-Content-Length", len(body)))
            (output,) = orjson.loads(body[:size])["outputs"]
            blob = body[size:]
            if (output["name"], output["datatype"]) != (OUTPUT, "INT64"):
                return WRONG
            got = np.frombuffer(blob, np.int64) if blob else np.array(output["data"], np.int64)
        except (ValueError, KeyError):
            load.history.said(f"{status} {body[:200]!r}")
            return MALFORMED
        asked = np.arange(load.history.rows[index], dtype=np.int64) + load.history.nonce[index]
        if output.get("shape") != [len(asked), 1] or got.shape != asked.shape:
            return WRONG
        right = got == answers(asked)
        if index in load.poisoned:  # answered all the same: any of its rows may be the poisoned one
            right |= got == answers(asked | POISON)
        return RIGHT if right.all() else WRONG


def _refusal(load: Load, status: int, body: bytes) -> int:
    try:
        text = orjson.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        text = None
    load.history.said(f"{status} {text or repr(body[:200])}")
    if not isinstance(text, str) or not text or status not in DOCUMENTED or "Traceback" in text:
        return MALFORMED
    return status
