"""From plain counters to the metric families of `/metrics`: names, types, labels, and what each is read from.

The families of the gateway and Triton's `nv_inference_*` are written directly (observe/exposition.py):
prometheus_client would append `_total` to Triton's counters, and one object per sample would hold up the
event loop at 500 models. What is standard about any process (`process_*`, `python_*`) comes from
prometheus_client's collectors.

Rules: a scrape folds and reads, it changes nothing else. `Scrape.add` does one model version, so that whoever
scrapes can give way to requests between two. Families without a version label are summed over a model's
versions. Labels are names from the configuration, protocols, codes, reasons and states: nothing a client can
invent.
"""

from __future__ import annotations

import platform
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Final

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

import gateway
from gateway.core.batch_queue import QueueStatistics
from gateway.observe.exposition import OPENMETRICS, TEXT, Family, Kind, labels, render
from gateway.observe.host import Host, HostUsage
from gateway.observe.record import Histogram, ModelStatistics, Recent

QUANTILES: Final = (0.5, 0.9, 0.95, 0.99, 0.999)
SUMMARIES: Final = ("request", "queue", "compute_input", "compute_infer", "compute_output")
_TAG: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_OWN_LABELS: Final = frozenset(("model", "version", "reason", "quantile"))

BACKEND_STATES: Final = ("ready", "starting", "unavailable", "failed")
"""Every backend shows each of these as 0 or 1; a state not listed here appears only while it lasts."""


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica of one model version, as seen now."""

    name: str
    state: str
    """One of `BACKEND_STATES`."""
    in_flight: int
    restarts: int = 0
    """Times the worker behind it was started again."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model version, as seen now. `name` and `version` together are unique in a scrape."""

    name: str
    version: str
    statistics: ModelStatistics
    queue: QueueStatistics
    replicas: Sequence[ReplicaView]
    load_s: float = 0.0
    """Seconds that loading it took."""
    cached: bool = False
    """Whether its answers may come from the response cache."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Labels that its configuration adds to Triton's metrics (`metric_tags`)."""


@dataclass(frozen=True, slots=True)
class HttpView:
    """The data port, as seen now."""

    open_connections: int
    held_bytes: int
    """Request bodies being received or not yet answered."""
    rejected: Mapping[str, int]
    """Requests refused before they reached a model, by the error's `reason`."""
    requests: int = 0
    aborted: int = 0
    """Requests whose client left before the answer."""


@dataclass(frozen=True, slots=True)
class GrpcView:
    """The gRPC port, as seen now. What it holds counts in `HttpView.held_bytes`: both ports share one budget."""

    open_connections: int
    rejected: Mapping[str, int]
    """Calls and connections refused before they reached a model, by reason."""
    requests: int = 0
    aborted: int = 0
    """Calls whose client left before the answer."""
    expired: int = 0
    """Calls whose deadline passed before the answer."""


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


