"""What is shown of registries, and what keeps their cache small.

Rules: the cache is looked through every hour, in a thread. What is loaded, what models.lock names and what the
inference log refers to always stays. Not at the start: what the former process logged last may not be sealed yet.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Final

from gateway.catalog import Catalog
from gateway.errors import GatewayError
from gateway.observe.exposition import Family, labels
from gateway.plan_registry import RegisteredModels
from gateway.registry.reference import SECTIONS

log = logging.getLogger("gateway.registry")

COLLECT_S: Final = 3600.0

Logged = Callable[[], set[str]]
"""Digests that the inference log refers to; blocks on the disk."""


def families(registered: RegisteredModels) -> Iterable[Family]:
    """Metrics; none where no registry is configured."""
    statistics = registered.registries.statistics()
    if not statistics.schemes:
        return []
    asked = Family("gateway_registry_requests_total", "counter", "Questions to a registry, by what came of them.")
    heard = Family(
        "gateway_registry_last_success_timestamp_seconds", "gauge", "When a registry answered last; 0: it never did."
    )
    for scheme, seen in statistics.schemes.items():
        registry = SECTIONS[scheme]
        for outcome in ("ok", "refused", "unavailable"):
            asked.add(labels(registry=registry, outcome=outcome), seen.outcomes.get(outcome, 0))
        heard.add(labels(registry=registry), seen.last_success)
    stale = Family(
        "gateway_registry_stale",
        "gauge",
        "1: the registry did not say what the model's reference means when last asked.",
    )
    unanswered = registered.registries.unanswered()
    for name, reference in registered.references():
        stale.add(labels(model=name), int(reference in unanswered))
    hits = Family("gateway_model_cache_hits_total", "counter", "Versions that were in the cache when they were loaded.")
    hits.add("", statistics.cache.hits)
    fetched = Family("gateway_model_cache_fetched_bytes_total", "counter", "Bytes of versions fetched into the cache.")
    fetched.add("", statistics.cache.fetched_bytes)
    damaged = Family(
        "gateway_model_cache_damaged_total", "counter", "Versions in the cache that were changed, and thrown away."
    )
    damaged.add("", statistics.cache.damaged)
    return [asked, heard, stale, hits, fetched, damaged]


async def keep_cache_small(registered: RegisteredModels, catalog: Catalog, logged: Logged) -> None:
    """Until cancelled. Does nothing where no model comes from a registry."""
    while True:
        await asyncio.sleep(COLLECT_S)
        if not registered.configured:
            continue
        loaded = {version.artifact.digest for version in catalog.versions() if version.artifact is not None}
        try:
            await asyncio.to_thread(_collect, registered, loaded, logged)
        except (GatewayError, OSError) as error:
            log.warning("the model cache was not looked through: %s", error)


def _collect(registered: RegisteredModels, loaded: set[str], logged: Logged) -> None:
    registered.registries.collect(loaded | logged())
