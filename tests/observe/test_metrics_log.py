"""Families of the inference log: names that dashboards rely on, and nothing where there is nothing to say."""

from __future__ import annotations

from gateway.observe.exposition import render
from gateway.observe.metrics_log import LogView, SealerView, SinkView, WalView, families

VIEW = LogView(
    [SinkView("wal", 10, 2, failing=False), SinkView("postgres", 7, 0, failing=True, lag_rows=3, lag_seconds=1.5)],
    [WalView("wal", 100, 2000, 9, 4, 0.5, 0.1)],
    refused=5,
    blocked=True,
    waiting_bytes=60,
    gaps=1,
    sealer=SealerView(8, 1, 300, 400, over_limit=True, failing=False),
)


def test_every_number_has_its_sample() -> None:
    text = render(families(VIEW), openmetrics=False).decode()
    for line in (
        'gateway_inference_log_records_total{sink="wal"} 10',
        'gateway_inference_log_records_total{sink="postgres"} 7',
        'gateway_inference_log_dropped_total{sink="wal"} 2',
        'gateway_inference_log_failing{sink="postgres"} 1',
        'gateway_inference_log_lag_rows{sink="postgres"} 3',
        'gateway_inference_log_lag_seconds{sink="postgres"} 1.5',
        'gateway_inference_log_queue_bytes{sink="wal"} 100',
        'gateway_inference_log_synced_records_total{sink="wal"} 9',
        "gateway_inference_log_refused_total 5",
        "gateway_inference_log_blocked 1",
        "gateway_inference_log_waiting_bytes 60",
        "gateway_inference_log_gaps_total 1",
        "gateway_inference_log_sealed_rows 8",
        "gateway_inference_log_over_limit 1",
    ):
        assert line in text.splitlines(), line
    assert 'lag_rows{sink="wal"}' not in text


def test_every_family_has_a_sample() -> None:
    assert all(family.lines for family in families(VIEW))
