"""Compressed requests and answers over real sockets, protocol options, and the roads beside the plain one."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import struct
import threading
import uuid
import zlib
from typing import Any

import pytest

from gateway.ingress import body_coding
from gateway.ingress.body_coding import AT_ONCE_BYTES, BodyCoding
from gateway.protocol import content_coding
from gateway.protocol.options import ProtocolOptions
from tests.ingress.oip_bench import ILLEGIBLE, POISON, Answer, Bench, check, http, infer, oip_bench, replica_of
from tests.ingress.test_oip_http import complete, waiting

INFER = "/v2/models/numbers/infer"
LIMIT = 400_000
SMALL, LARGE = list(range(4)), list(range(6000))


def body_of(numbers: list[int]) -> bytes:
    return infer(numbers).partition(b"\r\n\r\n")[2]


def packed(body: bytes, coding: str) -> bytes:
    return gzip.compress(body) if coding == "gzip" else zlib.compress(body)


def sent(body: bytes, coding: str, *headers: str) -> bytes:
    return http("POST", INFER, packed(body, coding), f"Content-Encoding: {coding}", *headers)


def coding_of(answer: Answer) -> str | None:
    return dict(answer.headers).get("Content-Encoding")


def plain(answer: Answer) -> Answer:
    """The answer with its body as it was before it was compressed."""
    assert int(answer["Content-Length"]) == len(answer.body)
    coding = coding_of(answer)
    if coding is not None:
        unpacked = gzip.decompress(answer.body) if coding == "gzip" else zlib.decompress(answer.body)
        answer = Answer(answer.status, answer.headers, unpacked)
    return answer


async def large(bench: Bench) -> None:
    await bench.serve(version="3", oversize=True)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("numbers", [SMALL, LARGE], ids=["small", "large"])
async def test_compressed_requests(coding: str, numbers: list[int]) -> None:
    async with oip_bench() as bench:
        await large(bench)
        client = await bench.client()
        check(await client.ask(sent(body_of(numbers), coding)), numbers)
        check(await client.ask(infer([1])), [1])


async def test_a_compressed_binary_request() -> None:
    whole = infer(SMALL, binary=True)
    head, _, body = whole.partition(b"\r\n\r\n")
    (length,) = [line for line in head.decode().split("\r\n") if line.startswith("Inference-Header-Content-Length")]
    async with oip_bench() as bench:
        answer = await bench.ask(sent(body, "gzip", length))
        check(answer, SMALL)
        assert "Inference-Header-Content-Length" in answer


async def test_identity_is_no_compression() -> None:
    async with oip_bench() as bench:
        check(await bench.ask(infer([7], "Content-Encoding: identity")), [7])


@pytest.mark.parametrize("coding", ["br", "GZIP", "gzip, identity", "x-gzip", ""])
async def test_unknown_codings_are_refused_and_the_connection_lives_on(coding: str) -> None:
    async with oip_bench() as bench:
        client = await bench.client()
        answer = await client.ask(infer([1], f"Content-Encoding: {coding}"))
        assert answer.status == 501
        assert "Unsupported compression type" in answer.error
        assert answer["Accept-Encoding"] == "gzip, deflate"
        check(await client.ask(infer([1])), [1])


async def test_only_inference_takes_compressed_bodies() -> None:
    async with oip_bench() as bench:
        for method, path in (("GET", "/v2"), ("POST", "/v2/repository/index")):
            answer = await bench.ask(http(method, path, b"", "Content-Encoding: gzip"))
            assert answer.status == 501
            assert "without Content-Encoding" in answer.error
        assert (await bench.ask(http("GET", "/v2/nope", b"", "Content-Encoding: gzip"))).status == 404
        answer = await bench.ask(
            http("POST", "/v2/models/numbers/generate", packed(b"{}", "gzip"), "Content-Encoding: gzip")
        )
        assert answer.status == 400
        assert "only 'identity' is supported" in answer.error


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_broken_compressed_bodies(coding: str) -> None:
    whole = packed(body_of(SMALL), coding)
    async with oip_bench() as bench:
        client = await bench.client()
        for broken in (whole[:-3], whole + b"x", whole + whole, body_of(SMALL), zlib.compress(body_of(SMALL))[2:-4]):
            answer = await client.ask(http("POST", INFER, broken, f"Content-Encoding: {coding}"))
            assert answer.status == 400
            assert f"Content-Encoding {coding}" in answer.error
            assert "Inference-Model" in answer
        check(await client.ask(sent(body_of([1]), coding)), [1])


@pytest.mark.parametrize("size", [LIMIT + 1, 30_000_000])
async def test_a_body_that_inflates_beyond_the_limit(size: int) -> None:
    async with oip_bench(bodies=BodyCoding(LIMIT)) as bench:
        body = body_of([5])
        padded = body[:-1] + b" " * (LIMIT - len(body)) + b"}"
        check(await bench.ask(sent(padded, "gzip")), [5])
        answer = await bench.ask(sent(body + b" " * (size - len(body)), "gzip"))
        assert answer.status == 413
        assert f"maximum allowed input size of {LIMIT} bytes" in answer.error
    async with oip_bench(bodies=BodyCoding(LIMIT), options=ProtocolOptions(triton_status_codes=True)) as bench:
        answer = await bench.ask(sent(body + b" " * (size - len(body)), "gzip"))
        assert answer.status == 400


async def test_inflated_bytes_count_as_held_until_the_answer() -> None:
    padded = body_of([5])[:-1] + b" " * 300_000 + b"}"
    async with oip_bench() as bench:
        replica = replica_of(bench.catalog.find("numbers", "2"))
        replica.held = []
        client = await bench.client()
        client.send(sent(padded, "gzip"))
        await waiting(bench, 1)
        assert bench.server.statistics().held_bytes >= len(padded)
        replica.release()
        check(await client.answer(), [5])
        assert bench.server.statistics().held_bytes == 0
        bench.server._shared.held.limit_bytes = 200_000
        refused = await client.ask(sent(padded, "gzip"))
        assert refused.status == 503
        assert "200000 bytes" in refused.error
        assert refused["Retry-After"] == "1"


class Gate:
    """Holds the threads that inflate and deflate until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        where = body_coding if name == "_rest" else content_coding
        real = getattr(where, name)

        def held(*arguments: Any) -> Any:
            self.entered.set()
            self.opened.wait(30)
            return real(*arguments)

        monkeypatch.setattr(where, name, held)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 30)


