"""A batch ↔ the body of an infer request over HTTP, for one model of one server.

Two forms, chosen per server: JSON with the tensors as bytes behind it (the binary tensor extension), or all JSON, for
servers without the extension. Answers may come in either form, tensor by tensor. The description of a batch's tensors
is remembered by their shapes; only parameters and data differ then.
Rules: NaN and infinities have no JSON form, nor has a BYTES element that is not UTF-8: such a batch is not sent. What a
server sends is read on the loop, so there is a bound on what makes many Python objects.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import orjson
import simdjson

from gateway.backends.interface import Batch, Failure, Success
from gateway.backends.remote_codec import (
    REMEMBERED,
    Astray,
    BatchForm,
    Garbled,
    Mismatch,
    NotEncodable,
    check_described,
    check_version,
    form_of,
    from_elements,
    from_raw,
    in_order,
    parameters_of,
    refusal,
)
from gateway.backends.remote_http1 import HttpAnswer
from gateway.core.assembly import AssemblyError, write_parts
from gateway.core.batchability import SignatureTensor
from gateway.core.request import BatchInput, OutputTensor
from gateway.core.tensor import element_count, unpack_bytes
from gateway.errors import GatewayError
from gateway.protocol import oip_data
from gateway.protocol.json_literals import Literals
from gateway.protocol.oip_json_text import parse_large, parse_small
from gateway.protocol.oip_plan import InputPlan

SLOW_BYTES: Final = 131_072
"""Largest JSON that is made Python objects of: everybody waits meanwhile, in the worst case some 100 ns for a byte."""
MAX_JSON_BYTES: Final = 64 << 20
"""Largest JSON that is read at all: tensors in JSON may be as long as in a request to us."""
HEADER_LENGTH: Final = b"inference-header-content-length"
_INFER_TIME: Final = re.compile(r"(?:^|,)\s*infer\s*;\s*dur=([0-9]{1,9}(?:\.[0-9]{1,6})?)")
"""In `Server-Timing`, milliseconds: a gateway like this one says so."""


class HttpCodec:
    """`head`: request line and constant header fields, each line with its end. `server`: its name, for messages."""

    def __init__(
        self,
        server: str,
        head: bytes,
        inputs: Sequence[SignatureTensor],
        outputs: Sequence[SignatureTensor],
        *,
        binary: bool,
        version: str = "",
    ) -> None:
        """`version`: the one that answers must come from, where they say so; empty: any."""
        self._server = server
        self._version = version
        self._head = head
        self._inputs = inputs
        self._outputs = outputs
        self._binary = binary
        self._known: dict[BatchForm, tuple[bytes, int]] = {}
        self._prefix = f"{secrets.token_hex(6)}-"
        self._asked = 0

    def request(self, batch: Batch, budget_s: float, timeout_us: int = 0) -> tuple[bytearray | bytes, str]:
        """Head and body, and the id by which an answer to it is known. `budget_s`: what the server is told of the time
        that it has; infinite: nothing.

        Raises:
            NotEncodable: the batch has no form that the server takes.
        """
        parameters = parameters_of(batch, timeout_us)
        self._asked += 1
        tag = f"{self._prefix}{self._asked:x}"
        opening = b'{"id":"%b",' % tag.encode()
        if parameters:
            try:
                opening += b'"parameters":%b,' % orjson.dumps(parameters)
            except (TypeError, ValueError) as error:
                raise NotEncodable("a request parameter has no JSON form") from error
        head = self._head if budget_s == np.inf else self._head + b"X-Request-Timeout-Ms: %d\r\n" % (budget_s * 1000)
        if not self._binary:
            body = opening + self._json(batch)
            return head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body, tag
        described, nbytes = self._described(batch)
        json_length = len(opening) + len(described)
        head += b"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: %d\r\n" % json_length
        head += b"Content-Length: %d\r\n\r\n%b%b" % (json_length + nbytes, opening, described)
        message = bytearray(len(head) + nbytes)
        message[: len(head)] = head
        at = len(head)
        with memoryview(message) as view:
            for given in batch.inputs:
                write_parts(given, view[at : at + given.nbytes])
                at += given.nbytes
        return message, tag

    def _described(self, batch: Batch) -> tuple[bytes, int]:
        """The JSON part but for its opening, and the number of bytes behind it."""
        form = form_of(batch)
        known = self._known.get(form)
        if known is None:
            inputs = [self._entry(given) | {"parameters": {"binary_data_size": given.nbytes}} for given in batch.inputs]
            text = self._rest(inputs, batch.outputs)
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            known = self._known[form] = text, sum([given.nbytes for given in batch.inputs])
        return known

    def _entry(self, given: BatchInput) -> dict[str, Any]:
        tensor = self._inputs[given.index]
        return {"name": tensor.name, "datatype": given.datatype.name, "shape": list(given.shape)}

    def _rest(self, inputs: list[dict[str, Any]], outputs: tuple[int, ...]) -> bytes:
        wanted: list[dict[str, Any]] = [{"name": self._outputs[place].name} for place in outputs]
        if self._binary:
            for item in wanted:
                item["parameters"] = {"binary_data": True}
        return orjson.dumps({"inputs": inputs, "outputs": wanted}, option=orjson.OPT_SERIALIZE_NUMPY)[1:]

    def _json(self, batch: Batch) -> bytes:
        inputs = [self._entry(given) | {"data": self._elements(given)} for given in batch.inputs]
        return self._rest(inputs, batch.outputs)

    def _elements(self, given: BatchInput) -> Any:
        datatype, name = given.datatype, self._inputs[given.index].name
        packed = bytearray(given.nbytes)
        view = memoryview(packed)
        write_parts(given, view)
        if datatype.kind == "bytes":
            try:
                return [element.decode() for element in unpack_bytes(view)]
            except ValueError as error:
                what = f"{self._server} takes JSON only, which has no form for input '{name}': it is not text"
                raise NotEncodable(what) from error
        array: np.ndarray[Any, Any] = np.frombuffer(packed, datatype.numpy)
        if datatype.name == "BF16":
            array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if datatype.kind in ("float", "half") and not np.isfinite(array).all():
            raise NotEncodable(f"{self._server} takes JSON only, which has no NaN or infinity (input '{name}')")
        return array

    # -- answers -----------------------------------------------------------------------------------------------

    def success(self, answer: HttpAnswer, outputs: tuple[int, ...]) -> Success | Failure:
        """An answer with status 200."""
        try:
            return self._read(answer, [self._outputs[place] for place in outputs])
        except (Mismatch, Garbled, Astray, GatewayError, AssemblyError, RecursionError) as error:
            return refusal(self._server, error)

    def _read(self, answer: HttpAnswer, wanted: list[SignatureTensor]) -> Success:
        body = answer.body
        stated = answer.headers.get(HEADER_LENGTH)
        length = len(body)
        if stated is not None:
            if not stated.isdigit() or len(stated) > 18 or int(stated) > length:
                raise Garbled
            length = int(stated)
        with memoryview(body) as view:
            document, literals = json_of(bytes(view[:length]))
        if type(document) is dict and self._of_another(document.get("id"), answer.tag):
            raise Astray
        items = document.get("outputs") if type(document) is dict else None
        if type(items) is not list:
            raise Garbled
        check_version(self._version, document.get("model_version"))
        found = self._tensors(
            items, {tensor.name: tensor for tensor in wanted}, memoryview(body).toreadonly()[length:], literals
        )
        if literals is not None and not literals.all_restored:
            raise Garbled
        timing = _INFER_TIME.search(answer.header(b"server-timing"))
        return in_order(wanted, found, (0, int(float(timing[1]) * 1e6), 0) if timing else (0, 0, 0))

    def _of_another(self, told: Any, asked: str) -> bool:
        """Whether an answer says that it is one to another of our questions. Not every server repeats a request's id,
        and models may make one up."""
        return type(told) is str and told != asked and told.startswith(self._prefix)

    def _tensors(
        self, items: list[Any], wanted: dict[str, SignatureTensor], blobs: memoryview, literals: Literals | None
    ) -> dict[str, OutputTensor]:
        found: dict[str, OutputTensor] = {}
        at = 0
        for item in items:
            if type(item) is not dict or type(name := item.get("name")) is not str:
                raise Garbled
            parameters = item.get("parameters")
            size = parameters.get("binary_data_size") if type(parameters) is dict else None
            blob = None
            if size is not None:
                if type(size) is not int or not 0 <= size <= len(blobs) - at:
                    raise Garbled
                blob, at = blobs[at : at + size], at + size
            tensor = wanted.get(name)
            if tensor is None:
                continue
            if name in found:
                raise Mismatch(f"output '{name}' twice")
            shape = check_described(tensor, item.get("datatype"), item.get("shape"))
            found[name] = (
                from_raw(tensor, shape, blob)
                if blob is not None
                else _from_json(tensor, shape, item.get("data"), literals)
            )
        if at != len(blobs):
            raise Garbled
        return found


def _from_json(tensor: SignatureTensor, shape: tuple[int, ...], data: Any, literals: Literals | None) -> OutputTensor:
    plan = InputPlan(0, tensor.name, tensor.datatype, shape, element_count(shape))
    if isinstance(data, simdjson.Array):
        return from_elements(tensor, shape, oip_data.from_array(plan, data, literals))
    return from_elements(tensor, shape, oip_data.from_json(plan, data))


def json_of(text: bytes) -> tuple[Any, Literals | None]:
    """JSON → Python objects. The `data` arrays of a large text stay simdjson's; where literals come with them, NaN and
    infinities stand there in disguise.

    Raises:
        Garbled: it is no JSON, or too long to be read while others wait.
    """
    try:
        if len(text) <= SLOW_BYTES:
            return parse_small(text), None
        if len(text) > MAX_JSON_BYTES or oip_data.may_nest_deeply(text):
            raise Garbled
        with contextlib.suppress(ValueError, RuntimeError):
            return parse_large(text, "outputs"), None
        literals = Literals(text)
        if literals.text is None:
            raise Garbled
        return parse_large(literals.text, "outputs"), literals
    except (GatewayError, ValueError, RuntimeError) as error:
        raise Garbled from error
