"""The sending half of an HTTP/2 connection: what goes out, in which order, and never more than the peer allows.

`out` collects finished frames; the shell takes it once per turn of the loop. Header blocks and control frames may
always go out; DATA is subject to the peer's two windows (RFC 9113 §5.2) and to the shell's `open`, which is false
while the transport does not take what it has. What cannot go waits in its stream.

Rules and invariants:
- A stream's data leaves in order, and its trailers after the last byte of it.
- Streams that may send take turns, one frame of at most `_TURN_BYTES` each, so that a long answer does not hold up
  short ones.
- `waiting` holds exactly the streams with queued data whose own window is open.
- Queued bytes are counted in `held`, the budget of all connections, until they are in `out` or dropped.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from gateway.protocol.hpack_blocks import EMPTY_TABLE
from gateway.protocol.http1 import Held
from gateway.protocol.http2_frames import (
    DATA,
    DEFAULT_FRAME_BYTES,
    DEFAULT_WINDOW,
    END_STREAM,
    frame,
    frame_head,
    header_frames,
    rst_stream,
)
from gateway.protocol.http2_limits import OpenCalls

Piece = bytes | memoryview

_TURN_BYTES: Final = 64 * 1024


class Stream:
    """One stream as the connection sees it. Owners derive from it, so a call is one object.

    `wanted`, `paused` and `head` are the owner's; the rest belongs to the connection.
    """

    __slots__ = (
        "content_left",
        "head",
        "id",
        "paused",
        "progress_at",
        "queue",
        "queued_bytes",
        "receive_window",
        "remote_closed",
        "send_window",
        "trailers",
        "wanted",
    )

    head: Any

    def __init__(self, stream_id: int, send_window: int, receive_window: int) -> None:
        self.id = stream_id
        self.send_window = send_window
        self.receive_window = receive_window
        """Bytes the client may still send."""
        self.remote_closed = False
        self.content_left = -1
        """Bytes announced by content-length and not here yet; below 0 if none was announced."""
        self.wanted = 0
        """Bytes missing of a message whose length is known: the window is opened for them."""
        self.paused = False
        """No more window is given."""
        self.queue: deque[Piece] | None = None
        self.queued_bytes = 0
        self.trailers: bytes | None = None
        """Header block that ends the stream once `queue` is empty."""
        self.progress_at = 0.0
        """When the client last took some of `queue`."""


class Output:
    """See the module's text."""

    __slots__ = (
        "calls",
        "closed",
        "held",
        "now",
        "open",
        "out",
        "peer_frame_bytes",
        "peer_window",
        "prefix",
        "send_window",
        "streams",
        "waiting",
    )

    def __init__(self, held: Held, calls: OpenCalls, now: float) -> None:
        self.held = held
        self.calls = calls
        """Counts `streams` of all connections."""
        self.now = now
        """The latest instant told."""
        self.closed = False
        """Nothing more is read or sent after what is in `out`."""
        self.open = True
        """Whether data may go out; the shell's."""
        self.out: list[Piece] = []
        self.send_window = DEFAULT_WINDOW
        self.peer_window = DEFAULT_WINDOW
        """What a new stream may send."""
        self.peer_frame_bytes = DEFAULT_FRAME_BYTES
        self.prefix = b""
        """Stands ahead of the next header block."""
        self.streams: dict[int, Stream] = {}
        self.waiting: dict[int, Stream] = {}

    def shrink_table(self) -> None:
        """The peer made its header table smaller, and waits to be told that ours follows (RFC 7541 §4.2)."""
        self.prefix = EMPTY_TABLE

    def send_headers(self, stream: Stream, block: bytes, *, end: bool = False) -> None:
        """Send a header block; `end`: it is the last of the stream, which is over with it."""
        if self.prefix:
            block, self.prefix = self.prefix + block, b""
        flags = END_STREAM if end else 0
        self.out.append(header_frames(stream.id, block, flags, self.peer_frame_bytes))
        if end:
            self.finished(stream)

    def send_data(self, stream: Stream, parts: list[Piece], length: int) -> None:
        """Send `length` bytes as soon as the windows allow. Parts must not change afterwards."""
        if (
            stream.queue is None
            and self.open
            and length <= min(self.send_window, stream.send_window, self.peer_frame_bytes)
        ):
            self.send_window -= length
            stream.send_window -= length
            self.out.append(frame_head(length, DATA, 0, stream.id))
            self.out.extend(parts)
            return
        if stream.queue is None:
            stream.queue = deque()
            stream.progress_at = self.now
        # Only here are parts counted and cut, so they have to be views of bytes.
        stream.queue.extend(memoryview(part).cast("B") for part in parts if len(part))
        stream.queued_bytes += length
        self.held.used_bytes += length
        if stream.send_window > 0:
            self.waiting[stream.id] = stream

    def send_trailers(self, stream: Stream, block: bytes) -> None:
        """End the stream with `block` behind all that was sent before."""
        if stream.queue:
            stream.trailers = block
        else:
            self.send_headers(stream, block, end=True)

    def send_short(self, stream: Stream, block: bytes, body: bytes) -> None:
        """A whole answer without trailers; its body is left out if a window is too small for it."""
        if len(body) > min(self.send_window, stream.send_window):
            self.send_headers(stream, block, end=True)
            return
        self.send_window -= len(body)
        self.send_headers(stream, block)
        self.out.append(frame(DATA, END_STREAM, stream.id, body))
        self.finished(stream)

    def finished(self, stream: Stream) -> None:
        """We have sent the last frame."""
        del self.streams[stream.id]
        self.calls.count -= 1
        if not stream.remote_closed:
            self._cut_short(stream)

    def _cut_short(self, stream: Stream) -> None:
        """A client that is still sending is told that nobody listens (§8.1)."""
        self.out.append(rst_stream(stream.id, 0))
        self.ignore(stream.id)

    def ignore(self, stream_id: int) -> None:
        """Frames of this stream may still be on their way; they mean nothing."""

    def forget(self, stream: Stream) -> None:
        """The stream is over whatever was queued for it."""
        del self.streams[stream.id]
        self.calls.count -= 1
        self.waiting.pop(stream.id, None)
        self.held.used_bytes -= stream.queued_bytes
        stream.queued_bytes = 0
        stream.queue = stream.trailers = None

    def pump(self, budget: int) -> None:
        """Move queued data to `out`, up to about `budget` bytes."""
        if self.closed:  # nothing goes out behind the GOAWAY that ended the connection
            return
        waiting = self.waiting
        while waiting and budget > 0 and self.send_window > 0 and self.open:
            stream_id = next(iter(waiting))
            stream = waiting.pop(stream_id)
            count = min(stream.queued_bytes, stream.send_window, self.send_window, self.peer_frame_bytes, _TURN_BYTES)
            self._cut(stream, count)
            budget -= count
            if not stream.queued_bytes:
                stream.queue = None
                self._emptied(stream)
            elif stream.send_window > 0:
                waiting[stream_id] = stream  # behind the others

    def _emptied(self, stream: Stream) -> None:
        if stream.trailers is not None:
            block, stream.trailers = stream.trailers, None
            self.send_headers(stream, block, end=True)
        else:
            self.drained(stream)

    def drained(self, stream: Stream) -> None:
        """All that was queued for a stream that goes on has left; for the owner."""

    def _cut(self, stream: Stream, count: int) -> None:
        """One DATA frame of `count` bytes from the head of the queue."""
        queue = stream.queue
        assert queue  # noqa: S101  # streams in `waiting` have one
        stream.send_window -= count
        stream.queued_bytes -= count
        stream.progress_at = self.now
        self.send_window -= count
        self.held.used_bytes -= count
        out = self.out
        out.append(frame_head(count, DATA, 0, stream.id))
        while count:
            part = queue[0]
            if len(part) <= count:
                out.append(queue.popleft())
                count -= len(part)
            else:
                view = memoryview(part)
                out.append(view[:count])
                queue[0] = view[count:]
                count = 0

    # -- what the peer says about our sending ------------------------------------------------------------------

    def window_changed(self, stream: Stream) -> None:
        """The peer opened this stream's window, or changed that of all of them, which may take it below zero."""
        if stream.send_window <= 0:
            self.waiting.pop(stream.id, None)
        elif stream.queued_bytes:
            self.waiting[stream.id] = stream
