"""Metric families of releases: how often the serving version changed or did not, when last, and what is loaded now.

Labels are model names, outcomes, roles, versions and digests of what is loaded at the moment: as many series as there
are releases in memory, none of those that left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gateway.observe.exposition import Family, labels


@dataclass(frozen=True, slots=True)
class ReleasesView:
    """What is known of one model's releases."""

    model: str
    outcomes: Mapping[str, int]
    last_swap: float
    """Seconds since 1970; 0.0: never."""
    asked_at: float | None
    """When the source was asked last, seconds since 1970; None: it never was."""
    trouble: bool
    """Whether it could not be asked when it was tried last."""
    refused: bool
    """Whether what the source means now was refused."""
    loaded: Sequence[tuple[str, str, str]]
    """Version, digest and role of each release that is loaded."""


def families(views: Iterable[ReleasesView]) -> list[Family]:
    swaps = Family("gateway_model_swaps_total", "counter", "Changes of a model's serving version, by what came of them")
    last = Family("gateway_model_last_swap_timestamp_seconds", "gauge", "When the serving version changed last")
    info = Family("gateway_model_release_info", "gauge", "1 for each release of a model that is loaded, by its role")
    asked = Family("gateway_model_source_asked_timestamp_seconds", "gauge", "When a followed source answered last")
    trouble = Family("gateway_model_source_unreachable", "gauge", "1 while a followed source cannot be asked")
    refused = Family("gateway_model_release_refused", "gauge", "1 while what a model's source means is refused")
    for view in views:
        model = labels(model=view.model)
        for outcome, count in view.outcomes.items():
            swaps.add(labels(model=view.model, outcome=outcome), count)
        if view.last_swap:
            last.add(model, view.last_swap)
        for version, digest, role in dict.fromkeys(view.loaded):
            info.add(labels(digest=digest, model=view.model, role=role, version=version), 1)
        if view.asked_at is not None:
            asked.add(model, view.asked_at)
        trouble.add(model, int(view.trouble))
        refused.add(model, int(view.refused))
    return [swaps, last, info, asked, trouble, refused]
