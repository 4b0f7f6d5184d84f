"""Inference over HTTP: answers, their provenance, their encodings, what is counted, and what is left behind."""

from __future__ import annotations

import asyncio
import functools
import gc
from collections.abc import Callable

import pytest

from gateway.core.admission import deadline_of
from gateway.core.traits import WORKER, Traits
from gateway.errors import InvalidRequest, NotReady
from gateway.ingress.http_connection import Connection
from gateway.ingress.http_server import Exchange
from gateway.ingress.oip_http import JOINED_BYTES, HttpCodec
from gateway.protocol.http1 import Head
from gateway.protocol.oip_answer import AnswerEncoder, BatchEncoder
from gateway.provenance.headers import Member, ModelReference, Provenance, parse
from tests.ingress.oip_bench import (
    ILLEGIBLE,
    MAX_QUEUE_ROWS,
    POISON,
    Answer,
    Bench,
    check,
    http,
    infer,
    oip_bench,
    replica_of,
)

MODEL = ModelReference("numbers", "2", "sha256:" + "12" * 32)
INFER = "/v2/models/numbers/infer"


def provenance_of(answer: Answer) -> Provenance:
    return parse(answer.headers)


def complete(answer: Answer, members: int = 1) -> Provenance:
    """All provenance headers are there, once each, and make sense."""
    found = provenance_of(answer)
    assert found.model == MODEL
    assert found.request_id == answer["X-Request-Id"]
    assert len(found.members) == members
    timings = found.timings_ms
    assert list(timings) == ["queue", "infer", "total"]
    assert 0.0 <= timings["queue"] <= timings["total"]
    assert timings["queue"] + timings["infer"] <= timings["total"] + 0.02, "each is rounded to 0.01 ms"
    for member in found.members:
        assert (member.backend, member.attempt) == ("onnx-1", 1)
        assert 0 <= member.row < member.size
    return found


def codes(bench: Bench) -> dict[int, int]:
    return bench.catalog.find("numbers", "2").statistics.protocol("http").codes


async def settled(bench: Bench) -> None:
    """Until no request is on its way."""
    while bench.server.statistics().in_flight:
        await asyncio.sleep(0)


# -- answers and provenance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("connection", ["", "Connection: close"])
async def test_an_answer_says_where_it_comes_from(binary: bool, connection: str) -> None:
    async with oip_bench() as bench:
        client = await bench.client()
        answer = await client.ask(infer([5, 6, 7], *([connection] if connection else []), binary=binary))
        check(answer, [5, 6, 7])
        (member,) = complete(answer).members
        assert (member.size, member.row) == (3, 0)
        assert ("Connection" in answer) == bool(connection)
        if connection:
            assert answer["Connection"] == "close"
            assert await client.ended()
        else:
            check(await client.ask(infer([8])), [8])


async def waiting(bench: Bench, count: int) -> None:
    """Until `count` requests wait or run."""
    scheduler = bench.catalog.find("numbers", "2").scheduler
    assert scheduler is not None
    while scheduler.pending < count:
        await asyncio.sleep(0)


@pytest.mark.parametrize("binary", [False, True])
async def test_the_members_of_a_batch_have_rows_and_ids_of_their_own(binary: bool) -> None:
    async with oip_bench() as bench:
        replica = replica_of(bench.catalog.find("numbers", "2"))
        replica.held = []
        clients = [await bench.client() for _ in range(6)]
        asked = [[0], [10], [20, 21], [30], [40, 41, 42], [50]]
        clients[0].send(infer(asked[0]))
        await waiting(bench, 1)
        for place, client in enumerate(clients[1:], 1):
            client.send(infer(asked[place], binary=binary and place % 2 == 0))
            await waiting(bench, place + 1)
        replica.release()
        answers = [await client.answer() for client in clients]
        for numbers, answer in zip(asked, answers, strict=True):
            check(answer, numbers)
        found = [complete(answer) for answer in answers]
        assert len({one.request_id for one in found}) == 6
        first, *rest = [one.members[0] for one in found]
        assert (first.size, first.row) == (1, 0)
        assert [(member.size, member.row) for member in rest] == [(8, 0), (8, 1), (8, 3), (8, 4), (8, 7)]
        assert len({member.batch_id for member in rest}) == 1
        assert first.batch_id != rest[0].batch_id


