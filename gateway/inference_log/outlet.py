"""Where frames go, and what becomes of them when there is no room: the one place that decides about losing a row.

    policy  the queue has no room                                          what the owner gets
    drop    rows are lost; counted, and recorded as a gap with a span      serving never waits
    spill   the second writer takes them; when that is full too, as drop   serving never waits
    block   further requests are refused; rows of what was executed wait   no answer without its row
            here, in memory, until the queue takes them

Rules and invariants:
* Every row offered here is taken, or waits here, or is counted in exactly one gap record: none just vanishes.
* Gap records and side streams may use the writer's reserve. A gap that finds no room waits and grows: there is one for
  each model version and reason, so what waits is bounded by what is served.
* What waits for `block` is bounded by what can be executing at one time, because nothing new is let in meanwhile. It
  keeps its order; rows of blocking models never overtake one another.
* Blocking ends when a quarter of the queue is free again: otherwise each request let in would block the next.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from gateway.core.log_policy import Overflow
from gateway.inference_log import frame
from gateway.inference_log.frame import Event, Stream
from gateway.inference_log.wal import MAX_PAYLOAD_BYTES

log = logging.getLogger("gateway.inference_log")

AGAIN_S: Final = 0.05
"""Pause before what waits is offered again."""
GAP_S: Final = 1.0
"""A gap is recorded this long after its first loss, or later: one record for a burst."""
MAX_WAITING_EVENTS: Final = 10_000
TOLD_EVERY_S: Final = 10.0


class Writer(Protocol):
    """Takes frames, or refuses at once; `writer.LogWriter` fits."""

    @property
    def pending_bytes(self) -> int: ...

    def offer(self, frame: bytes, rows: int, *, reserve: bool = False) -> bool: ...


class Later(Protocol):
    """Calls a function after so many seconds; a loop's `call_later` fits."""

    def __call__(self, delay_s: float, callback: Callable[[], None], /) -> object: ...


@dataclass(slots=True)
class _Gap:
    rows: int
    nbytes: int
    from_ns: int
    to_ns: int


@dataclass(frozen=True, slots=True)
class OutletStatistics:
    offered_rows: int
    """Rows and events that were to be written."""
    lost_rows: int
    """... and were not, for want of room."""
    spilled_rows: int
    refused_requests: int
    """Requests refused because their rows would have found no room; they have no row either."""
    waiting_rows: int
    """Rows of blocking models that wait for room."""
    waiting_bytes: int
    gap_records: int
    open_gaps: int
    """Gaps that are not recorded yet."""
    blocked: bool


