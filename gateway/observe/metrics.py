"""From plain counters to the metric families of `/metrics`: names, types, labels, and what each is read from.

The families of the gateway and Triton's `nv_inference_*` are written directly (observe/exposition.py):
prometheus_client would append `_total` to Triton's counters, and one object per sample would hold up the
event loop at 500 models. What is standard about any process (`process_*`, `python_*`) comes from
prometheus_client's collectors. Chapters of their own: Triton's families (metrics_triton.py) and what is known of
backends and failures (metrics_backends.py).

Rules: a scrape folds and reads, it changes nothing else. `Scrape.add` does one model version, so that whoever
scrapes can give way to requests between two. Families without a version label are summed over a model's
versions. Labels are names from the configuration, protocols, codes, reasons and states: nothing a client can
invent.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

import gateway
from gateway.observe import log, metrics_backends, metrics_triton
from gateway.observe.exposition import OPENMETRICS, TEXT, Family, labels, render
from gateway.observe.host import Host, HostUsage
from gateway.observe.metrics_table import Table
from gateway.observe.metrics_views import GrpcView, HttpView, ModelView
from gateway.observe.record import Histogram


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a scrape reads from; each is called once per scrape."""

    models: Callable[[], Iterable[ModelView]]
    http: Callable[[], HttpView]
    loop_lag: Mapping[str, Histogram]
    """Event-loop lag in seconds by process name."""
    build: Mapping[str, str]
    """Labels of `gateway_build_info`, see `build_labels`."""
    grpc: Callable[[], GrpcView] | None = None
    more: Sequence[Callable[[], Iterable[Family]]] = ()
    """Families of other parts of the gateway, whole; their names begin with `gateway_`."""


def build_labels() -> dict[str, str]:
    """Versions of the gateway, Python and onnxruntime (read from its package metadata, not imported)."""
    try:
        onnxruntime = metadata.version("onnxruntime")
    except metadata.PackageNotFoundError:
        onnxruntime = "none"
    return {
        "version": gateway.__version__,
        "python": platform.python_version(),
        "onnxruntime": onnxruntime,
    }


def _only_with_samples(name: str) -> bool:
    """Families that are left out whole while nothing has a sample of them."""
    return name.startswith("nv_cache_") or name.endswith("_summary_us")


class Metrics:
    """What `/metrics` serves; one for the process."""

    def __init__(self, sources: Sources, clock: Callable[[], float]) -> None:
        """`clock`: monotonic seconds, the one that requests' arrival times are read from."""
        self.sources = sources
        self._clock = clock
        self._host = Host()
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        PlatformCollector(registry=self._process)
        GCCollector(registry=self._process)

    def scrape(self) -> Scrape:
        """Start one scrape: `add` every model of `sources.models()`, then `finish`."""
        return Scrape(self._clock())

    def finish(self, scrape: Scrape, openmetrics: bool) -> tuple[bytes, str]:
        """The text of a scrape and its content type."""
        scrape.add_host(self._host.usage())
        scrape.add_process(self.sources.http(), self.sources.loop_lag, self.sources.build)
        if self.sources.grpc is not None:
            scrape.add_grpc(self.sources.grpc())
        more = [family for families in self.sources.more for family in families()]
        own = render([*scrape.families(), *more], openmetrics)
        if openmetrics:
            return own + generate_openmetrics(self._process), OPENMETRICS  # type: ignore[no-untyped-call]
        return own + generate_latest(self._process), TEXT

    def text(self, openmetrics: bool = False) -> tuple[bytes, str]:
        """A whole scrape at once."""
        scrape = self.scrape()
        for view in self.sources.models():
            scrape.add(view)
        return self.finish(scrape, openmetrics)


