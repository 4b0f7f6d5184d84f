"""Machines stand still for a moment: backends of a fleet that is at work, tried by its prober, in simulated time.

A pause is longer than an attempt may take, so callers' batches time out; the backends are well all the same. Whoever
stands still may be asked; nobody is ejected for it, nobody's request fails, and once the pause is over all are at work.
"""

from __future__ import annotations

import asyncio

import pytest

from gateway.core.breaker import Cause, State
from gateway.core.outcome import FailureKind
from tests.scripted import Caller, Kind, ScriptedBatch, ScriptedReplica, simulated
from tests.test_prober import Trial, state_of

SERVICE_S = 0.01
WARM_S = 2.5
"""Long enough for attempt timeouts to be learned."""


class Servers:
    """The backends of `trial`: each answers after `SERVICE_S`, unless it stands still."""

    def __init__(self, trial: Trial) -> None:
        self.loop = trial.bench.loop
        self.still_until: dict[ScriptedReplica, float] = {}
        self.timeouts: list[float] = []
        trial.backend.respond = self._execute

    def _execute(self, batch: ScriptedBatch) -> None:
        self.loop.call_later(batch.timeout_s, self._expire, batch)
        self._serve(batch)

    def _serve(self, batch: ScriptedBatch) -> None:
        begins = max(self.loop.time(), self.still_until.get(batch.replica, 0.0))
        self.loop.call_at(begins + SERVICE_S, self._deliver, batch)

    def _deliver(self, batch: ScriptedBatch) -> None:
        if batch.ended:
            return
        if self.loop.time() < self.still_until.get(batch.replica, 0.0):
            self._serve(batch)
        else:
            batch.reply()

    def _expire(self, batch: ScriptedBatch) -> None:
        if not batch.ended:
            self.timeouts.append(batch.timeout_s)
            batch.fail(FailureKind.TIMEOUT)


async def load(trial: Trial, seconds: float, per_s: float) -> list[Caller]:
    callers = []
    end = trial.bench.loop.time() + seconds
    while trial.bench.loop.time() < end:
        callers.append(trial.bench.send())
        await asyncio.sleep(1.0 / per_s)
    return callers


@pytest.mark.parametrize("pause_s", [0.05, 0.3])
@pytest.mark.parametrize(("slots", "load_per_s"), [(1, 150.0), (8, 400.0)], ids=["one", "eight"])
@pytest.mark.parametrize(("count", "still"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (9, 1), (9, 9)], ids=str)
def test_a_pause_ejects_nobody(count: int, still: int, slots: int, load_per_s: float, pause_s: float) -> None:
    remote: list[Kind] = ["oip"] * count

    @simulated
    async def run() -> None:
        trial = Trial(*remote, slots=slots)
        servers = Servers(trial)
        per_s = load_per_s * count
        callers = await load(trial, WARM_S, per_s)
        assert servers.timeouts == []
        now = trial.bench.loop.time()
        servers.still_until = dict.fromkeys(trial.backend.replicas[:still], now + pause_s)
        callers += await load(trial, pause_s + 0.3, per_s)
        states = [state_of(member) for member in trial.fleet.members]
        trips = [set(member.breaker.trips) for member in trial.fleet.members]
        assert bool(servers.timeouts) == (count > 1), "alone, it is waited for"
        assert states == [State.CLOSED] * count
        assert all(causes <= {Cause.SILENT} for causes in trips), trips
        assert not any(trips[still:])
        await asyncio.sleep(1.0)
        assert [caller.error for caller in callers if not caller.answered] == []
        await trial.finish()

    run()
