"""Configuration of the sink that copies the inference log into PostgreSQL: the key `postgres` of `inference_log`.

The data source name holds a password, so the file names only where it is: `env:NAME` or `file:PATH`. That is checked
here and not by its type, whose faults repeat what was written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import Field

from gateway.config_section import Section
from gateway.extras import lacking

MAX_REFERENCE: Final = 4096
_REFERENCE: Final = r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:.+)$"


class Postgres(Section):
    """Copies rows and events into tables of a PostgreSQL database, in a process of its own."""

    dsn: str = Field(json_schema_extra={"pattern": _REFERENCE}, repr=False, examples=["env:GATEWAY_LOG_DSN"])
    """`env:VARIABLE` or `file:PATH` (relative to this file's directory) that holds the data source name, such as
    `postgresql://user:password@db:5432/audit?sslmode=verify-full`."""
    db_schema: str = Field(
        default="public", alias="schema", pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}$", examples=["audit"]
    )
    """Schema that the tables are in; made if it is not there."""
    showcase_tables: bool = Field(default=False, examples=[True])
    """Fill `inference_requests`, `inference_responses`, `inference_errors` and `inference_metadata` too."""
    batch_rows: int = Field(default=5000, ge=1, le=100_000, examples=[5000])
    """Most rows of one transaction."""
    timeout_s: float = Field(default=60.0, gt=0, le=3600, allow_inf_nan=False, strict=False, examples=[60])
    """Longest time one statement may take; then it is tried again with fewer rows."""


def postgres_faults(
    section: Mapping[str, Any], base: Path, environ: Mapping[str, str]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong about `inference_log.postgres` beside types: place below it, and text."""
    keys = section.get("postgres")
    if not isinstance(keys, dict):
        return
    if (why := lacking("asyncpg")) is not None:
        yield (), why
    dsn = keys.get("dsn")
    if not isinstance(dsn, str):
        return
    if len(dsn) > MAX_REFERENCE or re.fullmatch(_REFERENCE, dsn) is None:
        yield ("dsn",), "must not stand here, it holds a password; write for example env:GATEWAY_LOG_DSN or file:PATH"
        return
    kind, _, name = dsn.partition(":")
    if kind == "env" and not environ.get(name):
        yield ("dsn",), f"the variable {name} is not set; set it where the gateway is started"
    elif kind == "file" and not (base / name).is_file():
        yield ("dsn",), f"there is no file {base / name}; write the path of a file that holds the data source name"


def anchored_dsn(keys: Postgres, base: Path) -> str:
    """`dsn`, so that it means the same in another working directory."""
    kind, _, name = keys.dsn.partition(":")
    return keys.dsn if kind == "env" else f"file:{(base / name).absolute()}"
