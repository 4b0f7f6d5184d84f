"""HTTP's codec of a version whose requests are logged, and the choice between it and the plain one.

Where there is no log nothing of this is used: a version gets the plain codec, and a request's path is what it always
was. What is noted is what was counted: a request is logged where its status is counted, so there is one row for each.
"""

from __future__ import annotations

import uuid

from gateway.catalog import ServedVersion
from gateway.core.request import InferRequest, Settle
from gateway.errors import Cancelled, GatewayError
from gateway.inference_log.handover import VersionLog
from gateway.ingress.http_server import Exchange
from gateway.ingress.oip_http import BatchMemo, HttpCodec, InventingHttpCodec
from gateway.ingress.request_notes import served
from gateway.ingress.routes import Route
from gateway.protocol.http1 import Head
from gateway.protocol.options import DEFAULT_OPTIONS, ProtocolOptions


class LoggedHttpCodec(HttpCodec):
    """As `HttpCodec`, and notes every request that ends."""

    def __init__(self, version: ServedVersion, options: ProtocolOptions = DEFAULT_OPTIONS) -> None:
        super().__init__(version, options)
        self._log: VersionLog = version.log.named(version.variant)

    def decode(self, head: Head, body: bytes, exchange: Exchange) -> InferRequest:
        self._log.check()
        request = super().decode(head, body, exchange)
        if self.options.invent_ids and request.request_id is None:
            request.request_id = str(uuid.uuid4())
        return request

    def prepared(self, request: InferRequest, head: Head, exchange: Exchange, settle: Settle) -> InferRequest:
        self._log.check()
        return super().prepared(request, head, exchange, settle)

    def write(
        self,
        request: InferRequest,
        memo: BatchMemo,
        parts: list[bytes | memoryview],
        json_length: int | None,
        coding: bytes | None = None,
        content_type: bytes | None = None,
    ) -> None:
        request_id = memo.ids[-1]
        super().write(request, memo, parts, json_length, coding, content_type)
        self._answered(request, request.context, request_id)

    def _answer(self, request: InferRequest, exchange: Exchange) -> None:
        batch = request.batch
        request_id = (batch.http_memo or self._memo(batch)).ids[-1]
        HttpCodec._answer(self, request, exchange)
        self._answered(request, exchange, request_id)

    def _answered(self, request: InferRequest, exchange: Exchange, request_id: bytes) -> None:
        route: Route = exchange.head.route
        form = request.form
        total_s = self._now() - request.received
        try:
            if form.plain:
                self._log.answered(request, request_id, total_s, "http", route.endpoint, None, route.caller)
            else:
                tensors = served(self._spec, form, request)
                self._log.answered(request, request_id, total_s, "http", route.endpoint, None, route.caller, tensors)
        except Exception:  # the answer is written: nothing may be written behind it
            self._log.failed()
        request.answer_id = request_id

    def ended(self, exchange: Exchange, error: GatewayError, request_id: bytes, request: InferRequest | None) -> None:
        route: Route = exchange.head.route
        received = exchange.received
        self._log.refused(
            error, request, request_id, received, self._now() - received, "http", route.endpoint, None, route.caller
        )

    def note_leaving(self, exchange: Exchange) -> None:
        """While the request is being inflated nobody else would notice that its client leaves."""
        left = exchange.on_abort
        if left is None:
            return

        def gone() -> None:
            left()
            self.refuse(exchange, Cancelled("the caller left"))

        exchange.on_abort = gone


def codec_for(version: ServedVersion, options: ProtocolOptions) -> HttpCodec:
    """The codec of a version that has none yet; it is kept with the version."""
    codec: HttpCodec
    if version.log is not None:
        codec = LoggedHttpCodec(version, options)
    else:
        codec = (InventingHttpCodec if options.invent_ids else HttpCodec)(version, options)
    version.http_codec = codec
    return codec
