"""Remote servers that mean harm, or behave so: nothing crosses callers, lasts for ever or takes the loop away.

What one connection makes of bytes is tested next to it (`test_remote_http1`, `test_remote_http2`) and by the fuzz
targets; here a whole replica meets a server on real sockets, or a decoder meets what a few bytes can stand for.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest

from gateway.backends import remote_connections
from gateway.backends.remote import Endpoint, RemoteError, RemoteModel, RemoteServer
from gateway.backends.remote_connections import Exchange
from gateway.backends.remote_http1 import MAX_HEAD_BYTES, Http1Connection
from gateway.backends.remote_outcome import retry_after_s
from gateway.backends.remote_queries import described, signature_fault
from gateway.core.outcome import Failure, FailureKind, Sign, Success
from gateway.core.request import InputTensor
from gateway.core.tensor import DATATYPE
from tests.backends.oip_server import Reply, Request, grpc_frames, http, http_json
from tests.backends.remote_rig import SCHEMES, Given, X, Y, execute, rig, seen, until, values
from tests.backends.test_remote_codec import Fed, answer, entry, http_codec
from tests.backends.wire_feed import exchange as exchanged
from tests.backends.wire_feed import open_connection

BROKEN, NOT_SENT, CANCELLED = FailureKind.BROKEN, FailureKind.NOT_SENT, FailureKind.CANCELLED
ASK = b"GET / HTTP/1.1\r\n\r\n"

# -- one exchange and the next ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [True, False], ids=["apart", "together"])
async def test_a_second_answer_is_not_given_to_the_next_question(cut: bool) -> None:
    async with rig() as r:

        def twice(asked: Request) -> Reply:
            length = int(asked.headers["inference-header-content-length"])
            asking = json.loads(asked.body[:length])
            data = (np.frombuffer(asked.body[length:], "<f4") * np.float32(2)).tolist()
            y = {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": data}
            good = http_json({"id": asking["id"], "outputs": [y]})
            return Reply(good * 2, cuts=[len(good)] if cut else ())

        r.peer.script = twice
        for value in range(10):
            outcome = await execute(r.replica, value)
            assert isinstance(outcome, Failure) or values(outcome) == [2.0 * value]


async def test_a_connection_on_which_words_wait_is_not_used_again() -> None:
    """They came after the loop had looked for the last time."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = RemoteServer(Endpoint("http", "127.0.0.1", listener.getsockname()[1]))
        channel = server.channel
        settled: list[Any] = []
        channel.begin(ASK, settled.append)
        await until(lambda: channel.connections == 1, "connected")
        first, _ = listener.accept()
        first.sendall(http(b"mine"))
        await until(lambda: len(settled) == 1, "answered")
        first.sendall(http(b"nobody's"))
        channel.begin(ASK, settled.append)  # the loop saw nothing of it
        await until(lambda: channel.connections == 1 and not channel._tasks, "on another connection")
        listener.settimeout(30)
        second, _ = listener.accept()
        second.sendall(http(b"yours"))
        await until(lambda: len(settled) == 2, "answered")
        assert [bytes(answer.body) for answer in settled] == [b"mine", b"yours"]
        first.close()
        second.close()
        await server.close()


def test_an_answer_that_names_another_question_is_not_taken() -> None:
    codec = http_codec()
    x = InputTensor(DATATYPE["FP32"], (1, 2), None, bytes(8))
    (_, first), (_, second) = codec.request(Fed(x), 1.0), codec.request(Fed(x), 1.0)
    assert first != second
    for told, fits in ((first, False), (second, True), (None, True), ("made-up", True)):
        found = codec.success(answer({"id": told, "outputs": [entry(data=[1, 2])]})._replace(tag=second), (0,))
        assert isinstance(found, Success) is fits, told


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("warm", [True, False], ids=["idle", "new"])
async def test_cancelled_at_any_step_a_batch_ends_once_and_its_connection_is_not_used_again(
    scheme: str, warm: bool
) -> None:
    async with rig(scheme) as r:
        answered = r.peer.script
        r.peer.script = lambda asked: Reply(answered(asked).data, cuts=(1, 30, 100))
        cancelled = 0
        for steps in range(40):
            if not warm:
                r.server.channel.drop_idle()
            batch = Given(float(steps))
            r.replica.execute(batch, 30.0)
            for _ in range(steps):
                await asyncio.sleep(0 if steps % 2 else 0.0003)
            r.replica.cancel(batch)
            outcome = await batch.result()
            cancelled += isinstance(outcome, Failure)
            assert isinstance(outcome, Success) or outcome.kind is CANCELLED
            assert r.replica.in_flight == 0
            assert values(await execute(r.replica, 1000.0 + steps)) == [2000.0 + 2 * steps]
            assert batch.times == 1
        assert cancelled >= 5
        channel = r.server.channel
        await until(lambda: all(c.exchange is None for c in channel._open), "no connection is held by anybody")
        assert {*channel._idle} <= channel._open


