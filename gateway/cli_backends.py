"""`gateway backends`: which backends a running gateway has, what state each is in and why; drain one, put it back.

Rules: a table where a person watches, tab-separated lines where a program reads, with every field in full. A drain that
is not over when the wait ends is no failure: it goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.cli_infer import natural, state_in_words
from gateway.client import Access, ClientError, ServerError, fetch

FIELDS: Final = (
    "model", "version", "backend", "state", "cause", "until", "slots", "in_flight", "latency_ms", "share", "kind",
    "zone", "url",
)  # fmt: skip
"""The columns for programs, in this order; empty ones are `-`."""
COLORS: Final = {
    "closed": "green", "ramp": "green", "half_open": "yellow", "open": "red", "unavailable": "red", "drained": "yellow",
}  # fmt: skip
MAX_TOKEN_CHARACTERS: Final = 4096
UNAUTHORIZED: Final = 401
NARROW: Final = 100
"""Columns of a terminal below which a table leaves out what `/api/backends` has."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to do with the backend `name`; see `gateway backends --help`."""

    action: str
    name: str
    model: str | None
    force: bool
    wait_s: float


def show(out: Console, url: str, access: Access, *, name: str | None, model: str | None) -> None:
    """One line a backend of a model version, from the operations port.

    Raises:
        ClientError: no server, an unexpected answer, or nothing of that name.
    """
    listed = _listed(url, access)
    chosen = [one for one in listed if (name is None or name in _names(one)) and model in (None, one["model"])]
    if not chosen and (name is not None or model is not None):
        names = ", ".join(sorted({str(one.get("backend")) for one in listed}, key=natural))
        of = f" of model '{model}'" if model is not None else ""
        what = f"no backend{of} is named '{name}'" if name is not None else f"model '{model}' has no backend here"
        raise ClientError(f"{what}; there are: {names or 'none'}")
    chosen.sort(key=lambda one: (str(one["model"]), natural(str(one.get("version"))), natural(str(one.get("backend")))))
    if not out.is_terminal:
        for one in chosen:
            out.file.write("\t".join(_cell(one.get(field)) for field in FIELDS) + "\n")
        return
    wide = out.width >= NARROW
    out.print(_table(chosen, wide=wide))
    for cause, held in [] if wide else _reasons(chosen):
        out.print(f"{', '.join(held)}: {cause}", markup=False, highlight=False)


def _names(one: Mapping[str, Any]) -> set[str]:
    """What people may call a backend: its own name, its server's, the server's address and URL."""
    url = str(one.get("url") or "")
    return {str(one.get("backend")), str(one.get("server")), url, url.rpartition("//")[2]} - {""}


def _listed(url: str, access: Access) -> list[dict[str, Any]]:
    try:
        listed = fetch(url, "/api/backends", access=access, option="--ops-url").json()
    except ServerError as error:
        raise ClientError(f"{error}; is {url} the operations port (8002 by default)? Name it with --ops-url") from None
    if not isinstance(listed, list) or not all(isinstance(one, dict) and "model" in one for one in listed):
        raise ClientError(
            f"{url} does not answer as the gateway's operations port (8002 by default); name it with --ops-url"
        )
    return listed


def _cell(value: object) -> str:
    return "-" if value in (None, "") else str(value)


def _table(chosen: Sequence[Mapping[str, Any]], *, wide: bool) -> Table:
    """A row a backend. A narrow one leaves out zone, slots and latency, and why, which then stands below it."""
    table = Table(show_edge=False)
    headings = ["model", "backend", "state", "in flight", "share"]
    headings += ["slots", "latency", "zone"] if wide else []
    for heading in headings:
        numeric = heading in ("in flight", "share", "slots", "latency")
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    if wide:
        table.add_column("why", overflow="fold")
    versions: dict[object, set[object]] = {}
    for one in chosen:
        versions.setdefault(one["model"], set()).add(one.get("version"))
    for one in chosen:
        name = str(one["model"])
        shown = f"{name}/{one.get('version')}" if len(versions[one["model"]]) > 1 else name
        state = str(one.get("state"))
        color = COLORS.get(state, "default")
        cells = [escape(shown), escape(str(one.get("backend")))]
        cells += [f"[{color}]{escape(state_in_words(state, one.get('seconds_left')))}[/{color}]"]
        cells += [str(one.get("in_flight", 0)), _share(one.get("share"))]
        if wide:
            latency = one.get("latency_ms")
            cells += [_number(one.get("slots")), "-" if latency is None else f"{latency:.1f} ms"]
            cells += [escape(_cell(one.get("zone"))), escape(str(one.get("cause") or ""))]
        table.add_row(*cells)
    return table


def _reasons(chosen: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Each reason once, with the backends that it holds for."""
    names: dict[str, list[str]] = {}
    for one in chosen:
        if cause := str(one.get("cause") or ""):
            held = names.setdefault(cause, [])
            held += [name] if (name := str(one.get("backend"))) not in held else []
    return list(names.items())


def _share(share: object) -> str:
    return f"{share:.0%}" if isinstance(share, int | float) else "-"


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else "-"


def change(out: Console, url: str, wanted: Wanted, access: Access, token_file: str | None) -> None:
    """Drain or undrain, and say what came of it.

    Raises:
        ClientError: no server, or its refusal.
    """
    options = {"model": wanted.model, "force": "true" if wanted.force else None}
    options["wait_s"] = f"{wanted.wait_s:.3f}" if wanted.wait_s else None
    query = urlencode({key: value for key, value in options.items() if value is not None})
    path = f"/api/backends/{quote(wanted.name, safe='')}/{wanted.action}" + (f"?{query}" if query else "")
    patient = replace(access, timeout_s=access.timeout_s + wanted.wait_s)
    with allowed(token_file) as headers:
        done = fetch(url, path, b"{}", headers, patient, option="--ops-url").json()
    for line in _report(wanted, done if isinstance(done, dict) else {}):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def allowed(token_file: str | None) -> Iterator[dict[str, str]]:
    """Headers of a request that changes something.

    Raises:
        ClientError: the token cannot be read, or the server wants one (raised by what is done inside).
    """
    headers = {"Content-Type": "application/json"}
    if token_file is not None:
        headers["Authorization"] = f"Bearer {read_token(token_file)}"
    try:
        yield headers
    except ServerError as error:
        if error.http_status != UNAUTHORIZED:
            raise
        raise ClientError(f"{error}; name a file that holds the token with --token-file") from None


def read_token(file: str) -> str:
    """The token that a file holds. Raises ClientError."""
    try:
        with Path(file).open(encoding="ascii") as opened:
            token = opened.read(MAX_TOKEN_CHARACTERS).strip()
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
        raise ClientError(f"cannot use --token-file {file}: {what}") from None
    if not token.isprintable() or not token:
        raise ClientError(f"cannot use --token-file {file}: it holds no token, which is one line of text")
    return token


def _report(wanted: Wanted, done: Mapping[str, Any]) -> list[str]:
    backends = [one for one in done.get("backends") or [] if isinstance(one, dict)]
    of = ", ".join(f"{one.get('model')} version {one.get('version')} on {one.get('backend')}" for one in backends)
    if wanted.action == "undrain":
        states = ", ".join(dict.fromkeys(state_in_words(str(one.get("state"))) for one in backends))
        return [f"{wanted.name} is undrained ({of}); now {states}"]
    flying = sum(int(one.get("in_flight") or 0) for one in backends)
    left = "1 batch" if flying == 1 else f"{flying} batches"
    rest = "nothing is under way there" if done.get("idle") else f"{left} still under way there"
    return [f"{wanted.name} is drained ({of}); {rest}"]
