"""What both protocols share between a batch and a remote server: parameters, and the checks of an answer's tensors.

Rules: an answer's tensor has the name, datatype, rank and fixed dims of the signature and exactly as many bytes as its
shape says, or nothing of the answer is used; rows are checked by whoever made the batch. What a server sends besides is
ignored. BYTES need not be text; each BOOL is the byte 0 or 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from gateway.backends.interface import Batch, Failure, Success
from gateway.backends.remote_outcome import broken, mismatch
from gateway.core.assembly import AssemblyError, encode_values
from gateway.core.batchability import SignatureTensor
from gateway.core.request import InputTensor, OutputTensor
from gateway.core.tensor import MAX_RANK, element_count, unpack_bytes
from gateway.errors import GatewayError

MAX_DIM: Final = 2**63 - 1
MAX_STRINGS: Final = 1 << 20
"""In one tensor of an answer: each of them is looked at."""
ROOM_BYTES: Final = 8 << 20
ROOM_FACTOR: Final = 32
"""Numbers in JSON take several times the bytes of binary ones; a server may add outputs of its own."""
REMEMBERED: Final = 256
"""Request heads remembered per model before starting afresh."""
BatchForm = tuple[tuple[Any, ...], tuple[int, ...]]


class Mismatch(Exception):
    """An answer that contradicts the signature."""


class Garbled(Exception):
    """An answer that is not one: it cannot be read."""


class Astray(Exception):
    """An answer to another question."""


class NotEncodable(Exception):
    """The batch has no form that this server takes; the text says why."""


def form_of(batch: Batch) -> BatchForm:
    """All that the description of a batch's tensors depends on."""
    return tuple([(given.index, given.shape, given.nbytes) for given in batch.inputs]), batch.outputs


def parameters_of(batch: Batch, timeout_us: int) -> dict[str, object]:
    """Of the request: the caller's own, the step of its sequence, and Triton's `timeout` if above 0."""
    found = dict(batch.parameters)
    step = batch.sequence
    if step is not None:
        found |= {"sequence_id": step.id, "sequence_start": step.start, "sequence_end": step.end}
    if timeout_us > 0:
        found["timeout"] = timeout_us
    return found


def check_version(asked: str, answered: object) -> None:
    """Raises Mismatch: one version was asked for, and another says that it answered."""
    if asked and answered and answered != asked:
        raise Mismatch(f"the answer of another version than {asked}")


def most_bytes(outputs: Sequence[SignatureTensor], rows: int) -> int:
    """Of an answer that holds these tensors for a batch of `rows`, in any form, with room for more that nobody asked
    for; 0: not to be told from the signature."""
    total = 0
    for tensor in outputs:
        dims = [rows if place == 0 and dim is None else dim for place, dim in enumerate(tensor.shape)]
        if None in dims or not tensor.datatype.itemsize:
            return 0
        total += element_count([dim for dim in dims if dim is not None]) * tensor.datatype.itemsize
    return ROOM_BYTES + ROOM_FACTOR * total


def check_described(tensor: SignatureTensor, datatype: Any, shape: Any) -> tuple[int, ...]:
    """The shape, if `datatype` and `shape` are those of an answer for `tensor`.

    Raises:
        Mismatch: they are not.
    """
    name = tensor.name
    if datatype != tensor.datatype.name:
        raise Mismatch(f"output '{name}' of another datatype than {tensor.datatype}")
    if type(shape) is not list or len(shape) > MAX_RANK:
        raise Mismatch(f"output '{name}' without a shape")
    if not all(type(dim) is int and 0 <= dim <= MAX_DIM for dim in shape):
        raise Mismatch(f"output '{name}' with an impossible shape")
    wanted = tensor.shape
    if len(shape) != len(wanted) or any(
        want is not None and want != dim for want, dim in zip(wanted, shape, strict=True)
    ):
        said = [-1 if dim is None else dim for dim in wanted]
        raise Mismatch(f"output '{name}' with shape {shape} where {said} was expected")
    return tuple(shape)


def from_raw(tensor: SignatureTensor, shape: tuple[int, ...], data: bytes | memoryview) -> OutputTensor:
    """A tensor in OIP binary form. Raises Mismatch: the bytes are not what the shape says."""
    datatype, count = tensor.datatype, element_count(shape)
    if datatype.itemsize:
        fits = count * datatype.itemsize == len(data)
    else:
        try:
            if count > MAX_STRINGS:
                raise Mismatch(f"output '{tensor.name}' with {count} strings, more than {MAX_STRINGS}")
            fits = len(unpack_bytes(data, count)) == count
        except ValueError:
            fits = False
    if not fits:
        raise Mismatch(f"output '{tensor.name}' with {len(data)} bytes for shape {list(shape)}")
    if datatype.kind == "bool" and count and int(np.frombuffer(data, np.uint8).max()) > 1:
        raise Mismatch(f"output '{tensor.name}' with a BOOL that is neither 0 nor 1")
    return OutputTensor(tensor.name, datatype, shape, data)


def from_elements(tensor: SignatureTensor, shape: tuple[int, ...], checked: InputTensor) -> OutputTensor:
    """Elements as the protocol's readers checked them."""
    if checked.buffer is not None:
        return OutputTensor(tensor.name, tensor.datatype, shape, bytes(checked.buffer))
    try:
        return OutputTensor(tensor.name, tensor.datatype, shape, encode_values(tensor.datatype, checked.values or []))
    except (OverflowError, ValueError, TypeError) as error:
        raise Mismatch(f"output '{tensor.name}' with elements that are not {tensor.datatype}") from error


def in_order(
    wanted: Sequence[SignatureTensor], found: Mapping[str, OutputTensor], compute_ns: tuple[int, int, int] = (0, 0, 0)
) -> Success:
    """Raises Mismatch: an output is missing."""
    for tensor in wanted:
        if tensor.name not in found:
            raise Mismatch(f"no output '{tensor.name}'")
    return Success([found[tensor.name] for tensor in wanted], *compute_ns)


def refusal(server: str, error: Exception) -> Failure:
    """What it means that an answer could not be taken; none of the server's data is repeated."""
    if isinstance(error, Mismatch):
        return mismatch(f"{server} answered with {error}")
    if isinstance(error, (AssemblyError, GatewayError)):
        return mismatch(f"{server} answered with data that does not fit its description")
    if isinstance(error, Astray):
        return broken(f"{server} gave the answer to another question")
    return broken(f"{server} gave an answer that cannot be read")
