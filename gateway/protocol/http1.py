"""One HTTP/1.x connection as seen by a server, without I/O: bytes in, events out.

Decides where each request ends and what it is; `http1_head.py` says which heads are accepted, `http1_chunked.py`
how chunked bodies are read, `http1_response.py` writes answers. The shell is `ingress/http_server.py`.

Rules and invariants:
- Events come in the order of the bytes, and are the same however the bytes are cut into reads (`Continue` apart:
  it depends on whether the body is there already).
- After a `Reject` that closes, and after a request that ends the connection, input is dropped unread.
- What is held is bounded: at most one head, one body, and what one read brought beyond the look-ahead limit; all
  of it is counted in `Held` until the shell says the request is over.
- Time is an argument. `expired` says whether the client has been too slow.

The usual case, one whole request with a remembered head in one read, takes the few lines of `take_whole`.
"""

from __future__ import annotations

from typing import Final

from gateway.errors import GatewayError, InvalidRequest, Overloaded, RequestTimeout
from gateway.protocol.http1_chunked import ChunkedDecoder
from gateway.protocol.http1_head import CHUNKED, Head, Heads, check_prefix
from gateway.protocol.http1_limits import HttpLimits
from gateway.protocol.http1_response import CONTINUE, adapt, error_response, response_head

__all__ = [
    "CONTINUE",
    "Continue",
    "Event",
    "Head",
    "Heads",
    "Held",
    "HttpLimits",
    "Receiver",
    "Reject",
    "Request",
    "adapt",
    "error_response",
    "response_head",
]

_IDLE: Final = 0
"""Between requests, nothing held."""
_HEAD: Final = 1
_BODY: Final = 2
_CHUNKS: Final = 3
_SKIP: Final = 4
"""Dropping the body of a refused request."""
_CLOSED: Final = 5

_BLANK: Final = b"\r\n\r\n"
"""What a head ends with, and none begins with."""

_MAX_LEADING_BLANK_LINES: Final = 4
_SMALL_PIECE_BYTES: Final = 4096


class Request:
    """A whole request. `body` is the content, decoded from chunks where it came in chunks."""

    __slots__ = ("body", "head")

    def __init__(self, head: Head, body: bytes) -> None:
        self.head = head
        self.body = body


class Continue:
    """The client waits for `100 Continue` before it sends its body."""

    __slots__ = ()


class Reject:
    """A request that is refused. `close`: where the next request begins is unknown or too far away. `head`: what is
    known of its head; None: not even where it was going."""

    __slots__ = ("close", "error", "head")

    def __init__(self, error: GatewayError, close: bool, head: Head | None = None) -> None:
        self.error = error
        self.close = close
        self.head = head


Event = Request | Continue | Reject


