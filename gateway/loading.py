"""From a model file on its workers to a signature that is served: how it may be batched, proven, and warmed up.

Rules: config.pbtxt and the configuration may only agree with the file (loading_signature.py); batching is proven by
running the same rows alone and together (`core/batchability.py`) unless somebody decided, with the optional inputs and
without; every instance has run once, and every sample of `model_warmup` (loading_warm_up.py), before the model takes
requests. A worker that dies meanwhile is waited for: a neighbour may have killed it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

from gateway.backends.binding import Binding, BoundReplica
from gateway.backends.interface import Failure, Replica
from gateway.core import batchability, ragged
from gateway.core.batchability import SignatureTensor, Verdict
from gateway.core.log_policy import LOG_POLICY, LogPolicy
from gateway.core.model import ONE_ROW, Artifact, BatchPolicy, ModelSpec, Oversize, TensorSpec
from gateway.core.request import InputTensor
from gateway.core.resilience import RESILIENCE, Resilience
from gateway.core.scheduling import PLAIN, Scheduling
from gateway.core.sequence_tensors import added_inputs, as_executed, check_sequences, with_added
from gateway.errors import ConfigError
from gateway.loading_golden import check_golden
from gateway.loading_ragged import MADE_UP, by_rows, prove
from gateway.loading_signature import (
    Signature,
    check_filled,
    chosen,
    hidden_tensors,
    kept_outputs,
    narrowed,
    served,
)
from gateway.loading_trial import (
    PROOF_SEED,
    Trial,
    probe_of,
    prove_rows,
    rows_of,
    run_patiently,
    spent_s,
    try_out,
    unanswered,
)
from gateway.loading_warm_up import WarmUp, read_samples
from gateway.protocol import config_document
from gateway.registry.golden_file import GoldenFile

log = logging.getLogger("gateway.catalog")

CHOSEN_MAX_BATCH_SIZE = 64
"""Rows, where neither config.pbtxt nor the configuration states a size."""


def _no_side_file(name: str) -> bytes:
    raise ConfigError(f"the model has no directory, and its configuration names the file {name} in it")


@dataclass(frozen=True, slots=True)
class WantedVersion:
    """One version to serve, with everything that was settled about it before loading."""

    name: str
    version: str
    read: Callable[[], tuple[Artifact, bytes | None]]
    """Reads and hashes the bytes, and the version's `provenance.json` if it has one; runs in a thread."""
    load: Callable[[Artifact], Awaitable[LoadedModel]]
    digest_pin: str | None
    batching: Literal["auto", "on", "off"]
    max_batch_size: int | None
    """None: the gateway chooses."""
    size_is_stated: bool
    """`max_batch_size` comes from config.pbtxt or the configuration."""
    max_queue_delay_s: float
    preferred_batch_sizes: tuple[int, ...]
    oversize: Oversize
    max_queue_rows: int
    max_queue_bytes: int
    deadline_s: float
    stated_inputs: tuple[TensorSpec, ...] = ()
    """As config.pbtxt states them; dims without the batch dimension if `max_batch_size` is above 0."""
    stated_outputs: tuple[TensorSpec, ...] = ()
    scheduling: Scheduling = PLAIN
    config_text: str = ""
    """config.pbtxt as read; empty: there is none."""
    side_file: Callable[[str], bytes] = _no_side_file
    """Reads a file below the model's directory, `warmup/…`; runs in a thread. Raises ConfigError."""
    resilience: Resilience = RESILIENCE
    logged: LogPolicy = LOG_POLICY
    platform: str = "onnxruntime_onnx"
    forwards_parameters: bool = False
    independent: str = ""
    """Why rows are known to be independent without a proof, in words; empty: they are not."""
    apart: str = ""
    """Why requests must not be merged, in words; empty: nothing is known against it."""
    untried: str = ""
    """Why the model must not be run on made-up input, in words; empty: it may be."""
    golden: Callable[[], GoldenFile | None] | None = None
    """Reads the golden inputs of the version, once `read` was called; runs in a thread. Raises ConfigError."""
    identity: str = ""
    """Names the content, as its source does before a byte is fetched: equal texts mean equal files. Empty: the digest
    does."""
    uri: str = ""
    """Where `identity` was found; empty: what `read` says."""
    confirm: Callable[[str, str], None] | None = None
    """Writes down that this version serves, for which reference (empty: its own), and the identity of what that means
    if an operator chose this one instead (else empty); called in a thread once it serves."""
    facts: Callable[[], dict[str, Any]] | None = None
    """What its registry says of it, for the manifest; None: it comes from no registry."""
    stale: str = ""
    """Why it is what was served last and not what its registry says now; empty: it is that."""
    instead_of: str = ""
    """Identity of what its reference meant when an operator chose this version instead; empty: nobody did."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What loading found out."""

    spec: ModelSpec
    row_s: float
    """Seconds a row took on trial; 0.0: the model ran on no made-up input."""
    probe: tuple[InputTensor | None, ...] | None
    """Made-up input on which the model ran, a tensor per input of the executed signature: one row, or the fewest that
    ran; None: nothing ran, or nothing may be run twice."""


