"""Chunked request bodies (RFC 9112 §7.1), strict: one reading only, memory bounded by what it yields.

Rules: sizes are 1 to 15 hex digits; extensions are bounded and dropped; each line ends with CRLF and holds no
control character; the trailer section is bounded, checked line by line and dropped. The number of chunks is
bounded because a chunk costs work whatever its size. Data is coalesced into one buffer, so a million one-byte
chunks hold no more memory than one chunk of a million bytes.
"""

from __future__ import annotations

import re
from typing import Final

from gateway.errors import HeadersTooLarge, InvalidRequest
from gateway.protocol.http1_head import body_too_large
from gateway.protocol.http1_limits import HttpLimits

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(;[\t\x20-\x7e\x80-\xff]*)?")
_TRAILER_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")
_BAD_IN_LINE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")

_SIZE: Final = 0
_DATA: Final = 1
_DATA_END: Final = 2
_TRAILER: Final = 3
_DONE: Final = 4

_MAX_HEX_DIGITS: Final = 15


class ChunkedDecoder:
    """Decoder of one chunked body. Feed it until `done`; `body` then holds the whole content."""

    __slots__ = ("_chunks", "_left", "_limits", "_line", "_state", "_trailer_bytes", "body")

    def __init__(self, limits: HttpLimits) -> None:
        self.body = bytearray()
        self._limits = limits
        self._state = _SIZE
        self._line = bytearray()
        self._left = 0
        self._chunks = 0
        self._trailer_bytes = 0

    @property
    def done(self) -> bool:
        return self._state == _DONE

    def feed(self, data: bytes | bytearray, at: int) -> int:
        """Decode from `data[at:]`; returns the position behind the last byte used.

        Raises:
            InvalidRequest: malformed, or more chunks than allowed.
            TooLarge: more content than `max_body_bytes`; found before that content is kept.
            HeadersTooLarge: trailer section over its limit.
        """
        end = len(data)
        while at < end and self._state != _DONE:
            if self._state == _DATA:
                at = self._take_data(data, at)
            else:
                at = self._take_line(data, at)
        return at

    def _take_data(self, data: bytes | bytearray, at: int) -> int:
        stop = min(len(data), at + self._left)
        self.body += memoryview(data)[at:stop]
        self._left -= stop - at
        if not self._left:
            self._state = _DATA_END
        return stop

    def _take_line(self, data: bytes | bytearray, at: int) -> int:
        """Collect up to a CRLF. Limits hold for a line still incomplete, so that it cannot grow while we wait."""
        found = data.find(b"\n", at)
        stop = len(data) if found < 0 else found + 1
        limit = self._line_limit()
        room = max(limit + 2 - len(self._line), 0)
        piece = data[at : min(stop, at + room)]
        self._line += piece
        whole = self._line.endswith(b"\n")
        content = self._line[:-2] if whole else self._line
        if whole and not self._line.endswith(b"\r\n"):
            raise InvalidRequest("chunked body: a line ends with a bare LF")
        if _BAD_IN_LINE.search(content.removesuffix(b"\r") if not whole else content):
            raise InvalidRequest("chunked body: a control character where a chunk size or trailer field stands")
        if not whole:
            self._check_incomplete(limit)
            return at + len(piece)
        self._line = bytearray()
        self._end_line(bytes(content))
        return at + len(piece)

    def _line_limit(self) -> int:
        """Bytes the line expected now may have, without its CRLF."""
        if self._state == _DATA_END:
            return 0
        if self._state == _SIZE:
            return _MAX_HEX_DIGITS + self._limits.max_chunk_extension_bytes
        return self._limits.max_trailer_bytes - self._trailer_bytes

    def _check_incomplete(self, limit: int) -> None:
        over = len(self._line) >= limit + 2 or (len(self._line) == limit + 1 and self._line[-1:] != b"\r")
        if over:
            raise self._too_long()

    def _too_long(self) -> InvalidRequest | HeadersTooLarge:
        if self._state == _DATA_END:
            return InvalidRequest("chunked body: chunk data is longer than its size says")
        if self._state == _SIZE:
            return InvalidRequest("chunked body: chunk size or extension too long")
        return HeadersTooLarge(f"trailer section exceeds {self._limits.max_trailer_bytes} bytes")

    def _end_line(self, line: bytes) -> None:
        if self._state == _SIZE:
            self._begin_chunk(line)
        elif self._state == _DATA_END:
            if line:
                raise InvalidRequest("chunked body: chunk data is longer than its size says")
            self._state = _SIZE
        elif not line:
            self._state = _DONE
        else:
            if not _TRAILER_LINE.fullmatch(line):
                raise InvalidRequest("chunked body: malformed trailer field")
            self._trailer_bytes += len(line) + 2
            if self._trailer_bytes > self._limits.max_trailer_bytes:
                raise self._too_long()

    def _begin_chunk(self, line: bytes) -> None:
        match = _SIZE_LINE.fullmatch(line)
        if match is None:
            raise InvalidRequest("chunked body: malformed chunk size; expected hexadecimal digits")
        if len(match[2] or b"") > self._limits.max_chunk_extension_bytes:
            raise InvalidRequest("chunked body: chunk extension too long")
        self._left = int(match[1], 16)
        if not self._left:
            self._state = _TRAILER
            return
        self._chunks += 1
        if self._chunks > self._limits.max_chunks:
            raise InvalidRequest(
                f"chunked body: more than {self._limits.max_chunks} chunks; send larger ones, or Content-Length"
            )
        if len(self.body) + self._left > self._limits.max_body_bytes:
            raise body_too_large(self._limits)
        self._state = _DATA
