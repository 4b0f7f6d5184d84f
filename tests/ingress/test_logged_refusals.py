"""Refusals that come before routing, or instead of it: whatever named an inference endpoint is a row of the log.

What has no readable request line, or names no such endpoint, is none; strangers' texts are bounded and make no models.
"""

from __future__ import annotations

import asyncio
import gzip
import random
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from gateway.core.log_policy import LogPolicy
from gateway.errors import InvalidRequest
from gateway.inference_log.handover import MAX_TEXT
from gateway.ingress.http_server import HttpLimits
from gateway.protocol.http1_head import Heads
from gateway.protocol.http2_frames import PREFACE, settings
from gateway.protocol.http2_limits import Http2Limits
from tests.inference_log.row_reader import Frames
from tests.ingress.grpc_bench import GrpcBench, grpc_bench
from tests.ingress.grpc_peer import RawClient, fields_for, prefixed
from tests.ingress.oip_bench import http, infer, oip_bench
from tests.ingress.test_logged_requests import log_into, rows
from tests.protocol.http2_peer import data, headers

PATH = "/v2/models/numbers/infer"
LIMITS = HttpLimits(max_body_bytes=1000)


def head(*fields: str, method: str = "POST", path: str = PATH, protocol: str = "HTTP/1.1") -> bytes:
    return "\r\n".join([f"{method} {path} {protocol}", "X-Request-Id: theirs", *fields, "", ""]).encode()


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (413, head("Host: a", "Content-Length: 1001")),
        (413, head("Host: a", "Transfer-Encoding: chunked") + b"3e9\r\n"),
        (400, head("Host: a", "Transfer-Encoding: chunked") + b"zz\r\n"),
        (400, head("Content-Length: 0")),
        (400, head("Host: a", "Content-Length: 1", "Transfer-Encoding: chunked")),
        (400, head("Host: a", "Content-Length: 1", "Content-Length: 2")),
        (400, head("Host: a", "no colon")),
        (400, head("Host: a", "Bad: \x01")),
        (400, head("Host: a", method="BREW")),
        (405, head("Host: a", method="GET")),
        (417, head("Host: a", "Content-Length: 1", "Expect: more")),
        (431, head("Host: a", "Long: " + "x" * 70_000)),
        (431, head("Host: a", *["A: b"] * 300)),
        (505, head("Host: a", protocol="HTTP/1.7")),
    ],
)
async def test_what_http_refuses_at_an_inference_endpoint_is_a_row(status: int, data: bytes) -> None:
    frames = Frames()
    async with oip_bench(log=log_into(frames), limits=LIMITS) as bench:
        answer = await bench.ask(data)
        assert answer.status == status
        (row,) = rows(bench, frames)
        assert row.id == answer["X-Request-Id"]
        assert (row.row.status, row.row.protocol, row.row.endpoint) == (status, "http", "infer")
        assert (row.model, row.detail.asked_model, row.detail.error) == ("", "numbers", answer.error)
        assert row.row.client_request_id == "theirs"
        assert row.inputs == {}


async def test_looking_where_a_refused_request_was_going_fails_on_nothing() -> None:
    rng = random.Random(3)
    sound = head(
        "Host: a", "traceparent: 00-" + "ab" * 16 + "-" + "cd" * 8 + "-01", "Inference-Header-Content-Length: 3"
    )
    async with oip_bench(log=log_into(Frames()), models=False) as bench:
        heads = Heads(LIMITS, bench.application.resolve)
        found = 0
        for _ in range(3000):
            text = bytearray(sound.replace(b"numbers", rng.choice([b"numbers", b"%2f", b"%ff", b"%", b"\x80", b""])))
            for _ in range(rng.randrange(4)):
                text[rng.randrange(len(text))] = rng.randrange(256)
            located = heads.located(text[: rng.randrange(len(text) + 1)], 0)
            bench.application.refused(located, InvalidRequest("odd"), 0.0)
            found += located is not None
        assert 500 < found < 3000
        assert not heads.remembered


