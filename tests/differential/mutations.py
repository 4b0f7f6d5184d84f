"""Requests that were right until something happened to them: random changes to valid infer requests, REST and gRPC.

A value is replaced, dropped, repeated or renamed, a byte of the text changed, a blob cut or lengthened, a length header
moved. Dimensions stay small where there is data: a Triton 2.51 allocates what a shape says, and ends.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any, Final

from tritonclient.grpc import service_pb2 as pb

from tests.differential.build import LENGTH, add, ask, blob, request, sample_blob, tensor
from tests.differential.exchange import Grpc, Http

VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, -1, 1, 2, 3, 9, 12, 100, 1.0, 1.5, -0.0, 2**64, -(2**63) - 1),
    *("", "x", "1", "INPUT0", "OUTPUT0", "OUTPUT1", "FP32", "INT32", "BYTES"),
    *([], {}, [1], [[1]], [None], ["a"], {"a": 1}, [1, 2, 3], [1, 3], [3, 1]),
)
KEYS: Final = (
    *("x", "id", "name", "shape", "datatype", "data", "parameters", "outputs", "binary_data_size", "binary_data"),
    *("binary_data_output", "classification", "priority", "sequence_id"),
)
BYTES: Final = b'{}[],:"0123456789.-eEtfnull\\ \n\x00\xff'


def _valid() -> Iterator[tuple[str, dict[str, Any], tuple[bytes, ...]]]:
    floats, ints, texts = blob("FP32", [1, 2.5, 0.1]), blob("INT32", [5, 6]), sample_blob("BYTES")
    outputs: list[dict[str, Any]] = [{"name": "OUTPUT0", "parameters": {"binary_data": False}}]
    parameters = {"binary_data_output": False, "priority": 1, "a": "x"}
    yield "m", ask(tensor(data=[1, 2.5, 0.1]), id="7", parameters=parameters, outputs=outputs), ()
    given = tensor(parameters={"binary_data_size": 12})
    yield "m", ask(given, parameters={"binary_data_output": True}), (floats,)
    outputs = [{"name": "OUTPUT0", "parameters": {"binary_data": True}}, {"name": "OUTPUT1"}]
    two = [tensor("INPUT0", (1, 2), "INT32", data=[1, 2]), tensor("INPUT1", (1, 2), "INT32")]
    yield "add_sub", ask(two[0], {**two[1], "parameters": {"binary_data_size": 8}}, outputs=outputs), (ints,)
    yield "id_bytes", ask(tensor(datatype="BYTES", data=["a", "bé", ""]), parameters={"sequence_id": 5}), ()
    given = tensor(datatype="BYTES", parameters={"binary_data_size": len(texts)})
    yield "id_bytes", ask(given, outputs=[{"name": "OUTPUT0", "parameters": {"binary_data": True}}]), (texts,)
    outputs = [{"name": "OUTPUT0", "parameters": {"classification": 2, "binary_data": False}}]
    yield "label_ints", ask(tensor(shape=(2, 4), datatype="INT32", data=[*range(8)]), outputs=outputs), ()
    yield "deep", ask(tensor(shape=(1, 2, 1, 2), datatype="INT32", data=[[[[1, 2]], [[3, 4]]]])), ()
    yield "id_bool", ask(tensor(datatype="BOOL", data=[True, False, True])), ()
    yield "fixed", ask(tensor(shape=(2, 3), data=[1, 2, 3, 4, 5, 6])), ()


VALID: Final = tuple(_valid())


def http(random: Random) -> Http:
    """One mutated POST …/infer."""
    model, document, blobs = random.choice(VALID)
    mutated = _mutated(random, document)
    while not _small(mutated):
        mutated = _mutated(random, document)
    text = json.dumps(mutated).encode()
    if random.random() < 0.15 and b"shape" not in (text := _scratched(random, text)):
        text = json.dumps(document).encode()
    parts = [_cut(random, part) if random.random() < 0.15 else part for part in blobs]
    headers = {}
    if parts or random.random() < 0.1:
        moved = random.choice((-1, 1, 5)) if random.random() < 0.1 else 0
        headers[LENGTH] = str(len(text) + moved)
    return Http("POST", f"/v2/models/{model}/infer", text + b"".join(parts), headers)


def _mutated(random: Random, document: dict[str, Any]) -> dict[str, Any]:
    document = copy.deepcopy(document)
    for _ in range(random.choice((1, 1, 1, 2))):
        parent, key = random.choice(list(_places(document)))
        chance = random.random()
        if chance < 0.6:
            parent[key] = copy.deepcopy(random.choice(VALUES))
        elif chance < 0.75:
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(
                random.randrange(len(parent) + 1), copy.deepcopy(random.choice((parent[key], random.choice(VALUES))))
            )
        elif chance < 0.9:
            parent[random.choice(KEYS)] = copy.deepcopy(random.choice(VALUES))
        else:
            parent[key + random.choice(("_", " ", "é"))] = parent.pop(key)
        if not document:
            break
    return document


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) below a node."""
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from _places(node[key])


def _small(document: dict[str, Any]) -> bool:
    inputs = document.get("inputs")
    shapes = [item.get("shape") for item in inputs if isinstance(item, dict)] if isinstance(inputs, list) else []
    dims = [dim for shape in shapes if isinstance(shape, list) for dim in shape]
    return all(not isinstance(dim, int) or dim <= 1000 for dim in dims)


def _scratched(random: Random, text: bytes) -> bytes:
    """One byte of the text changed, dropped or put in; never within a number of a shape."""
    place, byte = random.randrange(len(text)), bytes([random.choice(BYTES)])
    if text[max(place - 1, 0) : place + 2].translate(None, b"0123456789") != text[max(place - 1, 0) : place + 2]:
        byte = b'"'
    return random.choice(
        (text[:place] + byte + text[place + 1 :], text[:place] + text[place + 1 :], text[:place] + byte + text[place:])
    )


