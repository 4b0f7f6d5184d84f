"""Shared memory with the clients people have, tritonclient over HTTP and gRPC, against whole gateways; and with those
who mean no good."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway, until

MODELS = {
    "two": models.two_inputs(),
    "text": models.identity("BYTES"),
    "half": models.identity("FP16"),
    "cached": models.identity("FP32"),
    "small": models.identity("FP32"),
}
CONFIGS = {
    "cached": "max_batch_size: 8\nresponse_cache { enable: true }",
    "small": "max_batch_size: 4\ndynamic_batching { }",
}
KEYS = (f"/oip-{os.getpid()}-{number}" for number in itertools.count())
BYTES = 256
Create = Callable[..., Any]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    root = models.repository(tmp_path_factory.mktemp("sharing"), MODELS, CONFIGS)
    config = root.parent / f"{root.name}.yaml"
    config.write_text(f"defaults: {{oversize: split}}\nmodels: [{{source: {root}}}]\n")
    with gateway("serve", "-c", str(config), "--allow-client-shm", "--workers", "2") as process:
        yield process


@pytest.fixture(params=["http", "grpc"])
def api(request: pytest.FixtureRequest) -> Any:
    return http_client if request.param == "http" else grpc_client


@pytest.fixture
def client(api: Any, served: GatewayProcess) -> Iterator[Any]:
    port = served.port if api is http_client else served.grpc_port
    with contextlib.closing(api.InferenceServerClient(f"127.0.0.1:{port}")) as found:
        yield found
        found.unregister_system_shared_memory()
    until(lambda: not held(served), 20, "objects are still open although nobody uses them")


def held(served: GatewayProcess) -> list[str]:
    """Shared memory objects of clients that the gateway has open."""
    found = []
    for descriptor in Path(f"/proc/{served.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.append(str(descriptor.readlink()))
    return [target for target in found if target.startswith("/dev/shm/")]


@pytest.fixture
def create(client: Any) -> Iterator[Create]:
    """Objects in /dev/shm that are registered under `name`; they go with the test."""
    handles = []

    def make(name: str, size: int = BYTES) -> Any:
        key = next(KEYS)
        handle = shm.create_shared_memory_region(name, key, size)
        handles.append(handle)
        client.register_system_shared_memory(name, key, size)
        return handle

    yield make
    for handle in handles:
        shm.destroy_shared_memory_region(handle)


def given(api: Any, name: str, datatype: str, shape: list[int], region: str, size: int, offset: int = 0) -> Any:
    found = api.InferInput(name, shape, datatype)
    found.set_shared_memory(region, size, offset)
    return found


def wanted(api: Any, name: str, region: str, size: int, offset: int = 0) -> Any:
    found = api.InferRequestedOutput(name)
    found.set_shared_memory(region, size, offset)
    return found


def regions(client: Any) -> dict[str, tuple[int, int]]:
    """Name → (offset, bytes)."""
    status = client.get_system_shared_memory_status()
    if not isinstance(status, list):
        return {name: (region.offset, region.byte_size) for name, region in status.regions.items()}
    return {region["name"]: (region["offset"], region["byte_size"]) for region in status}


def test_registration(client: Any, served: GatewayProcess, create: Create) -> None:
    metadata = client.get_server_metadata()
    extensions = metadata["extensions"] if isinstance(metadata, dict) else list(metadata.extensions)
    assert "system_shared_memory" in extensions
    assert "cuda_shared_memory" not in extensions
    handle = create("a")
    create("b")
    assert len(held(served)) == 2
    assert regions(client) == {"a": (0, BYTES), "b": (0, BYTES)}
    with pytest.raises(InferenceServerException, match="shared memory region 'a' already in manager"):
        client.register_system_shared_memory("a", handle._shm_key, 8)
    with pytest.raises(InferenceServerException, match="Unable to open shared memory region: '/absent-object'"):
        client.register_system_shared_memory("c", "/absent-object", 8)
    client.unregister_system_shared_memory("a")
    client.register_system_shared_memory("a", handle._shm_key, 8, offset=16)
    assert regions(client) == {"a": (16, 8), "b": (0, BYTES)}
    client.unregister_system_shared_memory()
    assert regions(client) == {}
    with pytest.raises(InferenceServerException, match="Unable to find system shared memory region: 'a'"):
        client.get_system_shared_memory_status("a")


def test_inputs_and_outputs_in_shared_memory(api: Any, client: Any, create: Create) -> None:
    incoming, outgoing = create("in"), create("out")
    a, b = np.arange(6, dtype=np.int32).reshape(2, 3), np.full((2, 3), 10, np.int32)
    shm.set_shared_memory_region(incoming, [a, b])
    inputs = [given(api, "a", "INT32", [2, 3], "in", 24), given(api, "b", "INT32", [2, 3], "in", 24, 24)]
    outputs = [wanted(api, "product", "out", 24, 32), api.InferRequestedOutput("sum")]
    result = client.infer("two", inputs, outputs=outputs)
    assert shm.get_contents_as_numpy(outgoing, np.int32, [2, 3], 32).tolist() == (a * b).tolist()
    assert result.as_numpy("sum").tolist() == (a + b).tolist()
    described = result.get_output("product")
    if api is http_client:
        assert described == {"name": "product", "datatype": "INT32", "shape": [2, 3]}
    else:
        assert (described.datatype, list(described.shape), len(described.parameters)) == ("INT32", [2, 3], 0)
        assert [len(raw) for raw in result.get_response().raw_output_contents] == [0, 24]
    assert bytes(incoming._mpsm_handle.buf[:48]) == a.tobytes() + b.tobytes()


@pytest.mark.parametrize("model", ["text", "half"])
def test_datatypes_that_json_has_not(api: Any, client: Any, create: Create, model: str) -> None:
    incoming, outgoing = create("in"), create("out")
    if model == "half":
        datatype, sample, size = "FP16", np.array([[1, 2.5, -3]], np.float16), 6
    else:
        datatype, sample, size = "BYTES", serialize_byte_tensor(np.array([["", "hello", "é"]], np.object_)), 4 + 9 + 6
    shm.set_shared_memory_region(incoming, [sample])
    client.infer(model, [given(api, "x", datatype, [1, 3], "in", size)], outputs=[wanted(api, "y", "out", 64, 8)])
    content = [bytes(handle._mpsm_handle.buf[start : start + size]) for handle, start in ((incoming, 0), (outgoing, 8))]
    assert content[0] == content[1] != bytes(size)


def test_an_answer_from_the_cache_is_put_there_too(api: Any, client: Any, create: Create) -> None:
    incoming, outgoing = create("in"), create("out")
    for value in (1.5, 1.5, 2.5):
        sample = np.full((1, 4), value, np.float32)
        shm.set_shared_memory_region(incoming, [sample])
        shm.set_shared_memory_region(outgoing, [np.zeros((1, 4), np.float32)])
        client.infer("cached", [given(api, "x", "FP32", [1, 4], "in", 16)], outputs=[wanted(api, "y", "out", 16)])
        assert shm.get_contents_as_numpy(outgoing, np.float32, [1, 4]).tolist() == sample.tolist()


def test_callers_of_one_batch_get_their_own_rows(api: Any, served: GatewayProcess, create: Create) -> None:
    region = create("all", 4096)
    sample = np.arange(256, dtype=np.float32).reshape(64, 4)
    shm.set_shared_memory_region(region, [sample])
    port = served.port if api is http_client else served.grpc_port

    def one(row: int) -> None:
        with contextlib.closing(api.InferenceServerClient(f"127.0.0.1:{port}")) as own:
            where = 1024 + 16 * (63 - row)
            x, y = given(api, "x", "FP32", [1, 4], "all", 16, 16 * row), wanted(api, "y", "all", 16, where)
            own.infer("small", [x], outputs=[y])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(64)))
    assert shm.get_contents_as_numpy(region, np.float32, [64, 4], 1024).tolist() == sample[::-1].tolist()


def test_more_rows_than_a_batch_holds(api: Any, client: Any, create: Create) -> None:
    incoming, outgoing = create("in"), create("out")
    sample = np.arange(22, dtype=np.float32).reshape(11, 2)
    shm.set_shared_memory_region(incoming, [sample])
    client.infer("small", [given(api, "x", "FP32", [11, 2], "in", 88)], outputs=[wanted(api, "y", "out", 88)])
    assert shm.get_contents_as_numpy(outgoing, np.float32, [11, 2]).tolist() == sample.tolist()


def test_errors_of_use(api: Any, client: Any, create: Create) -> None:
    create("r", 64)
    x = given(api, "x", "FP32", [1, 4], "r", 16)
    for inputs, outputs, words in [
        ([given(api, "x", "FP32", [1, 4], "nobody", 16)], None, "Unable to find shared memory region: 'nobody'"),
        ([given(api, "x", "FP32", [1, 4], "r", 16, 64)], None, "Invalid offset for shared memory region"),
        ([given(api, "x", "FP32", [1, 4], "r", 16, 56)], None, "Invalid offset + byte size"),
        ([given(api, "x", "FP32", [1, 4], "r", 12)], None, "Expected 16, got 12"),
        ([x], [wanted(api, "y", "nobody", 16)], "Unable to find shared memory region: 'nobody'"),
        ([x], [wanted(api, "y", "r", 15)], "should be at least 16 bytes"),
    ]:
        with pytest.raises(InferenceServerException) as caught:
            client.infer("small", inputs, outputs=outputs)
        assert words in str(caught.value)
    client.infer("small", [x])


def test_a_stream_answers_into_shared_memory(served: GatewayProcess) -> None:
    key = next(KEYS)
    handle = shm.create_shared_memory_region("s", key, 64)
    answers: queue.Queue[Any] = queue.Queue()
    try:
        with contextlib.closing(grpc_client.InferenceServerClient(f"127.0.0.1:{served.grpc_port}")) as client:
            client.register_system_shared_memory("s", key, 64)
            shm.set_shared_memory_region(handle, [np.array([[1, 2]], np.float32)])
            client.start_stream(lambda result, error: answers.put((result, error)))
            for size in (8, 7, 8):
                x = given(grpc_client, "x", "FP32", [1, 2], "s", 8)
                client.async_stream_infer("small", [x], outputs=[wanted(grpc_client, "y", "s", size, 32)])
            errors = [answers.get(timeout=60)[1] for _ in range(3)]
            client.stop_stream()
            client.unregister_system_shared_memory("s")
        assert [error is None for error in errors] == [True, False, True]
        assert "should be at least 8 bytes" in str(errors[1])
        assert shm.get_contents_as_numpy(handle, np.float32, [1, 2], 32).tolist() == [[1, 2]]
    finally:
        shm.destroy_shared_memory_region(handle)


def test_an_object_cut_short_harms_nobody(api: Any, client: Any, served: GatewayProcess, create: Create) -> None:
    """A gateway that maps it would die of a bus error."""
    handle = create("r", 1 << 20)
    name = Path("/dev/shm") / handle._shm_key.lstrip("/")
    x = given(api, "x", "FP32", [1, 1 << 17], "r", 1 << 19)
    y = wanted(api, "y", "r", 1 << 19, 1 << 19)
    client.infer("small", [x], outputs=[y])
    os.truncate(name, 1 << 19)
    with pytest.raises(InferenceServerException, match="made shorter"):
        client.infer("small", [x], outputs=[y])
    os.truncate(name, 0)
    with pytest.raises(InferenceServerException, match="made shorter"):
        client.infer("small", [x])
    assert name.stat().st_size == 0
    os.truncate(name, 1 << 20)
    client.infer("small", [x], outputs=[y])
    assert served.process.poll() is None


def test_a_huge_sparse_object_costs_nothing(api: Any, client: Any, served: GatewayProcess) -> None:
    name = Path("/dev/shm") / next(KEYS).lstrip("/")
    name.touch()
    try:
        os.truncate(name, 1 << 36)
        client.register_system_shared_memory("huge", f"/{name.name}", 1 << 36)
        with pytest.raises(InferenceServerException, match="bytes in shared memory, at most"):
            client.infer("small", [given(api, "x", "FP32", [1, 1 << 34], "huge", 1 << 36)])
        assert client.is_server_live()
        assert name.stat().st_blocks == 0
    finally:
        name.unlink()


@pytest.mark.slow
def test_thousands_of_registrations(client: Any, create: Create) -> None:
    handle = create("first")
    refusals = []
    for number in range(3000):
        try:
            client.register_system_shared_memory(f"r{number}", handle._shm_key, 1)
        except InferenceServerException as error:
            refusals.append(str(error))
    assert len(refusals) >= 3000 - 1024
    assert all("are allowed" in text for text in refusals)
    assert len(regions(client)) == 3001 - len(refusals)
    client.unregister_system_shared_memory()
    assert regions(client) == {}
    client.register_system_shared_memory("again", handle._shm_key, 1)


def test_off_is_the_default(api: Any, tmp_path: Path) -> None:
    root = models.repository(tmp_path / "models", {"small": MODELS["small"]})
    handle = shm.create_shared_memory_region("r", key := next(KEYS), 64)
    try:
        with gateway("serve", str(root), "--workers", "1") as process:
            port = process.port if api is http_client else process.grpc_port
            with contextlib.closing(api.InferenceServerClient(f"127.0.0.1:{port}")) as client:
                x = given(api, "x", "FP32", [1, 2], "r", 8)
                calls: list[Callable[[], object]] = [
                    partial(client.register_system_shared_memory, "r", key, 64),
                    partial(client.unregister_system_shared_memory, "r"),
                    partial(client.infer, "small", [x]),
                ]
                for call in calls:
                    with pytest.raises(InferenceServerException, match="switched off") as caught:
                        call()
                    assert caught.value.status() in ("501", "StatusCode.UNIMPLEMENTED")
                assert regions(client) == {}
                assert "system_shared_memory" not in str(client.get_server_metadata())
    finally:
        shm.destroy_shared_memory_region(handle)
