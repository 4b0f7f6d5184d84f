"""The parts of the benchmarks that decide a figure: rotation, medians, ratios, claims, the request that is sent."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from rich.console import Console

from benchmarks import triton
from benchmarks.__main__ import parse
from benchmarks.report import Claim, Outcome, save, show
from benchmarks.scenarios import SCENARIOS, interleave, rotate
from benchmarks.workload import WIDTHS, perceptron, request_body
from benchmarks.wrk import Round


def outcome() -> Outcome:
    result = Outcome("tiny-json", "what was asked")
    for rate in (100.0, 900.0, 110.0):
        result.add("gateway", Round(rate, 1000, 2000))
    for rate in (50.0, 48.0, 52.0):
        result.add("triton", Round(rate, 4000, 9000, batch=8))
    return result


def test_each_system_is_first_equally_often() -> None:
    orders = [rotate(["a", "b", "c"], number) for number in range(6)]
    assert Counter(order[0] for order in orders) == {"a": 2, "b": 2, "c": 2}
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)


def test_rounds_are_interleaved_and_a_later_measure_sees_the_earlier_one() -> None:
    result, order = Outcome("x", "y"), []

    def measure(name: str) -> Round:
        order.append(name)
        return Round(len(result.rounds["a"]), 0, 0)

    interleave(result, 2, {"a": lambda: measure("a"), "b": lambda: measure("b")})
    assert order == ["a", "b", "b", "a"]
    assert [r.rate for r in result.rounds["b"]] == [1, 1]


def test_medians_and_ratios_ignore_one_odd_round() -> None:
    assert outcome().rate("gateway") == 110
    assert outcome().ratio("gateway", "triton") == pytest.approx(2.2)
    assert outcome().p50_us("triton") == 4000


@pytest.mark.parametrize(
    ("claim", "met"),
    [
        (Claim("c", 0.31, 0.30), True),
        (Claim("c", 0.29, 0.30), False),
        (Claim("c", 0.2, 0.35, at_most=True, unit=" ms"), True),
        (Claim("c", 0.4, 0.35, at_most=True, unit=" ms"), False),
    ],
)
def test_a_claim_says_whether_it_is_met(claim: Claim, met: bool) -> None:
    assert claim.met is met
    assert str(claim).endswith("met" if met else "MISSED")


def test_report_shows_every_system_and_writes_what_was_measured(tmp_path: Path) -> None:
    result = outcome()
    result.claims.append(Claim("gateway to Triton", result.ratio("gateway", "triton"), 3.5))
    console = Console(width=150, record=True, quiet=True)
    with console.capture():
        show(result, console)
        path = save([result], console, tmp_path)
    written = json.loads(path.read_text())
    assert written["machine"]["onnxruntime"] == onnxruntime.__version__
    (scenario,) = written["scenarios"]
    assert [r["rate"] for r in scenario["rounds"]["gateway"]] == [100, 900, 110]
    assert scenario["met"] == [False]


def test_an_unquiet_machine_is_pointed_out() -> None:
    assert outcome().unsteady() == ["gateway"]


@pytest.mark.parametrize("model", ["tiny"])
def test_model_is_the_same_every_time_and_answers_as_announced(model: str) -> None:
    content = perceptron(WIDTHS[model])
    assert content == perceptron(WIDTHS[model])
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    rows = np.ones((3, 16), np.float32)
    assert session.run(["y"], {"x": rows})[0].shape == (3, 4)


def test_request_is_one_row_of_the_protocol() -> None:
    body = json.loads(request_body(np.linspace(0, 1, 16, dtype=np.float32)))
    (tensor,) = body["inputs"]
    assert (tensor["shape"], tensor["datatype"], len(tensor["data"])) == ([1, 16], "FP32", 16)


def test_triton_flags_are_known_and_unknown_scenarios_get_defaults() -> None:
    for scenario in json.loads(triton.FLAGS_FILE.read_text()):
        assert scenario in SCENARIOS
        assert triton.best_flags(scenario).max_batch >= 1
    assert triton.best_flags("no such scenario") == triton.Flags()


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    names, plan = parse(["heavy", "--rounds", "0", "--without", "triton"])
    assert (names, plan.rounds, plan.has("triton"), plan.has("nginx")) == (["heavy"], 1, False, True)
    assert parse([])[0] == list(SCENARIOS)
    with pytest.raises(SystemExit):
        parse(["havy"])
    assert "heavy" in capsys.readouterr().err
