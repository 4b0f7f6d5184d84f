"""The inference log as the front ends feed it: every request is one row, and the row is that request's.

Over real sockets, with real codecs, catalog and scheduler; the log ends in memory, where its frames are decoded.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import struct
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from gateway.core.log_policy import LogPolicy
from gateway.core.tensor import pack_bytes
from gateway.errors import LogUnavailable, NotReady
from gateway.inference_log.handover import InferenceLog, VersionLog, Wall
from gateway.inference_log.outlet import Outlet
from gateway.ingress.grpc_call import GrpcCall
from gateway.ingress.logged_grpc import LoggedGrpcCodec
from gateway.ingress.logged_http import LoggedHttpCodec
from gateway.ingress.oip_grpc import GrpcCodec
from gateway.ingress.oip_http import HttpCodec
from gateway.management_access import Restrictions
from gateway.provenance.headers import parse
from tests.inference_log.row_reader import Frames, Logged, Tensor
from tests.ingress.grpc_bench import GrpcBench, check_numbers, grpc_bench, numbers_request
from tests.ingress.oip_bench import POISON, Answer, Bench, check, http, infer, oip_bench, replica_of

DIGEST = "sha256:" + "12" * 32
TRACE = "ab" * 16


def log_into(frames: Frames) -> InferenceLog:
    loop = asyncio.get_running_loop()
    outlet = Outlet(frames, 10**9, loop.call_later, time.monotonic, time.time_ns)
    return InferenceLog(outlet, loop.call_soon, Wall(time.time_ns, time.monotonic), random.Random(1).random)


@asynccontextmanager
async def logged(policy: LogPolicy | None = None, **how: Any) -> AsyncIterator[tuple[Bench, Frames]]:
    frames = Frames()
    async with oip_bench(log=log_into(frames), models=False, **how) as bench:
        if policy is not None:
            bench.log_policy = policy
        await bench.serve(version="1")
        await bench.serve(version="2")
        yield bench, frames
        assert bench.log is not None
        bench.log.flush()


@asynccontextmanager
async def logged_grpc() -> AsyncIterator[tuple[GrpcBench, Frames]]:
    frames = Frames()
    async with grpc_bench(log=log_into(frames)) as bench:
        yield bench, frames
        assert bench.log is not None
        bench.log.flush()


def rows(bench: Bench, frames: Frames) -> list[Logged]:
    assert bench.log is not None
    bench.log.flush()
    return frames.rows


def carries(row: Logged, numbers: Sequence[int], outputs: Sequence[str] = ("triple", "name")) -> None:
    """The row's tensors are what was sent, and what `check` finds in an answer."""
    shape = (len(numbers), 1)
    made = {
        "triple": Tensor("INT64", shape, struct.pack(f"<{len(numbers)}q", *[3 * n for n in numbers])),
        "name": Tensor("BYTES", shape, pack_bytes([b"n%d" % n for n in numbers])),
    }
    assert row.inputs == {"number": Tensor("INT64", shape, struct.pack(f"<{len(numbers)}q", *numbers))}
    assert row.outputs == {name: made[name] for name in outputs}


def agrees(row: Logged, answer: Answer, endpoint: str = "infer") -> None:
    """The row says what the answer's headers say."""
    told = parse(answer.headers)
    assert row.id == told.request_id
    assert (row.row.protocol, row.row.endpoint, row.row.grpc_code) == ("http", endpoint, None)
    assert row.row.status == answer.status
    if told.model is not None:
        assert (row.model, row.version, row.digest) == (told.model.name, told.model.version, told.model.digest)
    if len(told.members) == 1:
        (member,) = told.members
        assert row.batch is not None
        assert (row.batch.backend, row.row.attempt, row.batch.batch_id) == (
            member.backend,
            member.attempt,
            member.batch_id,
        )
        assert (row.batch.size, row.row.batch_row) == (member.size, member.row)
        assert abs((row.batch.dispatched - row.row.received) * 1e3 - told.timings_ms["queue"]) <= 0.0051
        assert row.row.total_s * 1e3 >= told.timings_ms["total"] - 0.0051


