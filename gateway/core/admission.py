"""Whether a request is let in: every queue has a bound in rows and in bytes, checked before anything is kept.

Refusals cost no memory and happen at arrival, not after a timeout. The bounds are per model version.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.core.batch_queue import BatchQueue
from gateway.core.model import BatchPolicy
from gateway.core.request import InferRequest
from gateway.errors import GatewayError, Overloaded, TooLarge


@dataclass(frozen=True, slots=True)
class Rejected:
    reason: str
    """Metric label."""
    message: str
    error: type[GatewayError] = Overloaded


MAX_GROUPS = 512
"""Kinds of requests (shapes, wanted outputs) that may wait at once: choosing among them costs time for each."""
MAX_TIMEOUT_S = 120.0
"""The longest deadline a caller may ask for; more is capped (resilience notes §1.2)."""


def admit(queue: BatchQueue, policy: BatchPolicy, request: InferRequest) -> Rejected | None:
    """None: let in. The bounds on the queue are also what one caller may occupy."""
    if request.rows > policy.max_queue_rows or request.nbytes > policy.max_queue_bytes:
        return Rejected(
            "too_large",
            f"the request holds {request.rows} rows and {request.nbytes} bytes, but only {policy.max_queue_rows} rows "
            f"and {policy.max_queue_bytes} bytes may wait for this model; send smaller requests",
            TooLarge,
        )
    if len(queue.groups) >= MAX_GROUPS and request.key not in queue.groups:
        return Rejected(
            "queue_shapes",
            f"Exceeds maximum queue size: requests of {MAX_GROUPS} different shapes wait, which cannot share batches; "
            "retry later",
        )
    if queue.rows + request.rows > policy.max_queue_rows:
        return Rejected(
            "queue_rows", f"Exceeds maximum queue size: {queue.rows} of {policy.max_queue_rows} rows wait; retry later"
        )
    if queue.nbytes + request.nbytes > policy.max_queue_bytes:
        return Rejected(
            "queue_bytes",
            f"Exceeds maximum queue size: {queue.nbytes} of {policy.max_queue_bytes} bytes wait; retry later",
        )
    return None


def deadline_of(policy: BatchPolicy, request: InferRequest) -> float:
    """Monotonic instant by which the caller wants its answer; `request.received` must be set."""
    if request.timeout_s:
        return request.received + min(request.timeout_s, MAX_TIMEOUT_S)
    return request.received + policy.deadline_s
