"""An ensemble at work: each request runs through its steps' models as requests of their own.

A step goes through the entry that every request goes through, into the queue of its model: steps of many callers, and
direct requests to the same model, share batches. `core/ensemble_plan.py` says which step may run when. Rules:
  * the versions of the steps' models are chosen when the request arrives, −1 meaning the newest that is ready then, and
    are not freed before it is done: reloading or unloading a model under a running ensemble fails nobody. Should one
    refuse all the same (its workers crash), the step goes to what its name means by then;
  * steps inherit the caller's deadline, priority and sequence. The caller leaves, or a step fails: the other steps of
    that request are dropped. A failure says which ensemble and step, and counts as OTHER for the ensemble;
  * an ensemble is ready while every step's model is, and says which one is not;
  * what an ensemble holds is bounded in rows and in bytes, intermediate tensors included;
  * the answer's provenance lists every execution in the order of the steps, as `model/version/backend`.

Compute times of the ensemble are the sums over its steps; its execution count is its requests (Triton's semantics).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from gateway.core.admission import deadline_of, never_fits
from gateway.core.batch_queue import QueueStatistics
from gateway.core.ensemble_plan import EnsemblePlan, plan_ensemble
from gateway.core.model import Artifact, BatchPolicy, ModelSpec
from gateway.core.request import QUEUED, RUNNING, InferRequest
from gateway.core.scheduling import EnsembleStep, Scheduling
from gateway.ensemble_run import EnsembleRun, StepVersion
from gateway.errors import Cancelled, ConfigError, GatewayError, NotFound, NotReady, Overloaded
from gateway.loading import WantedVersion
from gateway.observe.record import ModelStatistics

PLATFORM: Final = "ensemble"


Resolve = Callable[[str, str | None], StepVersion]
"""A READY version by model name and version (None: the newest); raises NotFound or NotReady."""
Infer = Callable[[Any, InferRequest], None]
"""The entry of every request: `Pipeline.infer`."""


class Ensemble:
    """The intake of one version of an ensemble; fits `intake.Intake`."""

    def __init__(
        self,
        spec: ModelSpec,
        statistics: ModelStatistics,
        resolve: Resolve,
        infer: Infer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`spec.scheduling.ensemble` are its steps.

        Raises:
            ConfigError: the steps do not hold together, or one of their models is not ready.
        """
        self.spec = spec
        self.statistics = statistics
        self.infer = infer
        self.now = clock
        self._resolve = resolve
        self._steps = spec.scheduling.ensemble
        self._closed: GatewayError | None = None
        self._idle = asyncio.Event()
        self._runs: dict[int, EnsembleRun] = {}
        self.outputs = frozenset(tensor.name for tensor in spec.outputs)
        self._rows = 0
        self.nbytes = 0
        try:
            versions = self._versions()
        except (NotFound, NotReady) as error:
            raise ConfigError(
                f"ensemble '{spec.name}': {error}; it needs every model of its steps to be ready"
            ) from None
        self._check_not_inside_itself()
        self._plan = self._make_plan(versions)

    # -- the steps' models -----------------------------------------------------------------------------------------

    @property
    def dependencies(self) -> tuple[str, ...]:
        """Names of the steps' models."""
        return tuple(dict.fromkeys(step.model for step in self._steps))

    @property
    def obstacle(self) -> str:
        """Why it cannot answer now; empty if it can."""
        try:
            for step, version in zip(self._steps, self._versions(), strict=True):
                if not version.ready:
                    return f"the model '{step.model}' of one of its steps is not ready"
        except GatewayError as error:
            return str(error)
        return ""

    def members(self) -> list[tuple[str, str, str]]:
        """(model, version, digest) of each step, as a request that arrived now would meet them.

        Raises:
            NotFound, NotReady: one of them is not there.
        """
        return [(v.spec.name, v.spec.version, v.spec.digest) for v in self._versions()]

    def fingerprint(self) -> bytes:
        """Changes whenever a request would meet other versions of the steps' models."""
        parts = []
        for step in self._steps:
            try:
                part = self._resolve(step.model, step.version).fingerprint()
            except GatewayError:
                part = b""
            parts.append(b"%d:%b" % (len(part), part))
        return b",".join(parts)

    def choose(self) -> tuple[EnsemblePlan, list[StepVersion]]:
        """The versions that the steps' models mean now, and the plan for them.

        Raises:
            NotReady: one is not there, or does not fit any more.
        """
        try:
            versions = self._versions()
        except (NotFound, NotReady) as error:
            raise NotReady(f"ensemble '{self.spec.name}' is not ready: {error}") from None
        planned = self._plan.steps
        if any(version.spec is not step.spec for version, step in zip(versions, planned, strict=True)):
            try:
                self._plan = self._make_plan(versions)
            except ConfigError as error:
                raise NotReady(f"ensemble '{self.spec.name}' is not ready: {error}") from None
        return self._plan, versions

    def _check_not_inside_itself(self) -> None:
        """Raises ConfigError: it is one of its own steps, however deep."""
        seen: set[str] = set()
        names = list(self.dependencies)
        while names:
            name = names.pop()
            if name == self.spec.name:
                raise ConfigError(f"ensemble '{name}' contains itself; a step cannot be the whole")
            if name not in seen:
                seen.add(name)
                names += self._resolve(name, None).dependencies

    def _versions(self) -> list[StepVersion]:
        return [self._resolve(step.model, step.version) for step in self._steps]

    def _make_plan(self, versions: Sequence[StepVersion]) -> EnsemblePlan:
        spec = self.spec
        steps: list[tuple[EnsembleStep, ModelSpec]] = [
            (step, version.spec) for step, version in zip(self._steps, versions, strict=True)
        ]
        return plan_ensemble(spec.name, spec.policy.max_batch_size, spec.inputs, spec.outputs, steps)

    # -- what callers do -----------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        return len(self._runs)

    def submit(self, request: InferRequest) -> None:
        self._admit(request.rows, request.nbytes)
        self._start(request)

    def submit_parts(self, whole: InferRequest, parts: Sequence[InferRequest]) -> None:
        self._admit(whole.rows, whole.nbytes)
        started: list[InferRequest] = []
        try:
            for part in parts:
                self._start(part)
                started.append(part)
        except GatewayError:
            for part in started:
                if (run := self._runs.get(id(part))) is not None:
                    run.drop()
            raise

    def _admit(self, rows: int, nbytes: int) -> None:
        if self._closed is not None:
            self.statistics.reject(self._closed.reason)
            raise type(self._closed)(str(self._closed))
        policy = self.spec.policy
        if (rejected := never_fits(policy, rows, nbytes)) is not None:
            self.statistics.reject(rejected.reason)
            raise rejected.error(rejected.message)
        if self._rows + rows > policy.max_queue_rows or self.nbytes + nbytes > policy.max_queue_bytes:
            self.statistics.reject("queue_rows" if self._rows + rows > policy.max_queue_rows else "queue_bytes")
            raise Overloaded(
                f"Exceeds maximum queue size: {self._rows} rows and {self.nbytes} bytes are on their way through "
                f"ensemble '{self.spec.name}', of {policy.max_queue_rows} rows and {policy.max_queue_bytes} bytes; "
                "retry later"
            )

    def _start(self, request: InferRequest) -> None:
        request.deadline = deadline_of(self.spec.policy, request)
        try:
            plan, versions = self.choose()
        except NotReady as error:
            self.statistics.reject(error.reason)
            raise
        run = self._runs[id(request)] = EnsembleRun(self, request, plan, versions)
        self._rows += request.rows
        request.owner, request.state = self, RUNNING
        try:
            run.begin()
        except GatewayError as error:
            run.drop()
            request.owner, request.state = None, QUEUED
            self.statistics.fail("OTHER", spent_s=self.now() - request.received)
            raise self.named(error) from None

    def abort(self, request: InferRequest) -> None:
        run = self._runs.get(id(request))
        if run is not None:
            if not request.part:
                self.statistics.fail("CANCELED", spent_s=self.now() - request.received)
            run.settle(error=Cancelled("the caller left"))

    def close(self, error: GatewayError) -> None:
        self._closed = error

    def fail_waiting(self, error: GatewayError) -> None:
        for run in list(self._runs.values()):
            self.statistics.reject(error.reason)
            run.settle(error=error)

    def reopen(self) -> None:
        self._closed = None

    async def drained(self) -> None:
        while self._runs:
            self._idle.clear()
            await self._idle.wait()

    def stop(self) -> None:
        """There is no timer of its own: the steps' models keep their deadlines."""

    def queue_statistics(self) -> QueueStatistics:
        oldest = min([run.request.received for run in self._runs.values()], default=None)
        return QueueStatistics(len(self._runs), self._rows, self.nbytes, 0, oldest)

    def __repr__(self) -> str:
        return f"<Ensemble {self.spec.name}/{self.spec.version} {len(self._steps)} steps, {len(self._runs)} under way>"

    # -- what runs need --------------------------------------------------------------------------------------------

    def named(self, error: GatewayError) -> GatewayError:
        """The same error, saying where it came from."""
        known = type(error)(f"in ensemble '{self.spec.name}', {error}")
        known.retry_after_s = error.retry_after_s
        return known

    def ended(self, run: EnsembleRun) -> None:
        if self._runs.pop(id(run.request), None) is not None:
            self._rows -= run.request.rows
        if not self._runs:
            self._idle.set()


