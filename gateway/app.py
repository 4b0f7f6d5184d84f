"""Composition root: one serving process, from its start to its end.

Start: log → ports bound (a taken port is known within milliseconds) → workers → models, loaded and warmed up →
ready. Stop (first SIGTERM or SIGINT): ready goes 503 → the port closes, every answer says `Connection: close` →
accepted requests are answered → workers end → exit 0. A second signal ends at once. SIGHUP: models as the configuration
says now (app_reload.py). SIGUSR2: a fresh process takes the ports over first (app_takeover.py); this one stays ready
while it answers what it has, and ends in the same way.

What there is to start and stop is built elsewhere: the models and all that has to do with them in app_models.py, the
data ports in app_ports.py, the operations port in app_operations.py, the inference log in app_log.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, TypeVar

import uvloop

from gateway import terminal
from gateway.app_files import connections_for, raise_file_limit
from gateway.app_log import ServingLog, serving_log
from gateway.app_models import Models
from gateway.app_operations import operations_port
from gateway.app_ports import DataPorts, Listeners
from gateway.app_reload import Reloading
from gateway.app_takeover import DRAINED, METRICS, inherited, not_handed_over, successor_serves, tell_ready
from gateway.config import Config
from gateway.config_variant_models import check_variants
from gateway.errors import BindError, ConfigError, GatewayError
from gateway.loading import WantedVersion
from gateway.observe import log as log_setup
from gateway.observe.loop_lag import LoopLag
from gateway.side_threads import SideThreads

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
    """One front-end process: models, data ports, operations port, and the signals that it obeys."""

    def __init__(self, config: Config, reread: Callable[[], Config] | None = None) -> None:
        self.config = config
        self.models = Models(config, self._spawn)
        self.serving_log: ServingLog | None = None
        """Where requests and events are logged; None: nowhere."""
        self._reloading = Reloading(config, reread, self.models)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loaded = False
        self._serving: Listeners | None = None
        """The data ports, once they may be handed to a successor."""
        self._stopping = asyncio.Event()
        self._delayed = False
        """Whether whoever asked us to stop wants the port open for a while (SIGTERM)."""
        self._draining = False
        self._successor: asyncio.Task[None] | None = None
        self._handed_over = False
        """Whether a successor serves the same ports."""

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- start ---------------------------------------------------------------------------------------------------

    async def serve(self, *, demo: bool) -> int:
        asyncio.get_running_loop().set_default_executor(SideThreads())
        try:
            wanted = await asyncio.to_thread(self.models.repository.initial)
            await asyncio.to_thread(check_variants, self.config)
        except ConfigError as error:
            terminal.show_faults(error)
            return EXIT_CONFIG
        self._build()
        self._catch_signals()
        try:
            if self.serving_log is not None:
                await asyncio.to_thread(self.serving_log.start)
            sockets = inherited(os.environ)
            self.models.backends.adopt(os.environ.pop(DRAINED, ""))
            listeners = await self.ports.listen(sockets)
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
            return await self._serve(wanted, listeners, sockets.get(METRICS, ()), demo=demo)
        finally:
            await self.operations.close()
            await self.models.remotes.close()
            await self._close_log()
            await self.models.pool.close()

    async def _close_log(self) -> None:
        if self.serving_log is not None:
            await self.serving_log.close()

    def _build(self) -> None:
        """Make everything that a configuration without faults asks for; nothing of it starts here."""
        max_connections = self._provide_files()
        self.serving_log = self.models.serving_log = serving_log(self.config)
        self.ports = DataPorts(self.config, self.models, self.obstacle, max_connections)
        self.loop_lag = LoopLag(self.ports.requests)
        self.operations = operations_port(self.config, self.models, self.ports, self.loop_lag, self._health)

    def _provide_files(self) -> int:
        """Have as many descriptors as we may; returns how many connections each data port may have with them."""
        wanted, limit = self.config.server.limits.max_connections, raise_file_limit()
        possible = connections_for(limit, wanted)
        if possible < wanted:
            log.warning(
                "at most %d connections are taken on each data port, and not %d (server.limits.max_connections): the "
                "system allows this process %d open files; raise that limit (ulimit -n, LimitNOFILE=)",
                possible, wanted, limit,
            )  # fmt: skip
        return possible

    async def _serve(
        self,
        wanted: Sequence[WantedVersion],
        listeners: Listeners,
        metrics_sockets: Sequence[socket.socket],
        *,
        demo: bool,
    ) -> int:
        """Load `wanted`, serve until told to stop, and stop; returns the exit code."""
        code = await self._load_models(wanted)
        if code is not None:
            return code
        await self._go_on()
        # Sockets that were handed over: nothing is accepted before it can be answered.
        await listeners.accept()
        if metrics_sockets:
            await self.operations.start(self.config.server.host, self.config.server.metrics_port, metrics_sockets)
        terminal.show_started(
            self.models.catalog.versions(),
            self.config.server.host,
            listeners.http.port,
            self.operations.port,
            grpc_port=listeners.grpc.port,
            encrypted=self.config.server.tls is not None,
            plain=self.config.server.log_format == "json",
            loadable=await asyncio.to_thread(self.models.repository.loadable),
        )
        if demo:
            self._spawn(self._show_demo(listeners.http.port))
        self._serving = listeners
        tell_ready(os.environ)
        await self._stopping.wait()
        await self._drain(listeners)
        return EXIT_OK

    async def _load_models(self, wanted: Sequence[WantedVersion]) -> int | None:
        """Everything that is served from the start; the exit code if that ended the start, for good or ill."""
        models = self.models
        try:
            if wanted or not models.remotes.configured:
                await models.start_workers()
            everything = await self._until_stopped(models.complete(wanted))
        except ConfigError as error:
            terminal.show_faults(error)
            return EXIT_CONFIG
        except GatewayError as error:
            terminal.show_error(str(error))
            return EXIT_MODEL
        if everything is None:
            return EXIT_OK
        with terminal.progress(len(everything)) as advance:
            models.registered.told = advance.fetching
            failed = await self._until_stopped(models.catalog.load_all(everything, on_loaded=advance))
        if failed is None:
            return EXIT_OK
        if failed:
            terminal.show_not_loaded(failed, plain=self.config.server.log_format == "json")
            return EXIT_MODEL
        return None

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

    async def _go_on(self) -> None:
        """Everything is loaded: ready from here on, and whatever runs beside the requests begins."""
        await self.models.releases.adopt(self.models.catalog.names(), "start")
        self._loaded = self.models.repository.open = True
        if self.serving_log is not None:
            self.serving_log.start_companions()
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        self.loop_lag.start()
        await self.models.go_on(self._stopping, rereads=self._reloading.possible)

    async def _show_demo(self, port: int) -> None:
        try:
            await asyncio.to_thread(terminal.show_demo, self.config.server.host, port, self.operations.port)
        except (OSError, ValueError) as error:  # it is stopping, or a proxy stands between; serving goes on
            terminal.show_error(f"the demo could not ask its models: {error}")

    # -- stop ----------------------------------------------------------------------------------------------------

    async def _drain(self, listeners: Listeners) -> None:
        server = self.config.server
        if self._successor is not None and not self._handed_over:
            self._successor.cancel()
        self._draining = not self._handed_over  # the ports serve on, and may be asked on a connection that we have
        await self.models.freeze()
        if self._delayed:
            log.info("stopping: not ready any more, still serving for %g s", server.drain_delay_s)
            await asyncio.sleep(server.drain_delay_s)
        log.info("stopping: answering %d accepted requests", self.models.pending())
        listeners.close()
        deadline = time.monotonic() + server.drain_timeout_s
        # Once a successor serves there is no hurry: clients learn of the end from their next answer.
        idle_s = server.drain_timeout_s / 2 if self._handed_over else 0.0
        unanswered = await self.ports.drain(server.drain_timeout_s, idle_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self.models.catalog.drain()
        if unanswered:
            log.warning("%d requests were still unanswered after %g s", unanswered, server.drain_timeout_s)
        await self.models.stop()
        self.loop_lag.close()
        log.info("stopped")

    # -- signals -------------------------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._signalled, self.config.server.drain_delay_s > 0)
        loop.add_signal_handler(signal.SIGINT, self._signalled, False)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._spawn(self._reloading.reload()))
        loop.add_signal_handler(signal.SIGUSR2, self._asked_to_hand_over)

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

    def _asked_to_hand_over(self) -> None:
        """SIGUSR2: have a successor take over the ports; see app_takeover.py."""
        if self._serving is None:
            log.warning("SIGUSR2: not yet serving, nothing to hand over")
            return
        if self._stopping.is_set() or self._successor is not None:
            log.warning("SIGUSR2: a successor is being started, or this process is ending, already")
            return
        for loss in not_handed_over(self.models.releases.statistics(), self.models.variants.statuses().values()):
            log.warning("SIGUSR2: %s", loss)
        fds = {**self._serving.fds(), METRICS: self.operations.fds()}
        self._successor = asyncio.ensure_future(self._hand_over(fds))

    async def _hand_over(self, fds: Mapping[str, Sequence[int]]) -> None:
        serves = await successor_serves(fds, self.models.backends.orders_as_text())
        self._successor = None
        if not serves:
            return
        self._handed_over = True
        await self.operations.stop_listening()
        self._stopping.set()

    # -- what is told of it ----------------------------------------------------------------------------------------

    def obstacle(self) -> str:
        """Why this server is not ready, in words; empty where it is."""
        if not self._loaded:
            return "models are still being loaded"
        if self._draining:
            return "the server is stopping"
        if self.serving_log is not None and any(version.log_blocked for version in self.models.catalog.versions()):
            return "the inference log has no room"
        return self.models.catalog.obstacle()

    def _health(self) -> dict[str, Any]:
        """What `/healthz` says besides that the process answers."""
        obstacle = self.obstacle()
        readiness = {"ready": False, "reason": obstacle} if obstacle else {"ready": True}
        return readiness | (self.serving_log.health() if self.serving_log is not None else {})
