"""The breaker's vocabulary: its states and the table between them, why it opens, what a failure weighs, its numbers.

`TRANSITIONS` is the whole life of a breaker (resilience notes §1.6); core/breaker.py says when which event happens.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from gateway.core.outcome import Failure, FailureKind, Sign


class State(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    RAMP = "ramp"
    UNAVAILABLE = "unavailable"
    """Process dead, server not reachable, or not verified yet: the replica says so itself."""
    DRAINED = "drained"
    """Held open by an operator."""
    PINNED = "pinned"
    """Held closed by an operator."""


WORDS: Final[dict[State, str]] = {
    State.CLOSED: "in use",
    State.OPEN: "ejected",
    State.HALF_OPEN: "on trial",
    State.RAMP: "ramping up",
    State.UNAVAILABLE: "unavailable",
    State.DRAINED: "drained",
    State.PINNED: "pinned",
}
"""For people."""


class Event(enum.Enum):
    TRIP = "trip"
    TIME = "time"
    """The time of OPEN or RAMP is over."""
    PROBE_FAILED = "probe_failed"
    PROVED = "proved"
    """Enough probes in a row succeeded."""
    PROVED_IN_USE = "proved_in_use"
    """Enough attempts in a row succeeded while it was used although it is open."""
    ANSWERED = "answered"
    """It was silent, and is not any more."""
    LOST = "lost"
    BACK_WARM = "back_warm"
    """Available again, and warmed up."""
    BACK_COLD = "back_cold"
    BACK_EARLY = "back_early"
    """Available again before its penalty for having gone is over: it may be flapping."""
    DRAIN = "drain"
    PIN = "pin"
    RELEASE_GONE = "release_gone"
    """The operator's order is lifted, and the replica is not available."""
    RELEASE_WARM = "release_warm"
    RELEASE_COLD = "release_cold"


TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    (State.CLOSED, Event.TRIP): State.OPEN,
    (State.CLOSED, Event.LOST): State.UNAVAILABLE,
    (State.CLOSED, Event.DRAIN): State.DRAINED,
    (State.CLOSED, Event.PIN): State.PINNED,
    (State.OPEN, Event.TIME): State.HALF_OPEN,
    (State.OPEN, Event.PROVED_IN_USE): State.CLOSED,
    (State.OPEN, Event.ANSWERED): State.CLOSED,
    (State.OPEN, Event.LOST): State.UNAVAILABLE,
    (State.OPEN, Event.DRAIN): State.DRAINED,
    (State.OPEN, Event.PIN): State.PINNED,
    (State.HALF_OPEN, Event.PROBE_FAILED): State.OPEN,
    (State.HALF_OPEN, Event.PROVED): State.RAMP,
    (State.HALF_OPEN, Event.PROVED_IN_USE): State.CLOSED,
    (State.HALF_OPEN, Event.ANSWERED): State.CLOSED,
    (State.HALF_OPEN, Event.LOST): State.UNAVAILABLE,
    (State.HALF_OPEN, Event.DRAIN): State.DRAINED,
    (State.HALF_OPEN, Event.PIN): State.PINNED,
    (State.RAMP, Event.TIME): State.CLOSED,
    (State.RAMP, Event.PROVED): State.CLOSED,
    (State.RAMP, Event.TRIP): State.OPEN,
    (State.RAMP, Event.LOST): State.UNAVAILABLE,
    (State.RAMP, Event.DRAIN): State.DRAINED,
    (State.RAMP, Event.PIN): State.PINNED,
    (State.UNAVAILABLE, Event.BACK_WARM): State.CLOSED,
    (State.UNAVAILABLE, Event.BACK_COLD): State.RAMP,
    (State.UNAVAILABLE, Event.BACK_EARLY): State.OPEN,
    (State.UNAVAILABLE, Event.DRAIN): State.DRAINED,
    (State.UNAVAILABLE, Event.PIN): State.PINNED,
    (State.DRAINED, Event.PIN): State.PINNED,
    (State.DRAINED, Event.RELEASE_GONE): State.UNAVAILABLE,
    (State.DRAINED, Event.RELEASE_WARM): State.CLOSED,
    (State.DRAINED, Event.RELEASE_COLD): State.RAMP,
    (State.PINNED, Event.DRAIN): State.DRAINED,
    (State.PINNED, Event.RELEASE_GONE): State.UNAVAILABLE,
    (State.PINNED, Event.RELEASE_WARM): State.CLOSED,
    (State.PINNED, Event.RELEASE_COLD): State.CLOSED,
}
"""What is missing is a mistake: it raises KeyError and changes nothing."""


