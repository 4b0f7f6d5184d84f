"""One loaded copy of a model: onnxruntime behind OIP's datatypes. The only file that imports onnxruntime.

Decides how every OIP datatype becomes what onnxruntime takes and back: numeric tensors are views into
shared memory and go in as they are; BYTES are ONNX strings and therefore UTF-8; BF16, which numpy lacks,
passes as its raw 16 bits through OrtValue. Element types and forms outside OIP (sequences, maps, optionals,
8-bit floats …) are refused when the model is loaded, not when the first request fails.

Texts of errors are fit for users: one line, at most 500 characters, no file paths. Node names stay, they
are the user's own.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import onnxruntime
from onnxruntime import OrtValue, RunOptions

from gateway.core.batchability import SignatureTensor
from gateway.core.tensor import DATATYPE, MAX_RANK, Datatype, element_count, pack_bytes, unpack_bytes
from gateway.protocol.ipc import Signature

RUNTIME_VERSION: Final[str] = onnxruntime.__version__
TEXT_LIMIT: Final = 500
MAX_OPTIONAL: Final = 64

_BF16: Final = DATATYPE["BF16"]
_BF16_ONNX: Final = 16  # TensorProto.DataType.BFLOAT16
_TYPES: Final = {
    "bool": DATATYPE["BOOL"],
    "uint8": DATATYPE["UINT8"],
    "uint16": DATATYPE["UINT16"],
    "uint32": DATATYPE["UINT32"],
    "uint64": DATATYPE["UINT64"],
    "int8": DATATYPE["INT8"],
    "int16": DATATYPE["INT16"],
    "int32": DATATYPE["INT32"],
    "int64": DATATYPE["INT64"],
    "float16": DATATYPE["FP16"],
    "float": DATATYPE["FP32"],
    "double": DATATYPE["FP64"],
    "string": DATATYPE["BYTES"],
    "bfloat16": _BF16,
}
_TENSOR_TYPE: Final = re.compile(r"tensor\((\w+)\)")


class ModelRefusedError(Exception):
    """The model cannot be loaded; the text says why."""


class RunError(Exception):
    """The model did not accept this input, or failed on it; the text says why."""


@dataclass(slots=True)
class Output:
    """One computed output. `data`: OIP binary form."""

    index: int
    datatype: Datatype
    shape: tuple[int, ...]
    data: memoryview | bytes


Feed = Any  # numpy array, or OrtValue for BF16


def new_interrupt() -> Any:
    """What ends the run it is given to; see `Session.run`."""
    return RunOptions()


class Session:
    """An onnxruntime session with the model's signature. Not thread-safe: one run at a time."""

    def __init__(self, model: bytes, intra_op_threads: int, external: Mapping[str, memoryview] | None = None) -> None:
        """`external`: content of the files in which the model keeps tensors, by the location it states; needed until
        the session is made. Raises ModelRefusedError."""
        options = _options(intra_op_threads)
        if external:
            _give_external_data(options, external)
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise ModelRefusedError(_load_text(str(error))) from None
        self.signature = Signature(
            _signature("input", self._session.get_inputs()) + _optional(self._session.get_overridable_initializers()),
            _signature("output", self._session.get_outputs()),
        )
        self._output_names = [tensor.name for tensor in self.signature.outputs]
        datatypes = {tensor.datatype for tensor in self.signature.inputs + self.signature.outputs}
        self._bf16 = _BF16 in datatypes
        self.views_only = not self._bf16 and all(t.datatype.kind != "bytes" for t in self.signature.inputs)
        """Whether what `feed` makes are views of the bytes: fed again, they say what the bytes say by then."""
        if self._bf16 and DATATYPE["BYTES"] in datatypes:
            raise ModelRefusedError(
                "the model mixes bfloat16 and string tensors, which onnxruntime cannot run from Python: "
                "export it with float32 instead of bfloat16"
            )

    def feed(self, index: int, shape: tuple[int, ...], data: memoryview) -> Feed:
        """Bytes in OIP binary form → what `run` takes. Numeric data is not copied and must outlive the run.

        Raises:
            RunError: shape and bytes contradict each other, or strings are not UTF-8.
        """
        tensor = self.signature.inputs[index]
        datatype = tensor.datatype
        count = element_count(shape)
        if datatype.kind == "bytes":
            try:
                return _strings(tensor.name, count, data).reshape(shape)
            except (ValueError, OverflowError, MemoryError) as error:
                raise RunError(f"input {tensor.name}: shape {list(shape)} is not possible: {error}") from None
        if len(data) != count * datatype.itemsize:
            raise RunError(f"input {tensor.name}: {len(data)} bytes do not make up shape {list(shape)} of {datatype}")
        try:
            array = np.frombuffer(data, datatype.numpy).reshape(shape)
        except (ValueError, OverflowError, MemoryError) as error:
            raise RunError(f"input {tensor.name}: shape {list(shape)} is not possible: {error}") from None
        if not self._bf16:
            return array
        if datatype is _BF16:
            return OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BF16_ONNX)
        return OrtValue.ortvalue_from_numpy(array)

    def feeds(self, inputs: Sequence[tuple[int, tuple[int, ...], memoryview]]) -> dict[str, Feed]:
        """What `run` takes, from (index, shape, bytes) of each input. Raises as `feed`."""
        signature = self.signature.inputs
        return {signature[index].name: self.feed(index, shape, data) for index, shape, data in inputs}

    def output_names(self, outputs: Sequence[int]) -> list[str]:
        """What `run` takes for these outputs."""
        return [self._output_names[index] for index in outputs]

    def run(self, feeds: dict[str, Feed], names: list[str], interrupt: Any = None) -> list[Any]:
        """Execute. Returns raw values for `collect`, in the order of `names`. `interrupt`: setting its `terminate`
        ends the run before its next node, and every later one until it is unset.

        Raises:
            RunError: with onnxruntime's reason.
        """
        try:
            if self._bf16:
                return list(self._session.run_with_ort_values(names, feeds, interrupt))
            return list(self._session.run(names, feeds, interrupt))
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise RunError(clean_text(str(error))) from None

    def collect(self, outputs: Sequence[int], values: list[Any]) -> list[Output]:
        """What `run` returned → OIP binary form. Raises RunError: rank too high for the protocol."""
        collected = []
        for index, value in zip(outputs, values, strict=True):
            datatype = self.signature.outputs[index].datatype
            shape, data = _ort_value(datatype, value) if self._bf16 else _array(datatype, value)
            if len(shape) > MAX_RANK:
                name = self._output_names[index]
                raise RunError(f"output {name} has rank {len(shape)}, at most {MAX_RANK} is possible")
            collected.append(Output(index, datatype, shape, data))
        return collected


