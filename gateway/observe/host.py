"""CPU and memory of the machine, as Linux tells them: what Triton's `nv_cpu_*` gauges show.

Rules: read when somebody asks, two small files of /proc; what cannot be read is None. Utilization is the share of time
that any core was busy since it was asked before (the first time: since the machine started).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class HostUsage:
    """`cpu`: 0.0 to 1.0, of all cores together; memory in bytes."""

    cpu: float | None
    memory_total_bytes: int | None
    memory_used_bytes: int | None


class Host:
    """Remembers the CPU times of the last look."""

    def __init__(self, proc: Path = _PROC) -> None:
        self._proc = proc
        self._busy = 0
        self._total = 0

    def usage(self) -> HostUsage:
        total, used = self._memory()
        return HostUsage(self._cpu(), total, used)

    def _cpu(self) -> float | None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            first = (self._proc / "stat").read_text().split("\n", 1)[0]
            # user nice system idle iowait irq softirq steal; what follows is contained in the first two.
            times = [int(field) for field in first.split()[1:9]]
            total, busy = sum(times), sum(times) - times[3] - times[4]
            passed, worked = total - self._total, busy - self._busy
            self._total, self._busy = total, busy
            return min(1.0, max(0.0, worked / passed)) if passed > 0 else 0.0
        return None

    def _memory(self) -> tuple[int | None, int | None]:
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            lines = (self._proc / "meminfo").read_text().splitlines()
            kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
            return kib["MemTotal"] * 1024, (kib["MemTotal"] - kib["MemAvailable"]) * 1024
        return None, None
