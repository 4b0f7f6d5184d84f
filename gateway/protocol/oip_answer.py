"""Answers: a request's rows of a finished batch → OIP JSON, with or without binary tensors behind it.

Per batch, once: each output becomes JSON text in one call and is cut into rows; everything of the body that does not
change from request to request is put together. Per request: its rows are joined and framed.
Rules (wire notes §1.8, §1.9): key order id, model_name, model_version, outputs; data flat; FP32 in its shortest form
that reads back to the same float32; NaN and Infinity as bare literals; no parameters but `binary_data_size`;
a response with at least one non-empty binary output carries `Inference-Header-Content-Length`; of an output in shared
memory it says name, datatype and shape only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import orjson

from gateway.core import assembly
from gateway.core.model import ModelSpec
from gateway.core.request import InferRequest, OutputTensor
from gateway.core.tensor import Datatype, element_count, unpack_bytes
from gateway.errors import InvalidRequest
from gateway.protocol.oip_outputs import answer_tensors
from gateway.protocol.oip_plan import ResponseForm

_NUMPY: Final = orjson.OPT_SERIALIZE_NUMPY
_DATA: Final = b',"data":['
_LITERAL: Final = {True: b"-Infinity", False: b"Infinity"}


class AnswerEncoder:
    """Encodes answers for one model version."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        identity = b'"model_name":%b,"model_version":%b,"outputs":[' % (
            orjson.dumps(spec.name),
            orjson.dumps(spec.version),
        )
        self._opening = b"{" + identity
        self._opening_with_id = b'{"id":%b,' + identity.replace(b"%", b"%%")

    def encode(self, request: InferRequest, encoded: BatchEncoder) -> tuple[list[bytes | memoryview], int, int | None]:
        """The body of a settled request: (parts, total bytes, JSON part's length if binary tensors follow).

        `encoded` belongs to the request's batch and is shared by all its members.

        Raises:
            InvalidRequest: a BYTES output is wanted as JSON but is not valid UTF-8, or an answer of the wanted form
                cannot be made.
        """
        form: ResponseForm = request.form
        if form.all_json:
            body = self.encode_json(request, encoded)
            return [body], len(body), None
        opening = self._opening_of(request)
        if form.plain:
            return self._encode_binary(opening, encoded, request.row, request.rows, form)
        # Nobody else gets these tensors, so they are as a batch of their own.
        tensors = answer_tensors(self.spec, form, request.batch, request.row, request.rows)
        own = BatchEncoder(self.spec, dict(zip(form.outputs, tensors, strict=True)), request.rows)
        return self._encode_binary(opening, own, 0, request.rows, form)

    def encode_json(self, request: InferRequest, encoded: BatchEncoder) -> bytes:
        """As `encode`, for a request whose form is `all_json`: the body in one piece."""
        wanted, row = request.form.outputs, request.row
        bodies = encoded.single_rows.get(wanted) if request.rows == 1 else None
        outputs = bodies[row] if bodies is not None else encoded.json_outputs(wanted, row, request.rows)
        return (self._opening if request.request_id is None else self._opening_of(request)) + outputs

    def _opening_of(self, request: InferRequest) -> bytes:
        """What a body begins with, up to its outputs."""
        if request.request_id is None:
            return self._opening
        return self._opening_with_id % orjson.dumps(request.request_id)

    def _encode_binary(
        self, opening: bytes, encoded: BatchEncoder, row: int, rows: int, form: ResponseForm
    ) -> tuple[list[bytes | memoryview], int, int | None]:
        plain = encoded.binary_frame(form, rows)
        if plain is not None:
            head = opening + plain
            found = [encoded.blob(index, row, rows) for index in form.outputs]
            return [head, *found], len(head) + sum(map(len, found)), len(head)
        fields: list[bytes] = []
        blobs: list[bytes | memoryview] = []
        total = 0
        for place, (index, binary) in enumerate(zip(form.outputs, form.binary, strict=True)):
            if form.targets and form.targets[place] is not None:
                fields.append(encoded.description(index, rows))
                continue
            if not binary:
                fields.append(encoded.json_output(index, row, rows))
                continue
            blob = encoded.blob(index, row, rows)
            fields.append(encoded.binary_head(index, rows) + b"%d}}" % len(blob))
            if len(blob):
                blobs.append(blob)
                total += len(blob)
        head = opening + b",".join(fields) + b"]}"
        return [head, *blobs], len(head) + total, len(head) if blobs else None


