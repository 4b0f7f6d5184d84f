"""Which replica gets the next batch: late binding, least in flight, ties in turn.

A batch is only bound to a replica that can take it now; work never waits for a "better" busy one (resilience
notes §2: most of the gain comes from not committing early).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Candidate(Protocol):
    """What routing looks at; `gateway.backends.interface.Replica` fits."""

    @property
    def name(self) -> str: ...
    @property
    def free_slots(self) -> int: ...
    @property
    def in_flight(self) -> int: ...


C = TypeVar("C", bound=Candidate)


def route(replicas: Sequence[C], turn: int, avoid: str | None = None) -> C | None:
    """The replica with a free slot and the fewest batches in flight; ties go to the first from place `turn` on.

    `avoid` names a replica that is only taken if no other has a free slot. None: nobody can take a batch.
    """
    best: C | None = None
    best_load = (True, 0)
    count = len(replicas)
    for step in range(count):
        replica = replicas[(turn + step) % count]
        if replica.free_slots <= 0:
            continue
        load = (replica.name == avoid, replica.in_flight)
        if best is None or load < best_load:
            best, best_load = replica, load
    return best
