from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from gateway.core.routing import route


@dataclass(frozen=True)
class Place:
    name: str
    free_slots: int
    in_flight: int


PLACES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=6).map(
    lambda pairs: [Place(f"r{index}", free, busy) for index, (free, busy) in enumerate(pairs)]
)


@given(PLACES, st.integers(0, 100), st.integers(0, 6))
def test_free_first_then_not_avoided_then_least_in_flight(places: list[Place], turn: int, avoided: int) -> None:
    avoid = f"r{avoided}"
    chosen = route(places, turn, avoid)
    free = [place for place in places if place.free_slots > 0]
    if not free:
        assert chosen is None
        return
    assert chosen in free
    others = [place for place in free if place.name != avoid] or free
    assert chosen in others
    assert chosen.in_flight == min(place.in_flight for place in others)


def test_ties_are_taken_in_turn() -> None:
    places = [Place(name, 1, 0) for name in "abc"]
    chosen = [route(places, turn) for turn in range(30)]
    assert Counter(place.name for place in chosen if place) == {"a": 10, "b": 10, "c": 10}


def test_nobody_free_means_nobody() -> None:
    assert route([], 3) is None
    assert route([Place("a", 0, 1)], 0) is None


def test_the_avoided_one_is_taken_rather_than_none() -> None:
    avoided, busy = Place("a", 1, 0), Place("b", 0, 1)
    assert route([avoided, busy], 0, "a") is avoided