@pytest.mark.parametrize("rows", [1, 20])
async def test_an_answer_of_a_remote_backend_names_no_digest(rows: int) -> None:
    """Also where a request was split: 20 rows are three batches."""
    async with oip_bench(models=False) as bench:
        replica = replica_of(await bench.serve(max_batch_size=8, oversize=True))
        for kind, known in ((Traits("oip", server="far"), False), (WORKER, True)):
            replica.traits = kind
            answer = await bench.ask(infer(list(range(rows))))
            check(answer, list(range(rows)))
            assert ("digest=" in answer["Inference-Model"]) is known


@pytest.mark.parametrize("binary", [False, True])
async def test_a_split_answer_lists_every_batch_it_ran_in(binary: bool) -> None:
    async with oip_bench(models=False) as bench:
        await bench.serve(version="2", max_batch_size=4, oversize=True)
        numbers = list(range(100, 110))
        answer = await bench.ask(infer(numbers, binary=binary, request_id="mine"))
        check(answer, numbers)
        assert answer.document["id"] == "mine"
        members = complete(answer, members=3).members
        assert [(member.size, member.row) for member in members] == [(4, 0), (4, 0), (2, 0)]
        assert len({member.batch_id for member in members}) == 3
        assert codes(bench) == {200: 1}


async def test_where_the_size_is_stated_a_larger_request_is_refused() -> None:
    async with oip_bench() as bench:
        answer = await bench.ask(infer(list(range(9))))
        assert answer.status == 400
        assert "inference request batch-size must be <= 8 for 'numbers'" in answer.error


async def test_keys_and_their_order_and_nothing_of_the_request_but_its_id() -> None:
    async with oip_bench() as bench:
        answer = await bench.ask(infer([1], request_id='a"%d\u2028é', parameters={"colour": "blue"}))
        document = answer.document
        assert list(document) == ["id", "model_name", "model_version", "outputs"]
        assert (document["id"], document["model_name"], document["model_version"]) == ('a"%d\u2028é', "numbers", "2")
        assert [list(output) for output in document["outputs"]] == [["name", "datatype", "shape", "data"]] * 2
        assert list((await bench.ask(infer([1]))).document) == ["model_name", "model_version", "outputs"]


async def test_chosen_outputs_come_alone() -> None:
    async with oip_bench() as bench:
        for name in ("name", "triple"):
            (output,) = (await bench.ask(infer([2], outputs=[name]))).document["outputs"]
            assert (output["name"], output["data"]) == (name, ["n2"] if name == "name" else [6])


@pytest.mark.parametrize("binary", [False, True])
async def test_large_answers_are_like_small_ones(binary: bool) -> None:
    async with oip_bench(models=False) as bench:
        await bench.serve(version="2", max_batch_size=100_000)
        client = await bench.client()
        small, large = [1234], list(range(10_000))
        answers = []
        for numbers in (small, large, small):
            answers.append(await client.ask(infer(numbers, binary=binary)))
            check(answers[-1], numbers)
            complete(answers[-1])
        assert len(answers[0].body) < JOINED_BYTES < len(answers[1].body)
        names = [sorted(name for name, _ in answer.headers) for answer in answers]
        assert names[0] == names[1] == names[2]
        assert len(names[0]) == len(set(names[0]))


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("size", [1, 10_000])
async def test_http_1_0(binary: bool, size: int) -> None:
    async with oip_bench(models=False) as bench:
        await bench.serve(version="2", max_batch_size=100_000)
        numbers = list(range(size))
        client = await bench.client()
        answer = await client.ask(infer(numbers, "Connection: keep-alive", binary=binary, protocol="HTTP/1.0"))
        check(answer, numbers)
        complete(answer)
        assert answer["Connection"] == "keep-alive"
        answer = await client.ask(infer(numbers, binary=binary, protocol="HTTP/1.0"))
        check(answer, numbers)
        complete(answer)
        assert await client.ended()


