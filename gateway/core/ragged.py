"""Ragged batches: rows of different shapes in one run, and the tensors that tell a model where each of them lies.

A ragged input (`allow_ragged_batch`) reaches the model flat: the elements of all requests, one request behind the
other, shape [elements]. What describes it is made here, once a batch (`batch_input`), from the shapes as the model
has them (after a `reshape`). The first four kinds count per *request*, a batch dimension and all; the last two per
*row*, without it. For two requests of shapes [2,3] and [1,4]:

    BATCH_ELEMENT_COUNT                        [2]     6 4
    BATCH_ACCUMULATED_ELEMENT_COUNT            [2]     6 10
    BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO  [3]     0 6 10
    BATCH_MAX_ELEMENT_COUNT_AS_SHAPE           [6]     the shape is the message; the data are zeros
    BATCH_ITEM_SHAPE                           [3,1]   3 3 4
    BATCH_ITEM_SHAPE_FLATTEN                   [3]     3 3 4

An output under `batch_output` comes back flat likewise, whatever shape the model gives it, and is cut by the shapes of
its source: its variable dims are the source's, place by place. Every other output has the batch's rows, as ever.

Invariant: an output is only cut when it holds exactly the elements that all members together must get.
A model with nothing of this has no `Ragged`, and pays for one test a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from gateway.core import assembly
from gateway.core.assembly import AssemblyError
from gateway.core.batch import Execution, FinishedBatch
from gateway.core.model import ModelSpec, TensorSpec
from gateway.core.request import BatchInput, InferRequest, InputTensor, OutputTensor
from gateway.core.reshape import reshaped
from gateway.core.scheduling import BatchInputTensor, Scheduling
from gateway.core.tensor import element_count, unpack_bytes

Shape = tuple[int, ...]
PER_ROW = frozenset({"BATCH_ITEM_SHAPE", "BATCH_ITEM_SHAPE_FLATTEN"})
"""Kinds that describe rows; the others describe requests."""


def asked_for(scheduling: Scheduling, inputs: Sequence[TensorSpec]) -> bool:
    """Whether a model has anything that this file is about."""
    return bool(scheduling.batch_inputs or scheduling.batch_outputs) or any(tensor.ragged for tensor in inputs)


def agreeing_dims(
    inputs: Sequence[TensorSpec], shapes: Sequence[Shape | None], batched: bool
) -> tuple[Shape | None, ...]:
    """What requests must have in common to share a batch, for each input: the dims after the batch dimension, nothing
    of a ragged one's, None where the input is absent. Part of the batch key."""
    skip = 1 if batched else 0
    return tuple(
        None if shape is None else () if tensor.ragged else shape[skip:]
        for tensor, shape in zip(inputs, shapes, strict=True)
    )


class _Scattered(NamedTuple):
    """An output that is cut by the shape of an input."""

    source: int
    """Place of that input."""
    dims: Shape


