"""One history against the real scheduler, dispatcher and fleet, in virtual time."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Final

from gateway.core.fleet import Member, State
from gateway.core.outcome import FailureKind
from gateway.core.request import InputTensor
from gateway.errors import Draining, GatewayError
from gateway.observe.record import ModelStatistics
from gateway.prober import Prober
from gateway.scheduler import Scheduler
from tests.simulation.checker import Checker, Violation
from tests.simulation.histories import Arrival, Change, History, history
from tests.simulation.loop import BusyLoop, SimulatedLoop
from tests.simulation.world import INT64, PROBE, Item, ScriptedReplica, World, spec_of

REST_S: Final = 200.0
"""After the last event: every deadline has passed by then, and every pause is over."""
PROBE_S: Final = 5.0
"""How long probing goes on after the last event."""
AFTERMATH_S: Final = 45.0
AFTERMATH_STEP_S: Final = 0.5
"""One request each: enough for every breaker to try, to ramp and to close."""


@dataclass(slots=True)
class Played:
    history: History
    violations: list[Violation]
    trace: list[str] | None
    tally: Counter[str] = field(default_factory=Counter)

    @property
    def broken(self) -> set[str]:
        """Names of the invariants that did not hold."""
        return {violation.invariant for violation in self.violations}


class Player:
    """Carries out the events of one history."""

    def __init__(self, made: History, verbose: bool = False) -> None:
        rng = Random(made.seed ^ 0x5EED)
        self.history = made
        self.loop = SimulatedLoop(rng, made.turn_s, made.late_s)
        self.world = World(self.loop, rng, [] if verbose else None)
        self.checker = Checker(made, self.world)
        self.world.watch = self.checker
        self.world.replicas = [ScriptedReplica(self.world, plan, place) for place, plan in enumerate(made.replicas)]
        for replica in self.world.replicas[made.present :]:
            replica.absent = True
        self.statistics = ModelStatistics()
        self.leaving: list[asyncio.Task[None]] = []
        self.followers: dict[int, list[int]] = {}
        """By place of an arrival: those that come when it is told something."""
        self.items: dict[int, Item] = {}
        self.prober: Prober | None = None

    def play(self) -> Played:
        loop, made = self.loop, self.history
        start = loop.now
        present = self.world.replicas[: made.present]
        spec = spec_of(made.policy, made.resilience, made.scheduling)
        with loop.current():
            self.scheduler = Scheduler(
                spec, present, self.statistics, loop.time, made.row_s, rng=Random(made.seed ^ 0xF1EE7)
            )
            if self.world.trace is not None:
                self.scheduler.fleets[0].watchers.append(self._breaker_changed)
            if made.probed:
                sample = (InputTensor(INT64, (1, 1), [PROBE], None),)
                self.prober = Prober(spec, self.scheduler, sample, 2.0, Random(made.seed ^ 0x9B0BE), loop.time)
                self.prober.start()
        self.checker.scheduler = self.scheduler
        for place, arrival in enumerate(made.arrivals):
            if 0 < arrival.follows <= place:
                self.followers.setdefault(place - arrival.follows, []).append(place)
            else:
                loop.call_at(start + arrival.at, self._arrives, arrival, place)
        self.world.told = self._told
        for change in made.changes:
            loop.call_at(start + change.at, self._changes, change)
        try:
            loop.run(start + made.span)
            self._all_well()
            if self.prober is not None:
                loop.run(loop.now + PROBE_S)
                self.prober.close()
            loop.run(loop.now + REST_S)
            if made.aftermath:
                self._aftermath()
            drained = loop.create_task(self.scheduler.drained())
            loop.run(loop.now + 1.0)
            if not drained.done():
                self.checker.violated("I5", "the scheduler does not become idle")
                drained.cancel()
                loop.run(loop.now)
            self.scheduler.stop()
            self._all_gone()
            self.checker.over()
        except BusyLoop as error:
            self.checker.violated("mishap", str(error))
        return Played(made, self.checker.violations, self.world.trace, self._tally())

    def _breaker_changed(self, member: Member, before: State) -> None:
        self.world.note(f"{member.name} was {before.value}: {member.breaker!r}")

    def _arrives(self, arrival: Arrival, place: int = -1) -> None:
        before = self.items.get(place - arrival.again) if arrival.again else None
        if before is not None:
            latest = self.world.sender(before)
            before = before if latest.settled or latest.refused is not None else None
        item = self.world.item(arrival, place, before)
        self.items[place] = item
        item.request.received = self.loop.now
        self.world.note(f"{item} arrives: {arrival}")
        try:
            self.scheduler.submit(item.request)
        except GatewayError as error:
            self.checker.refused(item, error)
            self.loop.call_soon(self._told, item)
            return
        self.checker.accepted_one(item)
        if arrival.leaves_after:
            self.loop.call_later(arrival.leaves_after, self._leaves, item)

    def _told(self, item: Item) -> None:
        """What callers do in that moment."""
        for place in self.followers.pop(item.place, ()):
            self._arrives(self.history.arrivals[place], place)
        before = self.items.get(item.place - 1) if item.arrival.takes_along else None
        if before is not None and before.refused is None:
            self._leaves(before)

    def _leaves(self, item: Item) -> None:
        if not item.settled:
            item.left = True
            self.world.note(f"{item} leaves")
            item.request.abort()

    def _changes(self, change: Change) -> None:
        replica = self.world.replicas[change.place]
        what, scheduler = change.what, self.scheduler
        if what == "stall":
            self.world.note(f"the loop stalls for {change.seconds:.3f} s")
            self.checker.stalled_s += change.seconds
            self.loop.stall(change.seconds)
        elif what == "add":
            self.world.note(f"{replica.name} joins")
            replica.absent = False
            replica.noticed()
            scheduler.add_replica(replica)
        elif what == "close":
            self.world.note("the model takes no more requests")
            self.checker.closed = True
            scheduler.close(Draining("the gateway is shutting down"))
        elif what == "remove":
            self.leaving.append(self.loop.create_task(self._removes(replica)))
        elif what in {"drain", "undrain", "force_closed"}:
            self._forced(replica, what)
        else:
            replica.set_mode(what)

    async def _removes(self, replica: ScriptedReplica) -> None:
        self.world.note(f"{replica.name} is removed")
        replica.removed = True
        replica.noticed()
        await self.scheduler.remove_replica(replica)
        self.world.note(f"{replica.name} is gone")
        if any(run.items for run in replica.running):
            self.checker.violated("I5", f"{replica.name} was removed and still executes {replica.running}")

    def _forced(self, replica: ScriptedReplica, what: str) -> None:
        fleet = self.scheduler.fleets[0]
        for member in fleet.members:
            if member.replica is replica:
                self.world.note(f"an operator orders {what} of {replica.name}")
                replica.drained = what == "drain"
                replica.forced = what != "undrain"
                to = {"drain": "open", "force_closed": "closed", "undrain": None}[what]
                fleet.force(member, to, self.loop.now)  # type: ignore[arg-type]  # literals, by way of a table
                self.scheduler.kick()
                return

    def _all_well(self) -> None:
        """Whatever still fails stops failing: what is left then is to come to rest."""
        for replica in self.world.replicas:
            if replica.mode != "ok":
                replica.set_mode("ok")
            if replica.forced:
                self._forced(replica, "undrain")

    def _aftermath(self) -> None:
        """Everything is well, and a few callers come, one by one."""
        if all(replica.removed for replica in self.world.replicas[: self.history.present]):
            return
        if self.checker.closed:
            self.checker.closed = False
            self.scheduler.reopen()
        loop, step = self.loop, 0.0
        while step < AFTERMATH_S:
            loop.call_later(step, self._arrives, Arrival(step, 1, 0, 0.0, 0, "", 0.0, 0))
            step += AFTERMATH_STEP_S
        before = len(self.world.items)
        loop.run(loop.now + AFTERMATH_S + 1.0)
        self.checker.healed(self.world.items[before:])
        loop.run(loop.now + self.history.policy.deadline_s)

    def _all_gone(self) -> None:
        for task in self.leaving:
            if not task.done():
                self.checker.violated("I5", "a replica that was removed is never gone")
                task.cancel()
                self.loop.run(self.loop.now)
            elif (error := task.exception()) is not None:
                self.checker.violated("mishap", f"a replica could not be removed: {error!r}")

    def _tally(self) -> Counter[str]:
        """What happened, so that a campaign can show that it was about something."""
        tally: Counter[str] = Counter({self.history.theme: 1, "requests": len(self.world.items)})
        for item in self.world.items:
            error = item.error or item.refused
            tally["answered" if error is None else f"told {type(error).__name__}"] += 1
            tally["rows"] += item.request.rows
        for run in self.world.runs:
            tally["batches" if run.items else "probes"] += 1
            if run.lane:
                tally[f"from the lane {run.lane}"] += 1
            if run.kind is not None:
                tally[f"{run.kind.value}/{run.sign.value}"] += 1
                tally["faults"] += run.kind is not FailureKind.CANCELLED
        for member in self.scheduler.fleets[0].members:
            if not member.breaker.trips:
                continue
            for cause, count in member.breaker.trips.items():
                tally["trips"] += count
                tally[f"trips: {cause.value}"] += count
        tally["hedges"] = self.checker.hedged
        tally["callbacks"] = self.loop.callbacks
        return tally


def play(seed: int, verbose: bool = False) -> Played:
    """The history of `seed`."""
    return play_history(history(seed), verbose)


def play_history(made: History, verbose: bool = False) -> Played:
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        return Player(made, verbose).play()
    finally:
        logging.disable(level)
