"""Short ways to write the corpus: infer requests as JSON, as JSON with binary tensors, and as protobuf."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf.message import Message
from tritonclient.grpc import service_pb2 as pb

from tests.differential.exchange import Grpc, Http

LENGTH = "Inference-Header-Content-Length"


def tensor(name: str = "INPUT0", shape: Any = (1, 3), datatype: Any = "FP32", **more: Any) -> dict[str, Any]:
    """An input of the JSON form; `data` and `parameters` among `more`."""
    shape = list(shape) if isinstance(shape, tuple) else shape
    return {"name": name, "shape": shape, "datatype": datatype, **more}


def ask(*inputs: Any, **more: Any) -> dict[str, Any]:
    return {**more, "inputs": list(inputs)}


SIMPLE = tensor(data=[1, 2.5, 0.1])


def infer(
    body: Any, model: str = "m", *blobs: bytes, headers: dict[str, str] | None = None, version: str = "", **checks: Any
) -> Http:
    """POST …/infer. `body` is a document, or bytes sent as they are; blobs follow the JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {LENGTH: str(len(data))} if blobs else {}
    path = f"/v2/models/{model}{f'/versions/{version}' if version else ''}/infer"
    return Http("POST", path, data + b"".join(blobs), {**sent, **(headers or {})}, **checks)


def blob(datatype: str, values: Any) -> bytes:
    """Little-endian binary form; BF16 takes its bits."""
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(element)) + element for element in values)
    return np.array(values, DTYPES[datatype]).tobytes()


DTYPES = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
    "BF16": "<u2",
}
SAMPLES: dict[str, list[Any]] = {
    "BOOL": [True, False, True],
    "UINT8": [0, 255, 7],
    "UINT16": [0, 2**16 - 1, 7],
    "UINT32": [0, 2**32 - 1, 7],
    "UINT64": [0, 2**64 - 1, 9007199254740993],
    "INT8": [-128, 127, 7],
    "INT16": [-(2**15), 2**15 - 1, 7],
    "INT32": [-(2**31), 2**31 - 1, 7],
    "INT64": [-(2**63), 2**63 - 1, 9007199254740993],
    "FP16": [1.5, -65504.0, 0.0],
    "FP32": [0.1, -3.4e38, 1e-40],
    "FP64": [0.1, -1.7e308, 5e-324],
    "BF16": [0x3F80, 0xFF80, 0x0001],
    "BYTES": ["hé", "", "b\0c"],
}
CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def sample_blob(datatype: str) -> bytes:
    values = SAMPLES[datatype]
    return blob(datatype, [text.encode() for text in values] if datatype == "BYTES" else values)


def request(
    model: str = "m", *, version: str = "", request_id: str = "", raw: Sequence[bytes] = (), **parameters: Any
) -> pb.ModelInferRequest:
    """A ModelInferRequest without inputs; parameters as `name=("int64_param", 5)`, or None for an empty one."""
    message = pb.ModelInferRequest(model_name=model, model_version=version, id=request_id)
    message.raw_input_contents.extend(raw)
    for name, chosen in parameters.items():
        parameter = message.parameters[name]
        if chosen is not None:
            setattr(parameter, chosen[0], chosen[1])
    return message


def add(
    message: pb.ModelInferRequest,
    name: str = "INPUT0",
    shape: Sequence[int] = (1, 3),
    datatype: str = "FP32",
    **contents: Sequence[Any],
) -> pb.ModelInferRequest:
    """Add an input; contents as `fp32_contents=[…]`. Returns the message."""
    item = message.inputs.add(name=name, datatype=datatype, shape=shape)
    for kind, values in contents.items():
        getattr(item.contents, kind).extend(values)
    return message


def simple(**more: Any) -> pb.ModelInferRequest:
    """The valid request for an FP32 identity, raw."""
    return add(request(raw=[blob("FP32", [1, 2.5, 0.1])], **more))


def call(message: Message, method: str = "ModelInfer", **checks: Any) -> Grpc:
    return Grpc(method, message.SerializeToString(), **checks)
