"""What a person at the terminal sees: progress, the table of models, the demo's first answers, faults.

Rules: one screen, no escape codes when the output is not a terminal (rich decides), errors in one line each with
what to do next. Nothing here is on the path of a request.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TextIO, cast

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from gateway.catalog import ServedVersion
from gateway.errors import ConfigError
from gateway.provenance.headers import Provenance, parse

SAMPLES: Final = Path(__file__).parent / "demo" / "samples"

SHORT_DIGEST: Final = 19
"""Characters: `sha256:` and twelve digits."""
MB: Final = 1_000_000
_COLUMNS: Final = (
    ("name", "version", "digest", "backends", "state", "batching"),
    ("name", "version", "backends", "state", "batching"),
    ("name", "version", "backends", "state"),
)
"""Of the table of models; the first that fit the screen are shown."""
FOLDED: Final = 12
"""Characters of a name in a line, where it has to be folded."""
FRAME: Final = 1
FRAME_OF_COLUMN: Final = 3
"""Characters of a table besides its cells: a line at its end, and for each column a line and a space on both sides."""
MAX_VALUES: Final = 6
MAX_NAMES: Final = 20
NEAR_BY_DEFAULT: Final = ("127.0.0.1:8000", "localhost:8000", "0.0.0.0:8000")
"""Addresses that `gateway infer` finds without --url."""
DEFAULT_OPERATIONS_PORT: Final = 8002
"""And `gateway models` without --ops-url."""

log = logging.getLogger("gateway")
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def show_error(message: str) -> None:
    """One line on stderr; a multi-line message keeps its lines."""
    err.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)


def show_faults(error: ConfigError) -> None:
    for fault in error.faults:
        show_error(str(fault))


@contextlib.contextmanager
def progress(total: int) -> Iterator[Loading]:
    """A progress bar over models being loaded; yields what is called with the name of one that is done.

    It stands on standard error, where the log goes too: while it is shown, lines of the log are printed above it.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(
        *columns, console=err, transient=True, redirect_stdout=False, disable=not (total and err.is_terminal)
    )
    with bar, _log_above(err):
        yield Loading(bar, bar.add_task("loading models", total=total))


@contextlib.contextmanager
def fetching(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """What is shown while files arrive; yields what is told how many bytes of how many are there."""
    bar = Progress(
        TextColumn("{task.description}"), TimeElapsedColumn(), console=err, transient=True, disable=not err.is_terminal
    )
    with bar, _log_above(err):
        loading = Loading(bar, bar.add_task(f"asking for {escape(what)}", total=None))
        yield lambda done, total: loading.fetching(what, done, total)


class Loading:
    """What is shown of models while they are loaded; any thread may tell."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar = bar
        self._task = task

    def __call__(self, name: str) -> None:
        """One is done, whichever way."""
        self._bar.update(self._task, advance=1, description=f"loaded {escape(name)}")

    def fetching(self, name: str, done: int, total: int | None) -> None:
        """`done` bytes of a model's files have come out of its registry, of `total` if that is known."""
        amount = f"{done / MB:.1f} MB" if total is None else f"{done / MB:.1f} of {total / MB:.1f} MB"
        self._bar.update(self._task, description=f"fetching {escape(name)}: {amount}")


class _Above:
    """A stream whose lines rich prints above what is live on its console."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def write(self, text: str) -> None:
        self._console.print(Text(text), end="", soft_wrap=True)

    def flush(self) -> None:
        """Every write is complete."""


@contextlib.contextmanager
def _log_above(console: Console) -> Iterator[None]:
    """Meanwhile what the log writes to the console's terminal goes through the console."""
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if console.is_terminal and isinstance(handler, logging.StreamHandler) and handler.stream is console.file
    ]
    stream = cast("TextIO", _Above(console))
    former = [(handler, handler.setStream(stream)) for handler in handlers]
    try:
        yield
    finally:
        for handler, before in former:
            handler.setStream(before)


