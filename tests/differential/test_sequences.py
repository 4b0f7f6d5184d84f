"""Sequences on both servers: what a model is told about them, and what is refused.

The models have no memory: they answer their input plus what the control inputs say (100 for START, 200 for END, 1000
times the correlation id), so an answer shows what the server told them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
from onnx import TensorProto, helper
from tritonclient.grpc import service_pb2 as pb

from tests.differential.allowed import ALLOWED, Allowed
from tests.differential.build import add, ask, blob, call, infer, request, tensor
from tests.differential.campaign import Setting, Tally, both, run
from tests.differential.exchange import Case, Grpc, Http
from tests.differential.zoo import Twin
from tests.live.models import model, value

pytestmark = pytest.mark.slow

ROW: list[int | str | None] = ["batch", 1]
TOLD: Final = """\
def compute(inputs, version):
    said = 100 * inputs["START"] + 200 * inputs["END"] + 1000 * inputs["CORRID"].astype(np.int32)
    return {"OUTPUT0": inputs["INPUT0"] + said}
"""
NAMED: Final = """\
def compute(inputs, version):
    return {"OUTPUT0": inputs["INPUT0"] + 100 * inputs["START"], "NAME": inputs["CORRID"]}
"""
CONTROLS: Final = """
sequence_batching {
  max_sequence_idle_microseconds: 60000000
  %s
  control_input [
    { name: "START" control [ { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } ] },
    { name: "END" control [ { kind: CONTROL_SEQUENCE_END int32_false_true: [ 0, 1 ] } ] },
    { name: "CORRID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: %s } ] }
  ]
}
"""


def told() -> bytes:
    weights = {name: helper.make_tensor(name, TensorProto.INT32, [], [number]) for name, number in FACTORS.items()}
    nodes = [
        *(helper.make_node("Constant", [], [name], value=tensor) for name, tensor in weights.items()),
        helper.make_node("Cast", ["CORRID"], ["id"], to=TensorProto.INT32),
        helper.make_node("Mul", ["START", "hundred"], ["a"]),
        helper.make_node("Mul", ["END", "two_hundred"], ["b"]),
        helper.make_node("Mul", ["id", "thousand"], ["c"]),
        helper.make_node("Add", ["a", "b"], ["ab"]),
        helper.make_node("Add", ["ab", "c"], ["abc"]),
        helper.make_node("Add", ["INPUT0", "abc"], ["OUTPUT0"]),
    ]
    inputs = [value(name, "INT32", ROW) for name in ("INPUT0", "START", "END")]
    return model(nodes, [*inputs, value("CORRID", "UINT64", ROW)], [value("OUTPUT0", "INT32", ROW)])


FACTORS: Final = {"hundred": 100, "two_hundred": 200, "thousand": 1000}


def named() -> bytes:
    nodes = [
        helper.make_node("Constant", [], ["zero"], value=helper.make_tensor("z", TensorProto.INT32, [], [0])),
        helper.make_node("Constant", [], ["hundred"], value=helper.make_tensor("h", TensorProto.INT32, [], [100])),
        helper.make_node("Mul", ["START", "hundred"], ["a"]),
        helper.make_node("Mul", ["END", "zero"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["ab"]),
        helper.make_node("Add", ["INPUT0", "ab"], ["OUTPUT0"]),
        helper.make_node("Identity", ["CORRID"], ["NAME"]),
    ]
    inputs = [*(value(name, "INT32", ROW) for name in ("INPUT0", "START", "END")), value("CORRID", "BYTES", ROW)]
    return model(nodes, inputs, [value("OUTPUT0", "INT32", ROW), value("NAME", "BYTES", ROW)])


INPUT, OUTPUT = [("INPUT0", "INT32", [1])], [("OUTPUT0", "INT32", [1])]
NAME, OLDEST = ("NAME", "BYTES", [1]), "oldest { max_candidate_sequences: 4 }"
TWINS = [
    Twin("direct", {1: told()}, INPUT, OUTPUT, 4, TOLD, CONTROLS % ("direct { }", "TYPE_UINT64")),
    Twin("oldest", {1: told()}, INPUT, OUTPUT, 4, TOLD, CONTROLS % (OLDEST, "TYPE_UINT64")),
    Twin("named", {1: named()}, INPUT, [*OUTPUT, NAME], 4, NAMED, CONTROLS % ("direct { }", "TYPE_STRING")),
]
SETTING = Setting(TWINS, defaults={"batching": "on"})
CORRELATION = "must specify a non-zero or non-empty correlation ID"
START = "must specify the START flag on the first request of the sequence"


def step(model_name: str, number: int, identifier: Any = None, flags: str = "", rows: int = 1, **checks: Any) -> Http:
    """One request of a sequence; flags: "s" start, "e" end."""
    parameters: dict[str, Any] = {} if identifier is None else {"sequence_id": identifier}
    parameters |= {"sequence_start": True} if "s" in flags else {}
    parameters |= {"sequence_end": True} if "e" in flags else {}
    given = tensor(shape=(rows, 1), datatype="INT32", data=[number] * rows)
    return infer(ask(given, parameters=parameters), model_name, **checks)


def message(model_name: str, number: int, identifier: int | str, flags: str = "") -> pb.ModelInferRequest:
    kind = "string_param" if isinstance(identifier, str) else "int64_param"
    parameters: dict[str, Any] = {"sequence_id": (kind, identifier)}
    parameters |= {"sequence_start": ("bool_param", True)} if "s" in flags else {}
    parameters |= {"sequence_end": ("bool_param", True)} if "e" in flags else {}
    made = request(model_name, raw=[blob("INT32", [number])], request_id=str(number), **parameters)
    return add(made, shape=(1, 1), datatype="INT32")


def _cases() -> Iterator[Case]:
    for name in ("direct", "oldest"):
        yield from (Case(f"sequence/{name} {what}", steps) for what, steps in _numbered(name))
    texts = (("a", "s"), ("a", ""), ("b", "s"), ("b", "e"), ("a", "e"))
    yield Case("sequence/named", tuple(step("named", n, name, flags) for n, (name, flags) in enumerate(texts)))
    yield Case("sequence/named by a number", (step("named", 1, 7, "se"),))
    yield Case("sequence/named by nothing", (step("named", 1, "", "se", says=(CORRELATION,)),))


def _numbered(name: str) -> Iterator[tuple[str, tuple[Http | Grpc, ...]]]:
    yield "whole", (step(name, 1, 7, "s"), step(name, 2, 7), step(name, 3, 7, "e"))
    yield "alone", (step(name, 1, 8, "se"), step(name, 1, 8, "se"))
    yield "no id", (step(name, 1, says=(CORRELATION,)), step(name, 1, 0, "s", says=(CORRELATION,)))
    yield "no start", (step(name, 1, 9, says=(START,)), step(name, 1, 9, "e", says=(START,)))
    yield "after the end", (step(name, 1, 10, "s"), step(name, 2, 10, "e"), step(name, 3, 10, says=(START,)))
    yield "started again", (step(name, 1, 11, "s"), step(name, 2, 11, "s"), step(name, 3, 11, "e"))
    yield "interleaved", tuple(step(name, n, 12 + n % 2, "s" if n < 2 else "e" if n > 3 else "") for n in range(6))
    yield "two rows", (step(name, 1, 14, "s", rows=2), step(name, 1, 14, "se"))
    yield "large id", (step(name, 1, 2**31, "se"),)
    yield "over gRPC", tuple(call(message(name, n, 15, "s" if n == 0 else "e" if n == 2 else "")) for n in range(3))
    yield "over gRPC without start", (call(message(name, 1, 16), says=(START,)),)
    parts = [message(name, n, 17 + n % 2, "s" if n < 2 else "e" if n > 3 else "").SerializeToString() for n in range(6)]
    yield "in a stream", (Grpc("ModelStreamInfer", stream=tuple(parts)),)
    broken = [message(name, n, 19, "s" if n == 1 else "e" if n == 2 else "").SerializeToString() for n in range(3)]
    yield "in a stream, too early", (Grpc("ModelStreamInfer", stream=tuple(broken)),)
    yield "metadata", (Http("GET", f"/v2/models/{name}"),)
    yield "config", (Http("GET", f"/v2/models/{name}/config"),)
    yield "statistics", (Http("GET", f"/v2/models/{name}/stats"),)


CASES = tuple(_cases())


@pytest.fixture(scope="module")
def tally(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tally]:
    with both(tmp_path_factory.mktemp("sequences"), SETTING) as (real, ours):
        yield run(CASES, real, ours)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_answers_are_equal_or_their_difference_is_explained(tally: Tally, case: Case) -> None:
    found = tally.unexplained[case.name]
    assert not found, "\n".join(map(str, found))


def test_counts_of_requests_and_rows_are_equal(tally: Tally) -> None:
    paths = [found.path for name in ("direct", "oldest") for found in tally.found[f"sequence/{name} statistics"]]
    assert not [path for path in paths if "success" in path or "inference_count" in path or "fail" in path]


ENTRIES = [entry for entry in ALLOWED if entry.cases[0].startswith("sequence/") and entry.path == "*status"]


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.why for entry in ENTRIES])
def test_every_entry_of_the_allow_list_explains_something(tally: Tally, entry: Allowed) -> None:
    assert entry not in tally.stale
