"""What the examples that come with Triton's client libraries do, against a whole gateway with the same kinds of models.

The four libraries (HTTP and gRPC, each with and without asyncio) must not notice that the server is another: calls,
results, error texts and the order of things on streams are those that the examples rely on. Every test runs against a
real Triton too, which says that what is asked of the gateway here is what Triton does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http_client
import tritonclient.http.aio as http_aio
import tritonclient.utils.shared_memory as shm
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from tests.differential.triton_process import TritonProcess, triton
from tests.live.example_models import (
    FIRST,
    MODELS,
    NEGATIVE,
    SECOND,
    SUMS,
    VALUES,
    WIDTH,
    check_pair,
    document,
    for_gateway,
    for_triton,
    pair,
    steps,
    tensor,
)
from tests.live.gateway_process import GatewayProcess, gateway

pytestmark = pytest.mark.slow
PATIENCE_S = 60.0
Server = GatewayProcess | TritonProcess
KEYS = (f"/example-{os.getpid()}-{number}" for number in itertools.count())


@pytest.fixture(scope="module", params=["gateway", "triton"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("examples")
    if request.param == "triton":
        with triton(for_triton(root), sorted(MODELS)) as real:
            yield real
        return
    file = root.parent / f"{root.name}.yaml"
    file.write_text("server:\n  client_shared_memory: true\n  protocol: {server_name: triton}\n")
    control = ("--model-control", "explicit", "--load-model", "*")
    with gateway("serve", str(for_gateway(root)), "-c", str(file), "--workers", "2", *control) as process:
        yield process


@pytest.fixture(params=["http", "grpc"])
def api(request: pytest.FixtureRequest) -> ModuleType:
    found: ModuleType = http_client if request.param == "http" else grpc_client
    return found


def address(api: ModuleType, served: Server) -> str:
    return f"127.0.0.1:{served.port if api in {http_client, http_aio} else served.grpc_port}"


@pytest.fixture
def client(api: ModuleType, served: Server) -> Iterator[Any]:
    with contextlib.closing(api.InferenceServerClient(address(api, served))) as found:
        yield found


@pytest.fixture
def over_grpc(served: Server) -> Iterator[Any]:
    with grpc_client.InferenceServerClient(address(grpc_client, served)) as found:
        yield found


@pytest.fixture
def stub(served: Server) -> Iterator[Any]:
    """Without the library: what protoc makes of Triton's own .proto files."""
    with grpc.insecure_channel(address(grpc_client, served)) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


# -- health, metadata, control --------------------------------------------------------------------------------------


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("simple")
    assert document(client.get_server_metadata())["name"] == "triton"
    metadata = document(client.get_model_metadata("simple"))
    assert metadata["name"] == "simple"
    assert metadata["platform"] in {"onnxruntime_onnx", "python"}
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'wrong_model_name' is not found"):
        client.get_model_metadata("wrong_model_name")
    found = document(client.get_model_config("simple"))
    found = found.get("config", found)
    assert (found["name"], found["max_batch_size"], len(found["input"])) == ("simple", 8, 2)
    with pytest.raises(InferenceServerException, match="unknown model"):
        client.get_model_config("wrong_model_name")


def test_model_control(client: Any) -> None:
    client.load_model("simple_string")
    assert client.is_model_ready("simple_string")
    client.unload_model("simple_string")
    assert not client.is_model_ready("simple_string")
    try:
        with pytest.raises(InferenceServerException, match="failed to load 'wrong_model_name', failed to poll"):
            client.load_model("wrong_model_name")
        client.unload_model("wrong_model_name")
        client.load_model("simple_string")
        stated = document(client.get_model_config("simple_string"))
        client.load_model("simple_string", config=json.dumps(stated.get("config", stated) | {"max_batch_size": 4}))
        found = document(client.get_model_config("simple_string"))
        assert found.get("config", found)["max_batch_size"] == 4
        index = document(client.get_model_repository_index())
        index = index.get("models", []) if isinstance(index, dict) else index
        states = {entry["name"]: entry["state"] for entry in index}
        assert states == dict.fromkeys(MODELS, "READY")
    finally:
        client.load_model("simple_string")


