"""The board: what a thread wrote is what the other process reads, whatever became of the first."""

from __future__ import annotations

import os

from gateway.workers.board import SEATS, Board, Progress, Seat, adopt


class Interrupt:
    terminate = False


def seats(count: int) -> tuple[Board, list[Seat]]:
    board = Board()
    words = adopt(os.dup(board.fd))
    board.release()
    return board, [Seat(words, index, Interrupt()) for index in range(count)]


def test_it_follows_a_batch() -> None:
    board, (seat,) = seats(1)
    assert board.progress() == {}
    seat.take(7)
    assert board.progress() == {7: Progress.NOT_BEGUN}
    seat.begin(7)
    assert board.progress() == {7: Progress.EXECUTING}
    seat.finish(7)
    assert board.progress() == {7: Progress.FINISHED}
    seat.take(8)
    assert board.progress() == {8: Progress.NOT_BEGUN}


def test_each_thread_has_a_word_of_its_own() -> None:
    board, taken = seats(SEATS)
    taken[0].begin(1)
    taken[-1].begin(2)
    assert board.progress() == {1: Progress.EXECUTING, 2: Progress.EXECUTING}


def test_only_the_batch_that_is_meant_is_cancelled() -> None:
    _, (seat,) = seats(1)
    seat.take(7)
    assert not seat.cancel(6)
    assert not seat.interrupt.terminate
    assert seat.cancel(7), "a batch that waits for its turn can be given up too"
    seat.begin(7)
    assert seat.interrupt.terminate
    assert seat.cancelled
    seat.finish(7)
    assert not seat.cancel(7), "too late"
    seat.take(8)
    assert (seat.cancelled, seat.interrupt.terminate) == (False, False), "the next batch must not pay"
