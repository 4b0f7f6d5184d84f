"""A replica seen through its configuration: tensors by the places and shapes of the served signature.

A served signature may name fewer tensors than the model file has, in another order, with other dims (`reshape`) or
with dims narrower than the file's. A `BoundReplica` translates each batch on its way to the replica, and the answer on
its way back; bytes are not touched. It also adds the inputs that are made for a batch and that no client sends
(core/ragged.py). Where nothing differs the replica itself is used, so this costs nothing then.
An output whose shape contradicts what is served is the run's failure, and reaches no caller.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.backends.interface import Batch, Failure, FailureKind, Replica, Success
from gateway.backends.wrapped import WrappedBatch, WrappedReplica
from gateway.core.assembly import part_nbytes
from gateway.core.batchability import SignatureTensor
from gateway.core.model import ModelSpec, TensorSpec
from gateway.core.ragged import Ragged
from gateway.core.request import BatchInput, InputTensor, OutputTensor
from gateway.core.reshape import fits, reshaped
from gateway.core.tensor import element_count


class Binding:
    """Places and shapes of one served version ↔ those of its model file."""

    def __init__(self, spec: ModelSpec, inputs: Sequence[SignatureTensor], outputs: Sequence[SignatureTensor]) -> None:
        """Raises KeyError: the spec names a tensor that the model does not have."""
        self.spec = spec
        of_input = {tensor.name: index for index, tensor in enumerate(inputs)}
        of_output = {tensor.name: index for index, tensor in enumerate(outputs)}
        self._input_places = tuple(of_input[tensor.name] for tensor in spec.inputs)
        self._output_places = tuple(of_output[tensor.name] for tensor in spec.outputs)
        self._of_input = of_input
        self._inputs = len(inputs)
        self._ragged = ragged = Ragged.of(spec)
        self._skip = 1 if spec.batched else 0
        self._narrow = tuple(
            tensor.reshape is None
            and _narrower(tensor.dims, outputs[place].shape[self._skip :])
            and (ragged is None or at not in ragged.scattered)
            for at, (tensor, place) in enumerate(zip(spec.outputs, self._output_places, strict=True))
        )
        self.neutral = (
            self._input_places == tuple(range(len(spec.inputs)))
            and self._output_places == tuple(range(len(spec.outputs)))
            and not any(tensor.reshape is not None for tensor in (*spec.inputs, *spec.outputs))
            and not any(self._narrow)
            and ragged is None
        )
        """Whether there is nothing to translate."""

    def model_outputs(self, outputs: tuple[int, ...]) -> tuple[int, ...]:
        return tuple([self._output_places[place] for place in outputs])

    def batch_inputs(self, inputs: Sequence[BatchInput]) -> list[BatchInput]:
        """With what is made for a ragged batch.

        Raises:
            ValueError: a shape does not fit the served dims.
        """
        found = [
            BatchInput(
                self._input_places[given.index],
                given.datatype,
                self._model_shape(self.spec.inputs[given.index], given.shape),
                given.nbytes,
                given.parts,
            )
            for given in inputs
        ]
        if self._ragged is not None:
            shapes = {given.index: [part.shape for part in given.parts] for given in inputs}
            for name, made in self._ragged.made(shapes):
                found.append(BatchInput(self._of_input[name], made.datatype, made.shape, part_nbytes(made), [made]))
        return found

    def model_inputs(self, inputs: Sequence[InputTensor | None]) -> list[InputTensor | None]:
        """One request's tensors in the order of the served signature → one per input of the model file."""
        found: list[InputTensor | None] = [None] * self._inputs
        for place, given in enumerate(inputs):
            if given is not None:
                shape = self._model_shape(self.spec.inputs[place], given.shape)
                found[self._input_places[place]] = InputTensor(given.datatype, shape, given.values, given.buffer)
        if self._ragged is not None:
            shapes = {place: [given.shape] for place, given in enumerate(inputs) if given is not None}
            for name, made in self._ragged.made(shapes):
                found[self._of_input[name]] = made
        return found

    def _model_shape(self, tensor: TensorSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
        if tensor.ragged:
            return (element_count(shape),)
        if tensor.reshape is None:
            return shape
        return (*shape[: self._skip], *reshaped(shape[self._skip :], tensor.dims, tensor.reshape))

    def served_output(self, place: int, output: OutputTensor) -> OutputTensor:
        """Raises ValueError: the model made a shape that contradicts what is served."""
        tensor, skip = self.spec.outputs[place], self._skip
        if tensor.reshape is not None:
            shape = (*output.shape[:skip], *reshaped(output.shape[skip:], tensor.reshape, tensor.dims))
            return OutputTensor(output.name, output.datatype, shape, output.data)
        if self._narrow[place] and not fits(output.shape[skip:], tensor.dims):
            raise ValueError(f"shape {list(output.shape[skip:])} where {list(tensor.dims)} was expected")
        return output


def _narrower(dims: tuple[int, ...], file: tuple[int | None, ...]) -> bool:
    return any(have is None and want != -1 for want, have in zip(dims, file, strict=False))


class _BoundBatch(WrappedBatch):
    """A batch with the places and shapes of the model file."""

    __slots__ = ("_binding",)

    def __init__(self, batch: Batch, binding: Binding) -> None:
        super().__init__(batch)
        self._binding = binding
        self.inputs = binding.batch_inputs(batch.inputs)
        self.outputs = binding.model_outputs(batch.outputs)

    def translated(self, answer: Success) -> Success | Failure:
        served = []
        for place, output in zip(self._batch.outputs, answer.outputs, strict=False):
            try:
                served.append(self._binding.served_output(place, output))
            except ValueError as error:
                return Failure(FailureKind.SUSPECT, f"output '{output.name}' has {error}, as config.pbtxt says")
        return Success(served, answer.compute_input_ns, answer.compute_infer_ns, answer.compute_output_ns)


class BoundReplica(WrappedReplica):
    """Fits `backends.interface.Replica`."""

    __slots__ = ("_binding",)

    def __init__(self, replica: Replica, binding: Binding) -> None:
        super().__init__(replica)
        self._binding = binding

    def execute(self, batch: Batch, timeout_s: float, /) -> None:
        self.hand_over(batch, _BoundBatch(batch, self._binding), timeout_s)
