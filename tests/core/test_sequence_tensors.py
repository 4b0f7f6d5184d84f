"""What the gateway adds to steps: control values, states, and what is wrong with a configuration of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gateway.core.batch import FinishedBatch
from gateway.core.batchability import SignatureTensor
from gateway.core.model import BatchPolicy, ModelSpec, TensorSpec
from gateway.core.request import InputTensor, OutputTensor, SequenceStep
from gateway.core.scheduling import PLAIN, ControlInput, SequencePolicy, StateTensor
from gateway.core.sequence_tensors import (
    SequenceTensors,
    SlotFlag,
    as_executed,
    check_sequences,
    with_added,
    zeros,
)
from gateway.core.tensor import DATATYPE, pack_bytes
from gateway.errors import ConfigError, InvalidRequest
from tests.sequence_bench import sequence_spec

INT32, INT64, FP32, BOOL, BYTES = (DATATYPE[name] for name in ("INT32", "INT64", "FP32", "BOOL", "BYTES"))
CONTROLS = (
    ControlInput("START", "CONTROL_SEQUENCE_START", INT32, 5, 6),
    ControlInput("READY", "CONTROL_SEQUENCE_READY", BOOL, 1, 0),
    ControlInput("END", "CONTROL_SEQUENCE_END", FP32, -0.5, 0.5),
    ControlInput("CORRID", "CONTROL_SEQUENCE_CORRID", INT64),
)
NAMES = [control.name for control in CONTROLS]


def spec_of(policy: SequencePolicy, size: int = 4, batching: BatchPolicy | None = None) -> ModelSpec:
    return sequence_spec(batching or BatchPolicy(size), policy)


def value(tensor: InputTensor) -> object:
    return np.frombuffer(tensor.buffer or b"", tensor.datatype.numpy).tolist()


@pytest.mark.parametrize("size", [0, 4])
def test_controls_of_each_kind_of_step(size: int) -> None:
    tensors = SequenceTensors(spec_of(SequencePolicy(controls=CONTROLS), size))
    correlation = tensors.correlation(77)
    for start in (False, True):
        for end in (False, True):
            added = tensors.added(SequenceStep(77, start, end), correlation, (), None)
            assert [value(tensor) for tensor in added] == [[6 if start else 5], [False], [0.5 if end else -0.5], [77]]
            assert {tensor.shape for tensor in added} == {(1, 1) if size else (1,)}
    assert [tensor.name for tensor in tensors.model_spec.inputs] == ["number", *NAMES]
    assert tensors.ready_place == 2


def test_a_slot_is_noted_in_the_ready_input_and_nowhere_else() -> None:
    tensors = SequenceTensors(spec_of(SequencePolicy(controls=CONTROLS)))
    added = tensors.added(SequenceStep(7), tensors.correlation(7), (), 3)
    assert [getattr(tensor, "slot", None) for tensor in added] == [None, 3, None, None]
    assert isinstance(added[1], SlotFlag)
    assert not any(isinstance(tensor, SlotFlag) for tensor in tensors.added(SequenceStep(7), None, (), None))
    assert {place: value(tensor) for place, tensor in tensors.idle_row().items()} == {
        1: [5], 2: [True], 3: [-0.5], 4: [0]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("datatype", "identity", "data"),
    [("INT32", 2**31 - 1, b"\xff\xff\xff\x7f"), ("UINT32", 2**32 - 1, b"\xff" * 4), ("UINT64", 2**64 - 1, b"\xff" * 8),
     ("INT64", 1, b"\1" + bytes(7)), ("BYTES", "hé", b"\3\0\0\0h\xc3\xa9"), ("BYTES", 12, b"\2\0\0\x0012")],
)  # fmt: skip
def test_ids_as_the_model_reads_them(datatype: str, identity: int | str, data: bytes) -> None:
    control = ControlInput("CORRID", "CONTROL_SEQUENCE_CORRID", DATATYPE[datatype])
    found = SequenceTensors(spec_of(SequencePolicy(controls=(control,)))).correlation(identity)
    assert found is not None
    assert (found.shape, found.buffer) == ((1, 1), data)


@pytest.mark.parametrize(
    ("datatype", "identity"),
    [("INT32", 2**31), ("UINT32", 2**32), ("INT64", 2**63), ("UINT64", "1"), ("INT32", "text")],
)
def test_ids_that_do_not_fit_are_refused_by_name(datatype: str, identity: int | str) -> None:
    control = ControlInput("CORRID", "CONTROL_SEQUENCE_CORRID", DATATYPE[datatype])
    tensors = SequenceTensors(spec_of(SequencePolicy(controls=(control,))))
    with pytest.raises(InvalidRequest, match=f"'sequence_id' must be an integer of {datatype}"):
        tensors.correlation(identity)


def test_any_id_does_where_the_model_is_not_told() -> None:
    tensors = SequenceTensors(spec_of(SequencePolicy()))
    assert tensors.correlation("text") is None
    assert tensors.correlation(2**64 - 1) is None


def test_first_states() -> None:
    states = (
        StateTensor("a", "a_out", INT64, (2,)),
        StateTensor("b", "b_out", BYTES, (2,)),
        StateTensor("c", "c_out", FP32, (-1, 2)),
        StateTensor("d", "d_out", INT32, (-1, 2), initial=bytes(range(24))),
        StateTensor("e", "e_out", BYTES, (1,), initial=pack_bytes([b"xy"])),
    )
    first = SequenceTensors(spec_of(SequencePolicy(states=states))).first
    assert [tensor.shape for tensor in first] == [(1, 2), (1, 2), (1, 1, 2), (1, 3, 2), (1, 1)]
    assert [tensor.buffer for tensor in first] == [bytes(16), bytes(8), bytes(8), bytes(range(24)), b"\2\0\0\0xy"]


@pytest.mark.parametrize(
    ("datatype", "dims", "initial"),
    [(INT64, (2,), bytes(15)), (INT64, (2,), bytes(8)), (FP32, (-1, 3), bytes(16)), (BYTES, (2,), pack_bytes([b"x"])),
     (BYTES, (1,), b"\xff\0\0\0x")],
)  # fmt: skip
def test_a_first_state_of_another_size_is_refused(datatype: object, dims: tuple[int, ...], initial: bytes) -> None:
    state = StateTensor("a", "a_out", datatype, dims, initial)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="state 'a': its initial_state file holds"):
        SequenceTensors(spec_of(SequencePolicy(states=(state,))))


def test_a_state_is_the_row_s_own_and_a_copy() -> None:
    states = (StateTensor("a", "a_out", INT64, (1,)), StateTensor("b", "sum", BYTES, (1,)))
    spec = spec_of(SequencePolicy(states=states))
    tensors = SequenceTensors(spec)
    assert [tensor.name for tensor in tensors.model_spec.outputs] == ["sum", "id", "flags", "a_out"], "one is served"
    data = bytearray(np.array([4, 5, 6], "<i8").tobytes())
    outputs = {
        0: OutputTensor("sum", BYTES, (3, 1), pack_bytes([b"x", b"longer", b"z"])),
        3: OutputTensor("a_out", INT64, (3, 1), memoryview(data)),
    }
    batch = FinishedBatch("1", 3, outputs, "b", 1, 0.0, 0.0, "full", (0, 0, 0))
    found = tensors.next_states(batch, 1)
    data[:] = bytes(24)
    assert [(tensor.shape, tensor.buffer) for tensor in found] == [
        ((1, 1), np.array([5], "<i8").tobytes()), ((1, 1), pack_bytes([b"longer"]))
    ]  # fmt: skip


def test_made_up_requests_get_everything_for_each_row() -> None:
    spec = spec_of(SequencePolicy(controls=CONTROLS, states=(StateTensor("a", "a_out", BYTES, (2,)),)))
    own = InputTensor(INT64, (3, 1), None, bytes(24))
    made = with_added(spec, [own])
    assert [tensor.shape for tensor in made if tensor is not None] == [(3, 1)] * 5 + [(3, 2)]
    last = made[-1]
    assert last is not None
    assert last.buffer == zeros(BYTES, 6)
    plain = replace(spec, scheduling=PLAIN)
    assert with_added(plain, [own]) == [own]
    assert as_executed(plain) is plain


# -- batching ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "delay_s", "preferred"),
    [
        (SequencePolicy(), 0.0, ()),
        (SequencePolicy(max_queue_delay_s=1.0), 0.0, ()),
        (SequencePolicy(max_queue_delay_s=1.0, minimum_slot_utilization=0.6), 1.0, (5, 6, 7, 8)),
        (SequencePolicy(max_queue_delay_s=1.0, minimum_slot_utilization=0.01), 1.0, tuple(range(1, 9))),
        (SequencePolicy("oldest", max_queue_delay_s=1.0, preferred_batch_sizes=(4, 8, 16)), 1.0, (4, 8)),
        (SequencePolicy("oldest"), 0.25, ()),
    ],
)
def test_when_batches_go(policy: SequencePolicy, delay_s: float, preferred: tuple[int, ...]) -> None:
    found = as_executed(spec_of(policy, batching=BatchPolicy(8, True, 0.25, (3,), "split"))).policy
    assert (found.max_queue_delay_s, found.preferred_batch_sizes, found.oversize) == (delay_s, preferred, "reject")


# -- against the file --------------------------------------------------------------------------------------------------


def file(name: str, datatype: str, *shape: int | None) -> SignatureTensor:
    return SignatureTensor(name, DATATYPE[datatype], shape)


CONTROL = SequencePolicy(controls=(ControlInput("START", "CONTROL_SEQUENCE_START", INT32),))
STATE = SequencePolicy(states=(StateTensor("s", "s_out", FP32, (-1, 2)),))
TWICE = SequencePolicy(states=(StateTensor("s", "s_out", FP32, (1,)), StateTensor("t", "s_out", FP32, (1,))))


@pytest.mark.parametrize(
    ("policy", "size", "inputs", "outputs", "text"),
    [
        (CONTROL, 4, [file("START", "INT32", None, 1)], [], None),
        (CONTROL, 4, [file("START", "INT32", None, None)], [], None),
        (
            CONTROL,
            4,
            [file("START", "INT32", None)],
            [],
            r"control_input 'START' needs shape \[-1, 1\], .* says \[-1\]",
        ),
        (CONTROL, 4, [file("START", "INT32", 1, 1)], [], "the first dimension is the batch"),
        (CONTROL, 4, [file("START", "INT32", None, 2)], [], "control_input 'START' needs shape"),
        (CONTROL, 0, [file("START", "INT32", 1)], [], None),
        (CONTROL, 0, [file("START", "INT32", None, 1)], [], r"needs shape \[1\]"),
        (STATE, 4, [file("s", "FP32", None, None, 2)], [file("s_out", "FP32", None, 7, 2)], None),
        (STATE, 4, [file("s", "FP32", None, None, 3)], [file("s_out", "FP32", None, 7, 2)], "state input 's' needs"),
        (STATE, 4, [file("s", "FP32", None, None, 2)], [file("s_out", "FP32", None, 2)], "state output 's_out' needs"),
        (TWICE, 4, [], [], "names the tensor 's_out' twice"),
    ],
)
def test_shapes_are_those_of_the_file(
    policy: SequencePolicy, size: int, inputs: list[SignatureTensor], outputs: list[SignatureTensor], text: str | None
) -> None:
    spec = spec_of(policy, size)
    if text is None:
        check_sequences(spec, inputs, outputs)
        return
    with pytest.raises(ConfigError, match=text):
        check_sequences(spec, inputs, outputs)


def test_what_the_gateway_fills_is_not_the_clients_too() -> None:
    spec = spec_of(CONTROL)
    spec = replace(spec, inputs=(*spec.inputs, TensorSpec("START", INT32, (1,))))
    with pytest.raises(ConfigError, match="lists input 'START', which sequence_batching fills; remove it"):
        check_sequences(spec, [], [])


def test_ragged_rows_have_no_sequences() -> None:
    spec = replace(spec_of(CONTROL), inputs=(TensorSpec("number", INT64, (-1,), ragged=True),))
    with pytest.raises(ConfigError, match="together with ragged batching is not supported"):
        check_sequences(spec, [], [])
