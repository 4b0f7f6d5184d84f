"""What the gateway adds to a request that is a step of a sequence: control inputs and the sequence's state.

Clients neither send nor see these tensors (wire notes §5.3): they are inputs and outputs of the model beside those of
its configuration. So a sequence model has two signatures: the one that clients see, and `SequenceTensors.model_spec`,
which has the control inputs, the state inputs and the state outputs behind the others.

Rules:
  * a control holds one element a row: START, READY and END the stated false or true value, CORRID the sequence's id;
  * a state's first value is what its owner stated, else zeros and empty strings; a variable dim is then 1, or what the
    stated bytes make of it. START brings every sequence back to it;
  * the value of a state output is the state of the sequence's next step, bit for bit, and of no other sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Final

import numpy as np

from gateway.core.assembly import slice_rows
from gateway.core.batch import FinishedBatch
from gateway.core.batchability import SignatureTensor
from gateway.core.model import BatchPolicy, ModelSpec, TensorSpec
from gateway.core.request import InputTensor, SequenceStep
from gateway.core.scheduling import ControlInput, Scheduling, SequencePolicy, StateTensor
from gateway.core.tensor import Datatype, element_count, pack_bytes, unpack_bytes
from gateway.errors import ConfigError, InvalidRequest

CORRID: Final = "CONTROL_SEQUENCE_CORRID"
READY: Final = "CONTROL_SEQUENCE_READY"
_BITS: Final = {"INT32": (-(2**31), 2**31 - 1), "UINT32": (0, 2**32 - 1), "INT64": (-(2**63), 2**63 - 1)}
_UINT64: Final = (0, 2**64 - 1)

States = tuple[InputTensor, ...]
"""One tensor for each state, in the order in which they are stated; shapes with the batch dimension."""


class SlotFlag(InputTensor):
    """The READY input of a step that has a fixed place in the batch: `slot`, from 0."""

    __slots__ = ("slot",)

    def __init__(self, flag: InputTensor, slot: int) -> None:
        super().__init__(flag.datatype, flag.shape, flag.values, flag.buffer)
        self.slot = slot


class SequenceTensors:
    """Of one version; `spec.scheduling.sequence` must be there."""

    def __init__(self, spec: ModelSpec) -> None:
        policy = spec.scheduling.sequence
        if policy is None:
            raise ValueError(f"model '{spec.name}' has no sequences")
        self._name = spec.name
        self._policy = policy
        self._batched = spec.batched
        self.model_spec = _model_spec(spec, policy)
        self.outputs = tuple(range(len(self.model_spec.outputs)))
        """A step is executed with all outputs, whatever its caller wants: so all steps may share batches."""
        places = {tensor.name: place for place, tensor in enumerate(self.model_spec.outputs)}
        self._state_places = tuple([places[state.output_name] for state in policy.states])
        self.first: States = tuple([_first(state, batched=spec.batched) for state in policy.states])
        self._lead = (1,) if spec.batched else ()
        self._correlated = next((control for control in policy.controls if control.kind == CORRID), None)
        self._flags = {
            (start, end): [self._flag(control, start, end) for control in policy.controls]
            for start in (False, True)
            for end in (False, True)
        }
        kinds = [control.kind for control in policy.controls]
        self._corrid_at = kinds.index(CORRID) if CORRID in kinds else None
        self._ready_at = kinds.index(READY) if READY in kinds else None
        self.ready_place = None if self._ready_at is None else len(spec.inputs) + self._ready_at
        """Index of the READY input in `model_spec`; None: the model has none."""

    def correlation(self, identity: int | str) -> InputTensor | None:
        """A sequence's id as its CORRID input; None: the model has none.

        Raises:
            InvalidRequest: the id does not fit its datatype.
        """
        control = self._correlated
        if control is None:
            return None
        datatype, shape = control.datatype, (*self._lead, 1)
        if datatype.kind == "bytes":
            return InputTensor(datatype, shape, None, pack_bytes([str(identity).encode()]))
        low, high = _BITS.get(datatype.name, _UINT64)
        if isinstance(identity, str) or not low <= identity <= high:
            raise InvalidRequest(
                f"parameter 'sequence_id' must be an integer of {datatype} for model '{self._name}', which reads it "
                f"as its input '{control.name}'"
            )
        return InputTensor(datatype, shape, None, np.array([identity], datatype.numpy).tobytes())

    def added(
        self, step: SequenceStep, correlation: InputTensor | None, states: States, slot: int | None
    ) -> tuple[InputTensor, ...]:
        """What stands behind the caller's own inputs. `slot`: the step's fixed place in the batch, if it has one."""
        controls = self._flags[step.start, step.end]
        if self._corrid_at is not None or (self._ready_at is not None and slot is not None):
            controls = [*controls]
            if self._corrid_at is not None and correlation is not None:
                controls[self._corrid_at] = correlation
            if self._ready_at is not None and slot is not None:
                controls[self._ready_at] = SlotFlag(controls[self._ready_at], slot)
        return (*controls, *states)

    def idle_row(self) -> dict[int, InputTensor]:
        """Control inputs of a slot without a request, by their index in `model_spec`."""
        place = len(self.model_spec.inputs) - len(self._policy.controls) - len(self._policy.states)
        return {
            place + at: self._constant(control, control.false_value) for at, control in enumerate(self._policy.controls)
        }

    def next_states(self, batch: FinishedBatch, row: int) -> States:
        """The states after the step that is row `row` of `batch`; copies, so that the batch is not held."""
        found = []
        for place in self._state_places:
            output = batch.outputs[place]
            own = slice_rows(output, row, 1) if self._batched else output
            found.append(InputTensor(own.datatype, own.shape, None, bytes(own.data)))
        return tuple(found)

    def example(self, rows: int) -> tuple[InputTensor, ...]:
        """What stands behind the inputs of a made-up request of `rows` rows, each the only step of a sequence."""
        added = self.added(SequenceStep(0, True, True), None, self.first, None)
        return tuple([_repeated(tensor, rows) for tensor in added]) if self._batched else added

    def _flag(self, control: ControlInput, start: bool, end: bool) -> InputTensor:
        on = {"CONTROL_SEQUENCE_START": start, "CONTROL_SEQUENCE_END": end, READY: True}.get(control.kind, False)
        return self._constant(control, control.true_value if on else control.false_value)

    def _constant(self, control: ControlInput, value: float) -> InputTensor:
        shape = (*self._lead, 1)
        if control.kind == CORRID:
            return InputTensor(control.datatype, shape, None, zeros(control.datatype, 1))
        return InputTensor(control.datatype, shape, None, np.array([value]).astype(control.datatype.numpy).tobytes())


def as_executed(spec: ModelSpec) -> ModelSpec:
    """The signature that the model is executed by: the clients' own, or that with what a sequence adds."""
    return spec if spec.scheduling.sequence is None else SequenceTensors(spec).model_spec


