"""What a person types → an OIP infer request that fits the model, and its answer → values.

Rules: pure. The model's metadata decides datatypes; the data decides the shape, and may be less nested than the
model asks: one row is a batch of one, flat rows are folded into fixed trailing dims. Numbers travel as JSON; arrays
from `.npy` files, and FP16 and BF16 which have no JSON form, travel through the binary tensor extension.
Whether values suit the datatype is for the server to say.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import orjson

from gateway.client import Answer, ClientError
from gateway.core.tensor import DATATYPE, MAX_RANK, Datatype, element_count, pack_bytes, unpack_bytes

HEADER_LENGTH: Final = "Inference-Header-Content-Length"
NPY_MAGIC: Final = b"\x93NUMPY"


@dataclass(frozen=True, slots=True)
class Output:
    """One output of an answer; `values` is flat, BYTES as text where they are UTF-8."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: list[Any]


@dataclass(frozen=True, slots=True)
class Request:
    """An encoded infer request."""

    body: bytes
    headers: dict[str, str]


def read_data(content: bytes) -> Any:
    """Data as given by a file or the command line: a numpy array, or what the JSON says.

    Raises:
        ClientError: neither.
    """
    if content.startswith(NPY_MAGIC):
        try:
            return np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ClientError(f"this .npy file cannot be read: {error}") from None
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        hint = "write rows such as [[1, 2], [3, 4]], or @file.json, @file.npy, or - for standard input"
        raise ClientError(f"the data is not JSON: {error}; {hint}") from None


def build_request(metadata: Mapping[str, Any], data: Any) -> Request:
    """The request for a model whose OIP metadata is `metadata`.

    `data` is rows for a model of one input, an object {input name: rows}, or a whole OIP request.

    Raises:
        ClientError: names or shapes do not fit the model.
    """
    if isinstance(data, dict):
        request = data.get("request", data)
        if isinstance(request, dict) and isinstance(request.get("inputs"), list):
            return _encode(dict(request), [])
    inputs = metadata.get("inputs") or []
    by_name = _by_name([tensor["name"] for tensor in inputs], data)
    entries, blobs = [], []
    for tensor in inputs:
        if tensor["name"] in by_name:
            entry, blob = _input(tensor, by_name[tensor["name"]])
            entries.append(entry)
            blobs += [blob] if blob is not None else []
    request = {"inputs": entries}
    outputs = metadata.get("outputs") or []
    if any(_datatype(output).kind == "half" for output in outputs):
        request["outputs"] = [
            {"name": o["name"], "parameters": {"binary_data": _datatype(o).kind == "half"}} for o in outputs
        ]
    return _encode(request, blobs)


def _by_name(names: Sequence[str], data: Any) -> dict[str, Any]:
    if isinstance(data, dict):
        if unknown := sorted(set(data) - set(names)):
            raise ClientError(f"the model has no input '{unknown[0]}'; its inputs are {', '.join(names)}")
        return data
    if len(names) != 1:
        example = "{" + ", ".join(f'"{name}": [[…]]' for name in names) + "}"
        raise ClientError(f"the model has {len(names)} inputs; name them: {example}")
    return {names[0]: data}


def _encode(request: dict[str, Any], blobs: Sequence[bytes]) -> Request:
    header = orjson.dumps(request)
    headers = {"Content-Type": "application/json"}
    if blobs:
        headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(header))}
    return Request(header + b"".join(blobs), headers)


def _datatype(tensor: Mapping[str, Any]) -> Datatype:
    try:
        return DATATYPE[tensor["datatype"]]
    except KeyError:
        raise ClientError(f"the model's metadata names the unknown datatype {tensor.get('datatype')}") from None


def _input(tensor: Mapping[str, Any], data: Any) -> tuple[dict[str, Any], bytes | None]:
    """One entry of `inputs`, and its bytes if they travel behind the JSON part."""
    name, datatype, dims = tensor["name"], _datatype(tensor), [int(dim) for dim in tensor["shape"]]
    if isinstance(data, np.ndarray):
        shape, blob = _fit(name, data.shape, dims), _to_bytes(name, data, datatype)
    else:
        found, flat = _flatten(name, data)
        shape = _fit(name, found, dims)
        if datatype.kind != "half":
            return {"name": name, "shape": shape, "datatype": datatype.name, "data": flat}, None
        blob = _to_bytes(name, _as_numbers(name, flat), datatype)
    parameters = {"binary_data_size": len(blob)}
    return {"name": name, "shape": shape, "datatype": datatype.name, "parameters": parameters}, blob


