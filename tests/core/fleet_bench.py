"""Replicas that a test sets by hand, and chance that it decides."""

from __future__ import annotations

from collections.abc import Callable

from gateway.backends.interface import Batch
from gateway.core.breaker import State
from gateway.core.fleet import Fleet, FleetPolicy, Member
from gateway.core.outcome import Failure, FailureKind, Sign, Success
from gateway.core.traits import Traits

OK = Success([], 0, 0, 0)
ERROR = Failure(FailureKind.BROKEN, "500", Sign.ANSWERED)
RESET = Failure(FailureKind.BROKEN, "connection reset")
TIMEOUT = Failure(FailureKind.TIMEOUT, "no answer")
WRONG = Failure(FailureKind.BROKEN, "3 rows instead of 4", Sign.MISMATCH)
REFUSED = Failure(FailureKind.NOT_SENT, "connection refused", Sign.CONNECT)
STALE_CONNECTION = Failure(FailureKind.NOT_SENT, "closed before an answer")
MISSING = Failure(FailureKind.NOT_SENT, "unknown model", Sign.MISSING)
BUSY = Failure(FailureKind.OVERLOAD, "429")
SUSPECT = Failure(FailureKind.SUSPECT, "400", Sign.ANSWERED)
CANCELLED = Failure(FailureKind.CANCELLED, "nobody waits")
BYSTANDER = Failure(FailureKind.BROKEN, "the worker ended", Sign.BYSTANDER)
EXIT = Failure(FailureKind.BROKEN, "the worker ended", Sign.EXIT)


class Middle:
    """Chance that always lies in the middle: no jitter."""

    def random(self) -> float:
        return 0.5


class Place:
    """Fits `Candidate`."""

    def __init__(self, name: str, kind: str = "oip", slots: int = 8, **traits: object) -> None:
        self.name = name
        self.traits = Traits("oip" if kind == "oip" else "onnx", max_slots=slots, **traits)  # type: ignore[arg-type]
        self.available = True
        self.slots = slots
        self.in_flight = 0

    @property
    def free_slots(self) -> int:
        return self.slots - self.in_flight if self.available else 0

    def execute(self, batch: Batch, timeout_s: float, /) -> None:
        raise AssertionError("the fleet only decides")

    def cancel(self, batch: Batch, /) -> None:
        raise AssertionError("the fleet only decides")

    def set_listener(self, changed: Callable[[], None], /) -> None:
        raise AssertionError("the fleet only decides")


class Bench:
    """A fleet, its places, a clock, and batches that go there and come back."""

    def __init__(self, *places: Place, policy: FleetPolicy | None = None, rng: object = None) -> None:
        self.now = 1000.0
        self.places = places
        self.fleet = Fleet(policy or FleetPolicy(), rng or Middle(), 32)  # type: ignore[arg-type]
        self.members = [self.fleet.join(place, self.now) for place in places]
        self.changes: list[tuple[str, str, str]] = []
        self.fleet.watchers.append(
            lambda member, before: self.changes.append((member.name, before.value, member.breaker.state.value))
        )

    def begin(self, member: Member, rows: int = 1) -> float:
        self.fleet.began(member, rows, self.now)
        _place(member).in_flight += 1
        return self.now

    def end(self, member: Member, began: float, outcome: Success | Failure, rows: int = 1) -> None:
        _place(member).in_flight -= 1
        took_s = self.now - began
        if isinstance(outcome, Success):
            self.fleet.succeeded(member, rows, took_s, 0.0, self.now)
        else:
            self.fleet.failed(member, rows, outcome, took_s, self.now)

    def run(self, member: Member, *outcomes: Success | Failure, took_s: float = 0.01, rows: int = 1) -> None:
        """One after the other."""
        for outcome in outcomes:
            began = self.begin(member, rows)
            self.now += took_s
            self.end(member, began, outcome, rows)

    def probe(self, member: Member, *outcomes: Success | Failure | None, took_s: float = 0.01) -> None:
        for outcome in outcomes:
            self.now += took_s
            self.fleet.probed(member, outcome, took_s, self.now)

    def wait(self, seconds: float) -> None:
        """As the dispatcher does it: looks again at every instant that the fleet names."""
        end = self.now + seconds
        while (wake := self.fleet.next_wake(self.now)) is not None and wake <= end:
            assert wake > self.now
            self.now = wake
        self.now = end
        self.fleet.next_wake(end)

    def recover(self, member: Member) -> None:
        """Out of OPEN and through its probes, into RAMP."""
        self.wait(member.breaker.until - self.now)
        assert member.breaker.state is State.HALF_OPEN
        for _ in range(3):
            assert self.fleet.choose(self.now, 1) is member
            self.run(member, OK)

    def states(self) -> list[str]:
        return [member.breaker.state.value for member in self.members]


def _place(member: Member) -> Place:
    assert isinstance(member.replica, Place)
    return member.replica


def bench(count: int, **options: object) -> Bench:
    return Bench(*[Place(f"r{index}", **options) for index in range(count)])  # type: ignore[arg-type]
