"""A request's rows of a finished batch → `inference.ModelInferResponse`, written by hand.

Per batch and form, once: model, outputs and the lengths of tensors of a fixed size. Per request: its slices. The fields
of a message may stand in any order; `id` and `parameters`, which differ per request, come first.

Rules (wire notes §2.3): exactly one raw_output_contents entry per output, in order, also for an empty one and for one
in shared memory; clients index them unchecked. Where the server's owner chose `typed_responses: mirror`, a request with
typed contents gets its answer in typed contents, unless an output is FP16 or BF16, which have no such form, or is
wanted in shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from gateway.core import assembly
from gateway.core.model import ModelSpec
from gateway.core.request import InferRequest, OutputTensor
from gateway.core.tensor import unpack_bytes
from gateway.protocol import schema
from gateway.protocol.oip_grpc_request import CONTENTS, GrpcForm
from gateway.protocol.oip_outputs import answer_tensors
from gateway.protocol.protobuf_wire import field, prefix, text, varint

Parts = list[bytes | memoryview]
_OUTPUTS: Final = 5
_RAW: Final = 6
_JOINED_BYTES: Final = 16_384
"""Outputs of a batch up to this size are kept as bytes: slices of them are cheaper than views."""


class _Piece(NamedTuple):
    before: bytes
    data: bytes | memoryview
    per_row: int
    """Bytes; 0 where all of `data` is one caller's."""


class _Template(NamedTuple):
    """An answer of so many rows in which only the tensors' bytes differ. `length`: bytes of the whole message."""

    pieces: tuple[_Piece, ...]
    length: int


class BatchAnswers:
    """What the answers of one batch share. It is kept with the batch, so it does not know it."""

    __slots__ = ("_count", "_identity", "_offsets", "_outputs", "_spec", "templates")

    def __init__(self, spec: ModelSpec, outputs: Mapping[int, OutputTensor], rows: int) -> None:
        """`outputs` by index into the model's outputs, each of `rows` rows where the model batches."""
        self._spec = spec
        self._identity = text(1, spec.name) + text(2, spec.version)
        self._outputs = outputs
        self._count = rows
        self._offsets: dict[int, list[int]] = {}
        self.templates: dict[tuple[tuple[int, ...], int], _Template | None] = {}

    def template(self, outputs: tuple[int, ...], rows: int) -> _Template | None:
        """None where a tensor's size depends on its content."""
        if (outputs, rows) not in self.templates:
            self.templates[outputs, rows] = self._template(outputs, rows)
        return self.templates[outputs, rows]

    def _template(self, outputs: tuple[int, ...], rows: int) -> _Template | None:
        before = self.heading(outputs, rows)
        pieces = []
        length = 0
        for index in outputs:
            output = self._outputs[index]
            if output.datatype.kind == "bytes":
                return None
            per_row = len(output.data) // self._count if self._spec.batched else 0
            size = per_row * rows if self._spec.batched else len(output.data)
            before += prefix(_RAW, size)
            data = bytes(output.data) if len(output.data) <= _JOINED_BYTES else memoryview(output.data)
            pieces.append(_Piece(before, data, per_row))
            length += len(before) + size
            before = b""
        return _Template(tuple(pieces), length)

    def heading(self, outputs: tuple[int, ...], rows: int) -> bytes:
        """Model and outputs, without data."""
        fields = []
        for index in outputs:
            output = self._outputs[index]
            shape = (rows, *output.shape[1:]) if self._spec.batched else output.shape
            fields.append(field(_OUTPUTS, describe(output, shape)))
        return self._identity + b"".join(fields)

    def blob(self, index: int, row: int, rows: int) -> bytes | memoryview:
        output = self._outputs[index]
        if not self._spec.batched:
            return output.data
        if output.datatype.kind != "bytes":
            per_row = len(output.data) // self._count
            return memoryview(output.data)[row * per_row : (row + rows) * per_row]
        offsets = self._offsets.get(index)
        if offsets is None:
            offsets = self._offsets[index] = assembly.row_offsets(output)
        return memoryview(output.data)[offsets[row] : offsets[row + rows]]


class AnswerWriter:
    """Writes answers for one model version."""

    def __init__(self, spec: ModelSpec, *, mirror: bool = False) -> None:
        self.spec = spec
        self._mirror = mirror
        self._identity = text(1, spec.name) + text(2, spec.version)
        self._contents = schema.message("inference.InferTensorContents")

    def write(self, request: InferRequest, answers: BatchAnswers, before: bytes = b"") -> tuple[Parts, int]:
        """The message of a settled request: (parts, total bytes).

        `answers` belongs to the request's batch and is shared by all its members; `before`: fields of the message that
        are the request's own.

        Raises:
            InvalidRequest: an answer of the wanted form cannot be made.
        """
        form: GrpcForm = request.form
        if request.request_id is not None:
            before += field(3, request.request_id.encode())
        if not form.response.plain or (form.typed and self._mirror):
            return self._write_own(request, form, before)
        row, rows = request.row, request.rows
        template = answers.templates.get((form.outputs, rows)) or answers.template(form.outputs, rows)
        if template is None:
            return _with_raw(
                before + answers.heading(form.outputs, rows), [answers.blob(index, row, rows) for index in form.outputs]
            )
        parts: Parts = [before]
        for head, data, per_row in template.pieces:
            parts.append(head)
            parts.append(data[row * per_row : (row + rows) * per_row] if per_row else data)
        return parts, len(before) + template.length

    def _write_own(self, request: InferRequest, form: GrpcForm, before: bytes) -> tuple[Parts, int]:
        tensors = answer_tensors(self.spec, form.response, request.batch, request.row, request.rows)
        head = before + self._identity
        mirrored = form.typed and self._mirror and not form.response.targets
        if mirrored and all(tensor.datatype.kind != "half" for tensor in tensors):
            fields = [describe(t, t.shape) + field(5, self._typed(t)) for t in tensors]
            body = head + b"".join([field(_OUTPUTS, one) for one in fields])
            return [body], len(body)
        head += b"".join([field(_OUTPUTS, describe(tensor, tensor.shape)) for tensor in tensors])
        return _with_raw(head, [tensor.data for tensor in tensors])

    def _typed(self, tensor: OutputTensor) -> bytes:
        values: Sequence[Any]
        if tensor.datatype.kind == "bytes":
            values = unpack_bytes(tensor.data)
        else:
            values = np.frombuffer(tensor.data, tensor.datatype.numpy).tolist()
        written: bytes = self._contents(**{CONTENTS[tensor.datatype.name]: values}).SerializeToString()
        return written


def describe(tensor: OutputTensor, shape: Sequence[int]) -> bytes:
    """Fields 1 to 3 of an InferOutputTensor."""
    dims = b"".join(map(varint, shape))
    return text(1, tensor.name) + text(2, tensor.datatype.name) + (field(3, dims) if dims else b"")


def _with_raw(head: bytes, blobs: Sequence[bytes | memoryview]) -> tuple[Parts, int]:
    parts: Parts = [head]
    for blob in blobs:
        parts.append(prefix(_RAW, len(blob)))
        parts.append(blob)
    return parts, sum(map(len, parts))
