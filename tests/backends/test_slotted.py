"""Fixed rows: who is where, what the others hold, and the answer back in its order."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from gateway.backends.interface import Batch, Failure, FailureKind, Success
from gateway.backends.slotted import Slots, SlottedReplica
from gateway.core.assembly import write_parts
from gateway.core.request import BatchInput, InputTensor, OutputTensor
from gateway.core.sequence_tensors import SlotFlag
from gateway.core.tensor import DATATYPE, pack_bytes, unpack_bytes
from tests.fakes import PlainBatch, PlainReplica

INT64, BYTES, BOOL = DATATYPE["INT64"], DATATYPE["BYTES"], DATATYPE["BOOL"]
READY_PLACE = 2


class _Inner(PlainReplica):
    """The replica behind: keeps what it was given."""

    name = "onnx-1"
    available = True
    free_slots = 1
    in_flight = 0

    def __init__(self) -> None:
        self.batch: Any = None

    def execute(self, batch: Batch, timeout_s: float, /) -> None:
        self.batch = batch

    def set_listener(self, changed: Any, /) -> None:
        self.changed = changed


class _Given(PlainBatch):
    def __init__(self, slots: list[int], *, flags: bool = True) -> None:
        rows = len(slots)
        numbers = [InputTensor(INT64, (1, 2), [slot, slot], None) for slot in slots]
        words = [InputTensor(BYTES, (1, 1), None, pack_bytes([b"w%d" % slot])) for slot in slots]
        plain = InputTensor(BOOL, (1, 1), None, b"\1")
        ready = [SlotFlag(plain, slot) if flags else plain for slot in slots]
        self.inputs = [
            BatchInput(0, INT64, (rows, 2), 16 * rows, numbers),
            BatchInput(1, BYTES, (rows, 1), sum(len(word.buffer or b"") for word in words), words),
            BatchInput(READY_PLACE, BOOL, (rows, 1), rows, ready),
        ]
        self.outputs = (0, 1)
        self.rows = rows
        self.outcome: Success | Failure | None = None

    def done(self, outcome: Success | Failure, /) -> None:
        self.outcome = outcome


def hand_over(given: _Given, highest: int) -> _Inner:
    inner = _Inner()
    idle = {READY_PLACE: InputTensor(BOOL, (1, 1), None, b"\0")}
    SlottedReplica(inner, Slots(READY_PLACE, idle, lambda: highest)).execute(given, 1.0)
    return inner


def written(given: BatchInput) -> bytes:
    data = bytearray(given.nbytes)
    write_parts(given, memoryview(data))
    return bytes(data)


@pytest.mark.parametrize(
    ("slots", "highest", "rows"),
    [([0], 0, 1), ([2], 0, 3), ([0], 3, 4), ([3, 0], 3, 4), ([1, 0, 2], 2, 3), ([5, 2, 4], 5, 6)],
)
def test_everybody_is_in_the_own_row(slots: list[int], highest: int, rows: int) -> None:
    given = _Given(slots)
    batch = hand_over(given, highest).batch
    assert batch.rows == rows
    assert [of.shape for of in batch.inputs] == [(rows, 2), (rows, 1), (rows, 1)]
    there = [row if row in slots else None for row in range(rows)]
    numbers = [row or 0 for row in there for _ in range(2)]
    assert written(batch.inputs[0]) == struct.pack(f"<{2 * rows}q", *numbers)
    words = [b"" if row is None else b"w%d" % row for row in there]
    assert unpack_bytes(written(batch.inputs[1])) == words
    assert written(batch.inputs[2]) == bytes(row is not None for row in there)
    answer = [
        OutputTensor("n", INT64, (rows, 1), struct.pack(f"<{rows}q", *[100 + row for row in range(rows)])),
        OutputTensor("w", BYTES, (rows, 1), pack_bytes([b"a%d" % row for row in range(rows)])),
    ]
    batch.done(Success(answer, 1, 2, 3))
    assert isinstance(given.outcome, Success)
    numbers_out, words_out = given.outcome.outputs
    assert struct.unpack(f"<{len(slots)}q", numbers_out.data) == tuple(100 + slot for slot in slots)
    assert unpack_bytes(words_out.data) == [b"a%d" % slot for slot in slots]
    assert {output.shape for output in given.outcome.outputs} == {(len(slots), 1)}
    assert (given.outcome.compute_input_ns, given.outcome.compute_infer_ns, given.outcome.compute_output_ns) == (
        1,
        2,
        3,
    )


@pytest.mark.parametrize("shape", [(2, 1), (4, 1), ()])
def test_an_answer_with_other_rows_is_broken(shape: tuple[int, ...]) -> None:
    given = _Given([2, 0])
    batch = hand_over(given, 2).batch
    batch.done(Success([OutputTensor("n", INT64, shape, bytes(8 * (shape or (1,))[0]))], 0, 0, 0))
    assert isinstance(given.outcome, Failure)
    assert given.outcome.kind is FailureKind.BROKEN
    assert "for a batch of 3 rows" in given.outcome.message


def test_a_failure_is_passed_on() -> None:
    given = _Given([1])
    failure = Failure(FailureKind.SUSPECT, "no")
    hand_over(given, 1).batch.done(failure)
    assert given.outcome is failure


@pytest.mark.parametrize("given", [_Given([1, 1]), _Given([0, 1], flags=False)])
def test_rows_without_a_slot_of_their_own_are_not_executed(given: _Given) -> None:
    with pytest.raises(ValueError, match="2 rows in the slots"):
        hand_over(given, 1)


def test_it_is_the_replica_behind_it() -> None:
    inner = _Inner()
    replica = SlottedReplica(inner, Slots(READY_PLACE, {}, lambda: 0))
    assert (replica.name, replica.available, replica.free_slots, replica.in_flight) == ("onnx-1", True, 1, 0)
    heard: list[str] = []
    replica.set_listener(lambda: heard.append("changed"))
    inner.changed()
    assert heard == ["changed"]
