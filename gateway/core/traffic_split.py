"""Which version of a model answers a request that names none: the champion, or its canary. Pure.

In this order:
  1. a request that names a version gets that version (decided before anybody asks here);
  2. one with all the headers of the rule goes to the canary, whatever the share;
  3. where the rule names a header to stick to and the request has it, a hash of its value is a point from 0 to 1, and
     points below the share go to the canary. Equal values meet the same version, and a growing share only adds values;
  4. any other request is drawn.

Headers are (name in lower case, value) as both protocols have them; a field that is sent twice counts with its first
value. The hash is keyed with the model's name: the callers that try one model's canary are not those of every other's.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

Headers = Iterable[tuple[bytes, bytes]]
_POINTS: Final = 2**53


class Why(enum.Enum):
    """What decided."""

    HEADER = "header"
    STICKY = "sticky"
    SHARE = "share"


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Who goes to the canary. `share`: 0 to 1; names are in lower case; `key`: the model's."""

    share: float
    header: tuple[tuple[bytes, bytes], ...] = ()
    """All of these; empty: none can demand it."""
    sticky: bytes = b""
    """Name of a header; empty: there is none."""
    key: bytes = b""

    @staticmethod
    def of(model: str, percent: float, header: Mapping[str, str], sticky: str | None) -> SplitRule:
        """From what the configuration says."""
        pairs = tuple((name.lower().encode("ascii"), value.encode("ascii")) for name, value in sorted(header.items()))
        return SplitRule(percent / 100, pairs, (sticky or "").lower().encode("ascii"), model.encode()[:64])


def to_canary(rule: SplitRule, headers: Headers, draw: Callable[[], float]) -> tuple[bool, Why]:
    """Whether the canary is to answer a request with these headers, and what decided that.

    `draw`: a number from 0 (included) to 1 (excluded), each as likely; asked at most once.
    """
    if rule.header or rule.sticky:
        fields: dict[bytes, bytes] = {}
        for name, value in headers:
            fields.setdefault(name, value)
        if rule.header and all(fields.get(name) == value for name, value in rule.header):
            return True, Why.HEADER
        if rule.sticky and (stuck := fields.get(rule.sticky)) is not None:
            return point(rule.key, stuck) < rule.share, Why.STICKY
    return draw() < rule.share, Why.SHARE


def point(key: bytes, value: bytes) -> float:
    """Where a value lies between 0 (included) and 1 (excluded): the first 53 bits of its keyed BLAKE2b hash."""
    return (int.from_bytes(blake2b(value, digest_size=8, key=key).digest(), "big") >> 11) / _POINTS
