"""The groups of requests that a server's owner can restrict; the names are Triton's."""

from __future__ import annotations

from typing import Literal

Api = Literal[
    "health",
    "metadata",
    "inference",
    "shared-memory",
    "model-config",
    "model-repository",
    "statistics",
    "trace",
    "logging",
]
