"""What the payloads of control frames say, checked: SETTINGS, WINDOW_UPDATE, padding and priority (RFC 9113 §6).

Pure functions; `http2.py` acts on what they return. Sizes of frames whose size is fixed are checked here too, before
their payload is waited for.
"""

from __future__ import annotations

from typing import Final

from gateway.protocol.http2_frames import (
    ENABLE_PUSH,
    GOAWAY,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_BYTES,
    MAX_FRAME_SIZE,
    MAX_WINDOW,
    PADDED,
    PING,
    PRIORITY_FLAG,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ConnectionFault,
    ErrorCode,
    settings_of,
)

_SETTING_BYTES: Final = 6
MAX_SETTINGS: Final = 32
"""Entries of one SETTINGS frame."""
_FIXED_BYTES: Final = {RST_STREAM: 4, PING: 8, WINDOW_UPDATE: 4}
_ON_CONNECTION: Final = frozenset((SETTINGS, PING, GOAWAY))
_GOAWAY_BYTES: Final = 8
_MAX_GOAWAY_BYTES: Final = 16_384
_PRIORITY_BYTES: Final = 5


def check_control(kind: int, ack: bool, stream_id: int, length: int) -> None:
    """Whether a frame of this type may have this stream and length; for all types but DATA, HEADERS, PRIORITY,
    CONTINUATION and unknown ones.

    Raises:
        ConnectionFault: it may not.
    """
    if kind == PUSH_PROMISE:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "clients cannot push")
    if kind in _ON_CONNECTION and stream_id:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a frame of the connection was sent on a stream")
    if kind == RST_STREAM and not stream_id:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "RST_STREAM on stream 0")
    if length != _FIXED_BYTES.get(kind, length):
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "a frame of fixed size has another one")
    if kind == SETTINGS:
        if (ack and length) or length % _SETTING_BYTES:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS has a size it cannot have")
        if length > MAX_SETTINGS * _SETTING_BYTES:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"more than {MAX_SETTINGS} settings in one frame")
    if kind == GOAWAY and not _GOAWAY_BYTES <= length <= _MAX_GOAWAY_BYTES:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY has a size it cannot have")


def read_settings(payload: bytes) -> dict[int, int]:
    """The values of a SETTINGS frame, the last of each; unknown ones included.

    Raises:
        ConnectionFault: a value that is not allowed.
    """
    values: dict[int, int] = {}
    for key, value in settings_of(payload):
        if key == ENABLE_PUSH and value > 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "SETTINGS_ENABLE_PUSH is neither 0 nor 1")
        if key == INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "SETTINGS_INITIAL_WINDOW_SIZE is over 2^31-1")
        if key == MAX_FRAME_SIZE and not 16_384 <= value <= MAX_FRAME_BYTES:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "SETTINGS_MAX_FRAME_SIZE is out of its range")
        values[key] = value
    return values


def unpad(payload: bytes, flags: int) -> bytes:
    """A payload without its padding.

    Raises:
        ConnectionFault: there is more padding than payload.
    """
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "padding is longer than the frame")
    return payload[1 : len(payload) - payload[0]]


def strip_priority(payload: bytes, flags: int, stream_id: int) -> tuple[bytes, bool]:
    """A HEADERS payload without its priority, and whether the stream depends on itself.

    Raises:
        ConnectionFault: the payload is too short to hold one.
    """
    if not flags & PRIORITY_FLAG:
        return payload, False
    if len(payload) < _PRIORITY_BYTES:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "HEADERS is too short for its priority")
    return payload[_PRIORITY_BYTES:], depends_on_itself(payload, stream_id)


def depends_on_itself(payload: bytes, stream_id: int) -> bool:
    return int.from_bytes(payload[:4], "big") & MAX_WINDOW == stream_id
