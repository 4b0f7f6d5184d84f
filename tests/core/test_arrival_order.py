from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.arrival_order import ArrivalOrder, Told
from gateway.core.request import InferRequest
from tests.scripted import request_of

STEPS = st.lists(
    st.one_of(
        st.just(("enter", 0)),
        st.tuples(st.sampled_from(["answer", "fail", "leave"]), st.integers(0, 9)),
    ),
    max_size=60,
)


class House:
    """Who entered, who was settled, who was told."""

    def __init__(self) -> None:
        self.order = ArrivalOrder()
        self.entered: list[InferRequest] = []
        self.settled: list[InferRequest] = []
        self.told: list[InferRequest] = []

    def enter(self) -> InferRequest:
        request = request_of([1, 2])
        request.settle = self.told.append
        self.order.enter(request)
        self.entered.append(request)
        return request

    def settle(self, request: InferRequest, error: Exception | None = None) -> None:
        request.error = error
        self.settled.append(request)
        self.tell(self.order.settled(request))

    def tell(self, told: list[Told]) -> None:
        for request, settle in told:
            settle(request)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_answers_keep_the_order_and_everyone_is_told_once(steps: list[tuple[str, int]]) -> None:
    house = House()
    left: list[InferRequest] = []
    for what, index in steps:
        running = [request for request in house.entered if request not in house.settled]
        if what == "enter":
            house.enter()
        elif what == "leave":
            held = sorted(house.order.held, key=house.entered.index)
            if held:
                left.append(held[index % len(held)])
                house.tell(house.order.leave(left[-1]))
        elif running:
            house.settle(running[index % len(running)], ValueError() if what == "fail" else None)
        _check(house, left)
    for request in [request for request in house.entered if request not in house.settled]:
        house.settle(request)
    _check(house, left)
    assert sorted(map(id, house.told)) == sorted(map(id, house.entered))
    assert (len(house.order), house.order.rows, house.order.nbytes) == (0, 0, 0)


def _check(house: House, left: list[InferRequest]) -> None:
    answered = [request for request in house.told if request.error is None and request not in left]
    assert answered == sorted(answered, key=house.entered.index)
    assert len(house.told) == len(set(house.told))
    failed = [request for request in house.settled if request.error is not None]
    assert set(failed) <= set(house.told)
    # Nobody is held back whom nobody is before.
    still_inside = [request for request in house.entered if request not in house.told]
    assert not still_inside or still_inside[0] not in house.order.held
    assert house.order.rows == sum(request.rows for request in house.order.held)
    assert house.order.nbytes == sum(request.nbytes for request in house.order.held)


def test_an_answer_waits_for_those_before_it() -> None:
    house = House()
    first, second, third = house.enter(), house.enter(), house.enter()
    house.settle(third)
    house.settle(second)
    assert house.told == []
    assert repr(house.order) == "<ArrivalOrder 3 inside, 2 held>"
    house.settle(first)
    assert house.told == [first, second, third]


def test_an_error_waits_for_nobody_and_gives_up_its_place() -> None:
    house = House()
    first, second, third = house.enter(), house.enter(), house.enter()
    house.settle(second, ValueError())
    assert house.told == [second]
    house.settle(third)
    house.settle(first, ValueError())
    assert house.told == [second, first, third]


def test_whose_answer_is_not_there_yet_cannot_be_let_go() -> None:
    house = House()
    first, second = house.enter(), house.enter()
    assert house.order.leave(second) == []
    house.settle(second)
    house.tell(house.order.leave(second))
    assert house.told == [second]
    house.settle(first)
    assert house.told == [second, first]
