"""When one replica of one model gets no more batches, and how it comes back (resilience notes §1.6).

It counts attempts, never rows, so that one poisonous row in a batch of 32 weighs once. Its states and what leads from
one to another are in core/breaker_states.py. Rules:

  * CLOSED and RAMP open by themselves: see `Cause`. A trip opens for 1 s · 2^(k-1), at most 60 s, ± 20 %; every trip
    raises k, every 60 s CLOSED lower it by one (gRPC A50's multiplier decay), and it stays in 0 … `MAX_LEVEL`;
  * silence is a question, not a verdict: CLOSED opens for a moment, and whatever comes from there, the probe's answer,
    a late one or a refusal, closes it again as if it had been CLOSED all along: k and how long it has served stay, and
    so do the failures counted, so that a replica which answers nothing but probes trips like any other. More silence
    is no answer, nor is one that took much longer than its peers need; a probe that did is made once more, and the
    second one is a trip (SLOW): what is ten times slower times out too, but a pause ends. To go away meanwhile is what
    it is for one that is CLOSED, a probe that fails is a trip;
  * HALF_OPEN has one permit; three probes in a row have to succeed. A probe that was cancelled, and one whose outcome
    never came, give it back;
  * RAMP is small batches, one at a time: a server that has just started is slow at first. It takes ten seconds, or one
    where the batches show that this server is not: the share doubles with each that took no longer than it should,
    starts again with one that did, and a dozen in a row end the ramp;
  * a replica that goes away is let back in after a second if it had served for ten; one that comes and goes waits
    longer every time;
  * an outcome counts only if the attempt began after the state did (`_stale`): what was sent before a trip says
    nothing about the recovery from it;
  * an overloaded replica is left alone for as long as it asked for, in every state;
  * a cancelled attempt, and one that somebody else's batch ended, mean nothing at all.

Whether an open breaker is obeyed is the fleet's decision (core/fleet.py): for the causes called *soft* it is not
obeyed once more than half of the replicas would be gone. A replica that proves itself while it is used all the same
closes at once.
"""

from __future__ import annotations

from collections import Counter
from math import inf
from typing import Final, Protocol

from gateway.core.breaker_states import (
    BREAKER,
    SOFT,
    TRANSITIONS,
    BreakerPolicy,
    Cause,
    Event,
    State,
    Weight,
    weigh,
)  # fmt: skip
from gateway.core.window import Window

__all__ = [
    "BREAKER", "MAX_LEVEL", "Breaker", "BreakerPolicy", "Cause", "Event", "Rng", "State", "Weight", "weigh",
]  # fmt: skip


class Rng(Protocol):
    """What is needed of `random.Random`."""

    def random(self) -> float:
        """Uniform in [0, 1)."""


SLOW_ANSWERS: Final = 2
"""Probes of a silent replica that took much longer than its peers need: it is slow, and not only just awake."""
MAX_LEVEL: Final = 7
"""From here on nothing gets longer: 2^6 s is over the cap. A bound, so that the level also comes down again."""
_EPSILON_S: Final = 1e-6


