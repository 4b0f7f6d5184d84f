"""What the codec's tests share: small models, and an independent, naive reading of requests and answers.

The naive reading uses only Python's json and numpy and nothing of `gateway.protocol`: it is the second opinion that
the four decoding roads are compared with.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from gateway.core.assembly import encode_values
from gateway.core.batch import FinishedBatch
from gateway.core.model import BatchPolicy, ModelSpec, TensorSpec
from gateway.core.request import InferRequest, InputTensor, OutputTensor
from gateway.core.tensor import DATATYPE
from gateway.errors import InvalidRequest
from gateway.protocol.oip_json import LARGE_BYTES, RequestDecoder

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For hypothesis: a slow machine is no failure."""

NUMPY = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BF16": "<u2",
}  # fmt: skip
JSON_DATATYPES = [name for name in [*NUMPY, "BYTES"] if name not in {"FP16", "BF16"}]
INTEGERS = [name for name in NUMPY if "INT" in name]


def tensor_spec(name: str, datatype: str = "FP32", dims: tuple[int, ...] = (-1,), optional: bool = False) -> TensorSpec:
    return TensorSpec(name, DATATYPE[datatype], dims, optional)


def model(
    inputs: list[TensorSpec] | None = None,
    outputs: list[TensorSpec] | None = None,
    *,
    name: str = "m",
    version: str = "1",
    max_batch_size: int = 8,
    **policy: Any,
) -> ModelSpec:
    return ModelSpec(
        name,
        version,
        "sha256:" + "0" * 64,
        "onnxruntime_onnx",
        tuple(inputs if inputs is not None else [tensor_spec("X")]),
        tuple(outputs if outputs is not None else [tensor_spec("Y")]),
        BatchPolicy(max_batch_size, **policy),
    )


def request_body(datatype: str = "FP32", data: str = "[1,2,3]", shape: str = "[1,3]", extra: str = "") -> bytes:
    """A request for one input X; `data`, `shape` and `extra` (further top-level members) are JSON text."""
    return f'{{{extra}"inputs":[{{"name":"X","shape":{shape},"datatype":"{datatype}","data":{data}}}]}}'.encode()


def padded(body: bytes, size: int = LARGE_BYTES) -> bytes:
    """The same document at `size` bytes or more: blanks before the last bracket."""
    return body[:-1] + b" " * max(0, size - len(body)) + body[-1:]


def packed(elements: list[bytes]) -> bytes:
    """BYTES in binary form, made without the module under test."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def tensor_bytes(tensor: InputTensor | None) -> bytes:
    """OIP binary form of a decoded tensor, whichever of its two forms it has."""
    assert tensor is not None
    if tensor.buffer is not None:
        assert tensor.values is None
        return bytes(tensor.buffer)
    assert tensor.values is not None
    return encode_values(tensor.datatype, tensor.values)


def naive_bytes(datatype: str, data: Any) -> bytes:
    """`data` as `json.loads` gave it (−0 as −0.0 is the caller's business) → OIP binary form."""
    flat: list[Any] = []

    def walk(item: Any) -> None:
        if isinstance(item, list):
            for member in item:
                walk(member)
        else:
            flat.append(item)

    walk(data)
    if datatype == "BYTES":
        return packed([item.encode() for item in flat])
    if datatype in {"FP32", "FP64"}:
        with np.errstate(over="ignore"):
            return np.array([float(item) for item in flat], "<f8").astype(NUMPY[datatype]).tobytes()
    return b"".join(np.array(item, NUMPY[datatype]).tobytes() for item in flat)


def naive_request(body: bytes) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """A valid JSON body → {input name: (shape, bytes)}."""
    document = json.loads(body, parse_int=lambda text: -0.0 if text == "-0" else int(text))
    read = {}
    for item in document["inputs"]:
        data = item["data"]
        if item["datatype"] in INTEGERS:
            data = json.loads(json.dumps(data), parse_float=lambda text: int(float(text)))
        read[item["name"]] = (tuple(item["shape"]), naive_bytes(item["datatype"], data))
    return read


def decoded(spec: ModelSpec, request: InferRequest) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """A decoded request in the same form, with the bookkeeping of its size checked on the way."""
    assert len(request.inputs) == len(spec.inputs)
    read = {}
    for place, tensor in zip(spec.inputs, request.inputs, strict=True):
        if tensor is not None:
            assert tensor.datatype is place.datatype
            read[place.name] = (tensor.shape, tensor_bytes(tensor))
    assert request.nbytes == sum(len(data) for _, data in read.values())
    return read


def batch_of(spec: ModelSpec, rows: int, outputs: list[np.ndarray[Any, Any] | list[bytes]]) -> FinishedBatch:
    """A finished batch: one array per output of `spec` (its shape is kept), or BYTES elements as [rows, n]."""
    tensors = {}
    for index, (place, content) in enumerate(zip(spec.outputs, outputs, strict=True)):
        if isinstance(content, list):
            shape: tuple[int, ...] = (rows, len(content) // rows) if rows else (0, 0)
            data = packed(content)
        else:
            shape, data = content.shape, np.ascontiguousarray(content, place.datatype.numpy).tobytes()
        tensors[index] = OutputTensor(place.name, place.datatype, shape, data)
    return FinishedBatch("a1f3-000001", rows, tensors, "onnx-1", 1, 0.0, 0.0, "full", (0, 0, 0))


# -- whole requests ------------------------------------------------------------------------------------------------

ROADS = ["typed", "general", "large", "strict", "large strict"]


def by_road(road: str, body: bytes) -> bytes:
    """The same request, changed so that it takes `road`."""
    if road == "typed":
        return body
    if road == "general":
        return body[:-1] + b',"unknown":[{"x":1}]}'
    if road == "large":
        return padded(body)
    strict = body[:-1] + b',"unknown":NaN}'
    return strict if road == "strict" else padded(strict)


def of_x(datatype: str = "FP32", **policy: Any) -> ModelSpec:
    return model([tensor_spec("X", datatype)], **policy)


def decode(spec: ModelSpec, body: bytes, header_length: int | None = None) -> InferRequest:
    return RequestDecoder(spec).decode(body, header_length)


def refused(spec: ModelSpec, body: bytes, *words: str, header_length: int | None = None) -> None:
    decoder = RequestDecoder(spec)
    for _ in range(2):  # nothing remembered from the first refusal lets the second through
        with pytest.raises(InvalidRequest) as caught:
            decoder.decode(body, header_length)
        assert caught.value.status == 400
        for word in words:
            assert word in str(caught.value)


def x_of(request: InferRequest) -> bytes:
    return tensor_bytes(request.inputs[0])


def binary_body(
    *inputs: tuple[str, str, list[int], bytes | str], extra: str = "", blobs: bytes | None = None
) -> tuple[bytes, int]:
    """(body, header length); an input whose content is text goes as JSON."""
    items = []
    for name, datatype, shape, content in inputs:
        how = f'"data":{content}' if isinstance(content, str) else f'"parameters":{{"binary_data_size":{len(content)}}}'
        items.append(f'{{"name":"{name}","shape":{shape},"datatype":"{datatype}",{how}}}')
    head = f'{{{extra}"inputs":[{",".join(items)}]}}'.encode()
    if blobs is None:
        blobs = b"".join(content for *_, content in inputs if isinstance(content, bytes))
    return head + blobs, len(head)
