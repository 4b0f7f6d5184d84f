"""Golden inputs: requests whose right answers are known, answered by every instance before a version serves.

The file is read in registry/golden_file.py. Outputs that an item does not name are not looked at.

Floating point fits if |a - b| <= atol + rtol * max(|a|, |b|), NaN fits NaN and an infinity itself; everything else must
be equal, shapes and datatypes included. A request is checked like a client's, with the same words. What is told about a
difference names the item, the output and the first element, and no more than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import orjson

from gateway.backends.interface import Failure, Replica
from gateway.core.agreement import distances, numbers, same_numbers
from gateway.core.assembly import encode_values
from gateway.core.model import ModelSpec, TensorSpec
from gateway.core.request import InputTensor, OutputTensor
from gateway.core.sequence_tensors import as_executed
from gateway.core.tensor import element_count, unpack_bytes
from gateway.errors import ConfigError, GatewayError, ModelError
from gateway.loading_trial import run_patiently, unanswered
from gateway.protocol.oip_data import from_json
from gateway.protocol.oip_json import RequestDecoder
from gateway.protocol.oip_plan import InputPlan, Planner
from gateway.protocol.options import ProtocolOptions
from gateway.registry.golden_file import GoldenFile, golden_requests

_OPTIONS: Final = ProtocolOptions(json_half=True)
_MAX_SHOWN: Final = 64


@dataclass(frozen=True, slots=True)
class _Item:
    inputs: Sequence[InputTensor | None]
    places: tuple[int, ...]
    """Of `expected`, in the model's outputs."""
    expected: Sequence[OutputTensor]


async def check_golden(golden: GoldenFile, spec: ModelSpec, replicas: Sequence[Replica]) -> int:
    """Have the instances answer the golden inputs; returns how many there are.

    Args:
        replicas: of the version, naming tensors as `spec` does; remote servers among them are not asked.

    Raises:
        ConfigError: the file is no list of requests to this model, or the model is one that cannot be asked like this.
        ModelError: an answer is wrong, or none came.
    """
    try:
        items = _read(golden, spec)
    except GatewayError as error:
        raise ConfigError(f"golden inputs {golden.place}: {error}") from None
    own = [replica for replica in replicas if replica.traits.kind != "oip"] or replicas[:1]
    for number, item in enumerate(items, start=1):
        for replica in own:
            outcome = await run_patiently(replica, item.inputs, item.places)
            if isinstance(outcome, Failure):
                raise unanswered(outcome, f"golden input {number} of {golden.place} is not answered")
            for expected, answered in zip(item.expected, outcome.outputs, strict=True):
                if wrong := _difference(expected, answered, golden.rtol, golden.atol):
                    raise ModelError(
                        f"golden input {number} of {golden.place}: output '{expected.name}' {wrong}; put another "
                        "version there, or correct the file if this answer is the right one"
                    )
    return len(items)


# -- the file ------------------------------------------------------------------------------------------------------


def _read(golden: GoldenFile, spec: ModelSpec) -> list[_Item]:
    if spec.scheduling.sequence is not None or spec.scheduling.ensemble:
        raise ConfigError("models with sequences and ensembles cannot be checked with golden inputs; remove the file")
    if any(tensor.ragged for tensor in spec.inputs):
        raise ConfigError("models with ragged batches cannot be checked with golden inputs; remove the file")
    decoder = RequestDecoder(spec, _OPTIONS)
    return [_item(number, item, spec, decoder) for number, item in enumerate(golden_requests(golden), start=1)]


def _item(number: int, item: Mapping[str, Any], spec: ModelSpec, decoder: RequestDecoder) -> _Item:
    try:
        request = decoder.decode(orjson.dumps({"inputs": item["inputs"]}))
        limit = max(1, spec.policy.max_batch_size)
        if spec.batched and request.rows > limit:
            raise ConfigError(f"it has {request.rows} rows, a batch takes {limit}")
        found = sorted((_expected(output, spec, decoder.planner) for output in item["outputs"]), key=lambda one: one[0])
    except GatewayError as error:
        raise ConfigError(f"item {number}: {error}") from None
    places = tuple(place for place, _ in found)
    if len(set(places)) < len(places):
        raise ConfigError(f"item {number} gives an output twice")
    return _Item(request.inputs, places, [tensor for _, tensor in found])


def _expected(output: Any, spec: ModelSpec, planner: Planner) -> tuple[int, OutputTensor]:
    """Place of an output in what is executed, and what it should be."""
    known: dict[str, tuple[int, TensorSpec]] = {t.name: (n, t) for n, t in enumerate(as_executed(spec).outputs)}
    name = output.get("name") if isinstance(output, dict) else None
    if name not in known:
        raise ConfigError(f"there is no output '{str(name)[:_MAX_SHOWN]}'; the outputs are {', '.join(known)}")
    place, tensor = known[name]
    if output.get("datatype") != tensor.datatype.name:
        raise ConfigError(f"output '{name}' is {tensor.datatype}, not '{str(output.get('datatype'))[:_MAX_SHOWN]}'")
    shape = output.get("shape")
    if not isinstance(shape, list) or not all(type(dim) is int and dim >= 0 for dim in shape):
        raise ConfigError(f"output '{name}' needs its 'shape', a list of whole numbers")
    form = InputPlan(place, name, tensor.datatype, tuple(shape), element_count(shape))
    sent = from_json(form, output.get("data"))
    data = sent.buffer if sent.buffer is not None else encode_values(tensor.datatype, sent.values or [])
    return place, OutputTensor(name, tensor.datatype, tuple(shape), data)


# -- comparing -----------------------------------------------------------------------------------------------------


def _difference(expected: OutputTensor, answered: OutputTensor, rtol: float, atol: float) -> str:
    """What is wrong with an answer, in words; empty: nothing."""
    if answered.datatype is not expected.datatype or answered.shape != expected.shape:
        return f"is {answered.datatype} {list(answered.shape)}, expected {expected.datatype} {list(expected.shape)}"
    if expected.datatype.kind == "bytes":
        pairs = zip(unpack_bytes(expected.data), unpack_bytes(answered.data), strict=True)
        place = next((n for n, (want, got) in enumerate(pairs) if want != got), None)
        return "" if place is None else f"differs in element {place}"
    want, got = numbers(expected.datatype, expected.data), numbers(answered.datatype, answered.data)
    fits = same_numbers(expected.datatype, want, got)
    if expected.datatype.kind in ("float", "half"):
        absolute, _ = distances(want, got, fits)
        with np.errstate(all="ignore"):
            larger = np.maximum(np.abs(want), np.abs(got))
            fits = fits | (np.isfinite(larger) & (absolute <= atol + rtol * larger))
    if bool(fits.all()):
        return ""
    first = int(np.argmin(fits))
    beyond = int(np.size(fits) - np.count_nonzero(fits))
    return f"is {got[first]:.9g} in element {first}, expected {want[first]:.9g} ({beyond} of {fits.size} are wrong)"
