"""One replica in a fleet: everything that was learned about it, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Final, Protocol

from gateway.core.batch_time import BatchTime
from gateway.core.breaker import Breaker, Cause, State
from gateway.core.slots import AdaptiveSlots
from gateway.core.traits import Traits

NOTE_LENGTH: Final = 200
UNLIMITED: Final = 1 << 30
"""Slots of whoever bounds them by itself."""


class Candidate(Protocol):
    """`gateway.backends.interface.Replica`, as seen from below. A fleet only reads its properties."""

    @property
    def name(self) -> str: ...
    @property
    def traits(self) -> Traits: ...
    @property
    def available(self) -> bool: ...
    @property
    def free_slots(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    def execute(self, batch: Any, timeout_s: float, /) -> None: ...
    def cancel(self, batch: Any, /) -> None: ...
    def set_listener(self, changed: Callable[[], None], /) -> None: ...


class Member:
    """Its attributes are for reading; only the fleet writes them."""

    __slots__ = (
        "adaptive", "batches", "breaker", "kind", "last_rows", "last_success", "note", "replica", "rows_in_flight",
        "slots", "time", "turn", "weight",
    )  # fmt: skip

    def __init__(self, replica: Candidate, breaker: Breaker, row_s: float = 0.0) -> None:
        """`row_s`: seconds a row took on trial, 0.0: nobody knows."""
        traits = replica.traits
        self.replica = replica
        self.breaker = breaker
        self.time = BatchTime(row_s)
        self.slots = AdaptiveSlots(traits.max_slots)
        self.kind = traits.kind
        self.adaptive = traits.kind == "oip"
        """Whether `slots` bounds it; a worker's `free_slots` says it all."""
        self.weight = traits.weight
        self.batches = 0
        """Client batches that began and did not end."""
        self.rows_in_flight = 0
        self.last_rows = 1
        self.last_success = -inf
        """When a batch or a probe last succeeded, monotonic seconds."""
        self.turn = 0.0
        self.note = ""
        """Text of the latest failure that counted against it."""

    @property
    def name(self) -> str:
        """A worker's instance may move; its name follows."""
        return self.replica.name

    @property
    def in_flight(self) -> int:
        return self.replica.in_flight

    def __repr__(self) -> str:
        return f"<Member {self.name} {self.breaker.state.value} batches={self.batches} rows={self.rows_in_flight}>"


@dataclass(frozen=True, slots=True)
class MemberStatistics:
    """One member as operators see it."""

    name: str
    server: str
    kind: str
    zone: str
    weight: float
    state: str
    """closed, open, half_open, ramp, unavailable or drained."""
    in_use: bool
    """Whether it gets batches: also true of an open one in panic."""
    cause: str
    """Why it is not simply closed, for people; empty otherwise."""
    until: float | None
    """When that changes by itself, monotonic seconds; None: it does not."""
    slots: int
    """Most batches in flight that it is given."""
    in_flight: int
    rows_in_flight: int
    ewma_s: float
    """Seconds that a batch like its latest may be expected to take now, peak-sensitive; 0.0: unknown."""
    level: int
    """How often it tripped lately: its next time open doubles with each."""
    trips: int
    ejections: Mapping[str, int]
    """Trips by cause (`breaker.Cause`); they sum up to `trips`."""
    share: float
    """Its part of the fleet's attempts in the last ten seconds, 0.0 to 1.0."""


@dataclass(frozen=True, slots=True)
class FleetStatistics:
    members: tuple[MemberStatistics, ...]
    """In the order in which they joined."""
    panic: bool
    """More than half tripped: every one that can be reached is used, one batch at a time."""
    usable: int


CAUSES: Final[dict[Cause, str]] = {
    Cause.NONE: "",
    Cause.CONSECUTIVE: "several attempts in a row failed",
    Cause.RATIO: "too many of the latest attempts failed",
    Cause.SILENT: "it did not answer in time, and is asked whether it still does",
    Cause.HUNG: "it did not answer at all",
    Cause.SLOW: "much slower than the others",
    Cause.PROBES: "several health probes in a row failed",
    Cause.TRIAL: "failed again while it was on trial",
    Cause.OVERLOAD: "overloaded while it was on trial",
    Cause.MISMATCH: "answers do not match the model",
    Cause.CONNECT: "no connection could be made",
    Cause.MISSING: "it does not have this model",
    Cause.LOST: "not available",
    Cause.OPERATOR: "held by an operator",
}


STATES: Final[dict[State, str]] = {
    State.DRAINED: "drained by an operator",
    State.PINNED: "held closed by an operator",
    State.RAMP: "just back: work is raised step by step",
}
"""Of states that say why by themselves."""


def cause_of(member: Member, now: float) -> str:
    """Why it is as it is, for people."""
    breaker = member.breaker
    state = breaker.state
    if state in STATES:
        return STATES[state]
    if state is State.OPEN and breaker.cause is Cause.LOST:
        return "it was not available, and may go away again"
    if state is State.CLOSED:
        return "overloaded: it asked to be left alone" if breaker.blocked_until > now else ""
    text = CAUSES[breaker.cause]
    if not member.note or breaker.cause is Cause.SLOW:
        return text
    return member.note if state is State.UNAVAILABLE else f"{text}; the last: {member.note}"


def until_of(member: Member, now: float, ramp_s: float) -> float | None:
    breaker = member.breaker
    if breaker.state is State.OPEN:
        return breaker.until
    if breaker.state is State.RAMP:
        return breaker.since + ramp_s
    return breaker.blocked_until if breaker.blocked_until > now else None


def _state(member: Member) -> str:
    if member.breaker.state is State.PINNED:
        return "closed" if member.replica.available else "unavailable"
    return str(member.breaker.state.value)


def seen(member: Member, in_use: bool, slots: int, now: float, ramp_s: float, total: int) -> MemberStatistics:
    """`total`: attempts of all members in the window."""
    replica, breaker = member.replica, member.breaker
    traits = replica.traits
    return MemberStatistics(
        name=member.name,
        server=traits.server,
        kind=traits.kind,
        zone=traits.zone,
        weight=traits.weight,
        state=_state(member),
        in_use=in_use,
        cause=cause_of(member, now),
        until=until_of(member, now, ramp_s),
        slots=slots if slots < UNLIMITED else replica.free_slots + replica.in_flight,
        in_flight=replica.in_flight,
        rows_in_flight=member.rows_in_flight,
        ewma_s=member.time.load(now) * member.time.predict_s(member.last_rows),
        level=breaker.level_at(now),
        trips=sum(breaker.trips.values()),
        ejections={cause.value: count for cause, count in breaker.trips.items()},
        share=breaker.window.total / total if total else 0.0,
    )
