"""Chunked bodies: one reading only, whatever the cuts, and flat memory."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import GatewayError
from gateway.protocol.http1_chunked import ChunkedDecoder
from gateway.protocol.http1_limits import HttpLimits

LIMITS = HttpLimits(max_body_bytes=1000, max_chunks=50, max_trailer_bytes=100)
Outcome = tuple[bytes, int, bool] | tuple[int, int]


def decode(data: bytes, cuts: list[int], limits: HttpLimits = LIMITS) -> Outcome:
    """(content, bytes used, done), or (status, bytes fed when it was refused, at most one piece late)."""
    decoder = ChunkedDecoder(limits)
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    used = 0
    for start, stop in pairwise(edges):
        piece = data[start:stop]
        if decoder.done:
            break
        try:
            used += decoder.feed(piece, 0)
        except GatewayError as error:
            return (error.status, len(str(error)))
    return (bytes(decoder.body), used, decoder.done)


def bytewise(data: bytes) -> list[int]:
    return list(range(len(data)))


GOOD = [
    (b"0\r\n\r\n", b""),
    (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    (b'5;a=b;c="d e"\r\nhello\r\n00\r\n\r\n', b"hello"),
    (b"A\r\n0123456789\r\na\r\n0123456789\r\n0;x\r\n\r\n", b"0123456789" * 2),
    (b"000000000000005\r\nhello\r\n0\r\nX: y\r\nZ:\r\n\r\n", b"hello"),
    (b"2\r\n\r\n\r\n0\r\n\r\n", b"\r\n"),
    (b"1;" + b"e" * 255 + b"\r\nx\r\n0\r\n\r\n", b"x"),
    (b"0\r\nA: " + b"b" * 95 + b"\r\n\r\n", b""),
    (b"1\r\nx\r\n" * 50 + b"0\r\n\r\n", b"x" * 50),
    (b"3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n", b"x" * 1000),
]


@pytest.mark.parametrize(("data", "body"), GOOD)
def test_accepted(data: bytes, body: bytes) -> None:
    expected = (body, len(data), True)
    assert decode(data, []) == expected
    assert decode(data, bytewise(data)) == expected


def test_what_follows_the_body_is_left_alone() -> None:
    decoder = ChunkedDecoder(LIMITS)
    data = b"xx1\r\na\r\n0\r\n\r\nGET /"
    assert decoder.feed(data, 2) == data.index(b"GET")
    assert decoder.done


REFUSED = [
    (b"\r\n", 400),
    (b"g\r\n", 400),
    (b"-1\r\n", 400),
    (b"+1\r\nx", 400),
    (b"0x1\r\nx", 400),
    (b"1_0\r\n", 400),
    (b" 1\r\nx", 400),
    (b"1 \r\nx", 400),
    (b"1\t;a\r\nx", 400),
    (b"1\nx", 400),
    (b"1\rx", 400),
    (b"1;a\nb\r\nx", 400),
    (b"1;a\rb\r\nx", 400),
    (b"1;a\x00\r\nx", 400),
    (b"0000000000000001\r\nx", 400),
    (b"ffffffffffffffffff\r\n", 400),
    (b"1;" + b"e" * 256 + b"\r\nx", 400),
    (b"1;" + b"e" * 100_000, 400),
    (b"1" * 100_000, 400),
    (b"5\r\nhelloX\r\n", 400),
    (b"5\r\nhello\n0\r\n", 400),
    (b"5\r\nhello\rX", 400),
    (b"5\r\nhello0\r\n\r\n", 400),
    (b"1\r\nx\r\n" * 51, 400),
    (b"3e9\r\n", 413),
    (b"1f4\r\n" + b"x" * 500 + b"\r\n1f5\r\n", 413),
    (b"fffffffffffffff\r\n", 413),
    (b"0\r\nbad trailer\r\n\r\n", 400),
    (b"0\r\nX : y\r\n\r\n", 400),
    (b"0\r\nX: y\n\r\n", 400),
    (b"0\r\nX: y\r\n folded\r\n\r\n", 400),
    (b"0\r\nX: \x00\r\n\r\n", 400),
    (b"0\r\nX: \x80\r\n\n", 400),
    (b"0\r\nA: " + b"b" * 98 + b"\r\n\r\n", 431),
    (b"0\r\n" + b"A: b\r\n" * 18, 431),
    (b"0\r\nA: " + b"b" * 100_000, 431),
]


@pytest.mark.parametrize(("data", "status"), REFUSED)
def test_refused(data: bytes, status: int) -> None:
    outcome = decode(data, [])
    assert outcome[0] == status
    assert decode(data[:5000], bytewise(data[:5000])) == outcome


@given(
    st.one_of(
        st.sampled_from([case[0] for case in GOOD] + [case[0][:400] for case in REFUSED]),
        st.lists(st.sampled_from([b"0", b"1", b"5;x", b"\r\n", b"\r", b"\n", b"a", b"X: y", b"\x00"])).map(b"".join),
        st.binary(max_size=60),
    ),
    st.lists(st.integers(min_value=0), max_size=6),
)
def test_the_outcome_does_not_depend_on_the_cuts(data: bytes, cuts: list[int]) -> None:
    whole = decode(data, [])
    assert decode(data, cuts) == whole
    assert decode(data, bytewise(data)) == whole


def test_one_byte_chunks_hold_no_more_than_their_content() -> None:
    limits = HttpLimits(max_chunks=60_000)
    decoder = ChunkedDecoder(limits)
    piece = b"1\r\nx\r\n" * 1000
    tracemalloc.start()
    try:
        for _ in range(50):
            decoder.feed(piece, 0)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(decoder.body) == 50_000
    assert held < 3 * 50_000
