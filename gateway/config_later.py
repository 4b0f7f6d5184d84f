"""Keys of later versions: which value of them is accepted already, and what the others are answered.

Rules: a key without effect is never accepted silently. Where one value says what this version does anyway
(`processes: 1`), it is accepted. Everything else is refused with the reason, not only called unknown.
Variables named almost like one of ours are noted: the environment holds foreign names too, so they are no fault.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Final

_REASONS: Final[dict[tuple[str, str], str]] = {
    ("server", "processes"): "several front-end processes are not supported in this version; write 1 or remove it",
    ("", "backends"): "belongs to one model; write it in an entry of models",
}
_NEUTRAL: Final[dict[tuple[str, str], object]] = {
    ("server", "processes"): 1,
}
_GUESSED: Final = frozenset(("auth", "authentication", "grpc"))
_SERVICE_LINK: Final = re.compile(r"(tcp|udp|sctp)://")
_SERVICE_NAME: Final = re.compile(r"(.*_)?SERVICE_(HOST|PORT)(_.*)?|(.*_)?PORT_[0-9]+_.*")
"""Variables that Kubernetes makes of a service named gateway."""
_OTHER_VARIABLES: Final = ("CONFIG", "URL", "OPS_URL", "DEBUG")
_ALIKE: Final = 0.75
"""Similarity from 0 to 1 above which a name is taken for a slip."""


def refusal(section: str, key: str, value: object) -> str | None:
    """Why a key of a later version cannot stand in `section` ("" is the top level); None if it is not one of
    them, or if `value` is what this version does anyway (see `is_neutral`)."""
    if is_neutral(section, key, value):
        return None
    if (reason := _REASONS.get((section, key))) is not None:
        return reason
    return f"'{key}' is not supported in this version; remove it" if key in _GUESSED else None


def is_neutral(section: str, key: str, value: object) -> bool:
    """Whether the key belongs to a later version but its value asks for nothing that this one lacks."""
    wanted = _NEUTRAL.get((section, key))
    return wanted is not None and type(value) is type(wanted) and value == wanted


def is_service_link(text: str) -> bool:
    """Kubernetes sets GATEWAY_HTTP_PORT=tcp://10.0.0.1:80 for a service named gateway-http."""
    return _SERVICE_LINK.match(text) is not None


def unknown_variables(environ: Mapping[str, str], options: Iterable[str]) -> list[str]:
    """A note for each variable that looks like a mistyped one of ours; `options` as in `http_port`."""
    known = [*(option.upper() for option in options), *_OTHER_VARIABLES]
    notes = []
    for variable, text in sorted(environ.items()):
        name = variable.removeprefix("GATEWAY_")
        if name == variable or name in known or is_service_link(text) or _SERVICE_NAME.fullmatch(name):
            continue
        if meant := difflib.get_close_matches(name[:64].upper(), known, n=1, cutoff=_ALIKE):
            notes.append(f"environment: {variable} is not a known variable; did you mean GATEWAY_{meant[0]}?")
    return notes
