"""A replica behind a configuration: other order, fewer outputs, other dims; bytes untouched."""

from __future__ import annotations

import struct

import pytest

from gateway.backends.binding import Binding, BoundReplica
from gateway.backends.interface import Batch, Failure, FailureKind, Success
from gateway.core.batchability import SignatureTensor
from gateway.core.model import BatchPolicy, ModelSpec, TensorSpec
from gateway.core.request import BatchInput, InputTensor, OutputTensor
from gateway.core.scheduling import PLAIN, BatchInputTensor, BatchOutputTensor, Scheduling
from gateway.core.tensor import DATATYPE
from tests.fakes import PlainBatch, PlainReplica

FP32, INT32, INT64 = DATATYPE["FP32"], DATATYPE["INT32"], DATATYPE["INT64"]
FILE_INPUTS = (SignatureTensor("a", FP32, (None, 3)), SignatureTensor("b", INT64, (None,)))
FILE_OUTPUTS = (SignatureTensor("p", FP32, (None, 3)), SignatureTensor("q", INT64, (None, None)))
A, B = TensorSpec("a", FP32, (3,)), TensorSpec("b", INT64, ())
P, Q = TensorSpec("p", FP32, (3,)), TensorSpec("q", INT64, (-1,))


def spec(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], size: int = 8) -> ModelSpec:
    return ModelSpec("m", "1", "", "", inputs, outputs, BatchPolicy(size))


def binding(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Binding:
    return Binding(spec(inputs, outputs), FILE_INPUTS, FILE_OUTPUTS)


RAGGED_INPUTS = (SignatureTensor("n", INT32, (None,)), SignatureTensor("x", FP32, (None,)))
RAGGED_OUTPUTS = (SignatureTensor("y", FP32, (None, 1)), SignatureTensor("z", FP32, (None, None)))


def ragged(scheduling: Scheduling, outputs: tuple[TensorSpec, ...]) -> Binding:
    """`x` comes in rows of any length; the model has it flat, and is told each request's length by `n`."""
    x = TensorSpec("x", FP32, (-1, 2), ragged=True)
    return Binding(
        ModelSpec("m", "1", "", "", (x,), outputs, BatchPolicy(8), scheduling=scheduling),
        RAGGED_INPUTS,
        RAGGED_OUTPUTS,
    )


COUNTS = (BatchInputTensor("BATCH_ELEMENT_COUNT", ("n",), INT32, ("x",)),)


def test_what_is_made_for_a_batch_is_added_where_the_model_has_it() -> None:
    served = ragged(Scheduling(batch_inputs=COUNTS), (TensorSpec("y", FP32, (1,)),))
    assert not served.neutral
    assert not Binding(served.spec, RAGGED_INPUTS[::-1], RAGGED_OUTPUTS).neutral  # `n` last, but nobody else makes it
    parts = [InputTensor(FP32, (1, count, 2), None, bytes(8 * count)) for count in (3, 0, 1)]
    flat, made = served.batch_inputs([BatchInput(0, FP32, (8,), 32, parts)])
    assert (flat.index, flat.shape, flat.nbytes, flat.parts) == (1, (8,), 32, parts)
    assert (made.index, made.shape, made.nbytes, made.datatype) == (0, (3,), 12, INT32)
    assert made.parts[0].buffer == struct.pack("<3i", 6, 0, 2)


def test_one_request_is_laid_flat_and_described_too() -> None:
    served = ragged(Scheduling(batch_inputs=COUNTS), (TensorSpec("y", FP32, (1,)),))
    made, flat = served.model_inputs([InputTensor(FP32, (1, 3, 2), None, bytes(24))])
    assert made is not None
    assert flat is not None
    assert (flat.shape, made.shape, made.buffer) == ((6,), (1,), struct.pack("<i", 6))


def test_an_output_that_is_cut_later_has_no_dims_yet() -> None:
    """Its dims are the members', so they cannot be enforced on the whole; those of other outputs are."""
    outputs = (TensorSpec("y", FP32, (1,)), TensorSpec("z", FP32, (3,)))
    z = OutputTensor("z", FP32, (1, 6), bytes(24))
    scatter = Scheduling(batch_outputs=(BatchOutputTensor(("z",), ("x",)),))
    assert ragged(scatter, outputs).served_output(1, z) is z
    with pytest.raises(ValueError, match=r"shape \[6\] where \[3\] was expected"):
        ragged(PLAIN, outputs).served_output(1, z)


class Recorded(PlainReplica):
    """A replica that keeps what it is given; fits `Replica`."""

    name, available, free_slots, in_flight = "onnx-1", True, 1, 0

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.timeout_s = 0.0
        self.listener: object = None

    def execute(self, batch: Batch, timeout_s: float, /) -> None:
        self.batch, self.timeout_s = batch, timeout_s

    def set_listener(self, changed: object, /) -> None:
        self.listener = changed


class Asked(PlainBatch):
    """Fits `Batch`."""

    rows = 2

    def __init__(self, inputs: list[BatchInput], outputs: tuple[int, ...]) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.outcomes: list[Success | Failure] = []

    def done(self, outcome: Success | Failure, /) -> None:
        self.outcomes.append(outcome)


@pytest.mark.parametrize(
    ("inputs", "outputs", "neutral"),
    [
        ((A, B), (P, Q), True),
        ((A,), (P,), True),  # what is left out stands behind what is served
        ((B, A), (P, Q), False),
        ((A, B), (Q,), False),
        ((TensorSpec("a", FP32, (1, 3), reshape=(3,)), B), (P, Q), False),
        ((A, B), (P, TensorSpec("q", INT64, (2,))), False),  # narrower than the file: to be enforced
    ],
)
def test_it_knows_whether_there_is_anything_to_do(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], neutral: bool
) -> None:
    assert binding(inputs, outputs).neutral is neutral


