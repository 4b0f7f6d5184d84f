"""One model version as HTTP clients see it: decode a request, and write its answer with provenance.

Everything that does not change from request to request is made once: per version the decoder, encoder and the
`Inference-Model` line; per batch the whole response head but for five values. Per request: one formatting operation
for the head, one join for the body.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from typing import Any, Final

from gateway.catalog import ServedVersion
from gateway.core.batch import FinishedBatch
from gateway.core.request import InferRequest, Settle
from gateway.errors import Cancelled, GatewayError, InvalidRequest, as_triton
from gateway.ingress.body_coding import BodyCoding
from gateway.ingress.http_server import Exchange
from gateway.protocol.http1 import Head, response_head
from gateway.protocol.oip_answer import AnswerEncoder, BatchEncoder
from gateway.protocol.oip_json import RequestDecoder
from gateway.protocol.options import DEFAULT_OPTIONS, ProtocolOptions
from gateway.provenance import headers

log = logging.getLogger("gateway.http")

JOINED_BYTES: Final = 65_536
"""Up to this size copying a body behind its head is cheaper than handing the transport several pieces."""
_OCTETS_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nInference-Header-Content-Length: %d\r\n"
    b"Content-Length: %d\r\n"
)
_JSON_HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
JSON: Final = b"application/json"
OCTETS: Final = b"application/octet-stream"


class BatchMemo:
    """What one batch's HTTP answers share."""

    __slots__ = ("encoded", "ids", "json_head", "octets_head", "provenance")

    def __init__(self, encoded: BatchEncoder, provenance: bytes, ids: list[bytes]) -> None:
        self.encoded = encoded
        self.provenance = provenance
        """Template for row, queue ms, total ms, request id."""
        self.json_head = _JSON_HEAD + provenance + b"\r\n"
        """The same behind a template for the body's length: a whole response head."""
        self.octets_head = _OCTETS_HEAD + provenance + b"\r\n"
        """... for binary tensors: the JSON part's length, then the body's."""
        self.ids = ids
        """Unused request ids, the smallest last."""


