"""A cut `inference.ModelInferRequest` → `InferRequest`, checked against one model version.

Rules (wire notes §2.3): an input has its data either typed in `contents` or raw; raw entries belong to the inputs in
order, but for those in shared memory; further raw entries are ignored. FP16 and BF16 are only ever raw. Names, shapes,
outputs and parameters are checked where REST's are; here stands only what gRPC says differently.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from gateway.core.client_memory import NO_CLIENT_MEMORY, Area, ClientMemory
from gateway.core.model import ModelSpec
from gateway.core.request import InferRequest, InputTensor
from gateway.core.tensor import DATATYPE, MAX_RANK, Datatype, pack_bytes
from gateway.errors import InvalidRequest
from gateway.protocol import oip_binary, oip_data
from gateway.protocol.oip_grpc_cut import Cut, Opening, is_typed, raw_tensors
from gateway.protocol.oip_memory import aimed, check_total, from_area
from gateway.protocol.oip_parameters import (
    NO_OPTIONS,
    RequestOptions,
    Uint64,
    input_options,
    memory_area,
    output_options,
    request_options,
)
from gateway.protocol.oip_plan import (
    MAX_INPUTS,
    MAX_OUTPUTS,
    InputPlan,
    Plan,
    Planner,
    ResponseForm,
    WantedOutput,
    shown,
)
from gateway.protocol.protobuf_wire import length_at, prefix, varints

LISTED_ELEMENTS: Final = 512
"""Up to this many typed numbers become a Python list."""
MAX_PARAMETERS: Final = 256
SMALL_TAIL: Final = 4096
"""Up to this size a copy of the tensors is cheaper than views."""
_OF_STREAMS: Final = frozenset({"triton_enable_empty_final_response"})
"""A client's say about the end of streams with several answers to one request; there are none here."""
CONTENTS: Final = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
_KINDS: Final[dict[str, tuple[str, ...]]] = {
    "timeout": ("int64_param",),
    "priority": ("int64_param", "uint64_param"),
    "sequence_id": ("int64_param", "string_param", "uint64_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    "triton_enable_empty_final_response": ("bool_param",),
    "classification": ("int64_param",),
    "shared_memory_region": ("string_param",),
    "shared_memory_offset": ("int64_param", "uint64_param"),
    "shared_memory_byte_size": ("int64_param", "uint64_param"),
}
_UNSIGNED: Final = frozenset({"timeout", "sequence_id"})
"""Numbers of 64 bits without a sign that travel in a field with one: clients send hashes as correlation ids."""
_HOLDS: Final = {
    "bool_contents": "BOOL", "int_contents": "INT32", "int64_contents": "INT64", "uint_contents": "UINT32",
    "uint64_contents": "UINT64", "fp32_contents": "FP32", "fp64_contents": "FP64", "bytes_contents": "BYTES",
}  # fmt: skip


class GrpcForm:
    """How a caller of gRPC wants its answer."""

    __slots__ = ("outputs", "response", "typed")

    def __init__(self, response: ResponseForm, typed: bool) -> None:
        self.response = response
        self.outputs = response.outputs
        self.typed = typed
        """Whether tensors came in `contents`; an option of the server lets answers follow suit."""


class _Known:
    """What an opening means for one model version: everything but the data."""

    __slots__ = ("areas", "form", "key", "nbytes", "options", "places", "plan", "single", "tail")

    def __init__(
        self, plan: Plan, form: GrpcForm, options: RequestOptions, areas: tuple[Area | None, ...] = ()
    ) -> None:
        """`areas`: where inputs are in shared memory, in the plan's order; empty where none is."""
        self.plan = plan
        self.areas = areas
        self.form = form
        self.options = options
        self.key = (plan.trailing, form.response.needed)
        self.places: list[tuple[InputPlan, bytes, int, int]] = []
        """Per input, counted from the end of the opening: the bytes before its data (tag and length), the start and
        the end of its data. Only where all inputs are raw, of a fixed size and of any bits."""
        self.nbytes = 0
        self.tail = -1
        """Bytes behind the opening where `places` applies."""
        self.single: tuple[Datatype, tuple[int, ...], int, int] | None = None
        """Datatype, shape, start and end of the only input of a model with one, where `places` applies and nothing of
        the request is to be looked at again."""
        if not form.typed and not areas and all(item.datatype.kind not in {"bytes", "bool"} for item in plan.inputs):
            self._place()

    def _place(self) -> None:
        at = 0
        for item in self.plan.inputs:
            size = item.elements * item.datatype.itemsize
            before = prefix(7, size)
            start = at + len(before)
            at = start + size
            self.places.append((item, before, start, at))
            self.nbytes += size
        self.tail = at
        plain = self.options is NO_OPTIONS and not self.form.response.areas
        if plain and at <= SMALL_TAIL and len(self.places) == 1 == len(self.plan.trailing):
            item, _, start, end = self.places[0]
            self.single = item.datatype, item.shape, start, end

    def fits(self, message: bytes | memoryview, at: int) -> bool:
        """Whether exactly the inputs' raw tensors, of the right sizes, stand from `at` on."""
        if self.tail != len(message) - at:
            return False
        for _, before, start, _ in self.places:  # noqa: SIM110  # a generator costs more than the comparison
            if message[at + start - len(before) : at + start] != before:
                return False
        return True

    def slices(self, message: bytes | memoryview, at: int) -> list[InputTensor]:
        """Where the message fits."""
        data = message if self.tail <= SMALL_TAIL and type(message) is bytes else memoryview(message)
        return [
            InputTensor(item.datatype, item.shape, None, data[at + start : at + end])
            for item, _, start, end in self.places
        ]


class RequestReader:
    """Reads requests for one model version."""

    def __init__(self, spec: ModelSpec, memory: ClientMemory = NO_CLIENT_MEMORY) -> None:
        self.spec = spec
        self._memory = memory
        self._planner = Planner(spec)
        self._datatypes = {tensor.name: tensor.datatype for tensor in spec.inputs}

    def read(self, cut: Cut) -> InferRequest:
        """
        Raises:
            InvalidRequest: the request does not fit the model.
            Unsupported: it asks for something this gateway does not offer.
        """
        opening, request_id, message, at, raw = cut
        known = opening.known
        if opening.reader is not self or type(known) is not _Known:
            known = self._form(opening)
            raw = raw if raw is not None else raw_tensors(message, at) or []
        single = known.single
        if raw is None and single is not None and type(message) is bytes:
            datatype, shape, start, end = single
            tensor = InputTensor(datatype, shape, None, message[at + start : at + end])
            form = known.form
            return InferRequest(
                (tensor,), known.plan.rows, known.nbytes, known.key, form.response.needed, request_id or None, form
            )
        if raw is None:
            return self._request(known, known.slices(message, at), known.nbytes, request_id)
        if known.areas:
            check_total(self._memory, known.areas)
        tensors = self._tensors(known, opening.message, raw)
        nbytes = sum(
            len(t.buffer) if t.buffer is not None else len(t.values or ()) * t.datatype.itemsize for t in tensors
        )
        return self._request(known, tensors, nbytes, request_id)

    def _form(self, opening: Opening) -> _Known:
        """What an opening means here, that another reader read last: two versions that share the requests for a model
        take turns."""
        second = opening.second
        opening.second = (opening.reader, opening.known)
        mine = second[1] if second is not None and second[0] is self else None
        known = mine if type(mine) is _Known else self._known(opening.message)
        opening.known, opening.reader = known, self
        return known

    def _known(self, message: Any) -> _Known:
        if len(message.inputs) > MAX_INPUTS:
            raise InvalidRequest(f"'inputs' holds {len(message.inputs)} tensors, at most {MAX_INPUTS} are allowed")
        if len(message.outputs) > MAX_OUTPUTS:
            raise InvalidRequest(f"'outputs' lists {len(message.outputs)} tensors, at most {MAX_OUTPUTS} are allowed")
        parameters = parameters_of(message.parameters, "request")
        options = request_options(parameters, _OF_STREAMS, forwarded=self.spec.forwards_parameters)
        areas = tuple([self._check_input(item) for item in message.inputs])
        keys = [(item.name, item.datatype, tuple(item.shape[: MAX_RANK + 1])) for item in message.inputs]
        plan = self._planner.plan(tuple(keys))
        form = self._planner.response_form([_wanted(item) for item in message.outputs], all_binary=True)
        return _Known(plan, GrpcForm(form, is_typed(message)), options, areas if any(areas) else ())

    def _check_input(self, item: Any) -> Area | None:
        """What gRPC words in its own way; everything else of inputs is the planner's business. Returns where it is in
        shared memory."""
        where = f"input '{shown(item.name)}'"
        parameters = parameters_of(item.parameters, where)
        input_options(parameters, where)
        area = memory_area(parameters, where) if parameters else None
        if area is not None and item.HasField("contents"):
            raise InvalidRequest(
                f"unexpected 'content' provided when using shared memory for input tensor '{shown(item.name)}' for "
                f"model '{self.spec.name}'"
            )
        expected = self._datatypes.get(item.name)
        if expected is None:
            return area
        if item.datatype not in DATATYPE:
            raise InvalidRequest(
                f"inference input '{item.name}' data-type is '<invalid>', but model '{self.spec.name}' expects "
                f"'{expected}' (the request says '{shown(item.datatype)}'; datatypes are written in capitals)"
            )
        if len(item.shape) <= MAX_RANK and any(dim < 0 for dim in item.shape):
            raise InvalidRequest(
                f"All input dimensions should be specified for input '{item.name}' for model '{self.spec.name}', got "
                f"{shown(str(list(item.shape)).replace(' ', ''))}"
            )
        return area

    def _tensors(self, known: _Known, message: Any, raw: list[bytes | memoryview]) -> list[InputTensor]:
        model = self.spec.name
        tensors = []
        left = iter(raw)
        areas = known.areas or [None] * len(message.inputs)
        for planned, item, area in zip(known.plan.inputs, message.inputs, areas, strict=True):
            if area is not None:
                tensors.append(from_area(self._memory, planned, area, model))
            elif item.HasField("contents"):
                if raw:
                    raise InvalidRequest(
                        f"contents field must not be specified when using raw_input_contents for '{planned.name}' for "
                        f"model '{model}'"
                    )
                tensors.append(self._typed(planned, item.contents))
            elif (blob := next(left, None)) is not None:
                tensors.append(oip_binary.from_blob(planned, memoryview(blob), model))
            else:
                raise InvalidRequest(
                    f"unable to find data for input tensor '{planned.name}' for model '{model}' in request."
                )
        return tensors

    def _typed(self, plan: InputPlan, contents: Any) -> InputTensor:
        wanted = CONTENTS.get(plan.datatype.name)
        for held, _ in contents.ListFields():
            if held.name != wanted:
                raise InvalidRequest(
                    f"unexpected explicit tensor data for input tensor '{plan.name}' for model '{self.spec.name}' of "
                    f"type '{_HOLDS[held.name]}', expected datatype '{plan.datatype}'"
                    + ("" if wanted else "; send it in raw_input_contents")
                )
        values = getattr(contents, wanted) if wanted else ()
        count = len(values)
        if count != plan.elements:
            size = max(plan.datatype.itemsize, 1)
            raise InvalidRequest(
                f"input byte size mismatch for input '{plan.name}' for model '{self.spec.name}'. Expected "
                f"{plan.elements * size}, got {count * size} (its shape needs {plan.elements} elements, "
                f"'contents' holds {count})"
            )
        kind = plan.datatype.kind
        if kind == "bytes":
            return oip_binary.from_blob(plan, memoryview(pack_bytes(list(values))), self.spec.name)
        if count > LISTED_ELEMENTS:
            contents.DiscardUnknownFields()
            return _from_packed(plan, contents.SerializeToString())
        return oip_data.from_checked(plan, list(values))

    def _request(self, known: _Known, tensors: list[InputTensor], nbytes: int, request_id: str) -> InferRequest:
        trailing = known.plan.trailing
        form = known.form
        if form.response.areas:
            form = GrpcForm(aimed(self._memory, form.response), form.typed)
        if len(tensors) == 1 == len(trailing):
            inputs: tuple[InputTensor | None, ...] = (tensors[0],)
        else:
            ordered: list[InputTensor | None] = [None] * len(trailing)
            for planned, tensor in zip(known.plan.inputs, tensors, strict=True):
                ordered[planned.place] = tensor
            inputs = tuple(ordered)
        request = InferRequest(
            inputs, known.plan.rows, nbytes, known.key, form.response.needed, request_id or None, form
        )
        if known.options is not NO_OPTIONS:
            known.options.apply(request)
        return request


def _from_packed(plan: InputPlan, contents: bytes) -> InputTensor:
    """Contents of one field of numbers, written again: their bytes in one piece. None becomes a Python object."""
    packed = memoryview(contents)[length_at(contents, 1, len(contents))[0] :]
    if plan.datatype.kind in {"float", "bool"}:
        return InputTensor(plan.datatype, plan.shape, None, packed)
    numbers = varints(packed)
    return oip_data.from_numbers(plan, numbers.view(np.int64) if plan.datatype.kind == "int" else numbers)


def parameters_of(parameters: Any, where: str) -> dict[str, object]:
    """A map of InferParameter as `oip_parameters` reads it. `where`: whose they are, as errors say it.

    Raises:
        InvalidRequest: a parameter of the protocol has a value of the wrong kind, or there are too many.
    """
    if len(parameters) > MAX_PARAMETERS:
        raise InvalidRequest(f"{where} has {len(parameters)} parameters, at most {MAX_PARAMETERS} are allowed")
    found: dict[str, object] = {}
    for name, value in parameters.items():
        kind = value.WhichOneof("parameter_choice")
        allowed = _KINDS.get(name)
        if allowed is not None and kind not in allowed:
            raise InvalidRequest(
                f"{where}: invalid value type for '{name}' parameter, expected {' or '.join(allowed)}, got "
                f"{kind or 'none'}"
            )
        given: Any = None if kind is None else getattr(value, kind)
        if kind == "uint64_param":
            given = Uint64(given)
        elif kind == "int64_param" and name in _UNSIGNED:
            given %= 2**64
        found[name] = given
    return found


def _wanted(item: Any) -> WantedOutput:
    where = f"output '{shown(item.name)}'"
    parameters = parameters_of(item.parameters, where)
    options = output_options(parameters, where)
    if "classification" in parameters and not options.classes:
        raise InvalidRequest(f"{where}: invalid value for 'classification' parameter, expected an integer above 0")
    return WantedOutput(item.name, True, options.classes, options.area)