class LoadedModel(Protocol):
    """What loading gives back; `workers.pool.LoadedModel` fits."""

    @property
    def replicas(self) -> Sequence[Replica]: ...
    @property
    def inputs(self) -> Sequence[SignatureTensor]: ...
    @property
    def outputs(self) -> Sequence[SignatureTensor]: ...

    def set_warm_up(self, batches: Sequence[Sequence[InputTensor | None]], /) -> None:
        """Inputs (one per model input; None: left out) run on an instance after its worker was restarted, before it
        takes requests again."""

    async def unload(self) -> None: ...


@runtime_checkable
class Bounded(Protocol):
    """A `LoadedModel` some of whose replicas take no more than so many rows at once."""

    @property
    def most_rows(self) -> int:
        """0: any number."""


def _chosen_rows(loaded: LoadedModel) -> int:
    """The size of batches where nobody states one."""
    most = loaded.most_rows if isinstance(loaded, Bounded) else 0
    return min(CHOSEN_MAX_BATCH_SIZE, most) if most else CHOSEN_MAX_BATCH_SIZE


def refuse_not_yet(scheduling: Scheduling) -> None:
    """Raises ConfigError: the model asks for what is read and not built."""
    asked = {
        "sequence_batching.iterative_sequence": scheduling.sequence is not None and scheduling.sequence.iterative,
    }
    for key, stands in asked.items():
        if stands:
            raise ConfigError(f"config.pbtxt: {key} is not supported yet; remove it")


def bound(spec: ModelSpec, loaded: LoadedModel) -> Sequence[Replica]:
    """The replicas as the served signature names their tensors, with those that the gateway adds to a sequence's steps;
    the loaded ones themselves where that is the same."""
    binding = Binding(as_executed(spec), loaded.inputs, loaded.outputs)
    return loaded.replicas if binding.neutral else [BoundReplica(replica, binding) for replica in loaded.replicas]


def document(wanted: WantedVersion, artifact: Artifact, spec: ModelSpec, instances: int) -> dict[str, Any]:
    """The completed configuration as GET …/config prints it; `instances`: 0 for an ensemble. Raises ConfigError."""
    return config_document.complete(spec, wanted.config_text, instances, artifact.model_file)


async def check_answers(wanted: WantedVersion, spec: ModelSpec, loaded: LoadedModel) -> None:
    """Whether a version answers its golden inputs, if it has any. Raises ConfigError, ModelError."""
    golden = None if wanted.golden is None else await asyncio.to_thread(wanted.golden)
    if golden is not None:
        count = await check_golden(golden, spec, bound(spec, loaded))
        log.info("model %s version %s answers %d golden inputs rightly", spec.name, spec.version, count)


