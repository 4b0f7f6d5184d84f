"""`gateway models split` and `promote`: how a running gateway shares out a model's requests between its versions.

Rules: a few lines for people, `key<TAB>value` lines where a program reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import orjson
from rich.console import Console

from gateway.cli_backends import allowed
from gateway.client import Access, ClientError, fetch


def act(
    out: Console,
    url: str,
    action: str,
    name: str,
    percents: Mapping[str, float | None],
    access: Access,
    token_file: str | None,
) -> None:
    """`split`: show a model's split, after changing it where `percents` names shares. `promote`: make the canary the
    version that the model's name means.

    Raises:
        ClientError: no server, or its refusal.
    """
    path = f"/api/models/{quote(name, safe='')}/{action}"
    wanted = {role: percent for role, percent in percents.items() if percent is not None}
    if action == "split" and not wanted:
        answer = fetch(url, path, access=access, option="--ops-url").json()
    else:
        with allowed(token_file) as headers:
            answer = fetch(url, path, orjson.dumps(wanted), headers, access, option="--ops-url").json()
    if not isinstance(answer, dict):
        raise ClientError(f"{url} does not answer as the gateway's operations port; name it with --ops-url")
    lines = status_lines(answer) if action == "split" else [(name, str(answer.get("text") or "promoted"))]
    for key, text in lines:
        if out.is_terminal:
            out.print(f"{key:<9} {text}", markup=False, highlight=False, soft_wrap=True)
        else:
            out.file.write(f"{key}\t{text}\n")


def show(out: Console, url: str, only: str | None, access: Access) -> None:
    """The splits of all models that have one, or of one; nothing where there is none.

    Raises:
        ClientError: no server, or an unexpected answer.
    """
    found = fetch(url, "/api/splits", access=access, option="--ops-url").json()
    for status in found if isinstance(found, list) else ():
        if only in (None, status.get("model")):
            out.print(f"{status.get('model')} is split", markup=False, highlight=False, soft_wrap=True)
            for key, text in status_lines(status):
                out.print(f"  {key:<15} {text}", markup=False, highlight=False, soft_wrap=True)


def status_lines(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One line for the champion and each variant."""
    canary, shadow = status.get("canary"), status.get("shadow")
    lines = [("champion", f"version {status.get('champion') or 'none'}")]
    if isinstance(canary, dict):
        lines[0] = ("champion", f"{lines[0][1]}, {status.get('champion_requests', 0)} requests")
        lines.append(("canary", _canary(canary)))
    if isinstance(shadow, dict):
        lines.append(("shadow", _shadow(shadow)))
    return lines


def _canary(canary: Mapping[str, Any]) -> str:
    parts = [_what(canary), f"{canary.get('requests', 0)} requests"]
    header = canary.get("header") or {}
    if header:
        parts.append("on demand with " + " and ".join(f"{name}: {value}" for name, value in header.items()))
    if canary.get("sticky"):
        parts.append(f"by {canary['sticky']}")
    if canary.get("fallbacks"):
        parts.append(f"{canary['fallbacks']} of its requests went to the champion")
    return _explained(parts, canary)


def _shadow(shadow: Mapping[str, Any]) -> str:
    parts = [_what(shadow)]
    if isinstance(mirror := shadow.get("mirror"), dict):
        compared = mirror.get("compared") or {}
        differed, agreed = compared.get("differed", 0), compared.get("agreed", 0)
        parts.append(f"{mirror.get('mirrored', 0)} copies, {differed} of {agreed + differed} answers differ")
        if dropped := sum((mirror.get("dropped") or {}).values()):
            parts.append(f"{dropped} not copied")
        parts += [_output(one) for one in compared.get("outputs") or [] if one.get("differing")]
    return _explained(parts, shadow)


def _output(seen: Mapping[str, Any]) -> str:
    rows = seen.get("rows") or 1
    text = f"{seen.get('output')}: {seen.get('equal_rows', 0) / rows:.1%} of the rows equal"
    most = seen.get("max_absolute")
    return text if most is None else f"{text}, at most {most:.4g} apart"


def _what(variant: Mapping[str, Any]) -> str:
    share = f"{variant.get('percent', 0):g} %"
    if variant.get("percent") != variant.get("configured_percent"):
        share += f" (configured: {variant.get('configured_percent', 0):g} %)"
    version = variant.get("version")
    return (
        f"version {version} from {variant.get('source')}, {share}" if version else f"{variant.get('source')}, {share}"
    )


def _explained(parts: list[str], variant: Mapping[str, Any]) -> str:
    reason = variant.get("reason")
    return ", ".join(parts) + (f"; takes no part: {reason}" if reason else "")
