"""gRPC over HTTP/2 as bytes: request heads, message framing, compression, and the header blocks of answers.

Rules (the gRPC project's PROTOCOL-HTTP2): POST with a content type of `application/grpc`; each message behind five
bytes, a compression flag and a length; `grpc-timeout` of at most eight digits and a unit; `grpc-message`
percent-encoded; binary metadata base64 under names ending in `-bin`. A request that is no gRPC at all is answered the
way HTTP answers (415, 405), everything else with a status in the trailers.

`content_coding.py` inflates and compresses, for this protocol as for HTTP.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any, Final

from gateway.errors import Overloaded
from gateway.protocol.content_coding import DEFLATE, GZIP
from gateway.protocol.hpack_blocks import metadata_literal, status_literal
from gateway.protocol.http2_fields import RequestFields

OK: Final = 0
CANCELLED: Final = 1
INVALID_ARGUMENT: Final = 3
DEADLINE_EXCEEDED: Final = 4
RESOURCE_EXHAUSTED: Final = 8
UNIMPLEMENTED: Final = 12
INTERNAL: Final = 13
UNAVAILABLE: Final = 14

ENCODINGS: Final = b"identity,deflate,gzip"
CODINGS: Final = frozenset((GZIP, DEFLATE))
"""What a message may be compressed with; `deflate` is the zlib format (RFC 1950), as in HTTP."""
COMPRESSION_LEVELS: Final = {"none": 0, "low": 1, "medium": 6, "high": 9}
MIN_COMPRESSED_BYTES: Final = 1024
"""A shorter message is not worth compressing."""
MAX_COMPRESSED_BYTES: Final = 1024 * 1024
"""A longer message would hold up all other calls while it is compressed: a MiB of numbers takes 60 ms."""
MAX_TIMEOUT_S: Final = 30 * 86_400.0
"""Longer ones are cut to this."""
MAX_MESSAGE_TEXT_BYTES: Final = 6144
"""Of a status text, percent-encoded. grpcio takes 8 KiB of trailers, and may refuse more."""

_CONTENT_TYPE: Final = metadata_literal(b"content-type", b"application/grpc")
HEADERS_BLOCK: Final = status_literal(200) + _CONTENT_TYPE
"""Begins every answer that is gRPC."""
TRAILERS_OK: Final = metadata_literal(b"grpc-status", b"0")
ACCEPTED_ENCODINGS: Final = metadata_literal(b"grpc-accept-encoding", ENCODINGS)

_TIMEOUT: Final = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNIT_S: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_GRPC_TYPE: Final = re.compile(rb"application/grpc([+;].*)?", re.IGNORECASE | re.DOTALL)
_UNPRINTABLE: Final = re.compile(rb"[^\x20-\x24\x26-\x7e]")
_RESERVED: Final = frozenset(
    (b"content-type", b"te", b"content-length", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding")
)


class CallHead:
    """What one header block says about a call. Shared by all calls with the same block: never changed once made."""

    __slots__ = (
        "accept_encoding",
        "content_length",
        "encoding",
        "http_status",
        "metadata",
        "path",
        "plain",
        "refusal",
        "route",
        "timeout_s",
    )

    def __init__(self, path: bytes) -> None:
        self.path = path
        """`/package.Service/Method`, as sent."""
        self.timeout_s: float | None = None
        """From `grpc-timeout`; seconds from the arrival of the head."""
        self.encoding: bytes = b"identity"
        """Of the request's compressed messages: identity, gzip or deflate."""
        self.accept_encoding: tuple[bytes, ...] = ()
        """What the client can read besides identity."""
        self.metadata: tuple[tuple[bytes, bytes], ...] = ()
        """(lower-case name, value as sent), in the order sent: all fields that are not gRPC's own."""
        self.content_length = -1
        self.http_status = 200
        """Not 200: the request is no gRPC, and answered with this status."""
        self.refusal: tuple[int, str] | None = None
        """Status and text for a head that cannot be served."""
        self.route: Any = None
        """Whatever the application resolved the head to."""
        self.plain = False
        """Nothing is to be done before the first bytes of the message: no deadline, no stream, no refusal."""

    def __repr__(self) -> str:
        return f"<CallHead {self.path[:80]!r}>"


