"""A fleet under whatever may happen to it, in any order: what always holds is checked after every step."""

from __future__ import annotations

import random
from typing import Literal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.core.breaker import MAX_LEVEL, State
from gateway.core.fleet import Fleet, FleetPolicy, Member
from gateway.core.outcome import Failure, FailureKind, Success
from tests.core import fleet_bench as fb
from tests.core.fleet_bench import Place

OUTCOMES = [
    fb.OK, fb.OK, fb.OK, fb.ERROR, fb.ERROR, fb.ERROR, fb.RESET, fb.TIMEOUT, fb.WRONG, fb.REFUSED, fb.STALE_CONNECTION,
    fb.MISSING, fb.BUSY, Failure(FailureKind.OVERLOAD, "503", retry_after_s=7.0), fb.SUSPECT, fb.CANCELLED,
    fb.BYSTANDER, fb.EXIT,
]  # fmt: skip
PICK = st.integers(0, 1_000_000)


class FleetMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.running: list[tuple[Member, int, float, bool]] = []
        """Member, rows, since when, and whether it was half-open: a trial."""
        self.probes: list[tuple[Member, float]] = []
        self.joined = 0

    @initialize(
        kinds=st.lists(st.sampled_from(["oip", "oip", "onnx"]), min_size=1, max_size=5),
        balancing=st.sampled_from(["pull", "p2c_ewma", "least_rows", "round_robin", "hash"]),
        sampled=st.booleans(),
        seed=PICK,
    )
    def start(
        self,
        kinds: list[str],
        balancing: Literal["pull", "p2c_ewma", "least_rows", "round_robin", "hash"],
        sampled: bool,
        seed: int,
    ) -> None:
        self.fleet = Fleet(FleetPolicy(balancing), random.Random(seed), 32)
        self.fleet.sampled = sampled
        for kind in kinds:
            self._join(kind)

    def _join(self, kind: str) -> None:
        self.joined += 1
        self.fleet.join(Place(f"r{self.joined}", kind, zone=f"z{self.joined % 2}"), self.now)

    def _member(self, pick: int) -> Member:
        return self.fleet.members[pick % len(self.fleet.members)]

    # -- what happens ------------------------------------------------------------------------------------------------

    @rule(rows=st.integers(1, 32), avoid=st.none() | PICK, affinity=st.none() | PICK)
    def send(self, rows: int, avoid: int | None, affinity: int | None) -> None:
        tried = () if avoid is None else (self._member(avoid),)
        member = self.fleet.choose(self.now, rows, tried, affinity)
        if member is None:
            self._nobody_was_free(tried, affinity)
            return
        place = member.replica
        assert isinstance(place, Place)
        state = member.breaker.state
        assert member not in tried
        assert place.available
        assert place.free_slots > 0
        assert member.breaker.blocked_until <= self.now
        assert state not in (State.UNAVAILABLE, State.DRAINED)
        if not self.fleet.panic:
            assert state is not State.OPEN
            assert state is not State.HALF_OPEN or not self.fleet.sampled
        else:
            assert place.in_flight == 0
        if state is State.RAMP:
            assert place.in_flight == 0
        assert 1 <= self.fleet.row_limit(member, self.now) <= 32
        assert self.fleet.attempt_timeout_s(member, rows, self.now, self.now + 30) > 0
        self.fleet.began(member, rows, self.now)
        place.in_flight += 1
        self.running.append((member, rows, self.now, state is State.HALF_OPEN))

    def _nobody_was_free(self, tried: tuple[Member, ...], affinity: int | None) -> None:
        if affinity is not None:
            return
        for member in self.fleet.members:
            idle = member.replica.in_flight == 0 and member.replica.free_slots > 0
            assert member in tried or not idle or not self.fleet.usable(member, self.now), "work-conserving"

    @precondition(lambda self: self.running)
    @rule(pick=PICK, outcome=st.sampled_from(OUTCOMES))
    def finish(self, pick: int, outcome: Success | Failure) -> None:
        member, rows, since, _ = self.running.pop(pick % len(self.running))
        assert isinstance(member.replica, Place)
        member.replica.in_flight -= 1
        if isinstance(outcome, Success):
            self.fleet.succeeded(member, rows, self.now - since, 0.0, self.now)
        else:
            self.fleet.failed(member, rows, outcome, self.now - since, self.now)

    @precondition(lambda self: self.running)
    @rule(outcome=st.sampled_from([fb.OK, fb.ERROR, fb.BUSY, fb.CANCELLED]))
    def finish_all(self, outcome: Success | Failure) -> None:
        while self.running:
            self.finish(0, outcome)

    @rule(pick=PICK, outcome=st.sampled_from([fb.ERROR, fb.REFUSED, fb.BUSY, fb.WRONG, fb.OK]))
    def same_again(self, pick: int, outcome: Success | Failure) -> None:
        """Five short batches at one member, as far as it gets any."""
        target = self._member(pick)
        others = tuple(member for member in self.fleet.members if member is not target)
        for _ in range(5):
            if self.fleet.choose(self.now, 1, others) is target:
                assert isinstance(target.replica, Place)
                self.fleet.began(target, 1, self.now)
                if isinstance(outcome, Success):
                    self.fleet.succeeded(target, 1, 0.0, 0.0, self.now)
                else:
                    self.fleet.failed(target, 1, outcome, 0.0, self.now)

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.3, 1.0, 1.3, 5.0, 10.0, 61.0, 700.0]))
    def wait(self, seconds: float) -> None:
        end, looked = self.now + seconds, 0
        while (wake := self.fleet.next_wake(self.now)) is not None and wake <= end:
            assert wake > self.now
            self.now = wake
            looked += 1
            assert looked < 100, "it wakes somebody for ever"
        self.now = end

    @rule(seconds=st.sampled_from([0.01, 1.0, 2.5, 10.0, 11.0, 61.0]))
    def oversleep(self, seconds: float) -> None:
        """Nobody looks in between."""
        self.now += seconds

    @rule(pick=PICK)
    def blame(self, pick: int) -> None:
        self.fleet.blamed(self._member(pick), self.now)

    @rule(pick=PICK)
    def flip(self, pick: int) -> None:
        member = self._member(pick)
        assert isinstance(member.replica, Place)
        member.replica.available = not member.replica.available
        self.fleet.availability_changed(member, self.now)

    @rule(pick=PICK, to=st.sampled_from(["open", "closed", None]))
    def order(self, pick: int, to: Literal["open", "closed"] | None) -> None:
        self.fleet.force(self._member(pick), to, self.now)

    @precondition(lambda self: len(self.fleet.members) < 6)
    @rule(kind=st.sampled_from(["oip", "onnx"]))
    def join(self, kind: str) -> None:
        self._join(kind)

    @precondition(lambda self: len(self.fleet.members) > 1)
    @rule(pick=PICK)
    def leave(self, pick: int) -> None:
        self.fleet.leave(self._member(pick))

    @rule()
    def begin_probes(self) -> None:
        for member in self.fleet.probes_due(self.now):
            since = max(member.breaker.since, self.now - 59.9)
            assert not any(other is member and began >= since for other, began in self.probes), "two probes at once"
            self.probes.append((member, self.now))

    @precondition(lambda self: self.probes)
    @rule(pick=PICK, outcome=st.none() | st.sampled_from(OUTCOMES))
    def end_probe(self, pick: int, outcome: Success | Failure | None) -> None:
        member, since = self.probes.pop(pick % len(self.probes))
        if self.now - since < 60:
            self.fleet.probed(member, outcome, self.now - since, self.now)

    @rule(pick=PICK, outcome=st.sampled_from([fb.OK, fb.ERROR, fb.REFUSED]))
    def health_probe(self, pick: int, outcome: Success | Failure) -> None:
        member = self._member(pick)
        if member.breaker.state in (State.CLOSED, State.RAMP):
            self.fleet.probed(member, outcome, 0.0, self.now)

    # -- what always holds -------------------------------------------------------------------------------------------

    @invariant()
    def one_trial_at_a_time(self) -> None:
        """Of those that are still believed in: after a minute a permit is given up."""
        for member in self.fleet.members:
            since = max(member.breaker.since, self.now - 60)
            trials = [1 for other, _, began, trial in self.running if other is member and trial and began >= since]
            assert len(trials) <= 1

    @invariant()
    def the_guard_holds(self) -> None:
        reachable = [
            member
            for member in self.fleet.members
            if member.replica.available
            and (member.breaker.soft_open or member.breaker.state in (State.CLOSED, State.RAMP, State.PINNED))
        ]
        ejected = [member for member in reachable if member.breaker.soft_open and not self.fleet.panic]
        assert len(ejected) <= len(reachable) // 2
        paused = [member for member in reachable if member.breaker.blocked_until > self.now]
        usable = [member for member in reachable if self.fleet.usable(member, self.now)]
        assert not reachable or usable or paused, "somebody who can be reached is used"

    @invariant()
    def nothing_is_out_of_bounds(self) -> None:
        for member in self.fleet.members:
            assert 0 <= member.breaker.level <= MAX_LEVEL
            assert member.breaker.blocked_until - self.now <= 300
            assert member.breaker.state is not State.OPEN or member.breaker.until - self.now <= 300
            mine = [rows for other, rows, _, _ in self.running if other is member]
            assert (member.batches, member.rows_in_flight) == (len(mine), sum(mine))

    @invariant()
    def permits_do_not_leak(self) -> None:
        """Whoever is half-open can be tried, is being tried, or will be at an instant that is named."""
        wake = self.fleet.next_wake(self.now)
        assert wake is None or wake > self.now
        for member in self.fleet.members:
            breaker = member.breaker
            assert breaker.state not in (State.OPEN, State.RAMP) or wake is not None
            if breaker.state is State.HALF_OPEN and not breaker.may_probe(self.now):
                assert wake is not None

    @invariant()
    def it_can_be_seen(self) -> None:
        seen = self.fleet.statistics(self.now)
        assert len(seen.members) == len(self.fleet.members)
        assert abs(sum(member.share for member in seen.members) - 1.0) < 1e-9 or not any(m.share for m in seen.members)
        assert all((member.until or self.now + 1) > self.now for member in seen.members)


TestFleetMachine = FleetMachine.TestCase
TestFleetMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
