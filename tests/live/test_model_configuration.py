"""Models as their config.pbtxt says, through a whole gateway and a client people have: REST and gRPC say the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from google.protobuf import json_format

from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway

CONFIGS = {
    "shaped": """max_batch_size: 8
      input { name: "x" data_type: TYPE_FP32 dims: [ 2, 8 ] reshape { shape: [ 16 ] } }
      output { name: "y" data_type: TYPE_FP32 dims: [ 1, 4 ] reshape { shape: [ 4 ] } }
      model_warmup { name: "w" batch_size: 2
        inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 2, 8 ] random_data: true } } }""",
    "optional": """max_batch_size: 8
      input { name: "bias" data_type: TYPE_FP32 dims: [ 2 ] optional: true }
      input { name: "x" data_type: TYPE_FP32 dims: [ 2 ] }""",
    "turned": """max_batch_size: 8
      input [ { name: "b" data_type: TYPE_FP32 dims: [ 2 ] }, { name: "a" data_type: TYPE_FP32 dims: [ 2 ] } ]
      output { name: "d" data_type: TYPE_FP32 dims: [ 2 ] }""",
}
CONTENTS = {"shaped": models.linear(), "optional": models.with_default(["batch", 2]), "turned": models.difference()}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    root = models.repository(tmp_path_factory.mktemp("configured"), {**CONTENTS, "bare": models.linear()}, CONFIGS)
    with gateway("serve", str(root), "--workers", "1", "--instances", "1") as process:
        yield process


@pytest.fixture(scope="module")
def rest(served: GatewayProcess) -> Iterator[Any]:
    with triton_http.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
        yield client


@pytest.fixture(scope="module")
def rpc(served: GatewayProcess) -> Iterator[Any]:
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{served.grpc_port}") as client:
        yield client


@pytest.mark.parametrize("name", [*CONFIGS, "bare"])
def test_both_protocols_print_the_same_configuration(rest: Any, rpc: Any, name: str) -> None:
    document = rest.get_model_config(name)
    message = rpc.get_model_config(name).config
    assert json_format.ParseDict(document, type(message)()) == message
    metadata = rest.get_model_metadata(name)
    for role in ("input", "output"):
        assert [t["name"] for t in document[role]] == [t["name"] for t in metadata[f"{role}s"]]
        assert [[-1, *t["dims"]] for t in document[role]] == [t["shape"] for t in metadata[f"{role}s"]]


def test_clients_see_the_dims_that_are_stated(rest: Any) -> None:
    x = np.random.default_rng(4).standard_normal((3, 2, 8)).astype(np.float32)
    shaped, bare = _tensor("x", x), _tensor("x", x.reshape(3, 16))
    answer = rest.infer("shaped", [shaped]).as_numpy("y")
    assert answer.shape == (3, 1, 4)
    np.testing.assert_allclose(answer.reshape(3, 4), rest.infer("bare", [bare]).as_numpy("y"), rtol=1e-6)
    with pytest.raises(Exception, match=r"unexpected shape for input 'x' for model 'shaped'. Expected \[-1,2,8\]"):
        rest.infer("shaped", [bare])


def test_order_outputs_and_dims_are_the_configs(rest: Any) -> None:
    inputs = [_tensor("a", np.array([[5, 7]], np.float32)), _tensor("b", np.array([[1, 10]], np.float32))]
    answer = rest.infer("turned", inputs)
    assert [output["name"] for output in answer.get_response()["outputs"]] == ["d"]
    assert answer.as_numpy("d").tolist() == [[4, -3]]
    with pytest.raises(Exception, match="unexpected inference output 's' for model 'turned'"):
        rest.infer("turned", inputs, outputs=[triton_http.InferRequestedOutput("s")])


def test_an_optional_input_may_be_left_out(rest: Any) -> None:
    x = _tensor("x", np.array([[1, 2]], np.float32))
    assert rest.infer("optional", [x]).as_numpy("y").tolist() == [[11, 22]]
    bias = _tensor("bias", np.array([[1, 1]], np.float32))
    assert rest.infer("optional", [bias, x]).as_numpy("y").tolist() == [[2, 3]]
    with pytest.raises(Exception, match="expected number of inputs between 1 and 2 but got 1 inputs"):
        rest.infer("optional", [bias])


def _tensor(name: str, array: np.ndarray[Any, Any]) -> Any:
    tensor = triton_http.InferInput(name, list(array.shape), "FP32")
    tensor.set_data_from_numpy(array)
    return tensor