def _cut(random: Random, part: bytes) -> bytes:
    place = random.randrange(len(part))
    return random.choice((part[:place], part + b"x", part[:place] + bytes([random.randrange(256)]) + part[place + 1 :]))


def _valid_messages() -> Iterator[pb.ModelInferRequest]:
    yield add(request(raw=[blob("FP32", [1, 2.5, 0.1])], request_id="7"))
    yield add(request(), fp32_contents=[1, 2.5, 0.1])
    yield add(request("id_bytes", raw=[sample_blob("BYTES")]), datatype="BYTES")
    yield add(request("id_bytes"), datatype="BYTES", bytes_contents=[b"a", b"", b"bc"])
    yield add(request("id_int8"), datatype="INT8", int_contents=[1, 2, -3])
    yield add(request("id_uint64"), datatype="UINT64", uint64_contents=[1, 2, 2**64 - 1])
    two = request("add_sub", raw=[blob("INT32", [1, 2]), blob("INT32", [5, 6])], priority=("uint64_param", 1))
    add(add(two, "INPUT0", (1, 2), "INT32"), "INPUT1", (1, 2), "INT32")
    two.outputs.add(name="OUTPUT1")
    yield two
    classes = add(request("label_ints", raw=[blob("INT32", [5, 1, 9, 7])]), shape=(1, 4), datatype="INT32")
    classes.outputs.add(name="OUTPUT0").parameters["classification"].int64_param = 2
    yield classes


MESSAGES: Final = tuple(_valid_messages())
PARAMETERS: Final = (
    *(("int64_param", value) for value in (-1, 0, 5)),
    *(("string_param", value) for value in ("", "x")),
    *(("bool_param", True), ("uint64_param", 5), ("double_param", 1.5)),
)


def grpc_request(random: Random) -> Grpc:
    """One mutated ModelInfer."""
    message = pb.ModelInferRequest()
    message.CopyFrom(random.choice(MESSAGES))
    for _ in range(random.choice((1, 1, 1, 2))):
        random.choice(CHANGES)(random, message)
    data = message.SerializeToString()
    if random.random() < 0.1:
        data = data[: random.randrange(len(data) + 1)]
    return Grpc("ModelInfer", data)


def _name(random: Random, message: pb.ModelInferRequest) -> None:
    for item in message.inputs[:1]:
        item.name = random.choice(("", "X", "INPUT1", "input0"))


def _datatype(random: Random, message: pb.ModelInferRequest) -> None:
    for item in message.inputs[-1:]:
        item.datatype = random.choice(("", "FP32", "fp32", "INT8", "INT32", "UINT32", "BYTES", "FP16", "BOOL", "x"))


def _shape(random: Random, message: pb.ModelInferRequest) -> None:
    for item in message.inputs[:1]:
        choice = random.choice(
            ([], [3], [1, 3], [3, 1], [1, 2], [2, 3], [9, 1], [1, 0], [0, 3], [1, -1], [-1, 3], [1, 1, 3])
        )
        item.shape[:] = choice


def _raw(random: Random, message: pb.ModelInferRequest) -> None:
    raw = message.raw_input_contents
    change = random.randrange(4)
    if change == 0 or not raw:
        raw.append(random.choice((b"", b"x", bytes(12), bytes(8))))
    elif change == 1:
        raw.pop()
    else:
        raw[0] = _cut(random, raw[0]) if raw[0] else b"x"


def _contents(random: Random, message: pb.ModelInferRequest) -> None:
    kinds: dict[str, list[Any]] = {
        "fp32_contents": [1.5, 2, 3],
        "fp64_contents": [1.5],
        "int_contents": [1, 2, 3],
        "uint_contents": [1, 2],
        "int64_contents": [1],
        "uint64_contents": [4],
        "bool_contents": [True],
        "bytes_contents": [b"a", b""],
    }
    for item in message.inputs[-1:]:
        if random.random() < 0.3:
            item.ClearField("contents")
        else:
            kind = random.choice(list(kinds))
            getattr(item.contents, kind).extend(kinds[kind][: random.randrange(1, 4)])


def _inputs(random: Random, message: pb.ModelInferRequest) -> None:
    if not message.inputs or random.random() < 0.5:
        message.inputs.add().CopyFrom(message.inputs[0] if message.inputs else pb.ModelInferRequest.InferInputTensor())
    else:
        del message.inputs[random.randrange(len(message.inputs))]


def _outputs(random: Random, message: pb.ModelInferRequest) -> None:
    output = message.outputs.add(name=random.choice(("OUTPUT0", "OUTPUT1", "", "x")))
    if random.random() < 0.3:
        kind, value = random.choice(PARAMETERS)
        setattr(output.parameters[random.choice(("classification", "binary_data", "x"))], kind, value)


def _parameter(random: Random, message: pb.ModelInferRequest) -> None:
    kind, value = random.choice(PARAMETERS)
    name = random.choice(("priority", "sequence_id", "sequence_start", "sequence_end", "custom", "triton_x"))
    setattr(message.parameters[name], kind, value)


def _model(random: Random, message: pb.ModelInferRequest) -> None:
    if random.random() < 0.5:
        message.model_version = random.choice(("1", "2", "x", "-1", "0"))
    else:
        message.model_name = random.choice(("", "nobody", "M"))


CHANGES: Final = (_name, _datatype, _shape, _raw, _contents, _inputs, _outputs, _parameter, _model)
