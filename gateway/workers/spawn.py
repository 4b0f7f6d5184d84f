"""How a worker process is started, and what the kernel knows of its death."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

_PACKAGE_PARENT: Final = str(Path(__file__).resolve().parents[2])


def spawn(name: str, generation: int, theirs: socket.socket, board: int) -> subprocess.Popen[bytes]:
    """Start a worker on its end of the socket; `board` is a descriptor (board.py). It leads a session of its own, so
    that a terminal's Ctrl-C reaches the gateway only, which then ends it in order. Raises OSError."""
    arguments = [name, str(theirs.fileno()), str(generation), str(os.getpid()), str(board)]
    # numpy's linear algebra is not used there; its threads would only slow the start down.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": _python_path()}
    return subprocess.Popen(  # noqa: S603  # our own interpreter and module
        # -P: a module lying in the working directory must not shadow one of ours.
        [sys.executable, "-P", "-m", "gateway.workers.process", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=2,
        pass_fds=(theirs.fileno(), board),
        start_new_session=True,
        env=environment,
    )


def _python_path() -> str:
    inherited = os.environ.get("PYTHONPATH")
    return f"{_PACKAGE_PARENT}{os.pathsep}{inherited}" if inherited else _PACKAGE_PARENT


def out_of_memory_kills() -> int:
    """How often the kernel has killed for lack of memory since boot."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
