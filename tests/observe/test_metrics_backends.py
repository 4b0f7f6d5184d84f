from __future__ import annotations

from dataclasses import replace

from gateway.core.agreement import AgreementStatistics, OutputAgreement
from gateway.observe.metrics_views import BACKEND_STATES, ReplicaView
from gateway.observe.record import ModelStatistics
from tests.observe.test_metrics import lines, metrics, view


def test_what_was_done_about_failures_is_counted_by_model() -> None:
    statistics = ModelStatistics()
    statistics.retry(3)
    statistics.hedge("won")
    statistics.hedge("lost")
    statistics.hedge("lost")
    statistics.poison(2)
    statistics.quarantine()
    statistics.attempt("a:8000", "overload")
    text = lines(metrics(view(statistics=statistics), view(version="2", statistics=statistics)))
    assert {
        'gateway_retries_total{model="m"} 6',
        'gateway_hedges_total{model="m",outcome="won"} 2',
        'gateway_hedges_total{model="m",outcome="lost"} 4',
        'gateway_hedges_total{model="m",outcome="failed"} 0',
        'gateway_poison_total{model="m"} 4',
        'gateway_quarantine_attempts_total{model="m"} 2',
        'gateway_backend_attempts_total{backend="a:8000",model="m",outcome="overload"} 2',
    } <= text


def test_a_backend_shows_one_state_its_slots_its_latency_and_why_it_was_ejected() -> None:
    replica = ReplicaView("a:8000", "half_open", 1, slots=2.5, latency_s=0.0125, ejections={"slow": 1, "ratio": 2})
    other = ReplicaView("b:8000", "closed", 2, slots=1.0)
    text = lines(metrics(view(replicas=[replica, other])))
    for state in BACKEND_STATES:
        wanted = int(state == "half_open")
        assert f'gateway_backend_state{{backend="a:8000",model="m",state="{state}"}} {wanted}' in text
    assert {
        'gateway_backend_slots{backend="a:8000",model="m"} 2.5',
        'gateway_backend_latency_seconds{backend="a:8000",model="m"} 0.0125',
        'gateway_backend_ejections_total{backend="a:8000",cause="slow",model="m"} 1',
        'gateway_backend_ejections_total{backend="a:8000",cause="ratio",model="m"} 2',
        'gateway_backend_inflight_batches{backend="b:8000",model="m"} 2',
    } <= text
    assert not [line for line in text if line.startswith("gateway_backend_ejections_total") and "b:8000" in line]


def test_panic_of_one_version_is_panic_of_the_model_and_budgets_add_up() -> None:
    calm = replace(view(version="1"), retry_budget_rows=100.0)
    panicking = replace(view(version="2"), retry_budget_rows=20.5, panic=True)
    text = lines(metrics(calm, panicking))
    assert 'gateway_panic{model="m"} 1' in text
    assert 'gateway_retry_budget_rows{model="m"} 120.5' in text
    assert 'gateway_panic{model="m"} 0' in lines(metrics(calm))


def test_agreement_is_the_worst_of_all_versions_and_only_there_where_asked_for() -> None:
    assert not [line for line in lines(metrics(view())) if line.startswith("gateway_agreement")]
    one = AgreementStatistics({"agreed": 3, "differed": 0}, (OutputAgreement("y", 0.5, 0.25, 1.0),))
    two = AgreementStatistics(
        {"agreed": 1, "differed": 2}, (OutputAgreement("y", 0.125, 0.75, 0.5), OutputAgreement("s", None, None, 0.25))
    )
    text = lines(metrics(replace(view(version="1"), agreement=one), replace(view(version="2"), agreement=two)))
    assert {line for line in text if line.startswith("gateway_agreement")} == {
        'gateway_agreement_batches_total{model="m",outcome="agreed"} 4',
        'gateway_agreement_batches_total{model="m",outcome="differed"} 2',
        'gateway_agreement_max_difference{measure="absolute",model="m",output="y"} 0.5',
        'gateway_agreement_max_difference{measure="relative",model="m",output="y"} 0.75',
        'gateway_agreement_min_equal_rows{model="m",output="y"} 0.5',
        'gateway_agreement_min_equal_rows{model="m",output="s"} 0.25',
    }
