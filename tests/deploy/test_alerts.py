"""Alerts about backends, evaluated by promtool's own engine on made-up series: which fire, and which do not."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ALERTS = Path(__file__).parent.parent.parent / "deploy" / "alerts.yml"
MODEL = 'instance="g",model="m"'

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def state(backend: str, shown: str, value: int = 1) -> str:
    return f'gateway_backend_state{{{MODEL},backend="{backend}",state="{shown}"}} {value}'


def firing(name: str, samples: Sequence[str], at: str = "5m", **labels: str) -> subprocess.CompletedProcess[str]:
    """Whether `name` fires (with exactly `labels`; none: it does not) while the samples stand for ten minutes."""
    series = [sample.rsplit(" ", 1) for sample in samples]
    document = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "5s",
        "tests": [
            {
                "interval": "5s",
                "input_series": [{"series": one, "values": f"{value}x120"} for one, value in series],
                "alert_rule_test": [{"eval_time": at, "alertname": name, "exp_alerts": _expected(labels)}],
            }
        ],
    }
    return subprocess.run(
        ["promtool", "test", "rules", "/dev/stdin"],
        input=json.dumps(document),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _expected(labels: Mapping[str, str]) -> list[dict[str, object]]:
    return [{"exp_labels": {"instance": "g", "model": "m", **labels}}] if labels else []


def matches(done: subprocess.CompletedProcess[str]) -> bool:
    """promtool compares annotations too, which are not what is tested: only the labels of what fires are looked at."""
    said = done.stdout + done.stderr
    return done.returncode == 0 or ("got:[" in said.replace(" ", "") and _labels(said, "exp:") == _labels(said, "got:"))


def _labels(said: str, which: str) -> list[str]:
    part = said.split(which, 1)[1].split("got:" if which == "exp:" else "\n\n", 1)[0]
    return [piece.split("}")[0] for piece in part.split("Labels:{")[1:]]


@pytest.mark.parametrize(
    ("name", "samples", "labels"),
    [
        ("BackendEjected", [state("a", "open")], {"backend": "a", "severity": "warning"}),
        ("BackendEjected", [state("a", "half_open")], {"backend": "a", "severity": "warning"}),
        ("BackendEjected", [state("a", "open", 0), state("a", "closed"), state("b", "drained")], {}),
        ("BackendUnavailable", [state("a", "unavailable")], {"backend": "a", "severity": "warning"}),
        ("BackendUnavailable", [state("a", "open")], {}),
        ("ModelHasNoBackend", [state("a", "closed", 0), state("a", "ramp", 0)], {"severity": "critical"}),
        ("ModelHasNoBackend", [state("a", "closed", 0), state("b", "ramp")], {}),
        ("ModelHasNoBackend", [state("a", "closed", 0), f"gateway_panic{{{MODEL}}} 1"], {}),
        ("ModelHasNoBackend", [state("a", "closed", 0), f"gateway_panic{{{MODEL}}} 0"], {"severity": "critical"}),
        ("Panic", [f"gateway_panic{{{MODEL}}} 1"], {"severity": "critical"}),
        ("Panic", [f"gateway_panic{{{MODEL}}} 0"], {}),
        ("RetryBudgetExhausted", [f'gateway_rejected_total{{{MODEL},reason="retry_budget_exhausted"}} 0+1'],
         {"severity": "critical"}),
        ("RetryBudgetExhausted", [f'gateway_rejected_total{{{MODEL},reason="overloaded"}} 0+1'], {}),
        ("BackendsDisagree", [f'gateway_agreement_batches_total{{{MODEL},outcome="differed"}} 0+1'],
         {"outcome": "differed", "severity": "warning"}),
        ("BackendsDisagree", [f'gateway_agreement_batches_total{{{MODEL},outcome="agreed"}} 0+1'], {}),
    ],
)  # fmt: skip
def test_what_fires(name: str, samples: Sequence[str], labels: Mapping[str, str]) -> None:
    done = firing(name, samples, **labels)
    assert matches(done), done.stdout + done.stderr


def test_the_comparison_sees_an_alert_that_does_not_fire() -> None:
    assert not matches(firing("Panic", [f"gateway_panic{{{MODEL}}} 0"], severity="critical"))
    assert not matches(firing("Panic", [f"gateway_panic{{{MODEL}}} 1"]))
    assert not matches(firing("Panic", [f"gateway_panic{{{MODEL}}} 1"], severity="warning"))