@pytest.mark.parametrize("binary", [False, True])
async def test_a_row_is_what_was_asked_and_answered(binary: bool) -> None:
    async with logged() as (bench, frames):
        headers = ("X-Request-Id: their/own:id", f"traceparent: 00-{TRACE}-{'12' * 8}-01")
        answer = await bench.ask(infer([4, 5], *headers, binary=binary, request_id="mine"))
        check(answer, [4, 5])
        (row,) = rows(bench, frames)
        agrees(row, answer, "raw" if binary else "infer")
        carries(row, [4, 5])
        assert (row.row.client_request_id, row.row.oip_id, row.row.trace_id) == ("their/own:id", "mine", TRACE)
        assert row.row.rows == 2
        assert row.row.sampling == 1.0
        assert row.row.detail is None


async def test_only_the_outputs_that_were_asked_for_are_kept() -> None:
    async with logged() as (bench, frames):
        await bench.ask(infer([1], outputs=["name"]))
        await bench.ask(infer([2], outputs=["triple"]))
        first, second = rows(bench, frames)
        carries(first, [1], ["name"])
        carries(second, [2], ["triple"])


async def test_parameters_that_nobody_reads_are_logged_each_with_its_own_request() -> None:
    async with logged() as (bench, frames):
        first: dict[str, object] = {"tenant": "a", "n": 1}
        said = [first, {"tenant": "b", "yes": True}, {}, first]
        for parameters in said:
            answer = await bench.ask(infer([1], parameters=parameters) if parameters else infer([1]))
            assert answer.status == 200, answer.body
        found = [None if row.detail is None else row.detail.parameters for row in rows(bench, frames)]
        assert [json.loads(text or "{}") for text in found] == said


async def test_classes_are_logged_as_they_were_served() -> None:
    async with logged() as (bench, frames):
        wanted = [{"name": "triple", "parameters": {"classification": 1}}]
        tensor = {"name": "number", "datatype": "INT64", "shape": [2, 1], "data": [7, 8]}
        body = json.dumps({"inputs": [tensor], "outputs": wanted}).encode()
        answer = await bench.ask(http("POST", "/v2/models/numbers/infer", body))
        assert answer.status == 200, answer.body
        (output,) = answer.document["outputs"]
        (row,) = rows(bench, frames)
        found = row.outputs["triple"]
        assert (found.datatype, list(found.shape)) == (output["datatype"], output["shape"])
        assert found.data == pack_bytes([text.encode() for text in output["data"]])


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
async def test_generate(endpoint: str) -> None:
    async with logged() as (bench, frames):
        answer = await bench.ask(http("POST", f"/v2/models/numbers/{endpoint}", b'{"number": [[6]]}'))
        assert answer.status == 200, answer.body
        (row,) = rows(bench, frames)
        agrees(row, answer, endpoint)
        carries(row, [6])


async def test_compressed_bodies_are_logged_as_they_were_meant() -> None:
    async with logged() as (bench, frames):
        plain = infer([9]).partition(b"\r\n\r\n")[2]
        head = ("Content-Encoding: gzip", "Accept-Encoding: gzip")
        answer = await bench.ask(http("POST", "/v2/models/numbers/infer", gzip.compress(plain), *head))
        assert answer.status == 200
        (row,) = rows(bench, frames)
        agrees(row, answer)
        carries(row, [9])


async def test_a_split_request_is_one_row_with_all_its_executions() -> None:
    frames = Frames()
    async with oip_bench(log=log_into(frames), models=False) as bench:
        await bench.serve(max_batch_size=4, oversize=True)
        numbers = list(range(10))
        answer = await bench.ask(infer(numbers))
        check(answer, numbers)
        (row,) = rows(bench, frames)
        carries(row, numbers)
        told = [(m.backend, m.batch_id, m.size, m.row) for m in parse(answer.headers).members]
        assert [(b.backend, b.batch_id, b.size, first) for b, first in row.executions] == told
        assert len(told) == 3
        timings = parse(answer.headers).timings_ms
        assert row.detail.queued_s == pytest.approx(timings["queue"] / 1e3, abs=6e-6)
        assert row.detail.infer_s == pytest.approx(timings["infer"] / 1e3, abs=6e-6)


