"""Hostile clients against a live gateway's gRPC port, and what is left of both ports afterwards.

Every attack is made while honest callers of REST and gRPC keep asking: none of their requests may fail. What the
attack held must be given back, and the process must not have grown. (tests/live/test_hostile.py attacks the HTTP port.)
"""

from __future__ import annotations

import asyncio
import gzip
import struct
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from gateway.protocol.http2_frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_WINDOW,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ErrorCode,
    frame,
    settings,
)
from tests.fuzz.attacker import (
    CALL,
    PATIENCE_S,
    Attacker,
    GoodCaller,
    Peak,
    answer_to,
    attack,
    message,
    prefixed,
    status_of,
    whole,
)
from tests.live import models
from tests.live.alone import Alone
from tests.live.gateway_process import GatewayProcess, gateway, until
from tests.live.test_hostile import GoodClient, rss_bytes
from tests.protocol.grpc_samples import infer_request
from tests.protocol.http2_peer import block, data, headers

MODELS = {"whole": models.whole_linear(), "id": models.identity("FP32")}
HELD_MIB = 64
GROWTH_BYTES = 160 * 1024 * 1024
"""What the allocator may keep of HELD_MIB held twice over (received, and on its way to the model)."""
REPEATED = 6
"""Attacks whose remains, were there any, would add up to more than that."""