def _flatten(name: str, data: Any) -> tuple[tuple[int, ...], list[Any]]:
    """Shape and elements of nested lists; ClientError if rows differ in length."""
    shape: list[int] = []
    level = [data]
    while level and isinstance(level[0], list):
        lengths = {len(item) if isinstance(item, list) else -1 for item in level}
        if len(lengths) != 1:
            raise ClientError(f"the rows for input '{name}' differ in length; give each the same")
        shape.append(lengths.pop())
        level = [element for item in level for element in item]
        if len(shape) > MAX_RANK:
            raise ClientError(f"the data for input '{name}' is nested deeper than {MAX_RANK} lists")
    if any(isinstance(item, list | dict) for item in level):
        raise ClientError(f"the data for input '{name}' must be nested lists of values, all equally deep")
    return tuple(shape), level


def _fit(name: str, shape: tuple[int, ...], dims: list[int]) -> list[int]:
    """The shape to send: as it is if the rank fits, else one row as a batch of one, else folded rows."""
    if len(shape) == len(dims):
        return list(shape)
    if len(shape) == len(dims) - 1 and _suits(shape, dims[1:]):
        return [1, *shape]
    size = element_count(dims[1:])
    if dims and all(dim > 0 for dim in dims[1:]) and element_count(shape) % size == 0:
        return [element_count(shape) // size, *dims[1:]]
    raise ClientError(f"input '{name}' has shape {dims} (-1: any), but the data has shape {list(shape)}")


def _suits(shape: Sequence[int], dims: Sequence[int]) -> bool:
    return all(dim in (-1, size) for size, dim in zip(shape, dims, strict=True))


def _as_numbers(name: str, flat: list[Any]) -> np.ndarray:
    try:
        return np.array(flat, np.float32)
    except (TypeError, ValueError):
        raise ClientError(f"the data for input '{name}' must be numbers") from None


def _to_bytes(name: str, array: np.ndarray, datatype: Datatype) -> bytes:
    """The array in OIP binary form; casts only where the kind of number stays the same."""
    if datatype.kind == "bytes":
        if array.dtype.kind not in "SU":
            raise ClientError(f"input '{name}' takes text; the array holds {array.dtype}")
        texts = [item.encode() if isinstance(item, str) else bytes(item) for item in array.ravel().tolist()]
        return pack_bytes(texts)
    if datatype.name == "BF16" and array.dtype != np.uint16:
        return _to_bfloat16(_cast(name, array, np.dtype("<f4"), datatype)).tobytes()
    return _cast(name, array, datatype.numpy, datatype).tobytes()


def _cast(name: str, array: np.ndarray, wanted: np.dtype[Any], datatype: Datatype) -> np.ndarray:
    if not np.can_cast(array.dtype, wanted, "same_kind"):
        hint = f"save it with .astype(numpy.{np.dtype(wanted).name})"
        raise ClientError(f"input '{name}' is {datatype}, the array holds {array.dtype}; {hint}")
    return np.ascontiguousarray(array, dtype=wanted)


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Upper 16 bits of FP32, rounded to nearest even; NaN stays NaN."""
    bits = array.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype("<u2")
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded).astype("<u2")


def read_outputs(answer: Answer) -> list[Output]:
    """The outputs of an infer answer, JSON and binary.

    Raises:
        ClientError: the answer does not follow the protocol.
    """
    length = answer.header(HEADER_LENGTH)
    split = int(length) if length and length.isdigit() else len(answer.body)
    document = Answer(answer.headers, answer.body[:split], 0.0).json()
    rest = memoryview(answer.body)[split:]
    outputs = []
    try:
        for entry in document["outputs"]:
            size = entry.get("parameters", {}).get("binary_data_size")
            values = entry["data"] if size is None else _from_bytes(DATATYPE[entry["datatype"]], rest[:size])
            rest = rest[size or 0 :]
            outputs.append(Output(entry["name"], entry["datatype"], tuple(entry["shape"]), list(values)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ClientError(f"the answer does not follow the protocol: {error}") from None
    return outputs


def _from_bytes(datatype: Datatype, data: memoryview) -> list[Any]:
    if datatype.kind == "bytes":
        return [element.decode(errors="backslashreplace") for element in unpack_bytes(data)]
    array = np.frombuffer(data, datatype.numpy)
    if datatype.name == "BF16":
        array = (array.astype("<u4") << np.uint32(16)).view("<f4")
    values: list[Any] = array.tolist()
    return values
