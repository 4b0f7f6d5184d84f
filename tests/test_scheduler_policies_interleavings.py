"""Any history of a model with levels and queue policies keeps every promise; and the checks see when one is broken.

Promises, looked at from outside at the moment a batch is handed over:
  * strict: nobody who waits has a higher level than the batch's first, and within the batch levels do not rise;
  * fair: requests of one level and kind go in the order in which they came, unless their time was up;
  * on time: nobody runs for the first time after a REJECT policy's time, and who is refused for it is told in time;
  * whole: no batch holds more rows than the limit; everyone is settled exactly once, with its own rows.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from contextlib import suppress
from math import inf

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.backends.interface import FailureKind
from gateway.core.batch_queue import Group
from gateway.core.model import BatchPolicy
from gateway.core.policy_queue import PolicyQueue
from gateway.core.request import QUEUED, InferRequest
from gateway.core.scheduling import QueuePolicy, Scheduling
from gateway.errors import NoBackend, Overloaded, QueueTimeout
from tests.scripted import Bench, Caller, ScriptedBatch, simulated, turns

LIMIT = 6
ON_TIME_S = 0.005
STATED = Scheduling(
    3,
    2,
    QueuePolicy("REJECT", default_timeout_s=0.2, allow_timeout_override=True, max_queue_size=8),
    ((1, QueuePolicy(max_queue_size=5)), (3, QueuePolicy("DELAY", default_timeout_s=0.05))),
)
KINDS: list[FailureKind | None] = [None, None, None, *FailureKind]
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("send"),
            st.integers(1, 5),
            st.sampled_from("ab"),
            st.integers(0, 4),
            st.sampled_from([0.0, 0.03, 0.5]),
            st.sampled_from([0.0, 0.0, 0.1]),
        ),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("end"), st.integers(0, 5), st.sampled_from(KINDS)),
        st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.01, 0.1, 1.0])),
        st.tuples(st.just("flip"), st.integers(0, 1)),
        st.tuples(st.just("turn")),
    ),
    min_size=5,
    max_size=60,
)


def level_of(request: InferRequest) -> int:
    return request.priority if request.priority in (1, 2, 3) else 2


def queue_time_of(request: InferRequest) -> float:
    """Until it is refused, seconds from its arrival."""
    stated = request.stated_timeout_s
    return inf if level_of(request) != 2 else min(0.2, stated or inf)


class Watch:
    """Looks at every batch the moment it is handed over, and at everyone in the end."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        bench.backend.inspect = self.look

    def look(self, batch: ScriptedBatch) -> None:
        assert batch.rows <= LIMIT, "more rows than the limit"
        members = [caller for caller in self.bench.callers if not set(batch.numbers).isdisjoint(caller.numbers)]
        now = self.bench.loop.time()
        for member in members:
            assert member.settled == 0, "somebody who was settled runs"
            assert now < member.request.deadline, "runs after its deadline"
            if member.request.attempt == 1:
                assert now - member.request.received < queue_time_of(member.request), "runs after its queue time"
        if batch.lane is not None:  # out of the queue before, and served first
            return
        ordered = sorted(members, key=lambda member: batch.numbers.index(member.numbers[0]))
        levels = [level_of(member.request) for member in ordered]
        assert levels == sorted(levels), "levels rise within a batch"
        waiting = [caller for caller in self.bench.callers if caller.settled == 0 and caller.request.state == QUEUED]
        assert levels[0] <= min((level_of(caller.request) for caller in waiting), default=9), "somebody was passed over"
        self._in_order(ordered, waiting)

    def _in_order(self, members: list[Caller], waiting: list[Caller]) -> None:
        key = members[0].request.key
        place = {id(caller): index for index, caller in enumerate(self.bench.callers)}
        for level in (1, 2):  # of the third, some were put back
            here = [place[id(member)] for member in members if level_of(member.request) == level]
            left = [place[id(c)] for c in waiting if level_of(c.request) == level and c.request.key == key]
            assert here == sorted(here), "not in the order of arrival"
            assert not here or not left or max(here) < min(left), "somebody who came earlier was passed over"

    def finally_look(self) -> None:
        for caller in self.bench.callers:
            if isinstance(caller.error, QueueTimeout):
                waited = caller.settled_at - caller.request.received
                allowed = queue_time_of(caller.request)
                assert allowed - 1e-9 <= waited, "refused too early"
                # Being in a batch that no replica took counts as waiting, but that is only known when it comes back.
                assert waited <= allowed + ON_TIME_S or caller.request.avoid is not None, "refused too late"


async def perform(bench: Bench, step: tuple[object, ...]) -> None:
    match step:
        case ("send", int(rows), str(key), int(priority), float(stated_s), float(timeout_s)):
            with suppress(Overloaded, NoBackend):
                bench.send(rows, key=key, priority=priority, stated_timeout_s=stated_s, timeout_s=timeout_s)
        case ("abort", int(index)) if bench.callers:
            bench.scheduler.abort(bench.callers[index % len(bench.callers)].request)
        case ("end", int(index), kind) if bench.backend.running:
            batch = bench.backend.running[index % len(bench.backend.running)]
            if isinstance(kind, FailureKind):
                batch.fail(kind)
            else:
                batch.reply()
        case ("sleep", float(seconds)):
            await asyncio.sleep(seconds)
        case ("flip", int(index)):
            replica = bench.backend.replicas[index % len(bench.backend.replicas)]
            replica.set_available(not replica.available)
        case _:
            await turns(1)


