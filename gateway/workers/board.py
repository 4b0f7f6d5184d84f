"""What each thread of a worker is doing, in memory that outlives the process: so a death can be put down to a batch.

The board is a small shared memory file with one 64-bit word per thread: the batch the thread was given last, and how
far it is with it in the two highest bits. The worker writes, the gateway reads it when the process is gone. A word is
written by one thread only and at once (eight aligned bytes), so no lock is needed and whatever is read was true.

Rules:
- EXECUTING is written before the first byte of a batch is looked at by the model, FINISHED before its answer is sent.
  Hence a batch without answer that is not on the board, or waits there, was never begun.
- Two stores per batch are all it costs, some tenths of a microsecond.
"""

from __future__ import annotations

import enum
import mmap
import os
import threading
from typing import Any, Final

from gateway.workers.shm import create_area

SEATS: Final = 4096
"""Threads a worker may have; more batches in flight wait for one of them."""
_BYTES: Final = 8 * SEATS
_WAITING: Final = 1 << 63
_FINISHED: Final = 1 << 62
_BATCH: Final = _FINISHED - 1


class Progress(enum.Enum):
    """How far a worker got with a batch that it did not answer."""

    NOT_BEGUN = "not_begun"
    EXECUTING = "executing"
    FINISHED = "finished"
    """Executed, but the answer did not get out."""


class Board:
    """The gateway's side: reads."""

    def __init__(self) -> None:
        """Raises OSError."""
        self.fd = create_area("gateway-board")
        try:
            os.posix_fallocate(self.fd, 0, _BYTES)
            self._words = memoryview(mmap.mmap(self.fd, _BYTES, prot=mmap.PROT_READ)).cast("Q")
        except OSError:
            os.close(self.fd)
            raise

    def __repr__(self) -> str:
        return f"<Board {len(self.progress())} batches>"

    def release(self) -> None:
        """Give up the descriptor, once the process has it; the memory stays readable."""
        os.close(self.fd)
        self.fd = -1

    def progress(self) -> dict[int, Progress]:
        """The last batch of every thread. What is not in it was not begun, or was answered long ago."""
        return {word & _BATCH: _progress(word) for word in self._words.tolist() if word}


def _progress(word: int) -> Progress:
    if word & _WAITING:
        return Progress.NOT_BEGUN
    return Progress.FINISHED if word & _FINISHED else Progress.EXECUTING


def adopt(fd: int) -> memoryview:
    """The worker's side of a board: its words. Closes `fd`. Raises OSError."""
    try:
        return memoryview(mmap.mmap(fd, _BYTES)).cast("Q")
    finally:
        os.close(fd)


class Seat:
    """One thread's word, and the switch that ends its run. `interrupt`: onnxruntime's RunOptions; a run that is given
    them ends before its next node once `terminate` is set."""

    __slots__ = ("_index", "_lock", "_words", "cancelled", "interrupt")

    def __init__(self, words: memoryview, index: int, interrupt: Any) -> None:
        self._words = words
        self._index = index
        self._lock = threading.Lock()
        self.interrupt = interrupt
        self.cancelled = False
        """Whether the batch at hand was to be given up; until the next one."""

    def take(self, batch: int) -> None:
        """This thread was given a batch and has not begun it."""
        if self.cancelled:
            self.cancelled = self.interrupt.terminate = False
        self._words[self._index] = batch | _WAITING

    def begin(self, batch: int) -> None:
        self._words[self._index] = batch

    def finish(self, batch: int) -> None:
        """From here on it can no longer be cancelled."""
        with self._lock:
            self._words[self._index] = batch | _FINISHED

    def cancel(self, batch: int) -> bool:
        """From another thread: give up `batch` if this thread has it; returns whether it has."""
        with self._lock:
            word = self._words[self._index]
            if word & _BATCH != batch or word & _FINISHED:
                return False
            self.cancelled = self.interrupt.terminate = True
            return True