@pytest.fixture(scope="module")
def alone() -> Alone:
    return Alone(MODELS["whole"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    directory = tmp_path_factory.mktemp("hostile")
    models.repository(directory / "models", MODELS)
    config = directory / "gateway.yaml"
    config.write_text(
        "server:\n  workers: 1\n  limits: {header_timeout_s: 1, write_timeout_s: 2, idle_timeout_s: 600, "
        f"max_held_bytes: {HELD_MIB * 2**20}}}\nmodels: [{{source: ./models}}]\n"
    )
    with gateway("serve", "-c", str(config)) as process:
        yield process


def nothing_left(served: GatewayProcess) -> None:
    until(lambda: served.metric("gateway_http_held_bytes") == 0, 60, "bytes are still held")
    until(lambda: served.metric("gateway_grpc_open_connections") == 0, 60, "connections are left")
    assert served.metric("gateway_queue_rows") == 0


@pytest.fixture
def honest(served: GatewayProcess, alone: Alone) -> Iterator[None]:
    """Honest callers on both ports during the test; afterwards nothing of the attack is left."""
    pids = [served.process.pid, *[worker["pid"] for worker in served.workers()]]
    before = rss_bytes(pids[0])
    with GoodClient(served.port, alone), GoodCaller(served) as caller:
        until(lambda: caller.answers > 3, 60, "no answers before the attack")
        yield
    nothing_left(served)
    until(lambda: rss_bytes(pids[0]) - before < GROWTH_BYTES, 20, f"the gateway grew from {before}")
    assert [worker["pid"] for worker in served.workers()] == pids[1:]
    assert "Traceback" not in served.output()


pytestmark = [pytest.mark.usefixtures("honest"), pytest.mark.slow]

# -- floods ----------------------------------------------------------------------------------------------------------


def flood(
    piece: Callable[[int], bytes], rounds: int = 2_000, reads: bool = True
) -> Callable[[Attacker], Awaitable[None]]:
    """Send until the gateway hangs up."""

    async def story(attacker: Attacker) -> None:
        reading = asyncio.create_task(attacker.rest() if reads else asyncio.sleep(PATIENCE_S))
        for number in range(rounds):
            if reading.done() or not await attacker.send(piece(number)):
                break
            await asyncio.sleep(0)
        if reads:
            await reading
        else:
            reading.cancel()

    return story


def resets(number: int) -> bytes:
    """Rapid reset (CVE-2023-44487): a hundred calls, each cancelled at once."""
    return b"".join(
        headers(stream_id, CALL, end=False) + data(stream_id, prefixed(message(*[1.0] * 6)), end=True)
        + frame(RST_STREAM, 0, stream_id, (8).to_bytes(4, "big"))
        for stream_id in range(200 * number + 1, 200 * number + 201, 2)
    )  # fmt: skip


def made_to_reset(number: int) -> bytes:
    """MadeYouReset (CVE-2025-8671): the gateway is made to cancel."""
    return b"".join(
        headers(stream_id, CALL, end=False) + frame(WINDOW_UPDATE, 0, stream_id, bytes(4))
        for stream_id in range(200 * number + 1, 200 * number + 201, 2)
    )


FLOODS: dict[str, Callable[[int], bytes]] = {
    "rapid reset": resets,
    "made to reset": made_to_reset,
    "SETTINGS": lambda _: settings({INITIAL_WINDOW_SIZE: 65_535}) * 200,
    "PING": lambda _: frame(PING, 0, 0, b"12345678") * 200,
    "empty DATA": lambda n: (headers(1, CALL, end=False) if not n else b"") + data(1) * 200,
    "unknown frames": lambda _: frame(99, 0, 1, b"") * 200,
    "PRIORITY": lambda _: frame(2, 0, 3, b"\0\0\0\1\5") * 200,
    "continuations": lambda n: frame(CONTINUATION if n else HEADERS, 0, 1, b"\0\1a\1b" * 10) * (50 if n else 1),
    "empty continuations": lambda n: frame(CONTINUATION if n else HEADERS, 0, 1, b"") * (50 if n else 1),
}


@pytest.mark.parametrize("name", FLOODS)
def test_whoever_floods_is_cut_off(served: GatewayProcess, name: str) -> None:
    for attacker in attack(served, flood(FLOODS[name]), count=4):
        assert attacker.goodbye() in {"ENHANCE_YOUR_CALM", ""}, name
    rejected = served.metric("gateway_grpc_rejected_total")
    assert rejected > 0


@pytest.mark.parametrize("name", ["SETTINGS", "PING"])
def test_whoever_floods_and_does_not_read_the_answers_is_cut_off(served: GatewayProcess, name: str) -> None:
    attack(served, flood(FLOODS[name], reads=False), count=4)


def test_ten_thousand_streams(served: GatewayProcess) -> None:
    """Calls that never end: those over the limit are refused, and the others cost little."""

    async def story(attacker: Attacker) -> None:
        reading = asyncio.create_task(attacker.rest())
        for number in range(10_000):
            if reading.done() or not await attacker.send(headers(2 * number + 1, CALL, end=False)):
                break
        await attacker.send(frame(PING, 0, 0, b"\0\0\0\0last"))
        until_time = time.monotonic() + 30
        while not reading.done() and time.monotonic() < until_time:
            if any(each.kind == PING for each in attacker.seen):
                break
            await asyncio.sleep(0.01)
        reading.cancel()

    (attacker,) = attack(served, story)
    refused = sum(
        each.kind == RST_STREAM and int.from_bytes(each.payload, "big") == ErrorCode.REFUSED_STREAM
        for each in attacker.seen
    )
    assert attacker.goodbye() == "ENHANCE_YOUR_CALM" or refused >= 10_000 - 1024 - 100
    assert refused


# -- slowness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["preface", "nothing", "header block", "call without bytes"])
def test_slow_clients_are_given_up(served: GatewayProcess, what: str) -> None:
    """A hundred clients that do not get on, against a header timeout of one second."""

    async def one() -> bool:
        attacker = Attacker(*await asyncio.open_connection("127.0.0.1", served.grpc_port))
        try:
            reading = asyncio.create_task(attacker.rest())
            greeting = PREFACE + settings({})
            if what == "header block":
                await attacker.send(greeting, frame(HEADERS, 0, 1, block(CALL)[:20]))
            elif what == "call without bytes":
                await attacker.send(greeting, headers(1, CALL, end=False))
            for number in range(400):
                if what == "preface":
                    await attacker.send(greeting[number % 24 : number % 24 + 1])
                elif what == "header block":
                    await attacker.send(frame(CONTINUATION, 0, 1, b"")[number % 9 : number % 9 + 1])
                done, _ = await asyncio.wait({reading}, timeout=0.1)
                ended = any(each.kind in {RST_STREAM, HEADERS} and each.stream == 1 for each in attacker.seen)
                if done or ended:
                    return True
            return False
        finally:
            attacker.writer.transport.abort()

    async def story() -> list[bool]:
        async with asyncio.timeout(PATIENCE_S):
            return list(await asyncio.gather(*(one() for _ in range(100))))

    assert all(asyncio.run(story()))


def test_answers_that_are_not_taken_are_given_up(served: GatewayProcess) -> None:
    """Windows of zero: four clients ask for far more than may be held, and take none of it."""
    content = prefixed(message(*[1.0] * 100_000, model="id"))

    async def story(attacker: Attacker) -> None:
        await attacker.send(settings({INITIAL_WINDOW_SIZE: 0}))
        reading = asyncio.create_task(attacker.rest())
        for number in range(60):
            parts = [content[at : at + 16_000] for at in range(0, len(content), 16_000)]
            last = len(parts) - 1
            stream_id = 2 * number + 1
            await attacker.send(
                headers(stream_id, CALL, end=False),
                *(data(stream_id, part, end=place == last) for place, part in enumerate(parts)),
            )
            assert served.process.poll() is None
        ended: set[int] = set()
        while len(ended) < 60 and not reading.done():
            await asyncio.sleep(0.1)
            ended = {each.stream for each in attacker.seen if each.kind == RST_STREAM or each.flags & END_STREAM}
        reading.cancel()

    attack(served, story, count=4)


def test_an_answer_taken_byte_by_byte_holds_nobody_up(served: GatewayProcess) -> None:
    """A window that is opened by one byte at a time (CVE-2019-9511): each frame the gateway sends was paid for."""
    content = prefixed(message(*[1.0] * 3_000, model="id"))

    async def story(attacker: Attacker) -> None:
        await attacker.send(settings({INITIAL_WINDOW_SIZE: 0}), headers(1, CALL, end=False), data(1, content, end=True))
        for _ in range(2_000):
            await attacker.send(frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1"), frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1"))
            found = await attacker.until(DATA, 1)
            assert len(found.payload) == 1

    attack(served, story, count=4)


# -- windows, lengths, sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((frame(WINDOW_UPDATE, 0, 0, MAX_WINDOW.to_bytes(4, "big")),), "FLOW_CONTROL_ERROR"),
        ((frame(WINDOW_UPDATE, 0, 0, bytes(4)),), "PROTOCOL_ERROR"),
        ((settings({INITIAL_WINDOW_SIZE: MAX_WINDOW + 1}),), "FLOW_CONTROL_ERROR"),
        ((frame(HEADERS, END_HEADERS, 1, b"\xff" * 50),), "COMPRESSION_ERROR"),
        ((b"\xff\xff\xff\0\0\0\0\0\1",), "FRAME_SIZE_ERROR"),
        ((frame(SETTINGS, 0, 0, b"12345"),), "FRAME_SIZE_ERROR"),
        ((data(7, b"x"),), "PROTOCOL_ERROR"),
        ((headers(2, CALL),), "PROTOCOL_ERROR"),
    ],
)
def test_broken_rules_end_the_connection(served: GatewayProcess, parts: tuple[bytes, ...], reason: str) -> None:
    async def story(attacker: Attacker) -> None:
        await attacker.send(*parts)
        await attacker.rest()

    (attacker,) = attack(served, story)
    assert attacker.goodbye() == reason


