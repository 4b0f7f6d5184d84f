"""Loading sequence models: what is proven, warmed up and refused. The rig is test_catalog's."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from onnx import helper

from gateway.core.request import InferRequest, InputTensor, SequenceStep
from gateway.core.tensor import DATATYPE
from gateway.sequence_scheduler import SequenceScheduler
from tests import test_catalog
from tests.live import models
from tests.live.test_sequences import ROW, accumulator, echoes_controls
from tests.test_catalog import Rig

runner, pool, rig = test_catalog.runner, test_catalog.pool, test_catalog.rig
FP32 = DATATYPE["FP32"]
STATE = 'state [ { input_name: "total" output_name: "total_out" data_type: TYPE_FP32 dims: [ 1 ] %s } ]'
SEQUENCES = "max_batch_size: 4 sequence_batching { " + STATE % "" + " }"


def mixes_states() -> bytes:
    """`sum` is each row's own; `total_out` is the mean over the batch."""
    return models.model(
        [
            helper.make_node("Add", ["x", "total"], ["sum"]),
            helper.make_node("ReduceMean", ["sum"], ["mean"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["sum", "sum"], ["nothing"]),
            helper.make_node("Add", ["nothing", "mean"], ["total_out"]),
        ],
        [models.value("x", "FP32", ROW), models.value("total", "FP32", ROW)],
        [models.value("sum", "FP32", ROW), models.value("total_out", "FP32", ROW)],
    )


def sums(rig: Rig, scheduler: SequenceScheduler, *xs: float) -> list[float]:
    """The answers to one sequence, step after step."""

    async def ask() -> list[float]:
        found = []
        for place, x in enumerate(xs):
            tensor = InputTensor(FP32, (1, 1), [x], None)
            request = InferRequest((tensor,), 1, 4, None, (0,), None)
            request.sequence = SequenceStep(9, place == 0, place == len(xs) - 1)
            request.received = rig.runner.get_loop().time()
            done = asyncio.Event()
            request.settle = lambda _, done=done: done.set()
            scheduler.submit(request)
            await done.wait()
            assert request.error is None
            row = request.row
            found.append(float(np.frombuffer(request.batch.outputs[0].data, "<f4")[row]))
        return found

    answered: list[float] = rig.run(ask())
    return answered


def intake(rig: Rig, content: bytes, config: str) -> SequenceScheduler:
    scheduler = rig.one(content, config).scheduler
    assert isinstance(scheduler, SequenceScheduler)
    return scheduler


def test_controls_and_states_are_no_part_of_the_signature(rig: Rig) -> None:
    version = rig.one(accumulator(), SEQUENCES)
    assert [tensor.name for tensor in version.spec.inputs] == ["x"]
    assert [tensor.name for tensor in version.spec.outputs] == ["sum"]
    assert version.spec.policy.merge
    assert version.spec.policy.oversize == "reject"


def test_a_state_that_depends_on_other_rows_is_found_out(rig: Rig) -> None:
    version = rig.one(mixes_states(), SEQUENCES)
    assert not version.spec.policy.merge
    assert "output 'total_out' differs" in version.spec.batching_note
    assert isinstance(version.scheduler, SequenceScheduler)
    assert sums(rig, version.scheduler, 1, 2, 3) == [1, 3, 6]


def test_slots_do_not_vanish_with_the_proof(rig: Rig) -> None:
    version = rig.one(mixes_states(), "sequence_batching { " + STATE % "" + " }")
    assert (version.spec.policy.merge, version.spec.policy.max_batch_size) == (False, 64)


def test_the_first_state_is_read_from_its_file(rig: Rig) -> None:
    folder = rig.root / "m" / "initial_state"
    folder.mkdir(parents=True)
    (folder / "hundred").write_bytes(np.array([100], "<f4").tobytes())
    initial = 'initial_state { name: "i" data_type: TYPE_FP32 dims: [ 1 ] data_file: "hundred" }'
    config = "max_batch_size: 4 sequence_batching { " + STATE % initial + " }"
    assert sums(rig, intake(rig, accumulator(), config), 1, 2) == [101, 103]


def test_warm_up_samples_get_states_and_controls_too(rig: Rig) -> None:
    sample = """model_warmup { name: "first" batch_size: 3 inputs { key: "x" value {
      data_type: TYPE_FP32 dims: [ 1 ] random_data: true } } }"""
    assert sums(rig, intake(rig, accumulator(), SEQUENCES + sample), 5, 5) == [5, 10]
    controls = """max_batch_size: 4 sequence_batching { control_input [
      { name: "START" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } },
      { name: "END" control { kind: CONTROL_SEQUENCE_END int32_false_true: [ 0, 1 ] } },
      { name: "READY" control { kind: CONTROL_SEQUENCE_READY bool_false_true: [ false, true ] } },
      { name: "CORRID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } } ] }"""
    assert sums(rig, intake(rig, echoes_controls(), controls + sample), 5, 6) == [1005, 6]


@pytest.mark.parametrize(
    ("inside", "text"),
    [
        ("iterative_sequence: true " + STATE % "", "sequence_batching.iterative_sequence is not supported yet"),
        (STATE.replace("dims: [ 1 ]", "dims: [ 2 ]") % "", "state input 'total' needs shape [-1, 2]"),
        (STATE.replace('"total_out"', '"nowhere"') % "", "names the output 'nowhere', but the model file has"),
        (STATE.replace("FP32", "INT64") % "", "says input 'total' is INT64, the model file says FP32"),
    ],
)
def test_what_cannot_be_is_refused_at_load(rig: Rig, inside: str, text: str) -> None:
    assert text in rig.refused(accumulator(), f"max_batch_size: 4 sequence_batching {{ {inside} }}")


def test_a_state_is_not_an_input_of_clients(rig: Rig) -> None:
    tensors = ", ".join(f"{{ name: '{name}' data_type: TYPE_FP32 dims: [ 1 ] }}" for name in ("x", "total"))
    listed = f"input [ {tensors} ]"
    assert "lists input 'total', which sequence_batching fills" in rig.refused(accumulator(), f"{SEQUENCES} {listed}")
