"""What a person at the terminal sees: progress, the table of models, the demo's first answers, faults.

Rules: one screen, no escape codes when the output is not a terminal (rich decides), errors in one line each with
what to do next. Nothing here is on the path of a request.
"""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gateway.catalog import ServedVersion
from gateway.errors import ConfigError
from gateway.provenance.headers import Provenance, parse

SAMPLES: Final = Path(__file__).parent / "demo" / "samples"

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def show_error(message: str) -> None:
    """One line on stderr; a multi-line message keeps its lines."""
    err.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)


def show_faults(error: ConfigError) -> None:
    for fault in error.faults:
        show_error(str(fault))


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar over models being loaded; yields the function that reports one as done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("loading models", total=total)

        def advance(name: str) -> None:
            bar.update(task, advance=1, description=f"loaded {escape(name)}")

        yield advance


def show_started(versions: Sequence[ServedVersion], host: str, http_port: int, operations_port: int) -> None:
    """The table of models and the URLs."""
    table = Table(title="models", title_justify="left", expand=False)
    for column in ("name", "version", "digest", "workers", "state", "batching"):
        table.add_column(column, overflow="fold", no_wrap=column in {"version", "digest", "state"})
    for version in versions:
        table.add_row(
            escape(version.name),
            escape(version.version),
            version.spec.digest[:19] + "…",
            escape(", ".join(replica.name for replica in version.replicas)),
            f"[green]{version.state.value}[/green]",
            _batching(version),
        )
    out.print(table)
    out.print(f"inference   http://{_address(host, http_port)}/v2")
    out.print(f"operations  http://{_address(host, operations_port)}/  (metrics, models, workers)")


def _batching(version: ServedVersion) -> str:
    policy = version.spec.policy
    if not policy.max_batch_size:
        return "off"
    return f"up to {policy.max_batch_size} rows" if policy.merge else "requests run alone"


def show_demo(host: str, http_port: int, operations_port: int) -> None:
    """Send one real request to each bundled model and print what came back, and what to try next."""
    for sample in sorted(SAMPLES.glob("*.json")):
        request = json.loads(sample.read_text())
        if "request" not in request:
            continue
        url = f"http://{_address(host, http_port)}/v2/models/{sample.stem}/infer"
        answer, provenance = _post(url, request["request"])
        out.print(f"\n[bold]{escape(sample.stem)}[/bold]  {escape(_brief(answer))}")
        _show_provenance(provenance)
    name = _near(SAMPLES / "digits.json")
    out.print("\ntry next:")
    out.print(f"  curl -i http://{_address(host, http_port)}/v2/models/digits")
    out.print(f"  gateway infer digits @{name} -v", soft_wrap=True)
    out.print(f"  curl http://{_address(host, operations_port)}/metrics")
    out.print("Ctrl-C stops.")


def _near(path: Path) -> Path:
    """Relative to the working directory where that is shorter to type."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _post(url: str, document: Any) -> tuple[Any, Provenance]:
    body = json.dumps(document).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310  # own URL
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
        return json.load(response), parse(response.headers.items())


def _brief(answer: Any) -> str:
    return "  ".join(f"{output['name']}={_numbers(output['data'])}" for output in answer["outputs"])


def _numbers(data: list[Any]) -> str:
    shown = ", ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in data[:10])
    return f"[{shown}{', …' if len(data) > 10 else ''}]"


def _show_provenance(provenance: Provenance) -> None:
    model = provenance.model
    if model is not None:
        out.print(f"  model    {model.name} version {model.version} {model.digest}", markup=False, soft_wrap=True)
    for member in provenance.members:
        out.print(
            f"  executed by {member.backend}, attempt {member.attempt}, batch {member.batch_id} of {member.size} "
            f"rows, row {member.row}"
        )
    timings = ", ".join(f"{name} {ms:.2f} ms" for name, ms in provenance.timings_ms.items())
    out.print(f"  request  {provenance.request_id}   {timings}", soft_wrap=True)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
