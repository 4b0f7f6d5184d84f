"""Remote replicas against real servers: Triton, MLServer and KServe, over HTTP and gRPC.

What a replica answers is compared with what it was sent (the models echo) and, bit for bit, with what tritonclient gets
from the same server.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from benchmarks.server import free_port
from gateway.backends.one_shot import run_once
from gateway.backends.remote import Endpoint, RemoteError, RemoteReplica, RemoteServer
from gateway.core.outcome import Failure, FailureKind, Sign, Success
from gateway.core.request import InputTensor
from gateway.core.tensor import DATATYPE, pack_bytes, unpack_bytes
from gateway.core.traits import Traits
from tests.differential import zoo
from tests.differential.triton_process import triton
from tests.live import venvs
from tests.live.gateway_process import until
from tests.live.remote_echo import KSERVE, MLSERVER

pytestmark = pytest.mark.slow
Scheme = Literal["http", "grpc"]
SCHEMES: tuple[Scheme, ...] = ("http", "grpc")
START_S = 180.0
TRAITS = Traits("oip", max_slots=8)

SAMPLES: dict[str, Any] = {
    "FP32": np.array([[0.1, -3.4e38, 1e-40], [1, 2, -0.0]], np.float32),
    "FP64": np.array([[0.1, -1.7e308, 5e-324]], np.float64),
    "FP16": np.array([[1.5, -65504.0, 0.0]], np.float16),
    "INT64": np.array([[-(2**63), 2**63 - 1, 9007199254740993]], np.int64),
    "UINT8": np.array([[0, 255, 7]], np.uint8),
    "BOOL": np.array([[True, False, True]], np.bool_),
    "BYTES": np.array([["hé".encode(), b"", b"b c"]], np.object_),
}
NAMES = {f"id_{datatype.lower()}": datatype for datatype in SAMPLES}


@dataclass
class Place:
    """Where a server listens, and which samples it can take."""

    maker: str
    ports: dict[Scheme, int]
    without: frozenset[tuple[Scheme, str]] = frozenset()

    def server(self, scheme: Scheme, **more: Any) -> RemoteServer:
        return RemoteServer(Endpoint(scheme, "127.0.0.1", self.ports[scheme], **more))


@pytest.fixture(scope="module")
def real_triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    twins = [*(zoo.copy(name, datatype) for name, datatype in NAMES.items())]
    twins += [twin for twin in zoo.TWINS if twin.name in ("versions", "add_sub")]
    root = zoo.write_repository(tmp_path_factory.mktemp("triton"), twins, triton=True)
    with triton(root, []) as process:
        yield Place("triton", {"http": process.port, "grpc": process.grpc_port})


@contextlib.contextmanager
def _process(command: list[str], folder: Path, port: int) -> Iterator[None]:
    log = folder / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
    try:

        def ready() -> bool:
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            with contextlib.closing(connection), contextlib.suppress(OSError):
                connection.request("GET", "/v2/health/ready")
                return connection.getresponse().status == 200
            return False

        until(ready, START_S, "the server did not become ready")
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


@pytest.fixture(scope="module")
def real_mlserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    program = venvs.need(venvs.mlserver)
    root = tmp_path_factory.mktemp("mlserver")
    ports: dict[Scheme, int] = {"http": free_port(), "grpc": free_port()}
    settings = {"host": "127.0.0.1", "http_port": ports["http"], "grpc_port": ports["grpc"], "parallel_workers": 0}
    (root / "settings.json").write_text(json.dumps(settings | {"metrics_port": free_port()}))
    for name, datatype in NAMES.items():
        home = root / name
        home.mkdir()
        (home / "echo.py").write_text(MLSERVER)
        tensor = {"datatype": datatype, "shape": [-1, 3]}
        stated = {"inputs": [tensor | {"name": "INPUT0"}], "outputs": [tensor | {"name": "OUTPUT0"}]}
        (home / "model-settings.json").write_text(
            json.dumps({"name": name, "implementation": "echo.Echo", "parameters": {"version": "v1"}} | stated)
        )
    with _process([str(program.path), "start", str(root)], root, ports["http"]):
        yield Place("mlserver", ports, frozenset({("grpc", "FP16")}))


@pytest.fixture(scope="module")
def real_kserve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    program = venvs.need(venvs.kserve)
    root = tmp_path_factory.mktemp("kserve")
    (root / "serve.py").write_text(KSERVE)
    ports: dict[Scheme, int] = {"http": free_port(), "grpc": free_port()}
    with _process([str(program.path), "serve.py", str(ports["http"]), str(ports["grpc"]), *NAMES], root, ports["http"]):
        yield Place("kserve", ports, frozenset({("http", "FP16")}))


@pytest.fixture(params=["triton", "mlserver", "kserve"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(f"real_{request.param}")
    return found


def tensor_of(datatype: str, array: Any) -> InputTensor:
    data = pack_bytes(list(array.ravel())) if datatype == "BYTES" else array.tobytes()
    return InputTensor(DATATYPE[datatype], array.shape, None, data)


async def replica_for(server: RemoteServer, name: str, version: str = "") -> RemoteReplica:
    model = await server.model(name, version, 20.0)
    replica = RemoteReplica(server, name, version, model.inputs, model.outputs, TRAITS)
    assert not await replica.verify(20.0)
    return replica


def theirs(place: Place, scheme: Scheme, name: str, array: Any, datatype: str) -> Any:
    """What tritonclient gets."""
    module: Any = triton_http if scheme == "http" else triton_grpc
    client = module.InferenceServerClient(f"127.0.0.1:{place.ports[scheme]}")
    with contextlib.closing(client):
        given = module.InferInput("INPUT0", array.shape, datatype)
        wanted = None
        if scheme == "http":
            binary = place.maker == "triton"
            given.set_data_from_numpy(array, binary_data=binary)
            wanted = [module.InferRequestedOutput("OUTPUT0", binary_data=binary)]
        else:
            given.set_data_from_numpy(array)
        return client.infer(name, [given], outputs=wanted).as_numpy("OUTPUT0")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("datatype", SAMPLES)
async def test_datatypes_come_back_as_their_own_client_gets_them(place: Place, scheme: Scheme, datatype: str) -> None:
    if (scheme, datatype) in place.without:
        pytest.skip("this server has no form for it")
    server = place.server(scheme, connect_timeout_s=5.0)
    array, name = SAMPLES[datatype], f"id_{datatype.lower()}"
    replica = await replica_for(server, name)
    outcome = await run_once(replica, [tensor_of(datatype, array)], (0,), 20.0)
    await replica.close()
    assert isinstance(outcome, Success), outcome
    (output,) = outcome.outputs
    assert (output.name, output.datatype.name, output.shape) == ("OUTPUT0", datatype, array.shape)
    assert bytes(output.data) == bytes(tensor_of(datatype, array).buffer or b"")
    # tritonclient does not tell KServe that its body is JSON, nor read its typed tensors, nor send FP16 as JSON.
    if place.maker == "triton" or (place.maker == "mlserver" and datatype != "FP16"):
        same = theirs(place, scheme, name, array, datatype)
        if datatype == "BYTES":
            assert unpack_bytes(output.data) == [v if isinstance(v, bytes) else v.encode() for v in same.ravel()]
        else:
            assert same.tobytes() == bytes(output.data)


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_what_a_server_says_of_itself_and_its_models(place: Place, scheme: Scheme) -> None:
    server = place.server(scheme, connect_timeout_s=5.0)
    info = await server.connect(20.0)
    assert info.is_triton == (place.maker == "triton")
    assert info.name
    model = await server.model("id_fp32", "", 20.0)
    assert [(t.name, t.datatype.name, t.shape) for t in model.inputs][:1] == [
        ("INPUT0", "FP32", (None, None) if place.maker == "triton" else (None, 3))
    ]
    assert model.max_batch_size == (8 if place.maker == "triton" else None)
    if place.maker != "kserve" or scheme == "http":
        assert {entry.name for entry in await server.index(20.0) if entry.ready} >= set(NAMES)
    with pytest.raises(RemoteError) as caught:
        await server.model("nobody", "", 20.0)
    assert caught.value.missing
    await server.close()


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_model_that_is_not_there_is_missing(place: Place, scheme: Scheme) -> None:
    server = place.server(scheme, connect_timeout_s=5.0)
    known = await replica_for(server, "id_fp32")
    known.model = "nobody"
    known.verified = False
    known.wire = None
    assert "nobody" in await known.verify(20.0)
    assert server.reachable
    await known.close()


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_input_that_triton_refuses_is_suspect(real_triton: Place, scheme: Scheme) -> None:
    server = real_triton.server(scheme)
    replica = await replica_for(server, "id_fp32")
    many = np.zeros((9, 3), np.float32)  # its largest batch has 8 rows
    outcome = await run_once(replica, [tensor_of("FP32", many)], (0,), 20.0)
    assert isinstance(outcome, Failure)
    assert (outcome.kind, outcome.sign) == (FailureKind.SUSPECT, Sign.ANSWERED)
    assert replica.available
    await replica.close()


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_versions_and_several_tensors(real_triton: Place, scheme: Scheme) -> None:
    server = real_triton.server(scheme)
    one = np.array([[1, 2]], np.float32)
    for version in ("1", "3"):
        replica = await replica_for(server, "versions", version)
        outcome = await run_once(replica, [tensor_of("FP32", one)], (0,), 20.0)
        assert isinstance(outcome, Success)
        assert bytes(outcome.outputs[0].data) == (one * int(version)).tobytes()
    both = await replica_for(server, "add_sub")
    a, b = np.array([[5, 6]], np.int32), np.array([[1, 2]], np.int32)
    for outputs, wanted in (((1,), [a - b]), ((0, 1), [a + b, a - b])):
        outcome = await run_once(both, [tensor_of("INT32", a), tensor_of("INT32", b)], outputs, 20.0)
        assert isinstance(outcome, Success)
        assert [bytes(o.data) for o in outcome.outputs] == [w.tobytes() for w in wanted]
    await server.close()


async def test_triton_over_json_alone(real_triton: Place) -> None:
    server = real_triton.server("http", json="always")
    replica = await replica_for(server, "id_int64")
    outcome = await run_once(replica, [tensor_of("INT64", SAMPLES["INT64"])], (0,), 20.0)
    assert isinstance(outcome, Success)
    assert bytes(outcome.outputs[0].data) == SAMPLES["INT64"].tobytes()
    await replica.close()
