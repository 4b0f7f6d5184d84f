"""`gateway log …`: the inference log on the command line; options here, what is shown in `cli_log_text.py`.

Works beside a running gateway and without one: everything is read from the log's directory. That is `--dir`, else
`inference_log.directory` of the configuration (`-c`, GATEWAY_CONFIG), else `./inference-log`. Rule: show, query,
export and tail leave an entry in the stream `access` before they show anything.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from gateway.cli_text import Verb, count
from gateway.config import load
from gateway.config_log import InferenceLog
from gateway.config_tree import Tree, read_tree
from gateway.errors import ConfigError

if TYPE_CHECKING:
    from gateway.inference_log.retention import RetentionPolicy
    from gateway.inference_log.store import Store

log_app = typer.Typer(
    name="log",
    help="Read the inference log: every request, its answer, and which model gave it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
NEVER_DAYS: Final = 100_000
Directory = Annotated[
    Path | None,
    typer.Option("--dir", envvar="GATEWAY_INFERENCE_LOG", metavar="DIR", help="The log's directory."),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("-c", "--config", envvar="GATEWAY_CONFIG", metavar="FILE", help="Take it from this configuration."),
]
Model = Annotated[str | None, typer.Option("--model", metavar="NAME", help="Only this model.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON, complete.")]
From = Annotated[
    str | None,
    typer.Option("--from", metavar="TIME", help="Received at this time or later: 2026-11-23, or with T10:00 (UTC)."),
]
To = Annotated[str | None, typer.Option("--to", metavar="TIME", help="Received before this time.")]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the log lies."""

    directory: Path
    spill: Path | None = None
    retention_days: int | None = None
    """As configured; None: no configuration was named."""
    models: Mapping[str, int] = field(default_factory=dict)
    """Days of models that have a rule of their own."""
    sinks: tuple[str, ...] = ()

    def policy(self) -> RetentionPolicy:
        """Retention as configured; without a configuration nothing is deleted for its age."""
        from gateway.inference_log.retention import RetentionPolicy  # noqa: PLC0415 — heavy

        return RetentionPolicy(NEVER_DAYS if self.retention_days is None else self.retention_days, dict(self.models))


def place(directory: Path | None, config: Path | None) -> Place:
    """The log that the options mean.

    Raises:
        ConfigError: there is none.
    """
    if config is None:
        return Place(directory or Path("inference-log"))
    root = _keys(read_tree(config))
    if "inference_log" not in root:
        if directory is not None:
            return Place(directory)
        raise ConfigError(f"{config} keeps no inference log: it has no section inference_log; name one with --dir")
    try:
        section = InferenceLog.model_validate(root["inference_log"] or {})
    except ValueError:
        raise ConfigError(
            f"{config}: the section inference_log has faults; gateway check -c {config} names them"
        ) from None
    base = config.parent
    spill = base / section.spill_directory if section.spill_directory else None
    sinks = ("postgres",) if section.postgres is not None else ()
    days = _days(root.get("defaults")) or section.retention_days
    entries = root.get("models")
    models = {
        str(entry["name"]): found
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict) and "name" in entry and (found := _days(entry)) is not None
    }
    return Place(directory or base / section.directory, spill, days, models, sinks)


def _keys(tree: Tree) -> dict[str, Any]:
    """The file's top level. Only what concerns the log is looked at: models and servers may be long gone."""
    if tree.faults:
        raise ConfigError(tree.faults)
    return tree.value if isinstance(tree.value, dict) else {}


def _days(holder: object) -> int | None:
    """`inference_log.retention_days` of a model's entry, or of `defaults`."""
    keys = holder.get("inference_log") if isinstance(holder, dict) else None
    days = keys.get("retention_days") if isinstance(keys, dict) else None
    return days if isinstance(days, int) else None


def open_store(where: Place) -> Store:
    """The log for reading.

    Raises:
        ConfigError: there is none.
    """
    from gateway.inference_log.store import Store  # noqa: PLC0415 — heavy

    return Store(where.directory, where.spill)


def _record(where: Place, kind: str, what: dict[str, Any]) -> None:
    from gateway.inference_log import access_trail  # noqa: PLC0415 — heavy

    access_trail.record(where.directory, kind, {key: value for key, value in what.items() if value is not None})


def _console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False)


