"""`gateway log ship` and `gateway log feedback`: the log's way out to PostgreSQL, and people's word on its way in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import orjson
from rich.console import Console

from gateway.cli_backends import read_token
from gateway.cli_text import count
from gateway.client import Access, ClientError, fetch
from gateway.errors import ConfigError
from gateway.inference_log.sink_state import Job, SinkState

LOOK_S: Final = 0.1
"""How often it is looked whether the database takes rows, until it was said that it does not."""


@dataclass(frozen=True, slots=True)
class Said:
    """What `gateway log feedback` is told."""

    request_id: str
    label: str | None
    old: str | None
    new: str | None
    row: int | None
    who: str | None
    note: str | None
    key: str | None


def ship(job: Job, wait_s: float, tell: Callable[[str], object]) -> SinkState:
    """Ship everything that is there now; `tell` is told what stands in the way, once, while it is tried on.

    Raises:
        ConfigError: what is needed is not there.
        ClientError: the database could not take it all within `wait_s`.
    """
    from gateway.inference_log import sink_process  # noqa: PLC0415 — an extra
    from gateway.inference_log.sinks import Shipper  # noqa: PLC0415 — an extra

    def started(shipper: Shipper) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(wait_s, shipper.stop)
        loop.call_later(LOOK_S, look, shipper)

    def look(shipper: Shipper) -> None:
        if (why := shipper.state.failing) is not None:
            tell(f"{why}; trying on for {wait_s:g} s (--wait), Ctrl-C loses nothing")
        else:
            asyncio.get_running_loop().call_later(LOOK_S, look, shipper)

    done, state = asyncio.run(sink_process.ship(job, once=True, started=started))
    if not done:
        why = state.failing or "the database is slow"
        raise ClientError(f"not everything was shipped within {wait_s:g} s: {why}; run it again, it goes on from there")
    return state


def shipped_line(before: SinkState | None, after: SinkState) -> str:
    """What one run did, in a line."""
    earlier = before or SinkState(name=after.name)
    parts = [f"{count(after.shipped_rows - earlier.shipped_rows, 'row')} shipped"]
    if refused := after.refused_rows - earlier.refused_rows:
        parts.append(f"{count(refused, 'row')} refused, see the table gateway_refused")
    if missing := after.missing_rows - earlier.missing_rows:
        parts.append(f"{count(missing, 'row')} of the log could not be read")
    return "; ".join(parts)


def print_sql(*, showcase: bool) -> str:
    """What whoever owns the database runs, if the gateway's role may not make tables."""
    from gateway.inference_log import postgres_schema  # noqa: PLC0415 — heavy beside other verbs

    return postgres_schema.script(showcase=showcase)


def feedback(out: Console, url: str, said: Said, access: Access, token_file: str | None) -> None:
    """Send one label or override, and say what came of it.

    Raises:
        ConfigError: neither or both were given.
        ClientError: no server, or its refusal.
    """
    body = orjson.dumps(item(said))
    headers = {"Content-Type": "application/json"}
    if token_file is not None:
        headers["Authorization"] = f"Bearer {read_token(token_file)}"
    done = fetch(url, "/api/feedback", body, headers, access, option="--ops-url").json()
    taken = done.get("accepted") if isinstance(done, dict) else 0
    out.print("taken" if taken else "it was said before, by this key: nothing is changed", markup=False)


def item(said: Said) -> dict[str, Any]:
    """As `POST /api/feedback` takes it; a value that is no JSON is text."""
    changes = said.old is not None or said.new is not None
    if (said.label is not None) == changes or (said.old is None) != (said.new is None):
        raise ConfigError("write either --label VALUE, or both --old VALUE and --new VALUE")
    found: dict[str, Any] = {"request_id": said.request_id}
    if said.label is not None:
        found["label"] = _value(said.label)
    else:
        found["override"] = {"old": _value(said.old or ""), "new": _value(said.new or "")}
    rest = {"row": said.row, "who": said.who, "note": said.note, "idempotency_key": said.key}
    return found | {name: value for name, value in rest.items() if value is not None}


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