def with_added(spec: ModelSpec, inputs: Sequence[InputTensor | None]) -> Sequence[InputTensor | None]:
    """Inputs of a made-up request to `spec` with what the gateway adds to them."""
    if spec.scheduling.sequence is None:
        return inputs
    rows = next((tensor.shape[0] for tensor in inputs if tensor is not None and spec.batched), 1)
    return [*inputs, *SequenceTensors(spec).example(rows)]


def added_inputs(scheduling: Scheduling) -> tuple[TensorSpec, ...]:
    """Controls and states as inputs of the model."""
    policy = scheduling.sequence
    if policy is None:
        return ()
    controls = [TensorSpec(control.name, control.datatype, (1,)) for control in policy.controls]
    return (*controls, *[TensorSpec(state.input_name, state.datatype, state.dims) for state in policy.states])


def nbytes(states: States) -> int:
    return sum([len(state.buffer or b"") for state in states])


def zeros(datatype: Datatype, count: int) -> bytes:
    """`count` zeros, false values or empty strings in OIP binary form."""
    return bytes(count * datatype.itemsize) if datatype.itemsize else pack_bytes([b""] * count)


def check_sequences(spec: ModelSpec, inputs: Sequence[SignatureTensor], outputs: Sequence[SignatureTensor]) -> None:
    """Whether controls and states have the shapes of the model file; that they exist was looked at before.

    Raises:
        ConfigError: they have not, or one is listed as an input that clients send.
    """
    policy = spec.scheduling.sequence
    if policy is None:
        return
    of_input, of_output = {tensor.name: tensor for tensor in inputs}, {tensor.name: tensor for tensor in outputs}
    if spec.scheduling.batch_inputs or spec.scheduling.batch_outputs or any(tensor.ragged for tensor in spec.inputs):
        raise ConfigError("config.pbtxt: sequence_batching together with ragged batching is not supported; remove one")
    hidden = [*[control.name for control in policy.controls], *[state.input_name for state in policy.states]]
    for names in (hidden, [state.output_name for state in policy.states]):
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ConfigError(f"config.pbtxt: sequence_batching names the tensor '{twice[0]}' twice; name it once")
    listed = {tensor.name for tensor in spec.inputs}.intersection(hidden)
    if listed:
        raise ConfigError(
            f"config.pbtxt lists input '{min(listed)}', which sequence_batching fills; remove it from input"
        )
    for control in policy.controls:
        _check_shape(f"control_input '{control.name}'", (1,), of_input[control.name], spec.batched)
    for state in policy.states:
        _check_shape(f"state input '{state.input_name}'", state.dims, of_input[state.input_name], spec.batched)
        _check_shape(f"state output '{state.output_name}'", state.dims, of_output[state.output_name], spec.batched)
        _first(state, batched=spec.batched)


