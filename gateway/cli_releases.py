"""`gateway models history|refresh|rollback`: which releases of a model there were, why one was refused; ask its source
now; go back to the former one.

Rules: a table where a person watches, tab-separated lines where a program reads, with every field in full.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.cli_backends import UNAUTHORIZED, read_token
from gateway.client import Access, ClientError, ServerError, fetch

WAIT_S: Final = 600.0
"""A release may have to be fetched and loaded first."""
FIELDS: Final = (
    "at", "outcome", "by", "from_version", "from_digest", "to_version", "to_digest", "to_uri", "took_s", "why",
)  # fmt: skip
"""The columns for programs, in this order; empty ones are `-`."""
SHOWN: Final = 5


def history(out: Console, url: str, model: str, access: Access) -> None:
    """One line for everything that happened to a model's serving version, the oldest first.

    Raises:
        ClientError: no server, or no such model.
    """
    lines = [_line(one) for one in _status(url, model, access).get("history") or []]
    if not out.is_terminal:
        for line in lines:
            out.file.write("\t".join(line[field] for field in FIELDS) + "\n")
        return
    table = Table(show_edge=False)
    for heading in ("when", "what", "by", "from", "to", "took", "why"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("when", "what"))
    for line in lines:
        took = "-" if line["took_s"] == "-" else f"{line['took_s']} s"
        cells = [line["at"], _words(line), line["by"], line["from_version"], line["to_version"], took, line["why"]]
        table.add_row(*map(escape, cells))
    out.print(table)


def show(out: Console, url: str, model: str, access: Access) -> None:
    """What serves, what is kept for a rollback, what was refused, and what happened last: a block for people."""
    status = _status(url, model, access)
    for one in status.get("releases") or []:
        text = f"  {one.get('role', ''):<15} version {one.get('version')}  {one.get('digest') or '-'}  {one.get('uri')}"
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    asked = "not asked since the start" if status.get("asked_at") is None else f"asked last {_when(status['asked_at'])}"
    lines = {
        "followed": f"{status.get('reference')}, every {status.get('interval_s'):g} s, {asked}"
        if status.get("followed")
        else "",
        "unreachable": status.get("trouble"),
        "refused": status.get("refused"),
        "withheld": f"{status['withheld']}, until the source means something else, or: "
        f"gateway models refresh {shlex.quote(model)} --force"
        if status.get("withheld")
        else "",
    }
    for heading, value in lines.items():
        if value:
            out.print(f"  {heading:<15} {value}", markup=False, highlight=False, soft_wrap=True)
    for one in [_line(one) for one in status.get("history") or []][-SHOWN:]:
        why = f": {one['why']}" if one["why"] != "-" else ""
        versions = one["to_version"] if one["from_version"] == "-" else f"{one['from_version']} -> {one['to_version']}"
        text = f"  {one['at']}  {_words(one)} by {one['by']}, {versions}{why}"
        out.print(text, markup=False, highlight=False, soft_wrap=True)


def change(
    out: Console, url: str, action: str, model: str, access: Access, token_file: str | None, *, force: bool
) -> None:
    """Refresh or roll back, and say what came of it.

    Raises:
        ClientError: no server, or its refusal.
    """
    query = f"?wait_s={WAIT_S:g}" + ("&force=true" if force else "")
    headers = {"Content-Type": "application/json"}
    if token_file is not None:
        headers["Authorization"] = f"Bearer {read_token(token_file)}"
    patient = replace(access, timeout_s=access.timeout_s + WAIT_S)
    path = f"/api/models/{quote(model, safe='')}/{action}{query}"
    try:
        done = fetch(url, path, b"{}", headers, patient, option="--ops-url").json()
    except ServerError as error:
        if error.http_status != UNAUTHORIZED:
            raise
        raise ClientError(f"{error}; name a file that holds the token with --token-file") from None
    text = done.get("text") if isinstance(done, dict) else None
    out.print(f"{model}: {text or 'done'}", markup=False, highlight=False, soft_wrap=True)


def _status(url: str, model: str, access: Access) -> Mapping[str, Any]:
    try:
        found = fetch(url, f"/api/models/{quote(model, safe='')}/releases", access=access, option="--ops-url").json()
    except ServerError as error:
        raise ClientError(f"{error}; is {url} the operations port (8002 by default)? Name it with --ops-url") from None
    if not isinstance(found, dict):
        raise ClientError(f"{url} does not answer as the gateway's operations port; name it with --ops-url")
    return found


def _line(happened: Mapping[str, Any]) -> dict[str, str]:
    cells = {field: str(happened.get(field)) if happened.get(field) not in (None, "") else "-" for field in FIELDS}
    return cells | {"at": _when(happened.get("at"))}


def _words(line: Mapping[str, str]) -> str:
    """What happened, for people."""
    return line["outcome"].replace("_", " ")


def _when(seconds: object) -> str:
    if not isinstance(seconds, int | float):
        return "never"
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
