"""Any order of arrivals, leavings, failures of every kind and sign, replicas that come, go and flip: rows never cross,
everyone is settled once, nothing is left anywhere, and what may be executed once is executed once."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.backends.interface import FailureKind, Sign
from gateway.core.model import BatchPolicy
from gateway.core.request import SequenceStep
from gateway.core.resilience import Resilience
from gateway.errors import GatewayError
from tests.scripted import Bench, Kind, ScriptedBatch, simulated, turns

OUTCOMES: list[tuple[FailureKind, Sign]] = [
    (FailureKind.NOT_SENT, Sign.CONNECT),
    (FailureKind.NOT_SENT, Sign.MISSING),
    (FailureKind.NOT_SENT, Sign.NONE),
    (FailureKind.OVERLOAD, Sign.ANSWERED),
    (FailureKind.BROKEN, Sign.NONE),
    (FailureKind.BROKEN, Sign.EXIT),
    (FailureKind.BROKEN, Sign.CRASH),
    (FailureKind.BROKEN, Sign.BYSTANDER),
    (FailureKind.BROKEN, Sign.ANSWERED),
    (FailureKind.BROKEN, Sign.MISMATCH),
    (FailureKind.TIMEOUT, Sign.NONE),
    (FailureKind.SUSPECT, Sign.ANSWERED),
    (FailureKind.SUSPECT, Sign.NONE),
    (FailureKind.CANCELLED, Sign.NONE),
]
RAN = {FailureKind.BROKEN, FailureKind.TIMEOUT, FailureKind.SUSPECT}
KINDS: list[Kind] = ["onnx", "oip"]

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, 4), st.sampled_from("ab"), st.sampled_from([0.0, 0.05, 0.3])),
        st.tuples(st.just("step"), st.integers(1, 2)),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("reply"), st.integers(0, 5)),
        st.tuples(st.just("reply"), st.integers(0, 5)),
        st.tuples(st.just("fail"), st.integers(0, 5), st.sampled_from(OUTCOMES)),
        st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.01, 0.1, 1.5])),
        st.tuples(st.just("flip"), st.integers(0, 3)),
        st.tuples(st.just("join"), st.sampled_from(KINDS)),
        st.tuples(st.just("remove"), st.integers(0, 3)),
        st.tuples(st.just("turn")),
    ),
    min_size=5,
    max_size=60,
)


class World:
    def __init__(self, bench: Bench, idempotent: bool) -> None:
        self.bench = bench
        self.idempotent = idempotent
        self.ran: Counter[int] = Counter()
        """How often a row was executed, as far as anybody can know."""
        self.ran_remotely: Counter[int] = Counter()
        """Of these, on servers, which may keep state between the steps of a sequence."""
        self.removals: list[asyncio.Future[None]] = []
        self.removed: set[str] = set()
        bench.backend.inspect = self.look

    def look(self, batch: ScriptedBatch) -> None:
        members = [c for c in self.bench.callers if not set(batch.numbers).isdisjoint(c.numbers)]
        assert len({caller.request.key for caller in members}) == 1
        assert batch.replica.name not in self.removed
        for caller in members:
            assert caller.settled == 0
            assert caller.request.deadline > self.bench.loop.time()
            if not self.idempotent:
                assert not any(self.ran[number] for number in caller.numbers), "executed again"
            if batch.replica.traits.kind == "oip" and caller.request.sequence:
                assert not any(self.ran_remotely[number] for number in caller.numbers), "a step was executed again"

    def note(self, batch: ScriptedBatch) -> None:
        self.ran.update(batch.numbers)
        if batch.replica.traits.kind == "oip":
            self.ran_remotely.update(batch.numbers)

    async def perform(self, step: tuple[object, ...]) -> None:
        bench = self.bench
        match step:
            case ("send", int(rows), str(key), float(timeout_s)):
                with suppress(GatewayError):
                    bench.send(rows, key=key, timeout_s=timeout_s)
            case ("step", int(identity)):
                with suppress(GatewayError):
                    bench.send(1, sequence=SequenceStep(identity))
            case ("abort", int(index)) if bench.callers:
                bench.scheduler.abort(bench.callers[index % len(bench.callers)].request)
            case ("reply", int(index)) if bench.backend.running:
                batch = bench.backend.running[index % len(bench.backend.running)]
                self.note(batch)
                batch.reply()
            case ("fail", int(index), (FailureKind() as kind, Sign() as sign)) if bench.backend.running:
                batch = bench.backend.running[index % len(bench.backend.running)]
                if kind in RAN:
                    self.note(batch)
                batch.fail(kind, sign=sign)
            case ("sleep", float(seconds)):
                await asyncio.sleep(seconds)
            case ("flip", int(index)):
                replica = bench.backend.replicas[index % len(bench.backend.replicas)]
                replica.set_available(not replica.available)
            case ("join", ("onnx" | "oip") as kind) if len(bench.backend.replicas) < 5:
                bench.scheduler.add_replica(bench.backend.add(kind))
            case ("remove", int(index)) if index < len(bench.backend.replicas) - 1:
                replica = bench.backend.replicas[index]
                self.removals.append(asyncio.ensure_future(bench.scheduler.remove_replica(replica)))
                await turns(1)
                self.removed.add(replica.name)
            case _:
                await turns(1)

    def check(self) -> None:
        running = [number for batch in self.bench.backend.running for number in batch.numbers]
        assert len(running) == len(set(running)), "a row runs twice at the same time"
        for caller in self.bench.callers:
            assert caller.settled <= 1
            if caller.answered:
                caller.check()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=STEPS,
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    slots=st.integers(1, 2),
    merge=st.booleans(),
    idempotent=st.booleans(),
)
@simulated
async def test_whatever_fails_everyone_is_settled_once_with_its_own_rows(
    steps: list[tuple[object, ...]], kinds: list[Kind], slots: int, merge: bool, idempotent: bool
) -> None:
    bench = Bench(
        BatchPolicy(6, merge, max_queue_rows=60),
        len(kinds),
        slots,
        resilience=Resilience(idempotent=idempotent),
        kinds=kinds,
    )
    world = World(bench, idempotent)
    for step in steps:
        await world.perform(step)
        world.check()
    for replica in bench.backend.replicas:
        replica.set_available(True)
    bench.backend.respond = ScriptedBatch.reply
    for batch in bench.backend.running:
        batch.reply()
    await bench.finish()
    for removal in world.removals:
        await removal
    (fleet,) = bench.scheduler.fleets
    assert [(member.batches, member.rows_in_flight) for member in fleet.members] == [(0, 0)] * len(fleet.members)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.data(),
    offender=st.integers(0, 11),
    how=st.sampled_from([(FailureKind.SUSPECT, Sign.ANSWERED), (FailureKind.BROKEN, Sign.EXIT)]),
    kinds=st.lists(st.sampled_from(KINDS), min_size=2, max_size=4),
)
@simulated
async def test_every_batch_mate_of_one_offender_is_answered(
    data: st.DataObject, offender: int, how: tuple[FailureKind, Sign], kinds: list[Kind]
) -> None:
    bench = Bench(replicas=len(kinds), kinds=kinds)
    poison = offender + 1
    bench.backend.respond = lambda batch: batch.fail(how[0], sign=how[1]) if poison in batch.numbers else batch.reply()
    for _ in range(12):
        bench.send()
        if data.draw(st.booleans()):
            await turns(data.draw(st.integers(1, 3)))
    await bench.finish()
    assert [caller.answered for caller in bench.callers] == [index != offender for index in range(12)]
