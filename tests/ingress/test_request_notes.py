"""What headers and metadata say of a caller: taken where it is well formed, else as if it were not there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.inference_log.handover import Caller
from gateway.ingress.request_notes import caller_of

TRACE = b"0af7651916cd43dd8448eb211c80319c"
PARENT = b"00-" + TRACE + b"-b7ad6b7169203331-01"


def test_both_are_found_wherever_they_stand() -> None:
    fields = [(b"accept", b"*/*"), (b"traceparent", PARENT), (b"x-request-id", b"their/own:id")]
    assert caller_of(fields) == caller_of(fields[::-1]) == Caller("their/own:id", TRACE.decode())
    assert caller_of([]) == Caller(None, None)


@pytest.mark.parametrize(
    "value", [b"", b"a b", b"line\r\nbreak", b"\x1b[31mred", b"caf\xc3\xa9", b"x" * 129, b"tab\there", b"del\x7f"]
)
def test_a_request_id_that_is_no_plain_word_is_not_taken(value: bytes) -> None:
    assert caller_of([(b"x-request-id", value)]).request_id is None


@pytest.mark.parametrize("value", [b"x" * 128, b"!~"])
def test_visible_ascii_of_bounded_length_is(value: bytes) -> None:
    assert caller_of([(b"x-request-id", value)]).request_id == value.decode()


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        (PARENT, True),
        (b"cc" + PARENT[2:] + b"-what-comes-later", True),
        (b"ff" + PARENT[2:], False),
        (PARENT.replace(TRACE, b"0" * 32), False),
        (PARENT.upper(), False),
        (PARENT[:-1], False),
        (PARENT + b"x", False),
        (b" " + PARENT, False),
        (PARENT.replace(b"b7ad6b7169203331", b"b7ad6b716920333"), False),
    ],
)
def test_trace_parents(value: bytes, taken: bool) -> None:
    assert caller_of([(b"traceparent", value)]).trace_id == (TRACE.decode() if taken else None)


@given(st.lists(st.tuples(st.sampled_from([b"x-request-id", b"traceparent", b"other"]), st.binary(max_size=140))))
def test_whatever_is_sent_what_is_kept_is_bounded_and_printable(fields: list[tuple[bytes, bytes]]) -> None:
    found = caller_of(fields)
    for text, most in ((found.request_id, 128), (found.trace_id, 32)):
        assert text is None or (text.isascii() and text.isprintable() and 0 < len(text) <= most and " " not in text)
