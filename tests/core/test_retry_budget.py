"""The retry budget against its own definition, written out event by event."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.retry_budget import MIN_RESERVE, TTL_S, RetryBudget


def drain(budget: RetryBudget, now: float) -> int:
    items = 0
    while items < 10_000 and budget.withdraw(1, now):
        items += 1
    return items


def test_one_death_is_affordable_from_the_start() -> None:
    budget = RetryBudget(0.1, max_batch_rows=64, slots=8)
    assert budget.withdraw(2 * 64 * 8, 0.0)
    assert not budget.withdraw(1, 0.0)
    assert RetryBudget(0.1, 1).withdraw(int(MIN_RESERVE), 0.0)


def test_the_reserve_comes_back_within_ten_seconds_and_no_further() -> None:
    budget = RetryBudget(0.1, 1)
    assert drain(budget, 0.0) == 100
    assert drain(budget, 5.0) == 50
    assert drain(budget, 105.0) == 100


def test_a_tenth_of_what_is_executed_may_be_executed_again() -> None:
    budget = RetryBudget(0.1, 1)
    drain(budget, 0.0)
    for _ in range(500):
        budget.deposit(2, 0.0)
    assert budget.available(0.0) == pytest.approx(100.0)
    assert drain(budget, 0.0) == 100


@pytest.mark.parametrize(("later", "left"), [(8.9, 100), (10.0, 0), (11.0, 0), (1e9, 0)])
def test_credit_expires(later: float, left: int) -> None:
    budget = RetryBudget(0.1, 1)
    budget.deposit(1000, 0.5)
    assert budget.statistics(0.5 + later).credit == pytest.approx(left)


def test_old_credit_goes_first() -> None:
    budget = RetryBudget(0.1, 1)
    budget.deposit(100, 0.5)
    budget.deposit(100, 8.5)
    assert budget.withdraw(10, 8.6)
    assert budget.statistics(11.0).credit == pytest.approx(10.0), "the newer ten are still there"


def test_all_or_nothing() -> None:
    budget = RetryBudget(0.1, 1)
    assert not budget.withdraw(101, 0.0)
    assert budget.withdraw(100, 0.0)
    seen = budget.statistics(0.0)
    assert (seen.withdrawn, seen.refused) == (100, 101)
    assert seen.available == seen.reserve == 0.0


def test_more_replicas_make_a_larger_reserve() -> None:
    budget = RetryBudget(0.1, 32, 1)
    drain(budget, 0.0)
    budget.resize(32, 8)
    assert drain(budget, 0.0) == 2 * 32 * 8 - 100
    budget.resize(32, 1)
    assert budget.available(0.0) == 0.0
    assert budget.available(20.0) == 100.0


def test_nothing_is_free_where_the_ratio_is_zero_except_the_reserve() -> None:
    budget = RetryBudget(0.0, 1)
    budget.deposit(10_000, 0.0)
    assert drain(budget, 0.0) == 100


moves = st.lists(
    st.tuples(st.sampled_from(["deposit", "withdraw"]), st.integers(1, 300), st.floats(0.0, 4.0)), max_size=120
)


@settings(max_examples=200, deadline=None)
@given(moves, st.sampled_from([0.0, 0.1, 0.2, 1.0]), st.integers(1, 64))
def test_no_window_pays_for_more_than_its_share_and_the_reserve(
    history: list[tuple[str, int, float]], ratio: float, batch: int
) -> None:
    budget = RetryBudget(ratio, batch)
    reserve = max(100, 2 * batch)
    deposits: list[tuple[float, int]] = []
    withdrawals: list[tuple[float, int]] = []
    now = 0.0
    for move, items, passed in history:
        now += passed
        if move == "deposit":
            budget.deposit(items, now)
            deposits.append((now, items))
        else:
            afford = budget.available(now)
            granted = budget.withdraw(items, now)
            assert granted == (items <= afford + 1e-9)
            if granted:
                withdrawals.append((now, items))
        assert 0.0 <= budget.statistics(now).reserve <= reserve
        assert budget.statistics(now).credit >= -1e-9
    for begin in {at for at, _ in withdrawals}:
        for end in {at for at, _ in withdrawals if at >= begin}:
            spent = sum(items for at, items in withdrawals if begin <= at <= end)
            share = ratio * sum(items for at, items in deposits if begin - TTL_S <= at <= end)
            assert spent <= share + reserve * (1 + (end - begin) / TTL_S) + 1e-6


@given(st.lists(st.floats(0.0, 1e6), max_size=40))
def test_a_clock_that_goes_back_gives_nothing_away(instants: list[float]) -> None:
    budget = RetryBudget(0.0, 1)
    budget.available(1e6)
    drain(budget, 1e6)
    for now in instants:
        budget.deposit(1, now)
        assert not budget.withdraw(1, now)
    assert "of 100" in repr(budget)


def test_nor_does_it_take_anything_away() -> None:
    budget = RetryBudget(0.1, 1)
    budget.deposit(500, 100.0)
    assert budget.available(100.0) == budget.available(3.0) == budget.available(100.0) == 150.0
