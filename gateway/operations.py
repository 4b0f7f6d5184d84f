"""The operations port: metrics, health and the state of models and workers, for people, scrapers and the CLI.

Off the hot path, hence plain aiohttp. Rules: GET and HEAD read; POST acts on backends, for those who may
(operations_access.py); never a tensor; errors are JSON `{"error": …}` like on the data port. On a loopback address the
`Host` header must name this machine, so that a web page whose name was re-pointed at 127.0.0.1 (DNS rebinding) reads
nothing. A scrape gives way to requests between model versions, so a long list of models does not hold up the loop.
"""

from __future__ import annotations

import asyncio
import errno
import html
import ipaddress
import logging
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from gateway.core.agreement import AgreementStatistics
from gateway.errors import BindError
from gateway.observe.exposition import prefers_openmetrics
from gateway.observe.metrics import Metrics
from gateway.operations_access import Access, Refusal
from gateway.operations_backends import MAX_WAIT_S, Action, Backends, LastBackend, UnknownBackend, audit
from gateway.operations_page import Asked, Page, PageFault

log = logging.getLogger("gateway.operations")

MAX_BODY: Final = 4096
MAX_NAME: Final = 256
_ACTION: Final = re.compile(r"/api/backends/.+/(drain|undrain)")
_SECONDS: Final = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
MODELS_PER_TURN: Final = 8
"""Model versions read between two turns of the event loop: about a millisecond."""

PAGES: Final = (
    ("/metrics", "counters and histograms for Prometheus"),
    ("/healthz", "whether the process answers at all"),
    ("/api/models", "models: version, state, digest, backends"),
    ("/api/backends", "backends: state, why and until when, what they are executing"),
    ("/api/workers", "worker processes"),
)


