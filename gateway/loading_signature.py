"""What a version serves: its model file's signature as config.pbtxt narrows it.

Rules: config.pbtxt may only agree with the file. It may list its tensors in another order, leave outputs out (they are
not served then), state dims where the file has variable ones (they are enforced from then on), give a tensor other
dims than the model's (`reshape`), and make an input optional for which the file has a default. Inputs are listed all
or none; those that the gateway fills itself (controls and states of sequences, `batch_input`) are never listed, and
inputs with a default are served only if listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gateway.core.batchability import SignatureTensor
from gateway.core.model import TensorSpec
from gateway.core.reshape import fits
from gateway.core.scheduling import Scheduling
from gateway.core.tensor import Datatype
from gateway.errors import ConfigError
from gateway.protocol.model_config_tensors import segments


@dataclass(frozen=True, slots=True)
class Signature:
    """The part of a model file's signature that is served or filled by the gateway."""

    inputs: tuple[SignatureTensor, ...]
    outputs: tuple[SignatureTensor, ...]


def hidden_tensors(scheduling: Scheduling) -> tuple[frozenset[str], frozenset[str]]:
    """Inputs that the gateway fills and outputs that it keeps to itself."""
    inputs = {name for made in scheduling.batch_inputs for name in made.target_names}
    outputs: set[str] = set()
    if scheduling.sequence is not None:
        inputs |= {control.name for control in scheduling.sequence.controls}
        inputs |= {state.input_name for state in scheduling.sequence.states}
        outputs |= {state.output_name for state in scheduling.sequence.states}
    return frozenset(inputs), frozenset(outputs)


def check_filled(scheduling: Scheduling, inputs: Sequence[SignatureTensor], outputs: Sequence[SignatureTensor]) -> None:
    """Whether the file has every tensor that the gateway is to fill or keep, with the stated datatype.

    Raises:
        ConfigError: it has not.
    """
    _check_filled("input", [(t, made.datatype) for made in scheduling.batch_inputs for t in made.target_names], inputs)
    if scheduling.sequence is not None:
        controls, states = scheduling.sequence.controls, scheduling.sequence.states
        _check_filled("input", [(control.name, control.datatype) for control in controls], inputs)
        _check_filled("input", [(state.input_name, state.datatype) for state in states], inputs)
        _check_filled("output", [(state.output_name, state.datatype) for state in states], outputs)


def _check_filled(role: str, wanted: list[tuple[str, Datatype]], actual: Sequence[SignatureTensor]) -> None:
    known = {tensor.name: tensor.datatype for tensor in actual}
    for name, datatype in wanted:
        if name not in known:
            raise ConfigError(f"config.pbtxt names the {role} '{name}', but the model file has {sorted(known)}")
        if known[name] is not datatype:
            raise ConfigError(f"config.pbtxt says {role} '{name}' is {datatype}, the model file says {known[name]}")


def chosen(
    role: str, actual: Sequence[SignatureTensor], stated: tuple[TensorSpec, ...], hidden: frozenset[str]
) -> tuple[SignatureTensor, ...]:
    """The tensors of the file that are served, in config.pbtxt's order if it lists them.

    Raises:
        ConfigError: it names one that the file does not have, or forgets an input.
    """
    known = {tensor.name: tensor for tensor in actual}
    if not stated:
        return tuple(tensor for tensor in actual if not tensor.optional and tensor.name not in hidden)
    for tensor in stated:
        if tensor.name not in known:
            raise ConfigError(f"config.pbtxt names the {role} '{tensor.name}', but the model file has {sorted(known)}")
        if tensor.optional and not known[tensor.name].optional:
            raise ConfigError(
                f"config.pbtxt says input '{tensor.name}' is optional, but the model file has no default for it; "
                "remove optional, or export the model with an initializer of this name"
            )
    listed = {tensor.name for tensor in stated} | hidden
    missing = [tensor.name for tensor in actual if not tensor.optional and tensor.name not in listed]
    if missing and role == "input":
        raise ConfigError(f"config.pbtxt lists no {role} {missing}, which the model file has; list all or none")
    return tuple(known[tensor.name] for tensor in stated)


