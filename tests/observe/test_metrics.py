from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gateway.core.agreement import AgreementStatistics, OutputAgreement
from gateway.core.batch_queue import QueueStatistics
from gateway.observe.exposition import OPENMETRICS, TEXT, labels, prefers_openmetrics
from gateway.observe.host import Host, HostUsage
from gateway.observe.metrics import Metrics, Sources, build_labels
from gateway.observe.metrics_views import BACKEND_STATES, GrpcView, HttpView, ModelView, ReplicaView
from gateway.observe.record import FAILURE_REASONS, Histogram, ModelStatistics, Recent

EMPTY = QueueStatistics(0, 0, 0, 0, None)
NOW = 100.0

PROMETHEUS_ACCEPT = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;q=0.3,*/*;q=0.1"
)

TRITON = {
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
    "nv_inference_pending_request_count",
}
CONTRACT = {
    "gateway_requests_total": ("counter", {"model", "version", "protocol", "code"}),
    "gateway_request_duration_seconds": ("histogram", {"model", "version", "protocol"}),
    "gateway_phase_duration_seconds": ("histogram", {"model", "version", "phase"}),
    "gateway_batch_rows": ("histogram", {"model", "version"}),
    "gateway_batches_total": ("counter", {"model", "version", "reason"}),
    "gateway_queue_rows": ("gauge", {"model", "version"}),
    "gateway_queue_bytes": ("gauge", {"model", "version"}),
    "gateway_queue_oldest_seconds": ("gauge", {"model", "version"}),
    "gateway_rejected_total": ("counter", {"model", "reason"}),
    "gateway_backend_state": ("gauge", {"model", "backend", "state"}),
    "gateway_backend_attempts_total": ("counter", {"model", "backend", "outcome"}),
    "gateway_backend_inflight_batches": ("gauge", {"model", "backend"}),
    "gateway_retries_total": ("counter", {"model"}),
    "gateway_retry_budget_rows": ("gauge", {"model"}),
    "gateway_backend_slots": ("gauge", {"model", "backend"}),
    "gateway_backend_latency_seconds": ("gauge", {"model", "backend"}),
    "gateway_backend_ejections_total": ("counter", {"model", "backend", "cause"}),
    "gateway_panic": ("gauge", {"model"}),
    "gateway_hedges_total": ("counter", {"model", "outcome"}),
    "gateway_poison_total": ("counter", {"model"}),
    "gateway_quarantine_attempts_total": ("counter", {"model"}),
    "gateway_agreement_batches_total": ("counter", {"model", "outcome"}),
    "gateway_agreement_max_difference": ("gauge", {"model", "output", "measure"}),
    "gateway_agreement_min_equal_rows": ("gauge", {"model", "output"}),
    "gateway_worker_restarts_total": ("counter", {"model", "backend"}),
    "gateway_event_loop_lag_seconds": ("histogram", {"process"}),
    "gateway_build_info": ("gauge", {"version", "python", "onnxruntime"}),
}


def busy_statistics() -> ModelStatistics:
    statistics = ModelStatistics()
    statistics.record_batch("onnx-1", 3, 2, "full", 1_500, 2_000_000, 2_500, 0.004, 0.003)
    statistics.protocol("http").answered(0.010, 0.002, 0.003)
    statistics.protocol("http").answered(0.011, 0.002, 0.003)
    statistics.count("http", 400)
    statistics.reject("overloaded")
    statistics.attempt("onnx-2", "broken")
    statistics.retry()
    return statistics


def view(
    name: str = "m",
    version: str = "1",
    statistics: ModelStatistics | None = None,
    replicas: Iterable[ReplicaView] = (),
    queue: QueueStatistics = EMPTY,
) -> ModelView:
    return ModelView(name, version, statistics or busy_statistics(), queue, tuple(replicas))


def metrics(*views: ModelView) -> Metrics:
    lag = Histogram((0.1, 1.0))
    lag.add(0.5)
    http = HttpView(open_connections=4, held_bytes=17, rejected={"too_large": 2}, requests=9, aborted=1)
    grpc = GrpcView(open_connections=5, rejected={"slow": 3}, requests=8, aborted=2, expired=6)
    sources = Sources(lambda: views, lambda: http, {"0": lag}, build_labels(), lambda: grpc)
    return Metrics(sources, lambda: NOW)


def lines(subject: Metrics, openmetrics: bool = False) -> set[str]:
    return set(subject.text(openmetrics)[0].decode().split("\n"))


def families(subject: Metrics, openmetrics: bool = False) -> dict[str, Metric]:
    text = subject.text(openmetrics)[0].decode()
    parsed = list((parse_openmetrics if openmetrics else parse_text)(text))
    assert len({f.name for f in parsed}) == len(parsed), "a family appears twice"
    return {f.name: f for f in parsed}


def test_tritons_names_and_label_order_are_exact() -> None:
    text = lines(metrics(view(queue=QueueStatistics(5, 9, 1000, 2, NOW - 1.5))))
    assert {
        'nv_inference_request_failure{model="m",reason="REJECTED",version="1"} 1',
        'nv_inference_request_failure{model="m",reason="CANCELED",version="1"} 0',
        'nv_inference_request_failure{model="m",reason="BACKEND",version="1"} 0',
        'nv_inference_request_failure{model="m",reason="OTHER",version="1"} 0',
        'nv_inference_request_success{model="m",version="1"} 2',
        'nv_inference_count{model="m",version="1"} 3',
        'nv_inference_exec_count{model="m",version="1"} 1',
        'nv_inference_request_duration_us{model="m",version="1"} 10000',
        'nv_inference_queue_duration_us{model="m",version="1"} 4000',
        'nv_inference_compute_input_duration_us{model="m",version="1"} 3',
        'nv_inference_compute_infer_duration_us{model="m",version="1"} 4000',
        'nv_inference_compute_output_duration_us{model="m",version="1"} 5',
        'nv_inference_pending_request_count{model="m",version="1"} 5',
        "# TYPE nv_inference_request_success counter",
        "# TYPE nv_inference_pending_request_count gauge",
    } <= text


def test_a_fresh_model_shows_its_counters_at_zero() -> None:
    text = lines(metrics(view(statistics=ModelStatistics())))
    for reason in FAILURE_REASONS:
        assert f'nv_inference_request_failure{{model="m",reason="{reason}",version="1"}} 0' in text
    assert 'gateway_batches_total{model="m",reason="worker_free",version="1"} 0' in text
    assert 'gateway_retries_total{model="m"} 0' in text
    assert 'gateway_batch_rows_count{model="m",version="1"} 0' in text


@pytest.mark.parametrize("openmetrics", [False, True])
def test_every_contracted_family_has_its_type_and_labels(openmetrics: bool) -> None:
    replica = ReplicaView("onnx-1", "closed", 1, 2, ejections={"slow": 1})
    agreement = AgreementStatistics({"agreed": 1}, (OutputAgreement("y", 0.5, 0.25, 0.75),))
    found = families(metrics(replace(view(replicas=[replica]), agreement=agreement)), openmetrics)
    for name, (kind, label_names) in CONTRACT.items():
        family = found[name.removesuffix("_total")]
        assert family.type == kind, name
        assert family.samples, name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == label_names, name
    for name in TRITON:
        expected = "gauge" if "pending" in name else "unknown" if openmetrics else "counter"
        assert found[name].type == expected
        # Reading plain text, the parser itself adds `_total` to every counter that lacks it.
        shown = f"{name}_total" if expected == "counter" else name
        assert {sample.name for sample in found[name].samples} == {shown}


@pytest.mark.parametrize("openmetrics", [False, True])
def test_both_formats_say_the_same(openmetrics: bool) -> None:
    subject = metrics(view(), view("n", "2"))
    samples = {
        (s.name, *sorted(s.labels.items())): s.value
        for family in families(subject, openmetrics).values()
        for s in family.samples
        if s.name.startswith(("gateway_", "nv_"))
    }
    assert samples[("gateway_requests_total", ("code", "400"), ("model", "m"), ("protocol", "http"), ("version", "1"))] == 1  # fmt: skip  # noqa: E501
    assert samples[("gateway_http_rejected_total", ("reason", "too_large"))] == 2
    assert samples[("gateway_http_open_connections",)] == 4
    assert samples[("gateway_http_requests_total",)] == 9
    assert samples[("gateway_http_aborted_total",)] == 1
    assert samples[("gateway_grpc_open_connections",)] == 5
    assert samples[("gateway_grpc_calls_total",)] == 8
    assert samples[("gateway_grpc_aborted_total",)] == 2
    assert samples[("gateway_grpc_expired_total",)] == 6
    assert samples[("gateway_grpc_rejected_total", ("reason", "slow"))] == 3
    count = "nv_inference_count" if openmetrics else "nv_inference_count_total"
    assert samples[count, ("model", "n"), ("version", "2")] == 3
    assert samples[("gateway_build_info", *sorted(build_labels().items()))] == 1


def test_histograms_are_cumulative_and_end_at_infinity() -> None:
    found = families(metrics(view()))["gateway_request_duration_seconds"]
    buckets = [(float(s.labels["le"]), s.value) for s in found.samples if s.name.endswith("_bucket")]
    assert buckets == sorted(buckets)
    assert [n for _, n in buckets] == sorted(n for _, n in buckets)
    last_bound, last = buckets[-1]
    assert math.isinf(last_bound)
    assert last == 2
    assert dict(buckets)[0.01] == 1
    assert {s.name.rpartition("_")[2]: s.value for s in found.samples[-2:]} == {
        "count": 2,
        "sum": pytest.approx(0.021),
    }


def test_queue_gauges_read_what_waits() -> None:
    text = lines(metrics(view(queue=QueueStatistics(5, 9, 1000, 2, NOW - 1.5))))
    assert 'gateway_queue_rows{model="m",version="1"} 9' in text
    assert 'gateway_queue_bytes{model="m",version="1"} 1000' in text
    assert 'gateway_queue_oldest_seconds{model="m",version="1"} 1.5' in text
    assert 'gateway_queue_oldest_seconds{model="m",version="1"} 0.0' in lines(metrics(view()))


def test_families_without_a_version_label_are_summed_over_versions() -> None:
    first = view("m", "1", replicas=[ReplicaView("onnx-1", "closed", 2, 3)])
    second = view("m", "2", replicas=[ReplicaView("onnx-1", "closed", 1, 3)])
    text = lines(metrics(first, second))
    assert 'gateway_rejected_total{model="m",reason="overloaded"} 2' in text
    assert 'gateway_retries_total{model="m"} 2' in text
    assert 'gateway_backend_attempts_total{backend="onnx-1",model="m",outcome="ok"} 2' in text
    assert 'gateway_backend_inflight_batches{backend="onnx-1",model="m"} 3' in text
    assert 'gateway_worker_restarts_total{backend="onnx-1",model="m"} 3' in text


def test_a_backend_shows_one_state_as_1_and_the_others_as_0() -> None:
    text = lines(metrics(view(replicas=[ReplicaView("onnx-1", "unavailable", 0)])))
    for state in BACKEND_STATES:
        wanted = int(state == "unavailable")
        assert f'gateway_backend_state{{backend="onnx-1",model="m",state="{state}"}} {wanted}' in text


def test_a_version_given_twice_appears_once() -> None:
    text = metrics(view(), view()).text()[0].decode().split("\n")
    series = [line.rpartition(" ")[0] for line in text if line and not line.startswith("#")]
    assert len(series) == len(set(series))


@pytest.mark.parametrize("openmetrics", [False, True])
@pytest.mark.parametrize("name", ['quote"d', "back\\slash", "new\nline", "naïve ☃", "a,b={}", "\\n"])
def test_any_name_survives_as_a_label(name: str, openmetrics: bool) -> None:
    found = families(metrics(view(name)), openmetrics)["nv_inference_count"]
    assert [s.labels["model"] for s in found.samples] == [name]


def test_labels_are_alphabetical_and_a_lone_surrogate_does_no_harm() -> None:
    assert labels(b="2", a="1") == 'a="1",b="2"'
    assert labels() == ""
    labels(model="\ud800").encode()


def test_many_models_add_samples_and_not_families() -> None:
    few = families(metrics(view()))
    many = families(metrics(*[view(f"model-{n}") for n in range(500)]))
    assert many.keys() == few.keys()
    assert len(many) < 80
    assert len(many["nv_inference_count"].samples) == 500


def test_scraping_between_records_loses_and_repeats_nothing() -> None:
    statistics = ModelStatistics()
    subject = metrics(view(statistics=statistics))
    protocol = statistics.protocol("http")
    for n in range(1, 200):
        protocol.answered(0.001 * n, 0.0, 0.0)
        if n % 7 == 0:
            text = lines(subject)
            assert f'gateway_request_duration_seconds_count{{model="m",protocol="http",version="1"}} {n}' in text
    text = lines(subject)
    assert 'gateway_requests_total{code="200",model="m",protocol="http",version="1"} 199' in text
    (total,) = [line for line in text if line.startswith("gateway_request_duration_seconds_sum")]
    assert float(total.split()[-1]) == pytest.approx(0.001 * 199 * 200 / 2)


def test_cache_counters_are_there_for_cached_models_only() -> None:
    plain = families(metrics(view()))
    assert not [name for name in plain if name.startswith("nv_cache_")]
    statistics = ModelStatistics()
    statistics.record_cache_hit(7_000, 2)
    statistics.record_cache_miss(9_000)
    text = lines(metrics(replace(view("a", statistics=statistics), cached=True), view("b")))
    assert {line for line in text if line.startswith("nv_cache_")} == {
        'nv_cache_num_hits_per_model{model="a",version="1"} 2',
        'nv_cache_num_misses_per_model{model="a",version="1"} 1',
        'nv_cache_hit_duration_per_model{model="a",version="1"} 7',
        'nv_cache_miss_duration_per_model{model="a",version="1"} 9',
    }


def test_tags_of_the_configuration_are_labels_of_tritons_metrics_and_hide_none_of_theirs() -> None:
    tagged = replace(view(), tags={"team": 'vi"sion', "model": "forged", "not a name": "x"}, load_s=0.25)
    text = lines(metrics(tagged))
    assert {
        'nv_inference_count{model="m",team="vi\\"sion",version="1"} 3',
        'nv_inference_request_failure{model="m",reason="OTHER",team="vi\\"sion",version="1"} 0',
        'nv_model_load_duration_secs{model="m",team="vi\\"sion",version="1"} 0.25',
    } <= text
    assert not [line for line in text if "forged" in line or "not a name" in line]


@pytest.mark.parametrize("openmetrics", [False, True])
def test_summaries_where_asked_for(openmetrics: bool) -> None:
    assert not [name for name in families(metrics(view()), openmetrics) if name.endswith("_summary_us")]
    statistics = ModelStatistics()
    statistics.recent = Recent()
    for n in range(1, 101):
        statistics.record_batch("onnx-1", 1, 1, "full", 1_000, n * 1_000, 2_000, 0.0, 0.001)
    statistics.record_batch("onnx-1", 9, 900, "full", 1_000, 7_000_000, 2_000, 0.9, 0.001)
    found = families(metrics(view(statistics=statistics)), openmetrics)
    samples = found["nv_inference_compute_infer_summary_us"].samples
    values = {s.labels.get("quantile", s.name.rsplit("_", 1)[1]): s.value for s in samples}
    assert values["0.5"] == values["0.999"] == 7000.0  # 900 of the 1000 requests
    assert values["count"] == 1000
    assert values["sum"] == pytest.approx(5050 + 900 * 7000)
    queue = {s.labels.get("quantile"): s.value for s in found["nv_inference_queue_summary_us"].samples}
    assert queue["0.5"] == 1000.0
    fresh = ModelStatistics()
    fresh.recent = Recent()
    empty = families(metrics(view(statistics=fresh)), openmetrics)["nv_inference_request_summary_us"].samples
    assert all(math.isnan(s.value) for s in empty if "quantile" in s.labels)


def test_the_machines_cpu_and_memory(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 400 kB\n")
    host = Host(tmp_path)
    assert host.usage() == HostUsage(None, 1_024_000, 614_400)
    (tmp_path / "stat").write_text("cpu 10 0 10 70 10 0 0 0 0 0\ncpu0 1 1 1 1\n")
    assert host.usage().cpu == pytest.approx(0.2)
    (tmp_path / "stat").write_text("cpu 40 0 10 80 10 0 0 0 0 0\n")
    assert host.usage().cpu == pytest.approx(0.75)
    assert host.usage().cpu == 0.0
    assert 0.0 <= families(metrics())["nv_cpu_utilization"].samples[0].value <= 1.0


def test_what_is_standard_about_a_process_is_there_too() -> None:
    found = families(metrics(view()))
    assert {"process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds"} <= found.keys()


def test_content_types() -> None:
    text, content_type = metrics().text()
    assert content_type == TEXT
    assert b"# EOF" not in text
    text, content_type = metrics().text(openmetrics=True)
    assert content_type == OPENMETRICS
    assert text.endswith(b"# EOF\n")
    assert text.count(b"# EOF") == 1


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", True),
        (PROMETHEUS_ACCEPT, True),
        ("text/plain;version=0.0.4;q=1,application/openmetrics-text;version=1.0.0;q=0.5", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;version=2.0.0", False),
        ("application/openmetrics-text;q=nonsense", False),
        (";;;,,=,q=", False),
    ],
)
def test_content_negotiation(accept: str, wanted: bool) -> None:
    assert prefers_openmetrics(accept) is wanted
