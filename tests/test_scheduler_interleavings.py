"""Any order of arrivals, leavings, outcomes, outages and deadlines: each request settles once, with its own rows."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.backends.interface import FailureKind
from gateway.core.model import BatchPolicy
from gateway.errors import NoBackend, Overloaded
from tests.scripted import Bench, ScriptedBatch, simulated, turns

KINDS: list[FailureKind | None] = [None, None, None, *FailureKind]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, 5), st.sampled_from("ab"), st.sampled_from([0.0, 0.05, 0.3])),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("end"), st.integers(0, 5), st.sampled_from(KINDS)),
        st.tuples(st.just("short"), st.integers(0, 5)),
        st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.01, 0.1, 1.0])),
        st.tuples(st.just("flip"), st.integers(0, 1)),
        st.tuples(st.just("turn")),
    ),
    min_size=5,
    max_size=60,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=STEPS,
    delay=st.sampled_from([0.0, 0.02]),
    merge=st.booleans(),
    replicas=st.integers(1, 2),
    slots=st.integers(1, 2),
)
@simulated
async def test_every_request_settles_once_with_its_own_rows(
    steps: list[tuple[object, ...]], delay: float, merge: bool, replicas: int, slots: int
) -> None:
    bench = Bench(BatchPolicy(6, merge, delay, (3,), max_queue_rows=40), replicas, slots)
    bench.backend.inspect = lambda batch: _only_for_those_inside(bench, batch)
    for step in steps:
        await perform(bench, step)
        _nothing_crossed(bench)
    for replica in bench.backend.replicas:
        replica.set_available(True)
    bench.backend.respond = ScriptedBatch.reply
    for batch in bench.backend.running:
        batch.reply()
    await bench.finish()


async def perform(bench: Bench, step: tuple[object, ...]) -> None:
    match step:
        case ("send", int(rows), str(key), float(timeout_s)):
            wanted = (0,) if rows < 4 else (0, 1)
            with suppress(Overloaded, NoBackend):
                bench.send(rows, key=key, timeout_s=timeout_s, as_values=rows % 2 == 0, outputs=wanted)
        case ("abort", int(index)) if bench.callers:
            bench.scheduler.abort(bench.callers[index % len(bench.callers)].request)
        case ("end", int(index), kind) if bench.backend.running:
            batch = bench.backend.running[index % len(bench.backend.running)]
            if isinstance(kind, FailureKind):
                batch.fail(kind)
            else:
                batch.reply()
        case ("short", int(index)) if bench.backend.running:
            bench.backend.running[index % len(bench.backend.running)].reply(lambda rows: rows[1:])
        case ("sleep", float(seconds)):
            await asyncio.sleep(seconds)
        case ("flip", int(index)):
            replica = bench.backend.replicas[index % len(bench.backend.replicas)]
            replica.set_available(not replica.available)
        case _:
            await turns(1)


def _only_for_those_inside(bench: Bench, batch: ScriptedBatch) -> None:
    """At the moment a batch is handed over, all its rows belong to callers who wait and still have time."""
    for caller in bench.callers:
        if not set(batch.numbers).isdisjoint(caller.numbers):
            assert caller.settled == 0
            assert caller.request.deadline > bench.loop.time()


def _nothing_crossed(bench: Bench) -> None:
    owners = {number: caller for caller in bench.callers for number in caller.numbers}
    running = [number for batch in bench.backend.running for number in batch.numbers]
    assert len(running) == len(set(running)), "a row runs twice at the same time"
    for caller in bench.callers:
        assert caller.settled <= 1
        if caller.answered:
            caller.check()
    for batch in bench.backend.running:
        keys = {owners[number].request.key for number in batch.numbers}
        assert len(keys) == 1, "requests that may not share a batch did"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), offenders=st.sets(st.integers(0, 19)), replicas=st.integers(1, 3))
@simulated
async def test_exactly_the_offenders_fail_whatever_the_batches(
    data: st.DataObject, offenders: set[int], replicas: int
) -> None:
    bench = Bench(replicas=replicas, slots=2)
    poison = {number for index in offenders for number in range(index * 3 + 1, index * 3 + 4)}
    breaks = data.draw(st.integers(0, 1))

    def respond(batch: ScriptedBatch) -> None:
        nonlocal breaks
        if poison & set(batch.numbers):
            batch.fail(FailureKind.SUSPECT)
        elif breaks:
            breaks -= 1
            batch.fail(FailureKind.BROKEN)
        else:
            batch.reply()

    bench.backend.respond = respond
    for _ in range(20):
        bench.send(3)
        if data.draw(st.booleans()):
            await turns(data.draw(st.integers(1, 3)))
    await bench.finish()
    failed = {index for index, caller in enumerate(bench.callers) if not caller.answered}
    assert failed == offenders
