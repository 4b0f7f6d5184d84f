"""The processes of a scenario: programmable backends and the gateway in front of them."""

from __future__ import annotations

import asyncio
import http.client
import random
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from tests.faults import backend_log
from tests.faults.behaviour import HEALTHY, Behaviour, Pace
from tests.faults.processes import Child

START_S: Final = 90.0
"""Generous: a loaded machine is slow, not broken."""


def free_port() -> int:
    """A port that is free, and that no outgoing connection will be given while its server is dead: below the range from
    which Linux takes those (a connection to a dead port of that range may even end up connected to itself)."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(1000):
        port = random.randrange(10_000, max(lowest, 20_000))
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


async def eventually(condition: Callable[[], bool], timeout_s: float, otherwise: str, every_s: float = 0.02) -> None:
    """Poll until `condition` holds.

    Raises:
        AssertionError: it did not within `timeout_s`.
    """
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, otherwise
        await asyncio.sleep(every_s)


class BackendProcess:
    """One programmable backend in a process of its own. Its ports and its log stay through restarts."""

    def __init__(
        self, name: str, folder: Path, pace: Pace, seed: int, host: str = "127.0.0.1", ports: tuple[int, int] = (0, 0)
    ) -> None:
        self.name = name
        self.http_port, self.grpc_port = ports if ports[0] else (free_port(), free_port())
        self.log = folder / f"{name}.log"
        self._control = folder / f"{name}.sock"
        command = [
            *(sys.executable, "-m", "tests.faults.backend", "--control", str(self._control), "--log", str(self.log)),
            *("--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port), "--seed", str(seed)),
            *("--host", host, "--base-s", str(pace.base_s), "--row-s", str(pace.row_s)),
        ]
        self.child = Child(command, folder / f"{name}.out")
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def wait_started(self) -> None:
        give_up, tries, why = time.monotonic() + START_S, 0, ""
        while True:
            told = f"{tries} tries, the last: {why}\n{self.child.output()}"
            assert self.child.alive, f"backend {self.name} ended: {told}"
            assert time.monotonic() < give_up, f"backend {self.name} did not start: {told}"
            try:
                self._streams = await asyncio.open_unix_connection(self._control)
            except OSError as error:
                tries, why = tries + 1, str(error)
                await asyncio.sleep(0.02)
            else:
                return

    async def behave(self, behaviour: Behaviour = HEALTHY) -> dict[str, int]:
        """From now on; returns the counters."""
        return await self._order({"behave": behaviour.to_document()})

    async def counters(self) -> dict[str, int]:
        return await self._order({"ask": True})

    async def _order(self, order: dict[str, Any]) -> dict[str, int]:
        if self._streams is None:
            await self.wait_started()
        assert self._streams is not None
        reader, writer = self._streams
        writer.write(orjson.dumps(order) + b"\n")
        answer: dict[str, int] = orjson.loads(await reader.readline())
        return answer

    def kill(self) -> None:
        """SIGKILL; its log stays."""
        self._hang_up()
        self.child.kill()

    async def restart(self, behaviour: Behaviour = HEALTHY) -> None:
        """A new process on the same ports, which behaves so from its first moment."""
        self._hang_up()
        self._control.unlink(missing_ok=True)
        self.child.restart("--behaviour", orjson.dumps(behaviour.to_document()).decode())
        await self.wait_started()

    def executions(self) -> list[backend_log.Execution]:
        return backend_log.read(self.log)

    def close(self) -> None:
        self._hang_up()
        self.child.go_on()
        self.child.close()

    def _hang_up(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


@dataclass(frozen=True, slots=True)
class BackendState:
    """One line of `/api/backends`."""

    model: str
    name: str
    state: str
    cause: str


@dataclass(frozen=True, slots=True)
class Where:
    """The world a gateway is put in."""

    prefix: tuple[str, ...] = ()
    """Words before its command line."""
    env: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None
    """Where its output goes; None: a file of its own."""


class GatewayServer:
    """`python -m gateway serve` with a configuration, or sources."""

    def __init__(
        self, folder: Path, arguments: Sequence[str], config: dict[str, Any] | None = None, where: Where | None = None
    ) -> None:
        where = where or Where()
        self.port, self.grpc_port, self.operations_port = free_port(), free_port(), free_port()
        self.folder = folder
        self.config = folder / "gateway.yaml"
        command = [*where.prefix, sys.executable, "-m", "gateway", "serve", *arguments]
        if config is not None:
            self.configure(config)
            command += ["--config", str(self.config)]
        command += ["--http-port", str(self.port), "--grpc-port", str(self.grpc_port)]
        command += ["--metrics-port", str(self.operations_port), "--log-format", "json"]
        self.child = Child(command, where.log or folder / "gateway.out", where.env)

    def configure(self, config: dict[str, Any]) -> None:
        """Write the configuration file; JSON is YAML."""
        self.config.write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))

    async def wait_started(self) -> None:
        def ready() -> bool:
            assert self.child.alive, f"the gateway ended with {self.child.exit_code}:\n{self.child.output()[-4000:]}"
            try:
                return self.get("/v2/health/ready")[0] == 200
            except OSError:
                return False

        await eventually(ready, START_S, "the gateway did not start", every_s=0.05)

    def get(self, path: str, port: int = 0) -> tuple[int, bytes]:
        """One request on a connection of its own; blocks."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=20)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post(self, path: str, document: Any, port: int = 0) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=60)
        try:
            connection.request("POST", path, orjson.dumps(document), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read(), {k.lower(): v for k, v in response.getheaders()}
        finally:
            connection.close()

    def backends(self) -> list[BackendState]:
        """What the operations port says of every backend."""
        return parse_backends(self.get("/api/backends", self.operations_port)[1])

    def metrics(self) -> str:
        return self.get("/metrics", self.operations_port)[1].decode()

    def workers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = orjson.loads(self.get("/api/workers", self.operations_port)[1])
        return found

    def close(self) -> None:
        self.child.go_on()
        self.child.close()


def parse_backends(body: bytes) -> list[BackendState]:
    return [BackendState(line["model"], line["backend"], line["state"], line["cause"]) for line in orjson.loads(body)]


def metric(text: str, name: str, **labels: str) -> float:
    """Sum of the samples called `name` whose labels include `labels`."""
    total = 0.0
    for line in text.splitlines():
        head, _, value = line.rpartition(" ")
        found, _, rest = head.partition("{")
        if found == name and all(f'{key}="{want}"' in rest for key, want in labels.items()):
            total += float(value)
    return total
