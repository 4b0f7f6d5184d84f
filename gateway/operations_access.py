"""Who may change something through the operations port.

Reading is free; acting is not (resilience notes §7). Rules:
  * where a token file is configured, every action needs `Authorization: Bearer <its content>`; the file is read anew
    for each, so that a token can be replaced while serving;
  * without one, only a port that is bound to this machine takes actions;
  * a browser may be made to send a request by any page it shows, so a request from a page of another origin is refused,
    and so is every content type that a page can send without asking first (CORS): it must be JSON.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MAX_TOKEN_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an action is not carried out: an HTTP status, and what to do about it."""

    status: int
    text: str


class Access:
    """The rules, as configured."""

    def __init__(self, token_file: Path | None, *, loopback: bool, key: str = "server.admin_token_file") -> None:
        """`loopback`: only this machine can connect to the port. `key`: where the configuration names the file."""
        self._token_file = token_file
        self._key = key
        self._loopback = loopback

    def refusal(self, headers: Mapping[str, str]) -> Refusal | None:
        """Why a request with these headers must not act; None: it may. Reads the token file."""
        origin = headers.get("Origin")
        if origin is not None and origin.lower() != f"http://{headers.get('Host', '').lower()}":
            return Refusal(403, "a page of another origin may not act here")
        if headers.get("Content-Type", "").split(";")[0].strip().lower() != "application/json":
            return Refusal(415, "actions take JSON; send Content-Type: application/json")
        if self._token_file is not None:
            return self._token_refusal(self._token_file, headers.get("Authorization", ""))
        if not self._loopback:
            return Refusal(
                403,
                "this port can be reached from other machines, and no token is configured; name a file with one in "
                f"{self._key}",
            )
        return None

    def _token_refusal(self, file: Path, authorization: str) -> Refusal | None:
        try:
            with file.open("rb") as opened:
                token = opened.read(MAX_TOKEN_BYTES).strip()
        except OSError:
            token = b""
        if not token:
            return Refusal(503, f"the file of {self._key} cannot be read or is empty")
        scheme, _, given = authorization.partition(" ")
        shown = given.strip().encode("utf-8", "surrogateescape")
        # Digests have one length: how long the token is does not show either.
        equal = hmac.compare_digest(hashlib.sha256(shown).digest(), hashlib.sha256(token).digest())
        if scheme.lower() != "bearer" or not equal:
            return Refusal(401, f"this needs the token of {self._key}: Authorization: Bearer <token>")
        return None

    def __repr__(self) -> str:
        return f"<Access token={self._token_file is not None} loopback={self._loopback}>"
