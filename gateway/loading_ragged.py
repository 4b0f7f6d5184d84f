"""Loading a model with ragged inputs, `batch_input` or `batch_output`: what its file must look like, and its proof.

Rules: such a model batches, and its requests are never split, for what it is told counts requests. A ragged input has
the shape [-1] in the file, and clients give it the dims of config.pbtxt behind the batch dimension. An output under
`batch_output` may have any shape in the file; its dims are config.pbtxt's. What is made for a batch has the rank that
its kind says.

The proof is the ordinary one (core/batchability.py) on requests of different shapes: made-up requests are run alone and
together, and each must get the same answer, or requests are never merged. A padded answer, as wide as the batch's
largest request, is found out that way. Neighbours in one flat tensor are nearer than rows: a running sum carries one
caller's NaN into the next one's answer. So each request must also get its answer between requests that hold NaN. If a
request of two rows does not get two, or other ones beside another request, the model answers requests rather than rows,
and requests have one row from then on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final, NamedTuple

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
from gateway.core.tensor import element_count
from gateway.errors import ConfigError
from gateway.loading_signature import Signature

SIZES: Final = (3, 8, 1, 5, 2)
"""Of the variable dims of ragged inputs, request by request; where the model wants others, multiples of one size:"""
FACTORS: Final = (1, 2, 1, 3, 2)
CEILINGS: Final = (8, 2, 1)
NOT_RUN: Final = Verdict(False, "it could not be run on made-up input, so its rows are not proven independent")

MADE_UP: Final = (
    "; that was judged by made-up requests: if an output is to count over the whole batch, as accumulated counts do, "
    "set batching: on for the model"
)
"""Behind the verdict against a model."""

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
            f"config.pbtxt: input '{tensor.name}' has allow_ragged_batch, which is not supported for an optional "
            "input; remove one of them"
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
    """A request of two rows is not answered as it should be."""


async def prove(
    spec: ModelSpec,
    inputs: Sequence[SignatureTensor],
    outputs: Sequence[SignatureTensor],
    run: Run,
    seed: int,
    *,
    optional: bool = True,
) -> Proof:
    """Whether requests of different shapes may share a run. `inputs`, `outputs`: the model file's; `optional`: with the
    optional inputs, or without.

    Raises:
        GatewayError: `run` does.
    """
    bench = _Bench(spec, Binding(spec, inputs, outputs), len(inputs), run)
    limit = spec.policy.max_batch_size
    given = tuple([tensor if optional or not tensor.optional else None for tensor in spec.inputs])
    count, rng = min(batchability.PROOF_ROWS, max(limit, 2)), np.random.default_rng(seed)
    for candidate in _candidates(given, count, rng):
        made = bench.model_inputs(candidate.members)
        answer = await run(made, bench.places)
        if isinstance(answer, Success):
            return await _proven(bench, candidate, answer, Proof(NOT_RUN, (made, answer), count), limit)
    return Proof(NOT_RUN)


async def _proven(bench: _Bench, candidate: _Candidate, answer: Success, proof: Proof, limit: int) -> Proof:
    """`proof` with its verdict. `answer`: to all members together; `limit`: rows of a batch."""
    members = candidate.members
    try:
        alone = [(await bench.answers([member]))[0] for member in members]
        verdict = _compare(bench.cut(members, answer), alone)
    except _Unanswered as error:
        return replace(proof, verdict=Verdict(False, str(error)))
    if verdict.batchable:
        verdict = await _spoiled(bench, members, alone) or verdict
    one_row = limit > 1 and not await _takes_two_rows(
        bench, candidate, alone[0], merged=verdict.batchable and limit > 2
    )
    return replace(proof, verdict=verdict, one_row=one_row)


async def _takes_two_rows(
    bench: _Bench, candidate: _Candidate, first: dict[int, OutputTensor], *, merged: bool
) -> bool:
    """Whether a request of two rows is answered; `merged`: and the same beside the first member, whose answer `first`
    is."""
    try:
        own = await bench.answers([candidate.two])
        if not merged:
            return True
        return _compare(await bench.answers([candidate.members[0], candidate.two]), [first, *own]).batchable
    except _Unanswered:
        return False


async def _spoiled(bench: _Bench, members: list[InferRequest], alone: list[dict[int, OutputTensor]]) -> Verdict | None:
    """None: nobody's answer changes when every other request holds NaN."""
    spoiled = [_without_numbers(member) for member in members]
    if spoiled == members:
        return None
    for odd in (0, 1):
        mixed = [
            own if place % 2 == odd else spoilt
            for place, (own, spoilt) in enumerate(zip(members, spoiled, strict=True))
        ]
        try:
            answers = await bench.answers(mixed)
        except _Unanswered:
            continue  # it refuses them, and members of a batch that is refused are tried again without each other
        verdict = _compare(answers[odd::2], alone[odd::2])
        if not verdict.batchable:
            return Verdict(False, f"{verdict.why}, where those hold NaN")
    return None


