"""The REST shell of everything but inference: bodies in, documents out; what they mean is `management.py`'s.

Rules: a body is JSON and, where Triton takes none, may be empty; settings are small and their bodies bounded. What
waits (loading, unloading, reading directories) runs as a task and goes on when its client leaves. Answers without a
document have no body.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

import orjson

from gateway.catalog import Catalog, ServedVersion
from gateway.errors import GatewayError, InvalidRequest, Malformed, TooLarge, as_triton
from gateway.ingress.http_server import Exchange
from gateway.ingress.oip_http import JSON, new_request_id, request_id_header
from gateway.ingress.routes import VERSIONED, Operation, Route, RouteTable
from gateway.management import Management
from gateway.protocol.http1 import Head, response_head
from gateway.protocol.options import DEFAULT_OPTIONS, ProtocolOptions
from gateway.provenance import headers

log = logging.getLogger("gateway.http")

MAX_SETTINGS_BYTES: Final = 1024 * 1024
BIG_BODY_BYTES: Final = 262_144
"""A larger load body (it holds files) is parsed in a thread."""
MODEL: Final = f"/v2/models/{{model}}{VERSIONED}"


class RestManagement:
    """Actions of the route table."""

    def __init__(
        self,
        management: Management,
        catalog: Catalog,
        provenance: Callable[[ServedVersion], dict[str, Any]],
        options: ProtocolOptions = DEFAULT_OPTIONS,
    ) -> None:
        self._management = management
        self._catalog = catalog
        self._manifest = provenance
        self._options = options
        self._tasks: set[asyncio.Task[None]] = set()

    def add_to(self, table: RouteTable) -> None:
        for pattern in ("/v2", "/v2/"):
            table.add(
                b"GET", pattern, Operation(self._server_metadata, "metadata", "Server metadata", "ServerMetadata")
            )
        table.add(b"GET", "/v2/health/live", Operation(self._live, "health", "Whether the server runs", "Live"))
        table.add(
            b"GET",
            "/v2/health/ready",
            Operation(self._server_ready, "health", "Whether every model serves", "Ready", errors=(503,)),
        )
        self._add_models(table)
        self._add_repository(table)
        self._add_settings(table)
        self._add_shared_memory(table)

    def _add_models(self, table: RouteTable) -> None:
        def get(pattern: str, operation: Operation) -> None:
            table.add(b"GET", pattern, operation)

        get("/v2/models", Operation(self._list_models, "metadata", "Names of the models", "Models"))
        get("/v2/models/stats", Operation(self._all_statistics, "statistics", "Statistics of all models", "Statistics"))
        get(MODEL, Operation(self._model_metadata, "metadata", "Model metadata", "ModelMetadata", errors=(404, 503)))
        get(
            f"{MODEL}/ready",
            Operation(self._model_ready, "health", "Whether the model can answer", "ModelReady", errors=(404, 503)),
        )
        get(
            f"{MODEL}/config",
            Operation(self._model_config, "model-config", "Completed configuration", "ModelConfig", errors=(404, 503)),
        )
        get(
            f"{MODEL}/stats",
            Operation(self._model_statistics, "statistics", "Statistics of a model", "Statistics", errors=(400,)),
        )
        get(
            f"{MODEL}/provenance",
            Operation(
                self._provenance, "metadata", "Files and lineage behind the digest", "Provenance", errors=(404, 503)
            ),
        )

    def _add_repository(self, table: RouteTable) -> None:
        errors = (400, 500, 501, 503)
        for prefix in ("/v2/repository", "/v2/repository/{repository}"):
            table.add(
                b"POST",
                f"{prefix}/index",
                Operation(
                    self._index, "model-repository", "Models and their states", "Index", "IndexRequest", errors=(400,)
                ),
            )
            for verb, action, text in (
                ("load", self._load, "Load a model, or load it again"),
                ("unload", self._unload, "Unload a model"),
            ):
                operation = Operation(action, "model-repository", text, "", f"{verb.title()}Request", errors=errors)
                table.add(b"POST", f"{prefix}/models/{{model}}/{verb}", operation)

    def _add_settings(self, table: RouteTable) -> None:
        for path, errors in (("/v2/trace/setting", (400, 501)), ("/v2/models/{model}/trace/setting", (400, 404, 501))):
            get = Operation(self._trace, "trace", "Trace settings", "TraceSettings", errors=errors[1:-1])
            table.add(b"GET", path, get)
            table.add(
                b"POST",
                path,
                Operation(
                    self._update_trace, "trace", "Change trace settings", "TraceSettings", "TraceChanges", True, errors
                ),
            )
        table.add(b"GET", "/v2/logging", Operation(self._log, "logging", "Log settings", "LogSettings"))
        table.add(
            b"POST",
            "/v2/logging",
            Operation(
                self._update_log, "logging", "Change log settings", "LogSettings", "LogChanges", True, (400, 501, 503)
            ),
        )

    def _add_shared_memory(self, table: RouteTable) -> None:
        for kind, status, register, unregister in (
            ("system", self._system_status, self._system_register, self._system_unregister),
            ("cuda", self._cuda_status, self._cuda_register, self._cuda_unregister),
        ):
            root, api = f"/v2/{kind}sharedmemory", "shared-memory"
            for path, errors in ((root, ()), (f"{root}/region/{{region}}", (404,))):
                table.add(
                    b"GET",
                    f"{path}/status",
                    Operation(status, api, f"Registered {kind} regions", "Regions", errors=errors),  # type: ignore[arg-type]
                )
                table.add(
                    b"POST",
                    f"{path}/unregister",
                    Operation(unregister, api, f"Forget {kind} regions", errors=(501,)),  # type: ignore[arg-type]
                )
            table.add(
                b"POST",
                f"{root}/region/{{region}}/register",
                Operation(
                    register,
                    api,  # type: ignore[arg-type]
                    f"Register a {kind} region",
                    "",
                    f"{kind.title()}Region",
                    True,
                    errors=(400, 404, 500, 501),
                ),
            )

    # -- health and metadata -------------------------------------------------------------------------------------

    def _server_metadata(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        answer(exchange, self._management.server_metadata())

    def _live(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        answer(exchange, {"live": self._management.server_live()})

    def _server_ready(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        obstacle = self._management.server_obstacle()
        answer(exchange, _readiness(obstacle), 503 if obstacle else 200)

    def _list_models(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        answer(exchange, {"models": self._management.models()})

    def _model_ready(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        obstacle = self._management.model_obstacle(route.model, route.version)
        answer(exchange, {"name": route.model, **_readiness(obstacle)}, 503 if obstacle else 200)

    def _model_metadata(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        answer(exchange, self._management.model_metadata(route.model, route.version))

    def _model_config(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        answer(exchange, self._management.model_config(route.model, route.version))

    def _provenance(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        answer(exchange, self._manifest(self._catalog.find(route.model, route.version)))

    # -- statistics ----------------------------------------------------------------------------------------------

    def _all_statistics(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        answer(exchange, self._management.statistics())

    def _model_statistics(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        answer(exchange, self._management.statistics(route.model, route.version or ""))

    # -- repository ----------------------------------------------------------------------------------------------

    def _index(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        ready = _object(body, empty=True).get("ready", False)
        if not isinstance(ready, bool):
            raise Malformed("'ready' must be true or false")

        async def work() -> None:
            answer(exchange, await self._management.repository_index(ready, route.name))

        self._later(exchange, work())

    def _load(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        async def work() -> None:
            if len(body) > BIG_BODY_BYTES:
                document = await asyncio.to_thread(_object, body, empty=True, limit=len(body))
            else:
                document = _object(body, empty=True)
            await self._management.load(route.model, _parameters(document), route.name)
            answer(exchange)

        self._later(exchange, work())

    def _unload(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        dependents = _parameters(_object(body, empty=True)).get("unload_dependents", False)
        if not isinstance(dependents, bool):
            raise Malformed("parameter 'unload_dependents' must be true or false")

        async def work() -> None:
            await self._management.unload(route.model, dependents, route.name)
            answer(exchange)

        self._later(exchange, work())

    def _later(self, exchange: Exchange, work: Coroutine[Any, Any, None]) -> None:
        async def settled() -> None:
            try:
                await work
            except Exception as error:
                if not isinstance(error, GatewayError):
                    log.exception("a management request failed in a way nobody foresaw")
                    error = GatewayError("the gateway failed on this request; its log says why")
                if not exchange.answered:
                    self.refuse(exchange, error)

        task = asyncio.get_running_loop().create_task(settled())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- settings ------------------------------------------------------------------------------------------------

    def _trace(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        answer(exchange, self._management.trace_settings(route.model or None))

    def _update_trace(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        answer(exchange, self._management.update_trace_settings(route.model or None, _object(body)))

    def _log(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        answer(exchange, self._management.log_settings())

    def _update_log(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        answer(exchange, self._management.update_log_settings(_object(body)))

    # -- shared memory -------------------------------------------------------------------------------------------

    def _system_status(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        answer(exchange, self._management.shm_status(route.name or None))

    def _cuda_status(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        answer(exchange, self._management.shm_status(route.name or None, "cuda"))

    def _system_register(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        document = _object(body)
        for name in ("key", "byte_size"):
            if name not in document:
                raise InvalidRequest(f"Shared memory register request has no '{name}' field")
        key, offset, size = document["key"], document.get("offset", 0), document["byte_size"]
        if not isinstance(key, str):
            raise Malformed("'key' must be a string: the name of a POSIX shared memory object")
        for name, number in (("offset", offset), ("byte_size", size)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise Malformed(f"'{name}' must be a whole number of bytes, at least 0")
        self._management.shm_register(route.name, key, offset, size)
        answer(exchange)

    def _system_unregister(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        self._management.shm_unregister(route.name or None)
        answer(exchange)

    def _cuda_register(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        self._management.cuda_shm_register(route.name)

    def _cuda_unregister(self, route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
        answer(exchange)  # there is none to forget

    # -- errors --------------------------------------------------------------------------------------------------

    def refuse(self, exchange: Exchange, error: GatewayError) -> bytes:
        """Write an error; returns the answer's request id."""
        if self._options.triton_status_codes:
            error = as_triton(error)
        request_id = new_request_id()
        exchange.send_error(error, headers.request_id_header(request_id))
        return request_id


