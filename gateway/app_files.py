"""How many descriptors there are, and how many of them connections may take.

A process that runs out of descriptors cannot accept, and cannot even say so: connections are cut off or wait for
nothing. So connections are refused politely before that, and a reserve is kept for everything else: models, workers
and their shared memory, backends, logs.
"""

from __future__ import annotations

import contextlib
import resource
from typing import Final

RESERVE: Final = 256
"""Descriptors kept for other things than clients; half of them all where there are few."""
_PORTS: Final = 2


def raise_file_limit() -> int:
    """Raise this process's soft limit of open files to the hard one; returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft


def connections_for(limit: int, wanted: int) -> int:
    """Connections that each of the two data ports may hold, of `wanted`, with `limit` descriptors (-1: unlimited)."""
    if limit < 0:
        return wanted
    available = limit - min(RESERVE, limit // 2)
    return wanted if _PORTS * wanted <= available else max(1, min(wanted, available // _PORTS))