@pytest.mark.parametrize("given", [b"", b'{"inp'])
async def test_a_body_that_arrives_too_slowly_is_a_row(given: bytes) -> None:
    frames = Frames()
    async with oip_bench(log=log_into(frames), limits=LIMITS) as bench:
        client = await bench.client()
        client.send(head("Host: a", "Content-Length: 500") + given)
        while not bench.server.statistics().remembered_heads:
            await asyncio.sleep(0.001)
        bench.server.sweep(asyncio.get_running_loop().time() + 3600)
        answer = await client.answer()
        assert answer.status == 408
        (row,) = rows(bench, frames)
        assert (row.id, row.row.status, row.detail.asked_model) == (answer["X-Request-Id"], 408, "numbers")


async def test_a_body_for_which_there_is_no_memory_is_a_row_and_the_connection_lives_on() -> None:
    frames = Frames()
    async with oip_bench(log=log_into(frames), limits=HttpLimits(max_held_bytes=400)) as bench:
        client = await bench.client()
        refused = await client.ask(http("POST", PATH, b" " * 500))
        served = await client.ask(infer([1]))
        assert (refused.status, served.status) == (503, 200)
        first, second = rows(bench, frames)
        assert (first.id, first.row.status) == (refused["X-Request-Id"], 503)
        assert (second.id, second.row.status) == (served["X-Request-Id"], 200)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
        b"POST /v2/models/numbers/infer",
        head("Host: a", "Content-Length: 1001", path="/v2/models/numbers/ready"),
        head("Host: a", "Content-Length: 1001", path="/elsewhere"),
        head("Host: a", method="POST", path="/v2/models/numbers"),
        head("Host: a", path="/v2/models/num%ff/infer"),
    ],
)
async def test_what_names_no_inference_endpoint_is_none(data: bytes) -> None:
    frames = Frames()
    async with oip_bench(log=log_into(frames), limits=LIMITS) as bench:
        client = await bench.client()
        client.send(data)
        client.writer.write_eof()
        await client.reader.read()
        assert rows(bench, frames) == []


async def test_names_that_strangers_invent_are_bounded_and_make_no_model() -> None:
    frames = Frames()
    async with oip_bench(log=log_into(frames), limits=LIMITS) as bench:
        names = ["x" * 4000, "..%2f..%2fetc", "a%00b", "%C3%A9"]
        for name in names:
            await bench.ask(head("Host: a", "Content-Length: 1001", path=f"/v2/models/{name}/infer"))
            await bench.ask(http("POST", f"/v2/models/{name}/infer", b"{}"))
        found = rows(bench, frames)
        asked = [row.detail.asked_model or "" for row in found]
        assert asked[::2] == asked[1::2] == ["x" * MAX_TEXT, "../../etc", "a\0b", "é"]
        assert {(row.model, row.version, row.row.endpoint) for row in found} == {("", "", "infer")}


async def test_an_owner_who_wants_no_log_of_a_model_gets_none_of_its_refusals() -> None:
    frames = Frames()
    async with oip_bench(log=log_into(frames), limits=LIMITS) as bench:
        for version in bench.catalog.versions():
            version.wanted = replace(version.wanted, logged=LogPolicy(enabled=False))
        assert (await bench.ask(head("Host: a", "Content-Length: 1001"))).status == 413
        assert (await bench.ask(head("Host: a", "Content-Length: 1001", path="/v2/models/no/infer"))).status == 413
        assert [row.detail.asked_model for row in rows(bench, frames)] == ["no"]


async def test_a_note_that_fails_costs_no_refusal(caplog: pytest.LogCaptureFixture) -> None:
    frames = Frames()
    log = log_into(frames)
    async with oip_bench(log=log, limits=LIMITS) as bench:

        def broken(*_: Any) -> None:
            raise RuntimeError("odd")

        log.unresolved.refused = broken  # type: ignore[method-assign, assignment]
        assert (await bench.ask(head("Host: a", "Content-Length: 1001"))).status == 413
        assert (await bench.ask(http("POST", "/v2/models/nobody/infer", b"{}"))).status == 404
        assert log.outlet.statistics().lost_rows == 2
    assert "could not be noted" in caplog.text


