"""Whether a request is let in: every queue has a bound in rows and in bytes, checked before anything is kept.

Refusals cost no memory and happen at arrival, not after a timeout. The bounds are per model version, and in requests
per priority level where its owner states a queue policy.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.core.arrival_order import ArrivalOrder
from gateway.core.batch_queue import BatchQueue
from gateway.core.model import BatchPolicy
from gateway.core.policy_queue import PolicyQueue
from gateway.core.request import InferRequest
from gateway.core.scheduling import QueuePolicy
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


def never_fits(policy: BatchPolicy, rows: int, nbytes: int) -> Rejected | None:
    """None: there may be room for such a request. The bounds on the queue are also what one caller may occupy."""
    if rows <= policy.max_queue_rows and nbytes <= policy.max_queue_bytes:
        return None
    return Rejected(
        "too_large",
        f"the request holds {rows} rows and {nbytes} bytes, but only {policy.max_queue_rows} rows and "
        f"{policy.max_queue_bytes} bytes may wait for this model; send smaller requests",
        TooLarge,
    )


def admit(queue: BatchQueue, policy: BatchPolicy, request: InferRequest) -> Rejected | None:
    """None: let in."""
    groups = queue.groups
    if (
        queue.rows + request.rows <= policy.max_queue_rows
        and queue.nbytes + request.nbytes <= policy.max_queue_bytes
        and (len(groups) < MAX_GROUPS or request.key in groups)
    ):
        return None
    if request.rows > policy.max_queue_rows or request.nbytes > policy.max_queue_bytes:
        return never_fits(policy, request.rows, request.nbytes)
    if len(groups) >= MAX_GROUPS and request.key not in groups:
        return Rejected(
            "queue_shapes",
            f"Exceeds maximum queue size: requests of {MAX_GROUPS} different shapes wait, which cannot share batches; "
            "retry later",
        )
    if queue.rows + request.rows > policy.max_queue_rows:
        return Rejected(
            "queue_rows", f"Exceeds maximum queue size: {queue.rows} of {policy.max_queue_rows} rows wait; retry later"
        )
    return Rejected(
        "queue_bytes", f"Exceeds maximum queue size: {queue.nbytes} of {policy.max_queue_bytes} bytes wait; retry later"
    )


def admit_to_level(queue: PolicyQueue, request: InferRequest) -> Rejected | None:
    """What the queue policy of its priority level adds to `admit`. A split request counts as one here."""
    bound = queue.full_for(request)
    if not bound:
        return None
    level = queue.level_of(request)
    where = f" with priority {level}" if level else ""
    return Rejected(
        "queue_size",
        f"Exceeds maximum queue size: {bound} requests{where} wait, as many as max_queue_size allows; retry later",
    )


def admit_beside(
    queue: BatchQueue, rows: int, nbytes: int, policy: BatchPolicy, request: InferRequest
) -> Rejected | None:
    """What requests that wait beside the queue, for a repeated attempt, add to `admit`: they take room in it."""
    fits = queue.rows + rows + request.rows <= policy.max_queue_rows
    if fits and queue.nbytes + nbytes + request.nbytes <= policy.max_queue_bytes:
        return None
    return Rejected(
        "queue_rows",
        f"Exceeds maximum queue size: {queue.rows} rows wait, and {rows} rows for another attempt after one that "
        "failed; retry later",
    )


def admit_in_order(
    queue: BatchQueue, order: ArrivalOrder, policy: BatchPolicy, request: InferRequest
) -> Rejected | None:
    """What `preserve_ordering` adds to `admit`: answers that are held back take room in the queue."""
    rows, nbytes = queue.rows + order.rows, queue.nbytes + order.nbytes
    if rows + request.rows <= policy.max_queue_rows and nbytes + request.nbytes <= policy.max_queue_bytes:
        return None
    return Rejected(
        "queue_order",
        f"Exceeds maximum queue size: {queue.rows} rows wait, and the answers of {order.rows} for those of earlier "
        f"requests, which is as much as fits with preserve_ordering; retry later",
    )


def deadline_of(policy: BatchPolicy, request: InferRequest, queue_policy: QueuePolicy | None = None) -> float:
    """Monotonic instant by which the caller wants its answer; `request.received` must be set.

    OIP's `timeout` counts towards it only where no queue policy is stated for the request: there it is about queueing
    and nothing else (core/policy_queue.py).
    """
    allowed_s = request.timeout_s
    if request.stated_timeout_s and queue_policy is None:
        stated = request.stated_timeout_s
        allowed_s = min(allowed_s, stated) if allowed_s else stated
    return request.received + (min(allowed_s, MAX_TIMEOUT_S) if allowed_s else policy.deadline_s)
