"""`inference.ModelInferRequest` cut in three: its `id`, its raw tensors, and everything else, here called the opening.

Clients that repeat themselves send the same opening again and again, so openings are remembered by their bytes, with
all that follows from them for the model version they went to; a request of a known opening costs a dictionary look-up.

Two roads: the walk cuts a message along its top-level fields and never copies a tensor; whatever it does not find
plain (unknown fields, an order no library writes) is read whole by the protobuf library, which is also the one that
reads openings. Bytes that are no message are INVALID_ARGUMENT on either road.

Invariants: a remembered opening's key is all of its bytes, cut at field boundaries, so remembering never weakens a
check; typed data is never part of what is remembered. What is remembered is bounded in number and in bytes, and so is
what the library is given to read: its objects are far larger than the bytes they come from.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, Protocol

from google.protobuf.message import DecodeError

from gateway.errors import InvalidRequest
from gateway.protocol import schema
from gateway.protocol.protobuf_wire import length_at

REMEMBERED_OPENINGS: Final = 1024
REMEMBERED_BYTES: Final = 4096
"""Longest opening that is remembered, and ..."""
REMEMBERED_TOTAL_BYTES: Final = 512 * 1024
"""... of all of them. The library's objects take up to 50 times as much."""
MAX_OPENING_BYTES: Final = 16 * 1024 * 1024
"""Of an opening with typed data; raw tensors do not count."""
MAX_WHOLE_BYTES: Final = 4 * 1024 * 1024
"""Of a message that is not plain."""
MAX_FIELDS: Final = 4096
"""Top-level fields of one message, and raw tensors among them."""
_ID: Final = 0x1A
_RAW: Final = 0x3A
_OPENING: Final = frozenset({0x0A, 0x12, 0x22, 0x2A, 0x32})
"""Tags of model_name, model_version, parameters, inputs, outputs."""


class KnownForm(Protocol):
    """What an opening means for one model version."""

    tail: int
    """Bytes behind the opening, where these are always as many and lie at the same places; else -1."""

    def fits(self, message: bytes | memoryview, at: int, /) -> bool:
        """Whether exactly the raw tensors that the opening announces stand from `at` on."""


class Opening:
    """All of a request but its `id` and raw tensors. `version` is "" where the client names none."""

    __slots__ = ("known", "message", "model", "reader", "second", "version")

    def __init__(self, message: Any) -> None:
        self.model: str = message.model_name
        self.version: str = message.model_version
        self.message = message
        self.reader: object = None
        """Who made `known`, and may use it."""
        self.known: KnownForm | None = None
        self.second: tuple[object, KnownForm | None] | None = None
        """The reader before that one, and what it made."""


class Cut(NamedTuple):
    """A request in its three parts. `raw`: its raw tensors; None: they lie from `at` on as the opening's known form
    says."""

    opening: Opening
    request_id: str
    message: bytes | memoryview
    at: int
    raw: list[bytes | memoryview] | None


_cut: Final = tuple.__new__
"""Makes a `Cut` of a tuple of its fields, without a frame of Python."""


