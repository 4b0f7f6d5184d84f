"""One request on its way through an ensemble: what it holds, which steps are under way, and how it ends.

Invariants: a step is submitted at most once, and only while the request is not settled; a tensor is held no longer than
a step or the answer needs it; whatever ends the request, its steps under way are dropped and everything is let go.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from gateway.core import assembly
from gateway.core.admission import MAX_TIMEOUT_S
from gateway.core.batch import Execution, FinishedBatch, executions
from gateway.core.batching import Reason
from gateway.core.duration import in_words
from gateway.core.ensemble_plan import EnsemblePlan, PlannedStep, Progress, fit_shape
from gateway.core.inner_request import inner_request
from gateway.core.model import ModelSpec, TensorSpec
from gateway.core.request import SETTLED, InferRequest, InputTensor, OutputTensor
from gateway.errors import (
    BackendError,
    DeadlineExceeded,
    Draining,
    GatewayError,
    InvalidRequest,
    NotFound,
    NotReady,
)
from gateway.observe.record import ModelStatistics

log = logging.getLogger("gateway.ensemble")

BACKEND: Final = "ensemble"


class StepVersion(Protocol):
    """What an ensemble needs to know of a served version."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def ready(self) -> bool: ...
    @property
    def dependencies(self) -> tuple[str, ...]:
        """Names of the models it is composed of."""

    def fingerprint(self) -> bytes:
        """Changes whenever what would answer changes."""

    def pin(self) -> None:
        """Somebody under way will still need it: it is not freed before as many `unpin`."""

    def unpin(self) -> None: ...


