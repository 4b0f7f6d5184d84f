"""Metric families of canaries and shadows.

Labels are configured names, versions, variants, reasons and outputs: bounded sets, whatever clients do. What two
versions say of each other stands at the shadow's version, and starts anew with each pair of versions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate

from gateway.core.shadow_comparison import BOUNDS, OutputComparison
from gateway.observe.exposition import Family, labels
from gateway.observe.metrics_table import Table
from gateway.traffic_shadow import MirrorStatistics
from gateway.variants_status import TrafficStatus

_COUNTERS = (
    ("variant_requests_total", "Requests without a version that a split gave to this variant"),
    ("variant_fallbacks_total", "Requests of a canary's share that the champion answered, because it could not"),
    ("shadow_mirrored_total", "Requests that were copied for a shadow"),
    ("shadow_dropped_total", "Requests of a shadow's share that were not copied, by reason"),
    ("shadow_compared_total", "Copies by what came of them: agreed, differed, failed"),
    ("shadow_differing_total", "Copies of which an output differed, by output"),
    ("shadow_rows_total", "Rows that were compared, by output"),
    ("shadow_equal_rows_total", "Rows of which both answers are equal in every element, by output"),
)
_GAUGES = (
    ("variant_share", "Share of the requests that a variant is to have, from 0 to 1"),
    ("variant_ready", "1 where a variant takes part, 0 where it cannot"),
    ("shadow_max_difference", "Largest difference between a shadow's answers and the champion's, by output"),
    ("shadow_pending_rows", "Rows of copies that are not compared yet"),
    ("shadow_pending_bytes", "Bytes of copies that are not compared yet"),
)


def families(statuses: Mapping[str, TrafficStatus]) -> Iterable[Family]:
    """Of every model that has variants; none where no model has."""
    table = Table()
    for name, text in _COUNTERS:
        table.family(f"gateway_{name}", "counter", text)
    for name, text in _GAUGES:
        table.family(f"gateway_{name}", "gauge", text)
    table.family("gateway_shadow_difference", "histogram", "Largest absolute difference of each copy, by output")
    for status in statuses.values():
        _add(table, status)
    return table.families(lambda name: True)


def _add(table: Table, status: TrafficStatus) -> None:
    model, canary, shadow = status.model, status.canary, status.shadow
    if canary is not None:
        for variant, version, n in (
            ("champion", status.champion, status.champion_requests),
            ("canary", canary.version, canary.requests),
        ):
            if version:
                named = labels(model=model, variant=variant, version=version)
                table["gateway_variant_requests_total"].add(named, n)
        table["gateway_variant_fallbacks_total"].add(labels(model=model, variant="canary"), canary.fallbacks)
    for variant, seen in (("canary", canary), ("shadow", shadow)):
        if seen is not None:
            named = labels(model=model, variant=variant)
            table["gateway_variant_share"].add(named, seen.percent / 100)
            table["gateway_variant_ready"].add(named, int(not seen.reason))
    if shadow is not None and shadow.mirror is not None:
        _add_mirror(table, model, shadow.version, shadow.mirror)


def _add_mirror(table: Table, model: str, version: str, mirror: MirrorStatistics) -> None:
    named = labels(model=model, version=version)
    table["gateway_shadow_mirrored_total"].add(named, mirror.mirrored)
    for reason, n in mirror.dropped.items():
        table["gateway_shadow_dropped_total"].add(labels(model=model, reason=reason, version=version), n)
    compared = mirror.compared
    for outcome, n in (("agreed", compared.agreed), ("differed", compared.differed), ("failed", mirror.failed)):
        table["gateway_shadow_compared_total"].add(labels(model=model, outcome=outcome, version=version), n)
    table["gateway_shadow_pending_rows"].add(named, mirror.pending_rows)
    table["gateway_shadow_pending_bytes"].add(named, mirror.pending_bytes)
    for output in compared.outputs:
        _add_output(table, model, version, output)


def _add_output(table: Table, model: str, version: str, seen: OutputComparison) -> None:
    shown = labels(model=model, output=seen.output, version=version)
    table["gateway_shadow_differing_total"].add(shown, seen.differing)
    table["gateway_shadow_rows_total"].add(shown, seen.rows)
    table["gateway_shadow_equal_rows_total"].add(shown, seen.equal_rows)
    if seen.buckets:
        cumulative = list(accumulate(seen.buckets))
        table["gateway_shadow_difference"].add_histogram(shown, BOUNDS, cumulative, seen.sum_absolute)
    for measure, value in (("absolute", seen.max_absolute), ("relative", seen.max_relative)):
        if value is not None:
            by = labels(measure=measure, model=model, output=seen.output, version=version)
            table["gateway_shadow_max_difference"].add(by, value)
