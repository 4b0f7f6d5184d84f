"""The command `gateway`: arguments → Config → what the verb does → exit code.

Exit codes: 0 done, or stopped cleanly · 1 the server refused or could not be reached · 2 bad usage or
configuration · 3 a port cannot be bound · 4 a required model could not be loaded · 130 interrupted.
Rules: never a bare traceback; `GATEWAY_DEBUG=1` shows it. Errors go to standard error. Heavy imports happen in the
verb that needs them, so that `--help` and `check` are instant.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

import gateway
from gateway.cli_log import log_app
from gateway.cli_options import (
    AllowClientShm,
    Authority,
    ConfigOption,
    GrpcPort,
    Headers,
    Host,
    HttpPort,
    Insecure,
    Instances,
    Later,
    LoadModel,
    Locked,
    LogFormat,
    LogLevel,
    MetricsPort,
    ModelCache,
    ModelControl,
    OpsUrl,
    SourceArguments,
    Timeout,
    TokenFile,
    Url,
    Workers,
    read_access,
)
from gateway.cli_text import Verb, harmless
from gateway.config import Config, json_schema, load
from gateway.errors import ConfigError, Fault, GatewayError
from gateway.extras import advice

EXIT_OK: Final = 0
EXIT_REFUSED: Final = 1
EXIT_CONFIG: Final = 2
EXIT_INTERRUPTED: Final = 130

app = typer.Typer(
    name="gateway",
    help="A high-throughput batching inference gateway for the Open Inference Protocol.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        _say(_console(), f"gateway {gateway.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """What holds for every verb."""


app.add_typer(log_app)


@app.command(cls=Verb)
def serve(
    sources: SourceArguments = None,
    config: ConfigOption = None,
    host: Host = None,
    http_port: HttpPort = None,
    grpc_port: GrpcPort = None,
    metrics_port: MetricsPort = None,
    workers: Workers = None,
    instances: Instances = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    insecure: Insecure = None,
    model_control: ModelControl = None,
    load_model: LoadModel = None,
    allow_client_shm: AllowClientShm = None,
    model_cache: ModelCache = None,
    locked: Locked = None,
    processes: Later = None,
) -> None:
    """Serve models over the Open Inference Protocol until told to stop."""
    options = {key: value for key, value in locals().items() if key not in ("sources", "config", "load_model")}
    options["load_models"] = load_model or None

    def read() -> Config:
        return load(config, options, os.environ).with_sources(sources or [])

    settings = read()
    _require_models(settings)
    _show_notes(settings)
    _run(settings, reread=read)


def _require_models(settings: Config) -> None:
    if not settings.models:
        hint = (
            "nothing to serve; name a SOURCE (a model repository, an .onnx file, a URL, models:/name@alias), or "
            "`models` in a -c file"
        )
        raise ConfigError([Fault(settings.file or "command line", 0, "", hint)])


def _show_notes(settings: Config) -> None:
    for note in settings.notes:
        _say(_console(stderr=True), f"warning: {note}")


@app.command()
def demo(
    host: Host = None,
    http_port: HttpPort = None,
    grpc_port: GrpcPort = None,
    metrics_port: MetricsPort = None,
    workers: Workers = None,
    instances: Instances = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    insecure: Insecure = None,
) -> None:
    """Serve the bundled models, send each a real request, show the answers, keep serving."""
    options = dict(locals())
    if "GATEWAY_LOG_LEVEL" not in os.environ:
        options["log_level"] = log_level or "warning"
    models = Path(gateway.__file__).parent / "demo" / "models"
    settings = load(None, options, os.environ).with_sources([str(models)])
    _show_notes(settings)
    _run(settings, demo=True)


def _run(config: Config, *, demo: bool = False, reread: Callable[[], Config] | None = None) -> None:
    from gateway.app import run  # noqa: PLC0415  # see the header

    code = run(config, demo=demo, reread=reread)
    if code:
        raise typer.Exit(code)


@app.command(
    help="Check a configuration file and the models it names; print every fault at once.\n\n"
    "Reads every config.pbtxt and every model file, and compares the files with the digests that are pinned. "
    "Loads no model into onnxruntime: a file that is no model, or that contradicts its config.pbtxt, shows when "
    "serving starts (exit code 4)."
)
def check(
    config: Annotated[Path, typer.Option("-c", "--config", envvar="GATEWAY_CONFIG", help="The file to check.")],
) -> None:
    from gateway import cli_check  # noqa: PLC0415  # see the header

    settings = load(config, {}, os.environ)
    _require_models(settings)
    served, notes = cli_check.check_models(settings)
    _show_notes(settings)
    for note in notes:
        _say(_console(stderr=True), f"note: {note}")
    _say(_console(), f"{config}: no faults; {served}; no model was loaded")


@app.command()
def lock(
    sources: SourceArguments = None,
    config: Annotated[
        Path | None, typer.Option("-c", "--config", envvar="GATEWAY_CONFIG", help="The file with the models.")
    ] = None,
    model_cache: ModelCache = None,
) -> None:
    """Ask the registries what every model reference means now, fetch it, and write models.lock.

    Shows what changed. With registries.locked: true (--locked) a gateway serves only what the lock names.
    """
    from gateway import cli_registry  # noqa: PLC0415  # see the header

    settings = load(config, {"model_cache": model_cache}, os.environ).with_sources(sources or [])
    cli_registry.lock(_console(), settings)


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(help="The scikit-learn model: .pkl, .pickle or .joblib.")],
    out: Annotated[Path, typer.Argument(help="The ONNX file to write, for example models/digits/1/model.onnx.")],
    trusted: Annotated[
        bool, typer.Option("--i-trust-this-pickle", help="A pickle is a program; this says that it may run here.")
    ] = False,
    features: Annotated[int, typer.Option(min=0, help="Columns of the model's input; 0: as the model says.")] = 0,
    memory_mb: Annotated[int, typer.Option(min=256, help="Memory that the conversion may take, in MiB.")] = 4096,
    time_s: Annotated[int, typer.Option(min=1, help="Time that it may take, in seconds.")] = 300,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest difference, relative to the number or to 1.")] = 1e-3,
) -> None:
    """Turn a scikit-learn pickle into an ONNX model, compare their answers, and write its provenance beside it.

    The pickle is opened in a process of its own, without network and in bounded memory and time. That process still
    runs as you: it can read and write your files.
    """
    from gateway import cli_convert  # noqa: PLC0415  # see the header

    cli_convert.convert_file(
        _console(), model, out, features, trusted=trusted, memory_mb=memory_mb, time_s=time_s, tolerance=tolerance
    )


@app.command()
def schema() -> None:
    """Print the configuration's JSON Schema, for editors."""
    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")


