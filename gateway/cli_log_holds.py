"""`gateway log hold`: legal holds, placed and released by people; each change is an entry of the lifecycle stream.

Rule: a hold is in force before its entry is written, and its release is written before it is lifted: whoever is killed
in between has kept too much, not too little.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from rich.console import Console

from gateway.errors import ConfigError
from gateway.inference_log.access_trail import reader
from gateway.inference_log.frame import Event
from gateway.inference_log.retention import Hold, holds, place_hold, release_hold
from gateway.inference_log.segments import Layout
from gateway.inference_log.writer import write_events


def show(out: Console, layout: Layout) -> None:
    """One paragraph a hold."""
    found = holds(layout)
    for hold in found.held:
        models = ", ".join(hold.models) or "all models"
        span = f"{hold.first or 'the beginning'} to {hold.last or 'open end'}"
        out.print(f"{hold.name}: {models}, {span}", markup=False, highlight=False, soft_wrap=True)
        out.print(f"  by {hold.by}, {hold.at}: {hold.reason}", markup=False, highlight=False, soft_wrap=True)
    for name in found.unreadable:
        text = f"{name}: this file is no hold that can be read, so nothing at all is deleted; mend or remove it"
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    if not found.held and not found.unreadable:
        out.print("no holds", highlight=False)


def add(layout: Layout, name: str, reason: str, models: Sequence[str], days: tuple[str, str]) -> None:
    """Put a hold into force.

    Raises:
        ConfigError: no reason, or a name or date that cannot be used.
    """
    if not reason.strip():
        raise ConfigError("say why: gateway log hold add NAME --reason 'case 17/2026'")
    now = datetime.now(UTC)
    hold = Hold(name, reason, reader(), now.isoformat(timespec="seconds"), list(models), *days)
    place_hold(layout, hold)
    _tell(layout, "hold_placed", msgspec.to_builtins(hold))


def release(layout: Layout, name: str) -> None:
    """End a hold.

    Raises:
        ConfigError: there is none of that name.
    """
    if not (layout.holds / f"{name}.json").exists() or "/" in name:
        raise ConfigError(f"there is no hold named {name[:64]!r}; see: gateway log hold list")
    _tell(layout, "hold_released", {"name": name, "by": reader()})
    release_hold(layout, name)


def _tell(layout: Layout, kind: str, details: dict[str, Any]) -> None:
    now_ns = time.time_ns()
    event = Event(now_ns, "lifecycle", kind, "", "", msgspec.json.encode(details).decode())
    write_events(layout.directory, [event], now_ns)