class Outlet:
    """One for the process; used on the event loop's thread only."""

    def __init__(
        self,
        writer: Writer,
        capacity: int,
        later: Later,
        clock: Callable[[], float],
        wall_ns: Callable[[], int],
        spill: Writer | None = None,
    ) -> None:
        """`capacity`: bytes at which the writer's queue counts as full. `spill`: the second writer."""
        self._writer = writer
        self._capacity = capacity
        self._later = later
        self._now = clock
        self._wall_ns = wall_ns
        self._spill = spill
        self._blocked = False
        self._blocking: deque[tuple[bytes, int]] = deque()
        self._events: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._gaps: dict[tuple[str, str, str], _Gap] = {}
        self._armed = False
        self._gap_due = 0.0
        self._told: float | None = None
        self._offered = self._lost = self._spilled = self._refused = self._recorded = 0

    def __repr__(self) -> str:
        return f"<Outlet lost={self._lost} waiting={len(self._blocking)} blocked={self._blocked}>"

    @property
    def blocked(self) -> bool:
        """Whether models that block must refuse requests now."""
        pending = self._writer.pending_bytes
        if self._blocked:
            if not self._blocking and pending <= self._capacity * 3 // 4:
                self._blocked = False
                log.warning("the inference log takes rows again; models that wait for it answer again")
        elif self._blocking or pending >= self._capacity:
            self._blocked = True
            log.error("the inference log has no room left; models with overflow: block refuse requests until it has")
        return self._blocked

    def put(self, data: bytes, rows: int, policy: Overflow, model: str, version: str) -> None:
        """A frame of requests to one model version."""
        self._offered += rows
        if len(data) > MAX_PAYLOAD_BYTES:  # would wait at the head of those that block, for ever
            self._lose(model, version, "too_large", rows, len(data))
        elif policy == "block":
            if self._blocking or not self._writer.offer(data, rows, reserve=True):
                self._blocking.append((data, rows))
                self._waiting_bytes += len(data)
                self._arm()
        elif self._writer.offer(data, rows):
            pass
        elif policy == "spill" and self._spill is not None and self._spill.offer(data, rows):
            self._spilled += rows
        else:
            self._lose(model, version, "spill_full" if policy == "spill" else "queue_full", rows, len(data))

    def event(self, stream: Stream, kind: str, model: str, version: str, details: Mapping[str, object]) -> bool:
        """An entry of a side stream; False: there is no room for it, or it cannot be written, which is counted and
        recorded as a gap. Raises nothing."""
        try:
            data = _event(self._wall_ns(), stream, kind, model, version, details)
        except Exception:  # whatever it is, no load and no swap fails for what cannot be written about it
            log.exception("an entry %s of %s could not be noted and is lost", kind, stream)
            self.lose(model, version, "faulty", 1, 0)
            return False
        self._offered += 1
        if not self._events and self._writer.offer(data, 1, reserve=True):
            return True
        if stream == "lifecycle" and len(self._events) < MAX_WAITING_EVENTS:
            self._events.append(data)
            self._waiting_bytes += len(data)
            self._arm()
            return True
        self._lose(model, version, f"{stream}_full", 1, len(data))
        return False

    def refused(self, model: str, version: str) -> None:
        """A request was refused because of `blocked`: it gets no row, but a place in a gap record."""
        self._refused += 1
        self._note(model, version, "refused", 1, 0)

    def statistics(self) -> OutletStatistics:
        return OutletStatistics(
            self._offered,
            self._lost,
            self._spilled,
            self._refused,
            sum(rows for _, rows in self._blocking) + len(self._events),
            self._waiting_bytes,
            self._recorded,
            len(self._gaps),
            self._blocked,
        )

    def finish(self) -> bool:
        """Offer all that waits, gaps last; whether everything was taken. May be called again."""
        self._offer_waiting()
        if not self._blocking and not self._events:
            self._record_gaps()
        return not (self._blocking or self._events or self._gaps)

    def give_up(self) -> int:
        """The process ends and nothing is taken any more: how many rows and events are lost with it."""
        rows = sum(rows for _, rows in self._blocking) + len(self._events)
        self._lost += rows
        self._blocking.clear()
        self._events.clear()
        self._waiting_bytes = 0
        return rows

    def lose(self, model: str, version: str, reason: str, rows: int, nbytes: int) -> None:
        """Rows that no frame could be made of: they count as offered and lost, and a gap record tells of them."""
        self._offered += rows
        self._lost += rows
        self._note(model, version, reason, rows, nbytes)

    def _lose(self, model: str, version: str, reason: str, rows: int, nbytes: int) -> None:
        self._lost += rows
        self._note(model, version, reason, rows, nbytes)
        now = self._now()
        if self._told is None or now - self._told >= TOLD_EVERY_S:
            self._told = now
            log.error(
                "the inference log has no room left: %d rows were lost so far (model %s, %s); they are counted in "
                "gateway_inference_log_dropped_total and in a gap record", self._lost, model or "unknown", reason,
            )  # fmt: skip

    def _note(self, model: str, version: str, reason: str, rows: int, nbytes: int) -> None:
        now_ns = self._wall_ns()
        gap = self._gaps.get((model, version, reason))
        if gap is None:
            if not self._gaps:
                self._gap_due = self._now() + GAP_S
            self._gaps[model, version, reason] = _Gap(rows, nbytes, now_ns, now_ns)
        else:
            gap.rows += rows
            gap.nbytes += nbytes
            gap.to_ns = now_ns
        self._arm()

    def _arm(self) -> None:
        if not self._armed:
            self._armed = True
            self._later(AGAIN_S, self._again)

    def _again(self) -> None:
        self._armed = False
        self._offer_waiting()
        if self._gaps and self._now() >= self._gap_due:
            self._record_gaps()
        if self._blocking or self._events or self._gaps:
            self._arm()
        elif self._blocked:
            _ = self.blocked  # tells people that it is over, if it is
            if self._blocked:
                self._arm()

    def _offer_waiting(self) -> None:
        offer = self._writer.offer
        while self._events and offer(self._events[0], 1, reserve=True):
            self._waiting_bytes -= len(self._events.popleft())
        while self._blocking and offer(*self._blocking[0], reserve=True):
            self._waiting_bytes -= len(self._blocking.popleft()[0])

    def _record_gaps(self) -> None:
        for key, gap in list(self._gaps.items()):
            model, version, reason = key
            details = {
                "rows": gap.rows, "bytes": gap.nbytes, "from_ns": gap.from_ns, "to_ns": gap.to_ns, "reason": reason,
            }  # fmt: skip
            kind = "refused" if reason == "refused" else "dropped"
            if not self._writer.offer(_event(self._wall_ns(), "gap", kind, model, version, details), 1, reserve=True):
                return
            self._offered += 1
            self._recorded += 1
            del self._gaps[key]


def _event(at_ns: int, stream: Stream, kind: str, model: str, version: str, details: Mapping[str, object]) -> bytes:
    return frame.encode(Event(at_ns, stream, kind, model, version, json.dumps(details, ensure_ascii=False)))
