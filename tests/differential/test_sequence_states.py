"""Sequences that remember, on both servers.

The Python twin of Triton keeps its sums itself, by correlation id; the ONNX twin of the gateway keeps nothing, and gets
the sum of each sequence back as its implicit state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import pytest
from onnx import helper

from tests.differential.campaign import Setting, Tally, both, run
from tests.differential.exchange import Asker, Case, Grpc, Http
from tests.differential.test_sequences import START, message, step
from tests.differential.triton_process import TritonProcess
from tests.differential.zoo import Twin
from tests.live.gateway_process import GatewayProcess
from tests.live.models import model, value

pytestmark = pytest.mark.slow

ROW: Final[list[int | str | None]] = ["batch", 1]
SUMS: Final = """\
TOTALS = {}


def compute(inputs, version):
    key = int(inputs["CORRID"].ravel()[0])
    if inputs["READY"].ravel()[0]:
        before = 0 if inputs["START"].ravel()[0] else TOTALS[key]
        TOTALS[key] = before + int(inputs["INPUT0"].ravel()[0])
    flags = inputs["START"] + 2 * inputs["END"] + 4 * inputs["READY"]
    return {"OUTPUT0": np.full_like(inputs["INPUT0"], TOTALS.get(key, 0)), "OUTPUT1": flags}
"""
POLICY: Final = """
sequence_batching {
  max_sequence_idle_microseconds: 60000000
  %s
  control_input [
    { name: "START" control [ { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } ] },
    { name: "END" control [ { kind: CONTROL_SEQUENCE_END int32_false_true: [ 0, 1 ] } ] },
    { name: "READY" control [ { kind: CONTROL_SEQUENCE_READY int32_false_true: [ 0, 1 ] } ] },
    { name: "CORRID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } ] }
  ]
  state [ { input_name: "TOTAL" output_name: "TOTAL_OUT" data_type: TYPE_INT32 dims: [ 1 ] } ]
}
"""


def sums() -> bytes:
    nodes = [
        helper.make_node("Add", ["INPUT0", "TOTAL"], ["OUTPUT0"]),
        helper.make_node("Identity", ["OUTPUT0"], ["TOTAL_OUT"]),
        helper.make_node("Add", ["END", "END"], ["end"]),
        helper.make_node("Add", ["READY", "READY"], ["half"]),
        helper.make_node("Add", ["half", "half"], ["ready"]),
        helper.make_node("Add", ["START", "end"], ["flags"]),
        helper.make_node("Add", ["flags", "ready"], ["OUTPUT1"]),
    ]
    inputs = [value(name, "INT32", ROW) for name in ("INPUT0", "START", "END", "READY", "TOTAL")]
    outputs = [value(name, "INT32", ROW) for name in ("OUTPUT0", "OUTPUT1", "TOTAL_OUT")]
    return model(nodes, [*inputs, value("CORRID", "UINT64", ROW)], outputs)


STRATEGIES: Final = {"sums_direct": "direct { }", "sums_oldest": "oldest { max_candidate_sequences: 8 }"}
TWINS = [
    Twin(name, {1: sums()}, [("INPUT0", "INT32", [1])], [("OUTPUT0", "INT32", [1]), ("OUTPUT1", "INT32", [1])], 4,
         SUMS, POLICY % strategy)
    for name, strategy in STRATEGIES.items()
]  # fmt: skip


def flags(place: int, last: int) -> str:
    return "s" if place == 0 else "e" if place == last else ""


def _cases() -> Iterator[Case]:
    for name in STRATEGIES:
        yield Case(f"{name} whole", tuple(step(name, 7 + n, 1, flags(n, 4)) for n in range(5)))
        again = (step(name, 5, 2, "s"), step(name, 6, 2), step(name, 50, 2, "s"), step(name, 60, 2, "e"))
        yield Case(f"{name} begun anew", again)
        yield Case(f"{name} over", (step(name, 1, 2, says=(START,)), step(name, 9, 2, "se"), step(name, 9, 2, "se")))
        turns = [(n, identity) for n in range(4) for identity in (31, 32, 33)]
        yield Case(
            f"{name} interleaved", tuple(step(name, identity + n, identity, flags(n, 3)) for n, identity in turns)
        )
        streamed = [
            message(name, identity * (n + 1), identity, flags(n, 3)).SerializeToString() for n, identity in turns
        ]
        yield Case(f"{name} in a stream", (Grpc("ModelStreamInfer", stream=tuple(streamed)),))
        yield Case(f"{name} metadata", (Http("GET", f"/v2/models/{name}"),))


CASES = tuple(_cases())


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TritonProcess, GatewayProcess]]:
    with both(tmp_path_factory.mktemp("states"), Setting(TWINS)) as found:
        yield found


@pytest.fixture(scope="module")
def tally(servers: tuple[TritonProcess, GatewayProcess]) -> Tally:
    return run(CASES, *servers)


@pytest.mark.parametrize("name", STRATEGIES)
def test_both_add_up(servers: tuple[TritonProcess, GatewayProcess], name: str) -> None:
    for server in servers:
        with contextlib.closing(Asker(server.port, server.grpc_port)) as asker:
            replies = [asker.ask(step(name, 10 + n, 99, flags(n, 3))) for n in range(4)]
        found = [[output["data"] for output in reply.body["outputs"]] for reply in replies]
        assert found == [[[10], [5]], [[21], [4]], [[33], [4]], [[46], [6]]]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_both_remember_the_same(tally: Tally, case: Case) -> None:
    known = ("body.platform", "body*.backend")  # the twins differ in this: Python there, ONNX here
    found = [difference for difference in tally.found[case.name] if not difference.path.endswith(known)]
    assert not found, "\n".join(map(str, found))
