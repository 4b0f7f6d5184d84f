"""Targets: what a remote server sends, from the bytes of its connection to what is said of its models.

A server is as little to be trusted as a client. Whatever it sends ends in one outcome, a success whose tensors are what
the signature says or a failure in a few printable words; nothing is raised but `RemoteError`, where a question was
asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hpack

from gateway.backends.remote_connections import Exchange
from gateway.backends.remote_http1 import Http1Connection
from gateway.backends.remote_http2 import GrpcAnswer, GrpcRequest, Http2Connection
from gateway.backends.remote_outcome import of_status, retry_after_s
from gateway.backends.remote_wire import grpc_refusal, http_words
from gateway.core.outcome import Failure
from tests.backends.oip_server import binary_answer, frame, grpc_frames, http, http_json
from tests.backends.wire_feed import open_connection
from tests.fuzz.target import Target, cut_up, require

MAX_WORDS = 1000
MAX_BYTES = 400
SECRETS = ("Bearer s3cret",)


def shown(text: str) -> None:
    """It gets into messages and logs."""
    require(text.isprintable() and len(text) < MAX_WORDS, "words that cannot be shown", text)


def words(text: str) -> None:
    """What a server said when it refused a request, in which there was a credential."""
    shown(text)
    require(SECRETS[0] not in text, "a credential is shown", text)


def failed(failure: Failure) -> Failure:
    words(failure.message)
    words(failure.words)
    require(0.0 <= failure.retry_after_s <= 300.0, "an impossible pause", failure)
    return failure


# -- connections -----------------------------------------------------------------------------------------------------


def _exchanges(kind: Any, asks: Sequence[Any], pieces: Sequence[bytes]) -> list[list[Any]]:
    """What each question was answered with; the next is asked as soon as the last is answered and the connection is
    free."""
    with open_connection(kind, MAX_BYTES) as (connection, channel):
        settled: list[list[Any]] = []

        def ask() -> None:
            mine: list[Any] = []
            settled.append(mine)

            def done(result: Any) -> None:
                mine.append(result)
                require(not (channel.released and connection.dropped), "a closed connection was given back")
                if channel.released and not connection.dropped and len(settled) < len(asks):
                    channel.released.clear()
                    ask()

            connection.send(Exchange(asks[len(settled) - 1], done, MAX_BYTES))

        ask()
        for piece in pieces:
            if connection.dropped:
                break
            connection.data_received(piece)
        require(
            len(connection.transport.sent) < 200_000, "it says more than it was told", len(connection.transport.sent)
        )
        if not connection.dropped:
            connection.connection_lost(None)
        for one in settled:
            require(len(one) == 1, "not one outcome", settled)
        return settled


def run_http1(given: bytes) -> None:
    """The first answer does not depend on the cuts; the next question's answer is never older than the question."""
    if not given:
        return
    first: list[object] = []
    for pieces in ([given[1:]], cut_up(given[1:], 1 + given[0] % 16)):
        (answer,), *later = _exchanges(Http1Connection, [b"ASK\r\n"] * 3, pieces)
        require(len(pieces) > 1 or len(given) <= 2 or not _answered(later), "an answer before its question", given)
        first.append(_http1_seen(answer))
    require(first[0] == first[1], "cut, it means something else", *first, given)


def _answered(exchanges: Sequence[list[Any]]) -> bool:
    return any(not isinstance(each[0], Failure) for each in exchanges)


def _http1_seen(answer: Any) -> object:
    if isinstance(answer, Failure):
        return failed(answer).kind
    require(100 < answer.status <= 999 and len(answer.body) <= MAX_BYTES, "an impossible answer", answer)
    failed(of_status(answer.status, http_words(answer, SECRETS), "peer", retry_after_s(answer.header(b"retry-after"))))
    return answer.status, answer.headers, bytes(answer.body)


_ASK = GrpcRequest(b"\x83", b"\0\0\0\0\3abc")


def run_http2(given: bytes) -> None:
    """As for HTTP/1; answers of gRPC are read to their end."""
    if not given:
        return
    first: list[object] = []
    for pieces in ([given[1:]], cut_up(given[1:], 1 + given[0] % 32)):
        (answer,), *later = _exchanges(Http2Connection, [_ASK] * 3, pieces)
        require(len(pieces) > 1 or len(given) <= 2 or not _answered(later), "an answer before its question", given)
        first.append(_http2_seen(answer))
    require(first[0] == first[1], "cut, it means something else", *first, given)