def _check_shape(what: str, dims: tuple[int, ...], tensor: SignatureTensor, batched: bool) -> None:
    wanted = (-1, *dims) if batched else dims
    file = [-1 if dim is None else dim for dim in tensor.shape]
    fits = len(wanted) == len(file) and all(-1 in pair or pair[0] == pair[1] for pair in zip(wanted, file, strict=True))
    if not fits or (batched and file[0] != -1):
        raise ConfigError(
            f"config.pbtxt: sequence_batching: {what} needs shape {list(wanted)}, the model file says {file}"
            + ("; the first dimension is the batch" if batched else "")
        )


def _model_spec(spec: ModelSpec, policy: SequencePolicy) -> ModelSpec:
    seen = {tensor.name for tensor in spec.outputs}
    outputs = [
        TensorSpec(state.output_name, state.datatype, state.dims)
        for state in policy.states
        if state.output_name not in seen
    ]
    return replace(
        spec,
        inputs=(*spec.inputs, *added_inputs(spec.scheduling)),
        outputs=(*spec.outputs, *outputs),
        policy=_batch_policy(spec.policy, policy),
        scheduling=replace(spec.scheduling, sequence=None, preserve_ordering=policy.preserve_ordering),
    )


def _batch_policy(policy: BatchPolicy, sequences: SequencePolicy) -> BatchPolicy:
    """How steps of different sequences become batches.

    Direct: Triton's delay only counts where a share of the slots is stated; that share or more goes at once."""
    limit = policy.max_batch_size
    if sequences.strategy == "oldest":
        preferred = tuple([size for size in sequences.preferred_batch_sizes if size <= limit])
        delay_s = sequences.max_queue_delay_s or policy.max_queue_delay_s
    elif sequences.minimum_slot_utilization > 0.0:
        preferred = tuple(range(max(1, ceil(sequences.minimum_slot_utilization * limit)), limit + 1))
        delay_s = sequences.max_queue_delay_s
    else:
        preferred, delay_s = (), 0.0
    return replace(policy, preferred_batch_sizes=preferred, max_queue_delay_s=delay_s, oversize="reject")


def _first(state: StateTensor, *, batched: bool) -> InputTensor:
    """Raises ConfigError: the stated bytes do not make up the dims."""
    known = element_count([dim for dim in state.dims if dim != -1])
    size = 1
    if state.initial is not None:
        count = _count(state)
        variable = state.dims.count(-1)
        size = count // known if variable == 1 and known else 1
        if size * known != count if variable else count != known:
            raise ConfigError(
                f"config.pbtxt: sequence_batching.state '{state.input_name}': its initial_state file holds {count} "
                f"elements, which do not make up dims {list(state.dims)}"
            )
    dims = tuple([size if dim == -1 else dim for dim in state.dims])
    data = zeros(state.datatype, element_count(dims)) if state.initial is None else state.initial
    return InputTensor(state.datatype, (1, *dims) if batched else dims, None, data)


def _count(state: StateTensor) -> int:
    data = state.initial or b""
    if state.datatype.itemsize:
        whole, rest = divmod(len(data), state.datatype.itemsize)
        return -1 if rest else whole
    try:
        return len(unpack_bytes(data))
    except ValueError:
        return -1


def _repeated(tensor: InputTensor, rows: int) -> InputTensor:
    return InputTensor(tensor.datatype, (rows, *tensor.shape[1:]), None, bytes(tensor.buffer or b"") * rows)
