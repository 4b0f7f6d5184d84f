"""Composition root: builds every part, wires them, and decides the order in which they start and stop.

Start: log → ports bound (a taken port is known within milliseconds) → workers → models, loaded and warmed up →
ready. Stop (first SIGTERM or SIGINT): ready goes 503 → the port closes, every answer says `Connection: close` →
accepted requests are answered → workers end → exit 0. A second signal ends at once. SIGUSR2: a fresh process takes
the ports over first (app_takeover.py); this one stays ready while it answers what it has, and ends in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
import socket
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import uvloop

from gateway import app_registries, app_variants, plan, terminal, variants_metrics
from gateway.agreement_sampling import AgreementSamplers
from gateway.app_files import connections_for, raise_file_limit
from gateway.app_log import ServingLog, serving_log
from gateway.app_takeover import (
    DRAINED,
    METRICS,
    Sockets,
    inherited,
    not_handed_over,
    successor_serves,
    tell_ready,
)
from gateway.app_takeover import GRPC as GRPC_SOCKETS
from gateway.app_takeover import HTTP as HTTP_SOCKETS
from gateway.app_variants import VariantLoader
from gateway.app_views import Views, release_view
from gateway.backends.onnx import LoadOptions, OnnxPool, PoolEvent
from gateway.catalog import Catalog, ServedVersion
from gateway.config import Config, ModelEntry, ModelSettings, Server
from gateway.config_sources import secret
from gateway.config_variant_models import check_variants
from gateway.core.model import Artifact
from gateway.core.release import Happened
from gateway.core.remembered import Store
from gateway.errors import BindError, ConfigError, GatewayError, ModelError
from gateway.inference_log.handover import InferenceLog
from gateway.inference_log.segments import Layout
from gateway.ingress.body_coding import BodyCoding
from gateway.ingress.endpoints import OipApplication
from gateway.ingress.grpc_server import GrpcServer, Http2Limits
from gateway.ingress.grpc_services import GrpcServices
from gateway.ingress.http_server import HttpLimits, HttpServer
from gateway.ingress.listener import Listener, listen
from gateway.ingress.tls import GRPC, HTTP, TlsFiles, context
from gateway.loading import LoadedModel, WantedVersion
from gateway.management import Management
from gateway.management_access import Restrictions
from gateway.management_repository import Repository
from gateway.management_settings import TraceSettings
from gateway.management_tracing import Tracing
from gateway.observe import log as log_setup
from gateway.observe import metrics_releases
from gateway.observe.loop_lag import LoopLag
from gateway.observe.metrics import Metrics, Sources, build_labels
from gateway.observe.metrics_views import GrpcView, HttpView
from gateway.observe.record import Recent
from gateway.observe.request_trace import TraceFile
from gateway.operations import Operations
from gateway.operations_backends import Backends
from gateway.operations_feedback import Feedback
from gateway.operations_releases import ReleasePages
from gateway.operations_split import split_pages
from gateway.operations_webhooks import MlflowWebhook
from gateway.pipeline import Pipeline
from gateway.plan_registry import RegisteredModels
from gateway.prober import Probers
from gateway.protocol.options import ProtocolOptions
from gateway.releases import Releases
from gateway.releases_sources import Following, following
from gateway.remote_models import RemoteModels
from gateway.shared_memory import SharedMemory
from gateway.side_threads import SideThreads
from gateway.variants import Variants
from gateway.variants_sources import Target

log = logging.getLogger("gateway")

EXIT_OK: Final = 0
EXIT_AT_ONCE: Final = 1
EXIT_CONFIG: Final = 2
EXIT_BIND: Final = 3
EXIT_MODEL: Final = 4
GC_THRESHOLDS: Final = (50_000, 20, 50)
"""Requests make few cycles; collecting young objects every 700 allocations would cost more than it finds."""


T = TypeVar("T")


def run(config: Config, *, demo: bool = False, reread: Callable[[], Config] | None = None) -> int:
    """Serve until told to stop; returns the process's exit code (contracts.md).

    `reread`: makes the configuration anew, for SIGHUP; raises ConfigError.
    """
    log_setup.set_up(config.server.log_level, config.server.log_format)
    with contextlib.suppress(KeyboardInterrupt):
        return uvloop.run(Gateway(config, reread).serve(demo=demo))
    return EXIT_OK


class Gateway:
    """One front-end process: data port, operations port, catalog and worker pool."""

    def __init__(self, config: Config, reread: Callable[[], Config] | None = None) -> None:
        self.config = config
        self._reread = reread
        self._reloading = asyncio.Lock()
        cache = config.server.response_cache
        self.pipeline = Pipeline(None if cache is None else Store(cache.max_bytes, cache.ttl_s))
        self.catalog = Catalog(self.pipeline.infer)
        self.backends = Backends(self.catalog.versions)
        self.remotes = RemoteModels(config, self.catalog)
        self.remotes.drained = self.backends.drained
        self.remotes.on_discovered = lambda name: self._spawn(self.repository.discovered(name))
        self.releases = Releases(self.catalog, self._following)
        self.registered = RegisteredModels(config, self._load)
        self.repository = Repository(config, self.catalog, self._load, self.remotes, self.releases, self.registered)
        loader = VariantLoader(self._load_apart, self._registered)
        infer = partial(self.pipeline.infer, past_cache=True)
        self.variants = Variants(self.catalog, loader.find, infer, self.releases.turn, looks=loader.looks)
        self._stopping = asyncio.Event()
        self._delayed = False
        """Whether whoever asked us to stop wants the port open for a while (SIGTERM)."""
        self._draining = False
        self._handed_over = False
        """Whether a successor serves the same ports."""
        self._successor: asyncio.Task[None] | None = None
        self._loaded = False
        self._serving: tuple[Listener, Listener] | None = None
        """The data ports, once they may be handed to a successor."""
        self._starting = asyncio.Lock()
        self._started = False
        """Whether there are workers."""
        self.serving_log: ServingLog | None = None
        self.inference_log: InferenceLog | None = None
        """Where requests and events are logged; None: nowhere."""
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- life ----------------------------------------------------------------------------------------------------

    async def serve(self, *, demo: bool) -> int:
        asyncio.get_running_loop().set_default_executor(SideThreads())
        try:
            wanted = await asyncio.to_thread(self.repository.initial)
            await asyncio.to_thread(check_variants, self.config)
        except ConfigError as error:
            terminal.show_faults(error)
            return EXIT_CONFIG
        self._provide_files()
        self.serving_log = serving_log(self.config)
        self.inference_log = self.serving_log.log if self.serving_log is not None else None
        self._build()
        self._catch_signals()
        try:
            if self.serving_log is not None:
                await asyncio.to_thread(self.serving_log.start)
            sockets = inherited(os.environ)
            self.backends.adopt(os.environ.pop(DRAINED, ""))
            listener, grpc_listener = await self._listen(sockets)
            if METRICS not in sockets:
                await self.operations.start(self.config.server.host, self.config.server.metrics_port)
        except ConfigError as error:
            terminal.show_faults(error)
            await self._close_log()
            return EXIT_CONFIG
        except BindError as error:
            terminal.show_error(str(error))
            await self._close_log()
            return EXIT_BIND
        try:
            return await self._serve(wanted, listener, grpc_listener, sockets.get(METRICS, ()), demo=demo)
        finally:
            await self.operations.close()
            await self.remotes.close()
            await self._close_log()
            await self.pool.close()

    async def _close_log(self) -> None:
        if self.serving_log is not None:
            await self.serving_log.close()

    def _provide_files(self) -> None:
        """Have as many descriptors as we may, and no more connections than there are descriptors for."""
        limit = raise_file_limit()
        self.max_connections = connections_for(limit, self.config.server.limits.max_connections)
        if self.max_connections < self.config.server.limits.max_connections:
            log.warning(
                "at most %d connections are taken on each data port, and not %d (server.limits.max_connections): the "
                "system allows this process %d open files; raise that limit (ulimit -n, LimitNOFILE=)",
                self.max_connections, self.config.server.limits.max_connections, limit,
            )  # fmt: skip

    def _build(self) -> None:
        server = self.config.server
        self.pool = OnnxPool(
            workers=server.worker_count,
            intra_op_threads=server.intra_op_threads,
            on_event=self._pool_event,
        )
        settings = TraceSettings(server.trace.file or "")
        file = TraceFile(Path(server.trace.file), server.trace.max_bytes) if server.trace.file else None
        self.tracing = Tracing(self.catalog, settings, file)
        memory = SharedMemory(server.limits.max_body_bytes) if server.client_shared_memory else None
        self.catalog.on_ready = self._model_ready
        self.catalog.on_retired = self._model_retired
        self.releases.on_happened = self._release_happened
        self.probers = Probers(server.probe_interval_s, random.Random())  # noqa: S311  # jitter
        self.agreement = AgreementSamplers(random.Random())  # noqa: S311  # a sample
        self.views = Views(self.catalog.versions, self.agreement)
        self.repository.forgotten = settings.forget
        self.management = Management(
            self.catalog,
            self.repository,
            self.obstacle,
            server_name=server.protocol.server_name,
            trace=settings,
            restrictions=Restrictions({api: (r.header, r.value) for r in server.restricted_apis for api in r.apis}),
            memory=memory,
        )
        options = server.protocol.options()
        if memory is not None:
            options = replace(options, memory=memory)
        limits = server.limits
        bodies = BodyCoding(limits.max_body_bytes, server.compression.min_bytes, server.compression.level)
        application = OipApplication(
            self.catalog, self.pipeline, plan.manifest_of, self.management, options, bodies, self.inference_log
        )
        self.http = HttpServer(
            application,
            HttpLimits(
                max_body_bytes=limits.max_body_bytes,
                max_held_bytes=limits.max_held_bytes,
                max_connections=self.max_connections,
                max_connections_per_address=limits.max_connections_per_address,
                header_timeout_s=limits.header_timeout_s,
                idle_timeout_s=limits.idle_timeout_s,
                write_timeout_s=limits.write_timeout_s,
                min_body_rate_bytes_s=limits.min_body_rate_bytes_s,
            ),
            refused=application.refused,
        )
        self._build_grpc(options)
        self.loop_lag = LoopLag(self._requests)
        sources = Sources(
            self.views.for_metrics, self._http_view, {"0": self.loop_lag.histogram}, build_labels(), self._grpc_view,
            more=[
                lambda: metrics_releases.families(map(release_view, self.releases.statistics())),
                lambda: variants_metrics.families(self.variants.statuses()),
                lambda: app_registries.families(self.registered),
                lambda: self.serving_log.families() if self.serving_log is not None else [],
            ],
        )  # fmt: skip
        token_file = self.config.base / server.admin_token_file if server.admin_token_file is not None else None
        self.operations = Operations(
            Metrics(sources, time.monotonic),
            self.views.for_people,
            self._worker_statuses,
            self.backends,
            token_file,
            health=self._health,
            pages=[
                *ReleasePages(self.releases).pages(),
                MlflowWebhook(self.releases, self._webhook_secret).page(),
                *split_pages(self.variants, self._promote),
                self._feedback().page(),
            ],
        )

    def _feedback(self) -> Feedback:
        section = self.config.inference_log
        file = section.feedback_token_file if section is not None else None
        return Feedback(
            self.inference_log,
            lambda: time.time_ns() // 1000,
            lambda: uuid.uuid4().hex,
            self.config.base / file if file is not None else None,
        )

    def _build_grpc(self, options: ProtocolOptions) -> None:
        server, limits = self.config.server, self.config.server.limits
        self.services = GrpcServices(
            self.catalog, self.pipeline, self.management, options, reflected=server.grpc_reflection,
            log=self.inference_log,
        )  # fmt: skip
        self.grpc = GrpcServer(
            self.services,
            Http2Limits(
                max_held_bytes=limits.max_held_bytes,
                max_connections=self.max_connections,
                max_connections_per_address=limits.max_connections_per_address,
                header_timeout_s=limits.header_timeout_s,
                write_timeout_s=limits.write_timeout_s,
                min_body_rate_bytes_s=limits.min_body_rate_bytes_s,
            ),
            held=self.http.held,
            compression=server.compression.grpc,
            refused=self.services.refused,
        )

    async def _listen(self, sockets: Sockets) -> tuple[Listener, Listener]:
        """Bind the two data ports, as far as they were not inherited."""
        server, base = self.config.server, self.config.base
        http_tls = grpc_tls = None
        if server.tls is not None:
            client_ca = base / server.tls.client_ca if server.tls.client_ca is not None else None
            files = TlsFiles(base / server.tls.cert, base / server.tls.key, client_ca)
            http_tls, grpc_tls = context(files, HTTP), context(files, GRPC)
        listener = await listen(
            server.host, server.http_port, self.http, tls=http_tls, sockets=sockets.get(HTTP_SOCKETS, ())
        )
        grpc = await listen(
            server.host,
            server.grpc_port,
            self.grpc,
            tls=grpc_tls,
            option="--grpc-port",
            sockets=sockets.get(GRPC_SOCKETS, ()),
        )
        return listener, grpc

    async def _serve(
        self,
        wanted: Sequence[WantedVersion],
        listener: Listener,
        grpc_listener: Listener,
        metrics_sockets: Sequence[socket.socket],
        *,
        demo: bool,
    ) -> int:
        code = await self._load_models(wanted)
        if code is not None:
            return code
        await self.releases.adopt(self.catalog.names(), "start")
        self._loaded = self.repository.open = True
        if self.serving_log is not None:
            self.serving_log.start_companions()
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        self.loop_lag.start()
        self._spawn(self.repository.poll_for_ever())
        self._spawn(app_registries.keep_cache_small(self.registered, self.catalog, self._logged_digests))
        if self.remotes.configured or self._reread is not None:
            self._spawn(self.remotes.follow())
        await self.remotes.reconcile()
        await app_variants.start(self.variants, self.config, self._stopping, self._spawn)
        # Sockets that were handed over: nothing is accepted before it can be answered.
        for inherited_listener in (listener, grpc_listener):
            await inherited_listener.start()
        if metrics_sockets:
            await self.operations.start(self.config.server.host, self.config.server.metrics_port, metrics_sockets)
        terminal.show_started(
            self.catalog.versions(),
            self.config.server.host,
            listener.port,
            self.operations.port,
            grpc_port=grpc_listener.port,
            encrypted=self.config.server.tls is not None,
            plain=self.config.server.log_format == "json",
            loadable=await asyncio.to_thread(self.repository.loadable),
        )
        if demo:
            self._spawn(self._show_demo(listener.port))
        self._serving = (listener, grpc_listener)
        tell_ready(os.environ)
        await self._stopping.wait()
        await self._drain(listener, grpc_listener)
        return EXIT_OK

    async def _show_demo(self, port: int) -> None:
        try:
            await asyncio.to_thread(terminal.show_demo, self.config.server.host, port, self.operations.port)
        except (OSError, ValueError) as error:  # it is stopping, or a proxy stands between; serving goes on
            terminal.show_error(f"the demo could not ask its models: {error}")

    async def _load_models(self, wanted: Sequence[WantedVersion]) -> int | None:
        """Everything that is served from the start; the exit code if that ended the start, for good or ill."""
        try:
            if wanted or not self.remotes.configured:
                await self._start_pool()
            everything = await self._until_stopped(self._with_remote(wanted))
        except ConfigError as error:
            terminal.show_faults(error)
            return EXIT_CONFIG
        except GatewayError as error:
            terminal.show_error(str(error))
            return EXIT_MODEL
        if everything is None:
            return EXIT_OK
        with terminal.progress(len(everything)) as advance:
            self.registered.told = advance.fetching
            failed = await self._until_stopped(self.catalog.load_all(everything, on_loaded=advance))
        if failed is None:
            return EXIT_OK
        if failed:
            terminal.show_not_loaded(failed, plain=self.config.server.log_format == "json")
            return EXIT_MODEL
        return None

    async def _start_pool(self) -> None:
        """Start the workers, once: nothing needs them while all models are on remote servers. Raises NotReady."""
        async with self._starting:
            if not self._started:
                await self.pool.start()
                self._started = True

    async def _with_remote(self, wanted: Sequence[WantedVersion]) -> list[WantedVersion]:
        """`wanted`, and what is served from registries and remote servers.

        Raises:
            ConfigError: a model is served from two places, or from nowhere.
            LoadFailed: nobody knows what a registry reference means.
            ModelError: there is nothing at all.
        """
        wanted = [*wanted, *await self.repository.initial_registered()]
        if not self.remotes.configured:
            return list(wanted)
        await self.remotes.open()
        found = [*wanted, *await self.repository.initial_remote()]
        if not found and self.config.server.model_control != "explicit":
            raise ModelError(f"there is nothing to serve: {self.remotes.obstacle()}")
        return found

    async def _until_stopped(self, loading: Coroutine[Any, Any, T]) -> T | None:
        """What `loading` comes to; None if a signal came first."""
        task = asyncio.ensure_future(loading)
        stopped = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if task.done():
            return task.result()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return None

    async def _drain(self, *listeners: Listener) -> None:
        server = self.config.server
        if self._successor is not None and not self._handed_over:
            self._successor.cancel()
        self._draining = not self._handed_over  # the ports serve on, and may be asked on a connection that we have
        self.repository.open = False
        await self.releases.close()
        self.variants.close()
        if self._delayed:
            log.info("stopping: not ready any more, still serving for %g s", server.drain_delay_s)
            await asyncio.sleep(server.drain_delay_s)
        log.info("stopping: answering %d accepted requests", self.pending())
        for listener in listeners:
            listener.close()
        deadline = time.monotonic() + server.drain_timeout_s
        self.services.drain()
        # Once a successor serves there is no hurry: clients learn of the end from their next answer.
        idle_s = server.drain_timeout_s / 2 if self._handed_over else 0.0
        drains = (self.http.drain(server.drain_timeout_s - idle_s, idle_s), self.grpc.drain(server.drain_timeout_s))
        unanswered = sum(await asyncio.gather(*drains))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self.catalog.drain()
        if unanswered:
            log.warning("%d requests were still unanswered after %g s", unanswered, server.drain_timeout_s)
        await self.probers.close()
        self.catalog.stop()
        await self.tracing.close()
        self.loop_lag.close()
        log.info("stopped")

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._signalled, self.config.server.drain_delay_s > 0)
        loop.add_signal_handler(signal.SIGINT, self._signalled, False)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._spawn(self._reload()))
        loop.add_signal_handler(signal.SIGUSR2, self._asked_to_hand_over)

    def _asked_to_hand_over(self) -> None:
        if self._serving is None:
            log.warning("SIGUSR2: not yet serving, nothing to hand over")
        else:
            self._take_over(*self._serving)

    def _take_over(self, listener: Listener, grpc_listener: Listener) -> None:
        """SIGUSR2: have a successor take over the ports; see app_takeover.py."""
        if self._stopping.is_set() or self._successor is not None:
            log.warning("SIGUSR2: a successor is being started, or this process is ending, already")
            return
        for loss in not_handed_over(self.releases.statistics(), self.variants.statuses().values()):
            log.warning("SIGUSR2: %s", loss)
        fds = {HTTP_SOCKETS: listener.fds(), GRPC_SOCKETS: grpc_listener.fds(), METRICS: self.operations.fds()}
        self._successor = asyncio.ensure_future(self._hand_over(fds))

    async def _hand_over(self, fds: Mapping[str, Sequence[int]]) -> None:
        serves = await successor_serves(fds, self.backends.orders_as_text())
        self._successor = None
        if not serves:
            return
        self._handed_over = True
        await self.operations.stop_listening()
        self._stopping.set()

    async def _reload(self) -> None:
        """SIGHUP: take over the models of the configuration as it is now; a bad one changes nothing."""
        if self._reread is None:
            log.warning("SIGHUP: there is no configuration to read again")
            return
        async with self._reloading:
            try:
                config = await asyncio.to_thread(self._reread)
                await asyncio.to_thread(check_variants, config)
                failed = await self.repository.reload(config)
                self.backends.reloaded(self.remotes.server_names())
            except GatewayError as error:
                log.error("SIGHUP: nothing was changed: %s", error)
                return
            await self.releases.refresh_all("SIGHUP")
            try:
                await self.variants.configure(config)
            except ConfigError as error:  # the files were others a moment ago
                log.error("SIGHUP: canaries and shadows stay as they were: %s", error)
            await self.variants.settle()
        if changed := _changed(self.config.server, config.server):
            log.warning("SIGHUP: changed too, but takes a restart: %s", ", ".join(changed))
        if self.config.server.model_control == "explicit":
            log.info("SIGHUP: models are loaded from where the configuration says now; what is loaded stays as it is")
        elif failed:
            log.error("SIGHUP: the models of the configuration are served, but for %s: see above", ", ".join(failed))
        else:
            log.info("SIGHUP: the models of the configuration are served")

    def _signalled(self, delayed: bool) -> None:
        if self._handed_over and not self._delayed:
            self._delayed = True
            log.info("stopping already: a successor serves")
            return
        if self._stopping.is_set():
            log.warning("stopping at once")
            os._exit(EXIT_AT_ONCE)  # the workers see the end of their stream and follow
        self._delayed = delayed
        self._stopping.set()

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- what the parts ask of each other --------------------------------------------------------------------------

    def obstacle(self) -> str:
        """Why this server is not ready, in words; empty where it is."""
        if not self._loaded:
            return "models are still being loaded"
        if self._draining:
            return "the server is stopping"
        if self.serving_log is not None and any(version.log_blocked for version in self.catalog.versions()):
            return "the inference log has no room"
        return self.catalog.obstacle()

    def _health(self) -> dict[str, Any]:
        """What `/healthz` says besides that the process answers."""
        obstacle = self.obstacle()
        readiness = {"ready": False, "reason": obstacle} if obstacle else {"ready": True}
        return readiness | (self.serving_log.health() if self.serving_log is not None else {})

    def _requests(self) -> float:
        return float(self.http.statistics().requests + self.grpc.statistics().requests)

    def pending(self) -> int:
        return sum(v.scheduler.pending for v in self.catalog.versions() if v.scheduler is not None)

    def _model_ready(self, version: ServedVersion) -> None:
        """A version is loaded and about to serve."""
        if self.serving_log is not None:
            self.serving_log.attach(version)
        self.tracing.attach(version)
        self.remotes.attach(version)
        self.backends.attach(version)
        self.probers.attach(version)
        self.agreement.attach(version)
        if self.config.server.metrics.nv_summaries and version.statistics.recent is None:
            version.statistics.recent = Recent()

    def _model_retired(self, version: ServedVersion) -> None:
        """A version takes no new callers."""
        self.probers.detach(version)
        self.agreement.detach(version)

    def _release_happened(self, name: str, happened: Happened) -> None:
        """A model's releases changed, or were not allowed to: the inference log keeps that with the predictions."""
        if self.inference_log is not None:
            details = asdict(happened)
            kind, version = details.pop("outcome"), happened.to_version or happened.from_version
            self.inference_log.event("lifecycle", kind, name, version, details)

    def _pool_event(self, event: PoolEvent) -> None:
        if event.kind == "model_failed":
            log.error("model %s version %s failed: %s", event.model, event.version, event.text)
            self.catalog.failed(event.model, event.version, event.text, event.subject)
        elif event.kind == "model_recovered":
            log.info("model %s version %s is back", event.model, event.version)
            self.catalog.recovered(event.model, event.version, event.subject)
        elif event.kind == "worker_died":
            log.warning("worker %s (pid %d) died: %s; it is started again", event.worker, event.pid, event.text)
        elif event.kind == "worker_ready" and event.generation > 1:
            log.info("worker %s is back (pid %d)", event.worker, event.pid)

    def _webhook_secret(self) -> str | None:
        """What MLflow signs its events with; may block. None: none are taken."""
        config = self.repository.config
        place = config.registries.mlflow.webhook_secret if config.registries.mlflow is not None else None
        return None if place is None else secret(place, config.base, config.environ)()

    def _following(self, name: str) -> Following:
        """How a model is followed; runs in a thread."""
        return following(self.repository.config, self._load, name, self.registered)

    async def _load(self, artifact: Artifact, settings: ModelSettings) -> LoadedModel:
        await self._start_pool()
        options = LoadOptions(settings.instances, settings.dedicated, settings.intra_op_threads)
        return self.remotes.mixed(artifact.name, await self.pool.load(artifact, options))

    async def _load_apart(self, artifact: Artifact, options: LoadOptions) -> LoadedModel:
        await self._start_pool()
        return await self.pool.load(artifact, options)

    async def _promote(self, name: str, version: ServedVersion) -> object:
        """The canary takes over; a browser or the command line asked."""
        async with self.releases.turn(name):
            return await self.releases.promote(name, [version], by="operator")

    def _registered(self, config: Config, entry: ModelEntry, name: str, load: plan.Load) -> Target:
        """What a variant's reference means, from its registry; runs in a thread."""
        settled = self.registered.registries.settle(entry.source)
        wanted = self.registered.release(config, entry, settled, load, name)
        return Target(settled.resolved.immutable_id, wanted, settled.resolved.mutable or bool(settled.stale))

    def _logged_digests(self) -> set[str]:
        """Digests of the models that sealed parts of the inference log refer to. Runs in a thread."""
        section = self.config.inference_log
        if section is None:
            return set()
        commits = Layout(self.config.base / section.directory).commits()
        return {digest for commit in commits.values() for digest in commit.digests}

    def _http_view(self) -> HttpView:
        statistics = self.http.statistics()
        return HttpView(
            statistics.open_connections,
            statistics.held_bytes,
            statistics.rejected,
            statistics.requests,
            statistics.aborted,
        )

    def _grpc_view(self) -> GrpcView:
        statistics = self.grpc.statistics()
        return GrpcView(
            statistics.open_connections,
            statistics.rejected,
            statistics.requests,
            statistics.aborted,
            statistics.expired,
        )

    def _worker_statuses(self) -> Sequence[object]:
        return self.pool.statistics().workers


def _changed(before: Server, now: Server) -> list[str]:
    """The keys of `server` that differ, dotted."""
    return [f"server.{key}" for key in type(before).model_fields if getattr(before, key) != getattr(now, key)]
