"""A batch on its way: its members, who executes it, and why it was sent. Fits `backends.interface.Batch`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from gateway.backends.interface import Replica
from gateway.core.batch import FinishedBatch
from gateway.core.batching import Reason
from gateway.core.fleet import Member
from gateway.core.outcome import Failure, Success
from gateway.core.request import NO_PARAMETERS, SETTLED, BatchInput, InferRequest, SequenceStep
from gateway.dispatcher_lanes import Lane
from gateway.errors import GatewayError


class Owner(Protocol):
    """Who asked for the batch and completes its members."""

    def batch_succeeded(self, members: list[InferRequest], batch: FinishedBatch) -> None: ...
    def batch_failed(self, members: list[InferRequest], error: GatewayError) -> None: ...
    def call_soon(self, callback: Callable[..., None], *arguments: object) -> object: ...
    def batch_returned(self) -> None:
        """A batch is over; those of its members who were not told anything wait in the lanes for another attempt."""


class Sender(Protocol):
    """Who sent the batch."""

    def batch_done(self, batch: RunningBatch, outcome: Success | Failure, /) -> None: ...


class RunningBatch:
    __slots__ = (
        "attempt", "backend", "cancelled", "deadline", "dispatched", "failed_twins", "inputs", "lane", "member",
        "members", "outputs", "over", "parameters", "place", "reason", "replica", "rows", "second", "sender",
        "sequence", "suspects", "twin",
    )  # fmt: skip

    def __init__(self, sender: Sender, members: list[InferRequest], rows: int, reason: Reason, member: Member) -> None:
        first = members[0]
        replica: Replica = member.replica
        self.sender = sender
        self.members = members
        self.rows = rows
        self.reason = reason
        self.member = member
        self.replica = replica
        self.backend = replica.name
        """Who executes it. The replica may move to another worker, and be named after it, while the batch runs."""
        self.outputs = first.outputs
        self.inputs: Sequence[BatchInput] = ()
        self.dispatched = 0.0
        self.deadline = math.inf
        """The latest of its members'."""
        self.sequence: SequenceStep | None = None
        self.parameters: Mapping[str, object] = NO_PARAMETERS
        self.attempt = 0
        self.lane: Lane | None = None
        """Where its members waited; None: in the queue."""
        self.place: object = None
        """What its lane knows its group by."""
        self.suspects: Member | None = None
        """Who is to blame if these rows succeed here."""
        self.twin: RunningBatch | None = None
        """The same members, as far as they were alive, on another replica, while both are under way."""
        self.failed_twins: tuple[tuple[RunningBatch, Failure], ...] = ()
        """Other attempts for the same members that failed meanwhile, and how."""
        self.second = False
        """It was sent because its twin is late."""
        self.over = False
        """Its twin was first: whatever it comes to is told nobody."""
        self.cancelled = False

    def done(self, outcome: Success | Failure, /) -> None:
        self.sender.batch_done(self, outcome)

    @property
    def isolated(self) -> bool:
        """Whether its members run by themselves: not even a rerun mixes them with others."""
        return self.lane is Lane.ISOLATED or self.lane is Lane.QUARANTINE

    @property
    def alive(self) -> list[InferRequest]:
        """The members who still wait for an answer."""
        return [member for member in self.members if member.state != SETTLED]

    def __repr__(self) -> str:
        where = "queue" if self.lane is None else self.lane.value
        return f"<RunningBatch {len(self.members)} requests, {self.rows} rows from the {where} on {self.backend}>"
