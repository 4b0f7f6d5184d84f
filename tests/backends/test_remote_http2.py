"""HTTP/2 as its client: whole calls, however they arrive; what was surely not processed is told apart."""

from __future__ import annotations

import struct
from typing import Any

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.backends.remote_connections import Exchange
from gateway.backends.remote_http2 import FRAMES, GrpcAnswer, GrpcRequest, Http2Connection, literal
from gateway.core.outcome import Failure, FailureKind, Sign
from tests.backends.oip_server import PREFACE, frame, grpc_frames
from tests.backends.wire_feed import PLACES, cut, exchange, open_connection

BLOCK = literal(":method", "POST") + literal("authorization", "x" * 300, secret=True)
ASK = GrpcRequest(BLOCK, b"\0\0\0\0\3abc")
SETTINGS = frame(4, 0, 0)
WHOLE = SETTINGS + frame(6, 0, 0, b"12345678") + grpc_frames(1, b"answer", 0, "", [("x-more", "y")])
PADDED = frame(0, 0xC, 1, b"\2" + b"\0\0\0\0\6answer" + b"..")
encoder = hpack.Encoder()
encoder.header_table_size = 0
HEAD = encoder.encode([(":status", "200"), ("content-type", "application/grpc")])
TAIL = encoder.encode([("grpc-status", "0")])
CONTINUED = (
    frame(1, 0x20, 1, b"\0\0\0\0\0" + HEAD[:3])
    + frame(9, 0, 1, HEAD[3:5])
    + frame(9, 4, 1, HEAD[5:])
    + frame(0xFE, 255, 9, b"unknown")
    + frame(0, 8, 1, b"\2" + b"\0\0\0\0\6answer" + b"..")
    + frame(1, 5, 1, TAIL)
)
GOOD = [WHOLE, CONTINUED]


def frames_sent(data: bytes) -> list[tuple[int, int, int, bytes]]:
    assert data.startswith(PREFACE)
    at, found = len(PREFACE), []
    while at < len(data):
        length = int.from_bytes(data[at : at + 3], "big")
        stream = int.from_bytes(data[at + 5 : at + 9], "big")
        found.append((data[at + 3], data[at + 4], stream, data[at + 9 : at + 9 + length]))
        at += 9 + length
    return found


@pytest.mark.parametrize("data", GOOD)
@given(places=PLACES)
def test_an_answer_may_arrive_in_any_pieces(data: bytes, places: list[int]) -> None:
    with open_connection(Http2Connection) as (connection, channel):
        (answer,) = exchange(connection, ASK, cut(data, places))
        assert isinstance(answer, GrpcAnswer)
        assert (answer.status, answer.code, bytes(answer.message)) == (200, 0, b"answer")
        assert channel.released == [connection]


@pytest.mark.parametrize("data", GOOD)
def test_an_answer_that_ends_early_anywhere_is_broken(data: bytes) -> None:
    for end in range(len(data)):
        with open_connection(Http2Connection) as (connection, channel):
            (answer,) = exchange(connection, ASK, [data[:end]] if end else [], lost=True)
            assert isinstance(answer, Failure)
            assert answer.kind is FailureKind.BROKEN
            assert not channel.released


def test_what_is_sent_is_a_call() -> None:
    with open_connection(Http2Connection) as (connection, _):
        exchange(connection, ASK, [WHOLE])
        exchange(connection, ASK, [grpc_frames(3, b"again")])
        sent = frames_sent(bytes(connection.transport.sent))
        heads: list[tuple[int, list[Any]]] = [
            (stream, list(hpack.Decoder().decode(payload))) for kind, _, stream, payload in sent if kind == 1
        ]
        assert [stream for stream, _ in heads] == [1, 3]
        assert heads[0][1] == [(":method", "POST"), ("authorization", "x" * 300)]
        assert isinstance(heads[0][1][1], hpack.NeverIndexedHeaderTuple)
        assert [(f, s, p) for k, f, s, p in sent if k == 0] == [(1, 1, ASK.message), (1, 3, ASK.message)]
        assert (4, 1, 0, b"") in sent  # its settings are acknowledged
        assert (6, 1, 0, b"12345678") in sent  # its ping is answered


