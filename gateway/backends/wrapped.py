"""A replica in front of another: what it is called and how busy it is comes from the one behind, and so does whatever a
batch says that the wrapping does not change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gateway.backends.interface import Batch, Failure, Replica, Success, Traits
from gateway.core.request import BatchInput, SequenceStep


class WrappedBatch:
    """Fits `backends.interface.Batch`: what a wrapping replica hands on in place of the batch it was given."""

    __slots__ = ("_batch", "inputs", "outputs", "replica", "rows")

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.inputs: Sequence[BatchInput] = batch.inputs
        self.outputs = batch.outputs
        self.rows = batch.rows
        self.replica: WrappedReplica | None = None
        """Who handed it over; set by `WrappedReplica.hand_over`."""

    @property
    def deadline(self) -> float:
        return self._batch.deadline

    @property
    def sequence(self) -> SequenceStep | None:
        return self._batch.sequence

    @property
    def parameters(self) -> Mapping[str, object]:
        return self._batch.parameters

    def done(self, outcome: Success | Failure, /) -> None:
        if self.replica is not None:
            self.replica.forget(self._batch)
        self._batch.done(self.translated(outcome) if isinstance(outcome, Success) else outcome)

    def translated(self, answer: Success) -> Success | Failure:
        """The answer to the batch behind, as one to the batch in front."""
        return answer


class WrappedReplica:
    """Everything of `backends.interface.Replica` but `execute`, which is why one is wrapped."""

    __slots__ = ("_replica", "_wrapped")

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._wrapped: dict[int, WrappedBatch] = {}
        """By identity of the batch in front: the one behind."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._replica!r}>"

    @property
    def name(self) -> str:
        return self._replica.name

    @property
    def traits(self) -> Traits:
        return self._replica.traits

    @property
    def available(self) -> bool:
        return self._replica.available

    @property
    def free_slots(self) -> int:
        return self._replica.free_slots

    @property
    def in_flight(self) -> int:
        return self._replica.in_flight

    @property
    def cause(self) -> str:
        """Why it is not available, in words; empty where the replica behind does not say."""
        return str(getattr(self._replica, "cause", ""))

    @property
    def url(self) -> str:
        """Where it is, for people; empty where the replica behind has no address."""
        return str(getattr(self._replica, "url", ""))

    def set_listener(self, changed: Callable[[], None], /) -> None:
        self._replica.set_listener(changed)

    def hand_over(self, batch: Batch, behind: WrappedBatch, timeout_s: float) -> None:
        """Execute `behind`, which stands for `batch`."""
        behind.replica = self
        self._wrapped[id(batch)] = behind
        self._replica.execute(behind, timeout_s)

    def cancel(self, batch: Batch, /) -> None:
        behind = self._wrapped.get(id(batch))
        if behind is not None:
            self._replica.cancel(behind)

    def forget(self, batch: Batch) -> None:
        self._wrapped.pop(id(batch), None)
