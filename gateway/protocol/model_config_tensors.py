"""Inputs and outputs as config.pbtxt states them, and the tensors that are made for ragged batches.

Rules are Triton's: `reshape` keeps the number of elements, so the products of the dims between variable ones agree, in
order; a scalar (empty reshape) needs the batch dimension of a batching model. What has no meaning for an ONNX model
(image formats, shape tensors, formats of TensorRT) is refused.
"""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath
from typing import Final, cast, get_args

from gateway.core.model import TensorSpec
from gateway.core.scheduling import BatchInputKind, BatchInputTensor, BatchOutputTensor
from gateway.core.tensor import DATATYPE, MAX_RANK, Datatype
from gateway.protocol.text_section import Section

DATA_TYPES: Final[dict[str, Datatype]] = {
    "TYPE_STRING" if name == "BYTES" else f"TYPE_{name}": datatype for name, datatype in DATATYPE.items()
}
INT32: Final = 2**31 - 1
INT64: Final = 2**63 - 1
MAX_LABEL_PATH: Final = 255


def read_inputs(top: Section, batch_size: int | None) -> tuple[TensorSpec, ...]:
    specs = []
    for tensor in top.sections("input"):
        hint = "image formats have no effect on ONNX models; remove it"
        tensor.refuse_unless("format", ("FORMAT_NONE", 0), hint)
        ragged, optional = tensor.flag("allow_ragged_batch"), tensor.flag("optional")
        spec = _read_tensor(tensor, batch_size, optional=optional, ragged=ragged)
        specs += [spec] if spec is not None else []
    _refuse_repeated(top, "input", specs)
    return tuple(specs)


def read_outputs(top: Section, batch_size: int | None) -> tuple[tuple[TensorSpec, ...], tuple[tuple[str, str], ...]]:
    """The outputs, and (output name, file) for each that names a file of labels."""
    specs, labels = [], []
    for tensor in top.sections("output"):
        file = read_file_name(tensor, "label_filename")
        spec = _read_tensor(tensor, batch_size, optional=False, ragged=False)
        if spec is None:
            continue
        specs.append(spec)
        if file:
            labels.append((spec.name, file))
    _refuse_repeated(top, "output", specs)
    return tuple(specs), tuple(labels)


def read_file_name(section: Section, name: str) -> str:
    """A file below the model's directory, as a relative path; "" if not stated or not acceptable."""
    line = next((value.line for value in section.values(name)), section.line)
    text = section.text(name) or ""
    parts = PurePosixPath(text).parts
    if "\0" in text or text.startswith("/") or ".." in parts or len(text) > MAX_LABEL_PATH:
        section.fault(line, name, "must be a path inside the model's directory, without ..")
        return ""
    return text


def read_data_type(section: Section) -> Datatype | None:
    kind = section.word("data_type", tuple(DATA_TYPES))
    if not section.has("data_type"):
        section.fault(section.line, "data_type", "is missing; write for example data_type: TYPE_FP32")
    return None if kind is None else DATA_TYPES[kind]


def read_dims(section: Section, low: int = -1) -> tuple[int, ...]:
    """`dims`, 1 or more each; `low` −1 allows variable ones."""
    if not section.has("dims"):
        section.fault(section.line, "dims", "is missing; write for example dims: [ -1 ]")
    dims = section.integers("dims", low, INT64)
    if 0 in dims or len(dims) > MAX_RANK:
        hint = f"must be 1 or more each, or -1 for variable, and at most {MAX_RANK} of them"
        section.fault(section.line, "dims", hint)
    return dims