class BatchEncoder:
    """What is encoded once per batch. `row` and `rows` of its methods select a request's part of the batch.

    It is kept with the batch, so it does not know it: a cycle would hold the outputs until the garbage collector comes
    by.
    """

    __slots__ = ("_count", "_frames", "_heads", "_offsets", "_outputs", "_rows", "_spec", "single_rows")

    def __init__(self, spec: ModelSpec, outputs: Mapping[int, OutputTensor], rows: int) -> None:
        """`outputs` by index into the model's outputs, each of `rows` rows where the model batches."""
        self._spec = spec
        self._outputs = outputs
        self._count = rows
        self._rows: dict[int, list[bytes | None]] = {}
        self.single_rows: dict[tuple[int, ...], list[bytes] | None] = {}
        """What `json_outputs` says of each single row, by outputs, once it was asked for; None: see there."""
        self._heads: dict[tuple[int, int, bool], bytes] = {}
        self._frames: dict[tuple[tuple[int, ...], tuple[bool, ...], int], bytes | None] = {}
        self._offsets: dict[int, list[int]] = {}

    def json_outputs(self, outputs: tuple[int, ...], row: int, rows: int) -> bytes:
        """All outputs and the closing brackets."""
        if rows == 1:
            bodies = self.single_rows.get(outputs) or self._single_row_bodies(outputs)
            if bodies is not None:
                return bodies[row]
        return b",".join([self.json_output(index, row, rows) for index in outputs]) + b"]}"

    def _single_row_bodies(self, outputs: tuple[int, ...]) -> list[bytes] | None:
        """What `json_outputs` says of each single row; None where a row cannot be JSON or rows mean nothing."""
        texts = [self._texts(index) for index in outputs]
        bodies: list[bytes] | None = None
        if self._spec.batched and not any(None in column for column in texts):
            heads = [self._head(index, 1, binary=False) for index in outputs]
            if len(outputs) == 1:
                head = heads[0]
                bodies = [head + text + b"]}]}" for text in texts[0] if text is not None]
            else:
                frame = b",".join([head.replace(b"%", b"%%") + b"%b]}" for head in heads]) + b"]}"
                bodies = [frame % row for row in zip(*texts, strict=True)]
        self.single_rows[outputs] = bodies
        return bodies

    def _texts(self, index: int) -> list[bytes | None]:
        texts = self._rows.get(index)
        if texts is None:
            texts = self._rows[index] = self._row_texts(self._outputs[index])
        return texts

    def json_output(self, index: int, row: int, rows: int) -> bytes:
        """One output object with its data."""
        head = self._heads.get((index, rows, False)) or self._head(index, rows, binary=False)
        return head + self.json_elements(index, row, rows) + b"]}"

    def json_elements(self, index: int, row: int, rows: int) -> bytes:
        """The elements of one output, separated by commas.

        Raises:
            InvalidRequest: it holds bytes that JSON cannot.
        """
        texts = self._texts(index)
        if not self._spec.batched:
            text = texts[0]
        else:
            chosen = texts[row : row + rows]
            text = None if None in chosen else b",".join([part for part in chosen if part])
        if text is None:
            raise InvalidRequest(
                f"output '{self._outputs[index].name}' holds bytes that are not valid UTF-8 and cannot be "
                "sent as JSON; ask for it with the parameter binary_data: true"
            )
        return text

    def description(self, index: int, rows: int) -> bytes:
        """One output object without its data."""
        return self._head(index, rows, binary=False).removesuffix(_DATA) + b"}"

    def elements(self, index: int, rows: int) -> int:
        """How many elements `rows` rows of one output have."""
        output = self._outputs[index]
        return element_count((rows, *output.shape[1:]) if self._spec.batched else output.shape)

    def binary_frame(self, form: ResponseForm, rows: int) -> bytes | None:
        """All output objects and the closing brackets, where every output is binary, of fixed size and not empty."""
        key = (form.outputs, form.binary, rows)
        if key not in self._frames:
            self._frames[key] = self._binary_frame(form, rows)
        return self._frames[key]

    def _binary_frame(self, form: ResponseForm, rows: int) -> bytes | None:
        fields = []
        for index, binary in zip(form.outputs, form.binary, strict=True):
            output = self._outputs[index]
            if not binary or output.datatype.kind == "bytes" or not len(output.data):
                return None
            size = len(output.data) // self._count * rows if self._spec.batched else len(output.data)
            fields.append(self._head(index, rows, binary=True) + b"%d}}" % size)
        return b",".join(fields) + b"]}"

    def binary_head(self, index: int, rows: int) -> bytes:
        """One output object up to the value of `binary_data_size`."""
        return self._heads.get((index, rows, True)) or self._head(index, rows, binary=True)

    def blob(self, index: int, row: int, rows: int) -> bytes | memoryview:
        output = self._outputs[index]
        if not self._spec.batched:
            return output.data
        if output.datatype.kind == "bytes":
            offsets = self._offsets.get(index)
            if offsets is None:
                offsets = self._offsets[index] = assembly.row_offsets(output)
            return memoryview(output.data)[offsets[row] : offsets[row + rows]]
        per_row = len(output.data) // self._count
        return memoryview(output.data)[row * per_row : (row + rows) * per_row]

    def _head(self, index: int, rows: int, *, binary: bool) -> bytes:
        output = self._outputs[index]
        shape = (rows, *output.shape[1:]) if self._spec.batched else output.shape
        head = b'{"name":%b,"datatype":"%b","shape":[%b]%b' % (
            orjson.dumps(output.name),
            output.datatype.name.encode(),
            ",".join(map(str, shape)).encode(),
            b',"parameters":{"binary_data_size":' if binary else _DATA,
        )
        self._heads[index, rows, binary] = head
        return head

    def _row_texts(self, output: OutputTensor) -> list[bytes | None]:
        """JSON text of each row's elements, without brackets; None where a row cannot be JSON."""
        rows = self._count if self._spec.batched else 1
        if output.datatype.kind == "bytes":
            return _string_rows(output, rows)
        numbers = np.frombuffer(output.data, output.datatype.numpy)
        if numbers.size == 0:
            return [b""] * rows
        if output.datatype.kind == "half":
            numbers = _widened(output.datatype, numbers)
        if numbers.size == rows:
            texts: list[bytes | None] = orjson.dumps(numbers, option=_NUMPY)[1:-1].split(b",")  # type: ignore[assignment]
        else:
            table = numbers.reshape(rows, -1)
            texts = orjson.dumps(table, option=_NUMPY)[2:-2].split(b"],[")  # type: ignore[assignment]
        if output.datatype.kind in {"float", "half"} and not np.isfinite(numbers).all():
            return _with_literals(texts, numbers.reshape(rows, -1))
        return texts


def _widened(datatype: Datatype, halves: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """FP16 or BF16 as float32, exactly."""
    if datatype.name == "FP16":
        return halves.astype(np.float32)
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _string_rows(output: OutputTensor, rows: int) -> list[bytes | None]:
    elements = unpack_bytes(output.data)
    per_row = len(elements) // rows if rows else 0
    texts: list[bytes | None] = []
    for row in range(rows):
        try:
            texts.append(orjson.dumps([e.decode() for e in elements[row * per_row : (row + 1) * per_row]])[1:-1])
        except UnicodeDecodeError:
            texts.append(None)
    return texts


def _with_literals(texts: list[bytes | None], table: np.ndarray[Any, Any]) -> list[bytes | None]:
    """orjson writes null for what JSON has no number for; put the protocol's literals in those places."""
    result = list(texts)
    for row in np.flatnonzero(~np.isfinite(table).all(axis=1)):
        tokens = (texts[row] or b"").split(b",")
        for column in np.flatnonzero(~np.isfinite(table[row])):
            value = float(table[row, column])
            tokens[column] = b"NaN" if math.isnan(value) else _LITERAL[value < 0]
        result[row] = b",".join(tokens)
    return result