async def test_refusals_are_rows_whatever_they_are_refused_for() -> None:
    async with logged(restrictions=Restrictions({})) as (bench, frames):
        broken = http("POST", "/v2/models/numbers/infer", b"{")
        unknown = http("POST", "/v2/models/nobody/versions/7/infer", b"{}")
        misfit = infer([1], parameters={"timeout": "soon"})
        coded = http("POST", "/v2/models/numbers/infer", b"{}", "Content-Encoding: br")
        answers = [await bench.ask(data) for data in (broken, unknown, misfit, coded)]
        assert [answer.status for answer in answers] == [400, 404, 400, 501]
        found = rows(bench, frames)
        by_id = {row.id: row for row in found}
        assert len(found) == len(by_id) == 4
        for answer in answers:
            row = by_id[answer["X-Request-Id"]]
            agrees(row, answer)
            assert row.detail.error == answer.error
            assert row.batch is None
            assert row.outputs == {}
        asked = by_id[answers[1]["X-Request-Id"]]
        assert (asked.model, asked.detail.asked_model, asked.detail.asked_version) == ("", "nobody", "7")
        assert asked.detail.reason == "not_found"
        assert by_id[answers[0]["X-Request-Id"]].model == "numbers"


async def test_restricted_inference_is_a_row() -> None:
    async with logged(restrictions=Restrictions({"inference": ("x-key", "secret")})) as (bench, frames):
        answer = await bench.ask(infer([1]))
        assert answer.status == 403
        (row,) = rows(bench, frames)
        assert (row.row.status, row.id, row.detail.asked_model) == (403, answer["X-Request-Id"], "numbers")


async def test_management_requests_are_no_rows() -> None:
    async with logged() as (bench, frames):
        for path in ("/v2", "/v2/models/numbers", "/v2/health/ready", "/v2/models/nobody", "/nowhere"):
            await bench.ask(http("GET", path))
        assert rows(bench, frames) == []


async def test_failures_keep_the_payload_and_batch_mates_keep_theirs() -> None:
    async with logged(LogPolicy(sampling=0.0)) as (bench, frames):
        bad, good = await asyncio.gather(bench.ask(infer([POISON])), bench.ask(infer([3])))
        assert bad.status >= 500
        check(good, [3])
        by_id = {row.id: row for row in rows(bench, frames)}
        failed = by_id[bad["X-Request-Id"]]
        assert failed.inputs["number"].data == struct.pack("<q", POISON)
        assert failed.outputs == {}
        assert failed.detail.error == bad.error
        assert failed.row.sampling == 1.0
        answered = by_id[good["X-Request-Id"]]
        assert (answered.inputs, answered.outputs, answered.row.sampling) == ({}, {}, 0.0)


async def test_a_passed_timeout_is_a_row() -> None:
    async with logged() as (bench, frames):
        replica = replica_of(bench.catalog.find("numbers", "2"))
        replica.held = []
        answer = await bench.ask(infer([1], "X-Request-Timeout-Ms: 30"))
        replica.release()
        assert answer.status == 504
        (row,) = rows(bench, frames)
        agrees(row, answer)
        assert (row.detail.reason, row.detail.error) == ("deadline", answer.error)
        assert row.inputs["number"].data == struct.pack("<q", 1)


async def test_a_caller_that_leaves_is_a_row() -> None:
    async with logged() as (bench, frames):
        replica = replica_of(bench.catalog.find("numbers", "2"))
        replica.held = []
        client = await bench.client()
        client.send(infer([1], request_id="leaver"))
        while not replica.held:
            await asyncio.sleep(0)
        client.writer.transport.abort()
        while not rows(bench, frames):
            await asyncio.sleep(0)
        replica.release()
        (row,) = rows(bench, frames)
        assert (row.row.status, row.row.oip_id, row.detail.reason) == (499, "leaver", "cancelled")
        assert row.inputs["number"].data == struct.pack("<q", 1)