def test_a_giant_length_costs_nothing(served: GatewayProcess) -> None:
    code, text = answer_to(served, headers(1, CALL, end=False), data(1, b"\0\xff\xff\xff\xff" + b"x" * 100))
    assert code == 8, text


def test_a_length_that_does_not_come_is_given_up_or_refused(served: GatewayProcess) -> None:
    """A hundred calls announce 60 MiB each, on four connections; nothing is set aside for them."""

    async def story(attacker: Attacker) -> None:
        await attacker.send(
            *(
                headers(number, CALL, end=False) + data(number, b"\0" + (60 * 2**20).to_bytes(4, "big") + b"x" * 1000)
                for number in range(1, 51, 2)
            )
        )
        reading = asyncio.create_task(attacker.rest())
        await asyncio.wait({reading}, timeout=1)
        reading.cancel()
        assert rss_bytes(served.process.pid) < 2**30

    attack(served, story, count=4)


@pytest.mark.parametrize("coding", [b"gzip", b"deflate"])
def test_a_compressed_bomb(served: GatewayProcess, coding: bytes) -> None:
    """A mebibyte of compressed zeros that are a gibibyte: refused, having cost no more than may be held."""
    import zlib

    zeros = zlib.compressobj(9, wbits=31 if coding == b"gzip" else 15)
    made = [zeros.compress(bytes(2**20)) for _ in range(1024)]
    content = b"".join([*made, zeros.flush()])
    peak = Peak(served.process.pid)
    with peak:
        for _ in range(REPEATED):
            code, text = answer_to(served, *whole(prefixed(content, 1), [*CALL, (b"grpc-encoding", coding)]))
            assert code == 8 or (code == 14 and "retry" in text), (code, text)
    assert peak.bytes - peak.before < 4 * HELD_MIB * 2**20


