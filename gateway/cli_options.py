"""The arguments and options that several verbs share: names, variables, and the help that is shown for each.

Rules: one meaning, one option, whatever the verb. A help names its variable and its default; the variables of what a
configuration file can say too are read by gateway.config alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from gateway.client import Access
from gateway.errors import ConfigError

SourceArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SOURCE",
        help="A model repository, one model's directory, an .onnx file, a running server's URL, or a registry's "
        "models:/name@alias.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("-c", "--config", envvar="GATEWAY_CONFIG", help="The configuration file (YAML)."),
]
# The variables are read by gateway.config, which knows their precedence; the help names them.
Host = Annotated[str | None, typer.Option(help="Address to listen on (127.0.0.1; GATEWAY_HOST).")]
HttpPort = Annotated[int | None, typer.Option(help="Port of OIP over HTTP (8000; GATEWAY_HTTP_PORT).")]
GrpcPort = Annotated[int | None, typer.Option(help="Port of OIP over gRPC (8001; GATEWAY_GRPC_PORT).")]
MetricsPort = Annotated[int | None, typer.Option(help="Port of /metrics and /api (8002; GATEWAY_METRICS_PORT).")]
Workers = Annotated[int | None, typer.Option(help="ONNX worker processes (one a core, at least 2; GATEWAY_WORKERS).")]
Instances = Annotated[int | None, typer.Option(help="Copies of each model (2; GATEWAY_INSTANCES).")]
LogLevel = Annotated[
    str | None,
    typer.Option(metavar="debug|info|warning|error", help="Least severe level (info; GATEWAY_LOG_LEVEL)."),
]
LogFormat = Annotated[
    str | None, typer.Option(metavar="console|json", help="Form of the log (console; GATEWAY_LOG_FORMAT).")
]
Insecure = Annotated[
    bool | None,
    typer.Option("--insecure", help="Allow a --host that other machines reach (GATEWAY_INSECURE)."),
]
ModelControl = Annotated[
    str | None,
    typer.Option(
        metavar="none|poll|explicit",
        help="Models at run time: fixed, following the sources, or loaded on request (none; GATEWAY_MODEL_CONTROL).",
    ),
]
LoadModel = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="With --model-control explicit: load it at start; repeatable, * is all."),
]
AllowClientShm = Annotated[
    bool | None,
    typer.Option("--allow-client-shm", help="Let local clients share memory for tensors (GATEWAY_ALLOW_CLIENT_SHM)."),
]
ModelCache = Annotated[
    str | None,
    typer.Option(metavar="DIRECTORY", help="Where files from registries are kept, by digest (GATEWAY_MODEL_CACHE)."),
]
Locked = Annotated[
    bool | None,
    typer.Option("--locked", help="Serve only what models.lock names, and ask no registry (GATEWAY_LOCKED)."),
]
# Options of later versions: known, so that they are answered with a reason instead of "no such option".
Later = Annotated[str | None, typer.Option(hidden=True)]
Url = Annotated[str, typer.Option(envvar="GATEWAY_URL", help="Address of the data port.")]
OpsUrl = Annotated[str, typer.Option("--ops-url", envvar="GATEWAY_OPS_URL", help="Address of the operations port.")]
TokenFile = Annotated[
    str | None,
    typer.Option("--token-file", envvar="GATEWAY_ADMIN_TOKEN_FILE", help="Its content allows to change something."),
]
Timeout = Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds to wait for an answer.")]
Headers = Annotated[
    list[str] | None,
    typer.Option("--header", metavar="NAME=VALUE", help="Send this header, for restricted APIs; repeatable."),
]
Authority = Annotated[
    str | None,
    typer.Option("--ca", metavar="FILE", help="Trust the authorities in this PEM file (https; SSL_CERT_FILE)."),
]
_HEADER: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)=([\x20-\x7e]*)")


def read_access(timeout_s: float, headers: Sequence[str] | None, ca: str | None) -> Access:
    """How a server is reached, as the options say. Raises ConfigError: a header that is not NAME=VALUE."""
    read: dict[str, str] = {}
    for text in headers or ():
        found = _HEADER.fullmatch(text)
        if found is None:  # what it says may be a secret, and is not repeated
            name = text.partition("=")[0] if "=" in text else ""
            raise ConfigError(f"--header {name[:64]!r}: write NAME=VALUE, in printable ASCII")
        read[found[1]] = found[2].strip()
    return Access(timeout_s, read, ca)
