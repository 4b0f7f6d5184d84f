"""`python -m tests.faults [NAME…] [--quick]`: inject faults, print the table.

A NAME is the start of a scenario's name (`02`, `30-goaway`). Without any, all but the long ones run: `campaign` and the
`rolling` ones run by name only. `--list` prints the names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import uvloop
from rich.console import Console

from tests.faults import report
from tests.faults.every import BY_NAME_ONLY, SCENARIOS
from tests.faults.registry import Scenario
from tests.faults.results import Result
from tests.faults.rig import Run, none_left


def chosen(names: list[str]) -> list[Scenario]:
    """Raises KeyError: a name that no scenario's begins with."""
    scenarios = sorted(SCENARIOS.values(), key=lambda one: one.name)
    if not names:
        return [one for one in scenarios if not one.name.startswith(BY_NAME_ONLY)]
    for name in names:
        if not any(one.startswith(name) for one in SCENARIOS):
            raise KeyError(name)
    return [one for one in scenarios if one.name.startswith(tuple(names))]


async def play(scenarios: list[Scenario], run: Run, console: Console) -> tuple[list[Result], int]:
    results = []
    try:
        for number, one in enumerate(scenarios, start=1):
            console.print(f"[{number}/{len(scenarios)}] {one.name}: {one.fault}", markup=False)
            try:
                result = await one.play(run)
            except Exception as error:
                result = Result(one.name, one.fault, one.expected)
                result.at_most(f"could not be played: {type(error).__name__} {str(error)[-600:]}", 1, 0)
            results.append(result)
            console.print(f"    {report.verdict(result)}", markup=False)
            for note in result.notes:
                console.print(f"    {note}", markup=False)
        return results, await none_left()
    finally:
        run.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a few seconds each, at a low rate: counts, no figures")
    parser.add_argument("--minutes", type=float, default=5.0, help="length of the campaign and of the rolling kills")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write RESULTS.md and results.json there")
    parser.add_argument("--list", action="store_true", help="print the names of all scenarios and stop")
    options = parser.parse_args()
    console = Console()
    if options.list:
        for one in SCENARIOS.values():
            console.print(f"{one.name:28} {one.fault}", markup=False, highlight=False)
        return 0
    try:
        scenarios = chosen(options.names)
    except KeyError as error:
        parser.error(f"no scenario begins with {error}; --list prints them all")
    results, left = uvloop.run(play(scenarios, Run(quick=options.quick, minutes=options.minutes), console))
    report.show(results, console)
    if left:
        console.print(f"{left} processes were left behind", style="red")
    if options.save:
        report.save(results, options.save, quick=options.quick)
    return 1 if left or any(result.broken for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
