"""Datatypes of the Open Inference Protocol and the two forms a tensor has on its way to a model.

Invariants: a datatype's `code` is its place in `DATATYPES` and part of the worker wire format, so entries are
only ever appended. All multi-byte values are little-endian, row-major (OIP binary extension). BYTES has no item
size: each element is a uint32 little-endian length followed by that many bytes.
BF16 has no numpy type; it is carried as its raw 16 bits (`uint16`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

MAX_RANK: Final = 16


@dataclass(frozen=True, slots=True)
class Datatype:
    """One OIP datatype. `itemsize` is bytes per element, 0 for BYTES."""

    name: str
    code: int
    itemsize: int
    numpy: np.dtype[Any]
    kind: str
    """"bool", "int", "uint", "float" (FP32, FP64), "half" (FP16, BF16: no JSON form) or "bytes"."""

    def __repr__(self) -> str:
        return self.name


DATATYPES: Final[tuple[Datatype, ...]] = tuple(
    Datatype(name, code, itemsize, np.dtype(numpy), kind)
    for code, (name, itemsize, numpy, kind) in enumerate(
        [
            ("BOOL", 1, "?", "bool"),
            ("UINT8", 1, "u1", "uint"),
            ("UINT16", 2, "<u2", "uint"),
            ("UINT32", 4, "<u4", "uint"),
            ("UINT64", 8, "<u8", "uint"),
            ("INT8", 1, "i1", "int"),
            ("INT16", 2, "<i2", "int"),
            ("INT32", 4, "<i4", "int"),
            ("INT64", 8, "<i8", "int"),
            ("FP16", 2, "<f2", "half"),
            ("FP32", 4, "<f4", "float"),
            ("FP64", 8, "<f8", "float"),
            ("BYTES", 0, "O", "bytes"),
            ("BF16", 2, "<u2", "half"),
        ]
    )
)
DATATYPE: Final[dict[str, Datatype]] = {d.name: d for d in DATATYPES}


def element_count(shape: tuple[int, ...] | list[int]) -> int:
    """Product of the dims; 1 for a scalar. Python integers, so it cannot overflow."""
    count = 1
    for dim in shape:
        count *= dim
    return count


_LENGTH = struct.Struct("<I")


def pack_bytes(elements: list[bytes]) -> bytes:
    """BYTES elements → OIP binary form (each element: uint32 LE length, then its bytes)."""
    pack = _LENGTH.pack
    return b"".join([part for element in elements for part in (pack(len(element)), element)])


def unpack_bytes(buffer: bytes | memoryview, most: int | None = None) -> list[bytes]:
    """OIP binary form → BYTES elements. With `most` it reads no further than to one element more than that.

    Raises:
        ValueError: a length prefix is cut short or points past the end of the buffer.
    """
    view = memoryview(buffer)
    end, at = len(view), 0
    elements: list[bytes] = []
    while at < end:
        if most is not None and len(elements) > most:
            break
        if end - at < 4:
            raise ValueError("incomplete string length indicator")
        (length,) = _LENGTH.unpack_from(view, at)
        at += 4
        if length > end - at:
            raise ValueError("incomplete string data")
        elements.append(bytes(view[at : at + length]))
        at += length
    return elements
