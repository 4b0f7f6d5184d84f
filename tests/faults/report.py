"""The table on the screen, and the same as files: RESULTS.md and results.json."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from tests.faults.results import Result

HEADINGS: Final = ("fault", "expected", "requests", "faults", "errors %", "p99 ratio", "detect", "recover", "l/w/d", "")


def cells(result: Result) -> tuple[str, ...]:
    """One line of the table."""
    if result.skipped:
        return (f"{result.name}: {result.fault}", result.expected, *("",) * 7, f"skipped: {result.skipped}")
    return (
        f"{result.name}: {result.fault}",
        result.expected,
        f"{result.requests:,}",
        f"{result.injected:,}",
        f"{result.error_percent:.2f}",
        "" if result.p99_ratio is None else f"{result.p99_ratio:.2f}",
        duration(result.detect_s),
        duration(result.recover_s),
        f"{result.lost}/{result.wrong}/{result.duplicated}",
        word(result),
    )


def word(result: Result) -> str:
    return "BROKEN" if result.broken else "missed" if result.missed else "ok"


def verdict(result: Result) -> str:
    if result.skipped:
        return f"skipped: {result.skipped}"
    if result.broken:
        said = [f"{count} x {text}" for text, count in result.texts.items()]
        return "BROKEN: " + "; ".join([*result.broken, f"outcomes {result.outcomes}", *said[:5]])
    if result.missed:
        return "missed: " + "; ".join(result.missed)
    return "as expected"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def show(results: Sequence[Result], console: Console) -> None:
    table = Table(show_lines=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in HEADINGS[2:8] else "left", overflow="fold")
    for result in results:
        style = "red" if result.broken else "yellow" if result.missed else "dim" if result.skipped else ""
        table.add_row(*cells(result), style=style)
    console.print(table)
    for result in results:
        if result.broken or result.missed:
            console.print(f"{result.name}: {verdict(result)}", markup=False)
    console.print(summary(results))


def summary(results: Sequence[Result]) -> str:
    played = [result for result in results if not result.skipped]
    rows, faults = sum(r.rows for r in played), sum(r.injected for r in played)
    lost, wrong, doubled = sum(r.lost for r in played), sum(r.wrong for r in played), sum(r.duplicated for r in played)
    text = (
        f"{len(played)} scenarios, {faults:,} faults injected, {rows:,} rows: {lost} lost, {wrong} wrong, {doubled} "
        f"duplicated; {sum(bool(r.broken) for r in played)} scenarios broken."
    )
    if rows and not lost + wrong + doubled:
        text += f" With 0 of {rows:,}, the 95 % upper bound is {3 / rows:.1g} a row."
    return text


def save(results: Sequence[Result], folder: Path, *, quick: bool) -> None:
    """Write RESULTS.md and results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "quick": quick,
        "results": [
            asdict(result) | {"broken": result.broken, "missed": result.missed, "p99_ratio": result.p99_ratio}
            for result in results
        ],
    }
    (folder / "results.json").write_text(json.dumps(document, indent=1, default=str) + "\n")
    lines = [f"{document['cores']} cores, Python {document['python']}. {summary(results)}", ""]
    lines += ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in cells(result)) + " |" for result in results]
    lines += ["", *(f"* {r.name}: {verdict(r)}" for r in results if r.broken or r.missed)]
    (folder / "RESULTS.md").write_text("\n".join(lines) + "\n")