def test_large_messages_wait_for_the_peers_windows_and_frames() -> None:
    message = bytes(200_000)
    with open_connection(Http2Connection) as (connection, _):
        found: list[Any] = exchange(connection, GrpcRequest(BLOCK, message), [])

        def data() -> list[int]:
            return [len(p) for k, _, _, p in frames_sent(bytes(connection.transport.sent)) if k == 0]

        assert sum(data()) == 65_535
        assert max(data()) == 16_384
        connection.data_received(frame(4, 0, 0, struct.pack(">HLHL", 4, 150_000, 5, 50_000)))
        assert sum(data()) == 65_535  # the connection's window is still closed
        connection.data_received(frame(8, 0, 0, struct.pack(">L", 1_000_000)))
        assert sum(data()) == 150_000
        assert max(data()) == 50_000
        connection.data_received(frame(8, 0, 1, struct.pack(">L", 50_000)))
        assert sum(data()) == 200_000
        flags = [f for k, f, _, _ in frames_sent(bytes(connection.transport.sent)) if k == 0]
        assert flags[-1] == 1
        assert not any(flags[:-1])
        connection.data_received(grpc_frames(1, b"done"))
        assert found[0].message == b"done"


def test_a_server_that_wants_no_table_is_told_that_ours_is_empty() -> None:
    with open_connection(Http2Connection) as (connection, _):
        exchange(connection, ASK, [frame(4, 0, 0, struct.pack(">HL", 1, 0)) + grpc_frames(1, b"x")])
        exchange(connection, ASK, [grpc_frames(3, b"x")])
        exchange(connection, ASK, [grpc_frames(5, b"x")])
        blocks = [p for k, _, _, p in frames_sent(bytes(connection.transport.sent)) if k == 1]
        assert [block.startswith(b"\x20") for block in blocks] == [False, True, False]
        decoder = hpack.Decoder()
        decoder.max_allowed_table_size = 0
        assert decoder.decode(blocks[1])


def goaway(last: int) -> bytes:
    return frame(7, 0, 0, struct.pack(">LL", last, 0))


def reset(error: int) -> bytes:
    return frame(3, 0, 1, struct.pack(">L", error))


def reset_of(stream: int) -> bytes:
    return frame(3, 0, stream, bytes(4))


BROKEN, NOT_SENT = FailureKind.BROKEN, FailureKind.NOT_SENT
ENDS = [
    (reset(7), NOT_SENT, True),
    (goaway(0), NOT_SENT, False),
    (reset(2), BROKEN, False),
    (reset(8), BROKEN, False),
    (reset(11), FailureKind.OVERLOAD, False),
    (frame(1, 4, 1, HEAD) + reset(7), BROKEN, False),
    (frame(1, 4, 1, HEAD) + reset(0), BROKEN, False),
]


@pytest.mark.parametrize(("data", "kind", "kept"), ENDS)
def test_ends_of_streams(data: bytes, kind: FailureKind, kept: bool) -> None:
    with open_connection(Http2Connection) as (connection, channel):
        (answer,) = exchange(connection, ASK, [SETTINGS + data])
        assert (answer.kind, bool(channel.released)) == (kind, kept)


def test_a_server_that_goes_away_still_answers_what_it_took() -> None:
    with open_connection(Http2Connection) as (connection, channel):
        (answer,) = exchange(connection, ASK, [SETTINGS + goaway(1), grpc_frames(1, b"last")])
        assert answer.message == b"last"
        assert not channel.released
        assert connection.dropped


def test_an_unused_connection_is_closed_when_the_server_goes_away() -> None:
    with open_connection(Http2Connection) as (connection, _):
        connection.data_received(SETTINGS + goaway(0))
        assert connection.dropped


def test_frames_of_streams_that_are_over_are_read_and_forgotten() -> None:
    with open_connection(Http2Connection) as (connection, _):
        exchange(connection, ASK, [SETTINGS + grpc_frames(1, b"first")])
        (answer,) = exchange(connection, ASK, [frame(8, 0, 1, bytes(4)) + reset(0) + grpc_frames(3, b"mine")])
        assert answer.message == b"mine"


@pytest.mark.parametrize("stream", [2, 3, 9])
def test_an_answer_to_what_was_not_asked_ends_the_connection(stream: int) -> None:
    with open_connection(Http2Connection) as (connection, channel):
        (answer,) = exchange(connection, ASK, [SETTINGS + grpc_frames(stream, b"stray") + grpc_frames(1, b"mine")])
        assert answer.kind is BROKEN
        assert connection.dropped
        assert not channel.released


