"""The rules of retrying, followed by a small simulation of what the dispatcher does with the verdicts."""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.outcome import FailureKind, Sign
from gateway.core.retry import (
    LANE_AFTER,
    MAX_ATTEMPTS,
    FailedBatch,
    Lane,
    Verdict,
    after_failure,
    counts,
    needs_budget,
    pause_s,
    ran,
)

K, S, V = FailureKind, Sign, Verdict
End = tuple[FailureKind, Sign]
CRASH: End = (K.BROKEN, S.EXIT)
CERTAIN: End = (K.BROKEN, S.CRASH)
RESET: End = (K.BROKEN, S.NONE)
ANSWER_500: End = (K.BROKEN, S.ANSWERED)
REFUSAL: End = (K.SUSPECT, S.ANSWERED)
HANG: End = (K.TIMEOUT, S.NONE)
GONE: End = (K.NOT_SENT, S.CONNECT)
BUSY: End = (K.OVERLOAD, S.NONE)
STARVED: End = (K.BROKEN, S.MEMORY)
BYSTANDER: End = (K.BROKEN, S.BYSTANDER)
ENDS = [
    CRASH,
    CERTAIN,
    RESET,
    ANSWER_500,
    REFUSAL,
    (K.SUSPECT, S.NONE),
    HANG,
    GONE,
    BUSY,
    BYSTANDER,
    (K.BROKEN, S.MISMATCH),
    STARVED,
]


@dataclass(frozen=True)
class Place:
    """A replica."""

    name: str
    worker: bool = False


@dataclass
class Member:
    number: int
    broken: int = 0
    executions: int = 0
    fate: str = ""
    left: bool = False
    tried: set[Place] = field(default_factory=set)
    alone: set[Place] = field(default_factory=set)


@dataclass
class Ended:
    """What a simulation came to."""

    attempts: int = 0
    crashes: int = 0
    blamed: list[Place] = field(default_factory=list)
    mixed: bool = False


Attempt = Callable[[list[Member], Place], End | None]


def simulate(
    members: list[Member], places: Sequence[Place], attempt: Attempt, base: FailedBatch | None = None
) -> Ended:
    """Runs until everybody has a fate. The least used place goes first, untried ones before all others."""
    base = base or FailedBatch(1, 0, K.BROKEN)
    todo: deque[tuple[list[Member], Lane, Place | None]] = deque([(members, Lane.CLEAN, None)])
    ended, turns = Ended(), itertools.count()
    while todo:
        batch, lane, accused = todo.popleft()
        place = _choose(batch, places, next(turns))
        executed = len(batch)
        end = attempt(batch, place)
        batch = [member for member in batch if not member.left]
        if not batch:
            continue
        ended.attempts += 1
        assert ended.attempts < 2000, "this does not end"
        for member in batch:
            member.executions += end is None or ran(end[0])
        if end is None:
            for member in batch:
                assert not member.fate, "settled twice"
                member.fate = "answered"
            if accused is not None and executed == len(batch):
                ended.blamed.append(accused)
            continue
        ended.crashes += end in (CRASH, CERTAIN)
        todo.extend(_failed(batch, executed, lane, place, places, end, base))
    return ended


def _choose(batch: list[Member], places: Sequence[Place], turn: int) -> Place:
    tried = set().union(*[member.tried for member in batch])
    alone = batch[0].alone if len(batch) == 1 else set()
    untried = [place for place in places if place not in tried]
    rest = untried or [place for place in places if place not in alone] or list(places)
    return rest[turn % len(rest)]