async def test_a_version_that_failed_refuses_with_rows_of_its_own() -> None:
    async with logged() as (bench, frames):
        bench.catalog.failed("numbers", "2", "its workers keep dying")
        answer = await bench.ask(infer([1], model="numbers/versions/2"))
        assert answer.status == 503
        found = [row for row in rows(bench, frames) if row.id == answer["X-Request-Id"]]
        assert [(row.row.status, row.detail.reason) for row in found] == [(503, NotReady.reason)]


async def test_payload_policies_are_applied_to_single_tensors() -> None:
    policy = LogPolicy(payload="hash", tensors=(("number", "drop"), ("triple", "truncate")), truncate_bytes=3)
    async with logged(policy) as (bench, frames):
        await asyncio.gather(bench.ask(infer([5, 6])), bench.ask(infer([7])))
        for row in rows(bench, frames):
            numbers = [5, 6] if row.row.rows == 2 else [7]
            triple = struct.pack(f"<{len(numbers)}q", *[3 * n for n in numbers])
            assert (row.inputs["number"].data, row.inputs["number"].length) == (b"", 8 * len(numbers))
            assert (row.outputs["triple"].data, row.outputs["triple"].length) == (triple[:3], len(triple))
            assert len(row.outputs["name"].data) == 32
            assert row.outputs["name"].policy == "hash"


async def test_a_model_that_is_not_to_be_logged_has_the_plain_codec() -> None:
    async with logged(LogPolicy(enabled=False)) as (bench, frames):
        check(await bench.ask(infer([1])), [1])
        assert type(bench.catalog.find("numbers", "2").http_codec) is HttpCodec
        assert rows(bench, frames) == []
    async with logged() as (bench, frames):
        check(await bench.ask(infer([1])), [1])
        assert type(bench.catalog.find("numbers", "2").http_codec) is LoggedHttpCodec


async def test_without_a_log_nothing_of_it_is_on_the_path() -> None:
    async with grpc_bench() as bench:
        check(await bench.ask(infer([1])), [1])
        check_numbers(await bench.infer(numbers_request([1])), [1])
        version = bench.catalog.find("numbers", "2")
        assert type(version.http_codec) is HttpCodec
        assert type(version.grpc_codec) is GrpcCodec
        assert version.log is None
    async with logged_grpc() as (grpc_one, _):
        await grpc_one.infer(numbers_request([1]))
        assert type(grpc_one.catalog.find("numbers", "2").grpc_codec) is LoggedGrpcCodec


async def test_a_version_that_is_promoted_answers_what_it_took_as_a_canary() -> None:
    async with logged() as (bench, frames):
        version = bench.catalog.find("numbers", "2")
        version.variant = "canary"
        replica = replica_of(version)
        replica.held = []
        earlier = asyncio.ensure_future(bench.ask(infer([1])))
        while not replica.held:
            await asyncio.sleep(0.001)
        version.variant, version.http_codec = "champion", None
        later = asyncio.ensure_future(bench.ask(infer([2])))
        while version.http_codec is None:
            await asyncio.sleep(0.001)
        replica.release()
        told = [parse((await asked).headers) for asked in (earlier, later)]
        assert [one.model.variant for one in told if one.model] == ["canary", "champion"]
        noted = {row.id: row.variant for row in rows(bench, frames)}
        assert [noted[one.request_id or ""] for one in told] == ["canary", "champion"]


