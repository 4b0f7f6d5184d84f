"""`gateway convert`: what a person sees of a conversion."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from gateway.conversion import Bounds, convert
from gateway.errors import ConfigError
from gateway.provenance.manifest import SIDECAR


def convert_file(
    out: Console,
    source: Path,
    target: Path,
    features: int,
    *,
    trusted: bool,
    memory_mb: int,
    time_s: int,
    tolerance: float,
) -> None:
    """Convert one model and tell what came of it.

    Raises:
        ConfigError: nobody said that the pickle is trusted, or it cannot be converted.
    """
    if not trusted:
        raise ConfigError(
            f"{source}: opening a pickle runs whatever its author put in; if you know where it comes from, say so with "
            "--i-trust-this-pickle"
        )
    done = convert(source, target, features, Bounds(memory_mb, time_s, tolerance))
    lines = [
        f"{target}: {done.model} with {done.features} features",
        *done.figures,
        f"{target.parent / SIDECAR}: made from {source.name}, sha256:{done.sha256}",
        *(f"note: {note}" for note in done.notes),
    ]
    if not done.isolated:
        lines.append("note: the process that opened the pickle had the network: this system allows no namespaces")
    for line in lines:
        out.print(escape(line), soft_wrap=True, highlight=False)
