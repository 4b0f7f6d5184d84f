"""`gateway models ACTION`: which action asks which port of a running gateway, and what it needs to be told.

The listings and everything about releases and variants are asked of the operations port; loading and unloading of the
data port, where Triton's clients ask for them too. Listings are short for programs: what people are shown beside them
is shown at a terminal only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from rich.console import Console

from gateway import cli_infer, cli_releases, cli_split
from gateway.client import Access
from gateway.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Wanted:
    """The words and options of one command."""

    action: str
    model: str | None
    url: str
    """Of the data port."""
    ops_url: str
    access: Access
    token_file: str | None
    force: bool
    """With refresh: also what was refused or rolled back from."""
    shares: Mapping[str, float | None]
    """With split: percent by role; None: not to be changed."""


def act(out: Console, wanted: Wanted) -> None:
    """Do it, and show what came of it.

    Raises:
        ConfigError: there is no such action; or it needs a model, and none is named.
        ClientError: no server, or it refuses.
    """
    if wanted.model is None and wanted.action in _OF_ONE_MODEL:
        raise ConfigError(f"name the model: gateway models {wanted.action} NAME")
    if wanted.action in _OF_ONE_MODEL:
        _OF_ONE_MODEL[wanted.action](out, wanted, wanted.model or "")
    elif wanted.action in ("list", "status"):
        _list(out, wanted, detailed=wanted.action == "status")
    else:
        *names, last = ["list", "status", *_OF_ONE_MODEL]
        raise ConfigError(f"'models {wanted.action}' does not exist; write {', '.join(names)} or {last}")


def _list(out: Console, wanted: Wanted, *, detailed: bool) -> None:
    cli_infer.models(out, wanted.ops_url, wanted.access, detailed=detailed, only=wanted.model)
    if not detailed or not out.is_terminal:
        return
    cli_split.show(out, wanted.ops_url, wanted.model, wanted.access)
    if wanted.model is not None:
        cli_releases.show(out, wanted.ops_url, wanted.model, wanted.access)


def _history(out: Console, wanted: Wanted, model: str) -> None:
    cli_releases.history(out, wanted.ops_url, model, wanted.access)


def _release(out: Console, wanted: Wanted, model: str) -> None:
    cli_releases.change(out, wanted.ops_url, wanted.action, model, wanted.access, wanted.token_file, force=wanted.force)


def _split(out: Console, wanted: Wanted, model: str) -> None:
    cli_split.act(out, wanted.ops_url, wanted.action, model, wanted.shares, wanted.access, wanted.token_file)


def _load(out: Console, wanted: Wanted, model: str) -> None:
    cli_infer.change_model(out, wanted.url, wanted.action, model, wanted.access)


_OF_ONE_MODEL: Final[Mapping[str, Callable[[Console, Wanted, str], None]]] = {
    "history": _history,
    "refresh": _release,
    "rollback": _release,
    "split": _split,
    "promote": _split,
    "load": _load,
    "unload": _load,
}
"""Actions that need a model's name."""
