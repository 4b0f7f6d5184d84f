"""Requests that the gateway makes itself: a step of an ensemble, an execution on behalf of the response cache.

Rule: such a request is an ordinary one of the model it goes to. It has the batch key that the protocols' decoders give
(trailing shapes and wanted outputs), so it shares batches with everybody else's requests.
"""

from __future__ import annotations

from gateway.core.assembly import part_nbytes
from gateway.core.model import ModelSpec
from gateway.core.ragged import agreeing_dims
from gateway.core.request import InferRequest, InputTensor


def inner_request(
    spec: ModelSpec, inputs: tuple[InputTensor | None, ...], rows: int, outputs: tuple[int, ...], cause: InferRequest
) -> InferRequest:
    """A request to the model of `spec`, made because of `cause`, whose place in line it inherits.

    `inputs` are in the model's order and fit its signature; `outputs` are indexes, ascending. What is left to set is
    `received`, `timeout_s` and `settle`.
    """
    shapes = [None if tensor is None else tensor.shape for tensor in inputs]
    trailing = agreeing_dims(spec.inputs, shapes, spec.batched)
    nbytes = sum([part_nbytes(tensor) for tensor in inputs if tensor is not None])
    request = InferRequest(inputs, rows, nbytes, (trailing, outputs), outputs, None)
    request.priority = cause.priority
    request.stated_timeout_s = cause.stated_timeout_s
    request.sequence = cause.sequence
    return request