# -- refusals --------------------------------------------------------------------------------------------------------


def refused(answer: Answer, status: int, text: str) -> None:
    assert answer.status == status, answer.body
    assert text in answer.error
    found = provenance_of(answer)
    assert found.model == MODEL, "once the model is known, every answer says which it is"
    assert found.request_id
    assert found.members == ()


@pytest.mark.parametrize(
    "value", ["abc", "0", "000", "-1", "+5", "1.5", "1e3", "", "5ms", "0x10", "9" * 13, "\xb2", "5, 6"]
)
async def test_a_timeout_header_that_is_no_number_is_refused(value: str) -> None:
    async with oip_bench() as bench:
        client = await bench.client()
        refused(await client.ask(infer([1], f"X-Request-Timeout-Ms: {value}")), 400, "whole number of milliseconds")
        check(await client.ask(infer([2], "X-Request-Timeout-Ms: 60000")), [2])
        assert codes(bench) == {400: 1, 200: 1}


async def test_a_timeout_that_passes_is_a_504_for_its_caller_only() -> None:
    async with oip_bench() as bench:
        replica = replica_of(bench.catalog.find("numbers", "2"))
        replica.held = []
        first, hasty, patient = [await bench.client() for _ in range(3)]
        first.send(infer([1]))
        await waiting(bench, 1)
        patient.send(infer([3]))
        await waiting(bench, 2)
        hasty.send(infer([2], "X-Request-Timeout-Ms: 1"))
        refused(await hasty.answer(), 504, "Request timeout expired")
        replica.release()
        check(await first.answer(), [1])
        check(await patient.answer(), [3])
        assert codes(bench) == {504: 1, 200: 2}


@pytest.mark.parametrize(
    ("parameter_us", "header", "expected_s"),
    [(None, None, 0.0), (None, b"250", 0.25), (100_000, b"250", 0.1), (500_000, b"250", 0.25), (500_000, None, 0.5)],
)
async def test_the_shorter_timeout_holds(parameter_us: int | None, header: bytes | None, expected_s: float) -> None:
    async with oip_bench() as bench:
        codec = HttpCodec(bench.catalog.find("numbers", "2"))
        body = infer([1], parameters={} if parameter_us is None else {"timeout": parameter_us})
        head = Head(b"POST", b"/")
        head.request_timeout_ms = header
        connection = Connection(bench.server._shared)
        exchange = Exchange(connection, head, 7.0, 0)
        request = codec.decode(head, body.partition(b"\r\n\r\n")[2], exchange)
        assert (request.received, request.context) == (7.0, exchange)
        assert deadline_of(bench.catalog.find("numbers", "2").spec.policy, request) == 7.0 + (expected_s or 30.0)
        head.request_timeout_ms = b"0"
        with pytest.raises(InvalidRequest):
            codec.decode(head, body.partition(b"\r\n\r\n")[2], exchange)


@pytest.mark.parametrize("value", ["9999", "-1", "abc", "", "1.5", "0x10", "9" * 19, "\xb2"])
async def test_a_header_length_that_makes_no_sense_is_refused(value: str) -> None:
    async with oip_bench() as bench:
        client = await bench.client()
        body = infer([1]).partition(b"\r\n\r\n")[2]
        answer = await client.ask(http("POST", INFER, body, f"Inference-Header-Content-Length: {value}"))
        refused(answer, 400, f"inference header size should be in range (0, {len(body)})")
        check(await client.ask(infer([2])), [2])


