"""Child processes that cannot outlive the rig.

Each child leads a process group of its own, asks the kernel for SIGKILL when the rig dies (PR_SET_PDEATHSIG), and
carries the rig's mark in its environment; so do its own children. `left_behind` finds every process with the mark.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

MARK: Final = "OIP_FAULT_RIG"
TOKEN: Final = f"{os.getpid()}-{time.monotonic_ns()}"
_DIE_WITH_PARENT: Final = ("setpriv", "--pdeathsig", "KILL", "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"')
"""Of util-linux; its next argument is the parent, who may have died before, and then it becomes the command. Not by
preexec_fn: that forks, and gRPC's handlers of a fork can crash."""


class Child:
    """A process with its output in a file. `stop` and `go_on` are SIGSTOP and SIGCONT."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.command = [*command]
        self.log = log
        self._env = {**os.environ, **(env or {}), MARK: TOKEN}
        self._process = self._spawn()

    def _spawn(self, *more: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as stream:
            return subprocess.Popen(
                [*_DIE_WITH_PARENT, str(os.getpid()), *self.command, *more],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=self._env,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.is_file() else ""

    def signal(self, number: int) -> None:
        if self.alive:
            self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the process alone, and wait for its end."""
        self.signal(signal.SIGKILL)
        self._process.wait(30)

    def stop(self) -> None:
        self.signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.signal(signal.SIGCONT)

    def restart(self, *more: str) -> None:
        """The same command again, with `more` arguments for this once; the process must have ended."""
        assert not self.alive
        self._process = self._spawn(*more)

    def wait(self, timeout_s: float) -> int:
        return self._process.wait(timeout_s)

    def close(self) -> None:
        """End it and everything in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)


def left_behind() -> list[int]:
    """Processes with this rig's mark that are alive (zombies are not)."""
    wanted = f"{MARK}={TOKEN}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                marked = wanted in (folder / "environ").read_bytes().split(b"\0")
                if marked and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(int(folder.name))
    return found


def resident_mib(pid: int) -> float:
    """Resident memory of a process, MiB; 0.0 if it is gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    return 0.0


def open_files(pid: int) -> int:
    """Open descriptors of a process; 0 if it is gone."""
    with contextlib.suppress(OSError):
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return 0


def processor_s(pid: int) -> float:
    """Processor time that a process has used, seconds; 0.0 if it is gone."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0