async def test_a_question_that_is_given_up_as_its_answer_comes_harms_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with rig() as r:
        channel = r.server.channel
        begun: list[Exchange] = []

        def begin(request: Any, done: Any, max_bytes: int = 0) -> Exchange:
            begun.append(Exchange(request, done, max_bytes))
            return begun[-1]

        monkeypatch.setattr(type(channel), "begin", lambda self, *given: begin(*given))
        asking = asyncio.create_task(channel.ask(ASK, 30.0))
        await asyncio.sleep(0)
        asking.cancel()
        begun[-1].settle("an answer")
        with pytest.raises(asyncio.CancelledError):
            await asking


# -- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_server_that_says_at_once_that_time_is_over_is_not_believed(scheme: str) -> None:
    async with rig(scheme) as r:
        r.peer.script = lambda asked: Reply(
            http(b"", 504) if scheme == "http" else grpc_frames(asked.stream, None, 4, "over")
        )
        begun = time.monotonic()
        batch = Given(1.0, deadline=begun + 25.0)
        r.replica.execute(batch, 30.0)
        outcome = await batch.result()
        assert isinstance(outcome, Failure)
        assert outcome.kind in (BROKEN, FailureKind.TIMEOUT)
        assert time.monotonic() - begun < 20.0


@pytest.mark.parametrize(
    ("text", "date", "expected"),
    [
        ("2", "", 2.0),
        ("1.5", "", 1.5),
        ("Fri, 31 Dec 1999 23:59:59 GMT", "Fri, 31 Dec 1999 23:59:29 GMT", 30.0),
        ("Fri, 31 Dec 1999 23:59:59 GMT", "Fri, 31 Dec 2010 23:59:59 GMT", 0.0),
        ("Fri, 31 Dec 1999 23:59:59 GMT", "", 0.0),
        ("Fri, 31 Feb 1999 23:59:59 GMT", "Fri, 31 Dec 1999 23:59:29 GMT", 0.0),
        ("Fri, 31 Xyz 1999 23:59:59 GMT", "Fri, 31 Dec 1999 23:59:29 GMT", 0.0),
        ("-1", "", 0.0),
        ("1e9", "", 0.0),
        ("9" * 400, "", 0.0),
        ("²", "", 0.0),
    ],
)
def test_when_to_try_again(text: str, date: str, expected: float) -> None:
    assert retry_after_s(text, date) == expected


async def test_what_this_process_lacks_is_not_the_servers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig() as r:

        async def none_left(self: Any) -> Any:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        r.server.channel.drop_idle()
        failed = r.server.statistics().connect_failures
        with monkeypatch.context() as patched:
            patched.setattr(remote_connections.Channel, "_socket", none_left)
            for _ in range(4):
                outcome = await execute(r.replica, 1)
                assert seen(outcome) == (NOT_SENT, Sign.NONE)
                assert isinstance(outcome, Failure)
                assert "open files" in outcome.message
            assert r.replica.available
        assert r.server.statistics().connect_failures == failed
        assert values(await execute(r.replica, 3)) == [6]