# -- inference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("named", [True, False])
def test_simple_inference(api: ModuleType, client: Any, named: bool, compression: str | None) -> None:
    outputs = [api.InferRequestedOutput(f"OUTPUT{n}") for n in (0, 1)] if named else None
    if api is http_client:
        more = {"request_compression_algorithm": compression, "response_compression_algorithm": compression}
    else:
        more = {"compression_algorithm": compression}
    check_pair(client.infer("simple", pair(api), outputs=outputs, headers={"test": "1"}, **more))
    statistics = document(client.get_inference_statistics("simple"))["model_stats"]
    assert [entry["name"] for entry in statistics] == ["simple"]
    assert int(statistics[0]["inference_stats"]["success"]["count"]) > 0
    with pytest.raises(InferenceServerException, match="requested model 'wrong_model_name' is not available"):
        client.get_inference_statistics("wrong_model_name")


def test_json_and_binary_tensors_in_one_request(served: Server) -> None:
    with http_client.InferenceServerClient(address(http_client, served)) as client:
        inputs = [pair(http_client, binary_data=False)[0], pair(http_client, binary_data=True)[1]]
        outputs = [http_client.InferRequestedOutput(f"OUTPUT{n}", binary_data=n == 0) for n in (0, 1)]
        check_pair(client.infer("simple", inputs, outputs=outputs))


def test_text(api: ModuleType, client: Any) -> None:
    check_pair(client.infer("simple_string", pair(api, "BYTES", object)))
    words = np.array([["", "a\0b", "日本", "x" * 5000]], object)
    result = client.infer("simple_identity", [tensor(api, "x", "BYTES", words)])
    assert [element.decode() for element in result.as_numpy("y").ravel()] == words.ravel().tolist()


def test_calls_without_waiting_over_http(served: Server) -> None:
    with http_client.InferenceServerClient(address(http_client, served), concurrency=4) as client:
        for pending in [client.async_infer("simple", pair(http_client)) for _ in range(20)]:
            check_pair(pending.get_result())


def test_calls_with_a_callback_over_grpc(over_grpc: Any) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    for _ in range(20):
        over_grpc.async_infer("simple", pair(grpc_client), lambda result, error: answers.put((result, error)))
    over_grpc.async_infer("nobody", pair(grpc_client), lambda result, error: answers.put((result, error)))
    found = [answers.get(timeout=PATIENCE_S) for _ in range(21)]
    for result, error in found:
        if error is None:
            check_pair(result)
        else:
            assert "unknown model" in error.message()
            assert error.status() == "StatusCode.NOT_FOUND"
    assert [error is None for _, error in found].count(False) == 1


@pytest.mark.parametrize("aio", [http_aio, grpc_aio], ids=["http", "grpc"])
async def test_asyncio(aio: Any, served: Server) -> None:
    async with aio.InferenceServerClient(address(aio, served)) as client:
        assert await client.is_server_live()
        assert await client.is_model_ready("simple")
        assert document(await client.get_server_metadata())["name"] == "triton"
        for result in await asyncio.gather(*(client.infer("simple", pair(aio)) for _ in range(20))):
            check_pair(result)
        wrong = [tensor(aio, f"INPUT{n}", "INT32", FIRST[:, :5]) for n in (0, 1)]
        with pytest.raises(InferenceServerException, match=r"unexpected shape for input 'INPUT\d' for model 'simple'"):
            await client.infer("simple", wrong)
        index = document(await client.get_model_repository_index())
        index = index["models"] if isinstance(index, dict) else index
        assert {entry["name"] for entry in index} == set(MODELS)


