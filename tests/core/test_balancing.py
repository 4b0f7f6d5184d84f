from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.balancing import STRATEGIES, rendezvous, take_turn, two_of
from gateway.core.breaker import BREAKER, Breaker
from gateway.core.member import Member
from tests.core.fleet_bench import Middle, Place

NOW = 1000.0


def member(name: str, weight: float = 1.0, batch_s: float = 0.0) -> Member:
    it = Member(Place(name, weight=weight), Breaker(BREAKER, Middle(), NOW))
    for _ in range(50 if batch_s else 0):
        it.time.observe(1, batch_s, NOW)
    return it


def shares(strategy: str, members: list[Member], picks: int = 6000) -> dict[str, float]:
    pick, rng = STRATEGIES[strategy], random.Random(7)  # type: ignore[index]
    counts: Counter[str] = Counter()
    for _ in range(picks):
        chosen = pick(members, 1, NOW, rng)
        counts[chosen.name] += 1
        if strategy == "round_robin":
            take_turn(members, chosen)
    return {it.name: counts[it.name] / picks for it in members}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equals_share_equally(strategy: str) -> None:
    found = shares(strategy, [member(name, batch_s=0.01) for name in "abc"])
    assert all(abs(share - 1 / 3) < 0.03 for share in found.values()), found


@pytest.mark.parametrize("strategy", ["pull", "least_rows", "round_robin", "hash"])
def test_weights_are_respected_among_idle_equals(strategy: str) -> None:
    found = shares(strategy, [member("a", 3.0, 0.01), member("b", 1.0, 0.01)])
    assert abs(found["a"] - 0.75) < 0.03, found


def test_turns_are_smooth() -> None:
    members, rng = [member("a", 5.0), member("b"), member("c")], Middle()
    pick = STRATEGIES["round_robin"]
    found = ""
    for _ in range(14):
        chosen = pick(members, 1, NOW, rng)
        assert pick(members, 1, NOW, rng) is chosen, "asking is no turn"
        take_turn(members, chosen)
        found += chosen.name
    assert found == "aabacaa" * 2


def test_pull_takes_the_one_expected_back_first() -> None:
    fast, slow = member("fast", batch_s=0.003), member("slow", batch_s=0.009)
    rng, pull = random.Random(1), STRATEGIES["pull"]
    assert {pull([slow, fast], 1, NOW, rng).name for _ in range(50)} == {"fast"}
    fast.batches = 3
    assert {pull([slow, fast], 1, NOW, rng).name for _ in range(50)} == {"slow"}


def test_pull_shares_batches_in_flight_by_weight() -> None:
    members = [member("a", 2.0, 0.01), member("b", 1.0, 0.01)]
    rng, pull = random.Random(1), STRATEGIES["pull"]
    for _ in range(9):
        pull(members, 1, NOW, rng).batches += 1
    assert 5 <= members[0].batches <= 7


def test_pull_shuns_whoever_fails_however_fast() -> None:
    good, bad = member("good", batch_s=0.01), member("bad", batch_s=0.0005)
    bad.time.failed(NOW)
    assert shares("pull", [good, bad])["bad"] == 0.0
    assert shares("p2c_ewma", [good, bad])["bad"] == 0.0


def test_p2c_takes_the_better_of_two() -> None:
    found = shares("p2c_ewma", [member("a", batch_s=0.01), member("b", batch_s=0.02), member("c", batch_s=0.03)])
    assert abs(found["a"] - 2 / 3) < 0.03
    assert found["c"] == 0.0


def test_least_rows_counts_rows_not_batches() -> None:
    one, many = member("one"), member("many")
    one.rows_in_flight, many.rows_in_flight = 32, 4
    many.replica.in_flight = 4  # type: ignore[misc]
    assert shares("least_rows", [one, many]) == {"one": 0.0, "many": 1.0}


def test_two_are_always_two_and_every_pair_is_as_likely() -> None:
    rng = random.Random(2)
    pairs = Counter(tuple(sorted(two_of("abcd", rng))) for _ in range(12_000))  # type: ignore[type-var]
    assert len(pairs) == 6
    assert all(abs(count - 2000) < 200 for count in pairs.values())


NAMES = st.lists(st.text(st.characters(codec="ascii"), min_size=1, max_size=8), min_size=2, max_size=9, unique=True)


@given(NAMES, st.data(), st.lists(st.integers(), min_size=1, max_size=30))
def test_if_one_goes_only_its_own_moves(names: list[str], data: st.DataObject, affinities: list[int]) -> None:
    members = [member(name, data.draw(st.sampled_from([0.5, 1.0, 4.0]))) for name in names]
    gone = data.draw(st.sampled_from(members))
    rest = [it for it in members if it is not gone]
    for affinity in affinities:
        before, after = rendezvous(members, affinity), rendezvous(rest, affinity)
        assert after is not None
        assert before is after or before is gone


def test_rendezvous_spreads_by_weight() -> None:
    members = [member("a", 1.0), member("b", 2.0), member("c", 1.0)]
    found = Counter(it.name for affinity in range(8000) if (it := rendezvous(members, affinity)))
    assert abs(found["b"] / 8000 - 0.5) < 0.03
    assert abs(found["a"] / 8000 - 0.25) < 0.03
    assert rendezvous([], 5) is None
