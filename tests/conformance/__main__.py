"""Command line of the conformance kit; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

import tests.conformance
from tests.conformance import extensions, rest, rpc  # registers the checks, in this order of the table
from tests.conformance.checks import CHECKS, Result, Verdict, run_check
from tests.conformance.subject import Subject, Unexaminable

__all__ = ["extensions", "main", "rest", "rpc"]

COLOURS = {Verdict.PASSED: "green", Verdict.FAILED: "red", Verdict.NOT_OFFERED: "dim"}


def examine(subject: Subject, console: Console | None = None) -> list[Result]:
    """Run every check, in order."""
    checks = track(CHECKS, "checking", console=console, transient=True) if console is not None else CHECKS
    return [run_check(found, subject) for found in checks]


def show(subject: Subject, results: list[Result], console: Console) -> None:
    table = Table(title=f"{subject.url}, model {subject.model}", title_justify="left")
    for heading in ("check", "level", "result", "seen"):
        table.add_column(heading, overflow="fold")
    section = ""
    for result in results:
        if result.check.section != section:
            section = result.check.section
            table.add_section()
            table.add_row(f"[bold]{section}[/bold]")
        verdict = f"[{COLOURS[result.verdict]}]{result.verdict.value}[/]"
        table.add_row(result.check.id, result.check.level, verdict, escape(result.seen))
    console.print(table)
    console.print(summary(results))


def summary(results: list[Result]) -> Table:
    """Sections down, verdicts across."""
    table = Table(title="summary", title_justify="left")
    for heading in ("section", *[verdict.value for verdict in Verdict]):
        table.add_column(heading)
    counts = Counter((result.check.section, result.verdict) for result in results)
    for section in dict.fromkeys(result.check.section for result in results):
        table.add_row(section, *[str(counts[section, verdict]) for verdict in Verdict])
    table.add_section()
    table.add_row("all", *[str(sum(r.verdict is verdict for r in results)) for verdict in Verdict])
    return table


def as_json(subject: Subject, results: list[Result]) -> str:
    rows = [
        {
            "id": r.check.id,
            "section": r.check.section,
            "level": r.check.level,
            "source": r.check.source,
            "result": r.verdict.value,
            "seen": r.seen,
        }
        for r in results
    ]
    return json.dumps(
        {"url": subject.url, "grpc": subject.grpc_address, "model": subject.model, "checks": rows}, indent=1
    )


def list_checks(console: Console) -> None:
    table = Table("check", "level", "what has to hold", "source")
    for found in CHECKS:
        table.add_row(found.id, found.level, escape(found.what), escape(found.source))
    console.print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance",
        description=tests.conformance.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", nargs="?", help="where REST is served, for instance http://127.0.0.1:8000")
    parser.add_argument("--grpc", metavar="HOST:PORT", help="where gRPC is served; left out: not examined")
    parser.add_argument("--model", help="the model to ask (default: the first that answers)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there, too")
    parser.add_argument("--list", action="store_true", help="describe all checks and end")
    chosen = parser.parse_args(arguments)
    if chosen.url is None and not chosen.list:
        parser.error("the URL of a server is needed")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """See the package's docstring for the exit codes."""
    chosen = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    if chosen.list:
        list_checks(console)
        return 0
    with Subject(chosen.url, chosen.grpc, chosen.model) as subject:
        try:
            subject.prepare()
        except (Unexaminable, OSError) as error:
            console.print(f"[red]cannot be examined[/red]: {escape(str(error))}")
            return 2
        results = examine(subject, console)
        show(subject, results, console)
        if chosen.json is not None:
            chosen.json.write_text(as_json(subject, results) + "\n")
    return int(any(r.verdict is Verdict.FAILED and r.check.level == "required" for r in results))


if __name__ == "__main__":
    sys.exit(main())