async def settle_spec(wanted: WantedVersion, artifact: Artifact, loaded: LoadedModel) -> Settled:
    """Signature, batching policy and warm-up of a freshly loaded model.

    Raises:
        ConfigError: config.pbtxt or the configuration contradicts the model file.
        ModelError: the model cannot run.
    """
    refuse_not_yet(wanted.scheduling)
    check_filled(wanted.scheduling, loaded.inputs, loaded.outputs)
    signature = _signature(wanted, loaded)
    if ragged.asked_for(wanted.scheduling, wanted.stated_inputs):
        return await _settle_ragged(wanted, artifact, loaded, signature)
    outputs = kept_outputs(wanted.scheduling, signature, loaded.outputs)
    obstacle = batchability.obstacle(signature.inputs, signature.outputs)
    if obstacle is not None and wanted.max_batch_size:
        raise ConfigError(
            f"max_batch_size is {wanted.max_batch_size}, but the model cannot batch: {obstacle}; set it to 0"
        )
    why = obstacle or _kept_apart(wanted, signature.inputs)
    if why is not None:
        size = (wanted.max_batch_size or 0) if obstacle is None else 0
        spec = _spec(wanted, artifact, signature, size, merge=False, note=f"not batched: {why}")
        # Only shapes are unknown here: a model that will not run on made-up input may still run on real input.
        trial = await _trial(wanted, loaded, _tried(wanted, loaded, whole=not size), outputs, None)
        await _warm_up(wanted, loaded, spec, trial)
        return Settled(spec, spent_s(trial), probe_of(spec, loaded, trial))
    limit = wanted.max_batch_size or _chosen_rows(loaded)
    # Who states a size without a proof may refuse more rows than that.
    rows = min(batchability.PROOF_ROWS, limit if wanted.independent else max(limit, 2))
    tried = _tried(wanted, loaded, whole=False)
    trial = await _trial(wanted, loaded, tried, outputs, rows)
    verdict = await _verdict(wanted, loaded, trial, outputs)
    if verdict.batchable and not wanted.independent and any(t is not None and t.optional for t in tried):
        required = [tensor if tensor is not None and not tensor.optional else None for tensor in tried]
        verdict = await prove_rows(loaded, await _trial(wanted, loaded, required, outputs, rows), outputs)
    if verdict.batchable or wanted.batching == "on":
        note = f"batches up to {limit} rows: {'batching is on' if wanted.batching == 'on' else verdict.why}"
        spec = _spec(wanted, artifact, signature, limit, merge=True, note=note)
    else:
        _warn_not_merged(wanted, verdict)
        # Rows of a sequence are slots: there are as many, merged or not.
        size = limit if wanted.size_is_stated or wanted.scheduling.sequence is not None else 0
        spec = _spec(wanted, artifact, signature, size, merge=False, note=f"not batched: {verdict.why}")
    await _warm_up(wanted, loaded, spec, trial)
    row_s = spent_s(trial) / (rows_of(trial[0]) if trial is not None else 1)
    return Settled(spec, row_s, probe_of(spec, loaded, trial, row=spec.batched and verdict.batchable))


async def _settle_ragged(
    wanted: WantedVersion, artifact: Artifact, loaded: LoadedModel, signature: Signature
) -> Settled:
    """`settle_spec` for a model whose batches are flat (loading_ragged.py)."""
    limit = wanted.max_batch_size or 0
    signature = by_rows(
        signature, loaded.inputs, wanted.scheduling, wanted.stated_inputs, wanted.stated_outputs, limit
    )  # fmt: skip
    obstacle = batchability.obstacle(signature.inputs, signature.outputs)
    if obstacle is not None:
        raise ConfigError(f"max_batch_size is {limit}, but the model cannot batch: {obstacle}")
    spec = _spec(wanted, artifact, signature, limit, merge=True, note="")
    proof_of = partial(
        prove, spec, loaded.inputs, loaded.outputs, partial(run_patiently, loaded.replicas[0]), PROOF_SEED
    )
    proof = await proof_of()
    verdict, one_row = proof.verdict, proof.one_row
    if verdict.batchable and any(tensor.optional for tensor in spec.inputs):
        without = await proof_of(optional=False)
        verdict, one_row = without.verdict, one_row or without.one_row
    kept_apart = _kept_apart(wanted, signature.inputs)
    merge = kept_apart is None and (verdict.batchable or wanted.batching == "on")
    if merge:
        note = f"batches up to {limit} rows: {'batching is on' if wanted.batching == 'on' else verdict.why}"
    else:
        note = f"not batched: {kept_apart or verdict.why}"
        if kept_apart is None:
            note += MADE_UP
            _warn_not_merged(wanted, verdict)
    if one_row:
        note += f"; {ONE_ROW}"
    policy = replace(spec.policy, merge=merge, oversize="reject", one_row=one_row)
    spec = replace(spec, policy=policy, batching_note=note)
    await _warm_up(wanted, loaded, spec, proof.trial)
    return Settled(spec, spent_s(proof.trial) / proof.rows, None)


def _warn_not_merged(wanted: WantedVersion, verdict: Verdict) -> None:
    log.warning(
        "model %s version %s: requests are not merged: %s (set batching: on to override)",
        wanted.name, wanted.version, verdict.why,
    )  # fmt: skip


def _signature(wanted: WantedVersion, loaded: LoadedModel) -> Signature:
    inputs, outputs = hidden_tensors(wanted.scheduling)
    return Signature(
        chosen("input", loaded.inputs, wanted.stated_inputs, inputs),
        chosen("output", loaded.outputs, wanted.stated_outputs, outputs),
    )


