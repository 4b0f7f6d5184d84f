"""HTTP/2 frames as bytes: types, flags, settings and error codes of RFC 9113, and how ours are written.

Everything here is stateless. Two exceptions tell the two kinds of fault apart (§5.4): a `ConnectionFault` ends the
connection with GOAWAY, a `StreamFault` ends one stream with RST_STREAM and leaves the others alone.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEAD_BYTES: Final = 9

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITY_FLAG: Final = 0x20

HEADER_TABLE_SIZE: Final = 1
ENABLE_PUSH: Final = 2
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5
MAX_HEADER_LIST_SIZE: Final = 6

DEFAULT_WINDOW: Final = 65_535
DEFAULT_FRAME_BYTES: Final = 16_384
MAX_FRAME_BYTES: Final = 2**24 - 1
MAX_WINDOW: Final = 2**31 - 1
MAX_STREAM_ID: Final = 2**31 - 1

_HEAD: Final = struct.Struct(">BHBBI")
_SETTING: Final = struct.Struct(">HI")
_PAIR: Final = struct.Struct(">II")

unpack_head = _HEAD.unpack_from
"""Upper and lower part of the payload's length, type, flags, stream (with the reserved bit)."""
settings_of = _SETTING.iter_unpack
"""(identifier, value) pairs of a SETTINGS payload, whose length must be a multiple of 6."""


class ErrorCode(IntEnum):
    """RFC 9113 §7."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


class ConnectionFault(Exception):
    """Ends the connection. The text goes out as GOAWAY's debug data."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class StreamFault(Exception):
    """Ends one stream."""

    def __init__(self, stream_id: int, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.stream_id = stream_id
        self.code = code


def frame_head(length: int, kind: int, flags: int, stream_id: int) -> bytes:
    return _HEAD.pack(length >> 16, length & 0xFFFF, kind, flags, stream_id)


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return frame_head(len(payload), kind, flags, stream_id) + payload


def settings(values: dict[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*item) for item in values.items()))


def window_update(stream_id: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream_id, increment.to_bytes(4, "big"))


def rst_stream(stream_id: int, code: int) -> bytes:
    return frame(RST_STREAM, 0, stream_id, code.to_bytes(4, "big"))


def goaway(last_stream: int, code: int, text: str = "") -> bytes:
    return frame(GOAWAY, 0, 0, _PAIR.pack(last_stream, code) + text.encode("ascii", "replace"))


def header_frames(stream_id: int, block: bytes, flags: int, frame_bytes: int) -> bytes:
    """A header block as HEADERS and as many CONTINUATIONs as the peer's frame size asks for.

    `flags`: END_STREAM or 0; END_HEADERS is set here.
    """
    if len(block) <= frame_bytes:
        return frame_head(len(block), HEADERS, flags | END_HEADERS, stream_id) + block
    cuts = [block[at : at + frame_bytes] for at in range(0, len(block), frame_bytes)]
    frames = [frame(HEADERS, flags, stream_id, cuts[0])]
    frames += [frame(CONTINUATION, 0, stream_id, cut) for cut in cuts[1:-1]]
    frames.append(frame(CONTINUATION, END_HEADERS, stream_id, cuts[-1]))
    return b"".join(frames)
