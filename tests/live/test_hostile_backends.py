"""A gateway in front of a server that attacks it, and one that does not: no caller notices.

Per attack: every caller gets the right answer (from the other server), the gateway goes on at once, stays small, and
not one byte of what the hostile server said is found in an answer or breaks a line of the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import hpack
import pytest

from tests.backends.oip_server import Reply, Request, frame, grpc_frames, http, http_json, infer_response, serving
from tests.live.gateway_process import GatewayProcess
from tests.live.test_hostile import rss_bytes

pytestmark = pytest.mark.slow

ROWS = 24
"""Asked for one by one, two at a time."""
GROWTH_BYTES = 160 << 20
PATIENCE_S = 40.0
STALL_S = 1.0
"""Far over what is promised, for machines that are busy with something else."""
EVIL = "evil\r\nX-Evil: yes\r\n\r\n\x1b[31m\u202e{}"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
FLOOD = 1 << 18

Attack = Callable[[Request], Reply]


def outputs(**more: Any) -> dict[str, Any]:
    return {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [666, 666]} | more]}


def binary(document: Any, blob: bytes) -> bytes:
    head = json.dumps(document).encode()
    return http(head + blob, headers=[("Inference-Header-Content-Length", str(len(head)))])


def of_http() -> dict[str, Attack]:
    evil = http_json(outputs())
    replies = {
        "announced": Reply(OK + b"Content-Length: 1099511627776\r\n\r\n", "flood", more=bytes(FLOOD)),
        "endless body": Reply(CHUNKED, "flood", more=(b"10000\r\n" + bytes(65_536) + b"\r\n")),
        "crumbs": Reply(CHUNKED, "flood", more=b"1\r\nx\r\n" * 40_000),
        "endless head": Reply(OK, "flood", more=b"X-A: " + b"y" * 1000 + b"\r\n"),
        "endless field": Reply(OK + b"X-A: ", "flood", more=b"y" * FLOOD),
        "endless trailer": Reply(CHUNKED + b"0\r\nX-A: ", "flood", more=b"y" * FLOOD),
        "endless extension": Reply(CHUNKED + b"1;", "flood", more=b"y" * FLOOD),
        "interim": Reply(b"", "flood", more=b"HTTP/1.1 103 E\r\nLink: x\r\n\r\n" * 8000),
        "drip": Reply(evil[:-1], "hang", cuts=range(1, len(evil) - 1)),
        "silence": Reply(b"", "hang"),
        "half": Reply(evil[:-1], "hang"),
        "short": Reply(evil[:-1], "close"),
        "reset": Reply(evil[:-1], "reset"),
        "until the end": Reply(OK + b"\r\n" + json.dumps(outputs()).encode(), "close"),
        "two lengths": Reply(OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"),
        "length and chunks": Reply(OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        "bomb": Reply(http(gzip.compress(bytes(1 << 24)), headers=[("Content-Encoding", "gzip")])),
        "redirect": Reply(http(b"", 307, [("Location", "http://127.0.0.1:1/")])),
        "upgrade": Reply(
            b"HTTP/1.1 101 Yes\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n", "flood", more=bytes(FLOOD)
        ),
        "injection": Reply(http_json({"error": EVIL * 500}, 500, [("X-Evil", "yes")])),
        "gigantic": Reply(http_json(outputs(shape=[2**62, 2]))),
        "overflow": Reply(binary(outputs(shape=[2**62, 2], parameters={"binary_data_size": 8}), bytes(8))),
        "negative": Reply(http_json(outputs(shape=[-1, 2]))),
        "size": Reply(binary(outputs(parameters={"binary_data_size": 2**63}), bytes(8))),
        "header length": Reply(http(b"{}", headers=[("Inference-Header-Content-Length", "9" * 30)])),
        "rows": Reply(http_json(outputs(shape=[2, 2], data=[666] * 4))),
        "deep": Reply(http(b"[" * 100_000)),
        "deep error": Reply(http(b'{"error":' + b"[" * 900 + b"]" * 900 + b"}", 500)),
        "wide": Reply(http(b'{"outputs":[' + b"{}," * 2_000_000 + b"{}]}")),
        "not json": Reply(http(b"\xff" * 100_000)),
        "nan": Reply(http(b'{"outputs":[{"name":"y","data":[' + b"NaN," * 3_000_000 + b"1]}]}")),
    }
    fixed: dict[str, Attack] = {name: lambda _, reply=reply: reply for name, reply in replies.items()}  # type: ignore[misc]
    return fixed | {"two answers": _two_answers}


def _two_answers(asked: Request) -> Reply:
    """A good one, and one more for whoever asks next."""
    length = int(asked.headers["inference-header-content-length"])
    asking = json.loads(asked.body[:length])
    numbers = struct.unpack(f"<{len(asked.body[length:]) // 4}f", asked.body[length:])
    shape = asking["inputs"][0]["shape"]
    good = http_json({"id": asking["id"]} | outputs(shape=shape, data=[2 * n for n in numbers]))
    return Reply(good * 2, cuts=[len(good)])


def of_grpc() -> dict[str, Attack]:
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    head = encoder.encode([(":status", "200"), ("content-type", "application/grpc")])

    def flood(unit: bytes, before: bytes = b"") -> Attack:
        return lambda asked: Reply(before, "flood", more=unit * (FLOOD // len(unit)))

    def mine(made: Callable[[int], bytes], then: Any = "hang") -> Attack:
        return lambda asked: Reply(made(asked.stream), then)

    def data(stream: int, content: bytes) -> bytes:
        return frame(1, 4, stream, head) + frame(0, 0, stream, content)

    def answered(message: bytes) -> Attack:
        return lambda asked: Reply(grpc_frames(asked.stream, message))

    evil = infer_response([("y", "FP32", [1, 2], bytes(8))])
    return {
        "settings": flood(frame(4, 0, 0)),
        "pings": flood(frame(6, 0, 0, bytes(8))),
        "large pings": flood(frame(6, 0, 0, bytes(16_000))),
        "windows": flood(frame(8, 0, 0, b"\0\0\0\1")),
        "continuations": lambda asked: Reply(
            frame(1, 0, asked.stream, head), "flood", more=frame(9, 0, asked.stream) * 20_000
        ),
        "crumbs": lambda asked: Reply(
            data(asked.stream, b"\0\x0f\xff\xff\xff"), "flood", more=frame(0, 0, asked.stream, b"x") * 20_000
        ),
        "endless": lambda asked: Reply(
            data(asked.stream, b"\0\x7f\xff\xff\xff"), "flood", more=frame(0, 0, asked.stream, bytes(16_000))
        ),
        "unknown frames": flood(frame(200, 0, 1, bytes(100))),
        "going away": flood(frame(7, 0, 0, b"\x7f\xff\xff\xff" + bytes(4))),
        "gone": mine(lambda stream: frame(7, 0, 0, bytes(8))),
        "calm": mine(lambda stream: frame(3, 0, stream, b"\0\0\0\x0b")),
        "reset": mine(lambda stream: frame(3, 0, stream, bytes(4))),
        "other streams": mine(lambda stream: grpc_frames(stream + 2, evil)),
        "even stream": mine(lambda stream: grpc_frames(2, evil)),
        "before it was asked": mine(lambda stream: grpc_frames(stream, None, 13, "no") + grpc_frames(stream + 2, evil)),
        "huge frame": lambda asked: Reply(
            b"\xff\xff\xff\0\0" + struct.pack(">L", asked.stream), "flood", more=bytes(FLOOD)
        ),
        "table bomb": lambda asked: Reply(
            frame(1, 4, asked.stream, b"\x40\1a\x7f\xa1\x1e" + b"x" * 4000 + b"\xbe" * 60_000), "hang"
        ),
        "silence": mine(lambda stream: b""),
        "push": mine(lambda stream: frame(5, 4, stream, b"\0\0\0\2" + head)),
        "injection": lambda asked: Reply(grpc_frames(asked.stream, None, 13, "e%0D%0AX-Evil: yes%1B[31m" * 300)),
        "gigantic": answered(infer_response([("y", "FP32", [2**62, 2], bytes(8))])),
        "negative": answered(infer_response([("y", "FP32", [-1, 2], bytes(8))])),
        "rows": answered(infer_response([("y", "FP32", [2, 2], bytes(16))])),
        "many outputs": answered(b"\x2a\0" * 2_000_000),
        "many parts": answered(b"\x32\0" * 2_000_000),
        "garbage": answered(b"\xff" * 100_000),
        "http/1": mine(lambda stream: b"HTTP/1.1 400 Bad Request\r\n\r\n", "close"),
    }


ATTACKS = {
    f"{scheme}: {name}": (scheme, attack)
    for scheme, attacks in (("http", of_http()), ("grpc", of_grpc()))
    for name, attack in attacks.items()
}


@contextlib.asynccontextmanager
async def siege(scheme: str, folder: Path, setup: Any = None) -> AsyncIterator[tuple[Any, GatewayProcess]]:
    """A hostile server and a gateway that has it and a good one."""
    async with serving(scheme, setup=setup) as hostile, serving() as good:
        config = folder / "gateway.yaml"
        config.write_text(
            "models:\n  - name: double\n    attempt_timeout_ms: 1000\n    backends:\n"
            f"      - {{url: '{scheme}://127.0.0.1:{hostile.port}', name: hostile}}\n"
            f"      - {{url: 'http://127.0.0.1:{good.port}', name: good}}\n"
        )
        served = GatewayProcess("serve", "-c", str(config))
        try:
            await asyncio.to_thread(served.wait_started)
            yield hostile, served
        finally:
            await asyncio.to_thread(served.close)


async def ask(served: GatewayProcess, value: int) -> tuple[int, dict[str, str], Any]:
    given = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [value, value]}
    return await asyncio.to_thread(served.infer, "double", {"inputs": [given]})


async def slowest_sign_of_life(served: GatewayProcess, over: asyncio.Event) -> float:
    slowest = 0.0
    while not over.is_set():
        begun = time.monotonic()
        status, _, _ = await asyncio.to_thread(served.request, "GET", "/v2/health/live")
        assert status == 200
        slowest = max(slowest, time.monotonic() - begun)
        await asyncio.sleep(0.005)
    return slowest


@pytest.mark.parametrize("name", ATTACKS)
async def test_no_caller_notices(name: str, tmp_path: Path) -> None:
    scheme, attack = ATTACKS[name]
    async with siege(scheme, tmp_path) as (hostile, served):
        assert (await ask(served, 1))[0] == 200
        before = rss_bytes(served.process.pid)
        hostile.script = attack
        over = asyncio.Event()
        watch = asyncio.create_task(slowest_sign_of_life(served, over))
        async with asyncio.timeout(PATIENCE_S):
            for value in range(0, ROWS, 2):
                for n, (status, headers, answer) in enumerate(
                    await asyncio.gather(ask(served, value), ask(served, value + 1))
                ):
                    assert status == 200, answer
                    assert answer["outputs"][0]["data"] == [2 * (value + n)] * 2
                    assert "x-evil" not in headers
        growth = rss_bytes(served.process.pid) - before
        over.set()
        stall = await watch
        assert hostile.infers, "it was never asked"
        assert growth < GROWTH_BYTES
        assert stall < STALL_S
        log = served.output()
        assert "Traceback" not in log
        assert "\x1b" not in log
        assert not [line for line in log.splitlines() if line.startswith("X-Evil")]
        print(f"{name}: grew {growth >> 20} MiB, slowest sign of life {stall * 1000:.0f} ms")  # noqa: T201


async def test_a_window_that_never_opens_is_given_up(tmp_path: Path) -> None:
    def closed(server: Any) -> None:
        server.generous = False
        server.settings = struct.pack(">HL", 4, 200)  # enough for questions, not for a batch

    async with siege("grpc", tmp_path, closed) as (_, served):
        for value in range(6):
            status, _, answer = await ask(served, value)
            assert (status, answer["outputs"][0]["data"]) == (200, [2 * value] * 2)
