"""ModelStreamInfer: order, errors in the stream, its end, and its bounds; and reflection, which is a stream too."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2

from gateway.catalog import ServedVersion
from gateway.errors import InvalidRequest
from gateway.ingress import grpc_stream
from gateway.protocol import reflection, schema
from gateway.protocol.options import ProtocolOptions
from tests.ingress.grpc_bench import GrpcBench, check_numbers, grpc_bench, numbers_request
from tests.ingress.oip_bench import POISON, replica_of
from tests.ingress.test_oip_grpc import UUID, until

Code = grpc.StatusCode


def pending(version: ServedVersion) -> int:
    assert version.scheduler is not None
    return version.scheduler.pending


def queued(version: ServedVersion) -> int:
    assert version.scheduler is not None
    return version.scheduler.queue_statistics().requests


def check_answer(message: Any, numbers: list[int], request_id: str = "") -> None:
    assert message.error_message == ""
    answer = message.infer_response
    assert answer.id == request_id
    assert {name: value.bool_param for name, value in answer.parameters.items()} == {"triton_final_response": True}
    check_numbers(answer, numbers)


def check_error(message: Any, words: str, request_id: str) -> None:
    assert words in message.error_message
    assert message.infer_response.id == request_id
    assert not message.infer_response.outputs


async def all_of(stream: Any) -> list[Any]:
    return [message async for message in stream]


async def test_answers_come_in_order_and_an_error_is_one_of_them() -> None:
    async with grpc_bench() as bench:
        stream = bench.infer_stream()
        await stream.write(numbers_request([1], request_id="1"))
        await stream.write(numbers_request([2], request_id="2", outputs=["nope"]))
        await stream.write(numbers_request([POISON], request_id="p"))
        await stream.write(numbers_request([3, 4], request_id="3"))
        await stream.write(numbers_request([5], model="nobody", request_id="n"))
        await stream.write(b"\xff" * 9)
        await stream.write(numbers_request([6], typed=True))
        await stream.done_writing()
        first, second, third, fourth, fifth, sixth, seventh = await all_of(stream)
        check_answer(first, [1], "1")
        check_error(second, "unexpected inference output 'nope'", "2")
        check_error(third, "poison", "p")
        assert third.infer_response.model_name == "numbers"
        assert third.infer_response.parameters["triton_final_response"].bool_param
        check_answer(fourth, [3, 4], "3")
        check_error(fifth, "Request for unknown model: 'nobody' is not found", "n")
        check_error(sixth, "not a valid inference.ModelInferRequest", "")
        check_answer(seventh, [6])
        assert await stream.code() is Code.OK
        assert UUID.fullmatch(dict(await stream.initial_metadata())["x-request-id"])
        version = bench.catalog.resolve("numbers", None)
        assert version.statistics.protocol("grpc").codes == {0: 3, 3: 1, 13: 1}


async def test_a_slow_model_holds_back_the_answers_of_those_behind_it() -> None:
    async with grpc_bench() as bench:
        await bench.serve("other")
        replica = replica_of(bench.catalog.resolve("numbers", None))
        replica.held = []
        stream = bench.infer_stream()
        await stream.write(numbers_request([1], request_id="slow"))
        await stream.write(numbers_request([2], model="other", request_id="quick"))
        other = bench.catalog.resolve("other", None)
        await until(lambda: other.statistics.success == 1)
        await stream.done_writing()
        replica.release()
        slow, quick = await all_of(stream)
        check_answer(slow, [1], "slow")
        check_answer(quick, [2], "quick")


async def test_the_end_of_the_requests_waits_for_the_answers() -> None:
    async with grpc_bench() as bench:
        replica = replica_of(bench.catalog.resolve("numbers", None))
        replica.held = []
        stream = bench.infer_stream()
        for n in range(3):
            await stream.write(numbers_request([n]))
        await stream.done_writing()
        await until(lambda: pending(bench.catalog.resolve("numbers", None)) == 3)
        replica.release()
        for n, message in enumerate(await all_of(stream)):
            check_answer(message, [n])
        assert await stream.code() is Code.OK


async def test_an_empty_stream_ends_well() -> None:
    async with grpc_bench() as bench:
        stream = bench.infer_stream()
        await stream.done_writing()
        assert await all_of(stream) == []
        assert await stream.code() is Code.OK


async def test_errors_end_the_stream_where_the_client_wants_it() -> None:
    async with grpc_bench() as bench:
        stream = bench.infer_stream(metadata=[("triton_grpc_error", "true")])
        await stream.write(numbers_request([1], outputs=["nope"], request_id="a"))  # not taken: in the stream
        await stream.write(numbers_request([1], request_id="b"))
        check_error(await stream.read(), "nope", "a")
        check_answer(await stream.read(), [1], "b")
        await stream.write(numbers_request([POISON]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is Code.INTERNAL
        assert "poison" in (caught.value.details() or "")


async def test_ids_are_invented_in_streams_too() -> None:
    async with grpc_bench(options=ProtocolOptions(invent_ids=True)) as bench:
        stream = bench.infer_stream()
        await stream.write(numbers_request([1]))
        assert len((await stream.read()).infer_response.id) == 36
        stream.cancel()


async def test_a_client_that_leaves_takes_its_requests_along() -> None:
    async with grpc_bench() as bench:
        version = bench.catalog.resolve("numbers", None)
        replica_of(version).held = []
        stream = bench.infer_stream()
        for n in range(6):
            await stream.write(numbers_request([n] * 8))
        await until(lambda: pending(version) == 6)
        stream.cancel()
        await until(lambda: not bench.services._streams)
        waiting = queued(version)
        assert waiting == 0
        replica_of(version).release()
        assert version.statistics.inference_count <= 16  # only what had left the queue ran


async def test_a_stream_is_not_read_beyond_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_stream, "MAX_IN_WORK", 4)
    async with grpc_bench() as bench:
        version = bench.catalog.resolve("numbers", None)
        replica_of(version).held = []
        stream = bench.infer_stream()
        for n in range(40):
            await stream.write(numbers_request([n]))
        await stream.done_writing()
        await until(lambda: pending(version) >= 4)
        await bench.call("ServerLive")  # behind all of the stream's messages on the same connection
        assert pending(version) == 4
        replica_of(version).release()
        for n, message in enumerate(await all_of(stream)):
            check_answer(message, [n])


async def test_a_stream_holds_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_stream, "MAX_IN_WORK_BYTES", 250)
    async with grpc_bench() as bench:
        version = bench.catalog.resolve("numbers", None)
        replica_of(version).held = []
        stream = bench.infer_stream()
        for n in range(20):
            await stream.write(numbers_request([n] * 8))
        await stream.done_writing()
        await until(lambda: pending(version) >= 3)
        await bench.call("ServerLive")
        assert pending(version) == 3
        replica_of(version).release()
        assert len(await all_of(stream)) == 20


async def test_when_the_server_stops_a_stream_ends_behind_its_answers() -> None:
    async with grpc_bench() as bench:
        version = bench.catalog.resolve("numbers", None)
        replica = replica_of(version)
        replica.held = []
        stream = bench.infer_stream()
        idle = bench.infer_stream()
        await idle.write(numbers_request([9], outputs=["nope"]))
        await idle.read()
        await stream.write(numbers_request([1]))
        await until(lambda: pending(version) == 1)
        bench.services.drain()
        assert await idle.code() is Code.UNAVAILABLE
        assert "shutting down" in await idle.details()
        replica.release()
        check_answer(await stream.read(), [1])
        assert await stream.code() is Code.UNAVAILABLE


async def test_a_deadline_ends_a_stream() -> None:
    async with grpc_bench() as bench:
        version = bench.catalog.resolve("numbers", None)
        replica_of(version).held = []
        stream = bench.infer_stream(timeout=0.1)
        for n in range(3):
            await stream.write(numbers_request([n] * 8))
        assert await stream.code() is Code.DEADLINE_EXCEEDED
        await until(lambda: queued(version) == 0)
        replica_of(version).release()


async def test_many_streams_at_once_keep_their_answers_apart() -> None:
    async with grpc_bench() as bench:

        async def one(seed: int) -> None:
            stream = bench.infer_stream()

            async def write() -> None:
                for n in range(25):
                    await stream.write(numbers_request([seed * 1000 + n], request_id=str(n)))
                await stream.done_writing()

            writing = asyncio.ensure_future(write())
            for n, message in enumerate(await all_of(stream)):
                check_answer(message, [seed * 1000 + n], str(n))
            await writing
            assert await stream.code() is Code.OK

        await asyncio.gather(*[one(seed) for seed in range(8)])


# -- reflection ------------------------------------------------------------------------------------------------------


async def ask(bench: GrpcBench, service: str, **request: Any) -> Any:
    package = reflection.SERVICES[service]
    stream = bench.stream("ServerReflectionInfo", "ServerReflectionRequest", "ServerReflectionResponse", service)
    await stream.write(schema.message(f"{package}.ServerReflectionRequest")(host="h", **request))
    answer = await stream.read()
    await stream.done_writing()
    assert await stream.code() is Code.OK
    assert answer.valid_host == "h"
    return answer


@pytest.mark.parametrize("service", reflection.SERVICES)
async def test_services_and_their_files_can_be_asked_for(service: str) -> None:
    async with grpc_bench(reflected=True) as bench:
        names = [one.name for one in (await ask(bench, service, list_services="")).list_services_response.service]
        assert {"inference.GRPCInferenceService", "grpc.health.v1.Health", service} <= set(names)
        for request in (
            {"file_containing_symbol": "inference.GRPCInferenceService"},
            {"file_containing_symbol": "inference.GRPCInferenceService.ModelInfer"},
            {"file_by_filename": "inference.proto"},
        ):
            found = (await ask(bench, service, **request)).file_descriptor_response.file_descriptor_proto
            files = [descriptor_pb2.FileDescriptorProto.FromString(data).name for data in found]
            assert files == ["inference.proto", "model_config.proto"]
        for request in (
            {"file_containing_symbol": "nope.Nope"},
            {"file_containing_symbol": "inference.GRPCInferenceService.Nope"},
            {"file_by_filename": "../etc/passwd"},
            {"all_extension_numbers_of_type": "nope.Nope"},
        ):
            assert (await ask(bench, service, **request)).error_response.error_code == Code.NOT_FOUND.value[0]
        assert (await ask(bench, service)).error_response.error_code == Code.INVALID_ARGUMENT.value[0]
        extensions = await ask(bench, service, all_extension_numbers_of_type="inference.ModelInferRequest")
        assert list(extensions.all_extension_numbers_response.extension_number) == []


def test_reflection_of_bytes_that_are_no_request() -> None:
    with pytest.raises(InvalidRequest, match="ServerReflectionRequest"):
        reflection.answer("grpc.reflection.v1", b"\xff")
