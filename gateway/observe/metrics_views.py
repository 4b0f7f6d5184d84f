"""What a scrape reads: plain values, as seen at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from gateway.core.agreement import AgreementStatistics
from gateway.core.batch_queue import QueueStatistics
from gateway.observe.record import ModelStatistics

BACKEND_STATES: Final = ("closed", "open", "half_open", "ramp", "unavailable", "drained")
"""Every backend shows each of these as 0 or 1, another one only while it lasts (core/breaker.py). `closed`: in full
use, as a circuit is; `open`: ejected for failures; `half_open`: being tried out; `ramp`: back with a growing share;
`unavailable`: the process or server cannot be reached, or is not verified yet; `drained`: taken out by an operator."""


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica of one model version, as seen now."""

    name: str
    state: str
    """One of `BACKEND_STATES`."""
    in_flight: int
    restarts: int = 0
    """Times the worker behind it was started again."""
    slots: float = 1.0
    """Batches it may be given at one time, as learned."""
    latency_s: float = 0.0
    """Moving mean of how long its batches take, seconds; 0.0: it had none yet."""
    ejections: Mapping[str, int] = field(default_factory=dict)
    """Times it was ejected, by cause."""


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
    retry_budget_rows: float = 0.0
    """Rows that may be executed again now."""
    panic: bool = False
    """Whether ejected backends are used all the same, because too few others are left."""
    agreement: AgreementStatistics | None = None
    """What comparing answers of different backends found, where the configuration asks for it."""


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
