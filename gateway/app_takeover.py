"""Rolling restart: listening sockets that outlive a process, so that nobody is ever refused a connection.

Two ways to hand sockets over, both by systemd's convention (sd_listen_fds(3)): descriptors from 3 on, `LISTEN_FDS` of
them, meant for the process `LISTEN_PID`, named in `LISTEN_FDNAMES`. The names here are `http`, `grpc` and `metrics`,
each as often as there are addresses; without names they come in this order, one of each.

- Socket activation: a service manager holds the sockets. Connections wait in them while the gateway restarts: it
  accepts none before its models are loaded.
- SIGUSR2: a running gateway starts its own command line anew, with its sockets inherited, waits until that process
  serves, and only then stops accepting. The queue of the sockets is shared: a connection in it is accepted by one of
  the two. What the old one has it answers, with `Connection: close` or GOAWAY; then it ends. A successor that does not
  come up changes nothing. What operators drained when it was started is drained there too; a share that was changed at
  run time is not repeated there, nor a rollback or promotion that models.lock does not name, which is told when it is
  started (`not_handed_over`).

The successor is a child that nothing binds to its parent, so it lives on. It has another process id: under a service
manager that follows the first one, use socket activation.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Final

from gateway.errors import BindError
from gateway.releases_model import ModelReleasesStatus
from gateway.variants_status import TrafficStatus

log = logging.getLogger("gateway")

HTTP: Final = "http"
GRPC: Final = "grpc"
METRICS: Final = "metrics"
NAMES: Final = (HTTP, GRPC, METRICS)
START_TIMEOUT_S: Final = 600.0
"""A successor that does not serve by then is ended: models may be large, but not as large as that."""
_FIRST_FD: Final = 3
_OUT_OF_THE_WAY: Final = 64
_READY: Final = "GATEWAY_READY_FD"
DRAINED: Final = "GATEWAY_DRAINED"
"""Variable of a successor's environment; see `operations_backends.Backends.orders_as_text`."""
# Only the process itself can know its number, which LISTEN_PID has to name, and move descriptors to where they belong.
_SHIM: Final = (
    "import os, sys\n"
    "for place, fd in enumerate(map(int, sys.argv[1].split(','))):\n"
    "    os.dup2(fd, 3 + place)\n"
    "    os.close(fd)\n"
    "os.environ['LISTEN_PID'] = str(os.getpid())\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)

Sockets = Mapping[str, Sequence[socket.socket]]


def not_handed_over(releases: Iterable[ModelReleasesStatus], traffic: Iterable[TrafficStatus]) -> list[str]:
    """What operators changed at run time and a successor, which knows the configuration and the sources only, will not
    do: sentences for people."""
    found = []
    for model in releases:
        live = next((release.version for release in model.releases if release.role == "live"), "none")
        if model.withheld and not model.remembers:
            found.append(
                f"model {model.model}: version {live} serves by an operator's choice; the successor serves what "
                f"{model.reference or 'its source'} means; move that too"
            )
    for split in traffic:
        for role, variant in (("canary", split.canary), ("shadow", split.shadow)):
            if variant is not None and variant.percent != variant.configured_percent:
                found.append(
                    f"model {split.model}: its {role} has {variant.percent:g} % by an operator's choice; the successor "
                    f"gives it the {variant.configured_percent:g} % of the configuration; change that too"
                )
    return found


def inherited(environment: MutableMapping[str, str]) -> dict[str, list[socket.socket]]:
    """The listening sockets this process was given, by name; the variables that say so are removed, because they are
    for nobody else.

    Raises:
        BindError: what was given cannot be listened on; the text says why and what to change.
    """
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "")
    if environment.pop("LISTEN_PID", "") != str(os.getpid()) or not count.isdecimal():
        return {}
    found: dict[str, list[socket.socket]] = {}
    given = names.split(":") if names else list(NAMES)
    if len(given) < int(count):
        raise BindError("inherited", _FIRST_FD, f"{count} sockets are given, but only {len(given)} names for them")
    for place in range(int(count)):
        fd, name = _FIRST_FD + place, given[place]
        if name not in NAMES:
            raise BindError(
                "inherited", fd, f"a socket is called {name[:64]!r}; name sockets {', '.join(NAMES)} (LISTEN_FDNAMES)"
            )
        found.setdefault(name, []).append(_listening(fd, name))
    return found