async def test_inflating_a_large_body_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    padded = body_of([5])[:-1] + b" " * (AT_ONCE_BYTES * 2) + b"}"
    gate = Gate(monkeypatch, "_rest")
    async with oip_bench() as bench:
        client = await bench.client()
        client.send(sent(padded, "gzip"))
        await gate.reached()
        check(await bench.ask(infer([1])), [1])
        gate.opened.set()
        check(await client.answer(), [5])


async def test_a_model_that_is_replaced_while_a_body_is_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    padded = body_of([5])[:-1] + b" " * (AT_ONCE_BYTES * 2) + b"}"
    gate = Gate(monkeypatch, "_rest")
    async with oip_bench() as bench:
        client = await bench.client()
        client.send(sent(padded, "gzip"))
        await gate.reached()
        former = bench.catalog.find("numbers", "2")
        assert await bench.catalog.replace([former.wanted]) == []
        while former.scheduler is not None:
            await asyncio.sleep(0)
        gate.opened.set()
        check(await client.answer(), [5])
        assert bench.catalog.find("numbers", "2").statistics.inference_count == 1


async def test_a_caller_who_leaves_while_its_body_is_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    padded = body_of([5])[:-1] + b" " * (AT_ONCE_BYTES * 2) + b"}"
    gate = Gate(monkeypatch, "_rest")
    async with oip_bench() as bench:
        replica = replica_of(bench.catalog.find("numbers", "2"))
        client = await bench.client()
        client.send(sent(padded, "gzip"))
        await gate.reached()
        client.writer.transport.abort()
        while bench.server.statistics().open_connections:
            await asyncio.sleep(0)
        replica.held = []
        gate.opened.set()
        check_later = asyncio.ensure_future(bench.ask(infer([1])))
        await waiting(bench, 1)
        replica.release()
        check(await check_later, [1])
        assert bench.catalog.find("numbers", "2").statistics.inference_count == 1, (
            "the caller who left was not executed"
        )


async def test_deflating_a_large_answer_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "deflate")
    async with oip_bench() as bench:
        await large(bench)
        client = await bench.client()
        client.send(infer(LARGE, "Accept-Encoding: gzip"))
        await gate.reached()
        check(await bench.ask(infer([1])), [1])
        gate.opened.set()
        answer = await client.answer()
        assert coding_of(answer) == "gzip"
        check(plain(answer), LARGE)


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip;q=0.5, deflate;q=0.8", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("br", None),
        ("*", None),
        ("identity", None),
        ("gzip;q=0", None),
    ],
)
@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
@pytest.mark.parametrize("count", [1500, 6000])
async def test_compressed_answers(accepted: str, coding: str | None, binary: bool, count: int) -> None:
    numbers = list(range(count))
    async with oip_bench() as bench:
        await large(bench)
        client = await bench.client()
        answer = await client.ask(infer(numbers, f"Accept-Encoding: {accepted}", binary=binary))
        assert coding_of(answer) == coding
        check(plain(answer), numbers)
        assert ("Inference-Header-Content-Length" in answer) == binary
        assert "X-Request-Id" in answer
        assert "Inference-Batch" in answer
        assert bench.catalog.find("numbers", "3").statistics.protocol("http").codes == {200: 1}


async def test_small_answers_and_errors_stay_plain() -> None:
    async with oip_bench() as bench:
        client = await bench.client()
        answer = await client.ask(infer([1], "Accept-Encoding: gzip, deflate"))
        assert coding_of(answer) is None
        complete(answer)
        check(answer, [1])
        for data in (
            http("POST", INFER, b"{}", "Accept-Encoding: gzip"),
            http("GET", "/v2/models/numbers", b"", "Accept-Encoding: gzip"),
        ):
            assert coding_of(await client.ask(data)) is None