class Home(Protocol):
    """The ensemble that a run belongs to."""

    nbytes: int
    """Bytes of all tensors held for requests under way: inputs, and what steps made of them."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def outputs(self) -> frozenset[str]: ...
    @property
    def statistics(self) -> ModelStatistics: ...
    @property
    def infer(self) -> Callable[[Any, InferRequest], None]: ...
    @property
    def now(self) -> Callable[[], float]: ...

    def choose(self) -> tuple[EnsemblePlan, list[StepVersion]]: ...
    def named(self, error: GatewayError) -> GatewayError: ...
    def ended(self, run: EnsembleRun) -> None: ...


class EnsembleRun:
    """One request on its way through the steps. Lets go of everything when it settles."""

    __slots__ = (
        "_done", "_ensemble", "_live", "_plan", "_progress", "_tensors", "_versions", "held", "request",
    )  # fmt: skip

    def __init__(self, ensemble: Home, request: InferRequest, plan: EnsemblePlan, versions: list[StepVersion]) -> None:
        self.request = request
        self.held = 0
        """Bytes of the tensors in `_tensors`."""
        self._ensemble = ensemble
        self._plan = plan
        self._versions = versions
        for version in versions:
            version.pin()
        self._progress = Progress(plan)
        self._tensors: dict[str, tuple[InputTensor | None, bool]] = {}
        """What is known and still needed, and whether its first dimension is the batch's; None: an optional input that
        the caller left out."""
        self._live: dict[int, tuple[InferRequest, PlannedStep]] = {}
        """Steps under way."""
        self._done: list[_Done] = []

    def begin(self) -> None:
        """Start the steps that need nothing but the caller's inputs. Raises what refuses one of them."""
        spec = self._ensemble.spec
        names = [tensor.name for tensor in spec.inputs]
        for name, tensor in zip(names, self.request.inputs, strict=True):
            self._put(name, tensor, spec.batched)
        self._launch_all(self._progress.arrived(names))

    def _put(self, name: str, tensor: InputTensor | None, batched: bool) -> None:
        self._tensors[name] = (tensor, batched)
        self._hold(_size(tensor))

    def _hold(self, nbytes: int) -> None:
        self.held += nbytes
        self._ensemble.nbytes += nbytes

    # -- steps -----------------------------------------------------------------------------------------------------

    def _launch_all(self, steps: list[int]) -> None:
        for step in steps:
            if self.request.state == SETTLED:  # a queue that is asked may find that another step's time is up
                return
            try:
                self._launch(step)
            except GatewayError:
                if self.request.state != SETTLED:
                    raise

    def _launch(self, index: int) -> None:
        try:
            self._submit(index)
        except (Draining, NotReady, NotFound):
            # Out of service since the request arrived, perhaps because another one took its place.
            if self.request.state == SETTLED:
                return
            plan, versions = self._ensemble.choose()
            if versions[index] is self._versions[index]:
                raise
            self._unpin()
            self._plan, self._versions = plan, versions
            for version in versions:
                version.pin()
            self._submit(index)
        for name in self._progress.started(index):
            if name in self._tensors and name not in self._ensemble.outputs:
                self._hold(-_size(self._tensors.pop(name)[0]))

    def _submit(self, index: int) -> None:
        request, ensemble = self.request, self._ensemble
        step, version = self._plan.steps[index], self._versions[index]
        inputs: list[InputTensor | None] = [None] * len(step.spec.inputs)
        for place, name in step.inputs:
            inputs[place] = self._as_read(name, step.spec, place)
        _check_present(step.spec, inputs)
        inner = inner_request(
            step.spec, tuple(inputs), _rows(step.spec, inputs), tuple([place for place, _ in step.outputs]), request
        )
        now = ensemble.now()
        left_s = request.deadline - now
        if left_s <= 0.0:
            raise DeadlineExceeded(f"Request timeout expired after {in_words(now - request.received)}")
        inner.received = now
        inner.timeout_s = left_s if left_s <= MAX_TIMEOUT_S else 0.0  # the model's own default may be longer than that
        inner.context = index
        inner.settle = self._step_settled
        self._live[index] = inner, step
        try:
            ensemble.infer(version, inner)
        except BaseException:
            self._live.pop(index, None)
            raise
        if self.request.state == SETTLED:
            inner.abort()

    def _as_read(self, name: str, spec: ModelSpec, place: int) -> InputTensor | None:
        tensor, batched = self._tensors[name]
        if tensor is None:
            return None
        reader = spec.inputs[place]
        shape = fit_shape(tensor.shape, reader.dims, batched=spec.batched, from_batched=batched)
        if shape is None:
            expected = [-1, *reader.dims] if spec.batched else list(reader.dims)
            raise InvalidRequest(
                f"unexpected shape for input '{reader.name}' for model '{spec.name}'. Expected {expected}, got "
                f"{list(tensor.shape)} (tensor '{name}')"
            )
        return InputTensor(tensor.datatype, shape, tensor.values, tensor.buffer)

    def _step_settled(self, inner: InferRequest) -> None:
        index: int = inner.context
        live, step = self._live.get(index, (None, None))
        if live is not inner or step is None:
            return  # of a request that has ended meanwhile
        del self._live[index]
        try:
            if inner.error is not None:
                if inner.avoid is not None:
                    self.request.avoid = _backend(step, inner.avoid)
                    self.request.attempt = inner.attempt
                raise inner.error
            self._step_answered(index, step, inner)
        except Exception as error:
            self._fail(error)

    def _step_answered(self, index: int, step: PlannedStep, inner: InferRequest) -> None:
        batch: FinishedBatch = inner.batch
        self._done.append(_Done(index, step, batch, inner))
        for place, name in step.outputs:
            if name in self._plan.readers or name in self._ensemble.outputs:
                output = batch.outputs[place]
                own = assembly.slice_rows(output, inner.row, inner.rows) if step.spec.batched else output
                self._put(name, InputTensor(own.datatype, own.shape, None, own.data), step.spec.batched)
        self._launch_all(self._progress.arrived([name for _, name in step.outputs]))
        if len(self._done) == len(self._plan.steps):
            self._finish()

    # -- the end ---------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        ensemble, request = self._ensemble, self.request
        done = sorted(self._done, key=_index)
        outputs = {index: self._output(ensemble.spec.outputs[index]) for index in request.outputs}
        inputs_ns, infer_ns, outputs_ns = (sum(part) for part in zip(*[d.compute_ns for d in done], strict=True))
        compute_ns = (inputs_ns, infer_ns, outputs_ns)
        dispatched, now = min([d.dispatched for d in done]), ensemble.now()
        attempt = max([execution.attempt for d in done for execution, _ in d.executions])
        batch_id = done[0].executions[0][0].batch_id
        reason = Reason.WORKER_FREE.value
        batch = FinishedBatch(batch_id, request.rows, outputs, BACKEND, attempt, dispatched, now, reason, compute_ns)
        batch.parts = [part for d in done for part in d.executions]
        ensemble.statistics.record_batch(
            BACKEND, request.rows, int(not request.part), reason, *compute_ns,
            max(0.0, dispatched - request.received), now - dispatched,
        )  # fmt: skip
        self.settle(batch)

    def _output(self, tensor: TensorSpec) -> OutputTensor:
        """Raises BackendError: a step's answer is not what the ensemble promises."""
        spec = self._ensemble.spec
        made, batched = self._tensors[tensor.name]
        if made is None:
            raise InvalidRequest(f"output '{tensor.name}' is an optional input, which the request lacks; leave it out")
        shape = fit_shape(made.shape, tensor.dims, batched=spec.batched, from_batched=batched)
        if shape is None or (spec.batched and shape[0] != self.request.rows):
            raise BackendError(f"output '{tensor.name}' has the unexpected shape {list(made.shape)}")
        data = made.buffer if made.buffer is not None else assembly.encode_values(made.datatype, made.values or [])
        return OutputTensor(tensor.name, tensor.datatype, shape, data)

    def _fail(self, error: Exception) -> None:
        if self.request.state == SETTLED:
            return
        if not isinstance(error, GatewayError):
            log.exception("ensemble %s failed on a request in a way nobody foresaw", self._ensemble.spec.name)
            error = GatewayError("the gateway failed on this request")
        self._ensemble.statistics.fail("OTHER", spent_s=self._ensemble.now() - self.request.received)
        self.settle(error=self._ensemble.named(error))

    def settle(self, batch: FinishedBatch | None = None, error: Exception | None = None) -> None:
        request = self.request
        if request.state == SETTLED:
            return
        request.state = SETTLED
        request.batch, request.error, request.row = batch, error, 0
        self.drop()
        try:
            request.settle(request)
        except Exception:
            log.exception("ensemble %s: an answer could not be written", self._ensemble.spec.name)

    def drop(self) -> None:
        """Let go of everything: steps under way are not needed any more."""
        self._ensemble.ended(self)
        self.request.owner = None
        self._unpin()
        self._hold(-self.held)
        self._tensors = {}
        live, self._live = self._live, {}
        for inner, _ in live.values():
            inner.abort()

    def _unpin(self) -> None:
        versions, self._versions = self._versions, []
        for version in versions:
            version.unpin()


