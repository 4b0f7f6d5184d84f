"""Samples of `model_warmup`: requests that every instance answers before a model is ready.

A sample is checked like a client's request, with the same words; its data are zeros (empty strings), random elements or
a file of the model's `warmup` directory in OIP binary form. Such a file holds one row, which stands for every row of
the sample, or all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gateway.core.batchability import random_bytes
from gateway.core.model import ModelSpec
from gateway.core.request import InputTensor
from gateway.core.scheduling import WarmUpInput, WarmUpSample
from gateway.core.tensor import element_count, pack_bytes, unpack_bytes
from gateway.errors import ConfigError, InvalidRequest
from gateway.protocol.oip_plan import Planner

FOLDER: Final = "warmup"
SEED: Final = 20_260_102
CEILING: Final = 8
"""Random whole numbers are below this: they are mostly indexes."""


@dataclass(frozen=True, slots=True)
class WarmUp:
    """One input to run `count` times; a tensor per input, None for those left out."""

    name: str
    inputs: Sequence[InputTensor | None]
    count: int


async def read_samples(
    samples: Sequence[WarmUpSample], spec: ModelSpec, side_file: Callable[[str], bytes]
) -> list[WarmUp]:
    """The samples as requests to `spec`: inputs in its order.

    Raises:
        ConfigError: a sample that `spec` would refuse, or a file that cannot be read or has another size.
    """
    planner = Planner(spec)
    found = []
    for sample in samples:
        rows = max(1, sample.batch_size)
        try:
            inputs = await _inputs(sample, rows, planner, side_file)
        except (InvalidRequest, ConfigError, ValueError) as error:
            raise ConfigError(f"warm-up sample '{sample.name}': {error}") from None
        found.append(WarmUp(sample.name, inputs, max(1, sample.count)))
    return found


async def _inputs(
    sample: WarmUpSample, rows: int, planner: Planner, side_file: Callable[[str], bytes]
) -> list[InputTensor | None]:
    spec = planner.spec
    limit = max(1, spec.policy.max_batch_size)
    if rows > limit:
        raise InvalidRequest(f"inference request batch-size must be <= {limit} for '{spec.name}'")
    lead = (rows,) if spec.batched else ()
    plan = planner.plan(tuple((given.name, given.datatype.name, (*lead, *given.dims)) for given in sample.inputs))
    rng = np.random.default_rng(SEED)
    inputs: list[InputTensor | None] = [None] * len(spec.inputs)
    for planned, given in zip(plan.inputs, sample.inputs, strict=True):
        content = await asyncio.to_thread(side_file, f"{FOLDER}/{given.file}") if given.data == "file" else None
        data = _data(given, rows, planned.shape, content, rng)
        inputs[planned.place] = InputTensor(given.datatype, planned.shape, None, data)
    return inputs


def _data(
    given: WarmUpInput, rows: int, shape: tuple[int, ...], content: bytes | None, rng: np.random.Generator
) -> bytes:
    if content is None:
        if given.data == "random":
            return random_bytes(given.datatype, shape, CEILING, rng)
        count = element_count(shape)
        return bytes(count * given.datatype.itemsize) if given.datatype.itemsize else pack_bytes([b""] * count)
    wanted = element_count(given.dims)
    size = len(content) // given.datatype.itemsize if given.datatype.itemsize else len(unpack_bytes(content))
    whole = not given.datatype.itemsize or len(content) % given.datatype.itemsize == 0
    if whole and size == wanted * rows:
        return content
    if whole and size == wanted:
        return content * rows
    raise ConfigError(
        f"input '{given.name}': {given.file} holds {size} elements of {given.datatype}, expected {wanted} for a row "
        f"or {wanted * rows} for all"
    )
