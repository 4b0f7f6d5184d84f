"""HTTP/1.1 as its client: one request, one answer.

Rules: redirects are not followed, answers are not compressed. An answer is whole, framed by Content-Length or chunks,
and within the bounds, or it is no answer (one that only ends with the connection could have been cut anywhere).
Only an answer can end a question's exchange that came after it: a connection on which anything waits to be read is not
used again. Trailers are read and forgotten.
"""

from __future__ import annotations

import socket
from typing import Any, ClassVar, Final, NamedTuple

import httptools

from gateway.backends.remote_connections import IDLE_S, Channel, Connection
from gateway.backends.remote_outcome import broken

MAX_HEAD_BYTES: Final = 65_536
MIN_STATUS: Final = 100
MAX_STATUS: Final = 999
MAX_PIECES: Final = 20_000
"""Chunks of a body, besides one for each 64 bytes of it: each costs some time."""
MAX_READ_BYTES: Final = 262_144
"""That arrive at one time."""


class HttpAnswer(NamedTuple):
    status: int
    headers: dict[bytes, bytes]
    """Names in lower case; the last of several."""
    body: bytes | bytearray
    tag: str = ""
    """What the request called itself."""

    def header(self, name: bytes) -> str:
        """Empty where there is none."""
        return self.headers.get(name, b"").decode("latin-1")


class Http1Connection(Connection):
    """Requests are `bytes` or `bytearray`, head and body; answers are `HttpAnswer`.

    Callbacks of the parser only note what they see; `data_received` acts on it.
    """

    alpn: ClassVar[str] = "http/1.1"

    def __init__(self, channel: Channel, sock: socket.socket) -> None:
        super().__init__(channel, sock)
        self._parser = httptools.HttpResponseParser(self)
        self._begin()

    def _begin(self) -> None:
        self._status = 0
        self._headers: dict[bytes, bytes] = {}
        self._body = bytearray()
        self._pieces = 0
        self._head_bytes = 0
        self._field_bytes = 0
        self._quiet_bytes = 0
        """Received since the parser last had something to tell."""
        self._complete = False
        self._keep = False
        self._fault = ""

    def silent(self) -> bool:
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False  # words that nobody asked for, or the end

    def write(self, request: Any) -> None:
        self._begin()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self.exchange is None:
            self.drop()  # nobody asked
            return
        self.answered = True
        if not self._status:
            self._head_bytes += len(data)
        told = self._field_bytes + len(self._body)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self._complete:
                self._keep = False  # what follows an answer takes nothing from it
            else:
                self._fault = self._fault or "an answer that is not HTTP"
        if not self._status and self._head_bytes > MAX_HEAD_BYTES:
            self._fault = f"an answer with a head of more than {MAX_HEAD_BYTES} bytes"
        self._quiet_bytes = self._quiet_bytes + len(data) if told == self._field_bytes + len(self._body) else 0
        if self._quiet_bytes > MAX_HEAD_BYTES + MAX_READ_BYTES and not self._complete:
            self._fault = self._fault or "an answer that goes on and says nothing"
        if self._fault:
            self.end(broken(f"{self.channel.name} gave {self._fault}"), keep=False)
        elif self._complete:
            body, self._body = self._body, bytearray()
            keep = self._keep and not self.transport.get_write_buffer_size()
            self.end(HttpAnswer(self._status, self._headers, body, self.exchange.tag), keep=keep)

    # -- what the parser calls ---------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:
            self._keep = False  # more than one answer to one question

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._complete:
            return
        self._field_bytes += len(name) + len(value)
        if self._field_bytes > MAX_HEAD_BYTES:
            self._fault = f"an answer with more than {MAX_HEAD_BYTES} bytes of header fields"
        elif not self._status:
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._complete:
            return
        self._status = self._parser.get_status_code()
        if not MIN_STATUS <= self._status <= MAX_STATUS:
            self._fault = "an answer with an impossible status"
        headers = self._headers
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[-20:]) > self.max_bytes:
            self._fault = self._too_large()
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            self._fault = "an answer with a content coding that nobody asked for"
        if b"keep-alive" in headers:
            self.idle_s = _idle_s(headers[b"keep-alive"])

    def on_body(self, data: bytes) -> None:
        if self._complete or self._fault:
            return
        self._body += data
        self._pieces += 1
        if self._pieces > MAX_PIECES + (len(self._body) >> 6):
            self._fault = "an answer in too many pieces"
        if len(self._body) > self.max_bytes:
            self._fault = self._too_large()
            self._body = bytearray()

    def on_message_complete(self) -> None:
        if self._complete:
            return
        if 100 <= self._status < 200:  # an interim answer: the real one follows
            self._status = 0
            self._headers = {}
            return
        self._complete = True
        self._keep = self._parser.should_keep_alive()

    def _too_large(self) -> str:
        return f"an answer of more than {self.max_bytes} bytes"


def _idle_s(value: bytes) -> float:
    """From `Keep-Alive: timeout=5`: a little less than the server allows."""
    for part in value.split(b","):
        key, _, number = part.strip().partition(b"=")
        if key.lower() == b"timeout" and number.isdigit():
            return max(min(float(int(number[:9])) - 1.0, IDLE_S), 0.5)
    return IDLE_S