class Ragged:
    """Batches of one model that has ragged inputs, `batch_input` or `batch_output`. It batches: rows come first."""

    def __init__(self, spec: ModelSpec) -> None:
        """Raises KeyError: a source or a target is not in the signature."""
        self._spec = spec
        self._inputs = {tensor.name: place for place, tensor in enumerate(spec.inputs)}
        outputs = {tensor.name: place for place, tensor in enumerate(spec.outputs)}
        self._made = [(made, self._inputs[made.source_inputs[0]]) for made in spec.scheduling.batch_inputs]
        self._per_request = any(made.kind not in PER_ROW for made, _ in self._made)
        self._scattered = {
            outputs[name]: _Scattered(self._inputs[scatter.source_inputs[0]], spec.outputs[outputs[name]].dims)
            for scatter in spec.scheduling.batch_outputs
            for name in scatter.target_names
        }
        self.scattered = frozenset(self._scattered)
        """Places of the outputs that are cut by an input's shape."""

    @classmethod
    def of(cls, spec: ModelSpec) -> Ragged | None:
        """None: the model has nothing of this."""
        return cls(spec) if asked_for(spec.scheduling, spec.inputs) else None

    # -- on the way in -------------------------------------------------------------------------------------------

    def concat(self, members: Sequence[InferRequest], rows: int) -> list[BatchInput]:
        """The batch's inputs, still in parts, ragged ones flat. What is made for the batch comes last: see `made`."""
        inputs = assembly.concat(list(members), rows, batched=True)
        for given in inputs:
            if self._spec.inputs[given.index].ragged:
                given.shape = (sum([element_count(part.shape) for part in given.parts]),)
                given.nbytes = sum(map(assembly.part_nbytes, given.parts))
        return inputs

    def model_shape(self, place: int, shape: Shape) -> Shape:
        """`shape` of one request's input, with its rows, as the model has it.

        Raises:
            ValueError: it does not fit the served dims.
        """
        tensor = self._spec.inputs[place]
        return shape if tensor.reshape is None else (shape[0], *reshaped(shape[1:], tensor.dims, tensor.reshape))

    def made(self, shapes: Mapping[int, Sequence[Shape]]) -> list[tuple[str, InputTensor]]:
        """The tensors that describe a batch, by name. `shapes`: by input, each member's, as clients see them.

        Raises:
            KeyError: an input that one of them describes is not in the batch.
            OverflowError: more elements than an INT32 counts.
        """
        found = []
        for made, source in self._made:
            tensor = describe(made, [self.model_shape(source, shape) for shape in shapes[source]])
            found += [(name, tensor) for name in made.target_names]
        return found

    # -- on the way back -----------------------------------------------------------------------------------------

    def check_outputs(
        self, members: Sequence[InferRequest], wanted: Shape, rows: int, outputs: list[OutputTensor]
    ) -> None:
        """Like `assembly.check_outputs`, which this one includes.

        Raises:
            AssemblyError: it is not the batch's answer.
        """
        try:
            assembly.check_outputs(self._spec, wanted, rows, outputs, self.scattered)
        except AssemblyError as error:
            if self._per_request and rows > len(members):
                raise AssemblyError(
                    f"{error}; its batch_input counts requests, not rows: send one row in each"
                ) from None
            raise
        for place, output in zip(wanted, outputs, strict=True):
            if place not in self._scattered:
                continue
            due = sum([element_count(self._cut_shape(place, member)) for member in members])
            if element_count(output.shape) != due:
                source = self._spec.inputs[self._scattered[place].source].name
                raise AssemblyError(
                    f"output '{output.name}' has {element_count(output.shape)} elements, where the shapes of input "
                    f"'{source}' make {due}"
                )

    def answers(self, members: Sequence[InferRequest], batch: FinishedBatch) -> dict[int, FinishedBatch] | None:
        """For each member, by its first row, a batch of its own with its part of the outputs, which passed
        `check_outputs`; None where plain rows will do."""
        if self.scattered.isdisjoint(batch.outputs):
            return None
        executed = Execution(batch.backend, batch.attempt, batch.batch_id, batch.rows, batch.remote)
        found, row = {}, 0
        for member, outputs in zip(members, self.cut(members, batch.outputs), strict=True):
            own = FinishedBatch(
                batch.batch_id, member.rows, outputs, batch.backend, batch.attempt, batch.dispatched, batch.finished,
                batch.reason, (batch.input_ns, batch.infer_ns, batch.output_ns),
            )  # fmt: skip
            own.parts = [(executed, row)]
            own.remote = batch.remote
            found[row] = own
            row += member.rows
        return found

    def cut(
        self, members: Sequence[InferRequest], outputs: Mapping[int, OutputTensor]
    ) -> list[dict[int, OutputTensor]]:
        """Checked outputs of a batch → each member's own."""
        found: list[dict[int, OutputTensor]] = [{} for _ in members]
        for place, output in outputs.items():
            if place in self._scattered:
                pieces = _scatter(output, [self._cut_shape(place, member) for member in members])
            else:
                starts = accumulate([member.rows for member in members], initial=0)
                pieces = [
                    assembly.slice_rows(output, row, member.rows) for row, member in zip(starts, members, strict=False)
                ]
            for own, piece in zip(found, pieces, strict=True):
                own[place] = piece
        return found

    def _cut_shape(self, place: int, member: InferRequest) -> Shape:
        """Shape of one member's part of a scattered output."""
        scattered = self._scattered[place]
        tensor = member.inputs[scattered.source]
        if tensor is None:
            raise AssemblyError(f"input '{self._spec.inputs[scattered.source].name}' is absent")
        shape = self.model_shape(scattered.source, tensor.shape)
        return (shape[0], *[shape[1 + at] if dim == -1 else dim for at, dim in enumerate(scattered.dims)])


def describe(made: BatchInputTensor, shapes: Sequence[Shape]) -> InputTensor:
    """One tensor about a batch. `shapes`: each request's, batch dimension first.

    Raises:
        OverflowError: more elements than an INT32 counts.
    """
    kind = made.kind
    if kind in PER_ROW:
        values = [size for shape in shapes for _ in range(shape[0]) for size in shape[1:]]
        rows = sum([shape[0] for shape in shapes])
        of = (rows, len(shapes[0]) - 1) if kind == "BATCH_ITEM_SHAPE" else (len(values),)
        return _tensor(made, values, of)
    counts = [element_count(shape) for shape in shapes]
    if kind == "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE":
        most = max(counts)
        return InputTensor(made.datatype, (most,), None, bytes(most * made.datatype.itemsize))
    if kind != "BATCH_ELEMENT_COUNT":
        counts = list(accumulate(counts, initial=0 if kind.endswith("_WITH_ZERO") else None))
    return _tensor(made, counts, (len(counts),))


def _tensor(made: BatchInputTensor, values: list[int], shape: Shape) -> InputTensor:
    return InputTensor(made.datatype, shape, None, np.array(values, made.datatype.numpy).tobytes())


def _scatter(output: OutputTensor, shapes: Sequence[Shape]) -> list[OutputTensor]:
    data = memoryview(output.data)
    ends = list(accumulate([element_count(shape) for shape in shapes], initial=0))
    if output.datatype.itemsize:
        offsets = [end * output.datatype.itemsize for end in ends]
    else:
        of_element = list(accumulate([4 + len(element) for element in unpack_bytes(output.data)], initial=0))
        offsets = [of_element[end] for end in ends]
    return [
        OutputTensor(output.name, output.datatype, shape, data[offsets[place] : offsets[place + 1]])
        for place, shape in enumerate(shapes)
    ]
