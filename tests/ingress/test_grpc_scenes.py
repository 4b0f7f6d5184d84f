"""The gateway's gRPC transport against grpc.aio's own server, step by step: who speaks when, and who hears of an end.

Each scene is played with grpcio's clients against both servers; what it returns must be equal. `Record` says what the
servicer saw: a call that its client gave up must be told to it, on either side.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.ingress.grpc_twins import METADATA, Side, path_of, twins
from tests.ingress.http_peer import LOOPS, run, until
from tests.ingress.test_grpc_differential import (
    CHANNEL_OPTIONS,
    LARGE,
    LIMITS,
    MANY,
    PATIENCE_S,
    SERVER_OPTIONS,
    SHORT_S,
    aio,
    pairs,
)


async def open_stream(channel: Any, method: str, **options: Any) -> Any:
    return channel.stream_stream(path_of(method))(timeout=PATIENCE_S, **options)


async def ending(call: Any) -> tuple[Any, ...]:
    return await call.code(), await call.details(), pairs(await call.trailing_metadata())


async def everything(call: Any) -> list[bytes]:
    messages = []
    while (message := await call.read()) is not aio.EOF:
        messages.append(message)
    return messages


async def ping_pong(channel: Any, side: Side) -> Any:
    call = await open_stream(channel, "Stream", metadata=METADATA)
    for message in (b"a", b"", LARGE, b"b"):
        await call.write(message)
        assert await call.read() == message
    await call.done_writing()
    return await call.read() is aio.EOF, await ending(call), side.record.messages


async def metadata_first(channel: Any, side: Side) -> Any:
    """Initial metadata and a greeting come before the client has sent anything."""
    call = await open_stream(channel, "Stream greeting")
    initial = pairs(await call.initial_metadata())
    greeting = await call.read()
    await call.write(b"x")
    await call.done_writing()
    return initial, greeting, await everything(call), await ending(call)


async def answer_behind_the_half_close(channel: Any, side: Side) -> Any:
    call = await open_stream(channel, "Stream late")
    for message in MANY:
        await call.write(message)
    await until(lambda: len(side.record.messages) == len(MANY))
    await call.done_writing()
    return await everything(call), await ending(call), side.record.messages


async def fails_between_messages(channel: Any, side: Side) -> Any:
    call = await open_stream(channel, "Stream fails")
    answers = []
    for message in (b"a", b"b"):
        await call.write(message)
        answers.append(await call.read())
    return answers, await ending(call), side.record.begun, side.record.messages


async def ends_while_the_client_still_could_send(channel: Any, side: Side) -> Any:
    call = await open_stream(channel, "Stream ends early")
    answers = []
    for message in (b"a", b"b"):
        await call.write(message)
        answers.append(await call.read())
    last = await call.read() is aio.EOF
    ended = await ending(call)
    try:
        await call.write(b"c")
    except (asyncio.InvalidStateError, grpc.RpcError) as error:
        refused = type(error).__name__
    return answers, last, ended, refused, await channel.unary_unary(path_of("Echo"))(b"on")


async def cancelled_by_the_client(channel: Any, side: Side) -> Any:
    call = channel.unary_unary(path_of("Hold"))(b"x")
    await until(lambda: side.record.begun == 1)
    call.cancel()
    await until(lambda: side.record.aborted == 1)
    stream = await open_stream(channel, "Stream hold")
    await stream.write(b"a")
    await stream.read()
    stream.cancel()
    await until(lambda: side.record.aborted == 2)
    return await call.code(), await stream.code(), await channel.unary_unary(path_of("Echo"))(b"on")


async def deadline_is_told_to_the_servicer(channel: Any, side: Side) -> Any:
    codes = [await channel.unary_unary(path_of("Hold"))(b"x", timeout=SHORT_S).code()]
    await until(lambda: side.record.aborted == side.record.begun)
    stream = channel.stream_stream(path_of("Stream hold"))(iter([b"x"]), timeout=SHORT_S)
    codes.append(await stream.code())
    await until(lambda: side.record.aborted == side.record.begun)
    return codes


async def channel_closed_under_calls(channel: Any, side: Side) -> Any:
    calls = [channel.unary_unary(path_of("Hold"))(b"x") for _ in range(20)]
    await until(lambda: side.record.begun == 20)
    await channel.close()
    await until(lambda: side.record.aborted == 20)
    return [await call.code() for call in calls]


async def held_calls_are_released(channel: Any, side: Side) -> Any:
    calls = [channel.unary_unary(path_of("Hold"))(b"%d" % number, timeout=PATIENCE_S) for number in range(50)]
    stream = await open_stream(channel, "Stream hold")
    await stream.write(b"x")
    await stream.done_writing()
    await until(lambda: side.record.begun == 51)
    side.record.released.set()
    return [await call for call in calls], await everything(stream), await ending(stream), side.record.aborted


async def many_calls_on_one_channel(channel: Any, side: Side) -> Any:
    async def one(number: int) -> Any:
        message = b"%d" % number * (number * number % 3000)
        match number % 4:
            case 0:
                return await channel.unary_unary(path_of("Mirror"))(message, metadata=(("x-n", str(number)),))
            case 1:
                return await ending(channel.unary_unary(path_of("Fail with trailing"))(message))
            case 2:
                return [each async for each in channel.stream_stream(path_of("Stream"))(iter([message] * 5))]
            case _:
                return await channel.stream_unary(path_of("Stream late"))(iter([message] * 3))

    return await asyncio.gather(*map(one, range(400))), side.record.begun, sorted(side.record.messages)


async def streams_side_by_side(channel: Any, side: Side) -> Any:
    calls = [await open_stream(channel, "Stream") for _ in range(20)]
    seen = []
    for turn in range(5):
        for number, call in enumerate(calls):
            await call.write(b"%d of %d" % (turn, number))
        seen.append([await call.read() for call in reversed(calls)])
    for call in calls:
        await call.done_writing()
    return seen, [await ending(call) for call in calls]


async def a_blocking_client_cancels(channel: Any, side: Side) -> Any:
    """The same with threads: one call that waits, and a stream that is iterated."""

    def calls() -> tuple[Any, Any, int]:
        blocking: Any
        with grpc.insecure_channel(side.address, options=CHANNEL_OPTIONS) as blocking:
            waiting = blocking.unary_unary(path_of("Hold")).future(b"x", timeout=PATIENCE_S)
            stream = blocking.stream_stream(path_of("Stream hold"))(iter([b"a", b"b"]), timeout=PATIENCE_S)
            first = next(stream)
            stream.cancel()
            begun.wait(PATIENCE_S)
            waiting.cancel()
            return stream.code(), first, waiting.cancelled()

    begun = threading.Event()
    made = asyncio.create_task(asyncio.to_thread(calls))
    await until(lambda: side.record.begun == 2)
    begun.set()
    await until(lambda: side.record.aborted == 2)
    return await made


SCENES = [
    a_blocking_client_cancels,
    ping_pong,
    metadata_first,
    answer_behind_the_half_close,
    fails_between_messages,
    ends_while_the_client_still_could_send,
    cancelled_by_the_client,
    deadline_is_told_to_the_servicer,
    channel_closed_under_calls,
    held_calls_are_released,
    many_calls_on_one_channel,
    streams_side_by_side,
]


@pytest.mark.parametrize("loop", list(LOOPS))
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_a_scene(scene: Callable[[Any, Side], Awaitable[Any]], loop: str) -> None:
    async def test() -> None:
        async with twins(SERVER_OPTIONS, LIMITS) as sides:
            theirs, mine = [await play(scene, side) for side in sides]
            assert mine == theirs

    run(loop, test())


async def play(scene: Callable[[Any, Side], Awaitable[Any]], side: Side) -> Any:
    async with aio.insecure_channel(side.address, options=CHANNEL_OPTIONS) as channel:
        return await scene(channel, side)
