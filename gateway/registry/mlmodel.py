"""The `MLmodel` file that MLflow puts beside a model: which file is the ONNX model, and what signature was stated.

Format: YAML, https://mlflow.org/docs/latest/ml/model/#storage-format. Only the `onnx` flavour is served; its `data` is
the path of the ONNX file. The signature is a text of JSON inside the YAML: a list of tensors (`tensor-spec`) or of
columns; which of a model's inputs a column belongs to, it does not say.

Rules: the stated signature is compared loosely and never enforced, the ONNX file says what is served. A difference is
told to people. What cannot be compared is not called different.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import yaml

from gateway.core.batchability import SignatureTensor
from gateway.errors import SourceError

MLMODEL: Final = "MLmodel"
MAX_BYTES: Final = 1024 * 1024
MAX_TENSORS: Final = 10_000
MAX_DIM: Final = 2**63 - 1
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_DATATYPES: Final = {
    "bool": "BOOL", "boolean": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "integer": "INT32", "int64": "INT64", "long": "INT64",
    "float16": "FP16", "float32": "FP32", "float": "FP32", "float64": "FP64", "double": "FP64",
    "str": "BYTES", "string": "BYTES", "object": "BYTES", "binary": "BYTES",
}  # fmt: skip
"""numpy's and MLflow's names → OIP's."""


@dataclass(frozen=True, slots=True)
class Stated:
    """One tensor or column of a stated signature. None: not said. `shape`: −1 is variable."""

    name: str | None
    datatype: str | None
    shape: tuple[int, ...] | None
    column: bool = False

    def document(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatype, "shape": None if self.shape is None else list(self.shape)}


@dataclass(frozen=True, slots=True)
class Mlmodel:
    """What the gateway takes from the file."""

    flavors: tuple[str, ...]
    onnx_file: str | None
    """Path of the ONNX file relative to the model's directory; None: the model has no ONNX flavour."""
    inputs: tuple[Stated, ...] | None = None
    outputs: tuple[Stated, ...] | None = None
    """None: no signature is stated."""

    def signature(self) -> dict[str, Any] | None:
        """For JSON; None where nothing is stated."""
        if self.inputs is None and self.outputs is None:
            return None
        sides = {"inputs": self.inputs, "outputs": self.outputs}
        return {side: None if tensors is None else [t.document() for t in tensors] for side, tensors in sides.items()}


def read_mlmodel(directory: Path) -> Mlmodel | None:
    """The MLmodel file of a directory; None if it has none.

    Raises:
        SourceError: it cannot be read or is not what MLflow writes.
    """
    path = directory / MLMODEL
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None
    return parse_mlmodel(data)


def parse_mlmodel(data: bytes) -> Mlmodel:
    """Raises SourceError."""
    if len(data) > MAX_BYTES:
        raise SourceError(f"{MLMODEL} is larger than {MAX_BYTES // 1024} KiB")
    try:
        document = yaml.load(data, Loader=_LOADER)  # noqa: S506  # both loaders are safe ones
    except (yaml.YAMLError, ValueError, RecursionError):
        raise SourceError(f"{MLMODEL} is not YAML; log the model again with MLflow") from None
    flavors = document.get("flavors") if isinstance(document, dict) else None
    if not isinstance(flavors, dict):
        raise SourceError(f"{MLMODEL} names no flavors; log the model again with MLflow")
    onnx = flavors.get("onnx")
    file = onnx.get("data") if isinstance(onnx, dict) else None
    stated = document.get("signature")
    stated = stated if isinstance(stated, dict) else {}
    return Mlmodel(
        tuple(sorted(str(name) for name in flavors)),
        _relative(file) if file is not None else None,
        _side(stated.get("inputs")),
        _side(stated.get("outputs")),
    )


