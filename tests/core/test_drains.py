"""Which backends are out of use, by the orders of operators."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.core.drains import Drains, Order

NAMES = ("blue", "green", "a:8000", "onnx-1")
MODELS = ("m", "n")
orders = st.builds(Order, st.sampled_from(NAMES), st.sampled_from((None, *MODELS)), st.booleans())


def test_an_order_holds_for_every_model_or_for_one_and_for_those_that_come_later() -> None:
    drains = Drains([Order("blue", None, drained=True), Order("green", "m", drained=True)])
    assert drains.drained("m", {"blue"})
    assert drains.drained("a model that comes later", {"x", "blue"})
    assert drains.drained("m", {"green"})
    assert not drains.drained("n", {"green"})
    assert not drains.drained("m", {"other"})


def test_the_latest_order_decides_by_whichever_name_it_was_given() -> None:
    drains = Drains([Order("a:8000", None, drained=True)])
    drains.give(Order("blue", "m", drained=False))
    assert not drains.drained("m", {"blue", "a:8000"})
    assert drains.drained("n", {"blue", "a:8000"})
    assert drains.drained("m", {"green", "a:8000"})
    drains.give(Order("a:8000", None, drained=True))
    assert drains.drained("m", {"blue", "a:8000"})
    drains.give(Order("a:8000", None, drained=False))
    assert not drains.drained("n", {"blue", "a:8000"})
    assert drains.orders == ()


def test_what_does_not_exist_any_more_is_forgotten_and_told() -> None:
    drains = Drains([Order("blue", None, drained=True), Order("green", None, drained=True)])
    drains.give(Order("blue", "m", drained=False))
    assert drains.keep(lambda name, _: name == "green") == [Order("blue", None, drained=True)]
    assert not drains.drained("n", {"blue"})
    assert drains.drained("n", {"green"})
    assert drains.keep(lambda name, model: True) == []


@given(st.lists(orders, max_size=30), st.frozensets(st.sampled_from(NAMES)), st.sampled_from(MODELS))
def test_what_is_kept_of_any_history_means_what_all_of_it_means(
    history: list[Order], names: frozenset[str], model: str
) -> None:
    drains = Drains(history)
    fitting = [order for order in history if order.name in names and order.model in (None, model)]
    assert drains.drained(model, names) is (bool(fitting) and fitting[-1].drained)
    assert len(drains.orders) <= len(NAMES) * (1 + len(MODELS))
    assert Drains(drains.orders).drained(model, names) is drains.drained(model, names)
