"""Compressed bodies of requests and answers: gzip and deflate, in bounded steps.

Rules (wire notes §1.10):
- a request's `Content-Encoding` is exactly `gzip`, `deflate` or `identity`; deflate means zlib-wrapped (RFC 9110
  §8.4.1.2). Which of the two a stream is, it says itself, and is believed; it must be whole, and nothing may stand
  behind it;
- inflating stops at the limit for bodies, whatever the stream still holds: a bomb costs no more than a plain body;
- an answer is compressed by the weights of `Accept-Encoding`: of gzip, deflate and identity the one with the highest
  weight, the first of equal ones; weight 0 excludes; anything else there is passed over, `br`, `*` and names in
  capitals included (a plain answer is always right).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Final

from gateway.errors import InvalidRequest, TooLarge

GZIP: Final = b"gzip"
DEFLATE: Final = b"deflate"
IDENTITY: Final = b"identity"
ACCEPTED: Final = b"gzip, deflate"
"""Value of the `Accept-Encoding` that a refusal carries."""
_WINDOW_BITS: Final = {GZIP: 31, DEFLATE: 15}
_EITHER: Final = 47
"""zlib's word for: gzip or zlib, whatever the stream begins as."""
_PIECE_BYTES: Final = 65_536
"""Compressed bytes given to zlib at once; it copies what it does not get to."""
_MAX_LISTED: Final = 32
"""Entries of `Accept-Encoding` that are looked at."""
_WEIGHT: Final = re.compile(rb"[qQ]=([01](?:\.[0-9]{0,3})?)")


class Inflation:
    """One compressed body on its way to a plain one. Call `step` until it says that it is done; read `result`."""

    __slots__ = ("_at", "_body", "_coding", "_left", "_limit", "_parts", "_stream", "_total")

    def __init__(self, coding: bytes, body: bytes, limit: int) -> None:
        """`coding`: GZIP or DEFLATE. `limit`: bytes that may come out."""
        self._stream = zlib.decompressobj(_EITHER)
        self._coding = coding
        self._body = memoryview(body)
        self._at = 0
        self._left = b""
        self._limit = limit
        self._total = 0
        self._parts: list[bytes] = []

    def step(self, most: int) -> bool:
        """Make about `most` bytes more. True: the whole body is there.

        Raises:
            InvalidRequest: the stream is broken, cut short, or something stands behind its end.
            TooLarge: more than the limit comes out of it.
        """
        goal = min(self._total + most, self._limit + 1)
        while self._total < goal:
            piece: bytes | memoryview = self._left
            if not piece:
                piece = self._body[self._at : self._at + _PIECE_BYTES]
                self._at += len(piece)
            try:
                made = self._stream.decompress(piece, goal - self._total)
            except zlib.error as error:
                raise self._broken("is not valid", str(error)) from error
            self._left = self._stream.unconsumed_tail
            self._total += len(made)
            if made:
                self._parts.append(made)
            if self._stream.eof:
                break
            if not made and not piece:
                raise self._broken("ends before its compressed data does", f"after {len(self._body)} bytes")
        if self._total > self._limit:
            raise TooLarge(
                f"request body inflates to more than {self._limit} bytes, which exceeds the maximum allowed input size "
                f"of {self._limit} bytes; send a smaller request or raise server.limits.max_body_bytes"
            )
        if self._stream.eof and (self._stream.unused_data or self._at < len(self._body)):
            raise self._broken("goes on behind the end of its compressed data", "send one stream and nothing after it")
        return self._stream.eof

    def _broken(self, how: str, why: str) -> InvalidRequest:
        name = self._coding.decode()
        hint = " (deflate is the zlib format)" if self._coding == DEFLATE else ""
        return InvalidRequest(f"request body with Content-Encoding {name}{hint} {how}: {why}")

    @property
    def made(self) -> int:
        """Bytes that came out so far."""
        return self._total

    @property
    def result(self) -> bytes:
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)


def choose_coding(accepted: bytes) -> bytes | None:
    """GZIP, DEFLATE, or None for a plain answer, by a request's `Accept-Encoding` (several fields joined by commas)."""
    best, highest = None, 0.0
    for entry in accepted.split(b",", _MAX_LISTED)[:_MAX_LISTED]:
        name, _, parameter = entry.partition(b";")
        name = name.strip(b" \t")
        if name not in _WINDOW_BITS and name != IDENTITY:
            continue
        weight = 1.0
        if parameter:
            stated = _WEIGHT.fullmatch(parameter.strip(b" \t"))
            if stated is None:
                continue
            weight = min(float(stated[1]), 1.0)
        if weight > highest:
            best, highest = name, weight
    return best if best in _WINDOW_BITS else None


def deflate(parts: Sequence[bytes | memoryview], coding: bytes, level: int) -> bytes:
    """The parts of an answer, compressed as one stream. `level`: zlib's, 1 (fast) to 9 (small)."""
    stream = zlib.compressobj(level, zlib.DEFLATED, _WINDOW_BITS[coding])
    made = [stream.compress(part) for part in parts]
    made.append(stream.flush())
    return b"".join(made)