def _failed(
    batch: list[Member], executed: int, lane: Lane, place: Place, places: Sequence[Place], end: End, base: FailedBatch
) -> list[tuple[list[Member], Lane, Place | None]]:
    kind, sign = end
    for member in batch:
        member.broken += counts(kind, sign)
        if ran(kind) and sign is not S.BYSTANDER:
            member.tried.add(place)
            if executed == 1:
                member.alone.add(place)
    known = batch[0].alone if len(batch) == 1 else set().union(*[member.tried for member in batch])
    verdict = after_failure(
        replace(
            base,
            members=len(batch),
            broken=max(member.broken for member in batch),
            kind=kind,
            sign=sign,
            same_build=place.worker,
            lane=lane,
            alone_failures=len(batch[0].alone),
            others=any(other not in known for other in places),
            executed=executed,
        )
    )
    then = LANE_AFTER.get(verdict)
    if then is None:
        for member in batch:
            assert not member.fate, "settled twice"
            member.fate = verdict.value
        return []
    if verdict is V.HALVE:
        assert len(batch) > 1
        middle = (len(batch) + 1) // 2
        return [(batch[:middle], then, None), (batch[middle:], then, None)]
    if verdict is V.SINGLES:
        return [([member], then, None) for member in batch]
    accused = (
        place
        if verdict is V.QUARANTINE and executed == len(batch) and kind in (K.SUSPECT, K.BROKEN) and sign is S.ANSWERED
        else None
    )
    return [(batch, then, accused)]


def crowd(size: int) -> list[Member]:
    return [Member(number) for number in range(size)]


def offending(numbers: set[int], end: End, only: Place | None = None) -> Attempt:
    def attempt(batch: list[Member], place: Place) -> End | None:
        guilty = any(member.number in numbers for member in batch)
        return end if guilty and (only is None or place == only) else None

    return attempt


REMOTE = [Place("a"), Place("b"), Place("c")]
WORKERS = [Place("onnx-1", worker=True), Place("onnx-2", worker=True)]
POOLS = {"one worker": WORKERS[:1], "workers": WORKERS, "one": REMOTE[:1], "two": REMOTE[:2], "three": REMOTE}
POOLS["mixed"] = [*WORKERS, *REMOTE[:1]]
pools = st.sampled_from(sorted(POOLS)).map(POOLS.__getitem__)


@given(st.integers(1, 64), st.data())
def test_halving_finds_what_workers_refuse_and_everyone_else_is_answered(size: int, data: st.DataObject) -> None:
    offender = data.draw(st.integers(0, size - 1))
    members = crowd(size)
    ended = simulate(members, WORKERS, offending({offender}, (K.SUSPECT, S.NONE)))
    assert [m.fate for m in members] == ["fail_model" if n == offender else "answered" for n in range(size)]
    assert ended.attempts - 1 <= 2 * math.ceil(math.log2(size))


@given(st.integers(1, 64), st.sampled_from([ANSWER_500, REFUSAL]), st.sampled_from(["one", "two", "three"]), st.data())
def test_what_every_remote_server_refuses_is_found_too(size: int, end: End, pool: str, data: st.DataObject) -> None:
    offender = data.draw(st.integers(0, size - 1))
    members = crowd(size)
    ended = simulate(members, POOLS[pool], offending({offender}, end))
    proven = "poison" if pool != "one" else "fail_backend"
    fate = "fail_model" if end == REFUSAL else proven
    assert [m.fate for m in members] == [fate if n == offender else "answered" for n in range(size)]
    assert ended.attempts - 1 <= 2 * math.ceil(math.log2(size)) + 2
    assert not ended.blamed


@given(st.integers(1, 32), st.sets(st.integers(0, 31)), st.sampled_from([CRASH, CERTAIN, ANSWER_500, REFUSAL]), pools)
def test_every_offender_is_found_and_nobody_else_pays(size: int, guilty: set[int], end: End, pool: list[Place]) -> None:
    members = crowd(size)
    simulate(members, pool, offending(guilty, end))
    assert {m.number for m in members if m.fate != "answered"} == guilty & set(range(size))
    assert all(m.fate in ("fail_model", "fail_backend", "poison", "answered") for m in members)


@given(st.integers(1, 32), st.sampled_from([ANSWER_500, REFUSAL]), st.sampled_from(["two", "three"]))
def test_a_replica_that_answers_errors_is_blamed_and_nobody_else_is(size: int, end: End, pool: str) -> None:
    members = crowd(size)
    ended = simulate(members, POOLS[pool], lambda batch, place: end if place == REMOTE[0] else None)
    assert {m.fate for m in members} == {"answered"}
    assert ended.blamed == [REMOTE[0]]
    assert ended.attempts == 2


