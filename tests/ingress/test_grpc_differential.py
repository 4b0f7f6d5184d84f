"""The gateway's gRPC transport against grpc.aio's own server: one servicer, one client, no difference.

Each of `CALLS` is made by grpcio's blocking and asyncio clients against both servers; what the client sees must be
equal. What may differ stands in `ALLOWED`, with the reason; an entry that no longer differs fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields
from typing import Any

import grpc
import grpc.aio
import pytest

from gateway.ingress.grpc_server import Http2Limits
from tests.ingress.grpc_twins import ACTS, DETAILS, LONG_BIN, METADATA, MIB, Pairs, path_of, twins
from tests.ingress.http_peer import run

aio: Any = grpc.aio
GZIP, DEFLATE = grpc.Compression.Gzip, grpc.Compression.Deflate
MAX_MESSAGE_BYTES = 5 * MIB
SERVER_OPTIONS = {"max_receive_message_length": MAX_MESSAGE_BYTES, "so_reuseport": 0}
LIMITS = Http2Limits(max_message_bytes=MAX_MESSAGE_BYTES)
CHANNEL_OPTIONS = [("grpc.max_receive_message_length", 6 * MIB), ("grpc.enable_retries", 0)]
PATIENCE_S = 20.0
SHORT_S = 0.05


@dataclass(frozen=True)
class Call:
    """One call of a client. `kind`: whether requests and answers are one or a stream, as grpcio spells it."""

    method: str
    messages: tuple[bytes, ...] = (b"message",)
    kind: str = ""
    metadata: Pairs = ()
    timeout: float = PATIENCE_S
    compression: Any = None

    @property
    def shape(self) -> str:
        return self.kind or ("stream_stream" if self.method in ACTS and ACTS[self.method].stream else "unary_unary")

    @property
    def request(self) -> Any:
        return self.messages[0] if self.shape.startswith("unary") else iter(self.messages)

    @property
    def options(self) -> dict[str, Any]:
        return {"metadata": self.metadata, "timeout": self.timeout, "compression": self.compression}


@dataclass(frozen=True)
class Seen:
    """What a client sees of a call."""

    messages: tuple[bytes, ...]
    code: grpc.StatusCode
    details: str
    initial: Pairs
    trailing: Pairs


MANY = tuple(b"%d" % number * number for number in range(40))
LARGE = bytes(range(256)) * 4096
CALLS: dict[str, Call] = {
    "an empty message": Call("Echo", (b"",)),
    "a message": Call("Echo"),
    "1 MiB": Call("Echo", (LARGE,)),
    "1 MiB and a bit": Call("Echo", (LARGE + b"x",)),
    **{f"a message of {size} bytes": Call("Echo", (LARGE[:size],)) for size in (16_379, 16_380, 65_530, 65_531)},
    "a message over the server's limit": Call("Echo", (bytes(MAX_MESSAGE_BYTES + 1),)),
    "a message that inflates over the server's limit": Call("Echo", (bytes(7 * MIB),), compression=GZIP),
    "the largest message allowed": Call("Echo", (bytes(MAX_MESSAGE_BYTES),)),
    **{
        f"{name}, {len(message)} bytes": Call("Echo", (message,), compression=coding)
        for name, coding in (("gzip", GZIP), ("deflate", DEFLATE))
        for message in (b"", b"a", b"a" * 5000, LARGE)
    },
    "initial metadata": Call("Initial"),
    "trailing metadata": Call("Trailing"),
    "metadata at both ends": Call("Both", (LARGE,)),
    "metadata sent and mirrored": Call("Mirror", metadata=METADATA),
    "long binary metadata mirrored": Call("Mirror", metadata=LONG_BIN),
    "metadata as the servicer sees it": Call("Told", metadata=METADATA + LONG_BIN),
    "no metadata as the servicer sees it": Call("Told"),
    "many metadata entries": Call("Told", metadata=tuple((f"x-{n}", str(n)) for n in range(100))),
    "6000 bytes of metadata": Call("Told", metadata=(("x-big", "a" * 6000),)),
    "20000 bytes of metadata": Call("Echo", metadata=(("x-big", "a" * 20_000),)),
    **{f"status {code}": Call(f"Fail {code}") for code in range(1, 17)},
    **{f"details: {name}": Call(f"Details {name}") for name in DETAILS},
    "details: 20000 bytes": Call("Huge details"),
    "details: 24000 bytes of other characters": Call("Huge other details"),
    "an error with metadata": Call("Fail with metadata"),
    "an error with trailing metadata": Call("Fail with trailing"),
    "an error of a message of 1 MiB": Call("Fail 3", (LARGE,)),
    "an exception": Call("Raise"),
    "an unknown method": Call("Nothing"),
    "an unknown streaming method": Call("Nothing", MANY, "stream_stream"),
    "a deadline": Call("Hold", timeout=SHORT_S),
    "a deadline of a stream": Call("Stream hold", timeout=SHORT_S),
    "a stream": Call("Stream", MANY),
    "a stream of empty messages": Call("Stream", (b"",) * 10),
    "a stream without messages": Call("Stream", ()),
    "a stream of large messages": Call("Stream", (LARGE, b"", LARGE + b"x", b"a")),
    "a stream with gzip": Call("Stream", (*MANY, LARGE), compression=GZIP),
    "a stream with deflate": Call("Stream", (*MANY, LARGE), compression=DEFLATE),
    "a stream with metadata": Call("Stream both", MANY),
    "a stream without messages, with metadata": Call("Stream both", ()),
    "a stream mirrors metadata": Call("Stream mirror", MANY, metadata=METADATA + LONG_BIN),
    "a stream that greets": Call("Stream greeting", MANY),
    "a stream that greets although nothing is sent": Call("Stream greeting", ()),
    "a stream that fails in the middle": Call("Stream fails", MANY),
    "a stream that fails before anything is sent": Call("Stream fails at once", ()),
    "a stream that fails at its end": Call("Stream fails at the end", MANY),
    "a stream that ends before anything is sent": Call("Stream ends at once", ()),
    "a stream that ends early": Call("Stream ends early", MANY),
    "a stream that raises": Call("Stream raises", MANY),
    "a stream with a message over the server's limit": Call("Stream", (b"a", bytes(MAX_MESSAGE_BYTES + 1))),
    "one message to a stream": Call("Stream", kind="unary_stream"),
    "many messages, one answer": Call("Stream late", MANY, "stream_unary"),
    "no message, one answer": Call("Stream late", (), "stream_unary"),
    "a stream that answers one where one is expected": Call("Stream", kind="unary_unary"),
    "a stream that answers nothing where one is expected": Call("Stream ends at once", kind="unary_unary"),
    "a unary method for a streaming client": Call("Echo", (b"a",), "stream_stream"),
    "a unary method and two messages": Call("Echo", (b"a", b"b"), "stream_stream"),
}

_WORDS = "each names the limit in its own words"
_RAISED = "a fault of ours is INTERNAL and its text stays in the log; grpc.aio shows the exception to the client"
_CUT = "a text the client would refuse, and the status with it, is cut so that both arrive"
_TWO = "two messages to a unary method are refused as the gRPC status guide says; grpc.aio serves the first"
ALLOWED: dict[tuple[str, str], str] = {
    ("a message over the server's limit", "details"): _WORDS,
    ("a message that inflates over the server's limit", "details"): _WORDS,
    ("a stream with a message over the server's limit", "details"): _WORDS,
    ("20000 bytes of metadata", "details"): _WORDS,
    ("an exception", "code"): _RAISED,
    ("an exception", "details"): _RAISED,
    ("a stream that raises", "code"): _RAISED,
    ("a stream that raises", "details"): _RAISED,
    ("details: 20000 bytes", "code"): _CUT,
    ("details: 20000 bytes", "details"): _CUT,
    ("details: 24000 bytes of other characters", "code"): _CUT,
    ("details: 24000 bytes of other characters", "details"): _CUT,
    ("a unary method and two messages", "messages"): _TWO,
    ("a unary method and two messages", "code"): _TWO,
    ("a unary method and two messages", "details"): _TWO,
}
"""(call, field of `Seen`) → why it may differ."""

_WRITES = "grpc.aio's client loses the status if its writer is at work when a stream ends (INTERNAL, from both servers)"
BLOCKING_ONLY = {
    "a stream that fails in the middle": _WRITES,
    "a stream that fails before anything is sent": _WRITES,
    "a stream that ends early": _WRITES,
    "a stream that ends before anything is sent": _WRITES,
    "a stream that raises": _WRITES,
    "a stream with a message over the server's limit": _WRITES,
    "an unknown streaming method": _WRITES,
    "a stream that answers nothing where one is expected": _WRITES,
    "a unary method and two messages": _WRITES,
    "a unary method for a streaming client": _WRITES,
    "a stream without messages, with metadata": (
        "grpc.aio's client loses the initial metadata of a stream if the trailing metadata comes with the same read"
    ),
}
"""Calls that the asyncio client cannot tell about reliably, whoever serves them.
`test_grpc_scenes.py` awaits each step."""


def blocking(address: str, call: Call) -> Seen:
    channel: Any
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        method = getattr(channel, call.shape)(path_of(call.method))
        messages = []
        try:
            if call.shape.endswith("_unary"):
                made = method.future(call.request, **call.options)
                messages.append(made.result())
            else:
                made = method(call.request, **call.options)
                messages.extend(made)  # what came before a fault is kept
        except grpc.RpcError:
            pass
        return Seen(
            tuple(messages),
            made.code(),
            bare(made.details()),
            pairs(made.initial_metadata()),
            pairs(made.trailing_metadata()),
        )


async def awaiting(address: str, call: Call) -> Seen:
    async with aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        made = getattr(channel, call.shape)(path_of(call.method))(call.request, **call.options)
        messages: list[bytes] = []
        try:
            if call.shape.endswith("_unary"):
                messages.append(await made)
            else:
                async for message in made:
                    messages.append(message)  # noqa: PERF401  # what came before a fault is kept
        except grpc.RpcError:
            pass
        return Seen(
            tuple(messages),
            await made.code(),
            bare(await made.details()),
            pairs(await made.initial_metadata()),
            pairs(await made.trailing_metadata()),
        )


def bare(details: str) -> str:
    """grpcio's client wraps a text it made itself, depending on where in its stack it was when the call ended."""
    return (
        details.removeprefix("Stream removed (").removesuffix(")") if details.startswith("Stream removed") else details
    )


