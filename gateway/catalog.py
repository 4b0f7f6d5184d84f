"""The models: which versions exist, what state each is in, and which one a name means.

Loading a version: read and hash its bytes → load its instances on workers → read its signature → settle how it may
be batched, with proof → warm every instance up → READY. A failure at any step leaves that version FAILED with its
reason, and everyone else untouched. States change only along `core.model.TRANSITIONS`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Protocol

import numpy as np

from gateway.backends.interface import Failure, Replica, Success
from gateway.backends.one_shot import run_once
from gateway.core import batchability
from gateway.core.batchability import SignatureTensor, Verdict
from gateway.core.model import (
    Artifact,
    BatchPolicy,
    ModelEvent,
    ModelSpec,
    ModelState,
    Oversize,
    TensorSpec,
    next_state,
)
from gateway.core.request import InputTensor
from gateway.errors import ConfigError, GatewayError, ModelError, NotFound, NotReady
from gateway.observe.record import ModelStatistics
from gateway.scheduler import Scheduler

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


class ServedVersion:
    """One model version in the catalog. `scheduler` is there exactly while requests can be taken."""

    def __init__(self, wanted: WantedVersion) -> None:
        self.name = wanted.name
        self.version = wanted.version
        self.wanted = wanted
        self.state = ModelState.LOADING
        self.reason = ""
        """Why it is not READY, in words."""
        self.statistics = ModelStatistics()
        self.artifact: Artifact | None = None
        """Files and digest; the model's bytes are not kept."""
        self.sidecar: bytes | None = None
        """Content of `provenance.json`."""
        self.loaded: LoadedModel | None = None
        self.scheduler: Scheduler | None = None
        self.codec: Any = None
        """Belongs to the ingress: decoder and encoder made for this version's signature."""
        self.split_rows = 0
        """A request of more rows than this is cut, and its answer put together again; 0: no request is."""
        self._spec: ModelSpec | None = None

    @property
    def spec(self) -> ModelSpec:
        """The signature; only known once the version was loaded."""
        if self._spec is None:
            raise NotReady(
                f"model '{self.name}' version {self.version} is not at ready state: {self.reason or 'loading'}"
            )
        return self._spec

    @property
    def replicas(self) -> Sequence[Replica]:
        return self.loaded.replicas if self.loaded is not None else ()

    @property
    def ready(self) -> bool:
        """Whether it can answer now: READY, and at least one replica is there to do it."""
        return self.state is ModelState.READY and any(replica.available for replica in self.replicas)

    def settle(self, spec: ModelSpec, loaded: LoadedModel) -> None:
        self._spec = spec
        self.split_rows = spec.policy.max_batch_size
        self.loaded = loaded
        self.scheduler = Scheduler(spec, loaded.replicas, self.statistics)

    def __repr__(self) -> str:
        return f"<ServedVersion {self.name}/{self.version} {self.state.value}>"


