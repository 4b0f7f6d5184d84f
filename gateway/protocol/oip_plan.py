"""What a validated request looks like before its data is looked at: plans, made once per distinct request form.

A `Plan` is everything a request's names, datatypes, shapes and wanted outputs decide: rows, element counts, the
batch key, the response form. Clients repeat themselves, so plans are remembered per model version in bounded
maps; the key is always the whole of what the plan was made from, so remembering never weakens a check.

Rules (wire notes §1.8): unknown, duplicate or missing inputs, datatype mismatch, wrong rank or dims, unequal
batch dimensions and unknown or repeated outputs are refused here, each with a text that names the field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from gateway.core.classification import check_classifiable
from gateway.core.client_memory import Area, Place
from gateway.core.model import ModelSpec, TensorSpec
from gateway.core.ragged import agreeing_dims
from gateway.core.tensor import DATATYPE, MAX_RANK, Datatype, element_count
from gateway.errors import InvalidRequest, Malformed
from gateway.protocol.options import DEFAULT_OPTIONS, ProtocolOptions

MAX_ELEMENTS: Final = 2**63 - 1
MAX_EMPTY_ELEMENTS: Final = 2**31 - 1
"""Bound on the product of the other dimensions where one is 0; models may be told dims as INT32 (core/ragged.py)."""
MAX_STRINGS: Final = 1_048_576
"""Elements of one BYTES input. Each becomes a Python object, and nobody else is served for half a second meanwhile."""
MAX_INPUTS: Final = 64
MAX_OUTPUTS: Final = 256
REMEMBERED: Final = 512
"""Distinct forms remembered per model version before starting afresh."""

MAX_SHOWN: Final = 128
"""Characters of a client's own text that an error repeats."""

InputKey = tuple[str, str, tuple[int, ...]]
"""Name, datatype and shape as the client wrote them."""


@dataclass(frozen=True, slots=True)
class InputPlan:
    """One input of a request form; `place` is its index in the model's signature."""

    place: int
    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    elements: int
    in_json: bool = True
    """Whether its elements may stand in JSON; FP16 and BF16 may where the server's owner says so."""


class WantedOutput(NamedTuple):
    """One output as a caller lists it."""

    name: str
    binary: bool = False
    classes: int = 0
    """0: the tensor itself; else the parameter `classification`."""
    area: Area | None = None
    """Where in shared memory it is wanted."""


@dataclass(frozen=True, slots=True)
class ResponseForm:
    """Which outputs the caller wants, in its order, and in what form."""

    outputs: tuple[int, ...]
    binary: tuple[bool, ...]
    all_json: bool
    """Plain, and none of them in binary form: the usual answer, worth one look only."""
    needed: tuple[int, ...]
    """`outputs`, ascending: what a batch must produce."""
    classes: tuple[int, ...] = ()
    """`classification` of each output, 0: off; empty where nobody asked."""
    plain: bool = True
    """Whether the answer is the caller's rows of the outputs and nothing else; otherwise see `oip_outputs`."""
    areas: tuple[Area | None, ...] = ()
    """Where in shared memory each output is wanted; empty where nobody asked."""
    targets: tuple[Place | None, ...] = ()
    """The same as places to write to: one request's own, never remembered with the form."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Inputs in the order the client sent them."""

    inputs: tuple[InputPlan, ...]
    rows: int
    trailing: tuple[tuple[int, ...] | None, ...]
    """Per model input: dims after the batch dimension (none of a ragged input's), None if absent. Part of the batch
    key."""


