"""One servicer, served twice: by grpc.aio's own server, and by the gateway's transport.

`ACTS` is the table of what its methods do; `Servicer` (grpc.aio) and `Application` (ours) both read it, and nothing
else, so whatever a client can tell apart lies in the transports. `Record` is what a servicer saw of its calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from gateway.ingress.grpc_server import CallHead, GrpcCall, GrpcServer, Http2Limits, StreamHandler
from gateway.ingress.listener import listen
from gateway.protocol.grpc_wire import UNIMPLEMENTED, binary_literal, binary_value
from gateway.protocol.hpack_blocks import metadata_literal

Pairs = tuple[tuple[str, str | bytes], ...]
CODES = {code.value[0]: code for code in grpc.StatusCode}
UNKNOWN_METHOD = "Method not found!"
MIB = 2**20


@dataclass(frozen=True)
class Act:
    """What a method does with a call, besides sending its messages back."""

    stream: bool = False
    initial: Pairs = ()
    trailing: Pairs = ()
    mirror: bool = False
    """The request's `x-` metadata comes back as initial metadata, and as trailing metadata under `t-`."""
    told: bool = False
    """The answer is the request's metadata as the servicer sees it."""
    code: int = 0
    details: str = ""
    raises: bool = False
    after: int | None = None
    """A stream ends after this many messages, instead of when the client has sent its last."""
    hold: bool = False
    """Ends when `Record.released` is set."""
    greeting: bytes | None = None
    """A stream's first message, before any of the client's."""
    late: bool = False
    """Messages come back when the client has sent its last, as one."""


METADATA: Pairs = (
    ("x-a", "1"),
    ("x-b-bin", bytes(range(256))),
    ("x-a", "two, three"),
    ("x-empty-bin", b""),
    ("x-e", ""),
)
LONG_BIN: Pairs = (("x-long-bin", b"\xfb\xff" * 1000),)
DETAILS = {
    "none": "",
    "plain": "the model is not ready",
    "other scripts": "naïve ☃ 模型 🎉",
    "percent": "100% %41 %zz %",
    "control characters": "one\ntwo\r\n\tthree\x7f\x1b",
    "blanks": "  at both ends  ",
    "3000 bytes": "a%" * 1500,
    "3000 other characters": "é" * 600,
}
ACTS: dict[str, Act] = {
    "Echo": Act(),
    "Mirror": Act(mirror=True),
    "Told": Act(told=True),
    "Initial": Act(initial=METADATA),
    "Trailing": Act(trailing=METADATA),
    "Both": Act(initial=METADATA + LONG_BIN, trailing=LONG_BIN + METADATA),
    "Raise": Act(raises=True),
    "Hold": Act(hold=True),
    "Huge details": Act(code=3, details="b" * 20_000),
    "Huge other details": Act(code=3, details="☃" * 8_000),
    **{f"Fail {code}": Act(code=code, details=f"status {code}") for code in range(1, 17)},
    **{f"Details {name}": Act(code=9, details=text) for name, text in DETAILS.items()},
    "Fail with metadata": Act(code=7, details="no", initial=METADATA, trailing=LONG_BIN),
    "Fail with trailing": Act(code=8, details="much", trailing=METADATA),
    "Stream": Act(stream=True),
    "Stream mirror": Act(stream=True, mirror=True),
    "Stream both": Act(stream=True, initial=METADATA, trailing=LONG_BIN),
    "Stream greeting": Act(stream=True, greeting=b"hello", initial=(("x-early", "yes"),)),
    "Stream late": Act(stream=True, late=True),
    "Stream fails": Act(stream=True, after=2, code=5, details="naïve\n", trailing=METADATA),
    "Stream fails at once": Act(stream=True, after=0, code=16, details="who are you?"),
    "Stream fails at the end": Act(stream=True, code=10, details="late", initial=METADATA),
    "Stream ends early": Act(stream=True, after=2, trailing=(("x-why", "enough"),)),
    "Stream ends at once": Act(stream=True, after=0),
    "Stream raises": Act(stream=True, after=1, raises=True),
    "Stream hold": Act(stream=True, hold=True),
}


