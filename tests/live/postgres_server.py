"""A real PostgreSQL of this test run's own: Debian's package, its data in a new directory, on loopback only.

Rules: the server never runs as root (it refuses to), so its files belong to another user where the tests are root; no
test sees another's tables, because each asks for a database of its own; durability is off, since what is tested is the
client. A server that cannot be had skips the test that asks, with what to install.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import asyncpg
import pytest

from tests.live.gateway_process import until

USER: Final = "gateway_sink"
PASSWORD: Final = "correct-horse-battery"
START_S: Final = 60.0
INSTALL: Final = "PostgreSQL's server is not here (on Debian: apt-get install postgresql)"
T = TypeVar("T")


def program(name: str) -> str:
    """Path of one of the server's programs; newest installed version first. Skips the test if there is none."""
    roots = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name.zfill(4), reverse=True)
    for folder in [*map(str, roots), *os.environ.get("PATH", "").split(os.pathsep)]:
        if (found := Path(folder) / name).is_file():
            return str(found.resolve())
    pytest.skip(INSTALL)


class PostgresServer:
    """One cluster; started, stopped, killed and frozen at will. `port` stays the same over restarts."""

    def __init__(self, *settings: str) -> None:
        """`settings`: further lines of postgresql.conf."""
        self._postgres, initdb = program("postgres"), program("initdb")
        self.directory = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
        self._account = _account()
        (self.directory / "password").write_text(PASSWORD)
        self._own(self.directory, self.directory / "password")
        self.data = self.directory / "data"
        self._run(
            *(initdb, "-D", str(self.data), "-U", USER, "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale"),
            *("--no-sync", f"--pwfile={self.directory / 'password'}"),
        )
        self.port = _free_port()
        lines = (
            *("listen_addresses = '127.0.0.1'", f"port = {self.port}", f"unix_socket_directories = '{self.directory}'"),
            *("fsync = off", "full_page_writes = off", "max_connections = 30", "shared_buffers = 32MB", *settings),
        )
        with (self.data / "postgresql.conf").open("a") as stream:
            stream.write("\n".join(("", *lines, "")))
        self.process: subprocess.Popen[bytes] | None = None
        self._databases = 0

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        with (self.directory / "log").open("ab") as stream:
            self.process = subprocess.Popen(
                [self._postgres, "-D", str(self.data)], stdout=stream, stderr=stream, **self._as_user()
            )

        def answers() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, (self.directory / "log").read_text()[-2000:]
            with contextlib.suppress(OSError, asyncpg.PostgresError):
                return self.run(self.dsn("postgres"), lambda one: one.fetchval("SELECT true")) is True
            return False

        until(answers, START_S, "PostgreSQL did not start")

    def stop(self, number: int = signal.SIGQUIT) -> None:
        """SIGQUIT: at once, like a crash of the whole server, connections cut; SIGINT: orderly."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
            self.process.wait(START_S)
            self.process = None

    def freeze(self, *, frozen: bool = True) -> None:
        """Stop all its processes from running without ending them, or let them go on."""
        assert self.process is not None
        for pid in [self.process.pid, *_children(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP if frozen else signal.SIGCONT)

    def dsn(self, database: str, user: str = USER, password: str = PASSWORD) -> str:
        return f"postgresql://{user}:{password}@127.0.0.1:{self.port}/{database}"

    def database(self) -> str:
        """DSN of a new, empty database."""
        self._databases += 1
        name = f"test_{os.getpid()}_{self._databases}"
        self.run(self.dsn("postgres"), lambda one: one.execute(f"CREATE DATABASE {name}"))
        return self.dsn(name)

    def run(self, dsn: str, ask: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        """What `ask` comes to, on a connection of its own; from code outside any event loop."""

        async def asked() -> T:
            connection = await asyncpg.connect(dsn, timeout=10)
            try:
                return await ask(connection)
            finally:
                await connection.close(timeout=10)

        return asyncio.run(asked())

    def rows(self, dsn: str, sql: str, *arguments: object) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in self.run(dsn, lambda one: one.fetch(sql, *arguments))]

    def execute(self, dsn: str, sql: str) -> None:
        self.run(dsn, lambda one: one.execute(sql))

    def configure(self, *settings: str) -> None:
        """Append settings; they hold from the next start."""
        with (self.data / "postgresql.conf").open("a") as stream:
            stream.write("\n".join(("", *settings, "")))

    def own(self, *paths: Path) -> None:
        """Give files to the server's user."""
        self._own(*paths)

    def close(self) -> None:
        with contextlib.suppress(AssertionError):
            self.freeze(frozen=False)
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _own(self, *paths: Path) -> None:
        if self._account is not None:
            for path in paths:
                os.chown(path, self._account.pw_uid, self._account.pw_gid)

    def _as_user(self) -> dict[str, Any]:
        here: dict[str, Any] = {"cwd": self.directory, "stdin": subprocess.DEVNULL}
        if self._account is not None:
            here |= {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": []}
        return here

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False, **self._as_user())
        assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def postgres(*settings: str) -> Iterator[PostgresServer]:
    """A started server, removed at the end."""
    server = PostgresServer(*settings)
    try:
        server.start()
        yield server
    finally:
        server.close()


def _account() -> pwd.struct_passwd | None:
    """Whom the server runs as, where this process is root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    pytest.skip("PostgreSQL does not run as root, and there is no other user here")


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