class Planner:
    """Makes and remembers plans for one model version."""

    def __init__(self, spec: ModelSpec, options: ProtocolOptions = DEFAULT_OPTIONS) -> None:
        self.spec = spec
        self._json_half = options.json_half
        self._inputs = {tensor.name: place for place, tensor in enumerate(spec.inputs)}
        self._outputs = {tensor.name: place for place, tensor in enumerate(spec.outputs)}
        self._required = sum(not tensor.optional for tensor in spec.inputs)
        self._plans: dict[tuple[InputKey, ...], Plan] = {}

    def plan(self, keys: tuple[InputKey, ...]) -> Plan:
        """Validated plan for these inputs.

        Raises:
            InvalidRequest: the inputs do not fit the model; the text names the input and what was expected.
        """
        plan = self._plans.get(keys)
        if plan is None:
            plan = self._make(keys)
            if len(self._plans) >= REMEMBERED:
                self._plans.clear()
            self._plans[keys] = plan
        return plan

    def _make(self, keys: tuple[InputKey, ...]) -> Plan:
        spec = self.spec
        inputs: dict[int, InputPlan] = {}
        for name, datatype, shape in keys:
            place = self._inputs.get(name)
            if place is None:
                raise InvalidRequest(f"unexpected inference input '{shown(name)}' for model '{spec.name}'")
            if place in inputs:
                raise InvalidRequest(f"input '{name}' already exists in request")
            inputs[place] = self._input(place, datatype, shape)
        self._check_present(inputs)
        rows = self._rows(list(inputs.values()))
        shapes = [inputs[place].shape if place in inputs else None for place in range(len(spec.inputs))]
        return Plan(tuple(inputs.values()), rows, agreeing_dims(spec.inputs, shapes, spec.batched))

    def _input(self, place: int, datatype_name: str, shape: tuple[int, ...]) -> InputPlan:
        spec, tensor = self.spec, self.spec.inputs[place]
        datatype = DATATYPE.get(datatype_name)
        if datatype is None:
            raise InvalidRequest(
                f"invalid datatype for input {tensor.name}: '{shown(datatype_name)}'; write one of "
                f"{', '.join(DATATYPE)}"
            )
        if datatype is not tensor.datatype:
            raise InvalidRequest(
                f"inference input '{tensor.name}' data-type is '{datatype}', but model '{spec.name}' expects "
                f"'{tensor.datatype}'"
            )
        if len(shape) > MAX_RANK:
            raise InvalidRequest(f"input '{tensor.name}' has {len(shape)} dimensions, at most {MAX_RANK} are allowed")
        if any(dim < 0 for dim in shape):
            raise Malformed(
                f"input '{tensor.name}': dimensions in 'shape' must not be negative, got {shown(_dims(shape))}. All "
                f"input dimensions should be specified for input '{tensor.name}' for model '{self.spec.name}'"
            )
        elements = element_count(shape)
        # A dimension of 0 makes the count 0 whatever the others are; runtimes multiply the others all the same.
        empty_but_huge = not elements and element_count([max(dim, 1) for dim in shape]) > MAX_EMPTY_ELEMENTS
        if empty_but_huge or elements * max(datatype.itemsize, 1) > MAX_ELEMENTS:
            raise InvalidRequest(
                f"input '{tensor.name}': shape {shown(_dims(shape))} causes total element count to exceed maximum "
                f"size of {MAX_ELEMENTS}"
            )
        self._check_dims(tensor, shape)
        if elements > MAX_STRINGS and not datatype.itemsize:
            raise InvalidRequest(
                f"input '{tensor.name}': shape {shown(_dims(shape))} holds {elements} strings, at most {MAX_STRINGS} "
                "are allowed; send several requests"
            )
        return InputPlan(place, tensor.name, datatype, shape, elements, datatype.kind != "half" or self._json_half)

    def _check_dims(self, tensor: TensorSpec, shape: tuple[int, ...]) -> None:
        spec = self.spec
        if spec.batched and not shape:
            raise InvalidRequest(
                f"input '{tensor.name}' has no shape but model requires batch dimension for '{spec.name}'"
            )
        expected = (-1, *tensor.dims) if spec.batched else tensor.dims
        if len(shape) != len(expected) or any(want not in (-1, got) for want, got in zip(expected, shape, strict=True)):
            raise InvalidRequest(
                f"unexpected shape for input '{tensor.name}' for model '{spec.name}'. Expected "
                f"{_dims(expected)}, got {_dims(shape)}"
            )

    def _check_present(self, inputs: dict[int, InputPlan]) -> None:
        spec = self.spec
        missing = [t.name for place, t in enumerate(spec.inputs) if place not in inputs and not t.optional]
        if not missing:
            return
        got = [plan.name for plan in inputs.values()]
        if self._required == len(spec.inputs):
            counts = f"expected {len(spec.inputs)} inputs but got {len(got)} inputs"
        else:
            counts = (
                f"expected number of inputs between {self._required} and {len(spec.inputs)} but got {len(got)} inputs"
            )
        raise InvalidRequest(
            f"{counts} for model '{spec.name}'. Got input(s) {got}, but missing required input(s) {missing}. "
            "Please provide all required input(s)."
        )

    def _rows(self, inputs: list[InputPlan]) -> int:
        spec = self.spec
        if not spec.batched or not inputs:
            return 1
        rows = inputs[0].shape[0]
        for plan in inputs:
            if plan.shape[0] != rows:
                raise InvalidRequest(
                    f"input '{plan.name}' batch size {plan.shape[0]} does not match other inputs for '{spec.name}': "
                    f"input '{inputs[0].name}' has {rows}"
                )
        if rows < 1:
            raise InvalidRequest(f"inference request batch-size must be >= 1 for '{spec.name}'")
        limit = spec.policy.request_rows
        if rows > limit:
            why = spec.policy.rows_reason
            raise InvalidRequest(f"inference request batch-size must be <= {limit} for '{spec.name}'{why}")
        return rows

    def response_form(self, wanted: Sequence[WantedOutput] | None, all_binary: bool) -> ResponseForm:
        """`wanted`: as listed by the caller; None or empty: all outputs, `all_binary` each.

        Raises:
            InvalidRequest: unknown or repeated output, one that JSON cannot carry (FP16, BF16), or one whose values
                cannot be ranked.
        """
        spec = self.spec
        if not wanted:
            outputs = tuple(range(len(spec.outputs)))
            binary = (all_binary,) * len(outputs)
            classes: tuple[int, ...] = ()
            areas: tuple[Area | None, ...] = ()
        else:
            outputs = tuple(self._output(item.name) for item in wanted)
            binary = tuple(item.binary for item in wanted)
            classes = tuple(item.classes for item in wanted) if any(item.classes for item in wanted) else ()
            areas = tuple(item.area for item in wanted) if any(item.area for item in wanted) else ()
            if len(set(outputs)) != len(outputs):
                raise InvalidRequest(f"an output is requested twice from model '{spec.name}'; list each output once")
        for place, index in enumerate(outputs):
            tensor = spec.outputs[index]
            if classes and classes[place]:
                check_classifiable(tensor.name, tensor.datatype)
            elif areas and areas[place]:
                continue  # in binary form, whatever the others are
            elif tensor.datatype.kind == "half" and not binary[place] and not self._json_half:
                raise InvalidRequest(
                    f"sending {tensor.datatype} data via JSON is not supported. Please use the binary data format "
                    f"for output '{tensor.name}' (parameter binary_data: true)"
                )
        plain = not classes and not areas
        return ResponseForm(outputs, binary, plain and not any(binary), tuple(sorted(outputs)), classes, plain, areas)

    def _output(self, name: str) -> int:
        place = self._outputs.get(name)
        if place is None:
            raise InvalidRequest(f"unexpected inference output '{shown(name)}' for model '{self.spec.name}'")
        return place


def shown(text: str) -> str:
    """A client's text as an error repeats it: its beginning."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _dims(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"