def ensemble_spec(wanted: WantedVersion, artifact: Artifact) -> ModelSpec:
    """The signature of an ensemble: what its configuration states, and nothing else."""
    policy = BatchPolicy(
        max_batch_size=wanted.max_batch_size or 0,
        merge=bool(wanted.max_batch_size),  # by the models of its steps
        oversize=wanted.oversize,
        max_queue_rows=wanted.max_queue_rows,
        max_queue_bytes=wanted.max_queue_bytes,
        deadline_s=wanted.deadline_s,
    )
    steps = " → ".join([step.model for step in wanted.scheduling.ensemble])
    return ModelSpec(
        wanted.name, wanted.version, artifact.digest, PLATFORM, wanted.stated_inputs, wanted.stated_outputs, policy,
        f"an ensemble of {steps}; its steps are batched by their models", wanted.scheduling,
    )  # fmt: skip


def check_cacheable(scheduling: Scheduling) -> None:
    """Raises ConfigError: the response cache cannot stand before a model like this."""
    if not scheduling.response_cache:
        return
    if scheduling.sequence is not None:
        raise ConfigError("response_cache: answers within a sequence cannot be cached; write enable: false")
    if scheduling.preserve_ordering:
        raise ConfigError(
            "response_cache: cached answers would overtake others, which preserve_ordering forbids; switch one off"
        )
