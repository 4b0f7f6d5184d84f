"""Response heads and error bodies of HTTP/1.x, as bytes.

Rules: error bodies are `{"error":"…"}` with exactly `Content-Type: application/json`; an error that may be retried
carries `Retry-After` in whole seconds; `Connection` is only written where it says something the protocol version
does not imply.
"""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Final

import orjson

from gateway.errors import GatewayError

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

_STATUS_LINES: Final[dict[int, bytes]] = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: ".encode() for status in HTTPStatus
}


def response_head(
    status: int,
    content_type: bytes,
    content_length: int,
    extra: bytes = b"",
    keep_alive: bool = True,
) -> bytes:
    """Status line and headers, through the blank line.

    `extra`: further headers, each with its CRLF; the caller vouches for them holding no stray CR or LF.
    `keep_alive`: whether the connection stays open.
    """
    connection = b"" if keep_alive else b"Connection: close\r\n"
    values = (_STATUS_LINES[status], content_type, content_length, extra, connection)
    return b"%b%b\r\nContent-Length: %d\r\n%b%b\r\n" % values


def error_response(error: GatewayError, extra: bytes = b"", keep_alive: bool = True) -> bytes:
    """A complete error response. `extra`: as for `response_head`."""
    if error.retryable:
        extra += b"Retry-After: %d\r\n" % max(1, math.ceil(error.retry_after_s))
    # A text may quote a client's bytes; a lone surrogate in it must not turn one error into another.
    body = orjson.dumps({"error": str(error).encode("utf-8", "replace").decode()})
    return response_head(error.status, b"application/json", len(body), extra, keep_alive) + body


def adapt(response: bytes, bodiless: bool, say_keep_alive: bool) -> bytes:
    """A complete response made fit for a HEAD request (`bodiless`) or for an HTTP/1.0 client that stays."""
    head, _, body = response.partition(b"\r\n\r\n")
    if say_keep_alive:
        head += b"\r\nConnection: keep-alive"
    return head + b"\r\n\r\n" + (b"" if bodiless else body)
