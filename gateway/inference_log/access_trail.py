"""Who read the log, when and what: every reading by the command line is an event of the stream `access`.

Rules: the event is on the disk before anything is shown; a reading that cannot be recorded does not take place. Each
reading writes an epoch of its own with one record, which the sealer takes like any process's that ended. Nothing of
what was read stands in the event, only what was asked for.
"""

from __future__ import annotations

import json
import os
import pwd
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gateway.errors import ConfigError
from gateway.inference_log import frame
from gateway.inference_log.writer import write_events

MAX_TEXT: Final = 4096
"""Characters of a query that are recorded."""


def reader() -> str:
    """The operating system's name of who runs this; before `sudo`, if it was used."""
    name = os.environ.get("SUDO_USER")
    if name and os.geteuid() == 0:
        return f"{name[:64]} (as root)"
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def access_event(kind: str, who: str, what: Mapping[str, Any], at_ns: int) -> frame.Event:
    """`kind`: show, query, export, tail; `what`: what was asked for, texts bounded here."""
    details = {"who": who} | {k: v[:MAX_TEXT] if isinstance(v, str) else v for k, v in what.items()}
    return frame.Event(at_ns, "access", kind, str(what.get("model") or ""), "", json.dumps(details, ensure_ascii=False))


def record(directory: Path, kind: str, what: Mapping[str, Any]) -> None:
    """Write the event; it is synced when this returns.

    Raises:
        ConfigError: it cannot be written.
    """
    now_ns = time.time_ns()
    try:
        write_events(directory, [access_event(kind, reader(), what, now_ns)], now_ns)
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(f"this reading cannot be recorded, so it does not take place: {why}") from None
