"""The server as its clients and its application see it, on both event loops."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket

import pytest

from gateway.errors import NotFound
from gateway.ingress.http_server import HttpLimits
from tests.ingress.http_peer import LOOPS, answer, bench, run, until
from tests.protocol.test_http1_head import REFUSED, block, get, post

pytestmark = pytest.mark.parametrize("loop", list(LOOPS))


def infer(body: bytes, *fields: bytes) -> bytes:
    return post(b"Content-Length: %d" % len(body), *fields) + body


def test_echo(loop: str) -> None:
    async def test() -> None:
        async with bench(echo=True) as b:
            client = await b.client()
            for body in (b"a", b"", b"x" * 1_000_000, b"b"):
                client.send(infer(body))
                assert await client.response() == (
                    200,
                    {"Content-Type": "text/plain", "Content-Length": str(len(body))},
                    body,
                )
            statistics = b.server.statistics()
            assert (statistics.requests, statistics.in_flight, statistics.held_bytes) == (4, 0, 0)
            assert b.app.given[0][0].received == b.clock.now

    run(loop, test())


def test_a_head_is_resolved_once_until_forgotten(loop: str) -> None:
    async def test() -> None:
        async with bench(echo=True) as b:
            for _ in range(2):
                client = await b.client()
                client.send(get() + get())
                assert [await client.status(), await client.status()] == [200, 200]
            assert b.app.resolved == [b"/v2"]
            b.server.forget_heads()
            client.send(get())
            assert await client.status() == 200
            assert b.app.resolved == [b"/v2", b"/v2"]

    run(loop, test())


def test_answers_leave_in_request_order(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            client = await b.client()
            client.send(b"".join(infer(b"%d" % n) for n in range(10)))
            await b.given(10)
            for exchange, body in reversed(b.app.given):
                exchange.send_parts([b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n", memoryview(body)])
            assert [(await client.response())[2] for _ in range(10)] == [b"%d" % n for n in range(10)]

    run(loop, test())


def test_no_more_is_handed_over_than_the_look_ahead(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            client = await b.client()
            client.send(b"".join(infer(b"%02d" % n) for n in range(100)))
            await b.given(32)
            other = await b.client()
            other.send(get())
            await b.given(33)
            assert b.server.statistics().in_flight == 33
            for n in range(100):
                mine = [pair for pair in b.app.given if pair[1]]
                # Reading goes on at half of the bound, so never more than it is under way.
                assert len(mine) - n <= 32
                answer(*mine[n])
                assert (await client.response())[2] == b"%02d" % n
                await until(lambda n=n: len(b.app.given) - 1 > min(n + 1, 99))  # type: ignore[misc]

    run(loop, test())


def test_a_thousand_pipelined_requests(loop: str) -> None:
    async def test() -> None:
        async with bench(echo=True) as b:
            client = await b.client()
            client.send(b"".join(infer(b"%03d" % n) for n in range(1000)))
            for n in range(1000):
                assert (await client.response())[2] == b"%03d" % n

    run(loop, test())


def test_continue_comes_behind_the_answers_before_it(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            client = await b.client()
            client.send(infer(b"first") + post(b"Content-Length: 6", b"Expect: 100-continue"))
            await b.given(1)
            answer(*b.app.given[0])
            assert (await client.response())[2] == b"first"
            assert await client.status() == 100
            client.send(b"second")
            await b.given(2)
            answer(*b.app.given[1])
            assert (await client.response())[2] == b"second"

    run(loop, test())


def test_head_requests_get_no_body(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            client = await b.client()
            client.send(block(b"HEAD /x HTTP/1.1", b"Host: a") + infer(b"next"))
            await b.given(2)
            b.app.given[0][0].send_error(NotFound("Not Found"))
            answer(*b.app.given[1])
            status, fields, _ = await client.response(bodiless=True)
            assert (status, fields["Content-Length"]) == (404, str(len('{"error":"Not Found"}')))
            assert (await client.response())[2] == b"next"

    run(loop, test())


def test_http_1_0(loop: str) -> None:
    async def test() -> None:
        async with bench(echo=True) as b:
            client = await b.client()
            client.send(block(b"POST / HTTP/1.0", b"Connection: keep-alive", b"Content-Length: 1") + b"a")
            status, fields, body = await client.response()
            assert (status, fields["Connection"], body) == (200, "keep-alive", b"a")
            client.send(block(b"GET / HTTP/1.0"))
            assert (await client.response())[1]["Connection"] == "close"
            assert await client.ended()

    run(loop, test())


def test_connection_close_is_honoured_and_nothing_behind_it_is_handled(loop: str) -> None:
    async def test() -> None:
        async with bench(echo=True) as b:
            client = await b.client()
            client.send(infer(b"a", b"Connection: close") + infer(b"b"))
            assert (await client.response())[1]["Connection"] == "close"
            assert await client.ended()
            assert b.app.bodies() == [b"a"]

    run(loop, test())


def test_the_application_may_end_a_connection(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            client = await b.client()
            client.send(infer(b"a") + infer(b"b"))
            await b.given(2)
            b.app.given[0][0].keep_alive = False
            answer(*b.app.given[0])
            assert await client.status() == 200
            assert await client.ended()
            assert b.app.aborted == [b"b"]

    run(loop, test())


# -- faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in REFUSED if len(case[1]) < 300], ids=lambda case: case[0])
def test_a_hostile_request_is_answered_closed_and_harms_nobody(loop: str, case: tuple[str, bytes, int]) -> None:
    _, raw, status = case

    async def test() -> None:
        async with bench(echo=True) as b:
            good, bad = await b.client(), await b.client()
            good.send(infer(b"hello")[:-1])
            bad.send(raw + infer(b"smuggled"))
            found, fields, body = await bad.response()
            assert (found, fields["Content-Type"], fields["Connection"]) == (status, "application/json", "close")
            assert list(json.loads(body)) == ["error"]
            assert await bad.ended()
            good.send(b"o")
            assert (await good.response())[2] == b"hello"
            assert b.app.bodies() == [b"hello"]
            assert sum(b.server.statistics().rejected.values()) == 1

    run(loop, test())


def test_a_refusal_waits_for_the_answers_before_it(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            client = await b.client()
            client.send(infer(b"a") + b"nonsense\r\n\r\n")
            await b.given(1)
            await until(lambda: b.server.statistics().rejected == {"invalid": 1})
            answer(*b.app.given[0])
            assert [await client.status(), await client.status()] == [200, 400]
            assert await client.ended()

    run(loop, test())


def test_a_client_that_is_still_sending_can_read_its_refusal(loop: str) -> None:
    async def test() -> None:
        async with bench(HttpLimits(max_body_bytes=1000)) as b:
            client = await b.client()
            client.send(post(b"Content-Length: 30000000"))
            for _ in range(300):
                client.send(b"x" * 100_000)
                await client.writer.drain()
            assert await client.status() == 413
            assert await client.ended()

    run(loop, test())


def test_a_refused_client_that_stays_is_cut_off(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            client = await b.client()
            client.send(b"nonsense\r\n\r\n")
            assert await client.status() == 400
            assert await client.ended()
            b.later(4.9)
            assert b.server.statistics().open_connections == 1
            b.later(0.1)
            await until(lambda: b.server.statistics().open_connections == 0)

    run(loop, test())


def test_an_exception_in_the_application_is_a_500_and_logged_once(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with bench(echo=True) as b:
            client = await b.client()
            b.app.fail = ValueError("secret")
            client.send(infer(b"a"))
            status, _, body = await client.response()
            assert status == 500
            assert b"secret" not in body
            b.app.fail = None
            client.send(infer(b"b"))
            assert (await client.response())[2] == b"b"

    with caplog.at_level(logging.ERROR, "gateway.http"):
        run(loop, test())
    assert [record.name for record in caplog.records] == ["gateway.http"]
    assert caplog.records[0].exc_info is not None


def test_an_exception_behind_the_answer_changes_nothing_for_the_client(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with bench(echo=True) as b:
            client = await b.client()
            client.send(infer(b"a"))
            assert await client.status() == 200
            with pytest.raises(RuntimeError, match="twice"):
                answer(*b.app.given[0])
            client.send(infer(b"b"))
            assert (await client.response())[2] == b"b"

    run(loop, test())
    assert not caplog.records


def test_answering_twice_is_refused_also_before_the_first_answer_has_left(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            client = await b.client()
            client.send(infer(b"a") + infer(b"b"))
            await b.given(2)
            answer(*b.app.given[1])
            with pytest.raises(RuntimeError, match="twice"):
                answer(*b.app.given[1])

    run(loop, test())


# -- limits --------------------------------------------------------------------------------------------------


def test_a_connection_over_the_limit_is_told_so(loop: str) -> None:
    async def test() -> None:
        async with bench(HttpLimits(max_connections=2), echo=True) as b:
            first, second = await b.connected(), await b.connected()
            third = await b.client()
            status, fields, body = await third.response()
            assert (status, fields["Connection"], fields["Retry-After"]) == (503, "close", "1")
            assert b"all 2 connections" in body
            assert await third.ended()
            for client in (first, second):
                client.send(get())
                assert await client.status() == 200
            first.leave()
            await until(lambda: b.server.statistics().open_connections == 1)
            fourth = await b.client()
            fourth.send(get())
            assert await fourth.status() == 200
            assert b.server.statistics().rejected == {"overloaded": 1}

    run(loop, test())


def test_held_bytes_are_bounded_and_given_back_with_the_answer(loop: str) -> None:
    async def test() -> None:
        async with bench(HttpLimits(max_held_bytes=1000)) as b:
            first, second = await b.client(), await b.client()
            first.send(infer(b"x" * 900))
            await b.given(1)
            assert b.server.statistics().held_bytes == 900
            second.send(infer(b"y" * 200))
            status, fields, _ = await second.response()
            assert (status, "Connection" in fields) == (503, False)
            answer(*b.app.given[0])
            assert await first.status() == 200
            assert b.server.statistics().held_bytes == 0
            second.send(infer(b"y" * 200))
            await b.given(2)
            answer(*b.app.given[1])
            assert await second.status() == 200

    run(loop, test())


def test_nagle_is_off(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            await b.connected()
            (connection,) = b.server._shared.connections
            sock: socket.socket = connection.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    run(loop, test())


# -- the end -------------------------------------------------------------------------------------------------


def test_drain_answers_what_was_accepted_and_closes_the_rest(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            idle, busy, pipelined, fresh = [await b.connected() for _ in range(4)]
            idle.send(infer(b"idle"))
            await b.given(1)
            answer(*b.app.given[0])
            assert await idle.status() == 200
            busy.send(infer(b"busy"))
            await b.given(2)
            pipelined.send(infer(b"one") + infer(b"two"))
            await b.given(4)
            drained = asyncio.ensure_future(b.server.drain(20.0))
            assert await idle.ended()
            assert await fresh.ended()
            with pytest.raises(ConnectionError):
                await b.client()
            for given in b.app.given[1:]:
                answer(*given)
            for client, said in ((busy, [True]), (pipelined, [False, True])):
                for close in said:
                    status, fields, _ = await client.response()
                    assert (status, "Connection" in fields) == (200, close)
                assert await client.ended()
            assert await drained == 0

    run(loop, test())


def test_drain_lets_a_request_that_has_begun_come_in(loop: str) -> None:
    async def test() -> None:
        async with bench(echo=True) as b:
            client = await b.connected()
            client.send(infer(b"abc")[:-1])
            await until(lambda: b.server.statistics().held_bytes == 2)
            drained = asyncio.ensure_future(b.server.drain(20.0))
            await until(lambda: b.server.draining)
            client.send(b"c" + infer(b"too late"))
            status, fields, body = await client.response()
            assert (status, fields["Connection"], body) == (200, "close", b"abc")
            assert await client.ended()
            assert await drained == 0
            assert b.app.bodies() == [b"abc"]

    run(loop, test())


def test_drain_takes_a_request_that_was_sent_before_it_began(loop: str) -> None:
    async def test() -> None:
        async with bench(echo=True) as b:
            client = await b.connected()
            os.write(client.writer.get_extra_info("socket").fileno(), infer(b"just in time"))
            assert await b.server.drain(20.0) == 0
            status, fields, body = await client.response()
            assert (status, fields["Connection"], body) == (200, "close", b"just in time")

    run(loop, test())


def test_drain_cuts_off_what_is_not_answered_in_time(loop: str) -> None:
    async def test() -> None:
        async with bench() as b:
            client = await b.client()
            client.send(infer(b"a"))
            await b.given(1)
            assert await b.server.drain(0.01) == 1
            assert await client.ended()
            assert b.app.aborted == [b"a"]
            answer(*b.app.given[0])

    run(loop, test())


def test_no_timer_without_a_connection(loop: str) -> None:
    async def test() -> None:
        async with bench(echo=True) as b:
            before = b.server.sweeping
            client = await b.connected()
            assert (before, b.server.sweeping) == (False, True)
            client.leave()
            await until(lambda: not b.server.sweeping)

    run(loop, test())