@pytest.mark.parametrize("early", [grpc_frames(3, b"not yours"), reset_of(3), frame(8, 0, 3, b"\0\0\0\1")[:4]])
def test_the_next_call_never_gets_what_came_before_it(early: bytes) -> None:
    """The next call begins as soon as the last is answered; what the server had sent by then cannot be for it."""
    with open_connection(Http2Connection) as (connection, _):
        second: list[Any] = []

        def next_call(_: Any) -> None:
            if not connection.dropped:
                connection.send(Exchange(ASK, second.append, 1 << 20))

        connection.send(Exchange(ASK, next_call, 1 << 20))
        connection.data_received(SETTINGS + grpc_frames(1, b"first") + early)
        assert not [answer for answer in second if isinstance(answer, GrpcAnswer)]


def test_what_comes_with_another_status_is_no_message() -> None:
    """A proxy that speaks for a dead server."""
    head = encoder.encode([(":status", "503"), ("retry-after", "2")])
    with open_connection(Http2Connection, max_bytes=1000) as (connection, channel):
        (answer,) = exchange(connection, ASK, [SETTINGS + frame(1, 4, 1, head) + frame(0, 1, 1, b"<html>no</html>")])
        assert (answer.status, answer.code, bytes(answer.message)) == (503, -1, b"")
        assert channel.released


FLOODS = {
    "ping": frame(6, 0, 0, bytes(8)),
    "settings": frame(4, 0, 0),
    "unknown": frame(99, 0, 0),
    "windows": frame(8, 0, 0, b"\0\0\0\1"),
    "crumbs": frame(0, 0, 1, b""),
    "going": goaway(2**31 - 1),
    "priority": frame(2, 0, 7, bytes(5)),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
@pytest.mark.parametrize("asked", [True, False])
def test_floods_run_into_their_end(flood: bytes, asked: bool) -> None:
    with open_connection(Http2Connection) as (connection, _):
        found = exchange(connection, ASK, [SETTINGS + frame(1, 4, 1, HEAD)]) if asked else []
        before = len(connection.transport.sent)
        for _ in range(200):
            if not connection.dropped:
                connection.data_received(flood * 100)
        assert connection.dropped
        assert len(connection.transport.sent) - before < 20 * FRAMES
        assert [answer.kind for answer in found] == [BROKEN] * asked


def test_heads_without_end_are_cut_off() -> None:
    interim = encoder.encode([(":status", "103")])
    for flood in (frame(1, 4, 1, interim), frame(1, 0, 1, HEAD) + frame(9, 0, 1, b"") * 5000):
        with open_connection(Http2Connection) as (connection, _):
            (answer,) = exchange(connection, ASK, [SETTINGS + flood * 100])
            assert answer.kind is BROKEN


def test_small_pieces_are_paid_for_by_what_they_hold() -> None:
    """No frame of a long answer or a long question counts as too many."""
    message = bytes(4_000_000)
    framed = b"\0" + len(message).to_bytes(4, "big") + message
    pieces = [frame(0, 0, 1, framed[at : at + 1024]) + frame(6, 0, 0, bytes(8)) for at in range(0, len(framed), 1024)]
    with open_connection(Http2Connection, 1 << 23) as (connection, _):
        (answer,) = exchange(connection, ASK, [frame(1, 4, 1, HEAD), *pieces, frame(1, 5, 1, TAIL)])
        assert answer.message == message
    with open_connection(Http2Connection) as (connection, _):
        found = exchange(connection, GrpcRequest(BLOCK, bytes(100_000_000)), [])
        for _ in range(50_000):
            more = b"\0\0\x08\0"
            connection.data_received(frame(8, 0, 0, more) + frame(8, 0, 1, more))
        connection.data_received(grpc_frames(1, b"done"))
        assert found[0].message == b"done"


FLAWS = [
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "for its HTTP port write http:// in url"),
    (b"\xff" * 20, "larger than allowed"),
    (frame(0, 0, 1, b"\0\0\0\0\1a") + frame(0, 1, 1), "breaks HTTP/2"),
    (frame(1, 4, 1, HEAD) + frame(1, 5, 1, TAIL), "no message"),
    (frame(1, 4, 1, HEAD) + frame(0, 0, 1, b"\1\0\0\0\1a") + frame(1, 5, 1, TAIL), "compressed"),
    (frame(1, 4, 1, HEAD) + frame(0, 0, 1, b"\0\0\0\0\2a") + frame(1, 5, 1, TAIL), "another length"),
    (frame(1, 4, 1, HEAD) + frame(0, 0, 1, b"\0\0\0\0\1ab") + frame(1, 5, 1, TAIL), "another length"),
    (frame(1, 4, 1, HEAD) + frame(0, 0, 1, b"\0\0\1\0\0" + bytes(2000)), "more than 1000 bytes"),
    (frame(1, 4, 1, HEAD) + frame(0, 0, 1, b"\0\xff\xff\xff\xff"), "more than 1000 bytes"),
    (frame(1, 4, 1, HEAD) + frame(0, 0, 1, b"\0\0\0\0\1" + bytes(1001)), "another length"),
    (frame(1, 4, 1, HEAD) * 2, "breaks HTTP/2"),
    (frame(1, 4, 1, TAIL), "breaks HTTP/2"),
    (frame(6, 0, 0, bytes(1000)), "breaks HTTP/2"),
    (frame(3, 0, 1, b""), "breaks HTTP/2"),
    (frame(1, 4, 1, b"\xff\xff\xff\xff\xff\xff\xff"), "breaks HTTP/2"),
    (frame(1, 0, 1, HEAD) + frame(0, 0, 1, b"x"), "breaks HTTP/2"),
    (frame(9, 4, 1, HEAD), "breaks HTTP/2"),
    (frame(5, 4, 1, HEAD), "breaks HTTP/2"),
    (frame(0, 8, 1, b"\7abc"), "breaks HTTP/2"),
    (frame(0, 8, 1, b""), "breaks HTTP/2"),
    (frame(4, 0, 0, struct.pack(">HL", 5, 1)), "breaks HTTP/2"),
    (frame(4, 0, 0, struct.pack(">HL", 4, 2**32 - 1)), "breaks HTTP/2"),
    (frame(4, 0, 0, b"abc"), "breaks HTTP/2"),
    (frame(8, 0, 0, b"ab"), "breaks HTTP/2"),
]