def _read_tensor(tensor: Section, batch_size: int | None, *, optional: bool, ragged: bool) -> TensorSpec | None:
    name = tensor.text("name")
    if not name:
        tensor.fault(tensor.line, "name", 'is missing; write name: "…" as in the model')
    kind = read_data_type(tensor)
    dims = read_dims(tensor)
    reshape = _read_reshape(tensor, dims, batch_size)
    tensor.refuse_unless("is_shape_tensor", ("false", 0), "shape tensors belong to TensorRT; remove it")
    hint = "non-linear formats belong to TensorRT; remove it"
    tensor.refuse_unless("is_non_linear_format_io", ("false", 0), hint)
    tensor.finish()
    return TensorSpec(name, kind, dims, optional, reshape, ragged) if name and kind is not None else None


def _read_reshape(tensor: Section, dims: tuple[int, ...], batch_size: int | None) -> tuple[int, ...] | None:
    block = tensor.section("reshape")
    if block is None:
        return None
    shape = block.integers("shape", -1, INT64)
    block.finish()
    if 0 in shape or len(shape) > MAX_RANK:
        hint = f"must be 1 or more each, or -1 for variable, and at most {MAX_RANK} of them"
        block.fault(block.line, "shape", hint)
    elif segments(shape) != segments(dims):
        hint = f"has different size for dims {list(dims)} and reshape {list(shape)}; both must hold as many elements"
        block.fault(block.line, "shape", hint)
    elif not shape and batch_size == 0:
        block.fault(block.line, "shape", "cannot be empty for a model with max_batch_size 0; state the whole shape")
    return shape


def segments(dims: tuple[int, ...]) -> list[int]:
    """Number of elements between the variable dims, in order: equal for two dims that can stand for each other."""
    products = [1]
    for dim in dims:
        if dim == -1:
            products.append(1)
        else:
            products[-1] *= dim
    return products


def _refuse_repeated(top: Section, name: str, specs: list[TensorSpec]) -> None:
    times = Counter([spec.name for spec in specs])
    for repeated in sorted(name for name, n in times.items() if n > 1):
        top.fault(0, name, f"'{repeated}' is described twice; keep one of them")


def read_batch_inputs(top: Section, inputs: tuple[TensorSpec, ...]) -> tuple[BatchInputTensor, ...]:
    found = []
    for block in top.sections("batch_input"):
        word = block.word("kind", get_args(BatchInputKind)) or "BATCH_ELEMENT_COUNT"
        kind = cast("BatchInputKind", word)
        datatype = read_data_type(block)
        if datatype is not None and datatype.name not in ("INT32", "FP32"):
            block.fault(block.line, "data_type", "batch input data type must be TYPE_INT32 or TYPE_FP32")
        targets = _names(block, "target_name")
        sources = _source(block, f"batch input kind '{kind}'", inputs)
        block.finish()
        if datatype is not None:
            found.append(BatchInputTensor(kind, targets, datatype, sources))
    return tuple(found)


def read_batch_outputs(
    top: Section, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> tuple[BatchOutputTensor, ...]:
    found = []
    for block in top.sections("batch_output"):
        kind = block.word("kind", ("BATCH_SCATTER_WITH_INPUT_SHAPE",)) or "BATCH_SCATTER_WITH_INPUT_SHAPE"
        targets = _names(block, "target_name")
        known = {spec.name for spec in outputs}
        for target in targets:
            if known and target not in known:
                block.fault(block.line, "target_name", f"unknown target output name '{target[:64]}'; name an output")
        found.append(BatchOutputTensor(targets, _source(block, f"batch output kind '{kind}'", inputs)))
        block.finish()
    return tuple(found)


def _names(block: Section, name: str) -> tuple[str, ...]:
    names = block.texts(name)
    if not block.has(name) or "" in names:
        block.fault(block.line, name, "is missing; name a tensor of the model")
    return names


def _source(block: Section, what: str, inputs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
    sources = block.texts("source_input")
    if len(sources) != 1:
        block.fault(block.line, "source_input", f"{what} expects 1 source input, got {len(sources)}")
    known = {spec.name for spec in inputs}
    for source in sources:
        if known and source not in known:
            block.fault(block.line, "source_input", f"unknown source input name '{source[:64]}'; name an input")
    return sources
