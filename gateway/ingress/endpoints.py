"""The OIP REST surface: which path means what, and what each answers.

A path is matched whole; the query string is ignored; segments are percent-decoded after splitting on `/` (wire notes
§1.1). Matching happens once per remembered request head, not per request. Every error is `{"error": "…"}`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import orjson

from gateway import __version__
from gateway.catalog import Catalog, ServedVersion
from gateway.core.model import TensorSpec
from gateway.errors import GatewayError, MethodNotAllowed, NotFound, NotReady, Unsupported
from gateway.ingress.http_server import Exchange
from gateway.ingress.oip_http import JSON, HttpCodec, request_id_header
from gateway.pipeline import Pipeline
from gateway.protocol.http1 import Head, response_head

log = logging.getLogger("gateway.http")

SERVER_NAME: Final = "oip-gateway"
EXTENSIONS: Final = ("binary_tensor_data", "parameters")
"""Only what is really on; clients decide by this list."""

Action = Callable[["Route", Head, bytes, Exchange], None]


class Route:
    """What a request head asks for, found once and kept with the remembered head."""

    __slots__ = ("action", "error", "model", "version")

    def __init__(
        self, action: Action, model: str = "", version: str | None = None, error: GatewayError | None = None
    ) -> None:
        self.action = action
        self.model = model
        self.version = version
        self.error = error


class OipApplication:
    """Answers every request on the data port; fits `http_server.Application`."""

    def __init__(
        self,
        catalog: Catalog,
        pipeline: Pipeline,
        provenance: Callable[[ServedVersion], dict[str, Any]],
        ready: Callable[[], bool],
    ) -> None:
        self._catalog = catalog
        self._pipeline = pipeline
        self._manifest = provenance
        self._ready = ready
        self._fixed: dict[tuple[str, ...], tuple[bytes, Action]] = {
            ("v2",): (b"GET", self._server_metadata),
            ("v2", ""): (b"GET", self._server_metadata),
            ("v2", "health", "live"): (b"GET", self._live),
            ("v2", "health", "ready"): (b"GET", self._server_ready),
            ("v2", "models"): (b"GET", self._list_models),
        }
        self._of_model: dict[tuple[str, ...], tuple[bytes, Action]] = {
            (): (b"GET", self._model_metadata),
            ("ready",): (b"GET", self._model_ready),
            ("infer",): (b"POST", self._infer),
            ("provenance",): (b"GET", self._provenance),
        }

    # -- routing ---------------------------------------------------------------------------------------------

    def resolve(self, head: Head) -> Route:
        try:
            segments = tuple([_decode(part) for part in head.path.split(b"/")])
        except UnicodeDecodeError:
            return Route(self._refuse, error=NotFound("Not Found"))
        if segments[0] != "":
            return Route(self._refuse, error=NotFound("Not Found"))
        if head.content_encoding not in {None, b"", b"identity"}:
            error = Unsupported("Unsupported compression type; send the body without Content-Encoding")
            return Route(self._refuse, error=error)
        return self._match(head.method, segments[1:])

    def _match(self, method: bytes, path: tuple[str, ...]) -> Route:
        model, version = "", None
        if len(path) >= 3 and path[:2] == ("v2", "models") and path[2]:
            model, rest = path[2], path[3:]
            if len(rest) >= 2 and rest[0] == "versions" and rest[1]:
                version, rest = rest[1], rest[2:]
            found = self._of_model.get(rest)
        else:
            found = self._fixed.get(path)
        if found is None:
            return Route(self._refuse, error=NotFound("Not Found"))
        wanted, action = found
        if method != wanted:
            error = MethodNotAllowed("Method Not Allowed")
            return Route(self._refuse, model=wanted.decode(), error=error)
        return Route(action, model, version)

    def handle(self, head: Head, body: bytes, exchange: Exchange) -> None:
        route: Route = head.route
        try:
            route.action(route, head, body, exchange)
        except GatewayError as error:
            exchange.send_error(error, request_id_header())

    # -- inference -------------------------------------------------------------------------------------------

    def _infer(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        try:
            version = self._catalog.resolve(route.model, route.version)
        except NotReady as error:
            self._refuse_unready(route, exchange, error)
            return
        codec: HttpCodec = version.http_codec or self._codec(version)
        try:
            request = codec.decode(head, body, exchange)
            exchange.on_abort = request.abort
            self._pipeline.infer(version, request)
        except Exception as error:
            if not isinstance(error, GatewayError):
                log.exception("a request to model %s failed in a way nobody foresaw", route.model)
            exchange.on_abort = None
            codec.refuse(exchange, error)

    def _refuse_unready(self, route: Route, exchange: Exchange, error: NotReady) -> None:
        """A version that once served and has failed is known: its refusals are counted, and say which it is."""
        version = self._catalog.find(route.model, route.version)
        if version.scheduler is None:
            raise error
        version.statistics.reject(error.reason)
        codec: HttpCodec = version.http_codec or self._codec(version)
        codec.refuse(exchange, error)

    def _codec(self, version: ServedVersion) -> HttpCodec:
        codec = HttpCodec(version)
        version.http_codec = codec
        return codec

    # -- everything else -------------------------------------------------------------------------------------

    def _refuse(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        assert route.error is not None  # noqa: S101  # a refusing route is only made with its error
        extra = request_id_header()
        if isinstance(route.error, Unsupported):
            extra += b"Accept-Encoding: identity\r\n"
        elif isinstance(route.error, MethodNotAllowed):
            extra += b"Allow: %b\r\n" % route.model.encode()
        exchange.send_error(route.error, extra)

    def _server_metadata(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        _answer(exchange, {"name": SERVER_NAME, "version": __version__, "extensions": EXTENSIONS})

    def _live(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        _answer(exchange, {"live": True})

    def _server_ready(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        ready = self._ready()
        _answer(exchange, {"ready": ready}, 200 if ready else 503)

    def _list_models(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        _answer(exchange, {"models": sorted({version.name for version in self._catalog.versions()})})

    def _model_ready(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        version = self._catalog.find(route.model, route.version)
        ready = version.ready
        _answer(exchange, {"name": version.name, "ready": ready}, 200 if ready else 503)

    def _model_metadata(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        version = self._catalog.resolve(route.model, route.version)
        spec = version.spec
        versions = [spec.version] if route.version is not None else self._catalog.ready_versions(spec.name)
        _answer(
            exchange,
            {
                "name": spec.name,
                "versions": versions,
                "platform": spec.platform,
                "inputs": [_tensor(tensor, spec.batched) for tensor in spec.inputs],
                "outputs": [_tensor(tensor, spec.batched) for tensor in spec.outputs],
            },
        )

    def _provenance(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        _answer(exchange, self._manifest(self._catalog.find(route.model, route.version)))


def _tensor(tensor: TensorSpec, batched: bool) -> dict[str, Any]:
    shape = [-1, *tensor.dims] if batched else list(tensor.dims)
    return {"name": tensor.name, "datatype": tensor.datatype.name, "shape": shape}


def _answer(exchange: Exchange, document: dict[str, Any], status: int = 200) -> None:
    body = orjson.dumps(document)
    exchange.send(response_head(status, JSON, len(body), request_id_header(), exchange.keep_alive) + body)


def _decode(segment: bytes) -> str:
    return (unquote_to_bytes(segment) if b"%" in segment else segment).decode()
