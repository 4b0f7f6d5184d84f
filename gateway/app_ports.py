"""The two data ports of one process: what their servers are told, where they listen, how they end.

Rules:
  * both ports have one management surface, one set of options and one budget of held bytes: whatever is true on one is
    true on the other;
  * both ports are bound, or none serves; a port that is taken is known before anything is loaded;
  * inherited sockets accept nothing before `Listeners.accept`: connections can wait in them for models to be loaded;
  * the end has two steps: `Listeners.close` takes no more connections, `drain` answers what there is.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, replace

from gateway import plan
from gateway.app_models import Models
from gateway.app_takeover import GRPC as GRPC_SOCKETS
from gateway.app_takeover import HTTP as HTTP_SOCKETS
from gateway.app_takeover import Sockets
from gateway.config import Config
from gateway.errors import BindError
from gateway.ingress.body_coding import BodyCoding
from gateway.ingress.endpoints import OipApplication
from gateway.ingress.grpc_server import GrpcServer, Http2Limits
from gateway.ingress.grpc_services import GrpcServices
from gateway.ingress.http_server import HttpLimits, HttpServer
from gateway.ingress.listener import Listener, listen
from gateway.ingress.tls import GRPC, HTTP, TlsFiles, context
from gateway.management import Management
from gateway.management_access import Restrictions
from gateway.observe.metrics_views import GrpcView, HttpView
from gateway.protocol.options import ProtocolOptions
from gateway.shared_memory import SharedMemory


@dataclass(frozen=True, slots=True)
class Listeners:
    """What is listened on."""

    http: Listener
    grpc: Listener

    async def accept(self) -> None:
        """Take connections; harmless where they are taken already."""
        await self.http.start()
        await self.grpc.start()

    def fds(self) -> dict[str, list[int]]:
        """Descriptors by the name that a successor knows them by."""
        return {HTTP_SOCKETS: self.http.fds(), GRPC_SOCKETS: self.grpc.fds()}

    def close(self) -> None:
        """Take no connection any more; those that are there live on."""
        self.http.close()
        self.grpc.close()


class DataPorts:
    """The HTTP and the gRPC server of one process."""

    def __init__(self, config: Config, models: Models, obstacle: Callable[[], str], max_connections: int) -> None:
        """`obstacle`: why the whole server is not ready, empty if it is. `max_connections`: on each port."""
        self._config = config
        self._models = models
        self._max_connections = max_connections
        server = config.server
        memory = SharedMemory(server.limits.max_body_bytes) if server.client_shared_memory else None
        management = Management(
            models.catalog,
            models.repository,
            obstacle,
            server_name=server.protocol.server_name,
            trace=models.trace_settings,
            restrictions=Restrictions({api: (r.header, r.value) for r in server.restricted_apis for api in r.apis}),
            memory=memory,
        )
        options = server.protocol.options()
        if memory is not None:
            options = replace(options, memory=memory)
        self.http = self._http_server(management, options)
        self._services = GrpcServices(
            models.catalog, models.pipeline, management, options, reflected=server.grpc_reflection,
            log=models.inference_log,
        )  # fmt: skip
        self.grpc = self._grpc_server()

    def __repr__(self) -> str:
        return f"<DataPorts http={self.http!r} grpc={self.grpc!r}>"

    def _http_server(self, management: Management, options: ProtocolOptions) -> HttpServer:
        models, limits, coding = self._models, self._config.server.limits, self._config.server.compression
        bodies = BodyCoding(limits.max_body_bytes, coding.min_bytes, coding.level)
        application = OipApplication(
            models.catalog, models.pipeline, plan.manifest_of, management, options, bodies, models.inference_log
        )
        return HttpServer(
            application,
            HttpLimits(
                max_body_bytes=limits.max_body_bytes,
                max_held_bytes=limits.max_held_bytes,
                max_connections=self._max_connections,
                max_connections_per_address=limits.max_connections_per_address,
                header_timeout_s=limits.header_timeout_s,
                idle_timeout_s=limits.idle_timeout_s,
                write_timeout_s=limits.write_timeout_s,
                min_body_rate_bytes_s=limits.min_body_rate_bytes_s,
            ),
            refused=application.refused,
        )

    def _grpc_server(self) -> GrpcServer:
        limits = self._config.server.limits
        return GrpcServer(
            self._services,
            Http2Limits(
                max_held_bytes=limits.max_held_bytes,
                max_connections=self._max_connections,
                max_connections_per_address=limits.max_connections_per_address,
                header_timeout_s=limits.header_timeout_s,
                write_timeout_s=limits.write_timeout_s,
                min_body_rate_bytes_s=limits.min_body_rate_bytes_s,
            ),
            held=self.http.held,
            compression=self._config.server.compression.grpc,
            refused=self._services.refused,
        )

    # -- life ----------------------------------------------------------------------------------------------------

    async def listen(self, sockets: Sockets) -> Listeners:
        """Bind both ports, as far as they were not inherited.

        Raises:
            BindError: an address cannot be listened on.
            ConfigError: a certificate or a key cannot be used.
        """
        server = self._config.server
        http_tls, grpc_tls = self._contexts()
        http = await listen(
            server.host, server.http_port, self.http, tls=http_tls, sockets=sockets.get(HTTP_SOCKETS, ())
        )
        try:
            grpc = await listen(
                server.host,
                server.grpc_port,
                self.grpc,
                tls=grpc_tls,
                option="--grpc-port",
                sockets=sockets.get(GRPC_SOCKETS, ()),
            )
        except BindError:
            http.close()
            raise
        return Listeners(http, grpc)

    def _contexts(self) -> tuple[ssl.SSLContext | None, ssl.SSLContext | None]:
        """For HTTP and gRPC; None: connections are not encrypted. Raises ConfigError."""
        tls, base = self._config.server.tls, self._config.base
        if tls is None:
            return None, None
        files = TlsFiles(base / tls.cert, base / tls.key, base / tls.client_ca if tls.client_ca is not None else None)
        return context(files, HTTP), context(files, GRPC)

    async def drain(self, timeout_s: float, idle_s: float) -> int:
        """Answer every request that was accepted, for `timeout_s` seconds at most; returns how many were not answered.

        `idle_s`: how long an idle HTTP connection may wait for one more request, whose answer tells its client of the
        end.
        """
        self._services.drain()
        drains = (self.http.drain(timeout_s - idle_s, idle_s), self.grpc.drain(timeout_s))
        return sum(await asyncio.gather(*drains))

    # -- what is told of them --------------------------------------------------------------------------------------

    def requests(self) -> float:
        """Requests of both ports since the start."""
        return float(self.http.statistics().requests + self.grpc.statistics().requests)

    def http_view(self) -> HttpView:
        statistics = self.http.statistics()
        return HttpView(
            statistics.open_connections,
            statistics.held_bytes,
            statistics.rejected,
            statistics.requests,
            statistics.aborted,
        )

    def grpc_view(self) -> GrpcView:
        statistics = self.grpc.statistics()
        return GrpcView(
            statistics.open_connections,
            statistics.rejected,
            statistics.requests,
            statistics.aborted,
            statistics.expired,
        )