class Catalog:
    """All versions by name. Lookups are two dictionary reads; everything slow happens at load."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str, ServedVersion]] = {}
        self._newest: dict[str, ServedVersion] = {}
        """The version a name without a version means: the highest that is READY."""

    # -- lookups -------------------------------------------------------------------------------------------------

    def resolve(self, name: str, version: str | None) -> ServedVersion:
        """The READY version that `name` (and `version`, None: newest) means.

        Raises:
            NotFound: no such model or version.
            NotReady: it exists but cannot answer now; the text says why.
        """
        if version is None:
            found = self._newest.get(name)
            if found is not None:
                return found
        found = self.find(name, version)
        if found.state is not ModelState.READY:
            raise NotReady(
                f"Request for model '{name}' version {found.version}, which is not at ready state: "
                f"{found.reason or found.state.value.lower()}"
            )
        return found

    def find(self, name: str, version: str | None) -> ServedVersion:
        """Like `resolve`, in whatever state; without a version the highest."""
        versions = self._models.get(name)
        if not versions:
            raise NotFound(f"Request for unknown model: '{_short(name)}' is not found")
        if version is None:
            return self._newest.get(name) or versions[max(versions, key=_numeric)]
        found = versions.get(version)
        if found is None:
            raise NotFound(f"Request for unknown model: '{name}' version {_short(version)} is not found")
        return found

    def ready_versions(self, name: str) -> list[str]:
        versions = self._models.get(name, {})
        return sorted((v.version for v in versions.values() if v.state is ModelState.READY), key=_numeric)

    def versions(self) -> list[ServedVersion]:
        """Every version, by name and number."""
        return [
            self._models[name][version]
            for name in sorted(self._models)
            for version in sorted(self._models[name], key=_numeric)
        ]

    def ready(self) -> bool:
        """Whether every version that should be served can take requests."""
        return all(version.ready for version in self.versions())

    # -- loading ---------------------------------------------------------------------------------------------------

    async def load_all(
        self,
        wanted: Iterable[WantedVersion],
        on_loaded: Callable[[str], None] = lambda name: None,
        parallel: int = 2,
    ) -> list[ServedVersion]:
        """Load versions, a few at a time; returns those that FAILED. Never raises for a model's sake.

        `on_loaded` is called with a model's name when it is done, whichever way.
        """
        gate = asyncio.Semaphore(parallel)

        async def one(version: WantedVersion) -> ServedVersion:
            async with gate:
                served = await self.load(version)
            on_loaded(version.name)
            return served

        served = await asyncio.gather(*[one(version) for version in wanted])
        return [version for version in served if version.state is ModelState.FAILED]

    async def load(self, wanted: WantedVersion) -> ServedVersion:
        """Load one version; the outcome is its state and reason."""
        version = ServedVersion(wanted)
        self._models.setdefault(wanted.name, {})[wanted.version] = version
        try:
            await self._load(version)
        except GatewayError as error:
            return _load_failed(version, str(error))
        except Exception as error:
            log.exception("loading a model failed in a way nobody foresaw")
            return _load_failed(version, f"the gateway failed on it: {type(error).__name__}: {error}")
        version.state = next_state(version.state, ModelEvent.LOADED)
        self._elect(version.name)
        spec = version.spec
        log.info("model %s version %s is ready: %s; %s", spec.name, spec.version, spec.batching_note, spec.digest)
        return version

    async def _load(self, version: ServedVersion) -> None:
        wanted = version.wanted
        try:
            artifact, version.sidecar = await asyncio.to_thread(wanted.read)
        except OSError as error:
            raise ConfigError(f"cannot read the model's files: {error.strerror or error}") from error
        if wanted.digest_pin is not None and artifact.digest != wanted.digest_pin:
            raise ConfigError(
                f"the files have digest {artifact.digest}, but the configuration pins {wanted.digest_pin}; "
                "put the right files there or change the pin"
            )
        version.artifact = replace(artifact, model=b"")
        loaded = await wanted.load(artifact)
        try:
            spec = await _settle_spec(version.wanted, artifact, loaded)
        except Exception:
            await loaded.unload()
            raise
        version.settle(spec, loaded)

    def failed(self, name: str, version: str, reason: str) -> None:
        """A READY version's workers crash too often: it takes no more requests until `recovered`."""
        found = self._models.get(name, {}).get(version)
        if found is None or found.state is not ModelState.READY or found.scheduler is None:
            return
        found.state = next_state(found.state, ModelEvent.CRASH_LOOP)
        found.reason = reason
        self._elect(name)
        error = NotReady(f"model '{name}' version {version} failed: {reason}")
        found.scheduler.close(error)
        found.scheduler.fail_waiting(error)

    def recovered(self, name: str, version: str) -> None:
        found = self._models.get(name, {}).get(version)
        if found is None or found.state is not ModelState.FAILED or found.scheduler is None:
            return
        found.state = next_state(found.state, ModelEvent.RECOVERED)
        found.reason = ""
        found.scheduler.reopen()
        self._elect(name)

    async def drain(self) -> None:
        """Returns when every accepted request is settled."""
        await asyncio.gather(*[v.scheduler.drained() for v in self.versions() if v.scheduler is not None])

    def stop(self) -> None:
        for version in self.versions():
            if version.scheduler is not None:
                version.scheduler.stop()

    def _elect(self, name: str) -> None:
        ready = self.ready_versions(name)
        if ready:
            self._newest[name] = self._models[name][ready[-1]]
        else:
            self._newest.pop(name, None)


def _load_failed(version: ServedVersion, reason: str) -> ServedVersion:
    version.state = next_state(version.state, ModelEvent.LOAD_FAILED)
    version.reason = reason
    log.error("model %s version %s could not be loaded: %s", version.name, version.version, reason)
    return version


def _numeric(version: str) -> tuple[int, str]:
    return (int(version) if version.isdecimal() else -1, version)


def _short(text: str) -> str:
    return text if len(text) <= 64 else text[:64] + "…"


# -- from a loaded file to a served signature ------------------------------------------------------------------------


async def _settle_spec(wanted: WantedVersion, artifact: Artifact, loaded: LoadedModel) -> ModelSpec:
    """Signature, batching policy and warm-up of a freshly loaded model.

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
        await _warm_up(loaded, await _trial(loaded, inputs, outputs, None))
        return spec
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
    return spec


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