def kept_outputs(
    scheduling: Scheduling, signature: Signature, actual: Sequence[SignatureTensor]
) -> tuple[SignatureTensor, ...]:
    """All outputs that a run is asked for: the served ones and, behind them, those that the gateway keeps to itself."""
    seen = {tensor.name for tensor in signature.outputs}
    hidden = hidden_tensors(scheduling)[1] - seen
    return (*signature.outputs, *[tensor for tensor in actual if tensor.name in hidden])


def narrowed(
    tensors: tuple[SignatureTensor, ...], stated: tuple[TensorSpec, ...], *, batched: bool
) -> tuple[SignatureTensor, ...]:
    """`tensors` with the dims that config.pbtxt states where the file's are variable: what a model is tried on.

    `batched`: the stated dims are without the batch dimension. Dims that contradict the file are left as they are.
    """
    dims = {tensor.name: tensor.dims if tensor.reshape is None else tensor.reshape for tensor in stated}
    return tuple(_narrowed(tensor, dims.get(tensor.name), batched) for tensor in tensors)


def _narrowed(tensor: SignatureTensor, dims: tuple[int, ...] | None, batched: bool) -> SignatureTensor:
    full = None if dims is None else (-1, *dims) if batched else dims
    if full is None or len(full) != len(tensor.shape):
        return tensor
    shape = [want if have is None and want != -1 else have for want, have in zip(full, tensor.shape, strict=True)]
    return replace(tensor, shape=tuple(shape))


def served(
    role: str, actual: tuple[SignatureTensor, ...], stated: tuple[TensorSpec, ...], *, batched: bool, short: bool
) -> tuple[TensorSpec, ...]:
    """Signature as clients see it. `actual`: what `chosen` gave.

    `short`: the stated dims may lack a variable first dimension that the served ones have.

    Raises:
        ConfigError: config.pbtxt contradicts the file.
    """
    of_file = [tuple([-1 if dim is None else dim for dim in tensor.shape[1 if batched else 0 :]]) for tensor in actual]
    if not stated:
        return tuple(TensorSpec(t.name, t.datatype, dims) for t, dims in zip(actual, of_file, strict=True))
    return tuple(
        _served(role, tensor, want, dims, batched=batched, short=short)
        for tensor, want, dims in zip(actual, stated, of_file, strict=True)
    )


def _served(
    role: str, tensor: SignatureTensor, want: TensorSpec, of_file: tuple[int, ...], *, batched: bool, short: bool
) -> TensorSpec:
    if tensor.datatype is not want.datatype:
        raise ConfigError(
            f"config.pbtxt says {role} '{want.name}' is {want.datatype}, the model file says {tensor.datatype}"
        )
    of_model = want.dims if want.reshape is None else want.reshape
    lead = (-1,) if short and of_file[:1] == (-1,) and len(of_file) == len(of_model) + 1 else ()
    own = of_file[len(lead) :]
    agrees = len(own) == len(of_model) and all(
        -1 in pair or pair[0] == pair[1] for pair in zip(of_model, own, strict=True)
    )
    if not agrees:
        what = "dims" if want.reshape is None else "the reshape"
        raise ConfigError(
            f"config.pbtxt says {role} '{want.name}' has {what} {list(of_model)}, the model file says {list(of_file)}"
            f"{_reshape_hint(want, own, may_be_empty=batched or bool(lead))}"
        )
    if want.reshape is None:
        dims = tuple(have if stated == -1 else stated for stated, have in zip(want.dims, own, strict=True))
        return replace(want, dims=(*lead, *dims))
    if not fits(want.reshape, own):
        raise ConfigError(
            f"config.pbtxt says the reshape of {role} '{want.name}' is {list(want.reshape)}, the model file says "
            f"{list(of_file)}; state its dims where they are fixed"
        )
    return replace(want, dims=(*lead, *want.dims), reshape=(*lead, *want.reshape))


def _reshape_hint(want: TensorSpec, of_file: tuple[int, ...], *, may_be_empty: bool) -> str:
    """How both shapes can stand, if they hold the same elements; else nothing. `of_file`: without a batch dimension."""
    if segments(want.dims) != segments(of_file) or not (of_file or may_be_empty):
        return ""
    reshape = f"reshape {{ shape: {_spaced(of_file)} }}"
    return f"; to serve it with dims of its own, write {reshape} beside dims: {_spaced(want.dims)}"


def _spaced(dims: tuple[int, ...]) -> str:
    """As config.pbtxt files have it."""
    return f"[ {', '.join(map(str, dims))} ]" if dims else "[ ]"
