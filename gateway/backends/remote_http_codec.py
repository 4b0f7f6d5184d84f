"""A batch ↔ the body of an infer request over HTTP, for one model of one server.

Two forms, chosen per server: JSON with the tensors as bytes behind it (the binary tensor extension), or all JSON, for
servers without the extension. Answers may come in either form, tensor by tensor. The description of a batch's tensors
is remembered by their shapes; only parameters and data differ then.
Rules: NaN and infinities have no JSON form, nor has a BYTES element that is not UTF-8: such a batch is not sent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import orjson

from gateway.backends.interface import Batch, Failure, Success
from gateway.backends.remote_codec import (
    REMEMBERED,
    BatchForm,
    Garbled,
    Mismatch,
    NotEncodable,
    check_described,
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
from gateway.protocol.oip_json import parse_small
from gateway.protocol.oip_plan import InputPlan

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
    ) -> None:
        self._server = server
        self._head = head
        self._inputs = inputs
        self._outputs = outputs
        self._binary = binary
        self._known: dict[BatchForm, tuple[bytes, int]] = {}

    def request(self, batch: Batch, budget_s: float, timeout_us: int = 0) -> bytearray | bytes:
        """Head and body. `budget_s`: what the server is told of the time it has; infinite: nothing.

        Raises:
            NotEncodable: the batch has no form that the server takes.
        """
        parameters = parameters_of(batch, timeout_us)
        opening = b"{"
        if parameters:
            try:
                opening = b'{"parameters":%b,' % orjson.dumps(parameters)
            except (TypeError, ValueError) as error:
                raise NotEncodable("a request parameter has no JSON form") from error
        head = self._head if budget_s == np.inf else self._head + b"X-Request-Timeout-Ms: %d\r\n" % (budget_s * 1000)
        if not self._binary:
            # Models on KServe often repeat the request's id in an answer that must have one.
            body = b'{"id":"1",%b%b' % (opening[1:], self._json(batch))
            return head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
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
        return message

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
        except (Mismatch, Garbled, GatewayError, AssemblyError, RecursionError) as error:
            return refusal(self._server, error)

    def _read(self, answer: HttpAnswer, wanted: list[SignatureTensor]) -> Success:
        body = answer.body
        stated = answer.headers.get(HEADER_LENGTH)
        length = len(body)
        if stated is not None:
            if not stated.isdigit() or len(stated) > 18 or int(stated) > length:
                raise Garbled
            length = int(stated)
        try:
            document = parse_small(body[:length])
        except GatewayError as error:
            raise Garbled from error
        items = document.get("outputs") if type(document) is dict else None
        if type(items) is not list:
            raise Garbled
        found = self._tensors(items, {tensor.name: tensor for tensor in wanted}, memoryview(body)[length:])
        timing = _INFER_TIME.search(answer.header(b"server-timing"))
        return in_order(wanted, found, (0, int(float(timing[1]) * 1e6), 0) if timing else (0, 0, 0))

    def _tensors(
        self, items: list[Any], wanted: dict[str, SignatureTensor], blobs: memoryview
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
            found[name] = from_raw(tensor, shape, blob) if blob is not None else _from_json(tensor, shape, item)
        if at != len(blobs):
            raise Garbled
        return found


def _from_json(tensor: SignatureTensor, shape: tuple[int, ...], item: dict[str, Any]) -> OutputTensor:
    plan = InputPlan(0, tensor.name, tensor.datatype, shape, element_count(shape))
    return from_elements(tensor, shape, oip_data.from_json(plan, item.get("data")))