class Openings:
    """Cuts messages and remembers what they begin with; one for all models."""

    def __init__(self) -> None:
        self._message = schema.message("inference.ModelInferRequest")
        self._openings: dict[bytes | tuple[bytes, bytes], Opening] = {}
        self._nbytes = 0
        """Of the keys there."""
        self._places: dict[int, tuple[int, int, int]] = {}
        """Where a message of this many bytes was cut last: start of `id`, end of `id`, first raw tensor. A guess: it
        counts only where the bytes so cut are an opening that is remembered."""

    def cut(self, message: bytes | memoryview) -> Cut:
        """
        Raises:
            InvalidRequest: these bytes are no ModelInferRequest.
        """
        guess = self._places.get(len(message))
        if guess is not None:
            start, end, at = guess
            if start == end:
                opening = self._openings.get(bytes(message[:at]))
                if opening is not None and opening.known is not None and opening.known.fits(message, at):
                    return _cut(Cut, (opening, "", message, at, None))
            elif message[start] == _ID and message[start + 1] == end - start - 2:
                opening = self._openings.get((bytes(message[:start]), bytes(message[end:at])))
                if opening is not None and opening.known is not None and opening.known.fits(message, at):
                    return _cut(Cut, (opening, _text(message[start + 2 : end]), message, at, None))
        return self._walk(message) or self.cut_whole(message)

    def cut_whole(self, message: bytes | memoryview) -> Cut:
        """By the protobuf library, which copies the tensors."""
        parsed = self._parse(message, MAX_WHOLE_BYTES)
        return Cut(Opening(parsed), parsed.id, message, 0, list(parsed.raw_input_contents))

    def _walk(self, message: bytes | memoryview) -> Cut | None:
        """None: not plain enough."""
        at, size, fields = 0, len(message), 0
        start = first = end = 0
        while at < size:
            tag = message[at]
            if tag == _RAW:
                break
            fields += 1
            if fields > MAX_FIELDS:
                raise _too_many()
            value, stop = length_at(message, at + 1, size)
            if stop < 0 or (tag not in _OPENING and (tag != _ID or end)):
                return None
            if tag == _ID:
                start, first, end = at, value, stop
            at = stop
        raw = raw_tensors(message, at)
        if raw is None:
            return None
        opening = self._opening(message, start, end, at)
        # A guess is only worth having for what is remembered, and for an id whose length has one byte.
        if opening.known is not None and opening.known.tail >= 0 and (not end or first == start + 2):
            if len(self._places) >= REMEMBERED_OPENINGS:
                self._places.clear()
            self._places[size] = (start, end, at)
        return Cut(opening, _text(message[first:end]), message, at, raw)

    def _opening(self, message: bytes | memoryview, start: int, end: int, at: int) -> Opening:
        """The one that ends at `at`, with its `id` from `start` to `end`."""
        if at - end + start > REMEMBERED_BYTES:
            return Opening(self._parse(bytes(message[:start]) + bytes(message[end:at]), MAX_OPENING_BYTES))
        key = (bytes(message[:start]), bytes(message[end:at])) if end else bytes(message[:at])
        found = self._openings.get(key)
        if found is None:
            found = Opening(self._parse(key if isinstance(key, bytes) else b"".join(key), MAX_OPENING_BYTES))
            if not is_typed(found.message):
                nbytes = at - end + start
                if len(self._openings) >= REMEMBERED_OPENINGS or self._nbytes + nbytes > REMEMBERED_TOTAL_BYTES:
                    self._openings.clear()
                    self._nbytes = 0
                self._openings[key] = found
                self._nbytes += nbytes
        return found

    def _parse(self, data: bytes | memoryview, limit: int) -> Any:
        if len(data) > limit:
            raise InvalidRequest(
                f"{len(data)} bytes of the request are no raw tensors, or stand before or behind them out of order; at "
                f"most {limit} may: send large tensors in raw_input_contents, and that field last"
            )
        try:
            return self._message.FromString(bytes(data))
        except DecodeError as error:
            raise _no_message() from error


def raw_tensors(message: bytes | memoryview, at: int) -> list[bytes | memoryview] | None:
    """The entries of raw_input_contents, which are all that stands from `at` on; None: something else stands there."""
    found: list[bytes | memoryview] = []
    size = len(message)
    view = memoryview(message)
    while at < size:
        if message[at] != _RAW:
            return None
        value, at = length_at(message, at + 1, size)
        if at < 0:
            return None
        if len(found) == MAX_FIELDS:
            raise _too_many()
        found.append(view[value:at])
    return found


def is_typed(message: Any) -> bool:
    return any(item.HasField("contents") for item in message.inputs)


def _text(value: bytes | memoryview) -> str:
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise _no_message() from error


def _too_many() -> InvalidRequest:
    return InvalidRequest(f"the request has more than {MAX_FIELDS} inputs, outputs, parameters or raw tensors")


def _no_message() -> InvalidRequest:
    return InvalidRequest(
        "the request is not a valid inference.ModelInferRequest: its bytes cannot be parsed; check the client's "
        ".proto file, and that strings are UTF-8"
    )
