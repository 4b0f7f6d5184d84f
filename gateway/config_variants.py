"""The keys `canary` and `shadow` of an entry: what they must say together, and with the keys beside them.

Rules: looks at what the file says before types are checked, so that it also speaks when another key is wrong. Nothing
is looked for on the network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from gateway.config_backends import EntryFault
from gateway.registry.reference import OipServerSource, parse

VARIANTS: Final = ("canary", "shadow")
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_VALUE: Final = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,254}[\x21-\x7e])?")


def variant_faults(item: object, source_fault: Callable[[str], str | None]) -> Iterator[EntryFault]:
    """What is wrong with an entry's `canary` and `shadow`.

    Args:
        item: the entry as it was read; of any type.
        source_fault: why a source cannot be served; None: it looks as if it could.
    """
    if not isinstance(item, dict):
        return
    for key in VARIANTS:
        variant = item.get(key)
        if not isinstance(variant, dict):
            continue
        if isinstance(item.get("source"), str) and _is_server(item["source"]) and "name" not in item:
            yield EntryFault((key,), "needs to know whose it is: a server may have many models; add name: to the entry")
        source = variant.get("source")
        if isinstance(source, str) and source:
            if _is_server(source):
                yield EntryFault(
                    (key, "source"),
                    "is a running server; a variant runs on workers of the gateway, so give its files: a directory, an "
                    ".onnx file, or a registry reference",
                )
            elif (fault := source_fault(source)) is not None:
                yield EntryFault((key, "source"), fault)
        if key == "canary":
            yield from _header_faults(variant)


def _header_faults(canary: Mapping[str, Any]) -> Iterator[EntryFault]:
    headers = canary.get("header")
    lower: set[str] = set()
    for name, value in headers.items() if isinstance(headers, dict) else ():
        place = ("canary", "header", name)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            yield EntryFault(place, "cannot be a header's name; use A-Z a-z 0-9 - _ . as in X-Variant")
            continue
        if name.lower() in lower:
            yield EntryFault(place, "stands twice, in capitals and small letters; keep one of them")
        elif isinstance(value, str) and not _VALUE.fullmatch(value):
            yield EntryFault(place, "must be 1 to 256 printable ASCII characters, without blanks around them")
        lower.add(name.lower())


def _is_server(source: str) -> bool:
    try:
        return isinstance(parse(source), OipServerSource)
    except ValueError:
        return False
