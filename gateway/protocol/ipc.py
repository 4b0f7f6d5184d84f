"""Frames between the gateway and its worker processes: bytes ↔ values, no I/O.

A frame is one datagram of a SOCK_SEQPACKET socket, at most `FRAME_LIMIT` bytes, all integers little-endian:

    magic u32 · kind u16 · version u16 · generation u32 · length u32 · identity u64 · payload … · crc32 u32

`length` counts the whole frame, `crc32` covers everything before it, `generation` numbers the worker
processes that lived under one name, and `identity` pairs an answer with its question (for RUN: the batch
id). Tensors never travel in frames: they lie in shared memory (workers/shm.py) and frames carry their
places.

    gateway → worker   LOAD (+ model fd, and one for its external data)  UNLOAD  DETACH  CANCEL
                       RUN (+ two fds the first time a buffer is used)
    worker → gateway   HELLO  LOADED  UNLOADED  RESULT  FAILED  CANCELLED

CANCEL has the identity of a RUN and asks for its early end; the RUN is answered all the same, exactly once: with
CANCELLED, or with what it came to before.

Rules: a frame that fails any check raises FrameError and its sender is not to be trusted any further. RUN
and RESULT are fixed binary structures because they are on the hot path; HELLO and LOADED carry JSON;
nothing is ever pickled.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from zlib import crc32

import orjson

from gateway.core.batchability import SignatureTensor
from gateway.core.tensor import DATATYPE, DATATYPES, MAX_RANK, Datatype

FRAME_LIMIT: Final = 65_536
MAGIC: Final = 0x5749504F
VERSION: Final = 1
ALIGNMENT: Final = 64
"""Tensors start at multiples of this in shared memory: a cache line, enough for any vector instruction."""

HELLO: Final = 1
LOAD: Final = 2
LOADED: Final = 3
UNLOAD: Final = 4
UNLOADED: Final = 5
RUN: Final = 6
RESULT: Final = 7
FAILED: Final = 8
DETACH: Final = 9
CANCEL: Final = 10
CANCELLED: Final = 11
_KINDS: Final = frozenset(range(HELLO, CANCELLED + 1))

_HEADER = "<IHHIIQ"
_head = struct.Struct(_HEADER)
_crc = struct.Struct("<I")
_MINIMUM = _head.size + _crc.size

_run_head = struct.Struct("<IIQHH")
_run_input = struct.Struct("<HHQQ")
_result_head = struct.Struct("<QQQQH")
_result_output = struct.Struct("<HBBQQ")
_load = struct.Struct("<III")
_u32 = struct.Struct("<I")
_dims = tuple(struct.Struct(f"<{rank}q") for rank in range(MAX_RANK + 1))


class FrameError(Exception):
    """A frame that cannot be believed: wrong magic, length, checksum, generation or contents."""


class FrameTooLargeError(Exception):
    """What was to be said does not fit into one frame."""

    def __init__(self, size: int) -> None:
        super().__init__(f"{size} bytes of description exceed the {FRAME_LIMIT} byte limit of one frame")


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs in the model file's order; indexes elsewhere refer to these places."""

    inputs: tuple[SignatureTensor, ...]
    outputs: tuple[SignatureTensor, ...]


@dataclass(slots=True)  # not frozen: built for every batch, and that costs three times as much
class RunInput:
    """Where one input lies in the input area. `offset` and `nbytes` in bytes."""

    index: int
    offset: int
    nbytes: int
    shape: tuple[int, ...]


@dataclass(slots=True)
class Run:
    instance: int
    buffer: int
    input_size: int
    """Bytes of the input area; the worker maps at least so much."""
    inputs: tuple[RunInput, ...]
    outputs: tuple[int, ...]


@dataclass(slots=True)
class ResultOutput:
    """Where one output lies in the output area. `offset` and `nbytes` in bytes."""

    index: int
    datatype: Datatype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(slots=True)
class Result:
    output_size: int
    """Bytes of the output area; the gateway maps at least so much."""
    input_ns: int
    infer_ns: int
    output_ns: int
    outputs: tuple[ResultOutput, ...]


@dataclass(frozen=True, slots=True)
class Load:
    instance: int
    intra_op_threads: int
    slots: int


