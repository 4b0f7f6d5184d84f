"""Run a replica once and wait for it: for proofs, warm-up and checks at load, never for requests."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Final

from gateway.backends.interface import Replica
from gateway.core.assembly import part_nbytes
from gateway.core.outcome import Failure, Success
from gateway.core.request import BatchInput, InputTensor, SequenceStep

TIMEOUT_S: Final = 120.0
"""First runs of big graphs are slow; nobody waits for an answer yet."""


class _Once:
    """A batch of one; fits `backends.interface.Batch`."""

    def __init__(self, inputs: Sequence[InputTensor | None], outputs: tuple[int, ...], rows: int) -> None:
        self.inputs = [
            BatchInput(index, tensor.datatype, tensor.shape, part_nbytes(tensor), [tensor])
            for index, tensor in enumerate(inputs)
            if tensor is not None
        ]
        self.outputs = outputs
        self.rows = rows
        self.deadline = math.inf
        self.sequence: SequenceStep | None = None
        self.parameters: Mapping[str, object] = {}
        self.outcome: asyncio.Future[Success | Failure] = asyncio.get_running_loop().create_future()

    def done(self, outcome: Success | Failure, /) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)


async def run_once(
    replica: Replica, inputs: Sequence[InputTensor | None], outputs: tuple[int, ...], timeout_s: float = TIMEOUT_S
) -> Success | Failure:
    """Execute `inputs` (one per model input, in its order; None: left out) on a replica with a free slot.

    Cancelled, it gives the batch up: the slot is free again once the replica has ended it.
    """
    first = next((tensor for tensor in inputs if tensor is not None), None)
    rows = first.shape[0] if first is not None and first.shape else 1
    once = _Once(inputs, outputs, rows)
    replica.execute(once, timeout_s)
    try:
        return await once.outcome
    except asyncio.CancelledError:
        replica.cancel(once)
        raise
