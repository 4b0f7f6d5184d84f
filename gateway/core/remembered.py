"""Answers that were given before, by what was asked: the key, and a store that never holds more than it may.

Decides what "the same request" means: the same load of the same model version, and inputs equal in presence, datatype,
shape and content. Nothing else counts: not the outputs asked for (all are stored), not parameters, not the id (wire
notes §5.3). Inputs that came as JSON and as bytes hit alike. The key is a 256-bit BLAKE2b digest over an unambiguous
encoding of all that, so two different requests do not meet.

Invariants of the store: `nbytes` is the sum of its entries' sizes and never above `max_bytes`; an entry older than the
time to live is never handed out; what goes first is what was used least recently. Time is an argument.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, NamedTuple

from gateway.core.assembly import encode_values, slice_rows
from gateway.core.batch import Execution, FinishedBatch, executions
from gateway.core.request import InferRequest, OutputTensor

MAX_KEYED_BYTES: Final = 4 * 1024 * 1024
"""Requests of more input bytes are not cached: looking one up would hold up everyone else for milliseconds."""
ENTRY_BYTES: Final = 512
"""What an entry weighs beside its data; and ..."""
OUTPUT_BYTES: Final = 256
"""... each of its outputs. Generous: many tiny answers must not take more memory than was allowed."""
_HEAD: Final = struct.Struct("<BBQ")
_ABSENT: Final = b"\xff"


def key_of(scope: bytes, request: InferRequest) -> bytes | None:
    """The key of a request; None if its inputs are too large to be worth it.

    `scope` names what answers: equal for two requests exactly if equal inputs give them equal answers.
    """
    if request.nbytes > MAX_KEYED_BYTES:
        return None
    digest = hashlib.blake2b(struct.pack("<Q", len(scope)), digest_size=32)
    digest.update(scope)
    for tensor in request.inputs:
        if tensor is None:
            digest.update(_ABSENT)
            continue
        data = tensor.buffer if tensor.values is None else encode_values(tensor.datatype, tensor.values)
        shape = tensor.shape
        digest.update(_HEAD.pack(tensor.datatype.code, len(shape), len(data or b"")))
        digest.update(struct.pack(f"<{len(shape)}Q", *shape))
        if data is not None:
            digest.update(data)
    return digest.digest()


class Remembered(NamedTuple):
    """An answer as it is kept: the request's own rows of every output, and the executions they came out of."""

    outputs: dict[int, OutputTensor]
    executions: tuple[tuple[Execution, int], ...]
    """(execution, first row of the request in it)."""

    @property
    def nbytes(self) -> int:
        """What it weighs."""
        return ENTRY_BYTES + sum(OUTPUT_BYTES + len(output.data) for output in self.outputs.values())


def remember(batch: FinishedBatch, row: int, rows: int, batched: bool) -> Remembered:
    """A request's part of an executed batch, copied: it keeps nothing of the others alive."""
    outputs = {}
    for index, output in batch.outputs.items():
        own = slice_rows(output, row, rows) if batched else output
        outputs[index] = OutputTensor(own.name, own.datatype, own.shape, bytes(own.data))
    return Remembered(outputs, tuple(executions(batch, row)))


@dataclass(slots=True)
class _Entry:
    answer: Remembered
    nbytes: int
    expires: float


class Store:
    """Answers by key; see the module's docstring."""

    __slots__ = ("_entries", "max_bytes", "nbytes", "ttl_s")

    def __init__(self, max_bytes: int, ttl_s: float | None) -> None:
        """`ttl_s`: seconds after which an answer is not given again; None: it does not age."""
        self.max_bytes = max_bytes
        self.ttl_s = ttl_s
        self.nbytes = 0
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes, now: float) -> Remembered | None:
        """The answer, if it is there and not too old; it is then the most recently used one."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if now >= entry.expires:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry.answer

    def put(self, key: bytes, answer: Remembered, now: float) -> bool:
        """Keep an answer, at the price of the least recently used ones. False: it is larger than the whole store."""
        nbytes = answer.nbytes
        if key in self._entries:
            self._drop(key)
        if nbytes > self.max_bytes:
            return False
        while self.nbytes + nbytes > self.max_bytes:
            self._drop(next(iter(self._entries)))
        expires = float("inf") if self.ttl_s is None else now + self.ttl_s
        self._entries[key] = _Entry(answer, nbytes, expires)
        self.nbytes += nbytes
        return True

    def _drop(self, key: bytes) -> None:
        self.nbytes -= self._entries.pop(key).nbytes

    def __repr__(self) -> str:
        return f"<Store {len(self._entries)} answers, {self.nbytes} of {self.max_bytes} bytes>"
