"""Sinks: copies of the inference log elsewhere. How far one has come, and the loop that takes it further.

A sink is a process of its own (`sink_process.py`) that follows the log's directory and hands pieces to a `Target`. The
directory is its buffer: while the target is away nothing is lost, and serving goes on.

Rules and invariants:
* How far a sink is stands in two places. The target itself says it when it is opened, and that counts: it moves in the
  same transaction as the rows. `<dir>/sinks/<name>.json` repeats it for others: retention and merging (`shipped_up_to`)
  and the gateway's metrics (`read_state`). It is never ahead of the target.
* At least once: after any failure the target is opened anew, asked how far it is, and gets everything from there on. It
  recognises rows by (epoch, position).
* One process ships to one target at a time: `<dir>/sinks/<name>.lock`.
* `Unavailable` is waited out, for ever, with growing pauses; whatever else a target raises is a fault of the gateway.
* A piece that took too long is tried with half its rows; what went well lets pieces grow again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from gateway.errors import GatewayError
from gateway.inference_log.private_files import write_json
from gateway.inference_log.sink_feed import Feed, Piece
from gateway.inference_log.sink_state import SinkState, read_state, shipped_up_to, state_file

__all__ = ["Shipment", "Shipper", "SinkState", "Target", "TooSlow", "Unavailable", "read_state", "shipped_up_to"]

log = logging.getLogger("gateway.inference_log")

PIECE_ROWS: Final = 5000
FEWEST_ROWS: Final = 50
POLL_S: Final = 0.5
"""Between two looks at a log with nothing new."""
STATE_S: Final = (1.0, 10.0)
"""Between two writes of the state while something changes, and while nothing does."""
PAUSES_S: Final = (0.2, 30.0)
"""Shortest and longest pause after a failure."""


class Unavailable(GatewayError):
    """The target cannot take rows at present; the text says why, without any secret."""

    reason = "sink_unavailable"


class TooSlow(Unavailable):
    """The target did not take a piece in time."""


@dataclass(frozen=True, slots=True)
class Shipment:
    """What became of a piece."""

    rows: int
    """New in the target."""
    duplicates: int
    refused: int


class Target(Protocol):
    """Where pieces go."""

    async def open(self) -> Mapping[str, int]:
        """Connect, and say how far it is: epoch → position. Raises Unavailable."""

    async def ship(self, piece: Piece) -> Shipment:
        """Take a piece, and remember that it is taken, in one step. Raises Unavailable; the target is closed then."""

    def check(self) -> None:
        """Between pieces, when there is none: raises Unavailable if the target is known to have gone away."""

    async def close(self) -> None: ...


class Shipper:
    """Ships one log to one target until told to stop.

    Args:
        clock: seconds since 1970.
        once: end when everything that was there is shipped.
    """

    def __init__(
        self,
        feed: Feed,
        target: Target,
        name: str,
        *,
        poll_s: float = POLL_S,
        pauses_s: tuple[float, float] = PAUSES_S,
        clock: Callable[[], float] = time.time,
        once: bool = False,
    ) -> None:
        self._feed = feed
        self._target = target
        self._poll_s = poll_s
        self._pauses_s = pauses_s
        self._clock = clock
        self._once = once
        self._stop = asyncio.Event()
        self._most_rows = feed.piece_rows
        self._path = state_file(feed.layout.directory, name)
        self._tried_us: int | None = None
        """Age of the piece that could not be shipped."""
        self.state = read_state(feed.layout.directory, name) or SinkState(name=name)
        self._said = SinkState(name=name)
        """What stands in the file."""
        self._unreadable = 0

    def __repr__(self) -> str:
        return f"<Shipper {self.state.name} shipped={self.state.shipped_rows} failing={self.state.failing}>"

    def stop(self) -> None:
        """End once nothing more can be shipped at present."""
        self._once = True
        self._stop.set()

    async def run(self) -> bool:
        """Until `stop`, or at once after everything if `once`; whether everything was shipped."""
        retrying = AsyncRetrying(
            wait=wait_random_exponential(self._pauses_s[0], max=self._pauses_s[1]),
            retry=retry_if_exception_type(Unavailable),
            stop=lambda _: self._stop.is_set(),
            before_sleep=self._failed,
            sleep=self._pause,
            reraise=True,
        )
        try:
            while True:
                try:
                    await retrying(self._session)
                except Unavailable as error:
                    self._note_failure(error)
                    return False
                if self._once:
                    return True
        finally:
            await self._target.close()
            self._write(force=True)

    async def _session(self) -> None:
        """Open the target and ship until stopped. A session that shipped something and then failed ends without an
        error, so that pauses begin anew."""
        shipped = 0
        positions = dict(await self._target.open())
        self._keep(positions)
        try:
            while True:
                shipped += await self._ship_all(positions)
                self._target.check()
                self._change(failing=None, failing_since_us=None)
                self._caught_up(positions)
                if self._once:
                    return
                await self._pause(self._poll_s)
        except Unavailable as error:
            await self._target.close()
            if isinstance(error, TooSlow):
                self._feed.piece_rows = max(FEWEST_ROWS, self._feed.piece_rows // 2)
            if shipped == 0:
                raise
            self._note_failure(error)
            await self._pause(self._pauses_s[0])

    async def _ship_all(self, positions: dict[str, int]) -> int:
        """Everything that can be read now; how many rows that was."""
        rows = 0
        pieces = self._feed.pieces(positions)
        try:
            for piece in pieces:
                self._tried_us = piece.oldest_us or None
                done = await self._target.ship(piece)
                rows += piece.rows
                positions[piece.epoch] = piece.next
                self._feed.piece_rows = min(self._most_rows, self._feed.piece_rows + self._most_rows // 20 + 1)
                self._shipped(piece, done)
        finally:
            pieces.close()
        self._tried_us = None
        return rows

    def _shipped(self, piece: Piece, done: Shipment) -> None:
        unreadable, self._unreadable = self._feed.unreadable_rows - self._unreadable, self._feed.unreadable_rows
        if piece.missing or unreadable:
            log.error("sink %s: %d rows of the log are nowhere to be read", self.state.name, piece.missing + unreadable)
        if done.refused:
            log.error(
                "sink %s: %d rows were refused; the table gateway_refused says why", self.state.name, done.refused
            )
        now = self.state
        self._change(
            shipped_rows=now.shipped_rows + done.rows,
            duplicate_rows=now.duplicate_rows + done.duplicates,
            refused_rows=now.refused_rows + done.refused,
            missing_rows=now.missing_rows + piece.missing + unreadable,
            epochs={**self.state.epochs, piece.epoch: piece.next},
            failing=None,
            failing_since_us=None,
            oldest_unshipped_us=piece.oldest_us or None,
        )
        self._write()

    def _caught_up(self, positions: Mapping[str, int]) -> None:
        waiting = self._feed.backlog(positions)
        self._change(lag_rows=waiting.rows, lag_bytes=waiting.bytes, oldest_unshipped_us=None)
        self._write()

    def _keep(self, positions: dict[str, int]) -> None:
        """Drop epochs that the directory knows nothing of any more, or never did: another gateway's."""
        known = self._feed.epochs()
        self._change(epochs={epoch: position for epoch, position in positions.items() if epoch in known})

    async def _failed(self, retry: RetryCallState) -> None:
        error = retry.outcome.exception() if retry.outcome is not None else None
        self._note_failure(error)

    def _note_failure(self, error: BaseException | None) -> None:
        text = str(error)
        if self.state.failing is None:
            log.error("sink %s: %s; rows wait in %s meanwhile", self.state.name, text, self._feed.layout.directory)
        waiting = self._feed.backlog(self.state.epochs)
        self._change(
            failing=text,
            failing_since_us=self.state.failing_since_us or round(self._clock() * 1e6),
            lag_rows=waiting.rows,
            lag_bytes=waiting.bytes,
            oldest_unshipped_us=self._tried_us or self.state.oldest_unshipped_us,
        )
        self._write(force=True)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            pass

    def _change(self, **fields: object) -> None:
        if self.state.failing is not None and fields.get("failing", "") is None:
            log.info("sink %s: takes rows again", self.state.name)
        self.state = msgspec.structs.replace(self.state, **fields)

    def _write(self, *, force: bool = False) -> None:
        """The state file; a disk that is full is a reason to try later, not to end."""
        now = self._clock()
        changed = msgspec.structs.replace(self.state, at_us=0) != msgspec.structs.replace(self._said, at_us=0)
        pause_s = STATE_S[0] if changed else STATE_S[1]
        if not force and 0 <= now - self._said.at_us / 1e6 < pause_s:
            return
        self.state = self._said = msgspec.structs.replace(self.state, at_us=round(now * 1e6))
        try:
            write_json(self._path, self.state)
        except OSError as error:
            log.warning("sink %s: %s cannot be written: %s", self.state.name, self._path, error.strerror)
