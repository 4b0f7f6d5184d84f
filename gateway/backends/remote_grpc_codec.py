"""A batch ↔ the messages of ModelInfer, for one model of one server.

Requests carry raw tensors, written by hand; what describes them is remembered by their shapes. Answers may hold raw
tensors (Triton) or typed ones (MLServer), for all outputs alike. An answer that is, but for the bytes of numbers in raw
tensors at its end, the same as an accepted one to the same question is not taken apart again.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from gateway.backends.interface import Batch, Failure, Success
from gateway.backends.remote_codec import (
    REMEMBERED,
    BatchForm,
    Garbled,
    Mismatch,
    NotEncodable,
    check_described,
    check_version,
    form_of,
    from_elements,
    from_raw,
    in_order,
    parameters_of,
    refusal,
)
from gateway.core.assembly import AssemblyError, write_parts
from gateway.core.batchability import SignatureTensor
from gateway.core.request import OutputTensor
from gateway.core.tensor import element_count, pack_bytes
from gateway.errors import GatewayError
from gateway.protocol import oip_data
from gateway.protocol.oip_grpc_request import CONTENTS
from gateway.protocol.oip_plan import InputPlan
from gateway.protocol.protobuf_wire import field, prefix, text, varint
from gateway.protocol.schema import DecodeError, message

MAX_PARTS: Final = 1024
"""Fields of an answer: outputs, raw tensors, and what is said of the whole."""
MAX_DESCRIBED_BYTES: Final = 1 << 20
"""Of an answer, beside its raw tensors."""
MAX_TYPED_BYTES: Final = 16 << 20
"""Of an answer whose tensors are typed: an element of one byte becomes an object of Python."""
_LENGTH_GIVEN: Final = 2
_VARINT: Final = 0
_FIXED: Final = {1: 8, 5: 4}
"""Bytes of wire types of a fixed size."""
_RAW: Final = 6 << 3 | _LENGTH_GIVEN
_ANY_BITS: Final = frozenset({"float", "half", "int", "uint"})
"""Kinds of which every value of the right size is one."""
MAX_REMEMBERED_BYTES: Final = 4096
"""Longest description of an answer that is remembered."""


class _Layout(NamedTuple):
    """An accepted answer without the bytes of its tensors."""

    fixed: tuple[tuple[int, bytes], ...]
    """What must stand where: together with the tensors, the whole answer."""
    tensors: tuple[tuple[SignatureTensor, tuple[int, ...], int, int], ...]
    """In the order of the outputs asked for: shape, start and end."""

    def read(self, answer: memoryview) -> Success | None:
        """None: it is not such an answer."""
        for at, expected in self.fixed:
            if answer[at : at + len(expected)] != expected:
                return None
        return Success(
            [
                OutputTensor(tensor.name, tensor.datatype, shape, answer[start:end])
                for tensor, shape, start, end in self.tensors
            ],
            0,
            0,
            0,
        )


class GrpcCodec:
    """`server`: its name, for messages."""

    def __init__(
        self,
        server: str,
        model: str,
        version: str,
        inputs: Sequence[SignatureTensor],
        outputs: Sequence[SignatureTensor],
    ) -> None:
        self._server = server
        self._version = version
        self._opening = text(1, model) + text(2, version)
        self._inputs = inputs
        self._outputs = outputs
        self._known: dict[BatchForm, tuple[bytes, int]] = {}
        self._layouts: dict[tuple[int, tuple[int, ...]], _Layout] = {}
        """By an answer's bytes and the outputs asked for."""

    def request(self, batch: Batch, timeout_us: int = 0) -> bytearray:
        """The message with its prefix.

        Raises:
            NotEncodable: the batch has no form that the server takes.
        """
        described, raw_bytes = self._described(batch)
        parameters = b"".join([_parameter(4, *item) for item in parameters_of(batch, timeout_us).items()])
        length = len(described) + len(parameters) + raw_bytes
        if length >= 2**31:
            raise NotEncodable(f"a batch of {length} bytes is more than one message of gRPC may have")
        found = bytearray(5 + length)
        found[1:5] = length.to_bytes(4, "big")
        at = 5 + len(described) + len(parameters)
        found[5:at] = described + parameters
        with memoryview(found) as view:
            for given in batch.inputs:
                before = prefix(7, given.nbytes)
                start = at + len(before)
                found[at:start] = before
                at = start + given.nbytes
                write_parts(given, view[start:at])
        return found

    def _described(self, batch: Batch) -> tuple[bytes, int]:
        """Everything but parameters and raw tensors, and the bytes that the raw tensors take."""
        form = form_of(batch)
        known = self._known.get(form)
        if known is None:
            parts = [self._opening]
            raw_bytes = 0
            for given in batch.inputs:
                tensor = self._inputs[given.index]
                shape = b"".join([varint(dim) for dim in given.shape])
                parts.append(field(5, text(1, tensor.name) + text(2, given.datatype.name) + field(3, shape)))
                raw_bytes += len(prefix(7, given.nbytes)) + given.nbytes
            parts += [field(6, text(1, self._outputs[place].name)) for place in batch.outputs]
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            known = self._known[form] = b"".join(parts), raw_bytes
        return known

    # -- answers -----------------------------------------------------------------------------------------------

    def success(self, answer: memoryview, outputs: tuple[int, ...]) -> Success | Failure:
        """The message of a call that ended with OK."""
        try:
            layout = self._layouts.get((len(answer), outputs))
            known = layout.read(answer) if layout is not None else None
            if known is not None:
                return known
            described, raw = parted(answer)
            parsed = message("inference.ModelInferResponse").FromString(described)
            success = self._read(parsed, raw, [self._outputs[place] for place in outputs])
            if raw and len(described) <= MAX_REMEMBERED_BYTES:
                self._remember(answer, described, raw, [item.name for item in parsed.outputs], success, outputs)
            return success
        except (Mismatch, Garbled, GatewayError, AssemblyError, DecodeError) as error:
            return refusal(self._server, error)

    def _read(self, answer: Any, raw: list[memoryview], wanted: list[SignatureTensor]) -> Success:
        items = answer.outputs
        if len(raw) not in (0, len(items)):
            raise Garbled
        check_version(self._version, answer.model_version)
        tensors = {tensor.name: tensor for tensor in wanted}
        found: dict[str, OutputTensor] = {}
        for place, item in enumerate(items):
            tensor = tensors.get(item.name)
            if tensor is None:
                continue
            if item.name in found:
                raise Mismatch(f"output '{tensor.name}' twice")
            shape = check_described(tensor, item.datatype, list(item.shape))
            found[tensor.name] = (
                from_raw(tensor, shape, raw[place]) if len(raw) else _from_typed(tensor, shape, item.contents)
            )
        return in_order(wanted, found)

    def _remember(
        self,
        answer: memoryview,
        described: bytes,
        raw: list[memoryview],
        names: list[str],
        success: Success,
        outputs: tuple[int, ...],
    ) -> None:
        """Where an accepted answer has its raw tensors, one behind the other at its end; `names`: whose they are."""
        if any(output.datatype.kind not in _ANY_BITS for output in success.outputs):
            return
        fixed, places, before, at = [], {}, described, 0
        for name, tensor in zip(names, raw, strict=True):
            before += prefix(6, len(tensor))
            fixed.append((at, before))
            start = at + len(before)
            at, before = start + len(tensor), b""
            places[name] = (start, at)
        if at != len(answer) or any(answer[start : start + len(text)] != text for start, text in fixed):
            return
        if len(self._layouts) >= REMEMBERED:
            self._layouts.clear()
        wanted = [self._outputs[place] for place in outputs]
        tensors = [
            (tensor, output.shape, *places[tensor.name]) for tensor, output in zip(wanted, success.outputs, strict=True)
        ]
        self._layouts[len(answer), outputs] = _Layout(tuple(fixed), tuple(tensors))


