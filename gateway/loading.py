"""From a model file on its workers to a signature that is served: how it may be batched, proven, and warmed up.

Rules: config.pbtxt and the configuration may only agree with the file; batching is proven by running the same rows
alone and together (`core/batchability.py`) unless somebody decided; every instance has run once before the model
takes requests. A worker that dies meanwhile is waited for: a neighbour may have killed it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np

from gateway.backends.interface import Failure, Replica, Success
from gateway.backends.one_shot import run_once
from gateway.core import batchability
from gateway.core.batchability import SignatureTensor, Verdict
from gateway.core.model import Artifact, BatchPolicy, ModelSpec, Oversize, TensorSpec
from gateway.core.request import InputTensor
from gateway.core.scheduling import PLAIN, Scheduling
from gateway.errors import ConfigError, ModelError

log = logging.getLogger("gateway.catalog")

CHOSEN_MAX_BATCH_SIZE = 64
"""Rows, where neither config.pbtxt nor the configuration states a size."""
PROOF_SEED = 20_260_101
"""Proofs are repeatable: the same model gets the same verdict at every start."""
TRIAL_RUNS: Final = 3
"""Two deaths may be a neighbour's doing in a shared worker; then the suspects get workers of their own."""
WORKER_BACK_S: Final = 60.0
"""How long a load waits for a worker that died. It is back within a second; a large model takes longer to load."""


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


class LoadedModel(Protocol):
    """What loading gives back; `workers.pool.LoadedModel` fits."""

    @property
    def replicas(self) -> Sequence[Replica]: ...
    @property
    def inputs(self) -> Sequence[SignatureTensor]: ...
    @property
    def outputs(self) -> Sequence[SignatureTensor]: ...

    def set_warm_up(self, batches: list[list[InputTensor]], /) -> None:
        """Inputs run on an instance after its worker was restarted, before it takes requests again."""

    async def unload(self) -> None: ...


async def settle_spec(wanted: WantedVersion, artifact: Artifact, loaded: LoadedModel) -> tuple[ModelSpec, float]:
    """Signature, batching policy and warm-up of a freshly loaded model; with it the seconds a row took on trial, 0.0 if
    the model ran on no made-up input.

    Raises:
        ConfigError: config.pbtxt or the configuration contradicts the model file.
        ModelError: the model cannot run.
    """
    inputs, outputs = tuple(loaded.inputs), tuple(loaded.outputs)
    obstacle = batchability.obstacle(inputs, outputs)
    if obstacle is not None and wanted.max_batch_size:
        raise ConfigError(
            f"max_batch_size is {wanted.max_batch_size}, but the model cannot batch: {obstacle}; set it to 0"
        )
    why = obstacle or _kept_apart(wanted, inputs)
    if why is not None:
        size = (wanted.max_batch_size or 0) if obstacle is None else 0
        spec = _spec(wanted, artifact, inputs, outputs, size, merge=False, note=f"not batched: {why}")
        # Only shapes are unknown here: a model that will not run on made-up input may still run on real input.
        trial = await _trial(loaded, inputs, outputs, None)
        await _warm_up(loaded, trial)
        return spec, _spent_s(trial)
    limit = wanted.max_batch_size or CHOSEN_MAX_BATCH_SIZE
    trial = await _trial(loaded, inputs, outputs, min(batchability.PROOF_ROWS, max(limit, 2)))
    verdict = await _prove(loaded, trial, len(outputs))
    if verdict.batchable or wanted.batching == "on":
        note = f"batches up to {limit} rows: {'batching is on' if wanted.batching == 'on' else verdict.why}"
        spec = _spec(wanted, artifact, inputs, outputs, limit, merge=True, note=note)
    else:
        log.warning(
            "model %s version %s: requests are not merged: %s (set batching: on to override)",
            wanted.name, wanted.version, verdict.why,
        )  # fmt: skip
        size = limit if wanted.size_is_stated else 0
        spec = _spec(wanted, artifact, inputs, outputs, size, merge=False, note=f"not batched: {verdict.why}")
    await _warm_up(loaded, trial)
    return spec, _spent_s(trial) / (trial[0][0].shape[0] if trial is not None else 1)


def _spent_s(trial: tuple[list[InputTensor], Success] | None) -> float:
    return 0.0 if trial is None else trial[1].compute_infer_ns / 1e9


def _kept_apart(wanted: WantedVersion, inputs: tuple[SignatureTensor, ...]) -> str | None:
    """Why somebody decided that this model is not batched; None where nobody did."""
    if wanted.max_batch_size == 0:
        return "max_batch_size is 0"
    if wanted.batching == "off":
        return "batching is off"
    ranks = {tensor.name: len(tensor.shape) for tensor in inputs}
    full = any(len(tensor.dims) == ranks.get(tensor.name) for tensor in wanted.stated_inputs)
    if wanted.max_batch_size is None and full:
        return "config.pbtxt states whole shapes and no max_batch_size"
    return None