def _relative(file: object) -> str:
    if not isinstance(file, str) or not file or "\0" in file or "\\" in file:
        raise SourceError(f"{MLMODEL} names no usable file for its onnx flavor")
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts:
        raise SourceError(f"{MLMODEL} names the file {file[:200]!r}, which is not inside the model's directory")
    return path.as_posix()


def _side(text: object) -> tuple[Stated, ...] | None:
    """Inputs or outputs; None where nothing usable is stated."""
    try:
        listed = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(listed, list) or len(listed) > MAX_TENSORS:
        return None
    return tuple(_stated(item) for item in listed if isinstance(item, dict))


def _stated(item: dict[str, Any]) -> Stated:
    name = _text(item.get("name"))
    spec = item.get("tensor-spec")
    if isinstance(spec, dict):
        shape = spec.get("shape")
        usable = isinstance(shape, list) and all(type(dim) is int and -1 <= dim <= MAX_DIM for dim in shape)
        return Stated(name, _datatype(spec.get("dtype")), tuple(shape) if usable and shape is not None else None)
    return Stated(name, _datatype(item.get("type")), None, column=True)


def _text(value: object) -> str | None:
    """None where nothing is said, or half of a surrogate pair, which no text can be written with later."""
    if not isinstance(value, str) or not value or any("\ud800" <= character <= "\udfff" for character in value):
        return None
    return value


def _datatype(text: object) -> str | None:
    return _DATATYPES.get(text) if isinstance(text, str) else None


def differences(
    stated: Mlmodel, inputs: Sequence[SignatureTensor], outputs: Sequence[SignatureTensor]
) -> tuple[str, ...]:
    """In what the stated signature differs from the ONNX file's, one sentence each, for people."""
    return (*_differing("input", stated.inputs, inputs), *_differing("output", stated.outputs, outputs))


def _differing(role: str, stated: tuple[Stated, ...] | None, actual: Sequence[SignatureTensor]) -> list[str]:
    if not stated:
        return []
    known = {tensor.name: tensor for tensor in actual}
    if any(tensor.column for tensor in stated):
        return _columns(role, stated, actual)
    if len(stated) == len(actual) == 1 and stated[0].name not in known:
        found = [] if stated[0].name is None else [f"calls the {role} '{stated[0].name}', the file '{actual[0].name}'"]
        return found + _tensor(role, stated[0], actual[0])
    found = []
    for tensor in stated:
        if tensor.name is None:
            continue
        if tensor.name not in known:
            found.append(f"has the {role} '{tensor.name}', the file has {sorted(known)}")
        else:
            found += _tensor(role, tensor, known[tensor.name])
    return found


def _tensor(role: str, stated: Stated, actual: SignatureTensor) -> list[str]:
    found = []
    datatype = actual.datatype.name
    if stated.datatype not in (None, datatype):
        found.append(f"says the {role} '{actual.name}' is {stated.datatype}, the file says {datatype}")
    if stated.shape is not None and not _fits(stated.shape, actual.shape):
        shape = [-1 if dim is None else dim for dim in actual.shape]
        found.append(f"says the {role} '{actual.name}' has shape {list(stated.shape)}, the file says {shape}")
    return found


def _fits(stated: Sequence[int], actual: Sequence[int | None]) -> bool:
    return len(stated) == len(actual) and all(
        want == -1 or have is None or want == have for want, have in zip(stated, actual, strict=True)
    )


def _columns(role: str, stated: Sequence[Stated], actual: Sequence[SignatureTensor]) -> list[str]:
    """Columns are either tensors of their own, or what one matrix is made of; else nothing can be said."""
    known = {tensor.name: tensor for tensor in actual}
    if {tensor.name for tensor in stated} <= known.keys():
        return [text for tensor in stated for text in _tensor(role, tensor, known[str(tensor.name)])]
    if len(actual) == 1 and len(actual[0].shape) == 2:
        width = actual[0].shape[1]
        if width not in (None, len(stated)):
            return [f"has {len(stated)} {role} columns, the file's '{actual[0].name}' has {width}"]
    return []
