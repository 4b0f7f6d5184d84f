"""Connections of the gRPC port: limits, slow and silent clients, faults, the end."""

from __future__ import annotations

import asyncio

import pytest

from gateway.ingress.grpc_connection import GrpcConnection
from gateway.ingress.grpc_server import Http2Limits
from gateway.protocol.http2_frames import ACK, GOAWAY, HEADERS, PING, PREFACE, RST_STREAM, frame, settings
from tests.ingress.grpc_peer import GrpcBench, RawClient, fields_for, grpc_bench, prefixed, raw_client
from tests.ingress.http_peer import LOOPS, run, until
from tests.protocol.http2_peer import Sent, data, headers

pytestmark = pytest.mark.parametrize("loop", list(LOOPS))

UNARY = fields_for(b"/test.Echo/Unary")
LATER = fields_for(b"/test.Echo/Later")
STREAM = fields_for(b"/test.Echo/Stream")


def call(stream_id: int, message: bytes = b"x", fields: list[tuple[bytes, bytes]] = UNARY) -> bytes:
    return headers(stream_id, fields, end=False) + data(stream_id, prefixed(message), end=True)


def code_of(goaway: Sent) -> int:
    return int.from_bytes(goaway.payload[4:8], "big")


async def served(client: RawClient, bench: GrpcBench, stream_id: int) -> bool:
    client.send(call(stream_id))
    return (await client.answer())["grpc-status"] == "0"