def test_classes_by_their_labels(api: ModuleType, client: Any) -> None:
    """As the image classification examples ask and read."""
    scores = np.array([[0.1, 0.9, 0.3, 0.2], [4, 1, 2, 3]], np.float32)
    outputs = [api.InferRequestedOutput("y", class_count=3)]
    result = client.infer("classes", [tensor(api, "x", "FP32", scores)], outputs=outputs)
    found = [[element.decode().split(":") for element in row] for row in result.as_numpy("y")]
    assert [[label for _, _, label in row] for row in found] == [["bee", "cow", "dog"], ["ant", "dog", "cow"]]
    assert [[int(place) for _, place, _ in row] for row in found] == [[1, 2, 3], [0, 3, 2]]
    assert found[0][0][0] == "0.900000"


# -- without the library: explicit contents -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "datatype", "field", "kind"),
    [
        ("simple", "INT32", "int_contents", np.int32),
        ("simple_int8", "INT8", "int_contents", np.int8),
        ("simple_uint8", "UINT8", "uint_contents", np.uint8),
        ("simple_string", "BYTES", "bytes_contents", object),
    ],
)
def test_explicit_contents(stub: Any, model: str, datatype: str, field: str, kind: Any) -> None:
    request = service_pb2.ModelInferRequest(model_name=model, id="my request id")
    for n, array in enumerate((FIRST + 1, SECOND)):
        added = request.inputs.add(name=f"INPUT{n}", datatype=datatype, shape=[1, WIDTH])
        elements = array.ravel().tolist()
        getattr(added.contents, field).extend([str(e).encode() for e in elements] if kind is object else elements)
    request.outputs.add(name="OUTPUT0")
    request.outputs.add(name="OUTPUT1")
    response = stub.ModelInfer(request)
    assert (response.id, [output.name for output in response.outputs]) == ("my request id", ["OUTPUT0", "OUTPUT1"])
    assert [list(output.shape) for output in response.outputs] == [[1, WIDTH]] * 2
    for raw, expected in zip(response.raw_output_contents, (FIRST + 2, FIRST), strict=True):
        if kind is object:
            texts = np.array([[str(v).encode() for v in expected[0]]], object)
            assert raw == serialize_byte_tensor(texts).item()
        else:
            assert np.frombuffer(raw, kind).tolist() == expected.ravel().tolist()


def test_generated_stubs_ask_everything(stub: Any) -> None:
    assert stub.ServerLive(service_pb2.ServerLiveRequest()).live
    assert stub.ServerReady(service_pb2.ServerReadyRequest()).ready
    assert stub.ModelReady(service_pb2.ModelReadyRequest(name="simple", version="1")).ready
    assert not stub.ModelReady(service_pb2.ModelReadyRequest(name="nobody")).ready
    assert stub.ServerMetadata(service_pb2.ServerMetadataRequest()).name == "triton"
    metadata = stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="simple"))
    assert [list(one.shape) for one in (*metadata.inputs, *metadata.outputs)] == [[-1, WIDTH]] * 4
    request = service_pb2.ModelInferRequest(model_name="simple", model_version="1")
    for n, array in enumerate((FIRST, SECOND)):
        request.inputs.add(name=f"INPUT{n}", datatype="INT32", shape=[1, WIDTH])
        request.raw_input_contents.append(array.tobytes())
    response = stub.ModelInfer(request)
    assert [output.name for output in response.outputs] == ["OUTPUT0", "OUTPUT1"]
    for raw, expected in zip(response.raw_output_contents, (FIRST + SECOND, FIRST - SECOND), strict=True):
        np.testing.assert_array_equal(np.frombuffer(raw, np.int32), expected[0])
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name="nobody"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# -- sequences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["simple_sequence", "simple_dyna_sequence"])
@pytest.mark.parametrize("identities", [(1000, 1001), ("first", "second")])
def test_two_sequences_step_by_step(api: ModuleType, client: Any, model: str, identities: tuple[Any, Any]) -> None:
    first, second = (steps(api, values, identity) for values, identity in zip(
        (VALUES, [-value for value in VALUES]), identities, strict=True))  # fmt: skip
    found: list[tuple[int, int]] = []
    for one, other in zip(first, second, strict=True):
        results = [client.infer(model, given, **parameters) for given, parameters in (one, other)]
        found.append((results[0].as_numpy("OUTPUT").item(), results[1].as_numpy("OUTPUT").item()))
    assert found == list(zip(SUMS, NEGATIVE, strict=True))