def parted(answer: memoryview) -> tuple[bytes, list[memoryview]]:
    """A ModelInferResponse without its raw tensors, and those, which stay where they are.

    The library is given no more than what it may make of it is worth: a few bytes can stand for a large object.

    Raises:
        Garbled: it is none, or too long or many-parted to be read while others wait.
    """
    described: list[memoryview] = []
    raw: list[memoryview] = []
    at, length = 0, 0
    while at < len(answer):
        start = at
        tag, at = _number(answer, at)
        if tag & 7 == _LENGTH_GIVEN:
            size, at = _number(answer, at)
            end = at + size
        elif tag & 7 == _VARINT:
            _, end = _number(answer, at)
        else:
            end = at + _FIXED.get(tag & 7, len(answer))
        if end > len(answer) or len(described) + len(raw) >= MAX_PARTS:
            raise Garbled
        if tag == _RAW:
            raw.append(answer[at:end])
        else:
            described.append(answer[start:end])
            length += end - start
        at = end
    if length > (MAX_DESCRIBED_BYTES if raw else MAX_TYPED_BYTES):
        raise Garbled
    return b"".join(described), raw


def _number(data: memoryview, at: int) -> tuple[int, int]:
    """A varint, and where it ends. Raises Garbled."""
    value = shift = 0
    for octet in data[at : at + 10]:
        value |= (octet & 0x7F) << shift
        shift += 7
        if octet < 0x80:
            return value, at + shift // 7
    raise Garbled


def _from_typed(tensor: SignatureTensor, shape: tuple[int, ...], contents: Any) -> OutputTensor:
    held = CONTENTS.get(tensor.datatype.name)
    if any(given.name != held for given, _ in contents.ListFields()):
        raise Mismatch(f"output '{tensor.name}' in a form that {tensor.datatype} does not have")
    values = list(getattr(contents, held)) if held else []
    count = element_count(shape)
    if len(values) != count:
        raise Mismatch(f"output '{tensor.name}' with {len(values)} elements for shape {list(shape)}")
    if tensor.datatype.kind == "bytes":
        return OutputTensor(tensor.name, tensor.datatype, shape, pack_bytes(values))
    if tensor.datatype.kind == "half":  # no elements: anything else had no field to come in
        return OutputTensor(tensor.name, tensor.datatype, shape, b"")
    return from_elements(
        tensor, shape, oip_data.from_checked(InputPlan(0, tensor.name, tensor.datatype, shape, count), values)
    )


def _parameter(number: int, name: str, value: object) -> bytes:
    """An entry of a map of InferParameter."""
    return field(number, text(1, name) + field(2, _choice(name, value)))


def _choice(name: str, value: object) -> bytes:
    if value is True or value is False:
        return b"\x08\x01" if value else b"\x08\x00"
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return b"\x10" + varint(value % 2**64) if value < 2**63 else b"\x28" + varint(value)
    if isinstance(value, str):
        return field(3, value.encode())
    if isinstance(value, float):
        return b"\x21" + struct.pack("<d", value)
    raise NotEncodable(f"the request parameter '{name}' has no form in gRPC")