def message(size: int, *, flag: int = 0, announced: int | None = None) -> bytes:
    """`size` zero bytes behind a prefix."""
    return struct.pack(">BI", flag, size if announced is None else announced) + bytes(size)


async def raw_call(
    bench: GrpcBench, method: str, body: bytes, fields: Sequence[tuple[bytes, bytes]] = (), *, end: bool = True
) -> dict[str, str]:
    """Headers and trailers of the answer to a call whose body is exactly `body`."""
    client = RawClient(*await asyncio.open_connection("127.0.0.1", bench.grpc_port))
    path = f"/inference.GRPCInferenceService/{method}".encode()
    asked = fields_for(path, (b"x-request-id", b"theirs"), *fields)
    client.send(PREFACE, settings({}), headers(1, asked, end=False), data(1, body, end=end))
    try:
        return await client.answer()
    finally:
        client.writer.transport.abort()


BOMB = prefixed(gzip.compress(bytes(50_000), mtime=0), 1)
GZIP = (b"grpc-encoding", b"gzip")
BROKEN_ANYWHERE = [
    (413, 8, message(0, announced=1001), []),
    (413, 8, BOMB, [GZIP]),
    (400, 13, message(4, flag=1), [GZIP]),
    (400, 13, message(4, flag=1), []),
    (501, 12, message(1), [(b"grpc-encoding", b"lzma")]),
    (400, 3, message(1), [(b"grpc-timeout", b"soon")]),
]
NOT_ONE_MESSAGE: list[Any] = [(501, 12, b"", []), (501, 12, message(1) + message(1), [])]
CUT_SHORT: list[Any] = [(400, 13, message(1)[:-1], [])]


@pytest.mark.parametrize(
    ("method", "status", "code", "body", "fields"),
    [
        *[("ModelInfer", *case) for case in BROKEN_ANYWHERE + NOT_ONE_MESSAGE],
        *[("ModelStreamInfer", *case) for case in BROKEN_ANYWHERE + CUT_SHORT],
    ],
)
async def test_what_grpc_refuses_before_a_message_is_read_is_a_row(
    method: str, status: int, code: int, body: bytes, fields: list[tuple[bytes, bytes]]
) -> None:
    frames = Frames()
    async with grpc_bench(log=log_into(frames), limits=Http2Limits(max_message_bytes=1000)) as bench:
        answer = await raw_call(bench, method, body, fields)
        assert answer["grpc-status"] == str(code)
        (row,) = rows(bench, frames)
        endpoint = "infer" if method == "ModelInfer" else "stream"
        assert (row.row.status, row.row.grpc_code, row.row.endpoint) == (status, code, endpoint)
        assert (row.id, row.row.client_request_id, row.model) == (answer["x-request-id"], "theirs", "")
        assert row.detail.error == answer["grpc-message"]


async def test_a_deadline_that_passes_before_the_message_came_is_a_row() -> None:
    frames = Frames()
    async with grpc_bench(log=log_into(frames)) as bench:
        answer = await raw_call(bench, "ModelInfer", b"", [(b"grpc-timeout", b"20m")], end=False)
        assert answer["grpc-status"] == "4"
        (row,) = rows(bench, frames)
        assert (row.row.status, row.row.grpc_code, row.id) == (504, 4, answer["x-request-id"])


async def test_calls_without_a_request_in_them_are_none() -> None:
    frames = Frames()
    async with grpc_bench(log=log_into(frames), limits=Http2Limits(max_message_bytes=1000)) as bench:
        for method in ("ModelMetadata", "Nothing"):
            answer = await raw_call(bench, method, message(0, announced=1001))
            assert answer["grpc-status"] != "0"
        assert (await raw_call(bench, "ModelStreamInfer", b""))["grpc-status"] == "0"
        late = await raw_call(bench, "ModelStreamInfer", b"", [(b"grpc-timeout", b"20m")], end=False)
        assert late["grpc-status"] == "4"
        assert rows(bench, frames) == []