@given(st.integers(1, 32), st.data(), st.sampled_from(["one worker", "workers"]))
def test_a_row_that_crashes_workers_costs_two_further_crashes(size: int, data: st.DataObject, pool: str) -> None:
    offender = data.draw(st.integers(0, size - 1))
    members = crowd(size)
    ended = simulate(members, POOLS[pool], offending({offender}, CRASH))
    assert [m.fate for m in members] == ["poison" if n == offender else "answered" for n in range(size)]
    assert ended.crashes <= (2 if size == 1 else 3)


@given(st.integers(1, 32), st.data(), st.sampled_from(["one worker", "workers"]), st.booleans())
def test_beyond_doubt_it_costs_one_and_in_a_storm_a_row_alone_none(
    size: int, data: st.DataObject, pool: str, storm: bool
) -> None:
    offender = data.draw(st.integers(0, size - 1))
    members = crowd(size)
    ended = simulate(members, POOLS[pool], offending({offender}, CERTAIN), FailedBatch(1, 0, K.BROKEN, storm=storm))
    assert [m.fate for m in members] == ["poison" if n == offender else "answered" for n in range(size)]
    assert ended.crashes == (1 if storm and size == 1 else 2)


@pytest.mark.parametrize("size", [1, 8])
def test_one_crash_that_comes_of_nothing_condemns_nobody(size: int) -> None:
    left = iter([CERTAIN])
    members = crowd(size)
    simulate(members, WORKERS, lambda batch, place: next(left, None))
    assert {m.fate for m in members} == {"answered"}


@given(st.integers(1, 16), st.sampled_from([HANG, RESET]), pools)
def test_a_row_that_never_gets_an_answer_ends_alone(size: int, end: End, pool: list[Place]) -> None:
    members = crowd(size)
    simulate(members, pool, offending({0}, end))
    assert members[0].fate in ("poison", "fail_backend")
    assert all(m.fate == "answered" for m in members[1:])
    assert all(m.broken <= MAX_ATTEMPTS for m in members)


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 12), st.sampled_from([CRASH, CERTAIN, RESET, ANSWER_500, REFUSAL, HANG]), pools, st.data())
def test_who_is_left_when_the_offender_leaves_is_not_taken_for_it(
    size: int, end: End, pool: list[Place], data: st.DataObject
) -> None:
    members, attempts = crowd(size), itertools.count(1)
    leave_at = data.draw(st.integers(1, 4))
    leaving = data.draw(st.sets(st.integers(1, size - 1)))

    def attempt(batch: list[Member], place: Place) -> End | None:
        guilty = any(member.number == 0 for member in batch)
        if next(attempts) == leave_at:
            for member in batch:
                member.left = member.number == 0 or member.number in leaving
        return end if guilty else None

    simulate(members, pool, attempt)
    assert {m.fate for m in members[1:] if not m.left} <= {"answered"}


def test_a_remote_server_that_is_slow_never_condemns_a_row_but_one_that_breaks_off_does() -> None:
    for end, fate in ((HANG, "fail_backend"), (RESET, "poison")):
        members = crowd(1)
        simulate(members, REMOTE, offending({0}, end))
        assert members[0].fate == fate


@pytest.mark.parametrize("end", [CRASH, RESET, HANG, (K.BROKEN, S.MISMATCH)])
@pytest.mark.parametrize("pool", sorted(POOLS))
@pytest.mark.parametrize("size", [1, 8])
def test_one_death_costs_nobody_an_answer_and_condemns_nobody(end: End, pool: str, size: int) -> None:
    left = iter([end])
    members = crowd(size)
    ended = simulate(members, POOLS[pool], lambda batch, place: next(left, None))
    assert {m.fate for m in members} == {"answered"}
    assert ended.attempts == 2


def test_a_worker_that_dies_under_a_halved_batch_costs_the_innocents_nothing() -> None:
    # Three halvings are three attempts, yet none of them broke anything.
    members = crowd(16)
    failures: list[End] = [(K.SUSPECT, S.NONE)] * 3 + [CRASH]
    left = iter(failures)
    simulate(members, WORKERS, lambda batch, place: next(left, None))
    assert {m.fate for m in members} == {"answered"}