def _options(intra_op_threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Spinning threads burn the cores that other workers and the front end need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # Every failure is returned to its caller; onnxruntime would print it to stderr a second time.
    options.log_severity_level = 4
    return options


def _give_external_data(options: Any, external: Mapping[str, memoryview]) -> None:
    """Hand the files over in memory: what is not among them onnxruntime refuses, it opens no file.

    It copies what it needs while the session is made."""
    if not hasattr(options, "add_external_initializers_from_files_in_memory"):
        raise ModelRefusedError(
            f"the model keeps weights in external data files, for which onnxruntime {RUNTIME_VERSION} is too old: "
            "install onnxruntime 1.23 or later, or save the model as one file"
        )
    files = {location: content for location, content in external.items() if len(content)}
    sizes = [len(content) for content in files.values()]
    options.add_external_initializers_from_files_in_memory(list(files), list(files.values()), sizes)


def _signature(role: str, tensors: list[Any]) -> tuple[SignatureTensor, ...]:
    signatures = []
    for tensor in tensors:
        match = _TENSOR_TYPE.fullmatch(tensor.type)
        datatype = _TYPES.get(match[1]) if match else None
        if datatype is None:
            raise ModelRefusedError(
                f"{role} {tensor.name} has type {tensor.type}, which the Open Inference Protocol cannot "
                "carry: export the model with plain tensors of a standard type"
            )
        shape = tuple(dim if isinstance(dim, int) and dim >= 0 else None for dim in tensor.shape)
        signatures.append(SignatureTensor(tensor.name, datatype, shape))
    return tuple(signatures)


def _optional(tensors: list[Any]) -> tuple[SignatureTensor, ...]:
    """Inputs with a default. Some exporters declare every weight as one; then none is meant to be an input."""
    if len(tensors) > MAX_OPTIONAL:
        return ()
    known = [tensor for tensor in tensors if (match := _TENSOR_TYPE.fullmatch(tensor.type)) and match[1] in _TYPES]
    return tuple(replace(tensor, optional=True) for tensor in _signature("input", known))


def _strings(name: str, count: int, data: memoryview) -> np.ndarray[Any, np.dtype[Any]]:
    try:
        elements = unpack_bytes(data)
    except ValueError as error:
        raise RunError(f"input {name}: {error}") from None
    if len(elements) != count:
        raise RunError(f"input {name}: {len(elements)} strings where the shape asks for {count}")
    array = np.empty(count, object)
    for place, element in enumerate(elements):
        try:
            array[place] = element.decode()
        except UnicodeDecodeError:
            raise RunError(
                f"input {name}: element {place} is not valid UTF-8, and the strings of ONNX models are UTF-8"
            ) from None
    return array


def _array(datatype: Datatype, value: Any) -> tuple[tuple[int, ...], memoryview | bytes]:
    if datatype.kind == "bytes":
        elements = np.asarray(value, object).reshape(-1).tolist()
        return value.shape, pack_bytes([str(element).encode() for element in elements])
    return value.shape, np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def _ort_value(datatype: Datatype, value: Any) -> tuple[tuple[int, ...], memoryview | bytes]:
    if datatype is not _BF16:
        return _array(datatype, value.numpy())
    shape = tuple(value.shape())
    nbytes = element_count(shape) * datatype.itemsize
    return shape, ctypes.string_at(value.data_ptr(), nbytes) if nbytes else b""


# --- Texts --------------------------------------------------------------------------------------------

_PREFIX: Final = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
# Source files of onnxruntime's build, and anything below a directory that systems have; node names such as
# "/layer1/Conv" are not paths.
_PATHS: Final = re.compile(
    r"\S*/\S*\.(?:cc|cpp|h|hpp|inc|py|so)\b(?::\d+)?"
    r"|/(?:home|root|tmp|usr|opt|var|mnt|srv|etc|proc|dev|run|data|work|app|onnxruntime_src)/\S*"
)


def clean_text(text: str) -> str:
    """A foreign error text → one line of at most `TEXT_LIMIT` characters without file paths."""
    line = " ".join(_PATHS.sub("", _PREFIX.sub("", text)).split())
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= TEXT_LIMIT else line[: TEXT_LIMIT - 1] + "…"


def _load_text(text: str) -> str:
    if "xternal data" in text or "xternal file" in text or "xternal initializer" in text:
        return (
            "the model's external data files do not hold what the model says they do (" + clean_text(text)[:200] + "): "
            "save model and data again, together"
        )
    if "protobuf parsing failed" in text or "No graph was found" in text:
        return "the file is not an ONNX model (its protobuf cannot be parsed): export it again"
    return clean_text(text)
