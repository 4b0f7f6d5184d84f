"""Whether rows of different callers may share a run of a model: proven at load, never assumed.

A model whose inputs and outputs all have a symbolic first dimension *may* treat it as a batch. Rule: the same random
rows are run alone and together; each row's answer must be the same within tolerance, or requests are never merged.
Random rows differ from each other, so a model that mixes rows (a mean over the batch, attention across it) is found
out. Chance and shapes are arguments; running the model is the caller's job.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from gateway.core.request import InputTensor, OutputTensor
from gateway.core.tensor import Datatype, element_count, pack_bytes, unpack_bytes

PROOF_ROWS: Final = 5
"""Rows run together: odd, so that vectorised kernels meet a remainder, and small, so that loading stays quick."""
RTOL: Final = 1e-3
ATOL_OF_SCALE: Final = 1e-4
"""Absolute tolerance as a share of the output's largest magnitude: summation order changes with the batch."""
HALF_RTOL: Final = 3e-2
"""For FP16 and BF16 outputs, whose mantissas hold 11 and 8 bits."""
MAX_TRIAL_ELEMENTS: Final = 1 << 26
VARIABLE_DIMS: Final = (8, 16, 1, 32, 64, 128, 224)
"""Sizes tried for variable dimensions until the model accepts one."""


@dataclass(frozen=True, slots=True)
class SignatureTensor:
    """One input or output as the model file declares it; `shape` in full, None where symbolic."""

    name: str
    datatype: Datatype
    shape: tuple[int | None, ...]
    optional: bool = False
    """The model has a default for it (an initializer that may be overridden); it may be left out."""


@dataclass(frozen=True, slots=True)
class Verdict:
    batchable: bool
    why: str


def obstacle(inputs: tuple[SignatureTensor, ...], outputs: tuple[SignatureTensor, ...]) -> str | None:
    """Why the signature alone rules batching out; None where every first dimension is symbolic."""
    if not inputs:
        return "the model has no inputs"
    for role, tensors in (("input", inputs), ("output", outputs)):
        for tensor in tensors:
            if not tensor.shape:
                return f"{role} '{tensor.name}' has no dimensions"
            if tensor.shape[0] is not None:
                return f"the first dimension of {role} '{tensor.name}' is fixed to {tensor.shape[0]}"
    return None


def trial_inputs(
    inputs: tuple[SignatureTensor, ...], rows: int | None, rng: np.random.Generator
) -> Iterator[list[InputTensor]]:
    """Inputs to try in turn until the model runs on one: shapes and value ranges from likely to last resort. None has
    more than `MAX_TRIAL_ELEMENTS`: what a server says of its model is no reason to run out of memory.

    `rows`: size of the first dimension; None: first dimensions are variable like any other.
    """
    for ceiling in (8, 2, 1):
        for size in VARIABLE_DIMS:
            if sum(element_count(_trial_shape(tensor, rows, size)) for tensor in inputs) <= MAX_TRIAL_ELEMENTS:
                yield [_random(tensor, rows, size, ceiling, rng) for tensor in inputs]
            if all(None not in tensor.shape[0 if rows is None else 1 :] for tensor in inputs):
                break


def _random(
    tensor: SignatureTensor, rows: int | None, size: int, ceiling: int, rng: np.random.Generator
) -> InputTensor:
    shape = _trial_shape(tensor, rows, size)
    return InputTensor(tensor.datatype, shape, None, random_bytes(tensor.datatype, shape, ceiling, rng))


def _trial_shape(tensor: SignatureTensor, rows: int | None, size: int) -> tuple[int, ...]:
    shape = tuple([size if dim is None else dim for dim in tensor.shape])
    return shape if rows is None else (rows, *shape[1:])


