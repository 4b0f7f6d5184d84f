"""OIP inference request, JSON with or without binary tensors → `InferRequest`.

Four roads lead to the same checks; a body takes the cheapest that can read it:
  1. typed (msgspec): small bodies of plain requests; names, shapes and elements are type-checked in C. Where all but
     the elements is, byte for byte, what it was in an earlier one, only the elements are read;
  2. general (orjson → dict): anything else that is small, and the JSON part before binary tensors, whose
     outcome is remembered by its bytes;
  3. large (simdjson): arrays go from text to numbers in C without becoming Python objects;
  4. standard library: bodies with the literals NaN, Infinity, −Infinity or −0, which no other parser reads, and to
     word what is wrong with a text. It is too slow for the largest bodies: in those, numbers stand in for NaN and
     Infinity (`json_literals`), and simdjson reads the rest.
A road that stumbles hands over to a more general one; only the general ones word errors.

Invariants: each road refuses duplicate keys, invalid UTF-8 and elements of a wrong type; unknown keys are ignored;
the same request gives the same tensors on every road.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import simdjson

from gateway.core.model import ModelSpec
from gateway.core.request import InferRequest, InputTensor
from gateway.core.tensor import pack_bytes
from gateway.errors import InvalidRequest, Malformed
from gateway.protocol import oip_binary, oip_data
from gateway.protocol.json_literals import MAX_LITERALS, Literals
from gateway.protocol.oip_frame import Frame, FrameInput, read_frame
from gateway.protocol.oip_json_forms import BinaryForm, BodyFrame, SingleForm, is_plain_binary
from gateway.protocol.oip_json_text import MINUS_ZERO, parse_large, parse_small
from gateway.protocol.oip_memory import aimed, check_total, from_area
from gateway.protocol.oip_parameters import NO_OPTIONS
from gateway.protocol.oip_plan import InputPlan, Plan, Planner, ResponseForm
from gateway.protocol.options import DEFAULT_OPTIONS, ProtocolOptions

LARGE_BYTES: Final = 10_240
"""From this body size on simdjson is faster than a list of Python floats that becomes an array later."""
REMEMBERED_HEADER_BYTES: Final = 2048
SLOW_BYTES: Final = 1_048_576
"""Largest JSON body for the roads that make Python objects of everything: about a tenth of a second for a mebibyte, in
which nobody else is served. Above it the sign of a literal -0 is lost."""
REMEMBERED_FORMS: Final = 512
REMEMBERED_FRAMES: Final = 4
"""What clients put around the elements of their only input. Each is compared with every body until one fits."""
LEARN_EVERY: Final = 16
"""One of so many bodies in a frame that is not remembered replaces the oldest one, so that many kinds cost little."""
_UNRANGED: Final = frozenset({"float", "bool"})
"""Kinds of which every element of the right Python type is in range."""
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_NO_BLOBS: Final = memoryview(b"")
_ELEMENT: Final = {"float": float, "int": int, "uint": int, "bool": bool, "bytes": str}


class RequestDecoder:
    """Decodes requests for one model version; everything that only depends on the model is made here, once."""

    def __init__(self, spec: ModelSpec, options: ProtocolOptions = DEFAULT_OPTIONS) -> None:
        self.spec = spec
        self.planner = Planner(spec, options)
        self._memory = options.memory
        self._forwards = spec.forwards_parameters
        self._all_json: ResponseForm | InvalidRequest
        try:
            self._all_json = self.planner.response_form(None, all_binary=False)
        except InvalidRequest as error:  # an FP16 output: only a request that asks for binary can be answered
            self._all_json = InvalidRequest(str(error))  # not its traceback, which holds the first request
        self._typed = _typed_decoder(spec)
        self._binary: dict[bytes, BinaryForm] = {}
        self._single: dict[tuple[str | int, ...], SingleForm] = {}
        self._elements: Any = _elements_decoder(spec) if self._typed is not None else None
        self._frames: list[BodyFrame] = []
        self._unframed = 0
        """Bodies that might have been remembered, and stood in none of these."""

    def decode(self, body: bytes, header_length: int | None = None) -> InferRequest:
        """`header_length`: length in bytes of the JSON part where binary tensors follow it, else None.

        Raises:
            InvalidRequest: the request is malformed or does not fit the model.
            Unsupported: it asks for something this gateway does not offer.
        """
        try:
            if header_length is None and len(body) < LARGE_BYTES:
                for frame in self._frames:
                    if body.startswith(frame.opening) and body.endswith(frame.closing):
                        request = self._decode_framed(body[frame.start : frame.stop], frame.form)
                        if request is not None:
                            return request
            if header_length is not None and (header_length != len(body) or not body):
                return self._decode_binary(body, header_length)
            if self._typed is not None and len(body) < LARGE_BYTES:
                request = self._decode_typed(body)
                if request is not None:
                    return request
            return self._decode_general(body)
        except RecursionError as error:
            raise Malformed("request body is nested too deeply") from error

    # -- road 1 ------------------------------------------------------------------------------------------------

    def _decode_framed(self, text: bytes, form: SingleForm) -> InferRequest | None:
        """`text`: what stands where the elements are due. None: another road must read the body."""
        try:
            data = self._elements.decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        if len(data) != form.elements or not (all(data) or b"-0" not in text or not MINUS_ZERO.search(text)):
            return None
        tensor = InputTensor(form.datatype, form.shape, data, None)
        return InferRequest((tensor,), form.rows, form.nbytes, form.key, form.form.needed, None, form.form)

    def _decode_typed(self, body: bytes) -> InferRequest | None:
        """None: this body needs a more general road."""
        try:
            frame = self._typed.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        keys = 1 + (frame.id is not msgspec.UNSET)
        inputs = frame.inputs
        # Each input has exactly four keys. A colon more means a key given twice or a string with a colon in it.
        if body.count(b":") != keys + 4 * len(inputs):
            return None
        only = inputs[0] if len(inputs) == 1 else None
        # A bare -0 came out as 0; where both could be, a closer look is worth its price.
        if (only is None or 0.0 in only.data) and b"-0" in body and MINUS_ZERO.search(body):
            return None
        if only is not None:
            known = self._single.get((only.name, only.datatype, *only.shape))
            if known is not None and len(only.data) == known.elements:
                if keys == 1:
                    self._learn(body, known)
                tensor = InputTensor(known.datatype, known.shape, only.data, None)
                return InferRequest(
                    (tensor,), known.rows, known.nbytes, known.key, known.form.needed, frame.id or None, known.form
                )
        return self._request_typed(inputs, frame.id or None)

    def _learn(self, body: bytes, form: SingleForm) -> None:
        """Remember what stands around the elements of an accepted body without `id`, now and then."""
        self._unframed += 1
        if self._unframed % LEARN_EVERY == 1:
            frame = BodyFrame.around(body, form)
            if frame is not None:
                self._frames = [*self._frames[1 - REMEMBERED_FRAMES :], frame]

    def _request_typed(self, inputs: list[Any], request_id: str | None) -> InferRequest:
        form = self._all_json
        if isinstance(form, InvalidRequest):
            raise InvalidRequest(str(form))
        plan = self.planner.plan(tuple([(item.name, item.datatype, tuple(item.shape)) for item in inputs]))
        tensors = [oip_data.from_checked(planned, item.data) for planned, item in zip(plan.inputs, inputs, strict=True)]
        request = self.request(plan, tensors, form, request_id)
        if len(plan.trailing) == 1 and plan.inputs[0].datatype.kind in _UNRANGED:
            if len(self._single) >= REMEMBERED_FORMS:
                self._single.clear()
            item = inputs[0]
            self._single[item.name, item.datatype, *item.shape] = SingleForm(plan, request, form)
        return request

    # -- roads 2, 3, 4 -----------------------------------------------------------------------------------------

    def _decode_general(self, body: bytes) -> InferRequest:
        if len(body) >= LARGE_BYTES:
            frame = self._large_frame(body)
            request = None if frame is None else self._from_frame(frame)
            if request is not None and (len(body) > SLOW_BYTES or not _may_lack_a_sign(request, body)):
                return request
            if len(body) > SLOW_BYTES:
                return self._decode_with_literals(body)
        return self._from_frame(read_frame(parse_small(body), forwarded=self._forwards))

    def _decode_with_literals(self, body: bytes) -> InferRequest:
        literals = Literals(body)
        frame = None if literals.text is None else self._large_frame(literals.text)
        request = None if frame is None else self._from_frame(frame, literals=literals)
        if request is None or not literals.all_restored:
            raise Malformed(
                f"a JSON body of more than {SLOW_BYTES} bytes must be valid, and keep its numbers and at most "
                f"{MAX_LITERALS} NaN and Infinity in 'data' arrays; send such tensors with the binary tensor extension"
            )
        return request

    def _large_frame(self, body: bytes) -> Frame | None:
        if body.startswith(_BYTE_ORDER_MARK) or oip_data.may_nest_deeply(body):
            return None  # simdjson reads both without a word
        try:
            document = parse_large(body, "inputs")
        except (ValueError, RuntimeError):
            return None  # NaN, an integer over 2^64, odd keys, or broken: the general parser tells which
        return read_frame(document, forwarded=self._forwards)

    def _decode_binary(self, body: bytes, header_length: int) -> InferRequest:
        if not 0 <= header_length <= len(body):
            raise InvalidRequest(f"inference header size should be in range (0, {len(body)}), got: {header_length}")
        if header_length == 0:
            return self._decode_raw(body)
        header = body[:header_length]
        known = self._binary.get(header)
        if known is not None and known.body_length == len(body):
            return known.request(memoryview(body))
        if header_length > SLOW_BYTES:
            raise InvalidRequest(
                f"the JSON part before binary tensors is over {SLOW_BYTES} bytes; send large tensors as binary too"
            )
        frame = read_frame(parse_small(header), forwarded=self._forwards)
        request = self._from_frame(frame, memoryview(body)[header_length:])
        if header_length <= REMEMBERED_HEADER_BYTES and is_plain_binary(frame, request):
            if len(self._binary) >= REMEMBERED_FORMS:
                self._binary.clear()
            self._binary[header] = BinaryForm(header_length, frame, request, self.spec)
        return request

    def _decode_raw(self, body: bytes) -> InferRequest:
        spec = self.spec
        plan = self.planner.plan((oip_binary.raw_request_key(spec, len(body)),))
        form = self.planner.response_form(None, all_binary=True)
        blob = pack_bytes([body]) if spec.inputs[0].datatype.kind == "bytes" else body
        tensor = oip_binary.from_blob(plan.inputs[0], memoryview(blob), spec.name)
        return self.request(plan, [tensor], form, None)

    def _from_frame(
        self, frame: Frame, blobs: memoryview = _NO_BLOBS, literals: Literals | None = None
    ) -> InferRequest:
        # Without a header length there are no blobs, but a tensor of no elements may still be declared binary.
        plan = self.planner.plan(tuple([(item.name, item.datatype, item.shape) for item in frame.inputs]))
        check_total(self._memory, [item.area for item in frame.inputs])
        at = 0
        tensors = []
        for planned, item in zip(plan.inputs, frame.inputs, strict=True):
            if item.area is not None:
                tensors.append(from_area(self._memory, planned, item.area, self.spec.name))
                continue
            if item.binary_data_size is None:
                tensors.append(_json_tensor(planned, item, literals))
                continue
            end = at + item.binary_data_size
            if end > len(blobs):
                raise InvalidRequest(
                    f"unexpected size for input '{item.name}', expecting {end - len(blobs)} additional bytes for model "
                    f"'{self.spec.name}'"
                )
            tensors.append(oip_binary.from_blob(planned, blobs[at:end], self.spec.name))
            at = end
        if at != len(blobs):
            raise InvalidRequest(
                f"unexpected additional input data for model '{self.spec.name}': {len(blobs) - at} bytes behind the "
                "last input"
            )
        form = self.planner.response_form(frame.outputs, all_binary=frame.options.binary_data_output)
        if form.areas:
            form = aimed(self._memory, form)
        request = self.request(plan, tensors, form, frame.request_id)
        if frame.options is not NO_OPTIONS:
            frame.options.apply(request)
        return request

    def request(
        self, plan: Plan, tensors: list[InputTensor], form: ResponseForm, request_id: str | None
    ) -> InferRequest:
        """The request of a plan; `tensors` in the plan's order."""
        nbytes = 0
        for tensor in tensors:
            buffer = tensor.buffer
            nbytes += len(buffer) if buffer is not None else len(tensor.values) * tensor.datatype.itemsize  # type: ignore[arg-type]
        if len(tensors) == 1 == len(plan.trailing):
            inputs: tuple[InputTensor | None, ...] = (tensors[0],)
        else:
            ordered: list[InputTensor | None] = [None] * len(plan.trailing)
            for planned, tensor in zip(plan.inputs, tensors, strict=True):
                ordered[planned.place] = tensor
            inputs = tuple(ordered)
        return InferRequest(inputs, plan.rows, nbytes, (plan.trailing, form.needed), form.needed, request_id, form)