class HttpCodec:
    """Reads requests for one model version and writes their answers."""

    def __init__(self, version: ServedVersion, options: ProtocolOptions = DEFAULT_OPTIONS) -> None:
        spec = version.spec
        self.options = options
        self.decoder = RequestDecoder(spec, options)
        self.generate: Any = None
        """Belongs to `rest_generate`: what it made for this version."""
        self.model_header = headers.model_header(spec.name, spec.version, spec.digest, version.variant)
        self._remote_header = headers.model_header(spec.name, spec.version, "", version.variant)
        """... of an answer that a remote backend made, perhaps from other files."""
        self._spec = spec
        self._encoder = AnswerEncoder(spec)
        self._statistics = version.statistics.protocol("http")
        self._now = time.monotonic

    def decode(self, head: Head, body: bytes, exchange: Exchange) -> InferRequest:
        """A request ready for the pipeline.

        Raises:
            InvalidRequest: malformed, or does not fit the model.
        """
        raw_length = head.inference_header_length
        if raw_length is None:
            request = self.decoder.decode(body)
        else:
            request = self.decoder.decode(body, _header_length(raw_length, len(body)))
        if head.request_timeout_ms is not None:
            request.timeout_s = timeout_of(head.request_timeout_ms)
        request.received = exchange.received
        request.context = exchange
        request.settle = self.settle
        return request

    def prepared(self, request: InferRequest, head: Head, exchange: Exchange, settle: Settle) -> InferRequest:
        """A request that was read in another way than `decode`'s, ready for the pipeline.

        Raises:
            InvalidRequest: a header of it makes no sense.
        """
        if head.request_timeout_ms is not None:
            request.timeout_s = timeout_of(head.request_timeout_ms)
        request.received = exchange.received
        request.context = exchange
        request.settle = settle
        if self.options.invent_ids and request.request_id is None:
            request.request_id = str(uuid.uuid4())
        return request

    def memo_of(self, batch: FinishedBatch) -> BatchMemo:
        """What the answers of one batch share."""
        memo: BatchMemo = batch.http_memo or self._memo(batch)
        return memo

    def settle(self, request: InferRequest) -> None:
        """Write the answer; the scheduler's callback."""
        exchange: Exchange = request.context
        exchange.on_abort = None  # it held the request, and a cycle would wait for the garbage collector
        if request.error is not None:
            executed = headers.backend_header(request.avoid, request.attempt) if request.avoid is not None else b""
            self.refuse(exchange, request.error, executed, request)
            return
        try:
            self._answer(request, exchange)
        except Exception as error:
            self.failed(request, error)

    def settle_coded(self, bodies: BodyCoding, coding: bytes, request: InferRequest) -> None:
        """As `settle`, for a caller who takes compressed answers in `coding`."""
        exchange: Exchange = request.context
        if request.error is not None:
            self.settle(request)
            return
        exchange.on_abort = None
        try:
            memo = self.memo_of(request.batch)
            parts, length, json_length = self._encoder.encode(request, memo.encoded)
        except Exception as error:
            self.failed(request, error)
            return

        def then(body: list[bytes | memoryview], coding: bytes | None) -> None:
            try:
                self.write(request, memo, body, json_length, coding)
            except Exception as error:
                self.failed(request, error)

        bodies.deflate(parts, length, coding, then)

    def failed(self, request: InferRequest, error: Exception) -> None:
        """An answer could not be written. The caller gets one all the same: nobody else will settle its request."""
        if not isinstance(error, GatewayError):
            log.error("an answer of model %s could not be written", self._spec.name, exc_info=error)
        if not request.context.answered:
            self.refuse(request.context, error, request=request)

    def _answer(self, request: InferRequest, exchange: Exchange) -> None:
        batch: FinishedBatch = request.batch
        memo: BatchMemo = batch.http_memo or self._memo(batch)
        plain = batch.parts is None and request.attempt == batch.attempt and not request.told and exchange.keep_alive
        if not request.form.all_json:
            self._answer_parts(request, exchange, memo, plain)
            return
        body = self._encoder.encode_json(request, memo.encoded)
        received = request.received
        queue_s, total_s = batch.dispatched - received, self._now() - received
        length = len(body)
        if plain and length <= JOINED_BYTES:
            head = memo.json_head % (length, request.row, queue_s * 1e3, total_s * 1e3, memo.ids.pop())
            exchange.send(head + body)
            self._statistics.answered(total_s, queue_s, batch.finished - batch.dispatched)
        else:
            self._write(request, memo, [body], None)

    def _answer_parts(self, request: InferRequest, exchange: Exchange, memo: BatchMemo, plain: bool) -> None:
        """As `_answer`, for whoever does not want everything as JSON. `plain`: the batch's own head serves."""
        batch: FinishedBatch = request.batch
        parts, length, json_length = self._encoder.encode(request, memo.encoded)
        if not plain or length > JOINED_BYTES:
            self._write(request, memo, parts, json_length)
            return
        queue_s, total_s = batch.dispatched - request.received, self._now() - request.received
        timed = (request.row, queue_s * 1e3, total_s * 1e3, memo.ids.pop())
        if json_length is None:
            exchange.send(memo.json_head % (length, *timed) + parts[0])
        else:
            exchange.send(b"".join([memo.octets_head % (json_length, length, *timed), *parts]))
        self._statistics.answered(total_s, queue_s, batch.finished - batch.dispatched)

    def write(
        self,
        request: InferRequest,
        memo: BatchMemo,
        parts: list[bytes | memoryview],
        json_length: int | None,
        coding: bytes | None = None,
        content_type: bytes | None = None,
    ) -> None:
        """Any answer of a batch, with its provenance.

        Args:
            parts: the body, compressed already where `coding` says so.
            json_length: length of the JSON part before compression, where binary tensors follow it.
            content_type: where it is neither JSON nor JSON and tensors.
        """
        self._write(request, memo, parts, json_length, coding, content_type)

    def _write(
        self,
        request: InferRequest,
        memo: BatchMemo,
        parts: list[bytes | memoryview],
        json_length: int | None,
        coding: bytes | None = None,
        content_type: bytes | None = None,
    ) -> None:
        exchange: Exchange = request.context
        batch: FinishedBatch = request.batch
        queue_s, total_s = batch.dispatched - request.received, self._now() - request.received
        lines = self._provenance(request, memo, queue_s * 1e3, total_s * 1e3) + request.told
        if json_length is not None:
            lines += b"Inference-Header-Content-Length: %d\r\n" % json_length
        if coding is not None:
            lines += b"Content-Encoding: %b\r\n" % coding
        length = sum(map(len, parts))
        kind = content_type or (JSON if json_length is None else OCTETS)
        exchange.send_parts([response_head(200, kind, length, lines, exchange.keep_alive), *parts])
        self._statistics.answered(total_s, queue_s, batch.finished - batch.dispatched)

    def refuse(
        self, exchange: Exchange, error: Exception, executed: bytes = b"", request: InferRequest | None = None
    ) -> None:
        """Write an error, with what is known of its provenance. `executed`: header line of the last attempt;
        `request`: where it was decoded."""
        known = error if isinstance(error, GatewayError) else GatewayError("the gateway failed on this request")
        if self.options.triton_status_codes:
            known = as_triton(known)
        self._statistics.count(known.status)
        request_id = new_request_id()
        if not isinstance(known, Cancelled):  # nobody is there to read it
            exchange.send_error(known, self.model_header + executed + headers.request_id_header(request_id))
        self.ended(exchange, known, request_id, request)

    def ended(self, exchange: Exchange, error: GatewayError, request_id: bytes, request: InferRequest | None) -> None:
        """A request ended without an answer: for codecs that keep a log."""

    def _memo(self, batch: FinishedBatch) -> BatchMemo:
        template = headers.batch_template(
            self._model_line(batch),
            batch.backend,
            batch.attempt,
            batch.batch_id,
            batch.rows,
            (batch.finished - batch.dispatched) * 1e3,
        )
        ids = headers.uuid7_block(time.time_ns() // 1_000_000, os.urandom(headers.UUID7_RANDOM_BYTES), batch.rows)
        ids.reverse()
        memo = BatchMemo(BatchEncoder(self._spec, batch.outputs, batch.rows), template, ids)
        batch.http_memo = memo
        return memo

    def _model_line(self, batch: FinishedBatch) -> bytes:
        return self._remote_header if batch.remote else self.model_header

    def _provenance(self, request: InferRequest, memo: BatchMemo, queue_ms: float, total_ms: float) -> bytes:
        batch: FinishedBatch = request.batch
        if batch.parts is None and request.attempt == batch.attempt:
            return headers.finish(memo.provenance, request.row, queue_ms, total_ms, memo.ids.pop())
        if batch.parts is None:  # shares a rerun with others, but for itself it is another attempt
            members = [headers.Member(batch.backend, request.attempt, batch.batch_id, batch.rows, request.row)]
        else:
            members = [headers.Member(b.backend, b.attempt, b.batch_id, b.rows, row) for b, row in batch.parts]
        infer_ms = (batch.finished - batch.dispatched) * 1e3
        return headers.split_headers(self._model_line(batch), members, queue_ms, infer_ms, total_ms, memo.ids.pop())


class InventingHttpCodec(HttpCodec):
    """For owners who want an `id` in every answer (`ProtocolOptions.invent_ids`)."""

    def decode(self, head: Head, body: bytes, exchange: Exchange) -> InferRequest:
        request = super().decode(head, body, exchange)
        if request.request_id is None:
            request.request_id = str(uuid.uuid4())
        return request


def new_request_id() -> bytes:
    """UUIDv7 text for an answer that never saw a batch."""
    return headers.uuid7_block(time.time_ns() // 1_000_000, os.urandom(headers.UUID7_RANDOM_BYTES), 1)[0]


def request_id_header() -> bytes:
    """`X-Request-Id` for an answer that never saw a batch."""
    return headers.request_id_header(new_request_id())


def _header_length(raw: bytes, total: int) -> int:
    if not raw.isdigit() or len(raw) > 18 or int(raw) > total:
        shown = raw[:32].decode("ascii", "replace")
        raise InvalidRequest(
            f"inference header size should be in range (0, {total}), got: {shown} (header "
            "Inference-Header-Content-Length)"
        )
    return int(raw)


def timeout_of(raw: bytes) -> float:
    """Seconds that `X-Request-Timeout-Ms` allows; over gRPC it is metadata.

    Raises:
        InvalidRequest: not a number of milliseconds above 0.
    """
    if not raw.isdigit() or len(raw) > 12 or int(raw) == 0:
        raise InvalidRequest("header X-Request-Timeout-Ms must be a whole number of milliseconds above 0")
    return int(raw) / 1e3
