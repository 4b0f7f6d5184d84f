"""Who looks after replicas, and how long anyone waits for one. More of it in test_scheduler_lifecycle.py."""

from __future__ import annotations

import asyncio

import pytest

from gateway.backends.interface import FailureKind
from gateway.errors import NoBackend
from gateway.scheduler_replicas import NO_REMOTE_S
from tests.scripted import Bench, simulated, turns


@simulated
async def test_patience_begins_anew_with_every_time_that_nobody_is_left() -> None:
    bench = Bench(kinds=["oip"])
    (replica,) = bench.backend.replicas
    replica.set_available(False)
    caller = bench.send()
    await asyncio.sleep(0.9 * NO_REMOTE_S)
    replica.set_available(True)
    replica.set_available(False)  # before anything was sent there
    begun = bench.loop.time()
    await asyncio.sleep(2 * NO_REMOTE_S)
    assert isinstance(caller.error, NoBackend)
    assert caller.settled_at - begun == pytest.approx(NO_REMOTE_S)
    with pytest.raises(NoBackend):
        bench.send()
    replica.set_available(True)
    bench.backend.respond = lambda batch: batch.reply()
    assert bench.send().settled == 0
    await bench.finish()


@simulated
async def test_hooks_and_figures_are_those_of_the_dispatcher() -> None:
    bench = Bench(replicas=2, kinds=["oip", "oip"])
    scheduler = bench.scheduler
    (dispatcher,) = scheduler.dispatchers
    assert scheduler.fleets == (dispatcher.fleet,)
    changes: list[str] = []
    scheduler.on_fleet_changed = lambda: changes.append("fleet")
    scheduler.on_executed = lambda batch, _: changes.append(batch.backend)
    before = scheduler.retry_budget_rows
    bench.send()
    (await bench.backend.expect_batch(rows=1)).fail(FailureKind.BROKEN)
    again = await bench.backend.expect_batch(rows=1)
    assert scheduler.retry_budget_rows < before
    again.reply()
    assert changes == ["fleet", again.replica.name]
    await bench.finish()


@simulated
async def test_a_replica_that_is_not_there_leaves_at_once_and_one_that_left_is_not_listened_to() -> None:
    bench = Bench(replicas=2)
    replica = bench.backend.replicas[0]
    await bench.scheduler.remove_replica(replica)
    await bench.scheduler.remove_replica(replica)
    changes: list[str] = []
    bench.scheduler.on_fleet_changed = lambda: changes.append("fleet")
    replica.set_available(False)
    await turns()
    assert changes == []
    assert [member.replica for member in bench.scheduler.fleets[0].members] == [bench.backend.replicas[1]]
    await bench.finish()