@settings(max_examples=500, deadline=None)
@given(
    st.integers(1, 12),
    st.lists(st.sampled_from([None, *ENDS]), max_size=60),
    st.sampled_from([end for end in ENDS if end not in (GONE, BUSY, BYSTANDER)]),
    pools,
    st.integers(1, 4),
)
def test_every_history_ends(
    size: int, history: list[End | None], then: End, pool: list[Place], max_attempts: int
) -> None:
    # What was never executed may come back for ever: deadline and budget end that. The rest must end by itself.
    members = crowd(size)
    outcomes = iter(history)
    base = FailedBatch(1, 0, K.BROKEN, max_attempts=max_attempts)
    simulate(members, pool, lambda batch, place: next(outcomes, then), base)
    assert all(m.fate for m in members)
    assert all(m.broken <= max(max_attempts, 3) for m in members)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 12), st.lists(st.sampled_from([None, *ENDS]), max_size=20), pools)
def test_what_must_not_run_twice_runs_once(size: int, history: list[End | None], pool: list[Place]) -> None:
    members = crowd(size)
    outcomes = iter(history)
    base = FailedBatch(1, 0, K.BROKEN, idempotent=False)
    simulate(members, pool, lambda batch, place: next(outcomes, None), base)
    assert all(m.executions <= 1 for m in members)
    assert all(m.fate for m in members)
    if history[:1] == [GONE] and all(end == GONE for end in history):
        assert {m.fate for m in members} == {"answered"}


@given(st.integers(1, 16), pools, st.data())
def test_nobody_meets_a_replica_again_while_another_is_untried(
    size: int, pool: list[Place], data: st.DataObject
) -> None:
    members = crowd(size)
    seen: dict[int, list[Place]] = {m.number: [] for m in members}

    def attempt(batch: list[Member], place: Place) -> End | None:
        for member in batch:
            if place in seen[member.number]:
                assert set().union(*[m.tried for m in batch]) == set(pool)
            seen[member.number].append(place)
        return data.draw(st.sampled_from([None, CRASH, RESET, ANSWER_500, REFUSAL, HANG]))

    simulate(members, pool, attempt)


@pytest.mark.parametrize("end", [GONE, BUSY, BYSTANDER])
@pytest.mark.parametrize("size", [1, 8])
def test_suspects_stay_suspects_and_the_rest_stay_clean(end: End, size: int) -> None:
    clean = FailedBatch(size, 0, *end)
    expected = V.REQUEUE if end == BYSTANDER else V.RETRY
    for broken in range(MAX_ATTEMPTS + 1):
        assert after_failure(replace(clean, broken=broken)) is expected
        assert after_failure(replace(clean, broken=broken, lane=Lane.QUARANTINE)) is V.QUARANTINE
    assert not counts(*end)


def test_what_counts_and_what_must_be_paid_for() -> None:
    assert [counts(*end) for end in (CRASH, RESET, HANG)] == [True] * 3
    assert [counts(*end) for end in (ANSWER_500, REFUSAL, GONE, BUSY, BYSTANDER)] == [False] * 5
    assert [kind for kind in FailureKind if not ran(kind)] == [K.NOT_SENT, K.OVERLOAD]
    assert needs_budget(V.RETRY, K.BROKEN)
    assert needs_budget(V.RETRY, K.OVERLOAD)
    assert not needs_budget(V.RETRY, K.NOT_SENT)
    assert not any(needs_budget(verdict, K.BROKEN) for verdict in Verdict if verdict is not V.RETRY)


remote = partial(FailedBatch, same_build=False)

