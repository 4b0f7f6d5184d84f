"""The table of paths on the data port: which path and method is which operation, and everything that describes it.

Rules: a path is matched whole, segment by segment, percent-decoded after splitting on `/`; a fixed segment goes before
one that is a name, so a model called `stats` hides nothing; an empty name matches nothing. The same table answers
requests and makes the OpenAPI description (openapi.py), so neither can promise what the other does not do. Matching
happens once per remembered request head, not per request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from gateway.core.api import Api
from gateway.errors import GatewayError
from gateway.inference_log.handover import NOBODY
from gateway.ingress.http_server import Exchange
from gateway.protocol.http1 import Head

Action = Callable[["Route", Head, bytes, Exchange], None]

VERSIONED: Final = "[/versions/{version}]"
"""In a pattern: the path exists with and without a version."""


class Route:
    """What a request head asks for, found once and kept with the remembered head."""

    __slots__ = ("action", "allow", "caller", "codings", "endpoint", "error", "model", "name", "version")

    def __init__(
        self,
        action: Action,
        model: str = "",
        version: str | None = None,
        error: GatewayError | None = None,
        name: str = "",
        allow: str = "",
    ) -> None:
        self.action = action
        self.model = model
        self.version = version
        self.error = error
        """Why it is refused, whatever its body says."""
        self.name = name
        """A repository's or region's."""
        self.allow = allow
        """Methods that the path does have, where it does not have this one."""
        self.codings: tuple[bytes | None, bytes | None] = (None, None)
        """Inference: content coding of the request's body and of the answer's; None: plain."""
        self.endpoint = ""
        """Inference, where it is logged: what the log calls this way of asking. Empty: it is not logged."""
        self.caller = NOBODY
        """Inference, where it is logged: what the head says of who asks."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. Schemas are names in `openapi.SCHEMAS`."""

    action: Action
    api: Api
    summary: str
    answer: str = ""
    """Schema of the answer's JSON; empty: the answer has no body."""
    body: str = ""
    """Schema of the request's JSON; empty: the body is not looked at."""
    body_required: bool = False
    errors: tuple[int, ...] = ()
    """Statuses of its refusals besides those that every path has."""
    media: tuple[str, ...] = ("application/json",)
    """Content types of the answer."""


@dataclass(frozen=True, slots=True)
class Match:
    """A path that exists: its methods, and the values of its names."""

    operations: dict[bytes, Operation]
    names: dict[str, str]


class RouteTable:
    """Patterns such as `/v2/models/{model}[/versions/{version}]/infer` and their operations."""

    def __init__(self) -> None:
        self.paths: dict[str, dict[bytes, Operation]] = {}
        """Every pattern, versions spelled out, in the order they were added."""
        self._fixed: dict[tuple[str, ...], dict[bytes, Operation]] = {}
        self._named: dict[int, list[tuple[tuple[str, ...], dict[bytes, Operation]]]] = {}

    def add(self, method: bytes, pattern: str, operation: Operation) -> None:
        for path in _spelled_out(pattern):
            operations = self.paths.get(path)
            if operations is None:
                operations = self.paths[path] = {}
                segments = tuple(path.split("/")[1:])
                if "{" in path:
                    self._named.setdefault(len(segments), []).append((segments, operations))
                else:
                    self._fixed[segments] = operations
            operations[method] = operation

    def match(self, segments: tuple[str, ...]) -> Match | None:
        """`segments`: those of the path, decoded, without the empty one before the first `/`."""
        fixed = self._fixed.get(segments)
        if fixed is not None:
            return Match(fixed, {})
        for pattern, operations in self._named.get(len(segments), ()):
            names = _names(pattern, segments)
            if names is not None:
                return Match(operations, names)
        return None


def _spelled_out(pattern: str) -> tuple[str, ...]:
    if VERSIONED in pattern:
        return pattern.replace(VERSIONED, ""), pattern.replace(VERSIONED, VERSIONED[1:-1])
    return (pattern,)


def _names(pattern: tuple[str, ...], segments: tuple[str, ...]) -> dict[str, str] | None:
    names: dict[str, str] = {}
    for expected, segment in zip(pattern, segments, strict=True):
        if expected.startswith("{"):
            if not segment:
                return None
            names[expected[1:-1]] = segment
        elif expected != segment:
            return None
    return names


def split_path(path: bytes) -> tuple[str, ...] | None:
    """Decoded segments of an absolute path, without the empty one before the first `/`; None: not a path of ours.

    Raises:
        UnicodeDecodeError: a segment is not UTF-8.
    """
    first, *segments = [_decode(part) for part in path.split(b"/")]
    return tuple(segments) if first == "" else None


def _decode(segment: bytes) -> str:
    return (unquote_to_bytes(segment) if b"%" in segment else segment).decode()


def header_of(head: Head) -> Callable[[str], bytes | None]:
    """Looks a header's value up by its name, in any case."""

    def look_up(name: str) -> bytes | None:
        wanted = name.lower().encode()
        return next((value for key, value in head.headers if key == wanted), None)

    return look_up