async def test_a_full_log_refuses_models_that_block_until_it_has_room() -> None:
    frames = Frames()
    async with oip_bench(log=log_into(frames), models=False) as bench:
        bench.log_policy = LogPolicy(overflow="block")
        version = await bench.serve()
        bench.log_policy = LogPolicy()
        await bench.serve("others")
        check(await bench.ask(infer([1])), [1])
        frames.pending_bytes = 10**9
        refused = await bench.ask(infer([2]))
        assert refused.status == 503
        assert "Retry-After" in refused
        assert "inference log" in refused.error
        assert version.log_blocked
        assert (await bench.ask(http("GET", "/v2/models/numbers/ready"))).status == 503
        check(await bench.ask(infer([2], model="others")), [2])
        frames.synced()
        check(await bench.ask(infer([3])), [3])
        assert (await bench.ask(http("GET", "/v2/models/numbers/ready"))).status == 200
        assert bench.log is not None
        while bench.log.outlet.statistics().open_gaps:
            await asyncio.sleep(0.02)
        inputs = sorted(struct.unpack("<q", row.inputs["number"].data)[0] for row in rows(bench, frames))
        assert inputs == [1, 2, 3]
        (gap,) = frames.events
        assert (gap.stream, gap.kind, gap.model) == ("gap", "refused", "numbers")
        assert json.loads(gap.details)["rows"] == 1


async def test_a_fault_of_the_log_costs_no_caller_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(VersionLog, "answered", broken)
    async with logged() as (bench, frames):
        check(await bench.ask(infer([4, 5])), [4, 5])
        check(await bench.ask(infer([6], binary=True)), [6])
        assert rows(bench, frames) == []
        assert bench.log is not None
        assert bench.log.outlet.statistics().lost_rows == 2
    async with logged_grpc() as (grpc_one, frames):
        check_numbers(await grpc_one.infer(numbers_request([7])), [7])
        assert rows(grpc_one, frames) == []
        assert grpc_one.log is not None
        assert grpc_one.log.outlet.statistics().lost_rows == 1


async def test_a_full_log_refuses_grpc_calls_of_models_that_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: VersionLog) -> None:
        raise LogUnavailable("the inference log has no room")

    async with logged_grpc() as (bench, frames):
        with monkeypatch.context() as patched:
            patched.setattr(VersionLog, "check", full)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await bench.infer(numbers_request([1]))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        check_numbers(await bench.infer(numbers_request([2])), [2])
        assert [struct.unpack("<q", row.inputs["number"].data) for row in rows(bench, frames)] == [(2,)]
        assert bench.log is not None
        assert bench.log.outlet.statistics().refused_requests == 1


@pytest.mark.parametrize("variant", ["champion", "canary"])
async def test_a_row_says_which_variant_answered(variant: str) -> None:
    async with logged() as (bench, frames):
        bench.catalog.find("numbers", "2").variant = variant
        check(await bench.ask(infer([1])), [1])
        assert [row.variant for row in rows(bench, frames)] == [variant]


@pytest.mark.parametrize("typed", [False, True])
async def test_grpc_rows_are_what_was_asked_and_answered(typed: bool) -> None:
    async with logged_grpc() as (bench, frames):
        metadata = (("x-request-id", "theirs"), ("traceparent", f"00-{TRACE}-{'12' * 8}-01"))
        call = bench.infer(numbers_request([4, 5], typed=typed, request_id="mine"), metadata=metadata)
        check_numbers(await call, [4, 5])
        told = parse([(key, str(value)) for key, value in await call.initial_metadata()])
        (row,) = rows(bench, frames)
        carries(row, [4, 5])
        assert row.id == told.request_id
        assert (row.row.protocol, row.row.endpoint) == ("grpc", "infer" if typed else "raw")
        assert (row.row.status, row.row.grpc_code) == (200, 0)
        assert (row.row.client_request_id, row.row.oip_id, row.row.trace_id) == ("theirs", "mine", TRACE)
        (member,) = told.members
        assert row.batch is not None
        assert (row.batch.batch_id, row.row.batch_row) == (member.batch_id, member.row)


async def test_grpc_refusals_are_rows() -> None:
    async with logged_grpc() as (bench, frames):
        cases = [
            (numbers_request([1], model="nobody"), 404, grpc.StatusCode.NOT_FOUND),
            (b"\xff\xff", 400, grpc.StatusCode.INVALID_ARGUMENT),
            (numbers_request([POISON]), 500, grpc.StatusCode.INTERNAL),
        ]
        for request, _, code in cases:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await bench.infer(request)
            assert caught.value.code() is code
        found = rows(bench, frames)
        assert [(row.row.status, row.row.grpc_code) for row in found] == [
            (status, code.value[0]) for _, status, code in cases
        ]
        assert found[0].detail.asked_model == "nobody"
        assert found[2].inputs["number"].data == struct.pack("<q", POISON)