RULES: list[tuple[str, FailedBatch, Verdict]] = [
    ("a crash is followed by quarantine", FailedBatch(8, 1, *CRASH), V.QUARANTINE),
    ("beyond doubt: alone", FailedBatch(8, 1, *CERTAIN), V.SINGLES),
    ("beyond doubt, and alone for the first time", FailedBatch(1, 1, *CERTAIN), V.QUARANTINE),
    ("beyond doubt, and alone in a storm", FailedBatch(1, 1, *CERTAIN, storm=True), V.POISON),
    ("the last of several in a storm", FailedBatch(1, 1, *CERTAIN, storm=True, executed=2), V.QUARANTINE),
    ("perhaps killed, and alone in a storm", FailedBatch(1, 1, *CRASH, storm=True), V.QUARANTINE),
    ("too much for the memory there is: half as much", FailedBatch(8, 1, *STARVED), V.HALVE),
    ("still too much: alone", FailedBatch(4, 2, *STARVED, lane=Lane.QUARANTINE), V.SINGLES),
    ("alone, and still too much", FailedBatch(1, 3, *STARVED, lane=Lane.QUARANTINE), V.POISON),
    ("so is a worker that had to be killed", FailedBatch(8, 1, *HANG), V.QUARANTINE),
    ("a remote one that hangs by a retry", remote(8, 1, *HANG), V.RETRY),
    ("a reset too", remote(8, 1, *RESET), V.RETRY),
    ("twice: alone", remote(8, 2, *RESET, lane=Lane.RETRY), V.SINGLES),
    ("suspects that break something: alone", FailedBatch(8, 1, *RESET, lane=Lane.QUARANTINE), V.SINGLES),
    ("alone, for the first time", FailedBatch(1, 1, *CRASH), V.QUARANTINE),
    ("alone, and not for the first time", FailedBatch(1, 2, *CRASH, lane=Lane.QUARANTINE), V.POISON),
    ("one replica is no proof", remote(1, 3, *RESET), V.FAIL_BACKEND),
    ("two are", remote(1, 3, *RESET, alone_failures=2), V.POISON),
    ("an error from one of several servers", remote(8, 0, *ANSWER_500, others=True), V.QUARANTINE),
    ("from the only one", remote(8, 0, *ANSWER_500), V.HALVE),
    ("a worker's refusal", FailedBatch(8, 0, K.SUSPECT, others=True), V.HALVE),
    ("a worker's refusal of one", FailedBatch(1, 0, K.SUSPECT, others=True), V.FAIL_MODEL),
    ("an outage is not searched for offenders", remote(8, 0, *ANSWER_500, outage=True), V.FAIL_BACKEND),
    ("nor one without answers", remote(8, 2, *RESET, outage=True), V.FAIL_BACKEND),
    ("nor is anybody condemned in it", remote(1, 3, *RESET, alone_failures=2, outage=True), V.FAIL_BACKEND),
    ("but what workers refuse is", FailedBatch(8, 0, K.SUSPECT, outage=True), V.HALVE),
    ("one attempt means one", FailedBatch(8, 1, *RESET, max_attempts=1), V.FAIL_BACKEND),
    ("also with an answer", remote(8, 0, *ANSWER_500, others=True, max_attempts=1), V.FAIL_BACKEND),
    ("innocents run alone though two were allowed", FailedBatch(8, 2, *RESET, max_attempts=2), V.SINGLES),
    ("once only: a refusal", FailedBatch(8, 0, *REFUSAL, idempotent=False), V.FAIL_MODEL),
    ("once only: too much to do", FailedBatch(8, 0, *BUSY, idempotent=False), V.FAIL_OVERLOADED),
    ("once only: somebody else's crash", FailedBatch(8, 0, *BYSTANDER, idempotent=False), V.FAIL_BACKEND),
    ("once only: not sent", FailedBatch(8, 0, *GONE, idempotent=False), V.RETRY),
    ("the last of several was not alone: refused", FailedBatch(1, 0, K.SUSPECT, executed=2), V.QUARANTINE),
    ("the last of several was not alone: crashed", FailedBatch(1, 3, *CRASH, executed=2), V.QUARANTINE),
    ("the last of several was not alone: an error", remote(1, 0, *ANSWER_500, executed=2), V.QUARANTINE),
    ("the last of several was not alone: reset", remote(1, 3, *RESET, executed=2, alone_failures=2), V.QUARANTINE),
    ("given up although somebody waits", FailedBatch(8, 0, K.CANCELLED), V.REQUEUE),
]  # fmt: skip


@pytest.mark.parametrize(("batch", "verdict"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES])
def test_the_rules(batch: FailedBatch, verdict: Verdict) -> None:
    assert after_failure(batch) is verdict


@given(st.integers(1, 60), st.integers())
def test_pauses_grow_to_a_second_and_are_jittered(tries: int, seed: int) -> None:
    longest = min(1.0, 0.025 * 2 ** (tries - 1))
    rng = random.Random(seed)
    pauses = [pause_s(tries, rng) for _ in range(50)]
    assert all(0.0 <= pause <= longest for pause in pauses)
    assert max(pauses) - min(pauses) > longest / 4