# -- bytes without end -----------------------------------------------------------------------------------------------

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "trailer": (CHUNKED + b"0\r\nX: ", b"y" * 65_536),
    "trailers": (CHUNKED + b"0\r\n", b"X: y\r\n" * 9000),
    "extension": (CHUNKED + b"1;", b"y" * 65_536),
    "size": (CHUNKED, b"0" * 65_536),
    "reason": (b"HTTP/1.1 200 ", b"y" * 65_536),
    "name": (b"HTTP/1.1 200 OK\r\n", b"y" * 65_536),
    "interim": (b"", b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" * 2000),
    "blanks": (b"", b"\r\n" * 32_000),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_has_no_end_is_cut_off(name: str) -> None:
    opening, more = ENDLESS[name]
    with open_connection(Http1Connection) as (connection, channel):
        found = exchanged(connection, ASK, [opening, *[more] * 30] if opening else [more] * 30)
        assert [answer.kind for answer in found] == [BROKEN]
        assert not channel.released


def test_crumbs_of_a_body_take_no_more_memory_than_they_are() -> None:
    crumbs = b"2\r\nab\r\n" * 30_000
    with open_connection(Http1Connection, 1 << 24) as (connection, _):
        tracemalloc.start()
        try:
            exchanged(connection, ASK, [CHUNKED, *[crumbs] * 20])
            held, _peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < 4 * 20 * 60_000


def test_a_trailer_takes_no_headers_place() -> None:
    body = b"3\r\nabc\r\n0\r\nX-One: late\r\n\r\n"
    with open_connection(Http1Connection) as (connection, channel):
        (found,) = exchanged(connection, ASK, [CHUNKED[:-2] + b"X-One: early\r\n\r\n" + body])
        assert found.header(b"x-one") == "early"
        assert channel.released


@pytest.mark.parametrize("length", ["18446744073709551616", "0" * 30 + "1000000000000", "-1", "+5", "5, 6"])
def test_announced_lengths_that_cannot_be(length: str) -> None:
    with open_connection(Http1Connection) as (connection, _):
        (found,) = exchanged(connection, ASK, [f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\nabc".encode()])
        assert found.kind is BROKEN


def test_a_head_is_counted_over_all_its_pieces() -> None:
    with open_connection(Http1Connection) as (connection, _):
        field = b"X-%05d: y\r\n"
        found = exchanged(connection, ASK, [b"HTTP/1.1 200 OK\r\n", *[field % n for n in range(MAX_HEAD_BYTES // 8)]])
        assert [answer.kind for answer in found] == [BROKEN]


async def test_answers_to_other_questions_are_bounded_more_tightly() -> None:
    async with rig() as r:
        r.peer.metadata = r.peer.metadata | {"more": "x" * remote_connections.MAX_TOLD_BYTES}
        with pytest.raises(RemoteError, match="more than 2097152 bytes"):
            await r.server.model("double")


# -- documents -------------------------------------------------------------------------------------------------------

DEEP = json.loads("[" * 900 + "]" * 900)
ODD: list[Any] = [
    DEEP, {"a": DEEP}, "--1", "²", "1" * 5000, "-", 2**63, 2**64 - 1, True, None, 1.5, "", "a\nb", "\u202e", "x" * 3000,
    [], {},
]  # fmt: skip
GOOD: dict[str, Any] = {
    "name": "m",
    "versions": ["1"],
    "platform": "p",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
}
CONFIG: dict[str, Any] = {
    "max_batch_size": 8,
    "input": [{"name": "x", "optional": True}],
    "dynamic_batching": {"max_queue_delay_microseconds": "5"},
    "sequence_batching": {},
    "model_transaction_policy": {"decoupled": False},
}


def read(metadata: dict[str, Any], config: dict[str, Any]) -> None:
    try:
        found = described(metadata, config, "m", "")
    except RemoteError as error:
        refused = str(error)
        if not refused.isprintable() or len(refused) > 2000:
            raise AssertionError(refused) from error
        return
    assert isinstance(found, RemoteModel)
    assert found.platform.isprintable()
    for text in (*found.versions, *[tensor.name for tensor in (*found.inputs, *found.outputs)]):
        assert text.isprintable()
        assert len(text) <= 1024
    for tensor in (*found.inputs, *found.outputs):
        assert all(dim is None or 0 <= dim < 2**63 for dim in tensor.shape)
    assert found.max_batch_size is None or 0 <= found.max_batch_size < 2**31
    assert 0 <= found.max_queue_delay_us < 2**31
    assert signature_fault((X,), (Y,), found).isprintable()


def replaced(document: Any, odd: Any) -> list[Any]:
    """The document with `odd` in the place of each of its parts."""
    if isinstance(document, dict):
        return [odd, *[document | {key: new} for key, value in document.items() for new in replaced(value, odd)]]
    if isinstance(document, list):
        return (
            [odd, *[[new, *document[1:]] for new in replaced(document[0], odd)], [*document, odd]]
            if document
            else [odd]
        )
    return [odd]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_odd_values_anywhere_in_what_a_server_says_of_a_model(odd: Any) -> None:
    for metadata in replaced(GOOD, odd)[1:]:
        read(metadata, CONFIG)
    for config in replaced(CONFIG, odd)[1:]:
        read(GOOD, config)


@pytest.mark.parametrize("words", [DEEP, {"error": DEEP}, {"error": {"a": [1]}}, {"detail": DEEP}])
async def test_odd_words_of_a_refusal_are_no_words(words: Any) -> None:
    async with rig() as r:
        r.peer.script = lambda _: Reply(http(b'{"error":' + b"[" * 900 + b"]" * 900 + b"}", 500))
        outcome = await execute(r.replica, 1)
        assert seen(outcome) == (BROKEN, Sign.ANSWERED)


async def test_a_server_that_cannot_be_understood_is_taken_back_when_it_can() -> None:
    async with rig() as r:
        good = dict(r.peer.metadata)
        r.peer.metadata = good | {"inputs": [{"name": "x", "datatype": "FP32", "shape": ["--1", "²"]}], "name": DEEP}
        r.peer.name = DEEP
        await r.peer.stop()
        await r.peer.start()
        await until(lambda: not r.replica.available, "it is seen")
        before = len(r.peer.requests)
        await until(lambda: len(r.peer.requests) > before + 3, "it is asked again and again")
        r.peer.metadata, r.peer.name = good, "scripted"
        await until(lambda: r.replica.available, "it is understood again")
