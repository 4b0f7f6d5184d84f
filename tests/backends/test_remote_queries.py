"""What servers say of themselves and their models, read strictly; whether two models can stand in for each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gateway.backends.remote import Endpoint, RemoteError, RemoteModel, RemoteServer
from gateway.backends.remote_queries import described, signature_fault
from gateway.core.batchability import SignatureTensor
from gateway.core.tensor import DATATYPE
from tests.backends.oip_server import Reply, http, http_json, refused_port, serving
from tests.backends.remote_rig import SCHEMES, X, Y

METADATA: dict[str, Any] = {
    "name": "m",
    "versions": ["1", "2"],
    "platform": "onnxruntime_onnx",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
    "outputs": [{"name": "y", "datatype": "BYTES", "shape": ["-1", "3"]}],
}


def test_metadata_and_configuration_make_a_model() -> None:
    config = {
        "max_batch_size": 16,
        "input": [{"name": "x", "optional": True}],
        "dynamic_batching": {"max_queue_delay_microseconds": "500"},
        "sequence_batching": {"direct": {}},
    }
    model = described(METADATA, config, "m", "2")
    assert model == RemoteModel(
        "m",
        "2",
        ("1", "2"),
        "onnxruntime_onnx",
        (SignatureTensor("x", DATATYPE["FP32"], (None, 2), True),),
        (SignatureTensor("y", DATATYPE["BYTES"], (None, 3)),),
        16,
        False,
        True,
        500,
        METADATA,
    )
    bare = described({"inputs": None}, None, "m", "")
    assert (bare.inputs, bare.outputs, bare.versions, bare.max_batch_size) == ((), (), (), None)


def tensors(item: Any) -> dict[str, Any]:
    return METADATA | {"inputs": item}


UNREADABLE = [
    tensors("x"),
    tensors([7]),
    tensors([{"datatype": "FP32", "shape": [1]}]),
    tensors([{"name": "x", "datatype": "STRING", "shape": [1]}]),
    tensors([{"name": "x", "datatype": "FP32"}]),
    tensors([{"name": "x", "datatype": "FP32", "shape": [1.5]}]),
    tensors([{"name": "x", "datatype": "FP32", "shape": [-2]}]),
    tensors([{"name": "x", "datatype": "FP32", "shape": [1] * 99}]),
    tensors([{"name": "x", "datatype": "FP32", "shape": [1]}] * 2),
    tensors([{"name": "x" * 5000, "datatype": "FP32", "shape": [1]}]),
    tensors([{"name": str(n), "datatype": "FP32", "shape": [1]} for n in range(1000)]),
]


@pytest.mark.parametrize("metadata", UNREADABLE, ids=range(len(UNREADABLE)))
def test_metadata_that_cannot_be_used(metadata: dict[str, Any]) -> None:
    with pytest.raises(RemoteError):
        described(metadata, None, "m", "")


def test_a_model_of_streams_is_refused() -> None:
    with pytest.raises(RemoteError, match="decoupled"):
        described(METADATA, {"model_transaction_policy": {"decoupled": True}}, "m", "")


def model(inputs: Any, outputs: Any) -> RemoteModel:
    return RemoteModel("m", "", (), "", tuple(inputs), tuple(outputs))


OTHER = SignatureTensor("z", X.datatype, (None, 2))
OPTIONAL = SignatureTensor("z", X.datatype, (None, 2), True)
SIGNATURES = [
    (model([X], [Y]), ""),
    (model([X, OPTIONAL], [OTHER, Y]), ""),
    (model([], []), ""),
    (model([X], [SignatureTensor("y", Y.datatype, (8, 2))]), ""),
    (model([SignatureTensor("x", X.datatype, (None, None))], [Y]), ""),
    (model([SignatureTensor("x", X.datatype, (8, 2))], [Y]), "its input 'x' has shape [8, 2], not [-1, 2]"),
    (model([OTHER], [Y]), "it has no input 'x'"),
    (model([X, OTHER], [Y]), "it wants an input 'z'"),
    (model([X], [OTHER]), "it has no output 'y'"),
    (model([SignatureTensor("x", DATATYPE["INT8"], (None, 2))], [Y]), "its input 'x' is INT8, not FP32"),
    (model([X], [SignatureTensor("y", Y.datatype, (None, 3))]), "its output 'y' has shape [-1, 3], not [-1, 2]"),
    (model([X], [SignatureTensor("y", Y.datatype, (2,))]), "its output 'y' has shape [2], not [-1, 2]"),
]


@pytest.mark.parametrize(("found", "text"), SIGNATURES, ids=range(len(SIGNATURES)))
def test_which_model_can_stand_in_for_another(found: RemoteModel, text: str) -> None:
    fault = signature_fault((X,), (Y,), found)
    assert fault == (f"signature mismatch: {text}" if text else "")


def test_a_model_that_takes_less_than_is_taken_here_cannot_stand_in() -> None:
    small = replace(model([X], [Y]), max_batch_size=4)
    assert signature_fault((X,), (Y,), small, 4) == ""
    assert signature_fault((X,), (Y,), small, 5) == (
        "signature mismatch: it takes at most 4 rows, and batches have up to 5; write max_batch_size: 4 for the model"
    )
    assert signature_fault((X,), (Y,), replace(small, max_batch_size=0), 5) == ""  # whatever its shape says
    needs = replace(model([X, replace(OPTIONAL, optional=False)], [Y]), max_batch_size=4)
    assert signature_fault((X, OPTIONAL), (Y,), needs).endswith("it wants input 'z', which callers may leave out")
    assert signature_fault((X, OPTIONAL), (Y,), replace(needs, max_batch_size=None)) == ""  # nobody says
    assert signature_fault((X, OPTIONAL), (Y,), small).endswith("it has no input 'z'")


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_questions_over_both_protocols(scheme: str) -> None:
    async with serving(scheme) as peer:
        peer.name = "triton"
        server = RemoteServer(Endpoint(scheme, "127.0.0.1", peer.port))  # type: ignore[arg-type]
        assert server.info is None
        info = await server.connect()
        assert (info.name, info.binary, info.is_triton) == ("triton", True, True)
        assert [(e.name, e.ready) for e in await server.index()] == [("double", True), ("cold", False)]
        found = await server.model("double")
        assert (found.inputs, found.outputs, found.max_batch_size) == ((X,), (Y,), 8)
        peer.extensions.remove("model_configuration")
        await server.connect()
        assert (await server.model("double")).max_batch_size is None
        peer.missing = True
        with pytest.raises(RemoteError) as caught:
            await server.model("double")
        assert (caught.value.missing, caught.value.connect) == (True, False)
        await server.close()


async def test_an_index_of_names_alone() -> None:
    def listed(peer: Any) -> None:
        reply = peer._reply

        def other(request: Any) -> Reply:
            if request.path == "/v2/repository/index":
                return Reply(http_json({"detail": "Not Found"}, 404))
            if request.path == "/v2/models":
                return Reply(http_json({"models": ["a", "b"]}))
            found: Reply = reply(request)
            return found

        peer._reply = other

    async with serving("http", None, listed) as peer:
        server = RemoteServer(Endpoint("http", "127.0.0.1", peer.port))
        assert [(entry.name, entry.ready) for entry in await server.index()] == [("a", True), ("b", True)]
        await server.close()


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b"", b'{"name":'])
async def test_answers_that_are_none(body: bytes) -> None:
    async with serving("http", None, lambda peer: setattr(peer, "_reply", lambda _: Reply(http(body)))) as peer:
        server = RemoteServer(Endpoint("http", "127.0.0.1", peer.port))
        with pytest.raises(RemoteError):
            await server.connect()
        with pytest.raises(RemoteError):
            await server.model("double")
        assert not server.reachable
        await server.close()


async def test_nobody_there() -> None:
    server = RemoteServer(Endpoint("http", "127.0.0.1", refused_port()))
    with pytest.raises(RemoteError, match="Connection refused") as caught:
        await server.connect()
    assert caught.value.connect
    assert not await server.ready()
    await server.close()


async def test_a_silent_server_is_given_up_in_time() -> None:
    async with serving("http", None, lambda peer: setattr(peer, "_reply", lambda _: Reply(b"", "hang"))) as peer:
        server = RemoteServer(Endpoint("http", "127.0.0.1", peer.port))
        with pytest.raises(RemoteError, match=r"no answer within 0\.05 s"):
            await server.connect(0.05)
        await server.close()
