"""Which other files an ONNX model keeps tensors in: read from its protobuf, without onnx and without onnxruntime.

Rules:
- The walk finds every tensor wherever it stands (weights, sparse weights, attributes of nodes, subgraphs, functions,
  training graphs); whatever it cannot follow is refused, not skipped.
- A location that names anything but a file below the model's own directory is refused: absolute, with `..`, or the mark
  that onnxruntime itself uses for addresses in memory. Whether the file is there, and no link, is for who opens it.
- A tensor that states a location counts, whether or not it also says that its data lie there: rather one file too many.

Source of the numbers: onnx.proto3 of ONNX 1.18, IR version 11; readers skip fields they do not know, and so does this.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Final

from gateway.registry.formats import shown

MAX_LOCATION: Final = 1024
MAX_LOCATIONS: Final = 10_000
MAX_NESTING: Final = 64
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION, _TRAINING, _ENTRY = range(9)
_CHILDREN: Final[dict[int, dict[int, int]]] = {
    _MODEL: {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _TENSOR: {13: _ENTRY},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
}
"""Message → number of a field → the message it holds; what is not listed holds no tensor."""


class ExternalDataError(ValueError):
    """The model cannot be walked, or names what it must not; the text says which and what to change."""


def locations(model: bytes) -> dict[str, str]:
    """Location as the model states it → the same as a plain relative path, in the order of appearance.

    Args:
        model: content of an ONNX file.

    Raises:
        ExternalDataError.
    """
    if b"location" not in model:  # the key must be there as plain text: most models are done here
        return {}
    view = memoryview(model)
    found: dict[str, str] = {}
    pending = [(_MODEL, 0, len(model), 0)]
    while pending:
        kind, start, end, depth = pending.pop()
        if depth > MAX_NESTING:
            raise ExternalDataError(f"its graphs are nested deeper than {MAX_NESTING} messages")
        if kind == _ENTRY:
            _note(view, start, end, found)
            continue
        children = _CHILDREN[kind]
        pending += [(children[n], a, b, depth + 1) for n, a, b in _fields(view, start, end) if n in children]
    return found


def _note(view: memoryview, start: int, end: int, found: dict[str, str]) -> None:
    """Add what one key-value entry of a tensor says, if it is a location."""
    key = value = b""
    for number, a, b in _fields(view, start, end):
        if number == 1:
            key = bytes(view[a:b])
        elif number == 2:
            value = bytes(view[a : min(b, a + MAX_LOCATION + 1)])
    if key != b"location":
        return
    try:
        location = value.decode()
    except UnicodeDecodeError:
        raise ExternalDataError("it names an external data file in other text than UTF-8; save it again") from None
    if location not in found:
        found[location] = _plain(location)
    if len(found) > MAX_LOCATIONS:
        raise ExternalDataError(f"it names more than {MAX_LOCATIONS} external data files; save it with one")


def _plain(location: str) -> str:
    """The path below the model's directory. Raises ExternalDataError."""
    path = PurePosixPath(location)
    if not location or len(location.encode()) > MAX_LOCATION or "\0" in location or not path.parts:
        raise ExternalDataError(f"it names an external data file by what is no file name: '{shown(location)}'")
    if path.is_absolute() or ".." in path.parts or "_ORT_MEM_ADDR_" in location:
        raise ExternalDataError(
            f"it names the external data file '{shown(location)}', which is not below the model's own directory; put "
            "the file beside the model and save the model with a relative location"
        )
    return str(path)


def _fields(view: memoryview, start: int, end: int) -> list[tuple[int, int, int]]:
    """Number, first and behind-last byte of every field with a length; the others are stepped over.

    Raises:
        ExternalDataError: bytes that no protobuf writer writes. A reader of another mind must not find more in them.
    """
    fields = []
    at = start
    while at < end:
        tag, at = _varint(view, at, end)
        wire = tag & 7
        if wire == 2:
            length, at = _varint(view, at, end)
            if length > end - at:
                raise _broken()
            fields.append((tag >> 3, at, at + length))
            at += length
        elif wire == 0:
            _, at = _varint(view, at, end)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise _broken()
    if at != end:
        raise _broken()
    return fields


def _varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        digit = view[at]
        at += 1
        value |= (digit & 0x7F) << shift
        if digit < 0x80:
            return value, at
        shift += 7
    raise _broken()


def _broken() -> ExternalDataError:
    return ExternalDataError("it is not an ONNX model (its protobuf cannot be parsed); export it again")