def _tried(wanted: WantedVersion, loaded: LoadedModel, *, whole: bool) -> list[SignatureTensor | None]:
    """The model's inputs with the dims that are enforced; None for those with a default that are not served.

    `whole`: stated dims hold every dimension, also the first."""
    stated = {tensor.name for tensor in wanted.stated_inputs}
    dims = (*wanted.stated_inputs, *added_inputs(wanted.scheduling))
    tensors = narrowed(tuple(loaded.inputs), dims, batched=not whole)
    return [tensor if not tensor.optional or tensor.name in stated else None for tensor in tensors]


def _kept_apart(wanted: WantedVersion, inputs: tuple[SignatureTensor, ...]) -> str | None:
    """Why somebody decided that this model is not batched; None where nobody did."""
    if wanted.max_batch_size == 0:
        return "max_batch_size is 0"
    if wanted.batching == "off":
        return "batching is off"
    if wanted.apart:
        return wanted.apart
    ranks = {tensor.name: len(tensor.shape) for tensor in inputs}
    own = [(tensor.name, tensor.dims if tensor.reshape is None else tensor.reshape) for tensor in wanted.stated_inputs]
    full = any(len(dims) == ranks.get(name) for name, dims in own)
    if wanted.max_batch_size is None and full:
        return "config.pbtxt states whole shapes and no max_batch_size"
    return None


async def _trial(
    wanted: WantedVersion,
    loaded: LoadedModel,
    inputs: Sequence[SignatureTensor | None],
    outputs: tuple[SignatureTensor, ...],
    rows: int | None,
) -> Trial | None:
    return None if wanted.untried else await try_out(loaded, inputs, outputs, rows)


async def _verdict(
    wanted: WantedVersion, loaded: LoadedModel, trial: Trial | None, outputs: tuple[SignatureTensor, ...]
) -> Verdict:
    if wanted.independent:
        return Verdict(True, wanted.independent)
    if wanted.untried:
        return Verdict(False, f"{wanted.untried}, so its rows are not proven independent")
    return await prove_rows(loaded, trial, outputs)


async def _warm_up(wanted: WantedVersion, loaded: LoadedModel, spec: ModelSpec, trial: Trial | None) -> None:
    """Run every instance once, and every sample of `model_warmup`; remember how to do so again after a restart."""
    check_sequences(spec, loaded.inputs, loaded.outputs)
    samples = await read_samples(wanted.scheduling.warm_up, spec, wanted.side_file)
    executed = as_executed(spec)
    binding = Binding(executed, loaded.inputs, loaded.outputs)
    outputs = binding.model_outputs(tuple(range(len(executed.outputs))))
    runs = [WarmUp("warm-up", trial[0], 1)] if trial is not None else []
    for sample in samples:
        inputs = binding.model_inputs(with_added(spec, sample.inputs))
        runs.append(WarmUp(f"warm-up sample '{sample.name}'", inputs, sample.count))
    for place, replica in enumerate(loaded.replicas):
        for run in runs[1:] if place == 0 and trial is not None else runs:
            for _ in range(run.count):
                outcome = await run_patiently(replica, run.inputs, outputs)
                if isinstance(outcome, Failure):
                    raise unanswered(outcome, f"{run.name} failed on {replica.name}")
    # A worker that dies from here on is replaced by one that runs the same again.
    loaded.set_warm_up([run.inputs for run in runs for _ in range(run.count)])


def _spec(
    wanted: WantedVersion, artifact: Artifact, signature: Signature, max_batch_size: int, *, merge: bool, note: str
) -> ModelSpec:
    policy = BatchPolicy(
        max_batch_size=max_batch_size,
        merge=merge,
        max_queue_delay_s=wanted.max_queue_delay_s,
        preferred_batch_sizes=tuple(size for size in wanted.preferred_batch_sizes if size <= max_batch_size),
        oversize=wanted.oversize if merge and wanted.scheduling.sequence is None else "reject",
        max_queue_rows=wanted.max_queue_rows,
        max_queue_bytes=wanted.max_queue_bytes,
        deadline_s=wanted.deadline_s,
    )
    batched = bool(max_batch_size)
    # Who states no size may leave the batch dimension out of the dims, and the model turn out not to be batchable.
    short = not batched and wanted.max_batch_size is None
    return ModelSpec(
        wanted.name,
        wanted.version,
        artifact.digest,
        wanted.platform,
        served("input", signature.inputs, wanted.stated_inputs, batched=batched, short=short),
        served("output", signature.outputs, wanted.stated_outputs, batched=batched, short=short),
        policy,
        note,
        wanted.scheduling,
        wanted.resilience,
        wanted.forwards_parameters,
    )
