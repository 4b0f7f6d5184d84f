"""How much an HTTP/2 client of the gRPC port may ask for, and for how long.

Rules: every limit has a unit in its name. `Allowance` is the one shape of all rate limits: a burst that is always
fine, a rate that is fine for ever, and credit for honest work; whoever outruns all three is cut off.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Http2Limits:
    """Limits of one gRPC server. All are per connection unless the name says otherwise."""

    max_streams: int = 1024
    """Calls open at one time; announced to the client, further ones are refused with REFUSED_STREAM."""
    max_calls: int = 65_536
    """Calls open at one time on all connections of the server; further ones are refused the same way."""
    max_message_bytes: int = 2**31 - 1
    """One gRPC message, inflated; `max_held_bytes` is usually reached before."""
    max_held_bytes: int = 512 * 1024 * 1024
    """Bytes held by the whole server: requests received or waiting for their answer, and answers not yet taken."""
    max_connections: int = 4096
    """Of the whole server."""
    max_connections_per_address: int = 256
    """From one remote address; loopback addresses are exempt, they are the operator's own machine."""
    max_header_list_bytes: int = 16 * 1024
    """All header fields of one request, 32 bytes added to each (RFC 9113 §6.5.2); a larger list is answered
    RESOURCE_EXHAUSTED, one four times as large ends the connection."""
    max_continuations: int = 32
    """CONTINUATION frames of one header block."""

    stream_window_bytes: int = 1024 * 1024
    """What a client may send ahead on one stream. Opened further for a longer message once its length is known."""
    connection_window_bytes: int = 64 * 1024 * 1024
    frame_bytes: int = 256 * 1024
    """Largest frame a client may send."""

    overhead_burst: int = 4096
    overhead_per_s: float = 200.0
    """Frames that carry nothing: PING, SETTINGS, PRIORITY, empty DATA, unknown types … Each useful frame pays for
    four more, so a client that estimates its bandwidth with pings is never hit."""
    reset_burst: int = 2048
    reset_per_s: float = 200.0
    """Streams cancelled by the client, or by us for its mistakes; each answered call pays for one more."""

    header_timeout_s: float = 10.0
    """From the connect to the end of the connection preface, for one header block, and until a call's first bytes."""
    idle_timeout_s: float = 600.0
    """A connection without calls, on which nothing arrives, is closed after this time."""
    keepalive_interval_s: float = 60.0
    """A connection with calls on which nothing arrives is asked with a PING whether it still lives."""
    keepalive_timeout_s: float = 20.0
    """Time to answer that PING."""
    write_timeout_s: float = 30.0
    """A client that takes nothing of a waiting answer for this long loses the call, or the connection."""
    stream_write_timeout_s: float = 600.0
    """The same for a streaming call, whose client may be busy with what it has."""
    body_window_s: float = 5.0
    min_body_rate_bytes_s: int = 1000
    """A message that brings less than this over a window is given up."""


class OpenCalls:
    """The calls open on all connections of a server."""

    __slots__ = ("count", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0


class Allowance:
    """How many more of something are let pass."""

    __slots__ = ("_at", "_burst", "_left", "_per_s")

    def __init__(self, burst: int, per_s: float, now: float) -> None:
        self._burst = burst
        self._per_s = per_s
        self._left = float(burst)
        self._at = now

    def take(self, now: float) -> bool:
        """Use one up; False if none is left."""
        if self._left < 1.0:
            self._left = min(self._burst, self._left + (now - self._at) * self._per_s)
            self._at = now
            if self._left < 1.0:
                return False
        elif self._left >= self._burst:
            self._at = now
        self._left -= 1.0
        return True

    def give(self, count: int) -> None:
        """Honest work pays for `count` more."""
        if self._left < self._burst:
            self._left += count