@log_app.command(cls=Verb)
def tail(
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as requests come, until interrupted.")] = False,
    lines: Annotated[
        int, typer.Option("-n", "--lines", min=0, max=100_000, help="Newest requests to begin with.")
    ] = 20,
    model: Model = None,
    status: Annotated[
        list[str] | None,
        typer.Option("--status", metavar="503|5xx|error", help="Only answers of this status; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """The newest requests, one line each; with -f as they come."""
    from gateway import cli_log_tail  # noqa: PLC0415 — heavy

    where = place(directory, config)
    store = open_store(where)
    chosen = cli_log_tail.Choice(model, cli_log_tail.statuses(status or ()))
    _record(where, "tail", {"model": model, "status": status, "follow": follow})
    cli_log_tail.tail(_console(), store, chosen, lines, follow=follow, as_json=as_json)


@log_app.command(cls=Verb)
def show(
    request_id: Annotated[
        str, typer.Argument(metavar="ID", help="An answer's X-Request-Id, the client's own, or the id of the OIP body.")
    ],
    as_json: Json = False,
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """One request with all that is known of it: input, answer, model, backend, batch, and who shared the batch."""
    from gateway import cli_log_text  # noqa: PLC0415 — heavy

    where = place(directory, config)
    store = open_store(where)
    _record(where, "show", {"id": request_id})
    cli_log_text.show(_console(), store, request_id, as_json=as_json)


@log_app.command(cls=Verb)
def query(
    sql: Annotated[
        str,
        typer.Argument(
            metavar="SQL",
            help="One SELECT on requests, lifecycle, gaps, feedback, labels, labelled, access; - reads it.",
        ),
    ],
    form: Annotated[
        str | None, typer.Option("--format", metavar="table|json|csv|parquet", help="table on a terminal, else json.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write it there.")] = None,
    memory_mb: Annotated[int, typer.Option("--memory-mb", min=64, max=1 << 20, help="Most memory for it.")] = 1024,
    threads: Annotated[int, typer.Option("--threads", min=1, max=256, help="Most threads for it.")] = 2,
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """SQL over the log (DuckDB's). `describe requests` names the columns."""
    from gateway import cli_log_query  # noqa: PLC0415 — heavy

    where = place(directory, config)
    store = open_store(where)
    text = sys.stdin.read() if sql == "-" else sql
    wanted = cli_log_query.Wanted(text, form, output, memory_mb, threads)
    wanted.check()
    _record(where, "query", {"sql": text})
    cli_log_query.query(_console(), _console(stderr=True), store, wanted)


@log_app.command(cls=Verb)
def export(
    form: Annotated[str, typer.Option("--as", metavar="parquet|jsonl|evidently|nannyml", help="What it is for.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Directory, made if it is not there.")],
    model: Model = None,
    start: From = None,
    end: To = None,
    names: Annotated[
        str | None,
        typer.Option("--names", metavar="A,B,…", help="Names of the features, in the order of the input's columns."),
    ] = None,
    prediction: Annotated[
        str | None, typer.Option("--prediction", metavar="OUTPUT", help="The output that is the prediction.")
    ] = None,
    probability: Annotated[
        str | None, typer.Option("--probability", metavar="OUTPUT", help="The output that holds class probabilities.")
    ] = None,
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Answered requests as flat tables for monitoring tools, labels joined: one file per model digest."""
    from gateway import cli_log_query  # noqa: PLC0415 — heavy
    from gateway.inference_log.exporting import Selection, export_log  # noqa: PLC0415 — heavy
    from gateway.inference_log.flattening import Roles  # noqa: PLC0415 — heavy

    where = place(directory, config)
    store = open_store(where)
    low, high = cli_log_query.moment_of(start, "--from"), cli_log_query.moment_of(end, "--to")
    roles = Roles(tuple(names.split(",")) if names else (), prediction, probability)
    _record(where, "export", {"model": model, "from": start, "to": end, "as": form, "output": str(output)})
    result = export_log(store, form, output, Selection(model, low, high), roles)
    cli_log_query.show_export(_console(), result, output)


@log_app.command(cls=Verb)
def stats(as_json: Json = False, directory: Directory = None, config: ConfigFile = None) -> None:
    """What the log holds: rows by model and status, losses, size, age, holds, what is sealed, how far sinks are."""
    from gateway import cli_log_stats  # noqa: PLC0415 — heavy

    where = place(directory, config)
    cli_log_stats.stats(_console(), open_store(where), where.retention_days, as_json=as_json)


@log_app.command(cls=Verb)
def verify(as_json: Json = False, directory: Directory = None, config: ConfigFile = None) -> None:
    """Check every segment: checksums, commit records, positions without holes. Exit code 1: something is wrong."""
    from gateway import cli_log_stats  # noqa: PLC0415 — heavy

    if not cli_log_stats.verify(_console(), open_store(place(directory, config)), as_json=as_json):
        raise typer.Exit(1)


def say(text: str) -> None:
    """A line for people."""
    _console().print(text, markup=False, highlight=False, soft_wrap=True)


def counted_rows(number: int) -> str:
    """`1 row`, `2 rows`."""
    return count(number, "row")


@log_app.command(cls=Verb)
def seal(directory: Directory = None, config: ConfigFile = None) -> None:
    """Turn what is still write-ahead log into Parquet once, and apply retention; a gateway does this by itself."""
    from gateway.inference_log import sealer  # noqa: PLC0415 — heavy
    from gateway.inference_log.sealer_settings import SealerSettings  # noqa: PLC0415

    where = place(directory, config)
    open_store(where)
    done = sealer.seal_by_hand(SealerSettings(where.directory, where.spill, where.policy(), where.sinks))
    lost = f", {counted_rows(done.lost_rows)} lost before" if done.lost_rows else ""
    say(f"{count(done.sealed_segments, 'segment')} sealed, {counted_rows(done.sealed_rows)}{lost}")


@log_app.command(cls=Verb)
def hold(
    action: Annotated[str, typer.Argument(metavar="add|list|release")] = "list",
    name: Annotated[str | None, typer.Argument(help="What the hold is called.")] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why; with add.")] = "",
    model: Annotated[
        list[str] | None, typer.Option("--model", metavar="NAME", help="Only rows of this model; repeatable.")
    ] = None,
    first: Annotated[
        str, typer.Option("--from", metavar="DATE", help="First day it covers; else from the beginning.")
    ] = "",
    last: Annotated[str, typer.Option("--to", metavar="DATE", help="Last day it covers; else open end.")] = "",
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Legal holds: what they cover is not deleted, whatever retention says, until they are released."""
    from gateway import cli_log_holds  # noqa: PLC0415 — heavy

    where = place(directory, config)
    if action == "list":
        cli_log_holds.show(_console(), open_store(where).layout)
        return
    if action not in ("add", "release"):
        raise ConfigError(f"'hold {action}' does not exist; write list, add or release")
    if name is None:
        raise ConfigError(f"name the hold: gateway log hold {action} NAME")
    layout = open_store(where).layout
    if action == "add":
        cli_log_holds.add(layout, name, reason, tuple(model or ()), (first, last))
    else:
        cli_log_holds.release(layout, name)
    say(f"hold {name} is {'in force' if action == 'add' else 'released'}")


@log_app.command(cls=Verb)
def ship(
    dsn: Annotated[
        str | None, typer.Option("--dsn", metavar="env:NAME|file:PATH", help="Where the data source name stands.")
    ] = None,
    wait: Annotated[float, typer.Option("--wait", min=0.1, help="Seconds that the database may take.")] = 600.0,
    showcase_tables: Annotated[
        bool, typer.Option("--showcase-tables", help="Fill the inference_… tables too.")
    ] = False,
    sql: Annotated[bool, typer.Option("--print-sql", help="Only print what makes the tables.")] = False,
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Copy what is not in PostgreSQL yet, once; a gateway with `inference_log: {postgres: …}` does this by itself."""
    from gateway import cli_log_ship  # noqa: PLC0415 — heavy
    from gateway.app_log import sink_job  # noqa: PLC0415 — heavy
    from gateway.inference_log.sink_state import NAME, Job, read_state  # noqa: PLC0415

    if sql:
        sys.stdout.write(cli_log_ship.print_sql(showcase=showcase_tables))
        return
    where = place(directory, config)
    job = None
    if config is not None and dsn is None:
        settings = load(config, {}, os.environ)
        if settings.inference_log is not None and settings.inference_log.postgres is not None:
            job = replace(sink_job(settings.inference_log, settings.base), directory=where.directory)
    elif dsn is not None:
        job = Job(where.directory, where.spill, dsn)
    if job is None:
        raise ConfigError("name the database: --dsn env:NAME, or -c with a file that has inference_log: {postgres: …}")
    open_store(where)
    before = read_state(job.directory, NAME)
    job = replace(job, showcase_tables=job.showcase_tables or showcase_tables)
    after = cli_log_ship.ship(
        job, wait, lambda text: _console(stderr=True).print(f"note: {text}", markup=False, soft_wrap=True)
    )
    say(cli_log_ship.shipped_line(before, after))


@log_app.command(cls=Verb)
def feedback(
    request_id: Annotated[str, typer.Argument(help="X-Request-Id of the answer.")],
    label: Annotated[str | None, typer.Option("--label", metavar="VALUE", help="The truth; JSON, else text.")] = None,
    old: Annotated[str | None, typer.Option("--old", metavar="VALUE", help="What the model said …")] = None,
    new: Annotated[str | None, typer.Option("--new", metavar="VALUE", help="… and what is used instead.")] = None,
    row: Annotated[int | None, typer.Option("--row", min=0, help="The request's row that is meant.")] = None,
    who: Annotated[str | None, typer.Option("--who", help="Who says it.")] = None,
    note: Annotated[str | None, typer.Option("--note", help="Why.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="Said once, however often it is sent.")] = None,
    ops_url: Annotated[
        str, typer.Option("--ops-url", envvar="GATEWAY_OPS_URL", help="Address of the operations port.")
    ] = "http://127.0.0.1:8002",
    token_file: Annotated[
        str | None,
        typer.Option("--token-file", envvar="GATEWAY_ADMIN_TOKEN_FILE", help="Its content allows feedback."),
    ] = None,
) -> None:
    """Say what was true, or what a person decided instead, of an answer of a running gateway."""
    from gateway import cli_log_ship  # noqa: PLC0415 — heavy
    from gateway.client import Access  # noqa: PLC0415

    said = cli_log_ship.Said(request_id, label, old, new, row, who, note, key)
    cli_log_ship.feedback(_console(), ops_url, said, Access(), token_file)
