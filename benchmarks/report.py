"""From rounds to figures: medians, ratios, the table on the screen and the JSON file beside it."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

import onnxruntime
from rich.console import Console
from rich.table import Table

from benchmarks.wrk import Round

RESULTS: Final = Path(__file__).parent / "results"
UNSTEADY: Final = 1.25
"""Fastest round over slowest, of one system; a quiet machine stays below 1.1."""


@dataclass(frozen=True)
class Claim:
    """A figure the gateway is to reach: `value` compared with `target`."""

    text: str
    value: float
    target: float
    at_most: bool = False
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.value <= self.target if self.at_most else self.value >= self.target

    def __str__(self) -> str:
        sign = "≤" if self.at_most else "≥"
        verdict = "met" if self.met else "MISSED"
        return f"{self.text}: {self.value:.3g}{self.unit} (target {sign} {self.target:g}{self.unit}) {verdict}"


@dataclass
class Outcome:
    """One scenario: all rounds of all systems, in the order they were run."""

    scenario: str
    what: str
    rate_unit: str = "requests/s"
    rounds: dict[str, list[Round]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    """Anything measured that is not a round of load, by name with unit."""

    def add(self, system: str, result: Round) -> None:
        self.rounds.setdefault(system, []).append(result)

    def rate(self, system: str) -> float:
        return median(r.rate for r in self.rounds[system])

    def p50_us(self, system: str) -> float:
        return median(r.p50_us for r in self.rounds[system])

    def unsteady(self) -> list[str]:
        """Systems whose fastest round is far above their slowest: something else used the machine."""
        spans = {name: [r.rate for r in rounds] for name, rounds in self.rounds.items()}
        return [name for name, rates in spans.items() if max(rates) > UNSTEADY * min(rates)]

    def ratio(self, over: str, under: str) -> float:
        """Median rate of `over` as a multiple of that of `under`."""
        return self.rate(over) / self.rate(under)


def machine() -> dict[str, str | int]:
    """What the figures were measured on, for the JSON file."""
    models = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }


def show(outcome: Outcome, console: Console) -> None:
    console.print(f"\n[bold]{outcome.scenario}[/bold]: {outcome.what}")
    if outcome.rounds:
        console.print(_table(outcome))
    for name, value in outcome.figures.items():
        console.print(f"  {name}: {value:.4g}")
    if names := outcome.unsteady():
        console.print(f"  rounds of {', '.join(names)} differ widely: the machine was not quiet", style="yellow")
    for claim in outcome.claims:
        console.print(f"  {claim}", style="green" if claim.met else "red", highlight=False)


def _table(outcome: Outcome) -> Table:
    table = Table("system", outcome.rate_unit, "min … max", "p50 ms", "p99 ms", "rows/batch", "gateway is", "flags")
    for column in table.columns[1:-1]:
        column.justify = "right"
    for system, rounds in outcome.rounds.items():
        rates = [r.rate for r in rounds]
        batch = median(r.batch for r in rounds)
        table.add_row(
            system,
            f"{median(rates):,.0f}",
            f"{min(rates):,.0f} … {max(rates):,.0f}",
            f"{outcome.p50_us(system) / 1e3:.3f}",
            f"{median(r.p99_us for r in rounds) / 1e3:.3f}",
            f"{batch:.1f}" if batch else "",
            f"{outcome.ratio('gateway', system):.2f} x" if "gateway" in outcome.rounds else "",
            outcome.notes.get(system, ""),
        )
    return table


def save(outcomes: list[Outcome], console: Console, folder: Path = RESULTS) -> Path:
    """Write everything measured as JSON; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = folder / f"{started}.json"
    scenarios = [asdict(o) | {"met": [c.met for c in o.claims]} for o in outcomes]
    path.write_text(json.dumps({"machine": machine(), "utc": started, "scenarios": scenarios}, indent=1) + "\n")
    console.print(f"\nwritten to {path}")
    return path
