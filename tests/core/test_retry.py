"""The rules of retrying, followed by a small simulation of what the dispatcher does with the verdicts."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.outcome import FailureKind
from gateway.core.retry import MAX_ATTEMPTS, SINGLES_FROM, FailedBatch, Verdict, after_failure, counts

UNTAKEN = (FailureKind.NOT_SENT, FailureKind.OVERLOAD)
BREAKING = tuple(kind for kind in FailureKind if counts(kind))


@dataclass
class Member:
    number: int
    broken: int = 0
    fate: str = ""


def simulate(members: list[Member], attempt: Callable[[list[Member]], FailureKind | None]) -> int:
    """Runs until everybody has a fate; returns the number of attempts."""
    todo = deque([members])
    attempts = 0
    while todo:
        batch = todo.popleft()
        attempts += 1
        assert attempts < 1000, "this does not end"
        kind = attempt(batch)
        if kind is None:
            for member in batch:
                member.fate = "answered"
            continue
        for member in batch:
            member.broken += counts(kind)
        verdict = after_failure(FailedBatch(len(batch), max(member.broken for member in batch), kind))
        if verdict is Verdict.REQUEUE:
            todo.append(batch)
        elif verdict is Verdict.HALVE:
            middle = (len(batch) + 1) // 2
            todo += [batch[:middle], batch[middle:]]
        elif verdict is Verdict.SINGLES:
            todo += [[member] for member in batch]
        else:
            assert len(batch) == 1, "members are only failed alone"
            batch[0].fate = verdict.value
    return attempts


@given(st.integers(1, 64), st.data())
def test_halving_finds_one_offender_and_everyone_else_is_answered(size: int, data: st.DataObject) -> None:
    offender = data.draw(st.integers(0, size - 1))
    members = [Member(number) for number in range(size)]
    attempts = simulate(
        members, lambda batch: FailureKind.SUSPECT if any(m.number == offender for m in batch) else None
    )
    assert [m.fate for m in members] == ["fail_model" if number == offender else "answered" for number in range(size)]
    assert attempts - 1 <= 2 * math.ceil(math.log2(size)) + 1


@given(st.integers(1, 32), st.sets(st.integers(0, 31)))
def test_halving_finds_every_offender(size: int, offenders: set[int]) -> None:
    members = [Member(number) for number in range(size)]
    simulate(members, lambda batch: FailureKind.SUSPECT if offenders & {m.number for m in batch} else None)
    assert {m.number for m in members if m.fate == "fail_model"} == offenders & set(range(size))
    assert all(m.fate in ("fail_model", "answered") for m in members)


@pytest.mark.parametrize("kind", BREAKING)
def test_a_batch_that_keeps_breaking_workers_costs_its_members_nothing_but_the_culprit(kind: FailureKind) -> None:
    members = [Member(number) for number in range(16)]
    simulate(members, lambda batch: kind if any(m.number == 5 for m in batch) else None)
    assert [m.number for m in members if m.fate != "answered"] == [5]
    assert members[5].fate == "fail_backend"
    assert members[5].broken == MAX_ATTEMPTS


@pytest.mark.parametrize("kind", BREAKING)
def test_a_culprit_joined_by_others_takes_nobody_along(kind: FailureKind) -> None:
    # The first batch breaks, comes back, and has company the second time.
    old, fresh = [Member(0), Member(1)], [Member(2), Member(3)]
    for member in old:
        member.broken = 1
    members = [*old, *fresh]
    simulate(members, lambda batch: kind if any(m.number == 2 for m in batch) else None)
    assert [m.fate for m in members] == ["answered", "answered", "fail_backend", "answered"]


@pytest.mark.parametrize("deaths", range(1, MAX_ATTEMPTS))
def test_dead_workers_cost_nobody_an_answer(deaths: int) -> None:
    left = iter([FailureKind.BROKEN] * deaths)
    members = [Member(number) for number in range(8)]
    simulate(members, lambda batch: next(left, None))
    assert {m.fate for m in members} == {"answered"}


def test_a_worker_that_dies_under_a_halved_batch_costs_the_innocents_nothing() -> None:
    # Three halvings are three attempts, yet none of them broke anything.
    member = Member(0)
    failures = iter([FailureKind.SUSPECT] * 3 + [FailureKind.BROKEN])
    batch = [member, *[Member(n) for n in range(1, 16)]]
    simulate(batch, lambda _: next(failures, None))
    assert {m.fate for m in batch} == {"answered"}


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 12), st.lists(st.sampled_from([None, *FailureKind]), max_size=60), st.sampled_from(BREAKING))
def test_every_history_ends(size: int, history: list[FailureKind | None], then: FailureKind) -> None:
    # Batches nobody took may come back for ever: the deadline ends that. Everything else must end by itself.
    members = [Member(number) for number in range(size)]
    outcomes = iter(history)
    simulate(members, lambda batch: next(outcomes, then))
    assert all(m.fate for m in members)
    assert all(m.broken <= MAX_ATTEMPTS for m in members)


@pytest.mark.parametrize("kind", UNTAKEN)
@pytest.mark.parametrize("broken", range(MAX_ATTEMPTS + 1))
def test_a_batch_that_nobody_took_waits_on(kind: FailureKind, broken: int) -> None:
    assert after_failure(FailedBatch(1, broken, kind)) is Verdict.REQUEUE
    assert after_failure(FailedBatch(8, broken, kind)) is Verdict.REQUEUE
    assert not counts(kind)


def test_the_limits() -> None:
    assert after_failure(FailedBatch(8, SINGLES_FROM - 1, FailureKind.BROKEN)) is Verdict.REQUEUE
    assert after_failure(FailedBatch(8, SINGLES_FROM, FailureKind.BROKEN)) is Verdict.SINGLES
    assert after_failure(FailedBatch(1, MAX_ATTEMPTS - 1, FailureKind.TIMEOUT)) is Verdict.SINGLES
    assert after_failure(FailedBatch(1, MAX_ATTEMPTS, FailureKind.TIMEOUT)) is Verdict.FAIL_BACKEND
    assert after_failure(FailedBatch(1, 1, FailureKind.SUSPECT)) is Verdict.FAIL_MODEL