@dataclass(frozen=True, slots=True)
class BackendStatus:
    name: str
    available: bool
    in_flight: int
    state: str = ""
    """As in `BackendView`; empty for what has none, an ensemble."""
    cause: str = ""
    """Why it is in this state, in words."""
    seconds_left: float | None = None
    """Until the state ends by itself; None: it does not."""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model version as `/api/models` shows it; the field names are part of the interface."""

    name: str
    version: str
    state: str
    """READY means that it can answer now; UNAVAILABLE is one that was unloaded, or has nobody to execute it."""
    digest: str
    backends: Sequence[BackendStatus]
    max_batch_size: int
    batching: str
    """Why the model is or is not batched, in words."""
    reason: str
    """Why it is not ready; empty where it is."""
    agreement: AgreementStatistics | None = None
    """What comparing answers of different backends found; null where nothing is compared."""
    role: str = "champion"
    """`champion`: the model's name means it; `standby`: on trial before it takes the name; `previous`: had the name,
    and is kept for a rollback; `canary`, `shadow`: see /api/models/M/split."""
    source: str = ""
    """Where its files are: a path, or what never changes its meaning in a registry."""
    reference: str = ""
    """What the configuration calls it in its registry; empty for what comes from elsewhere."""
    notes: Sequence[str] = ()
    """What people should know of what its registry says."""


class Operations:
    """The operations server.

    Args:
        metrics: what `/metrics` serves.
        models: model versions now, for `/api/models`.
        workers: worker processes now, for `/api/workers`: dataclasses or dicts of plain values.
        backends: for `/api/backends`.
        token_file: holds the token that actions need; None: only this machine may act.
        pages: whatever else is served.
        health: what `/healthz` says besides that the process answers.
    """

    def __init__(
        self,
        metrics: Metrics,
        models: Callable[[], Sequence[ModelStatus]],
        workers: Callable[[], Sequence[object]],
        backends: Backends,
        token_file: Path | None = None,
        pages: Sequence[Page] = (),
        health: Callable[[], Mapping[str, object]] = dict,
    ) -> None:
        self._health = health
        self._metrics = metrics
        self._models = models
        self._workers = workers
        self._backends = backends
        self._token_file = token_file
        self._pages = pages
        self._access = Access(token_file, loopback=False)
        self._runner: web.AppRunner | None = None
        self.port = 0
        """The port listened on, once started."""

    async def start(self, host: str, port: int, sockets: Sequence[socket.socket] = ()) -> None:
        """Listen; port 0 takes any free one. `sockets`: listening already; then no port is bound.

        Raises:
            BindError: the address is taken, not ours, or not allowed.
        """
        if not 0 <= port <= 65535:  # uvloop would take it modulo 65536
            raise BindError(host, port, "a port is a number from 0 to 65535; choose another with --metrics-port")
        self._access = Access(self._token_file, loopback=is_loopback(host))
        most = max([MAX_BODY, *[page.max_body for page in self._pages]])
        app = web.Application(
            middlewares=[_errors(self._listed()), _only_known_methods(self._pages), _host_check(host)],
            client_max_size=most,
        )
        app.router.add_get("/", partial(_index, self._listed()))
        app.router.add_get("/metrics", self._serve_metrics)
        app.router.add_get("/healthz", self._serve_health)
        app.router.add_get("/api/models", self._serve_models)
        app.router.add_get("/api/workers", self._serve_workers)
        app.router.add_get("/api/backends", self._serve_backends)
        app.router.add_post("/api/backends/{name}/{action:drain|undrain}", self._act)
        for page in self._pages:
            app.router.add_route(page.method, page.path, partial(self._serve_page, page))
        # What clients send is not our error; a malformed request would be logged with a traceback.
        logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        sites: list[web.BaseSite] = [web.SockSite(runner, sock) for sock in sockets]
        try:
            for site in sites or [web.TCPSite(runner, host, port)]:
                await site.start()
        except OSError as error:
            await runner.cleanup()
            raise BindError(host, port, _cause(error)) from None
        self._runner = runner
        self.port = runner.addresses[0][1]

    def fds(self) -> list[int]:
        """Descriptors of what is listened on, to hand over to another process."""
        sites = self._runner.sites if self._runner is not None else ()
        servers = [getattr(site, "_server", None) for site in sites]
        return [sock.fileno() for server in servers if server is not None for sock in server.sockets]

    async def stop_listening(self) -> None:
        """Take no new connections; those that are open are served."""
        for site in list(self._runner.sites) if self._runner is not None else ():
            await site.stop()

    async def close(self) -> None:
        """Stop listening and end open connections."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _serve_metrics(self, request: web.Request) -> web.Response:
        scrape = self._metrics.scrape()
        for n, view in enumerate(list(self._metrics.sources.models()), start=1):
            scrape.add(view)
            if n % MODELS_PER_TURN == 0:
                await asyncio.sleep(0)
        openmetrics = prefers_openmetrics(request.headers.get("Accept", ""))
        body, content_type = self._metrics.finish(scrape, openmetrics)
        response = web.Response(body=body, headers={"Content-Type": content_type, "Vary": "Accept"})
        response.enable_compression()
        return response

    async def _serve_health(self, _: web.Request) -> web.Response:
        return _json({"status": "alive", **self._health()})

    async def _serve_models(self, _: web.Request) -> web.Response:
        return _json(self._models())

    async def _serve_workers(self, _: web.Request) -> web.Response:
        return _json(self._workers())

    def _listed(self) -> list[tuple[str, str]]:
        return [*PAGES, *[(page.path, page.text) for page in self._pages if page.text]]

    async def _serve_page(self, page: Page, request: web.Request) -> web.Response:
        if page.method == "POST" and not page.open:
            refusal = await asyncio.to_thread(self._page_refusal, page, request.headers)
            if refusal is not None:
                audit.warning("%r refused: %s", request.path[:MAX_NAME], refusal.text)
                return _fault(refusal.status, refusal.text)
        body = await request.read()
        if len(body) > page.max_body:
            return _fault(413, f"the body has {len(body)} bytes; at most {page.max_body} are taken here")
        try:
            asked = Asked(dict(request.match_info), request.query, body, request.headers)
            return _json(await page.answer(asked), page.status)
        except PageFault as error:
            return _fault(error.status, str(error))

    def _page_refusal(self, page: Page, headers: Mapping[str, str]) -> Refusal | None:
        """Why a POST to the page is not let through; None: it is. Reads token files."""
        if page.token_file is None:
            return self._access.refusal(headers)
        if self._token_file is not None and self._access.refusal(headers) is None:
            return None
        return Access(page.token_file, loopback=False, key="inference_log.feedback_token_file").refusal(headers)

    async def _serve_backends(self, _: web.Request) -> web.Response:
        return _json(self._backends.views())

    async def _act(self, request: web.Request) -> web.Response:
        """Drain or undrain; what it did, as JSON."""
        refusal = await asyncio.to_thread(self._access.refusal, request.headers)
        name = request.match_info["name"]
        action: Action = "drain" if request.match_info["action"] == "drain" else "undrain"
        if refusal is not None:
            audit.warning("%s of backend %r refused: %s", action, name[:MAX_NAME], refusal.text)
            return _fault(refusal.status, refusal.text)
        try:
            model, force, wait_s = _options(request.query, await request.read())
        except ValueError as error:
            return _fault(400, str(error))
        try:
            return _json(await self._backends.act(action, name, model, force=force, wait_s=wait_s))
        except UnknownBackend as error:
            return _fault(404, str(error))
        except LastBackend as error:
            return _fault(409, str(error))