def answer(exchange: Exchange, document: object = None, status: int = 200) -> None:
    """`document` as JSON; None: no body."""
    body = b"" if document is None else orjson.dumps(document)
    exchange.send(response_head(status, JSON, len(body), request_id_header(), exchange.keep_alive) + body)


def _readiness(obstacle: str) -> dict[str, Any]:
    """`obstacle`: why something is not ready; empty: it is."""
    return {"ready": False, "reason": obstacle} if obstacle else {"ready": True}


def _object(body: bytes, *, empty: bool = False, limit: int = MAX_SETTINGS_BYTES) -> dict[str, Any]:
    """The JSON object in a body. `empty`: an empty body stands for an empty object.

    Raises:
        Malformed: something else.
        TooLarge: more than `limit` bytes.
    """
    if empty and not body.strip():
        return {}
    if len(body) > limit:
        raise TooLarge(f"the body of this request may have at most {limit} bytes")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Malformed(f"failed to parse the request JSON buffer: {error}") from None
    if not isinstance(document, dict):
        raise Malformed("the request's JSON must be an object")
    return document


def _parameters(document: dict[str, Any]) -> dict[str, Any]:
    parameters = document.get("parameters", {})
    if not isinstance(parameters, dict):
        raise Malformed("'parameters' must be an object")
    return parameters