@dataclass(frozen=True, slots=True)
class Hello:
    """What a worker says when it can take work."""

    pid: int
    onnxruntime: str


def aligned(offset: int) -> int:
    """The next place a tensor may start at."""
    return (offset + ALIGNMENT - 1) & -ALIGNMENT


# --- Frames -------------------------------------------------------------------------------------------


def encode(kind: int, generation: int, identity: int, payload: bytes = b"") -> bytes:
    """Raises FrameTooLargeError."""
    length = _MINIMUM + len(payload)
    if length > FRAME_LIMIT:
        raise FrameTooLargeError(length)
    body = _head.pack(MAGIC, kind, VERSION, generation, length, identity) + payload
    return body + _crc.pack(crc32(body))


def decode(frame: memoryview, generation: int) -> tuple[int, int, memoryview]:
    """A received datagram → kind, identity, payload (a view into `frame`).

    Raises:
        FrameError: the frame fails a check.
    """
    size = len(frame)
    if size < _MINIMUM:
        raise FrameError(f"frame of {size} bytes is shorter than a header")
    magic, kind, version, stamp, length, identity = _head.unpack_from(frame)
    if magic != MAGIC or version != VERSION:
        raise FrameError("frame does not start with the magic number and version of this gateway")
    if length != size:
        raise FrameError(f"frame says {length} bytes, {size} arrived")
    if _crc.unpack_from(frame, size - 4)[0] != crc32(frame[: size - 4]):
        raise FrameError("frame checksum does not match")
    if stamp != generation:
        raise FrameError(f"frame of generation {stamp}, expected {generation}")
    if kind not in _KINDS:
        raise FrameError(f"frame of unknown kind {kind}")
    return kind, identity, frame[_head.size : size - 4]


# --- RUN and RESULT: the hot path ---------------------------------------------------------------------

_packers: dict[tuple[int, ...], struct.Struct] = {}
_PACKERS_KEPT: Final = 512


def _run_packer(key: tuple[int, ...]) -> struct.Struct:
    """One struct for a whole RUN frame. `key`: number of outputs, then the rank of each input."""
    packer = _packers.get(key)
    if packer is None:
        inputs = "".join(f"HHQQ{rank}q" for rank in key[1:])
        packer = struct.Struct(f"{_HEADER}IIQHH{inputs}{key[0]}H")
        if len(_packers) >= _PACKERS_KEPT:
            _packers.clear()
        _packers[key] = packer
    return packer


def encode_run(
    generation: int,
    identity: int,
    *,
    instance: int,
    buffer: int,
    input_size: int,
    inputs: Sequence[tuple[int, int, int, tuple[int, ...]]],
    outputs: tuple[int, ...],
) -> bytes:
    """The whole RUN frame, packed in one call. `inputs`: (index, offset, nbytes, shape) each.

    Raises:
        FrameTooLargeError: too many inputs or outputs for one frame.
    """
    key = [len(outputs)]
    rest: list[int] = []
    for index, offset, nbytes, shape in inputs:
        rank = len(shape)
        key.append(rank)
        rest += (index, rank, offset, nbytes, *shape)
    packer = _run_packer(tuple(key))
    length = packer.size + 4
    if length > FRAME_LIMIT:
        raise FrameTooLargeError(length)
    body = packer.pack(
        MAGIC, RUN, VERSION, generation, length, identity,
        instance, buffer, input_size, len(inputs), len(outputs), *rest, *outputs,
    )  # fmt: skip
    return body + _crc.pack(crc32(body))


def decode_run(payload: memoryview) -> Run:
    """Raises FrameError: the payload contradicts itself."""
    try:
        instance, buffer, input_size, input_count, output_count = _run_head.unpack_from(payload)
        at = _run_head.size
        inputs = []
        for _ in range(input_count):
            index, rank, offset, nbytes = _run_input.unpack_from(payload, at)
            at += _run_input.size
            shape = _shape(payload, at, rank)
            at += 8 * rank
            if offset + nbytes > input_size:
                raise FrameError("an input reaches beyond the input area")
            inputs.append(RunInput(index, offset, nbytes, shape))
        outputs = struct.unpack_from(f"<{output_count}H", payload, at)
    except struct.error:
        raise FrameError("RUN is cut short") from None
    if at + 2 * output_count != len(payload):
        raise FrameError("RUN has bytes left over")
    return Run(instance, buffer, input_size, tuple(inputs), outputs)