def pairs(metadata: Any) -> Pairs:
    return tuple((str(name), value) for name, value in metadata or ())


async def from_thread(address: str, call: Call) -> Seen:
    return await asyncio.to_thread(blocking, address, call)


CLIENTS: dict[str, Callable[[str, Call], Awaitable[Seen]]] = {"sync": from_thread, "aio": awaiting}


def differences(theirs: Any, mine: Any) -> dict[str, tuple[Any, Any]]:
    both = {each.name: (getattr(theirs, each.name), getattr(mine, each.name)) for each in fields(theirs)}
    return {name: (one, other) for name, (one, other) in both.items() if one != other}


@pytest.mark.parametrize(
    ("name", "client"),
    [(name, client) for name in CALLS for client in CLIENTS if client == "sync" or name not in BLOCKING_ONLY],
)
def test_a_call(name: str, client: str) -> None:
    async def test() -> None:
        async with twins(SERVER_OPTIONS, LIMITS) as sides:
            theirs, mine = [await CLIENTS[client](side.address, CALLS[name]) for side in sides]
            found = differences(theirs, mine)
            assert found.keys() == {part for call, part in ALLOWED if call == name}, found

    run("uvloop", test())


def test_the_lists_name_calls_that_are_made() -> None:
    assert {name for name, _ in ALLOWED} | BLOCKING_ONLY.keys() <= CALLS.keys()
    assert {CALLS[name].method for name in CALLS} >= ACTS.keys(), "each behaviour is met by some call"


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("details: 2")])
def test_a_long_status_text_arrives_cut_and_with_its_status(name: str) -> None:
    async def test() -> None:
        async with twins(SERVER_OPTIONS, LIMITS) as (_, mine):
            for client in CLIENTS.values():
                seen = await client(mine.address, CALLS[name])
                assert seen.code is grpc.StatusCode.INVALID_ARGUMENT
                assert len(seen.details) > 400
                assert ACTS[CALLS[name].method].details.startswith(seen.details)

    run("uvloop", test())
