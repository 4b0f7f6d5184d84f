"""Golden inputs: requests whose right answers are known, answered by every instance before a version serves.

The file is a JSON list. An item is an OIP inference request whose `outputs` are the ones expected, as OIP answers have
them; outputs that it does not name are not looked at:

    [{"inputs":  [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0.1, 0.2, 0.3, 0.4]}],
      "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [0.7, 0.3]}]}]

Floating point fits if |a - b| <= atol + rtol * max(|a|, |b|), NaN fits NaN and an infinity itself; everything else must
be equal, shapes and datatypes included. A request is checked like a client's, with the same words. What is told about a
difference names the item, the output and the first element, and no more than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
from gateway.loading_trial import run_patiently
from gateway.protocol.oip_data import from_json
from gateway.protocol.oip_json import RequestDecoder
from gateway.protocol.oip_plan import InputPlan, Planner
from gateway.protocol.options import ProtocolOptions

GOLDEN_FILE: Final = "golden.json"
MAX_BYTES: Final = 16 * 1024 * 1024
MAX_ITEMS: Final = 1000
RTOL: Final = 1e-5
ATOL: Final = 1e-6
_OPTIONS: Final = ProtocolOptions(json_half=True)
_MAX_SHOWN: Final = 64


@dataclass(frozen=True, slots=True)
class GoldenFile:
    """The content of one, and how far answers may lie from it. `place`: where it was found, for people."""

    place: str
    content: bytes
    rtol: float = RTOL
    atol: float = ATOL


@dataclass(frozen=True, slots=True)
class _Item:
    inputs: Sequence[InputTensor | None]
    places: tuple[int, ...]
    """Of `expected`, in the model's outputs."""
    expected: Sequence[OutputTensor]


def read_golden(
    stated: Path | None, name: str | None, directory: Path, rtol: float = RTOL, atol: float = ATOL
) -> GoldenFile | None:
    """The golden inputs of a version; None: there are none. Blocks on the disk.

    Args:
        stated: the file that the configuration names; None: it names none.
        name: what to look for in the version's directory if `stated` is not there.
        directory: the version's directory, or its one file.

    Raises:
        ConfigError: a stated file is in neither place; one that is there cannot be read or is too large.
    """
    places = [stated] if stated is not None else []
    if directory.is_dir():
        places.append(directory / (name or GOLDEN_FILE))
    for place in places:
        try:
            if not place.is_file():
                continue
            if place is not stated and not place.resolve().is_relative_to(directory.resolve()):
                raise ConfigError(f"{place}: this link leaves the version's directory; put the file itself there")
            with place.open("rb") as stream:
                content = stream.read(MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"{place} cannot be read: {error.strerror}; check its permissions") from None
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{place} is larger than {MAX_BYTES} bytes; keep fewer golden inputs")
        return GoldenFile(str(place), content, rtol, atol)
    if stated is not None:
        raise ConfigError(
            f"there are no golden inputs: neither {stated} nor a file {name or GOLDEN_FILE} with the model; put one "
            "there, or remove `golden` from the configuration"
        )
    return None


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
                raise ModelError(f"golden input {number} of {golden.place} is not answered: {outcome.in_full}")
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
    try:
        document = orjson.loads(golden.content)
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"this is not JSON: {error}") from None
    if not isinstance(document, list) or not document:
        raise ConfigError('write a list of requests: [{"inputs": […], "outputs": […]}, …]')
    if len(document) > MAX_ITEMS:
        raise ConfigError(f"at most {MAX_ITEMS} requests can be checked, there are {len(document)}")
    decoder = RequestDecoder(spec, _OPTIONS)
    return [_item(number, item, spec, decoder) for number, item in enumerate(document, start=1)]


def _item(number: int, item: Any, spec: ModelSpec, decoder: RequestDecoder) -> _Item:
    if not isinstance(item, dict) or not isinstance(item.get("inputs"), list):
        raise ConfigError(f"item {number} is no request: it needs 'inputs' and 'outputs'")
    outputs = item.get("outputs")
    if not isinstance(outputs, list) or not outputs:
        raise ConfigError(f"item {number} needs the outputs that are right, as 'outputs'")
    try:
        request = decoder.decode(orjson.dumps({"inputs": item["inputs"]}))
        limit = max(1, spec.policy.max_batch_size)
        if spec.batched and request.rows > limit:
            raise ConfigError(f"it has {request.rows} rows, a batch takes {limit}")
        found = sorted((_expected(output, spec, decoder.planner) for output in outputs), key=lambda one: one[0])
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