def test_a_compressed_bomb_over_http(served: GatewayProcess) -> None:
    content = gzip.compress(bytes(2**29), 1)
    peak = Peak(served.process.pid)
    with peak:
        for _ in range(REPEATED):
            status, _, answer = served.request("POST", "/v2/models/whole/infer", content, {"Content-Encoding": "gzip"})
            assert status in {413, 503}, answer
    assert peak.bytes - peak.before < 4 * HELD_MIB * 2**20


@pytest.mark.parametrize("size", [20_000, 200_000, 2_000_000])
def test_huge_metadata_is_refused(served: GatewayProcess, size: int) -> None:
    fields = block([*CALL, *((b"x-%d" % number, b"v" * 900) for number in range(size // 900))])
    pieces = [fields[at : at + 16_000] for at in range(0, len(fields), 16_000)]

    async def story(attacker: Attacker) -> None:
        for place, piece in enumerate(pieces):
            kind = CONTINUATION if place else HEADERS
            end = END_HEADERS if place == len(pieces) - 1 else 0
            if not await attacker.send(frame(kind, end, 1, piece)):
                break
        while True:
            try:
                found = await attacker.frame()
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            if found.kind == HEADERS and found.flags & END_STREAM:
                return

    (attacker,) = attack(served, story)
    last = attacker.seen[-1]
    if last.kind == HEADERS:
        assert status_of(last)[0] == 8
    else:
        assert attacker.goodbye() in {"ENHANCE_YOUR_CALM", ""}
    assert size > 60_000 or last.kind == HEADERS


def test_an_hpack_bomb(served: GatewayProcess) -> None:
    """One long entry in the table, then thousands of references to it."""
    value = b"v" * 3900
    entry = b"\x40\x03x-a" + b"\x7f" + _continued(len(value) - 127) + value
    bomb = entry + b"\xbe" * 10_000

    async def story(attacker: Attacker) -> None:
        await attacker.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, block(CALL) + bomb))
        await attacker.rest()

    (attacker,) = attack(served, story)
    assert attacker.goodbye() == "ENHANCE_YOUR_CALM"


def _continued(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


# -- requests --------------------------------------------------------------------------------------------------------

_NAME = struct.pack("<BB", 0x0A, 5) + b"whole"
BAD_MESSAGES = {
    "garbage": b"\xff" * 40,
    "invalid UTF-8": b"\x0a\x02\xff\xfe",
    "a shape over 2^63": infer_request(("x", "FP32", [2**40, 2**40], b""), model="whole").SerializeToString(),
    "a huge row count": infer_request(("x", "FP32", [2**62, 6], b""), model="whole").SerializeToString(),
    "a zero beside 2^62": infer_request(("x", "FP32", [0, 2**62], b""), model="id").SerializeToString(),
    "negative dims": infer_request(("x", "FP32", [-1, -6], b""), model="whole").SerializeToString(),
    "a thousand dims": infer_request(("x", "FP32", [1] * 1000, b""), model="whole").SerializeToString(),
    "an input ten thousand times": _NAME + b"\x2a\x03\x0a\x01x" * 10_000,
    "raw tensors, a hundred thousand": _NAME + b"\x3a\x00" * 100_000,
    "nested groups": b"\x43" * 100_000,
    "a length beyond the message": b"\x0a\xff\xff\xff\xff\x07",
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages_are_explained(served: GatewayProcess, name: str) -> None:
    code, text = answer_to(served, *whole(prefixed(BAD_MESSAGES[name])))
    assert code == 3, (code, text)
    assert text
    assert len(text) < 4096


def test_half_closed_calls_hold_nothing(served: GatewayProcess) -> None:
    """Clients that ask and stop sending at once; the TCP connection is closed in the middle of everything."""

    async def story(attacker: Attacker) -> None:
        content = prefixed(message(*[1.0] * 6))
        for number in range(1, 101, 2):
            await attacker.send(headers(number, CALL, end=False), data(number, content[: number % len(content)]))
        attacker.writer.write_eof()
        await attacker.rest()

    attack(served, story, count=20)
