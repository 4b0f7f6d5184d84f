"""Ensembles: several models as one. Which tensor goes where, checked whole, and which step may run when. Pure.

Rules (wire notes §5.3, Triton's ensemble scheduler):
  * tensors of an ensemble have names of their own; each is written once, by a caller (an input) or by one step, and
    read by any number of steps and outputs. Who writes and who reads agree on datatype and dims;
  * every step's model takes at least as many rows as the ensemble does. An ensemble that does not batch may hold models
    that do: its tensors then show the batch dimension, or lack it where it is 1;
  * steps do not go round in a circle, every required input of every step is fed, and every tensor is read by a step or
    is an output. An optional input of the ensemble may be absent: then so are the inputs that it feeds;
  * a step may run as soon as all its tensors are there. Nothing else orders steps.

A plan is made for the exact signatures of the steps' models, and made again when one of them is replaced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from gateway.core.model import ModelSpec, TensorSpec
from gateway.core.scheduling import EnsembleStep
from gateway.core.tensor import Datatype
from gateway.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step, by places instead of names."""

    spec: ModelSpec
    inputs: tuple[tuple[int, str], ...]
    """(place in the model's inputs, tensor of the ensemble)."""
    outputs: tuple[tuple[int, str], ...]
    """(place in the model's outputs, tensor of the ensemble), by place."""

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(tensor for _, tensor in self.inputs)


@dataclass(frozen=True, slots=True)
class EnsemblePlan:
    """All steps of an ensemble, and what follows from them."""

    steps: tuple[PlannedStep, ...]
    readers: Mapping[str, tuple[int, ...]]
    """Tensor → the steps that read it."""


class Progress:
    """How far one request is: told of tensors, it says which steps may run now, each exactly once."""

    __slots__ = ("_missing", "_plan", "_unread")

    def __init__(self, plan: EnsemblePlan) -> None:
        self._plan = plan
        self._missing = [len(step.reads) for step in plan.steps]
        self._unread = {tensor: len(readers) for tensor, readers in plan.readers.items()}

    def arrived(self, tensors: Iterable[str]) -> list[int]:
        """These are known now (absent ones too: nothing more will come); the steps that this sets free, in order."""
        free = []
        for tensor in tensors:
            for step in self._plan.readers.get(tensor, ()):
                self._missing[step] -= 1
                if not self._missing[step]:
                    free.append(step)
        return sorted(free)

    def started(self, step: int) -> list[str]:
        """A step has what it reads; the tensors that no other step waits for."""
        done = []
        for tensor in self._plan.steps[step].reads:
            self._unread[tensor] -= 1
            if not self._unread[tensor]:
                done.append(tensor)
        return done


def fit_shape(
    shape: tuple[int, ...], dims: tuple[int, ...], *, batched: bool, from_batched: bool
) -> tuple[int, ...] | None:
    """A tensor's shape as its reader takes it; None if it does not fit.

    Args:
        shape: whole, as it was written.
        dims: what the reader states, −1 for variable; without the batch dimension if the reader is `batched`.
        from_batched: whether the writer's first dimension is the batch's.
    """
    if _fits((-1, *dims) if batched else dims, shape):
        return shape
    if batched and not from_batched and _fits(dims, shape):
        return (1, *shape)
    if from_batched and not batched and shape[:1] == (1,) and _fits(dims, shape[1:]):
        return shape[1:]
    return None