class Scrape:
    """The families of one scrape, filled one model version at a time."""

    def __init__(self, now: float) -> None:
        self._now = now
        self._seen: set[tuple[str, str]] = set()
        self._table = Table()
        metrics_triton.describe(self._table)
        self._describe_versions()
        metrics_backends.describe(self._table)
        self._describe_process()

    def families(self) -> list[Family]:
        """All families in a fixed order, with the sums over versions written."""
        return self._table.families(_only_with_samples)

    def add(self, view: ModelView) -> None:
        """Read one model version. A second view of it is ignored: a series may appear only once."""
        if (view.name, view.version) in self._seen:
            return
        self._seen.add((view.name, view.version))
        metrics_triton.add(self._table, view)
        self._add_requests(view)
        self._add_batches(view)
        metrics_backends.add(self._table, view)

    # -- families by model version -------------------------------------------------------------------------

    def _describe_versions(self) -> None:
        family = self._table.family
        family("gateway_requests_total", "counter", "Requests by status code of the answer")
        family(
            "gateway_request_duration_seconds",
            "histogram",
            "Arrival to answer of requests answered from a batch",
        )
        family(
            "gateway_phase_duration_seconds",
            "histogram",
            "Where the time goes: queue and total_overhead once a request, execute once a batch",
        )
        family("gateway_batch_rows", "histogram", "Rows of executed batches")
        family("gateway_batches_total", "counter", "Executed batches by the reason they left the queue")
        family("gateway_queue_rows", "gauge", "Rows waiting in the queue")
        family("gateway_queue_bytes", "gauge", "Bytes of input waiting in the queue")
        family("gateway_queue_oldest_seconds", "gauge", "Wait so far of the request that waits longest")

    def _add_requests(self, view: ModelView) -> None:
        table = self._table
        for protocol, part in view.statistics.protocols.items():
            for code, n in part.codes.items():
                table["gateway_requests_total"].add(
                    labels(model=view.name, version=view.version, protocol=protocol, code=str(code)), n
                )
            self._table.histogram(
                "gateway_request_duration_seconds",
                labels(model=view.name, version=view.version, protocol=protocol),
                part.durations,
            )

    def _add_batches(self, view: ModelView) -> None:
        s, table = view.statistics, self._table
        version = labels(model=view.name, version=view.version)
        for phase, histogram in (
            ("queue", s.queue_waits),
            ("execute", s.execute),
            ("total_overhead", s.overhead),
        ):
            self._table.histogram(
                "gateway_phase_duration_seconds",
                labels(model=view.name, phase=phase, version=view.version),
                histogram,
            )
        table["gateway_batch_rows"].add_histogram(version, s.rows.bounds, s.rows.cumulative(), s.rows.sum)
        for reason, n in s.batches.items():
            table["gateway_batches_total"].add(labels(model=view.name, reason=reason, version=view.version), n)
        oldest = view.queue.oldest
        table["gateway_queue_rows"].add(version, view.queue.rows)
        table["gateway_queue_bytes"].add(version, view.queue.nbytes)
        table["gateway_queue_oldest_seconds"].add(version, 0.0 if oldest is None else max(0.0, self._now - oldest))

    # -- families of the process ---------------------------------------------------------------------------

    def _describe_process(self) -> None:
        family = self._table.family
        family("nv_cpu_utilization", "gauge", "Share of the machine's CPU time in use since the last scrape")
        family("nv_cpu_memory_total_bytes", "gauge", "The machine's memory")
        family("nv_cpu_memory_used_bytes", "gauge", "The machine's memory in use")
        family("gateway_http_open_connections", "gauge", "Open connections to the data port")
        family("gateway_http_held_bytes", "gauge", "Bytes of request bodies being received or processed")
        family("gateway_http_requests_total", "counter", "Requests received whole on the data port, on any path")
        family("gateway_http_aborted_total", "counter", "Requests whose client left before the answer")
        family("gateway_http_rejected_total", "counter", "Requests refused at the data port, by reason")
        family("gateway_grpc_open_connections", "gauge", "Open connections to the gRPC port")
        family("gateway_grpc_calls_total", "counter", "Calls handed over by the gRPC port, of any method")
        family("gateway_grpc_aborted_total", "counter", "Calls whose client left before the answer")
        family("gateway_grpc_expired_total", "counter", "Calls whose deadline passed before the answer")
        family("gateway_grpc_rejected_total", "counter", "Calls and connections refused there, by reason")
        family("gateway_event_loop_lag_seconds", "histogram", "How late the event loop runs what is due")
        family("gateway_log_records_dropped_total", "counter", "Log records lost because the log was not read")
        family("gateway_build_info", "gauge", "Always 1; the labels name the versions running")

    def add_process(self, http: HttpView, lag: Mapping[str, Histogram], build: Mapping[str, str]) -> None:
        table = self._table
        table["gateway_http_open_connections"].add("", http.open_connections)
        table["gateway_http_held_bytes"].add("", http.held_bytes)
        table["gateway_http_requests_total"].add("", http.requests)
        table["gateway_http_aborted_total"].add("", http.aborted)
        for reason, n in http.rejected.items():
            table["gateway_http_rejected_total"].add(labels(reason=reason), n)
        for process, histogram in lag.items():
            self._table.histogram("gateway_event_loop_lag_seconds", labels(process=process), histogram)
        table["gateway_log_records_dropped_total"].add("", log.dropped())
        table["gateway_build_info"].add(labels(**build), 1)

    def add_grpc(self, grpc: GrpcView) -> None:
        table = self._table
        table["gateway_grpc_open_connections"].add("", grpc.open_connections)
        table["gateway_grpc_calls_total"].add("", grpc.requests)
        table["gateway_grpc_aborted_total"].add("", grpc.aborted)
        table["gateway_grpc_expired_total"].add("", grpc.expired)
        for reason, n in grpc.rejected.items():
            table["gateway_grpc_rejected_total"].add(labels(reason=reason), n)

    def add_host(self, usage: HostUsage) -> None:
        for name, value in (
            ("nv_cpu_utilization", usage.cpu),
            ("nv_cpu_memory_total_bytes", usage.memory_total_bytes),
            ("nv_cpu_memory_used_bytes", usage.memory_used_bytes),
        ):
            if value is not None:
                self._table[name].add("", value)
