"""Made-up input run on a freshly loaded model: what it runs on, whether its rows are independent, what is kept of it.

Rules: chance is seeded, so a model gets the same verdict at every start. A worker that dies meanwhile is waited for: a
neighbour may have killed it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from gateway.backends.interface import Failure, FailureKind, Replica, Success
from gateway.backends.one_shot import TIMEOUT_S, run_once
from gateway.core import batchability
from gateway.core.batchability import SignatureTensor, Verdict
from gateway.core.model import ModelSpec
from gateway.core.request import InputTensor
from gateway.core.sequence_tensors import as_executed
from gateway.errors import ModelError

if TYPE_CHECKING:
    from gateway.loading import LoadedModel

PROOF_SEED: Final = 20_260_101
"""Proofs are repeatable."""
TRIAL_RUNS: Final = 3
"""Two deaths may be a neighbour's doing in a shared worker; then the suspects get workers of their own."""
SERVER_S: Final = 10.0
"""How long a remote server is given for a run of made-up input: one that hangs must not hold up the start."""
WORKER_BACK_S: Final = 60.0
"""How long a load waits for a worker that died. It is back within a second; a large model takes longer to load."""


_OF_THE_MOMENT: Final = (FailureKind.TIMEOUT, FailureKind.OVERLOAD, FailureKind.NOT_SENT)
"""Failures that say nothing of the model."""


class ServerLost(ModelError):
    """The remote server that a load was trying the model on went away; another one may still have it."""


class RunTimedOut(ModelError):
    """The model did not answer in time, or its worker was not back in time; on a machine that is less busy it may."""


Trial = tuple[list[InputTensor | None], Success]
"""One tensor per input of the model file, None for those left out, and the answer."""


def spent_s(trial: Trial | None) -> float:
    return 0.0 if trial is None else trial[1].compute_infer_ns / 1e9


def rows_of(inputs: Sequence[InputTensor | None]) -> int:
    return next(tensor.shape[0] for tensor in inputs if tensor is not None)


async def try_out(
    loaded: LoadedModel,
    inputs: Sequence[SignatureTensor | None],
    outputs: tuple[SignatureTensor, ...],
    rows: int | None,
) -> Trial | None:
    """The first made-up input that the model runs on, with its answer."""
    rng = np.random.default_rng(PROOF_SEED)
    tried = tuple(tensor for tensor in inputs if tensor is not None)
    for candidate in batchability.trial_inputs(tried, rows, rng):
        made = iter(candidate)
        tensors = [None if tensor is None else next(made) for tensor in inputs]
        outcome = await run_patiently(loaded.replicas[0], tensors, _places(loaded, outputs))
        if isinstance(outcome, Success):
            return tensors, outcome
        if outcome.kind is FailureKind.TIMEOUT and loaded.replicas[0].traits.kind == "oip":
            break  # whatever it is asked
    return None


def _places(loaded: LoadedModel, outputs: tuple[SignatureTensor, ...]) -> tuple[int, ...]:
    """Indexes of `outputs` in the model file."""
    index = {tensor.name: place for place, tensor in enumerate(loaded.outputs)}
    return tuple(index[tensor.name] for tensor in outputs)


async def run_patiently(
    replica: Replica, inputs: Sequence[InputTensor | None], outputs: tuple[int, ...]
) -> Success | Failure:
    """Run made-up input. A worker that dies meanwhile may have died of something else: the run is repeated.

    Raises:
        ServerLost: a remote server goes away and does not come back.
        RunTimedOut: the worker does not come back, or was ended because the run took too long.
        ModelError: the worker dies every time.
    """
    why, late = "", False
    for _ in range(TRIAL_RUNS):
        patience_s = SERVER_S if replica.traits.kind == "oip" else TIMEOUT_S
        outcome = await run_once(replica, inputs, outputs, patience_s)
        if isinstance(outcome, Success) or replica.available:
            return outcome
        why, late = outcome.in_full, outcome.kind is FailureKind.TIMEOUT
        back = asyncio.Event()
        replica.set_listener(back.set)
        try:
            async with asyncio.timeout(SERVER_S if replica.traits.kind == "oip" else WORKER_BACK_S):
                while not replica.available:
                    back.clear()
                    await back.wait()
        except TimeoutError:
            late = True
            break
    if replica.traits.kind == "oip":
        raise ServerLost(f"the model's server {replica.name} was lost on a trial run: {why}")
    text = f"the model's worker {replica.name} died on every trial run: {why}"
    raise RunTimedOut(text) if late else ModelError(text)


def unanswered(failure: Failure, text: str) -> ModelError:
    """The error of a load whose run failed."""
    return (RunTimedOut if failure.kind in _OF_THE_MOMENT else ModelError)(f"{text}: {failure.in_full}")


async def prove_rows(loaded: LoadedModel, trial: Trial | None, outputs: tuple[SignatureTensor, ...]) -> Verdict:
    if trial is None:
        return Verdict(False, "it could not be run on made-up input, so its rows are not proven independent")
    inputs, together = trial
    alone = []
    for row in range(rows_of(inputs)):
        cut = [None if tensor is None else batchability.one_row([tensor], row)[0] for tensor in inputs]
        outcome = await run_patiently(loaded.replicas[0], cut, _places(loaded, outputs))
        if isinstance(outcome, Failure):
            return Verdict(False, f"it does not run on a single row: {outcome.in_full}")
        alone.append(list(outcome.outputs))
    return batchability.compare(list(together.outputs), alone)


def probe_of(
    spec: ModelSpec, loaded: LoadedModel, trial: Trial | None, *, row: bool = False
) -> tuple[InputTensor | None, ...] | None:
    """What ran on trial as one tensor per input of the executed signature; `row`: its first row only."""
    if trial is None or not spec.resilience.idempotent:
        return None
    given = {tensor.name: sent for tensor, sent in zip(loaded.inputs, trial[0], strict=True)}
    found: list[InputTensor | None] = []
    for tensor in as_executed(spec).inputs:
        sent = given[tensor.name]
        if sent is not None and row:
            (sent,) = batchability.one_row([sent], 0)
        if sent is not None and tensor.reshape is not None:
            if -1 in tensor.dims:
                return None  # which of the served shapes made the model's is anybody's guess
            lead = sent.shape[:1] if spec.batched else ()
            sent = InputTensor(sent.datatype, (*lead, *tensor.dims), sent.values, sent.buffer)
        found.append(sent)
    return tuple(found)