def _http2_seen(answer: Any) -> object:
    if isinstance(answer, Failure):
        return failed(answer).kind
    require(isinstance(answer, GrpcAnswer) and len(answer.message) <= MAX_BYTES, "an impossible answer", answer)
    if (answer.status, answer.code) != (200, 0):
        failed(grpc_refusal(answer, "peer", SECRETS))
    return answer.status, answer.code, answer.text, bytes(answer.message)


_HEAD = b"HTTP/1.1 200 OK\r\n"
_HTTP1_SEEDS = (
    http(b"0123456789", headers=[("Keep-Alive", "timeout=5"), ("Connection", "keep-alive")]),
    http_json({"error": "Bearer s3cret"}, 503, [("Retry-After", "2")]) * 2,
    _HEAD + b"Transfer-Encoding: chunked\r\n\r\n4;x=y\r\n0123\r\n6\r\n456789\r\n0\r\nX-Trailer: t\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + http(b"x"),
    b"HTTP/1.0 500 Oh\r\nContent-Length: 2\r\n\r\nno",
    b"HTTP/1.1 204 None\r\n\r\n",
    b"HTTP/1.1 101 Switch\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://a/\r\nContent-Length: 0\r\n\r\n",
    http(b"\x1f\x8b", headers=[("Content-Encoding", "gzip")]),
    _HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    _HEAD + b"\r\nuntil the end",
    binary_answer([("y", "FP32", [1, 2], bytes(8))]),
)
_HTTP1_WORDS = (
    b"\r\n", b"\n", b"\r", b": ", b"\0", b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 C\r\n\r\n", b"HTTP/1.0 ", b"Connection: close\r\n", b"\r\n\r\n", b"5\r\n",
    b"Connection: keep-alive\r\n", b"Upgrade: x\r\n", b"Content-Encoding: gzip\r\n", b";", b"ffffffffffffffff\r\n",
    b"Retry-After: 9\r\n", b"Keep-Alive: timeout=", b"204", b"304", b"Transfer-Encoding: gzip, chunked\r\n",
)  # fmt: skip

_encoder = hpack.Encoder()
_encoder.header_table_size = 0
_H2_HEAD = _encoder.encode([(":status", "200"), ("content-type", "application/grpc")])
_H2_TAIL = _encoder.encode([("grpc-status", "0")])
_TABLED = hpack.Encoder().encode([(":status", "200"), ("x-kept", "a value"), ("x-more", "b")])
_HTTP2_SEEDS = (
    frame(4, 0, 0) + grpc_frames(1, b"answer") + grpc_frames(3, b"second") + grpc_frames(5, b"third"),
    frame(4, 0, 0, b"\0\4\0\0\0\1\0\1\0\0\0\0") + frame(6, 0, 0, b"12345678") + grpc_frames(1, None, 14, "no%20no"),
    frame(1, 0x20, 1, bytes(5) + _H2_HEAD[:3]) + frame(9, 4, 1, _H2_HEAD[3:]) + frame(0, 8, 1, b"\2\0\0\0\0\1a..")
    + frame(1, 5, 1, _H2_TAIL),
    frame(7, 0, 0, bytes(8)), frame(7, 0, 0, b"\0\0\0\1" + bytes(4)) + grpc_frames(1, b"last"),
    frame(3, 0, 1, b"\0\0\0\7"), frame(3, 0, 1, b"\0\0\0\x0b"), frame(8, 0, 0, b"\x7f\xff\xff\xff") + frame(8, 0, 1,
    b"\0\0\0\1"),
    frame(1, 4, 1, _TABLED) + frame(0, 0, 1, b"\0\0\0\0\0") + frame(1, 5, 1, b"\xbe\xbf"),
    frame(1, 4, 1, _encoder.encode([(":status", "103")])) + grpc_frames(1, b"", 0, "", [("grpc-retry-pushback-ms",
    "5")]),
    frame(1, 5, 1, _encoder.encode([(":status", "503"), ("retry-after", "3")])),
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
)  # fmt: skip
_HTTP2_WORDS = (
    *(bytes([0, 0, length, kind]) for length in (0, 1, 4, 5, 6, 8) for kind in range(10)), _H2_HEAD, _H2_TAIL,
    b"\0\0\0\1", b"\0\0\0\3", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\1", b"\0\4", b"\0\5", b"\0\1", b"\x88",
    b"\x3f\xe1\x1f", b"\x20", frame(4, 0, 0), frame(6, 0, 0, bytes(8)), b"\xbe",
)  # fmt: skip

TARGETS = (
    Target("remote-http1", run_http1, tuple(bytes([n]) + s for s in _HTTP1_SEEDS for n in (0, 6)), _HTTP1_WORDS, 700),
    Target("remote-http2", run_http2, tuple(b"\6" + seed for seed in _HTTP2_SEEDS), _HTTP2_WORDS),
)
