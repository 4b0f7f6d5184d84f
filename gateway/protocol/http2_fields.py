"""Header fields of HTTP/2 requests: which lists are well formed (RFC 9113 §8.1-8.3).

Rules: names are lower-case tokens; values hold no NUL, CR or LF and no blanks at their ends; pseudo-headers are
known, unique, ahead of all others and complete; connection-specific fields do not exist; `te` is `trailers` or
absent; repeated `content-length` fields must agree. Whatever breaks one of these is malformed: its stream ends with
PROTOCOL_ERROR and no application sees it.
"""

from __future__ import annotations

import re
from typing import Final

from gateway.protocol.hpack_blocks import Fields

_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_BAD_VALUE: Final = re.compile(rb"[\0\r\n]|^[ \t]|[ \t]$")
_PATH: Final = re.compile(rb"/[\x21-\x7e]*|\*")
_SCHEME: Final = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*")
_CONNECTION_SPECIFIC: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)
_PSEUDO: Final = frozenset((b":method", b":scheme", b":path", b":authority"))
_REQUIRED: Final = (b":method", b":scheme", b":path")
MAX_LENGTH_DIGITS: Final = 18


class MalformedHeaders(Exception):
    """A header list that breaks a rule; the text says which."""


class RequestFields:
    """A well-formed request head."""

    __slots__ = ("content_length", "method", "path", "regular")

    def __init__(self, pseudo: dict[bytes, bytes], regular: Fields, content_length: int) -> None:
        self.method = pseudo[b":method"]
        self.path = pseudo[b":path"]
        self.regular = regular
        """All but the pseudo-headers, in the order sent."""
        self.content_length = content_length
        """Bytes; -1 if not announced."""


def read_request(fields: Fields) -> RequestFields:
    """Check the fields of a request.

    Raises:
        MalformedHeaders: see the module's text.
    """
    pseudo: dict[bytes, bytes] = {}
    count = 0
    for name, value in fields:
        if not name.startswith(b":"):
            break
        if name not in _PSEUDO:
            raise MalformedHeaders(f"unknown pseudo-header {_shown(name)}")
        if name in pseudo:
            raise MalformedHeaders(f"pseudo-header {_shown(name)} is repeated")
        if _BAD_VALUE.search(value):
            raise MalformedHeaders(f"pseudo-header {_shown(name)} holds a character it must not")
        pseudo[name] = value
        count += 1
    for name in _REQUIRED:
        if not pseudo.get(name):
            raise MalformedHeaders(f"pseudo-header {_shown(name)} is missing or empty")
    if pseudo[b":method"] == b"CONNECT":
        raise MalformedHeaders("CONNECT is not offered")
    if not _PATH.fullmatch(pseudo[b":path"]) or not _SCHEME.fullmatch(pseudo[b":scheme"]):
        raise MalformedHeaders("pseudo-header :path or :scheme is not one")
    regular = fields[count:]
    return RequestFields(pseudo, regular, _check_regular(regular))


def check_trailers(fields: Fields) -> None:
    """Check the fields of a trailer section, which has no pseudo-headers.

    Raises:
        MalformedHeaders: see the module's text.
    """
    _check_regular(fields)


def _check_regular(fields: Fields) -> int:
    """Returns the content length, −1 if there is none."""
    length = -1
    for name, value in fields:
        if not _NAME.fullmatch(name):
            raise MalformedHeaders(f"header name {_shown(name)} is not a lower-case token, or a late pseudo-header")
        if _BAD_VALUE.search(value):
            raise MalformedHeaders(f"header {_shown(name)} holds a character it must not")
        if name in _CONNECTION_SPECIFIC or (name == b"te" and value != b"trailers"):
            raise MalformedHeaders(f"header {_shown(name)} does not exist in HTTP/2")
        if name == b"content-length":
            if not value.isdigit() or len(value) > MAX_LENGTH_DIGITS or length not in {-1, int(value)}:
                raise MalformedHeaders("content-length is not one number")
            length = int(value)
    return length


def _shown(name: bytes) -> str:
    return repr(name[:40].decode("latin-1"))