@pytest.mark.parametrize(("data", "text"), FLAWS)
def test_what_is_no_answer(data: bytes, text: str) -> None:
    with open_connection(Http2Connection, max_bytes=1000) as (connection, channel):
        (answer,) = exchange(connection, ASK, [data])
        assert isinstance(answer, Failure)
        assert (answer.kind, answer.sign) == (BROKEN, Sign.NONE)
        assert text in answer.message
        assert not channel.released


@pytest.mark.parametrize("end", ["", "grpc-status"])
def test_a_call_that_ends_without_a_status_is_no_answer(end: str) -> None:
    tail = encoder.encode([(end, "zero")]) if end else b""
    data = frame(1, 4, 1, HEAD) + frame(0, 0 if end else 1, 1, b"\0\0\0\0\1a") + (frame(1, 5, 1, tail) if end else b"")
    with open_connection(Http2Connection) as (connection, _):
        (answer,) = exchange(connection, ASK, [data])
        assert answer.code == -1


@given(st.binary(max_size=300), PLACES)
def test_any_bytes_settle_once(data: bytes, places: list[int]) -> None:
    with open_connection(Http2Connection) as (connection, _):
        assert len(exchange(connection, ASK, cut(SETTINGS + data, places), lost=True)) == 1


ANY_FRAMES = st.tuples(
    st.sampled_from([*range(10)]), st.integers(0, 255), st.sampled_from([0, 1, 3]), st.binary(max_size=40)
)
NAMES = st.text(alphabet="abcdefgh-", min_size=1, max_size=200)
VALUES = st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=255), max_size=600)


@given(st.lists(ANY_FRAMES))
def test_any_frames_settle_once(frames: list[tuple[int, int, int, bytes]]) -> None:
    with open_connection(Http2Connection) as (connection, _):
        assert len(exchange(connection, ASK, [frame(*each) for each in frames], lost=True)) == 1


@given(NAMES, VALUES)
def test_literals_are_read_by_others_as_they_were_meant(name: str, value: str) -> None:
    (found,) = hpack.Decoder().decode(literal(name, value), raw=True)
    assert found == (name.encode(), value.encode("latin-1"))