class Held:
    """Request bytes held by all connections of a server. Whoever takes a `Request` gives its bytes back."""

    __slots__ = ("limit_bytes", "used_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0

    def __repr__(self) -> str:
        return f"<Held {self.used_bytes} of {self.limit_bytes} bytes>"


class Receiver:
    """The receiving half of one connection."""

    __slots__ = (
        "_blank_lines",
        "_block",
        "_body_bytes",
        "_buffer",
        "_chunks",
        "_head",
        "_heads",
        "_held",
        "_left",
        "_limits",
        "_own_bytes",
        "_pieces",
        "_remembered",
        "_scanned",
        "_served",
        "_since",
        "_state",
        "_window_bytes",
        "more",
    )

    def __init__(self, heads: Heads, held: Held, now: float) -> None:
        self._heads = heads
        self._remembered = heads.remembered
        self._limits = heads.limits
        self._held = held
        self._state = _HEAD
        self._served = False
        """Whether a head was ever completed; before that the header timer runs from the connect."""
        self._since = now
        """When the present state (or the present window of a body) began."""
        self._own_bytes = 0
        """What this connection has in `held`, requests handed over aside."""
        self._buffer = bytearray()
        self._scanned = 0
        """How far `_buffer` was searched for the end of its head."""
        self._blank_lines = 0
        self._block = _BLANK
        """The head of the latest request that came whole: mostly the next one's too, and found faster."""
        self._head: Head | None = None
        self._pieces: list[bytes | bytearray] = []
        self._left = 0
        """Bytes still to come of a body of known length."""
        self._chunks: ChunkedDecoder | None = None
        self._body_bytes = 0
        """Body bytes received, coding included; for the slow-body rule."""
        self._window_bytes = 0
        self.more = False
        """Whether `receive` stopped at its limit with input left; call it again with no data to go on."""

    def __repr__(self) -> str:
        names = ("idle", "head", "body", "chunks", "skip", "closed")
        return f"<Receiver {names[self._state]} holding {self._own_bytes} bytes>"

    @property
    def idle(self) -> bool:
        """Between requests, with nothing of the next one here."""
        return self._state == _IDLE or (self._state == _HEAD and self._served and not self._buffer)

    @property
    def unused(self) -> bool:
        """Nothing is under way: between requests, or before the first byte of the first one."""
        return self.idle or (self._state == _HEAD and not self._buffer)

    @property
    def skipping(self) -> bool:
        """Dropping the body of a request whose refusal is already out."""
        return self._state == _SKIP

    def receive(self, data: bytes, now: float = 0.0, limit: int = 32) -> list[Event]:
        """Take what was read; returns what it completes.

        `limit`: how many requests to return at most; input beyond it waits (see `more`). Never raises.
        """
        if limit > 0:
            head = self.take_whole(data)
            if head is not None:
                return [Request(head, data[-head.length :] if head.length else b"")]
        return self._advance(data, now, limit)

    def take_whole(self, data: bytes) -> Head | None:
        """The head, if `data` is one whole request with a remembered head and nothing was held before it: its body
        is the last `length` bytes, and it counts as handed over. None: nothing was taken, `receive` must see it."""
        if self._state == _IDLE:
            block = self._block
            if not data.startswith(block):
                block = data[: data.find(_BLANK) + 4]
            head = self._remembered.get(block)
            if head is not None and len(data) - len(block) == head.length:
                held = self._held
                used = held.used_bytes + head.length
                if head.keep_alive and used <= held.limit_bytes:
                    held.used_bytes = used
                    self._block = head.block
                    return head
        return None

    def _advance(self, data: bytes, now: float, limit: int) -> list[Event]:
        events: list[Event] = []
        source: bytes | bytearray = data
        if self._buffer:
            self._buffer += data
            source = self._buffer
        at = 0
        room = limit
        self.more = False
        while at < len(source) and self._state != _CLOSED:
            if self._state <= _HEAD and room <= 0:
                self.more = True
                break
            before = len(events)
            try:
                step = self._step(source, at, now, events)
            except GatewayError as error:
                self._reject(error, events, self._head or self._heads.located(source, at))
                break
            room -= sum(type(event) is not Continue for event in events[before:])
            if step < 0:
                break
            at = step
        self._keep(source, at, now)
        if self._held.used_bytes > self._held.limit_bytes and self._state in {_BODY, _CHUNKS}:
            self._reject(_too_much_held(), events, self._head)
            self._keep(b"", 0, now)
        return events

    def _step(self, source: bytes | bytearray, at: int, now: float, events: list[Event]) -> int:
        """Use some of `source[at:]`; returns the position behind it, −1 if more must arrive first."""
        if self._state <= _HEAD:
            return self._take_head(source, at, now, events)
        if self._state == _CHUNKS:
            return self._take_chunks(source, at, events)
        take = min(self._left, len(source) - at)
        if self._state == _BODY:
            self._add_piece(source[at : at + take])
        self._left -= take
        self._body_bytes += take
        if not self._left:
            if self._state == _BODY:
                self._complete(b"".join(self._pieces), events)
            else:
                self._state = _IDLE
        return at + take

    # -- heads -----------------------------------------------------------------------------------------------

    def _take_head(self, source: bytes | bytearray, at: int, now: float, events: list[Event]) -> int:
        if source[at] in b"\r\n":
            return self._take_blank_line(source, at, now)
        end = source.find(b"\r\n\r\n", max(at, self._scanned - 3))
        stop = end + 4 if end >= 0 else -1
        block = bytes(source[at:stop]) if end >= 0 else b""
        head = self._remembered.get(block)
        if head is None:
            check_prefix(source, at, self._scanned, stop, self._limits)
            if end < 0:
                self._wait(len(source) - at, now)
                return -1
            head = self._heads.read(block)
        self._scanned = 0
        self._blank_lines = 0
        self._served = True
        self._begin(head, len(source) - stop, now, events)
        return stop

    def _wait(self, scanned: int, now: float) -> None:
        """A head has begun and is not complete; its timer runs from its first byte."""
        if not self._scanned and self._served:
            self._since = now
        self._scanned = scanned

    def _take_blank_line(self, source: bytes | bytearray, at: int, now: float) -> int:
        """A few empty lines ahead of a request are let pass (RFC 9112 §2.2)."""
        line = source[at : at + 2]
        if line == b"\r":
            self._wait(0, now)
            return -1
        self._blank_lines += 1
        if line != b"\r\n" or self._blank_lines > _MAX_LEADING_BLANK_LINES:
            raise InvalidRequest("expected a request line")
        self._state = _HEAD
        return at + 2

    def _begin(self, head: Head, available: int, now: float, events: list[Event]) -> None:
        """The head is complete; `available` bytes behind it are here."""
        if not head.length:
            self._emit(head, b"", events)
            return
        self._since = now
        self._body_bytes = self._window_bytes = 0
        self._left = head.length
        if self._held.used_bytes + max(head.length, 0) > self._held.limit_bytes:
            self._skip(head, events)
            return
        self._head = head
        if head.length == CHUNKED:
            self._state = _CHUNKS
            self._chunks = ChunkedDecoder(self._limits)
        else:
            self._state = _BODY
        if head.expect_continue and not available:
            events.append(Continue())

    def _skip(self, head: Head, events: list[Event]) -> None:
        error = _too_much_held()
        # A client that was told to wait for 100 Continue may or may not send its body now: nothing can be skipped.
        known = not head.chunked and not head.expect_continue and head.keep_alive
        if known and head.length <= self._limits.max_skipped_body_bytes:
            self._state = _SKIP
            events.append(Reject(error, close=False, head=head))
        else:
            raise error

    # -- bodies ----------------------------------------------------------------------------------------------

    def _take_chunks(self, source: bytes | bytearray, at: int, events: list[Event]) -> int:
        chunks = self._chunks
        assert chunks is not None  # noqa: S101  # set with the state
        stop = chunks.feed(source, at)
        self._body_bytes += stop - at
        if chunks.done:
            self._complete(bytes(chunks.body), events)
        return stop

    def _add_piece(self, piece: bytes | bytearray) -> None:
        """Pieces stay as they were read and are joined once; small ones are merged, each costs an object."""
        pieces = self._pieces
        if len(piece) >= _SMALL_PIECE_BYTES or not pieces:
            pieces.append(piece)
        elif isinstance(pieces[-1], bytearray):
            pieces[-1] += piece
        else:
            pieces.append(bytearray(piece))

    def _complete(self, body: bytes, events: list[Event]) -> None:
        head = self._head
        assert head is not None  # noqa: S101  # set with the state
        self._head = self._chunks = None
        self._pieces = []
        self._emit(head, body, events)

    def _emit(self, head: Head, body: bytes, events: list[Event]) -> None:
        self._held.used_bytes += len(body)
        self._state = _IDLE if head.keep_alive else _CLOSED
        events.append(Request(head, body))

    def _reject(self, error: GatewayError, events: list[Event], head: Head | None) -> None:
        self._state = _CLOSED
        events.append(Reject(error, close=True, head=head))

    # -- accounts --------------------------------------------------------------------------------------------

    def _keep(self, source: bytes | bytearray, at: int, now: float) -> None:
        """Keep what is left of `source`, bring `held` up to date, and look after the clock."""
        if self._state == _CLOSED:
            self._drop()
        elif source is self._buffer:
            del self._buffer[:at]
        elif at < len(source):
            self._buffer = bytearray(memoryview(source)[at:])
        if self._state == _IDLE and self._buffer:
            self._state = _HEAD
            self._since = now
        own = len(self._buffer)
        if self._state == _BODY and self._head is not None:
            own += self._head.length - self._left
        elif self._chunks is not None:
            own += len(self._chunks.body)
        self._held.used_bytes += own - self._own_bytes
        self._own_bytes = own

    def _drop(self) -> None:
        self._buffer = bytearray()
        self._pieces = []
        self._head = self._chunks = None
        self.more = False

    def close(self) -> None:
        """The connection is over: forget everything, give back what was held. Further input is dropped."""
        self._state = _CLOSED
        self._keep(b"", 0, 0.0)

    # -- time ------------------------------------------------------------------------------------------------

    def expired(self, now: float) -> GatewayError | None:
        """The error to answer if the client has been too slow with a head or a body; None otherwise.

        Call it about once a second; it moves the window of the slow-body rule.
        """
        elapsed = now - self._since
        if self._state == _HEAD and (self._buffer or not self._served):
            if elapsed >= self._limits.header_timeout_s:
                return RequestTimeout(f"the request head did not arrive within {self._limits.header_timeout_s:g} s")
        elif self._state in {_BODY, _CHUNKS, _SKIP} and elapsed >= self._limits.body_window_s:
            if self._body_bytes - self._window_bytes < elapsed * self._limits.min_body_rate_bytes_s:
                return RequestTimeout(
                    f"the request body arrives at less than {self._limits.min_body_rate_bytes_s} bytes per second"
                )
            self._since = now
            self._window_bytes = self._body_bytes
        return None

    @property
    def begun(self) -> Head | None:
        """What is known of the head of the request that is arriving."""
        return self._head or self._heads.located(self._buffer, 0)

    def excuse(self, now: float) -> None:
        """Start the present timer anew: it was we who did not read."""
        self._since = now
        self._window_bytes = self._body_bytes


def _too_much_held() -> Overloaded:
    return Overloaded("the gateway holds as many request bytes as it may; retry later or send smaller requests")