class Cause(enum.Enum):
    """Why a breaker opened. The value is a metric label."""

    NONE = "none"
    CONSECUTIVE = "consecutive"
    RATIO = "ratio"
    SLOW = "slow"
    PROBES = "probes"
    TRIAL = "trial"
    """A probe failed while HALF_OPEN, or a batch while RAMP."""
    OVERLOAD = "overload"
    """It was overloaded by a probe."""
    SILENT = "silent"
    """One attempt took all its time, and nothing else came from there meanwhile: it is asked before it gets more."""
    HUNG = "hung"
    """One attempt took all its time, which was not short, and nothing else came from there meanwhile."""
    MISMATCH = "mismatch"
    CONNECT = "connect"
    MISSING = "missing"
    LOST = "lost"
    OPERATOR = "operator"


SOFT: Final = frozenset(
    {
        Cause.SILENT, Cause.HUNG, Cause.CONSECUTIVE, Cause.RATIO, Cause.SLOW, Cause.PROBES, Cause.TRIAL, Cause.OVERLOAD,
        Cause.LOST,
    }
)  # fmt: skip
"""Signs of trouble, not proof that it cannot work: subject to the fleet's guard. (LOST is that for a replica which is
available again; while it is not, there is nothing to decide.)"""


class Weight(enum.Enum):
    """What a failed attempt means to the breaker."""

    NEUTRAL = "neutral"
    HARD = "hard"
    MISMATCH = "mismatch"
    """Hard, and twice is enough."""
    OVERLOAD = "overload"
    CONNECT = "connect"
    MISSING = "missing"


_BY_SIGN: Final = {Sign.CONNECT: Weight.CONNECT, Sign.MISSING: Weight.MISSING, Sign.BYSTANDER: Weight.NEUTRAL}
_BY_KIND: Final = {
    FailureKind.NOT_SENT: Weight.NEUTRAL,
    FailureKind.OVERLOAD: Weight.OVERLOAD,
    FailureKind.BROKEN: Weight.HARD,
    FailureKind.TIMEOUT: Weight.HARD,
    FailureKind.SUSPECT: Weight.NEUTRAL,
    FailureKind.CANCELLED: Weight.NEUTRAL,
}


def weigh(failure: Failure) -> Weight:
    """Resilience notes §1.1, column "breaker"."""
    if failure.kind is FailureKind.BROKEN and failure.sign is Sign.MISMATCH:
        return Weight.MISMATCH
    return _BY_SIGN.get(failure.sign) or _BY_KIND[failure.kind]


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """The numbers of resilience notes §1.6; durations in seconds."""

    consecutive: int = 5
    """Hard failures in a row that trip."""
    attempts: int = 20
    """Attempts within the window below which no share of them trips."""
    failed_share: float = 0.5
    slow_share: float = 0.8
    slow_factor: float = 3.0
    """Slow: more than this many times the median of its peers."""
    hung_s: float = 0.75
    """Where nobody can ask it, an attempt that timed out in silence is enough if it took at least so long: a pause of
    the machine is shorter."""
    ask_s: float = 0.02
    """How long after an attempt that timed out in silence it is asked, where that is possible."""
    connects: int = 2
    """Connections in a row that could not be made."""
    health_probes: int = 3
    """Failed health probes in a row."""
    mismatches: int = 2
    mismatch_window_s: float = 60.0
    mismatch_open_s: float = 60.0
    """Shortest time open after wrong answers."""
    open_s: float = 1.0
    longest_open_s: float = 60.0
    jitter: float = 0.2
    longest_retry_after_s: float = 300.0
    pause_s: float = 0.1
    """How long an overloaded replica that did not say is left alone, doubled every time in a row up to ..."""
    longest_pause_s: float = 2.0
    proofs: int = 3
    """Successes in a row that end HALF_OPEN."""
    permit_s: float = 60.0
    """After this a probe without outcome is given up."""
    probe_again_s: float = 0.25
    """Shortest time between a permit that came back unused and the next probe."""
    ramp_s: float = 10.0
    """Of a ramp on which nothing is learned."""
    quick_ramp_s: float = 1.0
    """Shortest ramp, of a replica whose every batch took no longer than it should."""
    ramp_proofs: int = 12
    """Batches in a row that took no longer than they should and end a ramp early."""
    settled_s: float = 10.0
    """A replica that goes away after it served for so long is none that comes and goes."""
    decay_s: float = 60.0


BREAKER: Final = BreakerPolicy()
