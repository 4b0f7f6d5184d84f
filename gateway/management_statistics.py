"""Counters of model versions as the statistics documents of the protocol (Triton's, key by key).

Rules: the documents are what REST sends as JSON and their keys are the fields of `ModelStatisticsResponse`; all eight
durations are always there; `success` and `queue` count the same requests, the `compute_*` those that were executed.
`batch_stats` counts executions, by rows.
"""

from __future__ import annotations

from typing import Any

from gateway.catalog import ServedVersion
from gateway.observe.record import ModelStatistics


def version_document(version: ServedVersion) -> dict[str, Any]:
    """One entry of `model_stats`. Times are nanoseconds, `last_inference` milliseconds since 1970."""
    s = version.statistics
    return {
        "name": version.name,
        "version": version.version,
        "last_inference": s.last_inference_ms,
        "inference_count": s.inference_count,
        "execution_count": s.execution_count,
        "inference_stats": _durations(s),
        "response_stats": {},
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": _duration(size.count, size.compute_input_ns),
                "compute_infer": _duration(size.count, size.compute_infer_ns),
                "compute_output": _duration(size.count, size.compute_output_ns),
            }
            for rows, size in sorted(s.batch_sizes.items())
        ],
        "memory_usage": [],
    }


def _durations(s: ModelStatistics) -> dict[str, dict[str, int]]:
    executed = s.success - s.cache_hits
    return {
        "success": _duration(s.success, s.success_ns),
        "fail": _duration(s.failed, s.failed_ns),
        "queue": _duration(s.success, s.queue_ns),
        "compute_input": _duration(executed, s.compute_input_ns),
        "compute_infer": _duration(executed, s.compute_infer_ns),
        "compute_output": _duration(executed, s.compute_output_ns),
        "cache_hit": _duration(s.cache_hits, s.cache_hit_ns),
        "cache_miss": _duration(s.cache_misses, s.cache_miss_ns),
    }


def _duration(count: int, ns: int) -> dict[str, int]:
    return {"count": count, "ns": ns}
