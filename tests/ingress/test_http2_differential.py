"""The rules of HTTP/2 over sockets: what the gateway's gRPC port and grpc.aio's make of the same bytes.

Each case of `tests/protocol/test_http2_rules.py` is sent to both, on a connection of its own; what is compared is
whether it costs the client its connection, a stream, or nothing. Error codes are not: implementations choose them with
some freedom, and ours are checked one by one there. Where grpcio's core is more lenient than RFC 9113, or stricter, the
RFC decides and the case stands in `ALLOWED`; an entry that no longer differs fails.

Behind a case's bytes two PINGs and a call are sent, each after the answer to the one before, so nothing is waited for
longer than it takes: whoever answers all three has taken what came before, and said what it had to say.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

import pytest
from hpack import Decoder

from gateway.protocol.http2_frames import (
    ACK,
    DATA,
    END_STREAM,
    FRAME_HEAD_BYTES,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    frame,
    settings,
    unpack_head,
)
from tests.ingress.grpc_peer import fields_for, prefixed
from tests.ingress.grpc_twins import path_of, twins
from tests.ingress.http_peer import run
from tests.protocol.http2_peer import Sent, data, headers, parse
from tests.protocol.test_http2_rules import CASES, LIMITS, PREFACES

LOST, STREAM_LOST, FINE = "connection", "stream", "fine"
_PINGS: Final = (b"first...", b"second..")
_PROBE_STREAM: Final = 1001
_PROBE: Final = headers(_PROBE_STREAM, fields_for(path_of("Echo").encode()), end=False) + data(
    _PROBE_STREAM, prefixed(b"probe"), end=True
)
OPTIONS = {
    "max_concurrent_streams": LIMITS.max_streams,
    "http2.bdp_probe": 0,
    "http2.max_ping_strikes": 0,
    "http2.min_ping_interval_without_data_ms": 0,
    "so_reuseport": 0,
}
_REASONS: Final[dict[str, tuple[str, ...]]] = {
    (
        "grpcio's core does not check stream identifiers: frames on streams that are idle, even, 0 or were "
        "skipped are dropped"
    ): (
        "5.1 idle: DATA",
        "5.1 idle: RST_STREAM",
        "5.1 idle: WINDOW_UPDATE",
        "5.1 skipped streams are closed",
        "5.1 DATA on a skipped stream",
        "5.1.1 an even stream",
        "5.1.1 DATA on an even stream",
        "5.1.1 WINDOW_UPDATE on an even stream",
        "5.1.1 RST_STREAM on an even stream",
        "6.1 DATA on stream 0",
        "6.1 padded DATA on stream 0",
        "6.2 HEADERS on stream 0",
        "6.3 PRIORITY on stream 0",
        "6.4 RST_STREAM on stream 0",
        "6.6 PUSH_PROMISE on stream 0",
        "6.7 PING on a stream",
        "6.8 GOAWAY on a stream",
    ),
    "grpcio's core drops frames on streams that are over, and forgives them": (
        "5.1 half-closed (remote): DATA",
        "5.1 half-closed (remote): HEADERS",
        "5.1 reset by the client: DATA",
        "5.1 reset by the client: HEADERS",
        "5.1 closed: DATA",
        "5.1 closed: HEADERS",
        "5.1 reset by us: DATA is ignored",
        "5.1 reset by us: HEADERS is ignored",
        "5.1 reset by us: RST_STREAM is ignored",
        "5.1 reset by us: WINDOW_UPDATE is ignored",
    ),
    "grpcio's core does not read PRIORITY and PUSH_PROMISE, so it cannot mind what is wrong with them": (
        "6.3 PRIORITY of 4 bytes",
        "6.3 PRIORITY of 6 bytes",
        "6.3 a huge PRIORITY",
        "6.6 PUSH_PROMISE from a client",
    ),
    "grpcio's core checks neither windows for overflow nor dependencies for loops": (
        "5.3 HEADERS that depends on itself",
        "5.3 PRIORITY that depends on itself",
        "6.9.1 the connection's window over 2^31-1",
        "6.9.1 a stream's window over 2^31-1",
        "6.9.2 a changed initial window takes a stream's over 2^31-1",
    ),
    (
        "grpcio's core does not know padding: RFC 9113 §6.1 and §6.2 allow it, and end the connection where it is wrong"
    ): (
        "6.1 padding that is all",
        "6.1 padding longer than the frame",
        "6.1 padding as long as the frame",
        "6.1 padded and empty",
        "6.2 padding",
        "6.2 padding and priority",
        "6.2 padded and empty",
    ),
    (
        "grpcio's core takes malformed fields, or leaves such a request without an answer: RFC 9113 §8.1.1 "
        "wants the stream reset"
    ): (
        "8.1 a request as trailers",
        "8.1 a pseudo-header in the trailers",
        "8.1 an upper-case name in the trailers",
        "8.1.1 content-length that is not reached",
        "8.1.1 content-length that is not reached, with trailers",
        "8.1.1 content-length that is passed",
        "8.1.1 content-length that is passed by a later DATA",
        "8.1.1 content-length without a body",
        "8.1.1 content-length that is no number",
        "8.1.1 negative content-length",
        "8.1.1 two content-lengths",
        "8.2.1 an upper-case name",
        "8.2.1 an empty name",
        "8.2.1 a blank in a name",
        "8.2.1 a colon in a name",
        "8.2.1 a byte over 127 in a name",
        "8.2.1 NUL in a value",
        "8.2.1 CR in a value",
        "8.2.1 LF in a value",
        "8.2.1 LF at the end of a value",
        "8.2.1 a blank before a value",
        "8.2.1 a tab behind a value",
        "8.2.2 connection does not exist",
        "8.2.2 keep-alive does not exist",
        "8.2.2 proxy-connection does not exist",
        "8.2.2 transfer-encoding does not exist",
        "8.2.2 upgrade does not exist",
        "8.2.2 te other than trailers",
        "8.3 an unknown pseudo-header",
        "8.3 a pseudo-header of responses",
        "8.3 a pseudo-header behind a field",
        "8.3.1 no :method",
        "8.3.1 no :scheme",
        "8.3.1 no :path",
        "8.3.1 two :method",
        "8.3.1 two :scheme",
        "8.3.1 two :path",
        "8.3.1 two :authority",
        "8.3.1 an empty :path",
        "8.3.1 a :path without its slash",
        "8.3.1 a blank in :path",
        "8.5 CONNECT",
    ),
    ("grpcio's core goes on behind a block that cannot be decoded: RFC 9113 §4.3 wants the connection ended"): (
        "4.3 a block that cannot be decoded",
        "7541 4.2 a table size update behind a field",
        "7541 5.2 Huffman padding over 7 bits",
    ),
    "grpcio's core ends the connection where RFC 9113 tells to ignore a flag, or to reset the stream": (
        "4.1 undefined flags are ignored",
        "6.9 an increment of 0 on a stream",
        "8.1 a second HEADERS without END_STREAM",
    ),
    (
        "the case's body is no gRPC message: we refuse a truncated one, grpcio's core takes it for the end "
        "of the stream"
    ): (
        "4.2 DATA of the largest size is taken",
        "8.1 trailers",
        "8.1.1 content-length that is met",
        "8.1.1 content-length over several DATA",
    ),
    "grpcio's core takes the acknowledgement of its SETTINGS for the client's own": (
        "3.4 no SETTINGS but its acknowledgement",
    ),
    "a limit of ours": ("6.5 more settings than anyone needs",),
}
ALLOWED: Final = {rule: reason for reason, rules in _REASONS.items() for rule in rules}
"""Case → why the two differ, and who is right."""


def completed(sent: bytes) -> bytes:
    """The bytes with their last frame filled up, so that the PINGs behind it are read as such."""
    at = 0
    while len(sent) - at >= FRAME_HEAD_BYTES:
        high, low, *_ = unpack_head(sent, at)
        at += FRAME_HEAD_BYTES + (high << 16 | low)
    return sent + bytes(max(0, at - len(sent)))


class Wire:
    """One connection; keeps what the server sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self.frames: list[Sent] = []
        self.lost = False

    async def _frame(self) -> Sent:
        head = await self._reader.readexactly(FRAME_HEAD_BYTES)
        payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
        (found,) = parse(head + payload)
        self.frames.append(found)
        return found

    async def settle(self) -> None:
        """Until the server has taken everything, or has given up the connection."""
        try:
            for payload in _PINGS:
                self.writer.write(frame(PING, 0, 0, payload))
                while not self._answered(await self._frame(), payload):
                    pass
            self.writer.write(_PROBE)
            while not self._ended(await self._frame()):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            self.lost = True

    @staticmethod
    def _answered(found: Sent, payload: bytes) -> bool:
        return (found.kind, found.flags & ACK, found.payload) == (PING, ACK, payload)

    @staticmethod
    def _ended(found: Sent) -> bool:
        last = found.kind == RST_STREAM or (found.kind == HEADERS and bool(found.flags & END_STREAM))
        return last and found.stream == _PROBE_STREAM

    def verdict(self) -> str:
        if self.lost or any(each.kind == GOAWAY and any(each.payload[4:8]) for each in self.frames):
            return LOST
        if any(
            (each.kind == RST_STREAM and any(each.payload)) or (each.kind == HEADERS and each.flags & END_STREAM)
            for each in self.frames
            if each.stream != _PROBE_STREAM
        ):
            return STREAM_LOST  # the method never ends a call itself, so a status too is a refusal
        return FINE


