"""Tensors in shared memory, the same for REST and gRPC: inputs are copied out of it, outputs get their places in it.

Rules (wire notes §1.7): an input's area has exactly the bytes of its datatype and shape, in binary form, and is checked
like a tensor that was sent so; an output's area has room for it, which shows when the output is there. All areas are
looked up when the request is read: one that is not there costs no execution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gateway.core.client_memory import Area, ClientMemory
from gateway.core.request import InputTensor, OutputTensor
from gateway.errors import RegionFailed, TooLarge
from gateway.protocol.oip_binary import check_size, from_blob
from gateway.protocol.oip_plan import InputPlan, ResponseForm


def check_total(memory: ClientMemory, areas: Sequence[Area | None]) -> None:
    """Raises TooLarge: the inputs of one request would take more than allowed. A request is small, an area is not."""
    total = sum([area.nbytes for area in areas if area is not None])
    if total > memory.max_bytes:
        raise TooLarge(
            f"the inputs of the request have {total} bytes in shared memory, at most {memory.max_bytes} are allowed"
        )


def from_area(memory: ClientMemory, plan: InputPlan, area: Area, model: str) -> InputTensor:
    """One input's bytes as they are now, checked against its shape.

    Raises:
        NotFound, InvalidRequest, RegionFailed, Unsupported: see `ClientMemory.find` and `Place.read`.
        InvalidRequest: they do not fit the shape; see `oip_binary.from_blob`.
    """
    place = memory.find(area)
    check_size(plan, area.nbytes, model)  # before anything of that size is read
    return from_blob(plan, memoryview(place.read()), model)


def aimed(memory: ClientMemory, form: ResponseForm) -> ResponseForm:
    """A form with areas as one request has it: with the regions they lie in. Raises as `ClientMemory.find`."""
    return replace(form, targets=tuple([None if area is None else memory.find(area) for area in form.areas]))


def deliver(form: ResponseForm, tensors: Sequence[OutputTensor]) -> list[OutputTensor]:
    """Write what is wanted in shared memory there; what is left for the answer of it has no data.

    Args:
        tensors: in the order of `form.outputs`.

    Raises:
        RegionFailed: an area is too small, and nothing was written; or it cannot be written.
        InvalidRequest: the client's object has shrunk.
    """
    places = list(zip(tensors, form.targets, strict=True))
    for tensor, target in places:
        if target is not None and len(tensor.data) > target.area.nbytes:
            raise RegionFailed(
                f"shared memory size specified with the request for output '{tensor.name}' ({target.area.nbytes} "
                f"bytes) should be at least {len(tensor.data)} bytes to hold the results"
            )
    left = []
    for tensor, target in places:
        if target is None:
            left.append(tensor)
            continue
        target.write(tensor.data)
        left.append(OutputTensor(tensor.name, tensor.datatype, tensor.shape, b""))
    return left
