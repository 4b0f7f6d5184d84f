"""How much a client of the data port may ask for, and for how long: the limits of one HTTP server.

Rules: every limit has a unit in its name and a default that holds for a gateway open to many clients; the ones
that guard a parser are checked before the bytes they speak of are kept. Texts shown to a client name the
configuration key, so that whoever runs the gateway can find it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Limits of one HTTP server. All are per connection unless the name says otherwise."""

    max_body_bytes: int = 64 * 1024 * 1024
    max_request_line_bytes: int = 8 * 1024
    max_head_bytes: int = 64 * 1024
    """Request line and all fields, through the blank line."""
    max_field_bytes: int = 16 * 1024
    """One header field, its name and value."""
    max_fields: int = 100
    max_chunks: int = 65_536
    max_chunk_extension_bytes: int = 256
    max_trailer_bytes: int = 8 * 1024
    max_skipped_body_bytes: int = 1024 * 1024
    """A refused request's body up to this size is read and dropped so that the connection can stay open."""

    max_held_bytes: int = 512 * 1024 * 1024
    """Request bytes held by the whole server: being received, or waiting for their answer."""
    max_connections: int = 4096
    """Of the whole server."""
    max_connections_per_address: int = 256
    """From one remote address; loopback addresses are exempt, they are the operator's own machine."""
    max_in_flight: int = 32
    """Pipelined requests handed over and not yet answered; reading resumes at half of it."""

    header_timeout_s: float = 10.0
    """From the first byte of a request head (from the connect, for the first one) to its last."""
    body_window_s: float = 5.0
    """The slow-body rule looks at windows of this length; the first one is the grace period."""
    min_body_rate_bytes_s: int = 1000
    """A body that brings less than this over a window is given up."""
    idle_timeout_s: float = 75.0
    write_timeout_s: float = 30.0
    """A client that takes nothing of a waiting answer for this long is disconnected."""
    linger_s: float = 5.0
    """After a refusal: how long what the client still sends is dropped, so that it can read the refusal."""