async def test_a_header_length_as_long_as_the_body_is_plain_json() -> None:
    async with oip_bench() as bench:
        body = infer([1]).partition(b"\r\n\r\n")[2]
        check(await bench.ask(http("POST", INFER, body, f"Inference-Header-Content-Length: {len(body)}")), [1])


@pytest.mark.parametrize("binary", [False, True])
async def test_a_text_that_is_no_utf_8_fails_its_own_caller_only(binary: bool) -> None:
    async with oip_bench() as bench:
        replica = replica_of(bench.catalog.find("numbers", "2"))
        replica.held = []
        clients = [await bench.client() for _ in range(4)]
        asked = [[1], [2], [ILLEGIBLE, 3], [4]]
        for place, client in enumerate(clients):
            client.send(infer(asked[place], binary=binary and place == 2))
            await waiting(bench, place + 1)
        replica.release()
        answers = [await client.answer() for client in clients]
        for place in (0, 1, 3):
            check(answers[place], asked[place])
        sizes = [provenance_of(answers[place]).members[0].size for place in (1, 3)]
        assert sizes == [4, 4], "they shared a batch"
        if binary:
            assert answers[2].status == 200
            assert answers[2].body.endswith(b"\2\0\0\0\xff\xfe\2\0\0\0n3")
            assert codes(bench) == {200: 4}
        else:
            refused(answers[2], 400, "ask for it with the parameter binary_data: true")
            assert codes(bench) == {200: 3, 400: 1}


async def test_the_models_own_failure_is_a_500_for_its_caller_only() -> None:
    async with oip_bench() as bench:
        replica = replica_of(bench.catalog.find("numbers", "2"))
        replica.held = []
        clients = [await bench.client() for _ in range(4)]
        asked = [[1], [2], [POISON], [4]]
        for place, client in enumerate(clients):
            client.send(infer(asked[place]))
            await waiting(bench, place + 1)
        replica.release()
        refused(await clients[2].answer(), 500, "model 'numbers' failed: poison")
        for place in (0, 1, 3):
            check(await clients[place].answer(), asked[place])
        assert codes(bench) == {200: 3, 500: 1}


async def test_an_answer_that_cannot_be_encoded_is_a_500_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with oip_bench() as bench:
        client = await bench.client()
        for owner in (AnswerEncoder, BatchEncoder):
            with monkeypatch.context() as patch:
                patch.setattr(owner, "encode_json" if owner is AnswerEncoder else "__init__", lambda *_: 1 / 0)
                refused(await client.ask(infer([1])), 500, "the gateway failed on this request")
        assert "ZeroDivisionError" in caplog.text
        check(await client.ask(infer([2])), [2])
        assert codes(bench) == {500: 2, 200: 1}


async def test_malformed_and_refused_requests_are_counted_by_their_code() -> None:
    async with oip_bench() as bench:
        client = await bench.client()
        refused(await client.ask(http("POST", INFER, b"{")), 400, "JSON")
        refused(await client.ask(http("POST", INFER, b'{"inputs": []}')), 400, "expected 1 inputs but got 0 inputs")
        scheduler = bench.catalog.find("numbers", "2").scheduler
        assert scheduler is not None
        scheduler.close(NotReady("closing time"))
        answer = await client.ask(infer([1]))
        refused(answer, 503, "closing time")
        assert "Retry-After" in answer
        scheduler.reopen()
        check(await client.ask(infer([2])), [2])
        assert codes(bench) == {400: 2, 503: 1, 200: 1}
        assert (await client.ask(infer([1], model="nobody"))).status == 404
        assert codes(bench) == {400: 2, 503: 1, 200: 1}, "what names no model is nobody's"


