"""Answers in the order in which their requests arrived (`preserve_ordering`, wire notes §5.1): who is told when.

Rules: an answer is held back until everybody who came earlier has been told. An error is told at once and gives up its
place, whatever it is: a timeout that waits for its turn would be no timeout, and nobody waits behind a caller who left.
Invariants: everyone who entered is told exactly once; among those who are told an answer, the order is arrival; whoever
came first is never held back, so nobody waits longer than the deadlines of those before him.
"""

from __future__ import annotations

from collections import OrderedDict

from gateway.core.request import InferRequest, Settle

Told = tuple[InferRequest, Settle]


class ArrivalOrder:
    """Requests that entered and were not told. All methods are amortised O(1)."""

    __slots__ = ("_inside", "held", "nbytes", "rows")

    def __init__(self) -> None:
        self._inside: OrderedDict[InferRequest, Settle] = OrderedDict()
        self.held: set[InferRequest] = set()
        """Those whose answer is there, and not their turn."""
        self.rows = 0
        """Of those held."""
        self.nbytes = 0
        """Inputs of those held."""

    def enter(self, request: InferRequest) -> None:
        """A new request, behind all others; its `settle` must be the caller's own."""
        self._inside[request] = request.settle

    def settled(self, request: InferRequest) -> list[Told]:
        """`request` has its answer or error: who is to be told now, in this order, and how."""
        if request.error is not None:
            return [(request, self._inside.pop(request)), *self._whose_turn_it_is()]
        self.held.add(request)
        self.rows += request.rows
        self.nbytes += request.nbytes
        return self._whose_turn_it_is()

    def leave(self, request: InferRequest) -> list[Told]:
        """The caller of `request` left; if its answer is held, it is let go at once."""
        if request not in self.held:
            return []
        self._let_go(request)
        return [(request, self._inside.pop(request)), *self._whose_turn_it_is()]

    def _whose_turn_it_is(self) -> list[Told]:
        told = []
        while self._inside:
            first = next(iter(self._inside))
            if first not in self.held:
                break
            self._let_go(first)
            told.append((first, self._inside.pop(first)))
        return told

    def _let_go(self, request: InferRequest) -> None:
        self.held.remove(request)
        self.rows -= request.rows
        self.nbytes -= request.nbytes

    def __len__(self) -> int:
        return len(self._inside)

    def __repr__(self) -> str:
        return f"<ArrivalOrder {len(self._inside)} inside, {len(self.held)} held>"
