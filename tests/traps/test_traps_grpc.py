"""Traps 55–63: gRPC. The client is grpcio with tritonclient's messages."""

from __future__ import annotations

import queue
from multiprocessing import shared_memory
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from tests.differential.build import add, blob, request, simple
from tests.differential.exchange import Grpc
from tests.traps.client import INFER, STREAM, Client, refused

DATA = blob("FP32", [1, 2.5, 0.1])


def unary(client: Client, message: pb.ModelInferRequest) -> pb.ModelInferResponse:
    with client.channel() as channel:
        answer = channel.unary_unary(
            INFER,
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )(message, timeout=120)
    assert isinstance(answer, pb.ModelInferResponse)
    return answer


def test_trap_55_raw_and_typed(plain: Client, flagged: Client) -> None:
    two = add(
        add(request("add_sub", raw=[blob("INT32", [1, 2])] * 2), "INPUT0", (1, 2), "INT32"), "INPUT1", (1, 2), "INT32"
    )
    raw = unary(plain, two)
    assert [output.name for output in raw.outputs] == ["OUTPUT0", "OUTPUT1"]
    assert list(raw.raw_output_contents) == [blob("INT32", [2, 4]), blob("INT32", [0, 0])]
    typed = add(request(), fp32_contents=[1, 2.5, 3])
    answer = unary(plain, typed)
    assert list(answer.raw_output_contents) == [blob("FP32", [1, 2.5, 3])]
    mirrored = unary(flagged, typed)
    assert not mirrored.raw_output_contents
    assert list(mirrored.outputs[0].contents.fp32_contents) == [1, 2.5, 3]
    assert list(unary(flagged, simple()).raw_output_contents) == [DATA]


def test_trap_56_raw_with_typed_none_and_extra(plain: Client) -> None:
    both = plain.rpc(add(request(raw=[DATA]), fp32_contents=[1, 2, 3]))
    refused(both, "INVALID_ARGUMENT", "contents field must not be specified when using raw_input_contents for 'INPUT0'")
    refused(plain.rpc(add(request())), "INVALID_ARGUMENT", "unable to find data for input tensor 'INPUT0'")
    assert plain.rpc(add(request(raw=[DATA, b"more"]))).ok


def test_trap_57_64_mib_both_ways(plain: Client) -> None:
    data = np.arange(16 * 2**20, dtype=np.float32).tobytes()
    answer = unary(plain, add(request(raw=[data]), shape=(1, 16 * 2**20)))
    assert answer.raw_output_contents[0] == data


def test_trap_58_unknown_models(plain: Client) -> None:
    ready = plain.rpc(pb.ModelReadyRequest(name="nobody"), "ModelReady")
    assert (ready.status, ready.body) == ("OK", {})
    refused(plain.rpc(pb.ModelMetadataRequest(name="nobody"), "ModelMetadata"), "NOT_FOUND", "nobody")
    refused(plain.rpc(pb.ModelStatisticsRequest(name="nobody"), "ModelStatistics"), "INVALID_ARGUMENT", "nobody")


def test_trap_59_parameters(plain: Client) -> None:
    for kind in ("uint64_param", "int64_param"):
        assert plain.rpc(simple(priority=(kind, 1))).ok
        assert plain.rpc(simple(model="prio", priority=(kind, 1))).ok
    refused(plain.rpc(simple(custom=("uint64_param", 1))), "INVALID_ARGUMENT", "custom")


def test_trap_60_stream_lives_on_after_an_error(plain: Client) -> None:
    messages: queue.Queue[pb.ModelInferRequest | None] = queue.Queue()
    with plain.channel() as channel:
        replies: Any = channel.stream_stream(
            STREAM,
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )(iter(messages.get, None), timeout=60)
        for message in (simple(request_id="1"), add(request(request_id="2")), simple(request_id="3")):
            messages.put(message)
        first, second, third = next(replies), next(replies), next(replies)
        messages.put(simple(request_id="4"))  # still open
        assert next(replies).infer_response.id == "4"
        messages.put(None)
        assert list(replies) == []
    assert (first.infer_response.id, first.error_message) == ("1", "")
    assert first.infer_response.parameters["triton_final_response"].bool_param
    assert second.infer_response.id == "2"
    assert "unable to find data for input tensor 'INPUT0'" in second.error_message
    assert (third.infer_response.id, third.error_message) == ("3", "")
    assert third.infer_response.parameters["triton_final_response"].bool_param


def test_trap_62_health_and_unknown_methods(plain: Client) -> None:
    for service in ("", "x"):
        reply = plain.ask(Grpc("grpc.health.v1.Health/Check", b"\x0a\x01x" if service else b""))
        assert (reply.status, reply.body) == ("OK", "0801")
    refused(plain.ask(Grpc("Nope")), "UNIMPLEMENTED")
    refused(plain.ask(Grpc("nope.Nope/Nope")), "UNIMPLEMENTED")


def test_trap_63_shared_memory_output_has_an_empty_raw_entry(sharing: Client) -> None:
    memory = shared_memory.SharedMemory(create=True, size=64)
    try:
        register = pb.SystemSharedMemoryRegisterRequest(name="r63", key=f"/{memory.name}", byte_size=64)
        assert sharing.rpc(register, "SystemSharedMemoryRegister").ok
        message = add(request("add_sub"), "INPUT0", (1, 2), "INT32")
        add(message, "INPUT1", (1, 2), "INT32")
        message.raw_input_contents.extend([blob("INT32", [1, 2]), blob("INT32", [3, 4])])
        wanted = message.outputs.add(name="OUTPUT0")
        wanted.parameters["shared_memory_region"].string_param = "r63"
        wanted.parameters["shared_memory_byte_size"].int64_param = 8
        message.outputs.add(name="OUTPUT1")
        answer = unary(sharing, message)
        by_name = dict(zip([output.name for output in answer.outputs], answer.raw_output_contents, strict=True))
        assert by_name == {"OUTPUT0": b"", "OUTPUT1": blob("INT32", [-2, -2])}
        assert bytes(memory.buf or b"")[:8] == blob("INT32", [4, 6])
        unregister = pb.SystemSharedMemoryUnregisterRequest(name="r63")
        assert sharing.rpc(unregister, "SystemSharedMemoryUnregister").ok
    finally:
        memory.close()
        memory.unlink()


def test_a_refused_call_ends_with_its_status(plain: Client) -> None:
    """The helper above sees statuses: a call to a model nobody has is an error."""
    with pytest.raises(grpc.RpcError) as caught:
        unary(plain, simple(model="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
