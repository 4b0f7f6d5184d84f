"""The messages of one call, cut out of the bytes that its stream brings.

A message stands behind five bytes: whether it is compressed, and its length. Bytes are appended to one growing buffer;
a message that is the only one is handed out as a view of it, so that a large tensor is copied once on its way in.
"""

from __future__ import annotations

from typing import Final

PREFIX_BYTES: Final = 5
_COMPACT_BYTES: Final = 65_536


class MessageBuffer:
    """Bytes received and not handed out."""

    __slots__ = ("_at", "_bytes")

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._at = 0

    def __len__(self) -> int:
        return len(self._bytes) - self._at

    def __repr__(self) -> str:
        return f"<MessageBuffer {len(self)} bytes, the first message has {self.length}>"

    def add(self, piece: bytes | memoryview) -> None:
        self._bytes += piece

    @property
    def length(self) -> int:
        """Bytes of the first message without its prefix; −1 while the prefix is not complete."""
        at = self._at
        if len(self._bytes) - at < PREFIX_BYTES:
            return -1
        return int.from_bytes(self._bytes[at + 1 : at + PREFIX_BYTES], "big")

    @property
    def flag(self) -> int:
        """First byte of the first message's prefix: 0 plain, 1 compressed."""
        return self._bytes[self._at]

    @property
    def missing(self) -> int:
        """Bytes to come until the first message is complete; below 0: how many there are behind it."""
        return PREFIX_BYTES + max(self.length, 0) - len(self)

    def pop(self) -> bytes:
        """Cut out the first message, which must be complete."""
        start = self._at + PREFIX_BYTES
        stop = start + self.length
        message = bytes(memoryview(self._bytes)[start:stop])
        self._at = stop
        if stop == len(self._bytes):
            self._bytes = bytearray()
            self._at = 0
        elif stop >= _COMPACT_BYTES and stop >= len(self._bytes) // 2:
            del self._bytes[:stop]
            self._at = 0
        return message

    def only(self) -> memoryview:
        """The first message, complete and the only one, without a copy. The buffer is done with."""
        return memoryview(self._bytes)[self._at + PREFIX_BYTES :].toreadonly()
