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

import re
from typing import Any, Final

import msgspec
import orjson
import simdjson

from gateway.core.model import ModelSpec
from gateway.core.request import InferRequest, InputTensor
from gateway.core.tensor import pack_bytes
from gateway.errors import InvalidRequest, Malformed
from gateway.protocol import oip_binary, oip_data
from gateway.protocol.json_literals import MAX_LITERALS, Literals
from gateway.protocol.json_strict import given_twice, parse_strict
from gateway.protocol.oip_frame import Frame, FrameInput, read_frame
from gateway.protocol.oip_memory import aimed, check_total, from_area
from gateway.protocol.oip_parameters import NO_OPTIONS
from gateway.protocol.oip_plan import MAX_INPUTS, InputPlan, Plan, Planner, ResponseForm
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
_MINUS_ZERO: Final = re.compile(rb"-0[\s,\]}]")
_UP_TO_DATA: Final = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*\Z')
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_NO_BLOBS: Final = memoryview(b"")
_MAX_BESIDE_DATA: Final = 4096
"""Bytes of a value that is not tensor data, where simdjson has read the body."""
_MAX_LOOKED_UP: Final = 64
"""Members of one object; simdjson finds each by reading through all."""
_ELEMENT: Final = {"float": float, "int": int, "uint": int, "bool": bool, "bytes": str}


class _SingleForm:
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


class _BodyFrame:
    """What stood around the elements in a body of one input that was accepted: the same around other elements is the
    same request with other data. Read from left to right, a body that begins with `opening` is at the value of `data`
    there; if a list of elements is all that comes before `closing`, nothing else can differ."""

    __slots__ = ("closing", "form", "opening", "start", "stop")

    def __init__(self, opening: bytes, closing: bytes, form: _SingleForm) -> None:
        self.opening = opening
        self.closing = closing
        self.form = form
        self.start = len(opening)
        self.stop = -len(closing)

    @classmethod
    def around(cls, body: bytes, form: _SingleForm) -> _BodyFrame | None:
        """Of an accepted body with one input and no `id`; None: where its elements are cannot be told from afar."""
        at = body.rfind(b"[")
        opening, closing = body[:at], body[body.find(b"]", at) + 1 :]
        # Quotes within strings are escaped, and a longer key that ends like this would not have been accepted.
        if not _UP_TO_DATA.search(opening):
            return None
        return cls(opening, closing, form)


class _BinaryForm:
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


def _is_plain_binary(frame: Frame, request: InferRequest) -> bool:
    return (
        all(item.binary_data_size is not None for item in frame.inputs)
        and all(tensor is None or tensor.datatype.kind not in {"bytes", "bool"} for tensor in request.inputs)
        and not request.form.areas  # what it names may be another region next time
    )


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
        self._binary: dict[bytes, _BinaryForm] = {}
        self._single: dict[tuple[str | int, ...], _SingleForm] = {}
        self._elements: Any = _elements_decoder(spec) if self._typed is not None else None
        self._frames: list[_BodyFrame] = []
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

    def _decode_framed(self, text: bytes, form: _SingleForm) -> InferRequest | None:
        """`text`: what stands where the elements are due. None: another road must read the body."""
        try:
            data = self._elements.decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        if len(data) != form.elements or not (all(data) or b"-0" not in text or not _MINUS_ZERO.search(text)):
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
        if (only is None or 0.0 in only.data) and b"-0" in body and _MINUS_ZERO.search(body):
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

    def _learn(self, body: bytes, form: _SingleForm) -> None:
        """Remember what stands around the elements of an accepted body without `id`, now and then."""
        self._unframed += 1
        if self._unframed % LEARN_EVERY == 1:
            frame = _BodyFrame.around(body, form)
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
            self._single[item.name, item.datatype, *item.shape] = _SingleForm(plan, request, form)
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
        if header_length <= REMEMBERED_HEADER_BYTES and _is_plain_binary(frame, request):
            if len(self._binary) >= REMEMBERED_FORMS:
                self._binary.clear()
            self._binary[header] = _BinaryForm(header_length, frame, request, self.spec)
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
        and _MINUS_ZERO.search(body) is not None
    )


def parse_large(body: bytes, tensors: str) -> Any:
    """JSON text → Python objects, but for the `data` arrays of the list under the key `tensors`, which stay simdjson's.
    Nesting and a byte order mark are the caller's to look for. None: not an object.

    Raises:
        ValueError, RuntimeError: another road reads it better, or none at all.
    """
    return _shallow(simdjson.Parser().parse(body), tensors)


def parse_small(body: bytes) -> Any:
    """JSON text → Python objects, strictly: no duplicate keys, no BOM, UTF-8 only; NaN literals allowed."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return parse_strict(body)  # reads NaN and Infinity, or says where the text is broken
    if body.count(b":") != _count_keys(document) or _MINUS_ZERO.search(body):
        return parse_strict(body)
    return document


def _count_keys(value: Any) -> int:
    if type(value) is dict:
        return len(value) + sum(map(_count_keys, value.values()))
    if type(value) is list and value and type(value[0]) in (dict, list):
        return sum(map(_count_keys, value))
    return 0


def _shallow(document: Any, tensors: str) -> Any:
    """A simdjson document → dict; the `data` arrays of tensors stay simdjson arrays.

    Raises:
        ValueError: much is written beside the data, which the general road reads faster.
    """
    if not isinstance(document, simdjson.Object):
        return None
    result = _members(document)
    for name, value in result.items():
        if name == tensors and isinstance(value, simdjson.Array):
            if len(value) > MAX_INPUTS:
                raise ValueError("too many tensors")
            result[name] = [_shallow_input(item) for item in value]
        else:
            result[name] = _plain(value)
    return result


def _shallow_input(item: Any) -> Any:
    if not isinstance(item, simdjson.Object):
        return _plain(item)
    return {
        name: value if name == "data" and isinstance(value, simdjson.Array) else _plain(value)
        for name, value in _members(item).items()
    }


def _members(item: Any) -> dict[str, Any]:
    """One level of an object. Its values are looked up one by one: `items()` would turn all of them into Python
    objects, whole, and lose keys given twice further down.

    Raises:
        ValueError: keys that simdjson looks up slowly (many) or wrongly (holding NUL).
    """
    names = list(item)
    if len(names) > _MAX_LOOKED_UP or any("\0" in name for name in names):
        raise ValueError("not an object for simdjson")
    if len(set(names)) != len(names):
        raise given_twice(names)
    return {name: item[name] for name in names}


def _plain(value: Any) -> Any:
    if not isinstance(value, (simdjson.Object, simdjson.Array)):
        return value
    text: Any = value.mini  # bytes; its stub says otherwise
    if len(text) > _MAX_BESIDE_DATA:
        raise ValueError("not data, but large")
    return parse_small(text)
