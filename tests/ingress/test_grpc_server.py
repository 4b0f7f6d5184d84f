"""The gRPC server as grpcio's clients see it, on both event loops."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from gateway.ingress.grpc_server import Http2Limits
from tests.ingress.grpc_peer import GrpcBench, grpc_bench
from tests.ingress.http_peer import LOOPS, run, until

pytestmark = pytest.mark.parametrize("loop", list(LOOPS))

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
MIB = 2**20
aio: Any = grpc.aio
"""Its stubs lack EOF."""


@asynccontextmanager
async def connected(
    limits: Http2Limits | None = None, *, compression: str = "none", options: dict[str, int] | None = None
) -> AsyncIterator[tuple[GrpcBench, Any]]:
    async with grpc_bench(limits, compression) as bench:
        more = [(f"grpc.{name}", value) for name, value in (options or {}).items()]
        channel: Any = grpc.aio.insecure_channel(bench.address, options=[*UNLIMITED, *more])
        try:
            yield bench, channel
        finally:
            await channel.close()


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def test_unary_calls_with_metadata(loop: str) -> None:
    async def test() -> None:
        async with connected() as (bench, channel):
            unary = channel.unary_unary("/test.Echo/Unary")
            for message in (b"", b"a", bytes(70_000), bytes(3 * MIB), b"z"):
                call = unary(message, metadata=[("x-a", "1"), ("x-b-bin", b"\0\xff"), ("other", "2")])
                assert await call == message
                initial = await call.initial_metadata()
                assert dict(initial or ()) == {"x-a": "1", "x-b-bin": b"\0\xff"}
                assert await call.code() is grpc.StatusCode.OK
            assert bench.app.resolved.count(b"/test.Echo/Unary") <= 2, "a head is resolved once it is remembered"
            statistics = bench.server.statistics()
            assert (statistics.requests, statistics.in_flight, statistics.open_connections) == (5, 0, 1)

    run(loop, test())


def test_many_calls_at_a_time(loop: str) -> None:
    async def test() -> None:
        async with connected() as (_, channel):
            unary = channel.unary_unary("/test.Echo/Unary")
            messages = [b"%d" % number * (number % 50) for number in range(500)]
            assert await asyncio.gather(*map(unary, messages)) == messages

    run(loop, test())


def test_errors(loop: str) -> None:
    async def test() -> None:
        async with connected() as (bench, channel):
            error = await failure(channel.unary_unary("/test.Echo/Fail")(b""))
            assert (error.code(), error.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "naïve 100%\n")
            assert dict(error.trailing_metadata())["x-why"] == "because"
            error = await failure(channel.unary_unary("/test.Echo/Nothing")(b""))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED
            error = await failure(channel.unary_unary("/test.Echo/Raise")(b""))
            assert error.code() is grpc.StatusCode.INTERNAL
            assert await channel.unary_unary("/test.Echo/Unary")(b"on") == b"on"
            assert bench.server.statistics().in_flight == 0

    run(loop, test())


def test_a_stream(loop: str) -> None:
    async def test() -> None:
        async with connected() as (bench, channel):
            call = channel.stream_stream("/test.Echo/Stream")()
            for message in (b"a", b"", bytes(2 * MIB), b"b"):
                await call.write(message)
                assert await call.read() == message
            await call.done_writing()
            assert await call.read() is aio.EOF
            assert await call.code() is grpc.StatusCode.OK
            assert bench.app.streams[0].ended
            assert bench.app.aborted == []

    run(loop, test())


def test_a_stream_is_paused_and_resumed(loop: str) -> None:
    async def test() -> None:
        async with connected() as (bench, channel):
            call = channel.stream_stream("/test.Echo/Pausing")(iter([b"a", b"b", b"c"]))
            for number, message in enumerate((b"a", b"b", b"c"), 1):
                assert await call.read() == message
                (stream,) = bench.app.streams
                assert len(stream.messages) == number
                stream.call.resume()
            assert await call.read() is aio.EOF

    run(loop, test())


def test_a_client_that_reads_nothing_is_given_nothing_more(loop: str) -> None:
    async def test() -> None:
        options = {"http2.bdp_probe": 0, "http2.lookahead_bytes": 65_536}
        async with connected(options=options) as (bench, channel):
            sent = 0
            call = channel.stream_stream("/test.Echo/Stream")()

            async def write() -> None:
                nonlocal sent
                for _ in range(400):
                    await call.write(bytes(100_000))
                    sent += 1
                await call.done_writing()

            writing = asyncio.ensure_future(write())
            await until(lambda: bool(bench.app.streams) and not bench.app.streams[0].call.writable)
            for _ in range(200):
                await asyncio.sleep(0)
            given = len(bench.app.streams[0].messages)
            assert given < 40, "it goes on although nobody reads"
            assert bench.server.statistics().held_bytes < 8 * MIB
            received = 0
            async for message in call:
                received += len(message)
            await writing
            assert (received, sent) == (40_000_000, 400)
            assert bench.app.drained > 0

    run(loop, test())


def test_a_deadline_is_answered_and_told(loop: str) -> None:
    async def test() -> None:
        async with connected() as (bench, channel):
            error = await failure(channel.unary_unary("/test.Echo/Later")(b"", timeout=0.05))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: bool(bench.app.aborted))
            call, _ = bench.app.later[0]
            assert call.over
            call.reply([b"late"], 4)  # nobody hears it
            assert await channel.unary_unary("/test.Echo/Unary")(b"on", timeout=20) == b"on"

    run(loop, test())


def test_cancelling_is_told(loop: str) -> None:
    async def test() -> None:
        async with connected() as (bench, channel):
            call = channel.unary_unary("/test.Echo/Later")(b"x")
            await until(lambda: bool(bench.app.later))
            call.cancel()
            await until(lambda: bool(bench.app.aborted))
            stream = channel.stream_stream("/test.Echo/Stream")()
            await stream.write(b"x")
            await stream.read()
            stream.cancel()
            await until(lambda: len(bench.app.aborted) == 2)
            statistics = bench.server.statistics()
            assert (statistics.aborted, statistics.in_flight) == (2, 0)

    run(loop, test())


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
@pytest.mark.parametrize("answers", ["none", "low", "high"])
def test_compression_both_ways(loop: str, algorithm: grpc.Compression, answers: str) -> None:
    async def test() -> None:
        async with connected(compression=answers) as (_, channel):
            unary = channel.unary_unary("/test.Echo/Unary")
            stream = channel.stream_stream("/test.Echo/Stream", _as_is, _as_is)
            for message in (b"", b"a" * 5000, b"ab" * 3 * MIB):
                assert await unary(message, compression=algorithm) == message
                assert await unary(message) == message
            call = stream(iter([b"a" * 5000, b"b" * 3 * MIB, b"c"]), compression=algorithm)
            assert [len(message) async for message in call] == [5000, 3 * MIB, 1]

    run(loop, test())


def _as_is(data: bytes) -> bytes:
    return data


@pytest.mark.slow
def test_64_mib_both_ways(loop: str) -> None:
    async def test() -> None:
        async with connected() as (bench, channel):
            message = bytes(1024) * 64 * 1024
            assert await channel.unary_unary("/test.Echo/Unary")(message) == message
            call = channel.stream_stream("/test.Echo/Stream")(iter([message]))
            assert await call.read() == message
            assert await call.read() is aio.EOF
            assert bench.server.statistics().held_bytes == 0
            del message
            gc.collect()

    run(loop, test())


def test_pings_without_calls_are_fine(loop: str) -> None:
    async def test() -> None:
        options = {"keepalive_time_ms": 10, "keepalive_permit_without_calls": 1, "http2.max_pings_without_data": 0}
        async with connected(options=options) as (bench, channel):
            unary = channel.unary_unary("/test.Echo/Unary")
            await unary(b"")
            await asyncio.sleep(0.2)  # whatever it pings in the meantime
            await unary(b"")
            assert bench.server.statistics().accepted_connections == 1

    run(loop, test())


def test_a_message_over_the_limit(loop: str) -> None:
    async def test() -> None:
        async with connected(Http2Limits(max_message_bytes=1000)) as (bench, channel):
            unary = channel.unary_unary("/test.Echo/Unary")
            assert await unary(bytes(1000)) == bytes(1000)
            error = await failure(unary(bytes(100_000)))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "100000 bytes is over the limit of 1000" in str(error.details())
            error = await failure(unary(bytes(MIB), compression=grpc.Compression.Gzip))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert len(bench.app.calls) == 1

    run(loop, test())


def test_what_is_held_by_all_is_bounded(loop: str) -> None:
    async def test() -> None:
        async with connected(Http2Limits(max_held_bytes=100_000)) as (bench, channel):
            later = channel.unary_unary("/test.Echo/Later")
            held = later(bytes(80_000))
            await until(lambda: bool(bench.app.later))
            error = await failure(channel.unary_unary("/test.Echo/Unary")(bytes(50_000)))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "as many request bytes as it may" in str(error.details())
            held.cancel()
            await until(lambda: bench.server.statistics().held_bytes == 0)
            assert len(await channel.unary_unary("/test.Echo/Unary")(bytes(50_000))) == 50_000

    run(loop, test())


def test_more_calls_than_streams_wait_for_their_turn(loop: str) -> None:
    async def test() -> None:
        async with connected(Http2Limits(max_streams=5)) as (bench, channel):
            unary = channel.unary_unary("/test.Echo/Unary")
            await unary(b"")  # the client knows the limit from now on
            messages = [b"%d" % number for number in range(50)]
            assert await asyncio.gather(*map(unary, messages)) == messages
            assert bench.server.statistics().rejected == {}

    run(loop, test())


def test_too_much_metadata(loop: str) -> None:
    async def test() -> None:
        async with connected(Http2Limits(max_header_list_bytes=16_384), options={"max_metadata_size": 10**6}) as (
            _,
            channel,
        ):
            unary = channel.unary_unary("/test.Echo/Unary")
            error = await failure(unary(b"", metadata=[("x-big", "a" * 20_000)]))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await unary(b"on") == b"on"

    run(loop, test())


def test_draining_answers_what_was_accepted(loop: str) -> None:
    async def test() -> None:
        async with connected() as (bench, channel):
            call = asyncio.ensure_future(_wait(channel.unary_unary("/test.Echo/Later")(b"x")))
            await until(lambda: bool(bench.app.later))
            draining = asyncio.ensure_future(bench.server.drain(20.0))
            await asyncio.sleep(0.05)
            assert not draining.done()
            served, message = bench.app.later[0]
            served.reply([message], 1)
            assert await call == b"x"
            assert await draining == 0

    run(loop, test())


async def _wait(call: Any) -> Any:
    return await call


def test_draining_gives_up_after_its_time(loop: str) -> None:
    async def test() -> None:
        async with connected() as (bench, channel):
            call = asyncio.ensure_future(failure(channel.unary_unary("/test.Echo/Later")(b"x")))
            await until(lambda: bool(bench.app.later))
            assert await bench.server.drain(0.05) == 1
            assert (await call).code() is grpc.StatusCode.UNAVAILABLE
            assert len(bench.app.aborted) == 1

    run(loop, test())


def test_a_sync_client_in_threads(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            assert await asyncio.to_thread(_sync_calls, bench.address) == [b"%d" % number for number in range(64)]

    run(loop, test())


def _sync_calls(address: str) -> list[bytes]:
    channel: Any
    with grpc.insecure_channel(address) as channel:
        unary = channel.unary_unary("/test.Echo/Unary")
        futures = [unary.future(b"%d" % number, timeout=20) for number in range(64)]
        return [future.result() for future in futures]