async def taken(address: str, sent: bytes) -> str:
    host, port = address.split(":")
    wire = Wire(*await asyncio.open_connection(host, int(port)))
    try:
        wire.writer.write(sent)
        await wire.settle()
        return wire.verdict()
    finally:
        wire.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await wire.writer.wait_closed()


SENT = {
    **{case.rule: PREFACE + settings({}) + completed(case.sent) for case in CASES},
    **{f"3.4 {what}": sent for what, sent, _ in PREFACES},
}


async def all_of(rules: list[str]) -> dict[str, tuple[str, str]]:
    """(grpc.aio's verdict, ours) of each."""
    async with twins(OPTIONS, LIMITS) as (theirs, mine):
        return {
            rule: (await taken(theirs.address, SENT[rule]), await taken(mine.address, SENT[rule])) for rule in rules
        }


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_rules_of_http2(loop: str) -> None:
    async def test() -> None:
        found = await all_of(list(SENT))
        differing = {rule: verdicts for rule, verdicts in found.items() if verdicts[0] != verdicts[1]}
        assert differing.keys() == ALLOWED.keys(), {
            rule: differing.get(rule, "equal") for rule in differing.keys() ^ ALLOWED.keys()
        }

    run(loop, test())


# -- requests that no client of grpcio would send ---------------------------------------------------------------------


