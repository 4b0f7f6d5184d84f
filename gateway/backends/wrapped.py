"""A replica in front of another: what it is called and how busy it is comes from the one behind."""

from __future__ import annotations

from collections.abc import Callable

from gateway.backends.interface import Replica


class WrappedReplica:
    """Everything of `backends.interface.Replica` but `execute`, which is why one is wrapped."""

    __slots__ = ("_replica",)

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._replica!r}>"

    @property
    def name(self) -> str:
        return self._replica.name

    @property
    def available(self) -> bool:
        return self._replica.available

    @property
    def free_slots(self) -> int:
        return self._replica.free_slots

    @property
    def in_flight(self) -> int:
        return self._replica.in_flight

    def set_listener(self, changed: Callable[[], None], /) -> None:
        self._replica.set_listener(changed)