def _typed_decoder(spec: ModelSpec) -> Any:
    """A msgspec decoder for plain requests whose inputs all hold the same kind of element; None where they differ."""
    kinds = {tensor.datatype.kind for tensor in spec.inputs}
    if len(kinds) != 1 or kinds == {"half"}:
        return None
    element = _ELEMENT[kinds.pop()]
    tensor = msgspec.defstruct(
        "TypedInput",
        [("name", str), ("shape", list[int]), ("datatype", str), ("data", list[element])],  # type: ignore[valid-type]
        forbid_unknown_fields=True,
    )
    request = msgspec.defstruct(
        "TypedRequest",
        [("inputs", list[tensor]), ("id", str | msgspec.UnsetType, msgspec.UNSET)],  # type: ignore[valid-type]
        forbid_unknown_fields=True,
    )
    return msgspec.json.Decoder(request)


def _elements_decoder(spec: ModelSpec) -> Any:
    """A msgspec decoder for the elements of one input of a model that has a typed decoder."""
    return msgspec.json.Decoder(list[_ELEMENT[spec.inputs[0].datatype.kind]])  # type: ignore[misc]


def _json_tensor(planned: InputPlan, item: FrameInput, literals: Literals | None) -> InputTensor:
    if isinstance(item.data, simdjson.Array):
        return oip_data.from_array(planned, item.data, literals)
    return oip_data.from_json(planned, item.data)


def _may_lack_a_sign(request: InferRequest, body: bytes) -> bool:
    """simdjson reads the integer −0 as 0. The text is only searched where a zero came out."""
    return (
        any(tensor is not None and oip_data.holds_zero(tensor) for tensor in request.inputs)
        and MINUS_ZERO.search(body) is not None
    )