def _fits(dims: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(dims) == len(shape) and all(-1 in (a, b) or a == b for a, b in zip(dims, shape, strict=True))


def plan_ensemble(
    name: str,
    max_batch_size: int,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    steps: Sequence[tuple[EnsembleStep, ModelSpec]],
) -> EnsemblePlan:
    """Check an ensemble against the signatures of its steps' models.

    Raises:
        ConfigError: it does not hold together; every fault, each naming the step and the tensor.
    """
    return _Check(name, max_batch_size, inputs, outputs, steps).plan()


@dataclass(frozen=True, slots=True)
class _End:
    """Who writes or reads a tensor, and what it says about it."""

    who: str
    datatype: Datatype
    dims: tuple[int, ...]
    batched: bool


class _Check:
    def __init__(
        self,
        name: str,
        max_batch_size: int,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        steps: Sequence[tuple[EnsembleStep, ModelSpec]],
    ) -> None:
        self._name = name
        self._limit = max_batch_size
        self._steps = steps
        self._inputs = inputs
        self._outputs = outputs
        self._faults: list[str] = []
        self._writers = {tensor.name: self._own(tensor, "input") for tensor in inputs}
        self._made_by: dict[str, int] = {}
        """Tensor → the step that writes it."""

    def plan(self) -> EnsemblePlan:
        if not self._steps:
            self._fault("it has no step; add one for each model")
        if not self._outputs:
            self._fault("it has no output; name what its callers get")
        for step, spec in self._steps:
            self._check_rows(spec)
            self._check_names(step, spec)
        for index, (step, spec) in enumerate(self._steps):
            self._collect_writers(index, step, spec)
        for step, spec in self._steps:
            self._check_readers(step, spec)
        for tensor in self._outputs:
            self._check_reader(tensor.name, self._own(tensor, "output"))
        self._check_used()
        self._check_order()
        if self._faults:
            raise ConfigError(f"ensemble '{self._name}': {'; '.join(self._faults)}")
        return self._planned()

    def _fault(self, text: str) -> None:
        if text not in self._faults:
            self._faults.append(text)

    def _own(self, tensor: TensorSpec, role: str) -> _End:
        return _End(f"the ensemble's {role}", tensor.datatype, tensor.dims, self._limit > 0)

    def _check_rows(self, spec: ModelSpec) -> None:
        most = spec.policy.max_batch_size
        if most < self._limit:
            self._fault(
                f"it allows maximum batch size {self._limit}, but it contains model '{spec.name}' which only allows "
                f"maximum batch size to be {most}; lower the ensemble's max_batch_size or raise the model's"
            )

    def _check_names(self, step: EnsembleStep, spec: ModelSpec) -> None:
        maps = (("input", step.input_map, spec.inputs), ("output", step.output_map, spec.outputs))
        for role, mapping, tensors in maps:
            if not mapping:
                self._fault(f"step '{step.model}' maps no {role}; add {role}_map")
            known = [tensor.name for tensor in tensors]
            for label, times in Counter(own for own, _ in mapping).items():
                if label not in known:
                    self._fault(f"step '{step.model}' maps the {role} '{label}', but the model has {known}")
                elif times > 1:
                    self._fault(f"step '{step.model}' maps the {role} '{label}' twice; keep one of them")
        mapped = {own for own, _ in step.input_map}
        for tensor in spec.inputs:
            if tensor.name not in mapped and not tensor.optional:
                self._fault(f"step '{step.model}' leaves the input '{tensor.name}' unmapped; add it to input_map")

    def _collect_writers(self, index: int, step: EnsembleStep, spec: ModelSpec) -> None:
        specs = {tensor.name: tensor for tensor in spec.outputs}
        for own, tensor in step.output_map:
            if own not in specs:
                continue
            if tensor in self._writers:
                self._fault(
                    f"tensor '{tensor}' can appear in an output map only once, and not as an input of the ensemble; "
                    f"step '{step.model}' writes it again"
                )
                continue
            self._writers[tensor] = _end(f"step '{step.model}'", specs[own], spec)
            self._made_by[tensor] = index

    def _check_readers(self, step: EnsembleStep, spec: ModelSpec) -> None:
        specs = {tensor.name: tensor for tensor in spec.inputs}
        for own, tensor in step.input_map:
            if own in specs:
                self._check_reader(tensor, _end(f"step '{step.model}'", specs[own], spec))

    def _check_reader(self, tensor: str, reader: _End) -> None:
        writer = self._writers.get(tensor)
        if writer is None:
            self._fault(f"tensor '{tensor}' is read by {reader.who}, but no step and no input writes it")
            return
        if writer.datatype is not reader.datatype:
            self._fault(
                f"tensor '{tensor}': inconsistent data type: {writer.datatype} from {writer.who}, "
                f"{reader.datatype} for {reader.who}"
            )
        if not (_fits(writer.dims, reader.dims) or _fits(_whole(writer), _whole(reader))):
            self._fault(
                f"tensor '{tensor}': inconsistent shape: {list(writer.dims)} from {writer.who}, "
                f"{list(reader.dims)} for {reader.who}"
            )

    def _check_used(self) -> None:
        read = {tensor for step, _ in self._steps for _, tensor in step.input_map}
        for tensor in self._writers.keys() - read - {output.name for output in self._outputs}:
            writer = self._writers[tensor].who
            self._fault(f"tensor '{tensor}' from {writer} is read by no step and is no output; use it or leave it out")

    def _check_order(self) -> None:
        graph = {
            index: {self._made_by[tensor] for _, tensor in step.input_map if tensor in self._made_by}
            for index, (step, _) in enumerate(self._steps)
        }
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = " → ".join([f"'{self._steps[index][0].model}'" for index in reversed(error.args[1])])
            self._fault(f"its steps go round in a circle: {circle}; no step could be the first")

    def _planned(self) -> EnsemblePlan:
        planned = []
        for step, spec in self._steps:
            places = {tensor.name: place for place, tensor in enumerate(spec.inputs)}
            made = {tensor.name: place for place, tensor in enumerate(spec.outputs)}
            planned.append(
                PlannedStep(
                    spec,
                    tuple(sorted((places[own], tensor) for own, tensor in step.input_map)),
                    tuple(sorted((made[own], tensor) for own, tensor in step.output_map)),
                )
            )
        readers: dict[str, list[int]] = {}
        for index, one in enumerate(planned):
            for tensor in one.reads:
                readers.setdefault(tensor, []).append(index)
        return EnsemblePlan(
            tuple(planned),
            {tensor: tuple(indexes) for tensor, indexes in readers.items()},
        )


def _end(who: str, tensor: TensorSpec, spec: ModelSpec) -> _End:
    return _End(who, tensor.datatype, tensor.dims, spec.batched)


def _whole(end: _End) -> tuple[int, ...]:
    return (-1, *end.dims) if end.batched else end.dims


def load_order(steps_of: Mapping[str, Iterable[str]]) -> list[str]:
    """Ensembles in an order in which each comes behind those it contains.

    `steps_of`: ensemble → the models of its steps; models that are no ensembles are left out of the answer. Ensembles
    that contain themselves, however deep, come last, in the given order: loading them fails for want of a step.
    """
    waiting = {name: {step for step in steps if step in steps_of} for name, steps in steps_of.items()}
    ordered: list[str] = []
    while free := [name for name, inner in waiting.items() if inner <= set(ordered)]:
        ordered += free
        for name in free:
            del waiting[name]
    return [*ordered, *waiting]