async def _trial(
    loaded: LoadedModel,
    inputs: tuple[SignatureTensor, ...],
    outputs: tuple[SignatureTensor, ...],
    rows: int | None,
) -> tuple[list[InputTensor], Success] | None:
    """The first made-up input that the model runs on, with its answer."""
    rng = np.random.default_rng(PROOF_SEED)
    for candidate in batchability.trial_inputs(inputs, rows, rng):
        outcome = await _run(loaded.replicas[0], candidate, tuple(range(len(outputs))))
        if isinstance(outcome, Success):
            return candidate, outcome
    return None


async def _run(replica: Replica, inputs: list[InputTensor], outputs: tuple[int, ...]) -> Success | Failure:
    """Run made-up input. A worker that dies meanwhile may have died of something else: the run is repeated.

    Raises:
        ModelError: the worker dies every time, or does not come back.
    """
    why = ""
    for _ in range(TRIAL_RUNS):
        outcome = await run_once(replica, inputs, outputs)
        if isinstance(outcome, Success) or replica.available:
            return outcome
        why = outcome.message
        back = asyncio.Event()
        replica.set_listener(back.set)
        try:
            async with asyncio.timeout(WORKER_BACK_S):
                while not replica.available:
                    back.clear()
                    await back.wait()
        except TimeoutError:
            break
    raise ModelError(f"the model's worker {replica.name} died on every trial run: {why}")


async def _prove(loaded: LoadedModel, trial: tuple[list[InputTensor], Success] | None, outputs: int) -> Verdict:
    if trial is None:
        return Verdict(False, "it could not be run on made-up input, so its rows are not proven independent")
    inputs, together = trial
    alone = []
    for row in range(inputs[0].shape[0]):
        outcome = await _run(loaded.replicas[0], batchability.one_row(inputs, row), tuple(range(outputs)))
        if isinstance(outcome, Failure):
            return Verdict(False, f"it does not run on a single row: {outcome.message}")
        alone.append(list(outcome.outputs))
    return batchability.compare(list(together.outputs), alone)


async def _warm_up(loaded: LoadedModel, trial: tuple[list[InputTensor], Success] | None) -> None:
    """Run every instance once, and remember how to do so again after a restart."""
    if trial is None:
        return
    inputs, _ = trial
    loaded.set_warm_up([inputs])
    for replica in loaded.replicas[1:]:
        outcome = await _run(replica, inputs, (0,))
        if isinstance(outcome, Failure):
            raise ModelError(f"warm-up failed on {replica.name}: {outcome.message}")


def _spec(
    wanted: WantedVersion,
    artifact: Artifact,
    inputs: tuple[SignatureTensor, ...],
    outputs: tuple[SignatureTensor, ...],
    max_batch_size: int,
    *,
    merge: bool,
    note: str,
) -> ModelSpec:
    policy = BatchPolicy(
        max_batch_size=max_batch_size,
        merge=merge,
        max_queue_delay_s=wanted.max_queue_delay_s,
        preferred_batch_sizes=tuple(size for size in wanted.preferred_batch_sizes if size <= max_batch_size),
        oversize=wanted.oversize if merge else "reject",
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
        "onnxruntime_onnx",
        _tensors("input", inputs, wanted.stated_inputs, batched=batched, short=short),
        _tensors("output", outputs, wanted.stated_outputs, batched=batched, short=short),
        policy,
        note,
        wanted.scheduling,
    )


def _tensors(
    role: str, actual: tuple[SignatureTensor, ...], stated: tuple[TensorSpec, ...], *, batched: bool, short: bool
) -> tuple[TensorSpec, ...]:
    """Signature as served: names, datatypes, dims and order are the file's; config.pbtxt may only agree.

    `short`: its dims may lack a variable first dimension that the served ones have.

    Raises:
        ConfigError: config.pbtxt contradicts the file.
    """
    specs = {
        tensor.name: TensorSpec(
            tensor.name,
            tensor.datatype,
            tuple([-1 if dim is None else dim for dim in tensor.shape[1 if batched else 0 :]]),
        )
        for tensor in actual
    }
    if not stated:
        return tuple(specs.values())
    for tensor in stated:
        _check_stated(role, tensor, specs, short=short)
    missing = [name for name in specs if name not in {tensor.name for tensor in stated}]
    if missing and role == "input":
        raise ConfigError(f"config.pbtxt lists no {role} {missing}, which the model file has; list all or none")
    return tuple(specs.values())


def _check_stated(role: str, tensor: TensorSpec, specs: dict[str, TensorSpec], *, short: bool) -> None:
    spec = specs.get(tensor.name)
    if spec is None:
        raise ConfigError(f"config.pbtxt names the {role} '{tensor.name}', but the model file has {sorted(specs)}")
    if spec.datatype is not tensor.datatype:
        raise ConfigError(
            f"config.pbtxt says {role} '{tensor.name}' is {tensor.datatype}, the model file says {spec.datatype}"
        )
    dims = spec.dims
    if short and dims[:1] == (-1,) and len(dims) == len(tensor.dims) + 1:
        dims = dims[1:]
    fits = len(dims) == len(tensor.dims) and all(
        -1 in (want, have) or want == have for want, have in zip(tensor.dims, dims, strict=True)
    )
    if not fits:
        raise ConfigError(
            f"config.pbtxt says {role} '{tensor.name}' has dims {list(tensor.dims)}, the model file says "
            f"{list(spec.dims)}"
        )
