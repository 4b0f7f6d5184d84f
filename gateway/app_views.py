"""What scrapers and people are shown of the model versions: their state now, read when somebody asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from gateway.agreement_sampling import AgreementSamplers
from gateway.backends.onnx import OnnxReplica
from gateway.catalog import ServedVersion
from gateway.core.fleet import Member, MemberStatistics
from gateway.core.model import ModelState
from gateway.observe.metrics_releases import ReleasesView
from gateway.observe.metrics_views import ModelView, ReplicaView
from gateway.operations import BackendStatus, ModelStatus
from gateway.operations_backends import cause_of, member_statistics
from gateway.releases_model import ModelReleasesStatus
from gateway.scheduler import Scheduler
from gateway.sequence_scheduler import SequenceScheduler


class Views:
    """Of every version that `versions` gives."""

    def __init__(
        self,
        versions: Callable[[], Iterable[ServedVersion]],
        agreement: AgreementSamplers,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock`: the schedulers'."""
        self._versions = versions
        self._agreement = agreement
        self._now = clock

    def for_metrics(self) -> list[ModelView]:
        """The versions that take requests."""
        return [self._view(version) for version in self._versions() if version.scheduler is not None]

    def for_people(self) -> list[ModelStatus]:
        return [self._status(version) for version in self._versions()]

    def _view(self, version: ServedVersion) -> ModelView:
        scheduler = version.scheduler
        assert scheduler is not None  # noqa: S101  # see `for_metrics`
        now = self._now()
        budget = scheduler.retry_budget_rows if isinstance(scheduler, Scheduler | SequenceScheduler) else 0.0
        # What the scheduler has may be wrapped; the name is the same.
        restarts = {replica.name: replica.restarts for replica in version.replicas if isinstance(replica, OnnxReplica)}
        return ModelView(
            version.name,
            version.version,
            version.statistics,
            scheduler.queue_statistics(),
            [_replica_view(seen, restarts) for _, seen in member_statistics(version, now)],
            version.load_s,
            version.spec.scheduling.response_cache,
            version.config_document.get("metric_tags", {}),
            retry_budget_rows=budget,
            panic=any(fleet.panic for fleet in version.fleets),
            agreement=self._agreement.statistics(version),
        )

    def _status(self, version: ServedVersion) -> ModelStatus:
        known = version.scheduler is not None
        loaded = version.state is ModelState.READY
        reason = version.refusal if loaded else version.reason
        return ModelStatus(
            version.name,
            version.version,
            ModelState.UNAVAILABLE.value if loaded and reason else version.state.value,
            version.artifact.digest if version.artifact is not None else "",
            self._backends(version),
            version.spec.policy.max_batch_size if known else 0,
            version.spec.batching_note if known else "",
            reason,
            self._agreement.statistics(version),
            version.role,
            version.artifact.source if version.artifact is not None else version.wanted.uri,
            *_registered(version),
        )

    def _backends(self, version: ServedVersion) -> list[BackendStatus]:
        """Its workers and servers; an ensemble, which has none of its own, is one backend."""
        if version.dependencies and version.scheduler is not None:
            return [BackendStatus("ensemble", version.ready, version.scheduler.pending)]
        now = self._now()
        return [_backend_status(member, seen, now) for member, seen in member_statistics(version, now)]


def _registered(version: ServedVersion) -> tuple[str, list[str]]:
    """The reference that led to it, and what people should know of what its registry says."""
    if version.wanted.facts is None:
        return "", []
    facts = version.wanted.facts()
    return facts["reference"], [*facts["warnings"], *facts["notes"]]


def release_view(status: ModelReleasesStatus) -> ReleasesView:
    """One model's releases, for metrics."""
    return ReleasesView(
        status.model,
        status.swaps,
        status.last_swap,
        status.asked_at,
        bool(status.trouble),
        bool(status.refused),
        [(one.version, one.digest, one.role) for one in status.releases if one.role != "trial"],
    )


def _backend_status(member: Member, seen: MemberStatistics, now: float) -> BackendStatus:
    left = None if seen.until is None else round(max(0.0, seen.until - now), 3)
    available = member.replica.available
    return BackendStatus(seen.name, available, seen.in_flight, seen.state, cause_of(member, seen), left)


def _replica_view(seen: MemberStatistics, restarts: Mapping[str, int]) -> ReplicaView:
    again = restarts.get(seen.name, 0)
    return ReplicaView(seen.name, seen.state, seen.in_flight, again, seen.slots, round(seen.ewma_s, 6), seen.ejections)
