"""The binary tensor extension, inbound: blobs behind the JSON part → tensors that are views of the body.

Rules (wire notes §1.9): blobs stand back to back in the order of `inputs`, little-endian, row-major; every byte
belongs to exactly one input; a blob's size must be what its shape says. BYTES elements carry uint32 lengths.
A body with header length 0 is a raw request: one input, all outputs binary.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from gateway.core.model import ModelSpec
from gateway.core.request import InputTensor
from gateway.core.tensor import unpack_bytes
from gateway.errors import InvalidRequest
from gateway.protocol.oip_plan import InputKey, InputPlan

_MAX_BOOL: Final = 1


def from_blob(plan: InputPlan, blob: memoryview, model: str) -> InputTensor:
    """One input's bytes, checked against its shape.

    Raises:
        InvalidRequest: size differs from the shape's, a BOOL byte is neither 0 nor 1, or BYTES framing is broken.
    """
    datatype = plan.datatype
    check_size(plan, len(blob), model)
    if datatype.kind == "bytes":
        _check_bytes(plan, blob)
    elif datatype.kind == "bool" and len(blob) and int(np.frombuffer(blob, np.uint8).max()) > _MAX_BOOL:
        raise InvalidRequest(f"input '{plan.name}': a BOOL element must be the byte 0 or 1")
    return InputTensor(datatype, plan.shape, None, blob)


def check_size(plan: InputPlan, size: int, model: str) -> None:
    """Raises InvalidRequest: a tensor of `size` bytes is not of this shape. That of BYTES depends on its content."""
    datatype = plan.datatype
    if datatype.kind != "bytes" and plan.elements * datatype.itemsize != size:
        raise InvalidRequest(
            f"input byte size mismatch for input '{plan.name}' for model '{model}'. Expected "
            f"{plan.elements * datatype.itemsize}, got {size}"
        )


def _check_bytes(plan: InputPlan, blob: memoryview) -> None:
    try:
        elements = unpack_bytes(blob, plan.elements)  # a blob may hold millions more than its shape says
    except ValueError as error:
        raise InvalidRequest(f"{error} for inference input '{plan.name}'") from error
    if len(elements) > plan.elements:
        raise InvalidRequest(
            f"unexpected number of string elements {len(elements)} for inference input '{plan.name}', expecting "
            f"{plan.elements}"
        )
    if len(elements) < plan.elements:
        raise InvalidRequest(
            f"expected {plan.elements} string elements for inference input '{plan.name}', got {len(elements)}"
        )
    for index, element in enumerate(elements):
        try:
            element.decode()
        except UnicodeDecodeError as error:
            # ONNX strings are UTF-8; let in, this one element would fail the whole batch inside the model.
            raise InvalidRequest(f"input '{plan.name}': string element {index} is not valid UTF-8") from error


def raw_request_key(spec: ModelSpec, size: int) -> InputKey:
    """Shape of a raw request (no JSON part): batch 1, at most one variable dimension deduced from `size` bytes.

    Raises:
        InvalidRequest: the model has several inputs or variable dimensions, or the size does not fit.
    """
    if len(spec.inputs) != 1:
        raise InvalidRequest(
            f"raw request must only have 1 input (found {len(spec.inputs)}) to be deduced; send a JSON part and "
            "Inference-Header-Content-Length"
        )
    tensor = spec.inputs[0]
    dims = list(tensor.dims)
    variable = [place for place, dim in enumerate(dims) if dim < 0]
    if tensor.datatype.kind == "bytes":
        if dims != [1]:
            raise InvalidRequest(f"For BYTE datatype raw input '{tensor.name}', the model must have input shape [1]")
    elif variable:
        if len(variable) > 1:
            raise InvalidRequest(
                f"The shape of the raw input '{tensor.name}' can not be deduced because there are more than one "
                "variable-sized dimension"
            )
        dims[variable[0]] = 1
        unit = tensor.datatype.itemsize
        for dim in dims:
            unit *= dim
        if unit == 0 or size % unit:
            raise InvalidRequest(
                f"The shape of the raw input '{tensor.name}' can not be deduced: {size} bytes are not a multiple "
                f"of {unit}"
            )
        dims[variable[0]] = size // unit
    shape = (1, *dims) if spec.batched else tuple(dims)
    return tensor.name, tensor.datatype.name, shape