@pytest.mark.parametrize("identities", [(2000, 2001), ("third", "fourth")])
def test_two_sequences_on_one_stream(over_grpc: Any, identities: tuple[Any, Any]) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    over_grpc.start_stream(lambda result, error: answers.put((result, error)))
    for identity, sign in zip(identities, (1, -1), strict=True):
        for place, (given, more) in enumerate(steps(grpc_client, [sign * v for v in VALUES], identity)):
            over_grpc.async_stream_infer("simple_sequence", given, request_id=f"{identity}_{place}", **more)
    found = [answers.get(timeout=PATIENCE_S) for _ in range(2 * len(VALUES))]
    over_grpc.stop_stream()
    assert [error for _, error in found] == [None] * len(found)
    ids = [result.get_response().id for result, _ in found]
    assert ids == [f"{identity}_{place}" for identity in identities for place in range(len(VALUES))]
    assert [result.as_numpy("OUTPUT").item() for result, _ in found] == SUMS + NEGATIVE


async def test_two_sequences_on_one_stream_with_asyncio(served: Server) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        pairs = zip(steps(grpc_aio, VALUES, 3000), steps(grpc_aio, [-v for v in VALUES], 3001), strict=True)
        for given, more in itertools.chain.from_iterable(pairs):
            yield {"model_name": "simple_dyna_sequence", "inputs": given, **more}

    async with grpc_aio.InferenceServerClient(address(grpc_aio, served)) as client:
        found = []
        async for result, error in client.stream_infer(requests()):
            assert error is None
            found.append(result.as_numpy("OUTPUT").item())
    assert found == list(itertools.chain.from_iterable(zip(SUMS, NEGATIVE, strict=True)))


def test_a_sequence_that_was_never_begun(api: ModuleType, client: Any) -> None:
    given = [tensor(api, "INPUT", "INT32", np.array([[1]], np.int32))]
    with pytest.raises(InferenceServerException, match="must specify the START flag on the first request"):
        client.infer("simple_sequence", given, sequence_id=4000)
    with pytest.raises(InferenceServerException, match="must specify a non-zero or non-empty correlation ID"):
        client.infer("simple_sequence", given)


# -- shared memory, and objects that are used again ------------------------------------------------------------------


@pytest.fixture
def region(client: Any) -> Iterator[Callable[[str, list[Any], int], Any]]:
    """Register a region under a name, with arrays from its beginning on, of at least so many bytes."""
    with contextlib.ExitStack() as stack:

        def make(name: str, arrays: list[Any], size: int) -> Any:
            key = next(KEYS)
            handle = shm.create_shared_memory_region(name, key, size)
            stack.callback(shm.destroy_shared_memory_region, handle)
            shm.set_shared_memory_region(handle, arrays)
            client.register_system_shared_memory(name, key, size)
            stack.callback(client.unregister_system_shared_memory, name)
            return handle

        yield make


def test_tensors_in_shared_memory(api: ModuleType, client: Any, region: Any) -> None:
    size = FIRST.nbytes
    region("input_data", [FIRST, SECOND], 2 * size)
    handle = region("output_data", [], 2 * size)
    inputs = [api.InferInput(f"INPUT{n}", [1, WIDTH], "INT32") for n in (0, 1)]
    outputs = [api.InferRequestedOutput(f"OUTPUT{n}") for n in (0, 1)]
    for n in (0, 1):
        inputs[n].set_shared_memory("input_data", size, offset=n * size)
        outputs[n].set_shared_memory("output_data", size, offset=n * size)
    result = client.infer("simple", inputs, outputs=outputs)
    for n, expected in enumerate((FIRST + SECOND, FIRST - SECOND)):
        described = result.get_output(f"OUTPUT{n}")
        shape = described["shape"] if isinstance(described, dict) else list(described.shape)
        found = shm.get_contents_as_numpy(handle, np.int32, shape, offset=n * size)
        np.testing.assert_array_equal(found, expected)
    status = document(client.get_system_shared_memory_status())
    names = [entry["name"] for entry in status] if isinstance(status, list) else list(status["regions"])
    assert sorted(names) == ["input_data", "output_data"]


