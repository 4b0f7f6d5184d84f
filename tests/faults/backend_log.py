"""What a backend writes down: each inference request that reached it and each batch that it executed.

Written with one unbuffered `write` per record before anything of it is answered, so that the log survives kill −9 and
no answer can exist without its record. Times are CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from tests.faults.nonce import Nonces

_RECORD: Final = struct.Struct("<dBI")

ARRIVED: Final = 1
EXECUTED: Final = 2


@dataclass(frozen=True, slots=True)
class Execution:
    """One record. `at` is monotonic seconds; `nonces` one INT64 per row."""

    at: float
    kind: int
    nonces: Nonces


class ExecutionLog:
    """Appends to `path`; several generations of one backend may write the same file one after the other."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, kind: int, nonces: Nonces) -> None:
        os.write(self._fd, _RECORD.pack(time.monotonic(), kind, len(nonces)) + nonces.tobytes())

    def close(self) -> None:
        os.close(self._fd)


def read(path: Path) -> list[Execution]:
    """All records of a log; a last one that was cut off by a kill is left out."""
    if not path.exists():
        return []
    data, at, found = path.read_bytes(), 0, []
    while at + _RECORD.size <= len(data):
        when, kind, rows = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        if at + rows * 8 > len(data):
            break
        found.append(Execution(when, kind, np.frombuffer(data, np.int64, rows, at)))
        at += rows * 8
    return found
