"""gRPC clients people have, unchanged, against a whole gateway: tritonclient (sync, callbacks, streams, aio), the
health and reflection clients of grpcio, and plain grpcio with settings of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.utils import InferenceServerException

from gateway.protocol import schema
from gateway.provenance.headers import parse
from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway
from tests.live.test_clients import SAMPLES
from tests.protocol.grpc_samples import infer_request

MODELS = {f"id_{datatype.lower()}": models.identity(datatype) for datatype in models.ONNX_TYPE} | {
    "linear": models.linear(),
    "two": models.two_inputs(),
    "lookup": models.lookup(),
    "slow": models.slow(),
}
CONFIG = "server:\n  grpc_reflection: true\n"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    root = models.repository(tmp_path_factory.mktemp("grpc"), MODELS)
    config = root.parent / f"{root.name}.yaml"
    config.write_text(CONFIG)
    with gateway(
        "serve", str(root), "-c", str(config), "--workers", "2", "--model-control", "explicit", "--load-model", "*"
    ) as process:
        yield process


def address(served: GatewayProcess) -> str:
    return f"127.0.0.1:{served.grpc_port}"


@pytest.fixture
def client(served: GatewayProcess) -> Iterator[Any]:
    with triton.InferenceServerClient(address(served)) as found:
        yield found


@pytest.fixture
async def aio(served: GatewayProcess) -> AsyncIterator[Any]:
    async with triton_aio.InferenceServerClient(address(served)) as found:
        yield found


def tensor(name: str, datatype: str, array: Any) -> Any:
    found = triton.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array)
    return found


def linear(value: float = 0.5, rows: int = 1) -> list[Any]:
    return [tensor("x", "FP32", np.full((rows, 16), value, np.float32))]


def same(datatype: str, got: Any, sample: Any) -> bool:
    if datatype == "BYTES":
        return [e.decode() for e in got.ravel()] == list(sample.ravel())
    return bool(got.dtype == sample.dtype and got.shape == sample.shape and got.tobytes() == sample.tobytes())


# -- tritonclient: documents -----------------------------------------------------------------------------------------


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("linear")
    assert client.is_model_ready("linear", "1")
    assert not client.is_model_ready("nobody")
    assert "binary_tensor_data" in client.get_server_metadata(as_json=True)["extensions"]
    metadata = client.get_model_metadata("linear")
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("linear", ["1"], "onnxruntime_onnx")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("x", "FP32", [-1, 16])]
    with pytest.raises(InferenceServerException) as caught:
        client.get_model_metadata("nobody")
    assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_configuration_and_statistics(client: Any) -> None:
    config = client.get_model_config("two").config
    assert (config.name, config.platform) == ("two", "onnxruntime_onnx")
    assert [(i.name, list(i.dims)) for i in config.input] == [("a", [-1]), ("b", [-1])]
    before = client.get_inference_statistics("linear").model_stats[0]
    client.infer("linear", linear(rows=3))
    after = client.get_inference_statistics("linear", "1").model_stats[0]
    assert after.inference_count - before.inference_count == 3
    assert after.inference_stats.queue.count - before.inference_stats.queue.count == 1
    with pytest.raises(InferenceServerException) as caught:
        client.get_inference_statistics("nobody")
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_models_are_loaded_and_unloaded(client: Any) -> None:
    index = {m["name"]: m for m in client.get_model_repository_index(as_json=True)["models"]}
    assert index["lookup"] == {"name": "lookup", "version": "1", "state": "READY"}
    client.unload_model("lookup")
    assert not client.is_model_ready("lookup")
    index = {m["name"]: m for m in client.get_model_repository_index(as_json=True)["models"]}
    assert (index["lookup"]["state"], index["lookup"]["reason"]) == ("UNAVAILABLE", "unloaded")
    with pytest.raises(InferenceServerException) as caught:
        client.infer("lookup", [tensor("index", "INT64", np.array([1]))])
    assert caught.value.status() == "StatusCode.NOT_FOUND"
    client.load_model("lookup")
    assert client.infer("lookup", [tensor("index", "INT64", np.array([1]))]).as_numpy("row").tolist() == [[3, 4, 5]]
    with pytest.raises(InferenceServerException, match="failed to load 'nobody'") as caught:
        client.load_model("nobody")
    assert caught.value.status() == "StatusCode.INTERNAL"
    client.unload_model("nobody")


def test_settings(client: Any) -> None:
    assert list(client.get_trace_settings().settings["trace_rate"].value) == ["1000"]
    changed = client.update_trace_settings("linear", {"trace_rate": "7"})
    assert list(changed.settings["trace_rate"].value) == ["7"]
    client.update_trace_settings("linear", {"trace_rate": None})
    assert list(client.get_trace_settings("linear").settings["trace_rate"].value) == ["1000"]
    assert client.get_log_settings(as_json=True)["settings"]["log_info"] == {"bool_param": True}
    assert not client.get_system_shared_memory_status().regions


# -- tritonclient: inference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", sorted(SAMPLES))
def test_every_datatype_goes_there_and_back(client: Any, datatype: str) -> None:
    sample = SAMPLES[datatype]
    result = client.infer(f"id_{datatype.lower()}", [tensor("x", datatype, sample)], request_id=f"of {datatype}")
    assert result.get_response().id == f"of {datatype}"
    assert same(datatype, result.as_numpy("y"), sample)


def test_bf16_goes_there_and_back(served: GatewayProcess) -> None:
    """tritonclient wants a package of its own for it; the wire does not."""
    data = b"\xc0\x3f\x00\xc0"
    with grpc.insecure_channel(address(served)) as channel:
        answer = method(channel)(infer_request(("x", "BF16", [1, 2], data), model="id_bf16"))
        assert (answer.outputs[0].datatype, list(answer.raw_output_contents)) == ("BF16", [data])


def test_outputs_by_name_parameters_and_versions(client: Any) -> None:
    inputs = [tensor("a", "INT32", np.array([[2, 3]], np.int32)), tensor("b", "INT32", np.array([[10, 20]], np.int32))]
    result = client.infer(
        "two",
        inputs,
        model_version="1",
        outputs=[triton.InferRequestedOutput("product")],
        parameters={"tenant": "a", "share": 0.5},
        priority=1,
        timeout=10_000_000,
        headers={"x-request-timeout-ms": "20000"},
    )
    assert result.as_numpy("product").tolist() == [[20, 60]]
    assert result.as_numpy("sum") is None
    assert not result.get_response().parameters


def test_classification(client: Any) -> None:
    wanted = [triton.InferRequestedOutput("y", class_count=2)]
    plain = client.infer("linear", linear()).as_numpy("y")[0]
    (classes,) = client.infer("linear", linear(), outputs=wanted).as_numpy("y")
    best = sorted(range(4), key=lambda i: -plain[i])[:2]
    assert [int(text.split(b":")[1]) for text in classes] == best


def test_errors_have_their_status(client: Any) -> None:
    for model, inputs, status, words in [
        ("nobody", linear(), "NOT_FOUND", "Request for unknown model: 'nobody' is not found"),
        ("linear", [], "INVALID_ARGUMENT", "expected 1 inputs but got 0 inputs"),
        ("two", linear(), "INVALID_ARGUMENT", "unexpected inference input 'x' for model 'two'"),
        ("lookup", [tensor("index", "INT64", np.array([99]))], "INTERNAL", "99"),
    ]:
        with pytest.raises(InferenceServerException, match=words) as caught:
            client.infer(model, inputs)
        assert caught.value.status() == f"StatusCode.{status}"


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(client: Any, algorithm: str) -> None:
    plain = client.infer("linear", linear(rows=4)).as_numpy("y")
    assert (client.infer("linear", linear(rows=4), compression_algorithm=algorithm).as_numpy("y") == plain).all()


def test_64_mebibytes_both_ways(client: Any) -> None:
    sample = np.arange(16 * 1024 * 1024, dtype=np.float32).reshape(1, -1)
    got = client.infer("id_fp32", [tensor("x", "FP32", sample)]).as_numpy("y")
    assert got.tobytes() == sample.tobytes()


def test_a_deadline_that_cannot_be_kept(client: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer("slow", [tensor("x", "FP32", np.zeros((8, 768), np.float32))], client_timeout=0.0005)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    assert client.infer("linear", linear(), client_timeout=30).as_numpy("y").shape == (1, 4)


def test_calls_with_callbacks_and_their_cancellation(client: Any) -> None:
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for _ in range(20):
        client.async_infer("linear", linear(), callback=lambda result, error: outcomes.put((result, error)))
    for _ in range(20):
        result, error = outcomes.get(timeout=60)
        assert error is None
        assert result.as_numpy("y").shape == (1, 4)
    left = threading.Event()
    context = client.async_infer(
        "slow",
        [tensor("x", "FP32", np.zeros((64, 768), np.float32))],
        callback=lambda result, error: left.set(),
    )
    context.cancel()
    assert left.wait(60)
    assert client.is_server_ready()


def test_streams(client: Any) -> None:
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    for n in range(50):
        client.async_stream_infer("linear", linear(n / 50), request_id=str(n), enable_empty_final_response=True)
        if n == 25:
            client.async_stream_infer("two", linear(), request_id="bad")
    expected = [str(n) for n in range(26)] + ["bad"] + [str(n) for n in range(26, 50)]
    alone = {str(n): client.infer("linear", linear(n / 50)).as_numpy("y") for n in (0, 26, 49)}
    for request_id in expected:
        result, error = answers.get(timeout=60)
        if request_id == "bad":
            assert "unexpected inference input 'x'" in str(error)
            continue
        response = result.get_response()
        assert (error, response.id) == (None, request_id)
        assert response.parameters["triton_final_response"].bool_param
        if request_id in alone:
            np.testing.assert_allclose(result.as_numpy("y"), alone[request_id], rtol=1e-6)
    client.stop_stream()


async def test_tritonclient_aio(aio: Any) -> None:
    assert await aio.is_server_live()
    assert await aio.is_server_ready()
    assert await aio.is_model_ready("linear")
    assert not await aio.is_model_ready("nobody")
    result = await aio.infer("linear", linear(rows=2), request_id="7")
    assert result.as_numpy("y").shape == (2, 4)
    assert (await aio.get_inference_statistics("linear")).model_stats[0].inference_count >= 2
    with pytest.raises(InferenceServerException) as caught:
        await aio.infer("nobody", linear())
    assert caught.value.status() == "StatusCode.NOT_FOUND"

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for n in range(10):
            yield {"model_name": "linear", "inputs": linear(n), "request_id": str(n)}

    got = [(result.get_response().id, error) async for result, error in aio.stream_infer(requests())]
    assert got == [(str(n), None) for n in range(10)]


# -- grpcio ----------------------------------------------------------------------------------------------------------


def method(channel: Any, name: str = "ModelInfer") -> Any:
    return channel.unary_unary(
        f"/inference.GRPCInferenceService/{name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=schema.message(f"inference.{name}Response").FromString,
    )


def linear_request(**how: Any) -> Any:
    return infer_request(("x", "FP32", [1, 16], np.full((1, 16), 0.5, "<f4").tobytes()), model="linear", **how)


def test_provenance_is_metadata(served: GatewayProcess) -> None:
    with grpc.insecure_channel(address(served)) as channel:
        answer, call = method(channel).with_call(linear_request())
        assert answer.model_name == "linear"
        said = parse([(key, value) for key, value in call.initial_metadata()])
        assert said.model is not None
        assert said.model.name == "linear"
        assert said.model.digest.startswith("sha256:")
        (member,) = said.members
        assert member.backend.startswith("onnx-")
        assert {"queue", "infer", "total"} <= set(said.timings_ms)
    assert served.metric("gateway_requests_total", model="linear", protocol="grpc", code="0") >= 1


def test_keepalive_pings_are_welcome(served: GatewayProcess) -> None:
    options = [
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    with grpc.insecure_channel(address(served), options=options) as channel:
        for _ in range(5):
            assert method(channel)(linear_request()).model_name == "linear"


def test_the_health_client(served: GatewayProcess) -> None:
    with grpc.insecure_channel(address(served)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "inference.GRPCInferenceService", "x"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


def test_the_reflection_client(served: GatewayProcess) -> None:
    with grpc.insecure_channel(address(served)) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= set(database.get_services())
        pool = DescriptorPool(database)
        service = pool.FindServiceByName("inference.GRPCInferenceService")
        assert {m.name for m in service.methods} >= {"ModelInfer", "ModelStreamInfer", "ModelConfig"}
        assert service.FindMethodByName("ModelInfer").input_type.fields_by_name["raw_input_contents"].number == 7


def test_restricted_apis(tmp_path: Path) -> None:
    root = models.repository(tmp_path / "models", {"linear": models.linear()})
    config = tmp_path / "gateway.yaml"
    config.write_text("server:\n  restricted_apis:\n    - {apis: [inference, statistics], header: k, value: sesame}\n")
    with gateway("serve", str(root), "-c", str(config), "--workers", "1") as process:
        with triton.InferenceServerClient(address(process)) as client:
            assert client.is_server_ready()
            for headers in (None, {"triton-grpc-protocol-k": "x"}, {"k": "sesame"}):
                with pytest.raises(InferenceServerException, match="This protocol is restricted") as caught:
                    client.infer("linear", linear(), headers=headers)
                assert caught.value.status() == "StatusCode.UNAVAILABLE"
            headers = {"triton-grpc-protocol-k": "sesame"}
            assert client.infer("linear", linear(), headers=headers).as_numpy("y").shape == (1, 4)
            assert client.get_inference_statistics("linear", headers=headers).model_stats[0].inference_count == 1
        assert process.stop() == 0


def test_a_stop_answers_what_was_accepted_and_ends_open_streams(tmp_path: Path) -> None:
    root = models.repository(tmp_path / "models", {"linear": models.linear()})
    with gateway("serve", str(root), "--workers", "1") as process:  # noqa: SIM117  # the channel needs its port
        with grpc.insecure_channel(address(process)) as channel:
            requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
            stream: Any = channel.stream_stream(
                "/inference.GRPCInferenceService/ModelStreamInfer",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=schema.message("inference.ModelStreamInferResponse").FromString,
            )(iter(requests.get, None))
            requests.put(linear_request(request_id="1"))
            assert next(stream).infer_response.id == "1"
            assert process.stop() == 0  # an idle stream does not hold it up
            assert stream.code() is grpc.StatusCode.UNAVAILABLE
            requests.put(None)
