"""What a sealer is told, and its command line: all that a serving process needs to know of it.

Apart from `sealer.py`, which imports Arrow: a serving process has no use for that.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from gateway.inference_log.retention import RetentionPolicy


@dataclass(frozen=True, slots=True)
class SealerSettings:
    directory: Path
    spill: Path | None = None
    policy: RetentionPolicy = field(default_factory=RetentionPolicy)
    sinks: tuple[str, ...] = ()
    """Configured sinks: rows they have not shipped are neither merged nor deleted."""
    max_disk_bytes: int = 0
    """0: no limit."""


def command(settings: SealerSettings) -> list[str]:
    """The command of a sealer that ends when this process does."""
    spill = ["--spill", str(settings.spill)] if settings.spill else []
    return [
        *(sys.executable, "-m", "gateway.inference_log.sealer", str(settings.directory)),
        *spill,
        *("--retention", msgspec.json.encode(settings.policy).decode()),
        *(part for sink in settings.sinks for part in ("--sink", sink)),
        *("--max-disk-bytes", str(settings.max_disk_bytes)),
        *("--parent", str(os.getpid())),
    ]