def random_bytes(datatype: Datatype, shape: tuple[int, ...], ceiling: int, rng: np.random.Generator) -> bytes:
    """Random elements in OIP binary form; whole numbers from 0 to below `ceiling`."""
    count = element_count(shape)
    if datatype.kind == "bytes":
        return pack_bytes([b"w%d" % number for number in rng.integers(0, 1000, count)])
    if datatype.kind == "bool":
        return rng.integers(0, 2, count).astype(np.bool_).tobytes()
    if datatype.kind in {"int", "uint"}:
        # Small and not negative: whole numbers are mostly indexes.
        return rng.integers(0, ceiling, count).astype(datatype.numpy).tobytes()
    numbers = rng.standard_normal(count).astype(np.float32)
    if datatype.name == "BF16":
        return (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
    return numbers.astype(datatype.numpy).tobytes()


def one_row(inputs: list[InputTensor], row: int) -> list[InputTensor]:
    """Row `row` of trial inputs, as inputs of a single row. Trial inputs hold buffers."""
    chosen = []
    for tensor in inputs:
        rows = tensor.shape[0]
        data = bytes(tensor.buffer or b"")
        if tensor.datatype.kind == "bytes":
            part = _bytes_row(data, rows, row)
        else:
            size = len(data) // rows
            part = data[row * size : (row + 1) * size]
        chosen.append(InputTensor(tensor.datatype, (1, *tensor.shape[1:]), None, part))
    return chosen


def _bytes_row(data: bytes, rows: int, row: int) -> bytes:
    elements = unpack_bytes(data)
    per_row = len(elements) // rows
    return pack_bytes(elements[row * per_row : (row + 1) * per_row])


def compare(together: list[OutputTensor], alone: list[list[OutputTensor]]) -> Verdict:
    """`together`: outputs of a run on all rows; `alone[i]`: outputs of the run on row i."""
    rows = len(alone)
    for index, output in enumerate(together):
        if not output.shape or output.shape[0] != rows:
            return Verdict(False, f"output '{output.name}' has shape {list(output.shape)} for {rows} rows")
        for row, outputs in enumerate(alone):
            single = outputs[index]
            if tuple(single.shape) != (1, *output.shape[1:]):
                return Verdict(False, f"output '{output.name}': one row alone gives shape {list(single.shape)}")
            difference = _difference(output, row, rows, single)
            if difference:
                return Verdict(
                    False, f"row {row} of output '{output.name}' differs when run with other rows: {difference}"
                )
    return Verdict(True, f"{rows} random rows gave the same answers alone and together")


def difference(ours: OutputTensor, other: OutputTensor) -> str:
    """In what two outputs of the same shape differ beyond rounding; empty: in nothing."""
    return _difference(ours, 0, 1, other)


def _difference(output: OutputTensor, row: int, rows: int, single: OutputTensor) -> str:
    if output.datatype.kind == "bytes":
        same = _bytes_row(bytes(output.data), rows, row) == bytes(single.data)
        return "" if same else "other strings"
    whole, ours = _numbers(output).reshape(rows, -1)[row], _numbers(single)
    if output.datatype.kind in {"int", "uint", "bool"}:
        return "" if np.array_equal(whole, ours) else f"{_show(ours)} alone, {_show(whole)} together"
    finite = ours[np.isfinite(ours)]
    scale = float(np.abs(finite).max()) if finite.size else 0.0
    rtol = HALF_RTOL if output.datatype.kind == "half" else RTOL
    if np.allclose(whole, ours, rtol=rtol, atol=ATOL_OF_SCALE * scale + 1e-30, equal_nan=True):
        return ""
    return f"{_show(ours)} alone, {_show(whole)} together"


def _numbers(output: OutputTensor) -> np.ndarray[Any, Any]:
    array = np.frombuffer(output.data, output.datatype.numpy)
    if output.datatype.name == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64) if output.datatype.kind in {"float", "half"} else array


def _show(array: np.ndarray[Any, Any]) -> str:
    return np.array2string(array[:3], precision=4, separator=", ")
