"""Loading a model with ragged inputs, `batch_input` or `batch_output`: what its file must look like, and its proof.

Rules: such a model batches, and its requests are never split, for what it is told counts requests. A ragged input has
the shape [-1] in the file, and clients give it the dims of config.pbtxt behind the batch dimension. An output under
`batch_output` may have any shape in the file; its dims are config.pbtxt's. What is made for a batch has the rank that
its kind says.

The proof is the ordinary one (core/batchability.py) on requests of different shapes: made-up requests are run alone and
together, and each must get the same answer, or requests are never merged. A padded answer, as wide as the batch's
largest request, is found out that way. If a request of two rows gets the wrong number of rows by itself, the model
answers requests rather than rows, and requests have one row from then on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

import numpy as np

from gateway.backends.binding import Binding
from gateway.core import assembly, batchability
from gateway.core.assembly import AssemblyError
from gateway.core.batchability import SignatureTensor, Verdict
from gateway.core.model import ModelSpec, TensorSpec
from gateway.core.outcome import Failure, Success
from gateway.core.ragged import Ragged
from gateway.core.request import InferRequest, InputTensor, OutputTensor
from gateway.core.scheduling import BatchInputTensor, Scheduling
from gateway.errors import ConfigError
from gateway.loading_signature import Signature

SIZES: Final = (3, 8, 1, 5, 2)
"""Of the variable dims of ragged inputs, request by request; where the model wants others, multiples of one size:"""
FACTORS: Final = (1, 2, 1, 3, 2)
CEILINGS: Final = (8, 2, 1)

Run = Callable[[Sequence[InputTensor | None], tuple[int, ...]], Awaitable[Success | Failure]]
"""Runs made-up input on the model: one tensor per input of its file (None: left out), and places of its outputs."""


# -- signature -----------------------------------------------------------------------------------------------------


def by_rows(
    signature: Signature,
    file_inputs: Sequence[SignatureTensor],
    scheduling: Scheduling,
    stated_inputs: Sequence[TensorSpec],
    stated_outputs: Sequence[TensorSpec],
    max_batch_size: int | None,
) -> Signature:
    """`signature` with everything flat as if it came in rows of the stated dims: what clients see.

    `max_batch_size`: as stated, None if it is not.

    Raises:
        ConfigError: config.pbtxt asks for what cannot be, or contradicts the model file.
    """
    _check_batching(scheduling, stated_inputs, max_batch_size)
    inputs = {tensor.name: tensor for tensor in stated_inputs}
    outputs = {tensor.name: tensor for tensor in stated_outputs}
    seen = Signature(tuple([_ragged(tensor, inputs.get(tensor.name)) for tensor in signature.inputs]), ())
    sources = {tensor.name: tensor for tensor in seen.inputs}
    for made in scheduling.batch_inputs:
        source = _source(f"batch_input {list(made.target_names)}", made.source_inputs[0], sources)
        _check_targets(made, source, {tensor.name: tensor for tensor in file_inputs}, inputs)
    names = list(chain.from_iterable(made.target_names for made in scheduling.batch_inputs))
    for name in sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"config.pbtxt: batch_input makes the input '{name}' twice; keep one of them")
    scattered = {}
    for scatter in scheduling.batch_outputs:
        source = _source(f"batch_output {list(scatter.target_names)}", scatter.source_inputs[0], sources)
        for name in scatter.target_names:
            scattered[name] = _scattered_shape(name, outputs.get(name), source)
    shaped = [replace(tensor, shape=scattered.get(tensor.name, tensor.shape)) for tensor in signature.outputs]
    return Signature(seen.inputs, tuple(shaped))


def _check_batching(scheduling: Scheduling, inputs: Sequence[TensorSpec], max_batch_size: int | None) -> None:
    asked = {
        "allow_ragged_batch": any(tensor.ragged for tensor in inputs),
        "batch_input": bool(scheduling.batch_inputs),
        "batch_output": bool(scheduling.batch_outputs),
    }
    key = next(name for name, stands in asked.items() if stands)
    if not max_batch_size:
        raise ConfigError(f"config.pbtxt: {key} needs a max_batch_size of 1 or more; state it, or remove {key}")
    if scheduling.sequence is not None:
        raise ConfigError(f"config.pbtxt: {key} is not supported together with sequence_batching; remove one of them")


def _ragged(tensor: SignatureTensor, stated: TensorSpec | None) -> SignatureTensor:
    if stated is None or not stated.ragged:
        return tensor
    if stated.optional:
        raise ConfigError(
            f"config.pbtxt: input '{tensor.name}' has allow_ragged_batch, which is not supported for an optional input; "
            "remove one of them"
        )
    if tensor.shape != (None,):
        raise ConfigError(
            f"config.pbtxt expects that the model provides input with shape [-1] for ragged input '{tensor.name}', the "
            f"model file says {_shown(tensor)}; rows lie one behind the other in it, without a batch dimension"
        )
    return replace(tensor, shape=(None, *_model_dims(stated)))


def _model_dims(stated: TensorSpec) -> tuple[int | None, ...]:
    dims = stated.dims if stated.reshape is None else stated.reshape
    return tuple([None if dim == -1 else dim for dim in dims])


def _source(what: str, name: str, inputs: dict[str, SignatureTensor]) -> SignatureTensor:
    source = inputs.get(name)
    if source is None:
        raise ConfigError(f"config.pbtxt: {what}: source_input '{name}' is none of the inputs {sorted(inputs)}")
    if source.optional:
        raise ConfigError(f"config.pbtxt: {what}: source_input '{name}' is optional; nothing describes an absent input")
    return source


def _check_targets(
    made: BatchInputTensor,
    source: SignatureTensor,
    file: dict[str, SignatureTensor],
    stated: dict[str, TensorSpec],
) -> None:
    fits: tuple[int | None, ...] = (None,)
    if made.kind == "BATCH_ITEM_SHAPE":
        fits = (None, len(source.shape) - 1)
    for name in made.target_names:
        if name in stated:
            raise ConfigError(f"config.pbtxt: input '{name}' is made by batch_input; do not list it under input")
        shape = file[name].shape
        if len(shape) != len(fits) or shape[0] is not None or shape[1:] not in ((None,) * (len(fits) - 1), fits[1:]):
            want = [-1 if dim is None else dim for dim in fits]
            raise ConfigError(
                f"config.pbtxt: batch_input kind {made.kind} makes the shape {want}, the model file says "
                f"{_shown(file[name])} for input '{name}'"
            )


def _scattered_shape(name: str, stated: TensorSpec | None, source: SignatureTensor) -> tuple[int | None, ...]:
    if stated is None:
        raise ConfigError(f"config.pbtxt: batch_output names the output '{name}'; list it under output, with its dims")
    if stated.reshape is not None:
        raise ConfigError(f"config.pbtxt: output '{name}' has a reshape, and batch_output gives it a shape; remove one")
    dims = _model_dims(stated)
    if any(dim is None and at + 1 >= len(source.shape) for at, dim in enumerate(dims)):
        raise ConfigError(
            f"config.pbtxt: output '{name}' has dims {list(stated.dims)}, whose variable ones are to be those of input "
            f"'{source.name}', which has {len(source.shape) - 1}; state the others"
        )
    return (None, *dims)


def _shown(tensor: SignatureTensor) -> list[int]:
    return [-1 if dim is None else dim for dim in tensor.shape]


# -- proof ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Proof:
    verdict: Verdict
    trial: tuple[list[InputTensor | None], Success] | None = None
    """What the model ran on first, one tensor per input of its file, and the answer; None: it ran on nothing."""
    rows: int = 1
    """Of the trial."""
    one_row: bool = False
    """A request of two rows is not answered."""


async def prove(
    spec: ModelSpec, inputs: Sequence[SignatureTensor], outputs: Sequence[SignatureTensor], run: Run, seed: int
) -> Proof:
    """Whether requests of different shapes may share a run. `inputs`, `outputs`: the model file's.

    Raises:
        GatewayError: `run` does.
    """
    bench = _Bench(spec, Binding(spec, inputs, outputs), len(inputs), run)
    rng = np.random.default_rng(seed)
    limit = spec.policy.max_batch_size
    for members in _candidates(spec, min(batchability.PROOF_ROWS, max(limit, 2)), rng):
        made = bench.model_inputs(members)
        answer = await bench.run(made)
        if isinstance(answer, Success):
            break
    else:
        return Proof(Verdict(False, "it could not be run on made-up input, so its rows are not proven independent"))
    trial = (made, answer)
    try:
        together = bench.cut(members, answer)
        alone = [await bench.ask(member) for member in members]
    except _Unanswered as error:
        return Proof(Verdict(False, str(error)), trial, len(members))
    verdict = _compare(together, alone)
    if limit < 2:
        return Proof(verdict, trial, len(members))
    two = _doubled(members[1])
    try:
        own = await bench.ask(two)
    except _Unanswered:
        return Proof(verdict, trial, len(members), one_row=True)
    try:
        mixed = await bench.ask_all([members[0], two, members[2]]) if limit >= 4 and len(members) > 2 else [alone[0], own]
    except _Unanswered as error:
        return Proof(Verdict(False, str(error)), trial, len(members))
    return Proof(verdict, trial, len(members))


class _Unanswered(Exception):
    """A run failed, or its answer is not the requests' answer."""
