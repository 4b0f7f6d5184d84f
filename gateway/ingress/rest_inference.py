"""Inference on the data port: infer, plain and compressed, and generate.

The plain road is `infer`; what a request's head asks for beyond it is found once, when the head is first seen
(`for_head`), so that plain requests pay nothing for it. All roads end in the same pipeline.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from gateway.catalog import Catalog, ServedVersion
from gateway.core.request import InferRequest
from gateway.errors import GatewayError, NotReady, Unsupported
from gateway.ingress import rest_generate
from gateway.ingress.body_coding import BodyCoding, is_known, request_coding
from gateway.ingress.http_exchange import Exchange
from gateway.ingress.logged_http import LoggedHttpCodec, codec_for
from gateway.ingress.oip_http import HttpCodec
from gateway.ingress.routes import Operation, Route, RouteTable
from gateway.pipeline import Pipeline
from gateway.protocol.content_coding import ACCEPTED
from gateway.protocol.http1 import Head
from gateway.protocol.options import ProtocolOptions

log = logging.getLogger("gateway.http")

_ERRORS: Final = (400, 404, 413, 500, 501, 502, 503, 504)
_JSON: Final = "application/json"
_OF_MODEL: Final = "/v2/models/{model}[/versions/{version}]"


class UnsupportedCoding(Unsupported):
    """501: a `Content-Encoding` that is not offered there; carries `Accept-Encoding`."""

    def __init__(self, text: str, accepted: bytes) -> None:
        super().__init__(text)
        self.accepted = accepted


class RestInference:
    """Answers inference requests; the routes' actions."""

    def __init__(self, catalog: Catalog, pipeline: Pipeline, options: ProtocolOptions, bodies: BodyCoding) -> None:
        self._catalog = catalog
        self._pipeline = pipeline
        self._options = options
        self._bodies = bodies

    def add_to(self, table: RouteTable) -> None:
        table.add(
            b"POST",
            f"{_OF_MODEL}/infer",
            Operation(
                self.infer, "inference", "Inference", "InferResponse", "InferRequest", True, _ERRORS,
                (_JSON, "application/octet-stream"),
            ),
        )  # fmt: skip
        table.add(
            b"POST",
            f"{_OF_MODEL}/generate",
            Operation(
                self.generate, "inference", "Inference with flat JSON", "GenerateResponse", "GenerateRequest", True,
                _ERRORS,
            ),
        )  # fmt: skip
        table.add(
            b"POST",
            f"{_OF_MODEL}/generate_stream",
            Operation(
                self.generate_stream, "inference", "Inference with flat JSON, answered by server-sent events",
                "GenerateResponse", "GenerateRequest", True, _ERRORS, ("text/event-stream; charset=utf-8",),
            ),
        )  # fmt: skip

    def for_head(self, route: Route, head: Head) -> Route:
        """The route for a head that leads to it, with what the head says about compressed bodies.

        Raises:
            UnsupportedCoding: the body is compressed where, or how, none is taken.
        """
        coding = request_coding(head)
        if route.action == self.infer:
            if coding is not None and not is_known(coding):
                raise UnsupportedCoding(f"Unsupported compression type; send the body as {ACCEPTED.decode()}", ACCEPTED)
            accepted = self._bodies.answer_coding(head)
            if coding is not None or accepted is not None:
                route.action = self.infer_coded
                route.codings = (coding, accepted)
        elif coding is not None and route.action not in (self.generate, self.generate_stream):
            raise UnsupportedCoding("Unsupported compression type; send the body without Content-Encoding", b"identity")
        return route

    # -- infer -----------------------------------------------------------------------------------------------

    def infer(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        try:
            version = self._catalog.resolve(route.model, route.version)
        except NotReady as error:
            self._refuse_unready(route, exchange, error)
            return
        codec: HttpCodec = version.http_codec or codec_for(version, self._options)
        try:
            if version.split is not None and route.version is None:
                version = version.split.choose(version, head.headers, self._reader(head, body, exchange))
                codec = version.http_codec or codec_for(version, self._options)
            request = codec.decode(head, body, exchange)
            exchange.on_abort = request.abort
            self._pipeline.infer(version, request)
        except Exception as error:
            self._refuse(codec, route, exchange, error)

    def infer_coded(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        """The request is compressed, or the answer may be."""
        ready = self._ready(route, exchange)
        if ready is None:
            return
        version: ServedVersion = ready
        codec: HttpCodec = version.http_codec or codec_for(version, self._options)
        coding, accepted = route.codings

        inflated = False

        def plain(body: bytes) -> None:
            nonlocal version, codec, inflated
            inflated = True
            if version.scheduler is None:  # freed while the body was inflated: its name may mean another by now
                version = self._catalog.resolve(route.model, route.version)
                codec = version.http_codec or codec_for(version, self._options)
            if version.split is not None and route.version is None:
                version = version.split.choose(version, head.headers, self._reader(head, body, exchange))
                codec = version.http_codec or codec_for(version, self._options)
            request = codec.decode(head, body, exchange)
            if accepted is not None:
                request.settle = lambda request: codec.settle_coded(self._bodies, accepted, request)
            self._begin(version, request, exchange)

        def refuse(error: Exception) -> None:
            self._refuse(codec, route, exchange, error)

        if coding is not None:
            self._bodies.inflate(exchange, coding, body, plain, refuse)
            if isinstance(codec, LoggedHttpCodec) and not inflated:
                codec.note_leaving(exchange)
            return
        try:
            plain(body)
        except Exception as error:
            refuse(error)

    # -- generate --------------------------------------------------------------------------------------------

    def generate(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        self._generate(route, head, body, exchange, streaming=False)

    def generate_stream(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        self._generate(route, head, body, exchange, streaming=True)

    def _generate(self, route: Route, head: Head, body: bytes, exchange: Exchange, streaming: bool) -> None:
        version = self._ready(route, exchange)
        if version is None:
            return
        codec: HttpCodec = version.http_codec or codec_for(version, self._options)

        def read(version: ServedVersion) -> InferRequest:
            codec: HttpCodec = version.http_codec or codec_for(version, self._options)
            return rest_generate.decode(codec, head, body, exchange, streaming)

        try:
            if version.split is not None and route.version is None:
                version = version.split.choose(version, head.headers, read)
                codec = version.http_codec or codec_for(version, self._options)
            self._begin(version, read(version), exchange)
        except Exception as error:
            self._refuse(codec, route, exchange, error)

    # -- what all share --------------------------------------------------------------------------------------

    def _reader(self, head: Head, body: bytes, exchange: Exchange) -> Callable[[ServedVersion], InferRequest]:
        """For a choice that depends on what the request says (traffic.py)."""

        def read(version: ServedVersion) -> InferRequest:
            codec: HttpCodec = version.http_codec or codec_for(version, self._options)
            return codec.decode(head, body, exchange)

        return read

    def _ready(self, route: Route, exchange: Exchange) -> ServedVersion | None:
        """None: its refusal was sent."""
        try:
            return self._catalog.resolve(route.model, route.version)
        except NotReady as error:
            self._refuse_unready(route, exchange, error)
            return None

    def _begin(self, version: ServedVersion, request: InferRequest, exchange: Exchange) -> None:
        exchange.on_abort = request.abort
        self._pipeline.infer(version, request)

    def _refuse(self, codec: HttpCodec, route: Route, exchange: Exchange, error: Exception) -> None:
        if not isinstance(error, GatewayError):
            log.error("a request to model %s failed in a way nobody foresaw", route.model, exc_info=error)
        exchange.on_abort = None
        codec.refuse(exchange, error)

    def _refuse_unready(self, route: Route, exchange: Exchange, error: NotReady) -> None:
        """A version that once served and has failed is known: its refusals are counted, and say which it is."""
        version = self._catalog.find(route.model, route.version)
        if version.scheduler is None:
            raise error
        version.statistics.reject(error.reason)
        codec: HttpCodec = version.http_codec or codec_for(version, self._options)
        codec.refuse(exchange, error)
