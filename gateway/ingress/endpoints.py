"""The OIP REST surface: one application for every request on the data port.

A path is looked up once per remembered request head (routes.py); inference is answered by rest_inference.py,
everything else by rest_management.py. The query string is ignored. Every error is `{"error": "…"}`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gateway.catalog import Catalog, ServedVersion
from gateway.errors import GatewayError, MethodNotAllowed, NotFound, Restricted
from gateway.ingress import openapi
from gateway.ingress.body_coding import BodyCoding
from gateway.ingress.http_server import Exchange, HttpLimits
from gateway.ingress.oip_http import request_id_header
from gateway.ingress.rest_inference import RestInference, UnsupportedCoding
from gateway.ingress.rest_management import RestManagement, answer
from gateway.ingress.routes import Operation, Route, RouteTable, header_of, split_path
from gateway.management import Management
from gateway.pipeline import Pipeline
from gateway.protocol.http1 import Head
from gateway.protocol.options import DEFAULT_OPTIONS, ProtocolOptions


class OipApplication:
    """Answers every request on the data port; fits `http_server.Application`."""

    def __init__(
        self,
        catalog: Catalog,
        pipeline: Pipeline,
        provenance: Callable[[ServedVersion], dict[str, Any]],
        management: Management,
        options: ProtocolOptions = DEFAULT_OPTIONS,
        bodies: BodyCoding | None = None,
    ) -> None:
        """`bodies`: None takes the default bounds for compressed bodies."""
        self._restrictions = management.restrictions
        self._rest = RestManagement(management, catalog, provenance, options)
        self.table = RouteTable()
        self._rest.add_to(self.table)
        self._inference = RestInference(catalog, pipeline, options, bodies or BodyCoding(HttpLimits().max_body_bytes))
        self._inference.add_to(self.table)
        self.table.add(
            b"GET",
            "/v2/openapi.json",
            Operation(self._openapi, "metadata", "This description", "Description"),
        )

    # -- routing ---------------------------------------------------------------------------------------------

    def resolve(self, head: Head) -> Route:
        try:
            segments = split_path(head.path)
        except UnicodeDecodeError:
            segments = None
        match = self.table.match(segments) if segments is not None else None
        if match is None:
            return Route(self._refuse, error=NotFound("Not Found"))
        operation = match.operations.get(head.method)
        if operation is None:
            allow = ", ".join([method.decode() for method in match.operations])
            return Route(self._refuse, error=MethodNotAllowed("Method Not Allowed"), allow=allow)
        names = match.names
        name = names.get("repository") or names.get("region", "")
        route = Route(operation.action, names.get("model", ""), names.get("version"), name=name)
        try:
            self._restrictions.check(operation.api, header_of(head))
            return self._inference.for_head(route, head)
        except (Restricted, UnsupportedCoding) as error:
            return Route(self._refuse, error=error)

    def handle(self, head: Head, body: bytes, exchange: Exchange) -> None:
        route: Route = head.route
        try:
            route.action(route, head, body, exchange)
        except GatewayError as error:
            self._rest.refuse(exchange, error)

    # -- everything else -------------------------------------------------------------------------------------

    def _refuse(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        assert route.error is not None  # noqa: S101  # a refusing route is only made with its error
        extra = request_id_header()
        if isinstance(route.error, UnsupportedCoding):
            extra += b"Accept-Encoding: %b\r\n" % route.error.accepted
        elif route.allow:
            extra += b"Allow: %b\r\n" % route.allow.encode()
        exchange.send_error(route.error, extra)

    def _openapi(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        answer(exchange, openapi.document(self.table))
