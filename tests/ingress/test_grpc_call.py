"""Calls frame by frame: how messages may be cut, how many there may be, what is answered to what is no gRPC."""

from __future__ import annotations

import zlib

import pytest

from gateway.ingress.grpc_server import Http2Limits
from gateway.protocol.http2_frames import (
    DATA,
    END_STREAM,
    HEADERS,
    PING,
    RST_STREAM,
    WINDOW_UPDATE,
    frame,
    rst_stream,
    settings,
    window_update,
)
from tests.ingress.grpc_peer import fields_for, grpc_bench, prefixed, raw_client
from tests.ingress.http_peer import LOOPS, run, until
from tests.protocol.http2_peer import data, headers

pytestmark = pytest.mark.parametrize("loop", list(LOOPS))

UNARY = fields_for(b"/test.Echo/Unary")
STREAM = fields_for(b"/test.Echo/Stream")
GZIP = (b"grpc-encoding", b"gzip")


def gzipped(message: bytes) -> bytes:
    encoder = zlib.compressobj(wbits=31)
    return encoder.compress(message) + encoder.flush()


def head(*extra: tuple[bytes, bytes], path: bytes = b"/test.Echo/Unary", end: bool = False) -> bytes:
    return headers(1, fields_for(path, *extra), end=end)


def bodies(*pieces: bytes) -> bytes:
    return b"".join(data(1, piece) for piece in pieces) + data(1, end=True)


HELLO = prefixed(b"hello")
BROKEN = gzipped(b"hello" * 100)[:-5]

# what is sent, and the status and text it is answered with
ANSWERS = [
    (head() + data(1, HELLO, end=True), "0", ""),
    (head() + bodies(HELLO), "0", ""),
    (head() + bodies(*[HELLO[at : at + 1] for at in range(len(HELLO))]), "0", ""),
    (head() + bodies(b"", HELLO[:3], b"", HELLO[3:], b""), "0", ""),
    (head(GZIP) + bodies(HELLO), "0", ""),
    (head(GZIP) + bodies(prefixed(gzipped(b"hello"), 1)), "0", ""),
    (head((b"grpc-encoding", b"deflate")) + bodies(prefixed(zlib.compress(b"hello"), 1)), "0", ""),
    (head((b"grpc-encoding", b"identity")) + bodies(HELLO), "0", ""),
    (head(end=True), "12", "takes exactly one request message, and the call ended before it was complete"),
    (head() + bodies(b""), "12", "the call ended before it was complete"),
    (head() + bodies(HELLO[:4]), "12", "the call ended before it was complete"),
    (head() + data(1, HELLO[:-1], end=True), "12", "the call ended before it was complete"),
    (head() + data(1, HELLO + HELLO, end=True), "12", "a second one came"),
    (head() + bodies(HELLO, HELLO), "12", "a second one came"),
    (head() + bodies(HELLO, b"x"), "12", "a second one came"),
    (head() + data(1, HELLO + b"x", end=True), "12", "a second one came"),
    (head() + bodies(prefixed(b"x", 1)), "13", "no grpc-encoding was given"),
    (head((b"grpc-encoding", b"identity")) + bodies(prefixed(b"x", 1)), "13", "no grpc-encoding was given"),
    (head(GZIP) + bodies(prefixed(b"x", 2)), "13", "flagged as compressed"),
    (head(GZIP) + bodies(prefixed(b"no gzip", 1)), "13", "could not be inflated"),
    (head(GZIP) + bodies(prefixed(BROKEN, 1)), "13", "could not be inflated"),
    (head(GZIP) + bodies(prefixed(gzipped(b"a") + b"x", 1)), "13", "could not be inflated"),
    (head(GZIP) + bodies(prefixed(gzipped(bytes(10**7)), 1)), "8", "inflates to more bytes than there is room for"),
    (head((b"grpc-encoding", b"br")) + bodies(HELLO), "12", "grpc-encoding 'br' is not supported"),
    (head((b"grpc-timeout", b"1x")) + bodies(HELLO), "3", "grpc-timeout is not one to eight digits"),
    (head((b"grpc-timeout", b"0n")), "4", "Deadline Exceeded"),
    (head() + bodies(b"\0\xff\xff\xff\xff"), "8", "4294967295 bytes is over the limit"),
    (head(path=b"/nope/Nothing") + bodies(HELLO), "12", "unknown method"),
    (head(path=b"/test.Echo/Stream") + bodies(HELLO, HELLO[:3]), "13", "ended within a message"),
    (head(GZIP, path=b"/test.Echo/Stream") + bodies(prefixed(b"x", 1)), "13", "could not be inflated"),
    (head(path=b"/test.Echo/Stream") + bodies(prefixed(b"x", 1)), "13", "flagged as compressed"),
]


