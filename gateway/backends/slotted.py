"""A replica whose batches have fixed rows: each sequence keeps the row it was given, and the model is told which rows
hold a request (Triton's `direct` strategy with a READY control).

Rules: the batch has as many rows as reach to the highest one that a sequence has. A row without a request holds zeros,
empty strings and the controls' false values, and nobody sees its answer. The rows of the answer are brought back into
the order of the batch that was handed over, so nobody else has to know of slots. An answer with another number of rows
is broken.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.backends.interface import Batch, Failure, FailureKind, Replica, Success
from gateway.backends.wrapped import WrappedBatch, WrappedReplica
from gateway.core.assembly import AssemblyError, join_outputs, part_nbytes
from gateway.core.request import BatchInput, InputTensor
from gateway.core.sequence_tensors import SlotFlag, zeros
from gateway.core.tensor import element_count


class Slots:
    """What the rows of a lane's batches look like."""

    def __init__(self, ready_place: int, idle_row: dict[int, InputTensor], highest: Callable[[], int]) -> None:
        """`ready_place`: index of the input whose parts are `SlotFlag`s. `idle_row`: by input index, where zeros will
        not do. `highest`: the highest row that somebody has now."""
        self.ready_place = ready_place
        self.idle_row = idle_row
        self.highest = highest


class _SlottedBatch(WrappedBatch):
    """A batch whose rows stand in their slots."""

    __slots__ = ("_rows",)

    def __init__(self, batch: Batch, slots: Slots) -> None:
        """Raises KeyError, AttributeError, ValueError: the batch is not one of rows with slots of their own."""
        super().__init__(batch)
        flags = next(given for given in batch.inputs if given.index == slots.ready_place)
        self._rows = [part.slot for part in flags.parts if isinstance(part, SlotFlag)]
        if len(self._rows) != batch.rows or len(set(self._rows)) != batch.rows:
            raise ValueError(f"{batch.rows} rows in the slots {self._rows}")
        self.rows = max(slots.highest(), *self._rows) + 1
        self.inputs = [self._spread(given, slots.idle_row.get(given.index)) for given in batch.inputs]

    def _spread(self, given: BatchInput, idle: InputTensor | None) -> BatchInput:
        shape = (1, *given.shape[1:])
        empty = idle or InputTensor(given.datatype, shape, None, zeros(given.datatype, element_count(shape)))
        parts = [empty] * self.rows
        for row, part in zip(self._rows, given.parts, strict=True):
            parts[row] = part
        nbytes = given.nbytes + (self.rows - len(self._rows)) * part_nbytes(empty)
        return BatchInput(given.index, given.datatype, (self.rows, *given.shape[1:]), nbytes, parts)

    def translated(self, answer: Success) -> Success | Failure:
        whole = dict(enumerate(answer.outputs))
        for output in whole.values():
            if output.shape[:1] != (self.rows,):
                text = f"output '{output.name}' has shape {list(output.shape)} for a batch of {self.rows} rows"
                return Failure(FailureKind.BROKEN, text)
        try:
            own = join_outputs([(whole, row, 1) for row in self._rows])
        except (AssemblyError, ValueError) as error:
            return Failure(FailureKind.BROKEN, f"the backend's answer failed its checks: {error}")
        return Success([*own.values()], answer.compute_input_ns, answer.compute_infer_ns, answer.compute_output_ns)


class SlottedReplica(WrappedReplica):
    """Fits `backends.interface.Replica`."""

    __slots__ = ("_slots",)

    def __init__(self, replica: Replica, slots: Slots) -> None:
        super().__init__(replica)
        self._slots = slots

    def execute(self, batch: Batch, timeout_s: float, /) -> None:
        self.hand_over(batch, _SlottedBatch(batch, self._slots), timeout_s)