def show_not_loaded(versions: Sequence[ServedVersion], *, plain: bool = False) -> None:
    """One line a version that could not be loaded. Reasons that name the version themselves are not doubled.

    `plain`: in the log, where programs read the output.
    """
    for version in versions:
        place = f"model '{version.name}' version {version.version}"
        reason = version.reason
        text = reason if reason.startswith(place) else f"{place}: {reason}"
        if plain:
            log.error("could not be loaded: %s", text)
        else:
            show_error(text)


def show_started(
    versions: Sequence[ServedVersion],
    host: str,
    http_port: int,
    operations_port: int,
    *,
    grpc_port: int,
    encrypted: bool = False,
    plain: bool = False,
    loadable: Sequence[str] = (),
) -> None:
    """The table of models and the URLs; `plain`: one record of the log instead, where programs read the output.

    `loadable`: names of models that clients can load, for when none is loaded yet.
    """
    scheme = "https" if encrypted else "http"
    if plain:
        names = ", ".join(f"{version.name} version {version.version}" for version in versions) or "no model yet"
        inference, operations = _address(host, http_port), _address(host, operations_port)
        addresses = f"inference {scheme}://{inference}/v2, grpc {_address(host, grpc_port)}"
        log.info("serving %s; %s, operations http://%s/", names, addresses, operations)
        return
    if versions:
        out.print(_table(versions, out.width))
    else:
        _show_loadable(loadable, f"{scheme}://{_address(host, http_port)}")
    out.print(f"inference   {scheme}://{_address(host, http_port)}/v2")
    out.print(f"grpc        {_address(host, grpc_port)}{'  (TLS)' if encrypted else ''}")
    out.print(f"operations  http://{_address(host, operations_port)}/  (metrics, models, workers)")


def _show_loadable(names: Sequence[str], url: str) -> None:
    elsewhere = "" if url.startswith("http://") and url.removeprefix("http://") in NEAR_BY_DEFAULT else f" --url {url}"
    shown = ", ".join(names[:MAX_NAMES]) + (f", … ({len(names)} models)" if len(names) > MAX_NAMES else "")
    out.print(
        f"no model is loaded; load one with: gateway models load NAME{elsewhere} (there are: {shown or 'none'})",
        markup=False,
        soft_wrap=True,
    )


def _table(versions: Sequence[ServedVersion], width: int) -> Table | Text:
    """One row a version, on a screen of `width` columns.

    Lines break between words only. Where there is no room for that, columns are left out that `gateway models` shows;
    where that is not enough, long names are folded; and on the narrowest screens it is no table, but lines.
    """
    rows = [_row(version) for version in versions]
    for longest in (width, FOLDED):
        for columns in _COLUMNS:
            narrow, natural = _widths(columns, rows, longest)
            room = width - FRAME - FRAME_OF_COLUMN * len(columns) - sum(narrow)
            if room >= 0:
                return _spread(columns, rows, narrow, natural, room)
    return Text("\n".join(" ".join(row[column] for column in _COLUMNS[-1]) for row in rows))


def _spread(
    columns: Sequence[str], rows: Sequence[Mapping[str, str]], narrow: list[int], natural: list[int], room: int
) -> Table:
    """With columns as wide as `narrow`, and as near to `natural` as `room` allows, the last ones first."""
    widths = [*narrow]
    for place in reversed(range(len(columns))):
        more = max(0, min(room, natural[place] - narrow[place]))
        room -= more
        widths[place] += more
    table = Table(title="models", title_justify="left", expand=False)
    for column, width in zip(columns, widths, strict=True):
        table.add_column(column, width=width, overflow="fold")
    for row in rows:
        table.add_row(*[Text(row[column], style="green" if column == "state" else "") for column in columns])
    return table


def _row(version: ServedVersion) -> dict[str, str]:
    known = version.scheduler is not None  # a canary or a shadow may be loaded still, and nobody waits for it
    digest, batching = (_short(version.spec.digest) or "-", _batching(version)) if known else ("-", "-")
    cells = (digest, _backends(version), version.state.value, batching)
    return dict(zip(_COLUMNS[0], (version.name, version.version, *cells), strict=True))


