"""Compressed bodies on the data port: inflating requests and deflating answers without holding up the event loop.

Rules (wire notes §1.10): only inference takes and gives compressed bodies. Small ones are worked on at once; what
takes longer goes to one of a few threads (zlib lets go of the interpreter's lock), and its request goes on when it
comes back. What a body inflates to is bounded by the limit on bodies and counted as held, like bytes received.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from gateway.ingress.http_exchange import Exchange
from gateway.protocol import content_coding
from gateway.protocol.content_coding import DEFLATE, GZIP, Inflation
from gateway.protocol.http1 import Head

log = logging.getLogger("gateway.http")

AT_ONCE_BYTES: Final = 65_536
"""Plain bytes made or read in the event loop: about half a millisecond of work."""
_STEP_BYTES: Final = 4 * 1024 * 1024
_THREADS: Final = 2
MIN_BYTES: Final = 8192
LEVEL: Final = 1

Deflated = Callable[[list[bytes | memoryview], bytes | None], None]
"""Takes the parts of a body and its content coding, None: plain."""


def request_coding(head: Head) -> bytes | None:
    """A request's `Content-Encoding` unless it says that the body is plain."""
    return None if head.content_encoding in {None, b"identity"} else head.content_encoding


def is_known(coding: bytes) -> bool:
    return coding in {GZIP, DEFLATE}


class BodyCoding:
    """Inflates and deflates for one server."""

    def __init__(self, limit_bytes: int, min_bytes: int = MIN_BYTES, level: int = LEVEL) -> None:
        """
        Args:
            limit_bytes: what a request may inflate to.
            min_bytes: smallest answer that is compressed.
            level: zlib's; 0 leaves every answer plain.
        """
        self._limit = limit_bytes
        self._min_bytes = min_bytes
        self._level = level
        self._threads = ThreadPoolExecutor(_THREADS, "body-coding")  # no thread exists before the first job

    def answer_coding(self, head: Head) -> bytes | None:
        """What the sender of this head wants its answer compressed in, if in anything."""
        if not self._level:
            return None
        values = [value for name, value in head.headers if name == b"accept-encoding"]
        return content_coding.choose_coding(b",".join(values)) if values else None

    def inflate(
        self,
        exchange: Exchange,
        coding: bytes,
        body: bytes,
        then: Callable[[bytes], None],
        refuse: Callable[[Exception], None],
    ) -> None:
        """Calls `then` with the plain body, or `refuse`; now or later, and not at all if the client leaves meanwhile.

        `then` may raise whatever; it is reported to `refuse`.
        """
        inflation = Inflation(coding, body, self._limit)
        try:
            if inflation.step(AT_ONCE_BYTES):
                then(inflation.result)
                return
        except Exception as error:
            refuse(error)
            return
        gone = False

        def left() -> None:
            nonlocal gone
            gone = True

        def ready(future: Future[bytes]) -> None:
            if gone:
                return
            exchange.on_abort = None
            try:
                plain = future.result()
                exchange.hold(len(plain))
                then(plain)
            except Exception as error:
                refuse(error)
            finally:
                # What was raised knows this frame; with the future in it, all that came out so far would stay in memory
                # until the collector finds the circle.
                del future

        exchange.on_abort = left
        self._run(lambda: b"" if gone else _rest(inflation), ready)

    def deflate(self, parts: list[bytes | memoryview], length: int, coding: bytes, then: Deflated) -> None:
        """Calls `then`, which must not raise, with the body in `coding` or plain if that is no longer; now or later."""
        if length < self._min_bytes:
            then(parts, None)
        elif length <= AT_ONCE_BYTES:
            _give(parts, length, content_coding.deflate(parts, coding, self._level), coding, then)
        else:

            def ready(future: Future[bytes]) -> None:
                if future.exception() is None:
                    _give(parts, length, future.result(), coding, then)
                else:
                    log.error("an answer could not be compressed", exc_info=future.exception())
                    then(parts, None)

            self._run(lambda: content_coding.deflate(parts, coding, self._level), ready)

    def _run(self, work: Callable[[], bytes], ready: Callable[[Future[bytes]], None]) -> None:
        loop = asyncio.get_running_loop()
        future = self._threads.submit(work)
        future.add_done_callback(lambda done: loop.call_soon_threadsafe(ready, done))


def _rest(inflation: Inflation) -> bytes:
    while not inflation.step(_STEP_BYTES):
        pass
    return inflation.result


def _give(parts: list[bytes | memoryview], length: int, made: bytes, coding: bytes, then: Deflated) -> None:
    if len(made) < length:
        then([made], coding)
    else:
        then(parts, None)
