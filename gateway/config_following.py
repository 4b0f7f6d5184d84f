"""The keys of an entry that say how its source is followed: where they cannot mean anything.

Looks at what the file says before types are checked, so that it also speaks when another key is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gateway.config_backends import EntryFault
from gateway.registry.reference import OipServerSource, parse

OF_FILES: Final = ("golden", "poll_interval_s", "keep_previous")
"""Keys about versions that the gateway loads itself."""


def following_faults(item: object) -> Iterator[EntryFault]:
    """What is wrong with an entry's keys of `OF_FILES`; `item` is of any type."""
    if not isinstance(item, dict):
        return
    source = item.get("source")
    if isinstance(source, str) and source and not _is_server(source):
        return
    if isinstance(source, str) or "backends" in item:
        for key in OF_FILES:
            if item.get(key) is not None:
                yield EntryFault(
                    (key,), "is about versions that are loaded here, and remote servers load their own; remove it"
                )


def _is_server(source: str) -> bool:
    try:
        return isinstance(parse(source), OipServerSource)
    except ValueError:
        return False  # told elsewhere
