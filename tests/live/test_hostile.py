"""Hostile and broken clients against a live gateway: each is told so and cut off where its framing is not to be
trusted; nobody else notices, and nothing they send stays in memory.

The corpus is what let requests be smuggled past other servers (resilience notes F56–F68 and fact 6).
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.live import models
from tests.live.alone import Alone, check
from tests.live.gateway_process import GatewayProcess, gateway, until
from tests.live.in_process import gather_all
from tests.live.oip_wire import Answer, Connection, Request, Tensor, connect

MODELS = {"whole": models.whole_linear(), "id_bytes": models.identity("BYTES"), "two": models.two_inputs()}
HOST = b"Host: test\r\n"
INFER = b"POST /v2/models/whole/infer HTTP/1.1\r\n"
GOOD_BODY = b'{"inputs":[{"name":"x","shape":[1,6],"datatype":"FP32","data":[1,2,3,4,5,6]}]}'
SMUGGLED = b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n\r\n"
GROWTH_BYTES = 30 * 1024 * 1024


def framed(body: bytes, *fields: bytes) -> bytes:
    lines = b"".join([field + b"\r\n" for field in fields])
    return INFER + HOST + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body


MUST_REJECT = {
    "length and chunked": INFER + HOST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "two lengths": INFER + HOST + b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n" + SMUGGLED,
    "length list": INFER + HOST + b"Content-Length: 0, 44\r\n\r\n" + SMUGGLED,
    "length plus": INFER + HOST + b"Content-Length: +0\r\n\r\n" + SMUGGLED,
    "length minus": INFER + HOST + b"Content-Length: -1\r\n\r\n" + SMUGGLED,
    "length hex": INFER + HOST + b"Content-Length: 0x2c\r\n\r\n" + SMUGGLED,
    "length underscore": INFER + HOST + b"Content-Length: 4_4\r\n\r\n" + SMUGGLED,
    "length beyond 64 bits": INFER + HOST + b"Content-Length: 18446744073709551617\r\n\r\n" + SMUGGLED,
    "space before colon": INFER + HOST + b"Content-Length : 44\r\n\r\n" + SMUGGLED,
    "bare LF": b"GET /v2 HTTP/1.1\nHost: test\n\n" + SMUGGLED,
    "folded header": INFER + HOST + b"X-A: b\r\n c: d\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    "NUL in header": INFER + HOST + b"X-A: \0\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    "CR in header": INFER + HOST + b"X-A: a\rb\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    "no host": INFER + b"Content-Length: 0\r\n\r\n" + SMUGGLED,
    "two hosts": INFER + HOST + HOST + b"Content-Length: 0\r\n\r\n" + SMUGGLED,
    "HTTP/0.9": b"GET /v2\r\n" + SMUGGLED,
    "HTTP/2.0": b"GET /v2 HTTP/2.0\r\n" + HOST + b"\r\n" + SMUGGLED,
    "HTTP/1.2": b"GET /v2 HTTP/1.2\r\n" + HOST + b"\r\n" + SMUGGLED,
    "chunked on 1.0": b"POST /v2 HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "unknown coding": INFER + HOST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked twice": INFER + HOST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked not last": INFER + HOST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunk size with sign": INFER + HOST + b"Transfer-Encoding: chunked\r\n\r\n+0\r\n\r\n" + SMUGGLED,
    "chunk size 0x": INFER + HOST + b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n" + SMUGGLED,
    "chunk size too long": INFER + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 17 + b"\r\n" + SMUGGLED,
    "chunk ends with LF": INFER + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\n\n" + SMUGGLED,
    "chunk longer than said": INFER + HOST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n" + SMUGGLED,
    "chunk extension of 100 kB": INFER + HOST + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"a" * 100_000 + b"\r\na\r\n",
    "70000 chunks": INFER + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 70_000,
    "huge trailer": INFER + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"a" * 10_000 + b"\r\n\r\n",
    "300 headers": INFER + HOST + b"".join(b"X-%d: a\r\n" % n for n in range(300)) + b"Content-Length: 0\r\n\r\n",
    "header of 1 MiB": INFER + HOST + b"X-A: " + b"a" * 2**20 + b"\r\n\r\n",
    "URL of 1 MiB": b"GET /v2/" + b"a" * 2**20 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "method junk": b"G@T /v2 HTTP/1.1\r\n" + HOST + b"\r\n" + SMUGGLED,
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x42" * 200,
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "random": random.Random(1).randbytes(4096),
}

NESTED = b'{"inputs":[{"name":"x","shape":[1,6],"datatype":"FP32","data":' + b"[" * 200_000 + b"]" * 200_000 + b"}]}"


def of_shape(shape: str) -> bytes:
    return b'{"inputs":[{"name":"x","shape":%b,"datatype":"FP32","data":[]}]}' % shape.encode()


BAD_REQUESTS = {
    "cut short": framed(GOOD_BODY[:-7]),
    "garbage": framed(random.Random(2).randbytes(500)),
    "garbage behind": framed(GOOD_BODY + b"x"),
    "array": framed(b"[]"),
    "empty": framed(b""),
    "200k deep": framed(NESTED),
    "200k deep objects": framed(b'{"a":' * 200_000),
    "200k deep in an unknown key": framed(GOOD_BODY[:-1] + b',"k":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "dims 2^63": framed(of_shape(f"[{2**63}, 6]")),
    "dims 2^64": framed(of_shape(f"[{2**64}, 6]")),
    "product overflow": framed(of_shape(f"[{2**40}, {2**40}]")),
    "negative dim": framed(of_shape("[-1, 6]")),
    "float dim": framed(of_shape("[1.0, 6]")),
    "bool dim": framed(of_shape("[true, 6]")),
    "rows without data": framed(of_shape(f"[{2**31}, 6]")),
    "shape of 1000 dims": framed(of_shape(str([1] * 1000))),
    "deep shape": framed(of_shape("[" * 1000 + "]" * 1000)),
    "number 1e999": framed(GOOD_BODY.replace(b"[1,2", b"[1e999,2")),
    "bool for number": framed(GOOD_BODY.replace(b"[1,2", b"[true,2")),
    "string for number": framed(GOOD_BODY.replace(b"[1,2", b'["1",2')),
    "duplicate key": framed(GOOD_BODY[:-1] + b',"inputs":[]}'),
    "duplicate input": framed(GOOD_BODY.replace(b"[{", b"[{").replace(b"}]}", b"}," + GOOD_BODY[11:-1] + b"}")),
    "UTF-16": framed(GOOD_BODY.decode().encode("utf-16")),
    "BOM": framed(b"\xef\xbb\xbf" + GOOD_BODY),
    "bad UTF-8": framed(GOOD_BODY[:-1] + b',"id":"\xff\xfe"}'),
    "lone surrogate": framed(GOOD_BODY[:-1] + rb',"id":"\ud800"}'),
    "header length junk": framed(GOOD_BODY, b"Inference-Header-Content-Length: abc"),
    "header length negative": framed(GOOD_BODY, b"Inference-Header-Content-Length: -1"),
    "header length beyond body": framed(GOOD_BODY, b"Inference-Header-Content-Length: 9999"),
    "header length 2^64": framed(GOOD_BODY, b"Inference-Header-Content-Length: 18446744073709551616"),
    "header length underscore": framed(GOOD_BODY, b"Inference-Header-Content-Length: 1_0"),
    "blob of 2^62": framed(
        b'{"inputs":[{"name":"x","shape":[1,6],"datatype":"FP32","parameters":{"binary_data_size":%d}}]}' % 2**62
    ),
    "timeout junk": framed(GOOD_BODY, b"X-Request-Timeout-Ms: soon"),
    "other model": framed(GOOD_BODY).replace(b"/whole/", b"/%2e%2e%2fwhole%0d%0aX:/"),
    "unknown coding": framed(GOOD_BODY, b"Content-Encoding: br"),
}


def bytes_overrun() -> bytes:
    text = b'{"inputs":[{"name":"x","shape":[1,1],"datatype":"BYTES","parameters":{"binary_data_size":8}}]}'
    length = b"Inference-Header-Content-Length: %d" % len(text)
    return framed(text + b"\xff\xff\xff\xffabcd", length).replace(b"/whole/", b"/id_bytes/")


BAD_REQUESTS["BYTES length 2^32-1"] = bytes_overrun()


@pytest.fixture(scope="module")
def alone() -> Alone:
    return Alone(MODELS["whole"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    directory = tmp_path_factory.mktemp("hostile")
    models.repository(directory / "models", MODELS)
    config = directory / "gateway.yaml"
    config.write_text(
        "server:\n  workers: 2\n  limits: {header_timeout_s: 1, idle_timeout_s: 600, min_body_rate_bytes_s: 1000}\n"
        "models: [{source: ./models}]\n"
    )
    with gateway("serve", "-c", str(config)) as process:
        yield process


class GoodClient:
    """Keeps asking on one kept-alive connection in a thread of its own; nothing may ever go wrong on it."""

    def __init__(self, port: int, alone: Alone) -> None:
        self.answers = 0
        self._port = port
        self._alone = alone
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> GoodClient:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        until(lambda: self.answers > 3 or not self._thread.is_alive(), 60, "no answers")
        self._stop.set()
        self._thread.join(60)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            asyncio.run(self._ask())
        except BaseException as error:  # handed to the test's thread
            self._error = error

    async def _ask(self) -> None:
        rng = np.random.default_rng(0)
        async with connect(self._port) as connection:
            while not self._stop.is_set():
                array = rng.integers(-99, 100, (2, 6)).astype(np.float32)
                request = Request("whole", [Tensor("x", "FP32", array)], request_id=str(self.answers))
                async with asyncio.timeout(30):
                    check(request, await connection.ask(request), self._alone)
                self.answers += 1


async def hostile(port: int, data: bytes) -> tuple[list[Answer], bool]:
    """What comes back until the gateway closes, and whether it did. We never close first."""
    connection = await Connection.open(port)
    answers = []
    try:
        async with asyncio.timeout(60):
            connection.writer.write(data)
            while True:
                answers.append(await connection.receive())
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise AssertionError(f"not an answer: {error.partial[:200]!r}") from None
        return answers, True
    except ConnectionError:
        return answers, True
    finally:
        connection.abort()


# -- framing ---------------------------------------------------------------------------------------------------------


def test_whatever_could_smuggle_is_refused_and_cut_off(served: GatewayProcess, alone: Alone) -> None:
    async def story() -> dict[str, tuple[list[Answer], bool]]:
        results = await gather_all([hostile(served.port, data) for data in MUST_REJECT.values()])
        return dict(zip(MUST_REJECT, results, strict=True))

    with GoodClient(served.port, alone):
        outcome = asyncio.run(story())
    for name, (answers, closed) in outcome.items():
        assert closed, name
        assert len(answers) == 1, f"{name}: {[answer.status for answer in answers]}"
        assert 400 <= answers[0].status < 500 or answers[0].status in {501, 505}, f"{name}: {answers[0]}"
        assert answers[0].header("Content-Type") == "application/json", name
        assert answers[0].header("Connection") == "close", name
        assert answers[0].error, name


@pytest.mark.parametrize("name", ["two lengths", "length and chunked", "bare LF", "no host", "random"])
def test_it_makes_no_difference_how_the_bytes_arrive(served: GatewayProcess, name: str) -> None:
    async def story() -> tuple[int, bool]:
        async with connect(served.port) as connection:
            try:
                for byte in MUST_REJECT[name][:200]:
                    await connection.send(bytes([byte]))
                answer = await connection.receive()
                return answer.status, await connection.closed()
            except ConnectionError:
                return 400, True

    assert asyncio.run(story()) == (400, True)


def test_an_honest_request_ahead_is_answered_and_one_behind_is_not(served: GatewayProcess) -> None:
    stream = framed(GOOD_BODY) + MUST_REJECT["two lengths"] + framed(GOOD_BODY)
    answers, closed = asyncio.run(hostile(served.port, stream))
    assert [answer.status for answer in answers] == [200, 400]
    assert closed


# -- requests --------------------------------------------------------------------------------------------------------


def test_bad_requests_are_explained_and_the_connection_lives_on(served: GatewayProcess, alone: Alone) -> None:
    """The framing is intact, so only the request is refused: the next one on the connection is answered."""

    async def story() -> dict[str, Answer]:
        found = {}
        async with connect(served.port) as connection:
            for name, data in BAD_REQUESTS.items():
                await connection.send(data)
                found[name] = await connection.receive()
                request = Request("whole", [Tensor("x", "FP32", np.ones((1, 6), np.float32))], request_id=name)
                check(request, await connection.ask(request), alone)
        return found

    with GoodClient(served.port, alone):
        found = asyncio.run(story())
    for name, answer in found.items():
        assert answer.status in {400, 404, 501}, f"{name}: {answer.status} {answer.body[:200]!r}"
        assert answer.error, name
        assert "Traceback" not in answer.error, name
        assert len(answer.error) < 1000, name


def test_a_body_over_the_limit_is_413_before_it_is_sent(served: GatewayProcess, alone: Alone) -> None:
    with GoodClient(served.port, alone):
        head = INFER + HOST + b"Content-Length: %d\r\n\r\n" % (64 * 2**20 + 1)
        answers, closed = asyncio.run(hostile(served.port, head))
        assert [answer.status for answer in answers] == [413]
        assert "67108864" in answers[0].error
        assert closed


def test_a_chunked_body_over_the_limit_is_413(served: GatewayProcess, alone: Alone) -> None:
    chunk = b"100000\r\n" + b"a" * 2**20 + b"\r\n"
    with GoodClient(served.port, alone):
        data = INFER + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 65
        answers, closed = asyncio.run(hostile(served.port, data))
    assert closed
    assert [answer.status for answer in answers] in ([413], [])  # a reset may overtake it while we still send


def test_names_with_line_breaks_stay_out_of_headers_and_log(served: GatewayProcess) -> None:
    data = b"GET /v2/models/a%0d%0aInjected:%20yes%0a2026-01-01T00:00:00Z%20ERROR/ready HTTP/1.1\r\n" + HOST + b"\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as client:
        client.sendall(data)
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"Injected: yes" not in answer.partition(b"\r\n\r\n")[0]
    assert not [line for line in served.output().splitlines() if line.startswith(("Injected", "2026-01-01"))]


# -- slowness --------------------------------------------------------------------------------------------------------


def test_slow_heads_are_given_up_and_hold_nobody_up(served: GatewayProcess, alone: Alone) -> None:
    """200 connections that send a head one byte at a time, against a header timeout of one second."""

    async def loris() -> Answer:
        async with connect(served.port) as connection:
            reading = asyncio.create_task(connection.receive())
            for byte in INFER * 100:
                connection.writer.write(bytes([byte]))
                done, _ = await asyncio.wait({reading}, timeout=0.1)
                if done:
                    break
            return await reading

    async def story() -> list[Answer]:
        async with asyncio.timeout(120):
            return await gather_all([loris() for _ in range(200)])

    with GoodClient(served.port, alone) as good:
        before = good.answers
        answers = asyncio.run(story())
        assert good.answers > before
    assert {answer.status for answer in answers} == {408}
    assert all(answer.header("Connection") == "close" for answer in answers)


@pytest.mark.slow
def test_slow_bodies_are_given_up(served: GatewayProcess, alone: Alone) -> None:
    """Below 1000 bytes a second after five seconds of grace."""

    async def story() -> Answer:
        async with connect(served.port) as connection:
            connection.writer.write(INFER + HOST + b"Content-Length: 100000\r\n\r\n")
            reading = asyncio.create_task(connection.receive())
            for _ in range(1000):
                connection.writer.write(b" ")
                done, _ = await asyncio.wait({reading}, timeout=0.1)
                if done:
                    break
            return await reading

    with GoodClient(served.port, alone):
        assert asyncio.run(story()).status == 408


# -- memory ----------------------------------------------------------------------------------------------------------


def rss_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def besiege(served: GatewayProcess, requests: int) -> None:
    """`requests` hostile requests over 8 connections at a time, small ones mostly, none of them answered with 2xx."""
    small = [data for data in [*MUST_REJECT.values(), *BAD_REQUESTS.values()] if len(data) < 20_000]
    refusable = [data for data in BAD_REQUESTS.values() if len(data) < 20_000]

    async def attacker(number: int) -> None:
        rng = random.Random(number)
        sent = 0
        while sent < requests // 8:
            connection = await Connection.open(served.port)
            batch = [rng.choice(refusable) for _ in range(50)]
            connection.writer.write(b"".join(batch) + rng.choice(small))
            for _ in batch:
                assert (await connection.receive()).status >= 400
            connection.abort()
            sent += 51

    asyncio.run(_all(attacker))


async def _all(attacker: object) -> None:
    assert callable(attacker)
    await gather_all([attacker(number) for number in range(8)])


@pytest.mark.slow
def test_twenty_thousand_hostile_requests_leave_nothing_behind(served: GatewayProcess, alone: Alone) -> None:
    pids = [served.process.pid, *[worker["pid"] for worker in served.workers()]]
    with GoodClient(served.port, alone):
        besiege(served, 2_000)
        before = [rss_bytes(pid) for pid in pids]
        besiege(served, 20_000)
    until(lambda: served.metric("gateway_http_open_connections") == 0, 60, "connections are left")
    growth = [rss_bytes(pid) - was for pid, was in zip(pids, before, strict=True)]
    assert max(growth) < GROWTH_BYTES, growth
    assert served.metric("gateway_http_held_bytes") == 0
    assert served.metric("gateway_queue_rows") == 0
    assert [worker["pid"] for worker in served.workers()] == pids[1:]
    assert json.loads(served.request("GET", "/v2/health/live")[2])["live"]
