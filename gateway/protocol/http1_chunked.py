"""Chunked request bodies (RFC 9112 §7.1), strict: one reading only, memory bounded by what it yields.

Rules: sizes are 1 to 15 hex digits; extensions are bounded and dropped; each line ends with CRLF and holds no
control character; the trailer section is bounded, checked line by line and dropped. The number of chunks is
bounded because a chunk costs work whatever its size. Data is coalesced into one buffer, so a body in one-byte
chunks holds no more memory than the same body in one piece. A fault is found at the same byte however the bytes
were cut into reads.
"""

from __future__ import annotations

import re
from typing import Final

from gateway.errors import GatewayError, HeadersTooLarge, InvalidRequest
from gateway.protocol.http1_head import BAD_BYTE, body_too_large
from gateway.protocol.http1_limits import HttpLimits

_PLAIN_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})\r\n")
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(;[\t\x20-\x7e\x80-\xff]*)?")
_TRAILER_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")
_MAX_SIZE_DIGITS: Final = 15
_CR: Final = 0x0D

_SIZE: Final = 0
_DATA: Final = 1
_DATA_END: Final = 2
_TRAILER: Final = 3
_DONE: Final = 4


class ChunkedDecoder:
    """Decoder of one chunked body. Feed it until `done`; `body` then holds the whole content."""

    __slots__ = ("_chunks", "_left", "_limits", "_line", "_state", "_trailer_bytes", "body")

    def __init__(self, limits: HttpLimits) -> None:
        self.body = bytearray()
        self._limits = limits
        self._state = _SIZE
        self._line = bytearray()
        """The beginning of a line whose end has not arrived."""
        self._left = 0
        """Bytes of the current chunk still to come."""
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
            elif self._state == _SIZE and not self._line and (plain := _PLAIN_SIZE.match(data, at)):
                self._begin_chunk(plain[1])
                at = plain.end()
            else:
                at = self._take_line(data, at)
        return at

    def _take_data(self, data: bytes | bytearray, at: int) -> int:
        stop = min(len(data), at + self._left)
        self.body += data[at:stop]
        self._left -= stop - at
        if self._left:
            return stop
        if data[stop : stop + 2] == b"\r\n":
            self._state = _SIZE
            return stop + 2
        self._state = _DATA_END
        return stop

    def _take_line(self, data: bytes | bytearray, at: int) -> int:
        limit = self._line_limit()
        # An incomplete line is never longer than limit + 1, so there is always room for one byte more.
        room = at + limit + 2 - len(self._line)
        found = data.find(b"\n", at, room)
        stop = found + 1 if found >= 0 else min(len(data), room)
        self._line += data[at:stop]
        self._check_line(limit)
        if found >= 0:
            line = bytes(self._line[:-2])
            self._line.clear()
            self._end_line(line)
        return stop

    def _line_limit(self) -> int:
        """Bytes the line expected now may have, without its CRLF."""
        if self._state == _DATA_END:
            return 0
        if self._state == _SIZE:
            return _MAX_SIZE_DIGITS + self._limits.max_chunk_extension_bytes
        return self._limits.max_trailer_bytes - self._trailer_bytes

    def _check_line(self, limit: int) -> None:
        """Refuse the line at its first wrong byte, complete or not."""
        line = self._line
        bad = BAD_BYTE.search(line)
        over = len(line) > limit and line[limit] != _CR
        if bad is not None and not (over and limit + 1 < bad.end()):
            raise InvalidRequest("chunked body: a control character, or a line end that is not CRLF")
        if over:
            raise self._overlong()

    def _overlong(self) -> GatewayError:
        if self._state == _DATA_END:
            return InvalidRequest("chunked body: a chunk is longer than its size says")
        if self._state == _SIZE:
            return InvalidRequest("chunked body: chunk size or extension too long")
        return HeadersTooLarge(f"trailer section exceeds {self._limits.max_trailer_bytes} bytes; send fewer trailers")

    def _end_line(self, line: bytes) -> None:
        if self._state == _SIZE:
            self._begin_chunk(line)
        elif self._state == _DATA_END:
            self._state = _SIZE
        elif not line:
            self._state = _DONE
        elif not _TRAILER_LINE.fullmatch(line):
            raise InvalidRequest("chunked body: malformed trailer field")
        else:
            self._trailer_bytes += len(line) + 2
            if self._trailer_bytes > self._limits.max_trailer_bytes:
                raise self._overlong()

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
