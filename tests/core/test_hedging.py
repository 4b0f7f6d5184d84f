"""When a late batch is sent twice, and all the reasons not to."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.hedging import Hedge, HedgeShare, Later, Never, RunningAttempt, Surroundings, may_hedge

LATE = RunningAttempt(items=4, dispatched=10.0, deadline=20.0, p95_s=0.1, predicted_s=0.05, attempts=1, hedged=False)
QUIET = Surroundings(idempotent=True, max_attempts=3, idle_slot=True, waiting=False, all_closed=True, budget=100.0)


def rich(share: float = 0.02) -> HedgeShare:
    saved = HedgeShare(share)
    saved.deposit(1000)
    return saved


def test_a_batch_that_is_later_than_95_of_100_is_hedged() -> None:
    assert may_hedge(LATE, QUIET, rich(), 10.1) == Hedge()
    assert may_hedge(replace(LATE, deadline=math.inf), QUIET, rich(), 10.1) == Hedge()


def test_before_that_the_answer_is_when_to_look() -> None:
    assert may_hedge(LATE, QUIET, rich(), 10.02) == Later(10.1)


@pytest.mark.parametrize(
    "change",
    [{"hedged": True}, {"items": 0}, {"p95_s": None}, {"attempts": 3}, {"deadline": 10.14}, {"items": 21}],
    ids=str,
)
def test_some_batches_are_never_hedged(change: dict[str, Any]) -> None:
    assert may_hedge(replace(LATE, **change), QUIET, rich(), 10.1) == Never()


@pytest.mark.parametrize("change", [{"idempotent": False}, {"max_attempts": 1}, {"budget": 3.9}], ids=str)
def test_some_models_are_not(change: dict[str, Any]) -> None:
    assert may_hedge(LATE, replace(QUIET, **change), rich(), 10.1) == Never()
    assert may_hedge(LATE, QUIET, HedgeShare(0.0), 10.1) == Never()
    assert may_hedge(LATE, QUIET, HedgeShare(0.02), 10.1) == Never(), "nothing saved yet"


@pytest.mark.parametrize("change", [{"idle_slot": False}, {"waiting": True}, {"all_closed": False}], ids=str)
def test_hedges_only_use_what_is_idle(change: dict[str, Any]) -> None:
    decision = may_hedge(LATE, replace(QUIET, **change), rich(), 10.1)
    assert isinstance(decision, Later)
    assert 10.1 < decision.instant <= 10.2


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 8)), max_size=200), st.sampled_from([0.0, 0.02, 0.5]))
def test_hedged_items_never_exceed_their_share(history: list[tuple[int, int]], percent: float) -> None:
    share, seen = HedgeShare(percent), 0
    for first, items in history:
        share.deposit(first)
        seen += first
        decision = may_hedge(replace(LATE, items=items), QUIET, share, 11.0)
        assert isinstance(decision, Hedge) == (percent > 0.0 and share.allows(items))
        if isinstance(decision, Hedge):
            share.spend(items)
        assert share.hedged <= percent * seen + 1e-6
    assert str(share.hedged) in repr(share)


@given(
    st.builds(
        RunningAttempt,
        items=st.integers(0, 8),
        dispatched=st.just(10.0),
        deadline=st.floats(10.0, 12.0),
        p95_s=st.one_of(st.none(), st.floats(0.001, 1.0)),
        predicted_s=st.floats(0.0, 1.0),
        attempts=st.integers(1, 4),
        hedged=st.booleans(),
    ),
    st.builds(
        Surroundings,
        idempotent=st.booleans(),
        max_attempts=st.integers(1, 4),
        idle_slot=st.booleans(),
        waiting=st.booleans(),
        all_closed=st.booleans(),
        budget=st.floats(0.0, 10.0),
    ),
    st.floats(10.0, 12.0),
)
def test_looking_again_always_lies_ahead_and_a_hedge_can_still_arrive(
    attempt: RunningAttempt, around: Surroundings, now: float
) -> None:
    decision = may_hedge(attempt, around, rich(), now)
    if isinstance(decision, Later):
        assert decision.instant > now
    if isinstance(decision, Hedge):
        assert around.idempotent
        assert attempt.p95_s is not None
        assert now >= attempt.dispatched + attempt.p95_s
        assert now + attempt.predicted_s < attempt.deadline
