"""One model version as HTTP clients see it: decode a request, and write its answer with provenance.

Everything that does not change from request to request is made once: per version the decoder, encoder and the
`Inference-Model` line; per batch the whole response head but for five values. Per request: one formatting operation
for the head, one join for the body.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Final

from gateway.catalog import ServedVersion
from gateway.core.batch import FinishedBatch
from gateway.core.request import InferRequest
from gateway.errors import Cancelled, GatewayError, InvalidRequest
from gateway.ingress.http_server import Exchange
from gateway.protocol.http1 import Head, response_head
from gateway.protocol.oip_answer import AnswerEncoder, BatchEncoder
from gateway.protocol.oip_json import RequestDecoder
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

    def __init__(self, version: ServedVersion) -> None:
        spec = version.spec
        self.decoder = RequestDecoder(spec)
        self.model_header = headers.model_header(spec.name, spec.version, spec.digest)
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
            timeout_s = _timeout_s(head.request_timeout_ms)
            request.timeout_s = min(request.timeout_s or timeout_s, timeout_s)
        request.received = exchange.received
        request.context = exchange
        request.settle = self.settle
        return request

    def settle(self, request: InferRequest) -> None:
        """Write the answer; the scheduler's callback."""
        exchange: Exchange = request.context
        exchange.on_abort = None  # it held the request, and a cycle would wait for the garbage collector
        if request.error is not None:
            executed = headers.backend_header(request.avoid, request.attempt) if request.avoid is not None else b""
            self.refuse(exchange, request.error, executed)
            return
        try:
            self._answer(request, exchange)
        except Exception as error:
            # Whatever went wrong, the caller gets an answer: nobody else will settle this request.
            if not isinstance(error, GatewayError):
                log.exception("an answer of model %s could not be written", self._spec.name)
            if not exchange.answered:
                self.refuse(exchange, error)

    def _answer(self, request: InferRequest, exchange: Exchange) -> None:
        batch: FinishedBatch = request.batch
        memo: BatchMemo = batch.http_memo or self._memo(batch)
        parts, length, json_length = self._encoder.encode(request, memo.encoded)
        received = request.received
        now = self._now()
        queue_s, total_s = batch.dispatched - received, now - received
        plain = batch.parts is None and request.attempt == batch.attempt
        if plain and exchange.keep_alive and length <= JOINED_BYTES:
            timed = (request.row, queue_s * 1e3, total_s * 1e3, memo.ids.pop())
            if json_length is None:
                exchange.send(memo.json_head % (length, *timed) + parts[0])
            else:
                exchange.send(b"".join([memo.octets_head % (json_length, length, *timed), *parts]))
        else:
            provenance = self._provenance(request, memo, queue_s * 1e3, total_s * 1e3)
            if json_length is not None:
                provenance += b"Inference-Header-Content-Length: %d\r\n" % json_length
            content_type = JSON if json_length is None else OCTETS
            exchange.send_parts([response_head(200, content_type, length, provenance, exchange.keep_alive), *parts])
        self._statistics.answered(total_s, queue_s, batch.finished - batch.dispatched)

    def refuse(self, exchange: Exchange, error: Exception, executed: bytes = b"") -> None:
        """Write an error, with what is known of its provenance. `executed`: header line of the last attempt."""
        known = error if isinstance(error, GatewayError) else GatewayError("the gateway failed on this request")
        self._statistics.count(known.status)
        if isinstance(known, Cancelled):
            return  # nobody is there to read it
        exchange.send_error(known, self.model_header + executed + request_id_header())

    def _memo(self, batch: FinishedBatch) -> BatchMemo:
        template = headers.batch_template(
            self.model_header,
            batch.backend,
            batch.attempt,
            batch.batch_id,
            batch.rows,
            (batch.finished - batch.dispatched) * 1e3,
        )
        ids = headers.uuid7_block(time.time_ns() // 1_000_000, os.urandom(headers.UUID7_RANDOM_BYTES), batch.rows)
        ids.reverse()
        memo = BatchMemo(BatchEncoder(self._spec, batch), template, ids)
        batch.http_memo = memo
        return memo

    def _provenance(self, request: InferRequest, memo: BatchMemo, queue_ms: float, total_ms: float) -> bytes:
        batch: FinishedBatch = request.batch
        if batch.parts is None and request.attempt == batch.attempt:
            return headers.finish(memo.provenance, request.row, queue_ms, total_ms, memo.ids.pop())
        if batch.parts is None:  # shares a rerun with others, but for itself it is another attempt
            members = [headers.Member(batch.backend, request.attempt, batch.batch_id, batch.rows, request.row)]
        else:
            members = [headers.Member(b.backend, b.attempt, b.batch_id, b.rows, row) for b, row in batch.parts]
        infer_ms = (batch.finished - batch.dispatched) * 1e3
        return headers.split_headers(self.model_header, members, queue_ms, infer_ms, total_ms, memo.ids.pop())


def request_id_header() -> bytes:
    """`X-Request-Id` for an answer that never saw a batch."""
    block = headers.uuid7_block(time.time_ns() // 1_000_000, os.urandom(headers.UUID7_RANDOM_BYTES), 1)
    return headers.request_id_header(block[0])


def _header_length(raw: bytes, total: int) -> int:
    if not raw.isdigit() or len(raw) > 18 or int(raw) > total:
        shown = raw[:32].decode("ascii", "replace")
        raise InvalidRequest(
            f"inference header size should be in range (0, {total}), got: {shown} (header "
            "Inference-Header-Content-Length)"
        )
    return int(raw)


def _timeout_s(raw: bytes) -> float:
    if not raw.isdigit() or len(raw) > 12 or int(raw) == 0:
        raise InvalidRequest("header X-Request-Timeout-Ms must be a whole number of milliseconds above 0")
    return int(raw) / 1e3