def test_text_in_shared_memory(api: ModuleType, client: Any, region: Any) -> None:
    words = np.array([["a", "", "日本"]], object)
    packed = serialize_byte_tensor(words)
    size = len(packed.item())
    region("text_in", [packed], size)
    handle = region("text_out", [], 256)
    given = api.InferInput("x", [1, 3], "BYTES")
    given.set_shared_memory("text_in", size)
    wanted = api.InferRequestedOutput("y")
    wanted.set_shared_memory("text_out", 256)
    client.infer("simple_identity", [given], outputs=[wanted])
    found = shm.get_contents_as_numpy(handle, np.object_, [1, 3])
    assert [element.decode() for element in found.ravel()] == words.ravel().tolist()


def test_cuda_memory_is_refused_and_none_is_listed(api: ModuleType, client: Any) -> None:
    status = client.get_cuda_shared_memory_status()
    assert (status if isinstance(status, list) else list(status.regions)) == []
    with pytest.raises(InferenceServerException):
        client.register_cuda_shared_memory("gpu", b"AAAA", 0, 64)
    client.unregister_cuda_shared_memory()


def test_infer_objects_are_used_again(api: ModuleType, client: Any, region: Any) -> None:
    """The same inputs and outputs, with their content in the request and in shared memory by turns."""
    size = FIRST.nbytes
    region("again_in", [SECOND, FIRST], 2 * size)
    handle = region("again_out", [], 2 * size)
    inputs = pair(api)
    outputs = [api.InferRequestedOutput(f"OUTPUT{n}") for n in (0, 1)]
    ask = partial(client.infer, "simple", inputs, outputs=outputs)
    check_pair(ask())
    for n in (0, 1):  # the other way round, so that it shows where the content came from
        inputs[n].set_shared_memory("again_in", size, offset=n * size)
        outputs[n].set_shared_memory("again_out", size, offset=n * size)
    ask()
    found = shm.get_contents_as_numpy(handle, np.int32, [2, WIDTH])
    np.testing.assert_array_equal(found, np.concatenate([SECOND + FIRST, SECOND - FIRST]))
    for n, array in enumerate((FIRST, SECOND)):
        inputs[n].set_data_from_numpy(array)
        outputs[n].unset_shared_memory()
    check_pair(ask())


def test_one_client_for_many_models_and_settings(api: ModuleType, client: Any) -> None:
    """Requests with everything that the libraries can add to one; a plain model takes no notice of most of it."""
    more = {
        "request_id": "9",
        "model_version": "1",
        "priority": 1,
        "timeout": 10_000_000,
        "parameters": {"tenant": "a"},
    }
    result = client.infer("simple", pair(api), sequence_id=7, sequence_start=True, sequence_end=True, **more)
    check_pair(result)
    answer = result.get_response()
    assert (answer["id"] if isinstance(answer, dict) else answer.id) == "9"


def test_channels_with_settings_of_their_own(served: Server) -> None:
    keepalive = grpc_client.KeepAliveOptions(
        keepalive_time_ms=10_000, keepalive_timeout_ms=5_000, keepalive_permit_without_calls=True
    )
    arguments = [("grpc.primary_user_agent", "example"), ("grpc.max_receive_message_length", 1 << 20)]
    for more in ({"keepalive_options": keepalive}, {"channel_args": arguments}):
        with grpc_client.InferenceServerClient(address(grpc_client, served), **more) as client:
            check_pair(client.infer("simple", pair(grpc_client), client_timeout=PATIENCE_S))