class _Done:
    """What is said of a step's execution; nothing of what it made for others is held."""

    __slots__ = ("compute_ns", "dispatched", "executions", "index")

    def __init__(self, index: int, step: PlannedStep, batch: FinishedBatch, inner: InferRequest) -> None:
        self.index = index
        self.dispatched = batch.dispatched
        self.compute_ns = (batch.input_ns, batch.infer_ns, batch.output_ns)
        self.executions = [
            (Execution(_backend(step, e.backend), e.attempt, e.batch_id, e.rows, e.remote), row)
            for e, row in executions(batch, inner.row)
        ]


def _index(done: _Done) -> int:
    return done.index


def _backend(step: PlannedStep, backend: str) -> str:
    return f"{step.spec.name}/{step.spec.version}/{backend}"


def _check_present(spec: ModelSpec, inputs: Sequence[InputTensor | None]) -> None:
    """Raises InvalidRequest: the caller left out what a step's model requires."""
    missing = [tensor.name for tensor, given in zip(spec.inputs, inputs, strict=True) if not (given or tensor.optional)]
    if missing:
        got = [tensor.name for tensor, given in zip(spec.inputs, inputs, strict=True) if given]
        raise InvalidRequest(
            f"expected {len(got) + len(missing)} inputs but got {len(got)} inputs for model '{spec.name}'. Got "
            f"input(s) {got}, but missing required input(s) {missing}. Please provide all required input(s)."
        )


def _rows(spec: ModelSpec, inputs: Sequence[InputTensor | None]) -> int:
    """Rows of a step's request.

    Raises:
        InvalidRequest: the model cannot take them.
    """
    shapes = [tensor.shape for tensor in inputs if tensor is not None]
    if not spec.batched or not shapes:
        return 1
    rows = {shape[0] for shape in shapes}
    limit = spec.policy.request_rows
    if len(rows) > 1:
        raise InvalidRequest(f"the inputs of model '{spec.name}' have different batch sizes: {sorted(rows)}")
    if not 1 <= shapes[0][0] <= limit:
        raise InvalidRequest(
            f"inference request batch-size must be >= 1 and <= {limit} for '{spec.name}', got {shapes[0][0]}"
            f"{spec.policy.rows_reason}"
        )
    return shapes[0][0]


def _size(tensor: InputTensor | None) -> int:
    if tensor is None:
        return 0
    return len(tensor.buffer) if tensor.buffer is not None else len(tensor.values or ()) * tensor.datatype.itemsize