@pytest.mark.parametrize("step", [None, 1])
@pytest.mark.parametrize(("sent", "status", "text"), ANSWERS)
def test_one_call(loop: str, sent: bytes, status: str, text: str, step: int | None) -> None:
    async def test() -> None:
        async with grpc_bench(Http2Limits(max_message_bytes=10**6)) as bench:
            client = await raw_client(bench)
            if step is None:
                client.send(sent)
            else:
                for at in range(0, min(len(sent), 3000), step):
                    client.send(sent[at : at + step])
                    await client.writer.drain()
                client.send(sent[3000:])
            fields = await client.answer()
            assert fields["grpc-status"] == status
            assert fields[":status"] == "200"
            assert fields["content-type"] == "application/grpc"
            assert text in fields.get("grpc-message", "").replace("%25", "%")
            assert bench.app.messages == ([b"hello"] if status == "0" or text == "unknown method" else [])
            if "not supported" in text:
                assert fields["grpc-accept-encoding"] == "identity,deflate,gzip"
            client.send(headers(3, UNARY, end=False), data(3, HELLO, end=True))
            assert (await client.answer())["grpc-status"] == "0", "the connection goes on"

    run(loop, test())


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/v2")], "415"),
        ([(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/v2"), (b"content-type", b"text/plain")], "415"),
        (
            [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/"), (b"content-type", b"application/grpcx")],
            "415",
        ),
        (
            [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b"content-type", b"application/grpc")],
            "405",
        ),
    ],
)
def test_what_is_no_grpc_is_answered_as_http_does(loop: str, fields: list[tuple[bytes, bytes]], status: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            client.send(headers(1, fields))
            found = await client.frame(HEADERS)
            assert status.encode() in found.payload
            body = await client.frame(DATA)
            assert body.flags == END_STREAM
            assert b"speaks gRPC" in body.payload
            assert bench.server.statistics().rejected == {"not_grpc": 1}
            assert bench.app.resolved == []

    run(loop, test())


@pytest.mark.parametrize("kind", [b"application/grpc", b"application/grpc+proto", b"application/grpc;x=y"])
def test_content_types_of_grpc(loop: str, kind: bytes) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            fields = [(name, kind if name == b"content-type" else value) for name, value in UNARY]
            client.send(headers(1, fields, end=False), data(1, HELLO, end=True))
            assert (await client.answer())["grpc-status"] == "0"

    run(loop, test())


def test_several_messages_of_a_stream_in_one_frame(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            client.send(headers(1, STREAM, end=False), data(1, HELLO * 3 + HELLO[:6]), data(1, HELLO[6:], end=True))
            assert (await client.answer())["grpc-status"] == "0"
            assert bench.app.streams[0].messages == [b"hello"] * 4
            echoed = b"".join(each.payload for each in client.seen if each.kind == DATA)
            assert echoed == HELLO * 4

    run(loop, test())


def test_compressed_messages_of_a_stream_stay_in_order(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            client.send(window_update(0, 2**30))
            big = prefixed(gzipped(bytes(5 * 2**20)), 1)
            client.send(
                headers(1, fields_for(b"/test.Echo/Stream", GZIP), end=False),
                data(1, big + HELLO + prefixed(gzipped(b"x"), 1) + HELLO, end=True),
                window_update(1, 2**30),
            )
            assert (await client.answer())["grpc-status"] == "0"
            lengths = [len(message) for message in bench.app.streams[0].messages]
            assert lengths == [5 * 2**20, 5, 1, 5]

    run(loop, test())


def test_a_call_answered_before_its_end_stops_the_client(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            client.send(headers(1, UNARY, end=False), data(1, HELLO + b"more"))
            assert (await client.answer())["grpc-status"] == "12"
            found = await client.frame(RST_STREAM)
            assert (found.stream, found.payload) == (1, bytes(4))

    run(loop, test())


def test_answers_after_the_end_do_nothing(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            client.send(headers(1, fields_for(b"/test.Echo/Later"), end=False), data(1, HELLO, end=True))
            await until(lambda: bool(bench.app.later))
            client.send(rst_stream(1, 8))
            await until(lambda: bool(bench.app.aborted))
            call, _ = bench.app.later[0]
            call.reply([b"x"], 1)
            call.fail(3, "x")
            call.start()
            call.send([b"x"], 1)
            call.finish()
            client.send(headers(3, UNARY, end=False), data(3, HELLO, end=True))
            await client.answer()
            assert {each.stream for each in client.seen if each.kind in {HEADERS, DATA}} == {3}
            assert bench.app.aborted == [1]
            assert bench.server.statistics().aborted == 1

    run(loop, test())


def test_an_answer_larger_than_the_window_waits_and_is_counted(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            message = bytes(200_000)
            client.send(headers(1, UNARY, end=False))
            for at in range(0, len(prefixed(message)), 16_384):
                client.send(data(1, prefixed(message)[at : at + 16_384]))
            client.send(data(1, end=True))
            received = 0
            while received < 65_535:
                received += len((await client.frame(DATA)).payload)
            assert bench.server.statistics().held_bytes == 200_005 - 65_535
            client.send(window_update(0, 10**6), window_update(1, 10**6))
            await client.answer()
            assert sum(len(each.payload) for each in client.seen if each.kind == DATA) == 200_005
            assert bench.server.statistics().held_bytes == 0

    run(loop, test())


def test_deadlines_are_counted_and_on_time(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            timed = fields_for(b"/test.Echo/Later", (b"grpc-timeout", b"20m"))
            client.send(headers(1, timed, end=False), data(1, HELLO, end=True))
            await until(lambda: bool(bench.app.later))
            deadline = bench.app.later[0][0].deadline
            assert deadline is not None
            fields = await client.answer()
            assert bench.clock() >= deadline - 0.001
            assert (fields["grpc-status"], fields["grpc-message"]) == ("4", "Deadline Exceeded")
            assert bench.app.aborted == [1]
            statistics = bench.server.statistics()
            assert (statistics.expired, statistics.in_flight) == (1, 0)

    run(loop, test())


FAULTS = {
    "within a message": (STREAM, data(1, HELLO + HELLO[:3], end=True)),
    "compressed": (STREAM, data(1, HELLO + prefixed(b"x", 1))),
    "too long": (STREAM, data(1, HELLO + b"\0\xff\xff\xff\xff")),
    "cannot be inflated": (fields_for(b"/test.Echo/Stream", GZIP), data(1, HELLO + prefixed(BROKEN, 1))),
    "handler raises": (fields_for(b"/test.Echo/Stream"), data(1, HELLO + prefixed(b"raise"))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_stream_that_ends_for_its_clients_fault_is_told_to_its_handler(loop: str, fault: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            fields, body = FAULTS[fault]
            client.send(headers(1, fields, end=False), body)
            assert (await client.answer())["grpc-status"] not in {"", "0"}
            assert bench.app.streams[0].messages[:1] == [b"hello"]
            assert bench.app.aborted == [1]

    run(loop, test())


def test_a_message_that_does_not_come_is_told_to_the_streams_handler(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            client.send(headers(1, STREAM, end=False), data(1, HELLO + prefixed(bytes(100))[:20]))
            await client.frame(DATA)
            bench.later(1.0)
            bench.later(11.0)
            assert (await client.answer())["grpc-status"] == "4"
            assert bench.app.aborted == [1]

    run(loop, test())


def test_a_stream_that_reads_nothing_cannot_send_for_ever(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench() as bench:
            client = await raw_client(bench)
            client.send(settings({4: 0}), headers(1, STREAM, end=False))
            message = prefixed(bytes(15_995))
            window = 2**20
            for _ in range(200):
                if window < len(message):
                    break
                client.send(data(1, message))
                window -= len(message)
                client.send(frame(PING, 0, 0, b"12345678"))
                before = len(client.seen)
                await client.frame(PING)
                for each in client.seen[before:]:
                    if each.kind == WINDOW_UPDATE and each.stream == 1:
                        window += int.from_bytes(each.payload, "big")
            held = bench.server.statistics().held_bytes
            assert held <= 2**20 + 2 * 256 * 1024, held
            assert not bench.app.streams[0].call.writable
            client.send(settings({4: 2**30}), window_update(0, 2**30))
            await until(lambda: bench.app.streams[0].call.writable)
            await until(lambda: bench.server.statistics().held_bytes == 0)
            client.send(data(1, end=True))
            assert (await client.answer())["grpc-status"] == "0"
            updates = [each for each in client.seen if each.kind == WINDOW_UPDATE and each.stream == 1]
            assert updates, "who reads again may send again"

    run(loop, test())


def test_messages_announced_at_one_time_do_not_outgrow_the_budget(loop: str) -> None:
    async def test() -> None:
        async with grpc_bench(Http2Limits(max_held_bytes=100_000)) as bench:
            client = await raw_client(bench)
            message = prefixed(bytes(80_000))
            for call in (1, 3, 5, 7):
                client.send(headers(call, UNARY, end=False), data(call, message[:10]))
            for call in (1, 3, 5, 7):
                client.send(*[data(call, message[at : at + 8000]) for at in range(10, 60_010, 8000)])
            assert (await client.answer())["grpc-status"] == "14"
            client.send(frame(PING, 0, 0, b"12345678"))
            await client.frame(PING)
            assert bench.server.statistics().held_bytes <= 100_000

    run(loop, test())


@pytest.mark.parametrize("path", [b"/test.Echo/Unary", b"/test.Echo/Stream"])
def test_a_message_over_the_limit_is_refused_however_it_is_cut(loop: str, path: bytes) -> None:
    async def test() -> None:
        async with grpc_bench(Http2Limits(max_message_bytes=100)) as bench:
            client = await raw_client(bench)
            for call, size, step in ((1, 101, 1000), (3, 101, 7), (5, 100, 1000)):
                message = prefixed(bytes(size))
                pieces = [data(call, message[at : at + step]) for at in range(0, len(message), step)]
                client.send(headers(call, fields_for(path), end=False), *pieces[:-1])
                client.send(data(call, message[(len(pieces) - 1) * step :], end=True))
                assert (await client.answer())["grpc-status"] == ("8" if size > 100 else "0")

    run(loop, test())


@pytest.mark.parametrize(("size", "flag"), [(1023, 0), (1024, 1), (2**20, 1), (2**20 + 1, 0)])
def test_answers_that_would_take_long_to_compress_go_out_as_they_are(loop: str, size: int, flag: int) -> None:
    async def test() -> None:
        async with grpc_bench(compression="low") as bench:
            client = await raw_client(bench)
            fields = fields_for(b"/test.Echo/Unary", GZIP, (b"grpc-accept-encoding", b"gzip"))
            client.send(settings({4: 2**30}), window_update(0, 2**30))
            client.send(headers(1, fields, end=False), data(1, prefixed(gzipped(bytes(size)), 1), end=True))
            assert (await client.answer())["grpc-status"] == "0"
            answer = b"".join(each.payload for each in client.seen if each.kind == DATA)
            assert answer[0] == flag
            assert (len(answer) < size) is bool(flag)

    run(loop, test())
