"""All replicas of one model version: which of them may take a batch, and what every outcome means for them.

Pure: the dispatcher asks `choose`, reports `began` and then exactly one of `succeeded` and `failed` per attempt, and
looks again at `next_wake`. Who is chosen among several is the business of core/balancing.py, when one is ejected that
of core/breaker.py; this file holds what concerns all of them together:

  * **guard**: soft trips (failures, slowness, failed probes) never take more than half of the replicas away, rounded
    down, and so never the last one. What cannot be reached, lacks the model, gives wrong answers or is drained is not
    counted among them;
  * **panic**: where more than half tripped, nothing is known except that there is trouble: every replica is used that
    can be reached, one batch at a time (Envoy's panic threshold). It is the same condition as the guard's, seen from
    the other side, so outside panic an open replica never gets a batch;
  * **canary**: while HALF_OPEN one batch at a time is tried, if nobody probes with a sample (`sampled`); retried rows
    are not used for that while anyone else could take them;
  * **failure domains**: what failed in one zone goes to another, and on another host, while one there is free.

Work-conserving: if a usable replica outside `avoid` has a free slot, `choose` names one; except for what carries an
affinity, which belongs to one replica and waits for it.

Invariants: at most one probe per member at once; while `panic` is false at most half of the reachable replicas is
ejected by soft trips; what is unavailable, drained or told to be left alone is never chosen; `next_wake` is in the
future.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import inf
from typing import Final, Literal

from gateway.core.balancing import STRATEGIES, Pick, rendezvous, take_turn, two_of
from gateway.core.batch_time import normalised
from gateway.core.breaker import BREAKER, Breaker, BreakerPolicy, Cause, Rng, State, Weight, weigh
from gateway.core.member import (
    NOTE_LENGTH,
    UNLIMITED,
    Candidate,
    FleetStatistics,
    Member,
    MemberStatistics,
    seen,
)
from gateway.core.outcome import Failure, FailureKind, Sign, Success
from gateway.core.resilience import Balancing

__all__ = ["Candidate", "Fleet", "FleetPolicy", "FleetStatistics", "Member", "MemberStatistics", "State"]

FULL_SCAN: Final = 8
"""Up to so many replicas are all compared; of more, two drawn at random (power of two choices)."""
TRIAL_ROWS: Final = 4
"""Most rows of a client batch that tries a half-open replica."""
RAMP_START: Final = 0.1
"""Share of the largest batch with which a ramp begins; it grows linearly (Envoy's slow start), or faster where batches
come back in time."""
LONGEST_ATTEMPT_S: Final = 120.0
"""Where nothing is known of times and no deadline says otherwise; no caller may ask for more."""
SHORTEST_ATTEMPT_S: Final = 0.05
ALONE_S: Final = 5.0
"""A replica that has no peer to give the work to is waited for, a quarter of its callers' time and at most so long: a
pause there is no reason to use up their attempts."""
SILENT_SHARE: Final = 1.0 / 3.0
"""Of an attempt's time, at its end. An attempt has half as much again as batches take (`batch_time.TIMEOUT_FACTOR`), so
what was sent before it is answered by then. With many under way each would be one failure in a row otherwise."""
PEERS: Final = 9
"""Slowness is judged against at most so many peers."""


@dataclass(frozen=True, slots=True)
class FleetPolicy:
    balancing: Balancing = "pull"
    attempt_timeout_s: float | None = None
    """Seconds that one attempt may take; None: learned."""
    breaker: BreakerPolicy = BREAKER


class Fleet:
    """See the module's docstring. `now`: monotonic seconds."""

    def __init__(self, policy: FleetPolicy, rng: Rng, max_rows: int, row_s: float = 0.0) -> None:
        """`max_rows`: of the largest batch. `row_s`: seconds a row took on trial, 0.0: nobody knows."""
        self.members: list[Member] = []
        self.panic = False
        self.sampled = False
        """Whether somebody probes half-open members with a sample (`probes_due`); otherwise clients' batches do it."""
        self.watchers: list[Callable[[Member, State], None]] = []
        """Told the member and its former state at every change of state; must not call back."""
        self._policy = policy
        self._pick: Pick = STRATEGIES[policy.balancing]
        self._scans = policy.balancing in ("least_rows", "round_robin")
        self._turns = policy.balancing == "round_robin"
        self._in_turn: list[Member] = []
        """Among whom the latest was chosen, where they take turns."""
        self._rng = rng
        self._max_rows = max_rows
        self._row_s = row_s
        self._running = False
        self._only: Member | None = None
        self._calm = True
        """Every member is simply closed."""
        self._wake = inf
        self._reviewed = 0.0

    # -- who belongs to it ---------------------------------------------------------------------------------------

    def join(self, replica: Candidate, now: float) -> Member:
        """A new member: CLOSED, but RAMP for a remote one that joins others at work."""
        state = State.RAMP if self._running and replica.traits.kind == "oip" else State.CLOSED
        if not replica.available:
            state = State.UNAVAILABLE
        member = Member(replica, Breaker(self._policy.breaker, self._rng, now, state), self._row_s)
        self.members = [*self.members, member]
        self._review(now)
        return member

    def leave(self, member: Member) -> None:
        """No more batches; outcomes of those under way may still be reported."""
        self.members = [other for other in self.members if other is not member]
        self._review(self._reviewed)

    def of(self, replica: Candidate) -> Member:
        """KeyError: it is no member."""
        for member in self.members:
            if member.replica is replica:
                return member
        raise KeyError(replica.name)

    # -- choosing ------------------------------------------------------------------------------------------------

    def choose(
        self, now: float, rows: int, avoid: Collection[Member] = (), affinity: int | None = None
    ) -> Member | None:
        """Who takes a batch of about `rows` rows; None: nobody can now.

        `avoid`: members it was tried on, never chosen. `affinity`: of a sequence or the like, see `rendezvous`.
        """
        if now >= self._wake:
            self._advance(now)
        only = self._only
        if only is not None and not avoid:
            replica = only.replica
            free = replica.free_slots > 0 and (not only.adaptive or replica.in_flight < only.slots.limit)
            return only if free else None
        if affinity is not None:
            return self._belongs(now, avoid, affinity)
        if not self._scans and self._calm and not avoid and len(self.members) > FULL_SCAN:
            drawn = [member for member in two_of(self.members, self._rng) if self._free(member)]
            if drawn:
                return self._best(drawn, rows, now)
        ready = self._ready(now, avoid)
        if len(ready) == 1:
            return ready[0]
        return self._best(ready, rows, now) if ready else None

    def _best(self, ready: list[Member], rows: int, now: float) -> Member:
        if self._turns:
            self._in_turn = ready
        best: Member = ready[0] if len(ready) == 1 else self._pick(ready, rows, now, self._rng)
        return best

    def _free(self, member: Member) -> bool:
        replica = member.replica
        return replica.free_slots > 0 and (not member.adaptive or replica.in_flight < member.slots.limit)

    def _ready(self, now: float, avoid: Collection[Member]) -> list[Member]:
        """Those with a free slot, as far as they differ only in how good they are."""
        if self._calm:
            ready = []
            for member in self.members:
                replica = member.replica
                if replica.free_slots > 0 and (not member.adaptive or replica.in_flight < member.slots.limit):
                    ready.append(member)
        else:
            trials = [m for m in self.members if m not in avoid and self._may_try(m, now)]
            if trials and (not avoid or not self.others(now, avoid)):
                return trials[:1]
            ready = [m for m in self.members if self.usable(m, now) and self._has_slot(m)]
        return _elsewhere([member for member in ready if member not in avoid], avoid) if avoid else ready

    def _belongs(self, now: float, avoid: Collection[Member], affinity: int) -> Member | None:
        members = [m for m in self.members if m not in avoid and (self.usable(m, now) or self._may_try(m, now))]
        member = rendezvous(members, affinity)
        return member if member is not None and self._has_slot(member) else None

    def _has_slot(self, member: Member) -> bool:
        replica = member.replica
        return replica.free_slots > 0 and replica.in_flight < self._slots(member)

    def _slots(self, member: Member) -> int:
        if self.panic or member.breaker.state is State.RAMP:
            return 1
        return member.slots.limit if member.adaptive else UNLIMITED

    def _may_try(self, member: Member, now: float) -> bool:
        return (
            not self.sampled and member.breaker.may_probe(now) and member.replica.available and self._has_slot(member)
        )

    def usable(self, member: Member, now: float) -> bool:
        """Whether it takes batches, now or as soon as it has a free slot."""
        if now >= self._wake:
            self._advance(now)
        breaker = member.breaker
        if breaker.blocked_until > now or not member.replica.available:
            return False
        state = breaker.state
        return (
            state is State.CLOSED or state is State.PINNED or state is State.RAMP or (self.panic and breaker.soft_open)
        )

    def others(self, now: float, avoid: Collection[Member]) -> bool:
        """Whether any member outside `avoid` is usable, busy or not: then rows that failed wait for it."""
        return any(member not in avoid and self.usable(member, now) for member in self.members)

    def row_limit(self, member: Member, now: float) -> int:
        """Most rows of the next batch there. A ramp holds only while somebody else can do the rest of the work."""
        state = member.breaker.state
        if state is State.CLOSED or self.panic:
            return self._max_rows
        if state is State.HALF_OPEN:
            return min(TRIAL_ROWS, self._max_rows)
        if state is State.RAMP and any(m.breaker.state is State.CLOSED and m.replica.available for m in self.members):
            return max(1, int(member.breaker.ramp_share(now, RAMP_START) * self._max_rows))
        return self._max_rows

    def attempt_timeout_s(self, member: Member, rows: int, now: float, latest_deadline: float) -> float:
        """Seconds until the attempt is given up. `latest_deadline`: of anyone in the batch; infinite: nobody said."""
        left_s = min(latest_deadline - now, LONGEST_ATTEMPT_S)
        timeout_s = self._policy.attempt_timeout_s
        if timeout_s is None:
            if not member.adaptive:
                return member.time.worker_timeout_s(rows, left_s)
            timeout_s = member.time.attempt_timeout_s(rows)
            if timeout_s is not None and not self._has_peer(member, now):
                timeout_s = max(timeout_s, min(ALONE_S, left_s / 4.0))
        elif not member.adaptive:
            return timeout_s  # giving up costs the process: a deadline is no reason for that
        return max(min(left_s, left_s if timeout_s is None else timeout_s), SHORTEST_ATTEMPT_S)

    def _has_peer(self, member: Member, now: float) -> bool:
        """Whether somebody else could have the work of `member`. Not who is just being asked: if all stand still at
        once it is no use to send rows from one to the other until their attempts are used up."""
        return any(
            other is not member and self.usable(other, now) and other.breaker.cause is not Cause.SILENT
            for other in self.members
        )

    def patience_s(self, member: Member, rows: int) -> float:
        """Seconds that an attempt there may take whatever its callers' deadlines: before that nothing is amiss."""
        timeout_s = self._policy.attempt_timeout_s or member.time.attempt_timeout_s(rows)
        if timeout_s is None:
            return self._policy.breaker.hung_s
        return max(timeout_s, SHORTEST_ATTEMPT_S)

    def soonest_s(self, rows: int, now: float) -> float:
        """Seconds that a batch needs where it takes the shortest; 0.0: of somebody usable nobody knows."""
        return min([member.time.predict_s(rows) for member in self.members if self.usable(member, now)], default=0.0)

    def in_time(self, member: Member, rows: int, now: float, deadline: float) -> Member:
        """`member`, or another one with a free slot that can answer by `deadline` where it cannot. Nobody is waited
        for: predictions go stale."""
        if now + member.time.predict_s(rows) <= deadline:
            return member
        ready = self._ready(now, ())
        able = [other for other in ready if other.time.known and now + other.time.predict_s(rows) <= deadline]
        return self._best(able, rows, now) if able else member

    # -- outcomes ------------------------------------------------------------------------------------------------

    def began(self, member: Member, rows: int, now: float) -> None:
        """A batch of clients was handed over."""
        self._running = True
        member.batches += 1
        member.rows_in_flight += rows
        member.last_rows = rows
        if self._turns:
            if member in self._in_turn:
                take_turn(self._in_turn, member)
            self._in_turn = []
        if member.breaker.state is State.HALF_OPEN and not self.sampled:
            member.breaker.take_permit(now)
            self._review(now)

    def succeeded(self, member: Member, rows: int, took_s: float, compute_s: float, now: float) -> None:
        """`compute_s`: seconds that the backend says it computed; 0.0: it does not say."""
        together = member.batches
        member.batches = together - 1
        member.rows_in_flight -= rows
        member.last_success = now
        if member.adaptive:
            member.slots.observe(now, together, took_s, member.time.predict_s(rows), compute_s)
        slow = self._is_slow(member, rows, took_s / max(together, 1)) if len(self.members) > 2 else None
        breaker = member.breaker
        late = breaker.state is State.RAMP and self._is_late(member, rows, took_s, slow)
        member.time.observe(rows, took_s, now, max(together, 1))
        if breaker.state is State.CLOSED and not slow:
            breaker.succeeded(now - took_s, now, True, slow)
            return
        before = breaker.state
        if not self.sampled:
            breaker.return_permit(now, now - took_s)
        breaker.succeeded(now - took_s, now, self.panic, slow, late)
        self._changed(member, before, now)

    def _is_late(self, member: Member, rows: int, took_s: float, slow: bool | None) -> bool:
        """Whether a batch on the ramp took longer than it should: by its peers' times, else by its own of before."""
        if slow is not None:
            return slow
        return member.time.known and took_s > self._policy.breaker.slow_factor * member.time.predict_s(rows)

    def _is_slow(self, member: Member, rows: int, took_s: float) -> bool | None:
        """Among its own kind: a worker next door is no yardstick for a server across the network."""
        peers = [other.time for other in self.members if other is not member and other.kind == member.kind]
        ratio = normalised(rows, took_s, peers[:PEERS])
        return None if ratio is None else ratio > self._policy.breaker.slow_factor

    def failed(self, member: Member, rows: int, failure: Failure, took_s: float, now: float) -> None:
        """Any outcome but success; how much it counts is up to `breaker.weigh`."""
        member.batches -= 1
        member.rows_in_flight -= rows
        weight = weigh(failure)
        timed_out = failure.kind is FailureKind.TIMEOUT
        if timed_out:
            member.time.timed_out(rows, now)
        elif weight is not Weight.NEUTRAL:
            member.time.failed(now)
        if timed_out or weight is Weight.OVERLOAD:
            member.slots.overloaded(now)
        if weight is not Weight.NEUTRAL:
            member.note = failure.in_full[:NOTE_LENGTH]
        breaker = member.breaker
        before = breaker.state
        if not self.sampled:
            breaker.return_permit(now, now - took_s)
            if weight is Weight.NEUTRAL and before is State.HALF_OPEN and failure.kind is not FailureKind.SUSPECT:
                breaker.rest(now)
        if weight in (Weight.OVERLOAD, Weight.MISMATCH) or (failure.sign is Sign.ANSWERED and not timed_out):
            breaker.answered(now)
        slow = timed_out and len(self.members) > 2
        silence = self._silence(member, took_s, now) if timed_out else Cause.NONE
        breaker.failed(weight, now - took_s, now, failure.retry_after_s, slow, silence)
        self._changed(member, before, now)

    def _silence(self, member: Member, took_s: float, now: float) -> Cause:
        """What it means that an attempt there timed out after `took_s` seconds.

        Who is asked need not have been silent for all of them: what was sent before was answered in the beginning.
        """
        silent_s = now - member.last_success
        if self.sampled and member.adaptive:
            return Cause.SILENT if silent_s >= took_s * SILENT_SHARE else Cause.NONE
        return Cause.HUNG if silent_s >= took_s >= self._policy.breaker.hung_s else Cause.NONE

    def blamed(self, member: Member, now: float) -> None:
        """Rows that it refused (SUSPECT) succeeded elsewhere: that was a failure of its own after all.

        Only for SUSPECT: every other failure was charged when it was reported.
        """
        member.time.failed(now)
        member.note = "it refused input that another replica took"
        before = member.breaker.state
        member.breaker.failed(Weight.HARD, -inf, now)
        self._changed(member, before, now)

    # -- what happens besides ------------------------------------------------------------------------------------

    def availability_changed(self, member: Member, now: float) -> None:
        """`replica.available` flipped, or may have."""
        breaker = member.breaker
        before = breaker.state
        if not member.replica.available:
            breaker.lost(now, member.adaptive and self._running)
        else:
            breaker.back(now, member.adaptive and self._running)
        self._changed(member, before, now)

    def probes_due(self, now: float) -> list[Member]:
        """Half-open members to probe now; their permits are taken, and end with `probed`. Empty unless `sampled`."""
        if now >= self._wake:
            self._advance(now)
        if self._calm or not self.sampled:
            return []
        due = [m for m in self.members if m.replica.available and m.breaker.may_probe(now)]
        for member in due:
            member.breaker.take_permit(now)
        if due:
            self._review(now)
        return due

    def probed(
        self, member: Member, outcome: Success | Failure | None, took_s: float, now: float, rows: int = 1
    ) -> None:
        """Outcome of a probe of so many rows, for health or from `probes_due`, that began `took_s` ago. None: it was
        not made."""
        breaker = member.breaker
        before, started = breaker.state, now - took_s
        breaker.return_permit(now, started)
        if isinstance(outcome, Success):
            member.last_success = now
            if breaker.cause is Cause.SILENT:
                if self._is_slow(member, rows, took_s / (member.batches + 1)):
                    breaker.answered_slowly(started, now)
                else:
                    breaker.answered(now)
            elif before in (State.OPEN, State.HALF_OPEN):
                breaker.succeeded(started, now, self.panic)
            breaker.health_probe_succeeded()
        elif outcome is not None:
            self._probe_failed(member, outcome, started, now)
        else:
            breaker.rest(now)
        self._changed(member, before, now)

    def _probe_failed(self, member: Member, failure: Failure, started: float, now: float) -> None:
        """The sample is known to be good, so that a refusal of it is the replica's failure too."""
        weight = weigh(failure)
        if weight is Weight.NEUTRAL and failure.kind is not FailureKind.SUSPECT:
            member.breaker.rest(now)
            return
        member.note = failure.in_full[:NOTE_LENGTH]
        if weight in (Weight.HARD, Weight.NEUTRAL):
            member.breaker.health_probe_failed(started, now)
        else:
            if weight in (Weight.OVERLOAD, Weight.MISMATCH):
                member.breaker.answered(now)
            member.breaker.failed(weight, started, now, failure.retry_after_s)

    def force(self, member: Member, to: Literal["open", "closed"] | None, now: float) -> None:
        """By an operator, until lifted with None: no batches ("open", drained), or batches whatever happens."""
        states = {"open": State.DRAINED, "closed": State.PINNED, None: None}
        before = member.breaker.state
        cold = member.adaptive and self._running
        member.breaker.force(states[to], now, member.replica.available, cold)
        self._changed(member, before, now)

    # -- time ----------------------------------------------------------------------------------------------------

    def next_wake(self, now: float) -> float | None:
        """When something changes by itself, so that waiting work and probes should be looked at; always after `now`."""
        if now >= self._wake:
            self._advance(now)
        return self._wake if self._wake < inf else None

    def _advance(self, now: float) -> None:
        changes = []
        for member in self.members:
            before = member.breaker.state
            member.breaker.advance(now)
            if member.breaker.state is not before:
                changes.append((member, before))
        self._review(now)
        for member, before in changes:
            self._tell(member, before)

    def _changed(self, member: Member, before: State, now: float) -> None:
        self._review(now)
        if member.breaker.state is not before:
            self._tell(member, before)

    def _tell(self, member: Member, before: State) -> None:
        state = member.breaker.state
        back = before not in (State.CLOSED, State.RAMP) and state in (State.CLOSED, State.RAMP)
        if back and not member.breaker.was_asked:
            member.time.forgive()
        for watcher in self.watchers:
            watcher(member, before)

    def _review(self, now: float) -> None:
        """What all members together amount to, after any of them changed."""
        wake, reachable, tripped, calm = inf, 0, 0, True
        for member in self.members:
            breaker = member.breaker
            state = breaker.state
            wake = min(wake, breaker.next_wake(now))
            if state is not State.CLOSED or breaker.blocked_until > now:
                calm = False
            soft = breaker.soft_open
            if member.replica.available and (soft or state in (State.CLOSED, State.RAMP, State.PINNED)):
                reachable += 1
                tripped += soft
        self.panic = tripped > reachable // 2
        self._wake = wake
        self._reviewed = now
        self._calm = calm
        self._only = self.members[0] if calm and len(self.members) == 1 else None

    # -- seen from outside ---------------------------------------------------------------------------------------

    def statistics(self, now: float) -> FleetStatistics:
        if now >= self._wake:
            self._advance(now)
        for member in self.members:
            member.breaker.window.advance(now)
        total = sum(member.breaker.window.total for member in self.members)
        ramp_s = self._policy.breaker.ramp_s
        members = tuple(
            seen(member, self.usable(member, now), self._slots(member), now, ramp_s, total) for member in self.members
        )
        return FleetStatistics(members, self.panic, sum(member.in_use for member in members))

    def __repr__(self) -> str:
        return f"<Fleet {self.members!r}{' in panic' if self.panic else ''}>"


def _elsewhere(ready: list[Member], avoid: Collection[Member]) -> list[Member]:
    """Those outside the zones of `avoid`, else outside its hosts, if there are any."""
    zones = {member.replica.traits.zone for member in avoid} - {""}
    hosts = {member.replica.traits.host for member in avoid} - {""}
    other = [member for member in ready if member.replica.traits.zone not in zones] or ready
    return [member for member in other if member.replica.traits.host not in hosts] or other