def test_a_fault_ends_the_connection_with_its_reason(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client, other = await raw_client(bench), await raw_client(bench)
            client.send(call(1, fields=LATER), data(7, b"x"))
            goaway = await client.frame(GOAWAY)
            assert (code_of(goaway), b"never opened" in goaway.payload) == (1, True)
            assert (await client.rest())[-1].kind == GOAWAY
            await until(lambda: bool(bench.app.aborted))
            client.writer.close()
            await until(lambda: bench.server.statistics().open_connections == 1)
            assert bench.server.statistics().rejected == {"http2": 1}
            assert await served(other, bench, 1)

    run(loop, test())


def test_an_answer_given_later_leaves_at_the_end_of_that_turn(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            for stream_id in (1, 3, 5):
                client.send(call(stream_id, fields=LATER))
                await until(lambda: bool(bench.app.later))
                waiting, message = bench.app.later.pop()
                (connection,) = bench.server._shared.connections
                assert not connection.http2.out
                waiting.reply([message], len(message))
                assert connection.http2.out, "one write for all that comes up in this turn"
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                assert not connection.http2.out
                assert (await client.answer())["grpc-status"] == "0"

    run(loop, test())


def test_a_client_of_http1_is_told_what_this_port_speaks(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench, greet=False)
            client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = await client.reader.read()
            assert answer.startswith(b"HTTP/1.1 505 ")
            assert b"This port speaks gRPC" in answer
            assert bench.server.statistics().rejected == {"http_version": 1}

    run(loop, test())


def test_connections_over_the_limit_are_told_so(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench(Http2Limits(max_connections=2)) as bench:
            first, second = await raw_client(bench), await raw_client(bench)
            third = await raw_client(bench)
            goaway = await third.frame(GOAWAY)
            assert code_of(goaway) == 11
            assert b"all 2 connections are in use" in goaway.payload
            third.writer.close()
            assert bench.server.statistics().open_connections == 2
            assert await served(second, bench, 1)
            first.writer.close()
            await until(lambda: bench.server.statistics().open_connections == 1)
            assert await served(await raw_client(bench), bench, 1)

    run(loop, test())


def test_a_client_that_leaves_aborts_its_calls(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            client.send(call(1, bytes(1000), LATER), headers(3, STREAM, end=False), call(5, fields=LATER))
            await until(lambda: len(bench.app.later) == 2)
            assert bench.server.statistics().in_flight == 3
            client.writer.close()
            await until(lambda: len(bench.app.aborted) == 3)
            assert bench.server.statistics().held_bytes == 0

    run(loop, test())


def test_what_one_turn_produces_leaves_in_one_write(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            client.send(*(call(2 * number + 1, b"%d" % number, LATER) for number in range(10)))
            await until(lambda: len(bench.app.later) == 10)
            writes: list[int] = []
            flush = GrpcConnection.flush

            def counted(connection: GrpcConnection) -> None:
                writes.append(len(connection.http2.out))
                flush(connection)

            monkeypatch.setattr(GrpcConnection, "flush", counted)
            for waiting, message in bench.app.later:
                waiting.reply([message], len(message))
            for _ in range(10):
                assert (await client.answer())["grpc-status"] == "0"
            assert writes == [10]

    run(loop, test())


def test_a_silent_client_is_disconnected(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            nothing, part = await raw_client(bench, greet=False), await raw_client(bench, greet=False)
            part.send(PREFACE[:10])
            block = await raw_client(bench)
            block.send(frame(HEADERS, 0, 1, b"\x82"))
            await block.frame(4)
            bench.later(5.0)
            assert bench.server.statistics().rejected == {}
            bench.later(5.1)
            for client in (nothing, part):
                assert code_of((await client.rest())[-1]) == 4
            bench.later(10.0)
            assert code_of((await block.rest())[-1]) == 4
            assert bench.server.statistics().rejected["slow_client"] == 3

    run(loop, test())


def test_a_message_that_does_not_come(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            client.send(
                headers(1, UNARY, end=False),
                headers(3, UNARY, end=False) + data(3, prefixed(bytes(10_000))[:1000]),
                headers(5, STREAM, end=False),
                headers(7, STREAM, end=False) + data(7, prefixed(bytes(10_000))[:1000]),
            )
            await until(lambda: len(bench.app.streams) == 2)
            bench.later(1.0)
            bench.later(5.5)
            for _ in range(2):
                fields = await client.answer()
                assert fields["grpc-status"] == "4"
                assert "less than 1000 bytes per second" in fields["grpc-message"]
            assert {each.stream for each in client.seen if each.kind == HEADERS} == {3, 7}
            bench.later(5.0)
            await client.answer()
            assert {each.stream for each in client.seen if each.kind == HEADERS} == {1, 3, 7}, "a quiet stream is fine"

    run(loop, test())


def test_an_answer_that_is_not_taken(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            client.send(settings({4: 0}), call(1, b"abc"), headers(3, STREAM, end=False), data(3, prefixed(b"abc")))
            await until(lambda: bench.server.statistics().held_bytes == 16)
            bench.later(25.0)
            assert bench.server.statistics().rejected == {}
            bench.later(6.0)
            found = await client.frame(RST_STREAM)
            assert (found.stream, found.payload[-1]) == (1, 8)
            assert bench.server.statistics().held_bytes == 8
            for _ in range(20):
                client.send(frame(PING, 0, 0, b"8 bytes!"))
                await client.frame(PING)
                bench.later(29.0)
            assert (await client.frame(RST_STREAM)).stream == 3
            assert bench.server.statistics().held_bytes == 0
            assert bench.app.aborted == [3]

    run(loop, test())


def test_a_client_that_reads_nothing_is_cut_off(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.send(settings({4: 2**31 - 1}), frame(8, 0, 0, (2**30).to_bytes(4, "big")))
            message = bytes(2**20)
            for number in range(16):
                client.send(headers(2 * number + 1, UNARY, end=False))
                for at in range(0, 2**20 + 5, 2**16):
                    client.send(data(2 * number + 1, prefixed(message)[at : at + 2**16], end=at == 2**20))
            (connection,) = bench.server._shared.connections
            await until(lambda: connection.paused)
            bench.later(31.0)
            await until(lambda: bench.server.statistics().open_connections == 0)
            assert bench.server.statistics().rejected == {"unread": 1}
            assert bench.server.statistics().held_bytes == 0

    run(loop, test())


def test_keepalive_finds_a_dead_client(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            alive, dead = await raw_client(bench), await raw_client(bench)
            for client in (alive, dead):
                client.send(call(1, fields=LATER))
            await until(lambda: len(bench.app.later) == 2)
            bench.later(59.0)
            bench.later(2.0)
            ping = await alive.frame(PING)
            assert (await dead.frame(PING)).flags == 0
            bench.clock.now += 15.0
            alive.send(frame(PING, ACK, 0, ping.payload), call(3))
            await alive.answer()
            bench.later(6.0)
            await until(lambda: bench.server.statistics().open_connections == 1)
            assert bench.server.statistics().rejected == {"silent": 1}
            assert await served(alive, bench, 5)

    run(loop, test())


def test_an_idle_connection_is_closed_gracefully(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            assert await served(client, bench, 1)
            bench.later(599.0)
            client.send(call(3, fields=LATER))
            await until(lambda: bool(bench.app.later))
            bench.later(2.0)
            assert bench.server.statistics().open_connections == 1
            bench.app.later[0][0].reply([b""], 0)
            await client.answer()
            bench.later(600.0)
            await client.frame(GOAWAY)
            ping = await client.frame(PING)
            client.send(frame(PING, ACK, 0, ping.payload))
            assert code_of((await client.rest())[-1]) == 0

    run(loop, test())


def test_a_client_that_does_not_answer_the_ping_is_not_waited_for(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            assert await served(client, bench, 1)
            draining = asyncio.ensure_future(bench.server.drain(20.0))
            await client.frame(PING)
            bench.later(1.1)
            await client.frame(GOAWAY)
            await client.rest()
            client.writer.close()
            assert await draining == 0

    run(loop, test())


def test_a_client_that_says_goodbye_is_let_go(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            client.send(call(1, fields=LATER), frame(GOAWAY, 0, 0, bytes(8)))
            await until(lambda: bool(bench.app.later))
            bench.app.later[0][0].reply([b"x"], 1)
            assert (await client.answer())["grpc-status"] == "0"
            await client.rest()

    run(loop, test())
