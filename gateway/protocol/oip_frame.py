"""The parts of an inference request around its data: `id`, `inputs`, `outputs`, `parameters` as checked values.

Rules (wire notes §1.8, §1.9): unknown keys are ignored; each input has exactly one of `data`, `binary_data_size` and
`shared_memory_region`.
What parameters may say is decided in `oip_parameters`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gateway.core.client_memory import Area
from gateway.errors import InvalidRequest, Malformed
from gateway.protocol.oip_parameters import (
    RequestOptions,
    input_options,
    memory_area,
    output_options,
    request_options,
)
from gateway.protocol.oip_plan import MAX_INPUTS, MAX_OUTPUTS, WantedOutput, shown


@dataclass(frozen=True, slots=True)
class FrameInput:
    """`data` is a list or a simdjson array; None exactly where `binary_data_size` or `area` is set."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Any
    binary_data_size: int | None
    area: Area | None = None
    """Where in shared memory its data lie."""


@dataclass(frozen=True, slots=True)
class Frame:
    request_id: str | None
    inputs: tuple[FrameInput, ...]
    outputs: tuple[WantedOutput, ...] | None
    """None: all outputs."""
    options: RequestOptions


def read_frame(document: Any, *, forwarded: bool = False) -> Frame:
    """Checks a parsed request. `forwarded`: its own parameters go to the backend.

    Raises:
        InvalidRequest: a field is missing, mistyped or contradictory; the text names it (missing and mistyped ones
            raise `Malformed`).
        Unsupported: the request asks for something this gateway does not offer.
    """
    if type(document) is not dict:
        raise Malformed("request body must be a JSON object")
    request_id = document.get("id", "")
    if type(request_id) is not str:
        raise Malformed("'id' must be a string")
    options = request_options(_parameters(document, "request"), forwarded=forwarded)
    inputs = document.get("inputs")
    if type(inputs) is not list:
        raise Malformed("'inputs' is missing or not an array; give one object per input tensor")
    if len(inputs) > MAX_INPUTS:
        raise InvalidRequest(f"'inputs' holds {len(inputs)} tensors, at most {MAX_INPUTS} are allowed")
    return Frame(
        request_id or None,
        tuple([_input(index, item) for index, item in enumerate(inputs)]),
        _outputs(document.get("outputs")),
        options,
    )


def _input(index: int, item: Any) -> FrameInput:
    if type(item) is not dict:
        raise Malformed(f"inputs[{index}] must be an object")
    name = _text(item, "name", f"inputs[{index}]")
    where = f"input '{shown(name)}'"
    shape = item.get("shape")
    if type(shape) is not list or not all(map(_is_integer, shape)):
        raise Malformed(f"{where}: 'shape' is missing or not an array of integers")
    parameters = _parameters(item, where)
    size = input_options(parameters, where)
    area = memory_area(parameters, where) if parameters else None
    given = (item.get("data") is not None) + (size is not None) + (area is not None)
    if given != 1:
        raise InvalidRequest(
            "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
            f"'shared_memory_region' in 'parameters'. {where} sets {('none', '', 'both', 'all')[given]}"
        )
    return FrameInput(name, _text(item, "datatype", where), tuple(shape), item.get("data"), size, area)


def _outputs(outputs: Any) -> tuple[WantedOutput, ...] | None:
    if outputs is None:
        return None
    if type(outputs) is not list:
        raise Malformed("'outputs' must be an array of objects")
    if len(outputs) > MAX_OUTPUTS:
        raise InvalidRequest(f"'outputs' lists {len(outputs)} tensors, at most {MAX_OUTPUTS} are allowed")
    wanted = []
    for index, item in enumerate(outputs):
        if type(item) is not dict:
            raise Malformed(f"outputs[{index}] must be an object")
        name = _text(item, "name", f"outputs[{index}]")
        where = f"output '{shown(name)}'"
        options = output_options(_parameters(item, where), where)
        wanted.append(WantedOutput(name, options.binary_data, options.classes, options.area))
    return tuple(wanted) or None


def _text(item: dict[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if type(value) is not str:
        raise Malformed(f"{where}: '{key}' is missing or not a string")
    return value


def _parameters(item: dict[str, Any], where: str) -> dict[str, Any]:
    parameters = item.get("parameters")
    if parameters is None:
        return {}
    if type(parameters) is not dict:
        raise Malformed(f"{where}: 'parameters' must be an object")
    return parameters


def _is_integer(value: Any) -> bool:
    """An integer literal, −0 among them; not true or false."""
    return isinstance(value, int) and type(value) is not bool
