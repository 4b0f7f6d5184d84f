"""Triton's own metric families, `nv_*`, under its names and with its meaning, for dashboards that exist."""

from __future__ import annotations

import re
from typing import Final

from gateway.observe.exposition import labels
from gateway.observe.metrics_table import Table
from gateway.observe.metrics_views import ModelView
from gateway.observe.record import ModelStatistics, Recent

QUANTILES: Final = (0.5, 0.9, 0.95, 0.99, 0.999)
SUMMARIES: Final = ("request", "queue", "compute_input", "compute_infer", "compute_output")
_TAG: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_OWN_LABELS: Final = frozenset(("model", "version", "reason", "quantile"))


def describe(table: Table) -> None:
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
        table.family(f"nv_inference_{name}", "counter", text, foreign=True)
    table.family("nv_inference_pending_request_count", "gauge", "Requests waiting to be executed")
    for name, text in (
        ("num_hits", "Answers taken from the response cache"),
        ("num_misses", "Look-ups in the response cache that found nothing"),
        ("hit_duration", "Cumulative time of look-ups that found an answer in microseconds"),
        ("miss_duration", "Cumulative time of look-ups that found nothing, and of storing, in microseconds"),
    ):
        table.family(f"nv_cache_{name}_per_model", "counter", text, foreign=True)
    table.family("nv_model_load_duration_secs", "gauge", "Time that loading the model took in seconds")
    for name in SUMMARIES:
        table.family(f"nv_inference_{name}_summary_us", "summary", f"Newest {name} durations in microseconds")


def add(table: Table, view: ModelView) -> None:
    s = view.statistics
    tags = {name: value for name, value in view.tags.items() if _TAG.fullmatch(name) and name not in _OWN_LABELS}
    named = {**tags, "model": view.name, "version": view.version}
    version = labels(**named)
    for reason, n in s.failures.items():
        table["nv_inference_request_failure"].add(labels(**named, reason=reason), n)
    table["nv_model_load_duration_secs"].add(version, view.load_s)
    if view.cached:
        for name, value in (
            ("num_hits", s.cache_hits),
            ("num_misses", s.cache_misses),
            ("hit_duration", s.cache_hit_ns // 1000),
            ("miss_duration", s.cache_miss_ns // 1000),
        ):
            table[f"nv_cache_{name}_per_model"].add(version, value)
    if s.recent is not None:
        _add_summaries(table, s, s.recent, version)
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
        table[f"nv_inference_{name}"].add(version, value)


def _add_summaries(table: Table, s: ModelStatistics, recent: Recent, version: str) -> None:
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
        table[f"nv_inference_{name}_summary_us"].add_summary(version, quantiles, count, total_ns / 1e3)