async def test_who_leaves_is_counted_and_its_batch_mates_do_not_notice() -> None:
    async with oip_bench() as bench:
        statistics = bench.catalog.find("numbers", "2").statistics
        replica = replica_of(bench.catalog.find("numbers", "2"))
        replica.held = []
        first, gone, other = [await bench.client() for _ in range(3)]
        for place, client in enumerate((first, gone, other)):
            client.send(infer([place]))
            await waiting(bench, place + 1)
        gone.writer.transport.abort()
        while not statistics.failures["CANCELED"]:
            await asyncio.sleep(0)
        replica.release()
        check(await first.answer(), [0])
        answer = await other.answer()
        check(answer, [2])
        assert provenance_of(answer).members[0].size == 1, "the row of who left was not executed"
        assert codes(bench) == {200: 2, 499: 1}


async def test_durations_are_recorded_per_answer() -> None:
    async with oip_bench() as bench:
        statistics = bench.catalog.find("numbers", "2").statistics
        client = await bench.client()
        for _ in range(3):
            await client.ask(infer([1]))
        await client.ask(http("POST", INFER, b"{"))
        protocol = statistics.protocol("http")
        for histogram in (protocol.durations, statistics.queue_waits, statistics.overhead):
            histogram.fold()
            assert histogram.count == 3


# -- what is left behind ---------------------------------------------------------------------------------------------


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.lost = functools.partial(connection.connection_lost, None)
        connection.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    def writelines(self, data: object) -> None:
        assert isinstance(data, list)
        self.write(b"".join(data))

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        asyncio.get_running_loop().call_soon(self.lost)


WARMING, MEASURED = 5, 40


async def _left_behind(bench: Bench, act: Callable[[], None]) -> int:
    """How many objects only the garbage collector could free after `act` was called often."""

    async def often(times: int) -> None:
        for _ in range(times):
            act()
            await settled(bench)

    await often(WARMING)
    gc.collect()
    gc.disable()
    try:
        await often(MEASURED)
        return gc.collect()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (200, infer([1])),
        (200, infer([1, 2, 3])),
        (200, infer([1], binary=True)),
        (200, infer(list(range(8)), request_id="x")),
        (200, infer(list(range(20)), model="split")),
        (200, infer(list(range(20)), model="split", binary=True)),
        (503, infer(list(range(20)), model="split")),
        (400, infer(list(range(MAX_QUEUE_ROWS + 1)), model="split")),
        (500, infer([POISON, *range(20)], model="split")),
        (400, infer([1], "X-Request-Timeout-Ms: 0")),
        (400, infer([ILLEGIBLE])),
        (500, infer([POISON])),
        (404, infer([1], model="nobody")),
        (200, http("GET", "/v2/models/numbers")),
    ],
)
async def test_a_request_leaves_no_cycles(status: int, data: bytes) -> None:
    """They would hold tensors until the garbage collector comes by, which it rarely does."""
    async with oip_bench() as bench:
        split = await bench.serve("split", max_batch_size=8, oversize=True)
        if status == 503 and split.scheduler is not None:
            split.scheduler.close(NotReady("closing time"))
        connection = bench.server.protocol()
        wire = Wire(connection)
        assert await _left_behind(bench, lambda: connection.data_received(data)) == 0
        heads = [head for head in wire.written if head.startswith(b"HTTP/1.1 ")]
        assert {head[9:12] for head in heads} == {b"%d" % status}
        assert len(heads) == WARMING + MEASURED


@pytest.mark.parametrize("model", ["numbers", "split"])
async def test_a_caller_that_leaves_leaves_no_cycles(model: str) -> None:
    async with oip_bench() as bench:
        await bench.serve("split", max_batch_size=2, oversize=True)

        def come_and_go() -> None:
            connection = bench.server.protocol()
            wire = Wire(connection)
            connection.data_received(infer([1, 2, 3, 4, 5], model=model))
            wire.lost()
            del wire.lost  # the transport's own cycle, not the gateway's

        assert await _left_behind(bench, come_and_go) == 0


def test_members_are_what_the_headers_say() -> None:
    """`parse` is what these tests rest on; it must not be lenient."""
    found = parse([("Inference-Backend", '"a";attempt=2'), ("Inference-Batch", '"b";size=3;row=1')])
    assert found.members == (Member("a", 2, "b", 3, 1),)