async def test_a_passed_deadline_and_a_cancelled_call_are_rows() -> None:
    async with logged_grpc() as (bench, frames):
        replica = replica_of(bench.catalog.find("numbers", "2"))
        replica.held = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await bench.infer(numbers_request([1]), timeout=0.05)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        call = bench.infer(numbers_request([2]))
        waiting = asyncio.ensure_future(call)
        scheduler = bench.catalog.find("numbers", "2").scheduler
        assert scheduler is not None
        while not scheduler.pending:
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        while len(rows(bench, frames)) < 2:
            await asyncio.sleep(0.001)
        replica.release()
        late, left = rows(bench, frames)
        # Who noticed first, the gateway or its client, is a race.
        assert (late.row.status, late.row.grpc_code) in {(504, 4), (499, 1)}
        assert (left.row.status, left.row.grpc_code) == (499, 1)


async def test_every_request_of_a_stream_is_a_row() -> None:
    async with logged_grpc() as (bench, frames):
        stream = bench.infer_stream()
        wanted = [numbers_request([n], request_id=f"r{n}") for n in (1, POISON, 3)]
        wanted.insert(1, numbers_request([9], model="nobody", request_id="lost"))
        for request in wanted:
            await stream.write(request)
        await stream.done_writing()
        answers = [answer async for answer in stream]
        assert [bool(answer.error_message) for answer in answers] == [False, True, True, False]
        found = rows(bench, frames)
        assert len(found) == 4
        by_oip_id = {row.row.oip_id: row for row in found}
        carries(by_oip_id["r1"], [1])
        carries(by_oip_id["r3"], [3])
        assert {row.row.endpoint for row in found} == {"stream"}
        (lost,) = [row for row in found if row.detail.asked_model]
        assert (lost.detail.asked_model, lost.row.status) == ("nobody", 404)
        assert by_oip_id[f"r{POISON}"].row.status == 500


async def test_rows_of_many_callers_never_cross() -> None:
    async with logged_grpc() as (bench, frames):
        rng = random.Random(5)
        numbers = [[rng.randrange(10**6) for _ in range(rng.choice([1, 1, 1, 2, 3]))] for _ in range(120)]
        sent: dict[str, list[int]] = {}

        async def over_http(some: list[int], binary: bool) -> None:
            answer = await bench.ask(infer(some, binary=binary))
            check(answer, some)
            sent[answer["X-Request-Id"]] = some

        async def over_grpc(some: list[int], typed: bool) -> None:
            call = bench.infer(numbers_request(some, typed=typed))
            check_numbers(await call, some)
            sent[dict(await call.initial_metadata())["x-request-id"]] = some

        await asyncio.gather(
            *[over_http(some, n % 4 == 0) if n % 2 else over_grpc(some, n % 4 == 2) for n, some in enumerate(numbers)]
        )
        found = rows(bench, frames)
        assert len(found) == len(sent) == len(numbers)
        for row in found:
            carries(row, sent[row.id])


async def test_an_answer_that_cannot_be_sent_is_one_row_and_ends_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: GrpcCall, *_: object) -> None:
        raise RuntimeError(f"a fault of ours: {call!r}")

    async with logged_grpc() as (bench, frames):
        with monkeypatch.context() as patched:
            patched.setattr(GrpcCall, "reply", broken)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await bench.infer(numbers_request([4]))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        check_numbers(await bench.infer(numbers_request([5])), [5])
        assert [struct.unpack("<q", row.inputs["number"].data) for row in rows(bench, frames)] == [(4,), (5,)]
        version = bench.catalog.find("numbers", "2")
        assert version.statistics.protocol("grpc").codes == {0: 2}