def test_a_batch_on_its_way_and_back() -> None:
    served = binding((B, TensorSpec("a", FP32, (1, 3), reshape=(3,))), (Q, TensorSpec("p", FP32, (3, 1), reshape=(3,))))
    replica = Recorded()
    part_b, part_a = InputTensor(INT64, (2,), None, b"b" * 16), InputTensor(FP32, (2, 1, 3), None, b"a" * 24)
    asked = Asked([BatchInput(0, INT64, (2,), 16, [part_b]), BatchInput(1, FP32, (2, 1, 3), 24, [part_a])], (0, 1))
    BoundReplica(replica, served).execute(asked, 1.5)
    given = replica.batch
    assert given is not None
    assert replica.timeout_s == 1.5
    assert [(i.index, i.shape, i.nbytes, list(i.parts)) for i in given.inputs] == [
        (1, (2,), 16, [part_b]),
        (0, (2, 3), 24, [part_a]),
    ]
    assert given.outputs == (1, 0)
    assert given.rows == 2
    q, p = OutputTensor("q", INT64, (2, 1), b"q" * 16), OutputTensor("p", FP32, (2, 3), b"p" * 24)
    given.done(Success([q, p], 1, 2, 3))
    (outcome,) = asked.outcomes
    assert isinstance(outcome, Success)
    assert [(o.name, o.shape, o.data) for o in outcome.outputs] == [
        ("q", (2, 1), b"q" * 16),
        ("p", (2, 3, 1), b"p" * 24),
    ]
    assert (outcome.compute_input_ns, outcome.compute_infer_ns, outcome.compute_output_ns) == (1, 2, 3)


@pytest.mark.parametrize(
    "output", [TensorSpec("q", INT64, (2,)), TensorSpec("q", INT64, (1, 2), reshape=(2,))], ids=["narrower", "reshaped"]
)
def test_an_output_that_contradicts_what_is_served_reaches_nobody(output: TensorSpec) -> None:
    replica, asked = Recorded(), Asked([], (0,))
    BoundReplica(replica, binding((A, B), (output,))).execute(asked, 1.0)
    assert replica.batch is not None
    replica.batch.done(Success([OutputTensor("q", INT64, (2, 3), b"q" * 48)], 1, 2, 3))
    (outcome,) = asked.outcomes
    assert isinstance(outcome, Failure)
    assert outcome.kind is FailureKind.SUSPECT
    assert outcome.message == "output 'q' has shape [3] where [2] was expected, as config.pbtxt says"


def test_a_failure_passes_as_it_is() -> None:
    replica, asked = Recorded(), Asked([], (0,))
    BoundReplica(replica, binding((B, A), (P,))).execute(asked, 1.0)
    assert replica.batch is not None
    failure = Failure(FailureKind.TIMEOUT, "why")
    replica.batch.done(failure)
    assert asked.outcomes == [failure]


def test_tensors_of_a_request_in_the_models_order() -> None:
    served = binding((B, TensorSpec("a", FP32, (1, 3), optional=True, reshape=(3,))), (P,))
    b = InputTensor(INT64, (2,), [1, 2], None)
    first, second = served.model_inputs([b, None])
    assert first is None
    assert second is not None
    assert (second.shape, second.values) == ((2,), [1, 2])
    full = served.model_inputs([b, InputTensor(FP32, (2, 1, 3), None, b"a" * 24)])
    assert full[0] is not None
    assert full[0].shape == (2, 3)


def test_it_looks_like_the_replica_it_is() -> None:
    replica = Recorded()
    bound = BoundReplica(replica, binding((B, A), (P,)))
    assert (bound.name, bound.available, bound.free_slots, bound.in_flight) == ("onnx-1", True, 1, 0)
    bound.set_listener(print)
    assert replica.listener is print