class Breaker:
    """See the module's docstring. `started`: when the attempt began, monotonic seconds."""

    __slots__ = (
        "_closed_at", "_connects", "_health", "_mismatches", "_policy", "_proofs", "_rng", "_served_from", "_streak",
        "blocked_until", "cause", "in_time", "level", "pauses", "permit_at", "probe_after", "since", "state", "trips",
        "until", "was_asked", "window",
    )  # fmt: skip

    def __init__(self, policy: BreakerPolicy, rng: Rng, now: float, state: State = State.CLOSED) -> None:
        self._policy = policy
        self._rng = rng
        self.state = state
        self.since = self._closed_at = self._served_from = now
        """When the state began."""
        self.cause = Cause.NONE
        self.was_asked = False
        """Whether the state before this one was a question (SILENT): what comes after that is no recovery."""
        self.level = 0
        """k: how often it tripped lately."""
        self.until = now
        """When OPEN ends."""
        self._streak = 0
        self.blocked_until = now
        """Until when the replica asked to be left alone."""
        self.pauses = 0
        self.permit_at: float | None = None
        """When the probe under way began; None: the permit is free."""
        self.probe_after = now
        self.trips: Counter[Cause] = Counter()
        self.window = Window()
        self._mismatches: list[float] = []
        self._settle()

    def _settle(self) -> None:
        self._connects = self._health = self._proofs = 0
        self.in_time = 0
        """Batches in a row, while RAMP, that took no longer than they should."""
        self.permit_at = None

    # -- transitions ---------------------------------------------------------------------------------------------

    def _go(self, event: Event, now: float) -> None:
        before, self.state = self.state, TRANSITIONS[self.state, event]
        asked = self.was_asked = self.cause is Cause.SILENT
        self.since = now
        if before not in (State.CLOSED, State.RAMP) and not asked:
            self._served_from = now
        self._settle()
        if not asked:
            self._streak = 0
        if self.state in (State.CLOSED, State.RAMP):
            if not asked:
                self.window.clear()
            self.cause = Cause.NONE
        if self.state is State.CLOSED and not asked:
            self._closed_at = now

    def _trip(self, event: Event, cause: Cause, now: float, at_least_s: float = 0.0, worse: int = 1) -> None:
        level = min(max(self.level_at(now) + worse, 1), MAX_LEVEL)
        self._go(event, now)
        self.level = level
        policy = self._policy
        open_s = min(policy.open_s * 2.0 ** (self.level - 1), policy.longest_open_s)
        open_s *= 1.0 + policy.jitter * (2.0 * self._rng.random() - 1.0)
        self.until = max(now + max(open_s, at_least_s), self.blocked_until)
        self.cause = cause
        self.trips[cause] += 1

    def _ask(self, now: float) -> None:
        """See the rule about silence."""
        self.cause = Cause.SILENT
        self.trips[Cause.SILENT] += 1
        self._go(Event.TRIP, now)
        self.until = now + self._policy.ask_s

    def answered(self, now: float) -> None:
        """Something came from there, whatever it says: that is all that was asked, if it was."""
        if self.cause is Cause.SILENT:
            self._go(Event.ANSWERED, now)

    def answered_slowly(self, started: float, now: float) -> None:
        """The probe that asked it took much longer than its peers need."""
        if self.state is State.HALF_OPEN and self.cause is Cause.SILENT and not self._stale(started):
            self._proofs += 1
            if self._proofs >= SLOW_ANSWERS:
                self._trip(Event.PROBE_FAILED, Cause.SLOW, now)

    def level_at(self, now: float) -> int:
        """k, without what was worked off by being CLOSED."""
        if self.state is not State.CLOSED and self.cause is not Cause.SILENT:
            return self.level
        return max(0, self.level - int(max(now - self._closed_at, 0.0) / self._policy.decay_s))

    def advance(self, now: float) -> None:
        """What changes by itself."""
        if self.state is State.OPEN and now >= self.until:
            self._go(Event.TIME, now)
            self.probe_after = now
        elif self.state is State.RAMP and now >= self.since + self._policy.ramp_s:
            self._go(Event.TIME, now)
        elif self.permit_at is not None and now >= self.permit_at + self._policy.permit_s:
            self.permit_at = None

    def next_wake(self, now: float) -> float:
        """When `advance`, a pause or a rest next changes something; infinite: never. After `now`, once advanced."""
        if self.state is State.OPEN:
            wake = self.until
        elif self.state is State.RAMP:
            wake = self.since + self._policy.ramp_s
        elif self.permit_at is not None:
            wake = self.permit_at + self._policy.permit_s
        elif self.state is State.HALF_OPEN and self.probe_after > now:
            wake = self.probe_after
        else:
            wake = inf
        return min(wake, self.blocked_until) if self.blocked_until > now else wake

    def lost(self, now: float, remote: bool) -> None:
        """The replica is not available any more. A remote one that comes and goes is trusted less and less."""
        if (self.state, Event.LOST) not in TRANSITIONS:
            return
        self.blocked_until = now
        self.pauses = 0
        if remote and (self.state in (State.CLOSED, State.RAMP) or self.cause is Cause.SILENT):
            settled = now - self._served_from >= self._policy.settled_s
            self._trip(Event.LOST, Cause.LOST, now, worse=0 if settled else 1)
        else:
            until = self.until
            self._go(Event.LOST, now)
            self.cause, self.until = Cause.LOST, until

    def back(self, now: float, cold: bool) -> None:
        """Available again; `cold`: not warmed up."""
        if self.state is not State.UNAVAILABLE:
            return
        if not cold:
            self._go(Event.BACK_WARM, now)
        elif now < self.until:
            self._go(Event.BACK_EARLY, now)
            self.cause = Cause.LOST
        else:
            self._go(Event.BACK_COLD, now)

    def force(self, to: State | None, now: float, available: bool, cold: bool) -> None:
        """An operator's order: DRAINED, PINNED, or None to lift it. It stands until it is lifted."""
        if to is self.state:
            return
        if to is not None:
            self._go(Event.DRAIN if to is State.DRAINED else Event.PIN, now)
            self.cause = Cause.OPERATOR
        elif self.state in (State.DRAINED, State.PINNED):
            back = Event.RELEASE_COLD if cold else Event.RELEASE_WARM
            self._go(back if available else Event.RELEASE_GONE, now)
            self.until = now
            self.cause = Cause.NONE if available else Cause.LOST

    # -- outcomes ------------------------------------------------------------------------------------------------

    def _stale(self, started: float) -> bool:
        return started < self.since - _EPSILON_S

    def succeeded(self, started: float, now: float, in_use: bool, slow: bool | None = None, late: bool = False) -> None:
        """`in_use`: it would get batches even if it were open. `slow`: None where there is nobody to compare with.
        `late`: it took longer than it should, by whatever is known."""
        self.pauses = 0
        if self.cause is Cause.SILENT:
            if slow:
                self.window.time(True, now)
                return
            self.answered(now)
        state = self.state
        if state is State.CLOSED or state is State.PINNED or state is State.RAMP:
            self._streak = self._connects = self._health = 0
            self.window.attempt(False, now)
            if slow is not None:
                self.window.time(slow, now)
                if slow:
                    self._judge(now)
            if state is self.state is State.RAMP and not self._stale(started):
                self._ramped(now, late)
        elif state in (State.OPEN, State.HALF_OPEN) and not self._stale(started):
            self._proofs += 1
            if self._proofs < self._policy.proofs:
                return
            if in_use or state is State.OPEN:
                self._go(Event.PROVED_IN_USE, now)
            else:
                self._go(Event.PROVED, now)

    def _ramped(self, now: float, late: bool) -> None:
        """A batch on the ramp was answered."""
        self.in_time = 0 if late else self.in_time + 1
        if self.in_time >= self._policy.ramp_proofs and now >= self.since + self._policy.quick_ramp_s:
            self._go(Event.PROVED, now)

    def ramp_share(self, now: float, start: float) -> float:
        """Of the largest batch, while RAMP: `start` at first, then what time or the batches so far vouch for."""
        on_s = now - self.since
        vouched = min(start * 2.0 ** min(self.in_time, 30), on_s / self._policy.quick_ramp_s)
        return min(1.0, max(start, on_s / self._policy.ramp_s, vouched))

    def failed(
        self,
        weight: Weight,
        started: float,
        now: float,
        asked_s: float = 0.0,
        slow: bool = False,
        silence: Cause = Cause.NONE,
    ) -> None:
        """`asked_s`: for how long an overloaded one asked to be left alone.

        `slow`: it also took too long. `silence`: SILENT or HUNG if nothing else came from there meanwhile.
        """
        if weight is Weight.NEUTRAL:
            return
        if weight is Weight.OVERLOAD:
            self._pause(asked_s, now)
        if self.state is State.CLOSED or self.state is State.PINNED or self.state is State.RAMP:
            self._count(weight, started, now, slow, silence)
        elif self.state is State.HALF_OPEN and not self._stale(started):
            if silence is not Cause.SILENT or self.cause is not Cause.SILENT:
                self._trial_failed(Event.PROBE_FAILED, weight, now)
        elif self.state is State.OPEN:
            self._proofs = 0
            if weight is Weight.OVERLOAD:
                self.until = max(self.until, self.blocked_until)

    def _pause(self, asked_s: float, now: float) -> None:
        policy = self._policy
        if asked_s > 0.0:
            pause_s = min(asked_s, policy.longest_retry_after_s)
        else:
            pause_s = min(policy.pause_s * 2.0 ** min(self.pauses, 16), policy.longest_pause_s)
        self.pauses += 1
        self.blocked_until = max(self.blocked_until, now + pause_s)

    def _count(self, weight: Weight, started: float, now: float, slow: bool, silence: Cause) -> None:
        if weight is Weight.CONNECT:
            self._connects += 1
        else:
            self._connects = 0
            self.window.attempt(True, now)
            if weight is Weight.HARD or weight is Weight.MISMATCH:
                self._streak += 1
            if slow:
                self.window.time(True, now)
        if weight is Weight.MISMATCH:
            self._mismatches = [at for at in self._mismatches if at > now - self._policy.mismatch_window_s][-8:]
            self._mismatches.append(now)
        if self.state is State.PINNED:
            return
        if weight is Weight.MISSING:
            self._trip(Event.TRIP, Cause.MISSING, now)
        elif self.state is State.RAMP and weight in (Weight.HARD, Weight.MISMATCH) and not self._stale(started):
            self._trial_failed(Event.TRIP, weight, now)
        elif silence is Cause.HUNG:
            self._trip(Event.TRIP, Cause.HUNG, now)
        else:
            self._judge(now)
            if silence is Cause.SILENT and self.state is State.CLOSED and self.blocked_until <= now:
                self._ask(now)

    def _trial_failed(self, event: Event, weight: Weight, now: float) -> None:
        cause = {
            Weight.MISSING: Cause.MISSING,
            Weight.CONNECT: Cause.CONNECT,
            Weight.MISMATCH: Cause.MISMATCH,
            Weight.OVERLOAD: Cause.OVERLOAD,
        }.get(weight, Cause.TRIAL)
        at_least_s = self._policy.mismatch_open_s if cause is Cause.MISMATCH else 0.0
        self._trip(event, cause, now, at_least_s)

    def _judge(self, now: float) -> None:
        policy, window = self._policy, self.window
        if self.state is State.PINNED:
            return
        recent = [at for at in self._mismatches if at > now - policy.mismatch_window_s] if self._mismatches else ()
        if len(recent) >= policy.mismatches:
            self._mismatches.clear()
            self._trip(Event.TRIP, Cause.MISMATCH, now, policy.mismatch_open_s)
        elif self._connects >= policy.connects:
            self._trip(Event.TRIP, Cause.CONNECT, now)
        elif self._streak >= policy.consecutive:
            self._trip(Event.TRIP, Cause.CONSECUTIVE, now)
        elif self._health >= policy.health_probes:
            self._trip(Event.TRIP, Cause.PROBES, now)
        elif window.total >= policy.attempts and window.failed >= policy.failed_share * window.total:
            self._trip(Event.TRIP, Cause.RATIO, now)
        elif window.timed >= policy.attempts and window.slow >= policy.slow_share * window.timed:
            self._trip(Event.TRIP, Cause.SLOW, now)

    # -- probes --------------------------------------------------------------------------------------------------

    def may_probe(self, now: float) -> bool:
        """HALF_OPEN, and no probe is under way."""
        return (
            self.state is State.HALF_OPEN
            and self.permit_at is None
            and now >= self.probe_after
            and now >= self.blocked_until
        )

    def take_permit(self, now: float) -> None:
        self.permit_at = now

    def return_permit(self, now: float, started: float) -> None:
        """The probe is over, whatever came of it. What began before the permit was taken is another one."""
        if self.permit_at is not None and started >= self.permit_at - _EPSILON_S:
            self.permit_at = None
            self.probe_after = now

    def rest(self, now: float) -> None:
        """The probe could not be made: not again at once."""
        if self.state is State.HALF_OPEN:
            self.probe_after = now + self._policy.probe_again_s

    def health_probe_failed(self, started: float, now: float) -> None:
        """A probe failed that was made although the breaker is not open; three in a row trip."""
        if self.state is State.HALF_OPEN:
            if not self._stale(started):
                self._trip(Event.PROBE_FAILED, Cause.TRIAL, now)
        elif self.state in (State.CLOSED, State.RAMP):
            self._health += 1
            self._judge(now)

    def health_probe_succeeded(self) -> None:
        """It answers: neither its health nor its connections are in doubt. Client batches stay counted."""
        if self.state in (State.CLOSED, State.RAMP, State.PINNED):
            self._health = self._connects = 0

    @property
    def soft_open(self) -> bool:
        """Tripped for a cause that the fleet's guard may overrule."""
        return (self.state is State.OPEN or self.state is State.HALF_OPEN) and self.cause in SOFT

    def __repr__(self) -> str:
        return f"<Breaker {self.state.value} k={self.level} {self.cause.value} {self.window!r}>"