def encode_result(generation: int, identity: int, result: Result) -> bytes:
    """Raises FrameTooLargeError."""
    parts = [
        _result_head.pack(result.output_size, result.input_ns, result.infer_ns, result.output_ns, len(result.outputs))
    ]
    for output in result.outputs:
        rank = len(output.shape)
        parts.append(_result_output.pack(output.index, output.datatype.code, rank, output.offset, output.nbytes))
        parts.append(_dims[rank].pack(*output.shape))
    return encode(RESULT, generation, identity, b"".join(parts))


def decode_result(payload: memoryview) -> Result:
    """Raises FrameError: the payload contradicts itself."""
    try:
        output_size, input_ns, infer_ns, output_ns, count = _result_head.unpack_from(payload)
        at = _result_head.size
        outputs = []
        for _ in range(count):
            index, code, rank, offset, nbytes = _result_output.unpack_from(payload, at)
            at += _result_output.size
            shape = _shape(payload, at, rank)
            at += 8 * rank
            if code >= len(DATATYPES):
                raise FrameError(f"unknown datatype code {code}")
            if offset + nbytes > output_size:
                raise FrameError("an output reaches beyond the output area")
            outputs.append(ResultOutput(index, DATATYPES[code], shape, offset, nbytes))
    except struct.error:
        raise FrameError("RESULT is cut short") from None
    if at != len(payload):
        raise FrameError("RESULT has bytes left over")
    return Result(output_size, input_ns, infer_ns, output_ns, tuple(outputs))


def _shape(payload: memoryview, at: int, rank: int) -> tuple[int, ...]:
    if rank > MAX_RANK:
        raise FrameError(f"rank {rank} exceeds {MAX_RANK}")
    shape = _dims[rank].unpack_from(payload, at)
    if rank and min(shape) < 0:
        raise FrameError("negative dimension")
    return shape


# --- Control ------------------------------------------------------------------------------------------


def encode_load(load: Load) -> bytes:
    """Payload of LOAD."""
    return _load.pack(load.instance, load.intra_op_threads, load.slots)


def decode_load(payload: memoryview) -> Load:
    """Raises FrameError."""
    if len(payload) != _load.size:
        raise FrameError("LOAD has the wrong length")
    return Load(*_load.unpack(payload))


def encode_number(number: int) -> bytes:
    """Payload of UNLOAD (instance) and DETACH (buffer)."""
    return _u32.pack(number)


def decode_number(payload: memoryview) -> int:
    """Raises FrameError."""
    if len(payload) != _u32.size:
        raise FrameError("payload is not one number")
    number: int = _u32.unpack(payload)[0]
    return number


def encode_hello(hello: Hello) -> bytes:
    return orjson.dumps({"pid": hello.pid, "onnxruntime": hello.onnxruntime})


def decode_hello(payload: memoryview) -> Hello:
    """Raises FrameError."""
    try:
        value = orjson.loads(payload)
        return Hello(int(value["pid"]), str(value["onnxruntime"]))
    except (ValueError, KeyError, TypeError) as error:
        raise FrameError("HELLO is not what a worker says") from error


def encode_signature(signature: Signature) -> bytes:
    """Payload of LOADED."""

    def plain(tensors: tuple[SignatureTensor, ...]) -> list[list[Any]]:
        return [[tensor.name, tensor.datatype.name, tensor.shape, tensor.optional] for tensor in tensors]

    return orjson.dumps({"inputs": plain(signature.inputs), "outputs": plain(signature.outputs)})


def decode_signature(payload: memoryview) -> Signature:
    """Raises FrameError."""

    def tensors(items: list[tuple[str, str, list[int | None], bool]]) -> tuple[SignatureTensor, ...]:
        return tuple(
            SignatureTensor(name, DATATYPE[kind], tuple(dims), optional) for name, kind, dims, optional in items
        )

    try:
        value = orjson.loads(payload)
        return Signature(tensors(value["inputs"]), tensors(value["outputs"]))
    except (ValueError, KeyError, TypeError) as error:
        raise FrameError("LOADED does not hold a signature") from error
