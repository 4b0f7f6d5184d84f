"""Metric families by model, summed over its versions: who executes, what failed, what was done about it.

Labels are configured names, states, causes and outcomes: bounded sets, whatever clients or backends do.
"""

from __future__ import annotations

from gateway.core.agreement import AgreementStatistics
from gateway.observe.exposition import labels
from gateway.observe.metrics_table import Table
from gateway.observe.metrics_views import BACKEND_STATES, ModelView, ReplicaView


def describe(table: Table) -> None:
    for name, text in (
        ("rejected_total", "Requests refused for load or state, by reason"),
        ("retries_total", "Requests sent to a backend again after a failed attempt"),
        ("backend_attempts_total", "Batches sent to a backend, by outcome"),
        ("backend_ejections_total", "Times a backend was taken out for failing or being slow, by cause"),
        ("worker_restarts_total", "Restarts of the worker process behind a backend"),
        ("hedges_total", "Batches sent to a second backend because the first was late, by what the second came to"),
        ("poison_total", "Requests that break backends by themselves, and were refused"),
        ("quarantine_attempts_total", "Batches of suspects, run apart until it is known whose fault a failure was"),
        ("agreement_batches_total", "Batches drawn to be executed on a second backend too, by what came of it"),
    ):
        table.family(f"gateway_{name}", "counter", text)
    for name, text in (
        ("backend_state", "1 for the state a backend is in, 0 for the others"),
        ("backend_inflight_batches", "Batches a backend is executing"),
        ("backend_slots", "Batches a backend may be given at one time, as learned"),
        ("backend_latency_seconds", "Moving mean of how long a backend's batches take"),
        ("panic", "1 while ejected backends are used all the same, because too few others are left"),
        ("retry_budget_rows", "Rows that may be executed again now"),
        ("agreement_max_difference", "Largest difference between two backends' answers to the same rows, by output"),
        ("agreement_min_equal_rows", "Smallest share of equal rows in two backends' answers, by output"),
    ):
        table.family(f"gateway_{name}", "gauge", text)


def add(table: Table, view: ModelView) -> None:
    s, model = view.statistics, view.name
    named = labels(model=model)
    for reason, n in s.rejected.items():
        table.sum("gateway_rejected_total", labels(model=model, reason=reason), n)
    table.sum("gateway_retries_total", named, s.retries)
    table.sum("gateway_poison_total", named, s.poisoned)
    table.sum("gateway_quarantine_attempts_total", named, s.quarantine_attempts)
    for hedged, n in s.hedges.items():
        table.sum("gateway_hedges_total", labels(model=model, outcome=hedged), n)
    for (backend, outcome), n in s.attempts.items():
        table.sum("gateway_backend_attempts_total", labels(backend=backend, model=model, outcome=outcome), n)
    table.sum("gateway_retry_budget_rows", named, round(view.retry_budget_rows, 3))
    table.most("gateway_panic", named, int(view.panic))
    for replica in view.replicas:
        _add_backend(table, model, replica)
    if view.agreement is not None:
        _add_agreement(table, model, view.agreement)


def _add_backend(table: Table, model: str, replica: ReplicaView) -> None:
    backend = labels(backend=replica.name, model=model)
    table.sum("gateway_backend_inflight_batches", backend, replica.in_flight)
    table.sum("gateway_backend_slots", backend, round(replica.slots, 3))
    table.most("gateway_backend_latency_seconds", backend, replica.latency_s)
    # Versions and instances of a model may share a worker: its restarts are one number, not one each.
    table.most("gateway_worker_restarts_total", backend, replica.restarts)
    for cause, n in replica.ejections.items():
        table.sum("gateway_backend_ejections_total", labels(backend=replica.name, cause=cause, model=model), n)
    for state in dict.fromkeys((*BACKEND_STATES, replica.state)):
        shown = labels(backend=replica.name, model=model, state=state)
        table.most("gateway_backend_state", shown, int(state == replica.state))


def _add_agreement(table: Table, model: str, agreement: AgreementStatistics) -> None:
    for outcome, n in agreement.batches.items():
        table.sum("gateway_agreement_batches_total", labels(model=model, outcome=outcome), n)
    for seen in agreement.outputs:
        for measure, value in (("absolute", seen.max_absolute), ("relative", seen.max_relative)):
            if value is not None:
                shown = labels(measure=measure, model=model, output=seen.output)
                table.most("gateway_agreement_max_difference", shown, value)
        table.least("gateway_agreement_min_equal_rows", labels(model=model, output=seen.output), seen.min_equal_rows)
