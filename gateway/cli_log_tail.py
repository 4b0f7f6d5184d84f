"""`gateway log tail`: the newest requests, one line each, and then those that come.

Rules: a line says when, what status, which model, how long, who executed it in which company, and the id to ask for
more with; a refused or failed one says why instead. Times are UTC. A program gets JSON lines.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console

from gateway.errors import ConfigError
from gateway.inference_log.following import COLUMNS, Follower
from gateway.inference_log.log_queries import explained
from gateway.inference_log.rendering import json_text, jsonable
from gateway.inference_log.store import Store

POLL_S: Final = 0.25
WIDE: Final = 112
"""Columns that a whole line takes."""
_STATUS: Final = re.compile(r"([1-5]\d\d)|([1-5])xx", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which requests; `spans`: first and last status that is wanted, nothing: all."""

    model: str | None = None
    spans: tuple[tuple[int, int], ...] = ()

    def takes(self, row: Mapping[str, Any]) -> bool:
        named = self.model in (None, row["model"], row["asked_model"])
        return named and (not self.spans or any(low <= row["status"] <= high for low, high in self.spans))

    def where(self) -> tuple[str, dict[str, Any]]:
        """The same in SQL, with its parameters."""
        conditions, values = ["true"], {}
        if self.model is not None:
            conditions.append("(model = $model or asked_model = $model)")
            values["model"] = self.model
        spans = [f"status between {low} and {high}" for low, high in self.spans]
        return " and ".join([*conditions, *([f"({' or '.join(spans)})"] if spans else [])]), values


def statuses(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """`503` · `5xx` · `ok` · `error` → spans of HTTP statuses.

    Raises:
        ConfigError: something else.
    """
    spans = []
    for text in texts:
        if text in ("ok", "error"):
            spans.append((200, 299) if text == "ok" else (400, 599))
            continue
        found = _STATUS.fullmatch(text)
        if found is None:
            raise ConfigError(f"--status {text[:32]!r}: write a status such as 503, a class such as 5xx, ok, or error")
        spans.append((int(found[1]),) * 2 if found[1] else (int(found[2]) * 100, int(found[2]) * 100 + 99))
    return tuple(spans)


def tail(out: Console, store: Store, choice: Choice, lines: int, *, follow: bool, as_json: bool) -> None:
    """Print the newest `lines` requests, and with `follow` those that come, until interrupted."""
    follower = Follower(store)
    if follow:
        follower.start()
    seen: dict[str, int] = {}
    for row in newest(store, choice, lines) if lines else ():
        seen[row["epoch"]] = max(seen.get(row["epoch"], -1), row["position"])
        _print(out, row, as_json)
    while follow:
        out.file.flush()
        time.sleep(POLL_S)
        for row in follower.poll():
            if choice.takes(row) and row["position"] > seen.get(row["epoch"], -1):
                _print(out, row, as_json)


def newest(store: Store, choice: Choice, lines: int) -> list[dict[str, Any]]:
    """The newest `lines` requests, the newest last."""
    where, values = choice.where()
    sql = f"select {', '.join(COLUMNS)} from requests where {where} order by received desc, position desc limit $lines"  # noqa: S608 — our names
    with explained(), store.opened(["requests"]) as connection:
        rows = connection.sql(sql, params=values | {"lines": lines}).to_arrow_table().to_pylist()
    return list(reversed(rows))


def _print(out: Console, row: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        out.file.write(json_text(jsonable(dict(row))) + "\n")
        return
    style = "red" if row["status"] >= 500 else "yellow" if row["status"] >= 400 else None
    out.print(
        line_of(row, narrow=out.is_terminal and out.width < WIDE),
        style=style,
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def line_of(row: Mapping[str, Any], *, narrow: bool = False) -> str:
    """One request as one line; the id stands last but for an error's text, which may be long. `narrow`: within 80."""
    asked = row["asked_model"]
    served = _printable(f"{row['model']}/{row['version']}" if not asked else f"{asked}?")
    if row["variant"] in ("canary", "shadow"):
        served += f" {row['variant']}"
    if narrow:
        short = f"{row['received']:%H:%M:%S} {row['status']} {served:<14} {row['total_ms']:7.1f} ms {row['request_id']}"
        return f"{short} {_printable(row['error'])}" if row["error"] else short
    when = row["received"].strftime("%m-%d %H:%M:%S.") + f"{row['received'].microsecond // 1000:03d}"
    ran = "-"
    if row["batch_size"] is not None:
        ran = f"{row['backend']} of {row['batch_size']}"
    elif row["backend"]:
        ran = row["backend"]
    line = f"{when} {row['status']} {served:<16} {row['total_ms']:7.1f} ms {ran:<20} {row['request_id']}"
    return f"{line} {_printable(row['error'])}" if row["error"] else line


def _printable(text: str) -> str:
    """What strangers wrote must not move a terminal's cursor."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text[:300])