def call(
    *extra: tuple[bytes, bytes], body: bytes = prefixed(b"hello"), without: bytes = b"", method: str = "Echo"
) -> bytes:
    """One unary call; `extra` fields replace those of the same name."""
    named = {without, *(name for name, _ in extra if name in {b"content-type", b"te", b":method", b":path"})}
    fields = [pair for pair in fields_for(path_of(method).encode()) if pair[0] not in named]
    pseudo = [pair for pair in extra if pair[0].startswith(b":")]
    regular = [pair for pair in extra if not pair[0].startswith(b":")]
    return headers(1, [*pseudo, *fields, *regular], end=False) + data(1, body, end=True)


def typed(value: bytes) -> bytes:
    return call((b"content-type", value))


def timed(value: bytes) -> bytes:
    return call((b"grpc-timeout", value))


def told(*metadata: tuple[bytes, bytes]) -> bytes:
    return call(*metadata, method="Told")


REQUESTS = {
    "a plain call": call(),
    "an unknown method": call((b":path", b"/twin.Test/Nothing")),
    "a path of one part": call((b":path", b"/nothing")),
    "no te": call(without=b"te"),
    "GET": call((b":method", b"GET")),
    "PUT": call((b":method", b"PUT")),
    "application/grpc+proto": typed(b"application/grpc+proto"),
    "application/grpc with a parameter": typed(b"application/grpc;x=y"),
    "application/grpcx": typed(b"application/grpcx"),
    "application/json": typed(b"application/json"),
    "no content type": call(without=b"content-type"),
    "an unknown encoding, message as it is": call((b"grpc-encoding", b"br")),
    "an unknown encoding, message compressed": call((b"grpc-encoding", b"br"), body=prefixed(b"x", 1)),
    "identity": call((b"grpc-encoding", b"identity")),
    "gzip, message as it is": call((b"grpc-encoding", b"gzip")),
    "gzip that is none": call((b"grpc-encoding", b"gzip"), body=prefixed(b"x", 1)),
    "compressed without an encoding": call(body=prefixed(b"x", 1)),
    "an unknown flag": call(body=prefixed(b"x", 2)),
    "no message": call(body=b""),
    "half a prefix": call(body=b"\0\0\0"),
    "half a message": call(body=prefixed(b"hello")[:-2]),
    "two messages": call(body=prefixed(b"hello") * 2),
    "a timeout of 20 seconds": timed(b"20S"),
    "a timeout of 99999999 hours": timed(b"99999999H"),
    "a timeout without a unit": timed(b"20"),
    "a timeout in an unknown unit": timed(b"20x"),
    "a timeout of nine digits": timed(b"123456789u"),
    "an empty timeout": timed(b""),
    "a negative timeout": timed(b"-1S"),
    "metadata": told((b"x-a", b"1"), (b"x-b", b"2"), (b"x-a", b"3")),
    "binary metadata without padding": told((b"x-bin", b"AP8")),
    "binary metadata with padding": told((b"x-bin", b"AP8=")),
    "binary metadata that is empty": told((b"x-bin", b"")),
    "names starting with grpc-": told((b"grpc-mine", b"1")),
    "tracing": told((b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")),
}
_SILENT = "grpcio's core leaves such a request without an answer; we say what is wrong with it"
_TYPE = "grpcio's core serves it whatever its content type; gRPC over HTTP/2 asks for 415"
_CUT_SHORT = "grpc.aio leaves a unary call that brings no whole message without an answer; we end it"
_FREEDOM: Final = {
    "no te": "grpcio's core leaves a call without `te` unanswered; some proxies drop it, so we do not ask for it",
    "GET": _SILENT,
    "PUT": _SILENT,
    "application/grpcx": _TYPE,
    "application/json": _TYPE,
    "no content type": _TYPE,
    "an unknown encoding, message as it is": _SILENT,
    "an unknown encoding, message compressed": _SILENT,
    "an unknown flag": "grpcio's core takes the message for an empty one; a flag that means nothing is refused here",
    "no message": _CUT_SHORT,
    "half a prefix": _CUT_SHORT,
    "half a message": _CUT_SHORT,
    "two messages": "grpc.aio serves the first; a unary method takes exactly one",
    "a timeout without a unit": _SILENT,
    "a timeout in an unknown unit": _SILENT,
    "a timeout of nine digits": "grpcio's core takes more digits than the eight that the protocol allows",
    "an empty timeout": _SILENT,
    "a negative timeout": _SILENT,
}
"""Request → why its answer may differ."""


async def answered(address: str, sent: bytes) -> tuple[str | None, str | None, bytes]:
    """HTTP status, gRPC status (or how the stream was ended), and messages of a call on stream 1."""
    host, port = address.split(":")
    wire = Wire(*await asyncio.open_connection(host, int(port)))
    try:
        wire.writer.write(PREFACE + settings({}) + sent)
        await wire.settle()
    finally:
        wire.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await wire.writer.wait_closed()
    decoder, fields, body = Decoder(), dict[str, str](), b""
    for each in wire.frames:
        if each.kind == HEADERS:
            found = {str(name): str(value) for name, value in decoder.decode(each.payload)}
            fields |= found if each.stream == 1 else {}
        elif each.kind == DATA and each.stream == 1:
            body += each.payload
        elif each.kind == RST_STREAM and each.stream == 1 and any(each.payload):
            fields.setdefault("grpc-status", "reset")
    return fields.get(":status"), "lost" if wire.lost else fields.get("grpc-status"), body


@pytest.mark.parametrize("name", list(REQUESTS))
def test_a_request(name: str) -> None:
    async def test() -> None:
        async with twins(OPTIONS) as (theirs, mine):
            verdicts = [await answered(side.address, REQUESTS[name]) for side in (theirs, mine)]
            assert (verdicts[0] != verdicts[1]) is (name in _FREEDOM), verdicts

    run("uvloop", test())


def test_the_list_names_requests_that_are_made() -> None:
    assert _FREEDOM.keys() <= REQUESTS.keys()
