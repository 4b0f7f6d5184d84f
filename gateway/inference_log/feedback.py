"""Feedback: what people say about answers that were given, as entries of the log's stream `feedback`.

Two kinds. A *label* is the truth that was learned later; an *override* is a human's decision to use something else than
the answer, from `old` to `new`. Both name the request by its X-Request-Id, and a row of it where it had several.

Rules and invariants:
* Pure: time and chance are arguments. Everything a caller sends is bounded before it is kept.
* Items stand by themselves: a faulty one is refused with its place and the reason, the others are taken.
* The request need not be known: it may not be sealed yet, or be another gateway's. Whoever joins sees which are.
* An idempotency key says what is said once: the first entry with a key counts, later ones are left out of every view.
  Without a key each post counts by itself. Of several entries about the same row, the one said last counts.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

import orjson

MAX_ITEMS: Final = 1000
MAX_BODY: Final = 1024 * 1024
MAX_VALUE_BYTES: Final = 4096
"""Of a label, or of `old` or `new`, as JSON."""
MAX_WHO: Final = 256
MAX_NOTE: Final = 4096
MAX_ROW: Final = 2**31 - 1
REMEMBERED_KEYS: Final = 10_000
FUTURE_S: Final = 86_400
"""How far ahead of our clock a caller's `at` may be."""
_KEY: Final = re.compile(r"[\x21-\x7e]{1,128}")
_REQUEST_ID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_FIELDS: Final = frozenset(("request_id", "row", "label", "override", "who", "at", "note", "idempotency_key"))

Kind = Literal["label", "override"]

LABELS_VIEW: Final = """
SELECT * FROM (
    SELECT *, row_number() OVER (
        PARTITION BY request_id, item ORDER BY said DESC, "at" DESC, position DESC) = 1 AS last_word
    FROM (
        SELECT kind, details->>'$.request_id' AS request_id, try_cast(details->>'$.row' AS integer) AS item,
            json_extract(details, '$.label') AS label, json_extract(details, '$.old') AS "old",
            json_extract(details, '$.new') AS "new", details->>'$.who' AS who,
            make_timestamptz(try_cast(details->>'$.at_us' AS bigint)) AS said, details->>'$.note' AS note,
            details->>'$.idempotency_key' AS idempotency_key, "at", epoch, position,
            row_number() OVER (PARTITION BY details->>'$.idempotency_key' ORDER BY "at", epoch, position) AS repeated
        FROM feedback
    ) WHERE repeated = 1
) WHERE last_word
"""
"""DuckDB, over the view `feedback`: the last word on each request, or on one of its rows (`item`)."""

LABELLED_VIEW: Final = """
SELECT r.*, f.item AS feedback_item, f.kind AS feedback_kind, f.label AS feedback_label, f."old" AS feedback_old,
    f."new" AS feedback_new, f.who AS feedback_who, f.said AS feedback_said, f.note AS feedback_note
FROM requests AS r JOIN labels AS f USING (request_id)
WHERE r.variant IS DISTINCT FROM 'shadow'
"""
"""DuckDB, over `requests` and the view `labels` (LABELS_VIEW): requests with what was said of them."""

UNMATCHED_VIEW: Final = """
SELECT f.* FROM labels AS f WHERE NOT EXISTS (SELECT 1 FROM requests AS r WHERE r.request_id = f.request_id)
"""
"""DuckDB: feedback to requests that the log does not hold: too early, mistyped, or too old."""


class FeedbackError(ValueError):
    """What was sent, or one item of it, cannot be taken; the text says why and what to write."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that was said."""

    kind: Kind
    key: str
    details: Mapping[str, Any]
    """As it stands in the log: request_id, row, label | old and new, who, at_us, note, idempotency_key."""


@dataclass(frozen=True, slots=True)
class ItemFault:
    index: int
    error: str


