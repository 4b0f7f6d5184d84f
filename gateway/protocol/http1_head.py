"""Request heads of HTTP/1.x: from a block of bytes (request line through blank line) to a checked `Head`.

Decides which heads are accepted. A block passes only if llhttp (strict) accepts it, our own reading of the fields
is the same as llhttp's, and the checks that llhttp leaves out hold: one `Host`, HTTP/1.0 or 1.1 only, no
`Transfer-Encoding` on 1.0, and the counts and sizes of `HttpLimits` (resilience notes, fact 6 and §7.4).

Framing rules (RFC 9112 §6, stricter where it lets a server choose): at most one `Content-Length`, digits only;
`Transfer-Encoding` exactly `chunked`; never both. Upgrade offers are ignored, CONNECT is refused.

Remembered blocks: keep-alive clients send the same bytes again and again, so accepted blocks are kept in a bounded
map. The whole block is the key: a block is either known byte for byte or checked in full, so remembering
never weakens a check.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import httptools

from gateway.errors import (
    ExpectationFailed,
    GatewayError,
    HeadersTooLarge,
    InvalidRequest,
    TooLarge,
    UriTooLong,
    VersionNotSupported,
)
from gateway.protocol.http1_limits import HttpLimits

MAX_REMEMBERED_BLOCK_BYTES: Final = 2048
MAX_REMEMBERED_BLOCKS: Final = 2048

CHUNKED: Final = -1
"""`Head.length` of a chunked body: compares unequal to every number of bytes."""

BAD_BYTE: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r[^\n]|(?<!\r)\n")
_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([\x21\x22\x24-\x7e]+) HTTP/([0-9])\.([0-9])")
_ABSOLUTE = re.compile(rb"https?://([^/?]+)([^?]*)", re.IGNORECASE)
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class Head:
    """One accepted request head. Shared by all requests with the same bytes: never changed once made."""

    __slots__ = (
        "block",
        "chunked",
        "client_request_id",
        "content_encoding",
        "content_length",
        "expect_continue",
        "headers",
        "http10",
        "inference_header_length",
        "keep_alive",
        "length",
        "method",
        "path",
        "request_timeout_ms",
        "route",
        "target",
        "uncommon",
    )

    def __init__(self, method: bytes, target: bytes) -> None:
        self.method = method
        self.target = target
        """As sent."""
        self.path = b""
        """The bytes before `?`, still percent-encoded; without scheme and authority."""
        self.headers: tuple[tuple[bytes, bytes], ...] = ()
        """(lower-case name, value without surrounding blanks), in the order sent."""
        self.http10 = False
        self.uncommon = method == b"HEAD"
        """Whether answers need `http1_response.adapt`: HEAD, or HTTP/1.0."""
        self.keep_alive = True
        self.content_length: int | None = None
        """As announced; None if not. Never negative, never over the body limit."""
        self.chunked = False
        self.length = 0
        """Bytes of the body; `CHUNKED` when only the body itself will tell."""
        self.expect_continue = False
        self.inference_header_length: bytes | None = None
        """Raw value of `Inference-Header-Content-Length`."""
        self.content_encoding: bytes | None = None
        self.request_timeout_ms: bytes | None = None
        """Raw value of `X-Request-Timeout-Ms`."""
        self.client_request_id: bytes | None = None
        """`X-Request-Id`, if it is 1 to 128 characters of `A-Z a-z 0-9 . _ -`; safe to echo and to log."""
        self.block = b""
        """All its bytes."""
        self.route: Any = None
        """Whatever the application resolved the head to."""

    def __repr__(self) -> str:
        return f"<Head {self.method.decode()} {self.target[:80]!r}>"


class Heads:
    """The heads of one server: checks new blocks, remembers accepted ones, resolves each once."""

    def __init__(self, limits: HttpLimits, resolve: Callable[[Head], Any]) -> None:
        self.limits = limits
        self.remembered: dict[bytes, Head] = {}
        self._resolve = resolve

    def read(self, block: bytes) -> Head:
        """Head of `block` (request line through blank line).

        Raises:
            GatewayError: the head is refused; nothing is remembered of it.
        """
        head = self.remembered.get(block)
        if head is not None:
            return head
        head = parse_head(block, self.limits)
        head.route = self._resolve(head)
        if len(block) <= MAX_REMEMBERED_BLOCK_BYTES:
            if len(self.remembered) >= MAX_REMEMBERED_BLOCKS:
                del self.remembered[next(iter(self.remembered))]
            self.remembered[block] = head
        return head

    def located(self, data: bytes | bytearray, start: int) -> Head | None:
        """Where a request was going that is refused before its head was accepted, for those who keep account of it:
        method, path and whole fields from `start` on, resolved, and nothing else. None: there is no request line."""
        block, whole, _ = bytes(data[start : start + self.limits.max_head_bytes]).partition(b"\r\n\r\n")
        lines = block.split(b"\r\n")
        if not whole:
            del lines[-1]  # not all of it is there
        found = _REQUEST_LINE.fullmatch(lines[0]) if lines else None
        absolute = _ABSOLUTE.match(found[2]) if found is not None else None
        if found is None or not (found[2].startswith(b"/") or absolute):
            return None
        head = Head(found[1], found[2])
        head.path = (absolute[2] or b"/") if absolute is not None else found[2].partition(b"?")[0]
        pairs = [line.partition(b":") for line in lines[1 : self.limits.max_fields]]
        head.headers = tuple((name.lower(), value.strip(b" \t")) for name, colon, value in pairs if colon)
        head.route = self._resolve(head)
        return head

    def forget(self) -> None:
        """Drop all remembered heads: what they resolve to has changed."""
        self.remembered.clear()


def check_prefix(data: bytes | bytearray, start: int, scanned: int, end: int, limits: HttpLimits) -> None:
    """Refuse a head as early as its bytes allow, whether or not it is complete.

    The head begins at `start`; bytes before `scanned` were looked at before; it is complete at `end`, or `end` is
    −1. What is refused, and as what, depends only on the bytes, never on how they were cut into reads: of several
    faults the one that shows first counts.

    Raises:
        InvalidRequest: a control character, a bare CR or a bare LF.
        UriTooLong: the request line does not end within its limit.
        HeadersTooLarge: the head does not end within its limit.
    """
    available = (len(data) if end < 0 else end) - start
    faults: list[tuple[int, GatewayError]] = []
    bad = BAD_BYTE.search(data, max(start, scanned - 1), start + min(available, limits.max_head_bytes))
    if bad is not None:
        faults.append((bad.end() - start, _bad_byte(data, start)))
    line_limit = limits.max_request_line_bytes
    if available >= line_limit and data.find(b"\r\n", start, start + line_limit) < 0:
        text = f"request line exceeds {line_limit} bytes; send parameters in the body"
        faults.append((line_limit, UriTooLong(text)))
    if available >= limits.max_head_bytes and (end < 0 or available > limits.max_head_bytes):
        faults.append((limits.max_head_bytes, _head_too_large(limits)))
    if faults:
        raise min(faults, key=lambda fault: fault[0])[1]


def _bad_byte(data: bytes | bytearray, start: int) -> InvalidRequest:
    if data[start : start + 2] == b"\x16\x03":
        return InvalidRequest("this port speaks plain HTTP, not TLS; use an http:// URL")
    return InvalidRequest("request head holds a control character, or a CR or LF that is not a line end (CRLF)")


def _head_too_large(limits: HttpLimits) -> HeadersTooLarge:
    return HeadersTooLarge(f"request head exceeds {limits.max_head_bytes} bytes; send fewer or shorter headers")


class _Reading:
    """What llhttp makes of a block."""

    def __init__(self) -> None:
        self.fields: list[tuple[bytes, bytes]] = []
        self.complete = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self.complete += 1


def parse_head(block: bytes, limits: HttpLimits) -> Head:
    """Check one whole block, request line through blank line, with no bare CR or LF in it.

    Raises:
        GatewayError: the head is refused; the framing of what follows it is not to be trusted.
    """
    lines = block[:-4].split(b"\r\n")
    request_line = _REQUEST_LINE.fullmatch(lines[0])
    if request_line is None:
        raise InvalidRequest("malformed request line; expected METHOD target HTTP/1.1")
    if request_line[3] + request_line[4] not in {b"11", b"10"}:
        raise VersionNotSupported("only HTTP/1.1 and HTTP/1.0 are spoken on this port")
    if len(lines) - 1 > limits.max_fields:
        raise HeadersTooLarge(f"more than {limits.max_fields} header fields; send fewer")
    if max(map(len, lines[1:]), default=0) > limits.max_field_bytes:
        raise HeadersTooLarge(f"a header field exceeds {limits.max_field_bytes} bytes; send shorter headers")
    fields = _split_fields(lines[1:])
    head = Head(request_line[1], request_line[2])
    head.block = block
    head.headers = tuple(fields)
    head.http10 = request_line[4] == b"0"
    head.uncommon = head.uncommon or head.http10
    _locate(head)
    _frame(head, limits)
    _persist(head)
    head.inference_header_length = _single(head, b"inference-header-content-length")
    head.content_encoding = _single(head, b"content-encoding")
    head.request_timeout_ms = _single(head, b"x-request-timeout-ms")
    own_id = _single(head, b"x-request-id")
    head.client_request_id = own_id if own_id and _REQUEST_ID.fullmatch(own_id) else None
    # Last, so that what both refuse is refused in our words, and our checks do not lean on llhttp's.
    if fields != _ask_llhttp(block):
        raise InvalidRequest("ambiguous header fields")
    return head


def _split_fields(lines: list[bytes]) -> list[tuple[bytes, bytes]]:
    fields = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or line[:1] in b" \t":
            raise InvalidRequest("malformed header field; expected `Name: value` on one line")
        fields.append((name.lower(), value.strip(b" \t")))
    return fields


def _ask_llhttp(block: bytes) -> list[tuple[bytes, bytes]]:
    """Fields as llhttp reads them. A fresh parser for each block: no state is carried from one to the next."""
    reading = _Reading()
    parser = httptools.HttpRequestParser(reading)
    try:
        parser.feed_data(block)
    except httptools.HttpParserUpgrade as upgrade:
        # llhttp stops behind the head of CONNECT and of any upgrade offer; an offer may be ignored (RFC 9110 §7.8).
        if parser.get_method() == b"CONNECT" or upgrade.args[0] != len(block):
            raise InvalidRequest("CONNECT is not offered; this is not a proxy") from None
    except httptools.HttpParserInvalidMethodError:
        raise InvalidRequest("unknown method; this port takes GET and POST") from None
    except httptools.HttpParserError as error:
        raise InvalidRequest(f"malformed request head: {error}") from None
    if reading.complete != 1:
        raise InvalidRequest("malformed request head")
    return reading.fields


def _values(head: Head, name: bytes) -> list[bytes]:
    return [value for key, value in head.headers if key == name]


def _single(head: Head, name: bytes) -> bytes | None:
    """Value of a field that may be sent once at most; two of them could be read two ways."""
    values = _values(head, name)
    if len(values) > 1:
        raise InvalidRequest(f"header {name.decode()} is sent more than once")
    return values[0] if values else None


def _locate(head: Head) -> None:
    """Host and path. Origin form, absolute form for this very host, and `*` (RFC 9112 §3.2)."""
    host = _single(head, b"host")
    if host is None and not head.http10:
        raise InvalidRequest("header Host is missing")
    if host is not None and not _HOST.fullmatch(host):
        raise InvalidRequest("header Host is malformed")
    target = head.target
    absolute = _ABSOLUTE.match(target)
    if target.startswith(b"/") or (target == b"*" and head.method == b"OPTIONS"):
        head.path = target.partition(b"?")[0]
    elif absolute is None:
        raise InvalidRequest("malformed request target; expected a path that begins with /")
    elif host is not None and absolute[1].lower() != host.lower():
        raise InvalidRequest("the authority in the request target and the header Host differ")
    else:
        head.path = absolute[2] or b"/"


def _frame(head: Head, limits: HttpLimits) -> None:
    """How long the body is. Everything two parsers could read differently is refused (RFC 9112 §6.3, §11.2)."""
    length = _single(head, b"content-length")
    coding = _single(head, b"transfer-encoding")
    if coding is not None:
        if length is not None:
            raise InvalidRequest("both Content-Length and Transfer-Encoding are sent; send one of them")
        if head.http10:
            raise InvalidRequest("HTTP/1.0 has no Transfer-Encoding; send Content-Length")
        if coding != b"chunked":
            raise InvalidRequest("the only Transfer-Encoding taken is exactly `chunked`")
        head.chunked = True
        head.length = CHUNKED
    elif length is not None:
        if not _LENGTH.fullmatch(length):
            raise InvalidRequest("header Content-Length is not a plain decimal number of at most 18 digits")
        head.content_length = head.length = int(length)
        if head.length > limits.max_body_bytes:
            raise body_too_large(limits)


def body_too_large(limits: HttpLimits) -> TooLarge:
    """The 413 of a body over the limit, whether announced or found while it arrives."""
    return TooLarge(
        f"request body exceeds the limit of {limits.max_body_bytes} bytes; "
        "send a smaller request or raise server.limits.max_body_bytes"
    )


def _persist(head: Head) -> None:
    """Whether the connection stays open, and what the client expects before it sends the body."""
    options = [option.strip(b" \t").lower() for value in _values(head, b"connection") for option in value.split(b",")]
    head.keep_alive = b"close" not in options and (not head.http10 or b"keep-alive" in options)
    expectations = _values(head, b"expect")
    if head.http10 or not expectations:  # RFC 9110 §10.1.1: an expectation in HTTP/1.0 is ignored
        return
    if len(expectations) > 1 or expectations[0].lower() != b"100-continue":
        raise ExpectationFailed("the only expectation met is `Expect: 100-continue`")
    head.expect_continue = head.length != 0