async def test_every_size_may_be_compressed_and_none() -> None:
    async with oip_bench(bodies=BodyCoding(LIMIT, min_bytes=0)) as bench:
        answer = await bench.ask(infer(SMALL, "Accept-Encoding: gzip"))
        assert coding_of(answer) == "gzip"
        check(plain(answer), SMALL)
        complete(answer)
    async with oip_bench(bodies=BodyCoding(LIMIT, min_bytes=0, level=0)) as bench:
        assert coding_of(await bench.ask(infer(SMALL, "Accept-Encoding: gzip"))) is None


async def test_an_answer_that_compression_makes_longer_stays_plain() -> None:
    async with oip_bench(bodies=BodyCoding(LIMIT, min_bytes=0)) as bench:
        noise = [int.from_bytes(os.urandom(8), "little", signed=True) // 4 for _ in range(8)]
        answer = await bench.ask(infer(noise, "Accept-Encoding: gzip", binary=True, outputs=["triple"]))
        assert plain(answer).body[-64:] == struct.pack("<8q", *(number * 3 for number in noise))
        assert coding_of(answer) in {None, "gzip"}
        assert len(answer.body) <= len(plain(answer).body)


async def test_an_error_for_a_caller_who_takes_compressed_answers() -> None:
    async with oip_bench(bodies=BodyCoding(LIMIT, min_bytes=0)) as bench:
        client = await bench.client()
        answer = await client.ask(infer([POISON], "Accept-Encoding: gzip"))
        assert answer.status == 500
        assert "Inference-Backend" in answer
        answer = await client.ask(infer([ILLEGIBLE], "Accept-Encoding: gzip"))
        assert answer.status == 400
        assert "UTF-8" in answer.error


# -- options -------------------------------------------------------------------------------------------------------


async def test_ids_are_invented_where_the_owner_wants_it() -> None:
    async with oip_bench(options=ProtocolOptions(invent_ids=True)) as bench:
        seen = set()
        for data in (infer([1]), infer([1], "Accept-Encoding: gzip"), infer([1], binary=True)):
            answer = await bench.ask(data)
            check(answer, [1])
            seen.add(uuid.UUID(answer.document["id"]))
        assert len(seen) == 3
        assert (await bench.ask(infer([1], request_id="7"))).document["id"] == "7"
    async with oip_bench() as bench:
        assert "id" not in (await bench.ask(infer([1]))).document


MALFORMED = [
    b"[]",
    b"{",
    b"{}",
    b'{"id":7,"inputs":[]}',
    body_of([1]).replace(b"[1]", b"[1,2]"),
    body_of([1]).replace(b"[1]", b'["x"]'),
    body_of([1]).replace(b"[1, 1]", b"[1, -1]"),
    body_of([1])[:-1] + b',"parameters":{"priority":-1}}',
]
INVALID = [
    body_of([1]).replace(b"number", b"X"),
    body_of([1]).replace(b"INT64", b"INT65"),
    body_of([1]).replace(b"[1, 1]", b"[0, 1]").replace(b"[1]", b"[]"),
    body_of([1])[:-1] + b',"parameters":{"a":null}}',
    b'{"inputs":[]}',
]


@pytest.mark.parametrize("triton", [False, True])
async def test_status_of_what_cannot_be_read(triton: bool) -> None:
    async with oip_bench(options=ProtocolOptions(triton_status_codes=triton)) as bench:
        client = await bench.client()
        for body in MALFORMED:
            answer = await client.ask(http("POST", INFER, body))
            assert (answer.status, bool(answer.error)) == (500 if triton else 400, True), body
        for body in INVALID:
            answer = await client.ask(http("POST", INFER, body))
            assert (answer.status, bool(answer.error)) == (400, True), body


async def test_a_raw_request_is_a_body_without_json() -> None:
    async with oip_bench() as bench:
        client = await bench.client()
        raw = struct.pack("<q", 5)
        answer = await client.ask(http("POST", INFER, raw, "Inference-Header-Content-Length: 0"))
        check(answer, [5])
        answer = await client.ask(http("POST", INFER, b"", "Inference-Header-Content-Length: 0"))
        assert answer.status == 400
        assert "byte size mismatch" in answer.error
        answer = await client.ask(http("POST", INFER, b""))
        assert answer.status == 400
        assert "JSON" in answer.error


async def test_classification_over_http() -> None:
    async with oip_bench() as bench:
        client = await bench.client()
        document = json.loads(body_of([4, 5]))
        document["outputs"] = [{"name": "triple", "parameters": {"classification": 3}}, {"name": "name"}]
        answer = await client.ask(http("POST", INFER, json.dumps(document).encode()))
        assert answer.status == 200, answer.body
        first, second = answer.document["outputs"]
        assert first == {"name": "triple", "datatype": "BYTES", "shape": [2, 1], "data": ["12:0", "15:0"]}
        assert second["data"] == ["n4", "n5"]
        document["outputs"][1]["parameters"] = {"classification": 1}
        answer = await client.ask(http("POST", INFER, json.dumps(document).encode()))
        assert answer.status == 400
        assert "'name'" in answer.error