def path_of(name: str) -> str:
    return "/twin.Test/" + name.replace(" ", "_")


_BY_PATH = {path_of(name): act for name, act in ACTS.items()}
RAW_PATH = "/a.B/C"
"""Of the requests that the rules of HTTP/2 are tried with: a stream that is held."""
_BY_PATH[RAW_PATH] = ACTS["Stream hold"]


@dataclass
class Record:
    """What one servicer saw."""

    begun: int = 0
    aborted: int = 0
    messages: list[int] = field(default_factory=list)
    """Length of each, in order of arrival."""
    released: asyncio.Event = field(default_factory=asyncio.Event)


def plan(act: Act, request: Pairs) -> tuple[Pairs, Pairs]:
    """Initial and trailing metadata of the answer."""
    if not act.mirror:
        return act.initial, act.trailing
    mine = tuple(pair for pair in request if pair[0].startswith("x-"))
    return mine, tuple((f"t-{name}", value) for name, value in mine)


def as_told(request: Pairs) -> bytes:
    return repr([pair for pair in request if pair[0] != "user-agent"]).encode()


class Servicer(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio has no types
    """For grpc.aio."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def service(self, handler_call_details: Any) -> Any:
        act = _BY_PATH.get(handler_call_details.method)
        if act is None:
            return None
        record = self._record

        async def unary(request: bytes, context: Any) -> bytes | None:
            with _Watched(record):
                record.messages.append(len(request))
                told = await _open(act, context)
                if act.hold:
                    await record.released.wait()
                await _close(act, context)
                return as_told(told) if act.told else request

        async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            with _Watched(record):
                await _open(act, context)
                if act.greeting is not None:
                    yield act.greeting
                async for answer in _answers(act, requests, record):
                    yield answer
                if act.hold:
                    await record.released.wait()
                await _close(act, context)

        if act.stream:
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)


async def _answers(act: Act, requests: AsyncIterator[bytes], record: Record) -> AsyncIterator[bytes]:
    kept: list[bytes] = []
    count = 0
    if act.after == 0:
        return
    async for message in requests:
        record.messages.append(len(message))
        count += 1
        if act.late:
            kept.append(message)
        else:
            yield message
        if count == act.after:
            return
    if act.late:
        yield b"".join(kept)


class _Watched:
    def __init__(self, record: Record) -> None:
        self._record = record

    def __enter__(self) -> None:
        self._record.begun += 1

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._record.aborted += isinstance(error, asyncio.CancelledError | GeneratorExit)


async def _open(act: Act, context: Any) -> Pairs:
    request = tuple((str(name), value) for name, value in context.invocation_metadata())
    initial, trailing = plan(act, request)
    if initial:
        await context.send_initial_metadata(initial)
    if trailing:
        context.set_trailing_metadata(trailing)
    return request


async def _close(act: Act, context: Any) -> None:
    if act.raises:
        raise RuntimeError("on purpose")
    if act.code:
        await context.abort(CODES[act.code], act.details, plan(act, ())[1])


class Application:
    """For the gateway's transport."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def resolve(self, head: CallHead) -> Method:
        return Method(self.record, _BY_PATH.get(head.path.decode()))


class Method:
    def __init__(self, record: Record, act: Act | None) -> None:
        self.record = record
        self.act = act
        self.streaming = act is None or act.stream

    def handle(self, head: CallHead, message: bytes | memoryview, call: GrpcCall) -> None:
        assert self.act is not None
        taker = Taker(self.record, self.act, head, call)
        call.on_abort = taker.aborted
        self.record.messages.append(len(message))
        if self.act.hold:
            when_released(self.record, lambda: taker.close(message))
        else:
            taker.close(as_told(metadata_of(head)) if self.act.told else message)

    def open(self, head: CallHead, call: GrpcCall) -> StreamHandler:
        if self.act is None:
            call.fail(UNIMPLEMENTED, UNKNOWN_METHOD)
        return Taker(self.record, self.act or Act(), head, call)


class Taker:
    """One call; the handler of a streaming one."""

    def __init__(self, record: Record, act: Act, head: CallHead, call: GrpcCall) -> None:
        self.record = record
        self.act = act
        self.call = call
        self.count = 0
        self.kept: list[bytes] = []
        record.begun += 1
        initial, self.trailing = plan(act, metadata_of(head))
        if initial:
            call.start(encoded(initial))
        if act.greeting is not None:
            call.send([act.greeting], len(act.greeting))
        if act.after == 0:
            self.close()

    def close(self, message: bytes | memoryview | None = None) -> None:
        act, call = self.act, self.call
        if act.raises:
            raise RuntimeError("on purpose")
        if act.code:
            call.fail(act.code, act.details, encoded(self.trailing))
            return
        if message is not None and not self.trailing and not call.started:
            call.reply([message], len(message))
            return
        if message is not None:
            call.send([message], len(message))
        call.finish(0, "", encoded(self.trailing))

    def message(self, message: bytes | memoryview) -> None:
        self.record.messages.append(len(message))
        self.count += 1
        if self.act.late:
            self.kept.append(bytes(message))
        else:
            self.call.send([message], len(message))
        if self.count == self.act.after:
            self.close()

    def half_closed(self) -> None:
        if self.act.late:
            joined = b"".join(self.kept)
            self.call.send([joined], len(joined))
        if self.act.hold:
            when_released(self.record, self.close)
        else:
            self.close()

    def aborted(self) -> None:
        self.record.aborted += 1

    def writable(self) -> None:
        pass


def when_released(record: Record, then: Any) -> None:
    waiting = asyncio.ensure_future(record.released.wait())
    waiting.add_done_callback(lambda done: None if done.cancelled() else then())


def metadata_of(head: CallHead) -> Pairs:
    pairs: list[tuple[str, str | bytes]] = []
    for name, value in head.metadata:
        if name.endswith(b"-bin"):
            decoded = binary_value(value)
            assert decoded is not None
            pairs.append((name.decode(), decoded))
        else:
            pairs.append((name.decode(), value.decode("latin-1")))
    return tuple(pairs)


def encoded(pairs: Iterable[tuple[str, str | bytes]]) -> bytes:
    return b"".join(
        metadata_literal(name.encode(), value.encode())
        if isinstance(value, str)
        else binary_literal(name.encode(), value)
        for name, value in pairs
    )


@dataclass(frozen=True)
class Side:
    """One of the two servers."""

    name: str
    address: str
    record: Record


@asynccontextmanager
async def twins(
    options: dict[str, int] | None = None, limits: Http2Limits | None = None
) -> AsyncIterator[tuple[Side, Side]]:
    """(grpc.aio's, ours). `options` without `grpc.` are for the former, `limits` for the latter."""
    theirs, mine = Record(), Record()
    server = grpc.aio.server(options=[(f"grpc.{name}", value) for name, value in (options or {}).items()])
    server.add_generic_rpc_handlers((Servicer(theirs),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    gateway = GrpcServer(Application(mine), limits, asyncio.get_running_loop().time)
    listener = await listen("127.0.0.1", 0, gateway)
    try:
        yield (
            Side("grpc.aio", f"127.0.0.1:{port}", theirs),
            Side("gateway", f"127.0.0.1:{listener.port}", mine),
        )
    finally:
        mine.released.set()
        theirs.released.set()
        await gateway.drain(0.0)
        await server.stop(None)
        statistics = gateway.statistics()
        assert (statistics.open_connections, statistics.held_bytes, statistics.in_flight) == (0, 0, 0)