def _widths(columns: Sequence[str], rows: Sequence[Mapping[str, str]], longest: int) -> tuple[list[int], list[int]]:
    """Of each column what its longest word takes (of names no more than `longest`), and what its longest cell takes."""
    cells = [[column, *[row[column] for row in rows]] for column in columns]
    words = [max(cell_len(word) for cell in column for word in cell.split(" ")) for column in cells]
    named = [column in {"name", "backends"} for column in columns]
    narrow = [min(word, longest) if name else word for word, name in zip(words, named, strict=True)]
    return narrow, [max(map(cell_len, column)) for column in cells]


def _backends(version: ServedVersion) -> str:
    """Who executes it: workers and remote servers, or for an ensemble its steps' models."""
    if version.dependencies:
        return f"ensemble of {', '.join(version.dependencies)}"
    return ", ".join(sorted((replica.name for replica in version.replicas), key=_natural))


def _short(digest: str) -> str:
    return digest[:SHORT_DIGEST] + "…" if len(digest) > SHORT_DIGEST else digest


def _natural(name: str) -> tuple[int, str]:
    """Sorts onnx-2 before onnx-10."""
    return len(name), name


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
        _show_answer(sample.stem, answer)
        _show_provenance(provenance)
    name = shlex.quote(str(_near(SAMPLES / "digits.json")))
    address = _address(host, http_port)
    elsewhere = "" if address in NEAR_BY_DEFAULT else f" --url http://{address}"
    operations = _address(host, operations_port)
    default = operations_port == DEFAULT_OPERATIONS_PORT and f"{host}:8000" in NEAR_BY_DEFAULT
    out.print("\ntry next:")
    for line in (
        f"curl -i http://{address}/v2/models/digits",
        f"{_program()} infer digits @{name} -v{elsewhere}",
        f"{_program()} models status{'' if default else f' --ops-url http://{operations}'}",
        f"curl http://{operations}/metrics",
    ):
        out.print(f"  {line}", markup=False, soft_wrap=True)
    out.print("Ctrl-C stops.")


def _program() -> str:
    """How this installation's `gateway` can be called from the working directory."""
    beside = Path(sys.executable).parent / "gateway"
    found = shutil.which("gateway")
    if found is not None and (not beside.exists() or Path(found).samefile(beside)):
        return "gateway"
    if beside.exists():
        return shlex.quote(str(_near(beside)))
    return f"{shlex.quote(str(_near(Path(sys.executable))))} -m gateway"


def _near(path: Path) -> Path:
    """Relative to the working directory where that is shorter to type."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _post(url: str, document: Any) -> tuple[Any, Provenance]:
    body = json.dumps(document).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310  # own URL
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
        return json.load(response), parse(response.headers.items())


def _show_answer(name: str, answer: Any) -> None:
    """The first row of each output: a whole batch does not fit on a screen, and a cut one would mislead."""
    outputs = answer["outputs"]
    rows = outputs[0]["shape"][0]
    out.print(f"\n[bold]{escape(name)}[/bold]  {'1 row sent' if rows == 1 else f'{rows} rows sent, row 0 of them:'}")
    for output in outputs:
        row = output["data"][: len(output["data"]) // output["shape"][0]]
        out.print(f"  {output['name']} = {_values(row)}", markup=False, soft_wrap=True)


def _values(row: list[Any]) -> str:
    shown = ", ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row[:MAX_VALUES])
    return f"[{shown}, … ({len(row)} values)]" if len(row) > MAX_VALUES else shown if len(row) == 1 else f"[{shown}]"


def _show_provenance(provenance: Provenance) -> None:
    model = provenance.model
    if model is not None:
        out.print(
            f"  model    {model.name} version {model.version} {_short(model.digest)}".rstrip(),
            markup=False,
            soft_wrap=True,
        )
    for member in provenance.members:
        out.print(
            f"  executed by {member.backend}, attempt {member.attempt}, batch {member.batch_id} of "
            f"{'1 row' if member.size == 1 else f'{member.size} rows'}, row {member.row}",
            markup=False,
            soft_wrap=True,
        )
    timings = ", ".join(f"{name} {ms:.2f} ms" for name, ms in provenance.timings_ms.items())
    out.print(f"  request  {provenance.request_id}", markup=False, soft_wrap=True)
    out.print(f"  time     {timings}", markup=False, soft_wrap=True)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