def read_head(request: RequestFields) -> CallHead:
    """What a request's fields say. Never raises: what is wrong is in `http_status` or `refusal`."""
    head = CallHead(request.path)
    head.content_length = request.content_length
    fields: dict[bytes, bytes] = {}
    metadata = []
    for name, value in request.regular:
        if name in _RESERVED:
            fields[name] = value
        else:
            metadata.append((name, value))
    head.metadata = tuple(metadata)
    if not _GRPC_TYPE.fullmatch(fields.get(b"content-type", b"")):
        head.http_status = 415
    elif request.method != b"POST":
        head.http_status = 405
    head.accept_encoding = tuple(
        name for part in fields.get(b"grpc-accept-encoding", b"").split(b",") if (name := part.strip()) in CODINGS
    )
    timeout = fields.get(b"grpc-timeout")
    if timeout is not None:
        head.timeout_s = timeout_of(timeout)
        if head.timeout_s is None:
            shown = timeout[:32].decode("ascii", "replace")
            head.refusal = INVALID_ARGUMENT, f"grpc-timeout is not one to eight digits and a unit of HMSmun: {shown!r}"
    head.encoding = fields.get(b"grpc-encoding", b"identity")
    if head.encoding != b"identity" and head.encoding not in CODINGS:
        shown = head.encoding[:32].decode("ascii", "replace")
        head.refusal = UNIMPLEMENTED, f"grpc-encoding {shown!r} is not supported; use one of {ENCODINGS.decode()}"
    return head


def timeout_of(value: bytes) -> float | None:
    """Seconds of a `grpc-timeout`; None if it is malformed."""
    found = _TIMEOUT.fullmatch(value)
    return min(int(found[1]) * _UNIT_S[found[2]], MAX_TIMEOUT_S) if found else None


def percent_encoded(text: str) -> bytes:
    """A status text as `grpc-message` carries it: UTF-8, all but printable ASCII (and `%`) percent-encoded.

    At most MAX_MESSAGE_TEXT_BYTES as encoded, because clients refuse a long header list, and with it the status; a
    longer text is cut behind a whole character.
    """
    encoded = _percent_encoded(text[:MAX_MESSAGE_TEXT_BYTES])
    if len(encoded) <= MAX_MESSAGE_TEXT_BYTES:
        return encoded
    room, count = MAX_MESSAGE_TEXT_BYTES, 0
    for character in text:
        room -= len(_percent_encoded(character))
        if room < 0:
            break
        count += 1
    return _percent_encoded(text[:count])


def _percent_encoded(text: str) -> bytes:
    return _UNPRINTABLE.sub(lambda found: b"%%%02X" % found[0][0], text.encode("utf-8", "replace"))


def trailers(code: int, text: str = "", extra: bytes = b"") -> bytes:
    """Header block that ends a call. `extra`: encoded literals."""
    block = metadata_literal(b"grpc-status", b"%d" % code)
    if text:
        block += metadata_literal(b"grpc-message", percent_encoded(text))
    return block + extra


def binary_literal(name: bytes, value: bytes) -> bytes:
    """Literal of a binary metadata entry; `name` ends in `-bin`."""
    return metadata_literal(name, base64.b64encode(value).rstrip(b"="))


def binary_value(value: bytes) -> bytes | None:
    """The bytes of a `-bin` metadata value, padded or not; None if it is no base64."""
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error:
        return None


def too_much_held() -> Overloaded:
    return Overloaded("the gateway holds as many request bytes as it may; retry later or send smaller requests")


def http_answer(status: int) -> tuple[bytes, bytes]:
    """Header block and body for a request that is no gRPC."""
    text = (
        b"This port speaks gRPC: POST with content-type application/grpc. "
        b"Inference over HTTP/1.1 is on the gateway's HTTP port.\n"
    )
    block = status_literal(status) + metadata_literal(b"content-type", b"text/plain")
    if status == 405:
        block += metadata_literal(b"allow", b"POST")
    return block, text
