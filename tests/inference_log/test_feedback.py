"""Feedback: what is taken, what is refused and why; what people see of it when it is joined."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.inference_log.feedback import (
    LABELLED_VIEW,
    LABELS_VIEW,
    MAX_ITEMS,
    UNMATCHED_VIEW,
    FeedbackError,
    RecentKeys,
    read,
)

ID = "01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e77"
NOW_US = 1_790_000_000_000_000


def keys() -> Iterator[str]:
    return (f"fresh-{number}" for number in count())


def taken(value: object) -> list[dict[str, object]]:
    """Details of the items, all of which must be taken."""
    items, faults = read(json.dumps(value).encode(), NOW_US, keys().__next__)
    assert faults == []
    assert all(item.key == item.details["idempotency_key"] for item in items)
    return [dict(item.details) | {"kind": item.kind} for item in items]


def test_a_label_and_an_override() -> None:
    (one,) = taken({"request_id": ID.upper(), "label": [1, "a"]})
    said = {"kind": "label", "request_id": ID, "row": None, "label": [1, "a"], "who": None, "at_us": NOW_US}
    assert one == said | {"note": None, "idempotency_key": "fresh-0"}
    full = {"request_id": ID, "row": 3, "who": "ada", "note": "seen", "at": "2026-09-20T02:00:00+02:00"}
    (one,) = taken([full | {"override": {"old": None, "new": 0}, "idempotency_key": "k"}])
    assert (one["kind"], one["old"], one["new"], one["row"], one["who"]) == ("override", None, 0, 3, "ada")
    assert (one["at_us"], one["note"], one["idempotency_key"]) == (1_789_862_400_000_000, "seen", "k")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"request_id": "mine"}, "X-Request-Id"),
        ({"request_id": 5}, "X-Request-Id"),
        ({"label": None}, "not null"),
        ({"override": {"old": 1, "new": 2}}, "either label, or override"),
        ({"row": -1}, "row must be"),
        ({"row": True}, "row must be"),
        ({"row": 2**31}, "row must be"),
        ({"label": "x" * 5000}, "label is longer"),
        ({"label": json.loads("[" * 400 + "]" * 400)}, "label is nested too deeply"),
        ({"who": ""}, "who must be text"),
        ({"who": "x" * 257}, "who must be text"),
        ({"note": 3}, "note must be text"),
        ({"at": "2026-01-01T00:00:00"}, "with its zone"),
        ({"at": "yesterday"}, "with its zone"),
        ({"at": "2036-01-01T00:00:00Z"}, "future"),
        ({"at": "1950-01-01T00:00:00Z"}, "before 1970"),
        ({"idempotency_key": "a b"}, "visible ASCII"),
        ({"idempotency_key": "a" * 129}, "visible ASCII"),
        ({"lable": 1}, "'lable' is unknown"),
    ],
)
def test_a_faulty_item_is_refused_and_the_others_are_taken(change: dict[str, object], says: str) -> None:
    good = {"request_id": ID, "label": 1}
    items, faults = read(json.dumps([good, good | change, good]).encode(), NOW_US, keys().__next__)
    assert len(items) == 2
    (fault,) = faults
    assert fault.index == 1
    assert says in fault.error


@pytest.mark.parametrize("body", [b"", b"{", b"[]", json.dumps([{}] * (MAX_ITEMS + 1)).encode(), b"\xff"])
def test_what_is_no_list_of_items_is_refused_whole(body: bytes) -> None:
    with pytest.raises(FeedbackError):
        read(body, NOW_US, keys().__next__)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["request_id", "row", "label", "override", "who", "at", "note", "idempotency_key", "x"])


@given(st.dictionaries(FIELDS, JSON | st.just(ID)) | JSON)
def test_whatever_is_sent_is_taken_or_refused_with_a_reason(value: object) -> None:
    try:
        items, faults = read(json.dumps(value).encode(), NOW_US, keys().__next__)
    except FeedbackError:
        assert value == []
        return
    assert len(items) + len(faults) == (len(value) if isinstance(value, list) else 1)
    assert all(fault.error for fault in faults)
    assert all(json.loads(json.dumps(item.details)) == item.details for item in items)


def test_recent_keys_are_bounded() -> None:
    recent = RecentKeys(3)
    for number in range(5):
        recent.add(str(number))
    assert [str(number) in recent for number in range(5)] == [False, False, True, True, True]


def test_the_views_of_the_log_join_truth_to_predictions() -> None:
    other = ID.replace("77", "78")
    said = [
        ("label", 1, {"request_id": ID, "row": None, "label": "cat", "at_us": 5, "idempotency_key": "a"}),
        ("label", 2, {"request_id": ID, "row": None, "label": "dog", "at_us": 9, "who": "ada", "idempotency_key": "b"}),
        ("label", 3, {"request_id": ID, "row": None, "label": "cow", "at_us": 99, "idempotency_key": "a"}),
        ("override", 4, {"request_id": ID, "row": 1, "old": 1, "new": 2, "at_us": 5, "idempotency_key": "c"}),
        ("label", 5, {"request_id": other, "row": None, "label": 1, "at_us": 5, "idempotency_key": "d"}),
    ]
    with duckdb.connect() as connection:
        connection.execute("CREATE TABLE requests (request_id text, variant text, model text)")
        connection.execute("INSERT INTO requests VALUES ($1, NULL, 'digits'), ($1, 'shadow', 'digits')", [ID])
        connection.execute(
            'CREATE TABLE feedback (kind text, "at" timestamptz, details text, epoch text, position bigint)'
        )
        for kind, position, details in said:
            connection.execute(
                "INSERT INTO feedback VALUES (?, now(), ?, 'e', ?)", [kind, json.dumps(details), position]
            )
        connection.execute(f"CREATE VIEW labels AS {LABELS_VIEW}")
        found = connection.execute(
            "SELECT model, feedback_item, feedback_kind, feedback_label, feedback_old, feedback_new, feedback_who, "
            f"epoch_us(feedback_said) FROM ({LABELLED_VIEW}) ORDER BY feedback_item NULLS FIRST"
        ).fetchall()
        assert found == [
            ("digits", None, "label", '"dog"', None, None, "ada", 9),
            ("digits", 1, "override", None, "1", "2", None, 5),
        ]
        assert connection.execute(f"SELECT request_id FROM ({UNMATCHED_VIEW})").fetchall() == [(other,)]
