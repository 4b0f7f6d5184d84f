"""Command line of the benchmarks; see the package's docstring."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

import benchmarks
from benchmarks.report import Outcome, save, show
from benchmarks.scenarios import SCENARIOS, Plan
from benchmarks.server import BenchmarkError


def parse(arguments: list[str] | None = None) -> tuple[list[str], Plan]:
    """Scenarios to run, in order, and how."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=benchmarks.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", nargs="*", help=f"any of: {', '.join(SCENARIOS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per system; medians are taken over them")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one round of one system")
    parser.add_argument("--without", action="append", default=[], choices=["nginx", "triton"], help="leave out")
    parser.add_argument("--tune-triton", action="store_true", help="search Triton's best flags first and keep them")
    parser.add_argument("--rows", type=int, default=Plan.rows, help="log-show: rows of the log that is read")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.scenario if name not in SCENARIOS]:
        parser.error(f"no scenario {', '.join(unknown)}; there are: {', '.join(SCENARIOS)}")
    plan = Plan(max(1, args.rounds), args.seconds, frozenset(args.without), args.tune_triton, max(1, args.rows))
    return args.scenario or list(SCENARIOS), plan


def main() -> int:
    """Exit code 0: everything was measured (whether or not a target was met), 1: something could not be."""
    names, plan = parse()
    console = Console(width=None if sys.stdout.isatty() else 150)
    outcomes: list[Outcome] = []
    try:
        for name in names:
            outcome = SCENARIOS[name](plan)
            show(outcome, console)
            outcomes.append(outcome)
    except BenchmarkError as error:
        console.print(f"[red]{name}[/red]: {error}", highlight=False)
        return 1
    finally:
        if outcomes:
            save(outcomes, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
