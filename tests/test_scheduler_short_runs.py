"""Short runs: one batch at a time, so that batches do not fall apart over idle replicas; long runs use them all."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.core import assembly
from gateway.core.batching import MIN_PATIENCE_S, SHORT_RUN_S, one_at_a_time
from gateway.core.model import BatchPolicy
from gateway.errors import ModelError
from tests.scripted import Bench, simulated, turns

LONG_NS = int(SHORT_RUN_S * 2e9)


async def first_run(bench: Bench, infer_ns: int) -> None:
    """The scheduler knows nothing about a model's runs before the first."""
    bench.send(1)
    (await bench.backend.expect_batch(rows=1)).reply(infer_ns=infer_ns)
    await turns()


@simulated
async def test_while_a_short_run_is_under_way_others_gather_for_the_next() -> None:
    bench = Bench(BatchPolicy(8), replicas=2)
    await first_run(bench, infer_ns=1000)
    bench.send(1)
    running = await bench.backend.expect_batch(rows=1)
    bench.send(2)
    await turns()
    bench.send(3)
    await turns()
    assert bench.backend.running == [running]
    running.reply()
    (await bench.backend.expect_batch(rows=5)).reply()
    await bench.finish()


@simulated
async def test_what_clients_send_on_reading_their_answers_joins_the_next_batch() -> None:
    bench = Bench(BatchPolicy(8))
    await first_run(bench, infer_ns=1000)
    bench.send(1)
    running = await bench.backend.expect_batch(rows=1)
    bench.send(2)
    await turns()
    # As if the answer's reader came back within the same turn of the loop in which the answer was written.
    bench.loop.call_soon(bench.send, 4)
    running.reply()
    (await bench.backend.expect_batch(rows=6)).reply()
    await bench.finish()


@simulated
async def test_a_full_batch_does_not_wait_for_a_short_run() -> None:
    bench = Bench(BatchPolicy(4), replicas=2)
    await first_run(bench, infer_ns=1000)
    bench.send(1)
    running = await bench.backend.expect_batch(rows=1)
    bench.send(4)
    (await bench.backend.expect_batch(rows=4)).reply()
    running.reply()
    await bench.finish()


@simulated
async def test_long_runs_use_every_replica_at_once() -> None:
    bench = Bench(BatchPolicy(8), replicas=2)
    await first_run(bench, infer_ns=LONG_NS)
    bench.send(1)
    first = await bench.backend.expect_batch(rows=1)
    bench.send(2)
    second = await bench.backend.expect_batch(rows=2)
    first.reply()
    second.reply()
    await bench.finish()


@simulated
async def test_a_model_not_run_before_counts_as_long() -> None:
    bench = Bench(BatchPolicy(8), replicas=2)
    bench.send(1)
    first = await bench.backend.expect_batch(rows=1)
    bench.send(2)
    second = await bench.backend.expect_batch(rows=2)
    first.reply()
    second.reply()
    await bench.finish()


def test_the_rule() -> None:
    assert one_at_a_time(SHORT_RUN_S / 2, waiting_rows=3, limit=4)
    assert not one_at_a_time(SHORT_RUN_S / 2, waiting_rows=4, limit=4)
    assert not one_at_a_time(SHORT_RUN_S, waiting_rows=1, limit=4)


@simulated
async def test_a_short_run_that_hangs_holds_nobody_up_for_long() -> None:
    bench = Bench(BatchPolicy(8), replicas=2)
    await first_run(bench, infer_ns=1000)
    bench.send(1)
    hanging = await bench.backend.expect_batch(rows=1)
    begun = bench.loop.time()
    bench.send(2)
    other = await bench.backend.expect_batch(rows=2)
    assert bench.loop.time() - begun <= 2 * MIN_PATIENCE_S
    other.reply()
    hanging.reply()
    await bench.finish()


@simulated
async def test_a_batch_that_cannot_be_put_together_stalls_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(BatchPolicy(8))
    whole = assembly.concat

    def short_of_memory(*arguments: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(assembly, "concat", short_of_memory)
    unlucky = bench.send(1)
    await turns()
    assert isinstance(unlucky.error, ModelError)
    monkeypatch.setattr(assembly, "concat", whole)
    bench.send(2)
    (await bench.backend.expect_batch(rows=2)).reply()
    await bench.finish()
