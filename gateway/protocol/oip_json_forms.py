"""What is remembered of an accepted OIP JSON request, so that the next one like it is not checked anew.

Three kinds: `SingleForm`, all but the elements of a request with one input; `BodyFrame`, the bytes that stand around
those elements in its body; `BinaryForm`, the JSON part of a request whose tensors are all binary. Which are kept, and
how many, is the decoder's affair (oip_json.py).

Invariant: a body that fits one of these gives the very request that the roads of oip_json.py would have made of it. So
only what can differ in data alone is remembered: no element needs a range check, and no region of shared memory is
named, since its name may mean another one next time.
"""

from __future__ import annotations

import re
from typing import Final

from gateway.core.model import ModelSpec
from gateway.core.request import InferRequest, InputTensor
from gateway.protocol.oip_frame import Frame
from gateway.protocol.oip_parameters import NO_OPTIONS
from gateway.protocol.oip_plan import Plan, ResponseForm

_UP_TO_DATA: Final = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*\Z')


class SingleForm:
    """A plain request with one input whose elements need no range check, once accepted: only data can differ."""

    __slots__ = ("datatype", "elements", "form", "key", "nbytes", "rows", "shape")

    def __init__(self, plan: Plan, request: InferRequest, form: ResponseForm) -> None:
        only = plan.inputs[0]
        self.datatype = only.datatype
        self.shape = only.shape
        self.elements = only.elements
        self.rows = plan.rows
        self.nbytes = request.nbytes
        self.key = request.key
        self.form = form


class BodyFrame:
    """What stood around the elements in a body of one input that was accepted: the same around other elements is the
    same request with other data. Read from left to right, a body that begins with `opening` is at the value of `data`
    there; if a list of elements is all that comes before `closing`, nothing else can differ."""

    __slots__ = ("closing", "form", "opening", "start", "stop")

    def __init__(self, opening: bytes, closing: bytes, form: SingleForm) -> None:
        self.opening = opening
        self.closing = closing
        self.form = form
        self.start = len(opening)
        self.stop = -len(closing)

    @classmethod
    def around(cls, body: bytes, form: SingleForm) -> BodyFrame | None:
        """Of an accepted body with one input and no `id`; None: where its elements are cannot be told from afar."""
        at = body.rfind(b"[")
        opening, closing = body[:at], body[body.find(b"]", at) + 1 :]
        # Quotes within strings are escaped, and a longer key that ends like this would not have been accepted.
        if not _UP_TO_DATA.search(opening):
            return None
        return cls(opening, closing, form)


class BinaryForm:
    """A request whose inputs are all binary, of fixed size and unrestricted in value, once accepted: the same JSON
    part with as many bytes behind it is as valid."""

    __slots__ = ("_key", "_needed", "_options", "_places", "_request_id", "_rows", "_total", "body_length", "form")

    def __init__(self, header_length: int, frame: Frame, request: InferRequest, spec: ModelSpec) -> None:
        starts: dict[str, int] = {}
        at = header_length
        for item in frame.inputs:
            starts[item.name] = at
            at += item.binary_data_size or 0
        self._places = [
            None
            if tensor is None
            else (tensor.datatype, tensor.shape, starts[named.name], starts[named.name] + len(tensor.buffer or b""))
            for named, tensor in zip(spec.inputs, request.inputs, strict=True)
        ]
        self._rows = request.rows
        self._total = request.nbytes
        self._key = frame.options.plain_key(request)
        self._needed = request.outputs
        self._request_id = request.request_id
        self._options = frame.options
        self.form = request.form
        self.body_length = header_length + request.nbytes

    def request(self, body: memoryview) -> InferRequest:
        inputs = tuple(
            [
                None if place is None else InputTensor(place[0], place[1], None, body[place[2] : place[3]])
                for place in self._places
            ]
        )
        request = InferRequest(inputs, self._rows, self._total, self._key, self._needed, self._request_id, self.form)
        if self._options is not NO_OPTIONS:
            self._options.apply(request)
        return request


def is_plain_binary(frame: Frame, request: InferRequest) -> bool:
    """Whether a `BinaryForm` may stand for requests like this one."""
    return (
        all(item.binary_data_size is not None for item in frame.inputs)
        and all(tensor is None or tensor.datatype.kind not in {"bytes", "bool"} for tensor in request.inputs)
        and not request.form.areas  # what it names may be another region next time
    )