def _only_where_asked_for(name: str) -> bool:
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
        own = render(scrape.families(), openmetrics)
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
        self._by_name: dict[str, Family] = {}
        self._sums: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._describe_triton()
        self._describe_versions()
        self._describe_models()
        self._describe_process()

    def families(self) -> list[Family]:
        """All families in a fixed order, with the sums over versions written."""
        for (name, label_text), value in self._sums.items():
            self._by_name[name].add(label_text, value)
        self._sums.clear()
        return [family for family in self._by_name.values() if family.lines or not _only_where_asked_for(family.name)]

    def add(self, view: ModelView) -> None:
        """Read one model version. A second view of it is ignored: a series may appear only once."""
        if (view.name, view.version) in self._seen:
            return
        self._seen.add((view.name, view.version))
        self._add_triton(view)
        self._add_requests(view)
        self._add_batches(view)
        self._add_model(view)

    # -- Triton's families ---------------------------------------------------------------------------------

    def _describe_triton(self) -> None:
        for name, text in (
            ("request_success", "Requests answered"),
            ("request_failure", "Requests that failed, by reason"),
            ("count", "Inferences performed: rows, a batch of n counts n"),
            ("exec_count", "Model executions: batches"),
            ("request_duration_us", "Cumulative request duration in microseconds"),
            ("queue_duration_us", "Cumulative time requests waited in the queue in microseconds"),
            ("compute_input_duration_us", "Cumulative time spent preparing inputs in microseconds"),
            ("compute_infer_duration_us", "Cumulative time spent executing the model in microseconds"),
            ("compute_output_duration_us", "Cumulative time spent reading outputs in microseconds"),
        ):
            self._family(f"nv_inference_{name}", "counter", text, foreign=True)
        self._family("nv_inference_pending_request_count", "gauge", "Requests waiting to be executed")
        for name, text in (
            ("num_hits", "Answers taken from the response cache"),
            ("num_misses", "Look-ups in the response cache that found nothing"),
            ("hit_duration", "Cumulative time of look-ups that found an answer in microseconds"),
            ("miss_duration", "Cumulative time of look-ups that found nothing, and of storing, in microseconds"),
        ):
            self._family(f"nv_cache_{name}_per_model", "counter", text, foreign=True)
        self._family("nv_model_load_duration_secs", "gauge", "Time that loading the model took in seconds")
        for name in SUMMARIES:
            self._family(f"nv_inference_{name}_summary_us", "summary", f"Newest {name} durations in microseconds")

    def _add_triton(self, view: ModelView) -> None:
        s, family = view.statistics, self._by_name
        tags = {name: value for name, value in view.tags.items() if _TAG.fullmatch(name) and name not in _OWN_LABELS}
        named = {**tags, "model": view.name, "version": view.version}
        version = labels(**named)
        for reason, n in s.failures.items():
            family["nv_inference_request_failure"].add(labels(**named, reason=reason), n)
        family["nv_model_load_duration_secs"].add(version, view.load_s)
        if view.cached:
            for name, value in (
                ("num_hits", s.cache_hits),
                ("num_misses", s.cache_misses),
                ("hit_duration", s.cache_hit_ns // 1000),
                ("miss_duration", s.cache_miss_ns // 1000),
            ):
                family[f"nv_cache_{name}_per_model"].add(version, value)
        if s.recent is not None:
            self._add_summaries(s, s.recent, version)
        for name, value in (
            ("request_success", s.success),
            ("count", s.inference_count),
            ("exec_count", s.execution_count),
            ("request_duration_us", s.success_ns // 1000),
            ("queue_duration_us", s.queue_ns // 1000),
            ("compute_input_duration_us", s.compute_input_ns // 1000),
            ("compute_infer_duration_us", s.compute_infer_ns // 1000),
            ("compute_output_duration_us", s.compute_output_ns // 1000),
            ("pending_request_count", view.queue.requests),
        ):
            family[f"nv_inference_{name}"].add(version, value)

    def _add_summaries(self, s: ModelStatistics, recent: Recent, version: str) -> None:
        executed = s.success - s.cache_hits
        sums = {
            "request": (s.success, s.success_ns),
            "queue": (s.success, s.queue_ns),
            "compute_input": (executed, s.compute_input_ns),
            "compute_infer": (executed, s.compute_infer_ns),
            "compute_output": (executed, s.compute_output_ns),
        }
        for name, values in recent.quantiles(QUANTILES).items():
            count, total_ns = sums[name]
            quantiles = [(quantile, value / 1e3) for quantile, value in zip(QUANTILES, values, strict=True)]
            self._by_name[f"nv_inference_{name}_summary_us"].add_summary(version, quantiles, count, total_ns / 1e3)

    # -- families by model version -------------------------------------------------------------------------

    def _describe_versions(self) -> None:
        self._family("gateway_requests_total", "counter", "Requests by status code of the answer")
        self._family(
            "gateway_request_duration_seconds",
            "histogram",
            "Arrival to answer of requests answered from a batch",
        )
        self._family(
            "gateway_phase_duration_seconds",
            "histogram",
            "Where the time goes: queue and total_overhead once a request, execute once a batch",
        )
        self._family("gateway_batch_rows", "histogram", "Rows of executed batches")
        self._family("gateway_batches_total", "counter", "Executed batches by the reason they left the queue")
        self._family("gateway_queue_rows", "gauge", "Rows waiting in the queue")
        self._family("gateway_queue_bytes", "gauge", "Bytes of input waiting in the queue")
        self._family("gateway_queue_oldest_seconds", "gauge", "Wait so far of the request that waits longest")

    def _add_requests(self, view: ModelView) -> None:
        family = self._by_name
        for protocol, part in view.statistics.protocols.items():
            for code, n in part.codes.items():
                family["gateway_requests_total"].add(
                    labels(model=view.name, version=view.version, protocol=protocol, code=str(code)), n
                )
            self._histogram(
                "gateway_request_duration_seconds",
                labels(model=view.name, version=view.version, protocol=protocol),
                part.durations,
            )

    def _add_batches(self, view: ModelView) -> None:
        s, family = view.statistics, self._by_name
        version = labels(model=view.name, version=view.version)
        for phase, histogram in (
            ("queue", s.queue_waits),
            ("execute", s.execute),
            ("total_overhead", s.overhead),
        ):
            self._histogram(
                "gateway_phase_duration_seconds",
                labels(model=view.name, phase=phase, version=view.version),
                histogram,
            )
        family["gateway_batch_rows"].add_histogram(version, s.rows.bounds, s.rows.cumulative(), s.rows.sum)
        for reason, n in s.batches.items():
            family["gateway_batches_total"].add(labels(model=view.name, reason=reason, version=view.version), n)
        oldest = view.queue.oldest
        family["gateway_queue_rows"].add(version, view.queue.rows)
        family["gateway_queue_bytes"].add(version, view.queue.nbytes)
        family["gateway_queue_oldest_seconds"].add(version, 0.0 if oldest is None else max(0.0, self._now - oldest))

    # -- families by model, summed over its versions -------------------------------------------------------

    def _describe_models(self) -> None:
        self._family("gateway_rejected_total", "counter", "Requests refused for load or state, by reason")
        self._family("gateway_retries_total", "counter", "Requests sent to a backend again after a failed attempt")
        self._family("gateway_backend_state", "gauge", "1 for the state a backend is in, 0 for the others")
        self._family("gateway_backend_attempts_total", "counter", "Batches sent to a backend, by outcome")
        self._family("gateway_backend_inflight_batches", "gauge", "Batches a backend is executing")
        self._family("gateway_worker_restarts_total", "counter", "Restarts of the worker process behind a backend")

    def _add_model(self, view: ModelView) -> None:
        s, model = view.statistics, view.name
        for reason, n in s.rejected.items():
            self._sum("gateway_rejected_total", labels(model=model, reason=reason), n)
        self._sum("gateway_retries_total", labels(model=model), s.retries)
        for (backend, outcome), n in s.attempts.items():
            self._sum("gateway_backend_attempts_total", labels(backend=backend, model=model, outcome=outcome), n)
        for replica in view.replicas:
            backend = labels(backend=replica.name, model=model)
            self._sum("gateway_backend_inflight_batches", backend, replica.in_flight)
            # Versions and instances of a model may share a worker: its restarts are one number, not one each.
            self._most("gateway_worker_restarts_total", backend, replica.restarts)
            for state in dict.fromkeys((*BACKEND_STATES, replica.state)):
                self._most(
                    "gateway_backend_state",
                    labels(backend=replica.name, model=model, state=state),
                    int(state == replica.state),
                )

    # -- families of the process ---------------------------------------------------------------------------

    def _describe_process(self) -> None:
        self._family("nv_cpu_utilization", "gauge", "Share of the machine's CPU time in use since the last scrape")
        self._family("nv_cpu_memory_total_bytes", "gauge", "The machine's memory")
        self._family("nv_cpu_memory_used_bytes", "gauge", "The machine's memory in use")
        self._family("gateway_http_open_connections", "gauge", "Open connections to the data port")
        self._family("gateway_http_held_bytes", "gauge", "Bytes of request bodies being received or processed")
        self._family("gateway_http_requests_total", "counter", "Requests received whole on the data port, on any path")
        self._family("gateway_http_aborted_total", "counter", "Requests whose client left before the answer")
        self._family("gateway_http_rejected_total", "counter", "Requests refused at the data port, by reason")
        self._family("gateway_grpc_open_connections", "gauge", "Open connections to the gRPC port")
        self._family("gateway_grpc_calls_total", "counter", "Calls handed over by the gRPC port, of any method")
        self._family("gateway_grpc_aborted_total", "counter", "Calls whose client left before the answer")
        self._family("gateway_grpc_expired_total", "counter", "Calls whose deadline passed before the answer")
        self._family("gateway_grpc_rejected_total", "counter", "Calls and connections refused there, by reason")
        self._family("gateway_event_loop_lag_seconds", "histogram", "How late the event loop runs what is due")
        self._family("gateway_build_info", "gauge", "Always 1; the labels name the versions running")

    def add_process(self, http: HttpView, lag: Mapping[str, Histogram], build: Mapping[str, str]) -> None:
        family = self._by_name
        family["gateway_http_open_connections"].add("", http.open_connections)
        family["gateway_http_held_bytes"].add("", http.held_bytes)
        family["gateway_http_requests_total"].add("", http.requests)
        family["gateway_http_aborted_total"].add("", http.aborted)
        for reason, n in http.rejected.items():
            family["gateway_http_rejected_total"].add(labels(reason=reason), n)
        for process, histogram in lag.items():
            self._histogram("gateway_event_loop_lag_seconds", labels(process=process), histogram)
        family["gateway_build_info"].add(labels(**build), 1)

    def add_grpc(self, grpc: GrpcView) -> None:
        family = self._by_name
        family["gateway_grpc_open_connections"].add("", grpc.open_connections)
        family["gateway_grpc_calls_total"].add("", grpc.requests)
        family["gateway_grpc_aborted_total"].add("", grpc.aborted)
        family["gateway_grpc_expired_total"].add("", grpc.expired)
        for reason, n in grpc.rejected.items():
            family["gateway_grpc_rejected_total"].add(labels(reason=reason), n)

    def add_host(self, usage: HostUsage) -> None:
        for name, value in (
            ("nv_cpu_utilization", usage.cpu),
            ("nv_cpu_memory_total_bytes", usage.memory_total_bytes),
            ("nv_cpu_memory_used_bytes", usage.memory_used_bytes),
        ):
            if value is not None:
                self._by_name[name].add("", value)

    # -- small print ---------------------------------------------------------------------------------------

    def _family(self, name: str, kind: Kind, text: str, *, foreign: bool = False) -> None:
        self._by_name[name] = Family(name, kind, text, foreign=foreign)

    def _histogram(self, name: str, label_text: str, histogram: Histogram) -> None:
        cumulative = histogram.cumulative()
        self._by_name[name].add_histogram(label_text, histogram.bounds, cumulative, histogram.sum)

    def _sum(self, name: str, label_text: str, value: int) -> None:
        self._sums[name, label_text] += value

    def _most(self, name: str, label_text: str, value: int) -> None:
        key = (name, label_text)
        self._sums[key] = max(self._sums[key], value)
