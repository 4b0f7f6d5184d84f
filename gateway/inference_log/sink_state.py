"""What a serving process needs to know of its sink: how to start it, and what it last said. Imports nothing heavy."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from gateway.inference_log.private_files import read_json
from gateway.inference_log.segments import Layout

NAME: Final = "postgres"


class SinkState(msgspec.Struct, frozen=True, kw_only=True):
    """What a sink last said of itself."""

    name: str
    at_us: int = 0
    """When, microseconds since 1970."""
    shipped_rows: int = 0
    """Rows and events that the target took, since the sink was set up."""
    duplicate_rows: int = 0
    """... that it had already."""
    refused_rows: int = 0
    """... that it would never take, each by itself; it keeps a note of each."""
    missing_rows: int = 0
    """Positions of the log that were nowhere when their turn came: damage, or retention came first."""
    lag_rows: int = 0
    """Rows that wait, partly guessed from bytes."""
    lag_bytes: int = 0
    oldest_unshipped_us: int | None = None
    """When the first row that waits arrived; None: none waits."""
    failing: str | None = None
    """Why the target takes nothing at present."""
    failing_since_us: int | None = None
    epochs: dict[str, int] = {}
    """Epoch → every position below is shipped."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to ship, and where to."""

    directory: Path
    spill: Path | None
    dsn: str
    """env:NAME or file:PATH."""
    schema: str = "public"
    showcase_tables: bool = False
    batch_rows: int = 5000
    timeout_s: float = 60.0

    def arguments(self) -> list[str]:
        """The command line that means this job. It names where the secret is, and does not hold it."""
        found = [str(self.directory), "--dsn", self.dsn, "--schema", self.schema, "--batch-rows", str(self.batch_rows)]
        found += ["--timeout-s", f"{self.timeout_s:g}"]
        found += ["--spill", str(self.spill)] if self.spill is not None else []
        return found + (["--showcase-tables"] if self.showcase_tables else [])


def command(job: Job, log_level: str, log_format: str) -> list[str]:
    """How the gateway starts it."""
    module = [sys.executable, "-m", "gateway.inference_log.sink_process"]
    return [*module, *job.arguments(), "--log-level", log_level, "--log-format", log_format]


def state_file(directory: Path, name: str) -> Path:
    return Layout(directory).sinks / f"{name}.json"


def read_state(directory: Path, name: str) -> SinkState | None:
    """What the sink last wrote; None before it ever did."""
    return read_json(state_file(directory, name), SinkState)


def shipped_up_to(directory: Path, name: str) -> Mapping[str, int]:
    """Epoch → every position below it is shipped; of an epoch that is not there, nothing is known to be."""
    state = read_state(directory, name)
    return state.epochs if state is not None else {}