async def run(bench: Bench, steps: list[tuple[object, ...]]) -> None:
    watch = Watch(bench)
    for step in steps:
        await perform(bench, step)
    for replica in bench.backend.replicas:
        replica.set_available(True)
    bench.backend.respond = ScriptedBatch.reply
    for batch in bench.backend.running:
        batch.reply()
    await bench.finish()
    watch.finally_look()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS, delay=st.sampled_from([0.0, 0.02]), replicas=st.integers(1, 2), slots=st.integers(1, 2))
@simulated
async def test_any_history_keeps_every_promise(
    steps: list[tuple[object, ...]], delay: float, replicas: int, slots: int
) -> None:
    await run(Bench(BatchPolicy(LIMIT, True, delay, (3,), max_queue_rows=60), replicas, slots, STATED), steps)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS, replicas=st.integers(1, 3), slots=st.integers(1, 2))
@simulated
async def test_any_history_keeps_the_order_of_answers(
    steps: list[tuple[object, ...]], replicas: int, slots: int
) -> None:
    bench = Bench(BatchPolicy(LIMIT, max_queue_rows=20), replicas, slots, Scheduling(preserve_ordering=True))
    told: list[Caller] = []
    left: set[InferRequest] = set()
    for step in steps:
        if step[0] == "abort" and bench.callers:
            left.add(bench.callers[int(str(step[1])) % len(bench.callers)].request)
        await perform(bench, step)
        for caller in bench.callers:
            caller.on_settled = functools.partial(told.append, caller)
            assert caller.settled <= 1
    for replica in bench.backend.replicas:
        replica.set_available(True)
    bench.backend.respond = ScriptedBatch.reply
    for batch in bench.backend.running:
        batch.reply()
    await bench.finish()
    answered = [bench.callers.index(caller) for caller in told if caller.answered and caller.request not in left]
    assert answered == sorted(answered)
    assert bench.scheduler._order is not None
    assert (len(bench.scheduler._order), bench.scheduler._order.rows) == (0, 0)


# -- negative controls: a room that breaks one promise is seen to break it -------------------------------------------

HISTORY: list[tuple[object, ...]] = [
    ("send", 1, "a", 2, 0.0, 0.0),  # keeps the replica busy
    ("turn",),
    *[("send", 2, "a", 3, 0.0, 0.0)] * 2,
    *[("send", 2, "a", 2, 0.03, 0.0)] * 2,
    *[("send", 2, "a", 2, 0.0, 0.0)] * 2,
    ("send", 2, "b", 2, 0.0, 0.0),
    ("turn",),
    ("sleep", 0.1),
    ("send", 2, "a", 1, 0.0, 0.0),
    ("end", 0, None),
]


def levels_do_not_matter(queue: PolicyQueue) -> None:
    queue._levels, queue._default_level = 0, 0
    queue._policies = {}


def the_last_goes_first(queue: PolicyQueue) -> None:
    arrivals = iter(range(10_000, 0, -1))
    push = queue.push

    def backwards(request: InferRequest) -> None:
        queue._arrivals = next(arrivals)
        push(request)

    queue.push = backwards  # type: ignore[method-assign]


def nobody_s_time_is_ever_up(queue: PolicyQueue) -> None:
    queue.overdue = lambda now: None  # type: ignore[method-assign]


def time_is_up_late(queue: PolicyQueue) -> None:
    overdue = queue.overdue
    queue.overdue = lambda now: overdue(now - 0.06)  # type: ignore[method-assign]


def groups_go_by_arrival(queue: PolicyQueue) -> None:
    def first() -> Group:
        return min(queue.groups.values(), key=lambda group: group.requests[0].received)

    queue.first = first  # type: ignore[method-assign]


def more_is_taken_than_fits(queue: PolicyQueue) -> None:
    take = queue.take

    def greedy(group: Group, max_rows: int) -> list[InferRequest]:
        return take(group, max_rows + 3)

    queue.take = greedy  # type: ignore[method-assign]


class Loose(PolicyQueue):
    """Without slots, so that a method can be replaced."""


@simulated
@pytest.mark.parametrize(
    ("sabotage", "seen"),
    [
        (levels_do_not_matter, "levels rise|passed over"),
        (the_last_goes_first, "order of arrival|came earlier"),
        (nobody_s_time_is_ever_up, "after its queue time"),
        (time_is_up_late, "after its queue time|too late"),
        (groups_go_by_arrival, "passed over"),
        (more_is_taken_than_fits, "more rows than the limit"),
    ],
)
async def test_a_broken_promise_is_seen(sabotage: Callable[[PolicyQueue], None], seen: str) -> None:
    bench = Bench(BatchPolicy(LIMIT), scheduling=STATED)
    queue = Loose(STATED)
    bench.scheduler._queue = bench.scheduler._levels = bench.scheduler._door._queue = queue
    sabotage(queue)
    with pytest.raises(AssertionError, match=seen):
        await run(bench, HISTORY)


@simulated
async def test_the_same_history_with_a_whole_room_keeps_them() -> None:
    await run(Bench(BatchPolicy(LIMIT), scheduling=STATED), HISTORY)
