"""Seats, the backlog, idleness and the bounds of sequences, without a clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.admission import MAX_GROUPS
from gateway.core.model import BatchPolicy
from gateway.core.request import InferRequest, InputTensor, SequenceStep
from gateway.core.sequencing import OpenSequence, SequenceRoom, admit_step
from gateway.core.tensor import DATATYPE
from gateway.errors import Overloaded, TooLarge

INT64 = DATATYPE["INT64"]


def begin(room: SequenceRoom, identity: int | str, available: tuple[bool, ...] = (True, True)) -> OpenSequence:
    sequence = OpenSequence(identity, None, ())
    room.begin(sequence, available)
    return sequence


def seats(*sequences: OpenSequence) -> list[tuple[int, int] | None]:
    return [None if s.seat is None else (s.seat.lane, s.seat.row) for s in sequences]


def state(elements: int) -> InputTensor:
    return InputTensor(INT64, (1, elements), None, bytes(8 * elements))


def test_seats_are_given_row_by_row_over_all_lanes() -> None:
    room = SequenceRoom(2, 2, 1.0)
    found = [begin(room, identity) for identity in range(5)]
    assert seats(*found) == [(0, 0), (1, 0), (0, 1), (1, 1), None]
    assert room.count == 5


def test_a_lane_that_is_not_available_gets_a_sequence_last() -> None:
    room = SequenceRoom(2, 2, 1.0)
    found = [begin(room, identity, (False, True)) for identity in range(4)]
    assert seats(*found) == [(1, 0), (1, 1), (0, 0), (0, 1)]


def test_a_seat_goes_to_whoever_waits_longest_and_not_to_newcomers() -> None:
    room = SequenceRoom(1, 1, 1.0)
    first, second, third = (begin(room, identity, (True,)) for identity in "abc")
    assert room.end(first) is second
    assert seats(first, second, third) == [None, (0, 0), None]
    assert (first.over, second.over) == (True, False)
    fourth = begin(room, "d", (True,))
    assert room.end(third) is None, "it had no seat to pass on"
    assert room.end(second) is fourth
    assert room.end(fourth) is None
    assert (room.count, room.highest_row(0)) == (0, -1)
    assert seats(begin(room, "e", (True,))) == [(0, 0)]


def test_the_lowest_free_row_is_taken_first() -> None:
    room = SequenceRoom(1, 0, 1.0)
    found = [begin(room, identity, (True,)) for identity in range(5)]
    room.end(found[3])
    room.end(found[1])
    assert room.highest_row(0) == 4
    assert seats(begin(room, "x", (True,)), begin(room, "y", (True,)), begin(room, "z", (True,))) == [
        (0, 1), (0, 3), (0, 5)
    ]  # fmt: skip


def test_an_id_names_the_newest_sequence_that_steps_may_join() -> None:
    room = SequenceRoom(1, 4, 1.0)
    old = begin(room, 7, (True,))
    assert room.find(7) is old
    room.close(old)
    assert room.find(7) is None
    new = begin(room, 7, (True,))
    room.end(old)
    assert room.find(7) is new, "the end of the old one is not the new one's"


def test_whoever_rests_longest_oversleeps_first() -> None:
    room = SequenceRoom(1, 4, 2.0)
    first, second, third = (begin(room, identity, (True,)) for identity in "abc")
    for at, sequence in enumerate((first, second, third)):
        room.rests(sequence, 10.0 + at)
    room.busy(first)
    assert room.next_idle() == 13.0
    assert room.overslept(12.999) is None
    assert room.overslept(13.0) is second
    room.end(second)
    assert room.overslept(13.5) is None
    room.rests(first, 13.6)
    assert room.overslept(100.0) is third
    room.end(third)
    room.end(first)
    assert room.next_idle() is None


def test_bytes_of_states_are_those_of_sequences_that_live() -> None:
    room = SequenceRoom(1, 4, 1.0)
    first, second = begin(room, 1, (True,)), begin(room, 2, (True,))
    room.keep(first, (state(2), state(3)))
    room.keep(second, (state(1),))
    room.keep(second, (state(4),))
    assert room.state_bytes == 40 + 32
    room.restart(first, (state(100),))
    assert room.state_bytes == 32, "the first state is not the sequence's own"
    assert first.states[0].shape == (1, 100)
    room.end(second)
    assert room.state_bytes == 0


def request(nbytes: int = 8, *, end: bool = False) -> InferRequest:
    made = InferRequest((), 1, nbytes, None, (0,), None)
    made.sequence = SequenceStep(1, False, end)
    return made


@pytest.mark.parametrize(
    ("waiting", "nbytes", "reason"),
    [((9, 0, 0), 8, None), ((10, 0, 0), 8, "queue_rows"), ((0, 92, 0), 8, None), ((0, 93, 0), 8, "queue_bytes"),
     ((0, 0, 0), 101, "too_large"), ((0, 0, MAX_GROUPS - 1), 8, None), ((0, 0, MAX_GROUPS), 8, "queue_shapes")],
)  # fmt: skip
def test_what_may_wait(waiting: tuple[int, int, int], nbytes: int, reason: str | None) -> None:
    policy = BatchPolicy(4, max_queue_rows=10, max_queue_bytes=100)
    rejected = admit_step(SequenceRoom(1, 4, 1.0), policy, waiting, request(nbytes), begins=True)
    assert (None if rejected is None else rejected.reason) == reason
    assert rejected is None or rejected.error is (TooLarge if reason == "too_large" else Overloaded)


def test_how_many_may_live_and_what_their_states_may_hold() -> None:
    policy = BatchPolicy(4, max_queue_rows=2, max_queue_bytes=100)
    room = SequenceRoom(1, 4, 1.0)
    first, _ = begin(room, 1, (True,)), begin(room, 2, (True,))
    assert admit_step(room, policy, (0, 0, 0), request(), begins=False) is None
    rejected = admit_step(room, policy, (0, 0, 0), request(), begins=True)
    assert rejected is not None
    assert rejected.reason == "queue_sequences"
    room.keep(first, (state(13),))
    rejected = admit_step(room, policy, (0, 0, 0), request(), begins=False)
    assert rejected is not None
    assert rejected.reason == "sequence_states"
    assert admit_step(room, policy, (0, 0, 0), request(end=True), begins=False) is None, "an end makes room"


@given(
    st.lists(st.tuples(st.sampled_from(["begin", "end", "close", "rest", "busy"]), st.integers(0, 20)), max_size=80),
    st.integers(1, 3), st.integers(0, 3),
)  # fmt: skip
def test_no_seat_is_shared_and_none_is_lost(moves: list[tuple[str, int]], lanes: int, rows: int) -> None:
    room = SequenceRoom(lanes, rows, 1.0)
    alive: list[OpenSequence] = []
    for at, (move, index) in enumerate(moves):
        if move == "begin":
            alive.append(begin(room, at, (True,) * lanes))
        elif alive:
            sequence = alive[index % len(alive)]
            if move == "end":
                alive.remove(sequence)
                heir = room.end(sequence)
                assert heir is None or heir in alive
            elif move == "close":
                room.close(sequence)
            elif move == "rest" and sequence.seat is not None:
                room.rests(sequence, float(at))
            else:
                room.busy(sequence)
        taken = [seat for seat in seats(*alive) if seat is not None]
        assert len(taken) == len(set(taken)) == min(len(alive), lanes * rows or len(alive))
        assert all(row < rows or not rows for _, row in taken)
        assert [room.highest_row(lane) for lane in range(lanes)] == [
            max([row for of, row in taken if of == lane], default=-1) for lane in range(lanes)
        ]
        assert room.count == len(alive)
    for sequence in alive:
        room.end(sequence)
    assert (room.count, room.state_bytes, room.next_idle()) == (0, 0, None)
