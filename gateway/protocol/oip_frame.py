"""The parts of an inference request around its data: `id`, `inputs`, `outputs`, `parameters` as checked values.

Rules (wire notes §1.8, §1.9): unknown keys are ignored; parameters are strings, integers, booleans or doubles and
their names do not start with `triton_`; each input has exactly one of `data` and `binary_data_size`. What this
gateway does not offer (classification, shared memory) is refused by name, never ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from gateway.errors import InvalidRequest, Unsupported
from gateway.protocol.oip_plan import MAX_INPUTS, MAX_OUTPUTS, shown

MAX_TIMEOUT_US: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class FrameInput:
    """`data` is a list or a simdjson array; None exactly where `binary_data_size` is set."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Any
    binary_data_size: int | None


@dataclass(frozen=True, slots=True)
class Frame:
    request_id: str | None
    inputs: tuple[FrameInput, ...]
    outputs: tuple[tuple[str, bool], ...] | None
    """(name, binary); None: all outputs."""
    binary_data_output: bool
    timeout_s: float
    """0: none given."""


def read_frame(document: Any) -> Frame:
    """Checks a parsed request.

    Raises:
        InvalidRequest: a field is missing, mistyped or contradictory; the text names it.
        Unsupported: the request asks for something this gateway does not offer.
    """
    if type(document) is not dict:
        raise InvalidRequest("request body must be a JSON object")
    request_id = document.get("id", "")
    if type(request_id) is not str:
        raise InvalidRequest("'id' must be a string")
    parameters = _parameters(document, "request")
    inputs = document.get("inputs")
    if type(inputs) is not list:
        raise InvalidRequest("'inputs' is missing or not an array; give one object per input tensor")
    if len(inputs) > MAX_INPUTS:
        raise InvalidRequest(f"'inputs' holds {len(inputs)} tensors, at most {MAX_INPUTS} are allowed")
    return Frame(
        request_id or None,
        tuple([_input(index, item) for index, item in enumerate(inputs)]),
        _outputs(document.get("outputs")),
        _flag(parameters, "binary_data_output", "request"),
        _timeout_s(parameters),
    )


def _input(index: int, item: Any) -> FrameInput:
    if type(item) is not dict:
        raise InvalidRequest(f"inputs[{index}] must be an object")
    name = _text(item, "name", f"inputs[{index}]")
    where = f"input '{shown(name)}'"
    shape = item.get("shape")
    if type(shape) is not list or not all(map(_is_integer, shape)):
        raise InvalidRequest(f"{where}: 'shape' is missing or not an array of integers")
    parameters = _parameters(item, where)
    _refuse_shared_memory(parameters, where)
    size = parameters.get("binary_data_size")
    if size is not None and (not _is_integer(size) or size < 0):
        raise InvalidRequest(f"{where}: 'binary_data_size' must be an integer that is not negative")
    has_data = item.get("data") is not None
    if has_data == (size is not None):
        raise InvalidRequest(
            f"Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters'. {where} "
            f"sets {'both' if has_data else 'none'}"
        )
    return FrameInput(name, _text(item, "datatype", where), tuple(shape), item.get("data"), size)


def _outputs(outputs: Any) -> tuple[tuple[str, bool], ...] | None:
    if outputs is None:
        return None
    if type(outputs) is not list:
        raise InvalidRequest("'outputs' must be an array of objects")
    if len(outputs) > MAX_OUTPUTS:
        raise InvalidRequest(f"'outputs' lists {len(outputs)} tensors, at most {MAX_OUTPUTS} are allowed")
    wanted = []
    for index, item in enumerate(outputs):
        if type(item) is not dict:
            raise InvalidRequest(f"outputs[{index}] must be an object")
        name = _text(item, "name", f"outputs[{index}]")
        where = f"output '{shown(name)}'"
        parameters = _parameters(item, where)
        _refuse_shared_memory(parameters, where)
        _refuse_classification(parameters, where)
        wanted.append((name, _flag(parameters, "binary_data", where)))
    return tuple(wanted) or None


def _text(item: dict[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if type(value) is not str:
        raise InvalidRequest(f"{where}: '{key}' is missing or not a string")
    return value


def _parameters(item: dict[str, Any], where: str) -> dict[str, Any]:
    parameters = item.get("parameters")
    if parameters is None:
        return {}
    if type(parameters) is not dict:
        raise InvalidRequest(f"{where}: 'parameters' must be an object")
    for name, value in parameters.items():
        if not isinstance(value, (str, int, float)):
            raise InvalidRequest(f"{where}: parameter '{shown(name)}' must be a string, integer, boolean or double")
        if name.startswith("triton_"):
            raise InvalidRequest(f"{where}: parameter '{shown(name)}' uses the reserved prefix 'triton_'")
    return parameters


def _refuse_shared_memory(parameters: dict[str, Any], where: str) -> None:
    if "shared_memory_region" in parameters:
        raise Unsupported(f"{where}: shared memory regions of clients are not offered by this gateway")


def _refuse_classification(parameters: dict[str, Any], where: str) -> None:
    count = parameters.get("classification", 0)
    if not _is_integer(count) or count < 0:
        raise InvalidRequest(f"{where}: parameter 'classification' must be an integer that is not negative")
    if count:
        raise Unsupported(f"{where}: 'classification' is not offered by this gateway")


def _flag(parameters: dict[str, Any], name: str, where: str) -> bool:
    value = parameters.get(name, False)
    if type(value) is not bool:
        raise InvalidRequest(f"{where}: parameter '{name}' must be true or false")
    return value


def _timeout_s(parameters: dict[str, Any]) -> float:
    for name in ("timeout", "priority"):
        value = parameters.get(name, 0)
        if not _is_integer(value) or not 0 <= value <= MAX_TIMEOUT_US:
            raise InvalidRequest(f"request: parameter '{name}' must be an integer that is not negative")
    return float(parameters.get("timeout", 0)) / 1e6


def _is_integer(value: Any) -> bool:
    """An integer literal, −0 among them; not true or false."""
    return isinstance(value, int) and type(value) is not bool