@app.command()
def infer(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    data: Annotated[
        str,
        typer.Argument(help='JSON rows, {"input": rows}, an OIP request, @file.json, @file.npy, or - (stdin).'),
    ],
    url: Url = "http://127.0.0.1:8000",
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Add provenance and timings.")] = False,
    timeout: Timeout = 60.0,
    header: Headers = None,
    ca: Authority = None,
) -> None:
    """Send one request and show the answer."""
    from gateway import cli_infer  # noqa: PLC0415  # see the header

    access = read_access(timeout, header, ca)
    cli_infer.infer(_console(), _console(stderr=True), model, data, url, access, verbose=verbose)


@app.command()
def models(
    action: Annotated[
        str,
        typer.Argument(
            metavar="list|status|history|refresh|rollback|split|promote|load|unload",
            help="`status` adds batching and load; `refresh` asks the model's source now; `rollback` goes back; "
            "`split` shows or changes the shares of its canary and shadow; `promote` lets the canary take over.",
        ),
    ] = "list",
    model: Annotated[str | None, typer.Argument(help="Only this model; the one to act on.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="With refresh: also what was refused or rolled back from.")
    ] = False,
    canary: Annotated[
        float | None,
        typer.Option("--canary", metavar="PERCENT", help="With split: the canary's share of the requests."),
    ] = None,
    shadow: Annotated[
        float | None, typer.Option("--shadow", metavar="PERCENT", help="With split: the share that the shadow is sent.")
    ] = None,
    url: Url = "http://127.0.0.1:8000",
    ops_url: OpsUrl = "http://127.0.0.1:8002",
    token_file: TokenFile = None,
    timeout: Timeout = 60.0,
    header: Headers = None,
    ca: Authority = None,
) -> None:
    """List the models of a running gateway: version, state, digest, backends; or change what one serves.

    Loading and unloading need a gateway that was started with --model-control explicit.
    """
    from gateway import cli_models  # noqa: PLC0415  # see the header

    access = read_access(timeout, header, ca)
    shares = {"canary": canary, "shadow": shadow}
    cli_models.act(
        _console(), cli_models.Wanted(action, model, url, ops_url, access, token_file, force=force, shares=shares)
    )


@app.command()
def backends(
    action: Annotated[
        str, typer.Argument(metavar="list|drain|undrain", help="`drain`: no new batches; `undrain` lifts that.")
    ] = "list",
    name: Annotated[str | None, typer.Argument(help="A backend; or a server, or host:port: all there.")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="Only for this model.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Drain the last one that can serve a model, too.")] = False,
    wait: Annotated[
        float, typer.Option("--wait", min=0.0, max=600.0, help="With drain: seconds to wait until it is idle.")
    ] = 0.0,
    ops_url: OpsUrl = "http://127.0.0.1:8002",
    token_file: TokenFile = None,
    timeout: Timeout = 60.0,
    header: Headers = None,
    ca: Authority = None,
) -> None:
    """List the backends of a running gateway: state, why, until when; or drain one and put it back."""
    from gateway import cli_backends  # noqa: PLC0415  # see the header

    access = read_access(timeout, header, ca)
    if action in ("drain", "undrain"):
        if name is None:
            raise ConfigError(f"name the backend: gateway backends {action} NAME")
        wanted = cli_backends.Wanted(action, name, model, force, wait)
        cli_backends.change(_console(), ops_url, wanted, access, token_file)
        return
    if action != "list":
        raise ConfigError(f"'backends {action}' does not exist; write list, drain or undrain")
    cli_backends.show(_console(), ops_url, access, name=name, model=model)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="gateway")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_REFUSED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`gateway models | head`); nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_REFUSED
    except Exception as error:
        if os.environ.get("GATEWAY_DEBUG") == "1":
            raise
        return _explain(error)
    return EXIT_OK


def _explain(error: Exception) -> int:
    console = _console(stderr=True)
    if isinstance(error, ConfigError):
        for fault in error.faults:
            _say(console, f"error: {harmless(str(fault)).removeprefix(': ')}")
        return EXIT_CONFIG
    if isinstance(error, GatewayError):
        _say(console, f"error: {harmless(str(error))}")  # it may repeat what a client, or a registry, wrote
        return EXIT_REFUSED
    if isinstance(error, ModuleNotFoundError) and (told := advice((error.name or "").partition(".")[0])):
        _say(console, f"error: this {told}")
        return EXIT_CONFIG
    what = " ".join(str(error).split())[:300] or "no further text"
    _say(
        console,
        f"error: {type(error).__name__}: {what}; this is a fault of the gateway, GATEWAY_DEBUG=1 shows where",
    )
    return EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
