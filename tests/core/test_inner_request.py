"""Requests of the gateway's own share batches with clients' requests."""

from __future__ import annotations

from gateway.core.inner_request import inner_request
from gateway.core.model import BatchPolicy, ModelSpec, TensorSpec
from gateway.core.request import InferRequest, InputTensor, SequenceStep
from gateway.core.tensor import DATATYPE
from gateway.protocol.oip_json import RequestDecoder

INT32 = DATATYPE["INT32"]


def spec(max_batch_size: int) -> ModelSpec:
    dims = (-1,) if max_batch_size else (-1, -1)
    return ModelSpec(
        "m", "1", "sha256:0", "onnxruntime_onnx",
        (TensorSpec("a", INT32, dims), TensorSpec("b", INT32, dims, optional=True)),
        (TensorSpec("y", INT32, dims), TensorSpec("z", INT32, dims)),
        BatchPolicy(max_batch_size),
    )  # fmt: skip


def test_its_batch_key_is_the_one_a_client_s_request_gets() -> None:
    for max_batch_size in (0, 8):
        model = spec(max_batch_size)
        body = (
            b'{"inputs":[{"name":"a","shape":[2,3],"datatype":"INT32","data":[1,2,3,4,5,6]}],"outputs":[{"name":"z"}]}'
        )
        client = RequestDecoder(model).decode(body)
        inner = inner_request(model, client.inputs, client.rows, (1,), client)
        assert (inner.key, inner.outputs, inner.rows, inner.nbytes) == (
            client.key, client.outputs, client.rows, client.nbytes,
        )  # fmt: skip


def test_rows_of_different_shapes_share_batches_where_the_input_is_ragged() -> None:
    for ragged, same in ((False, False), (True, True)):
        inputs = (TensorSpec("a", INT32, (-1,), ragged=ragged),)
        model = ModelSpec("m", "1", "", "", inputs, (TensorSpec("y", INT32, (1,)),), BatchPolicy(8))
        body = b'{"inputs":[{"name":"a","shape":[1,3],"datatype":"INT32","data":[1,2,3]}]}'
        client = RequestDecoder(model).decode(body)
        inner = inner_request(model, (InputTensor(INT32, (1, 2), [4, 5], None),), 1, (0,), client)
        assert (inner.key == client.key) is same


def test_it_inherits_its_place_in_line() -> None:
    cause = InferRequest((), 1, 0, None, (0,), "id")
    cause.priority, cause.stated_timeout_s, cause.sequence = 2, 0.5, SequenceStep(7, start=True)
    inner = inner_request(spec(8), (InputTensor(INT32, (1, 1), [4], None), None), 1, (0,), cause)
    assert (inner.priority, inner.stated_timeout_s, inner.sequence) == (2, 0.5, SequenceStep(7, start=True))
    assert (inner.request_id, inner.part, inner.nbytes) == (None, False, 4)
