"""What is installed only on request: a package that is missing is a wish to be told, not a fault."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

EXTRA_OF: Final = {
    "pyarrow": "log",
    "duckdb": "log",
    "asyncpg": "postgres",
    "obstore": "objects",
    "cryptography": "signing",
}
"""Package → the extra of pyproject.toml that brings it."""


def lacking(package: str) -> str | None:
    """Why `package`, one of those, cannot be used here, with what to do; None: it is installed."""
    return None if find_spec(package) is not None else advice(package)


def advice(package: str) -> str | None:
    """What to say of a `package` that is not there; None: it belongs to no extra."""
    extra = EXTRA_OF.get(package)
    return None if extra is None else f"needs {package}, which is not installed: pip install 'oip-gateway[{extra}]'"
