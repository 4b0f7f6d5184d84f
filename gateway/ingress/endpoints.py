"""The OIP REST surface: one application for every request on the data port.

A path is looked up once per remembered request head (routes.py); inference is answered by rest_inference.py,
everything else by rest_management.py. The query string is ignored. Every error is `{"error": "…"}`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gateway.catalog import Catalog, ServedVersion
from gateway.core.api import Api
from gateway.errors import GatewayError, MethodNotAllowed, NotFound, Restricted
from gateway.inference_log.handover import InferenceLog
from gateway.ingress import openapi
from gateway.ingress.body_coding import BodyCoding
from gateway.ingress.http_server import Exchange, HttpLimits
from gateway.ingress.oip_http import new_request_id
from gateway.ingress.request_notes import Unresolved, caller_of
from gateway.ingress.rest_inference import RestInference, UnsupportedCoding
from gateway.ingress.rest_management import RestManagement, answer
from gateway.ingress.routes import Match, Operation, Route, RouteTable, header_of, split_path
from gateway.management import Management
from gateway.pipeline import Pipeline
from gateway.protocol.http1 import Head
from gateway.protocol.options import DEFAULT_OPTIONS, ProtocolOptions
from gateway.provenance import headers


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
        log: InferenceLog | None = None,
    ) -> None:
        """`bodies`: None takes the default bounds for compressed bodies; `log`: None: requests are not logged."""
        self._unresolved = Unresolved(log, catalog) if log is not None else None
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
        if segments is None or match is None:
            return Route(self._refuse, error=NotFound("Not Found"))
        operation = match.operations.get(head.method)
        if operation is None:
            return self._other_method(match, head, segments)
        names = match.names
        name = names.get("repository") or names.get("region", "")
        route = Route(operation.action, names.get("model", ""), names.get("version"), name=name)
        try:
            self._restrictions.check(operation.api, header_of(head))
            return self._logged(self._inference.for_head(route, head), operation.api, head, segments)
        except (Restricted, UnsupportedCoding) as error:
            refusing = Route(self._refuse, route.model, route.version, error=error)
            return self._logged(refusing, operation.api, head, segments)

    def _other_method(self, match: Match, head: Head, segments: tuple[str, ...]) -> Route:
        operations, names = match.operations, match.names
        error, allow = MethodNotAllowed("Method Not Allowed"), ", ".join([method.decode() for method in operations])
        refusing = Route(self._refuse, names.get("model", ""), names.get("version"), error, allow=allow)
        return self._logged(refusing, next(iter(operations.values())).api, head, segments)

    def _logged(self, route: Route, api: Api, head: Head, segments: tuple[str, ...]) -> Route:
        """The route, with what the inference log wants to know of the head."""
        if self._unresolved is not None and api == "inference":
            endpoint = segments[-1]
            route.endpoint = "raw" if endpoint == "infer" and head.inference_header_length is not None else endpoint
            route.caller = caller_of(head.headers)
        return route

    def handle(self, head: Head, body: bytes, exchange: Exchange) -> None:
        route: Route = head.route
        try:
            route.action(route, head, body, exchange)
        except GatewayError as error:
            self._note(route, exchange, error, self._rest.refuse(exchange, error))

    def _note(self, route: Route, exchange: Exchange, error: GatewayError, request_id: bytes) -> None:
        """A request was refused before a model version was found for it."""
        if self._unresolved is not None and route.endpoint:
            asked = (route.model, route.version or "")
            self._unresolved.refused("http", route.endpoint, route.caller, request_id, exchange.received, error, asked)

    def refused(self, head: Head | None, error: GatewayError, received: float) -> bytes:
        """Fits `http_exchange.Refused`: a request was refused before it was handed over."""
        request_id = new_request_id()
        route: Route | None = head.route if head is not None else None
        if self._unresolved is not None and route is not None and route.endpoint:
            asked = (route.model, route.version or "")
            self._unresolved.refused("http", route.endpoint, route.caller, request_id, received, error, asked)
        return headers.request_id_header(request_id)

    # -- everything else -------------------------------------------------------------------------------------

    def _refuse(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        assert route.error is not None  # noqa: S101  # a refusing route is only made with its error
        request_id = new_request_id()
        extra = headers.request_id_header(request_id)
        if isinstance(route.error, UnsupportedCoding):
            extra += b"Accept-Encoding: %b\r\n" % route.error.accepted
        elif route.allow:
            extra += b"Allow: %b\r\n" % route.allow.encode()
        exchange.send_error(route.error, extra)
        self._note(route, exchange, route.error, request_id)

    def _openapi(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        answer(exchange, openapi.document(self.table))
