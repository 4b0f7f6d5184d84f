"""ModelInfer: requests by grpcio over real sockets, provenance, refusals, counting, deadlines."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from gateway.catalog import ServedVersion
from gateway.core.model import ModelState
from gateway.core.traits import WORKER, Traits
from gateway.errors import ConfigError
from gateway.ingress.oip_grpc import GrpcCodec, fields, metadata
from gateway.protocol.hpack_blocks import Blocks
from gateway.protocol.oip_grpc_cut import Openings
from gateway.protocol.options import ProtocolOptions
from gateway.provenance.headers import parse
from tests.ingress.grpc_bench import GrpcBench, check_numbers, grpc_bench, numbers_request
from tests.ingress.oip_bench import MAX_QUEUE_ROWS, POISON, replica_of
from tests.ingress.oip_bench import check as check_http
from tests.ingress.oip_bench import infer as http_request

Code = grpc.StatusCode
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


async def initial(call: Any) -> dict[str, str]:
    return dict(await call.initial_metadata())


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


def codes(version: ServedVersion) -> dict[int, int]:
    return version.statistics.protocol("grpc").codes


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("typed", [False, True])
async def test_a_request_is_answered(typed: bool) -> None:
    async with grpc_bench() as bench:
        for numbers in ([7], [1, 2, 3], [7]):
            message = await bench.infer(numbers_request(numbers, typed=typed))
            assert (message.model_name, message.model_version, message.id) == ("numbers", "2", "")
            check_numbers(message, numbers)


async def test_many_callers_share_batches_and_get_their_own_rows() -> None:
    async with grpc_bench() as bench:
        replica = replica_of(bench.catalog.resolve("numbers", None))
        replica.held = []
        calls = [bench.infer(numbers_request([n, n + 1000], request_id=f"id{n}")) for n in range(12)]
        tasks = [asyncio.ensure_future(call_result(call)) for call in calls]
        await until(lambda: bench.grpc_server.statistics().in_flight == 12)
        replica.release()
        for n, message in enumerate(await asyncio.gather(*tasks)):
            check_numbers(message, [n, n + 1000])
            assert message.id == f"id{n}"
        assert bench.catalog.resolve("numbers", None).statistics.rows.sum == 24
        assert bench.catalog.resolve("numbers", None).statistics.execution_count < 12


async def test_callers_of_both_protocols_share_batches_and_get_their_own_rows() -> None:
    async with grpc_bench() as bench:
        version = bench.catalog.resolve("numbers", None)
        replica_of(version).held = []
        by_grpc = [bench.infer(numbers_request([n, n + 1000])) for n in range(6)]
        tasks = [asyncio.ensure_future(call_result(call)) for call in by_grpc]
        by_http = [asyncio.ensure_future(bench.ask(http_request([n, n + 2000]))) for n in range(6)]
        await until(lambda: bench.grpc_server.statistics().in_flight == bench.server.statistics().in_flight == 6)
        replica_of(version).release()
        for n, message in enumerate(await asyncio.gather(*tasks)):
            check_numbers(message, [n, n + 1000])
        http_batches = set()
        for n, answer in enumerate(await asyncio.gather(*by_http)):
            check_http(answer, [n, n + 2000])
            http_batches.add(parse(answer.headers).members[0].batch_id)
        grpc_batches = {parse((await initial(call)).items()).members[0].batch_id for call in by_grpc}
        assert http_batches & grpc_batches
        assert set(version.statistics.protocols) == {"http", "grpc"}


async def call_result(call: Any) -> Any:
    return await call


async def test_the_version_is_looked_up_for_every_request() -> None:
    async with grpc_bench(models=False) as bench:
        first = await bench.serve(version="1")
        for _ in range(3):
            assert (await bench.infer(numbers_request([1]))).model_version == "1"
        await bench.serve(version="2")
        assert (await bench.infer(numbers_request([1]))).model_version == "2"
        for _ in range(3):
            assert (await bench.infer(numbers_request([1], version="1"))).model_version == "1"
            assert (await bench.infer(numbers_request([1], version="01"))).model_version == "1"
        again = await bench.serve(version="1")
        assert again is not first
        check_numbers(await bench.infer(numbers_request([5], version="1")), [5])
        assert (codes(again), codes(first)[0]) == ({0: 1}, 9)


async def test_an_oversized_request_is_split_and_joined() -> None:
    async with grpc_bench(models=False) as bench:
        await bench.serve(oversize=True)
        call = bench.infer(numbers_request(list(range(20))))
        check_numbers(await call, list(range(20)))
        members = parse((await initial(call)).items()).members
        assert [member.size for member in members] == [8, 8, 4]


async def test_ids_are_invented_where_the_owner_wants_them() -> None:
    async with grpc_bench(options=ProtocolOptions(invent_ids=True)) as bench:
        assert re.fullmatch(r"[0-9a-f-]{36}", (await bench.infer(numbers_request([1]))).id)
        assert (await bench.infer(numbers_request([1], request_id="mine"))).id == "mine"


async def test_typed_requests_are_mirrored_where_the_owner_wants_it() -> None:
    async with grpc_bench(options=ProtocolOptions(typed_responses="mirror")) as bench:
        message = await bench.infer(numbers_request([4], typed=True))
        assert list(message.outputs[0].contents.int64_contents) == [12]
        assert not message.raw_output_contents
        check_numbers(await bench.infer(numbers_request([4])), [4])


# -- provenance ------------------------------------------------------------------------------------------------------


async def test_provenance_is_initial_metadata() -> None:
    async with grpc_bench() as bench:
        seen = set()
        for _ in range(3):
            call = bench.infer(numbers_request([1, 2]))
            await call
            said = await initial(call)
            assert UUID.fullmatch(said["x-request-id"])
            seen.add(said["x-request-id"])
            found = parse(said.items())
            assert found.model is not None
            assert (found.model.name, found.model.version, found.model.digest) == (
                "numbers",
                "2",
                "sha256:" + "12" * 32,
            )
            (member,) = found.members
            assert (member.backend, member.attempt, member.size, member.row) == ("onnx-1", 1, 2, 0)
            assert list(found.timings_ms) == ["queue", "infer", "total"]
            assert found.timings_ms["total"] >= found.timings_ms["infer"] >= 0
        assert len(seen) == 3


async def test_an_answer_of_a_remote_backend_names_no_digest() -> None:
    async with grpc_bench() as bench:
        replica = replica_of(bench.catalog.resolve("numbers", None))
        for kind, digest in ((Traits("oip", server="far"), ""), (WORKER, "sha256:" + "12" * 32)):
            replica.traits = kind
            call = bench.infer(numbers_request([1, 2]))
            await call
            found = parse((await initial(call)).items())
            assert found.model is not None
            assert (found.model.version, found.model.digest) == ("2", digest)


async def test_members_of_one_batch_are_told_their_own_rows() -> None:
    async with grpc_bench() as bench:
        replica = replica_of(bench.catalog.resolve("numbers", None))
        replica.held = []
        calls = [bench.infer(numbers_request([n, n])) for n in range(5)]
        tasks = [asyncio.ensure_future(call_result(call)) for call in calls]
        await until(lambda: bench.grpc_server.statistics().in_flight == 5)
        replica.release()
        await asyncio.gather(*tasks)
        members = [parse((await initial(call)).items()).members[0] for call in calls]
        batches: dict[str, list[int]] = {}
        for member in members:
            batches.setdefault(member.batch_id, []).append(member.row)
            assert member.size == 2 * sum(other.batch_id == member.batch_id for other in members)
        for rows in batches.values():
            assert sorted(rows) == list(range(0, 2 * len(rows), 2))


async def test_refusals_say_which_model() -> None:
    async with grpc_bench() as bench:
        call = bench.infer(numbers_request([1], outputs=["nope"]))
        await refused(call)
        # The transport has one header block for an error: what would be initial metadata stands in it.
        said = {**await initial(call), **dict(await call.trailing_metadata())}
        found = parse([(k, v) for k, v in said.items() if isinstance(v, str)])
        assert found.model is not None
        assert found.model.name == "numbers"
        assert UUID.fullmatch(found.request_id or "")


def test_metadata_are_the_lines_of_http() -> None:
    lines = b'Inference-Model: "m";version="1"\r\nX-Request-Id: 7\r\n'
    pairs = [(b"inference-model", b'"m";version="1"'), (b"x-request-id", b"7")]
    assert fields(lines) == pairs
    assert Blocks(4096).decode(metadata(lines))[0] == pairs


# -- refusals --------------------------------------------------------------------------------------------------------


async def test_unknown_models_and_versions() -> None:
    async with grpc_bench() as bench:
        for message, code, words in [
            (numbers_request([1], model="nobody"), Code.NOT_FOUND, "Request for unknown model: 'nobody' is not found"),
            (numbers_request([1], version="9"), Code.NOT_FOUND, "version 9 is not found"),
            (numbers_request([1], version="abc"), Code.INVALID_ARGUMENT, "version string 'abc'"),
            (numbers_request([1], version="-1"), Code.INVALID_ARGUMENT, "version should be an integral value > 0"),
            (b"\xff" * 40, Code.INVALID_ARGUMENT, "not a valid inference.ModelInferRequest"),
            (b"", Code.NOT_FOUND, "''"),
        ]:
            found, text = await refused(bench.infer(message))
            assert found is code
            assert words in text
        await bench.serve("broken", refuse=ConfigError("no such file"))
        code, text = await refused(bench.infer(numbers_request([1], model="broken")))
        assert code is Code.UNAVAILABLE
        assert "no such file" in text


async def test_refusals_are_counted_by_grpc_code() -> None:
    async with grpc_bench() as bench:
        version = bench.catalog.resolve("numbers", None)
        await refused(bench.infer(numbers_request([1], outputs=["nope"])))
        await bench.infer(numbers_request([1]))
        code, text = await refused(bench.infer(numbers_request([POISON])))
        assert (code, "poison" in text) == (Code.INTERNAL, True)
        assert codes(version) == {3: 1, 0: 1, 13: 1}


async def test_a_full_queue_is_unavailable() -> None:
    async with grpc_bench(models=False) as bench:
        version = await bench.serve(max_batch_size=MAX_QUEUE_ROWS)
        replica = replica_of(version)
        replica.held = []
        rows = MAX_QUEUE_ROWS // 2 + 1
        kept = []
        for _ in range(2):
            kept.append(asyncio.ensure_future(call_result(bench.infer(numbers_request([1] * rows)))))
            await until(lambda: bench.grpc_server.statistics().in_flight == len(kept))
        code, text = await refused(bench.infer(numbers_request([1] * rows)))
        assert (code, "Exceeds maximum queue size" in text) == (Code.UNAVAILABLE, True)
        replica.release()
        await asyncio.gather(*kept)
        assert codes(version) == {14: 1, 0: 2}


async def test_a_version_that_failed_is_known() -> None:
    async with grpc_bench(models=False) as bench:
        version = await bench.serve()
        await bench.infer(numbers_request([1]))
        bench.catalog.failed("numbers", "1", "its workers crash")
        assert version.state is ModelState.FAILED
        code, text = await refused(bench.infer(numbers_request([1])))
        assert (code, "its workers crash" in text) == (Code.UNAVAILABLE, True)
        assert codes(version) == {0: 1, 14: 1}
        bench.catalog.recovered("numbers", "1")
        await bench.infer(numbers_request([1]))


async def test_nothing_unforeseen_reaches_a_caller(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def break_down(*_: object) -> None:
        raise ZeroDivisionError("secret")

    async with grpc_bench() as bench:
        monkeypatch.setattr(bench.pipeline, "infer", break_down)
        code, text = await refused(bench.infer(numbers_request([1])))
        assert (code, text) == (Code.INTERNAL, "the gateway failed on this request")
        assert "secret" in caplog.text


# -- time ------------------------------------------------------------------------------------------------------------


async def held_call(bench: GrpcBench, **options: Any) -> tuple[Any, Any]:
    """A call that waits behind a busy replica, and the version it waits for."""
    version = bench.catalog.resolve("numbers", None)
    replica_of(version).held = []
    bench.busy = []
    for n in range(2):  # one runs, one waits
        bench.busy.append(asyncio.ensure_future(call_result(bench.infer(numbers_request([n] * 8)))))
        await until(lambda: bench.grpc_server.statistics().in_flight == len(bench.busy))
    return bench.infer(numbers_request([1]), **options), version


async def let_go(bench: GrpcBench, version: Any) -> None:
    replica_of(version).release()
    await asyncio.gather(*bench.busy)


async def test_a_deadline_reaches_the_queue() -> None:
    async with grpc_bench() as bench:
        call, version = await held_call(bench, timeout=0.1)
        code, _ = await refused(call)
        assert code is Code.DEADLINE_EXCEEDED
        await until(lambda: version.scheduler.queue_statistics().requests == 1)  # its slot in the queue is free
        await let_go(bench, version)
        # The client's clock runs first as a rule, and then it has cancelled; ours counts a deadline.
        assert codes(version) in ({4: 1, 0: 2}, {1: 1, 0: 2})
        assert version.statistics.inference_count == 16


@pytest.mark.parametrize(
    ("deadline", "header_s", "timeout_s"),
    [(None, 0.0, 0.0), (None, 2.0, 2.0), (105.0, 0.0, 5.0), (105.0, 2.0, 2.0), (101.0, 2.0, 1.0), (99.0, 0.0, 1e-6)],
)
async def test_the_time_a_caller_allows(deadline: float | None, header_s: float, timeout_s: float) -> None:
    async with grpc_bench() as bench:
        codec = GrpcCodec(bench.catalog.resolve("numbers", None))
        call: Any = SimpleNamespace(received=100.0, deadline=deadline)
        request = codec.read(Openings().cut(numbers_request([1]).SerializeToString()), call, header_s)
        assert request.received == 100.0
        assert request.timeout_s == pytest.approx(timeout_s)


async def test_a_timeout_of_our_own_metadata_reaches_the_queue() -> None:
    async with grpc_bench() as bench:
        call, version = await held_call(bench, metadata=[("x-request-timeout-ms", "50")])
        code, _ = await refused(call)
        assert code is Code.DEADLINE_EXCEEDED
        await let_go(bench, version)
        assert version.statistics.inference_count == 16
        for wrong in ("0", "x", "-5"):
            code, text = await refused(bench.infer(numbers_request([1]), metadata=[("x-request-timeout-ms", wrong)]))
            assert (code, "X-Request-Timeout-Ms" in text) == (Code.INVALID_ARGUMENT, True)


async def test_a_cancelled_call_leaves_the_queue() -> None:
    async with grpc_bench() as bench:
        call, version = await held_call(bench)
        await until(lambda: version.scheduler.queue_statistics().requests == 2)
        call.cancel()
        await until(lambda: version.scheduler.queue_statistics().requests == 1)
        await let_go(bench, version)
        assert codes(version) == {1: 1, 0: 2}
        assert version.statistics.failures["CANCELED"] == 1
        assert version.statistics.inference_count == 16


async def test_a_deadline_that_is_far_changes_nothing() -> None:
    async with grpc_bench() as bench:
        check_numbers(await bench.infer(numbers_request([3]), timeout=20), [3])
