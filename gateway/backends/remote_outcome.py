"""How a server's refusal is read: status → outcome class (resilience notes §1.1).

Rules: what cannot have executed is NOT_SENT or OVERLOAD; input that was refused is SUSPECT, since we had validated it
and servers use these statuses for other things too; everything else is BROKEN. A server that does not know the model,
or does not let us in, has executed nothing and will not until somebody changes something there: NOT_SENT, MISSING.
Servers say "unknown model" with several statuses, so their words are looked at, for this alone.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

from gateway.core.outcome import Failure, FailureKind, Sign

MAX_RETRY_AFTER_S: Final = 300.0
_MISSING: Final = re.compile(
    r"unknown model|model .{0,300}(is )?not (ready|found|loaded)|no available version|not at ready state", re.IGNORECASE
)
"""Triton, MLServer, KServe and OpenVINO Model Server, whatever the status."""

_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

Reading = tuple[FailureKind, Sign]

_OVERLOAD: Final[Reading] = (FailureKind.OVERLOAD, Sign.ANSWERED)
_MISSES: Final[Reading] = (FailureKind.NOT_SENT, Sign.MISSING)
_SUSPECT: Final[Reading] = (FailureKind.SUSPECT, Sign.ANSWERED)
_BROKEN: Final[Reading] = (FailureKind.BROKEN, Sign.ANSWERED)

OF_STATUS: Final[dict[int, Reading]] = {
    401: _MISSES, 403: _MISSES, 404: _MISSES, 405: _MISSES, 407: _MISSES, 410: _MISSES,
    408: _BROKEN, 499: _BROKEN,
    429: _OVERLOAD, 503: _OVERLOAD,
}  # fmt: skip
"""Statuses of HTTP that say something else than their class."""
_OF_CLASS: Final[dict[int, Reading]] = {2: _BROKEN, 3: _MISSES, 4: _SUSPECT, 5: _BROKEN}
"""By first digit. 2: not 200, so not an answer. 3: redirects are never followed."""
_MAY_BE_MISSING: Final = frozenset({400, 500, 503})

OF_CODE: Final[dict[int, Reading]] = {
    1: _BROKEN, 2: _BROKEN, 3: _SUSPECT, 4: (FailureKind.TIMEOUT, Sign.ANSWERED), 5: _MISSES, 6: _SUSPECT, 7: _MISSES,
    8: _OVERLOAD, 9: _SUSPECT, 10: _BROKEN, 11: _SUSPECT, 12: _MISSES, 13: _BROKEN, 14: _OVERLOAD, 15: _BROKEN,
    16: _MISSES,
}  # fmt: skip
"""Status codes of gRPC, where the server itself said it."""
_CODE_MAY_BE_MISSING: Final = frozenset({2, 3, 9, 13, 14})


def of_status(status: int, text: str, server: str, retry_after_s: float = 0.0) -> Failure:
    """An answer with a status other than 200. `text`: the server's words, fit to be shown."""
    kind, sign = OF_STATUS.get(status) or _OF_CLASS.get(status // 100, _BROKEN)
    if status in _MAY_BE_MISSING and _MISSING.search(text):
        kind, sign = _MISSES
    return _failure(kind, sign, f"{server} answered with status {status}", text, retry_after_s)


def of_code(code: int, name: str, text: str, server: str, retry_after_s: float = 0.0) -> Failure:
    """A call that the server ended with a code other than OK."""
    kind, sign = OF_CODE.get(code, _BROKEN)
    if code in _CODE_MAY_BE_MISSING and _MISSING.search(text):
        kind, sign = _MISSES
    return _failure(kind, sign, f"{server} answered with {name}", text, retry_after_s)


def _failure(kind: FailureKind, sign: Sign, what: str, text: str, retry_after_s: float) -> Failure:
    after = min(max(retry_after_s, 0.0), MAX_RETRY_AFTER_S) if kind is FailureKind.OVERLOAD else 0.0
    return Failure(kind, what, sign, after, text)


def retry_after_s(text: str, date: str = "") -> float:
    """`Retry-After`: seconds, or a date, which is held against the server's own `Date`, so no clock of ours counts.
    0.0 for anything else."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", text):
        return float(text)
    until, now = _instant(text), _instant(date)
    return max((until - now).total_seconds(), 0.0) if until is not None and now is not None else 0.0


def _instant(text: str) -> datetime | None:
    """In the one form of RFC 9110 §5.6.7 that may be sent."""
    found = re.fullmatch(
        r"[A-Z][a-z]{2}, ([0-9]{2}) ([A-Z][a-z]{2}) ([0-9]{4}) ([0-9]{2}):([0-9]{2}):([0-9]{2}) GMT", text
    )
    if found is None or found[2] not in _MONTHS:
        return None
    day, year, hour, minute, second = (int(found[place]) for place in (1, 3, 4, 5, 6))
    try:
        return datetime(year, _MONTHS.index(found[2]) + 1, day, hour, minute, second, tzinfo=UTC)
    except ValueError:
        return None


def milliseconds(text: str) -> float:
    """gRPC's push-back, as seconds; 0.0: none, or "do not try again"."""
    return int(text) / 1000 if re.fullmatch(r"[0-9]{1,9}", text) else 0.0


def not_connected(text: str) -> Failure:
    return Failure(FailureKind.NOT_SENT, text, Sign.CONNECT)


def not_sent(text: str) -> Failure:
    return Failure(FailureKind.NOT_SENT, text)


def broken(text: str) -> Failure:
    return Failure(FailureKind.BROKEN, text)


def mismatch(text: str) -> Failure:
    return Failure(FailureKind.BROKEN, text, Sign.MISMATCH)