class _Candidate(NamedTuple):
    members: list[InferRequest]
    """Of one row each, and of different shapes."""
    two: InferRequest
    """Of two rows."""


class _Unanswered(Exception):
    """A run failed, or what came back is not the answer to the requests."""


class _Bench:
    """The model, asked as the dispatcher asks it."""

    def __init__(self, spec: ModelSpec, binding: Binding, inputs: int, run: Run) -> None:
        self._outputs = tuple(range(len(spec.outputs)))
        self.places = binding.model_outputs(self._outputs)
        self._ragged = Ragged(spec)
        self._binding = binding
        self._inputs = inputs
        self._run = run

    def model_inputs(self, members: Sequence[InferRequest]) -> list[InputTensor | None]:
        found: list[InputTensor | None] = [None] * self._inputs
        for given in self._binding.batch_inputs(self._ragged.concat(members, _rows(members))):
            data = bytearray(given.nbytes)
            assembly.write_parts(given, memoryview(data))
            found[given.index] = InputTensor(given.datatype, given.shape, None, bytes(data))
        return found

    async def answers(self, members: Sequence[InferRequest]) -> list[dict[int, OutputTensor]]:
        """Each member's outputs, of a run of them all. Raises _Unanswered."""
        answer = await self._run(self.model_inputs(members), self.places)
        if isinstance(answer, Failure):
            raise _Unanswered(f"it does not run on {len(members)} requests of {_rows(members)} rows: {answer.message}")
        return self.cut(members, answer)

    def cut(self, members: Sequence[InferRequest], answer: Success) -> list[dict[int, OutputTensor]]:
        """Raises _Unanswered."""
        try:
            outputs = [self._binding.served_output(place, o) for place, o in enumerate(answer.outputs)]
            self._ragged.check_outputs(members, self._outputs, _rows(members), outputs)
            return self._ragged.cut(members, dict(enumerate(outputs)))
        except (AssemblyError, ValueError) as error:
            raise _Unanswered(str(error)) from None


def _rows(members: Sequence[InferRequest]) -> int:
    return sum([member.rows for member in members])


def _candidates(given: Sequence[TensorSpec | None], count: int, rng: np.random.Generator) -> Iterator[_Candidate]:
    """What to try in turn until the model runs on it."""
    for ceiling in CEILINGS:
        attempts: list[tuple[int, tuple[int, ...]]] = [(batchability.VARIABLE_DIMS[0], SIZES)]
        attempts += [(size, tuple([size * factor for factor in FACTORS])) for size in batchability.VARIABLE_DIMS]
        for size, sizes in attempts:
            members = [_request(given, 1, size, own, ceiling, rng) for own in sizes[:count]]
            yield _Candidate(members, _request(given, 2, size, sizes[1], ceiling, rng))


def _request(
    given: Sequence[TensorSpec | None], rows: int, size: int, own: int, ceiling: int, rng: np.random.Generator
) -> InferRequest:
    """`own`: of the variable dims of ragged inputs; `size`: of other inputs'."""
    inputs: list[InputTensor | None] = []
    for tensor in given:
        if tensor is None:
            inputs.append(None)
            continue
        variable = own if tensor.ragged else size
        shape = (rows, *[variable if dim == -1 else dim for dim in tensor.dims])
        data = batchability.random_bytes(tensor.datatype, shape, ceiling, rng)
        inputs.append(InputTensor(tensor.datatype, shape, None, data))
    return InferRequest(tuple(inputs), rows, 0, None, (), None)


def _without_numbers(request: InferRequest) -> InferRequest:
    """The request with NaN in place of every number that may be one; itself if there is none."""
    inputs = [_nan_like(tensor) for tensor in request.inputs]
    if all(ours is theirs for ours, theirs in zip(inputs, request.inputs, strict=True)):
        return request
    return InferRequest(tuple(inputs), request.rows, 0, None, (), None)


def _nan_like(tensor: InputTensor | None) -> InputTensor | None:
    if tensor is None or tensor.datatype.kind not in {"float", "half"}:
        return tensor
    nan = b"\xc0\x7f" if tensor.datatype.name == "BF16" else np.array(np.nan, tensor.datatype.numpy).tobytes()
    return InputTensor(tensor.datatype, tensor.shape, None, nan * element_count(tensor.shape))


def _compare(together: list[dict[int, OutputTensor]], alone: list[dict[int, OutputTensor]]) -> Verdict:
    for place, (ours, single) in enumerate(zip(together, alone, strict=True)):
        for index, output in ours.items():
            expected = single[index]
            if output.shape != expected.shape:
                why = f"shape {list(expected.shape)} alone, {list(output.shape)} together"
            else:
                why = batchability.difference(output, expected)
            if why:
                return Verdict(
                    False, f"output '{output.name}' of request {place} differs when run with other requests: {why}"
                )
    return Verdict(True, f"{len(alone)} random requests of different shapes gave the same answers alone and together")
