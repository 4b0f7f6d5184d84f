"""One more path of the operations port, as plain data: `operations.py` serves it, and knows nothing of what it does.

Rules: GET reads and is free; POST acts, and is let through by operations_access.py only; what is sent and answered is
JSON. A page raises `PageFault` for what a caller did wrong; anything else it raises is logged, and answered 500.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


class PageFault(Exception):
    """What was asked for cannot be done: an HTTP status, and what to do about it."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class Asked:
    """One request to a page."""

    names: Mapping[str, str]
    """The path's own, decoded."""
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Looked up in any case."""


@dataclass(frozen=True, slots=True)
class Page:
    method: Literal["GET", "POST"]
    path: str
    """As in `/api/models/{name}/split`; a name in braces matches one segment."""
    answer: Callable[[Asked], Awaitable[object]]
    """What orjson can write: plain values, dataclasses, sequences of them."""
    text: str = ""
    """What the port's index says of it; empty: it is not listed."""
    open: bool = False
    """POST: whether it proves by itself who may act, for instance by a signature of the body."""
    max_body: int = 4096
    """Bytes; a longer one is answered 413."""
    status: int = 200
    """HTTP status of what `answer` gives."""
    token_file: Path | None = None
    """POST: holds a token that allows this page alone; the one that allows everything does so too."""
