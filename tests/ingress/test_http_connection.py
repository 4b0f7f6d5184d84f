"""One connection against a slow, absent or greedy client, on both event loops."""

from __future__ import annotations

import pytest

from gateway.ingress.http_server import HttpLimits
from gateway.protocol.http1 import response_head
from tests.ingress.http_peer import LOOPS, Bench, Client, answer, bench, run, until
from tests.protocol.test_http1_head import block, get, post

pytestmark = pytest.mark.parametrize("loop", list(LOOPS))


def infer(body: bytes) -> bytes:
    return post(b"Content-Length: %d" % len(body)) + body


# -- slow clients --------------------------------------------------------------------------------------------


def test_a_slow_head_is_a_408(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            silent, slow = await b.connected(), await b.connected()
            slow.send(get()[:10])
            await until(lambda: b.server.statistics().held_bytes == 10)
            b.later(9.9)
            assert b.server.statistics().rejected == {}
            b.later(0.1)
            for client in (silent, slow):
                status, fields, _ = await client.response()
                assert (status, fields["Connection"]) == (408, "close")
                assert await client.ended()
            assert b.server.statistics().rejected == {"slow_client": 2}

    run(loop, test())


def test_a_slow_body_is_a_408(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            client = await b.connected()
            client.send(post(b"Content-Length: 10000"))
            for second in range(4):
                client.send(b"x")
                await until(lambda second=second: b.server.statistics().held_bytes == second + 1)  # type: ignore[misc]
                b.later(1.0)
            assert b.server.statistics().rejected == {}
            b.later(1.0)
            assert await client.status() == 408
            assert await client.ended()
            assert b.server.statistics().held_bytes == 0

    run(loop, test())


def test_an_idle_connection_is_closed_without_a_word(loop: str) -> None:
    async def test() -> None:
        async with bench(echo=True) as b:
            client = await b.client()
            client.send(get())
            assert await client.status() == 200
            b.later(74.9)
            client.send(get())
            assert await client.status() == 200
            b.later(74.9)
            assert b.server.statistics().open_connections == 1
            b.later(0.1)
            assert await client.ended()
            assert b.server.statistics().rejected == {}

    run(loop, test())


def test_waiting_for_an_answer_is_not_idleness(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            client = await b.client()
            client.send(infer(b"a"))
            await b.given(1)
            b.later(100.0)
            answer(*b.app.given[0])
            assert await client.status() == 200
            b.later(74.0)
            client.send(infer(b"b"))
            await b.given(2)
            answer(*b.app.given[1])
            assert await client.status() == 200

    run(loop, test())


def test_a_skipped_body_that_does_not_come_ends_the_connection_without_a_second_answer(loop: str) -> None:
    async def test() -> None:
        async with bench(HttpLimits(max_held_bytes=100)) as b:
            client = await b.client()
            client.send(post(b"Content-Length: 200"))
            assert await client.status() == 503
            b.later(5.0)
            assert await client.ended()

    run(loop, test())


# -- clients that leave --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["leave", "reset"])
def test_a_client_that_leaves_has_its_requests_given_up_once(loop: str, how: str) -> None:
    async def test() -> None:
        async with bench() as b:
            client, other = await b.client(), await b.client()
            client.send(infer(b"a") + infer(b"b") + infer(b"answered"))
            await b.given(3)
            other.send(infer(b"other"))
            await b.given(4)
            answer(*b.app.given[2])
            getattr(client, how)()
            await until(lambda: b.server.statistics().open_connections == 1)
            assert b.app.aborted == [b"a", b"b"]
            for given in b.app.given[:2]:
                answer(*given)
                answer(*given)
            statistics = b.server.statistics()
            assert (statistics.aborted, statistics.held_bytes) == (2, len(b"other"))
            answer(*b.app.given[3])
            assert await other.status() == 200
            assert b.app.aborted == [b"a", b"b"]

    run(loop, test())


def test_a_client_that_leaves_in_the_middle_of_a_body_frees_it(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            client = await b.client()
            client.send(infer(b"hello")[:-1])
            await until(lambda: b.server.statistics().held_bytes == 4)
            client.leave()
            await until(lambda: b.server.statistics().held_bytes == 0)
            assert not b.app.given

    run(loop, test())


def test_a_failing_on_abort_harms_nobody(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError

    async def test() -> None:
        async with bench() as b:
            client = await b.client()
            client.send(infer(b"a") + infer(b"b"))
            await b.given(2)
            b.app.given[0][0].on_abort = fail
            client.reset()
            await until(lambda: b.app.aborted == [b"b"])

    run(loop, test())
    assert len(caplog.records) == 1


def test_a_client_that_closed_only_its_half_is_answered(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            client = await b.client()
            client.send(infer(b"a") + infer(b"b"))
            await b.given(2)
            client.writer.write_eof()
            # After a moment without an answer it is asked, by an interim response, whether it still listens.
            assert await client.status() == 100
            for given in b.app.given:
                answer(*given)
            assert [(await client.response())[2], (await client.response())[2]] == [b"a", b"b"]
            assert await client.ended()
            assert b.app.aborted == []

    run(loop, test())


def test_a_half_closed_pipeline_longer_than_the_look_ahead_is_answered(loop: str) -> None:
    async def test() -> None:
        async with bench(echo=True) as b:
            client = await b.client()
            client.send(b"".join(infer(b"%03d" % n) for n in range(500)))
            client.writer.write_eof()
            for n in range(500):
                assert (await client.response())[2] == b"%03d" % n
            assert await client.ended()

    run(loop, test())


def test_http_1_0_is_not_asked_whether_it_listens(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            client = await b.client()
            client.send(block(b"GET / HTTP/1.0"))
            await b.given(1)
            client.writer.write_eof()
            (connection,) = b.server._shared.connections
            await until(lambda: connection._eof)
            b.later(1.0)
            answer(*b.app.given[0])
            assert await client.status() == 200
            assert await client.ended()

    run(loop, test())


# -- clients that do not read --------------------------------------------------------------------------------

LARGE = b"x" * 1_000_000


async def stuffed(b: Bench) -> Client:
    """A client that has sent many requests and takes none of the answers, until the server has stopped."""
    client = await b.client()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(infer(b"") * 500)
    (connection,) = b.server._shared.connections
    await until(lambda: not connection.writable)
    return client


class LargeAnswers:
    """Answers every request with a megabyte, at once."""

    def __init__(self, b: Bench) -> None:
        b.app.echo = False
        handle = b.app.handle
        count = [0]

        def large(*arguments: object) -> None:
            handle(*arguments)  # type: ignore[arg-type]
            count[0] += 1
            exchange = b.app.given[-1][0]
            exchange.send(response_head(200, b"a/b", len(LARGE)) + LARGE)

        b.server._shared.handle = large


def test_a_client_that_never_reads_stops_being_served_and_is_cut_off(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            LargeAnswers(b)
            await stuffed(b)
            (connection,) = b.server._shared.connections
            handed_over = len(b.app.given)
            assert handed_over <= 3 * 32
            assert connection.transport.get_write_buffer_size() <= 4 * len(LARGE)
            b.later(29.9)
            assert len(b.app.given) == handed_over
            assert b.server.statistics().open_connections == 1
            b.later(0.2)
            b.later(30.0)
            await until(lambda: b.server.statistics().open_connections == 0)
            assert b.server.statistics().rejected == {"unread": 1}
            # What was answered but never left is not given up a second time.
            assert b.app.aborted == []

    run(loop, test())


def test_a_client_that_reads_again_gets_everything_in_order(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            LargeAnswers(b)
            client = await stuffed(b)
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            for _ in range(100):
                assert (await client.response())[2] == LARGE
                b.later(1.0)

    run(loop, test())
