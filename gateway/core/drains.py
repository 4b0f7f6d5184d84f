"""What operators took out of use: which backends get no batches, whatever replicas stand for them at the moment.

Rules, pure:
  * an order names a backend, a server or an address, for every model or for one; the latest one that fits decides;
  * an order holds for replicas that come later: those that a reload, another version or another address brings;
  * only another order and `keep` end one. Invariant: of a name and a model there is at most one order, so that what is
    kept is bounded by the names that were ever drained and still mean something.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Order:
    """One thing that somebody wanted."""

    name: str
    model: str | None
    """None: every model, those included that come later."""
    drained: bool
    """False: back in use."""


class Drains:
    """All orders that still mean something."""

    def __init__(self, orders: Iterable[Order] = ()) -> None:
        """`orders`: the earliest first, as another's `orders`."""
        self._orders: list[Order] = []
        for order in orders:
            self.give(order)

    @property
    def orders(self) -> tuple[Order, ...]:
        """The earliest first."""
        return tuple(self._orders)

    def give(self, order: Order) -> None:
        """It is the latest now."""
        self._orders = [
            former for former in self._orders if former.name != order.name or order.model not in (None, former.model)
        ]
        self._orders.append(order)
        self._drop_pointless()

    def drained(self, model: str, names: Container[str]) -> bool:
        """Whether the backend of `model` that goes by all of `names` gets no batches."""
        for order in reversed(self._orders):
            if order.name in names and order.model in (None, model):
                return order.drained
        return False

    def keep(self, exists: Callable[[str, str | None], bool]) -> list[Order]:
        """Forget the orders about what does not exist, by name and model (None: any); returns those of them that had
        taken something out of use."""
        gone = [order for order in self._orders if not exists(order.name, order.model)]
        self._orders = [order for order in self._orders if order not in gone]
        self._drop_pointless()
        return [order for order in gone if order.drained]

    def _drop_pointless(self) -> None:
        """What is put back before anything was taken out."""
        while self._orders and not self._orders[0].drained:
            del self._orders[0]

    def __repr__(self) -> str:
        return f"<Drains {len(self._orders)} orders>"
