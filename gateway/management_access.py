"""APIs that only callers with an agreed header may use: which ones, and the one check for REST and gRPC.

Rules: an API belongs to one group and a group needs one header at most; values are compared in constant time, and
neither they nor what was sent instead ever stand in a text.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from typing import Final

from gateway.core.api import Api
from gateway.errors import Restricted

GRPC_PREFIX: Final = "triton-grpc-protocol-"
"""Before the header's name, in lower case, where it is gRPC metadata."""


class Restrictions:
    """Which groups need a header."""

    def __init__(self, needed: Mapping[Api, tuple[str, str]] | None = None) -> None:
        """`needed`: group → (header's name, value it must have)."""
        self._needed: dict[str, tuple[str, str]] = {}
        for api, header in (needed or {}).items():
            self._needed[api] = header

    def required(self, api: str) -> tuple[str, str] | None:
        """Header and value that a group needs; None where it is open to everybody."""
        return self._needed.get(api)

    def check(self, api: str, header: Callable[[str], str | bytes | None]) -> None:
        """`header(name)`: what the caller sent under that name (to be compared without case), None if nothing.

        Raises:
            Restricted: not what the group needs.
        """
        needed = self._needed.get(api)
        if needed is None:
            return
        name, value = needed
        sent = header(name)
        given = sent.encode("utf-8", "surrogateescape") if isinstance(sent, str) else sent
        if given is None or not hmac.compare_digest(given, value.encode()):
            raise Restricted(f"This API is restricted, expecting header '{name}'")
