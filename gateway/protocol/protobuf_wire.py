"""Protobuf's wire format, as far as the gRPC hot path reads and writes it by hand.

Reading is only ever a short cut: whoever walks bytes here gives up (`None`) on anything but the plainest form, and lets
the protobuf library read the whole message. So a walk may refuse what the library accepts, but where it accepts, it
must mean the same. Numbers of fields are 1 to 15 (one byte of tag), and all walked fields have a length in front.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

MAX_LENGTH_BYTES: Final = 5
"""Bytes of a length that the walk reads; the largest message has 2^31 - 1 bytes."""


def varint(value: int) -> bytes:
    """`value` ≥ 0 in base 128, lowest digits first."""
    if value < 0x80:
        return b"%c" % value
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def prefix(number: int, length: int) -> bytes:
    """What stands before the `length` bytes of a string, bytes or message field."""
    return b"%c" % (number << 3 | 2) + varint(length)


def field(number: int, value: bytes) -> bytes:
    """A string, bytes or message field; also where it is empty, as an entry of a repeated field is."""
    return prefix(number, len(value)) + value


def text(number: int, value: str) -> bytes:
    """A string field, left out where it is empty, as protobuf does."""
    return field(number, value.encode()) if value else b""


def varints(packed: memoryview) -> np.ndarray[Any, Any]:
    """The numbers of a packed field of integers, as unsigned ones of 64 bits; negative ones are their complements.

    `packed` was written by a protobuf library: every number is whole and has at most ten bytes.
    """
    octets = np.frombuffer(packed, np.uint8)
    ends = np.flatnonzero(octets < 0x80)
    if len(ends) == len(octets):  # small numbers only: the case in which there are most of them
        return octets.astype(np.uint64)
    starts = np.empty_like(ends)
    starts[0] = 0
    starts[1:] = ends[:-1] + 1
    numbers = (octets[starts] & 0x7F).astype(np.uint64)
    place, longer = 1, np.flatnonzero(ends > starts)
    while len(longer):
        at = starts[longer] + place
        numbers[longer] |= (octets[at] & 0x7F).astype(np.uint64) << np.uint64(7 * place)
        longer = longer[at < ends[longer]]
        place += 1
    return numbers


def length_at(message: bytes | memoryview, at: int, end: int) -> tuple[int, int]:
    """A field's length that begins at `at`: (its value's first byte, the byte behind its value).

    (0, −1) where it is not plain: cut short, too long, or the value would end behind `end`.
    """
    length = shift = 0
    for place in range(at, min(at + MAX_LENGTH_BYTES, end)):
        digit = message[place]
        length |= (digit & 0x7F) << shift
        if digit < 0x80:
            stop = place + 1 + length
            return (place + 1, stop) if stop <= end else (0, -1)
        shift += 7
    return 0, -1
