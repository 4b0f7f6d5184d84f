"""What people are shown of a model's variants; field names are part of the interface (`/api/models/NAME/split`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.traffic_shadow import MirrorStatistics


@dataclass(frozen=True, slots=True)
class VariantStatus:
    """One variant as people are shown it; the field names are part of the interface."""

    source: str
    version: str
    """Empty while nothing is loaded."""
    digest: str
    state: str
    reason: str
    """Why it takes no part; empty where it does."""
    percent: float
    configured_percent: float
    requests: int
    """Canary: answered by it because of the split; shadow: copies made."""


@dataclass(frozen=True, slots=True)
class CanaryStatus(VariantStatus):
    header: Mapping[str, str]
    sticky: str | None
    fallbacks: int
    """Requests of its share that the champion answered, because it could not."""


@dataclass(frozen=True, slots=True)
class ShadowStatus(VariantStatus):
    mirror: MirrorStatistics | None
    """None while there is none."""


@dataclass(frozen=True, slots=True)
class TrafficStatus:
    """How one model's requests are shared out."""

    model: str
    champion: str
    """Version that the name means; empty while there is none."""
    champion_requests: int
    """Answered by the champion since it has a canary beside it."""
    canary: CanaryStatus | None
    shadow: ShadowStatus | None
