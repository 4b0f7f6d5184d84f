"""OIP's generate extension: one flat JSON object in, one out, mapped to and from an ordinary inference request.

Rules (wire notes §1.12):
- a key that names an input becomes that tensor: a scalar is one element, an array its elements; `id` is the request's
  id; `parameters` is an object whose members are treated like keys of the request itself; every other key is a
  parameter, under the rules for parameters;
- shapes are not stated, so they are made to fit: fixed dimensions take their share of the elements, the innermost
  variable one takes the rest, other variable ones are 1; the batch dimension counts as a variable one;
- the answer holds `id` (if given), `model_name`, `model_version` and each output by name; an output of one element is
  that element, any other a flat array. As an event it is `data: {…}` and a blank line.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from gateway.core.model import TensorSpec
from gateway.core.request import InferRequest
from gateway.errors import InvalidRequest, Malformed
from gateway.protocol import oip_data
from gateway.protocol.oip_answer import BatchEncoder
from gateway.protocol.oip_json import RequestDecoder
from gateway.protocol.oip_json_text import parse_small
from gateway.protocol.oip_parameters import NO_OPTIONS, request_options
from gateway.protocol.oip_plan import MAX_INPUTS, shown

MAX_BODY_BYTES: Final = 1_048_576
"""A larger JSON body would be read for so long that everybody else had to wait."""
EVENT_STREAM: Final = b"text/event-stream; charset=utf-8"


class Generate:
    """Reads and answers generate requests of one model version."""

    def __init__(self, decoder: RequestDecoder) -> None:
        """`decoder`: the version's own, whose plans are shared."""
        spec = decoder.spec
        self._decoder = decoder
        self._inputs = {tensor.name: tensor for tensor in spec.inputs}
        self._identity = b'"model_name":%b,"model_version":%b' % (orjson.dumps(spec.name), orjson.dumps(spec.version))
        self._outputs = [orjson.dumps(tensor.name) for tensor in spec.outputs]

    def decode(self, body: bytes) -> InferRequest:
        """A request ready for the pipeline.

        Raises:
            InvalidRequest: malformed, or does not fit the model.
            Unsupported: it asks for something this gateway does not offer.
        """
        if len(body) > MAX_BODY_BYTES:
            raise InvalidRequest(
                f"the body of a generate request may hold {MAX_BODY_BYTES} bytes, this one has {len(body)}; send large "
                "tensors to infer"
            )
        try:
            document = parse_small(body)
        except RecursionError as error:
            raise Malformed("request body is nested too deeply") from error
        if type(document) is not dict:
            raise Malformed("request body must be a JSON object: attempt to get members for non-object")
        data: dict[str, Any] = {}
        parameters: dict[str, Any] = {}
        request_id = ""
        for name, value in document.items():
            if name == "parameters":
                self._nested(value, data, parameters)
            elif name == "id" and name not in self._inputs:
                if type(value) is not str:
                    raise Malformed("'id' must be a string")
                request_id = value
            else:
                self._sort(name, value, data, parameters)
        return self._request(data, parameters, request_id or None)

    def _nested(self, members: Any, data: dict[str, Any], parameters: dict[str, Any]) -> None:
        if "parameters" in self._inputs:
            raise InvalidRequest("Keyword 'parameters' for nested schema also given as input tensor name")
        if type(members) is not dict:
            raise Malformed("Expected JSON object for keyword: 'parameters'")
        for name, value in members.items():
            self._sort(name, value, data, parameters)

    def _sort(self, name: str, value: Any, data: dict[str, Any], parameters: dict[str, Any]) -> None:
        if name not in self._inputs:
            parameters[name] = value
        elif name in data:
            raise InvalidRequest(f"input '{shown(name)}' already exists in request")
        else:
            data[name] = value if type(value) is list else [value]

    def _request(self, data: dict[str, Any], parameters: dict[str, Any], request_id: str | None) -> InferRequest:
        options = request_options(parameters, forwarded=self._decoder.spec.forwards_parameters)
        if len(data) > MAX_INPUTS:
            raise InvalidRequest(f"the request names {len(data)} inputs, at most {MAX_INPUTS} are allowed")
        batched = self._decoder.spec.batched
        keys = [
            (name, tensor.datatype.name, fitting_shape(tensor, len(data[name]), batched))
            for name, tensor in self._inputs.items()
            if name in data
        ]
        plan = self._decoder.planner.plan(tuple(keys))
        form = self._decoder.planner.response_form(None, all_binary=False)
        tensors = [oip_data.from_json(planned, data[planned.name]) for planned in plan.inputs]
        request = self._decoder.request(plan, tensors, form, request_id)
        if options is not NO_OPTIONS:
            options.apply(request)
        return request

    def encode(self, request: InferRequest, encoded: BatchEncoder) -> bytes:
        """The answer to a settled request, as JSON. `encoded` belongs to its batch.

        Raises:
            InvalidRequest: an output holds bytes that are not valid UTF-8.
        """
        members = [] if request.request_id is None else [b'"id":' + orjson.dumps(request.request_id)]
        members.append(self._identity)
        for index in request.form.outputs:
            text = encoded.json_elements(index, request.row, request.rows)
            single = encoded.elements(index, request.rows) == 1
            members.append(
                b"%b:%b" % (self._outputs[index], text) if single else b"%b:[%b]" % (self._outputs[index], text)
            )
        return b"{" + b",".join(members) + b"}"


def as_event(document: bytes) -> bytes:
    """One server-sent event. JSON text of ours holds no line end."""
    return b"data: " + document + b"\n\n"


def fitting_shape(tensor: TensorSpec, elements: int, batched: bool) -> tuple[int, ...]:
    """The shape in which so many elements are given to this input; with the batch dimension, if there is one.

    Raises:
        InvalidRequest: no shape of this input has so many elements.
    """
    shape = [-1, *tensor.dims] if batched else list(tensor.dims)
    left, fits = elements, True
    for dim in shape:
        if dim >= 0:
            fits = fits and (left % dim == 0 if dim else left == 0)
            left = left // dim if dim else 1
    for place in reversed(range(len(shape))):
        if shape[place] < 0:
            shape[place], left = left, 1
    if not fits or left != 1:
        raise InvalidRequest(
            f"The schema can not convert input '{tensor.name}' to tensor with proper shape: {elements} elements do not "
            f"fill {[-1, *tensor.dims] if batched else list(tensor.dims)}"
        )
    return tuple(shape)
