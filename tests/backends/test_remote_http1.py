"""HTTP/1.1 as its client: whole answers, however they arrive, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.backends.remote_http1 import MAX_HEAD_BYTES, Http1Connection, HttpAnswer
from gateway.core.outcome import Failure, FailureKind
from tests.backends.oip_server import http
from tests.backends.wire_feed import PLACES, cut, exchange, open_connection

ASK = b"GET / HTTP/1.1\r\n\r\n"
WHOLE = http(b"0123456789", headers=[("X-Odd", "value")])
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4;x=y\r\n0123\r\n6\r\n456789\r\n0\r\nX-Trailer: t\r\n\r\n"
)
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
GOOD = [WHOLE, CHUNKED, INTERIM + WHOLE, WHOLE.replace(b"HTTP/1.1", b"HTTP/1.0")]


@pytest.mark.parametrize("data", GOOD)
@given(places=PLACES)
def test_an_answer_may_arrive_in_any_pieces(data: bytes, places: list[int]) -> None:
    with open_connection(Http1Connection) as (connection, channel):
        (answer,) = exchange(connection, ASK, cut(data, places))
        assert isinstance(answer, HttpAnswer)
        assert (answer.status, answer.body) == (200, b"0123456789")
        assert bool(channel.released) == (b"HTTP/1.0" not in data)
        assert bytes(connection.transport.sent) == ASK


@pytest.mark.parametrize("data", GOOD)
def test_an_answer_that_ends_early_anywhere_is_broken(data: bytes) -> None:
    for end in range(len(data)):
        with open_connection(Http1Connection) as (connection, channel):
            (answer,) = exchange(connection, ASK, [data[:end]] if end else [], lost=True)
            assert isinstance(answer, Failure)
            assert answer.kind is FailureKind.BROKEN
            assert not channel.released


def test_answers_follow_one_another_on_a_connection() -> None:
    with open_connection(Http1Connection) as (connection, channel):
        for body in (b"one", b"", b"three"):
            (answer,) = exchange(connection, ASK, [http(body)])
            assert answer.body == body
        assert len(channel.released) == 3


REFUSED = [
    (b"SSH-2.0-OpenSSH_9.2\r\n", "not HTTP"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "not HTTP"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", "not HTTP"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "not HTTP"),
    (http(b"abc", headers=[("Content-Encoding", "gzip")]), "content coding"),
    (http(b"x" * 2000), "more than 1000 bytes"),
    (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1f4\r\n" + (b"x" * 500 + b"\r\n1f4\r\n") * 3,
        "more than",
    ),
    (http(b"", headers=[("X", "y" * MAX_HEAD_BYTES)]), "header fields"),
    (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "not HTTP"),
]


@pytest.mark.parametrize(("data", "text"), REFUSED)
def test_what_is_no_answer(data: bytes, text: str) -> None:
    with open_connection(Http1Connection, max_bytes=1000) as (connection, channel):
        (answer,) = exchange(connection, ASK, [data])
        assert isinstance(answer, Failure)
        assert answer.kind is FailureKind.BROKEN
        assert text in answer.message
        assert connection.transport.aborted
        assert not channel.released


def test_a_head_without_end_is_cut_off() -> None:
    with open_connection(Http1Connection) as (connection, _):
        found = exchange(connection, ASK, [b"HTTP/1.1 200 OK\r\n", *[b"x" * 4096] * 40])
        assert len(found) == 1
        assert connection.dropped


def test_interim_answers_without_end_are_cut_off() -> None:
    with open_connection(Http1Connection) as (connection, _):
        found = exchange(connection, ASK, [b"HTTP/1.1 100 Continue\r\n\r\n" * 100] * 100)
        assert len(found) == 1
        assert connection.dropped


@pytest.mark.parametrize("more", [b"HTTP/1.1 200 OK\r\n", WHOLE])
def test_more_than_one_answer_ends_the_connection(more: bytes) -> None:
    with open_connection(Http1Connection) as (connection, channel):
        (answer,) = exchange(connection, ASK, [WHOLE + more])
        assert answer.body == b"0123456789"
        assert not channel.released


def test_words_that_nobody_asked_for_end_the_connection() -> None:
    with open_connection(Http1Connection) as (connection, _):
        connection.data_received(WHOLE)
        assert connection.dropped


@pytest.mark.parametrize(
    ("value", "idle_s"), [("timeout=5", 4.0), ("timeout=1000, max=9", 60.0), ("timeout=0", 0.5), ("x", 60.0)]
)
def test_a_connection_is_kept_no_longer_than_the_server_keeps_it(value: str, idle_s: float) -> None:
    with open_connection(Http1Connection) as (connection, _):
        exchange(connection, ASK, [http(b"", headers=[("Keep-Alive", value)])])
        assert connection.idle_s == idle_s


@given(st.binary(max_size=300), PLACES)
def test_any_bytes_settle_at_most_once(data: bytes, places: list[int]) -> None:
    with open_connection(Http1Connection) as (connection, _):
        assert len(exchange(connection, ASK, cut(b"HTTP/1.1 200 OK\r\n" + data, places), lost=True)) == 1