def _listening(fd: int, name: str) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise BindError("inherited", fd, f"the socket called {name!r} is none: {error.strerror}") from None
    tcp = sock.type == socket.SOCK_STREAM and sock.family in (socket.AF_INET, socket.AF_INET6)
    if not tcp or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 1:
        sock.close()
        raise BindError("inherited", fd, f"the socket called {name!r} does not listen for TCP connections")
    sock.setblocking(False)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def tell_ready(environment: MutableMapping[str, str]) -> None:
    """Tell whoever started this process as its successor that it serves; harmless if nobody did."""
    text = environment.pop(_READY, "")
    if text.isdecimal():
        with contextlib.suppress(OSError):  # the predecessor is gone
            os.write(int(text), b"1")
        with contextlib.suppress(OSError):
            os.close(int(text))


class Successor:
    """A process that is to take over these sockets. `command`: what to run."""

    def __init__(
        self, sockets: Mapping[str, Iterable[int]], command: Sequence[str] | None = None, drained: str = ""
    ) -> None:
        """Start it. `sockets`: descriptors of listening sockets, by name. Raises OSError."""
        names = [name for name, fds in sockets.items() for _ in fds]
        ready, theirs = os.pipe2(os.O_CLOEXEC)
        copies: list[int] = []
        try:
            handed = [*[fd for fds in sockets.values() for fd in fds], theirs]
            copies.extend(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _OUT_OF_THE_WAY) for fd in handed)
            environment = {
                **os.environ,
                "LISTEN_FDS": str(len(names)),
                "LISTEN_FDNAMES": ":".join(names),
                _READY: str(_FIRST_FD + len(names)),
            } | ({DRAINED: drained} if drained else {})
            places = ",".join(map(str, copies))
            self._process = subprocess.Popen(  # noqa: S603  # our own command line
                [sys.executable, "-ISc", _SHIM, places, *(command or [sys.executable, *sys.orig_argv[1:]])],
                stdin=subprocess.DEVNULL,
                pass_fds=copies,
                env=environment,
            )
        except BaseException:
            os.close(ready)
            raise
        finally:
            for fd in [*copies, theirs]:
                os.close(fd)
        self._ready = ready

    def __repr__(self) -> str:
        return f"<Successor pid={self.pid}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    async def serves(self, timeout_s: float = START_TIMEOUT_S) -> str:
        """Wait until it does; returns why it never will, empty if it does. It is gone then."""
        loop = asyncio.get_running_loop()
        said: asyncio.Future[bytes] = loop.create_future()
        loop.add_reader(self._ready, self._heard, said)
        try:
            async with asyncio.timeout(timeout_s):
                word = await said
        except TimeoutError:
            self._process.kill()
            why = f"it did not serve within {timeout_s:g} s"
        except asyncio.CancelledError:
            self._process.terminate()
            raise
        else:
            if word:
                return ""
            why = "see what it wrote"
        finally:
            loop.remove_reader(self._ready)
            os.close(self._ready)
        code = await asyncio.to_thread(self._process.wait)
        return f"it ended with exit code {code}; {why}"

    def _heard(self, said: asyncio.Future[bytes]) -> None:
        if not said.done():
            said.set_result(_read(self._ready))


async def successor_serves(sockets: Mapping[str, Sequence[int]], drained: str) -> bool:
    """Start a successor; returns once it serves, or will not. `sockets`: descriptors of listening sockets, by name."""
    try:
        successor = Successor(sockets, drained=drained)
    except OSError as error:
        log.error("SIGUSR2: no successor could be started, this process goes on: %s", error.strerror)
        return False
    log.info("SIGUSR2: a successor is started (pid %d)", successor.pid)
    why = await successor.serves()
    if why:
        log.error("the successor does not serve, this process goes on: %s", why)
        return False
    log.info("the successor serves (pid %d)", successor.pid)
    return True


def _read(fd: int) -> bytes:
    """One byte of the pipe; empty at its end, which comes when the process ends."""
    try:
        return os.read(fd, 1)
    except OSError as error:
        if error.errno in (errno.EINTR, errno.EAGAIN):
            return b""
        raise