def read(body: bytes, now_us: int, fresh_key: Callable[[], str]) -> tuple[list[Item], list[ItemFault]]:
    """One item or a list of them, as JSON.

    Args:
        now_us: microseconds since 1970; when it was said, if the caller does not say.
        fresh_key: makes a key for an item that has none.

    Raises:
        FeedbackError: nothing of it can be taken.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise FeedbackError(f"the body is not JSON: {error}") from None
    listed = found if isinstance(found, list) else [found]
    if not 1 <= len(listed) <= MAX_ITEMS:
        raise FeedbackError(f"the list has {len(listed)} items; send 1 to {MAX_ITEMS} at a time")
    items, faults = [], []
    for index, one in enumerate(listed):
        try:
            items.append(_item(one, now_us, fresh_key))
        except FeedbackError as error:
            faults.append(ItemFault(index, str(error)))
    return items, faults


def _item(one: object, now_us: int, fresh_key: Callable[[], str]) -> Item:
    if not isinstance(one, dict):
        raise FeedbackError('must be an object, for example {"request_id": "…", "label": 1}')
    if unknown := sorted(one.keys() - _FIELDS):
        raise FeedbackError(f"'{unknown[0][:64]}' is unknown; there are {', '.join(sorted(_FIELDS))}")
    request_id, row = one.get("request_id"), one.get("row")
    if not isinstance(request_id, str) or _REQUEST_ID.fullmatch(request_id) is None:
        raise FeedbackError("request_id must be the X-Request-Id of the answer, a UUID")
    if row is not None and (type(row) is not int or not 0 <= row <= MAX_ROW):
        raise FeedbackError("row must be a number from 0 up: the row of the request that is meant")
    key = one.get("idempotency_key")
    if key is not None and (not isinstance(key, str) or _KEY.fullmatch(key) is None):
        raise FeedbackError("idempotency_key must be 1 to 128 visible ASCII characters")
    kind, said = _said(one)
    details = {
        "request_id": request_id.lower(),
        "row": row,
        **said,
        "who": _text(one, "who", MAX_WHO),
        "at_us": _at_us(one.get("at"), now_us),
        "note": _text(one, "note", MAX_NOTE),
        "idempotency_key": key or fresh_key(),
    }
    return Item(kind, details["idempotency_key"], details)


def _said(one: Mapping[str, Any]) -> tuple[Kind, dict[str, Any]]:
    if ("label" in one) == ("override" in one):
        raise FeedbackError('write either label, or override: {"old": …, "new": …}')
    if "label" in one:
        if one["label"] is None:
            raise FeedbackError("label must be a value, not null")
        return "label", {"label": _value(one["label"], "label")}
    change = one["override"]
    if not isinstance(change, dict) or change.keys() != {"old", "new"}:
        raise FeedbackError('override must be an object with "old" and "new"')
    return "override", {name: _value(change[name], name) for name in ("old", "new")}


def _value(value: object, name: str) -> object:
    try:
        size = len(orjson.dumps(value))
    except orjson.JSONEncodeError:
        raise FeedbackError(f"{name} is nested too deeply") from None
    if size > MAX_VALUE_BYTES:
        raise FeedbackError(f"{name} is longer than {MAX_VALUE_BYTES} bytes of JSON")
    return value


def _text(one: Mapping[str, Any], name: str, most: int) -> str | None:
    value = one.get(name)
    if value is not None and (not isinstance(value, str) or not value or len(value) > most):
        raise FeedbackError(f"{name} must be text of 1 to {most} characters")
    return value


def _at_us(value: object, now_us: int) -> int:
    if value is None:
        return now_us
    try:
        when = datetime.fromisoformat(value) if isinstance(value, str) else None
        if when is None or when.tzinfo is None:
            raise ValueError
        found = round((when - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1_000_000)
    except (ValueError, OverflowError):
        raise FeedbackError("at must be a time with its zone, such as 2026-11-23T10:00:00Z") from None
    if not 0 <= found <= now_us + FUTURE_S * 1_000_000:
        raise FeedbackError("at lies in the future, or before 1970")
    return found


class RecentKeys:
    """Keys of the newest items, so that a post that is repeated at once is not written again."""

    def __init__(self, most: int = REMEMBERED_KEYS) -> None:
        self._most = most
        self._keys: OrderedDict[str, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<RecentKeys {len(self._keys)}>"

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, key: str) -> None:
        self._keys[key] = None
        while len(self._keys) > self._most:
            self._keys.popitem(last=False)
