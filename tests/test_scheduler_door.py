"""What is told to whom who is not let in, and which reason comes first."""

from __future__ import annotations

import pytest

from gateway.backends.interface import FailureKind
from gateway.core.model import BatchPolicy
from gateway.core.scheduling import QueuePolicy, Scheduling
from gateway.errors import Draining, Overloaded
from tests.scripted import Bench, simulated


@simulated
async def test_a_closed_door_is_the_first_reason_and_is_counted() -> None:
    bench = Bench(BatchPolicy(4, max_queue_rows=4))
    bench.send(4)
    bench.scheduler.close(Draining("going"))
    with pytest.raises(Draining, match="going"):
        bench.send(4)
    assert bench.statistics.rejected == {"draining": 1}
    (await bench.backend.expect_batch(rows=4)).reply()
    bench.scheduler.reopen()
    bench.send()
    (await bench.backend.expect_batch(rows=1)).reply()
    await bench.finish()


@simulated
async def test_who_waits_for_another_attempt_takes_room() -> None:
    bench = Bench(BatchPolicy(4, max_queue_rows=4), kinds=["oip"])
    bench.send(3)
    batch = await bench.backend.expect_batch(rows=3)
    bench.backend.replicas[0]._slots = 0
    batch.fail(FailureKind.BROKEN)
    bench.send(1)
    with pytest.raises(Overloaded, match="3 rows for another attempt"):
        bench.send(1)
    bench.backend.replicas[0]._slots = 1
    bench.backend.respond = lambda batch: batch.reply()
    bench.scheduler.kick()
    await bench.finish()


@simulated
async def test_a_level_is_bounded_where_the_queue_is_not() -> None:
    bounded = Scheduling(default_queue_policy=QueuePolicy(max_queue_size=1))
    bench = Bench(BatchPolicy(1), scheduling=bounded)
    bench.send()
    first = await bench.backend.expect_batch(rows=1)
    bench.send()
    with pytest.raises(Overloaded, match="max_queue_size"):
        bench.send()
    bench.backend.respond = lambda batch: batch.reply()
    first.reply()
    await bench.finish()
