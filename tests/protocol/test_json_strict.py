"""The strict parser takes JSON as RFC 8259 has it plus NaN and Infinity, and nothing that is ambiguous."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import InvalidRequest
from gateway.protocol.json_strict import MAX_INTEGER_DIGITS, MinusZero, parse_strict

from .oip_samples import PATIENT

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def refused(body: bytes, *words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_strict(body)
    assert caught.value.status == 400
    for word in words:
        assert word in str(caught.value)


@settings(PATIENT)
@given(JSON, st.booleans())
def test_reads_what_json_writes(document: Any, ascii_only: bool) -> None:
    assert parse_strict(json.dumps(document, ensure_ascii=ascii_only).encode()) == document


def test_literals_nan_and_infinity() -> None:
    first, *rest = parse_strict(b"[NaN, Infinity, -Infinity]")
    assert math.isnan(first)
    assert rest == [math.inf, -math.inf]


def test_minus_zero_integer_is_zero_but_remembers_its_sign() -> None:
    (number,) = parse_strict(b"[-0]")
    assert number == 0
    assert type(number) is MinusZero


def test_minus_zero_float_keeps_its_sign() -> None:
    assert math.copysign(1, parse_strict(b"[-0.0]")[0]) == -1


@pytest.mark.parametrize("text", ["1e400", "-1e400", "1.0e999"])
def test_float_over_the_range_is_refused(text: str) -> None:
    refused(f"[{text}]".encode(), text, "too large")


@pytest.mark.parametrize("digits", [MAX_INTEGER_DIGITS + 1, 400, 5000, 100_000])
@pytest.mark.parametrize("sign", ["", "-"])
def test_integer_that_no_float_holds_is_refused(digits: int, sign: str) -> None:
    refused(f"[{sign}{'9' * digits}]".encode(), "digits")


def test_integer_that_a_float_holds_is_read() -> None:
    assert parse_strict(b"[" + b"1" + b"0" * 308 + b"]") == [10**308]


@pytest.mark.parametrize(
    "body",
    [b'{"a":1,"a":2}', b'{"x":{"a":1,"b":2,"a":1}}', b'{"x":[1,{"a":1,"a":1}]}', b'{"a":1,"\\u0061":2}'],
)
def test_key_given_twice_is_refused_by_name(body: bytes) -> None:
    refused(body, "'a'", "twice")


@pytest.mark.parametrize(
    "body", [b'{"a":"\xff"}', b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"\xf8\x88\x80\x80\x80"', b"\xfe"]
)
def test_invalid_utf8_is_refused(body: bytes) -> None:
    refused(body, "UTF-8")


def test_byte_order_mark_is_refused() -> None:
    refused(b"\xef\xbb\xbf{}", "byte order mark")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_refused(encoding: str) -> None:
    refused('{"a":1}'.encode(encoding))


@pytest.mark.parametrize(
    "body", [b'"\\ud800"', b'"\\udc00\\ud800"', b'{"\\ud800":1}', b'{"a":["x",{"b":"\\uDFFF"}]}', b'"\\ud800\\\\udc00"']
)
def test_lone_surrogate_is_refused(body: bytes) -> None:
    refused(body, "surrogate")


@pytest.mark.parametrize(
    ("body", "text"), [(b'"\\ud83d\\ude00"', "😀"), (b'"\\\\ud800"', "\\ud800"), (b'"\\u0000"', "\0")]
)
def test_escapes_that_are_fine(body: bytes, text: str) -> None:
    assert parse_strict(body) == text


@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"{", b"[1", b'{"a"', b"[1,]", b"{}{}", b"{} x", b"[01]", b"[+1]", b"[.5]", b"[1.]", b"nan", b"[inf]",
     b"[0x1]", b"[1_0]", b"{'a':1}", b'["\x00"]', b'["\n"]', b'"\\x"', b"[1]\x00", b"// c\n1", "[\u0661]".encode()],
)  # fmt: skip
def test_what_is_not_json_is_refused(body: bytes) -> None:
    refused(body, "JSON")


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
@pytest.mark.parametrize("closed", [False, True])
def test_nesting_of_200000_is_refused_at_once(opening: bytes, closed: bool) -> None:
    body = opening * 200_000 + (b"1" + opening.translate(bytes.maketrans(b"[{", b"]}"), b'"a:') * 200_000) * closed
    begun = time.process_time()
    refused(body, "nested")
    assert time.process_time() - begun < 5