def _options(query: Mapping[str, str], body: bytes) -> tuple[str | None, bool, float]:
    """`model`, `force` and `wait_s` of an action; raises ValueError with what is wrong about them."""
    if body.strip() not in (b"", b"{}"):
        raise ValueError("the body must be empty or {}; options stand in the query: ?model=…&force=true&wait_s=30")
    if unknown := set(query) - {"model", "force", "wait_s"}:
        raise ValueError(f"'{min(unknown)[:MAX_NAME]}' is no option; there are model, force and wait_s")
    force = query.get("force", "false")
    if force not in ("true", "false"):
        raise ValueError("force is true or false")
    wait = query.get("wait_s", "0")
    if _SECONDS.fullmatch(wait) is None or float(wait) > MAX_WAIT_S:
        raise ValueError(f"wait_s is a number of seconds from 0 to {MAX_WAIT_S:g}")
    return query.get("model"), force == "true", float(wait)


async def _index(pages: Sequence[tuple[str, str]], _: web.Request) -> web.Response:
    rows = "".join(f'<li><a href="{path}">{path}</a> {html.escape(text)}</li>' for path, text in pages)
    title = "<title>Inference gateway</title><h1>Inference gateway: operations</h1>"
    page = f"<!doctype html><html lang=en>{title}<ul>{rows}</ul></html>"
    return web.Response(text=page, content_type="text/html")


def _json(value: object, status: int = 200) -> web.Response:
    body = orjson.dumps(value if not isinstance(value, tuple) else list(value))
    # Set as a header, because `content_type=` would add a charset to what contracts fix as exactly this.
    return web.Response(body=body, status=status, headers={"Content-Type": "application/json"})


def _fault(status: int, text: str) -> web.Response:
    return _json({"error": text}, status)


def _errors(pages: Sequence[tuple[str, str]]) -> Middleware:
    """Whatever goes wrong is told in JSON, and only the log sees the traceback."""

    @web.middleware
    async def catch(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPNotFound:
            known = ", ".join(path for path, _ in pages)
            return _fault(404, f"nothing is served here; this port serves {known}. Inference is on the data port")
        except web.HTTPException as error:
            return _fault(error.status, error.reason)
        except Exception:
            log.exception("operations: %s failed", request.path)
            return _fault(500, "this page could not be made; the gateway's log says why")

    return catch


def _only_known_methods(pages: Sequence[Page]) -> Middleware:
    """Middleware that refuses methods which a path does not have."""
    known = [(re.compile(re.sub(r"\{[a-z]+\}", "[^/]+", page.path)), page.method) for page in pages]

    def allowed(path: str) -> list[str]:
        if _ACTION.fullmatch(path):
            return ["POST"]
        found = {method for pattern, method in known if pattern.fullmatch(path)}
        if not found:
            return ["GET", "HEAD"]
        return [*(["GET", "HEAD"] if "GET" in found else []), *(["POST"] if "POST" in found else [])]

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        methods = allowed(request.path)
        if request.method not in methods:
            response = _fault(405, f"{request.method} is not allowed here; use {methods[0]}")
            response.headers["Allow"] = ", ".join(methods)
            return response
        return await handler(request)

    return check


def _host_check(bound: str) -> Middleware:
    """Middleware that refuses a foreign `Host` where only this machine can connect."""
    allowed = {"localhost", "127.0.0.1", "::1", bound.lower()} if is_loopback(bound) else None

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        hosts = request.headers.getall("Host", [])
        if allowed is not None and any(host_name(value) not in allowed for value in hosts):
            return _fault(403, "this Host is not served here; open the port as http://127.0.0.1 or http://localhost")
        return await handler(request)

    return check


def is_loopback(host: str) -> bool:
    """Whether a bind address can be reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(value: str) -> str:
    """The name in a `Host` header: lower case, without port, brackets of IPv6 removed."""
    if value.startswith("["):
        name, _, port = value[1:].partition("]")
        port = port.removeprefix(":")
    else:
        name, _, port = value.partition(":")
    return name.lower() if not port or port.isdecimal() else ""


def _cause(error: OSError) -> str:
    """What went wrong and what to change."""
    number = error.errno or 0
    # asyncio wraps the system's text into a longer one that repeats the address.
    text = os.strerror(number) if number > 0 else error.strerror
    if number in {errno.EADDRINUSE, errno.EACCES}:
        return f"{text}; choose another port with --metrics-port"
    return f"{text}; choose another address with --host"
