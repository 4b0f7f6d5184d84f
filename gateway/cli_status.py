"""Why a model is not as it was meant to be, as one cell: the last column of `gateway models status` for programs.

Everything that people are shown in lines of their own is in it: why a version is not ready, why what its source means
now does not serve, and why a canary or shadow takes no part.

Rule: a gateway that has no such page, or forbids it, costs the listing nothing; the text says less.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from gateway.client import Access, ServerError, fetch


def reasons(url: str, names: Iterable[str], access: Access) -> dict[str, list[str]]:
    """Model → what is known against it beyond its versions' own reasons, from the operations port at `url`.

    Raises:
        ClientError: no server.
    """
    splits = _page(url, "/api/splits", access)
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        releases = _page(url, f"/api/models/{quote(name, safe='')}/releases", access)
        found[name] = _of_releases(releases) if isinstance(releases, dict) else []
    for status in splits if isinstance(splits, list) else ():
        if isinstance(status, dict) and status.get("model") in found:
            found[status["model"]] += _of_variants(status)
    return found


def why(model: Mapping[str, Any], others: Iterable[str]) -> str:
    """The column of one line of the listing, without tabs and line ends; `others`: see `reasons`."""
    parts = [f"not ready: {model['reason']}"] if model.get("reason") else []
    if model.get("role", "champion") == "champion":
        parts += others
    return one_line("; ".join(parts)) or "-"


def one_line(text: str) -> str:
    """`text` as a cell of tab-separated lines can hold it."""
    return " ".join(text.split())


def _of_releases(status: Mapping[str, Any]) -> list[str]:
    headings = {"trouble": "its source cannot be asked", "refused": "refused", "withheld": "withheld"}
    return [f"{text}: {status[key]}" for key, text in headings.items() if status.get(key)]


def _of_variants(status: Mapping[str, Any]) -> list[str]:
    variants = {role: status.get(role) for role in ("canary", "shadow")}
    return [
        f"its {role} takes no part: {variant['reason']}"
        for role, variant in variants.items()
        if isinstance(variant, dict) and variant.get("reason")
    ]


def _page(url: str, path: str, access: Access) -> Any:
    try:
        return fetch(url, path, access=access, option="--ops-url").json()
    except ServerError:
        return None
